"""n-gram floors: numbers worked by hand, a naive implementation with dictionaries, and probabilities that sum to one."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from smalllm import ngrams
from smalllm.config import UserError
from smalllm.data.prepare import prepare
from smalllm.data.shards import TokenDataset
from smalllm.ngrams import CACHE, Floors, NGrams, discounts, floors, measure

BOS, EOS = 0, 1


class Naive:
    """Interpolated modified Kneser-Ney as Chen and Goodman write it, one n-gram at a time."""

    def __init__(self, documents: list[list[int]], order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        self.counts: dict[int, Counter] = {}
        for n in range(1, order + 1):
            raw = Counter(tuple(d[i : i + n]) for d in documents for i in range(len(d) - n + 1))
            before = defaultdict(set)
            for d in documents:
                for i in range(len(d) - n):
                    before[tuple(d[i + 1 : i + 1 + n])].add(d[i])
            counts = raw if n == order else Counter({g: raw[g] if g[0] == BOS else len(before[g]) for g in raw})
            self.counts[n] = Counter({g: c for g, c in counts.items() if g != (BOS,)})
        self.discounts = {n: self._discounts(list(counts.values())) for n, counts in self.counts.items()}

    @staticmethod
    def _discounts(counts: list[int]) -> list[float]:
        n = {k: counts.count(k) for k in (1, 2, 3, 4)}
        if n[1] and n[2] and n[3]:
            y = n[1] / (n[1] + 2 * n[2])
            found = [0.0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
            if min(found[1:]) > 0:
                return found
        return [0.0, 0.5, 1.0, 1.5]

    def probability(self, history: list[int], token: int) -> float:
        return self._probability(tuple(history[max(0, len(history) - self.order + 1) :]), token)

    def _probability(self, context: tuple[int, ...], token: int) -> float:
        n = len(context) + 1
        lower = 1 / (self.vocab_size - 1) if n == 1 else self._probability(context[1:], token)
        counts, take = self.counts[n], self.discounts[n]
        followers = [c for gram, c in counts.items() if gram[:-1] == context and c]
        if not sum(followers):
            return lower
        left = sum(take[min(c, 3)] for c in followers)
        count = counts[(*context, token)]
        return (count - take[min(count, 3)]) / sum(followers) + left / sum(followers) * lower


def corpus(seed: int, documents: int, vocab_size: int) -> list[list[int]]:
    """Documents with a lot of repetition, some of them empty."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 12, documents)
    return [
        [BOS, *(2 + (generator.integers(0, vocab_size - 2, n) ** 2) // (vocab_size - 2)).tolist(), EOS] for n in lengths
    ]


def counted(documents: list[list[int]], length: int, vocab_size: int) -> NGrams:
    return NGrams(np.concatenate(documents), length, vocab_size, BOS)


# ── the mathematics ──


def test_discounts_worked_by_hand():
    """n1 = 4, n2 = 2, n3 = 1, n4 = 1: Y = 4 / 8, D = 1 - 2/4, 2 - 3/4, 3 - 2."""
    assert discounts(np.array([1, 1, 1, 1, 2, 2, 3, 4, 0, 9])).tolist() == [0.0, 0.5, 1.25, 1.0]
    assert discounts(np.array([1, 1, 2])).tolist() == [0.0, 0.5, 1.0, 1.5]  # no count of 3
    assert discounts(np.array([1, 2, 3] + [4] * 9)).tolist() == [0.0, 0.5, 1.0, 1.5]  # D3 would be negative


def test_bigram_worked_by_hand():
    """Documents "a b a b" and "a"; ids 0 and 1 are begin and end, a is 2, b is 3, and 4 never comes.

    Few n-grams: discounts 0.5, 1, 1.5. Continuation counts: the end follows a and b, so 2; a follows the begin and b, 2; b
    follows a, 1. Unigram: (2 - 1) / 5, (2 - 1) / 5, (1 - 0.5) / 5, and 2.5 / 5 = 0.5 over four ids.
    After a (seen 3 times): b twice, end once: the rest is 1 + 0.5 of 3.
    """
    counts = counted([[0, 2, 3, 2, 3, 1], [0, 2, 1]], 2, vocab_size=5)
    p_end, p_a, p_b, p_4 = 0.2 + 0.125, 0.2 + 0.125, 0.1 + 0.125, 0.125
    stream = np.array([0, 2, 3, 1, 0, 2, 2, 4, 3, 1])
    expected = [
        (2 - 1) / 2 + 1 / 2 * p_a,  # a after the begin, which comes twice, with nothing else behind it
        (2 - 1) / 3 + 1.5 / 3 * p_b,
        (1 - 0.5) / 2 + 1 / 2 * p_end,  # after b: a and the end, once each
        (2 - 1) / 2 + 1 / 2 * p_a,
        1.5 / 3 * p_a,
        1.5 / 3 * p_4,
        p_b,  # nothing is known of what follows 4
        (1 - 0.5) / 2 + 1 / 2 * p_end,
    ]
    assert counts.probabilities(stream, 2) == pytest.approx(expected)


def test_unigram_worked_by_hand():
    """Counts themselves at the highest order: end 2, a 3, b 2 of 7; discounts 1, 1.5, 1 leave 3.5 / 7 for four ids."""
    counts = counted([[0, 2, 3, 2, 3, 1], [0, 2, 1]], 2, vocab_size=5)
    rest = 3.5 / 7 / 4
    expected = [1.5 / 7 + rest, 1 / 7 + rest, rest, 1 / 7 + rest]
    assert counts.probabilities(np.array([0, 2, 3, 4, 1]), 1) == pytest.approx(expected)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("seed, documents, vocab_size", [(0, 300, 9), (1, 60, 30), (2, 3, 5), (3, 1, 4)])
def test_probabilities_are_those_of_a_naive_count(order: int, seed: int, documents: int, vocab_size: int):
    known, asked = corpus(seed, documents, vocab_size), corpus(seed + 100, 20, vocab_size)
    naive, counts = Naive(known, order, vocab_size), counted(known, 5, vocab_size)
    expected = [naive.probability(d[:i], d[i]) for d in [*asked, *known[:20]] for i in range(1, len(d))]
    assert counts.probabilities(np.concatenate([*asked, *known[:20]]), order) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_probabilities_of_every_context_sum_to_one(order: int):
    vocab_size = 12
    counts = counted(corpus(7, 400, vocab_size), 5, vocab_size)
    for history in ([], [3], [2, 2], [11, 5, 2, 2], [3, 2, 4, 2, 2, 5, 2], [9, 9, 9, 9, 9]):
        each = [counts.probabilities(np.array([BOS, *history, token]), order)[-1] for token in range(1, vocab_size)]
        assert sum(each) == pytest.approx(1.0, abs=1e-12) and min(each) > 0


def test_a_floor_is_the_entropy_where_that_is_known():
    """Tokens drawn from one distribution, whatever came before: every order comes near its entropy."""
    generator = np.random.default_rng(5)
    p = np.array([0.1, 0.5, 0.25, 0.15])  # of end, 2, 3, 4
    stream = generator.choice([1, 2, 3, 4], 200_000, p=p)
    stream = np.insert(stream, np.flatnonzero(stream[:-1] == EOS) + 1, BOS)
    stream = np.concatenate([[BOS], stream])
    counts, entropy = NGrams(stream, 5, 6, BOS), -(p * np.log(p)).sum()
    for order in (1, 2, 5):
        loss = -np.log(counts.probabilities(stream[:50_000], order)).mean()
        assert loss == pytest.approx(entropy, rel=0.01)


# ── datasets ──


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(["storyworld:200"], tmp_path / "data", vocab_size=400, seed=1)
    return tmp_path / "data"


def test_bytes_and_tokens_are_counted_as_evaluation_counts_them(folder: Path):
    """All tokens and the end token of each document by the UTF-8 bytes of its text: the formula of `evaluation.summarize`."""
    dataset = TokenDataset.open(folder)
    tokenizer, found = dataset.tokenizer(), measure(dataset)
    documents = list(dataset.valid.iterate_documents())
    assert found.tokens == [len(ids) - 1 for ids in documents]
    assert found.bytes == [len(tokenizer.decode(ids.tolist()).encode()) for ids in documents]
    assert sum(found.bytes) == dataset.valid.text_bytes
    assert found.whole and found.train_tokens == dataset.train.tokens
    train = [ids.tolist() for ids in dataset.train.iterate_documents()]
    naive = Naive(train, 2, dataset.manifest.vocab_size)
    first = documents[0].tolist()
    nats = -sum(math.log(naive.probability(first[:i], first[i])) for i in range(1, len(first)))
    assert found.nats["bigram"][0] == pytest.approx(nats)
    floor = found.on(1)[1]
    assert floor.name == "bigram" and floor.loss == pytest.approx(nats / (len(first) - 1))
    assert floor.bits_per_byte == pytest.approx(nats / math.log(2) / found.bytes[0])


def test_longer_contexts_predict_better(folder: Path):
    unigram, bigram, fivegram = (floor.bits_per_byte for floor in floors(TokenDataset.open(folder)).on())
    assert unigram > bigram > fivegram > 0


def test_a_prefix_is_counted_and_that_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ngrams, "TRAIN_TOKENS", 5000)
    monkeypatch.setattr(ngrams, "VALID_TOKENS", 1)
    found = measure(TokenDataset.open(folder))
    assert not found.whole and 4000 < found.train_tokens <= 5000 and len(found.tokens) == 1


def test_floors_are_kept_beside_the_data(folder: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = TokenDataset.open(folder)
    first = floors(dataset)
    assert (folder / CACHE).exists()
    monkeypatch.setattr(ngrams, "measure", lambda _: pytest.fail("counted again"))
    assert floors(TokenDataset.open(folder)) == first  # and the dataset still verifies


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-40],
        lambda text: "[" * 100_000,
        lambda text: "[]",
        lambda text: text.replace('"fingerprint": "', '"fingerprint": "0'),
        lambda text: text.replace('"version": 1', '"version": 0'),
        lambda text: json.dumps(json.loads(text) | {"nats": {"unigram": [1.0]}}),
        lambda text: json.dumps(json.loads(text) | {"tokens": []}),
        lambda text: json.dumps(json.loads(text) | {"tokens": [0] * len(json.loads(text)["tokens"])}),
        lambda text: text.replace('"whole": true', '"whole": "yes"'),
    ],
)
def test_a_cache_that_is_not_of_this_dataset_is_replaced(folder: Path, damage):
    expected = floors(TokenDataset.open(folder))
    (folder / CACHE).write_text(damage((folder / CACHE).read_text()))
    assert floors(TokenDataset.open(folder)) == expected
    assert floors(TokenDataset.open(folder)) == expected


