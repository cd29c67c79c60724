"""Generation in the shape of the published scripts, written plainly: what ours is measured against.

The same mathematics as `minimind_v`, and nothing of its code: logits of every position of the prompt, a cache that each
token copies to add itself, key-value heads copied out to all query heads, a mask for every step, a full sort for every
draw, the whole answer decoded again for every token. Each question is read from its beginning, its pictures prepared
by CLIPImageProcessor and encoded anew. Attention is torch's fused one for a prompt and written out for one token, as
the published model has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.plain import PUBLISHED, SYSTEM, PlainAttention, PlainVLM, make_processor

Past = tuple[Tensor, Tensor]


class PlainChat:
    """A model that answers conversations."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import PreTrainedTokenizerFast

        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"))
        self.published = PUBLISHED["small"]
        self.processor = make_processor(self.published)
        image_id, self.eos_id = self.tokenizer.convert_tokens_to_ids([self.published.image_token, "<|im_end|>"])
        self.model = PlainVLM(folder, self.published, image_id, "fused").eval().to(device)
        self.heads = PlainAttention.heads

    @torch.no_grad()
    def answer(
        self, messages: list[dict[str, str]], pictures: list[Path], limit: int, temperature: float, top_p: float
    ) -> Iterator[tuple[int, str]]:
        """The ids of an answer, each with the text so far. `<image>` in a message marks a picture."""
        device = self.model.cos.device
        shown = [Image.open(path).convert("RGB") for path in pictures]
        pixel_values = (
            self.processor(images=shown, return_tensors="pt")["pixel_values"][None].to(device) if shown else None
        )
        turns = [{"role": "system", "content": SYSTEM}, *messages]
        text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
        image = self.published.image_token * self.published.image_tokens
        text = text.replace("<image>", image) + "<|im_start|>assistant\n"
        input_ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(
            device
        )  # [1, T]
        start, past = input_ids.shape[1], None
        while input_ids.shape[1] < start + limit:
            unread = input_ids if past is None else input_ids[:, -1:]
            logits, past = self.forward(unread, pixel_values if past is None else None, past)
            token = self.draw(logits[:, -1, :], temperature, top_p)  # [1, 1]
            if token.item() == self.eos_id:
                return
            input_ids = torch.cat((input_ids, token), dim=1)
            yield token.item(), self.tokenizer.decode(input_ids[0, start:].tolist())

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None, past: list[Past] | None):
        """Logits of all given positions [1, T, V], and the keys and values so far."""
        model = self.model
        h = model.model.embed_tokens(input_ids)  # [1, T, D]
        if pixel_values is not None:
            features = torch.stack([model.encode(pixel_values[:, n]) for n in range(pixel_values.shape[1])], dim=1)
            h = model.insert_features(h, input_ids, model.vision_proj.vision_proj(features))
        begin = past[0][0].shape[2] if past else 0
        cos, sin = model.cos[begin : begin + h.shape[1]], model.sin[begin : begin + h.shape[1]]
        presents = []
        for number, layer in enumerate(model.model.layers):
            attended, present = self.attend(
                layer.self_attn, layer.input_layernorm(h), cos, sin, past[number] if past else None
            )
            presents.append(present)
            h = h + attended
            x = layer.post_attention_layernorm(h)
            h = h + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
        return model.lm_head(model.model.norm(h)), presents

    def attend(self, attention: PlainAttention, x: Tensor, cos: Tensor, sin: Tensor, past: Past | None):
        """Attention over all keys and values so far, and these."""
        q, k, v = (attention.split(proj(x)) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = (tensor * cos + attention.half_turn(tensor) * sin for tensor in (q, k))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        keys, values = (tensor.repeat_interleave(self.heads // tensor.shape[1], dim=1) for tensor in (k, v))
        if q.shape[2] > 1:
            out = attention.fused(q, keys, values)
        else:
            scores = q @ keys.transpose(-2, -1) / math.sqrt(attention.head_dim)  # [1, heads, 1, S]
            scores = scores + torch.triu(torch.full((1, 1), float("-inf"), device=q.device), diagonal=1)
            out = F.softmax(scores.float(), dim=-1).type_as(q) @ values
        return attention.o_proj(out.transpose(1, 2).flatten(2)), (k, v)

    @staticmethod
    def draw(logits: Tensor, temperature: float, top_p: float) -> Tensor:
        """The next id from logits [1, V]: the likeliest at temperature 0, else one of the nucleus."""
        if temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        logits = logits / (temperature + 1e-9)
        ordered, ids = torch.sort(logits, descending=True, dim=-1)
        mass = torch.cumsum(F.softmax(ordered, dim=-1), dim=-1)
        beyond = mass > top_p
        beyond[:, 1:] = beyond[:, :-1].clone()
        beyond[:, 0] = False
        logits = logits.masked_fill(beyond.scatter(1, ids, beyond), float("-inf"))
        return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
