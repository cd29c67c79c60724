"""Answer test prompts with llama.cpp and the exported files, without mmv.

`verify_gguf` runs it with the exported folder, and a folder with `cases.json` and picture files for `answers.npz`.
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
    """A model and its vision encoder, if it has one, open in llama.cpp."""

    def __init__(self, folder: Path, context: int = 2048) -> None:
        import llama_cpp
        from jinja2 import Environment
        from llama_cpp import mtmd_cpp

        self.mtmd: Any = mtmd_cpp
        self.api: Any = llama_cpp
        self.llama: Any = llama_cpp.Llama(
            str(folder / "model.gguf"), n_ctx=context, n_threads=1, n_threads_batch=1, verbose=False
        )
        mmproj = folder / "mmproj.gguf"
        self.vision = self._open_vision(mmproj) if mmproj.is_file() else None
        self.mark = mtmd_cpp.mtmd_default_marker().decode()
        self.template = Environment().from_string(self.llama.metadata["tokenizer.chat_template"])

    def _open_vision(self, mmproj: Path) -> Any:
        options = self.mtmd.mtmd_context_params_default()
        options.use_gpu = False
        options.n_threads = self.llama.n_threads
        vision = self.mtmd.mtmd_init_from_file(str(mmproj).encode(), self.llama.model, options)
        if not vision or not self.mtmd.mtmd_support_vision(vision):
            raise ValueError("llama.cpp could not open mmproj.gguf")
        return vision

    def ids(self, text: str) -> list[int]:
        """Token ids of ordinary text."""
        return self.llama.tokenize(text.encode(), add_bos=False, special=False) if text else []

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """The messages in the file's own layout, with llama.cpp's mark for each image."""

        def as_text(item: dict[str, Any]) -> dict[str, Any]:
            return {"type": "text", "text": self.mark if item["type"] == "image" else item["text"]}

        marked = [message | {"content": [as_text(item) for item in message["content"]]} for message in messages]
        return self.template.render(messages=marked, add_generation_prompt=True)

    def read(self, prompt: str, pictures: list[Path]) -> tuple[list[int], np.ndarray]:
        """Read a prompt. Returns the ids, -1 for each position of an image, and the projected features there [N, H]."""
        self.llama.reset()
        self.llama._ctx.kv_cache_clear()
        if not self.vision:
            ids = self.llama.tokenize(prompt.encode(), add_bos=False, special=True)
            self.llama.eval(ids)
            return ids, np.zeros((0, 0), np.float32)
        chunks = self._chunks(prompt, pictures)
        ids = []
        features: list[np.ndarray] = []
        for number in range(self.mtmd.mtmd_input_chunks_size(chunks)):
            chunk = self.mtmd.mtmd_input_chunks_get(chunks, number)
            count = self.mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            if self.mtmd.mtmd_input_chunk_get_type(chunk) == self.mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                tokens = self.mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(ctypes.c_size_t()))
                ids += tokens[:count]
                self.llama.eval(tokens[:count])
            else:
                ids += [-1] * count
                features.append(self._encode(chunk, count))
        self.mtmd.mtmd_input_chunks_free(chunks)
        return ids, np.concatenate(features) if features else np.zeros((0, 0), np.float32)

    def _chunks(self, prompt: str, pictures: list[Path]) -> Any:
        bitmaps = []
        for picture in pictures:
            data = picture.read_bytes()
            buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
            bitmaps.append(self.mtmd.mtmd_helper_bitmap_init_from_buf(self.vision, buffer, len(data), False))
        text = self.mtmd.mtmd_input_text()
        encoded = prompt.encode()
        text.text, text.text_len, text.add_special, text.parse_special = encoded, len(encoded), True, True
        chunks = self.mtmd.mtmd_input_chunks_init()
        array = (self.mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        failed = self.mtmd.mtmd_tokenize(self.vision, chunks, ctypes.byref(text), array, len(bitmaps))
        for bitmap in bitmaps:
            self.mtmd.mtmd_bitmap_free(bitmap)
        if failed:
            raise ValueError(f"llama.cpp refused the prompt (code {failed})")
        return chunks

    def _encode(self, chunk: Any, count: int) -> np.ndarray:
        if self.mtmd.mtmd_encode_chunk(self.vision, chunk):
            raise ValueError("llama.cpp could not encode the image")
        shape = (count, self.llama.n_embd())
        features = np.ctypeslib.as_array(self.mtmd.mtmd_get_output_embd(self.vision), shape).copy()
        past = ctypes.c_int32()
        llama = self.llama
        if self.mtmd.mtmd_helper_eval_chunk_single(
            self.vision, llama._ctx.ctx, chunk, llama.n_tokens, 0, llama.n_batch, False, ctypes.byref(past)
        ):
            raise ValueError("llama.cpp could not read the image")
        self.llama.n_tokens = past.value
        return features

    def logits(self) -> np.ndarray:
        """The logits of the next token [V]."""
        logits = self.api.llama_get_logits_ith(self.llama._ctx.ctx, -1)
        return np.ctypeslib.as_array(logits, (self.llama.n_vocab(),)).copy()

    def say(self, limit: int = NEW_TOKENS) -> tuple[list[int], np.ndarray]:
        """Generate greedily up to the end mark, included. Returns the tokens and their logits [N, V]."""
        tokens: list[int] = []
        logits: list[np.ndarray] = []
        while len(tokens) < limit and (not tokens or tokens[-1] != self.llama.token_eos()):
            if tokens:
                self.llama.eval(tokens[-1:])
            logits.append(self.logits())
            tokens.append(int(logits[-1].argmax()))
        return tokens, np.stack(logits)


def main(folder: Path, work: Path) -> None:
    """Answer the cases; write ids, projected features, tokens and logits, and the ids of the texts."""
    model = LlamaCpp(folder)
    questions = json.loads((work / "cases.json").read_text(encoding="utf-8"))
    answers: dict[str, np.ndarray] = {}
    for number, case in enumerate(questions["cases"]):
        ids, features = model.read(model.prompt(case["messages"]), [work / name for name in case["pictures"]])
        tokens, logits = model.say()
        for name, value in (("ids", ids), ("features", features), ("tokens", tokens), ("logits", logits)):
            answers[f"{name}{number}"] = np.asarray(value)
    for number, text in enumerate(questions["texts"]):
        answers[f"text{number}"] = np.asarray(model.ids(text), dtype=np.int64)
    np.savez(work / "answers.npz", **answers)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
