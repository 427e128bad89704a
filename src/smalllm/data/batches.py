"""Which tokens a step sees: ``batches.rows_of(step)`` is a pure function of (seed, step).

The training split is cut into rows of at most ``context`` targets, each token a target once per epoch; rows come in a
keyed random order. Nothing is stored, so resuming needs only the step, and any number of ranks sees the same order.
The module knows nothing about models.
"""

from __future__ import annotations

import threading
import time
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from smalllm.config import UserError
from smalllm.data.shards import TokenSplit

IGNORE = -100
"""Target of a position that does not count (torch's ignore_index)."""
PARTING_SECONDS = 0.2
"""To wait for the thread at the end. After Ctrl-C in a ``join``, Python 3.11 never sees that thread end (bpo-45274)."""


@dataclass(frozen=True)
class Batch:
    """Inputs and targets, each int64 [sequences, context]; targets are the inputs' successors, or IGNORE. ``starts``, int32,
    is where each position's document begins in its row, where documents must not see each other."""

    inputs: Tensor
    targets: Tensor
    starts: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        starts = None if self.starts is None else change(self.starts)
        return Batch(change(self.inputs), change(self.targets), starts)


Segment = tuple[int, int]
"""A stretch of the split: first token read, number of targets (the tokens that follow each of those read)."""


