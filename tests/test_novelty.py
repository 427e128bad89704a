"""What was copied: spans worked by hand, equality with a brute-force search, the same without a compiler."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalllm.data.shards import TokenDataset
from smalllm.judging.novelty import TrainingText, longest_matches, sorted_suffixes
from smalllm.native import suffixes
from smalllm.native.build import Unavailable
from smalllm.tokenizer import Tokenizer

STORIES = [
    "The cat sat on the warm mat. It was a very good mat.",
    "A dog ran to the old red barn and found a bone.",
    "Once upon a time a bird sang in a tree.",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(STORIES * 20, vocab_size=330)


def training_text(tokenizer: Tokenizer) -> TrainingText:
    documents = [np.array(tokenizer.encode_document(story)) for story in STORIES]
    return TrainingText(documents, sum(map(len, documents)), tokenizer.vocab_size)


@pytest.fixture(params=["native", "numpy"])
def training(tokenizer: Tokenizer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TrainingText:
    if request.param == "native":
        request.getfixturevalue("native")
    else:
        monkeypatch.setattr(suffixes, "sort", _unavailable)
    return training_text(tokenizer)


def _unavailable(*_: object) -> None:
    raise Unavailable("no compiler")


def brute_force(training: list[int], ids: list[int]) -> int:
    """The longest span of ids that stands in the training ids, by looking everywhere."""
    return max(
        (end - start for start in range(len(ids)) for end in range(start + 1, len(ids) + 1) if holds(training, ids[start:end])),
        default=0,
    )  # fmt: skip


def holds(ids: list[int], span: list[int]) -> bool:
    return any(ids[place : place + len(span)] == span for place in range(len(ids)))


def test_a_copied_sentence_is_found_in_the_middle_of_new_text(training: TrainingText, tokenizer: Tokenizer):
    copied = " ran to the old red barn and"
    copy = training.longest_copy(tokenizer.encode(f"My fox{copied} cried."), tokenizer)
    assert copy.text == copied and copy.words == 7
    assert copy.tokens == len(tokenizer.encode(copied))


def test_a_whole_story_is_a_copy_of_all_its_tokens(training: TrainingText, tokenizer: Tokenizer):
    ids = tokenizer.encode(STORIES[0])
    copy = training.longest_copy(ids, tokenizer)
    assert (copy.tokens, copy.words, copy.text) == (len(ids), 13, STORIES[0])


def test_no_copy_reaches_across_two_stories(training: TrainingText, tokenizer: Tokenizer):
    """The end and begin tokens stand between them."""
    copy = training.longest_copy(tokenizer.encode("found a bone.Once upon a time"), tokenizer)
    assert copy.text in ("found a bone.", "Once upon a time") or len(copy.text) < len("Once upon a time")


def test_nothing_is_copied_from_nothing(training: TrainingText, tokenizer: Tokenizer):
    assert training.longest_copy([], tokenizer).tokens == 0
    empty = TrainingText([], 0, tokenizer.vocab_size)
    assert empty.longest_copy(tokenizer.encode("The cat"), tokenizer) == type(training.longest_copy([], tokenizer))(
        0, 0, ""
    )


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 4), max_size=12))
@settings(max_examples=150, deadline=None)
def test_the_longest_match_is_that_of_brute_force(text: list[int], ids: list[int]):
    training = TrainingText([np.array(text, np.int64)], len(text), 5)
    lengths, places = training.matches(ids)
    assert max(lengths.tolist(), default=0) == brute_force(text, ids)
    for start, (length, place) in enumerate(zip(lengths, places, strict=True)):
        assert text[place : place + length] == ids[start : start + length]


@given(st.lists(st.integers(1, 4), max_size=60), st.lists(st.integers(1, 5), max_size=20))
@settings(max_examples=100, deadline=None)
def test_native_and_numpy_agree(native: None, symbols: list[int], query: list[int]):
    text = np.array([*symbols, 0], np.uint16)
    order = suffixes.sort(text, 6)
    assert sorted_suffixes(text).tolist() == order.tolist()
    asked = np.array(query, np.uint16)
    assert longest_matches(text, order, asked)[0].tolist() == suffixes.longest(text, order, asked)[0].tolist()


def test_the_training_split_is_read_whole_or_as_far_as_it_fits(dataset_folder: Path):
    dataset = TokenDataset.open(dataset_folder)
    vocabulary = dataset.manifest.vocab_size
    whole, part = (TrainingText.of(dataset.train, vocabulary, most) for most in (None, 1000))
    assert (whole.tokens, whole.covered) == (dataset.train.tokens, 1.0)
    assert (part.tokens, part.covered) == (1000, 1000 / dataset.train.tokens)
    assert part.bytes == 1001 * 6
    first = next(dataset.train.iterate_documents())[1:-1].tolist()
    assert whole.longest_copy(first, dataset.tokenizer()).tokens == len(first)


def test_the_benchmark_measures_and_computes(dataset_folder: Path, tmp_path: Path, native: None):
    from novelty import main  # of benchmarks/

    main(["--megabytes", "0.2", "0.4", "--data", str(dataset_folder), "--json", str(tmp_path / "rows.json")])
    small, large, computed = json.loads((tmp_path / "rows.json").read_text())
    assert large["tokens"] == pytest.approx(2 * small["tokens"], rel=0.01)
    assert large["kept_megabytes"] == pytest.approx(6e-6 * large["tokens"], rel=0.01)
    assert (
        computed["computed"]
        and computed["peak_bytes_per_token"] == pytest.approx(large["peak_bytes_per_token"])
        and not large["computed"]
    )
