"""Documents as an iterator: built-in stories, files of several formats, standard input, the Hugging Face hub.

It knows nothing of tokens, splits or training, and it is the only module that talks to a hub. Everything streams:
memory holds one document and a buffer, whatever the size of the file.

What a document is:

    .txt      the text between lines that are exactly `<|endoftext|>`; without such a line, the whole file. Newlines at
              both ends of a document are dropped, all else is kept. A file that reaches 8 million characters without a
              separator is cut at blank lines into passages of 2,000 characters and more.
    .jsonl    each line: a string, or an object with `text`, `story` or `content`
    .json     one such value, several, or one array of them
    .csv      rows of the column `text`, `story` or `content`, or of the only column; the first row is the header
    .parquet  the same columns
    .gz .zst  any of the text formats, compressed; .tar.gz: each member in turn, never unpacked on disk

Text must be UTF-8; a byte order mark is dropped; documents of nothing but white space are skipped and counted.

Several machines may share a source (`share`). Its files, one behind the other, are cut into spans of equally many bytes,
and what begins in a span is read by its machine alone: documents of .txt and .jsonl, row groups of .parquet, and whole
files of the formats in which no place but the beginning says where a document begins. Every document is read by one
machine, and a machine reads little more than its span, of a hub too.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import re
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self, cast

from smalllm.config import UserError
from smalllm.untrusted import printable

CHUNK_BYTES = 1 << 20
# A line of its own. The place before it is looked at last, because text that begins a pattern is found much faster.
SEPARATOR = re.compile(r"<\|endoftext\|>(?<![^\n]<\|endoftext\|>)\r?$\n?", re.MULTILINE)
BLANK_LINES = re.compile(r"(?:\r?\n){2,}")
BORDERS = (BLANK_LINES, re.compile(r"\n"), re.compile(r"(?<=[.!?])\s"), re.compile(r"\s"))
FIELDS = ("text", "story", "content")
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
PACKED = (".gz", ".zst")
READABLE = (*SUFFIXES, *(suffix + packed for suffix in SUFFIXES[:-1] for packed in PACKED), ".tar.gz", ".tgz")
PASSAGE_CHARACTERS = 2_000
UNSEPARATED_CHARACTERS = 8_000_000
SEPARATED_BYTES = 4_000_000  # of a .txt file, in which its first separator must stand if machines are to share the file
LONGEST_DOCUMENT = 1 << 28  # characters; a compressed bomb must end as an error
LONGEST_VALUE = 1 << 26  # characters of a value of a .json file, of which several copies are in memory
HEAD_BYTES = 8192
SEPARATOR_LINE = re.compile(rb"(?<![^\n])<\|endoftext\|>\r?\n")
NEWLINE = re.compile(rb"\n")
LONGEST_BORDER = 16  # bytes: a separator and what must stand before it
SCAN_BYTES = 1 << 16  # in which it is looked for at once
RANGE_BYTES = 1 << 22  # asked of a hub at once
MOST_MEMBERS = 200_000  # of an archive, of whatever kind
LONGEST_HEADER = 1 << 16  # bytes of an archive that say what an entry is called
DEFAULT_STORIES = 100_000
WORLDS = {"storyworld": False, "storyworld-small": True}  # whether it is the small one
HELD_OUT_START = 1_000_000_000  # validation stories of storyworld are numbered from here, whatever the size of training
TINYSTORIES = "hf://datasets/roneneldan/TinyStories/TinyStoriesV2-GPT4-{}.txt"
INSTEAD = "use `storyworld`, which is built in, or give a local file"


@dataclass(frozen=True)
class Source:
    """An origin of documents. `name` identifies it without folders of this machine; `validation` names its official
    validation source, if it has one."""

    name: str
    paths: tuple[Path, ...] = ()
    stories: range | None = None
    small: bool = False  # the story world that has few words
    validation: str | None = None
    members: int | None = None  # of each archive, the first so many
    stretches: tuple[Stretch, ...] | None = None  # of files, for one of several machines; then `paths` is empty
    files: tuple[FileEntry, ...] = ()  # that all machines share

    @property
    def shared(self) -> bool:
        """Whether this is one machine's share, which may be empty."""
        return self.stretches is not None


@dataclass(frozen=True)
class FileEntry:
    """A file that is read: its name without folders, its size in bytes, and its SHA-256 if somebody has told."""

    name: str
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Stretch:
    """What begins at the bytes `start` to `end` - 1 of a file."""

    file: Path | _HubFile
    start: int
    end: int
    whole: bool = False  # which is all of the file


