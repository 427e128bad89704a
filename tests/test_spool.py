"""The spool: everything comes back, in the order of the keys, whatever the sizes."""

from __future__ import annotations

import os
import tracemalloc
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalllm.data import spool
from smalllm.data.spool import Document, Spool, keys


def read(filled: Spool) -> list[Document]:
    return [document for bucket in filled.buckets() for document in bucket]


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 300), max_size=60), block=st.integers(1, 200), bits=st.integers(0, 6))
def test_all_documents_come_back_in_the_order_of_their_keys(tmp_path_factory, sizes, block, bits):
    documents = [
        Document(key, number, os.urandom(size)) for number, (key, size) in enumerate(zip(keys(7), sizes, strict=False))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "BLOCK_BYTES", block)
        patch.setattr(spool, "BUCKET_BITS", bits)
        filled = Spool(tmp_path_factory.getbasetemp())
        for document in documents:
            filled.add(document)
        assert read(filled) == read(filled) == sorted(documents)
        assert (filled.documents, filled.text_bytes) == (len(sizes), sum(sizes))
        filled.close()


def test_keys_are_a_function_of_the_seed_and_never_alike():
    some = list(islice(keys(1), 10_000))
    assert len(set(some)) == 10_000 and some == list(islice(keys(1), 10_000))
    assert not set(some) & set(islice(keys(2), 10_000))


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    """40 MB through 64 buckets of blocks of 16 kB: a megabyte of them, and one bucket at a time."""
    monkeypatch.setattr(spool, "BUCKET_BITS", 6)
    monkeypatch.setattr(spool, "BLOCK_BYTES", 1 << 14)
    tracemalloc.start()
    filled, text = Spool(tmp_path), b"x" * 2_000
    for key in islice(keys(3), 20_000):
        filled.add(Document(key, 0, text))
    count = sum(len(bucket) for bucket in filled.buckets())
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    filled.close()
    assert count == 20_000 and most < 6e6


def test_the_file_has_no_name_and_a_short_one_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "BLOCK_BYTES", 10)
    filled = Spool(tmp_path)
    filled.add(Document(1, 2, b"some text"))
    assert list(tmp_path.iterdir()) == []
    os.truncate(filled._file.fileno(), 5)
    with pytest.raises(OSError, match="Input/output error"):
        read(filled)
    filled.close()
