"""One holder of a folder at a time: a lock of the file system, which it drops when a process dies; where it has none (some
network and cloud file systems), a file whose holder shows that it lives by changing it.

Clocks of two machines differ, so that life is told from what the file holds and not from its date.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

BEAT_SECONDS = 4.0
DEAD_SECONDS = 20.0
"""A file that has not changed for so long belongs to a holder that is gone: five beats, and what caches may withhold."""
SETTLE_SECONDS = 2.0
"""What two that take over at once wait before they look whose file it is; more than a cache of attributes keeps (NFS: 1 s)."""
SIZE = 96
"""Bytes of that file."""

Note = Callable[[str], None]


class Lock:
    """Held from ``acquire`` until ``release`` or the end of the process."""

    def __init__(self, path: Path, descriptor: int | None, token: bytes = b"") -> None:
        self.path, self._descriptor, self._token = path, descriptor, token
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lock of {path}", daemon=True)
        if token:
            self._thread.start()

    @classmethod
    def acquire(cls, path: Path, warn: Note | None = None) -> Self | None:
        """Lock a path in a folder that exists; None when another process holds it. OSError when the folder cannot be written.
        ``warn`` hears of a file system without locks, where a holder that was killed costs a wait of 20 s."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            free = _flock(descriptor) or _flock(descriptor, seconds=0.05)  # a reader may be asking ``is_held`` just now
        except OSError as error:
            os.close(descriptor)
            return cls._take(path, error, warn or (lambda message: None))
        if not free or not _is(descriptor, path):  # or its holder removed it between our opening and locking it
            os.close(descriptor)
            return None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        return cls(path, descriptor)

    @classmethod
    def _take(cls, path: Path, error: OSError, warn: Note) -> Self | None:
        """Lock by a file that exists only while somebody holds it."""
        token = f"{os.getpid()} on {socket.gethostname()[:40]} {secrets.token_hex(8)}".encode()
        warn(
            f"the file system of {path.parent} has no locks ({error.strerror}): {_beating(path).name} says who uses it, and it"
            " takes seconds to see"
        )
        if not _create(path, token):
            warn(f"waiting up to {DEAD_SECONDS:g} s to see whether process {holder(path)} still lives")
            if _lives(path):
                return None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_beating(path))
            if not _create(path, token):
                return None
        time.sleep(SETTLE_SECONDS)
        return cls(path, None, token) if _content(path).startswith(token) else None

    def lost(self) -> bool:
        """Whether another process has taken over, as it may where this one was stopped for long and the file system has no
        locks."""
        return bool(self._token) and not _content(self.path, b"?").startswith((self._token, b"?"))

    def release(self, remove: bool = False) -> None:
        """Let others have it. ``remove``: leave no file."""
        self._ended.set()
        if self._token:
            self._thread.join(BEAT_SECONDS)
            if not self.lost():
                with contextlib.suppress(OSError):
                    os.unlink(_beating(self.path))
        if remove:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(BEAT_SECONDS) and not self.lost():
            count += 1
            with contextlib.suppress(OSError):
                try:
                    with open(_beating(self.path), "r+b") as file:
                        file.write(_padded(self._token, count))
                except FileNotFoundError:  # somebody tidied up
                    _create(self.path, self._token)


def is_held(path: Path) -> bool:
    """Whether a process, this one or another, holds the lock; leaves no trace. Without locks of the file system: whether the file
    is there and was changed within 20 s of this machine's clock."""
    try:
        descriptor = os.open(
            path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY
        )  # NFS locks what may be written
    except OSError:
        return False
    try:
        return not _flock(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            return abs(time.time() - _beating(path).stat().st_mtime) < DEAD_SECONDS
        return False
    finally:
        os.close(descriptor)


def holder(path: Path) -> str:
    """The process that holds the lock, or held it last: its number, and its machine where that may be another one; or "?"."""
    content = _content(path).decode("ascii", "replace").split()
    if len(content) > 2:
        return " ".join(content[:3])
    with contextlib.suppress(OSError):
        return path.read_text("ascii", "replace")[:32].strip() or "?"
    return "?"


def _flock(descriptor: int, seconds: float = 0.0) -> bool:
    """Lock a file after waiting so long; False when another has it; OSError where files cannot be locked."""
    time.sleep(seconds)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _beating(path: Path) -> Path:
    return path.with_name(f"{path.name}-beat")


def _padded(token: bytes, count: int) -> bytes:
    return (token + b" %d" % count).ljust(SIZE)


def _create(path: Path, token: bytes) -> bool:
    """Make the file; False when it is there."""
    try:
        descriptor = os.open(_beating(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with open(descriptor, "wb") as file:
        file.write(_padded(token, 0))
    return True


def _content(path: Path, otherwise: bytes = b"") -> bytes:
    """What the file holds; opened anew, since network file systems look again only then. ``otherwise``: it cannot be read."""
    try:
        return _beating(path).read_bytes()[:SIZE] or otherwise
    except OSError:
        return otherwise


def _lives(path: Path) -> bool:
    """Watch the file until it changes, or for as long as a holder that lives would not leave it alone."""
    before, ends = _content(path), time.monotonic() + DEAD_SECONDS
    while time.monotonic() < ends:
        time.sleep(min(1.0, BEAT_SECONDS / 2))
        if (now := _content(path)) != before:
            return now != b""
    return False
