"""Leaks: what is planted is found, what is found is one, by a naive count of words; the hashes themselves by hand."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest

from smalllm.config import UserError
from smalllm.data import duplicates
from smalllm.data.duplicates import BINS, Auditor, ShingleHasher, audit, jaccard
from smalllm.data.prepare import prepare
from smalllm.data.shards import LeakRecord, Manifest, TokenDataset
from smalllm.data.storyworld import story

STORIES = [story(seed=3, index=number).text for number in range(1500)]
VALID, TRAIN = STORIES[:300], STORIES[300:]


def naive_shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))} if words else set()


def naive_jaccard(one: str, other: str) -> float:
    a, b = naive_shingles(one), naive_shingles(other)
    return len(a & b) / max(1, len(a | b))


def found(valid: list[str], train: list[str], **options) -> LeakRecord:
    auditor = Auditor(lambda number: valid[number].encode(), len(valid), **options)
    auditor.add_all(text.encode() for text in train)
    return auditor.finish()


def similarity(one: str, other: str) -> float:
    hashes, bounds = ShingleHasher(0).shingles([one.encode(), other.encode()])
    return jaccard(hashes[: bounds[1]], hashes[bounds[1] :])


# ── what is compared ──


def test_similarity_worked_by_hand():
    """Seven words have three runs of five; another last word leaves two of them: 2 in both of 4 in either."""
    assert similarity("one two three four five six seven", "one two three four five six eight") == 2 / 4
    assert similarity("One, two: THREE four five", "one two three four five!") == 1.0
    assert similarity("three words only", "Three words. Only!") == 1.0
    assert similarity("three words only", "three words more") == 0.0
    assert similarity("", "...") == 0.0


@pytest.mark.parametrize(
    "one, other",
    [
        ("She said: “don’t go there now”", 'she said "don\'t go there now"'),  # other quotation marks
        ("ÉTÉ à la mer bleue", "été à la mer bleue"),  # case beyond ASCII
        ("a\u00a0b c d e f", "a b c d e f"),  # no-break space
        ("b" * 100 + " c d e f", "B" * 100 + " c d e f"),
    ],
)
def test_case_and_punctuation_do_not_count(one: str, other: str):
    assert similarity(one, other) == 1.0


def test_words_without_spaces_are_characters():
    assert similarity("从前有一个小女孩", "从前有一个小男孩") == pytest.approx(
        2 / 6
    )  # 8 characters, 4 runs; 2 are equal
    assert similarity("从前、有一个。", "从前有一个") == 1.0


@pytest.mark.parametrize(
    "one, other", [("x" * 64 + "ab", "x" * 64 + "b"), ("a b", "ab"), ("ab c", "a bc"), ("a", "a a")]
)
def test_different_words_have_different_hashes(one: str, other: str):
    assert similarity(one, other) == 0.0


def test_shingles_are_those_of_a_naive_count():
    texts = [*STORIES[:50], "", "one", "a b c d", "Ünïcode — “quoted” text of seven words", "  \n "]
    hashes, bounds = ShingleHasher(5).shingles([text.encode() for text in texts])
    for number, text in enumerate(texts):
        assert len(set(hashes[bounds[number] : bounds[number + 1]].tolist())) == len(naive_shingles(text))
    for one, other in zip(texts, texts[1:], strict=False):
        assert similarity(one, other) == pytest.approx(naive_jaccard(one, other))


def test_signatures_estimate_the_similarity():
    """The share of equal bins is the Jaccard similarity within four standard errors of 128 draws."""
    hasher, generator = ShingleHasher(1), np.random.default_rng(2)
    for shared in (0, 50, 100, 180):
        numbers = generator.integers(0, 2**64, 400, dtype=np.uint64)
        both = np.concatenate([numbers[:200], numbers[200 - shared : 400 - shared]])
        one, other = hasher.signatures(both, np.array([0, 200, 400]))
        expected = shared / (400 - shared)
        assert (one == other).mean() == pytest.approx(expected, abs=4 * (max(expected, 0.01) / BINS) ** 0.5)


def test_a_single_shingle_fills_every_bin():
    (signature,) = ShingleHasher(0).signatures(np.array([12345], np.uint64), np.array([0, 1]))
    assert (signature == 12345).all()


# ── what is found ──


def changed(text: str, generator: random.Random) -> str:
    words = text.split(" ")
    for place in generator.sample(range(len(words)), 2):
        words[place] = "zebra"
    return " ".join(words)


def cut(text: str, generator: random.Random) -> str:
    sentences = re.split(r"(?<=[.!?]) ", text)
    del sentences[generator.randrange(len(sentences))]
    return " ".join(sentences)


def restyled(text: str, generator: random.Random) -> str:
    return text.upper().replace(".", " !").replace(",", ";").replace('"', "”")


PLANTS = {"exact": lambda text, _: text, "changed": changed, "cut": cut, "restyled": restyled}


@pytest.mark.parametrize("kind", PLANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_copies_are_found(kind: str, seed: int):
    """99 % of those that are near duplicates by the naive count, and nothing that is not one."""
    generator = random.Random(seed)
    planted = [PLANTS[kind](text, generator) for text in VALID]
    near = sum(naive_jaccard(*pair) >= 0.8 for pair in zip(VALID, planted, strict=True))
    assert near >= 200
    train = TRAIN + planted
    generator.shuffle(train)
    record = found(VALID, train, seed=seed)
    assert 0.99 * near <= record.exact + record.near <= near
    assert record.exact == (len(VALID) if kind == "exact" else 0)
    assert record.worst is not None
    assert record.worst.valid_text[:200] == VALID[record.worst.valid][:200]
    assert record.worst.train_text[:200] == train[record.worst.train][:200]
    assert record.worst.similarity == pytest.approx(naive_jaccard(VALID[record.worst.valid], train[record.worst.train]))


def test_no_alarm_without_a_leak():
    nearest = max(naive_jaccard(one, other) for one in VALID[:20] for other in TRAIN)
    record = found(VALID, TRAIN)
    assert nearest < 0.8 and (record.exact, record.near, record.worst) == (0, 0, None)
    assert (record.valid_documents, record.train_documents) == (len(VALID), len(TRAIN))


def test_the_threshold_is_kept():
    text = " ".join(f"word{number}" for number in range(64))  # 60 runs of five
    other = " ".join([*text.split()[:-8], *"abcdefgh"])  # 8 runs differ: 52 in both of 68 in either
    assert found([text], [other], threshold=0.76).near == 1
    assert found([text], [other], threshold=0.77).near == 0


def test_short_and_empty_documents():
    record = found(["", "The end.", "!!!"], ["", "the end", "?", "another end of all"])
    assert (record.exact, record.near) == (0, 1) and record.worst is not None and record.worst.similarity == 1.0
    assert found([], ["text"]).near == 0 and found(["text"], []).train_documents == 0


def test_what_is_found_does_not_depend_on_the_groups(monkeypatch: pytest.MonkeyPatch):
    train = TRAIN[:300] + [changed(text, random.Random(1)) for text in VALID[:30]]
    whole = found(VALID[:60], train)
    monkeypatch.setattr(duplicates, "GROUP_BYTES", 5_000)
    monkeypatch.setattr(duplicates, "PAIRS_AT_ONCE", 7)
    assert found(VALID[:60], train) == whole and whole.near > 20


def test_thousands_of_copies_cost_no_thousands_of_comparisons(monkeypatch: pytest.MonkeyPatch):
    """Text made of one template: every validation document resembles every training document."""
    template = " ".join(f"word{number}" for number in range(200))
    valid = [f"{template} valid {number}" for number in range(300)]
    monkeypatch.setattr(duplicates, "GROUP_BYTES", 100_000)
    monkeypatch.setattr(duplicates, "MOST_VERIFIED", 3)
    auditor = Auditor(lambda number: valid[number].encode(), len(valid))
    auditor.add_all(f"{template} train {number}".encode() for number in range(2000))
    record = auditor.finish()
    assert record.near == 300 and auditor._verified.max() <= 3


def test_only_so_many_bytes_are_compared_and_that_is_said():
    train = TRAIN[:100]
    record = found(VALID, [*train, VALID[0]], most_bytes=sum(len(text.encode()) for text in train))
    assert (record.train_documents, record.exact) == (100, 0)


# ── datasets ──


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(f"{text}\n<|endoftext|>\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """200 documents with ten near copies of validation, and one exact copy, which prepare leaves out."""
    generator = random.Random(4)
    copies = [changed(text, generator) for text in VALID[:10]]
    train = write(tmp_path / "train.txt", [*TRAIN[:190], *copies, VALID[0]])
    prepare([train], tmp_path / "data", valid=write(tmp_path / "valid.txt", VALID[:40]), vocab_size=600)
    return tmp_path / "data"


def test_prepare_counts_and_keeps_near_copies(leaky: Path):
    record = Manifest.load(leaky).leaks
    assert record is not None and record.worst is not None and record.worst.similarity >= 0.8
    assert 8 <= record.near <= 10 and record.exact == 0
    assert (record.valid_documents, record.train_documents) == (40, 200)


def test_the_audit_of_a_folder_finds_the_same(leaky: Path):
    record, again = Manifest.load(leaky).leaks, audit(leaky, seed=42)
    assert record is not None and again == record
    assert audit(leaky, threshold=1.0, seed=42).near == 0
    assert audit(leaky, most_bytes=1).train_documents == 1


def test_the_fingerprint_is_that_of_the_data_alone(leaky: Path):
    manifest = Manifest.load(leaky)
    assert manifest.leaks is not None
    assert manifest.model_copy(update={"leaks": None}).fingerprint == manifest.fingerprint


def test_a_folder_from_before_the_audit_opens(leaky: Path):
    fields = Manifest.load(leaky).model_dump(mode="json")
    del fields["leaks"]
    Manifest.model_validate(fields).save(leaky)
    assert TokenDataset.open(leaky).manifest.leaks is None


def test_a_damaged_folder_is_a_sentence(leaky: Path):
    (leaky / "valid-00000.bin").unlink()
    with pytest.raises(UserError, match=r"valid-00000\.bin is missing"):
        audit(leaky)
