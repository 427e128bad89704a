"""From sources to a dataset folder: read, split, learn the vocabulary, encode, write.

It knows nothing of models and training, and of formats and hubs only what `sources` tells it.

1. Every document is copied once to a spool file in the dataset's folder; memory keeps 16 bytes for each (its place and
   a 64-bit hash of its text and the seed).
2. The hash decides the side, so equal texts fall on the same side. Texts of the validation side occur there once, and
   nowhere in training.
3. A seeded permutation of all documents is the stored order. The tokenizer learns from the first 20 MB of training text
   in that order: an even sample of everything.
4. Batches of documents are encoded on all threads and appended to shards. The first 50 MB of training are compared with
   validation on the way (`duplicates`), and what resembles it stands in the manifest, which comes last.

The result depends on the documents and the settings, never on the number of workers. An interrupted prepare leaves no
manifest; the next one removes what it finds and starts again.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from smalllm.config import UserError
from smalllm.data.duplicates import Auditor, scrambled
from smalllm.data.shards import (
    MANIFEST,
    TOKENIZER,
    InputRecord,
    Manifest,
    ShardRecord,
    ShardWriter,
    SplitRecord,
    TokenDataset,
    file_sha256,
    read_at,
    token_dtype,
)
from smalllm.data.sources import Counts, Source, documents, open_source, passages
from smalllm.files import FileSystem
from smalllm.tokenizer import MAX_PIECES, Tokenizer

VOCAB_SIZE = 4096
VALID_FRACTION = 0.02
SAMPLE_BYTES = 20_000_000
BATCH_BYTES = 4_000_000
AUDIT_BYTES = 50_000_000  # of training text; `duplicates.audit` compares everything
REPORT_SECONDS = 0.1
SPOOL = ".spool"
LOCK = ".lock"
OURS = re.compile(
    r"\.lock|\.spool|manifest\.json|tokenizer\.model|floors\.json|(train|valid)-\d{5}\.bin|\.tmp-.+-\d+|\..+\.tmp"
)

Stage = Literal["read", "tokenizer", "encode"]


@dataclass(frozen=True)
class PrepareProgress:
    """How far it is: text bytes of this stage, and of how many if that is known."""

    stage: Stage
    documents: int
    done_bytes: int
    total_bytes: int | None
    seconds: float


@dataclass(frozen=True)
class PrepareResult:
    """What a prepare made. Bytes are UTF-8 bytes of text; a megabyte is 10^6; the rate is that of the whole prepare."""

    out: str
    train_documents: int
    valid_documents: int
    train_tokens: int
    valid_tokens: int
    train_bytes: int
    valid_bytes: int
    vocab_size: int
    bytes_per_token: float
    seconds: float
    megabytes_per_second: float
    duplicates: int = 0  # documents left out because validation holds the same text
    empty: int = 0  # documents of nothing but white space, left out
    reused: bool = False  # the folder held this dataset already
    fingerprint: str = ""
    leaks: dict[str, Any] | None = None  # shards.LeakRecord: validation documents that training nearly holds


@dataclass(frozen=True)
class Settings:
    """The arguments that decide the content of the dataset."""

    vocab_size: int
    valid_fraction: float | None
    num_files: int | None
    sample_rate: float
    limit: int | None
    seed: int


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
    valid: str | None = None,
    valid_fraction: float | None = None,
    num_files: int | None = None,
    sample_rate: float = 1.0,
    limit: int | None = None,
    seed: int = 42,
    workers: int | None = None,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> PrepareResult:
    """Make the dataset folder `out` from `sources`.

    Validation comes from `valid`; else from the source's own validation (tinystories, storyworld), unless
    `valid_fraction` is given; else a fraction (0.02) of the documents is held out. A single document, such as a book,
    is first cut into passages. `num_files`, `sample_rate` and `limit` apply to `sources` only. The vocabulary is that of a
    given `tokenizer`, or `vocab_size` pieces (4,096 unless given) are learned. If `out` already holds the dataset of these settings it is kept
    (`reused`). Raises UserError for every mistake of the user.
    """
    given = Tokenizer.load(tokenizer) if tokenizer else None
    if given and vocab_size not in (None, given.vocab_size):
        raise UserError(f"vocab_size={vocab_size} but {tokenizer} has {given.vocab_size} pieces; leave vocab_size out")
    settings = Settings(
        VOCAB_SIZE if vocab_size is None else vocab_size, valid_fraction, num_files, sample_rate, limit, seed
    )
    _check_settings(sources, valid, settings, workers)
    clock = _Clock(progress)
    opened = [open_source(source, num_files=num_files) for source in sources]
    held_out = _validation_source(opened, valid, valid_fraction)
    with _locked(Path(out)) as folder:
        description = _describe(opened, held_out, settings, given)
        if (folder / MANIFEST).exists():
            return _reuse(folder, description, clock)
        _clear(folder)
        try:
            return _make(folder, opened, held_out, description, given, workers or _cores(), settings, clock)
        except BaseException as error:
            _clear(folder)
            if isinstance(error, OSError):  # reading errors are UserErrors already
                raise UserError(f"out={folder} cannot be written ({error.strerror}); free space or change it") from None
            raise


# -- before the work


class _Clock:
    """Seconds since the start, and reports of progress, REPORT_SECONDS apart."""

    def __init__(self, report: Callable[[PrepareProgress], None] | None) -> None:
        self._report, self._start, self._last = report, time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def report(self, stage: Stage, documents: int, done: int, total: int | None = None) -> None:
        if self._report and (self.seconds - self._last >= REPORT_SECONDS or done == total):
            self._last = self.seconds
            self._report(PrepareProgress(stage, documents, done, total, self.seconds))


def _check_settings(sources: Sequence[str], valid: str | None, settings: Settings, workers: int | None) -> None:
    if not sources:
        raise UserError("source is missing; give a file, a folder, `storyworld` or `tinystories`")
    fraction = settings.valid_fraction
    if fraction is not None and valid is not None:
        raise UserError(f"valid={valid} and valid_fraction={fraction} exclude each other; leave one out")
    if fraction is not None and not 0.0 < fraction < 1.0:
        raise UserError(f"valid_fraction={fraction} must be above 0 and below 1; 0.02 is usual")
    if not 0 <= settings.seed < 1 << 63:
        raise UserError(f"seed={settings.seed} must be from 0 to {(1 << 63) - 1}")
    if not 0 < settings.vocab_size <= MAX_PIECES:
        raise UserError(f"vocab_size={settings.vocab_size} is not possible; 4096 is usual for small models")
    if workers is not None and not 1 <= workers <= 1024:
        raise UserError(f"workers={workers} must be from 1 to 1024; leave it out to use every core")
    if list(sources).count("-") + (valid == "-") > 1:
        raise UserError("source - (standard input) can be read only once; name it once")


def _validation_source(sources: list[Source], valid: str | None, fraction: float | None) -> Source | None:
    """The source of validation documents, or None to hold out a fraction."""
    if valid is not None:
        return open_source(valid)
    if fraction is None and len(sources) == 1 and sources[0].validation:
        return open_source(sources[0].validation)
    return None


@dataclass(frozen=True)
class _Description:
    """What the manifest says of the origin; equal descriptions make equal datasets."""

    sources: list[str]
    inputs: list[InputRecord]
    settings: dict[str, str | int | float | None]
    repeatable: bool  # standard input is not


def _describe(sources: list[Source], valid: Source | None, settings: Settings, given: Tokenizer | None) -> _Description:
    everything = [*sources, valid] if valid else sources
    inputs = [
        InputRecord(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path))
        for source in everything
        for path in source.paths
    ]
    fields: dict[str, str | int | float | None] = {
        "valid": valid.name if valid else None,
        "valid_fraction": None if valid else settings.valid_fraction or VALID_FRACTION,
        "num_files": settings.num_files,
        "sample_rate": float(settings.sample_rate),
        "limit": settings.limit,
        "tokenizer": given.fingerprint if given else None,
        "vocab_size": given.vocab_size if given else settings.vocab_size,
    }
    names = [source.name for source in sources]
    return _Description(names, inputs, {**fields, "seed": settings.seed}, all(s.name != "-" for s in everything))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- the folder


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Create the folder and keep other prepares out of it. The system drops the lock of a process that dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "ab")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"out={folder} cannot be written ({error.strerror}); choose another folder") from None
    with file:
        if not _try_lock(file, folder / LOCK):
            raise UserError(f"out={folder} is being written by another prepare; wait for it or choose another folder")
        try:
            yield folder
        finally:
            with suppress(OSError):  # Windows does not remove an open file
                (folder / LOCK).unlink()
            with suppress(OSError):  # a folder that got nothing should not stay
                folder.rmdir()


def _try_lock(file: IO[bytes], path: Path) -> bool:
    """Take the lock; False if another holds it, or removed the file between our opening and locking it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _clear(folder: Path) -> None:
    """Remove what an interrupted prepare left; never anything else."""
    names = sorted(path.name for path in folder.iterdir())
    if foreign := [name for name in names if not OURS.fullmatch(name)]:
        raise UserError(f"out={folder} holds other files (first: {foreign[0]}); choose a new or empty folder")
    for name in names:
        if name != LOCK:
            (folder / name).unlink()


