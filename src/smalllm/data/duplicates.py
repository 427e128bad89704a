"""Leaks between training and validation: documents that stand on both sides, word for word or nearly.

It knows documents as UTF-8 bytes and dataset folders, and nothing of sources and models. Two documents are compared by
their shingles, the runs of five words (Broder 1997); a document of fewer words is one shingle. Words are compared without
case and punctuation. Likely pairs are found by MinHash (one permutation: Li, Owen and Zhang 2012, arXiv 1208.1259; empty
bins filled as in Shrivastava 2017, arXiv 1703.04664) in bands, and each is verified: its Jaccard similarity, the shingles that
both have over those that either has, is counted over all shingles (as 64-bit hashes).

Most training documents resemble none, and are let go before their words are looked at: fewer than half of their stretches
of 16 letters stand in validation. Of a validation document memory holds 0.8 kB, and a bit field of at most 64 MB of all; training
documents stream by, a megabyte at a time. The record says how many of both were compared.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from smalllm.data.shards import LeakRecord, PairRecord, TokenDataset, TokenSplit, within

SHINGLE_WORDS = 5
THRESHOLD = 0.8
BINS = 128
BANDS, ROWS = 21, 6  # a pair of similarity 0.8 shares a band with probability 1 - (1 - 0.8^6)^21 = 99.8 %
SLACK = 0.2  # a pair is verified when its estimate lies at most so far below the threshold: 5 standard errors
MOST_VALID, MOST_VALID_BYTES = 50_000, 16_000_000
STRETCH, STRIDE = 16, 16  # letters
FEWEST_STRETCHES = 12  # of a document that may be let go without a look at its words
MOST_PAIRS = 10_000  # that are estimated for one validation document; then it is left alone
MOST_VERIFIED = 100  # that are verified for one that has turned out a near duplicate
GROUP_BYTES = 1 << 20
PAIRS_AT_ONCE = 1 << 18
EXCERPT = 300  # characters

_EMPTY = np.uint32(0xFFFFFFFF)
_WORD_BYTE = np.zeros(256, bool)
_WORD_BYTE[np.frombuffer((string.ascii_lowercase + string.digits).encode(), np.uint8)] = True
_WORD_BYTE[0x80:] = True
_LOW_BYTES = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)
_READ = 64  # bytes of a word; longer ones are told apart by these and their length
_LOWER = bytes(range(256)).lower()
_NO_LETTERS = bytes(byte for byte in range(256) if not chr(byte).isascii() or not chr(byte).isalnum())
_LARGEST_SIEVE = 26  # bits of a place in it
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def audit(
    folder: Path, texts: Sequence[bytes] | None = None, *, threshold: float = THRESHOLD, seed: int = 0,
    most_bytes: int | None = None,
) -> LeakRecord:  # fmt: skip
    """Compare ``texts``, by default the validation documents of a dataset folder, with all its training documents, or with
    those of the first ``most_bytes`` bytes of text: they stand in random order. UserError for a damaged folder."""
    dataset = TokenDataset.open(folder, verify=False)
    tokenizer = dataset.tokenizer()
    pieces = [tokenizer.bytes_of(id) for id in range(tokenizer.vocab_size)]
    stored = _StoredTexts(dataset.valid, pieces, MOST_VALID)
    text, count = (stored.text, len(stored)) if texts is None else (lambda number: texts[number], len(texts))
    auditor = Auditor(text, count, threshold=threshold, seed=seed, most_bytes=most_bytes)
    documents = dataset.train.iterate_documents()
    while not auditor.full and (some := list(islice(documents, 1024))):
        auditor.add_all([_text(ids, pieces) for ids in some])
    return auditor.finish()


class Auditor:
    """Takes the training documents in turn and finds those that resemble a validation document.

    ``text(number)`` gives a validation document, of which there are ``count``; the first 50,000 or 16 MB are compared, with the
    training documents of the first ``most_bytes`` bytes. What is found depends on the documents, their order and ``seed`` alone.
    """

    def __init__(
        self,
        text: Callable[[int], bytes],
        count: int,
        *,
        threshold: float = THRESHOLD,
        seed: int = 0,
        most_bytes: int | None = None,
    ) -> None:
        assert 0.0 < threshold <= 1.0
        self._text, self._threshold, self._left = text, threshold, most_bytes
        self._count = sum(1 for _ in compared(map(text, range(count))))
        self._hasher = ShingleHasher(seed)
        self._signatures = np.concatenate([np.empty((0, BINS), np.uint32), *self._valid_signatures()])
        self._index = _Bands(self._signatures)
        self._sieve = _Sieve(text, self._count)
        self._best = np.zeros(self._count)
        self._exact = np.zeros(self._count, bool)
        self._estimated = np.zeros(self._count, np.int64)
        self._verified = np.zeros(self._count, np.int64)
        self._worst: PairRecord | None = None
        self._group: list[bytes] = []
        self._group_bytes = self._compared = 0

    @property
    def full(self) -> bool:
        """Whether ``most_bytes`` are reached."""
        return self._left is not None and self._left <= 0

    def add_all(self, texts: Iterable[bytes]) -> None:
        """The next training documents."""
        for text in texts:
            if self.full:
                return
            self._group.append(text)
            self._group_bytes += len(text)
            self._left = None if self._left is None else self._left - len(text)
            if self._group_bytes >= GROUP_BYTES:
                self._compare_group()

    def finish(self) -> LeakRecord:
        """What was found, after the last document."""
        self._compare_group()
        near = self._best >= self._threshold
        return LeakRecord(
            threshold=self._threshold,
            exact=int(self._exact.sum()),
            near=int((near & ~self._exact).sum()),
            valid_documents=self._count,
            train_documents=self._compared,
            worst=self._worst,
        )

    def _valid_signatures(self) -> list[np.ndarray]:
        return [
            self._hasher.signatures(*self._hasher.shingles([self._text(number) for number in range(start, end)]))
            for start in range(0, self._count, 1024)
            if (end := min(start + 1024, self._count))
        ]

    def _compare_group(self) -> None:
        if not self._group:
            return
        kept = self._sieve.kept(self._group)
        shingles, bounds = self._hasher.shingles([self._group[number] for number in kept])
        signatures = self._hasher.signatures(shingles, bounds)
        for train, valid in self._index.pairs(signatures):
            estimates = (signatures[train] == self._signatures[valid]).mean(axis=1)
            self._estimated += np.bincount(valid, minlength=self._count)
            likely = np.flatnonzero(estimates >= self._threshold - SLACK)
            for place in likely[np.argsort(-estimates[likely], kind="stable")].tolist():
                row = int(train[place])
                self._verify(kept[row], int(valid[place]), shingles[bounds[row] : bounds[row + 1]])
        spent = (self._estimated >= MOST_PAIRS) | ((self._best >= self._threshold) & (self._verified >= MOST_VERIFIED))
        self._index.leave_out(spent)
        self._compared += len(self._group)
        self._group, self._group_bytes = [], 0

    def _verify(self, train: int, valid: int, shingles: np.ndarray) -> None:
        if self._best[valid] >= self._threshold and self._verified[valid] >= MOST_VERIFIED:
            return
        self._verified[valid] += 1
        ours, _ = self._hasher.shingles([self._text(valid)])
        similarity = jaccard(ours, shingles)
        self._best[valid] = max(self._best[valid], similarity)
        self._exact[valid] |= similarity == 1.0 and self._text(valid) == self._group[train]
        if similarity >= self._threshold and (self._worst is None or similarity > self._worst.similarity):
            self._worst = PairRecord(
                similarity=similarity,
                valid=valid,
                train=self._compared + train,
                valid_text=_excerpt(self._text(valid)),
                train_text=_excerpt(self._group[train]),
            )


class _Sieve:
    """Lets those documents go that resemble no validation document, by stretches of 16 letters: of validation all are known, of
    a document every sixteenth is looked up. A document with a similarity of 0.8 has four of five of its runs of words in
    common with one, hence about as many stretches; one with fewer than half is let go. ASCII letters and digits alone are looked
    at: a text that consists of other signs by half, or is short, is always kept."""

    def __init__(self, text: Callable[[int], bytes], count: int) -> None:
        stretches = sum(len(_letters(text(number))) for number in range(count))
        self._bits = np.uint64(min(_LARGEST_SIEVE, max(16, int(8 * stretches).bit_length())))
        self._known = np.zeros(1 << int(self._bits), bool)
        for number in range(count):
            letters = _letters(text(number))
            self._known[self._places(letters, np.arange(max(0, len(letters) - STRETCH + 1)))] = True

    def kept(self, texts: Sequence[bytes]) -> list[int]:
        """The numbers of the texts that may resemble a validation document."""
        letters = [_letters(text) for text in texts]
        sizes, begins = np.array([len(some) for some in letters]), np.cumsum([0, *map(len, letters)])[:-1]
        stretches = np.maximum(0, (sizes - STRETCH) // STRIDE + 1)
        text_of = np.repeat(np.arange(len(texts)), stretches)
        within = np.arange(len(text_of)) - np.repeat(np.cumsum(stretches) - stretches, stretches)
        known = self._known[self._places(b"".join(letters), begins[text_of] + STRIDE * within)]
        common = np.bincount(text_of, weights=known, minlength=len(texts))
        other = 2 * sizes < np.array([len(text) for text in texts])
        return np.flatnonzero((2 * common >= stretches) | (stretches < FEWEST_STRETCHES) | other).tolist()

    def _places(self, letters: bytes, starts: np.ndarray) -> np.ndarray:
        """(starts,) int64: where the stretches that begin there are noted."""
        if not len(starts):
            return starts
        eights = np.ndarray((len(letters) - 7,), "<u8", letters, strides=(1,))
        mixed = (eights[starts] * _GOLDEN ^ eights[starts + 8]) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * _GOLDEN
        return (mixed >> (np.uint64(64) - self._bits)).astype(np.int64)


class ShingleHasher:
    """Documents to hashed shingles and to MinHash signatures; another seed, other hashes."""

    def __init__(self, seed: int) -> None:
        self._seed = scrambled(np.array([seed], np.uint64) * _GOLDEN + np.uint64(1))[0]
        places = np.arange(BINS * BINS, dtype=np.uint64)
        self._donors = np.argsort(scrambled(places * _GOLDEN + self._seed).reshape(BINS, BINS), axis=1)

    def shingles(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of the shingles of UTF-8 texts, (shingles,) uint64, in the order of the text and as often as they come, and
        (texts + 1,) where those of each text begin and the last end. A text without words has none."""
        hashes, firsts = _words(texts)
        words = np.diff(firsts)
        padding = SHINGLE_WORDS - 1  # behind each text, so that no window reaches into the next
        text_of_word = np.repeat(np.arange(len(texts)), words)
        padded = np.zeros(len(hashes) + padding * len(texts), np.uint64)
        padded[np.arange(len(hashes)) + padding * text_of_word] = hashes
        counts = np.where(words > 0, np.maximum(words - padding, 1), 0)
        bounds = np.concatenate([[0], np.cumsum(counts)])
        gaps = np.repeat(firsts[:-1] + padding * np.arange(len(texts)) - bounds[:-1], counts)
        starts = np.arange(bounds[-1]) + gaps
        mixed = np.full(len(starts), self._seed)
        for offset in range(SHINGLE_WORDS):
            mixed = mixed * _GOLDEN + padded[starts + offset]
        return scrambled(mixed), bounds

    def signatures(self, shingles: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """(texts, BINS) uint32: the least hash of each bin; an empty bin takes that of another, chosen by its number alone.
        All are the largest number where a text has no shingles."""
        counts = np.diff(bounds)
        cells = np.repeat(np.arange(len(counts)) * BINS, counts) + (shingles >> np.uint64(57)).astype(np.int64)
        flat = np.full(len(counts) * BINS, _EMPTY)
        np.minimum.at(
            flat, cells, np.minimum(shingles & np.uint64(0xFFFFFFFF), np.uint64(_EMPTY - 1)).astype(np.uint32)
        )
        signatures = flat.reshape(-1, BINS)
        texts, bins = np.nonzero((signatures == _EMPTY) & (counts > 0)[:, None])
        filled = signatures.copy()
        for attempt in range(BINS):
            if not len(texts):
                break
            found = signatures[texts, self._donors[bins, attempt]]
            full = found != _EMPTY
            filled[texts[full], bins[full]] = found[full]
            texts, bins = texts[~full], bins[~full]
        return filled


class _Bands:
    """Finds validation documents that have all rows of a band in common with a document."""

    def __init__(self, signatures: np.ndarray) -> None:
        keys = _band_keys(signatures)
        order = np.argsort(keys.ravel(), kind="stable")
        documents = np.repeat(np.arange(len(signatures)), BANDS)
        has_words = ~(signatures == _EMPTY).all(axis=1)
        self._set(keys.ravel()[order], documents[order], has_words)

    def leave_out(self, spent: np.ndarray) -> None:
        """Do not find these (documents,) bool any more."""
        if spent[self._documents].any():
            self._set(self._keys, self._documents, ~spent)

    def pairs(self, signatures: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """(documents, validation documents) of every pair that shares a band, each pair once, in order and in parts; of a
        band that more than 256 validation documents have, 256 are taken."""
        keys = _band_keys(signatures)
        keys[(signatures == _EMPTY).all(axis=1)] = 0  # of texts without words; 0 is in no index
        flat = keys.ravel()
        known = np.flatnonzero(self._sieve[(flat >> np.uint64(44)).astype(np.int64)])
        first = np.searchsorted(self._keys, flat[known], side="left")
        found = np.minimum(np.searchsorted(self._keys, flat[known], side="right") - first, 256)
        parts = np.cumsum(found) // PAIRS_AT_ONCE  # whole documents would be nicer; a pair in two parts costs little
        return [
            self._part(known[chosen] // BANDS, first[chosen], found[chosen])
            for part in np.unique(parts[found > 0])
            if len(chosen := np.flatnonzero((parts == part) & (found > 0)))
        ]

    def _part(self, documents: np.ndarray, first: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ends = np.cumsum(found)
        places = np.arange(ends[-1]) - np.repeat(ends - found - first, found)
        most = int(self._documents.max()) + 1
        pairs = np.unique(np.repeat(documents, found) * most + self._documents[places])
        return pairs // most, pairs % most

    def _set(self, keys: np.ndarray, documents: np.ndarray, wanted: np.ndarray) -> None:
        kept = wanted[documents]
        self._keys, self._documents = keys[kept], documents[kept]
        self._sieve = np.zeros(1 << 20, bool)
        self._sieve[(self._keys >> np.uint64(44)).astype(np.int64)] = True


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """|A and B| / |A or B| of two lists of hashes, as sets; 0 where both are empty.

    >>> jaccard(np.array([1, 2, 2, 3]), np.array([2, 3, 4]))
    0.5
    """
    both = np.unique(np.concatenate([one_set := np.unique(one), other_set := np.unique(other)]))
    return (len(one_set) + len(other_set) - len(both)) / max(1, len(both))


def scrambled(numbers: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): each (n,) uint64 to another one, no two to the same."""
    mixed = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def compared(texts: Iterable[bytes]) -> Iterator[bytes]:
    """The first validation documents, as many as are compared with training."""
    return islice(within(texts, MOST_VALID_BYTES), MOST_VALID)


def _letters(text: bytes) -> bytes:
    """The ASCII letters and digits of a text, in lower case."""
    return text.translate(_LOWER, _NO_LETTERS)


def _band_keys(signatures: np.ndarray) -> np.ndarray:
    """(documents, BANDS) uint64: a hash of the rows of each band and its number, never 0."""
    rows = signatures[:, : BANDS * ROWS].reshape(-1, BANDS, ROWS).astype(np.uint64)
    keys = np.broadcast_to(np.arange(BANDS, dtype=np.uint64), rows.shape[:2])
    for row in range(ROWS):
        keys = keys * _GOLDEN + rows[:, :, row]
    return np.maximum(scrambled(keys), np.uint64(1))


def _words(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(words,) uint64 hashes of the words of UTF-8 texts, and (texts + 1,) where those of each begin and the last end.

    A word is a run of letters and digits; what has three bytes or more in UTF-8 (Chinese, say) is a word by itself.
    """
    lower = [text.lower() if text.isascii() else text.decode("utf-8", "replace").lower().encode() for text in texts]
    data = b"\n".join([b"", *lower, bytes(_READ)])  # a separator before each text, and room to read behind the last
    array = np.frombuffer(data, np.uint8)
    begins, ends = _word_bounds(array, all(text.isascii() for text in texts))
    lengths = ends - begins
    eights = np.ndarray((len(data) - 7,), "<u8", data, strides=(1,))
    hashes = scrambled((eights[begins] & _LOW_BYTES[np.minimum(lengths, 8)]) + lengths.astype(np.uint64) * _GOLDEN)
    longer = np.flatnonzero(lengths > 8)
    for offset in range(8, _READ, 8):
        part = eights[begins[longer] + offset] & _LOW_BYTES[np.minimum(lengths[longer] - offset, 8)]
        hashes[longer] = scrambled(hashes[longer] * _GOLDEN + part)
        longer = longer[lengths[longer] > offset + 8]
    text_begins = 1 + np.cumsum([0, *(len(text) + 1 for text in lower)])
    return hashes, np.searchsorted(begins, text_begins)


def _word_bounds(array: np.ndarray, is_ascii: bool) -> tuple[np.ndarray, np.ndarray]:
    """Where words begin and end (the byte behind the last) in bytes whose first and last are no part of a word."""
    inside = _WORD_BYTE[array]
    if is_ascii:
        edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
        return edges[::2], edges[1::2]
    lead = array >= 0xE0  # begins a character of three bytes or more
    wide = lead.copy()
    for offset, least in ((1, 0xE0), (2, 0xE0), (3, 0xF0)):
        wide[offset:] |= array[:-offset] >= least
    inside &= ~_punctuation(array)
    begins = inside.copy()
    begins[1:] &= ~inside[:-1] | lead[1:] | (wide[:-1] & ~wide[1:])
    ends = inside.copy()
    ends[:-1] &= ~inside[1:] | begins[1:]
    return np.flatnonzero(begins), np.flatnonzero(ends) + 1


def _punctuation(array: np.ndarray) -> np.ndarray:
    """(bytes,) bool: part of a sign of U+0080 to U+00BF, U+2000 to U+207F or U+3000 to U+303F, in UTF-8."""
    first, second = array[:-1], array[1:]
    two = np.flatnonzero(first == 0xC2)
    three = np.flatnonzero(
        ((first == 0xE2) & ((second == 0x80) | (second == 0x81))) | ((first == 0xE3) & (second == 0x80))
    )
    found = np.zeros(len(array), bool)
    for places in (two, two + 1, three, three + 1, np.minimum(three + 2, len(array) - 1)):
        found[places] = True
    return found


class _StoredTexts:
    """The first documents of a split, read and decoded when asked for."""

    def __init__(self, split: TokenSplit, pieces: Sequence[bytes], most: int) -> None:
        self._split, self._pieces = split, pieces
        self._bounds = np.cumsum([0, *(len(ids) for ids in islice(split.iterate_documents(), most))])

    def text(self, number: int) -> bytes:
        """The UTF-8 text of a document."""
        start, end = self._bounds[number : number + 2].tolist()
        return _text(self._split.read(start, end - start), self._pieces)

    def __len__(self) -> int:
        return len(self._bounds) - 1


def _text(ids: np.ndarray, pieces: Sequence[bytes]) -> bytes:
    return b"".join([pieces[id] for id in ids.tolist()])


def _excerpt(text: bytes) -> str:
    decoded = text.decode("utf-8", "replace")
    return decoded if len(decoded) <= EXCERPT else decoded[:EXCERPT] + " ..."
