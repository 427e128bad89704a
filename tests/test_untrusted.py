"""Files of others: regular ones of a sane size are read, anything else is an OSError at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from smalllm.untrusted import content, printable


def test_a_small_file_is_read(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    assert content(tmp_path / "a", 3) == b"abc"
    with pytest.raises(OSError) as error:
        content(tmp_path / "a", 2)
    assert error.value.strerror == "it has 3 bytes, more than the 2 of any such file"


def strange(path: Path, thing: str) -> None:
    """Something that is no regular file, or one of a size that no file of its kind has."""
    match thing:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
        case "sparse":
            path.touch()
            os.truncate(path, 1 << 40)


@pytest.mark.parametrize(
    "thing", ["pipe", "folder", "device", "loop", "missing", "sparse", "a\0b", "a\ud800", "x" * 5000]
)
def test_what_is_no_file_is_an_error_at_once(tmp_path: Path, thing: str):
    path = tmp_path / thing
    strange(path, thing)
    with pytest.raises(OSError) as error:
        content(path, 1 << 20)
    assert error.value.strerror


def test_foreign_words_stay_one_line():
    assert printable("a\nb\x1b]0;x\x07\u202e\u2028\ud800é") == r"a\nb\x1b]0;x\x07\u202e\u2028\ud800é"
    assert printable("x" * 100, 10) == "xxxxxxxxxx..."
