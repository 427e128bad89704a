"""The hub, through the real client and a server on this machine.

The client reads its environment when it is imported, so cases about the environment are processes of their own; the
others set the client's constants, which is much faster.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow
import pytest
from hub_server import Hub, hub
from huggingface_hub import constants
from pyarrow import parquet

from smalllm.config import UserError
from smalllm.data import sources
from smalllm.data.prepare import prepare
from smalllm.data.shards import TokenDataset
from smalllm.data.sources import documents, open_source, share

REPO = "someone/stories"
TEXT = "".join(f"Story {number} was told.\n<|endoftext|>\n" for number in range(2_000)).encode()
CHILD = """
import json, sys
from smalllm.config import UserError
from smalllm.data.sources import documents
try:
    print(json.dumps(list(documents(sys.argv[1], num_files=json.loads(sys.argv[2])))))
except UserError as error:
    print(json.dumps({"error": str(error)}))
"""


def read(server: Hub, home: Path, source: str = f"hf://datasets/{REPO}/train.txt", num_files=None, **extra: str):
    """The documents a child process reads, or {"error": sentence}."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment = {**keep, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), **extra}
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", CHILD, source, json.dumps(num_files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout)


def sentence_of(source: str = f"hf://datasets/{REPO}/train.txt") -> str:
    """The UserError of a source, in this process."""
    with pytest.raises(UserError) as error:
        list(documents(source))
    return str(error.value)


