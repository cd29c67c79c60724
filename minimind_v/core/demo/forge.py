"""Trains the demo's assets of a generation: a tokenizer, a tiny vision encoder and a text-only language model.

    python -m minimind_v.core.demo.forge --generation 2025 --seed 7 --out minimind_v/core/demo/assets

Offline work of about an hour on two cores; `figures.json` keeps what it measured. None of it sees a held-out
shape-colour pair, and the language model never gets an image.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel, SiglipVisionConfig, SiglipVisionModel

from minimind_v.core.config.generation import V2025, V2026
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.config.schema import SIGLIP_VISION
from minimind_v.core.data.images import load_pixels
from minimind_v.core.data.layouts import ChatML
from minimind_v.core.data.prompt import IMAGE_MARK, PromptEncoder, Tokens
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.demo import warm_start, world
from minimind_v.core.demo.generations import DEMO_GENERATIONS, DemoGeneration
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.loss import IGNORE, supervised, supervised_loss
from minimind_v.core.model.vision.encoder import VisionEncoder, VisionSpec
from minimind_v.core.model.vision.spec import DEMO, TOWERS
from minimind_v.core.model.vlm import VLM

log = logging.getLogger(__name__)
ROWS = 20  # of a step of the base's training
GROUP = 5  # of them that are computed together
MASTERY = 0.95  # share of right answers at which the training of the language model ends
ATTRIBUTES = (list(world.SIZES), list(world.COLOURS), list(world.SHAPES), list(world.POSITIONS))
WORDS = [word for attribute in ATTRIBUTES for word in attribute]  # all words for a patch
# The added tokens in the order of their ids, as published: those of both generations, and those of minimind-3v alone.
# The last are not special, so decoding keeps them.
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MEDIA = ["<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
         "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
         "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>",
         "<tts_text_bos_single>"]  # fmt: skip
KEPT = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
        *(f"<|buffer{number}|>" for number in range(1, 10))]  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How many steps the assets of a generation take at most, and the highest learning rates."""

    tower_steps: int
    tower_lr: float
    base_steps: int
    base_lr: float


RECIPES = {"2025": Recipe(1600, 1.5e-3, 7500, 2e-3), "3v": Recipe(900, 1e-3, 400, 1e-3)}  # 3v: a warm start


# --- tokenizer --------------------------------------------------------------------------------------------------------


def make_tokenizer(out: Path, demo: DemoGeneration) -> None:
    """A byte-level BPE with merges only inside single words, so that no token spans a shape and a colour."""
    added = TOKENS if demo.generation is V2025 else TOKENS + MEDIA + KEPT
    vocabulary: set[str] = set()
    rng = random.Random(0)
    for _ in range(2000):
        scene = world.make_scene(rng)
        texts = [ChatML.system_prompt, "system user assistant", world.caption(scene, "en")]
        texts += [question.text + " " + question.answer for question in world.questions(scene, rng)]
        texts += world.CAPTION_PROMPTS["en"]
        vocabulary.update(
            f"{space}{word}" for text in texts for word in text.split() if word.isascii() for space in ("", " ")
        )
    chinese = [*world.SHAPES.values()]
    chinese += [zh for zh, _ in (*world.COLOURS.values(), *world.SIZES.values(), *world.POSITIONS.values())]
    chinese += [zh for _, zh in world.NUMBERS.values()]
    chinese += ["有一个", "有几个物体", "在哪里", "是什么颜色", "是大还是小", "什么形状是", "没有"]
    chinese += ["吗", "的", "，", "。", "？", "描述", "这张图片", "你看到了什么", "图片里有什么"]
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PRESETS[demo.preset].vocab_size,
        min_frequency=1,
        special_tokens=added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(vocabulary) + chinese * 2, trainer)

    assert tokenizer.get_vocab_size() == PRESETS[demo.preset].vocab_size, tokenizer.get_vocab_size()
    description = json.loads(tokenizer.to_str())
    for token in description["added_tokens"]:
        token["special"] = token["content"] not in KEPT  # the trainer makes all of them special
    text = json.dumps(description, ensure_ascii=False, separators=(",", ":"))
    (out / "tokenizer.json").write_text(text, encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
              "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "model_max_length": 2048}  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


# --- training ---------------------------------------------------------------------------------------------------------


def descend(
    name: str, optimiser: torch.optim.Optimizer, losses: Iterator[Tensor], steps: int, rising: float
) -> Iterator[int]:
    """Do a step for each loss and yield its number. The rate rises over a share of the steps, and then falls."""
    (group,) = optimiser.param_groups
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=group["lr"], total_steps=steps, pct_start=rising)
    started = time.time()
    for step, loss in enumerate(losses, 1):
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            log.info(f"{name} {step}/{steps} loss {loss.item():.4f} {time.time() - started:.0f} s")
        yield step


