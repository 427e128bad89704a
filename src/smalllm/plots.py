"""Curves of runs as a picture, and the same figures as text. Reads metrics.jsonl; knows nothing about models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from smalllm.checkpoint import RunFolder
from smalllm.config import UserError
from smalllm.metrics import Record, read_records

INK, FAINT, GRID = "#1f2933", "#9aa5b1", "#e4e7eb"
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")


def series(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have the key."""
    pairs = [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def read_run(run: Path) -> list[Record]:
    """The records of a run; UserError when there are none yet."""
    records = list(read_records(RunFolder(run).metrics_file))
    if not records:
        raise UserError(f"run {run} has no metrics yet; train it longer, or name another run")
    return records


def plot_runs(runs: Sequence[Path], out: Path) -> Path:
    """Draw training loss, validation bits per byte and learning rate of the runs over their steps into a PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {out}: give a name that ends in .png, .svg or .pdf")
    figure, (loss_axes, bits_axes, lr_axes) = pyplot.subplots(1, 3, figsize=(12.5, 3.6), dpi=120, layout="constrained")
    for run, colour in zip(runs, COLOURS * (1 + len(runs) // len(COLOURS)), strict=False):
        records = read_run(run)
        loss_axes.plot(*series(records, "train_loss"), color=colour, linewidth=1.2, label=run.name)
        steps, bits = series(records, "valid_bits_per_byte")
        bits_axes.plot(steps, bits, color=colour, linewidth=1.4, marker="o", markersize=3.5, label=run.name)
        if bits:
            best = min(range(len(bits)), key=bits.__getitem__)
            bits_axes.annotate(
                f"{bits[best]:.3f}", (steps[best], bits[best]), textcoords="offset points", xytext=(0, 8),
                ha="center", fontsize=8, color=colour,
            )  # fmt: skip
        lr_axes.plot(*series(records, "lr"), color=colour, linewidth=1.2)
    for axes, title in (
        (loss_axes, "training loss (nats per token)"),
        (bits_axes, "validation (bits per byte)"),
        (lr_axes, "learning rate"),
    ):
        _style(axes, title)
    if len(runs) > 1:
        loss_axes.legend(frameon=False, fontsize=8)
    figure.savefig(out)
    pyplot.close(figure)
    return out


def _style(axes, title: str) -> None:  # type: ignore[no-untyped-def]
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel("step", fontsize=8, color=FAINT)
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
