"""The report as one HTML file: no script, nothing fetched, every foreign text escaped (`markup`), light and dark."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

from smalllm.judging.sides import Score
from smalllm.plots import AXES, Axis, series
from smalllm.reporting import chart
from smalllm.reporting.dossier import Dossier, RunFacts, spread
from smalllm.reporting.markup import Markup, element, joined
from smalllm.reporting.wording import DEFINITIONS, CardRow, card_rows, count, label, lead, overview, shown, title

CURVES = (
    ("train_loss", "Training loss, nats per token (log scale; bold: running mean)"),
    ("valid_bits_per_byte", "Validation, bits per byte (log scale)"),
    ("lr", "Learning rate"),
    ("tokens_per_second", "Speed, tokens per second"),
)
SHORT = 24  # characters of a value that stands in a column of numbers


def page(dossier: Dossier, x: Axis = "step") -> str:
    """The whole page; the same dossier gives the same text."""
    style = (resources.files("smalllm.reporting") / "page" / "report.css").read_text(encoding="utf-8")
    head = element(
        "head", element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(style)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="generator", content="SmallLM"),
        element("title", title(dossier)), element("style", Markup(style)),
    )  # fmt: skip
    parts = (_header(dossier), *_sections(dossier, x), element("footer", DEFINITIONS))
    return "<!doctype html>\n" + element("html", head, element("body", *parts), lang="en") + "\n"


def _policy(style: str) -> str:
    """This style sheet and nothing else."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _header(dossier: Dossier) -> Markup:
    tiles = [
        element("div", element("dt", name), element("dd", value, element("span", more, class_="more")), class_="tile")
        for name, value, more in overview(dossier)
    ]
    return element(
        "header", element("p", "SmallLM report", class_="eyebrow"), element("h1", title(dossier)),
        element("p", lead(dossier), class_="lead"), element("dl", *tiles, class_="tiles") if tiles else "",
    )  # fmt: skip


def _sections(dossier: Dossier, x: Axis) -> Iterator[Markup]:
    for heading, content in (
        ("Is the difference real?", _verdicts(dossier)),
        ("Scores", _scores(dossier)),
        ("Curves", _curves(dossier, x)),
        ("Stories, counted", _scorecard(dossier)),
        ("Stories, as they came", _samples(dossier)),
        ("Settings", _settings(dossier)),
        ("Where it ran", _environment(dossier)),
        ("Once more", _again(dossier)),
    ):
        if content:
            yield element("section", element("h2", heading), content)


# ── what was found ──


def _verdicts(dossier: Dossier) -> Markup:
    contest = dossier.contest
    cards = []
    for number, found in enumerate(contest.comparisons if contest else ()):
        assert contest is not None
        drawing = chart.difference(found.difference, found.interval, found.strict_interval)
        cards.append(_verdict(found.verdict, contest.sentences(number), drawing))
    notes = element("ul", *(element("li", note) for note in dossier.notes), class_="notes") if dossier.notes else ""
    return joined((*cards, notes)) if len(dossier.runs) > 1 or dossier.notes else Markup("")


def _verdict(verdict: str, sentences: tuple[str, str], drawing: Markup) -> Markup:
    found, meaning = sentences
    words = element("div", element("span", verdict, class_="badge"), element("p", found), element("p", meaning))
    return element("div", words, drawing, class_="verdict real" if verdict == "real" else "verdict")


def _scores(dossier: Dossier) -> Markup:
    scored = [(run, run.score) for run in dossier.runs if run.score]
    if not scored or dossier.documents is None:
        return Markup("")
    edges = [edge for _, score in scored for edge in score.evaluation.bits_per_byte_interval]
    floors = [] if dossier.floor is None else [dossier.floor]
    span = (min(edges + floors), max(edges + floors) + 1e-9)
    rows = [_score(dossier, run, score, span) for run, score in scored]
    first = scored[0][1].evaluation
    told = f"{first.documents:,} documents, {first.bytes:,} bytes: {dossier.documents.origin}."
    told += f" The floor, {dossier.floor:.4f}, is the exact entropy of these documents." if floors else ""
    heads = ("run", "bits per byte", "95 % interval", "", "seed", "step", "parameters")
    return joined((_table(heads, rows, numbers=(1, 2, 4, 5, 6)), element("p", told, class_="note")))


def _score(dossier: Dossier, run: RunFacts, score: Score, span: tuple[float, float]) -> Markup:
    level, interval = score.evaluation.bits_per_byte, score.evaluation.bits_per_byte_interval
    drawing = chart.whisker(level, interval, span, colour(dossier, run), dossier.floor)
    return element(
        "tr", element("th", _swatch(dossier, run), run.name, class_="word"), _number(f"{level:.4f}"),
        _number("{:.4f} to {:.4f}".format(*interval)), element("td", drawing, class_="plot"),
        _number(str(run.entrant.seed)), _number(f"{score.step:,}"), _number(count(score.parameters)),
    )  # fmt: skip


def colour(dossier: Dossier, run: RunFacts) -> int:
    """Runs of one side have one colour, where there are sides."""
    return run.side if len(dossier.sides) > 1 else dossier.runs.index(run)


def _swatch(dossier: Dossier, run: RunFacts) -> Markup:
    return _box(colour(dossier, run), "inline") if len(dossier.runs) > 1 else Markup("")


def _box(number: int, class_: str) -> Markup:
    box = element("rect", width=20, height=20, rx=5, class_=f"box c{number % chart.COLOURS}")
    return element("svg", box, viewBox="0 0 20 20", class_=class_, aria_hidden="true", preserveAspectRatio="none")


