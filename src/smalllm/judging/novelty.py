"""What a text has copied from the training data: the longest spans of tokens that stand there as well, exactly.

All suffixes of the training tokens are sorted once (a suffix array: U. Manber, G. Myers, "Suffix Arrays", SIAM Journal on
Computing 22(5), 1993); then every span of a text is looked up by halving. It takes 6 bytes of memory for a token, 2 for the
token and 4 for its place, and up to 2.3 more while it is built (above 65,535 pieces 2 more). The module knows nothing about
models.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from smalllm.data.shards import CHUNK_TOKENS, TokenSplit
from smalllm.hardware import total_memory
from smalllm.native import suffixes
from smalllm.native.build import Unavailable
from smalllm.tokenizer import Tokenizer

MEMORY_SHARE = 0.25  # of the machine's, that the index of a run's data may take
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True)
class Copy:
    """The longest span that a text shares with the training data; ``words`` are whole words, of the span with most of them."""

    tokens: int
    words: int
    text: str


class TrainingText:
    """Training tokens with their suffixes in order. ``covered`` is the share of the training data that is in it."""

    def __init__(self, parts: Iterable[np.ndarray], tokens: int, vocab_size: int, covered: float = 1.0) -> None:
        """``parts`` are ids in turn, ``tokens`` of them together. Native code or, slower, numpy."""
        symbol = np.uint16 if vocab_size < 1 << 16 else np.int32
        self.covered, self._text = covered, np.zeros(tokens + 1, symbol)  # ids are kept plus 1: the end is a 0
        filled = 0
        for part in parts:
            self._text[filled : filled + len(part)] = part
            filled += len(part)
        assert filled == tokens
        np.add(self._text[:-1], 1, out=self._text[:-1])
        try:
            self._order, self._native = suffixes.sort(self._text, vocab_size + 1), True
        except Unavailable:
            self._order, self._native = sorted_suffixes(self._text), False

    @classmethod
    def of(cls, split: TokenSplit, vocab_size: int, most_tokens: int | None = None) -> TrainingText:
        """A split of a dataset, or as many of its first tokens as a quarter of the machine's memory holds."""
        most = most_tokens or int(MEMORY_SHARE * total_memory(torch.device("cpu")) / bytes_per_token(vocab_size))
        tokens = min(split.tokens, most, suffixes.LONGEST_TEXT - 1)
        return cls(_chunks(split, tokens), tokens, vocab_size, tokens / max(1, split.tokens))

    @property
    def tokens(self) -> int:
        return len(self._text) - 1

    @property
    def bytes(self) -> int:
        return self._text.nbytes + self._order.nbytes

    def matches(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """For each place of some ids: how many ids from there on stand side by side in the training data, and where;
        int32 [ids] each."""
        query = np.asarray(ids, dtype=np.int64).astype(self._text.dtype) + self._text.dtype.type(1)
        find = suffixes.longest if self._native else longest_matches
        return find(self._text, self._order, query)

    def longest_copy(self, ids: Sequence[int], tokenizer: Tokenizer) -> Copy:
        """The longest copied span of a text, which is given by ids of this tokenizer, that of the data."""
        lengths, _ = self.matches(ids)
        if not lengths.size or not lengths.max():
            return Copy(0, 0, "")
        start = int(lengths.argmax())
        return Copy(
            tokens=int(lengths[start]),
            words=_most_words(ids, lengths, tokenizer),
            text=tokenizer.decode(ids[start : start + int(lengths[start])]),
        )


def bytes_per_token(vocab_size: int) -> float:
    """Memory for a token while the index is built, at most: token, place, and the marks and numbers of sorting."""
    return (2 if vocab_size < 1 << 16 else 4) + 4 + 2.25


def _chunks(split: TokenSplit, tokens: int) -> Iterator[np.ndarray]:
    for start in range(0, tokens, CHUNK_TOKENS):
        yield split.read(start, min(CHUNK_TOKENS, tokens - start))


def _most_words(ids: Sequence[int], lengths: np.ndarray, tokenizer: Tokenizer) -> int:
    """Whole words of the text inside one copied span, at most."""
    text = tokenizer.decode(ids)
    places = [0, *itertools.accumulate(len(character.encode()) for character in text)]  # in bytes, of each character
    words = [(places[word.start()], places[word.end()]) for word in WORD.finditer(text)]
    begins, ends = np.array([w[0] for w in words]), np.array([w[1] for w in words])
    bounds = np.array([0, *itertools.accumulate(len(tokenizer.bytes_of(id)) for id in ids)])
    first = np.searchsorted(begins, bounds[np.arange(len(ids))])
    last = np.searchsorted(ends, bounds[np.arange(len(ids)) + lengths], side="right")
    return max(0, int((last - first).max()))


# ── without a compiler ──


def sorted_suffixes(text: np.ndarray) -> np.ndarray:
    """The places of the suffixes of ``text`` [n] from the smallest on, int32 [n], by doubling (Manber & Myers 1993): ranks by
    the first k symbols give those by 2k. O(n log n) a round, and a round for each doubling of the longest repetition."""
    rank, reach = text.astype(np.int64), 1
    while True:
        after = np.zeros_like(rank)
        after[: max(0, len(rank) - reach)] = rank[reach:] + 1
        key = rank * (int(rank.max()) + 2) + after
        order = np.argsort(key, kind="stable")
        rank = np.empty_like(key)
        rank[order] = np.concatenate([[0], np.cumsum(np.diff(key[order]) != 0)])
        if rank[order[-1]] == len(text) - 1:
            return order.astype(np.int32)
        reach *= 2


def longest_matches(text: np.ndarray, order: np.ndarray, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`suffixes.longest` in Python."""
    lengths, places = np.zeros(len(query), np.int32), np.zeros(len(query), np.int32)
    for start in range(len(query)):
        lengths[start], places[start] = _longest_match(text, order, query[start:].tolist())
    return lengths, places


def _longest_match(text: np.ndarray, order: np.ndarray, query: list[int]) -> tuple[int, int]:
    low, high, best, place = 0, len(order), 0, 0
    while high - low > 1 and best < len(query):
        middle = (low + high) // 2
        suffix = text[order[middle] : order[middle] + len(query)].tolist()
        shared = next((i for i, (a, b) in enumerate(zip(suffix, query, strict=False)) if a != b), len(suffix))
        if shared > best:
            best, place = shared, int(order[middle])
        low, high = (middle, high) if suffix < query else (low, middle)
    return best, place
