"""A training run in the shape of the published scripts, written plainly: what ours is measured against.

The same mathematics as `minimind_v`, and nothing of its code: every row padded to the stage's full length, repeated
key-value heads, logits of every position, pictures prepared by transformers in the loader, the same parameters
frozen. Both generations: PUBLISHED says what each does its own way. Attention comes in two kinds: `explicit` writes out
scores, a causal mask and a softmax; `fused` calls torch's scaled_dot_product_attention, as the published model does by
default where torch has it.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

SYSTEM = "You are a helpful assistant"
POSITIONS = 32768


@dataclass(frozen=True)
class Published:
    """What the published code of one generation does its own way."""

    vision_model: str  # transformers' class
    processor: str
    image_size: int
    image_token: str
    image_tokens: int
    eps: float
    trained: dict[str, tuple[str, ...]]  # by stage: parts of the names of the parameters that learn
    rate: Callable[[float], float]  # of the learning rate, at a share of the run
    first_step: int  # the number of the first step in that share


PUBLISHED = {
    "small": Published(
        "CLIPVisionModel",
        "CLIPImageProcessorPil",
        224,
        "@",
        196,
        1e-5,
        {"pretrain": ("vision_proj.", "layers.{last}."), "sft": ("vision_proj.", "model.", "lm_head.")},
        lambda share: 0.1 + 0.5 * (1 + math.cos(math.pi * share)),
        0,
    ),
    "3v": Published(
        "SiglipVisionModel",
        "SiglipImageProcessorPil",
        256,
        "<|image_pad|>",
        64,
        1e-6,
        {"pretrain": ("vision_proj.",), "sft": ("vision_proj.", "layers.0.", "layers.{last}.")},
        lambda share: 0.1 + 0.45 * (1 + math.cos(math.pi * share)),
        1,
    ),
}


@dataclass(frozen=True)
class PlainRun:
    """The settings of one run; paths are those of `material.make_material`."""

    folder: Path
    stage: str
    row_numbers: list[int]  # which rows to read, in order, counted from 0
    batch_size: int
    length: int  # tokens that every row is padded to
    lr: float
    total: int  # updates that the learning rate's schedule spans
    attention: str
    workers: int = 1
    device: str = "cpu"
    bfloat16: bool = False  # products in bf16, by autocast
    preset: str = "small"  # one of PUBLISHED

    @property
    def published(self) -> Published:
        return PUBLISHED[self.preset]


def run_plain(run: PlainRun, on_step: Callable[[int, float, float], None]) -> None:
    """Train; tells each update's number of samples, loss and gradient norm before clipping."""
    dataset = PlainDataset(run)
    device = torch.device(run.device)
    loader = DataLoader(dataset, batch_size=run.batch_size, num_workers=run.workers, pin_memory=device.type == "cuda")
    model = PlainVLM(run.folder, run.published, dataset.image_id, run.attention).to(device)
    last = len(model.model.layers) - 1
    for name, parameter in model.named_parameters():
        trainable = any(piece.format(last=last) in name for piece in run.published.trained[run.stage])
        parameter.requires_grad_(trainable and not name.startswith("vision_encoder."))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=run.lr)
    model.train()
    model.vision_encoder.eval()
    for step, batch in enumerate(loader):
        x, y, loss_mask, pixel_values = (tensor.to(device, non_blocking=True) for tensor in batch)
        lr = run.lr * run.published.rate((step + run.published.first_step) / run.total)
        for group in optimiser.param_groups:
            group["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=run.bfloat16):
            logits = model(x, pixel_values)  # [B, T, V]
            token_loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1), reduction="none").view(y.shape)
            loss = (token_loss * loss_mask).sum() / loss_mask.sum()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        on_step(len(x), loss.item(), float(grad_norm))


