"""Data order: a pure function of (seed, step), every token once per epoch, whatever the number of ranks."""

from __future__ import annotations

import threading
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalllm.config import UserError
from smalllm.data.batches import IGNORE, Batches, Prefetch, mix, pack, permute

PINNED_MIX = (635286641217458360, 6321771992720037893, 7795324965117060851)
PINNED_SEQUENCES = [[(498, 10)], [(638, 10)], [(288, 10)], [(578, 10)]]


class Tokens:
    """A split whose token at position i is i."""

    name = "train"

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.documents = 0

    def read(self, start: int, count: int) -> np.ndarray:
        assert start >= 0 and start + count <= self.tokens
        return np.arange(start, start + count, dtype=np.uint32)


@given(st.integers(1, 3000), st.integers(0, 2**62))
@settings(max_examples=60)
def test_permute_is_a_permutation(size: int, key: int):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_works_beyond_32_bits_and_keys_differ():
    size = 10**13
    index = np.arange(size - 1000, size)
    there = permute(index, size, 5)
    assert len(set(there.tolist())) == 1000 and there.min() >= 0 and there.max() < size
    assert not np.array_equal(there, permute(index, size, 6))


def test_permute_moves_neighbours_apart():
    there = permute(np.arange(1000), 1000, 3)
    assert np.abs(np.diff(there)).mean() > 250  # 333 for a random permutation, 1 for none


def test_mix_is_pinned():
    """Resuming an old run needs the same order for ever."""
    assert (mix(42, 0), mix(42, 1), mix(0)) == PINNED_MIX
    assert Batches(Tokens(1000), 10, 40, seed=42).rows_of(3) == PINNED_SEQUENCES


@given(tokens=st.integers(2, 500), context=st.integers(1, 40), sequences=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_every_token_is_a_target_once_per_epoch(tokens: int, context: int, sequences: int, seed: int):
    batches = Batches(Tokens(tokens), context, context * sequences, seed)
    steps = -(-2 * batches.rows.count // sequences)
    windows = [segment for step in range(steps) for row in batches.rows_of(step) for segment in row]
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for start, count in windows[epoch * batches.rows.count : (epoch + 1) * batches.rows.count]:
            seen.update((start + 1 + i) % tokens for i in range(count))
        assert seen == Counter(range(tokens))


@given(
    tokens=st.integers(2, 300),
    sequences=st.integers(1, 12),
    micro=st.integers(1, 5),
    world=st.sampled_from([1, 2, 3, 8]),
    step=st.integers(0, 40),
)
@settings(max_examples=80, deadline=None)
def test_ranks_and_micro_batches_share_a_step_without_overlap(
    tokens: int, sequences: int, micro: int, world: int, step: int
):
    batches = Batches(Tokens(tokens), 8, 8 * sequences, seed=1)
    whole = _rows(batches, step, sequences, 0, 1)
    shared = [row for rank in range(world) for row in _rows(batches, step, micro, rank, world)]
    assert Counter(shared) == Counter(whole)
    assert batches.tokens(step) == sum(target != IGNORE for _, targets in whole for target in targets)


def _rows(batches: Batches, step: int, micro: int, rank: int, world: int) -> list[tuple]:
    found = []
    for batch in batches.micro_batches(step, micro, rank, world):
        assert len(batch.inputs) <= micro
        found += [(tuple(i), tuple(t)) for i, t in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)]
    return found


def test_targets_are_the_successors_and_all_positions_count():
    batches = Batches(Tokens(256 * 4), 256, 512, seed=3)
    for batch in batches.micro_batches(0, 1):
        assert torch.equal((batch.inputs + 1) % 1024, batch.targets)
        assert batch.tokens == 256  # not 255


def test_the_short_window_is_padded_with_targets_that_do_not_count():
    batches = Batches(Tokens(10), 8, 16, seed=0)
    rows = _rows(batches, 0, 2, 0, 1)
    assert sorted(sum(t != IGNORE for t in targets) for _, targets in rows) == [2, 8]
    assert batches.tokens(0) == 10


def test_order_depends_on_the_seed_and_changes_between_epochs():
    first, other = Batches(Tokens(4096), 16, 64, seed=1), Batches(Tokens(4096), 16, 64, seed=2)
    assert first.rows_of(0) != other.rows_of(0)
    epoch = first.rows.count // first.rows_per_step
    assert first.rows_of(0) != first.rows_of(epoch)
    assert first.epoch(epoch) == 1.0


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="the train split has 1 tokens"):
        Batches(Tokens(1), 8, 8, seed=0)


