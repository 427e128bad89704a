"""From sources to a dataset folder: read, split, learn the vocabulary, encode, write.

It knows nothing of models and training, and of formats and hubs only what `sources` tells it.

1. Every document is copied once to a spool (`spool`), a file that gives documents back in a seeded random order; memory
   keeps 16 bytes for each validation document. A 64-bit hash of its text and the seed decides its side, so equal texts
   fall on the same one. Texts of the validation side occur there once, and nowhere in training.
2. The tokenizer learns from the first 20 MB of training text in the random order: an even sample of everything.
3. Batches of documents are encoded on all threads and appended to shards. The first 50 MB of training are compared with
   validation on the way (`duplicates`), and what resembles it stands in the manifest, which comes last.

Several machines do the same with their shares of the documents, and `parts` makes one dataset of what they wrote.

The result depends on the documents and the settings, never on the number of workers. An interrupted prepare leaves no
manifest; the next one removes what it finds and starts again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smalllm.config import UserError
from smalllm.data.duplicates import Auditor, compared
from smalllm.data.parts import Part, PartManifest, clear, merge, tidy
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
    token_dtype,
)
from smalllm.data.sources import Counts, Source, documents, open_source, passages, share
from smalllm.data.spool import Document, Spool, keys
from smalllm.files import FileSystem
from smalllm.locks import Lock, holder
from smalllm.tokenizer import MAX_PIECES, Tokenizer

VOCAB_SIZE = 4096
VALID_FRACTION = 0.02
SAMPLE_BYTES = 20_000_000
BATCH_BYTES = 4_000_000
AUDIT_BYTES = 50_000_000  # of training text; `duplicates.audit` compares everything
REPORT_SECONDS = 0.1
LOCK = ".lock"
OURS = re.compile(
    r"\.lock(-beat)?|\.spool|manifest\.json|tokenizer\.model|floors\.json|(train|valid)-\d{5}\.bin|\.tmp-.+-\d+|\..+\.tmp"
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
    shard: str | None = None  # which of several parts was asked for, such as "2/5"
    complete: bool = True  # else the figures are those of this part alone, and there is no dataset yet
    missing: list[str] = field(default_factory=list)  # the parts that are not made yet


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
    shard: str | None = None,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> PrepareResult:
    """Make the dataset folder `out` from `sources`.

    Validation comes from `valid`; else from the source's own validation (tinystories, storyworld), unless
    `valid_fraction` is given; else a fraction (0.02) of the documents is held out. A single document, such as a book,
    is first cut into passages. `num_files`, `sample_rate` and `limit` apply to `sources` only. The vocabulary is that of a
    given `tokenizer`, or `vocab_size` pieces (4,096 unless given) are learned. If `out` already holds the dataset of these settings it is kept
    (`reused`).

    `shard` such as "2/5" makes the second of five parts of the dataset, from a fifth of the sources, with a `tokenizer` that
    all parts share. Who finishes last makes one dataset of them; until then the figures are those of the part (`complete`).

    Raises UserError for every mistake of the user.
    """
    part = Part.parse(shard) if shard is not None else Part(1, 1)
    given = Tokenizer.load(tokenizer) if tokenizer else None
    if given and vocab_size not in (None, given.vocab_size):
        raise UserError(f"vocab_size={vocab_size} but {tokenizer} has {given.vocab_size} pieces; leave vocab_size out")
    settings = Settings(
        VOCAB_SIZE if vocab_size is None else vocab_size, valid_fraction, num_files, sample_rate, limit, seed
    )
    _check_settings(sources, valid, settings, workers)
    clock = _Clock(progress)
    if part.of > 1:
        return _prepare_part(part, sources, Path(out), valid, given, settings, workers or _cores(), clock)
    opened = [open_source(source, num_files=num_files) for source in sources]
    held_out = _validation_source(opened, valid, valid_fraction)
    with _locked(Path(out)) as folder:
        description = _describe(opened, held_out, settings, given)
        if (folder / MANIFEST).exists():
            return _reuse(folder, description, clock)
        _clear(folder)
        with _cleared_on_failure(folder, lambda: _clear(folder)):
            return _make(folder, opened, held_out, description, given, workers or _cores(), settings, clock)


def _prepare_part(
    part: Part,
    sources: Sequence[str],
    out: Path,
    valid: str | None,
    given: Tokenizer | None,
    settings: Settings,
    threads: int,
    clock: _Clock,
) -> PrepareResult:
    """Make one of several parts, unless it is there, and one dataset of all if this was the last one missing."""
    if given is None:
        learn = f"smalllm prepare {shlex.join(sources)} --limit 20000 --out FOLDER"
        raise UserError(
            f"shard={part} needs one tokenizer for all parts; "
            f"learn it with `{learn}` and add --tokenizer FOLDER/{TOKENIZER}"
        )
    if settings.limit is not None:
        raise UserError(
            f"limit={settings.limit} counts the documents of all parts, which shard={part} does not know; "
            "use sample_rate or num_files"
        )
    opened = [share(source, *part, num_files=settings.num_files) for source in sources]
    held_out = _validation_source(opened, valid, settings.valid_fraction)
    description = _describe(opened, held_out, settings, given, part)
    with _locked(out, f"{LOCK}-{part.label}") as folder:
        if (folder / MANIFEST).exists():
            made = None
        elif (folder / part.manifest).exists():
            made = PartManifest.load(folder, part.manifest)
            _check_part(made, description, given, folder, part)
        else:
            clear(folder, part)
            with _cleared_on_failure(folder, lambda: clear(folder, part)):
                made = _make_part(folder, part, opened, held_out, description, given, threads, settings, clock)
        return replace(_finish(folder, part, made, description, given, clock), shard=str(part))


def _finish(
    folder: Path, part: Part, made: PartManifest | None, description: _Description, given: Tokenizer, clock: _Clock
) -> PrepareResult:
    """The dataset of all parts, if they are there and nobody else is making it; else the figures of this part."""
    missing, done = part.missing(folder), (folder / MANIFEST).exists()
    result = None
    if (done or not missing) and (lock := Lock.acquire(folder / LOCK)):
        try:
            if made and not (folder / MANIFEST).exists():
                with _cleared_on_failure(folder):
                    manifest, duplicates, empty = merge(folder, part, given, AUDIT_BYTES)
                rate = _result(folder, made, clock).megabytes_per_second
                result = replace(_result(folder, manifest, clock), duplicates=duplicates, empty=empty)
                result = replace(result, megabytes_per_second=rate)
            tidy(folder, part)
        finally:
            lock.release(remove=True)
    if result:
        return result
    if made is None or (folder / MANIFEST).exists():  # another one was faster
        return _reuse(folder, description, clock)
    figures = replace(_result(folder, made, clock), duplicates=made.duplicates, empty=made.empty, fingerprint="")
    return replace(figures, complete=False, missing=[str(other) for other in missing])


def _make_part(
    folder: Path,
    part: Part,
    sources: list[Source],
    held_out: Source | None,
    description: _Description,
    given: Tokenizer,
    threads: int,
    settings: Settings,
    clock: _Clock,
) -> PartManifest:
    """Write the shards of one part and its manifest."""
    for other in part.fellows:  # a mistake is found now, and not when all are done
        if (folder / other.manifest).exists():
            known = PartManifest.load(folder, other.manifest)
            _check_part(known, description, given, folder, part)
    with closing(_Corpus(folder, settings, bool(held_out))) as corpus:
        empty = _fill(corpus, sources, held_out, settings, clock, part)
        encoder = _Encoder(folder, corpus, given, threads, clock, f"-{part.label}")
        made = PartManifest(
            **_origin(description, given),
            valid=encoder.write("valid", corpus.valid()),
            train=encoder.write("train", corpus.train()),
            part=part.number,
            parts=part.of,
            duplicates=0,
            empty=empty,
        )
        left_out = len(corpus) - made.train.documents - made.valid.documents
        made = made.model_copy(update={"duplicates": left_out})
    FileSystem().sync_folder(folder)
    made.save(folder, part.manifest)
    return made


def _check_part(made: PartManifest, description: _Description, given: Tokenizer, folder: Path, part: Part) -> None:
    """UserError unless a part that is there is of the dataset that was asked for."""
    known = (made.sources, made.inputs, made.settings, made.tokenizer_fingerprint)
    if known != (description.sources, description.inputs, description.settings, given.fingerprint):
        raise UserError(
            f"out={folder} has part {made.part}/{made.parts} of other settings, sources or another tokenizer than "
            f"shard={part}; give all machines the same command but for --shard, and a new folder"
        )


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


def _describe(
    sources: list[Source], valid: Source | None, settings: Settings, given: Tokenizer | None, part: Part | None = None
) -> _Description:
    """What the manifest says. Where machines share the sources, none reads all files, so that these have the SHA-256 that
    the hub tells, or none."""
    everything = [*sources, valid] if valid else sources
    read = [
        InputRecord(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path) if part is None else None)
        for source in everything
        for path in source.paths
    ]
    shared = [
        InputRecord(name=file.name, bytes=file.bytes, sha256=file.sha256)
        for source in everything
        for file in source.files
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
    if part is not None:
        fields["parts"] = part.of
    names = [source.name for source in sources]
    repeatable = all(source.name != "-" for source in everything)
    return _Description(names, shared + read, {**fields, "seed": settings.seed}, repeatable)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- the folder


@contextmanager
def _locked(folder: Path, name: str = LOCK) -> Iterator[Path]:
    """Create the folder and keep other prepares out of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock.acquire(folder / name)
    except OSError as error:
        raise UserError(f"out={folder} cannot be written ({error.strerror}); choose another folder") from None
    if lock is None:
        raise UserError(
            f"out={folder} is being written by another prepare, process {holder(folder / name)}; wait for it or choose another"
            " folder"
        )
    try:
        yield folder
    finally:
        lock.release(remove=True)
        with suppress(OSError):
            folder.rmdir()  # a folder that got nothing should not stay