def _curves(dossier: Dossier, x: Axis) -> Markup:
    drawn = [_curve(dossier, key, name, x) for key, name in CURVES]
    if not any(drawn):
        return Markup("")
    return joined((_legend(dossier), element("div", *drawn, class_="charts")))


def _curve(dossier: Dossier, key: str, name: str, x: Axis) -> Markup:
    marked = key == "valid_bits_per_byte"
    lines = [
        chart.Line(
            run.name, colour(dossier, run), *series(run.records, key, x), marked=marked, noisy=key == "train_loss"
        )
        for run in dossier.runs
    ]
    return chart.curves(name, lines, AXES[x][0], dossier.floor if marked else None, marked or key == "train_loss")


def _legend(dossier: Dossier) -> Markup:
    if len(dossier.runs) == 1:
        return Markup("")
    names = dossier.sides if len(dossier.sides) > 1 else [run.name for run in dossier.runs]
    entries = [
        element("li", _box(number, "swatch"), element("span", _counted(dossier, number, name)))
        for number, name in enumerate(names)
    ]
    return element("ul", *entries, class_="legend")


def _counted(dossier: Dossier, side: int, name: str) -> str:
    members = sum(run.side == side for run in dossier.runs) if len(dossier.sides) > 1 else 1
    return f"{name} ({members} seeds)" if members > 1 else name


# ── stories ──


def _scorecard(dossier: Dossier) -> Markup:
    runs = [run for run in dossier.runs if run.stories]
    if not runs:
        return Markup("")
    rows = list(card_rows([run.stories for run in runs]))
    with_data = any(row.data is not None for row in rows)
    heads = ("", *(run.name for run in runs), *(("the data",) if with_data else ()))
    written = [_card_row(row, len(heads), with_data) for row in rows]
    note = f"{runs[0].stories.get('count', 'Some')} stories of each model, from nothing, with one seed; small: 95 % intervals."
    note += " In the last column: the validation documents, measured alike." if with_data else ""
    return joined((_table(heads, written, numbers=range(1, len(heads))), element("p", note, class_="note")))


def _card_row(row: CardRow, columns: int, with_data: bool) -> Markup:
    if not row.values:
        return element("tr", element("th", row.name, colspan=columns), class_="group")
    cells = [_value(value, interval) for value, interval in zip(row.values, row.intervals, strict=True)]
    cells += [_value(row.data, "") if row.data is not None else element("td", "")] if with_data else []
    return element("tr", element("th", row.name), *cells, class_="inner" if row.inner else None)


def _value(value: Any, interval: str) -> Markup:
    told = shown(value)
    spread = element("span", interval, class_="more") if interval else ""
    return element("td", told, spread, class_="number" if len(told) < SHORT else "word")


def _samples(dossier: Dossier) -> Markup:
    parts = [_timeline(run, colour(dossier, run)) for run in dossier.runs if run.samples]
    return element("div", *parts, class_="samples") if parts else Markup("")


def _timeline(run: RunFacts, number: int) -> Markup:
    entries = []
    for story in spread(run.samples):
        when = element("p", f"step {story.step:,}", class_="when")
        entries.append(element("li", when, element("p", element("b", story.prompt), story.text, class_="tale")))
    return element(
        "div", element("h3", run.name), element("ol", *entries), class_=f"timeline c{number % chart.COLOURS}"
    )


# ── how it was made ──


def _settings(dossier: Dossier) -> Markup:
    differing = dossier.differing()
    rows: list[Markup] = []
    group = None
    for name in dossier.runs[0].settings:
        section = name.rpartition(".")[0] or "run"
        if section != group:
            group = section
            rows.append(element("tr", element("th", section, colspan=len(dossier.runs) + 1), class_="group"))
        rows.append(_setting(dossier, name, name in differing))
    told = "Bold: not the default."
    told += " Marked: not the same in all runs." if len(dossier.runs) > 1 else ""
    return joined((_table(("", *(run.name for run in dossier.runs)), rows), element("p", told, class_="note")))


def _setting(dossier: Dossier, name: str, differs: bool) -> Markup:
    cells = [
        element(
            "td", run.settings[name] or "–", class_="word changed" if run.settings[name] != run.usual[name] else "word"
        )
        for run in dossier.runs
    ]
    return element("tr", element("th", element("code", name)), *cells, class_="differs" if differs else None)


def _environment(dossier: Dossier) -> Markup:
    names = list(dict.fromkeys(name for run in dossier.runs for name in run.environment))
    rows = []
    for name in names:
        cells = [element("td", run.environment.get(name) or "–", class_="word") for run in dossier.runs]
        rows.append(element("tr", element("th", label(name)), *cells))
    return _table(("", *(run.name for run in dossier.runs)), rows) if rows else Markup("")


def _again(dossier: Dossier) -> Markup:
    commands = "\n".join(run.command() for run in dossier.runs)
    note = (
        "With the data of the fingerprint above, on the same machine, threads and versions, the weights come out the same when"
        " the steps are given; a budget of minutes depends on the machine."
    )
    return joined((element("pre", commands), element("p", note, class_="note")))


# ── tables ──


def _table(heads: Sequence[str], rows: Sequence[Markup], numbers: Sequence[int] = ()) -> Markup:
    cells = [
        element("th", head, class_="number" if place in numbers else "word", scope="col")
        for place, head in enumerate(heads)
    ]
    table = element("table", element("thead", element("tr", *cells)), element("tbody", *rows))
    return element("div", table, class_="scroll", tabindex=0)


def _number(text: str) -> Markup:
    return element("td", text, class_="number")
