"""The memory of words: cuts where it was told, finds by bytes, forgets without harm."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalllm.native.words import Words, bounds_of, fill, flattened

pytestmark = pytest.mark.usefixtures("native")

WORDS = st.text(alphabet="ab c\n\0éñ日本🙂", max_size=6)
TEXTS = st.lists(WORDS, max_size=50).map("".join)  # of many times 64 bytes
SINGLE = [bytes([number]) for number in range(256)]  # pieces of one character join nothing


def look_up(words: Words, texts: list[str], frame: tuple[int, int] = (-1, -1)):
    """What is found, and the unknown words."""
    text = "".join(texts).encode()
    bounds = bounds_of([part.encode() for part in texts])
    frames = np.tile(np.array(frame, np.int32), (len(texts), 1))
    found = words.look_up(np.frombuffer(text, np.uint8), bounds, frames)
    return found, [text[start:end].decode() for start, end in found.missing.tolist()]


def number(word: str) -> list[int]:
    """Some ids of a word that no other word has: no more than bytes."""
    return [ord(character) for character in word]


def learn(words: Words, unknown: list[str]) -> None:
    words.add([word.encode() for word in unknown], list(map(number, unknown)))


def cut(text: str, pieces: list[str]) -> list[str]:
    """The words of a text, by the rule."""
    joined = {pair for piece in pieces for pair in zip(piece, piece[1:], strict=False)}
    parts = [text[:1]] if text else []
    for left, right in zip(text, text[1:], strict=False):
        if (left, right) in joined:
            parts[-1] += right
        else:
            parts.append(right)
    return parts


@given(st.lists(WORDS, max_size=12), st.lists(TEXTS, max_size=3), st.integers(0, 1000))
@settings(max_examples=400, deadline=None)
def test_ids_are_those_of_the_words_in_their_order(pieces, texts, share):
    words = Words([piece.encode() for piece in pieces])
    parts = [cut(text, pieces) for text in texts]
    distinct = sorted({word for part in parts for word in part})
    known = [word for index, word in enumerate(distinct) if index * 389 % 1000 < share]
    learn(words, known)
    found, unknown = look_up(words, texts, (7000, 7001))
    assert sorted(unknown) == [word for word in distinct if word not in known] and len(words) == len(known)
    ids, counts = fill(found, list(map(number, unknown)))
    expected = [[7000, *(id for word in part for id in number(word)), 7001] for part in parts]
    assert ids.tolist() == [id for text in expected for id in text] and counts.tolist() == list(map(len, expected))


def test_cut_worked_by_hand():
    words = Words([b" the", "é日".encode(), *SINGLE])
    _, unknown = look_up(words, [" the the,tea é日é  "])
    assert unknown == [" the", ",", "t", "e", "a", " ", "é日", "é"]


@pytest.mark.parametrize("size", range(60, 70))
def test_blocks_of_64_bytes_leave_no_trace(size):
    words, run = Words([b"aa", "aé".encode()]), "a" * size
    found, unknown = look_up(words, [run, f"{run}é{run}", run])
    assert [unknown[~id] for id in found.ids] == [run, f"{run}é", run, run]


def test_text_ends_are_cuts_and_frames_are_optional():
    words = Words([b"ab"])
    learn(words, ["a", "b", "ab"])
    text, bounds = np.frombuffer(b"abab", np.uint8), np.array([1, 2, 2, 4])
    frames = np.array([[-1, -1], [1, 2], [3, -1]], np.int32)
    found = words.look_up(text, bounds, frames)
    assert found.ids.tolist() == [98, 1, 2, 3, 97, 98] and found.counts.tolist() == [1, 2, 3]


@pytest.mark.parametrize("start", ["", "12345678"])
def test_words_of_one_length_in_one_table_are_told_apart(start):
    """Some 500 words in 1,024 slots: hundreds meet another word of their length on the way."""
    words = Words([b"%02d" % number for number in range(100)])
    numbers = [f"{start}{number:03d}" for number in range(500)]
    learn(words, numbers)
    found, unknown = look_up(words, numbers)
    assert not unknown and found.ids.tolist() == [id for word in numbers for id in number(word)]


def test_words_that_collide_are_found_or_unknown_and_never_wrong():
    """Words of equal hash: as many are kept as are looked for, the others stay unknown."""
    alike = [word for word in (f"{number:05d}" for number in range(100_000)) if place(word) == 5][:60]
    words = Words([b"%02d" % number for number in range(100)])
    learn(words, alike)
    assert len(alike) == 60 and len(words) == 32
    found, unknown = look_up(words, alike)
    assert unknown == alike[32:]
    assert fill(found, list(map(number, unknown)))[0].tolist() == [id for word in alike for id in number(word)]


def test_a_word_is_not_taken_for_the_longer_one_in_its_slot():
    """They differ by a zero byte at the end, which stands behind the shorter one's head as well."""
    short = next(word for number in range(100_000) if place(word := f"{number:05d}") == place(word + "\0"))
    words = Words([*(b"%02d" % number for number in range(100)), *(b"%d\0" % number for number in range(10))])
    learn(words, [short + "\0"])
    assert look_up(words, [short, short + "\0"])[1] == [short]