class PlainDataset(Dataset):
    """Rows as four tensors: inputs [T], targets [T], loss mask [T], pixels [1, 3, S, S]."""

    def __init__(self, run: PlainRun) -> None:
        from transformers import PreTrainedTokenizerFast

        self.run = run
        lines = (run.folder / f"{run.stage}.jsonl").read_text(encoding="utf-8").splitlines()
        self.rows = [json.loads(lines[number]) for number in run.row_numbers]
        self.zip: zipfile.ZipFile | None = None
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(run.folder / "tokenizer" / "tokenizer.json"))
        self.processor = make_processor(run.published)
        self.image_id = self.tokenizer.convert_tokens_to_ids(run.published.image_token)
        self.answer_start = self._ids("<|im_start|>assistant\n")
        self.answer_end = self._ids("<|im_end|>\n")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row, length = self.rows[number], self.run.length
        messages = row["conversations"]
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": SYSTEM}, *messages]
        text = "".join(map(message_text, messages))
        ids = self._ids(text.replace("<image>", self.run.published.image_token * self.run.published.image_tokens))
        mask = self._answers(ids)
        padding = length - len(ids)
        ids, mask = torch.tensor(ids + [0] * padding), torch.tensor(mask + [0] * padding)
        if self.zip is None:  # opened in the worker: a handle must not be shared
            self.zip = zipfile.ZipFile(self.run.folder / f"{self.run.stage}.zip")
        picture = Image.open(io.BytesIO(self.zip.read(row["image"]))).convert("RGB")
        pixel_values = self.processor(images=picture, return_tensors="pt")["pixel_values"]  # [1, 3, S, S]
        return ids[:-1], ids[1:], mask[1:], pixel_values

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _answers(self, ids: list[int]) -> list[int]:
        """1 for every token from behind an answer's header to the newline that closes it."""
        mask, position = [0] * len(ids), 0
        start, end = self.answer_start, self.answer_end
        while position < len(ids):
            if ids[position : position + len(start)] != start:
                position += 1
                continue
            position += len(start)
            while ids[position : position + len(end)] != end:
                mask[position] = 1
                position += 1
            mask[position : position + len(end)] = [1] * len(end)
        return mask


def message_text(message: dict[str, str]) -> str:
    """A message as the chat template writes it; an answer's reasoning, where it has one, stands before it."""
    thought = f"<think>\n{message['reasoning_content']}\n</think>\n\n" if "reasoning_content" in message else ""
    return f"<|im_start|>{message['role']}\n{thought}{message['content']}<|im_end|>\n"


def make_processor(published: Published):
    """transformers' image processor of a generation: CLIP's crops, SigLIP's squeezes with a bicubic filter."""
    import transformers

    make = getattr(transformers, published.processor)
    size = published.image_size
    return make() if make.__name__.startswith("CLIP") else make(size={"height": size, "width": size}, resample=3)


