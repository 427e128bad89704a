"""Documents from every source: what a document is, and what is refused in which words."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import re
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from smalllm.config import UserError
from smalllm.data import sources
from smalllm.data.sources import Counts, documents, open_source, passages, share
from smalllm.data.storyworld import log2_probability

SEPARATOR = "<|endoftext|>\n"
TEXTS = [
    "Once upon a time.\nThe end.",
    "  two  \n\n lines ",
    "🙂 é \u2028 \u2581 \x00 nul",
    '"quoted", <|endoftext|> inside',
]


def write(path: Path, data: str | bytes) -> str:
    data = data.encode() if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def csv_of(*rows: list[str]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()


def archive(path: Path, members: dict[str, str]) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return str(path)


def sentence(source: str, **options: object) -> str:
    with pytest.raises(UserError) as error:
        list(documents(source, **options))
    assert "\n" not in str(error.value)
    return str(error.value)


# -- .txt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"a\n{SEPARATOR}b\n{SEPARATOR}", ["a", "b"]),
        (f"a\n{SEPARATOR}b", ["a", "b"]),
        ("a\r\n<|endoftext|>\r\n\r\nb\r\nc\r\n", ["a", "b\r\nc"]),
        (f"\n\na \n\n b\n\n{SEPARATOR}\n{SEPARATOR} \n{SEPARATOR}", ["a \n\n b"]),
        ("a <|endoftext|> b\n<|endoftext|> c\n", ["a <|endoftext|> b\n<|endoftext|> c"]),
        ("one\n\nfile\n", ["one\n\nfile"]),
        ("\ufeffmarked\n", ["marked"]),
        ("nel\x85 line\u2028 \x0c form\x1c", ["nel\x85 line\u2028 \x0c form\x1c"]),
        (f"{SEPARATOR}<|endoftext|>", None),
    ],
)
def test_documents_of_a_text_file(tmp_path, text, expected):
    source = write(tmp_path / "a.txt", text)
    if expected is None:
        assert "holds no text" in sentence(source)
    else:
        assert list(documents(source)) == expected


@given(
    st.lists(st.sampled_from(["<|endoftext|>", "\n", "\r", "\r\n", "a", " ", "\u2028", "<|", "text|>"])).map("".join)
)
@settings(max_examples=500, deadline=None)
def test_separators_are_the_lines_of_that_text_alone(text):
    plain = re.compile(r"^<\|endoftext\|>\r?$\n?", re.MULTILINE)  # says the same, five times slower
    assert sources.SEPARATOR.split(text) == plain.split(text)


@given(
    st.lists(st.text(st.sampled_from("ab\n\r <|endoftext|>é🙂")).map(lambda text: text.strip("\r\n")), min_size=1),
    st.integers(1, 40),
)
@settings(max_examples=150, deadline=None)
def test_text_file_does_not_depend_on_the_size_of_the_buffer(tmp_path_factory, texts, chunk):
    texts = [text for text in texts if text.strip() and not sources.SEPARATOR.search(text)]
    data = "".join(f"{text}\n{SEPARATOR}" for text in texts).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK_BYTES", chunk)
        assert [text for text in sources._read_text(io.BytesIO(data), "x") if text.strip()] == texts


def test_line_of_100_megabytes_is_one_document_in_bounded_memory(tmp_path):
    source = write(tmp_path / "a.txt", "word " * 4_000_000 + "\n" + SEPARATOR + "b")
    assert [len(text) for text in documents(source)] == [20_000_000, 1]


def test_memory_does_not_grow_with_the_file(tmp_path):
    source = write(tmp_path / "a.txt", f"{'word ' * 200}\n{SEPARATOR}" * 20_000)
    tracemalloc.start()
    count = sum(1 for _ in documents(source))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 and peak < 12e6


def test_huge_file_without_separators_is_cut_at_blank_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNSEPARATED_CHARACTERS", 30_000)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 10_000)
    text = "\n\n".join(f"Paragraph {number} " + "x" * (number % 900) for number in range(400))
    found = list(documents(write(tmp_path / "a.txt", text)))
    assert "\n\n".join(found) == text
    assert min(map(len, found[:-1])) >= 2_000 and max(map(len, found)) < 3_000


def test_passages_cut_at_the_best_border():
    assert passages("short") == ["short"]
    text = "\n\n".join(["A line. Another one.\nAnd more."] * 20)
    assert "\n\n".join(passages(text, 50)) == text
    assert passages("aaaa. bbbb " * 30, 50)[0].endswith("aaaa. ")
    assert [len(piece) for piece in passages("x" * 250, 50)] == [100, 100, 50]


@given(st.text(alphabet="ab.\n\r ", max_size=300), st.integers(1, 20))
def test_passages_lose_nothing_but_newlines(text, size):
    pieces = passages(text, size)
    assert "".join(pieces).replace("\n", "").replace("\r", "") == text.replace("\n", "").replace("\r", "")
    assert all(len(piece) <= 2 * size for piece in pieces)


# -- the other formats


@pytest.mark.parametrize("field", ["text", "story", "content", "anything"])
@pytest.mark.parametrize(
    "ending", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet", ".tar.gz"]
)
def test_every_format_gives_the_same_texts(tmp_path, field, ending):
    objects = [{field: text} for text in TEXTS]
    path = tmp_path / f"a{ending}"
    match ending.removesuffix(".gz"):
        case ".jsonl":
            write(path, "".join(json.dumps(item, ensure_ascii=False) + "\r\n" for item in objects) + "\n")
        case ".json":
            write(path, json.dumps(objects, indent=2))
        case ".csv":
            write(path, csv_of([field], *([text] for text in TEXTS)))
        case ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(objects), path)
        case ".tar":
            archive(path, {"x/a.json": json.dumps(objects[:1]), "x/b.json": json.dumps(objects[1:]), "x/._b.json": "{"})
    assert list(documents(str(path))) == TEXTS


def test_the_text_field_is_found_among_others(tmp_path):
    rows = [{"id": 1, "story": "a", "summary": "b"}, {"id": 2, "story": None, "summary": "d"}]
    assert list(documents(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))) == ["a"]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(documents(str(tmp_path / "a.parquet"))) == ["a"]
    assert list(documents(write(tmp_path / "a.csv", csv_of(["id", "story"], ["1", "a"], [], ["2", ""])))) == ["a"]


@pytest.mark.parametrize(
    "text", ['"a" "b"\n{"text": "c"}', '["a", "b",\n "c"]', '"a"\n"b"\n"c"', ' [ "a" , {"text":"b"}, "c"]']
)
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_json_arrays_and_sequences(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(sources, "CHUNK_BYTES", chunk)
    assert list(documents(write(tmp_path / "a.json", text))) == ["a", "b", "c"]


def test_only_newlines_end_a_json_line(tmp_path):
    assert list(documents(write(tmp_path / "a.jsonl", '{"text": "a\u2028b\x85c"}\n"d"'))) == ["a\u2028b\x85c", "d"]


# -- which files, which documents


def test_folder_and_glob_are_sorted_and_recursive(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/deep/y.jsonl", "notes.md", ".hidden.txt", ".git/x.txt"):
        write(tmp_path / name, '"y"' if name.endswith("jsonl") else Path(name).stem)
    assert list(documents(str(tmp_path))) == ["y", "z", "b"]
    assert list(documents(str(tmp_path), num_files=2)) == ["y", "z"]
    assert list(documents(str(tmp_path / "**" / "*.txt"))) == ["z", "b"]
    assert list(documents(str(tmp_path / "*.txt"))) == ["b"]
    assert open_source(str(tmp_path)).name == tmp_path.name


def test_num_files_counts_the_members_of_an_archive(tmp_path):
    source = archive(
        tmp_path / "a.tar.gz", {f"../escaped{number}.json": json.dumps([str(number)]) for number in range(5)}
    )
    assert list(documents(source, num_files=2)) == ["0", "1"]
    assert list(tmp_path.parent.glob("escaped*")) == []


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"a\n{SEPARATOR}b\n".encode())))
    assert list(documents("-")) == ["a", "b"]


def test_sample_rate_is_a_function_of_seed_and_text(tmp_path):
    source = write(tmp_path / "a.txt", SEPARATOR.join(f"{number}\n" for number in range(2000)))
    half = list(documents(source, sample_rate=0.5))
    assert half == list(documents(source, sample_rate=0.5)) and 900 < len(half) < 1100
    assert half != list(documents(source, sample_rate=0.5, seed=1))
    assert set(documents(source, sample_rate=0.1)) < set(half)
    assert list(documents(source, sample_rate=0.5, limit=10)) == half[:10]
    backwards = write(tmp_path / "b.txt", SEPARATOR.join(f"{number}\n" for number in reversed(range(2000))))
    assert list(documents(backwards, sample_rate=0.5)) == half[::-1]
    assert list(documents(source, limit=3)) == ["0", "1", "2"]


def test_counts(tmp_path):
    counts = Counts()
    list(documents(write(tmp_path / "a.txt", f"a\n{SEPARATOR} \t\n{SEPARATOR}b\n"), counts=counts))
    assert (counts.read, counts.empty, counts.kept) == (3, 1, 2)


def test_the_small_story_world_is_a_source_too():
    source = open_source("storyworld-small:50")
    assert (source.name, source.validation) == ("storyworld-small:50", "storyworld-small:2@1000000000")
    small, whole = list(documents("storyworld-small:5")), list(documents("storyworld:5"))
    assert len(small) == 5 and not set(small) & set(whole)
    assert all(math.isfinite(log2_probability(text, small=True)) for text in [*small, *documents(source.validation)])


def test_storyworld_is_a_source_with_validation_of_its_own():
    source = open_source("storyworld:50")
    assert source.name == "storyworld:50" and source.validation == "storyworld:2@1000000000"
    training, validation = list(documents(source)), list(documents(source.validation))
    assert len(training) == 50 and len(validation) == 2 and not set(training) & set(validation)
    assert training[:5] == list(documents("storyworld:5"))
    assert training != list(documents(source, seed=1))
    assert open_source("storyworld").name == "storyworld:100000"


# -- refusals


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"", "is empty (0 bytes); give a source with text"),
        ("a.txt", b" \n\n", "holds no text (1 empty documents); give a source with text"),
        ("a.txt", b"abc\xffd", "is not UTF-8 at byte offset 3 (0xFF); convert it, as in `iconv -f LATIN1 -t UTF-8`"),
        ("a.txt", b"x" * 3_000_000 + "é".encode()[:1], "is not UTF-8 at byte offset 3000000 (0xC3)"),
        ("a.txt", b"ab\x00c", "is a binary file (byte 0 at offset 2); give text in UTF-8"),
        ("a.txt", "utf-16".encode("utf-16"), "is a binary file"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        ("a.docx", b"PK", "has an unknown format"),
        ("a.txt.gz", b"not gzip", "is damaged"),
        ("a.tar.gz", b"not tar", "is damaged"),
        ("a.parquet", b"not parquet", "is not a readable parquet file"),
        ("a.jsonl", b'"a"\n\n{"text": "b"', "line 3 is not JSON; write one object or string per line"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"id": 1, "name": "x"}', "line 1 has no field text, story or content (found: id, name)"),
        ("a.jsonl", b'{"text": 5}', "line 1 has a int where its text should be"),
        ("a.jsonl", b'"\\ud800"', "line 1 has a lone surrogate"),
        ("a.json", b'["a", "b"', "is not whole JSON"),
        ("a.json", b'["a", {"text": nope}, "b"]', "is not whole JSON"),
        ("a.csv", b"id,name\n1,x\n", "has no field text, story or content (found: id, name)"),
        ("a.csv", b"id,text\n1,a\n2\n", "line 3 has 1 columns and its header 2"),
        ("a.csv", b'text\n"open', "is not CSV"),
    ],
)
def test_bad_files_are_named_in_one_sentence(tmp_path, name, data, words):
    path = tmp_path / name
    path.write_bytes(data)
    said = sentence(str(path))
    assert words in said and name in said


def test_bad_sources_are_named_in_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    assert sentence(f"{tmp_path}/missing.txt") == (
        f"source {tmp_path}/missing.txt does not exist; give a file, a folder, a glob, `storyworld`, `tinystories` "
        "or hf://datasets/OWNER/NAME"
    )
    assert sentence(str(tmp_path / "empty")) == (
        f"source {tmp_path}/empty holds no text files; "
        "it must hold files ending in .txt, .jsonl, .json, .csv, .parquet or .gz"
    )
    assert "has an unknown format" in sentence(write(tmp_path / "a.doc", "x"))
    assert "holds no text files" in sentence(str(tmp_path / "*.txt"))
    assert "needs a number of stories" in sentence("storyworld:many")
    assert "needs a number of stories" in sentence("storyworld:0")
    assert "as in storyworld-small:100000" in sentence("storyworld-small:x")
    assert "cannot be read" in sentence("a\0b") or "does not exist" in sentence("a\0b")
    assert "num_files=2 does not apply" in sentence("storyworld", num_files=2)
    for options, words in (
        ({"sample_rate": 0.0}, "sample_rate=0.0 must be above 0"),
        ({"sample_rate": float("nan")}, "sample_rate=nan must be above 0"),
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"num_files": -1}, "num_files=-1 must be at least 1"),
    ):
        assert words in sentence("storyworld", **options)


def test_sample_rate_that_keeps_nothing(tmp_path):
    said = sentence(write(tmp_path / "a.txt", "one"), sample_rate=1e-9)
    assert said == "sample_rate=1e-09 keeps none of the 1 documents of a.txt; raise it"


def test_file_without_permission(tmp_path, monkeypatch):
    source = write(tmp_path / "a.txt", "text")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # chmod does not stop the administrator
    assert sentence(source) == f"{source} cannot be read (Permission denied); check the file and its permissions"


def test_compressed_bomb_ends_as_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_DOCUMENT", 3_000_000)
    for name in ("a.txt.gz", "a.jsonl.gz", "a.json.gz"):
        assert "holds a line or document of more than" in sentence(write(tmp_path / name, '"' + "a" * 9_000_000))


def entry(
    name: str = "a.json", kind: bytes = tarfile.REGTYPE, data: bytes = b'["text"]', size: int | None = None
) -> bytes:
    """An entry of an archive that says what it likes."""
    found = tarfile.TarInfo(name)
    found.type, found.size = kind, len(data) if size is None else size
    return found.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            entry(kind=tarfile.XHDTYPE, data=bytes(1 << 20)) + entry(),
            "an entry of 1048576 bytes where its name should be",
        ),
        (entry(kind=tarfile.GNUTYPE_LONGNAME, data=b"", size=1 << 40), "where its name should be"),
        (entry(kind=tarfile.XGLTYPE, size=-1) + entry(), "an entry of -1 bytes where its name should be"),
        (entry(kind=tarfile.GNUTYPE_SPARSE, size=1 << 50) + entry(), "it has sparse files"),
        (
            entry(kind=tarfile.XHDTYPE, data=b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n") + entry(),
            "it has sparse files",
        ),
        (entry(kind=tarfile.XHDTYPE, data=b"22 GNU.sparse.map=0,1\n") + entry(), "it has sparse files"),
        (entry(kind=tarfile.XHDTYPE, data=b"10 path=x\n") * 3000 + entry(), "recursion"),
        (entry(size=1 << 50), "is damaged"),
        (entry("x.json\n\x1b[2J" * 9) + entry("\x1b[2J.json", data=b"{"), r"\x1b[2J.json is not whole JSON"),
    ],
)
def test_archives_that_ask_for_too_much_are_damaged(tmp_path, data, words):
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(data + bytes(1024))
    assert words in sentence(str(tmp_path / "a.tar.gz"))


def test_a_long_name_in_an_archive_is_still_of_its_format(tmp_path):
    source = archive(tmp_path / "a.tar.gz", {"x" * 300 + ".json": '["a text"]'})
    assert list(documents(source)) == ["a text"]


def test_archives_of_very_many_entries_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_MEMBERS", 100)
    source = write(tmp_path / "a.tar.gz", entry("a.md", data=b"") * 101)
    assert "has more than 100 entries" in sentence(source)


def test_a_source_that_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("pipe.txt", "zero.txt"):
        assert f"{name} is not a regular file" in sentence(str(tmp_path / name))


# -- several machines


def shares(source: str, parts: int, **options: object) -> list[list[str]]:
    """The documents of each part in turn."""
    return [list(documents(share(source, part, parts), **options)) for part in range(1, parts + 1)]


def flat(lists: list[list[str]]) -> list[str]:
    return [text for some in lists for text in some]


awkward = st.lists(
    st.text(alphabet="ab \n\r\t\ufeff\u2028é🙂", max_size=12)
    | st.sampled_from(["<|endoftext|>", "x<|endoftext|>", "<|endoftext|> y", "\r", "a\n<|endoftext|>\nb"]),
    min_size=1,
    max_size=25,
)


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
@settings(max_examples=150, deadline=None)
@given(
    files=st.lists(awkward, min_size=1, max_size=3),
    parts=st.integers(1, 9),
    scan=st.integers(17, 40),
    newline=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
def test_parts_are_all_documents_in_order_each_once(tmp_path_factory, ending, files, parts, scan, newline, last):
    folder = tmp_path_factory.mktemp("parts")
    for number, texts in enumerate(files):
        if ending == "txt":
            lines = [f"{text}{newline}<|endoftext|>" for text in texts] + ["end"] * last
        else:
            lines = [json.dumps({"text": text}, ensure_ascii=number % 2 == 0) for text in texts] + [""] * last
        write(folder / f"{number}.{ending}", newline.join(lines) + newline * last)
    whole, counts = list(_or_nothing(str(folder), Counts())), Counts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SCAN_BYTES", scan)
        patch.setattr(sources, "CHUNK_BYTES", scan)
        found = [list(documents(share(str(folder), part, parts), counts=counts)) for part in range(1, parts + 1)]
    assert flat(found) == whole
    expected = Counts()
    list(_or_nothing(str(folder), expected))
    assert counts == expected


def _or_nothing(source: str, counts: Counts):
    try:
        yield from documents(source, counts=counts)
    except UserError:
        assert counts.kept == 0


def test_borders_are_those_of_the_whole_file(monkeypatch):
    """Wherever the search begins and however much it reads at once."""
    data = (
        b"ab\nx<|endoftext|>\r\nc\n<|endoftext|>\nd\n<|endoftext|>\r\ne<|endoftext|>\nf\n<|endoftext|>\n<|endoftext|>"
    )
    borders = [match.end() for match in re.finditer(rb"(?m)^<\|endoftext\|>\r?\n", data)]
    assert len(borders) == 3
    for scan in range(17, 60):
        monkeypatch.setattr(sources, "SCAN_BYTES", scan)
        for place in range(1, len(data) + 1):
            expected = next((border for border in borders if border >= place), None)
            assert sources._next_border(io.BytesIO(data), sources.SEPARATOR_LINE, place) == expected


def test_parts_of_a_file_are_about_equal(tmp_path):
    text = write(tmp_path / "a.txt", SEPARATOR.join(f"story {number:06d}\n" for number in range(10_000)))
    lines = write(tmp_path / "a.jsonl", "".join(f'"story {number:06d}"\n' for number in range(10_000)))
    for source in (text, lines):
        assert all(abs(len(some) - 2_500) <= 1 for some in shares(source, 4))


def test_damaged_pages_of_parquet_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"] * 1000}), path, row_group_size=100)
    data = path.read_bytes()
    path.write_bytes(data[:50] + b"\xff" * 200 + data[250:])
    assert "a.parquet is not a readable parquet file (" in sentence(str(path))
    with pytest.raises(UserError, match=r"^[^\n]*a.parquet is not a readable parquet file \([^\n]*$"):
        list(documents(share(str(path), 1, 2)))


def test_parts_of_parquet_are_row_groups(tmp_path):
    table = pyarrow.table({"id": range(1000), "text": [f"row {number}" for number in range(1000)]})
    for name in ("a", "b"):
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=100)
    found = shares(str(tmp_path), 3)
    assert flat(found) == list(documents(str(tmp_path))) and [len(some) % 100 for some in found] == [0, 0, 0]
    assert min(map(len, found)) >= 500


def test_what_cannot_be_cut_goes_to_one_part(tmp_path):
    texts = [f"text {number}\n" for number in range(100)]
    write(tmp_path / "a.txt.gz", SEPARATOR.join(texts))
    write(tmp_path / "b.csv", csv_of(["text"], *([f"csv\n{text}"] for text in texts)))
    write(tmp_path / "c.json", json.dumps([f"json {text}" for text in texts]))
    write(tmp_path / "d.txt", "no separator " * 500)
    write(tmp_path / "e.txt", "")
    zst(tmp_path / "f.jsonl.zst", "".join(json.dumps(f"zst {text}") + "\n" for text in texts))
    archive(tmp_path / "g.tar.gz", {"h.txt": "in an archive", "i.txt": "another"})
    whole = list(documents(str(tmp_path)))
    assert len(whole) == 403
    for parts in (2, 3, 8, 50):
        found = shares(str(tmp_path), parts)
        assert flat(found) == whole
        for kind, count in (("text", 100), ("csv", 100), ("json", 100), ("no ", 1), ("zst", 100), ("in an", 1)):
            assert sorted(sum(text.startswith(kind) for text in some) for some in found)[-2:] == [0, count]


def zst(path: Path, text: str) -> str:
    path.write_bytes(pyarrow.compress(text.encode(), "zstd", asbytes=True))
    return str(path)


def test_zst_is_read_and_damage_is_named(tmp_path):
    text = "".join(f"story {number}\n{SEPARATOR}" for number in range(2000))
    path = Path(zst(tmp_path / "a.txt.zst", text))
    assert list(documents(str(path))) == [f"story {number}" for number in range(2000)]
    whole = path.read_bytes()
    path.write_bytes(whole + whole)  # as tools write that compress in several threads
    assert len(list(documents(str(path)))) == 4000
    for data in (whole[:-5], b"nothing of the kind"):
        path.write_bytes(data)
        assert "a.txt.zst cannot be read" in sentence(str(path))


def test_parts_of_the_story_world(tmp_path):
    found = shares("storyworld:20@5", 3)
    assert flat(found) == list(documents("storyworld:20@5")) and sorted(map(len, found)) == [6, 7, 7]
    assert share("storyworld:200", 1, 3).validation == open_source("storyworld:200").validation
    assert flat(shares("storyworld:2", 5)) == list(documents("storyworld:2"))


def test_sampling_does_not_depend_on_the_parts(tmp_path):
    source = write(tmp_path / "a.txt", SEPARATOR.join(f"{number}\n" for number in range(2000)))
    assert flat(shares(source, 7, sample_rate=0.3)) == list(documents(source, sample_rate=0.3))


def test_num_files_comes_before_the_parts(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.txt", f"{name}\n{SEPARATOR}" * 10)
    found = [list(documents(share(str(tmp_path), part, 2, num_files=2))) for part in (1, 2)]
    assert found == [["a"] * 10, ["b"] * 10]


def test_standard_input_has_no_parts():
    with pytest.raises(
        UserError, match="standard input. cannot be shared by several machines; write it to a file first"
    ):
        share("-", 1, 2)


def test_mistakes_in_a_part_name_the_place(tmp_path):
    lines = [f'"story {number}"' for number in range(1000)]
    lines[900] = "{"
    source = write(tmp_path / "a.jsonl", "\n".join(lines))
    with pytest.raises(UserError, match=r"a.jsonl line \d+ from byte \d+ on is not JSON"):
        list(documents(share(source, 2, 2)))
    data = SEPARATOR.join(f"{number:04d}\n" for number in range(1000)).encode()
    place = data.index(b"0900")
    broken = write(tmp_path / "a.txt", data[:place] + b"\xff" + data[place + 1 :])
    with pytest.raises(UserError, match=f"a.txt is not UTF-8 at byte offset {place} "):
        list(documents(share(broken, 2, 2)))


def test_memory_does_not_grow_with_a_row_group(tmp_path):
    """One row group of 40 MB, of which memory holds a few pages."""
    table = pyarrow.table({"text": [os.urandom(5_000).hex() for _ in range(4_000)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4_000, use_dictionary=False)
    del table
    before, most = pyarrow.total_allocated_bytes(), 0
    for number, _ in enumerate(documents(str(tmp_path / "a.parquet"))):
        if number % 100 == 0:
            most = max(most, pyarrow.total_allocated_bytes() - before)
    assert 0 < most < 20e6
