"""One holder at a time, on file systems with and without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from smalllm import locks
from smalllm.checkpoint import RunFolder
from smalllm.config import UserError
from smalllm.data.prepare import prepare
from smalllm.locks import Lock, holder, is_held
from smalllm.reliability.promises import Recorder, in_child, make_data, settings
from smalllm.training.trainer import train


@pytest.fixture
def lockless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, and a faster heart."""

    def unsupported(descriptor: int, flags: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    for name, seconds in (("BEAT_SECONDS", 0.1), ("DEAD_SECONDS", 0.6), ("SETTLE_SECONDS", 0.1)):
        monkeypatch.setattr(locks, name, seconds)


def held_by_a_child(path: Path) -> int:
    """A process that holds the lock until it is killed."""
    ready = path.with_name("ready")

    def hold() -> None:
        assert Lock.acquire(path) is not None
        ready.touch()
        time.sleep(60)

    pid = in_child(hold)
    while not ready.exists():
        time.sleep(0.01)
    return pid


def killed(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    first = Lock.acquire(path)
    assert first is not None and is_held(path) and not first.lost() and holder(path) == str(os.getpid())
    assert Lock.acquire(path) is None
    first.release()
    assert not is_held(path) and path.exists()
    second = Lock.acquire(path)
    assert second is not None
    second.release(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_file_that_was_replaced_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flock = tmp_path / ".lock", fcntl.flock

    def replaced(descriptor: int, flags: int) -> None:
        path.unlink()
        path.write_bytes(b"")
        flock(descriptor, flags)

    monkeypatch.setattr(fcntl, "flock", replaced)
    assert Lock.acquire(path) is None


def test_a_holder_that_lives_is_seen_without_locks(lockless: None, tmp_path: Path) -> None:
    path, notes = tmp_path / ".lock", list[str]()
    pid = held_by_a_child(path)
    try:
        began = time.monotonic()
        assert Lock.acquire(path, notes.append) is None
        assert time.monotonic() - began < 0.5 and is_held(path) and holder(path).startswith(f"{pid} on ")
        assert "has no locks (Operation not supported)" in notes[0] and f"process {pid} on" in notes[1]
    finally:
        killed(pid)
    mine = Lock.acquire(path)
    assert mine is not None and holder(path).startswith(f"{os.getpid()} on ")
    time.sleep(0.3)
    assert not mine.lost()
    mine.release(remove=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ready"]


def test_one_of_many_takes_over(lockless: None, tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    killed(held_by_a_child(path))

    def contend(number: int) -> None:
        lock = Lock.acquire(path)
        (tmp_path / f"{number}-{'has' if lock else 'not'}").touch()
        time.sleep(1.5)

    pids = [in_child(lambda number=number: contend(number)) for number in range(6)]  # type: ignore[misc]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 6
    assert len(list(tmp_path.glob("*-has"))) == 1 and len(list(tmp_path.glob("*-not"))) == 5


def test_what_was_lost_while_it_stood_still_is_not_written(lockless: None, tmp_path: Path) -> None:
    """A trainer that was stopped for long finds another one in its place, and ends without a word to the disk."""
    make_data(tmp_path)
    config, run = settings(tmp_path / "data", steps=100_000, evaluate_every=1000), tmp_path / "run"
    error = tmp_path / "error"

    def work() -> None:
        try:
            train(config, run)
        except UserError as refusal:
            error.write_text(str(refusal))

    pid = in_child(work)
    while (RunFolder(run).newest_step() or 0) < 10:
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    notes = Recorder()
    train(config.replace(train={"steps": (RunFolder(run).newest_step() or 0) + 20}), run, display=notes)
    newest, lines = RunFolder(run).newest_step(), RunFolder(run).metrics_file.read_bytes()
    lock = Lock.acquire(run / ".lock")  # somebody still has it
    os.kill(pid, signal.SIGCONT)
    assert os.waitpid(pid, 0)[1] == 0 and lock is not None
    lock.release()
    assert "was taken over by process" in error.read_text() and f"process {os.getpid()} on" in error.read_text()
    assert RunFolder(run).newest_step() == newest
    assert RunFolder(run).metrics_file.read_bytes().startswith(lines[: lines.rindex(b"\n") + 1])
    assert any("waiting up to" in note for note in notes.notes)


def test_prepare_without_locks(lockless: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    pid = held_by_a_child(out / ".lock")
    (out / "ready").unlink()
    try:
        with pytest.raises(UserError, match=f"another prepare, process {pid} on"):
            prepare(["storyworld:200"], out, vocab_size=512)
    finally:
        killed(pid)
    prepare(["storyworld:200"], out, vocab_size=512)
    assert (out / "manifest.json").exists() and not list(out.glob(".lock*"))
