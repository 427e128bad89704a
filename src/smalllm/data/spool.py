"""Documents on disk, given back in a seeded random order, in memory that hardly grows with them.

It knows nothing of sources, splits or tokens. Every document gets a random key; the order is that of the keys. The first
bits of its key choose one of 1,024 buckets, whose documents are collected and go to one file in blocks; reading takes a
bucket at a time and sorts it (Sanders 1998, "Random permutations on distributed, external and hierarchical memory"). So
the disk reads and writes whole blocks, however little of the text memory could hold: 32 MB and a few thousandths of it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import tempfile
from array import array
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smalllm.data.duplicates import scrambled
from smalllm.data.shards import read_at

BUCKET_BITS = 10
BLOCK_BYTES = 1 << 15
KEYS_AT_ONCE = 4096

_RECORD = struct.Struct("<QQI")  # key, mark, bytes of text


class Document(NamedTuple):
    """A text in UTF-8, its place in the order, and a number that equal texts have in common."""

    key: int  # 64 bits
    mark: int  # 64 bits
    text: bytes


class Spool:
    """Documents are added, then read, as often as wanted. The file has no name and vanishes with the process."""

    def __init__(self, folder: Path) -> None:
        """Make the file in a folder, on whose disk there must be room for the text and 20 bytes for each document."""
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".tmp-spool-", suffix="-0", buffering=0)  # noqa: SIM115
        self._ends = [bytearray() for _ in range(1 << BUCKET_BITS)]  # of buckets: less than a block of each
        self._blocks = [array("I") for _ in range(1 << BUCKET_BITS)]  # numbers of the others in the file
        self._written = 0  # blocks
        self.text_bytes = 0
        self.documents = 0

    def add(self, document: Document) -> None:
        """Not while it is being read."""
        key, mark, text = document
        bucket = key >> (64 - BUCKET_BITS)
        end = self._ends[bucket]
        end += _RECORD.pack(key, mark, len(text))
        end += text
        if len(end) >= BLOCK_BYTES:
            self._write(bucket)
        self.text_bytes += len(text)
        self.documents += 1

    def buckets(self) -> Iterator[list[Document]]:
        """All documents in the order of their keys, in lists that are not empty."""
        for bucket in range(1 << BUCKET_BITS):
            data = b"".join([*map(self._block, self._blocks[bucket]), self._ends[bucket]])
            if data:
                yield sorted(_documents(data))

    def close(self) -> None:
        self._file.close()

    def _write(self, bucket: int) -> None:
        """Move the whole blocks of a bucket's end to the file."""
        end = self._ends[bucket]
        blocks = len(end) // BLOCK_BYTES
        left = memoryview(end)[: blocks * BLOCK_BYTES]
        while left:
            left = left[self._file.write(left) :]
        left.release()
        self._blocks[bucket].extend(range(self._written, self._written + blocks))
        self._written += blocks
        self._ends[bucket] = end[blocks * BLOCK_BYTES :]

    def _block(self, number: int) -> bytes:
        data = read_at(self._file.fileno(), number * BLOCK_BYTES, BLOCK_BYTES)
        if len(data) != BLOCK_BYTES:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return data


def _documents(data: bytes) -> Iterator[Document]:
    """The documents of a bucket as they were added."""
    place = 0
    while place < len(data):
        key, mark, size = _RECORD.unpack_from(data, place)
        place += _RECORD.size + size
        yield Document(key, mark, data[place - size : place])


def keys(seed: int) -> Iterator[int]:
    """A key for each document in turn, no two alike."""
    for first in count(0, KEYS_AT_ONCE):
        yield from _mixed(np.arange(first, first + KEYS_AT_ONCE, dtype=np.uint64), seed).tolist()


def _mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood 2014) of each number: pseudo-random keys that no library version changes."""
    key = int.from_bytes(hashlib.blake2b(f"order {seed}".encode(), digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):
        return scrambled((numbers + np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15))
