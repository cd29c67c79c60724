"""The demo's tokenizer: words of its world, and the added tokens of a generation."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from minimind_v.core.config.generation import V2025
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.data.layouts import ChatML
from minimind_v.core.demo import world
from minimind_v.core.demo.generations import DemoGeneration

# The added tokens in the order of their ids, as published: those of both generations, and those of minimind-3v alone.
# The last are not special, so decoding keeps them.
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MEDIA = ["<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
         "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
         "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>",
         "<tts_text_bos_single>"]  # fmt: skip
KEPT = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
        *(f"<|buffer{number}|>" for number in range(1, 10))]  # fmt: skip


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