class StreamRows:
    """The split as a ring of tokens, cut every ``context`` tokens wherever that falls; each epoch cuts elsewhere."""

    def __init__(self, split: TokenSplit, context: int, seed: int) -> None:
        self.tokens, self.context, self.seed = split.tokens, context, seed
        self.count = -(-split.tokens // context)

    def row(self, index: int, epoch: int) -> list[Segment]:
        cut = mix(self.seed, epoch, 1) % self.tokens
        targets = min(self.context, self.tokens - index * self.context)
        return [((cut + index * self.context) % self.tokens, targets)]


class PackedRows:
    """Whole documents packed into rows (best fit, longest first, among neighbours in the stored order), so that a token
    sees all of its document; a document longer than ``context`` is cut into pieces. Begin tokens are no targets.
    Memory holds 12 bytes for each piece and 8 for each row."""

    GROUP = 4096

    def __init__(self, split: TokenSplit, context: int) -> None:
        lengths = np.fromiter((len(document) for document in split.iterate_documents()), dtype=np.int64)
        if not len(lengths) or lengths.max() < 2:
            raise UserError(f"the {split.name} split holds no token to learn; give more text to: smalllm prepare")
        self._starts, self._targets = array("Q"), array("I")  # of the pieces, row after row
        self._ends = array("Q", [0])  # of the rows among them
        begin = 0
        for first in range(0, len(lengths), self.GROUP):
            group = lengths[first : first + self.GROUP]
            starts = begin + np.cumsum(group) - group
            begin += int(group.sum())
            pieces = [
                (start + offset, min(context, length - 1 - offset))
                for start, length in zip(starts.tolist(), group.tolist(), strict=True)
                for offset in range(0, length - 1, context)
            ]
            for row in pack(pieces, context):
                self._starts.extend(start for start, _ in row)
                self._targets.extend(targets for _, targets in row)
                self._ends.append(len(self._starts))
        self.count = len(self._ends) - 1

    def row(self, index: int, epoch: int) -> list[Segment]:
        pieces = slice(self._ends[index], self._ends[index + 1])
        return list(zip(self._starts[pieces], self._targets[pieces], strict=True))


def pack(pieces: list[Segment], capacity: int) -> list[list[Segment]]:
    """Best-fit decreasing bin packing of segments into rows of at most ``capacity`` targets.

    >>> pack([(0, 3), (10, 5), (20, 2), (30, 1)], capacity=6)
    [[(10, 5)], [(0, 3), (20, 2), (30, 1)]]
    """
    rows: list[list[Segment]] = []
    open_rows: dict[int, list[int]] = {}  # free targets -> rows that have so many
    spaces = 0  # bit n is set when a row has n free
    for piece in sorted(pieces, key=lambda piece: (-piece[1], piece[0])):
        fitting = spaces >> piece[1] << piece[1]
        if fitting:
            space = (fitting & -fitting).bit_length() - 1
            row = open_rows[space].pop()
            spaces ^= (not open_rows[space]) << space
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(piece)
        left = space - piece[1]
        open_rows.setdefault(left, []).append(row)
        spaces |= 1 << left
    return rows


class Batches:
    """The endless stream of global batches of a split. ``packing`` is ``stream`` or ``documents``."""

    def __init__(self, split: TokenSplit, context: int, batch_tokens: int, seed: int, packing: str = "stream") -> None:
        assert batch_tokens % context == 0
        if split.tokens < 2:
            raise UserError(f"the {split.name} split has {split.tokens} tokens; give more text to: smalllm prepare")
        self.split, self.context, self.seed = split, context, seed
        self.rows_per_step = batch_tokens // context
        self.rows = PackedRows(split, context) if packing == "documents" else StreamRows(split, context, seed)
        self.rows_of = lru_cache(4)(self._rows_of)  # asked for the tokens and for the batches of a step

    def epoch(self, step: int) -> float:
        """Passes over the data when ``step`` steps are done."""
        return step * self.rows_per_step / self.rows.count

    def _rows_of(self, step: int) -> list[list[Segment]]:
        """The segments of each row of a step, over all ranks."""
        number = np.arange(self.rows_per_step, dtype=np.int64) + step * self.rows_per_step
        found = []
        for epoch in np.unique(number // self.rows.count).tolist():
            within = number[number // self.rows.count == epoch] % self.rows.count
            index = permute(within, self.rows.count, mix(self.seed, epoch))
            found += [self.rows.row(row, epoch) for row in index.tolist()]
        return found

    def micro_batches(self, step: int, micro_batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """This rank's share of a step in pieces of at most ``micro_batch`` rows."""
        mine = self.rows_of(step)[rank::world]
        for start in range(0, len(mine), micro_batch):
            yield self._batch(mine[start : start + micro_batch])

    def tokens(self, step: int) -> int:
        """Targets that count in a step, over all ranks: the divisor of its loss."""
        return sum(targets for row in self.rows_of(step) for _, targets in row)

    def _batch(self, rows: list[list[Segment]]) -> Batch:
        inputs = np.zeros((len(rows), self.context), dtype=np.int64)
        targets = np.full((len(rows), self.context), IGNORE, dtype=np.int64)
        starts = np.zeros((len(rows), self.context), dtype=np.int32)
        for number, row in enumerate(rows):
            place = 0
            for start, count in row:
                tokens = self._ring(start, count + 1)
                inputs[number, place : place + count] = tokens[:-1]
                targets[number, place : place + count] = tokens[1:]
                starts[number, place : place + count] = place
                place += count
            starts[number, place:] = place  # padding is a document of its own
        separate = torch.from_numpy(starts) if isinstance(self.rows, PackedRows) else None
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), separate)

    def _ring(self, start: int, count: int) -> np.ndarray:
        """Tokens from ``start``, going on at the beginning when the end is reached."""
        parts = []
        while count:
            here = min(count, self.split.tokens - start)
            parts.append(self.split.read(start, here))
            start, count = 0, count - here
        return np.concatenate(parts)


class Prefetch:
    """Makes the batches of the next step on a thread of its own while this step computes, so that it never waits for them.

    What goes wrong in the thread is raised by the `step` that needs its batches. A thread that died, or a disk that does not
    answer for ``patience`` seconds, is a UserError and no hang; ``warn`` is told once that a disk is slow.
    """

    def __init__(
        self, batches: Batches, pin: bool = False, warn: Callable[[str], None] | None = None,
        slow: float = 10.0, patience: float = 600.0, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.rank, self.world = rank, world
        self.batches, self.pin = batches, pin  # pinned memory is copied to a GPU in the background
        self.warn, self.slow, self.patience = warn, slow, patience
        self.coming: _Coming | None = None
        self._threads: deque[threading.Thread] = deque(maxlen=1)
        weakref.finalize(self, _join, self._threads)  # a program's end stops threads in the midst of C++ otherwise
        self.waited = 0.0
        """Seconds that steps have waited for their batches."""

    def step(self, step: int, micro_batch: int) -> list[Batch]:
        """The micro-batches of a step; those of the next one are begun."""
        if self.coming is None or self.coming.key != (step, micro_batch):
            self.coming = self._begin(step, micro_batch)
        made = self._finished(self.coming)
        self.coming = self._begin(step + 1, micro_batch)
        return made

    def close(self) -> None:
        """Wait a moment for the thread, which cannot keep the program from ending."""
        if self.coming is not None:
            self.coming.thread.join(PARTING_SECONDS)

    def _begin(self, step: int, micro_batch: int) -> _Coming:
        coming = _Coming((step, micro_batch), lambda: self._make(step, micro_batch))
        self._threads.append(coming.thread)
        return coming

    def _finished(self, coming: _Coming) -> list[Batch]:
        """What the thread made; waits as long as there is hope."""
        began = time.monotonic()
        coming.thread.join(self.slow)
        if coming.thread.is_alive() and self.warn is not None:
            self.warn(f"step {coming.key[0]} waits for its data; is the disk of {self.batches.split.name} slow?")
            self.warn = None
        coming.thread.join(max(0.0, self.patience - self.slow))
        self.waited += time.monotonic() - began
        if coming.thread.is_alive():
            raise UserError(f"the data of step {coming.key[0]} did not come within {self.patience:g} s; check its disk")
        return coming.result()

    def _make(self, step: int, micro_batch: int) -> list[Batch]:
        made = list(self.batches.micro_batches(step, micro_batch, self.rank, self.world))
        return [batch.pinned() for batch in made] if self.pin else made


def _join(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        thread.join(PARTING_SECONDS)


class _Coming:
    """The batches of a step, being made by a thread."""

    def __init__(self, key: tuple[int, int], make: Callable[[], list[Batch]]) -> None:
        self.key, self._make = key, make
        self._made: list[Batch] | None = None
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self.thread.start()

    def result(self) -> list[Batch]:
        """When the thread has ended: what it made, or its error."""
        if self._error is not None:
            raise self._error
        if self._made is None:  # such as in a process that was forked from the one that has the thread
            raise UserError(f"the thread that reads the data of step {self.key[0]} died; start again, the run goes on")
        return self._made

    def _run(self) -> None:
        try:
            self._made = self._make()
        except BaseException as error:  # SystemExit and MemoryError too must reach whoever waits
            self._error = error


def mix(*parts: int) -> int:
    """A 63-bit number from integers, as if drawn at random (splitmix64 finalizer, Steele et al. 2014)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ part) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed random permutation of range(size) sends each index, without storing it: a balanced Feistel network
    with cycle walking (Black & Rogaway 2002). O(1) memory, so terabytes of tokens are shuffled for free."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    value = index.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        value[outside] = _feistel(value[outside], half, key)
        outside = value >= np.uint64(size)
    return value.astype(np.int64)


def _feistel(value: np.ndarray, half: int, key: int, rounds: int = 4) -> np.ndarray:
    low_mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = value >> shift, value & low_mask
    for turn in range(rounds):
        left, right = right, left ^ (_scramble(right, mix(key, turn)) & low_mask)
    return (left << shift) | right


def _scramble(value: np.ndarray, key: int) -> np.ndarray:
    """A hash of each uint64 (murmur3 finalizer); overflow wraps, as meant."""
    with np.errstate(over="ignore"):
        value = (value ^ np.uint64(key)) * np.uint64(0xFF51AFD7ED558CCD)
        value ^= value >> np.uint64(33)
        value *= np.uint64(0xC4CEB9FE1A85EC53)
        return value ^ (value >> np.uint64(33))
