"""The page of `mmv data preview`: rows as the model receives them, with explanations."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from minimind_v.core.config.schema import RunConfig
from minimind_v.core.curate.preview import TEXT_ROW, BatchView, PictureView, RowView
from minimind_v.core.curate.token_text import Piece, visible
from minimind_v.core.model.vision.encoder import VisionSpec
from minimind_v.core.pages.frame import ASSETS, page
from minimind_v.core.rows.cells import data_uri
from minimind_v.core.wording import plural
from minimind_v.core.wording import size as file_size

NEWLINE = '<span class="dim">↵</span>'
SHIFTS = 6  # predictions of a row that the page lists


def preview_page(views: list[RowView], spec: VisionSpec, config: RunConfig, name: str) -> str:
    """The whole page."""
    side = spec.image_size // spec.patch_size
    used = sum(not view.trouble for view in views)
    head = (
        f"<h1>Rows as the model receives them</h1><p class='dim'>{plural(len(views), 'row')} of "
        f"<code>{escape(visible(name))}</code>, read as <b>{config.stage}</b> data: at most {config.data.max_length} "
        f"tokens per row, batches of {config.data.batch_size}, images of {spec.image_size} × {spec.image_size} pixels. "
        f"Training would use {used} of them.</p>"
    )
    switches = (
        f'<input type="checkbox" id="grid" hidden><input type="checkbox" id="ids" hidden>'
        f'<nav class="switches"><label for="grid"><b>▦</b> patch grid {side} × {side}</label>'
        f'<label for="ids"><b>#</b> token ids</label>{_legend()}</nav>'
    )
    body = head + _lesson(spec, config) + switches
    body += "<main>" + "".join(_row(view, spec, config) for view in views) + "</main>"
    return page(f"{name} — preview", body, "preview")


def _legend() -> str:
    samples = (("t", "context"), ("t l", "supervised"), ("t s", "special"), ("t p", "image"), ("t x", "cut off"))
    return (
        '<span class="legend">' + "".join(f'<span class="{kind}">{text}</span>' for kind, text in samples) + "</span>"
    )


def _lesson(spec: VisionSpec, config: RunConfig) -> str:
    """How to read the page, with the sizes of this run."""
    text = (ASSETS / "lesson.html").read_text(encoding="utf-8")
    return text.format(
        size=spec.image_size,
        patch=spec.patch_size,
        side=spec.image_size // spec.patch_size,
        patches=spec.tokens_per_image,
        width=spec.width,
        max_length=config.data.max_length,
        resizing=_resizing(spec),
    )


def _resizing(spec: VisionSpec) -> str:
    """The topic about how an image becomes a square."""
    if spec.resize_mode == "squeeze":
        return (
            "<h3>What squeezing does</h3>"
            f"<p>The vision encoder needs a square. Both sides become {spec.image_size} pixels: nothing is lost, but a "
            "wide image becomes narrower. The model learns from squeezed shapes, and receives them at every "
            "question.</p>"
        )
    return (
        "<h3>What the crop does</h3>"
        f"<p>The vision encoder needs a square. The shorter side becomes {spec.image_size} pixels, and the longer side "
        "is cropped to its middle. The model never receives the darkened edges. An answer about something in these "
        "edges teaches the model to invent things.</p>"
    )


# --- a row ------------------------------------------------------------------------------------------------------------


def _row(view: RowView, spec: VisionSpec, config: RunConfig) -> str:
    lost = view.whole - len(view.tokens)
    state, kind = ("skipped", "bad") if view.trouble else ("cut", "bad") if lost else ("complete", "good")
    blocks = [f'<h2><code>{_safe(view.location)}</code> <span class="badge {kind}">{state}</span></h2>']
    if view.trouble:
        blocks.append(f'<p class="warn">Training skips this row: {_safe(view.trouble)}.</p>')
    if view.pictures:
        removed = range(view.tokens.images, len(view.pictures)) if view.whole and view.tokens else range(0)
        pictures = (_picture(image, n, n in removed, spec) for n, image in enumerate(view.pictures))
        blocks.append(f'<div class="pictures">{"".join(pictures)}</div>')
    if view.whole:
        blocks += [_facts(view, config), "".join(_messages(view))]
    if view.unmarked:
        blocks.append(f'<p class="dim">This is {_safe(TEXT_ROW)}.</p>')
    if view.unanswered:
        blocks.append(
            f"<p>The last question has no answer, so training does not use it: "
            f'<span class="t x">{_safe(view.unanswered)}</span></p>'
        )
    if view.tokens and not view.trouble:
        blocks.append(_shift(view))
    if view.source:
        source = "\n".join(map(_safe, view.source.split("\n")))
        blocks.append(f"<details><summary>The row in the file</summary><pre>{source}</pre></details>")
    return f"<section>{''.join(blocks)}</section>"


def _picture(picture: PictureView, number: int, removed: bool, spec: VisionSpec) -> str:
    name = _safe(picture.name)
    if picture.trouble:
        return f'<p class="warn">Image {number + 1} cannot be shown: {_safe(picture.trouble)}</p>'
    side, size = spec.image_size // spec.patch_size, spec.image_size
    lines = "".join(f"M{n} 0V{side}M0 {n}H{side}" for n in range(1, side))
    grid = (
        f'<svg class="grid" viewBox="0 0 {side} {side}"><path d="{lines}" stroke="#fff" stroke-opacity=".75" '
        f'stroke-width="1" vector-effect="non-scaling-stroke"/></svg>'
    )
    gone = ' <span class="badge bad">cut off with its turn</span>' if removed else ""
    return (
        f'<figure class="original"><span class="frame"><img alt="" src="{data_uri(picture.thumbnail, "jpeg")}">'
        f"{_crop(picture)}</span><figcaption><b>Original</b> {name}: {picture.width} × {picture.height}, "
        f"{file_size(picture.size)} — {picture.resizing}{gone}"
        f'</figcaption></figure><figure class="model"><span class="frame"><img alt="" '
        f'src="{data_uri(picture.model, "png")}">{grid}</span><figcaption><b>What the model receives</b>: '
        f"{size} × {size} pixels, {side} × {side} patches, {spec.tokens_per_image} tokens</figcaption></figure>"
    )


def _crop(picture: PictureView) -> str:
    """The drawing over an original that darkens its cropped edges; empty for one that is not cropped."""
    if picture.squeezed:
        return ""
    width, height = picture.width, picture.height
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none"><path fill="#000a" fill-rule="evenodd" '
        f'd="M0 0H{width}V{height}H0ZM{left} {top}h{short}v{short}h-{short}Z"/><rect x="{left}" y="{top}" '
        f'width="{short}" height="{short}" fill="none" stroke="#fff" stroke-width="2" '
        f'vector-effect="non-scaling-stroke" stroke-dasharray="6 4"/></svg>'
    )


def _facts(view: RowView, config: RunConfig) -> str:
    tokens, images, supervised = len(view.tokens), sum(view.tokens.image_mask), view.supervised
    context, lost = tokens - images - supervised, view.whole - tokens
    facts = [(tokens, "tokens"), (images, "image patches"), (context, "context"), (supervised, "supervised")]
    if lost:
        facts += [(lost, "cut off"), (view.answers_lost, "of these in answers")]
    padding = view.batch.length - tokens if view.batch else 0
    bar = ((images, "image"), (context, "context"), (supervised, "supervised"), (padding, "pad"), (lost, "cut"))
    total = max(sum(width for width, _ in bar), 1)
    return (
        '<div class="bar">'
        + "".join(f'<i class="b-{name}" style="width:{100 * width / total:.2f}%"></i>' for width, name in bar)
        + '</div><div class="facts">'
        + "".join(f"<span><b>{number:,}</b> {text}</span>" for number, text in facts)
        + f"</div>{_padding(view.batch, tokens, config)}"
    )


def _padding(batch: BatchView | None, tokens: int, config: RunConfig) -> str:
    if batch is None:
        return ""
    return (
        f'<p class="dim">In the first epoch, this row is in a batch with {plural(batch.rows - 1, "other row")} of up '
        f"to {batch.length} tokens and gets <b>{batch.length - tokens}</b> tokens of padding. Padded to "
        f"{config.data.max_length} tokens, it would get {config.data.max_length - tokens}.</p>"
    )


def _messages(view: RowView) -> Iterator[str]:
    """The pieces in a block per message; each message begins with the row's first special token."""
    opening = view.pieces[0].ids if view.pieces else ()
    blocks: list[list[Piece]] = []
    for piece in view.pieces:
        if not blocks or (piece.special and piece.ids == opening):
            blocks.append([])
        blocks[-1].append(piece)
    yield '<div class="text">'
    for block in blocks:
        role = "".join(piece.text for piece in block[1:6] if piece.picture is None).partition("\n")[0]
        kind = role if role in ("user", "assistant", "system") else "system"
        yield f'<div class="message {kind}">{"".join(_chip(piece) for piece in block)}</div>'
    if view.hidden:
        yield f'<p class="dim">… and {view.hidden:,} more tokens, not shown here.</p>'
    yield "</div>"