def _reuse(folder: Path, description: _Description, clock: _Clock) -> PrepareResult:
    """The dataset that is there, if it is the one that was asked for."""
    manifest = TokenDataset.open(folder).manifest
    same = (manifest.sources, manifest.inputs, manifest.settings) == (
        description.sources,
        description.inputs,
        description.settings,
    )
    if not same or not description.repeatable:
        reason = "with other settings or sources" if description.repeatable else "and standard input cannot be compared"
        raise UserError(f"out={folder} holds a dataset already, {reason}; choose another --out or delete the folder")
    return replace(_result(folder, manifest, clock), reused=True)


# -- the work


class _Spool:
    """Documents on disk, found by number; in memory 16 bytes for each."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path = path
        self._file = open(path, "w+b", buffering=1 << 20)  # noqa: SIM115 (closed by close)
        self._key = f"smalllm {seed}".encode()
        self.ends = array("Q", [0])
        self._hashes = array("Q")

    def add(self, text: str) -> None:
        data = text.encode()
        self._file.write(data)
        self.ends.append(self.ends[-1] + len(data))
        self._hashes.append(int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self._key).digest(), "little"))

    def text(self, number: int) -> bytes:
        """The UTF-8 text of a document."""
        start, end = self.ends[number], self.ends[number + 1]
        return read_at(self._file.fileno(), start, end - start)

    def flush(self) -> None:
        """After the last `add` and before the first `text`."""
        self._file.flush()

    def cut_only_document(self) -> None:
        """Replace a single document by its passages: a book becomes a corpus."""
        self.flush()
        text = self.text(0).decode()
        self._file.seek(0)
        self._file.truncate()
        self.ends, self._hashes = array("Q", [0]), array("Q")
        for passage in passages(text):
            self.add(passage)

    def close(self) -> None:
        self._file.close()

    @property
    def bytes(self) -> int:
        return self.ends[-1]

    @property
    def hashes(self) -> np.ndarray:
        """(documents,) uint64: equal for equal texts."""
        return np.array(self._hashes, dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._hashes)


def _make(
    folder: Path,
    sources: list[Source],
    held_out: Source | None,
    description: _Description,
    given: Tokenizer | None,
    threads: int,
    settings: Settings,
    clock: _Clock,
) -> PrepareResult:
    spool = _Spool(folder / SPOOL, settings.seed)
    try:
        held_out_documents, empty = _fill(spool, sources, held_out, settings, clock)
        train, valid, duplicates = _split(spool, held_out_documents, settings)
        tokenizer = given or _learn(spool, train, settings.vocab_size, clock)
        tokenizer.save(folder / TOKENIZER)
        total = _text_bytes(spool, train) + _text_bytes(spool, valid)
        encoder = _Encoder(folder, spool, tokenizer, threads, clock, total)
        auditor = Auditor(
            lambda number: spool.text(valid[number]), len(valid), seed=settings.seed, most_bytes=AUDIT_BYTES
        )
        manifest = Manifest(
            sources=description.sources,
            inputs=description.inputs,
            settings=description.settings,
            seed=settings.seed,
            vocab_size=tokenizer.vocab_size,
            dtype=token_dtype(tokenizer.vocab_size),
            tokenizer_fingerprint=tokenizer.fingerprint,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            valid=encoder.write("valid", valid),
            train=encoder.write("train", train, auditor),
            leaks=auditor.finish(),
        )
    finally:
        spool.close()
    (folder / SPOOL).unlink()
    FileSystem().sync_folder(folder)
    manifest.save(folder)
    return replace(_result(folder, manifest, clock), duplicates=duplicates, empty=empty)


def _fill(
    spool: _Spool, sources: list[Source], held_out: Source | None, settings: Settings, clock: _Clock
) -> tuple[int, int]:
    """Spool the validation documents, then the others; the number of the first, and of empty documents."""
    empty = Counts()
    if held_out:
        _spool(spool, documents(held_out, seed=settings.seed, counts=empty), clock)
    held_out_documents, skipped, left = len(spool), empty.empty, settings.limit
    for source in sources:
        counts = Counts()
        _spool(spool, _selected(source, settings, left, counts), clock)
        skipped += counts.empty
        left = left - counts.kept if left is not None else None
        if left == 0:
            break
    if held_out is None and len(spool) == 1:
        spool.cut_only_document()
    spool.flush()
    return held_out_documents, skipped


def _selected(source: Source, settings: Settings, limit: int | None, counts: Counts) -> Iterator[str]:
    return documents(source, sample_rate=settings.sample_rate, limit=limit, seed=settings.seed, counts=counts)


def _spool(spool: _Spool, texts: Iterator[str], clock: _Clock) -> None:
    for text in texts:
        spool.add(text)
        clock.report("read", len(spool), spool.bytes)


def _split(spool: _Spool, held_out_documents: int, settings: Settings) -> tuple[np.ndarray, np.ndarray, int]:
    """Numbers of the training and of the validation documents in stored order, and of duplicates left out."""
    hashes = spool.hashes
    order = np.argsort(_mixed(np.arange(len(hashes), dtype=np.uint64), settings.seed), kind="stable")
    if held_out_documents:
        chosen = order < held_out_documents
    else:
        chosen = _held_out(hashes, settings.valid_fraction or VALID_FRACTION)[order]
    valid, train = order[chosen], order[~chosen]
    once = np.sort(np.unique(hashes[valid], return_index=True)[1])
    train = train[~np.isin(hashes[train], hashes[valid])]
    if not len(train) or not len(once):
        raise UserError(_one_sided(len(hashes), bool(held_out_documents)))
    return train, valid[once], len(hashes) - len(train) - len(once)


def _held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are validation. With few documents, the nearest one goes to a side that would be empty."""
    threshold = np.uint64(min(fraction * 2.0**64, 2.0**64 - 2048))
    lowest, highest = hashes.min(), hashes.max()
    return hashes < min(max(threshold, lowest + np.uint64(1)), highest)


