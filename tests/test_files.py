"""Files are whole or as before, whatever the disk does."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from smalllm.files import FileSystem, no_space_left
from smalllm.reliability.disks import CountingDisk, Event, FailingDisk, PowerLoss, RecordingDisk


def test_pieces_become_a_file(tmp_path: Path):
    FileSystem().write(tmp_path / "a", [b"one ", memoryview(b"two"), b""])
    assert (tmp_path / "a").read_bytes() == b"one two"


def test_new_folders_are_told_to_the_device(tmp_path: Path):
    disk = CountingDisk()
    disk.mkdir(tmp_path / "a" / "b")
    disk.mkdir(tmp_path / "a" / "b")
    assert [kind for kind, _ in disk.events] == ["make_folder", "sync_folder", "make_folder", "sync_folder"]


@pytest.mark.parametrize("at", range(5))
def test_a_replaced_file_is_the_old_or_the_new_one(at: int, tmp_path: Path):
    path = tmp_path / "hint"
    path.write_bytes(b"old")
    with pytest.raises(OSError):
        FailingDisk(at, errno.EIO).replace(path, [b"new one"])
    assert path.read_bytes() == (b"new one" if at == 4 else b"old")
    assert os.listdir(tmp_path) == ["hint"]


@pytest.mark.parametrize("for_good", [False, True])
def test_an_append_is_all_or_nothing(for_good: bool, tmp_path: Path):
    path = tmp_path / "log"
    path.write_bytes(b"line 1\n")
    with pytest.raises(OSError):
        FailingDisk(1, errno.ENOSPC, for_good).append(path, b"line 2\n")
    assert path.read_bytes() == b"line 1\n"
    FileSystem().append(path, b"line 2\n")
    assert path.read_bytes() == b"line 1\nline 2\n"


def test_a_tree_goes_as_far_as_it_can(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("x")
    (tmp_path / "a" / "link").symlink_to(tmp_path)
    FileSystem().remove_tree(tmp_path / "a")
    FileSystem().remove_tree(tmp_path / "a")
    assert not (tmp_path / "a").exists() and tmp_path.is_dir()


def test_a_full_disk_has_several_names():
    assert all(no_space_left(OSError(number, "")) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    assert not no_space_left(OSError(errno.EIO, ""))


def lost(events: list[Event], folder: Path, number: int) -> dict[str, bytes]:
    """What a power cut after these events leaves, one of many ways."""
    import random

    PowerLoss(events, Path("/disk")).write_to(folder / str(number), random.Random(number))
    found = sorted(path for path in (folder / str(number)).rglob("*") if path.is_file())
    return {str(path.relative_to(folder / str(number))): path.read_bytes() for path in found}


def test_what_a_power_cut_can_leave_worked_by_hand(tmp_path: Path):
    a, b, root = Path("/disk/a"), Path("/disk/b"), Path("/disk")
    written = [Event("create", a), Event("put", a, data=b"12")]
    states = [lost(written, tmp_path / "bare", number) for number in range(300)]
    assert {state.get("a") for state in states} == {None, b"", b"1", b"12", b"1\0", b"\0\0"}
    safe = [*written, Event("sync", a), Event("sync_folder", root)]
    assert all(lost(safe, tmp_path / "safe", number) == {"a": b"12"} for number in range(50))
    moved = [*safe, Event("rename", b, other=a)]
    names = {tuple(lost(moved, tmp_path / "moved", number)) for number in range(300)}
    assert names == {("a",), ("b",), ("a", "b"), ()}  # weaker than any real disk, which moves a name in one
    grown = [*safe, Event("put", a, data=b"3", offset=2)]
    assert all(lost(grown, tmp_path / "grown", number)["a"].startswith(b"12") for number in range(50))


def test_a_recording_disk_remembers_what_it_did(tmp_path: Path):
    disk = RecordingDisk()
    disk.mkdir(tmp_path / "a")
    disk.replace(tmp_path / "a" / "f", [b"x", b"yz"])
    disk.append(tmp_path / "a" / "f", b"!")
    kinds = [event.kind for event in disk.events]
    assert kinds == ["make_folder", "sync_folder", "create", "put", "put", "sync", "rename", "sync_folder", "put"]
    assert disk.events[-1].offset == 3 and (tmp_path / "a" / "f").read_bytes() == b"xyz!"