class Documents(Tokens):
    """Documents of given lengths, one after the other."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(sum(lengths))
        self.lengths, self.documents = lengths, len(lengths)

    def iterate_documents(self):  # type: ignore[no-untyped-def]
        start = 0
        for length in self.lengths:
            yield np.arange(start, start + length)
            start += length


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=60),
    context=st.integers(2, 40),
    sequences=st.integers(1, 5),
)
@settings(max_examples=80, deadline=None)
def test_packed_rows_hold_each_target_once_and_whole_documents(lengths: list[int], context: int, sequences: int):
    split = Documents(lengths)
    batches = Batches(split, context, context * sequences, seed=3, packing="documents")
    rows = [batches.rows.row(index, 0) for index in range(batches.rows.count)]
    begins = set(np.cumsum([0, *lengths])[:-1].tolist())
    targets = Counter(start + 1 + i for row in rows for start, count in row for i in range(count))
    assert targets == Counter(set(range(split.tokens)) - begins)
    assert all(0 < sum(count for _, count in row) <= context for row in rows)
    for row in rows:
        for start, _ in row:  # a piece begins with its document, or with a whole context of it behind
            begin = max(b for b in begins if b <= start)
            assert (start - begin) % context == 0
    steps = -(-batches.rows.count // sequences)
    seen = [row for step in range(steps) for row in batches.rows_of(step)][: batches.rows.count]
    assert sorted(seen) == sorted(rows)


def test_packed_rows_take_few_bytes_for_each_document():
    split = Documents([200, 150, 90] * 20_000)
    tracemalloc.start()
    rows = Batches(split, 256, 256, seed=0, packing="documents").rows
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert rows.count > 30_000 and kept < 24 * 60_000  # lists of tuples took 142


@given(st.lists(st.integers(1, 30), max_size=80))
def test_packing_is_at_most_a_little_more_than_the_best(lengths: list[int]):
    """Best fit decreasing never needs more than 11/9 of the best packing and one row (Johnson 1973)."""
    rows = pack([(i, length) for i, length in enumerate(lengths)], 30)
    lower_bound = -(-sum(lengths) // 30)
    assert len(rows) <= 11 / 9 * max(lower_bound, sum(length > 15 for length in lengths)) + 4
    assert sorted(piece for row in rows for piece in row) == list(enumerate(lengths))


def test_padding_of_packed_rows_does_not_count():
    batches = Batches(Documents([5, 4]), 8, 8, seed=0, packing="documents")
    inputs, targets = _rows(batches, 0, 1, 0, 1)[0]
    assert batches.tokens(0) == 7
    assert inputs[:7] == (0, 1, 2, 3, 5, 6, 7) and targets == (1, 2, 3, 4, 6, 7, 8, IGNORE)


def test_starts_say_where_the_documents_of_a_packed_row_begin():
    (batch,) = Batches(Documents([5, 4]), 10, 10, seed=0, packing="documents").micro_batches(0, 1)
    assert batch.starts is not None and batch.starts.tolist() == [[0, 0, 0, 0, 4, 4, 4, 7, 7, 7]]  # padding is apart
    (stream,) = Batches(Documents([5, 4]), 3, 3, seed=0, packing="stream").micro_batches(0, 1)
    assert stream.starts is None


def test_prefetched_batches_are_those_of_the_step():
    batches = Batches(Documents([5, 9, 4, 7, 12]), 6, 24, seed=0, packing="documents")
    prefetch = Prefetch(batches)
    for step, micro_batch in (
        (0, 2),
        (1, 2),
        (1, 1),
        (5, 4),
        (6, 4),
    ):  # also again, otherwise divided, and from elsewhere
        made, expected = prefetch.step(step, micro_batch), list(batches.micro_batches(step, micro_batch))
        assert len(made) == len(expected)
        assert all(
            torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
            for a, b in zip(made, expected, strict=True)
        )
    prefetch.close()


def test_an_error_while_prefetching_reaches_the_step_that_needs_it():
    batches = Batches(Documents([5, 9, 4]), 6, 6, seed=0)
    prefetch = Prefetch(batches)
    prefetch.step(0, 1)
    prefetch.coming.thread.join()
    batches.split.read = lambda start, count: (_ for _ in ()).throw(UserError("the shard is gone"))
    prefetch.step(1, 1)  # made before
    with pytest.raises(UserError, match="the shard is gone"):
        prefetch.step(2, 1)
    prefetch.close()


def test_a_dead_thread_is_an_error_and_no_hang():
    prefetch = Prefetch(Batches(Documents([5, 9, 4]), 6, 6, seed=0))
    prefetch.step(0, 1)
    prefetch.coming.thread.join()
    prefetch.coming._made = None
    with pytest.raises(UserError, match="the thread that reads the data of step 1 died"):
        prefetch.step(1, 1)


def test_a_slow_disk_is_told_once_and_one_that_never_answers_is_an_error():
    batches, answer, told = Batches(Documents([5, 9, 4]), 6, 6, seed=0), threading.Event(), []
    prefetch = Prefetch(batches, warn=told.append, slow=0.01, patience=0.05)
    read, batches.split.read = batches.split.read, lambda start, count: answer.wait(10) and read(start, count)
    with pytest.raises(UserError, match=r"the data of step 0 did not come within 0.05 s; check its disk"):
        prefetch.step(0, 1)
    assert told == ["step 0 waits for its data; is the disk of train slow?"] and prefetch.waited > 0.04
    answer.set()
    assert len(prefetch.step(0, 1)) == 1
    prefetch.close()


def test_a_split_of_single_tokens_is_refused():
    with pytest.raises(UserError, match="the train split holds no token to learn"):
        Batches(Documents([1, 1, 1]), 8, 8, seed=0, packing="documents")
