"""Disks that crash, tear, fail, fill up and lose power: file systems for `checkpoint.RunFolder` that do what real ones do on
their worst days, at a moment that the caller chooses.

    CrashingDisk   the process dies before or after the k-th event, or with so many bytes of a write on the disk
    FailingDisk    the k-th event, or every one from there on, is an error
    RecordingDisk  remembers all events; ``power_loss`` makes the states that a power cut could have left behind
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from smalllm.files import FileSystem, Piece

CRASHED = 77
"""Exit status of a process that its disk ended."""


class EventfulDisk(FileSystem):
    """Every change goes through ``event``, which may refuse it, or be the end."""

    def event(self, kind: str, path: Path, do: Callable[..., None], size: int = 0) -> None:
        """Do it. A ``put`` is of ``size`` bytes, and ``do(n)`` writes the first n of them only."""
        do()

    def make_folder(self, path: Path) -> None:
        self.event("make_folder", path, lambda: super(EventfulDisk, self).make_folder(path))

    def open(self, path: Path, mode: str) -> IO[bytes]:
        found: list[IO[bytes]] = []
        self.event("open", path, lambda: found.append(super(EventfulDisk, self).open(path, mode)))
        return found[0]

    def put(self, file: IO[bytes], data: Piece) -> None:
        """A write that may be torn."""
        view = memoryview(data).cast("B")

        def put(size: int | None = None) -> None:
            super(EventfulDisk, self).put(file, view[:size])

        self.event("put", Path(file.name), put, len(view))

    def sync(self, file: IO[bytes]) -> None:
        self.event("sync", Path(file.name), lambda: super(EventfulDisk, self).sync(file))

    def sync_folder(self, path: Path) -> None:
        self.event("sync_folder", path, lambda: super(EventfulDisk, self).sync_folder(path))

    def rename(self, source: Path, target: Path) -> None:
        self.event("rename", target, lambda: super(EventfulDisk, self).rename(source, target))

    def shorten(self, path: Path, size: int) -> None:
        self.event("shorten", path, lambda: super(EventfulDisk, self).shorten(path, size))

    def unlink(self, path: Path) -> None:
        self.event("unlink", path, lambda: super(EventfulDisk, self).unlink(path))

    def remove_folder(self, path: Path) -> None:
        self.event("remove_folder", path, lambda: super(EventfulDisk, self).remove_folder(path))


@dataclass
class CountingDisk(EventfulDisk):
    """Remembers what kind of events there were, and of how many bytes."""

    events: list[tuple[str, int]] = field(default_factory=list)

    def event(self, kind: str, path: Path, do: Callable[..., None], size: int = 0) -> None:
        self.events.append((kind, size))
        do()


@dataclass
class CrashingDisk(EventfulDisk):
    """The process dies at event number ``at`` (from 0): before it, after it, or when ``torn`` bytes of it are written."""

    at: int
    when: Literal["before", "after", "torn"] = "before"
    torn: int = 0
    seen: int = 0

    def event(self, kind: str, path: Path, do: Callable[..., None], size: int = 0) -> None:
        """Count, and die where it was said."""
        here, self.seen = self.seen == self.at, self.seen + 1
        if here and self.when == "torn":
            do(self.torn)
        elif not here or self.when == "after":
            do()
        if here:
            os._exit(CRASHED)


@dataclass
class FailingDisk(EventfulDisk):
    """Event number ``at`` (from 0), and with ``for_good`` all after it, is an error; a write gets half way. What makes room
    works on a disk that stays full, as it does in life."""

    at: int
    error: int
    for_good: bool = False
    seen: int = 0

    def event(self, kind: str, path: Path, do: Callable[..., None], size: int = 0) -> None:
        """Count, and fail where it was said."""
        here, later, self.seen = self.seen == self.at, self.seen > self.at, self.seen + 1
        if not here and not (later and self.for_good and kind not in ("unlink", "remove_folder", "shorten")):
            return do()
        if kind == "put":
            do(size // 2)
        raise OSError(self.error, os.strerror(self.error), str(path))


# ── power loss ──


@dataclass
class Event:
    """One change to the disk; ``other`` is where a rename came from, ``data`` what was written and ``offset`` where."""

    kind: str
    path: Path
    other: Path | None = None
    data: bytes = b""
    offset: int = 0


@dataclass
class RecordingDisk(FileSystem):
    """Does everything, and remembers it in order. ``mark`` notes moments, such as "saved step 3"."""

    events: list[Event] = field(default_factory=list)
    marks: list[tuple[int, int]] = field(default_factory=list)

    def mark(self, number: int) -> None:
        self.marks.append((len(self.events), number))

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        self.events.append(Event("make_folder", path))

    def open(self, path: Path, mode: str) -> IO[bytes]:
        """Opening makes or empties a file, or changes nothing yet."""
        if not path.exists():
            self.events.append(Event("create", path))
        elif mode == "wb":
            self.events.append(Event("empty", path))
        return super().open(path, mode)

    def put(self, file: IO[bytes], data: Piece) -> None:
        self.events.append(Event("put", Path(file.name), data=bytes(data), offset=os.fstat(file.fileno()).st_size))
        super().put(file, data)

    def sync(self, file: IO[bytes]) -> None:
        self.events.append(Event("sync", Path(file.name)))

    def sync_folder(self, path: Path) -> None:
        self.events.append(Event("sync_folder", path))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.events.append(Event("rename", target, other=source))

    def shorten(self, path: Path, size: int) -> None:
        super().shorten(path, size)
        self.events.append(Event("shorten", path, offset=size))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.events.append(Event("unlink", path))

    def remove_folder(self, path: Path) -> None:
        super().remove_folder(path)
        self.events.append(Event("remove_folder", path))


@dataclass
class _Inode:
    """A file or folder: what is in memory, what is on the device, and what waits in between."""

    folder: bool
    now: bytearray = field(default_factory=bytearray)
    safe: bytes = b""
    names: dict[str, _Inode] = field(default_factory=dict)
    safe_names: dict[str, _Inode] = field(default_factory=dict)
    waiting: list[tuple[str, _Inode | None]] = field(default_factory=list)


class PowerLoss:
    """A disk in two layers. A write reaches the device at ``sync`` at the latest, a name at ``sync_folder``; until then each
    may have reached it or not: bytes written since are there, gone, cut or zero; names that were made, moved or removed in a
    folder are there or not, each for itself and in any order. That is weaker than what ext4 and xfs promise."""

    def __init__(self, events: Sequence[Event], root: Path) -> None:
        self.root = _Inode(folder=True)
        for event in events:
            self._apply(event, root)

    def write_to(self, target: Path, chance: random.Random) -> None:
        """One of the states in which a power cut now could leave the disk, as real files."""
        self._write(self.root, target, chance)

    def _apply(self, event: Event, root: Path) -> None:
        if event.kind == "sync_folder":
            found = self._find(event.path, root)
            found.safe_names, found.waiting = dict(found.names), []
            return
        parent, name = self._find(event.path.parent, root), event.path.name
        match event.kind:
            case "make_folder" | "create":
                self._link(parent, name, _Inode(folder=event.kind == "make_folder"))
            case "empty":
                parent.names[name].now.clear()
            case "put":
                parent.names[name].now[event.offset :] = event.data
            case "shorten":
                del parent.names[name].now[event.offset :]
            case "sync":
                parent.names[name].safe = bytes(parent.names[name].now)
            case "rename":
                assert event.other is not None
                source = self._find(event.other.parent, root)
                moved = source.names[event.other.name]
                self._unlink(source, event.other.name)
                self._link(parent, name, moved)
            case "unlink" | "remove_folder":
                self._unlink(parent, name)

    def _find(self, path: Path, root: Path) -> _Inode:
        found = self.root
        for part in path.parts[len(root.parts) :]:
            found = found.names[part]
        return found

    @staticmethod
    def _link(parent: _Inode, name: str, inode: _Inode) -> None:
        parent.names[name] = inode
        parent.waiting.append((name, inode))

    @staticmethod
    def _unlink(parent: _Inode, name: str) -> None:
        del parent.names[name]
        parent.waiting.append((name, None))

    def _write(self, inode: _Inode, target: Path, chance: random.Random) -> None:
        target.mkdir(parents=True, exist_ok=True)
        names, waiting = dict(inode.safe_names), list(inode.waiting)
        likely = chance.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        if chance.random() < 0.5:
            chance.shuffle(waiting)
        for name, found in waiting:
            if chance.random() < likely:
                if found is None:
                    names.pop(name, None)
                else:
                    names[name] = found
        for name, found in names.items():
            if found.folder:
                self._write(found, target / name, chance)
            else:
                (target / name).write_bytes(self._content(found, chance))

    @staticmethod
    def _content(inode: _Inode, chance: random.Random) -> bytes:
        whole = bytes(inode.now)
        if whole == inode.safe:
            return whole
        kept = inode.safe if whole.startswith(inode.safe) else b""  # what was appended since cannot harm it
        cut = chance.randrange(len(kept), len(whole) + 1)
        lost = len(whole) - cut
        return chance.choice(
            (inode.safe, whole, whole[:cut], whole[:cut] + bytes(lost), kept + bytes(len(whole) - len(kept)))
        )