@contextmanager
def _cleared_on_failure(folder: Path, clear: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Remove what was made when making fails, and say what is wrong with the disk."""
    try:
        yield
    except BaseException as error:
        clear()
        if isinstance(error, OSError):  # reading errors are UserErrors already
            raise UserError(f"out={folder} cannot be written ({error.strerror}); free space or change it") from None
        raise


def _clear(folder: Path) -> None:
    """Remove what an interrupted prepare left; never anything else."""
    names = sorted(path.name for path in folder.iterdir())
    if foreign := [name for name in names if not OURS.fullmatch(name)]:
        raise UserError(f"out={folder} holds other files (first: {foreign[0]}); choose a new or empty folder")
    for name in names:
        if not name.startswith(LOCK):
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


class _Corpus:
    """All documents in two spools, one of each side, in one random order; memory has 16 bytes for each validation document.
    Validation has a source of its own (`held_out`), or is a fraction of the documents."""

    def __init__(self, folder: Path, settings: Settings, held_out: bool) -> None:
        self._folder, self._held_out = folder, held_out
        fraction = settings.valid_fraction or VALID_FRACTION
        self._limit = 0 if held_out else int(min(fraction * 2.0**64, 2.0**64 - 2048))  # marks below it are validation
        self._secret = f"smalllm {settings.seed}".encode()
        self._seed = settings.seed
        self._begin()

    def hold_out(self, text: str) -> None:
        """A document of validation."""
        self._put(self._document(text), valid=True)

    def know(self, text: str) -> None:
        """A document that another machine puts on the validation side."""
        self._valid_marks.append(self._mark(text.encode()))
        self._valid_keys.append(0)

    def add(self, text: str) -> None:
        """A document of the sources; its text decides its side."""
        document = self._document(text)
        self._put(document, valid=document.mark < self._limit)

    def settle(self) -> None:
        """After the last document: with few of them, the nearest one goes to a side that would be empty. UserError where
        that cannot be."""
        if not self._held_out and len(self) and not (self._train.documents and self._valid.documents):
            marks = [document.mark for spool in self._spools for bucket in spool.buckets() for document in bucket]
            self._divide(min(max(self._limit, min(marks) + 1), max(marks)))
        if not self._valid.documents or next(self.train(), None) is None:
            raise UserError(_one_sided(len(self), self._held_out))

    def cut_only_document(self) -> None:
        """Replace a single document by its passages: a book becomes a corpus."""
        text = next(bucket[0].text for spool in self._spools for bucket in spool.buckets()).decode()
        self.close()
        self._begin()
        for passage in passages(text):
            self.add(passage)

    def valid(self) -> Iterator[bytes]:
        """The texts of validation in stored order, each once."""
        copies = self._copies()
        for bucket in self._valid.buckets():
            for document in bucket:
                self.passed += len(document.text)
                if document.key not in copies:
                    yield document.text

    def train(self) -> Iterator[bytes]:
        """The texts of training in stored order, without those of a validation source."""
        known = np.unique(np.frombuffer(self._valid_marks, np.uint64)) if self._held_out else None
        for bucket in self._train.buckets():
            left_out = [False] * len(bucket)
            if known is not None:
                left_out = np.isin(np.array([document.mark for document in bucket], np.uint64), known).tolist()
            for document, copy in zip(bucket, left_out, strict=True):
                self.passed += len(document.text)
                if not copy:
                    yield document.text

    def close(self) -> None:
        """Give the disk back."""
        for spool in self._spools:
            spool.close()

    @property
    def text_bytes(self) -> int:
        return self._train.text_bytes + self._valid.text_bytes

    def __len__(self) -> int:
        return self._train.documents + self._valid.documents

    @property
    def _spools(self) -> tuple[Spool, Spool]:
        return self._train, self._valid

    def _begin(self) -> None:
        self._train, self._valid = Spool(self._folder), Spool(self._folder)
        self._keys = keys(self._seed)
        self._valid_marks, self._valid_keys = array("Q"), array("Q")
        self.passed = 0  # bytes of text that `valid` and `train` have gone by; who encodes begins at 0

    def _document(self, text: str) -> Document:
        data = text.encode()
        return Document(next(self._keys), self._mark(data), data)

    def _mark(self, data: bytes) -> int:
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self._secret).digest(), "little")

    def _put(self, document: Document, valid: bool) -> None:
        (self._valid if valid else self._train).add(document)
        if valid:
            self._valid_marks.append(document.mark)
            self._valid_keys.append(document.key)

    def _divide(self, limit: int) -> None:
        """Divide the documents anew."""
        spools = self._spools
        self._begin()
        for spool in spools:
            for bucket in spool.buckets():
                for document in bucket:
                    self._put(document, document.mark < limit)
            spool.close()

    def _copies(self) -> set[int]:
        """The keys of validation documents whose text stands there already."""
        order = np.lexsort((self._valid_keys, self._valid_marks))
        marks = np.array(self._valid_marks, np.uint64)[order]
        again = order[1:][marks[1:] == marks[:-1]]
        return set(np.array(self._valid_keys, np.uint64)[again].tolist())


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
    with closing(_Corpus(folder, settings, bool(held_out))) as corpus:
        empty = _fill(corpus, sources, held_out, settings, clock)
        tokenizer = given or _learn(corpus, settings.vocab_size, clock)
        tokenizer.save(folder / TOKENIZER)
        texts = list(compared(corpus.valid()))
        encoder = _Encoder(folder, corpus, tokenizer, threads, clock)
        auditor = Auditor(texts.__getitem__, len(texts), seed=settings.seed, most_bytes=AUDIT_BYTES)
        manifest = Manifest(
            **_origin(description, tokenizer),
            valid=encoder.write("valid", corpus.valid()),
            train=encoder.write("train", corpus.train(), auditor),
            leaks=auditor.finish(),
        )
        left_out = len(corpus) - manifest.train.documents - manifest.valid.documents
    FileSystem().sync_folder(folder)
    manifest.save(folder)
    return replace(_result(folder, manifest, clock), duplicates=left_out, empty=empty)


def _origin(description: _Description, tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields of a manifest that say what made it."""
    return {
        "sources": description.sources,
        "inputs": description.inputs,
        "settings": description.settings,
        "seed": description.settings["seed"],
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }


def _fill(
    corpus: _Corpus,
    sources: list[Source],
    held_out: Source | None,
    settings: Settings,
    clock: _Clock,
    part: Part | None = None,
) -> int:
    """Spool the validation documents, then the others; how many empty documents were left out. The first of several parts
    keeps the validation documents, the others only know them."""
    skipped = 0
    if held_out:
        counts = Counts()
        keep = corpus.hold_out if part is None or part.number == 1 else corpus.know
        _spool(corpus, keep, documents(held_out, seed=settings.seed, counts=counts), clock)
        skipped = counts.empty if keep == corpus.hold_out else 0
    left = settings.limit
    for source in sources:
        counts = Counts()
        _spool(corpus, corpus.add, _selected(source, settings, left, counts), clock)
        skipped += counts.empty
        left = left - counts.kept if left is not None else None
        if left == 0:
            break
    if part is None:
        if held_out is None and len(corpus) == 1:
            corpus.cut_only_document()
        corpus.settle()
    return skipped


def _selected(source: Source, settings: Settings, limit: int | None, counts: Counts) -> Iterator[str]:
    return documents(source, sample_rate=settings.sample_rate, limit=limit, seed=settings.seed, counts=counts)


def _spool(corpus: _Corpus, keep: Callable[[str], None], texts: Iterator[str], clock: _Clock) -> None:
    for text in texts:
        keep(text)
        clock.report("read", len(corpus), corpus.text_bytes)


def _one_sided(count: int, explicit: bool) -> str:
    if explicit:
        return "valid holds every document of the sources, so none is left for training; give other text as valid"
    found = "only one short document" if count == 1 else f"{count} documents that are all the same"
    return (
        f"the sources give {found}, and training and validation need one each; "
        "give more text, or separate the documents with lines <|endoftext|>"
    )


def _learn(corpus: _Corpus, vocab_size: int, clock: _Clock) -> Tokenizer:
    """A tokenizer from an even sample of the training documents."""
    clock.report("tokenizer", len(corpus), 0)
    sample: list[str] = []
    size = 0
    for text in corpus.train():
        sample.append(text.decode())
        size += len(text)
        if size >= SAMPLE_BYTES:
            break
    return Tokenizer.train(sample, vocab_size)


class _Encoder:
    """Writes splits from the spools."""

    def __init__(
        self, folder: Path, corpus: _Corpus, tokenizer: Tokenizer, threads: int, clock: _Clock, label: str = ""
    ) -> None:
        self._folder, self._corpus, self._tokenizer, self._label = folder, corpus, tokenizer, label
        self._threads, self._clock = threads, clock
        self._documents = corpus.passed = 0

    def write(
        self, split: Literal["train", "valid"], texts: Iterator[bytes], auditor: Auditor | None = None
    ) -> SplitRecord:
        """Encode the documents in this order into shards, and show them to an auditor."""
        writer = ShardWriter(self._folder, split + self._label, self._tokenizer.vocab_size)
        digest = hashlib.sha256()
        size = 0
        try:
            for batch in _batches(texts):
                writer.add(*self._tokenizer.encode_documents(batch, self._threads))
                size += sum(map(len, batch))
                if auditor:
                    auditor.add_all(batch)
                if split == "valid":
                    digest.update(b"\0".join([*batch, b""]))
                self._advance(len(batch))
            self._advance(0)
            shards = writer.close()
        except BaseException:
            writer.abandon()
            raise
        return _split_record(shards, size, digest.hexdigest() if split == "valid" else None)

    def _advance(self, documents: int) -> None:
        self._documents += documents
        self._clock.report("encode", self._documents, self._corpus.passed, self._corpus.text_bytes)


def _batches(texts: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Texts of about BATCH_BYTES together."""
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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
        bytes_per_token=round(size / max(1, train.tokens + valid.tokens), 4),
        seconds=round(seconds, 3),
        megabytes_per_second=round(size / 1e6 / seconds, 3),
        fingerprint=manifest.fingerprint,
        leaks=manifest.leaks.model_dump() if manifest.leaks else None,
    )
