"""Write and read the tokenizer and the chat template for llama.cpp and Ollama."""

from __future__ import annotations

import json
import re
from string import Template
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from minimind_v.core.data.layouts import ChatML, find_layout
from minimind_v.core.data.thinking import EMPTY_BLOCK
from minimind_v.core.data.tokenizer import Tokenizer, usual_layout
from minimind_v.core.errors import WeightsError
from minimind_v.core.files import read_asset
from minimind_v.core.formats.gguf.file import Reader, Writer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens
# llama.cpp's `gpt-2` gives the same ids for this kind only: byte-level BPE that splits with GPT-2's pattern.
_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_PLAIN = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
          "byte_fallback": False, "ignore_merges": False}  # fmt: skip


def chat_template(layout: str) -> str:
    """The jinja template of a chat layout, without the tags that only transformers reads.

    In that of 2025, newlines join the items of a client's message; where a server has put its mark for an image
    (`<__media…__>`) right before the text, the template adds the newline of training.
    """
    if layout == "chatml":
        lines = read_asset("minimind_v.core.formats.gguf", "chat_template.jinja").splitlines()
        return Template("".join(lines)).substitute(system=ChatML.system_prompt)
    text = read_asset("minimind_v.core.formats.hf", "chat_template_think.jinja")
    return re.sub(r"{% (end)?generation %}", "", text)


def write_tokenizer(writer: Writer, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Write tokens, merges, special ids and the chat template.

    Raises WeightsError where llama.cpp would give other ids.
    """
    description = json.loads(tokenizer.backend.to_str())
    _check_kind(description)
    tokens = {id: token for token, id in description["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for added in description["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    file = writer.file
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list([tokens.get(id, f"[PAD{id}]") for id in range(vocab_size)])
    file.add_token_types([types.get(id, UNUSED) for id in range(vocab_size)])
    merges = description["model"]["merges"]
    file.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    file.add_bos_token_id(tokenizer.bos_id)
    file.add_eos_token_id(tokenizer.eos_id)
    file.add_eot_token_id(tokenizer.eos_id)
    file.add_pad_token_id(tokenizer.pad_id)
    file.add_add_bos_token(False)
    file.add_add_space_prefix(False)
    file.add_chat_template(chat_template(tokenizer.layout))


def _check_kind(description: dict[str, Any]) -> None:
    split = description.get("pre_tokenizer") or {}
    wrong = [f"{name} is {split.get(name)!r}" for name, value in _SPLIT.items() if split.get(name) != value]
    wrong += [
        f"{name} is {description['model'].get(name)!r}"
        for name, value in _PLAIN.items()
        if description["model"].get(name) not in (value, value and None)
    ]
    if description.get("normalizer"):
        wrong.append("it normalises")
    if wrong:
        raise WeightsError(
            f"llama.cpp would produce other token ids ({'; '.join(wrong)}): "
            f"only byte-level BPE with GPT-2's pattern (MiniMind's kind) can be converted"
        )


def read_tokenizer(reader: Reader) -> Tokenizer:
    """Rebuild the tokenizer from the keys that llama.cpp reads."""
    tokens, types, merges = (_list(reader, name) for name in ("tokens", "token_type", "merges"))
    vocab = {token: id for id, (token, type) in enumerate(zip(tokens, types, strict=False)) if type != UNUSED}
    pad, bos, eos = (reader.number(f"tokenizer.ggml.{name}_token_id") for name in ("padding", "bos", "eos"))
    used = sum(type != UNUSED for type in types)
    if len(types) != len(tokens) or len(vocab) != used:
        raise WeightsError(f"{reader.path}: its tokens do not belong to a MiniMind tokenizer — convert again")
    if not max(pad, bos, eos) < len(tokens):
        raise WeightsError(
            f"{reader.path}: has {len(tokens):,} tokens, and special tokens after them, which mmv does not support — "
            "convert again"
        )
    try:
        backend = FastTokenizer(models.BPE(vocab, [tuple(merge.split(" ", 1)) for merge in merges]))
    except Exception as error:  # the Rust library raises plain Exception
        raise WeightsError(f"{reader.path}: its tokenizer is damaged ({error}) — convert again") from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, type in zip(tokens, types, strict=True) if type == kind
        ]  # fmt: skip
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    backend.encode_special_tokens = True
    layout = usual_layout(backend)
    placeholder = vocab.get(find_layout(layout).placeholder)
    if placeholder is None:
        raise WeightsError(f"{reader.path}: its tokens do not belong to a MiniMind tokenizer — convert again")
    return Tokenizer(backend, pad, bos, eos, placeholder, layout)


def _list(reader: Reader, name: str) -> list[Any]:
    """An array of the tokenizer: texts, or the types of tokens."""
    values, kind = reader.key(f"tokenizer.ggml.{name}"), int if name == "token_type" else str
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise WeightsError(f"{reader.path}: tokenizer.ggml.{name} is not an array of {kind.__name__} — convert again")
    return values


def modelfile(files: list[str], layout: str) -> str:
    """Ollama's `Modelfile` for these files beside it.

    Ollama itself puts the mark of an image directly before the question.
    """
    chat = find_layout(layout)
    block = EMPTY_BLOCK if layout == "chatml-think" else ""
    return Template(read_asset("minimind_v.core.formats.gguf", "Modelfile")).substitute(
        sources="\n".join(f"FROM ./{name}" for name in files),
        answer=f'{{{{ if eq .Role "assistant" }}}}{block}{{{{ end }}}}' if block else "",
        block=block,
        system=f'SYSTEM """{chat.system_prompt}"""\n' if chat.system_prompt else "",
    )
