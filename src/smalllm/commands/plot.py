"""`smalllm plot`: curves of runs as a picture and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smalllm.checkpoint import find_run
from smalllm.plots import axis, floor, plot_runs, table
from smalllm.terminal import plain


def plot(
    *runs: Annotated[str, Parameter(name="RUN", show_default=False)],
    out: Annotated[Path | None, Parameter(name="--out")] = None,
    x: Annotated[str, Parameter(name="--x")] = "step",
) -> None:
    """Draw training loss, validation bits per byte and learning rate.

    Parameters
    ----------
    runs
        Run folders or names; left out, the newest run.
    out
        A .png, .svg or .pdf; left out, curve.png in the first run's folder.
    x
        What the curves run over: step, tokens or time.
    """
    below = axis(x)
    folders = [find_run(run)[0].path for run in (runs or (None,))]
    picture = plot_runs(folders, out or folders[0] / "curve.png", below, _floors(folders))
    for folder in folders:
        print(plain(table(folder)), end="\n\n")
    print(plain(f"drawn in {picture}"))


def _floors(folders: list[Path]) -> dict[str, float]:
    """Floors by name; one where all runs have the same."""
    found = {folder.name: value for folder in folders if (value := floor(folder)) is not None}
    return (
        {"floor": next(iter(found.values()))}
        if len(set(found.values())) == 1
        else {f"floor of {name}": value for name, value in found.items()}
    )
