"""`smalllm compare`: whether a difference between runs is real. The work is `sides`, `comparison`, `contest`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from smalllm.config import UserError
from smalllm.hardware import pick_device
from smalllm.judging.comparison import SMALLEST
from smalllm.judging.contest import Contest, hold
from smalllm.judging.sides import Score, Side, form_sides, score, shared_documents
from smalllm.terminal import plain


def compare(
    *runs: Annotated[str, Parameter(name="RUN", show_default=False)],
    against: Annotated[tuple[str, ...], Parameter(name="--against", consume_multiple=True, negative="")] = (),
    text: Annotated[str | None, Parameter(name="--text")] = None,
    limit: Annotated[int | None, Parameter(name="--limit")] = None,
    checkpoint: Annotated[str, Parameter(name="--checkpoint")] = "best",
    smallest: Annotated[float, Parameter(name="--smallest")] = 100 * SMALLEST,
    device: Annotated[str, Parameter(name="--device")] = "auto",
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Tell whether the difference between runs is real, in bits per byte on the same documents.

    Parameters
    ----------
    runs
        Two runs or checkpoints; or more, of which those stand on one side that differ in nothing but their seed.
    against
        The runs of the other side, when sides shall not be told by the settings.
    text
        Documents to score, in a file [default: the validation documents of the first run].
    limit
        Score the first N documents only.
    checkpoint
        best, latest or a step.
    smallest
        Differences below so many percent do not matter.
    device
        auto, cpu, mps, cuda or cuda:N.
    json_output
        Print one JSON object to standard output.
    """
    _check(limit, smallest)
    sides = form_sides(runs, against)
    documents = shared_documents(sides, text, limit)
    scores = [_scored(side, documents.texts, checkpoint, str(pick_device(device))) for side in sides]
    contest = hold(sides, scores, documents, smallest / 100)
    if json_output:
        print(json.dumps(contest.figures()))
    else:
        _print(contest)


def _check(limit: int | None, smallest: float) -> None:
    if limit is not None and limit < 1:
        raise UserError(f"limit = {limit} is not possible; use 1 or more")
    if not 0 <= smallest < 100:
        raise UserError(f"smallest = {smallest} is not possible; give percent, from 0 to below 100, such as 1")


def _scored(side: Side, texts: list[str], checkpoint: str, device: str) -> list[Score]:
    done = []
    for member in side.entrants:
        print(plain(f"scoring {len(texts):,} documents by {member.name}"), file=sys.stderr)
        done.append(score(member, texts, checkpoint, device))
    return done


def _print(contest: Contest) -> None:
    console = Console(highlight=False)
    console.print(_table(contest))
    for number in range(len(contest.comparisons)):
        found, meaning = contest.sentences(number)
        console.print(Text(plain(f"\n{found}\n{meaning}")))
    for note in contest.notes():
        console.print(Text(plain(f"note: {note}")))


def _table(contest: Contest) -> Table:
    figures = contest.figures()
    table = Table(
        title=Text(plain(f"{figures['documents']:,} documents, {figures['bytes']:,} bytes: {figures['text']}"))
    )
    for column in ("side", "run", "seed", "step"):
        table.add_column(column)
    table.add_column("bits per byte, 95 % interval", justify="right")
    for run in figures["runs"]:
        low, high = run["bits_per_byte_interval"]
        cells = (run["side"], run["run"], str(run["seed"]), f"{run['step']:,}")
        told = f"{run['bits_per_byte']:.4f}  {low:.4f} to {high:.4f}"
        table.add_row(*(Text(plain(cell)) for cell in (*cells, told)))
    return table