class Readable(Protocol):
    """What documents are read from."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes; none at the end."""


@dataclass
class Counts:
    """What became of the documents of a source."""

    read: int = 0
    empty: int = 0
    left_out: int = 0  # by sample_rate

    @property
    def kept(self) -> int:
        return self.read - self.empty - self.left_out


@dataclass
class _Text:
    """Collects one document over many chunks."""

    name: str
    parts: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, part: str) -> None:
        self.parts.append(part)
        self.size += len(part)
        if self.size > LONGEST_DOCUMENT:
            raise UserError(_too_long(self.name))

    def take(self) -> str:
        text = "".join(self.parts)
        self.parts, self.size = [], 0
        return text


def _too_long(name: str, most: int = LONGEST_DOCUMENT) -> str:
    return (
        f"{name} holds a line or document of more than {most} characters; "
        "separate its documents with lines <|endoftext|>"
    )


# -- the whole of it


def documents(
    source: str | Source,
    *,
    num_files: int | None = None,
    sample_rate: float = 1.0,
    limit: int | None = None,
    seed: int = 42,
    counts: Counts | None = None,
) -> Iterator[str]:
    """The documents of a source in its own order.

    `sample_rate` keeps a document by a hash of (seed, its text), `limit` ends after so many kept ones, `num_files`
    takes the first files of a folder, glob, hub repository or archive. Raises UserError for what cannot be read, and where
    there is nothing, but for one machine's share.
    """
    _check_selection(sample_rate, limit, num_files)
    source = open_source(source, num_files=num_files) if isinstance(source, str) else source
    counts = Counts() if counts is None else counts
    for text in _read(source, seed):
        counts.read += 1
        if not text or text.isspace():
            counts.empty += 1
        elif sample_rate < 1.0 and not _sampled(seed, text, sample_rate):
            counts.left_out += 1
        else:
            yield text
            if counts.kept == limit:
                return
    if counts.kept == 0 and not source.shared:
        raise UserError(_nothing(source, counts, sample_rate))


def open_source(source: str, *, num_files: int | None = None) -> Source:
    """Find what a SOURCE word names, downloading from the hub what is not cached; UserError when there is none."""
    _check_selection(1.0, None, num_files)
    word, _, rest = source.partition(":")
    if word in WORLDS or source == "-":
        if num_files is not None:
            raise UserError(f"num_files={num_files} does not apply to the source {source}; leave it out or use limit")
        return Source("-") if source == "-" else _storyworld(word, rest)
    if source == "tinystories":
        return _hub_source("tinystories", TINYSTORIES.format("train"), num_files, TINYSTORIES.format("valid"))
    if source.startswith("hf://"):
        return _hub_source(source, source, num_files, None)
    return Source(Path(source).name or "folder", tuple(_local_paths(source)[:num_files]), members=num_files)


