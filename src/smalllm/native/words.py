"""A memory of words and their ids: looks up whole texts, several hundred megabytes a second, and lists what it lacks.

It knows nothing of tokenizers. What a word is, the caller decides by a list of pieces: a text is cut between two
characters that stand side by side in no piece. The ids come from the caller too. A hash only says where to look: a word
is found when its bytes are equal.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import NamedTuple

import numpy as np

from smalllm.native.build import load

MOST_WORDS = 1 << 18  # of up to 64 bytes and as many ids: some 10 MB for a language, never more than 200 MB
MOST_BYTES = 1 << 30  # of text in one call: an unknown word's number is an int32


class Found(NamedTuple):
    """What `look_up` found in some texts."""

    ids: np.ndarray  # (ids,) int32: of all texts in turn; ~number in place of an unknown word
    counts: np.ndarray  # (texts,) int64: how many of them each text has
    missing: np.ndarray  # (unknown words, 2) int64: where the word of each number begins and ends in the text


class Words:
    """Known words. Several threads may `look_up` at once, but none while another one adds."""

    def __init__(self, pieces: Sequence[bytes], most: int = MOST_WORDS) -> None:
        """No cut is made inside a piece, in UTF-8; at most so many words are kept, then all are forgotten.

        Raises native.build.Unavailable where C++ cannot be compiled.
        """
        assert 0 < most <= MOST_WORDS
        self._library = _library()
        text = np.frombuffer(b"".join(pieces), np.uint8)
        self._words = _checked(self._library.words_new(text, bounds_of(pieces), len(pieces), most))
        weakref.finalize(self, self._library.words_free, self._words)

    def __len__(self) -> int:
        return int(self._library.words_count(self._words))

    def look_up(self, text: np.ndarray, bounds: np.ndarray, frames: np.ndarray) -> Found:
        """The ids of the known words of texts, and the unknown words; a word that comes twice is usually listed once.

        `text` (bytes,) uint8 holds the texts, `bounds` (texts + 1,) int64 says where each begins and the last ends, and
        `frames` (texts, 2) int32 has the ids to put before and after each, negative for none.
        """
        texts, size = len(bounds) - 1, int(bounds[-1] - bounds[0])
        assert bounds[0] >= 0 and bounds[-1] <= len(text) and (np.diff(bounds) >= 0).all() and size <= MOST_BYTES
        assert frames.shape == (texts, 2)
        ids, counts = np.empty(size + 2 * texts, np.int32), np.empty(texts, np.int64)  # no word has more ids than bytes
        missing, misses = np.empty((size, 2), np.int64), ctypes.c_int64()
        used = self._library.words_look_up(self._words, text, bounds, texts, frames, ids, counts, missing, misses)
        return Found(ids[: _checked(used)], counts, missing[: misses.value])

    def add(self, words: Sequence[bytes], ids: Sequence[Sequence[int]]) -> None:
        """Remember the ids of words. Any word may be forgotten; those of more than 64 bytes, or of more ids than bytes,
        are not taken up."""
        flat, bounds = flattened(ids)
        assert (flat >= 0).all()
        text = np.frombuffer(b"".join(words), np.uint8)
        _checked(self._library.words_add(self._words, text, bounds_of(words), flat, bounds, len(words)))


def fill(found: Found, ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(ids,) int32 and (texts,) int64: those of `found` after each unknown word got its `ids`, which are in its order."""
    flat, bounds = flattened(ids)
    sizes = np.diff(bounds)[~found.ids[found.ids < 0]]
    filled, counts = np.empty(len(found.ids) - len(sizes) + int(sizes.sum()), np.int32), found.counts.copy()
    used = _library().words_fill(found.ids, counts, len(counts), flat, bounds, filled, len(filled))
    assert used == len(filled)
    return filled, counts


def flattened(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids one after another, (ids,) int32, and their bounds."""
    bounds = bounds_of(lists)
    return np.fromiter(chain.from_iterable(lists), np.int32, int(bounds[-1])), bounds


def bounds_of(parts: Sequence[Sequence[int]]) -> np.ndarray:
    """(parts + 1,) int64: where each part begins, and the last one ends, when they stand one after another."""
    return np.concatenate([[0], np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)))])


def _checked(answer: int | None) -> int:
    if answer is None or answer < 0:
        raise MemoryError("no memory for the words of a text")
    return answer


@cache
def _library() -> ctypes.CDLL:
    """words.cpp, with types that refuse arrays of another kind."""
    library = load("words")
    size, handle = ctypes.c_int64, ctypes.c_void_p
    bytes_, int32, int64 = (np.ctypeslib.ndpointer(kind, flags="C") for kind in (np.uint8, np.int32, np.int64))
    library.words_new.restype, library.words_new.argtypes = handle, [bytes_, int64, size, size]
    library.words_free.restype, library.words_free.argtypes = None, [handle]
    library.words_count.restype, library.words_count.argtypes = size, [handle]
    library.words_look_up.restype = size
    library.words_look_up.argtypes = [
        handle, bytes_, int64, size, int32, int32, int64, int64, ctypes.POINTER(size),
    ]  # fmt: skip
    library.words_add.restype, library.words_add.argtypes = size, [handle, bytes_, int64, int32, int64, size]
    library.words_fill.restype, library.words_fill.argtypes = size, [int32, int64, size, int32, int64, int32, size]
    return library
