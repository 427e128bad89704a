"""Token shards on disk and the manifest that vouches for them; it knows nothing of text, sources or training.

A dataset folder:

    manifest.json           written last: a folder without one is not a dataset
    tokenizer.model
    train-00000.bin ...     raw little-endian uint16 (uint32 above 65,536 pieces): <s> tokens </s> of every document
    valid-00000.bin ...

What several machines prepared has train-0002-of-0005-00000.bin instead: the first file of the second of five (`parts`).
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sized
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from smalllm.config import UserError
from smalllm.files import FileSystem
from smalllm.tokenizer import LARGEST_MODEL, Tokenizer
from smalllm.untrusted import content, opened, printable

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
SHARD_TOKENS = 50_000_000  # 100 MB of uint16
CHUNK_TOKENS = 1 << 20
LARGEST_MANIFEST = 1 << 26  # bytes
SPARE_FILES = 512  # for whatever else a process opens beside its shards
REMAKE = "delete the folder and run `smalllm prepare` again"

_SEEK_LOCK = threading.Lock()

Count = Annotated[int, Field(ge=0, le=1 << 48)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Part of a manifest: frozen, of a closed schema, strict about types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ShardRecord(Record):
    """One file of tokens. Its name cannot leave the folder."""

    file: Annotated[str, Field(pattern=r"^(train|valid)-([0-9]{4}-of-[0-9]{4}-)?[0-9]{5}\.bin$")]
    tokens: Count
    documents: Count
    sha256: Digest


class SplitRecord(Record):
    """One side of the data. `text_bytes` counts the UTF-8 bytes of the documents, markers not included;
    `text_sha256` is over each document's UTF-8 text followed by a NUL byte (validation only)."""

    documents: Count
    tokens: Count
    text_bytes: Count
    text_sha256: Digest | None = None
    shards: list[ShardRecord]

    @model_validator(mode="after")
    def _sums(self) -> Self:
        if self.tokens != sum(shard.tokens for shard in self.shards):
            raise ValueError("tokens must be the sum over the shards")
        if self.documents != sum(shard.documents for shard in self.shards):
            raise ValueError("documents must be the sum over the shards")
        return self


class InputRecord(Record):
    """One file that was read: its name without folders, size and SHA-256. Machines that share their sources do not read
    whole files: then SHA-256 is what the hub says, or unknown."""

    name: str
    bytes: Count
    sha256: Digest | None


class PairRecord(Record):
    """A validation and a training document that resemble each other: their numbers in stored order and how they begin.
    `similarity` is the Jaccard similarity of their runs of five words."""

    similarity: Annotated[float, Field(ge=0.0, le=1.0)]
    valid: Count
    train: Count
    valid_text: str
    train_text: str


class LeakRecord(Record):
    """What `duplicates` found: validation documents that stand in training word for word (`exact`), and others that have a
    similarity of `threshold` or more with a training document (`near`). The documents of each side are those compared;
    they are the first in stored order."""

    threshold: Annotated[float, Field(gt=0.0, le=1.0)]
    exact: Count
    near: Count
    valid_documents: Count
    train_documents: Count
    worst: PairRecord | None = None