def share(source: str, part: int, parts: int, *, num_files: int | None = None) -> Source:
    """One machine's part of a source, from 1 to `parts`; UserError for standard input. No file is read for it."""
    assert 1 <= part <= parts
    _check_selection(1.0, None, num_files)
    if source == "-":
        raise UserError("source - (standard input) cannot be shared by several machines; write it to a file first")
    found, files = _shareable(source, num_files)
    if found.stories is not None:
        count, start = len(found.stories), found.stories.start
        mine = range(start + count * (part - 1) // parts, start + count * part // parts)
        return replace(found, stories=mine, stretches=())
    sizes = [size for _, size, _ in files]
    first, last = (sum(sizes) * number // parts for number in (part - 1, part))
    stretches, begin = [], 0
    for (file, size, _), end in zip(files, accumulate(sizes), strict=True):
        if max(first, begin) < min(last, end):
            whole = first <= begin and end <= last
            stretches.append(Stretch(file, max(first - begin, 0), min(last - begin, size), whole))
        begin = end
    entries = tuple(FileEntry(Path(file.name).name, size, sha256) for file, size, sha256 in files)
    return replace(found, paths=(), stretches=tuple(stretches), files=entries)


def passages(text: str, size: int = PASSAGE_CHARACTERS) -> list[str]:
    """Cut a long text into pieces of `size` to 2 * `size` characters at the best border there: blank line, line,
    sentence, word, else anywhere. Newlines at the cuts are dropped."""
    pieces, start = [], 0
    while len(text) - start > 2 * size:
        end = _border(text, start + size, start + 2 * size)
        pieces.append(text[start:end])
        start = end
    pieces.append(text[start:])
    return [piece for piece in (piece.strip("\r\n") for piece in pieces) if piece]


def _border(text: str, low: int, high: int) -> int:
    found = (border.search(text, low, high) for border in BORDERS)
    return next((match.end() for match in found if match), high)


def _check_selection(sample_rate: float, limit: int | None, num_files: int | None) -> None:
    if not 0.0 < sample_rate <= 1.0:
        raise UserError(f"sample_rate={sample_rate} must be above 0 and at most 1; use 1 for all documents")
    for name, value in (("limit", limit), ("num_files", num_files)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1; leave it out for everything")


def _sampled(seed: int, text: str, rate: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=f"sample {seed}".encode()).digest()
    return int.from_bytes(digest, "big") < rate * 2.0**64


def _nothing(source: Source, counts: Counts, sample_rate: float) -> str:
    if counts.left_out:
        return f"sample_rate={sample_rate} keeps none of the {counts.left_out} documents of {source.name}; raise it"
    if source.paths and not any(path.stat().st_size for path in source.paths):
        return f"source {source.name} is empty (0 bytes); give a source with text"
    return f"source {source.name} holds no text ({counts.empty} empty documents); give a source with text"


# -- where the bytes are


def _read(source: Source, seed: int) -> Iterator[str]:
    if source.name == "-":
        yield from _read_text(sys.stdin.buffer, "standard input")
    elif source.stories is not None:
        from smalllm.data.storyworld import stories

        yield from stories(seed, source.stories.start, len(source.stories), source.small)
    for path in source.paths:
        yield from _read_path(path, source.members)
    for stretch in source.stretches or ():
        yield from _read_stretch(stretch, source.members)


def _shareable(source: str, num_files: int | None) -> tuple[Source, list[tuple[Path | _HubFile, int, str | None]]]:
    """A source, and the files that make it up: where, how large, and their SHA-256 if the hub tells."""
    hub = TINYSTORIES.format("train") if source == "tinystories" else source
    if hub.startswith("hf://"):
        validation = TINYSTORIES.format("valid") if source == "tinystories" else None
        chosen, validation = _on_hub(hub, num_files, validation)
        return Source(source, validation=validation, members=num_files), [
            (file, _size_on_hub(file), file.sha256) for file in chosen
        ]
    found = open_source(source, num_files=num_files)
    return found, [(path, path.stat().st_size, None) for path in found.paths]


def _storyworld(world: str, rest: str) -> Source:
    """`WORLD[:STORIES[@START]]`; its validation stories are as many as 2 % of it."""
    match = re.fullmatch(r"(\d{1,9})(?:@(\d{1,12}))?", rest or str(DEFAULT_STORIES))
    if match is None or int(match[1]) == 0:
        raise UserError(f"source {world}:{rest} needs a number of stories from 1, as in {world}:{DEFAULT_STORIES}")
    count, start = int(match[1]), int(match[2] or 0)
    name = f"{world}:{count}" + (f"@{start}" if start else "")
    return Source(
        name,
        stories=range(start, start + count),
        small=WORLDS[world],
        validation=f"{world}:{count // 50 + 1}@{HELD_OUT_START}",
    )


def _local_paths(source: str) -> list[Path]:
    """The files of a path, folder (all below it) or glob, sorted by name."""
    path = Path(source)
    try:
        if path.is_dir():
            return _readable(source, [file for file in path.rglob("*") if not _hidden(file.relative_to(path))])
        if path.exists():
            return [_check_suffix(path)]
        if glob.has_magic(source):
            return _readable(source, [Path(name) for name in glob.glob(source, recursive=True)])
    except UserError:
        raise
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"source {source[:200]!r} cannot be read ({reason}); give another path") from None
    raise UserError(
        f"source {source[:200]} does not exist; give a file, a folder, a glob, `storyworld`, `tinystories` "
        "or hf://datasets/OWNER/NAME"
    )


def _readable(source: str, files: list[Path]) -> list[Path]:
    found = sorted(file for file in files if file.name.endswith(READABLE) and file.is_file())
    if not found:
        raise UserError(
            f"source {source} holds no text files; it must hold files ending in {', '.join(SUFFIXES)} or .gz"
        )
    return found


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _check_suffix(path: Path) -> Path:
    if not path.name.lower().endswith(READABLE):
        raise UserError(
            f"{path} has an unknown format; rename or convert it to one of {', '.join(SUFFIXES)}, or .gz of them"
        )
    if not path.is_file():
        raise UserError(f"{path} is not a regular file; give a file, a folder, or - for standard input")
    return path


# -- the formats


def _read_path(path: Path, members: int | None) -> Iterator[str]:
    name = path.name.lower()
    try:
        if name.endswith((".tar.gz", ".tgz")):
            yield from _read_archive(path, members)
        elif name.endswith(".parquet"):
            yield from _read_parquet(path, str(path))
        else:
            with _unpacked(path) as stream:
                yield from _read_stream(stream, str(path))
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({printable(str(error))}); get it again") from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}); check the file and its permissions"
        ) from None


def _unpacked(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.name.lower().endswith(".zst"):
        import pyarrow  # here, because it is slow to import

        return cast(BinaryIO, pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def _without_packing(name: str) -> str:
    return next((name.removesuffix(packed) for packed in PACKED if name.endswith(packed)), name)


def _read_stretch(stretch: Stretch, members: int | None) -> Iterator[str]:
    """What begins in a stretch of a file: documents, row groups, or all of a file that cannot be cut."""
    file = stretch.file
    read = None if stretch.whole else _reader(file)
    if read is None:
        if stretch.start == 0:
            yield from _read_path(file if isinstance(file, Path) else _download(file), members)
        return
    try:
        with _opened(file) as stream:
            yield from read(stream, str(file), stretch)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); check the file or the network") from None


def _reader(file: Path | _HubFile) -> Callable[[BinaryIO, str, Stretch], Iterator[str]] | None:
    """How a part of a file is read; None where only its beginning says where documents begin."""
    match Path(file.name.lower()).suffix:
        case ".parquet":
            return _read_parquet
        case ".jsonl":
            return _read_some_json_lines
        case ".txt" if _is_separated(file):
            return _read_some_text
        case _:
            return None


def _is_separated(file: Path | _HubFile) -> bool:
    try:
        with _opened(file) as stream:
            return _next_border(stream, SEPARATOR_LINE, 0, SEPARATED_BYTES) is not None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); check the file or the network") from None


def _read_some_json_lines(stream: BinaryIO, name: str, stretch: Stretch) -> Iterator[str]:
    window = _window(stream, NEWLINE, stretch)
    return _read_json_lines(window, name, window.start)


def _read_some_text(stream: BinaryIO, name: str, stretch: Stretch) -> Iterator[str]:
    window = _window(stream, SEPARATOR_LINE, stretch)
    return _read_text(window, name, window.start, separated=True)


class _Window:
    """The bytes from `start` to `end` - 1 of a stream."""

    def __init__(self, stream: BinaryIO, start: int, end: int) -> None:
        stream.seek(start)
        self.start, self._stream, self._left = start, stream, end - start

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end."""
        data = self._stream.read(min(size, self._left))
        self._left -= len(data)
        return data


def _window(stream: BinaryIO, border: re.Pattern[bytes], stretch: Stretch) -> _Window:
    """From the first document that begins in a stretch to the end of the last one."""
    start = _next_border(stream, border, stretch.start) if stretch.start else 0
    end = _next_border(stream, border, stretch.end) if start is not None else None
    return _Window(stream, 0, 0) if start is None else _Window(stream, start, sys.maxsize if end is None else end)


def _next_border(stream: BinaryIO, border: re.Pattern[bytes], place: int, within: int | None = None) -> int | None:
    """The first place from `place` on at which a document begins, because a border ends there; None if there is none, or
    none `within` so many bytes."""
    start = max(0, place - LONGEST_BORDER)
    stream.seek(start)
    data = b""
    while chunk := stream.read(SCAN_BYTES):
        data += chunk
        for match in border.finditer(data):
            known = match.start() or not start  # what stands before it
            if known and start + match.end() >= max(place, 1):
                return start + match.end()
        start, data = start + len(data[:-LONGEST_BORDER]), data[-LONGEST_BORDER:]
        if within is not None and start > place + within:
            break
    return None


def _read_stream(stream: BinaryIO, name: str) -> Iterator[str]:
    match Path(_without_packing(name.lower())).suffix:
        case ".jsonl":
            return _read_json_lines(stream, name)
        case ".json":
            return _read_json(stream, name)
        case ".csv":
            return _read_csv(stream, name)
        case _:
            return _read_text(stream, name)


def _read_archive(path: Path, members: int | None) -> Iterator[str]:
    """Each text file of a .tar.gz in turn. Names of members appear in messages only."""
    with tarfile.open(path, mode="r|gz", tarinfo=_Entry) as archive:
        number = entries = 0
        while (member := archive.next()) is not None:
            vars(archive).update(members=[], pax_headers={})  # which would grow without end
            entries += 1
            if entries > MOST_MEMBERS:
                raise UserError(f"{path} has more than {MOST_MEMBERS:,} entries; unpack it and give the folder")
            base = member.name.rpartition("/")[2]
            if not member.isfile() or base.startswith(".") or not base.endswith(SUFFIXES[:-1]):
                continue
            if members is not None and number == members:
                return
            number += 1
            stream = archive.extractfile(member)
            assert stream is not None
            yield from _read_stream(cast(BinaryIO, stream), f"{path}:{printable(member.name[-200:], 200)}")


class _Entry(tarfile.TarInfo):
    """What tarfile reads of an entry, which it believes: headers of gigabytes, and files that are mostly holes, are refused."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        entry = super().frombuf(buf, encoding, errors)
        if entry.size < 0 or (entry.type in _HEADERS and entry.size > LONGEST_HEADER):
            raise tarfile.ReadError(f"an entry of {entry.size} bytes where its name should be")
        if entry.type == tarfile.GNUTYPE_SPARSE:
            entry._refuse_holes()
        return entry

    def _refuse_holes(self, *_: object) -> None:
        raise tarfile.ReadError("it has sparse files")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_holes  # the three ways of newer archives


_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def _characters(stream: Readable, name: str, position: int = 0) -> Iterator[str]:
    """Decode UTF-8 chunk by chunk, from a position in the file on; UserError names the first byte that is not."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    while chunk := stream.read(CHUNK_BYTES):
        if position == 0:
            _check_head(chunk, name)
        text = _decode(decoder, chunk, position, name)
        yield text.removeprefix("\ufeff") if position == 0 else text
        position += len(chunk)
    _decode(decoder, b"", position, name, final=True)


def _decode(decoder: codecs.IncrementalDecoder, chunk: bytes, position: int, name: str, final: bool = False) -> str:
    pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        offset, byte = position - pending + error.start, error.object[error.start]
        raise UserError(
            f"{name} is not UTF-8 at byte offset {offset} (0x{byte:02X}); convert it, as in `iconv -f LATIN1 -t UTF-8`"
        ) from None


def _check_head(chunk: bytes, name: str) -> None:
    head = chunk[:HEAD_BYTES]
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(f"{name} is a Git LFS pointer, not the data; run `git lfs pull` or download the file itself")
    if b"\0" in head and not _without_packing(name.lower()).endswith((".csv", ".json", ".jsonl")):
        raise UserError(f"{name} is a binary file (byte 0 at offset {head.index(0)}); give text in UTF-8")


def _lines(stream: Readable, name: str, position: int = 0) -> Iterator[str]:
    r"""Lines with their "\n", and only "\n" ends one; a line of 100 MB costs no more than its length."""
    pending = _Text(name)
    for chunk in _characters(stream, name, position):
        *lines, rest = chunk.split("\n")
        for line in lines:
            pending.add(line)
            yield pending.take() + "\n"
        pending.add(rest)
    if pending.size:
        yield pending.take()


def _line_blocks(stream: Readable, name: str, position: int) -> Iterator[str]:
    """The text in blocks that end with a line's end, except the last; much faster than single lines."""
    pending = _Text(name)
    for chunk in _characters(stream, name, position):
        whole, newline, rest = chunk.rpartition("\n")
        if newline:
            pending.add(whole + newline)
            yield pending.take()
        pending.add(rest)
    yield pending.take()


def _read_text(stream: Readable, name: str, position: int = 0, *, separated: bool = False) -> Iterator[str]:
    pending, cutting = _Text(name), False
    for block in _line_blocks(stream, name, position):
        first, *others = SEPARATOR.split(block)
        pending.add(first)
        for other in others:
            yield from _finished(pending.take(), cutting)
            pending.add(other)
            separated, cutting = True, False
        if not separated and pending.size > UNSEPARATED_CHARACTERS:
            *whole, rest = _cut_at_blank_lines(pending.take())
            yield from whole
            pending.add(rest)
            cutting = True
    if text := pending.take().strip("\r\n"):
        yield from _finished(text, cutting)


def _finished(text: str, cutting: bool) -> list[str]:
    """A document without the newlines at its ends, or the last passages of a file that is being cut."""
    return [part.strip("\r\n") for part in (_cut_at_blank_lines(text) if cutting else [text])]


def _cut_at_blank_lines(text: str) -> list[str]:
    """Passages of at least PASSAGE_CHARACTERS; the last one may go on in the text that follows."""
    pieces, start = [], 0
    while match := BLANK_LINES.search(text, start + PASSAGE_CHARACTERS):
        pieces.append(text[start : match.start()].strip("\r\n"))
        start = match.end()
    return [*pieces, text[start:]]


def _read_json_lines(stream: Readable, name: str, position: int = 0) -> Iterator[str]:
    for number, line in enumerate(_lines(stream, name, position), start=1):
        if not line.isspace():
            place = f"{name} line {number}" + (f" from byte {position} on" if position else "")
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"{place} is not JSON; write one object or string per line") from None
            yield _text_of(value, place)


