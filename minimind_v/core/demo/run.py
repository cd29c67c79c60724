"""The demo: the whole pipeline on the embedded world, with the functions of the real commands."""

from __future__ import annotations

import json
import platform
import random
import shlex
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file
from pathlib import Path
from typing import Any

import torch

from minimind_v.core.config.load import build_config
from minimind_v.core.data.images import blank_pixels
from minimind_v.core.demo import world
from minimind_v.core.demo.dataset import DemoSet, Test, write_pictures, write_pretrain, write_sft, write_test
from minimind_v.core.demo.generations import DEMO_GENERATIONS, DemoGeneration
from minimind_v.core.errors import RunError, UsageError
from minimind_v.core.evaluate.run import Scores, evaluate, held_out_dataset
from minimind_v.core.export.folder import export
from minimind_v.core.files import only_writer, read_notes, write_text
from minimind_v.core.formats.load import LoadedModel, load
from minimind_v.core.formats.request import ExportRequest
from minimind_v.core.generate.batch import Question, generate_many
from minimind_v.core.generate.sampling import GREEDY
from minimind_v.core.generate.session import Session
from minimind_v.core.hub.sources import SOURCES
from minimind_v.core.monitor.metrics import Listener, read_metrics
from minimind_v.core.outputs import check_folder
from minimind_v.core.pages.demo_report import Sample, write_report
from minimind_v.core.pages.run_report import read_run
from minimind_v.core.paths import DATASET_DIR, OUT_DIR
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.train.run import train

RESULTS = "summary.json", "report.html"
MARK = ".mmv-demo"  # a file in the folder of a demo, which may overwrite that folder


@dataclass(frozen=True)
class Size:
    """The size of the demo."""

    pretrain_rows: int = 3000
    sft_rows: int = 6000
    test_rows: int = 600
    pretrain_lr: float = 4e-3
    sft_lr: float = 1e-3


FULL = Size()
SHORT = Size(pretrain_rows=1200, sft_rows=1500, test_rows=300)  # for tests; less accurate
BATCH = 16  # rows of a step
EVALUATIONS = 3  # evaluations during pretraining, besides the one before it
PICTURES = "pictures"  # the folder of the picture files
EXAMPLE = "star"  # the picture of the example question


