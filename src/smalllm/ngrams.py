"""Floors that a trained model must beat: how well counting predicts the validation split of a dataset.

An n-gram model by interpolated modified Kneser-Ney smoothing (Chen and Goodman 1998, TR-10-98, section 4.1.6 and equation
26) over token ids: the probability of a token after the n - 1 tokens before it is its discounted count, and what the
discounts leave goes to the model of n - 1, whose counts are how many different tokens stand before each n-gram; below the
unigrams every token has the same probability. Runs of tokens that begin a document have nothing before them and keep their plain counts.

Documents are scored as `evaluation` scores them: each by itself from the begin token, all its tokens and the end token, by
the UTF-8 bytes of its text. Counts are sorted arrays; on a large corpus they are those of the first tokens of training,
and the floors say of how many. It knows nothing of models that are trained.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, model_validator

from smalllm.data.shards import Record, TokenDataset, within
from smalllm.files import FileSystem
from smalllm.untrusted import content

CACHE = "floors.json"
ORDERS = {"unigram": 1, "bigram": 2, "5-gram": 5}
TRAIN_TOKENS = 2_000_000  # counted at most; memory is some 100 bytes for each
VALID_TOKENS = 200_000  # scored at most
LARGEST_CACHE = 1 << 26  # bytes
VERSION = 1  # of the cache: another way to count is another one


@dataclass(frozen=True)
class Floor:
    """What one n-gram model scores. ``loss`` is nats per token, as ``Evaluation.loss``."""

    name: str
    loss: float
    bits_per_byte: float


class Floors(Record):
    """The n-gram models of a dataset on its first validation documents, one by one.

    ``nats`` has for each name the summed -ln p of every document; ``tokens`` what is predicted in each (the end token
    counts, the begin token does not), ``bytes`` the UTF-8 bytes of each. ``train_tokens`` were counted.
    """

    train_tokens: Annotated[int, Field(ge=0)]
    whole: bool  # whether that is the whole training split
    tokens: list[Annotated[int, Field(ge=1)]]
    bytes: list[Annotated[int, Field(ge=0)]]
    nats: dict[str, list[Annotated[float, Field(gt=0.0)]]]

    @model_validator(mode="after")
    def _one_for_each_document(self) -> Self:
        if list(self.nats) != list(ORDERS) or not self.tokens:
            raise ValueError("nats must have the orders, and documents")
        lengths = {len(self.tokens), len(self.bytes), *(len(nats) for nats in self.nats.values())}
        if len(lengths) > 1:
            raise ValueError("there must be a number for each document")
        return self

    def on(self, documents: int | None = None) -> list[Floor]:
        """The floors on the first documents (all that were scored when there are no more), unigram first."""
        tokens, size = sum(self.tokens[:documents]), sum(self.bytes[:documents])
        totals = {name: math.fsum(nats[:documents]) for name, nats in self.nats.items()}
        return [Floor(name, nats / tokens, nats / math.log(2) / max(1, size)) for name, nats in totals.items()]


def newly_beaten(found: list[Floor], bits_per_byte: float, before: str) -> Floor | None:
    """The largest n-gram model that a model with so many bits per byte is better than, when it is larger than ``before``."""
    names = [floor.name for floor in found]
    better = [floor for floor in found if bits_per_byte < floor.bits_per_byte]
    known = names.index(before) if before in names else -1
    return better[-1] if better and names.index(better[-1].name) > known else None


def floors(dataset: TokenDataset) -> Floors:
    """The floors of a dataset: from the cache in its folder, else counted (seconds) and kept there if it can be written to.
    UserError for a damaged split."""
    path = dataset.folder / CACHE
    key = {"version": VERSION, "fingerprint": dataset.fingerprint, "limits": [TRAIN_TOKENS, VALID_TOKENS]}
    if (cached := _read(path, key)) is not None:
        return cached
    counted = measure(dataset)
    with contextlib.suppress(OSError):  # a folder that cannot be written to goes without
        FileSystem().replace(path, [(json.dumps(key | counted.model_dump()) + "\n").encode()])
    return counted


def measure(dataset: TokenDataset) -> Floors:
    """Count the first training documents and score the first validation documents."""
    tokenizer = dataset.tokenizer()
    sizes = np.array([len(tokenizer.bytes_of(id)) for id in range(tokenizer.vocab_size)])
    train, valid = (
        list(within(dataset.train.iterate_documents(), TRAIN_TOKENS)),
        list(within(dataset.valid.iterate_documents(), VALID_TOKENS)),
    )
    counts = NGrams(np.concatenate(train), max(ORDERS.values()), dataset.manifest.vocab_size, dataset.manifest.bos_id)
    stream = np.concatenate(valid)
    firsts = np.cumsum([0, *(len(ids) - 1 for ids in valid)])[:-1]
    return Floors(
        train_tokens=sum(map(len, train)),
        whole=len(train) == dataset.train.documents,
        tokens=[len(ids) - 1 for ids in valid],
        bytes=[int(sizes[ids].sum()) for ids in valid],
        nats={
            name: np.add.reduceat(-np.log(counts.probabilities(stream, order)), firsts).tolist()
            for name, order in ORDERS.items()
        },
    )


class NGrams:
    """The n-grams of documents up to a length, counted once for the models of all orders up to it.

    ``stream`` (tokens,) is documents one after another, each from ``bos``, which stands nowhere else and is never predicted. An
    n-gram is known by its number, its place among the sorted n-grams of its length; its key, by which they are sorted, is the
    number of all but its last token, times ``vocab_size``, plus that token.
    """

    def __init__(self, stream: np.ndarray, length: int, vocab_size: int, bos: int) -> None:
        self._vocab_size, self._bos = vocab_size, bos
        self._keys: list[np.ndarray] = []
        self._plain: list[_Discounted] = []  # of counts
        self._continued: list[_Discounted] = []  # of how many tokens stand before; for all lengths but the last
        inside, numbers = _tokens_since(bos, stream), np.zeros(len(stream), np.int64)
        counts, begins, contexts, width = np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0, np.int64), 1
        for n in range(1, length + 1):
            ends = np.flatnonzero(inside >= n - 1)
            unique = _Unique(self._key(numbers[ends - 1] if n > 1 else numbers, stream[ends]))
            if n > 1:  # numbers are still those of the shorter n-grams that end here
                before = np.bincount(numbers[ends[unique.place]], minlength=len(counts))
                self._continued.append(_Discounted(np.where(begins, counts, before), contexts, width))
            begins = inside[ends[unique.place]] == n - 1
            counts = np.where(begins, 0, unique.counts) if n == 1 else unique.counts  # bos is never predicted
            contexts, width = unique.keys // vocab_size, len(self._keys[-1]) if n > 1 else 1
            self._keys.append(unique.keys)
            self._plain.append(_Discounted(counts, contexts, width))
            numbers = np.full(len(stream), -1)
            numbers[ends] = unique.numbers

    def probabilities(self, stream: np.ndarray, order: int) -> np.ndarray:
        """The probability (predicted tokens,) that the model of this order gives to every token of documents but ``bos``, in
        order. Each is above 0, and for every context those of all tokens but ``bos`` sum to 1."""
        inside = _tokens_since(self._bos, stream)
        result = np.full(len(stream), 1.0 / (self._vocab_size - 1))
        numbers = np.zeros(len(stream), np.int64)
        for n in range(1, order + 1):
            contexts = np.where(inside >= n - 1, np.roll(numbers, 1), -1) if n > 1 else numbers
            numbers = self._find(n, contexts, stream)
            model = self._plain[n - 1] if n == order else self._continued[n - 1]
            result = model.interpolated(numbers, contexts, result)
        return result[inside > 0]

    def _key(self, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return contexts * self._vocab_size + tokens.astype(np.int64)

    def _find(self, n: int, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The number of each n-gram, -1 for those that were not counted."""
        known, wanted = self._keys[n - 1], self._key(contexts, tokens)
        places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where((contexts >= 0) & (known[places] == wanted), places, -1)