# --- vision -----------------------------------------------------------------------------------------------------------


def nameless_colour(rng: random.Random) -> tuple[int, int, int]:
    """A colour without a word in the world, far from those with one."""
    while True:
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        named = (rgb for _, rgb in world.COLOURS.values())
        grey = max(colour) - min(colour) < 40  # the background is grey
        if not grey and all(sum((a - b) ** 2 for a, b in zip(colour, rgb, strict=True)) > 75**2 for rgb in named):
            return colour


def captioned_image(spec: VisionSpec, rng: random.Random, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """The pixels of an image [3, S, S], and the words of the object on each patch [P, words].

    Most objects have a colour without a name, and no word for it. With named colours alone the tower learned that red
    objects are never stars, and could not encode the shape of the held-out pairs. (With `held_out`, for measurements
    only, every image has such a pair, and all colours have names.)
    """
    patches = spec.image_size // spec.patch_size
    figures = [
        figure if held_out or rng.random() < 0.4 else replace(figure, colour=nameless_colour(rng), named=False)
        for figure in world.pose(world.make_scene(rng, held_out), rng)
    ]
    drawing = world.jpeg(world.paint(figures, rng))
    pixels = load_pixels(drawing, "drawn", spec.image_size, spec.resize_mode, spec.resample)
    covers = []
    for figure in figures:
        mask = Image.new("L", (world.CANVAS, world.CANVAS))
        figure.paint(ImageDraw.Draw(mask), 255)
        covers.append(np.asarray(mask.resize((patches, patches), Image.Resampling.BOX)).reshape(-1) / 255)
    cover = np.stack(covers)  # [objects, P]
    labels = np.zeros((patches * patches, len(WORDS)), dtype=np.float32)
    for patch, (which, share) in enumerate(zip(cover.argmax(0), cover.max(0), strict=True)):
        if share > 0.15:
            item, named = figures[which].item, figures[which].named
            names = (item.size, item.shape, item.position, *([item.colour] if named else []))
            labels[patch, [WORDS.index(name) for name in names]] = 1
    return torch.from_numpy(pixels.copy()), torch.from_numpy(labels)


def batches(
    spec: VisionSpec, rng: random.Random, count: int, size: int, held_out: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` fresh batches of images [B, 3, S, S] and words [B, P, words]."""
    for _ in range(count):
        pixels, labels = zip(*(captioned_image(spec, rng, held_out) for _ in range(size)), strict=True)
        yield torch.stack(pixels), torch.stack(labels)


def published_tower(model_type: str) -> PreTrainedModel:
    """transformers' tower of the demo's sizes, its weights drawn as those of the published ones were."""
    sizes = vars(DEMO[model_type])
    if model_type == SIGLIP_VISION:
        return SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False))
    return CLIPVisionModel(CLIPVisionConfig(**sizes, projection_dim=sizes["hidden_size"]))


def demo_spec(model_type: str) -> VisionSpec:
    """The spec of the demo's tower."""
    return TOWERS[model_type].describe(DEMO[model_type], {})


def train_tower(out: Path, demo: DemoGeneration, seed: int, recipe: Recipe) -> dict[str, float]:
    """Train the tower to caption: from each patch a linear layer predicts the words of its object.

    It predicts them by regression to 0 and 1, not by logits, so that the features hold them linearly and at one scale,
    as a linear projector needs them.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model_type = demo.generation.towers[0]
    published, tower = published_tower(model_type), TOWERS[model_type].build(DEMO[model_type])
    tower.load_state_dict(published.state_dict())
    if demo.generation is V2026:
        warm_start.fill_tower(tower)
    spec = demo_spec(model_type)
    encoder = VisionEncoder(tower, spec)
    tower.requires_grad_(True)
    reader = nn.Linear(spec.width, len(WORDS))
    parameters = [*tower.parameters(), *reader.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.tower_lr, weight_decay=0.05)

    def losses() -> Iterator[Tensor]:
        for pixels, labels in batches(spec, rng, recipe.tower_steps, 64):
            read = reader(_encode(encoder, pixels))  # [B, P, words]
            named = labels.any(dim=-1, keepdim=True)  # patches of objects are rare: weigh them up
            yield ((read - labels).square() * torch.where(named, 4.0, 1.0)).mean()

    started = time.time()
    for _ in descend("tower", optimiser, losses(), recipe.tower_steps, 0.1):
        pass
    figures = _score_tower(encoder, reader, random.Random(seed + 1))
    figures["seconds"] = round(time.time() - started)
    folder = out / "vision"
    folder.mkdir(exist_ok=True)
    published.load_state_dict(tower.state_dict())
    published.half().save_pretrained(folder)
    normal = {"image_mean": spec.mean, "image_std": spec.std, "size": spec.image_size}
    (folder / "preprocessor_config.json").write_text(json.dumps(normal, indent=1) + "\n")
    return figures


def _encode(encoder: VisionEncoder, pixels: Tensor) -> Tensor:
    """Features as VisionEncoder computes them, but with gradients."""
    return encoder.tower((pixels.float() / 255 - encoder.mean) / encoder.std)


@torch.no_grad()
def _score_tower(encoder: VisionEncoder, reader: nn.Linear, rng: random.Random) -> dict[str, float]:
    """The share of object patches of new images whose words are predicted right; held-out pairs apart."""
    names, groups = ("size", "colour", "shape", "place"), [len(attribute) for attribute in ATTRIBUTES]
    pairs = [(WORDS.index(shape), WORDS.index(colour)) for shape, colour in sorted(world.HELD_OUT)]
    figures: dict[str, float] = {}
    for held_out, suffix in ((False, ""), (True, "_of_held_out_pairs")):
        right, total = torch.zeros(len(names)), torch.zeros(len(names))
        for pixels, labels in batches(encoder.spec, rng, 10, 64, held_out):
            chosen = sum(labels[..., s] * labels[..., c] for s, c in pairs) > 0 if held_out else labels.any(dim=-1)
            read, truth = reader(_encode(encoder, pixels))[chosen], labels[chosen]
            for n, (guess, target) in enumerate(zip(read.split(groups, -1), truth.split(groups, -1), strict=True)):
                named = target.any(dim=-1)  # a colour without a name does not count
                right[n] += ((guess.argmax(-1) == target.argmax(-1)) & named).sum()
                total[n] += named.sum()
        shares = (right / total).tolist()
        figures |= {f"patch_{name}{suffix}": round(share, 4) for name, share in zip(names, shares, strict=True)}
    return figures


# --- language ---------------------------------------------------------------------------------------------------------


def talk(scene: world.Scene, rng: random.Random, opening: str) -> list[dict[str, str]]:
    """A conversation about a scene that `opening` shows: up to ten questions, sometimes a caption first."""
    turns = []
    if rng.random() < 0.3:
        language = rng.choice(world.LANGUAGES)
        turns.append((rng.choice(world.CAPTION_PROMPTS[language]), world.caption(scene, language)))
    turns += [(question.text, question.answer) for question in world.questions(scene, rng)][:10]
    messages = []
    for number, (question, answer) in enumerate(turns):
        messages.append({"role": "user", "content": question if number else f"{opening}\n{question}"})
        messages.append({"role": "assistant", "content": answer})
    return messages


def written(scene: world.Scene, rng: random.Random) -> str:
    """A scene in words, its objects in any order."""
    return world.caption(tuple(rng.sample(scene, len(scene))), rng.choice(world.LANGUAGES))


Chords = tuple[list[list[int]], list[float]]  # token ids and weight of each position
Row = tuple[Tokens, Chords | None]  # None: a row of text


class ChordBook:
    """Several words at one position, like the notes of a chord.

    The patch of an image has size, colour, shape and position at a single position, where text takes four. To prepare
    the language model, half of its training rows look like that: each position holds the summed embeddings of all
    words for one object, or of the empty mark. They hold words only, no image.
    """

    EMPTY = "."

    def __init__(self, tokenizer: Tokenizer, positions: int) -> None:
        self.tokenizer = tokenizer
        self.positions = positions

    def write(self, scene: world.Scene, rng: random.Random) -> Chords:
        """Token ids and weight of each position."""
        empty = self.tokenizer.encode(self.EMPTY).ids
        chords, loudness = [empty] * self.positions, [1.0] * self.positions
        side = int(self.positions**0.5)
        language = rng.choice((*world.LANGUAGES, "both"))
        for figure in world.pose(scene, rng):
            languages = world.LANGUAGES if language == "both" else (language,)
            names = [name for language in languages for name in figure.item.names(language)]
            ids = [id_ for name in names for id_ in self.tokenizer.encode(f" {name}" if name.isascii() else name).ids]
            xs, ys = zip(*figure.outline, strict=True)
            scale = side / world.CANVAS
            for row in range(int(min(ys) * scale), min(side - 1, int(max(ys) * scale)) + 1):
                for column in range(int(min(xs) * scale), min(side - 1, int(max(xs) * scale)) + 1):
                    if rng.random() < 0.8:
                        chords[row * side + column] = ids
                        loudness[row * side + column] = rng.uniform(0.5, 1.5)
        return chords, loudness


def train_base(out: Path, demo: DemoGeneration, seed: int, recipe: Recipe) -> dict[str, float]:
    """Train the language model on the world's language until it answers questions about a text."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = Tokenizer.load(out)
    spec = demo_spec(demo.generation.towers[0])
    model = accelerate(VLM(PRESETS[demo.preset], spec, tokenizer.placeholder_id), torch.device("cpu"))
    _wake(model)
    if demo.generation is V2026:
        warm_start.fill_base(model, tokenizer)
    reader = Reader(model, tokenizer, spec.tokens_per_image)
    parameters = list(model.model.parameters())
    steps, lr = recipe.base_steps, recipe.base_lr
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    losses, started = (reader.loss(rng, ROWS) for _ in range(steps)), time.time()
    for step in descend("base", optimiser, losses, steps, 0.05):
        if step % 500 == 0 or step == steps:
            figures = reader.score(random.Random(seed + 1))
            log.info(f"base {step}: {figures}")
            kept = {k: v.half().contiguous() for k, v in model.state_dict().items() if k.startswith("model.")}
            save_file(kept, out / f"{demo.weights_name('lm')}.safetensors", metadata={"format": "pt"})
            if min(figures.values()) >= MASTERY:
                break
    return figures | {"seconds": round(time.time() - started), "rows": step * ROWS}


def _wake(model: VLM) -> None:
    """Fresh weights at the scale of their width.

    The usual 0.02 suits wide models. At width 128 the attention starts so near to uniform that the model did not learn
    to find a word in 60,000 rows; with these weights it takes a few thousand.
    """
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)


class Reader:
    """Makes training rows for the base, and scores it."""

    def __init__(self, model: VLM, tokenizer: Tokenizer, positions: int) -> None:
        self.model = model
        self.encoder = PromptEncoder(tokenizer, positions)
        self.chords = ChordBook(tokenizer, positions)

    def draw(self, rng: random.Random, rows: int, written_rows: bool) -> list[Row]:
        """New rows, all text or all chords, from the shortest to the longest."""
        drawn = []
        for _ in range(rows):
            scene = world.make_scene(rng)
            opening = written(scene, rng) if written_rows else IMAGE_MARK
            tokens = self.encoder.row(talk(scene, rng, opening), 0 if written_rows else 1, 1024, rng)
            drawn.append((tokens, None if written_rows else self.chords.write(scene, rng)))
        return sorted(drawn, key=lambda row: len(row[0]))

    def batch(self, rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [B, T, D], labels and ids [B, T] of rows."""
        encoded, chords = [tokens for tokens, _ in rows], [chord for _, chord in rows if chord]
        length = max(len(row) for row in encoded)
        ids = torch.tensor([row.input_ids + [0] * (length - len(row)) for row in encoded])
        mask = torch.tensor([row.loss_mask + [False] * (length - len(row)) for row in encoded])
        x = self.model.model.embed_tokens(ids)
        if chords:
            image_mask = torch.tensor([row.image_mask + [False] * (length - len(row)) for row in encoded])
            x = x.masked_scatter(image_mask[..., None], self.sound(chords))
        return x, torch.where(mask, ids, IGNORE), ids

    def sound(self, chords: list[Chords]) -> Tensor:
        """Summed embeddings of every position of every row, [B · P, D], times their weights, with some noise."""
        flat = [ids for row, _ in chords for ids in row]
        offsets = torch.tensor([0, *[len(ids) for ids in flat]]).cumsum(0)[:-1]
        table = self.model.model.embed_tokens.weight
        sums = F.embedding_bag(torch.tensor([n for ids in flat for n in ids]), table, offsets, mode="sum")
        loud = torch.tensor([volume for _, row in chords for volume in row])[:, None]
        noise = torch.randn_like(sums) * table.detach().std() * 0.3
        return sums * loud + noise

    def loss(self, rng: random.Random, rows: int) -> Tensor:
        """The loss of new rows. Rows of about one length are computed together, since padding costs as much as text."""
        drawn = self.draw(rng, rows, written_rows=rng.random() < 0.4)
        losses, tokens = [], 0
        for start in range(0, rows, GROUP):
            x, labels, _ = self.batch(drawn[start : start + GROUP])
            positions, targets = supervised(labels)
            hidden, _ = self.model.model(x, positions=positions)
            loss_sum, correct = supervised_loss(self.model.lm_head(hidden), targets)
            losses.append(loss_sum)
            tokens += len(correct)
        return torch.stack(losses).sum() / tokens

    @torch.no_grad()
    def score(self, rng: random.Random) -> dict[str, float]:
        """The share of answers whose every token is the likeliest one, over new rows of text and of chords."""
        scores = {}
        for name, in_writing in (("written", True), ("chords", False)):
            right = total = 0
            for _ in range(4):
                x, labels, ids = self.batch(self.draw(rng, 64, in_writing))
                hidden, _ = self.model.model(x)
                guess = self.model.lm_head(hidden).argmax(-1)[:, :-1]
                wrong = (guess != ids[:, 1:]) & (labels[:, 1:] != IGNORE)
                start = (labels[:, 1:] != IGNORE) & (labels[:, :-1] == IGNORE)  # an answer's first token
                answer = start.cumsum(1) * (labels[:, 1:] != IGNORE)
                for row in range(len(ids)):
                    right += int(start[row].sum()) - len(set(answer[row][wrong[row]].tolist()))
                    total += int(start[row].sum())
            scores[f"answers_{name}"] = round(right / total, 4)
        return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--generation", choices=DEMO_GENERATIONS, default="2025")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--only", choices=("tokenizer", "tower", "base"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "figures.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    figures["seed"] = options.seed
    demo, recipe = DEMO_GENERATIONS[options.generation], RECIPES[options.generation]
    if options.only in (None, "tokenizer"):
        make_tokenizer(options.out, demo)
    if options.only in (None, "tower"):
        figures["tower"] = train_tower(options.out, demo, options.seed, recipe)
    if options.only in (None, "base"):
        figures["base"] = train_base(options.out, demo, options.seed, recipe)
    path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