def _mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood 2014) of each number: pseudo-random keys that no library version changes."""
    key = int.from_bytes(hashlib.blake2b(f"order {seed}".encode(), digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):
        return scrambled((numbers + np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15))


def _one_sided(count: int, explicit: bool) -> str:
    if explicit:
        return "valid holds every document of the sources, so none is left for training; give other text as valid"
    found = "only one short document" if count == 1 else f"{count} documents that are all the same"
    return (
        f"the sources give {found}, and training and validation need one each; "
        "give more text, or separate the documents with lines <|endoftext|>"
    )


def _learn(spool: _Spool, train: np.ndarray, vocab_size: int, clock: _Clock) -> Tokenizer:
    """A tokenizer from an even sample of the training documents."""
    clock.report("tokenizer", len(train), 0)
    sampled, size = 0, 0
    while sampled < len(train) and size < SAMPLE_BYTES:
        size += spool.ends[train[sampled] + 1] - spool.ends[train[sampled]]
        sampled += 1
    return Tokenizer.train((spool.text(number).decode() for number in train[:sampled]), vocab_size)


def _text_bytes(spool: _Spool, numbers: np.ndarray) -> int:
    return int(np.diff(np.array(spool.ends, dtype=np.uint64))[numbers].sum())


class _Encoder:
    """Writes splits from the spool."""

    def __init__(
        self, folder: Path, spool: _Spool, tokenizer: Tokenizer, threads: int, clock: _Clock, total: int
    ) -> None:
        self._folder, self._spool, self._tokenizer = folder, spool, tokenizer
        self._threads, self._clock, self._total = threads, clock, total
        self._documents = self._done = 0

    def write(
        self, split: Literal["train", "valid"], numbers: np.ndarray, auditor: Auditor | None = None
    ) -> SplitRecord:
        """Encode the documents in this order into shards, and show them to an auditor."""
        writer = ShardWriter(self._folder, split, self._tokenizer.vocab_size)
        digest = hashlib.sha256()
        size = 0
        try:
            for batch in self._batches(numbers):
                writer.add(*self._tokenizer.encode_documents(batch, self._threads))
                size += sum(map(len, batch))
                if auditor:
                    auditor.add_all(batch)
                if split == "valid":
                    digest.update(b"\0".join([*batch, b""]))
                self._advance(batch)
            shards = writer.close()
        except BaseException:
            writer.abandon()
            raise
        return _split_record(shards, size, digest.hexdigest() if split == "valid" else None)

    def _batches(self, numbers: np.ndarray) -> Iterator[list[bytes]]:
        """Texts of about BATCH_BYTES together."""
        batch: list[bytes] = []
        size = 0
        for number in numbers:
            batch.append(self._spool.text(number))
            size += len(batch[-1])
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _advance(self, batch: list[bytes]) -> None:
        self._documents += len(batch)
        self._done += sum(map(len, batch))
        self._clock.report("encode", self._documents, self._done, self._total)


def _split_record(shards: list[ShardRecord], text_bytes: int, text_sha256: str | None) -> SplitRecord:
    return SplitRecord(
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=text_bytes,
        text_sha256=text_sha256,
        shards=shards,
    )


def _result(folder: Path, manifest: Manifest, clock: _Clock) -> PrepareResult:
    train, valid = manifest.train, manifest.valid
    size, seconds = train.text_bytes + valid.text_bytes, clock.seconds
    return PrepareResult(
        out=str(folder),
        train_documents=train.documents,
        valid_documents=valid.documents,
        train_tokens=train.tokens,
        valid_tokens=valid.tokens,
        train_bytes=train.text_bytes,
        valid_bytes=valid.text_bytes,
        vocab_size=manifest.vocab_size,
        bytes_per_token=round(size / (train.tokens + valid.tokens), 4),
        seconds=round(seconds, 3),
        megabytes_per_second=round(size / 1e6 / seconds, 3),
        fingerprint=manifest.fingerprint,
        leaks=manifest.leaks.model_dump() if manifest.leaks else None,
    )
