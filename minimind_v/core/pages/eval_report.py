"""`report.html` of `mmv eval --task`: the figures with their intervals, and questions with their images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from minimind_v.core.curate.token_text import visible
from minimind_v.core.errors import shorten
from minimind_v.core.evaluate.ask import SEEN
from minimind_v.core.evaluate.by_task import Evaluation
from minimind_v.core.evaluate.results import most_frequent_kinds
from minimind_v.core.evaluate.sheets import Card
from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.pages.frame import figures, page, write_page
from minimind_v.core.pages.plot import COLOURS, HEIGHT, WIDTH, Interval, axis, chart, intervals, legend, number
from minimind_v.core.rows.cells import data_uri
from minimind_v.core.wording import answer_text, chance, plural

PAGE = "report.html"  # in the folder of an evaluation
Figure = Mapping[str, Any]  # an entry of a report: value, ci_low, ci_high …
LONGEST, SHORT = 300, 60  # characters of a text on a card, and of a name in a figure
ACROSS = 24  # characters of the heads of a table, beyond which they stand upright
LABELS = 6  # below a histogram, without the last
SKIPPED = 5  # that are listed
ALIKE = 0.9  # the share of equal answers from which the page says that they are
UNSHARP = 0.3  # the width of an interval from which the page says that it is wide
REPLACEMENTS = {"blank": "a grey image", "swapped": "the image of another row", "none": "no image"}
SHEETS = {
    "helped": (
        "Helped by the image",
        "Better with their image than with a grey one: the largest differences, the surest answers first.",
    ),
    "misled": (
        "Misled by the image",
        "Worse with their image than with a grey one: the largest differences, the surest answers first.",
    ),
    "best": ("Best answers", "The best scores, of equal ones the surest answers first."),
    "worst": ("Worst answers", "The worst scores, of equal ones the surest answers first. A truth may be wrong."),
    "random": ("Random questions", "Drawn by chance: these alone say what a usual answer looks like."),
}


def write_eval_report(evaluation: Evaluation) -> Path:
    """Write the page into the folder of the evaluation. Raises UsageError for a file of others, or RunError."""
    path = Path(evaluation.report["predictions"]).with_name(PAGE)
    write_page(path, eval_report_page(evaluation))
    return path


def eval_report_page(evaluation: Evaluation) -> str:
    """The page."""
    report, thumbnails = evaluation.report, evaluation.thumbnails
    title = f"{report['task']} · {Path(report['model']).name}"
    split = f", split {report['split']}" if report.get("split") else ""
    note = f"<p><b>{safe(report['note'])}</b></p>" if report.get("note") else ""
    sheets = "".join(
        section(head, f'<p class="dim">{text}</p>{cards(map(_card, evaluation.sheets[name]), thumbnails)}')
        for name, (head, text) in SHEETS.items()
        if evaluation.sheets[name]
    )
    body = (
        f'<h1>{safe(title)}</h1><p class="dim"><code>{safe(report["model"])}</code> on '
        f"<code>{safe(report['data'])}</code>{safe(split)}: {plural(report['rows'], 'question')} about "
        f"{plural(report['pictures'], 'image')}, {report['skipped']:,} skipped.</p>{note}"
        f"{_gains(report)}{_metrics(report)}{_kinds(report)}{_confusion(report)}{_calibration(report)}"
        f"{_lengths(report)}{_languages(report)}{sheets}{_skipped(evaluation)}{_files(report)}"
    )
    return page(f"{title} — evaluation", body, "plot", "eval_report")


# --- figures ----------------------------------------------------------------------------------------------------------


def _gains(report: Figure) -> str:
    gains = {REPLACEMENTS[name]: gain for name, gain in report["visual_gain"].items() if gain["value"] is not None}
    values = {REPLACEMENTS[name]: report["variants"][name] for name in REPLACEMENTS}
    if not gains:
        return section("Does it use its image?", "<p>No question has an image that could be replaced.</p>")
    rows = [interval_of(f"over {name}", gain) for name, gain in gains.items()]
    table = "".join(f"<tr><td>with {name}</td><td>{_value(values[name])}</td></tr>" for name in gains)
    verdicts = "".join(f"<li>{_verdict(name, gain)}</li>" for name, gain in gains.items())
    return section(
        "Does it use its image?",
        f"<p>How much better <b>{safe(_gain_name(report))}</b> is with the image than with {_listed(gains)}.</p>"
        f"<table><tr><th></th><th>{safe(_gain_name(report))}</th></tr><tr><td>with the image</td>"
        f"<td>{_value(report['variants'][SEEN])}</td></tr>{table}</table>"
        f"{intervals(rows)}<ul>{verdicts}</ul>{reading('A dot is the measured difference, its line')}",
    )


def _value(value: float | None) -> str:
    return "no such answers" if value is None else f"{value:.3f}"


def _verdict(name: str, gain: Figure) -> str:
    """What a gain shows, and no more."""
    if gain["ci_low"] is None:
        return f"Against {name}: no interval (a single image, or nothing varies), so nothing is shown."
    if gain["ci_low"] > 0:
        verdict = "the answers are <b>better with the image</b>"
    elif gain["ci_high"] < 0:
        verdict = "the answers are <b>worse with the image</b>"
    else:
        verdict = (
            "the interval contains 0. These data <b>do not show</b> that the image improves the answers, nor that it "
            "does not"
        )
    return f"Against {name}: {verdict} ({chance(gain['p'])})."


def _metrics(report: Figure) -> str:
    metrics, answer = report["metrics"], report["most_frequent_answer"]
    wide = [
        metric["name"]
        for metric in metrics
        if metric["ci_low"] is not None and metric["ci_high"] <= 1 and metric["ci_high"] - metric["ci_low"] > UNSHARP
    ]
    notes = [f"These data say little about {safe(', '.join(wide))}: the interval is wide."] if wide else []
    if all(metric["ci_low"] is None for metric in metrics):
        notes.append("No figure has an interval: the questions are about a single image, or nothing varies.")
    if answer is not None and answer["n"] > max(1, ALIKE * report["rows"]):
        notes.append(
            f"<b>{answer['n']:,} of {report['rows']:,} answers are the same: {_label(answer['answer'])}.</b> It is the "
            f"true answer to {plural(answer['truths'], 'question')}."
        )
    return section("Metrics", charts(metrics) + "".join(f"<p>{note}</p>" for note in notes))


def _kinds(report: Figure) -> str:
    kinds = report.get("kinds", {})
    if not kinds:
        return ""
    shown, more = most_frequent_kinds(kinds)
    gains = [
        interval_of(name, kinds[name]["visual_gain"]["blank"])
        for name in shown
        if kinds[name]["visual_gain"]["blank"]["value"] is not None
    ]
    rows = [interval_of(name, kinds[name]) for name in shown]
    rest = f"<p>{more:,} kinds with fewer questions are in report.json.</p>" if more else ""
    gain = f"<h3>Gain over a grey image</h3>{intervals(gains)}" if gains else ""
    around = (0.0, 1.0) if all((row.high or row.value or 0) <= 1 for row in rows) else (0.0,)
    metric = next(iter(kinds.values()))["name"]
    return section(
        "By kind of question",
        f"{gain}<h3>{safe(metric)}</h3>{intervals(rows, around)}{rest}<p>By chance, one interval of 20 misses its true "
        "value: of many kinds, one that stands out shows little.</p>",
    )


def _confusion(report: Figure) -> str:
    confusion = report["confusion"]
    if confusion is None:
        return ""
    counts, labels = confusion["counts"], [*confusion["labels"], "other"]
    columns = [number for number in range(len(labels)) if number < len(labels) - 1 or any(row[-1] for row in counts)]
    head = "".join(f"<th>{_label(labels[number])}</th>" for number in columns)
    rows = "".join(
        f"<tr><th>{_label(label)}</th>{''.join(_cell(row, row_number, column, labels) for column in columns)}"
        f"<td>{sum(row):,}</td></tr>"
        for row_number, (label, row) in enumerate(zip(labels, counts, strict=True))
        if any(row)
    )
    down = " down" if sum(len(labels[number]) for number in columns) > ACROSS else ""
    n, most = sum(map(sum, counts)), max(map(sum, counts[:-1]))
    baseline = f"Always answering {_label(labels[0])} would agree in {most / n:.0%} of {plural(n, 'question')}."
    return section(
        "Which answers are taken for which",
        f'<div class="wide"><table class="confusion{down}"><tr><th>truth ↓ answer →</th>{head}<th>all</th>'
        f"</tr>{rows}</table></div><p>A row has the questions of one true answer (of several, the most frequent one), "
        f"and its right answers in the framed cell. {baseline}</p>",
    )


def _cell(row: Sequence[int], row_number: int, column: int, labels: Sequence[str]) -> str:
    share = row[column] / sum(row)
    kind = "same" if row_number == column < len(labels) - 1 else "" if row[column] else "dim"
    return f'<td class="{kind}" style="--share:{50 * share:.0f}%">{row[column]:,}</td>'


def _label(label: str) -> str:
    return f"<bdi>{safe(shorten(label, SHORT))}</bdi>" if label.strip() else "(nothing)"


def _calibration(report: Figure) -> str:
    head, calibration = "Calibration: is it as sure as it is right?", report["calibration"]
    if calibration is None:
        return section(head, '<p class="dim">No figure: the answers of this task have no probability of their own.</p>')
    over = calibration["overconfidence"]
    numbers = {
        "mean probability of its answers": _percent(calibration["confidence"]),
        "of these answers are right": _percent(calibration["score"]),
    }
    if calibration["ece"] is not None:
        label = f"expected calibration error; by chance alone some {calibration['ece_by_chance']:.3f}"
        numbers[label] = f"{calibration['ece']:.3f}"
    if over["ci_low"] is None:
        verdict = "No interval (a single image, or nothing varies), so nothing is shown."
    elif over["ci_low"] <= 0 <= over["ci_high"]:
        verdict = "The interval contains 0: these data show neither that the model is too sure nor that it is not."
    elif calibration["ece"] is None or calibration["ece"] <= calibration["ece_by_chance"]:
        verdict = "The interval leaves out 0, but the error is not shown to be more than that of chance."
    elif over["ci_low"] > 0:
        verdict = "The model is <b>surer than it is right</b>."
    else:
        verdict = "The model is <b>less sure than it is right</b>."
    drawn = (
        f'<div class="square">{_reliability(calibration["bins"])}</div><p>Each dot is a group of answers: to the '
        "right the model was surer, upwards it was more often right. On the dashed line both agree; a line through a "
        "dot is the 95 % interval. A dot whose interval meets the dashed line shows no error.</p>"
        if calibration["bins"]
        else f"<p>{plural(calibration['n'], 'answer')}: too few for groups by probability.</p>"
    )
    difference = intervals([interval_of("probability − score", over)])
    return section(
        head,
        f"{figures(numbers)}{difference}<p>{verdict} The probability is that of the answer in these words; of a "
        f"choice, that among the choices.</p>{drawn}",
    )


def _percent(share: float) -> str:
    """A share that is not whole is rounded neither to all nor to nothing."""
    text = f"{share:.0%}"
    return {"100%": "over 99%", "0%": "under 1%"}.get(text, text) if 0 < share < 1 else text


def _reliability(bins: Sequence[Figure]) -> str:
    def at(x: float, y: float) -> str:
        return f"{WIDTH * x:.1f},{HEIGHT * (1 - y):.2f}"

    shapes = f'<polyline class="even" points="{at(0, 0)} {at(1, 1)}"/>'
    for own in bins:
        x, y = own["confidence"], own["value"]
        if own["ci_low"] is not None:
            shapes += f'<polyline class="range" points="{at(x, own["ci_low"])} {at(x, own["ci_high"])}"/>'
        shapes += f'<polyline class="point" points="{at(x, y)} {at(x, y)}"><title>n {own["n"]:,}</title></polyline>'
    labels = [(0.0, "probability 0"), (0.5, "0.5"), (1.0, "1")]
    return chart(shapes, axis(0, 1), labels)


def _lengths(report: Figure) -> str:
    lengths = report["answer_length"]
    if lengths is None:
        return ""
    sides, width = {"model": COLOURS[0], "truth": COLOURS[3]}, lengths["width"]
    bars = len(lengths["model"])
    ticks, step = axis(0, max(lengths["model"] + lengths["truth"])), WIDTH / bars
    shapes = "".join(
        f'<rect x="{step * (bar + 0.08 + 0.42 * side):.2f}" y="{HEIGHT * (1 - count / ticks[-1]):.2f}" '
        f'width="{step * 0.42:.2f}" height="{HEIGHT * count / ticks[-1]:.2f}" style="fill:{colour}">'
        f"<title>{count:,}</title></rect>"
        for side, (name, colour) in enumerate(sides.items())
        for bar, count in enumerate(lengths[name])
    )
    labels = [
        ((bar + 0.5) / bars, str(bar) if width == 1 else f"{bar * width}–{bar * width + width - 1}")
        for bar in range(bars)
    ]
    if lengths["longest"] >= bars * width:
        labels[-1] = labels[-1][0], f"{(bars - 1) * width} or more"
    shown = [*labels[: -(bars > LABELS) - 1 : -(-bars // LABELS)], labels[-1]]
    key = legend([(sides["model"], "answers of the model"), (sides["truth"], "true answers")])
    return section(
        "Length of the answers",
        f"{chart(shapes, ticks, shown)}{key}<p>Words of an answer; a Chinese character counts as one. The mean is "
        f"{lengths['model_mean']:.1f}, that of the true answers {lengths['truth_mean']:.1f}. Equal lengths do not mean "
        "right answers.</p>",
    )


def _languages(report: Figure) -> str:
    names = {"zh": "Chinese", "other": "other languages"}
    languages = report["language"]
    has_answers = report["answer_length"] is not None
    answers = "".join(
        f"<li>{plural(own['n'], 'question')} in {names[own['language']]}: Chinese in {own['truths_zh']:,} true answers"
        + (f" and {own['answers_zh']:,} of the model.</li>" if has_answers else ".</li>")
        for own in languages
    )
    rows = [interval_of(names[own["language"]], own) for own in languages]
    drawn = (
        f"<h3>{safe(languages[0]['name'])}</h3>{intervals(rows)}<p>Questions in two languages are different questions: "
        "a difference may come from these.</p>"
        if len(languages) > 1
        else ""
    )
    return section("Language", f"<ul>{answers}</ul>{drawn}")


# --- questions --------------------------------------------------------------------------------------------------------


def _card(card: Card) -> dict[str, Any]:
    answers = []
    for name, line in (("answer", card.with_image), ("grey image", card.blank)):
        if line is None:
            continue
        score = f"score {number(line['score'])}"
        if TASKS[line["task"]].answers == "none":
            answers.append((name if line is card.blank else "own image", score, ""))
        else:
            sure = "" if line["confidence"] is None else f", {_percent(line['confidence'])} sure"
            answers.append((name, answer_text(line["answer"]), score + sure))
    return {key: card.with_image[key] for key in ("picture", "question", "truth")} | {"answers": answers}


def cards(entries: Iterable[Mapping[str, Any]], thumbnails: Mapping[str, Sequence[bytes]]) -> str:
    """Questions with their `picture`, `question`, `truth`, and `answers`: a name, a text and a note each."""
    return f'<div class="cards">{"".join(_drawn_card(entry, thumbnails) for entry in entries)}</div>'


def _drawn_card(entry: Mapping[str, Any], thumbnails: Mapping[str, Sequence[bytes]]) -> str:
    images = "".join(
        f'<img alt="{safe(str(entry["picture"]))}" src="{data_uri(data, "jpeg")}">'
        for data in thumbnails.get(str(entry["picture"]), [])
    )
    texts = [("truth", entry["truth"], ""), *entry["answers"]]
    lines = "".join(
        f'<dt>{escape(name)}</dt><dd><span dir="auto">{_clipped(text) or "–"}</span> <small>{escape(note)}</small></dd>'
        for name, text, note in texts
    )
    return (
        f'<article><div>{images}<p class="question" dir="auto">{_clipped(entry["question"])}</p></div><dl>{lines}</dl>'
        "</article>"
    )


# --- the rest ---------------------------------------------------------------------------------------------------------


def _skipped(evaluation: Evaluation) -> str:
    reasons = evaluation.report["skipped_reasons"]
    if not reasons:
        return ""
    counts = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
    first = "".join(f"<li>{_clipped(str(row))}</li>" for row in evaluation.skipped[:SKIPPED])
    return section("Skipped", f"<p>{safe(counts)}. The first ones:</p><ul>{first}</ul>")


def _files(report: Figure) -> str:
    return (
        f'<p class="dim">Every answer: <code>{safe(report["predictions"])}</code>; all figures: <code>report.json'
        "</code> beside it. <code>mmv compare</code> says whether another model is really better.</p>"
    )


def _gain_name(report: Figure) -> str:
    """The metric of the gains: that of the kinds and languages."""
    return str(report["language"][0]["name"])


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def section(head: str, body: str) -> str:
    """A section; the body is already HTML."""
    return f"<section><h2>{escape(head)}</h2>{body}</section>"


def reading(subject: str) -> str:
    """The sentence under a chart of intervals."""
    return (
        f'<p class="dim">{subject} is its 95 % interval: with other images of the same kind, such an interval contains '
        "the true value in 95 of 100 cases. It says nothing about other kinds of images or questions.</p>"
    )


def interval_of(name: str, figure: Figure, value: str = "value") -> Interval:
    """A figure of a report for a chart."""
    low, high, middle = figure["ci_low"], figure["ci_high"], figure[value]
    name = visible(shorten(name, SHORT)) + (f" (n {figure['n']:,})" if "n" in figure else "")
    if middle is None:
        return Interval(name, "no such answers", None)
    text = f"{middle:.3f}" + ("  no interval" if low is None else f"  [{low:.3f}, {high:.3f}]")
    return Interval(name, text.replace("-", "−"), middle, low, high)


def charts(metrics: Iterable[Figure], value: str = "value") -> str:
    """Metrics of one unit on one axis: shares and their differences together, others by the first word of the name."""
    lowest, groups = 0 if value == "value" else -1, dict[str, list[Interval]]()
    for metric in metrics:
        ends = [metric[key] for key in (value, "ci_low", "ci_high") if metric[key] is not None]
        unit = "" if all(lowest <= end <= 1 for end in ends) else metric["name"].partition("_")[0]
        groups.setdefault(unit, []).append(interval_of(metric["name"], metric, value))
    return "".join(intervals(rows, (0.0, 0.0 if unit or value != "value" else 1.0)) for unit, rows in groups.items())


def safe(text: Any) -> str:
    """Text for a page, with control characters shown."""
    return escape(visible(str(text)))


def _clipped(text: Any) -> str:
    return "" if text is None else safe(shorten(str(text), LONGEST))