def _chip(piece: Piece) -> str:
    kinds = {
        "t": True, "s": piece.special, "l": piece.supervised, "x": piece.removed,
        "many": bool(piece.token_bytes), "p": piece.picture is not None,
    }  # fmt: skip
    kind, ids = " ".join(name for name in kinds if kinds[name]), " ".join(map(str, piece.ids))
    if piece.picture is not None:
        patches = len(piece.ids)
        text = f"▦ image {piece.picture + 1} · {patches} patches"
        return f'<span class="{kind}" data-id="{piece.ids[0]} × {patches}">{text}</span> '
    # The line breaks after the chip, not in it, lest an empty end of it stand on the next line.
    breaks = piece.text.endswith("\n")
    shown = _safe(piece.text.removesuffix("\n"), lines=True) + NEWLINE * breaks
    if piece.token_bytes:
        shown += f"<small>{' | '.join(piece.token_bytes)}</small>"
    return f'<span class="{kind}" data-id="{ids}" title="{ids}">{shown}</span>{"<br>" * breaks}'


def _shift(view: RowView) -> str:
    """The first predictions of a row, and its last."""
    pieces = [piece for piece in view.pieces if not piece.removed]
    targets = [n for n in range(1, len(pieces)) if pieces[n].supervised]
    if not targets:
        return ""
    rows = [
        f"<tr><td><span class='t'>{_safe(pieces[n - 1].text) or '…'}</span></td>"
        f"<td><span class='t l'>{_safe(pieces[n].text) or '…'}</span></td></tr>"
        for n in (targets if len(targets) <= SHIFTS + 1 else [*targets[:SHIFTS], targets[-1]])
    ]
    if len(targets) > SHIFTS + 1:
        rows.insert(-1, f'<tr><td class="dim">… {len(targets) - SHIFTS - 1} more …</td><td></td></tr>')
    return (
        f"<details><summary>The loss mask, token by token</summary><p>{view.supervised} of {len(view.tokens)} tokens "
        "are supervised; the model predicts each of them at the token before it. The loss of this row is the mean "
        f"surprise at these tokens; the other {len(view.tokens) - view.supervised} do not count.</p>"
        f'<table class="shift"><tr><th>after reading</th><th>predict</th></tr>{"".join(rows)}</table></details>'
    )


def _safe(text: str, lines: bool = False) -> str:
    """Text for a page, with control characters escaped; with `lines`, a line break also breaks the line."""
    if not lines:
        return escape(visible(text))
    return f"{NEWLINE}\n".join(escape(visible(line)) for line in text.split("\n"))