class Manifest(Record):
    """What the folder holds and what made it. `settings` are the arguments of prepare that decide the content."""

    version: Literal[1] = 1
    created_with: str = Field(default_factory=lambda: f"smalllm {version('smalllm')}")
    sources: list[str]
    inputs: list[InputRecord]
    settings: dict[str, str | int | float | None]
    seed: int
    vocab_size: Annotated[int, Field(ge=1)]
    dtype: Literal["uint16", "uint32"]
    tokenizer_fingerprint: Digest
    bos_id: Count
    eos_id: Count
    train: SplitRecord
    valid: SplitRecord
    leaks: LeakRecord | None = None

    @model_validator(mode="after")
    def _dtype_fits(self) -> Self:
        if self.dtype != token_dtype(self.vocab_size):
            raise ValueError(f"dtype must be {token_dtype(self.vocab_size)} for a vocabulary of {self.vocab_size}")
        return self

    @model_validator(mode="after")
    def _markers_fit(self) -> Self:
        if self.bos_id == self.eos_id or max(self.bos_id, self.eos_id) >= self.vocab_size:
            raise ValueError("bos_id and eos_id must be two ids of the vocabulary")
        return self

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON without `created_with` and `leaks`: equal data made by two versions is equal,
        and what was found out about it does not change it."""
        return _canonical_sha256(self.model_dump(mode="json", exclude={"created_with", "leaks"}))

    def save(self, folder: Path, name: str = MANIFEST) -> None:
        """Write manifest.json atomically, with the SHA-256 of its content, so that a damaged manifest is noticed."""
        content = self.model_dump(mode="json")
        content["sha256"] = _canonical_sha256(content)
        FileSystem().replace(folder / name, [(json.dumps(content, indent=1) + "\n").encode()])

    @classmethod
    def load(cls, folder: Path, name: str = MANIFEST) -> Self:
        """Read and check manifest.json; UserError names the file and the damage."""
        path = folder / name
        try:
            fields = json.loads(content(path, LARGEST_MANIFEST).decode("utf-8"))
            digest = fields.pop("sha256", None)
            manifest = cls.model_validate(fields)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); make the dataset with `smalllm prepare`"
            ) from None
        except ValidationError as error:
            place = printable(".".join(map(str, error.errors()[0]["loc"]))) or "manifest"
            raise UserError(f"{path} is damaged ({place}: {error.errors()[0]['msg']}); {REMAKE}") from None
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise UserError(f"{path} is damaged (not a JSON object in UTF-8); {REMAKE}") from None
        if digest != _canonical_sha256(fields):
            raise UserError(f"{path} is damaged (its content does not match its SHA-256); {REMAKE}")
        return manifest


class _Shard:
    """A file of tokens, open from its check to the last read, so that what is read is what was checked.

    Files are read with pread, because a memory map of a file that someone truncates ends the process.
    """

    def __init__(self, path: Path, record: ShardRecord, width: int) -> None:
        self.path, self._sha256 = path, record.sha256
        try:
            with opened(path) as file:
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise UserError(f"{path} is missing or cannot be read ({error.strerror}); {REMAKE}") from None
        weakref.finalize(self, os.close, self._file)
        self._checked = self._state()
        if (size := self._checked[0]) != (expected := record.tokens * width):
            change = "truncated" if size < expected else "grown"
            raise UserError(f"{path} is {change}: {size} bytes where the manifest says {expected}; {REMAKE}")

    def verify(self) -> None:
        """UserError unless the bytes have the SHA-256 of the manifest."""
        state, digest, place = self._state(), hashlib.sha256(), 0
        while part := self._bytes(place, CHUNK_TOKENS):
            digest.update(part)
            place += len(part)
        if digest.hexdigest() != self._sha256:
            raise UserError(f"{self.path} has changed: its SHA-256 is not the one in the manifest; {REMAKE}")
        self._checked = state

    def read(self, offset: int, size: int) -> bytes:
        """So many bytes; UserError where the file ended. After the file was written to, only if it still verifies."""
        data = self._bytes(offset, size)
        if len(data) != size:
            raise UserError(f"{self.path} ended early: {len(data)} of {size} bytes at byte {offset}; {REMAKE}")
        if self._state() == self._checked:
            return data
        self.verify()
        return self.read(offset, size)

    def _bytes(self, offset: int, size: int) -> bytes:
        try:
            return read_at(self._file, offset, size)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read at byte {offset} ({error.strerror}); check the disk, or {REMAKE}"
            ) from None

    def _state(self) -> tuple[int, int]:
        """Size and time of the last change."""
        status = os.fstat(self._file)
        return status.st_size, status.st_mtime_ns


class TokenSplit:
    """The tokens of one side of a dataset, as one long sequence over all its shards. Reading is thread-safe."""

    def __init__(self, name: str, folder: Path, record: SplitRecord, manifest: Manifest) -> None:
        self.name = name
        self.tokens = record.tokens
        self.documents = record.documents
        self.text_bytes = record.text_bytes
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._limit, self._bos, self._eos = manifest.vocab_size, manifest.bos_id, manifest.eos_id
        _allow_open_files(len(record.shards))
        self._shards = [_Shard(folder / shard.file, shard, self.dtype.itemsize) for shard in record.shards]
        self._starts = np.cumsum([0, *(shard.tokens for shard in record.shards)])

    def verify(self) -> None:
        """UserError that names the first shard whose bytes are not those of the manifest."""
        for shard in self._shards:
            shard.verify()

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start ... start + count - 1 as (count,) in the stored dtype.

        Raises UserError for a shard that has shrunk or holds an id outside the vocabulary.
        """
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"tokens {start} to {start + count} of {self.name}, which has {self.tokens}")
        result = np.empty(count, self.dtype)
        filled = 0
        while filled < count:
            shard = int(np.searchsorted(self._starts, start + filled, side="right")) - 1
            offset = start + filled - int(self._starts[shard])
            size = min(count - filled, int(self._starts[shard + 1]) - start - filled)
            result[filled : filled + size] = self._read_shard(shard, offset, size)
            filled += size
        return result

    def iterate_documents(self) -> Iterator[np.ndarray]:
        """Every document in stored order, from its begin to its end token, in constant memory. UserError unless they are
        as many as the manifest says."""
        pending, left = np.empty(0, self.dtype), self.documents
        for start in range(0, self.tokens, CHUNK_TOKENS):
            chunk = np.concatenate([pending, self.read(start, min(CHUNK_TOKENS, self.tokens - start))])
            ends = np.flatnonzero(chunk == self._eos) + 1
            documents = np.split(chunk, ends)
            pending = documents.pop()
            left -= len(documents)
            if left < 0:
                break
            for document in documents:
                self._check_document(document)
                yield document
        if left:
            raise UserError(f"split {self.name} does not hold the {self.documents} documents of its manifest; {REMAKE}")
        if len(pending):
            raise UserError(f"split {self.name} ends inside a document; {REMAKE}")

    def _read_shard(self, shard: int, offset: int, count: int) -> np.ndarray:
        width = self.dtype.itemsize
        tokens = np.frombuffer(self._shards[shard].read(offset * width, count * width), self.dtype)
        if count and int(tokens.max()) >= self._limit:
            self._refuse_id(shard, offset, tokens)
        return tokens

    def _refuse_id(self, shard: int, offset: int, tokens: np.ndarray) -> None:
        place = int(np.argmax(tokens >= self._limit))
        raise UserError(
            f"{self._shards[shard].path} holds id {tokens[place]} at token {offset + place}, "
            f"outside the vocabulary of {self._limit}; {REMAKE}"
        )

    def _check_document(self, document: np.ndarray) -> None:
        if document[0] != self._bos:
            raise UserError(f"split {self.name} holds a document that does not begin with id {self._bos}; {REMAKE}")


