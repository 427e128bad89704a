"""How fast text becomes training data: `data.prepare` on stories of the built-in world, in a folder that is gone afterwards."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from smalllm.data import storyworld
from smalllm.data.prepare import prepare

MARK = "\n<|endoftext|>\n"


@dataclass(frozen=True)
class PreparingSpeed:
    """The figures of `smalllm bench prepare --json`: text of so many UTF-8 ``bytes`` with a vocabulary of so many pieces,
    from the file to the finished folder, in 10^6 bytes a second. Learning the vocabulary is among it, and does not grow with
    the text."""

    megabytes_per_second: float
    bytes: int
    documents: int
    tokens: int
    vocab_size: int
    seconds: float


def preparing_speed(megabytes: float, vocab_size: int, seed: int = 0) -> PreparingSpeed:
    """Write a file of stories, prepare it, and measure the second."""
    with tempfile.TemporaryDirectory(prefix="smalllm-bench-") as folder:
        text = Path(folder) / "stories.txt"
        with text.open("w", encoding="utf-8") as file:
            file.writelines(story + MARK for story in _stories(round(megabytes * 1e6), seed))
        start = time.perf_counter()
        made = prepare([str(text)], Path(folder) / "data", vocab_size=vocab_size)
        seconds = time.perf_counter() - start
    size = made.train_bytes + made.valid_bytes
    return PreparingSpeed(
        round(size / seconds / 1e6, 2), size, made.train_documents + made.valid_documents, made.train_tokens + made.valid_tokens,
        made.vocab_size, round(seconds, 3),
    )  # fmt: skip


def _stories(size: int, seed: int) -> Iterator[str]:
    """Stories until they have so many bytes."""
    told = 0
    for story in storyworld.stories(seed):
        told += len(story)
        yield story
        if told >= size:
            return


def table(speed: PreparingSpeed) -> Table:
    """The figures for a person, with what they stand for."""
    grid = Table.grid(padding=(0, 2))
    for name, figure, meaning in (
        ("speed", f"{speed.megabytes_per_second:,.1f} MB/s", "from the file to the finished folder"),
        ("text", f"{speed.bytes / 1e6:,.1f} MB", f"{speed.documents:,} stories, {speed.tokens:,} tokens"),
        (
            "vocabulary",
            f"{speed.vocab_size:,} pieces",
            f"learned among it; {speed.seconds:.1f} s in all",
        ),
    ):
        grid.add_row(name, figure, meaning)
    return grid
