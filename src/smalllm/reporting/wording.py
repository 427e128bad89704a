"""Words and numbers of a report, the same in HTML and in Markdown. Plain text: who writes it somewhere escapes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smalllm.reporting.dossier import Dossier, RunFacts

DEFINITIONS = (
    "Bits per byte: every document is scored on its own by the run's tokenizer, its end included, and the sum of -log2 of the"
    " probabilities is divided by the UTF-8 bytes of the texts; it does not depend on the tokenizer. Intervals are 95 % bootstrap"
    " intervals over documents. Differences are paired over documents; where a side has two seeds or more, the variance between seeds"
    " enters. A difference is called real when its 99 % interval leaves out zero. Made by smalllm report."
)
MOST_LISTED, MOST_ROWS = 12, 60


def title(dossier: Dossier) -> str:
    """The runs, or the sides, by name."""
    names = dossier.sides if len(dossier.sides) > 1 else [run.name for run in dossier.runs]
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"


def lead(dossier: Dossier) -> str:
    """One sentence on what this is about."""
    runs = dossier.runs
    if len(runs) == 1:
        layers, width, context = (runs[0].settings[f"model.{key}"] for key in ("layers", "width", "context"))
        return f"{layers} layers, {width} wide, with a context of {context} tokens, trained on {_data(runs[0])}."
    differing = sorted(dossier.differing() - {"name", "data.path"})
    told = f"They differ in {', '.join(differing)}." if differing else "Their settings are the same."
    return f"{len(runs)} runs. {told}"


def _data(run: RunFacts) -> str:
    return run.settings["data.path"] or run.settings["data.source"] or "data that is not told"


def overview(dossier: Dossier) -> Iterator[tuple[str, str, str]]:
    """Name, value and a smaller remark of the figures that come first, of the best run."""
    scored = [(run, run.score) for run in dossier.runs if run.score]
    if scored:
        run, score = min(scored, key=lambda pair: pair[1].evaluation.bits_per_byte)
        low, high = score.evaluation.bits_per_byte_interval
        best = f", {run.name}" if len(dossier.runs) > 1 else ""
        yield "bits per byte", f"{score.evaluation.bits_per_byte:.4f}", f"{low:.4f} to {high:.4f}{best}"
        if dossier.floor:
            excess = 100 * (score.evaluation.bits_per_byte / dossier.floor - 1)
            yield "above the floor", f"{excess:.1f} %", f"floor {dossier.floor:.4f}"
        yield "parameters", count(score.parameters), f"step {score.step:,}"
    run = scored[0][0] if len(scored) == 1 else dossier.runs[0]
    if (tokens := _most(dossier, "tokens")) is not None:
        yield "tokens learned from", count(int(tokens)), "the longest run" if len(dossier.runs) > 1 else ""
    if (seconds := _most(dossier, "seconds")) is not None:
        yield "time", duration(seconds), "the longest run" if len(dossier.runs) > 1 else ""
    if (speed := _most(dossier, "tokens_per_second")) is not None:
        yield "tokens per second", count(int(speed)), run.environment.get("device_name", "")


def _most(dossier: Dossier, key: str) -> float | None:
    values = [value for run in dossier.runs if (value := run.last(key)) is not None]
    return max(values) if values else None


def label(key: str) -> str:
    """A key for people: underscores are spaces."""
    return key.replace("_", " ")


@dataclass(frozen=True)
class CardRow:
    """A line of the scorecards: what it is called, its value in each, its interval in each, the same of the data. A
    heading has no values; ``inner`` lines stand below one."""

    name: str
    values: tuple[Any, ...] = ()
    intervals: tuple[str, ...] = ()
    data: Any = None
    inner: bool = False


def card_rows(cards: Sequence[Mapping[str, Any]]) -> Iterator[CardRow]:
    """Every key of any of the cards, whatever they hold; an object becomes a heading with lines below it.
    ``intervals`` stand beside the values, and ``data``, the same figures of the data, in a column of its own."""
    beside: Mapping[str, Any] = next((card["data"] for card in cards if isinstance(card.get("data"), Mapping)), {})
    for key in _keys(cards):
        values = [card.get(key) for card in cards]
        if any(isinstance(value, Mapping) for value in values):
            parts = [value if isinstance(value, Mapping) else {} for value in values]
            yield CardRow(label(key))
            yield from (_card_row(parts, name, {}, True) for name in _keys(parts))
        else:
            yield _card_row(cards, key, beside, False)


def _keys(cards: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for card in cards for key in card)
    return [str(key) for key in keys if key not in ("intervals", "data")][:MOST_ROWS]


def _card_row(cards: Sequence[Mapping[str, Any]], key: str, beside: Mapping[str, Any], inner: bool) -> CardRow:
    intervals = tuple(_interval(card.get("intervals"), key) for card in cards)
    return CardRow(label(key), tuple(card.get(key) for card in cards), intervals, beside.get(key), inner)


def _interval(intervals: Any, key: str) -> str:
    found = intervals.get(key) if isinstance(intervals, Mapping) else None
    if not isinstance(found, list | tuple) or len(found) != 2:
        return ""
    return f"{shown(found[0])} to {shown(found[1])}"


def shown(value: Any) -> str:
    """A value of the scorecard, whatever it is."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"
        case int():
            return f"{value:,}"
        case list() | tuple():
            rest = f" and {len(value) - MOST_LISTED} more" if len(value) > MOST_LISTED else ""
            return ", ".join(map(shown, value[:MOST_LISTED])) + rest
        case Mapping():
            return ", ".join(f"{label(str(key))} {shown(inner)}" for key, inner in value.items()) or "none"
    return str(value)


def count(number: int) -> str:
    """
    >>> count(950), count(20_340_480), count(12_500)
    ('950', '20.3 M', '12.5 k')
    """
    if number >= 1_000_000:
        return f"{number / 1e6:.3g} M" if number < 1e9 else f"{number / 1e9:.3g} B"
    return f"{number / 1e3:.3g} k" if number >= 10_000 else f"{number:,}"


def duration(seconds: float) -> str:
    """
    >>> duration(42), duration(200), duration(7300)
    ('42 s', '3 min 20 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
