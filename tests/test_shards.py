"""Token shards: what is written is what is read, and every damage is named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalllm.config import UserError
from smalllm.data import shards
from smalllm.data.shards import Manifest, ShardWriter, SplitRecord, TokenDataset, token_dtype
from smalllm.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["the cat sat on the mat\n"] * 9, 280)
DOCUMENTS = [[1, *(3 + (number * index) % 277 for index in range(number)), 2] for number in range(1, 40)]


def write(folder, documents, split, *, shard_tokens=100, vocab_size=280):
    writer = ShardWriter(folder, split, vocab_size, shard_tokens=shard_tokens)
    for document in documents:
        add(writer, document)
    tokens, count = sum(map(len, documents)), len(documents)
    return SplitRecord(documents=count, tokens=tokens, text_bytes=tokens - 2 * count, shards=writer.close())


def add(writer, document):
    writer.add(np.array(document, np.int64), np.array([len(document)]))


def make(folder, documents=DOCUMENTS, **changes):
    """A dataset whose validation split is the first three documents."""
    TOKENIZER.save(folder / "tokenizer.model")
    values = {
        "sources": ["made by hand"],
        "inputs": [],
        "settings": {"limit": None},
        "seed": 42,
        "vocab_size": 280,
        "dtype": "uint16",
        "tokenizer_fingerprint": TOKENIZER.fingerprint,
        "bos_id": 1,
        "eos_id": 2,
        "train": write(folder, documents, "train"),
        "valid": write(folder, documents[:3], "valid"),
    }
    Manifest(**{**values, **changes}).save(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "dataset")


def refusal(folder, **options):
    with pytest.raises(UserError) as error:
        TokenDataset.open(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- round trips


def test_what_is_written_is_what_is_read(whole):
    dataset = TokenDataset.open(whole)
    assert [list(document) for document in dataset.train.iterate_documents()] == DOCUMENTS
    assert [list(document) for document in dataset.valid.iterate_documents()] == DOCUMENTS[:3]
    assert (dataset.train.documents, dataset.train.tokens) == (39, sum(map(len, DOCUMENTS)))
    assert dataset.tokenizer().fingerprint == TOKENIZER.fingerprint
    assert len(dataset.manifest.train.shards) > 5
    assert sorted(path.name for path in whole.iterdir() if path.name.startswith(".")) == []


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_read_crosses_shard_borders(whole, data):
    split = TokenDataset.open(whole, verify=False).train
    flat = [token for document in DOCUMENTS for token in document]
    start = data.draw(st.integers(0, len(flat)))
    count = data.draw(st.integers(0, len(flat) - start))
    found = split.read(start, count)
    assert found.dtype == np.dtype("<u2") and list(found) == flat[start : start + count]


def test_read_beyond_the_end_is_an_error(whole):
    split = TokenDataset.open(whole).train
    for start, count in ((split.tokens, 1), (-1, 1), (0, split.tokens + 1)):
        with pytest.raises(IndexError):
            split.read(start, count)


def test_bytes_worked_by_hand(tmp_path):
    writer = ShardWriter(tmp_path, "train", 280)
    add(writer, [1, 258, 2])
    (record,) = writer.close()
    raw = bytes([1, 0, 2, 1, 2, 0])
    assert (tmp_path / "train-00000.bin").read_bytes() == raw
    assert (record.file, record.tokens, record.documents) == ("train-00000.bin", 3, 1)
    assert record.sha256 == hashlib.sha256(raw).hexdigest()


def test_large_vocabularies_take_four_bytes(tmp_path):
    assert (token_dtype(65_536), token_dtype(65_537)) == ("uint16", "uint32")
    writer = ShardWriter(tmp_path, "train", 70_000)
    add(writer, [1, 69_999, 2])
    writer.close()
    assert (tmp_path / "train-00000.bin").read_bytes() == bytes([1, 0, 0, 0, 0x6F, 0x11, 1, 0, 2, 0, 0, 0])


def test_no_id_is_clamped(tmp_path):
    writer = ShardWriter(tmp_path, "train", 280)
    for ids in ([1, 280, 2], [1, -1, 2], []):
        with pytest.raises(AssertionError):
            add(writer, ids)
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_shard_has_its_name_only_when_it_is_whole(tmp_path):
    writer = ShardWriter(tmp_path, "train", 280, shard_tokens=10)
    for _ in range(5):
        add(writer, [1, 5, 5, 2])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".train-00002.bin.tmp",
        "train-00000.bin",
        "train-00001.bin",
    ]
    assert [record.documents for record in writer.close()] == [2, 2, 1]


def test_fingerprint_is_of_the_content(whole):
    manifest = TokenDataset.open(whole).manifest
    assert manifest.model_copy(update={"created_with": "another"}).fingerprint == manifest.fingerprint
    assert manifest.model_copy(update={"seed": 7}).fingerprint != manifest.fingerprint
    assert TokenDataset.open(whole).fingerprint == manifest.fingerprint


# -- damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "is missing or cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "is truncated"),
        (lambda path: path.write_bytes(b""), "is truncated: 0 bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0\0"), "is grown"),
        (lambda path: path.write_bytes(bytes(path.read_bytes()[::-1])), "has changed: its SHA-256"),
    ],
)
@pytest.mark.parametrize("name", ["train-00001.bin", "valid-00000.bin"])
def test_damaged_shards_are_named(folder, name, damage, words):
    damage(folder / name)
    said = refusal(folder)
    assert said.startswith(f"{folder / name} {words}") and said.endswith("run `smalllm prepare` again")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "uint32"}, "dtype must be uint16 for a vocabulary of 280"),
        ({"vocab_size": 70_000}, "dtype must be uint32"),
        ({"version": 2}, "version"),
        ({"extra": 1}, "extra"),
        ({"seed": "42"}, "seed"),
    ],
)
def test_wrong_manifests_are_named(folder, changes, words):
    content = {**json.loads((folder / "manifest.json").read_text()), **changes}
    (folder / "manifest.json").write_text(json.dumps(content))
    said = refusal(folder)
    assert words in said and str(folder / "manifest.json") in said


TRICKS = ["../train-00000.bin", "/etc/passwd", "train-00000.bin\n", "train-0.bin", "x/train-00000.bin", ""]


@pytest.mark.parametrize("name", TRICKS)
def test_shard_names_cannot_leave_the_folder(folder, name):
    content = json.loads((folder / "manifest.json").read_text())
    content["train"]["shards"][0]["file"] = name
    (folder / "manifest.json").write_text(json.dumps(content))
    assert "train.shards.0.file" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff", '{"version": 1}', "[" * 100_000, '{"seed": NaN}'])
def test_manifests_that_are_no_manifests(folder, text):
    (folder / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "is damaged" in refusal(folder)


def test_folder_without_a_manifest(tmp_path):
    assert "cannot be read" in refusal(tmp_path) and "smalllm prepare" in refusal(tmp_path)


def test_another_tokenizer_is_refused(folder):
    Tokenizer.train(["another text"] * 9, 275).save(folder / "tokenizer.model")
    assert "tokenizer.model has changed" in refusal(folder)
    with pytest.raises(UserError, match="is not the tokenizer that made this dataset"):
        TokenDataset.open(folder, verify=False).tokenizer()


def test_id_outside_the_vocabulary_names_shard_offset_and_id(tmp_path):
    folder = make(tmp_path, vocab_size=270)
    with pytest.raises(UserError, match=r"train-0000\d.bin holds id 27\d at token \d+, outside the vocabulary of 270"):
        list(TokenDataset.open(folder).train.iterate_documents())


def test_shard_truncated_after_opening_is_an_error_and_no_signal(folder):
    split = TokenDataset.open(folder).train
    with open(folder / "train-00000.bin", "r+b") as file:
        file.truncate(10)
    with pytest.raises(UserError, match=r"train-00000.bin ended early: 10 of 40 bytes at byte 0"):
        split.read(0, 20)


def test_shard_overwritten_after_opening_is_noticed_before_its_tokens_are_used(folder):
    split = TokenDataset.open(folder).train
    data = (folder / "train-00000.bin").read_bytes()
    (folder / "train-00000.bin").write_bytes(data[:2][::-1] + data[2:])
    with pytest.raises(UserError, match="train-00000.bin has changed: its SHA-256"):
        split.read(0, 20)


def test_shard_touched_or_replaced_after_opening_is_read_on(folder):
    split = TokenDataset.open(folder).train
    before = split.read(0, 20).tolist()
    os.utime(folder / "train-00000.bin")
    assert split.read(0, 20).tolist() == before
    (folder / "other").write_bytes(b"")
    os.replace(folder / "other", folder / "train-00000.bin")  # what is open is the file that was verified
    assert split.read(0, 20).tolist() == before


def test_a_disk_that_fails_is_named(folder, monkeypatch):
    split = TokenDataset.open(folder).train

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shards, "read_at", fail)
    with pytest.raises(
        UserError, match=r"train-00000.bin cannot be read at byte 0 \(Input/output error\); check the disk"
    ):
        split.read(0, 20)


@pytest.mark.parametrize("name", ["train-00001.bin", "manifest.json", "tokenizer.model"])
@pytest.mark.parametrize("thing", ["pipe", "device"])
def test_what_is_no_file_is_refused_at_once(folder, name, thing):
    (folder / name).unlink()
    os.mkfifo(folder / name) if thing == "pipe" else (folder / name).symlink_to("/dev/zero")
    assert f"{folder / name} " in refusal(folder) and "it is not a regular file" in refusal(folder)


@pytest.mark.parametrize("documents", [38, 40])
def test_another_number_of_documents_than_the_manifest_says_is_refused(whole, documents):
    dataset = TokenDataset.open(whole)
    dataset.train.documents = documents
    with pytest.raises(UserError, match=f"does not hold the {documents} documents of its manifest"):
        list(dataset.train.iterate_documents())


@pytest.mark.parametrize("changes", [{"eos_id": 1}, {"eos_id": 280}, {"bos_id": 1 << 40}])
def test_markers_are_two_ids_of_the_vocabulary(tmp_path, changes):
    with pytest.raises(ValueError, match="two ids of the vocabulary"):
        make(tmp_path, **changes)


def test_what_a_manifest_says_cannot_write_to_a_terminal(folder):
    content = {**json.loads((folder / "manifest.json").read_text()), "\x1b[2J\n" + "x" * 9000: 1}
    (folder / "manifest.json").write_text(json.dumps(content))
    assert r"\x1b[2J\nxxx" in refusal(folder) and len(refusal(folder)) < 500


MANY_SHARDS = """
import resource, sys
import numpy as np
from pathlib import Path
from smalllm.data.shards import Manifest, ShardWriter, SplitRecord, TokenSplit
folder = Path(sys.argv[1])
writer = ShardWriter(folder, "train", 300, shard_tokens=3)
for number in range(200):
    writer.add(np.array([1, number, 2]), np.array([3]))
shards = writer.close()
record = SplitRecord(documents=200, tokens=600, text_bytes=0, shards=shards)
manifest = Manifest(
    sources=[], inputs=[], settings={}, seed=0, vocab_size=300, dtype="uint16", tokenizer_fingerprint="0" * 64, bos_id=1,
    eos_id=2, train=record, valid=record,
)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
splits = [TokenSplit("train", folder, record, manifest) for _ in range(2)]
print([split.read(3 * 199, 3).tolist() for split in splits])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_more_shards_than_a_process_may_open_by_default(tmp_path):
    command = [sys.executable, "-c", MANY_SHARDS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[[1, 199, 2], [1, 199, 2]]\n", done.stderr