class Demo:
    """One run of the demo in its own folder, which has the standard folders inside."""

    def __init__(
        self,
        out: Path,
        seed: int,
        listener: Listener,
        announce: Callable[[str, list[str]], None],
        size: Size = FULL,
        demo: DemoGeneration = DEMO_GENERATIONS["2025"],
    ) -> None:
        """`announce` gets the title of each stage and the equivalent commands."""
        self.out, self.seed, self.listener, self.announce, self.size = out, seed, listener, announce, size
        self.demo = demo
        self.options = f"--generation {demo.name} --seed {seed}" + " --short" * (size == SHORT)
        self.seconds: dict[str, float] = {}
        self.runs, self.dataset = out / OUT_DIR, out / DATASET_DIR
        self.weights = {stage: self.runs / f"{demo.weights_name(stage)}.pth" for stage in ("lm", "pretrain", "sft")}
        self.vision, self.tokenizer = out / demo.generation.vision_model, out / demo.generation.tokenizer

    def run(self) -> dict[str, Any]:
        """Run all stages; returns the content of `summary.json`.

        Raises UsageError if the folder has other files or the finished demo of other options, RunError if another demo
        is running in it or it cannot be written.
        """
        self._refuse_to_replace()
        with only_writer(self.out / MARK):
            self._refuse_to_replace()  # another demo may have written it meanwhile
            write_text(self.out / MARK, json.dumps({"made_by": "mmv demo"}) + "\n")
            again = f"the demo in {self.out} is not finished; the same command starts it again from the beginning"
            try:
                self._clear()
                return self._run()
            except OSError as error:
                raise RunError(f"{error.strerror or error} — {again}") from error
            except (KeyboardInterrupt, SystemExit):
                self.listener.lost(f"stopped — {again}")
                raise

    def _run(self) -> dict[str, Any]:
        started = time.perf_counter()
        sft = self.weights["sft"]
        tests = [["--data", self.dataset / f"heldout_{name}_data.jsonl"] for name in ("scenes", "pairs")]
        self._stage("assets", "assets: drawing the world", [SOURCES["dataset"].command()], self._assets)
        before = self._stage("before", "before training: the model guesses", [], lambda: self._score(self._untrained()))
        for stage, title in (("pretrain", "pretraining on captions"), ("sft", "fine-tuning on questions")):
            self._stage(stage, title, [_command("train", stage, *self._flags(stage))], partial(self._train, stage))
        loaded = load(sft, device="cpu")
        after = self._stage(
            "eval", "evaluation: new scenes, with their images and with blank ones, and new pairs",
            [_command("eval", "--model", sft, *tests[0], "--blind"), _command("eval", "--model", sft, *tests[1])],
            lambda: self._score(loaded) | {"blank": self._evaluate(loaded, self.scenes_set, blank=True)},
        )  # fmt: skip
        picture, question = self.pictures[EXAMPLE]
        chat = _command("chat", "--model", sft, "--greedy", "--image", picture, question.text)
        answer = self._stage("chat", "chat: a question about a new image", [chat], lambda: self._chat(loaded))
        samples = self._samples(loaded)
        export = _command("convert", "--model", sft, "--to", "safetensors")
        self._stage("convert", "convert: the same weights as safetensors", [export], self._convert)
        summary = self._summary(before, after, answer, time.perf_counter() - started)
        summary_file, report = (self.out / name for name in RESULTS)
        write_text(summary_file, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        write_report(report, summary, self._curves(), self._use_of_images(), samples, world.knows())
        self._note_end()
        return summary

    def _stage(self, name: str, title: str, commands: list[str], work: Callable[[], Any]) -> Any:
        self.announce(title, commands)
        started = time.perf_counter()
        result = work()
        self.seconds[name] = round(time.perf_counter() - started, 2)
        return result

    def _refuse_to_replace(self) -> None:
        """Raises UsageError if the folder has files that no demo wrote."""
        mark = self.out / MARK
        check_folder(self.out)
        if self.out.exists() and not mark.exists():
            own = f".{MARK}.lock"
            if any(path.name != own for path in self.out.iterdir()):
                raise UsageError(f"{self.out} contains other files — name a new folder with --out")
        notes = read_notes(mark)
        if notes.get("options", self.options) != self.options:
            raise UsageError(
                f"{self.out} has the finished demo of {notes['options']} — name a new folder with --out, or remove it: "
                f"{shlex.join(['rm', '-r', str(self.out)])}"
            )
        for name, stamp in notes.get("weights", {}).items():
            if (path := self.out / "out" / name).exists() and _stamp(path) != stamp:
                raise UsageError(
                    f"{path} was changed after the demo wrote it — move it, or name a new folder with --out"
                )

    def _clear(self) -> None:
        """Remove the results of an earlier demo: none of them stays beside a part of this one."""
        for name in RESULTS:
            (self.out / name).unlink(missing_ok=True)
        for weights in self.weights.values():
            for ending in (".pth", ".safetensors", ".json"):
                weights.with_suffix(ending).unlink(missing_ok=True)
            if (run := weights.with_suffix("")).is_dir():
                shutil.rmtree(run)

    def _note_end(self) -> None:
        """Record the options and the state of the weights: weights that are changed later are not overwritten."""
        weights = {path.name: _stamp(path) for path in self.weights.values()}
        notes = {"made_by": "mmv demo", "options": self.options, "weights": weights}
        write_text(self.out / MARK, json.dumps(notes) + "\n")

    # --- stages -------------------------------------------------------------------------------------------------------

    def _assets(self) -> None:
        base = self.weights["lm"].with_suffix(".safetensors")
        with as_file(self.demo.assets) as assets:
            for folder in (self.vision, self.tokenizer):
                folder.mkdir(parents=True, exist_ok=True)
            for path in (assets / "vision").iterdir():
                shutil.copy(path, self.vision)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(assets / name, self.tokenizer)
            self.runs.mkdir(parents=True, exist_ok=True)
            shutil.copy(assets / base.name, base)
        export(ExportRequest(base), "pth", self.weights["lm"], overwrite=True)
        folder, size = self.dataset, self.size
        # Each set has its own random numbers, so that the size of one does not change another.
        dice = [random.Random(f"{self.seed}/{name}") for name in ("pretrain", "sft", "scenes", "pairs", "files")]
        _, pretrain_scenes = write_pretrain(folder, dice[0], size.pretrain_rows)
        _, sft_scenes = write_sft(folder, dice[1], size.sft_rows)
        scenes = pretrain_scenes | sft_scenes
        self.scenes_set, self.scenes = write_test(folder, "heldout_scenes", dice[2], size.test_rows, scenes, False)
        self.pairs_set, self.pairs = write_test(folder, "heldout_pairs", dice[3], size.test_rows, scenes, True)
        written = write_pictures(self.out / PICTURES, dice[4], scenes)
        self.pictures = {path.stem: (path, question) for path, question in written}

    def _untrained(self) -> LoadedModel:
        """The base with a fresh projector, as pretraining starts from it."""
        torch.manual_seed(self.seed)
        return load(self.weights["lm"], self.vision, self.tokenizer, "cpu", new_projector=True)

    def _flags(self, stage: str) -> list[Any]:
        options = self._options(stage).items()
        return [text for flag, value in options for text in (f"--{flag.replace('_', '-')}", value)]

    def _options(self, stage: str) -> dict[str, Any]:
        data, evaluation = self.dataset, dict[str, Any]()
        before = "lm" if stage == "pretrain" else "pretrain"
        if stage == "pretrain":  # it teaches the model to use images
            evaluation = {
                "eval_every": -(-self.size.pretrain_rows // BATCH // EVALUATIONS),
                "eval_task": "vqa",
                "eval_data": data / "heldout_pairs_data.jsonl",
                "eval_limit": 40,
            }
        return {
            "preset": self.demo.preset,
            "data": data / f"{stage}_data.jsonl",
            "images": data / f"{stage}_images.zip",
            "vision_model": self.vision,
            "tokenizer": self.tokenizer,
            "init": self.weights[before],
            "out": self.runs,
            "features": "off",  # each image is encoded once, and a cache would take 300 MB
            "epochs": 1,
            "batch_size": BATCH,
            "lr": self.size.pretrain_lr if stage == "pretrain" else self.size.sft_lr,
            "log_every": 10,
            "seed": self.seed,
            "device": "cpu",
            **evaluation,
        }

    def _train(self, stage: str) -> None:
        summary = train(build_config(stage, options=self._options(stage)), self.listener, overwrite=True)
        if summary.stopped_by:
            raise SystemExit(128 + summary.stopped_by)

    def _score(self, loaded: LoadedModel) -> dict[str, Scores]:
        return {"scenes": self._evaluate(loaded, self.scenes_set), "pairs": self._evaluate(loaded, self.pairs_set)}

    def _evaluate(self, loaded: LoadedModel, rows: DemoSet, blank: bool = False) -> Scores:
        tokenizer = loaded.tokenizer
        dataset = held_out_dataset(loaded.model, tokenizer, open_rows(rows.data, rows.images), 1536, blank)
        return evaluate(loaded.model, dataset, tokenizer.pad_id, tokenizer.eos_id, batch_size=32)

    def _chat(self, loaded: LoadedModel) -> str:
        """Ask the question about one of the image files."""
        picture, question = self.pictures[EXAMPLE]
        answer = "".join(Session(loaded.model, loaded.tokenizer, GREEDY).ask(question.text, [picture], 32)).strip()
        verdict = "correct" if answer == question.answer else f"wrong: the correct answer is {question.answer}"
        self.listener.message(f"   {question.text}\n   {answer} ({verdict})")
        return answer

    def _samples(self, loaded: LoadedModel, count: int = 12) -> list[Sample]:
        """Questions about held-out images, answered before training, after it, and with a blank image."""
        tests = self.scenes[:count] + self.pairs[:count]
        pictures = [test.picture for test in tests]
        before, after = (_answers(model, tests, pictures) for model in (self._untrained(), loaded))
        blank = _answers(loaded, tests, [blank_pixels(loaded.model.spec.image_size)] * len(tests))
        return [
            Sample(test.picture, test.question.text, test.question.answer, *given)
            for test, *given in zip(tests, before, after, blank, strict=True)
        ]

    def _convert(self) -> None:
        sft = self.weights["sft"]
        export(ExportRequest(sft), "safetensors", sft.with_suffix(".safetensors"), overwrite=True)

    # --- results ------------------------------------------------------------------------------------------------------

    def _curves(self) -> dict[str, list[tuple[int, float]]]:
        curves = {}
        for stage in ("pretrain", "sft"):
            records = read_metrics(self.weights[stage].with_suffix("") / "metrics.jsonl")
            curves[stage] = [(record["step"], record["loss"]) for record in records]
        return curves

    def _use_of_images(self) -> list[dict[str, Any]]:
        """The evaluations during pretraining."""
        return next(iter(read_run(self.weights["pretrain"].with_suffix("")).evaluations.values()), [])

    def _summary(
        self, before: dict[str, Scores], after: dict[str, Scores], answer: str, seconds: float
    ) -> dict[str, Any]:
        picture, question = self.pictures[EXAMPLE]
        work = ("before", "pretrain", "sft", "eval")
        return {
            "accuracy_heldout_scenes": after["scenes"].accuracy,
            "accuracy_heldout_pairs": after["pairs"].accuracy,
            "accuracy_blank": after["blank"].accuracy,
            "accuracy_before": before["scenes"].accuracy,
            "accuracy_before_pairs": before["pairs"].accuracy,
            "by_kind_scenes": _by_kind(after["scenes"], self.scenes),
            "by_kind_pairs": _by_kind(after["pairs"], self.pairs),
            "questions": {"scenes": after["scenes"].short_answers, "pairs": after["pairs"].short_answers},
            "example": {
                "model": str(self.weights["sft"]),
                "image": str(picture),
                "question": question.text,
                "answer": answer,
                "truth": question.answer,
            },
            "knows": world.knows(),
            "seconds": self.seconds,
            "seconds_training_and_evaluation": round(sum(self.seconds[name] for name in work), 2),
            "seconds_total": round(seconds, 2),
            "seed": self.seed,
            "seeds": {
                "demo": self.seed,
                "assets": json.loads((self.demo.assets / "figures.json").read_text())["seed"],
            },
            "rows": {"pretrain": self.size.pretrain_rows, "sft": self.size.sft_rows},
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        }


def _command(*arguments: Any) -> str:
    return shlex.join(["mmv", *map(str, arguments)])


def _answers(loaded: LoadedModel, tests: list[Test], images: list[Any]) -> list[str]:
    questions = [Question(test.question.text, [image]) for test, image in zip(tests, images, strict=True)]
    return [answer.strip() for answer in generate_many(loaded.model, loaded.tokenizer, questions, max_new_tokens=32)]


def _by_kind(scores: Scores, tests: list[Test]) -> dict[str, float]:
    """Accuracy for each kind of question. Rows of a test set hold one question each, in order."""
    right: dict[str, list[bool]] = defaultdict(list)
    for answers, test in zip(scores.answers.values(), tests, strict=True):
        right[test.question.kind] += [bool(answer) for answer in answers]
    return {kind: round(sum(marks) / len(marks), 4) for kind, marks in sorted(right.items())}


def _stamp(path: Path) -> list[int]:
    """Size and modification time of a file."""
    return [path.stat().st_size, path.stat().st_mtime_ns]