def _read_json(stream: BinaryIO, name: str) -> Iterator[str]:
    for number, value in enumerate(_json_values(stream, name), start=1):
        yield _text_of(value, f"{name} value {number}")


def _json_values(stream: BinaryIO, name: str) -> Iterator[Any]:
    """The items of a top-level array, or the values that follow one another, parsed from a buffer that moves along."""
    chunks = _characters(stream, name)
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    buffer, ended = "", False
    start, array = 0, False
    while True:
        start = cast(re.Match[str], space.match(buffer, start)).end()
        if not array and buffer[start : start + 1] == "[":
            start, array = start + 1, True
            continue
        if array and buffer[start : start + 1] == "]":
            return
        try:
            value, start = decoder.raw_decode(buffer, start)
            yield value
            continue
        except (ValueError, RecursionError):
            if ended and not array and start == len(buffer):
                return
            if len(buffer) - start > min(LONGEST_VALUE, LONGEST_DOCUMENT):
                raise UserError(_too_long(name, LONGEST_VALUE)) from None
            if ended:
                raise UserError(f"{name} is not whole JSON; give an array, or one object or string per line") from None
        more = _at_least(chunks, len(buffer) - start, name)
        buffer, start, ended = buffer[start:] + more, 0, not more


def _at_least(chunks: Iterator[str], size: int, name: str) -> str:
    """The next chunks, `size` characters and more: doubling the buffer keeps a long value linear in time."""
    text = _Text(name)
    for chunk in chunks:
        text.add(chunk)
        if text.size >= size:
            break
    return text.take()