@pytest.fixture
def client(server, tmp_path, monkeypatch):
    """Point the client of this process to the server and an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return server


@pytest.fixture
def server():
    with hub(REPO, {"train.txt": TEXT, "README.md": b"# a card"}) as state:
        yield state


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_download_is_whole_and_the_cache_serves_it_offline(server, tmp_path):
    texts = read(server, tmp_path)
    assert len(texts) == 2_000 and texts[7] == "Story 7 was told."
    downloads = [entry for entry in server.requests if entry[0] == "GET" and "/resolve/" in entry[1]]
    assert len(downloads) == 1
    before = len(server.requests)
    assert read(server, tmp_path, HF_HUB_OFFLINE="1") == texts
    assert len(server.requests) == before
    server.status = 500
    assert read(server, tmp_path) == texts


def test_cut_connection_goes_on_where_it_ended(client):
    kept = constants.DOWNLOAD_CHUNK_SIZE  # what the client has written when the connection ends
    client.files["train.txt"] = b"<|endoftext|>\n".join([b"a" * 999_999 + b"\n"] * 12)
    client.cut_after = kept + 500_000
    assert [len(text) for text in documents(f"hf://datasets/{REPO}/train.txt")] == [999_999] * 12
    ranges = [entry[2] for entry in client.requests if entry[0] == "GET" and "/resolve/" in entry[1]]
    assert ranges == [None, f"bytes={kept}-"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("announced", "its SHA-256 is not the one the hub gives"),
        ("swapped", "bytes instead of"),
        ("pointer", "it is a Git LFS pointer"),
        ("page", "it is a web page"),
    ],
)
def test_damaged_download_is_refused_and_not_kept(client, damage, words):
    if damage == "announced":
        client.announced["train.txt"] = hashlib.sha256(b"other").hexdigest()
    elif damage == "swapped":
        client.swapped["train.txt"] = TEXT[:-1]
    else:
        start = b"<!DOCTYPE html>" if damage == "page" else b"version https://git-lfs.github.com/spec/v1\n"
        client.swapped["train.txt"] = start.ljust(len(TEXT), b" ")
    sentence = sentence_of()
    assert words in sentence and "run it again" in sentence and "storyworld" in sentence
    client.announced, client.swapped = {}, {}
    assert len(list(documents(f"hf://datasets/{REPO}/train.txt"))) == 2_000


@pytest.mark.parametrize(
    ("status", "words"),
    [(404, "no such dataset"), (401, "set HF_TOKEN"), (403, "set HF_TOKEN"), (500, "status 500")],
)
def test_refusals_are_one_sentence(client, status, words):
    client.status = status
    sentence = sentence_of()
    assert sentence.startswith(f"cannot download {REPO}: ") and words in sentence
    assert sentence.endswith("use `storyworld`, which is built in, or give a local file")


def test_network_login_page_and_no_server(client, monkeypatch):
    client.web_page = True
    assert "did not answer like a hub" in sentence_of()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in sentence_of()


def test_a_hub_that_never_answers_is_given_up(client, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    client.silent = True
    began = time.monotonic()
    assert "cannot be reached (ReadTimeout)" in sentence_of() and time.monotonic() - began < 5
    client.silent = False


def test_offline_without_a_cache(server, tmp_path):
    assert "HF_HUB_OFFLINE is set" in read(server, tmp_path, HF_HUB_OFFLINE="1")["error"]
    assert not server.requests


def test_token_is_sent_and_written_nowhere(server, tmp_path):
    server.token = "hf_secretsecretsecret"
    assert len(read(server, tmp_path, HF_TOKEN=server.token)) == 2_000
    assert server.requests[-1][3] == f"Bearer {server.token}"
    assert not [path for path in files_below(tmp_path) if server.token.encode() in path.read_bytes()]


def test_without_a_file_the_parquet_shards_of_train(client):
    client.files = {
        "data/train-00001-of-00002.parquet": parquet_bytes("c"),
        "data/train-00000-of-00002.parquet": parquet_bytes("a", "b"),
        "data/validation-00000-of-00001.parquet": parquet_bytes("held out"),
        "train.csv": b"text\nother\n",
    }
    assert list(documents(f"hf://datasets/{REPO}")) == ["a", "b", "c"]
    assert list(documents(f"hf://datasets/{REPO}/data/validation-*")) == ["held out"]
    assert open_source(f"hf://datasets/{REPO}").validation == f"hf://datasets/{REPO}/data/validation-*.parquet"
    client.status = 500  # from the cache
    assert list(documents(f"hf://datasets/{REPO}", num_files=1)) == ["a", "b"]


def test_tinystories_brings_its_official_validation(client, tmp_path):
    client.repo = "roneneldan/TinyStories"
    client.files = {
        "TinyStoriesV2-GPT4-train.txt": TEXT,
        "TinyStoriesV2-GPT4-valid.txt": b"Story 7 was told.\n<|endoftext|>\nA new story was told.\n",
    }
    result = prepare(["tinystories"], tmp_path / "out", vocab_size=290)
    assert (result.train_documents, result.valid_documents, result.duplicates) == (1_999, 2, 1)
    manifest = TokenDataset.open(tmp_path / "out").manifest
    assert manifest.sources == ["tinystories"] and str(manifest.settings["valid"]).endswith(
        "TinyStoriesV2-GPT4-valid.txt"
    )
    assert [item.bytes for item in manifest.inputs] == [len(data) for data in client.files.values()]


def test_archive_of_json_shards(client):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as tar:
        for number in range(3):
            data = json.dumps([{"story": f"{number}a", "source": "x"}, {"story": f"{number}b"}]).encode()
            entry = tarfile.TarInfo(f"data0{number}.json")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    client.files["all_data.tar.gz"] = sink.getvalue()
    assert list(documents(f"hf://datasets/{REPO}/all_data.tar.gz", num_files=2)) == ["0a", "0b", "1a", "1b"]


def test_names_that_the_hub_does_not_have(client):
    sentence = sentence_of(f"hf://datasets/{REPO}/test.txt")
    assert "no readable file test.txt" in sentence and "train.txt" in sentence
    assert "no such dataset" in sentence_of("hf://datasets/someone/else")
    assert "must look like" in sentence_of("hf://models/x")
    assert "not a name that the hub allows" in sentence_of("hf://datasets/..--/x--y")


def parquet_bytes(*texts: str) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": list(texts)}), sink)
    return sink.getvalue().to_pybytes()


# -- several machines


def rows(count: int, group: int) -> bytes:
    """A parquet file of texts that cannot be compressed."""
    file = io.BytesIO()
    table = pyarrow.table({"text": [f"{number} {os.urandom(200).hex()}" for number in range(count)]})
    parquet.write_table(table, file, row_group_size=group)
    return file.getvalue()


@pytest.fixture
def dataset(client, monkeypatch):
    """Two large files of each format that can be cut, and one that cannot."""
    monkeypatch.setattr(sources, "RANGE_BYTES", 16_384)
    monkeypatch.setattr(sources, "SCAN_BYTES", 1024)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 4096)
    client.files = {
        "a.txt": TEXT * 10,
        "b.jsonl": b"".join(json.dumps(f"line {number} of a long file").encode() + b"\n" for number in range(20_000)),
        "c.parquet": rows(2_400, 240),
        "d.csv": b"text\n" + b"row of a table\n" * 3_000,
    }
    return client


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl", "c.parquet", "d.csv", "*"])
def test_a_machine_fetches_its_part_alone(dataset, name):
    source = f"hf://datasets/{REPO}/{name}"
    parts, fetched = [], []
    for part in range(1, 5):
        dataset.sent = 0
        parts += list(documents(share(source, part, 4)))
        fetched.append(dataset.sent)
    size = sum(len(data) for file, data in dataset.files.items() if name in (file, "*"))
    assert parts == list(documents(source))
    if name not in ("d.csv", "*"):  # a.txt is read a little at its beginning too, and a parquet file at its end
        assert max(fetched) < 0.3 * size + 100_000 and sum(fetched) < 1.2 * size + 200_000
    if name == "d.csv":
        assert sorted(fetched) == [0, 0, 0, size]
    assert all(commit in entry[1] for entry in dataset.requests if entry[2] for commit in ["/resolve/0123456789abcdef"])


def test_sharing_downloads_nothing_before_it_reads(dataset):
    share(f"hf://datasets/{REPO}", 1, 3)
    assert dataset.sent == 0


def test_parts_need_no_network_when_the_cache_has_the_files(dataset, monkeypatch):
    source = f"hf://datasets/{REPO}/b.jsonl"
    whole = list(documents(source))
    dataset.status = 500
    assert [text for part in (1, 2) for text in documents(share(source, part, 2))] == whole


@pytest.mark.parametrize("damage", ["no_ranges", "status", "swapped"])
def test_a_hub_that_gives_something_else_than_the_range_is_named(dataset, damage):
    shared = share(f"hf://datasets/{REPO}/b.jsonl", 2, 3)
    if damage == "no_ranges":
        dataset.no_ranges = True
    elif damage == "status":
        dataset.status = 403
    else:
        dataset.swapped["b.jsonl"] = dataset.files["b.jsonl"] + b"more"
    with pytest.raises(UserError) as error:
        list(documents(shared))
    expected = "cannot download" if damage == "status" else "the hub did not give bytes"
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


def test_parts_of_a_dataset_on_the_hub_become_one(client, tmp_path):
    learned = tmp_path / "first" / "tokenizer.model"
    source = f"hf://datasets/{REPO}/train.txt"
    whole = prepare([source], learned.parent, vocab_size=290)
    for part in (2, 1):
        merged = prepare([source], tmp_path / "parts", tokenizer=learned, shard=f"{part}/2")
    assert merged.complete and (merged.train_tokens, merged.valid_tokens) == (whole.train_tokens, whole.valid_tokens)
    inputs = TokenDataset.open(tmp_path / "parts").manifest.inputs
    assert [(file.name, file.sha256) for file in inputs] == [("train.txt", hashlib.sha256(TEXT).hexdigest())]
