"""What `mmv look` shows in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from minimind_v.cli.terminal import Terminal
from minimind_v.core.curate.token_text import visible

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from minimind_v.core.generate.traced import Trace, TracedImage

FULL = 8.0  # bits of the strongest colour
GAIN, LOSS, HEAT = (18, 165, 148), (229, 130, 74), (255, 190, 60)
SHOWN = 0.001  # of probability: a rival with less is left out
GRID_WIDTH = 7  # cells of a patch's word, at most
WIDE = 64  # cells of a terminal that has room for all columns of the table of tokens
PICTURE_WIDTH = 44  # cells of an image
IMAGES = {
    "grey": "grey image", "mirrored": "mirrored image", "rotated": "images in another order",
    "another": "another image", "painted": "painted image",
}  # fmt: skip


def show_trace(terminal: Terminal, trace: Trace) -> None:
    """Write the answer coloured by the bits that the image gives, tokens and rivals, the image, words of patches."""
    out = terminal.out
    out.soft_wrap = not out.is_terminal  # there, lines break between words
    out.print(_answer(trace))
    bits, blank = sum(token.bits for token in trace.tokens), sum(token.bits_blank for token in trace.tokens)
    gain = f"The image gives {blank - bits:.1f} bits to this answer"
    out.print(Text(f"\n{gain}: {bits:.1f} bits of surprise with it, {blank:.1f} with a grey image.", "bold"))
    out.print(_tokens(trace, out.width))
    for number, image in enumerate(trace.images):
        _show_image(terminal, trace, number, image)
    for variant in trace.variants.values():
        out.print(Text.assemble((f"answer to the {IMAGES[variant.images]}: ", "dim"), visible(variant.answer)))


def _answer(trace: Trace) -> Text:
    pieces = []
    for token in trace.tokens:
        share = max(-1.0, min(1.0, token.gain / FULL))
        red, green, blue = GAIN if share > 0 else LOSS
        style = f"on #{_mix((36, 40, 46), (red, green, blue), abs(share))}" if abs(share) > 0.04 else ""
        pieces.append((visible(token.text), f"white {style}" if style else ""))
    return Text.assemble(*pieces)


def _tokens(trace: Trace, width: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    bits = ("bits", "grey image") if width >= WIDE else ()
    for name in ("token", "probability", *bits, "from the image", "rivals"):
        is_last = name == "rivals"  # it has what the others leave
        justify: JustifyMethod = "left" if is_last or name == "token" else "right"
        table.add_column(name, justify=justify, no_wrap=True, ratio=1 if is_last else None)
    for token in trace.tokens:
        rivals = Text()
        for word in token.rivals:
            if word.value >= SHOWN:
                rivals.append(visible(word.text).strip() or "␣").append(f" {word.value:.1%}  ", "dim")
        gain = Text(f"{round(token.gain, 2) + 0:+.2f}", "bold" if abs(token.gain) >= 1 else "dim")
        numbers = [f"{token.probability:.1%}", f"{token.bits:.2f}", f"{token.bits_blank:.2f}"][: len(bits) + 1]
        table.add_row(Text(visible(token.text)), *numbers, gain, rivals)
    return table


# --- images -----------------------------------------------------------------------------------------------------------


def _show_image(terminal: Terminal, trace: Trace, number: int, image: TracedImage) -> None:
    out, count = terminal.out, image.rows * image.columns
    patches = slice(number * count, (number + 1) * count)
    which = f" {number + 1}" if len(trace.images) > 1 else ""
    if out.is_terminal:
        from textual_image.renderable import HalfcellImage

        out.print(Text(f"\nImage{which}, and what the answer attends to (mean of all layers and heads)", "dim"))
        attention = trace.attention[..., patches].mean(axis=(0, 1, 2)).reshape(image.rows, image.columns)
        out.print(HalfcellImage(heated(image.pixels, attention), width=min(PICTURE_WIDTH, out.width), height="auto"))
    out.print(Text(f"\nNearest word of each patch{which and f' of image{which}'}", "dim"))
    out.print(
        _grid([patch.nearest[0].text if patch.nearest else "" for patch in trace.patches[patches]], image, out.width)
    )
    if trace.occlusion is not None:
        lost = trace.occlusion[:, patches].sum(axis=0).tolist()
        out.print(Text(f"\nBits that the answer loses where a patch{which and f' of image{which}'} is grey", "dim"))
        out.print(_grid([f"{round(bits, 1) + 0:.1f}" for bits in lost], image, out.width))


def _grid(texts: Sequence[str], image: TracedImage, width: int) -> Text:
    """Texts in rows and columns, cut to equal widths."""
    cells = max(2, min(GRID_WIDTH, width // image.columns - 1, max(map(cell_len, texts))))
    rows = [texts[start : start + image.columns] for start in range(0, len(texts), image.columns)]
    return Text("\n".join(" ".join(set_cell_size(visible(text), cells) for text in row).rstrip() for row in rows))


def heated(pixels: np.ndarray, weights: np.ndarray) -> Image:
    """An image [3, S, S], dimmed, that glows where the weights [rows, columns] of its patches are high."""
    import numpy as np
    from PIL import Image as Pillow

    size = pixels.shape[-1]
    map_image = Pillow.fromarray((weights / max(weights.max(), 1e-9)).astype(np.float32))
    heat = np.asarray(map_image.resize((size, size), Pillow.Resampling.BILINEAR))[..., None]  # [S, S, 1]
    mixed = pixels.transpose(1, 2, 0) * (0.55 + 0.45 * heat) * (1 - 0.45 * heat) + np.array(HEAT) * 0.45 * heat
    return Pillow.fromarray(mixed.clip(0, 255).astype(np.uint8))


def _mix(low: tuple[int, int, int], high: tuple[int, int, int], share: float) -> str:
    return "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))