def _text_of(value: Any, place: str) -> str:
    """The text of a JSON value; "" for null."""
    if isinstance(value, dict):
        value = value.get(_text_field(list(value), place), "")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place} has a {type(value).__name__} where its text should be; give a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place} has a lone surrogate (character {error.start}), not valid Unicode; remove it"
        ) from None
    return value


def _text_field(names: list[str], place: str) -> str:
    for name in FIELDS:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    found = printable(", ".join(map(str, names[:8])), 200) or "none"
    raise UserError(f"{place} has no field {', '.join(FIELDS[:-1])} or {FIELDS[-1]} (found: {found}); rename one")


def _read_csv(stream: BinaryIO, name: str) -> Iterator[str]:
    csv.field_size_limit(LONGEST_DOCUMENT)
    rows = csv.reader(_lines(stream, name), strict=True)
    header = next(rows, None)
    if header is None:
        return
    column = header.index(_text_field(header, name))
    try:
        for row in rows:
            if row and column >= len(row):
                raise UserError(
                    f"{name} line {rows.line_num} has {len(row)} columns and its header {len(header)}; mend it"
                )
            yield row[column] if row else ""
    except csv.Error as error:
        raise UserError(f"{name} line {rows.line_num} is not CSV ({error}); mend or convert it") from None