class _Unique:
    """Distinct keys in order, how often each comes, a place where it stands, and for each place the number of its key."""

    def __init__(self, keys: np.ndarray) -> None:
        order = np.argsort(keys)
        ordered = keys[order]
        firsts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        self.keys, self.counts = ordered[firsts], np.diff(np.append(firsts, len(keys)))
        self.place = order[firsts]
        self.numbers = np.empty(len(keys), np.int64)
        self.numbers[order] = np.repeat(np.arange(len(firsts)), self.counts)


class _Discounted:
    """Counts (n-grams,) from which Kneser-Ney discounts are taken, and what each context (of ``width``) has left for others."""

    def __init__(self, counts: np.ndarray, contexts: np.ndarray, width: int) -> None:
        self._counts, self._discounts = counts.astype(np.int32), discounts(counts)
        self._totals = np.bincount(contexts, weights=counts, minlength=width)
        taken = np.bincount(contexts, weights=self._discounts[np.minimum(counts, 3)], minlength=width)
        self._left = taken / np.maximum(self._totals, 1)

    def interpolated(self, numbers: np.ndarray, contexts: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Probabilities of n-grams (-1: not counted) behind contexts (-1: not counted), given those of the lower order."""
        counts = np.where(numbers >= 0, self._counts[numbers], 0)
        totals = self._totals[contexts]
        own = (counts - self._discounts[np.minimum(counts, 3)]) / np.maximum(totals, 1)
        return np.where((contexts >= 0) & (totals > 0), own + self._left[contexts] * lower, lower)


def discounts(counts: np.ndarray) -> np.ndarray:
    """(4,) what is taken from a count of 0, 1, 2, and 3 or more: Y = n1 / (n1 + 2 n2), D_k = k - (k + 1) Y n_{k+1} / n_k, where
    n_k counts come k times. Where those are not above 0 (few n-grams) 0, 0.5, 1, 1.5, as KenLM falls back to.

    >>> discounts(np.array([1, 1, 1, 1, 2, 2, 3, 4])).tolist()
    [0.0, 0.5, 1.25, 1.0]
    """
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if min(n1, n2, n3) > 0:
        y = n1 / (n1 + 2 * n2)
        found = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (found[1:] > 0).all():
            return found
    return np.array([0.0, 0.5, 1.0, 1.5])


def _tokens_since(bos: int, stream: np.ndarray) -> np.ndarray:
    """(tokens,) how many tokens of its document stand before each."""
    starts = np.flatnonzero(stream == bos)
    assert len(starts) and starts[0] == 0
    return np.arange(len(stream)) - np.repeat(starts, np.diff(np.append(starts, len(stream))))


def _read(path: Path, key: dict[str, Any]) -> Floors | None:
    """What the cache holds, if it is of this dataset and whole."""
    try:
        stored = json.loads(content(path, LARGEST_CACHE))
        if {name: stored.pop(name) for name in key} != key:
            return None
        return Floors.model_validate(stored)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
