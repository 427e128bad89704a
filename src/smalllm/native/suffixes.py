"""The suffixes of a text of symbols in order, sorted in linear time, and the longest matches of a query in them.

It knows nothing of tokens. A text is an array of uint16 or int32 whose last symbol is a 0 that stands nowhere else in it.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

from smalllm.native.build import load

LONGEST_TEXT = (1 << 31) - 1  # symbols: places are 32-bit numbers


def sort(text: np.ndarray, kinds: int) -> np.ndarray:
    """The places of the suffixes of ``text`` [n] from the smallest on, int32 [n]; symbols are less than ``kinds``. Beside
    both arrays it takes an eighth of a byte and at most 2 bytes a symbol, and four a kind.

    Raises native.build.Unavailable where C++ cannot be compiled, MemoryError.
    """
    assert 0 < len(text) <= LONGEST_TEXT and text[-1] == 0 and int(text.max()) < kinds
    order = np.empty(len(text), np.int32)
    if _function("sort", text)(text, order, len(text), kinds) < 0:
        raise MemoryError("no memory to sort the suffixes of a text")
    return order


def longest(text: np.ndarray, order: np.ndarray, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each place of ``query`` [m], whose symbols are not 0: how many symbols from there on stand side by side
    somewhere in the text, and where; int32 [m] each. O(m log n) comparisons."""
    assert len(order) == len(text) and query.dtype == text.dtype and not (query == 0).any()
    lengths, places = np.empty(len(query), np.int32), np.empty(len(query), np.int32)
    _function("longest", text)(text, order, len(text), query, len(query), lengths, places)
    return lengths, places


@cache
def _library() -> ctypes.CDLL:
    """suffixes.cpp, with types that refuse arrays of another kind."""
    library, size = load("suffixes"), ctypes.c_int64
    int32 = np.ctypeslib.ndpointer(np.int32, flags="C")
    for bits, symbol in ((16, np.uint16), (32, np.int32)):
        text = np.ctypeslib.ndpointer(symbol, flags="C")
        sort, longest = getattr(library, f"suffixes_sort{bits}"), getattr(library, f"suffixes_longest{bits}")
        sort.restype, sort.argtypes = size, [text, int32, size, size]
        longest.restype, longest.argtypes = None, [text, int32, size, text, size, int32, int32]
    return library


def _function(name: str, text: np.ndarray) -> ctypes._NamedFuncPointer:
    assert text.dtype in (np.uint16, np.int32)
    function: ctypes._NamedFuncPointer = getattr(_library(), f"suffixes_{name}{8 * text.dtype.itemsize}")
    return function