def _read_parquet(place: Path | BinaryIO, name: str, stretch: Stretch | None = None) -> Iterator[str]:
    """The rows, or those of the row groups that begin in a stretch of the file; memory holds some pages of one group."""
    import pyarrow  # here, because it is slow to import
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(place, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:
            column = _text_field(file.schema_arrow.names, name)
            begins = [_group_start(file.metadata.row_group(number)) for number in range(file.num_row_groups)]
            groups = [n for n, begin in enumerate(begins) if stretch is None or stretch.start <= begin < stretch.end]
            for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[column], use_threads=False):
                for value in batch.column(0).to_pylist():
                    yield _text_of(value, name)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if (
            isinstance(error, OSError) and error.errno
        ):  # of the disk, and not of pyarrow, which has this class for damage too
            raise
        reason = printable(str(error).partition("\n")[0], 200)
        raise UserError(f"{name} is not a readable parquet file ({reason}); get it again") from None


def _group_start(group: Any) -> int:
    """The byte at which a row group begins."""
    first = group.column(0)
    return int(first.dictionary_page_offset or first.data_page_offset)


# -- the hub


@dataclass(frozen=True)
class _HubFile:
    """What the hub says of a file (size in bytes, SHA-256 if it is a large one), or where the cache has it."""

    name: str
    size: int | None = None
    sha256: str | None = None
    cached: Path | None = None
    repo: str = ""
    revision: str | None = None  # of the repository: the commit that was listed

    def __str__(self) -> str:
        return f"{self.repo}/{self.name}"