@pytest.mark.skipif(os.name == "nt", reason="a folder in place of the file")
def test_a_folder_that_cannot_be_written_to_goes_without(folder: Path):
    (folder / CACHE).mkdir()
    assert len(floors(TokenDataset.open(folder)).on()) == 3


def test_a_damaged_dataset_is_a_sentence(folder: Path):
    dataset = TokenDataset.open(folder)
    os.truncate(folder / "train-00000.bin", 10)
    with pytest.raises(UserError, match="train-00000.bin"):
        floors(dataset)


def test_prepare_knows_the_file_as_its_own(folder: Path):
    floors(TokenDataset.open(folder))
    (folder / "manifest.json").unlink()  # as an interrupted prepare leaves it
    prepare(["storyworld:200"], folder, vocab_size=400, seed=1)
    assert not (folder / CACHE).exists()


def test_floors_of_all_documents_are_the_sum_of_their_parts():
    made = Floors(
        train_tokens=9, whole=True, tokens=[2, 3], bytes=[4, 8],
        nats={name: [math.log(2) * n, math.log(2) * 2 * n] for name, n in zip(ngrams.ORDERS, itertools.count(1), strict=False)},
    )  # fmt: skip
    assert [floor.bits_per_byte for floor in made.on()] == pytest.approx([3 / 12, 6 / 12, 9 / 12])
    assert [floor.loss for floor in made.on(1)] == pytest.approx([math.log(2) * n / 2 for n in (1, 2, 3)])
    assert made.on(50) == made.on()
