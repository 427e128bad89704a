"""Every change that training makes to the disk, as few small calls, so that a test can crash, tear, fill or record them
(`reliability.disks`). Files are written so that they survive a power cut: bytes first, then names.

Knows nothing about what the files hold.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO

Piece = bytes | memoryview


class FileSystem:
    """The disk. The first group are its single events, which tests replace; the second group is made of them."""

    # ── single events: each happens or does not ──

    def make_folder(self, path: Path) -> None:
        os.mkdir(path)

    def open(self, path: Path, mode: str) -> IO[bytes]:
        """Create or empty (``wb``), or go on at the end of (``ab``), a file."""
        return open(path, mode, buffering=0)

    def put(self, file: IO[bytes], data: Piece) -> None:
        """All of the data; on an error some of it may be in the file."""
        view = memoryview(data).cast("B")
        while view:
            view = view[file.write(view) :]

    def sync(self, file: IO[bytes]) -> None:
        """What was put into the file survives a power cut when this returns."""
        os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        """Names made, moved or removed in this folder survive a power cut when this returns. Windows and some network
        file systems cannot do it, and need not."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except PermissionError:
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def shorten(self, path: Path, size: int) -> None:
        os.truncate(path, size)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        os.rmdir(path)

    def free_bytes(self, path: Path) -> int:
        """Room on the disk of an existing folder."""
        return shutil.disk_usage(path).free

    # ── made of them ──

    def mkdir(self, path: Path) -> None:
        """A folder and those above it; those that are new survive a power cut."""
        if path.is_dir():
            return
        if path.parent != path:
            self.mkdir(path.parent)
        with contextlib.suppress(FileExistsError):
            self.make_folder(path)
            self.sync_folder(path.parent)

    def write(self, path: Path, pieces: Iterable[Piece]) -> None:
        """A file of these pieces; its bytes survive a power cut when this returns, its name does after ``sync_folder``."""
        with self.open(path, "wb") as file:
            for piece in pieces:
                self.put(file, piece)
            self.sync(file)

    def replace(self, path: Path, pieces: Iterable[Piece]) -> None:
        """The file is the old one or the new one, whole, at every instant; the new one for good when this returns."""
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        try:
            self.write(temporary, pieces)
            self.rename(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                self.unlink(temporary)
            raise
        self.sync_folder(path.parent)

    def append(self, path: Path, data: bytes) -> None:
        """Data at the end of a file: all of it or, when that fails, none. Survives a crash of the program, and a power
        cut after ``sync_file``."""
        before = path.stat().st_size if path.exists() else 0
        try:
            with self.open(path, "ab") as file:
                self.put(file, data)
        except OSError:
            with contextlib.suppress(OSError):
                self.shorten(path, before)  # a full disk can still shorten files
            raise

    def sync_file(self, path: Path) -> None:
        """What was appended, and the name of the file, survive a power cut when this returns."""
        if path.exists():
            with self.open(path, "ab") as file:
                self.sync(file)
            self.sync_folder(path.parent)

    def remove_tree(self, path: Path) -> None:
        """A file or folder and all below; what cannot be removed now stays for the next time."""
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                for entry in sorted(path.iterdir()):
                    self.remove_tree(entry)
                self.remove_folder(path)
            else:
                self.unlink(path)


class Untouched(FileSystem):
    """Changes nothing: the disk of those who train along while the first rank writes."""

    def make_folder(self, path: Path) -> None: ...
    def put(self, file: IO[bytes], data: Piece) -> None: ...
    def sync(self, file: IO[bytes]) -> None: ...
    def sync_folder(self, path: Path) -> None: ...
    def rename(self, source: Path, target: Path) -> None: ...
    def shorten(self, path: Path, size: int) -> None: ...
    def unlink(self, path: Path) -> None: ...
    def remove_folder(self, path: Path) -> None: ...

    def open(self, path: Path, mode: str) -> IO[bytes]:
        return open(os.devnull, mode, buffering=0)

    def free_bytes(self, path: Path) -> int:
        return sys.maxsize


def no_space_left(error: OSError) -> bool:
    """Whether an error of the file system means that the disk, or the quota, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