def _hub_source(name: str, address: str, num_files: int | None, validation: str | None) -> Source:
    """Download (or find in the cache) the files of hf://datasets/OWNER/NAME[/FILE]; FILE may hold * and ?."""
    chosen, validation = _on_hub(address, num_files, validation)
    return Source(name, tuple(map(_download, chosen)), validation=validation, members=num_files)


def _on_hub(address: str, num_files: int | None, validation: str | None) -> tuple[list[_HubFile], str | None]:
    """The files that an address means, and the address of their validation."""
    match = re.fullmatch(r"hf://datasets/([^/]+/[^/]+)(?:/(.+))?", address.rstrip("/"))
    if match is None:
        raise UserError(f"source {address} must look like hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME/FILE")
    repo, pattern = match[1], match[2]
    files = _hub_files(repo)
    chosen = _choose(repo, pattern, list(files))
    if pattern is None and (held_out := _held_out_pattern(chosen[0], list(files))):
        validation = f"hf://datasets/{repo}/{held_out}"
    return [files[name] for name in chosen[:num_files]], validation


def _hub_files(repo: str) -> dict[str, _HubFile]:
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        seconds = (
            constants.HF_HUB_ETAG_TIMEOUT
        )  # without one, a hub that takes the question and is silent is waited for in vain
        dataset = huggingface_hub.HfApi().dataset_info(repo, files_metadata=True, timeout=seconds)
    except Exception as error:  # the client raises errors of four libraries
        return _cached_files(repo, error)
    return {
        item.rfilename: _HubFile(
            item.rfilename, item.size, item.lfs.sha256 if item.lfs else None, repo=repo, revision=dataset.sha
        )
        for item in dataset.siblings or []
    }


def _size_on_hub(file: _HubFile) -> int:
    """The size that the hub told, or that of the copy in the cache."""
    return file.size if file.size is not None else _download(file).stat().st_size


def _opened(file: Path | _HubFile) -> BinaryIO:
    """A file, or one that stays on the hub, of which only what is read is fetched."""
    if isinstance(file, Path) or file.cached:
        return open(file if isinstance(file, Path) else cast(Path, file.cached), "rb")
    return cast(BinaryIO, io.BufferedReader(_HubRange(file), RANGE_BYTES))


