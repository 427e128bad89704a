"""Which tokens a step sees: ``batches.sequences(step)`` is a pure function of (seed, step).

The training split is a ring of tokens, cut into windows of ``context`` inputs, each token a target exactly once per
epoch; windows come in a keyed random order, and each epoch cuts elsewhere. Nothing is stored, so resuming needs only
the step, and any number of ranks sees the same order. The module knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smalllm.config import UserError
from smalllm.data.shards import TokenSplit

IGNORE = -100
"""Target of a position that does not count (torch's ignore_index)."""


@dataclass(frozen=True)
class Batch:
    """Inputs and targets, each int64 [sequences, context]; targets are the inputs' successors, or IGNORE."""

    inputs: Tensor
    targets: Tensor

    @property
    def tokens(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device) -> Batch:
        return Batch(self.inputs.to(device, non_blocking=True), self.targets.to(device, non_blocking=True))


class Batches:
    """The endless stream of global batches of a split."""

    def __init__(self, split: TokenSplit, context: int, batch_tokens: int, seed: int) -> None:
        assert batch_tokens % context == 0
        if split.tokens < 2:
            raise UserError(f"the {split.name} split has {split.tokens} tokens; give more text to: smalllm prepare")
        self.split, self.context, self.seed = split, context, seed
        self.sequences_per_step = batch_tokens // context
        self.windows = -(-split.tokens // context)

    def epoch(self, step: int) -> float:
        """Passes over the data when ``step`` steps are done."""
        return step * self.sequences_per_step / self.windows

    def sequences(self, step: int) -> list[tuple[int, int]]:
        """(first token, number of targets) of each window of a step; the first token counts from the epoch's cut."""
        number = np.arange(self.sequences_per_step, dtype=np.int64) + step * self.sequences_per_step
        found = []
        for epoch in np.unique(number // self.windows):
            index = permute(number[number // self.windows == epoch] % self.windows, self.windows, mix(self.seed, int(epoch)))
            cut = mix(self.seed, int(epoch), 1) % self.split.tokens
            for window in index.tolist():
                targets = min(self.context, self.split.tokens - window * self.context)
                found.append(((cut + window * self.context) % self.split.tokens, targets))
        return found

    def micro_batches(self, step: int, micro_batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """This rank's share of a step in pieces of at most ``micro_batch`` sequences."""
        mine = self.sequences(step)[rank::world]
        for start in range(0, len(mine), micro_batch):
            yield self._batch(mine[start : start + micro_batch])

    def tokens(self, step: int) -> int:
        """Targets that count in a step, over all ranks: the divisor of its loss."""
        return sum(targets for _, targets in self.sequences(step))

    def _batch(self, windows: list[tuple[int, int]]) -> Batch:
        inputs = np.zeros((len(windows), self.context), dtype=np.int64)
        targets = np.full((len(windows), self.context), IGNORE, dtype=np.int64)
        for row, (start, count) in enumerate(windows):
            tokens = self._ring(start, count + 1)
            inputs[row, :count], targets[row, :count] = tokens[:-1], tokens[1:]
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def _ring(self, start: int, count: int) -> np.ndarray:
        """Tokens from ``start``, going on at the beginning when the end is reached."""
        parts = []
        while count:
            here = min(count, self.split.tokens - start)
            parts.append(self.split.read(start, here))
            start, count = 0, count - here
        return np.concatenate(parts)


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
