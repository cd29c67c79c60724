"""Answer test prompts with llama.cpp and the two exported files, without mmv.

Run as a program by `verify_gguf`: the folder, and a folder with `cases.json` and pictures, which gets `answers.npz`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

NEW_TOKENS = 32


class LlamaCpp:
    """A model with its eye, open in llama.cpp."""

    def __init__(self, folder: Path, context: int = 2048) -> None:
        import llama_cpp
        from jinja2 import Environment
        from llama_cpp import mtmd_cpp

        self.mtmd: Any = mtmd_cpp
        self.api: Any = llama_cpp
        self.llama: Any = llama_cpp.Llama(
            str(folder / "model.gguf"), n_ctx=context, n_threads=1, n_threads_batch=1, verbose=False
        )
        options = mtmd_cpp.mtmd_context_params_default()
        options.use_gpu = False
        options.n_threads = self.llama.n_threads
        self.eye = mtmd_cpp.mtmd_init_from_file(str(folder / "mmproj.gguf").encode(), self.llama.model, options)
        if not self.eye or not mtmd_cpp.mtmd_support_vision(self.eye):
            raise ValueError("llama.cpp could not open mmproj.gguf")
        self.mark = mtmd_cpp.mtmd_default_marker().decode()
        self.template = Environment().from_string(self.llama.metadata["tokenizer.chat_template"])

    def ids(self, text: str) -> list[int]:
        """Token ids of ordinary text."""
        return self.llama.tokenize(text.encode(), add_bos=False, special=False) if text else []

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """The messages in the file's own layout, each picture as llama.cpp's mark."""
        marked = [
            said | {"content": [
                {"type": "text", "text": self.mark if part["type"] == "image" else part["text"]}
                for part in said["content"]
            ]}
            for said in messages
        ]  # fmt: skip
        return self.template.render(messages=marked, add_generation_prompt=True)

    def read(self, prompt: str, pictures: list[Path]) -> tuple[list[int], np.ndarray]:
        """Let the model read. Returns the ids, -1 for each position of a picture, and what it is given there [N, H]."""
        self.llama.reset()
        self.llama._ctx.kv_cache_clear()
        chunks = self._chunks(prompt, pictures)
        ids: list[int] = []
        given: list[np.ndarray] = []
        for number in range(self.mtmd.mtmd_input_chunks_size(chunks)):
            chunk = self.mtmd.mtmd_input_chunks_get(chunks, number)
            count = self.mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            if self.mtmd.mtmd_input_chunk_get_type(chunk) == self.mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                found = self.mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(ctypes.c_size_t()))
                ids += found[:count]
                self.llama.eval(found[:count])
            else:
                ids += [-1] * count
                given.append(self._look(chunk, count))
        self.mtmd.mtmd_input_chunks_free(chunks)
        return ids, np.concatenate(given) if given else np.zeros((0, 0), np.float32)

    def _chunks(self, prompt: str, pictures: list[Path]) -> Any:
        bitmaps = []
        for picture in pictures:
            data = picture.read_bytes()
            buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
            bitmaps.append(self.mtmd.mtmd_helper_bitmap_init_from_buf(self.eye, buffer, len(data), False))
        text = self.mtmd.mtmd_input_text()
        encoded = prompt.encode()
        text.text, text.text_len, text.add_special, text.parse_special = encoded, len(encoded), True, True
        chunks = self.mtmd.mtmd_input_chunks_init()
        array = (self.mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        failed = self.mtmd.mtmd_tokenize(self.eye, chunks, ctypes.byref(text), array, len(bitmaps))
        for bitmap in bitmaps:
            self.mtmd.mtmd_bitmap_free(bitmap)
        if failed:
            raise ValueError(f"llama.cpp refused the prompt (code {failed})")
        return chunks

    def _look(self, chunk: Any, count: int) -> np.ndarray:
        if self.mtmd.mtmd_encode_chunk(self.eye, chunk):
            raise ValueError("llama.cpp could not encode the image")
        width = self.llama.n_embd()
        found = np.ctypeslib.as_array(self.mtmd.mtmd_get_output_embd(self.eye), (count * width,)).copy()
        past = ctypes.c_int32()
        if self.mtmd.mtmd_helper_eval_chunk_single(
            self.eye, self.llama._ctx.ctx, chunk, self.llama.n_tokens, 0, self.llama.n_batch, False, ctypes.byref(past)
        ):
            raise ValueError("llama.cpp could not read the image")
        self.llama.n_tokens = past.value
        return found.reshape(count, width)

    def logits(self) -> np.ndarray:
        """Of the next token [V]."""
        found = self.api.llama_get_logits_ith(self.llama._ctx.ctx, -1)
        return np.ctypeslib.as_array(found, (self.llama.n_vocab(),)).copy()

    def say(self, limit: int = NEW_TOKENS) -> tuple[list[int], np.ndarray]:
        """The likeliest tokens up to the end, the end included, and the logits that each was taken from [N, V]."""
        said: list[int] = []
        thought: list[np.ndarray] = []
        while len(said) < limit and (not said or said[-1] != self.llama.token_eos()):
            if said:
                self.llama.eval(said[-1:])
            thought.append(self.logits())
            said.append(int(thought[-1].argmax()))
        return said, np.stack(thought)


def main(folder: Path, work: Path) -> None:
    """Read the cases and the texts, answer each, write what was read, seen, thought and said."""
    model = LlamaCpp(folder)
    asked = json.loads((work / "cases.json").read_text(encoding="utf-8"))
    found: dict[str, np.ndarray] = {}
    for number, case in enumerate(asked["cases"]):
        ids, given = model.read(model.prompt(case["messages"]), [work / name for name in case["pictures"]])
        said, thought = model.say()
        for name, value in (("ids", ids), ("given", given), ("said", said), ("logits", thought)):
            found[f"{name}{number}"] = np.asarray(value)
    for number, text in enumerate(asked["texts"]):
        found[f"text{number}"] = np.asarray(model.ids(text), dtype=np.int64)
    np.savez(work / "answers.npz", **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
