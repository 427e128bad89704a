"""The report as Markdown, for a README or an issue. Foreign text stands in code, so that it stays the text that it
is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from smalllm.plots import series
from smalllm.reporting.dossier import Dossier, Story, spread
from smalllm.reporting.wording import DEFINITIONS, card_rows, lead, overview, shown, title
from smalllm.terminal import plain

BARS = "▁▂▃▄▅▆▇█"
POINTS = 24


def text(dossier: Dossier) -> str:
    """The whole report."""
    parts = [f"# {code(title(dossier))}", words(lead(dossier)), _overview(dossier)]
    for heading, content in (
        ("Is the difference real?", _verdicts(dossier)),
        ("Scores", _scores(dossier)),
        ("Curves", _curves(dossier)),
        ("Stories, counted", _scorecard(dossier)),
        ("Stories, as they came", "\n\n".join(_timelines(dossier))),
        ("Settings", _settings(dossier)),
        ("Where it ran", _environment(dossier)),
        ("Once more", fenced("\n".join(run.command() for run in dossier.runs), "console")),
    ):
        parts += [f"## {heading}", content] if content else []
    return "\n\n".join([*parts, DEFINITIONS]) + "\n"


def _overview(dossier: Dossier) -> str:
    return table(("figure", "value", ""), [[words(cell) for cell in row] for row in overview(dossier)])


def _verdicts(dossier: Dossier) -> str:
    contest = dossier.contest
    parts = []
    for number, found in enumerate(contest.comparisons if contest else ()):
        assert contest is not None
        said, meaning = contest.sentences(number)
        parts.append(f"**{found.verdict}**: {words(said)}. {words(meaning)}")
    return "\n\n".join([*parts, *(f"- {words(note)}" for note in dossier.notes)])


def _scores(dossier: Dossier) -> str:
    rows = [
        [
            code(run.name), str(run.entrant.seed), f"{run.score.step:,}", f"{run.score.parameters:,}",
            f"{run.score.evaluation.bits_per_byte:.4f}", "{:.4f} to {:.4f}".format(*run.score.evaluation.bits_per_byte_interval),
        ]
        for run in dossier.runs if run.score
    ]  # fmt: skip
    floor = f"\n\nFloor (exact entropy of these documents): {dossier.floor:.4f}." if dossier.floor else ""
    return table(("run", "seed", "step", "parameters", "bits per byte", "95 % interval"), rows) + floor if rows else ""


def _curves(dossier: Dossier) -> str:
    rows = []
    for run in dossier.runs:
        for key, name in (("train_loss", "training loss"), ("valid_bits_per_byte", "bits per byte")):
            values = series(run.records, key)[1]
            if values:
                rows.append(
                    [
                        code(run.name),
                        name,
                        sparkline(values),
                        f"{values[0]:.4f}",
                        f"{min(values):.4f}",
                        f"{values[-1]:.4f}",
                    ]
                )
    return table(("run", "curve", "over steps", "first", "lowest", "last"), rows) if rows else ""


def sparkline(values: Sequence[float], points: int = POINTS) -> str:
    """A curve in one line; the highest value is a full bar.

    >>> sparkline([4.0, 2.0, 1.0, 0.5])
    '█▄▂▁'
    """
    count = min(points, len(values))
    chosen = [values[round(place * (len(values) - 1) / max(1, count - 1))] for place in range(count)]
    low, high = min(chosen), max(chosen)
    return "".join(
        BARS[round((value - low) / (high - low) * (len(BARS) - 1))] if high > low else BARS[0] for value in chosen
    )


def _scorecard(dossier: Dossier) -> str:
    runs = [run for run in dossier.runs if run.stories]
    rows, above = [], ""
    for row in card_rows([run.stories for run in runs]):
        if not row.values:
            above = f"{row.name}: "
            continue
        data = "" if row.data is None else words(shown(row.data))
        rows.append([words((above if row.inner else "") + row.name), *map(_value, row.values, row.intervals), data])
    return table(("", *(code(run.name) for run in runs), "the data"), rows) if rows else ""


def _value(value: Any, interval: str) -> str:
    return words(shown(value) + (f" ({interval})" if interval else ""))


def _timelines(dossier: Dossier) -> Iterator[str]:
    for run in dossier.runs:
        if run.samples:
            yield "\n\n".join([f"### {code(run.name)}", *map(_story, spread(run.samples, 4))])


def _story(story: Story) -> str:
    return f"step {story.step:,}\n\n{fenced(story.prompt + story.text)}"


def _settings(dossier: Dossier) -> str:
    """For several runs what differs, for one what is not the default."""
    first = dossier.runs[0]
    names = (
        dossier.differing()
        if len(dossier.runs) > 1
        else {name for name in first.settings if first.settings[name] != first.usual[name]}
    )
    return _columns(dossier, [name for name in first.settings if name in names], lambda run: run.settings)


def _environment(dossier: Dossier) -> str:
    return _columns(
        dossier,
        list(dict.fromkeys(name for run in dossier.runs for name in run.environment)),
        lambda run: run.environment,
    )


def _columns(dossier: Dossier, names: Sequence[str], values: Any) -> str:
    rows = [[code(name), *(code(values(run).get(name) or "–") for run in dossier.runs)] for name in names]
    return table(("", *(code(run.name) for run in dossier.runs)), rows) if rows else ""


# ── Markdown ──


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(foreign: str) -> str:
    """Foreign text as code in a line or a cell.

    >>> code("a|b`c")
    '`` a\\\\|b`c ``'
    """
    line = " ".join(plain(foreign).split()).replace("|", "\\|")
    ticks = "`" * (1 + max((len(found) for found in re.findall("`+", line)), default=0))
    return f"{ticks}{line}{ticks}" if len(ticks) == 1 else f"{ticks} {line} {ticks}"


def fenced(foreign: str, language: str = "text") -> str:
    """Foreign text of several lines as a block of code."""
    safe = plain(foreign)
    ticks = "`" * max(3, 1 + max((len(found) for found in re.findall("`+", safe)), default=0))
    return f"{ticks}{language}\n{safe}\n{ticks}"


def words(foreign: str) -> str:
    """Foreign words in a sentence or a cell: what Markdown or HTML would take for its own is escaped.

    >>> words("a<b> [c](d) *e*")
    'a\\\\<b\\\\> \\\\[c\\\\]\\\\(d\\\\) \\\\*e\\\\*'
    """
    return re.sub(r"([\\`*_\[\]()<>#|~!&$])", r"\\\1", " ".join(plain(foreign).split()))
