"""Models of every shape, small and with random weights, and texts of every kind."""

import random
import unicodedata
from pathlib import Path

import torch

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.formats.checkpoint import Checkpoint, Receipt
from minimind_v.core.formats.load import LoadedModel
from minimind_v.core.model.vision.clip import ClipVision
from minimind_v.core.model.vision.encoder import VisionEncoder, VisionSpec
from minimind_v.core.model.vision.spec import ClipConfig
from minimind_v.core.model.vlm import VLM
from tests.cli.harness import ASSETS

SIZES = {
    "dense": TextConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=600),
    "odd": TextConfig(
        hidden_size=72, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3, intermediate_size=100,
        vocab_size=613, rope_theta=12345.0, rms_norm_eps=1e-6,
    ),
    "moe": TextConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=600, use_moe=True),
    "moe, two shared": TextConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=600, use_moe=True, n_routed_experts=5,
        num_experts_per_tok=3, n_shared_experts=2,
    ),
    "moe, none shared": TextConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=600, use_moe=True, n_routed_experts=3,
        num_experts_per_tok=1, n_shared_experts=0,
    ),
}  # fmt: skip


def loaded_model(name="dense", seed=0, tokenizer=ASSETS, config=None, loud=8.0):
    """A model with a tower of its own, as `load` would give it; weights loud enough to tell logits apart."""
    torch.manual_seed(seed)
    config = config or SIZES[name]
    clip_config = ClipConfig(
        image_size=48, patch_size=16, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4
    )
    tower = ClipVision(clip_config)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else 0.15)
    loaded_tokenizer = Tokenizer.load(tokenizer)
    spec = VisionSpec(48, 16, 96)
    model = VLM(config, spec, loaded_tokenizer.placeholder_id, VisionEncoder(tower, spec))
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(loud) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) / 5)
    held = {key: value for key, value in model.state_dict().items() if not key.startswith("vision_encoder.")}
    checkpoint = Checkpoint(Path("sft_vlm.pth"), held, config, "sft", [], False)
    return LoadedModel(model.eval(), loaded_tokenizer, checkpoint, Receipt("made"))


TEXTS = (
    "",
    " ",
    "\n",
    "\n\n\n",
    " \t\r\n x",
    "a  b   c",
    "Hello, world!",
    "Don't you'll we're I'd IT'S can't've",
    "请描述这张图片里的内容。",
    "图中有2只猫，3.14米，２０２４年",
    "日本語のテキスト、한국어 텍스트",
    "🙂👨‍👩‍👧‍👦🏳️‍🌈 é é ﬁ",
    "def f(x):\n    return x[0] @ b  # {'a': 1}\n\n\tprint(f\"{x!r:>10}\")",
    "<|im_end|>\n<|im_start|>user <|endoftext|>",
    "@@@@ user@example.com @",
    "\u200b\ufeff\u00a0\u3000\u2028x\u0085y",
    "١٢٣ ½ ² Ⅷ ①",
    "\x00\x01\x7f\x1b[0m",
    "ǅ ß İ ı ﷺ",
    "\U0010ffff\U000e0001𝒳𐍈",
)  # fmt: skip


def random_texts(count, seed=0):
    """Strings of characters from everywhere, close to each other as often as not.

    Of those that Unicode 14 has: libraries of other years differ in what later ones are.
    """
    draw = random.Random(seed)
    ranges = ((32, 127), (32, 127), (0x4E00, 0x9FFF), (0x4E00, 0x4F00), (0, 0x2FF), (0x300, 0xD7FF), (0xE000, 0x10FFFF))
    common = [" ", "  ", "\n", "'s", "'re", "1", "，", "。", "的", "\t", "@", "🙂"]

    def piece():
        low, high = draw.choice(ranges)
        while unicodedata.category(letter := chr(draw.randint(low, high))) == "Cn":
            pass
        return draw.choice(common) if draw.random() < 0.3 else letter

    return ["".join(piece() for _ in range(draw.randint(1, 30))) for _ in range(count)]
