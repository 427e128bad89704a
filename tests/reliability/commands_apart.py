"""One command in a process of its own, with the streams, the environment and the rights that it is to meet."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import pty
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smalllm.cli import run

CAPABILITIES_3 = 0x20080522  # <linux/capability.h>: _LINUX_CAPABILITY_VERSION_3


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Place:
    """Where a command runs. A stream is a file to open, "closed", or "tty"; left out, an empty input and kept outputs."""

    here: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    stdin: str = os.devnull
    stdout: str = ""
    stderr: str = ""
    encoding: str = "utf-8"
    before: Callable[[], Any] = lambda: None


def command(arguments: list[str], place: Place, said: Path, verb: Callable[[list[str]], int] = run) -> Outcome:
    """Run it as the interpreter would: streams that are closed are None, and what is buffered is written at the end."""
    said.mkdir(exist_ok=True)
    terminal = pty.openpty() if "tty" in (place.stdin, place.stdout, place.stderr) else (-1, -1)
    if not (pid := os.fork()):
        code = 99
        try:
            code = _inside(arguments, place, said, terminal[1], verb)
        finally:
            os._exit(code)
    shown = _shown(terminal) if terminal[0] >= 0 else ""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = [
        (said / name).read_bytes().decode("utf-8", "replace") if (said / name).exists() else ""
        for name in ("out", "err")
    ]
    return Outcome(code, texts[0] + shown, texts[1])


def _shown(terminal: tuple[int, int]) -> str:
    """Everything that the child writes to the terminal; it ends with the child."""
    os.close(terminal[1])
    seen = b""
    with contextlib.suppress(OSError):
        while piece := os.read(terminal[0], 1 << 16):
            seen += piece
    os.close(terminal[0])
    return seen.decode("utf-8", "replace")


def _inside(arguments: list[str], place: Place, said: Path, terminal: int, verb: Callable[[list[str]], int]) -> int:
    os.chdir(place.here)
    os.environ.update(place.environment)
    for name in place.without:
        os.environ.pop(name, None)
    streams = [
        _stream(0, place.stdin, "", terminal, place.encoding),
        _stream(1, place.stdout, str(said / "out"), terminal, place.encoding),
        _stream(2, place.stderr, str(said / "err"), terminal, place.encoding),
    ]
    sys.stdin, sys.stdout, sys.stderr = streams  # type: ignore[assignment]
    place.before()
    code = verb(arguments)
    for stream in (sys.stdout, sys.stderr):
        try:  # as Python does when it ends
            stream.flush()
        except (OSError, ValueError):
            return 120
    return code


def _stream(number: int, wanted: str, kept: str, terminal: int, encoding: str) -> io.TextIOWrapper | None:
    if wanted == "closed":
        os.close(number)
        return None
    mode = "r" if number == 0 else "w"
    opened = (
        terminal
        if wanted == "tty"
        else os.open(wanted or kept, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT, 0o600)
    )
    os.dup2(opened, number)
    return open(number, mode, encoding=encoding, closefd=False)


def drop_rights() -> None:
    """Let even root be refused where the permissions of a file say so."""
    if os.geteuid() == 0:
        header, data = (ctypes.c_uint32 * 2)(CAPABILITIES_3, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(header, data) == 0


def listing(folder: Path) -> dict[str, int]:
    """Every file and folder below, with its size."""
    return {str(path.relative_to(folder)): path.lstat().st_size * path.is_file() for path in folder.rglob("*")}