class TokenDataset:
    """A folder of token shards whose files are what the manifest says."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.train = TokenSplit("train", folder, manifest.train, manifest)
        self.valid = TokenSplit("valid", folder, manifest.valid, manifest)

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> TokenDataset:
        """Open a dataset. Sizes are always checked, SHA-256 of every file with `verify`.

        Raises UserError that names the file and the damage.
        """
        folder = Path(folder)
        dataset = cls(folder, Manifest.load(folder))
        if verify:
            dataset.train.verify()
            dataset.valid.verify()
            _check_tokenizer(folder / TOKENIZER, dataset.manifest.tokenizer_fingerprint)
        return dataset

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens; UserError when the file is another one."""
        tokenizer = Tokenizer.load(self.folder / TOKENIZER)
        if tokenizer.fingerprint != self.manifest.tokenizer_fingerprint:
            raise UserError(f"{self.folder / TOKENIZER} is not the tokenizer that made this dataset; {REMAKE}")
        return tokenizer


Item = TypeVar("Item", bound=Sized)


def within(items: Iterable[Item], most: int) -> Iterator[Item]:
    """The first items whose lengths add up to at most so much; one at least.

    >>> list(within(["abc", "de", "f"], 5)), list(within(["abcdef", "g"], 5))
    (['abc', 'de'], ['abcdef'])
    """
    size = 0
    for number, item in enumerate(items):
        size += len(item)
        if number and size > most:
            return
        yield item