class PlainVLM(nn.Module):
    """Vision model, projector and language model; the parameters have the published names."""

    def __init__(self, folder: Path, published: Published, image_id: int, attention: str) -> None:
        import transformers
        from safetensors.torch import load_file

        super().__init__()
        self.published = published
        weights = {name: tensor.float() for name, tensor in load_file(folder / "weights.safetensors").items()}
        vocabulary, hidden = weights["model.embed_tokens.weight"].shape
        layers = sum(name.endswith("input_layernorm.weight") for name in weights)
        self.image_id = image_id
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocabulary, hidden)
        self.model.layers = nn.ModuleList(PlainBlock(weights, attention, published.eps) for _ in range(layers))
        self.model.norm = PlainNorm(hidden, published.eps)
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)
        self.vision_proj = nn.Module()
        if "vision_proj.mlp.0.weight" in weights:
            layers = nn.LayerNorm(768), nn.Linear(768, hidden), nn.GELU(), nn.Linear(hidden, hidden)
            self.vision_proj.mlp = nn.Sequential(*layers)
        else:
            self.vision_proj.vision_proj = nn.Sequential(nn.Linear(768, hidden))
        self.load_state_dict(weights)
        self.lm_head.weight = self.model.embed_tokens.weight
        self.vision_encoder = getattr(transformers, published.vision_model).from_pretrained(folder / "vision")
        head_dim = self.model.layers[0].self_attn.head_dim
        angles = torch.outer(torch.arange(POSITIONS).float(), 1e6 ** -(torch.arange(0, head_dim, 2) / head_dim))
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, torch.cat([table, table], dim=-1), persistent=False)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """input_ids [B, T], pixel_values [B, N, 3, H, W] → logits [B, T, V]."""
        h = self.model.embed_tokens(input_ids)  # [B, T, D]
        features = torch.stack([self.encode(pixel_values[:, n]) for n in range(pixel_values.shape[1])], dim=1)
        (projector,) = self.vision_proj.children()
        h = self.insert_features(h, input_ids, projector(features))
        cos, sin = self.cos[: h.shape[1]], self.sin[: h.shape[1]]
        for layer in self.model.layers:
            h = layer(h, cos, sin)
        return self.lm_head(self.model.norm(h))

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] → features [B, P, 768]; CLIP's class token stands before them."""
        return self.vision_encoder(pixel_values=pixel_values).last_hidden_state[:, -self.published.image_tokens :]

    def insert_features(self, h: Tensor, input_ids: Tensor, projected: Tensor) -> Tensor:
        """Put the projected pictures [B, N, P, D] over the runs of the image token."""
        rows = []
        for row, pictures, ids in zip(h, projected, input_ids.tolist(), strict=True):
            pieces, begin = [], 0
            for picture in pictures:
                start = ids.index(self.image_id, begin)
                pieces += [row[begin:start], picture]
                begin = start + len(picture)
            rows.append(torch.cat([*pieces, row[begin:]]))
        return torch.stack(rows)


class PlainBlock(nn.Module):
    """A pre-norm decoder layer."""

    def __init__(self, weights: dict[str, Tensor], attention: str, eps: float) -> None:
        super().__init__()
        inner, hidden = weights["model.layers.0.mlp.gate_proj.weight"].shape
        kv_width = weights["model.layers.0.self_attn.k_proj.weight"].shape[0]
        self.self_attn = PlainAttention(hidden, kv_width, attention)
        if "model.layers.0.self_attn.q_norm.weight" in weights:
            self.self_attn.q_norm, self.self_attn.k_norm = (PlainNorm(self.self_attn.head_dim, eps) for _ in range(2))
        self.input_layernorm, self.post_attention_layernorm = PlainNorm(hidden, eps), PlainNorm(hidden, eps)
        self.mlp = nn.Module()
        self.mlp.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.mlp.up_proj = nn.Linear(hidden, inner, bias=False)
        self.mlp.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), cos, sin)
        x = self.post_attention_layernorm(h)
        return h + self.mlp.down_proj(F.silu(self.mlp.gate_proj(x)) * self.mlp.up_proj(x))


class PlainNorm(nn.Module):
    """RMSNorm, step by step in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


class PlainAttention(nn.Module):
    """Causal attention with the key-value heads copied out to all query heads."""

    heads = 8

    def __init__(self, hidden: int, kv_width: int, attention: str) -> None:
        super().__init__()
        self.head_dim = hidden // self.heads
        self.attend = {"explicit": self.explicit, "fused": self.fused}[attention]
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (self.split(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))  # [B, heads, T, hd]
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = (tensor * cos + self.half_turn(tensor) * sin for tensor in (q, k))
        k, v = (tensor.repeat_interleave(self.heads // tensor.shape[1], dim=1) for tensor in (k, v))
        return self.o_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    @staticmethod
    def half_turn(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat([-x[..., half:], x[..., :half]], dim=-1)

    def explicit(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        time = q.shape[2]
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)  # [B, heads, T, T]
        scores = scores + torch.triu(torch.full((time, time), float("-inf"), device=q.device), diagonal=1)
        return F.softmax(scores.float(), dim=-1).type_as(q) @ v

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
