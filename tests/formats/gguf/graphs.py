"""What llama.cpp computes from its two files: its graphs (`llama`, `granitemoe`, LLaVA) written down anew in numpy.

Nothing of ours is used, and of the `gguf` package only the reader.
"""

import re
from itertools import pairwise

import numpy as np
import regex
from gguf import GGUFReader, dequantize


class File:
    """Keys and float64 tensors of a GGUF file."""

    def __init__(self, path):
        reader = GGUFReader(path)
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {
            tensor.name: np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float64)
            for tensor in reader.tensors
        }
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}

    def __getitem__(self, name):
        return self.tensors[name]


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _silu(x):
    return x / (1 + np.exp(-x))


# --- the language model -----------------------------------------------------------------------------------------------


def language_logits(file, ids):
    """Logits [T, V] of token ids, as the graphs of `llama` and `granitemoe` compute them."""
    arch = file.keys["general.architecture"]
    key = {name.removeprefix(f"{arch}."): value for name, value in file.keys.items() if name.startswith(f"{arch}.")}
    heads, kv, width = key["attention.head_count"], key["attention.head_count_kv"], key["rope.dimension_count"]
    scale = key.get("attention.scale", width**-0.5)
    x = file["token_embd.weight"][ids] * key.get("embedding_scale", 1)
    time = len(ids)
    causal = np.triu(np.full((time, time), -np.inf), 1)
    for layer in range(key["block_count"]):
        blk = f"blk.{layer}."
        y = _rms(x, file[f"{blk}attn_norm.weight"], key)
        q, k, v = (
            (y @ file[f"{blk}attn_{name}.weight"].T).reshape(time, -1, width).transpose(1, 0, 2) for name in "qkv"
        )
        q, k = (_rope_neighbours(states, key["rope.freq_base"]) for states in (q, k))
        k, v = (np.repeat(states, heads // kv, axis=0) for states in (k, v))
        attended = _softmax(q @ k.transpose(0, 2, 1) * scale + causal) @ v
        x = x + attended.transpose(1, 0, 2).reshape(time, -1) @ file[f"{blk}attn_output.weight"].T * key.get(
            "residual_scale", 1
        )
        y = _rms(x, file[f"{blk}ffn_norm.weight"], key)
        forward = _experts(file, blk, y, key) if arch == "granitemoe" else _swiglu(file, f"{blk}ffn_{{}}.weight", y)
        x = x + forward * key.get("residual_scale", 1)
    head = file.tensors.get("output.weight", file["token_embd.weight"])
    return _rms(x, file["output_norm.weight"], key) @ head.T / key.get("logit_scale", 1)


def _rms(x, weight, key):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + key["attention.layer_norm_rms_epsilon"]) * weight


def _rope_neighbours(x, base):
    """LLAMA_ROPE_TYPE_NORM: components 2i and 2i + 1 are turned together."""
    width = x.shape[-1]
    angle = np.arange(x.shape[1])[:, None] * base ** (-np.arange(0, width, 2) / width)
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.stack((turned.real, turned.imag), -1).reshape(x.shape)


def _swiglu(file, name, x):
    gate, up, down = (file[name.format(kind)] for kind in ("gate", "up", "down"))
    return (_silu(x @ gate.T) * (x @ up.T)) @ down.T


def _experts(file, blk, x, key):
    """build_moe_ffn with softmax gating and normalised weights, plus the shared expert."""
    probs = _softmax(x @ file[f"{blk}ffn_gate_inp.weight"].T)
    out = np.zeros_like(x)
    for t, row in enumerate(probs):
        best = np.argsort(-row, kind="stable")[: key["expert_used_count"]]
        for e in best:
            gate, up, down = (file[f"{blk}ffn_{kind}_exps.weight"][e] for kind in ("gate", "up", "down"))
            out[t] += row[e] / row[best].sum() * (down @ (_silu(gate @ x[t]) * (up @ x[t])))
    if key.get("expert_shared_feed_forward_length"):
        out += _swiglu(file, f"{blk}ffn_{{}}_shexp.weight", x)
    return out


# --- the eye ----------------------------------------------------------------------------------------------------------


def image_embeddings(file, pixels):
    """What the language model is given for normalised pixels [3, S, S], as the LLaVA graph computes it: [P, hidden]."""
    key = {name.removeprefix("clip.vision."): value for name, value in file.keys.items()}
    assert key["clip.projector_type"] == "mlp"
    assert "v.class_embd" not in file.tensors, "with one, versions of llama.cpp differ in where they put it"
    assert "v.post_ln.weight" not in file.tensors, "it would be applied"
    patch, heads, eps = key["patch_size"], key["attention.head_count"], key["attention.layer_norm_epsilon"]
    side = key["image_size"] // patch
    cut = pixels.reshape(3, side, patch, side, patch).transpose(1, 3, 0, 2, 4).reshape(side * side, -1)
    kernel = file["v.patch_embd.weight"]
    x = cut @ kernel.reshape(len(kernel), -1).T + file["v.position_embd.weight"]
    x = _layer_norm(file, "v.pre_ln", x, eps)
    (deepest,) = key["feature_layer"]
    for layer in range(deepest):
        blk = f"v.blk.{layer}."
        y = _layer_norm(file, f"{blk}ln1", x, eps)
        q, k, v = (
            _linear(file, f"{blk}attn_{name}", y).reshape(len(y), heads, -1).transpose(1, 0, 2) for name in "qkv"
        )
        attended = _softmax(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])) @ v
        x = x + _linear(file, f"{blk}attn_out", attended.transpose(1, 0, 2).reshape(x.shape))
        y = _linear(file, f"{blk}ffn_up", _layer_norm(file, f"{blk}ln2", x, eps))
        x = x + _linear(file, f"{blk}ffn_down", y / (1 + np.exp(-1.702 * y)))
    return _linear(file, "mm.2", _gelu_by_table(_linear(file, "mm.0", x)))


