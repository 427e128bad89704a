"""Sorted suffixes: the answer for a word, and equality with plain sorting and plain searching."""

from __future__ import annotations

import numpy as np
import pytest

from smalllm.native import suffixes

pytestmark = pytest.mark.usefixtures("native")


def text_of(symbols: list[int], kind: type) -> np.ndarray:
    return np.array([*symbols, 0], kind)


def naive_order(text: np.ndarray) -> list[int]:
    symbols = text.tolist()
    return sorted(range(len(symbols)), key=lambda place: symbols[place:])


def naive_longest(text: list[int], query: list[int]) -> list[int]:
    """For each place of the query the longest common beginning with any suffix of the text."""

    def common(one: list[int], other: list[int]) -> int:
        return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

    return [max(common(text[place:], query[start:]) for place in range(len(text))) for start in range(len(query))]


def test_banana():
    """b=2 a=1 n=3: the suffixes of banana$ in order are $, a$, ana$, anana$, banana$, na$, nana$."""
    text = text_of([2, 1, 3, 1, 3, 1], np.uint16)
    order = suffixes.sort(text, 4)
    assert order.tolist() == [6, 5, 3, 1, 0, 4, 2]
    lengths, places = suffixes.longest(text, order, np.array([3, 1, 3, 1, 2, 2, 9], np.uint16))
    assert lengths.tolist() == [4, 3, 2, 1, 1, 1, 0]
    assert places[0] == 2


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_order_and_matches_equal_the_naive_ones(kind: type):
    generator = np.random.default_rng(0)
    for _ in range(400):
        kinds = int(generator.integers(2, 6))
        text = text_of(generator.integers(1, kinds, generator.integers(0, 50)).tolist(), kind)
        order = suffixes.sort(text, kinds)
        assert order.tolist() == naive_order(text)
        query = generator.integers(1, kinds + 1, generator.integers(0, 12)).astype(kind)
        lengths, places = suffixes.longest(text, order, query)
        assert lengths.tolist() == naive_longest(text.tolist()[:-1] or [0], query.tolist())
        for start, (length, place) in enumerate(zip(lengths, places, strict=True)):
            assert text[place : place + length].tolist() == query[start : start + length].tolist()


@pytest.mark.parametrize("symbols", [[1] * 3000, [1, 2] * 1500, [3, 1, 2] * 1000 + [3, 1], [65_535, 1] * 10])
def test_repetitions_are_sorted(symbols: list[int]):
    text = text_of(symbols, np.uint16)
    assert suffixes.sort(text, 1 << 16).tolist() == naive_order(text)


def test_large_symbols_need_32_bits():
    text = text_of([100_000, 7, 100_000, 8], np.int32)
    assert suffixes.sort(text, 100_001).tolist() == naive_order(text)


def test_arguments_that_would_reach_outside_are_refused():
    with pytest.raises(AssertionError):
        suffixes.sort(np.array([1, 2], np.uint16), 3)  # no 0 at its end
    with pytest.raises(AssertionError):
        suffixes.sort(text_of([5], np.uint16), 5)
    text = text_of([1, 2], np.uint16)
    order = suffixes.sort(text, 3)
    with pytest.raises(AssertionError):
        suffixes.longest(text, order, np.array([0], np.uint16))
    with pytest.raises(AssertionError):
        suffixes.longest(text, order, np.array([1], np.int32))
