"""`smalllm prepare`: turn text into a dataset folder. Only words and bars are here; the work is `data.prepare`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from smalllm.config import UserError
from smalllm.data.prepare import PrepareProgress, PrepareResult
from smalllm.data.prepare import prepare as prepare_dataset
from smalllm.terminal import plain

KEYS = (
    "out",
    "train_documents",
    "valid_documents",
    "train_tokens",
    "valid_tokens",
    "train_bytes",
    "valid_bytes",
    "vocab_size",
    "bytes_per_token",
    "seconds",
    "megabytes_per_second",
    "duplicates",
    "empty",
    "reused",
    "fingerprint",
    "leaks",
    "shard",
    "complete",
    "missing",
)
STAGES = {"read": "reading documents", "tokenizer": "learning the vocabulary", "encode": "encoding"}


def prepare(
    *sources: Annotated[str, Parameter(name="SOURCE", allow_leading_hyphen=True)],
    out: Annotated[Path, Parameter(name="--out")],
    vocab_size: Annotated[int | None, Parameter(name="--vocab-size")] = None,
    tokenizer: Annotated[Path | None, Parameter(name="--tokenizer")] = None,
    valid: Annotated[str | None, Parameter(name="--valid")] = None,
    valid_fraction: Annotated[float | None, Parameter(name="--valid-fraction")] = None,
    num_files: Annotated[int | None, Parameter(name="--num-files")] = None,
    sample_rate: Annotated[float, Parameter(name="--sample-rate")] = 1.0,
    limit: Annotated[int | None, Parameter(name="--limit")] = None,
    seed: Annotated[int, Parameter(name="--seed")] = 42,
    workers: Annotated[int | None, Parameter(name="--workers")] = None,
    shard: Annotated[str | None, Parameter(name="--shard")] = None,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Turn text into a dataset: documents, validation split, vocabulary, token shards.

    Parameters
    ----------
    sources
        storyworld[-small][:STORIES], tinystories, hf://datasets/OWNER/NAME[/FILE], a file, a folder, a glob
        (.txt .jsonl .csv .parquet .json .gz .zst), or - for standard input. In .txt a line <|endoftext|> separates
        documents; without one, a file is a document, and a single long document is cut at paragraphs.
    out
        The dataset folder to make.
    vocab_size
        Pieces of the vocabulary to learn [default: 4096].
    tokenizer
        A SentencePiece .model to use instead of learning one.
    valid
        A source of validation documents; their copies are kept out of training.
    valid_fraction
        The fraction of documents held out for validation [default: the source's own validation, else 0.02].
    num_files
        Take the first N files of a folder, glob, repository or archive.
    sample_rate
        Keep this fraction of the documents.
    limit
        Stop after N documents.
    seed
        Decides the split, the sample and the order.
    workers
        Threads that encode [default: one for each core]; the result does not depend on it.
    shard
        Make part I of N of the dataset, as in 2/5, with --tokenizer: N machines give the same command with I from 1 to N
        and one folder, and the last one to finish makes one dataset of the parts.
    json_output
        Print one JSON object to standard output.
    """
    if unknown := [source for source in sources if source.startswith("-") and source != "-"]:
        raise UserError(f"option {unknown[0]} is unknown; see `smalllm prepare --help`")
    console = Console(stderr=True)
    report, finish = _bars(console) if console.is_terminal else (_lines(console), lambda: None)
    try:
        result = prepare_dataset(
            sources,
            out,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            valid=valid,
            valid_fraction=valid_fraction,
            num_files=num_files,
            sample_rate=sample_rate,
            limit=limit,
            seed=seed,
            workers=workers,
            shard=shard,
            progress=report,
        )
    finally:
        finish()
    if json_output:
        print(json.dumps({key: dataclasses.asdict(result)[key] for key in KEYS}))
    else:
        print(_summary(result))


def _bars(console: Console) -> tuple[Callable[[PrepareProgress], None], Callable[[], None]]:
    """A live bar for each stage, and what ends them."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=console, transient=True)
    bars.start()
    tasks = {stage: bars.add_task(words, total=None, start=False) for stage, words in STAGES.items()}

    def report(state: PrepareProgress) -> None:
        bars.start_task(tasks[state.stage])
        bars.update(tasks[state.stage], completed=state.done_bytes, total=state.total_bytes)

    return report, bars.stop


def _lines(console: Console) -> Callable[[PrepareProgress], None]:
    """A plain line at each stage and every ten seconds."""
    last: dict[str, float] = {}

    def report(state: PrepareProgress) -> None:
        if state.seconds - last.get(state.stage, -10.0) >= 10.0:
            last[state.stage] = state.seconds
            console.print(
                Text(f"{STAGES[state.stage]}: {state.documents:,} documents, {state.done_bytes / 1e6:.1f} MB")
            )

    return report


def _summary(result: PrepareResult) -> str:
    out = plain(result.out)
    lines = [
        f"{'unchanged: ' if result.reused else ''}{out}{'' if result.complete else f', part {result.shard} alone'}",
        f"  train       {result.train_documents:,} documents, {result.train_tokens:,} tokens",
        f"  validation  {result.valid_documents:,} documents, {result.valid_tokens:,} tokens",
        f"  vocabulary  {result.vocab_size:,} pieces, {result.bytes_per_token:.2f} bytes per token",
    ]
    if result.duplicates or result.empty:
        lines.append(
            f"  left out    {result.duplicates:,} copies of validation documents, {result.empty:,} empty documents"
        )
    lines += _leaks(result.leaks)
    if not result.reused:
        lines.append(f"  speed       {result.megabytes_per_second:.1f} MB/s, {result.seconds:.1f} s")
    if not result.complete:
        return "\n".join([*lines, _what_is_missing(result)])
    return "\n".join([*lines, f"next: smalllm train --data {out}"])


def _what_is_missing(result: PrepareResult) -> str:
    """What to do until there is a dataset."""
    if not result.missing:
        return "next: wait; another process makes one dataset of the parts"
    some = ", ".join(result.missing[:8]) + (", ..." if len(result.missing) > 8 else "")
    missing = f"the parts that are missing ({len(result.missing)}): {some}"
    return f"next: {missing}; the last one to finish makes one dataset of them"


def _leaks(leaks: dict[str, Any] | None) -> list[str]:
    """Whether training nearly holds validation documents, and the pair that resembles most."""
    if leaks is None:  # made by an earlier version
        return []
    compared = (
        f"{leaks['valid_documents']:,} validation documents, {leaks['train_documents']:,} training documents compared"
    )
    worst = leaks["worst"]
    if worst is None:
        return [f"  leaks       none found among {compared}"]
    return [
        f"  leaks       {leaks['near'] + leaks['exact']:,} of {compared}: similarity {leaks['threshold']:g} or more",
        f"  most alike  {worst['similarity']:.2f}, validation document {worst['valid']:,}: {_line(worst['valid_text'])}",
        f"              training document {worst['train']:,}: {_line(worst['train_text'])}",
    ]


def _line(text: str, most: int = 80) -> str:
    flat = plain(" ".join(text.split()))
    return flat if len(flat) <= most else f"{flat[:most]} ..."
