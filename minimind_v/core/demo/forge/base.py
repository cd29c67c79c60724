"""The demo's text-only language model, which learns to read its world before it gets an image."""

from __future__ import annotations

import logging
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from minimind_v.core.config.generation import V2026
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.data.prompt import IMAGE_MARK, PromptEncoder, Tokens
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.demo import warm_start, world
from minimind_v.core.demo.forge.tower import demo_spec
from minimind_v.core.demo.forge.training import Recipe, descend
from minimind_v.core.demo.generations import DemoGeneration
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.loss import IGNORE, supervised, supervised_loss
from minimind_v.core.model.vlm import VLM

log = logging.getLogger(__name__)
ROWS = 20  # of a step of the base's training
GROUP = 5  # of them that are computed together
MASTERY = 0.95  # share of right answers at which the training of the language model ends


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
