"""Several machines, one dataset: who makes which part, and how the parts become one.

It knows dataset folders and nothing of sources and text files. Part 2 of 5 leaves in the folder

    train-0002-of-0005-00000.bin ...    its training documents, in a random order of its own
    valid-0002-of-0005-00000.bin ...    its validation documents
    part-0002-of-0005.json              written last: what both are

and whoever sees that all five are there makes of them

    valid-00000.bin ...                 the validation documents of all parts, each once, in an order that depends
                                        on their tokens and the seed alone
    manifest.json                       which lists the training files in turns, one of each part

and removes the parts' manifests and validation files. All of it may be killed at any time, and made again: what is written
depends on the parts alone.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple, Self

import numpy as np
from pydantic import Field

from smalllm.config import UserError
from smalllm.data.duplicates import Auditor, compared
from smalllm.data.shards import (
    TOKENIZER,
    Count,
    LeakRecord,
    Manifest,
    ShardWriter,
    SplitRecord,
    TokenSplit,
)
from smalllm.tokenizer import Tokenizer

MOST_PARTS = 9999
OURS = re.compile(  # what may stand in the folder while parts are made
    r"\.lock.*|\.tmp-.+-\d+|tokenizer\.model|\.?valid-\d{5}\.bin(\.tmp)?|"
    r"\.?(train|valid)-\d{4}-of-\d{4}-\d{5}\.bin(\.tmp)?|part-\d{4}-of-\d{4}\.json"
)


class Part(NamedTuple):
    """One of several parts; the first one is number 1.

    >>> Part.parse("2/5").label
    '0002-of-0005'
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "2/5"; UserError for what is no part."""
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text.strip())
        number, of = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= number <= of <= MOST_PARTS:
            raise UserError(
                f"shard={text} is not one of n parts; "
                f"the first of 4 machines gives 1/4, the last 4/4 (at most {MOST_PARTS} parts)"
            )
        return cls(number, of)

    @property
    def label(self) -> str:
        return f"{self.number:04d}-of-{self.of:04d}"

    @property
    def manifest(self) -> str:
        """The name of its manifest."""
        return f"part-{self.label}.json"

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def fellows(self) -> list[Part]:
        """All parts, this one among them."""
        return [Part(number, self.of) for number in range(1, self.of + 1)]

    def missing(self, folder: Path) -> list[Part]:
        """The parts that are not done yet."""
        return [part for part in self.fellows if not (folder / part.manifest).exists()]


class PartManifest(Manifest):
    """What one machine made, and how many documents it left out: copies of validation documents, and empty ones."""

    part: Annotated[int, Field(ge=1, le=MOST_PARTS)]
    parts: Annotated[int, Field(ge=1, le=MOST_PARTS)]
    duplicates: Count
    empty: Count

    def check_fellow(self, other: PartManifest, out: Path) -> None:
        """UserError unless another part belongs to the same dataset."""
        for name in ("sources", "inputs", "settings", "tokenizer_fingerprint"):
            if getattr(self, name) != getattr(other, name):
                what = {"inputs": "other files", "tokenizer_fingerprint": "another tokenizer"}.get(
                    name, f"other {name}"
                )
                raise UserError(
                    f"out={out} has part {other.part}/{other.parts} from {what} than part {self.part}/{self.parts}; "
                    "give the same command everywhere, with another --shard alone, and a new folder"
                )


def clear(folder: Path, part: Part) -> None:
    """Remove what an interrupted prepare left of a part. UserError for files of anybody else."""
    names = sorted(path.name for path in folder.iterdir())
    labels = re.compile(r"part-(\d{4})-of-(\d{4})\.json|\.?(?:train|valid)-(\d{4})-of-(\d{4})-.*")
    for name in names:
        if not OURS.fullmatch(name):
            raise UserError(f"out={folder} holds other files (first: {name}); choose a new or empty folder")
        if (match := labels.fullmatch(name)) and int(match[2] or match[4]) != part.of:
            raise UserError(
                f"out={folder} holds a part of another number of parts ({name}) than shard={part}; "
                "give all machines the same number, or choose a new folder"
            )
    for name in names:
        if part.label in name and not name.startswith(".lock"):
            (folder / name).unlink()


def merge(folder: Path, part: Part, tokenizer: Tokenizer, audit_bytes: int) -> tuple[Manifest, int, int]:
    """Make one dataset of all parts: its manifest, and how many copies and empty documents were left out.

    The caller sees to it that no other process does the same, and removes the parts with `tidy`. UserError when the parts
    do not belong together, or a side is empty."""
    parts = [PartManifest.load(folder, fellow.manifest) for fellow in part.fellows]
    for other in parts[1:]:
        parts[0].check_fellow(other, folder)
    if not any(made.train.documents for made in parts) or not any(made.valid.documents for made in parts):
        raise UserError(
            f"out={folder} has too few documents for {part.of} parts: one side is empty; "
            "delete the folder and leave --shard out"
        )
    tokenizer.save(folder / TOKENIZER)
    pieces = [tokenizer.bytes_of(id) for id in range(tokenizer.vocab_size)]
    common = parts[0].model_dump(
        exclude={"part", "parts", "duplicates", "empty", "created_with", "train", "valid", "leaks"}
    )
    common["inputs"] = parts[0].inputs
    train, valid = _in_turns([made.train for made in parts]), _merge_valid(folder, parts, pieces)
    manifest = Manifest(**common, train=train, valid=valid)
    stored = TokenSplit("valid", folder, valid, manifest).iterate_documents()
    leaks = _audit(folder, parts, list(compared(_text(ids, pieces) for ids in stored)), pieces, audit_bytes)
    manifest = manifest.model_copy(update={"leaks": leaks})
    left_out = sum(made.duplicates + made.valid.documents for made in parts) - valid.documents
    manifest.save(folder)
    return manifest, left_out, sum(made.empty for made in parts)


def tidy(folder: Path, part: Part) -> None:
    """Remove what is of no use any more when there is a manifest.json."""
    for fellow in part.fellows:
        with suppress(FileNotFoundError):
            (folder / fellow.manifest).unlink()
    for path in folder.glob("valid-????-of-????-?????.bin"):
        path.unlink(missing_ok=True)


def _in_turns(splits: Sequence[SplitRecord]) -> SplitRecord:
    """The files of all splits: the first of each, then the second of each."""
    shards = sorted(
        ((number, shard) for split in splits for number, shard in enumerate(split.shards)), key=lambda s: s[0]
    )
    return SplitRecord(
        documents=sum(split.documents for split in splits),
        tokens=sum(split.tokens for split in splits),
        text_bytes=sum(split.text_bytes for split in splits),
        shards=[shard for _, shard in shards],
    )


# -- validation


def _merge_valid(folder: Path, parts: Sequence[PartManifest], pieces: Sequence[bytes]) -> SplitRecord:
    """Write the validation documents of all parts, each once, in the order of a keyed hash. Memory holds 22 bytes for each,
    and 24 more for a moment."""
    splits = [TokenSplit("valid", folder, made.valid, made) for made in parts]
    marks, places, sizes, owners = array("Q"), array("Q"), array("I"), array("H")
    key = f"smalllm {parts[0].seed}".encode()
    for owner, split in enumerate(splits):
        place = 0
        for ids in split.iterate_documents():
            marks.append(int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8, key=key).digest(), "little"))
            places.append(place)
            sizes.append(len(ids))
            owners.append(owner)
            place += len(ids)
    once = np.unique(np.frombuffer(marks, np.uint64), return_index=True)[1]
    writer = ShardWriter(folder, "valid", parts[0].vocab_size)
    digest, size = hashlib.sha256(), 0
    try:
        for number in once.tolist():
            ids = splits[owners[number]].read(places[number], sizes[number])
            writer.add(ids, np.array([len(ids)]))
            text = _text(ids, pieces)
            digest.update(text + b"\0")
            size += len(text)
        shards = writer.close()
    except BaseException:
        writer.abandon()
        raise
    tokens = sum(shard.tokens for shard in shards)
    return SplitRecord(
        documents=len(once), tokens=tokens, text_bytes=size, text_sha256=digest.hexdigest(), shards=shards
    )


def _audit(
    folder: Path, parts: Sequence[PartManifest], valid: list[bytes], pieces: Sequence[bytes], most_bytes: int
) -> LeakRecord:
    """Compare the validation documents of all parts with the first training documents of each part, evenly."""
    with_text = [made for made in parts if made.train.shards]
    auditor = Auditor(valid.__getitem__, len(valid), seed=parts[0].seed)
    compared, stored = [0], [0]  # training documents before each part: of those compared, and of all in stored order
    for made in with_text:
        split, left, count = TokenSplit("train", folder, made.train, made), most_bytes // len(with_text), 0
        for text in (_text(ids, pieces) for ids in split.iterate_documents()):
            if left <= 0:
                break
            auditor.add_all([text])
            left, count = left - len(text), count + 1
        compared.append(compared[-1] + count)
        stored.append(stored[-1] + made.train.shards[0].documents)  # what is compared stands in the first file
    leaks = auditor.finish()
    if (worst := leaks.worst) is None:
        return leaks
    part = int(np.searchsorted(compared, worst.train, side="right")) - 1
    place = stored[part] + worst.train - compared[part]
    return leaks.model_copy(update={"worst": worst.model_copy(update={"train": place})})


def _text(ids: np.ndarray, pieces: Sequence[bytes]) -> bytes:
    return b"".join([pieces[id] for id in ids.tolist()])