class _HubRange(io.RawIOBase):
    """A file on the hub, read by HTTP ranges. A range has no checksum: that it comes from the listed commit, and from a file
    of the listed size, is all that is checked."""

    def __init__(self, file: _HubFile) -> None:
        assert file.size is not None
        self._file, self._size, self._place = file, file.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; nothing is asked of the hub."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Ask for as much as there is room for; UserError when the hub gives anything else."""
        data = self._range(self._place, min(self._place + len(buffer), self._size))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def _range(self, start: int, end: int) -> bytes:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_backoff,
        )

        if start >= end:
            return b""
        url = hf_hub_url(self._file.repo, self._file.name, repo_type="dataset", revision=self._file.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
        try:
            answer = http_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(answer)
        except Exception as error:  # the client raises errors of four libraries
            raise UserError(_hub_sentence(error, str(self._file))) from None
        size = answer.headers.get("Content-Range", "").rpartition("/")[2]
        ranged = answer.status_code == 206 and size in ("*", str(self._size))
        if len(answer.content) != end - start or not (ranged or (start, end) == (0, self._size)):
            raise UserError(
                f"the hub did not give bytes {start} to {end - 1} of {self._file} (status {answer.status_code}, "
                f"{len(answer.content)} bytes); download the dataset, and give its folder"
            )
        return answer.content


def _download(file: _HubFile) -> Path:
    import huggingface_hub

    if file.cached:
        return file.cached

    try:
        path = Path(huggingface_hub.hf_hub_download(file.repo, file.name, repo_type="dataset"))
    except Exception as error:  # as above
        raise UserError(_hub_sentence(error, str(file))) from None
    if damage := _damage(path, file):
        path.resolve().unlink(missing_ok=True)  # or every later run would find it in the cache
        path.unlink(missing_ok=True)
        raise UserError(f"the download of {file} is damaged ({damage}); run it again, or {INSTEAD}")
    return path


def _damage(path: Path, file: _HubFile) -> str | None:
    """What is wrong with a downloaded file, if anything."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"{size} bytes instead of {file.size}"
    with open(path, "rb") as stream:
        head = stream.read(256).lstrip().lower()
        if head.startswith((b"<!doctype html", b"<html")):
            return "it is a web page, perhaps of a network login"
        if head.startswith(b"version https://git-lfs"):
            return "it is a Git LFS pointer"
        stream.seek(0)
        if file.sha256 and hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
            return "its SHA-256 is not the one the hub gives"
    return None


def _choose(repo: str, pattern: str | None, names: list[str]) -> list[str]:
    """The files of a repository that match FILE; without it the parquet shards of train, else its other train files."""
    readable = sorted(name for name in names if name.lower().endswith(READABLE))
    if pattern is not None:
        if chosen := [name for name in readable if name == pattern or fnmatchcase(name, pattern)]:
            return chosen
        raise UserError(
            f"dataset {repo} has no readable file {pattern}; it has {', '.join(readable[:8]) or 'none at all'}"
        )
    training = [name for name in readable if not re.search(r"valid|test|dev\b", name.lower())] or readable
    training = [name for name in training if "train" in name.lower()] or training
    if chosen := [name for name in training if name.endswith(".parquet")] or training:
        return chosen
    raise UserError(f"dataset {repo} has no file of a known format; give one that has {', '.join(SUFFIXES)}")


def _held_out_pattern(chosen: str, names: list[str]) -> str | None:
    """The files of the official validation split: like the chosen ones, but named for validation."""
    alike = (name for name in names if name.endswith(Path(chosen).suffix))
    held_out = min((name for name in alike if re.search(r"valid|\bdev\b", name.lower())), default=None)
    return re.sub(r"\d+-of-\d+", "*", held_out) if held_out else None


def _cached_files(repo: str, error: Exception) -> dict[str, _HubFile]:
    """Without the hub, the files of its cache; if the hub refused or the cache has none, the error in a sentence."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = [] if _refused(error) else huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        repos = []
    revisions = [
        revision
        for found in repos
        if (found.repo_id, found.repo_type) == (repo, "dataset")
        for revision in found.revisions
    ]
    files: dict[str, _HubFile] = {}
    for revision in sorted(revisions, key=lambda revision: revision.last_modified):
        for file in revision.files:
            name = file.file_path.relative_to(revision.snapshot_path).as_posix()
            files[name] = _HubFile(name, file.size_on_disk, cached=file.file_path, repo=repo)
    if not files:
        raise UserError(_hub_sentence(error, repo)) from None
    return files


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _refused(error: Exception) -> bool:
    from huggingface_hub.errors import HFValidationError

    return isinstance(error, HFValidationError) or _status(error) in (401, 403, 404)


def _hub_sentence(error: Exception, what: str) -> str:
    """One sentence for what the hub's client raised: what failed, why, what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    status = _status(error)
    if isinstance(error, HFValidationError):
        reason = "not a name that the hub allows"
    elif isinstance(error, OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set and it is not in the cache"
    elif status == 404:
        reason = "the hub has no such dataset or file"
    elif status in (401, 403):
        reason = "the hub says it does not exist or needs a login: set HF_TOKEN if you have access"
    elif status is not None:
        reason = f"the hub answered with status {status}"
    elif isinstance(error, (ValueError, TypeError)):
        reason = f"{constants.ENDPOINT} did not answer like a hub, perhaps a network login page"
    else:
        reason = f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
    return f"cannot download {what}: {reason}; {INSTEAD}"
