"""Curves of runs as a picture, and the same figures as text. Reads metrics.jsonl; knows nothing about models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from smalllm.checkpoint import RunFolder
from smalllm.config import UserError
from smalllm.evaluation import storyworld_floor
from smalllm.judging.sides import entrant, first_validation
from smalllm.metrics import Record, read_records

INK, FAINT, GRID = "#1f2933", "#9aa5b1", "#e4e7eb"
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")
FLOOR_DOCUMENTS = 200
Axis = Literal["step", "tokens", "time"]
AXES: dict[Axis, tuple[str, str, float]] = {
    "step": ("step", "step", 1.0), "tokens": ("tokens", "tokens", 1.0), "time": ("minutes", "seconds", 1 / 60),
}  # fmt: skip
"""What may stand below a curve: its name, the key of a record, and the factor between them."""


def axis(name: str) -> Axis:
    """The axis of this name; UserError for another."""
    for known in get_args(Axis):
        if name == known:
            return known
    raise UserError(f"--x {name} is not known; use {', '.join(get_args(Axis))}")


def series(records: Sequence[Record], key: str, x: Axis = "step") -> tuple[list[float], list[float]]:
    """Places on the axis and values of the records that have both.

    >>> series([{"step": 1, "lr": 0.5, "seconds": 90}, {"step": 2}], "lr", "time")
    ([1.5], [0.5])
    """
    _, place, factor = AXES[x]
    pairs = [
        (record[place] * factor, record[key]) for record in records if _number(record, place) and _number(record, key)
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _number(record: Record, key: str) -> bool:
    return isinstance(record.get(key), int | float) and not isinstance(record[key], bool)


def read_run(run: Path) -> list[Record]:
    """The records of a run; UserError when there are none yet."""
    records = list(read_records(RunFolder(run).metrics_file))
    if not records:
        raise UserError(f"run {run} has no metrics yet; train it longer, or name another run")
    return records


def floor(run: Path) -> float | None:
    """Bits per byte below which no model comes on a run's validation documents, where that is known: the exact
    entropy of the built-in corpus. None for other texts, and where the data is gone."""
    try:
        return storyworld_floor(first_validation(entrant(str(run)), FLOOR_DOCUMENTS))
    except UserError:
        return None


def plot_runs(runs: Sequence[Path], out: Path, x: Axis = "step", floors: Mapping[str, float] | None = None) -> Path:
    """Draw training loss, validation bits per byte and learning rate of the runs into a PNG, SVG or PDF. ``floors``
    are dashed lines by their name. In an SVG, text stays text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {out}: give a name that ends in .png, .svg or .pdf")
    figure, axes = pyplot.subplots(1, 3, figsize=(12.5, 3.6), dpi=120, layout="constrained")
    for run, colour in zip(runs, COLOURS * (1 + len(runs) // len(COLOURS)), strict=False):
        _draw_run(axes, read_run(run), colour, _literal(run.name), x)
    for name, value in (floors or {}).items():
        axes[1].axhline(value, color=FAINT, linewidth=1, linestyle=(0, (5, 4)))
        axes[1].annotate(
            f"{_literal(name)} {value:.3f}", (1, value), xycoords=("axes fraction", "data"), textcoords="offset points",
            xytext=(0, 3), ha="right", fontsize=8, color=FAINT,
        )  # fmt: skip
    titles = ("training loss (nats per token)", "validation (bits per byte)", "learning rate")
    for one, title in zip(axes, titles, strict=True):
        _style(one, title, AXES[x][0])
    if len(runs) > 1:
        axes[0].legend(frameon=False, fontsize=8)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(out)
    pyplot.close(figure)
    return out


def _literal(name: str) -> str:
    """A name in which matplotlib finds no formula, and which it does not leave out of the legend."""
    return "\u200b" + name.replace("$", r"\$") if name.startswith("_") else name.replace("$", r"\$")


def _draw_run(axes, records: Sequence[Record], colour: str, name: str, x: Axis) -> None:  # type: ignore[no-untyped-def]
    loss_axes, bits_axes, lr_axes = axes
    loss_axes.plot(*series(records, "train_loss", x), color=colour, linewidth=1.2, label=name)
    places, bits = series(records, "valid_bits_per_byte", x)
    bits_axes.plot(places, bits, color=colour, linewidth=1.4, marker="o", markersize=3.5, label=name)
    if bits:
        best = min(range(len(bits)), key=bits.__getitem__)
        bits_axes.annotate(
            f"{bits[best]:.3f}", (places[best], bits[best]), textcoords="offset points", xytext=(0, 8),
            ha="center", fontsize=8, color=colour,
        )  # fmt: skip
    lr_axes.plot(*series(records, "lr", x), color=colour, linewidth=1.2)


def _style(axes, title: str, below: str) -> None:  # type: ignore[no-untyped-def]
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(below, fontsize=8, color=FAINT)
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(colors=FAINT, labelsize=8)
    axes.margins(y=0.12)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def table(run: Path, rows: int = 12) -> str:
    """The figures of a run as text: about ``rows`` lines, the evaluations first of all."""
    records = read_run(run)
    chosen = [record for record in records if "valid_bits_per_byte" in record] or records
    chosen = chosen[:: max(1, len(chosen) // rows)] + (
        [chosen[-1]] if (len(chosen) - 1) % max(1, len(chosen) // rows) else []
    )
    lines = [
        f"{run.name}",
        f"{'step':>8} {'tokens':>12} {'train loss':>10} {'valid loss':>10} {'bits/byte':>9} {'lr':>9} {'tokens/s':>9}",
    ]
    for record in chosen:
        lines.append(
            f"{record['step']:>8} {_cell(record, 'tokens', '12d')} {_cell(record, 'train_loss', '10.4f')}"
            f" {_cell(record, 'valid_loss', '10.4f')} {_cell(record, 'valid_bits_per_byte', '9.4f')}"
            f" {_cell(record, 'lr', '9.2e')} {_cell(record, 'tokens_per_second', '9.0f')}"
        )
    return "\n".join(lines)


def _cell(record: Record, key: str, form: str) -> str:
    value = record.get(key)
    return format(value, form) if isinstance(value, int | float) else " " * int(form.rstrip("dfe").partition(".")[0])