class ShardWriter:
    """Writes one split: documents in, shard files SPLIT-NUMBER.bin and their records out.

    A shard has its final name only when it is whole and on disk. Documents are never cut between shards.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, *, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder, self._split, self._limit, self._shard_tokens = folder, split, vocab_size, shard_tokens
        self._dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._records: list[ShardRecord] = []
        self._begin()

    def add(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """Append documents: (ids,) integers, each document from begin to end, and (documents,) how many ids each has.

        An empty document and ids outside the vocabulary are our own bugs.
        """
        bounds = np.concatenate([[0], np.cumsum(counts)])
        assert len(counts) and int(counts.min()) > 0 and bounds[-1] == len(ids), "counts are not those of the ids"
        assert int(ids.min()) >= 0 and int(ids.max()) < self._limit, "id outside the vocabulary"
        first = 0
        while first < len(counts):
            room = bounds[first] + self._shard_tokens - self._tokens
            last = int(np.searchsorted(bounds, room, side="right")) - 1  # documents up to here find room
            if last <= first and self._tokens:
                self._finish()
                self._begin()
                continue
            last = max(last, first + 1)
            self._append(ids[bounds[first] : bounds[last]], last - first)
            first = last

    def close(self) -> list[ShardRecord]:
        """Finish the last shard; the records of all shards in order."""
        if self._tokens:
            self._finish()
        else:
            self.abandon()
        return self._records

    def abandon(self) -> None:
        """Drop the shard in progress."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _append(self, ids: np.ndarray, documents: int) -> None:
        data = ids.astype(self._dtype).data
        self._file.write(data)
        self._hash.update(data)
        self._tokens += len(ids)
        self._documents += documents

    def _begin(self) -> None:
        self._name = f"{self._split}-{len(self._records):05d}.bin"
        self._temporary = self._folder / f".{self._name}.tmp"
        self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by _finish or abandon)
        self._hash = hashlib.sha256()
        self._tokens = self._documents = 0

    def _finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._folder / self._name)
        record = ShardRecord(
            file=self._name, tokens=self._tokens, documents=self._documents, sha256=self._hash.hexdigest()
        )
        self._records.append(record)


def _allow_open_files(more: int) -> None:
    """Raise the limit of open files, which is often 1,024, as far as the system allows: 100 GB of tokens are 1,000 files."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit; macOS refuses some values
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        open_files = len(os.listdir("/dev/fd"))
        wanted = open_files + more + SPARE_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _canonical_sha256(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smallest stored type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_at(file: int, offset: int, size: int) -> bytes:
    """Up to `size` bytes of a file descriptor at `offset`; fewer only where the file ends. Thread-safe."""
    parts: list[bytes] = []
    while size > 0 and (part := _pread(file, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return b"".join(parts)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_tokenizer(path: Path, expected: str) -> None:
    try:
        digest = hashlib.sha256(content(path, LARGEST_MODEL)).hexdigest()
    except OSError as error:
        raise UserError(f"{path} is missing or cannot be read ({error.strerror}); {REMAKE}") from None
    if digest != expected:
        raise UserError(f"{path} has changed: its SHA-256 is not the one in the manifest; {REMAKE}")


def _pread(file: int, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file, size, offset)
    with _SEEK_LOCK:  # Windows has no pread
        os.lseek(file, offset, os.SEEK_SET)
        return os.read(file, size)