def place(word: str) -> int:
    """The slot of 1,024 that words.cpp looks at first, for a word of at most 8 bytes."""
    data = word.encode()
    hash = (int.from_bytes(data, "little") ^ len(data)) * 0x9E3779B97F4A7C15 % 2**64
    return (hash ^ hash >> 32) % 1024


def test_a_full_table_starts_anew():
    words = Words(SINGLE, most=3)
    learn(words, ["a", "b", "c"])
    assert len(words) == 3 and look_up(words, ["abc"])[1] == []
    learn(words, ["c", "d"])
    assert len(words) == 2 and look_up(words, ["abcd"])[1] == ["a", "b"]


def test_tables_grow_to_their_limit():
    words, many = Words([b"%02d" % number for number in range(100)], most=4000), [f"{n:04d}" for n in range(4001)]
    learn(words, many[:4000])
    found, unknown = look_up(words, many[:4000])
    assert (
        len(words) == 4000 and not unknown and found.ids.tolist() == [i for word in many[:4000] for i in number(word)]
    )
    learn(words, many[4000:])
    assert len(words) == 1


def test_long_words_and_words_of_many_ids_are_not_kept():
    words = Words([b"aa", b"b"])
    words.add([b"a" * 64, b"a" * 65, b"b", b""], [[1], [2], [3, 4], []])
    assert len(words) == 1
    found, unknown = look_up(words, ["a" * 64, "b" * 1, "a" * 65, "a" * 65])
    assert unknown == ["b", "a" * 65, "a" * 65]
    assert fill(found, [[3, 4], [2], []])[0].tolist() == [1, 3, 4, 2]


def test_known_words_can_have_no_ids():
    words = Words(SINGLE)
    words.add([b"a"], [[]])
    found, unknown = look_up(words, ["aa"])
    assert not unknown and not len(found.ids) and found.counts.tolist() == [0]


def test_many_threads_look_up_at_once():
    words = Words([b"%02d" % number for number in range(100)])
    learn(words, [f"{number:03d}" for number in range(0, 1000, 2)])
    texts = [" ".join(f"{number * step % 1000:03d}" for number in range(2000)) for step in range(1, 9)]
    alone = [look_up(words, [text])[0] for text in texts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda text: look_up(words, [text])[0], texts))
    for one, other in zip(alone, together, strict=True):
        assert all(map(np.array_equal, one, other))


@given(st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_cut_without_loss(text):
    words = Words(["né日".encode(), b"\xff\x80\x80\x80\x80", b"\x80\x80"])
    found = words.look_up(np.frombuffer(text, np.uint8), np.array([0, len(text)]), np.full((1, 2), -1, np.int32))
    parts = [text[start:end] for start, end in found.missing.tolist()]
    assert b"".join(parts[~id] for id in found.ids) == text


def test_arguments_that_would_reach_outside_are_refused():
    words, frames = Words(SINGLE), np.full((1, 2), -1, np.int32)
    text = np.frombuffer(b"abc", np.uint8)
    for bounds in ([0, 4], [-1, 2], [2, 1]):
        with pytest.raises(AssertionError):
            words.look_up(text, np.array(bounds), frames)
    with pytest.raises(AssertionError):
        words.look_up(text, np.array([0, 1, 2]), frames)
    with pytest.raises(AssertionError):
        words.add([b"a"], [[-1]])
    with pytest.raises(IndexError):
        fill(look_up(words, ["ab"])[0], [[1]])


def test_flattened():
    ids, bounds = flattened([[1, 2], [], [3]])
    assert (ids.tolist(), bounds.tolist(), ids.dtype) == ([1, 2, 3], [0, 2, 2, 3], np.int32)
    assert flattened([])[1].tolist() == [0]