def _linear(file, name, x):
    return x @ file[f"{name}.weight"].T + file[f"{name}.bias"]


def _layer_norm(file, name, x, eps):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * file[f"{name}.weight"] + file[f"{name}.bias"]


def _gelu_by_table(x):
    """ggml's GELU on a CPU: looked up in half precision inside ±10."""
    h = np.clip(x, -11, 11).astype(np.float16).astype(np.float64)
    gelu = 0.5 * h * (1 + np.tanh(0.79788456080286535588 * h * (1 + 0.044715 * h * h)))
    return np.where(x <= -10, 0, np.where(x >= 10, x, gelu.astype(np.float16).astype(np.float64)))


# --- the words --------------------------------------------------------------------------------------------------------

_GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


class Words:
    """`tokenizer.ggml.model` gpt2 with `pre` gpt-2: GPT-2's pattern, bytes as printable characters, merges by rank."""

    def __init__(self, file):
        assert (file.keys["tokenizer.ggml.model"], file.keys["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
        assert not file.keys["tokenizer.ggml.add_bos_token"]
        self.ids = {token: id for id, token in enumerate(file.keys["tokenizer.ggml.tokens"])}
        self.rank = {tuple(re.split(" ", merge)): n for n, merge in enumerate(file.keys["tokenizer.ggml.merges"])}
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in shown]
        self.letter = {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}

    def encode(self, text):
        """Ids of ordinary text: special tokens written out are text."""
        return [id for word in _GPT2.findall(text) for id in self._merge(word)]

    def _merge(self, word):
        pieces = [self.letter[byte] for byte in word.encode()]
        while pairs := [(self.rank[pair], n) for n, pair in enumerate(pairwise(pieces)) if pair in self.rank]:
            _, n = min(pairs)
            pieces[n : n + 2] = [pieces[n] + pieces[n + 1]]
        return [self.ids[piece] for piece in pieces]
