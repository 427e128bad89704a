"""Compile a C++ file of this package for this very CPU, once, and load it.

Libraries are plain C functions over pointers, called with ctypes (which releases the GIL): no headers of Python or torch,
so that compiling takes seconds. They are kept in the user's cache under a hash of everything that shapes them. Who calls
``load`` has a slower path for when there is no compiler, and says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from functools import cache
from pathlib import Path

# What of -ffast-math keeps infinities, NaN and the order of operations.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fno-strict-aliasing",
)  # fmt: skip
SECONDS = 180
FOLDER = Path(__file__).parent
NO_COMPILER = "there is no C++ compiler here (g++); install one to train faster"


class Unavailable(RuntimeError):
    """There is no native code here; the message says why."""


_locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
_building: list[threading.Thread] = []


def load(name: str) -> ctypes.CDLL:
    """The library of ``native/<name>.cpp``; Unavailable when it cannot be built here. Several threads may ask at once, and
    several processes: each of those builds to a file of its own, and the last rename wins."""
    with _locks[name]:
        return _load(name)


@cache
def _load(name: str) -> ctypes.CDLL:
    if os.environ.get("SMALLLM_NATIVE") == "0":
        raise Unavailable("SMALLLM_NATIVE=0")
    if sys.platform != "linux":
        raise Unavailable("native code is built on Linux only")
    path = compiler()
    if path is None:
        raise Unavailable(NO_COMPILER)
    source = FOLDER / f"{name}.cpp"
    try:
        library = cache_folder() / f"{name}-{_fingerprint(source, path)}.so"
        if not library.exists():
            _build(source, path, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{path} could not build {name}.cpp: {_reason(error)}") from None


def begin(*names: str) -> None:
    """Build libraries beside other work, one after another, so that a later ``load`` finds them."""

    def quietly() -> None:
        for name in names:
            with contextlib.suppress(Unavailable):
                load(name)

    thread = threading.Thread(target=quietly, name=f"build {' '.join(names)}", daemon=True)
    _building.append(thread)
    thread.start()


def wait() -> None:
    """Let what was begun be finished: a compiler beside it would spoil what is to be measured."""
    while _building:
        _building.pop().join()


def compiler() -> str | None:
    """Path of the C++ compiler: $CXX, g++ or clang++."""
    return next((path for path in map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")) if path), None)


def cache_folder() -> Path:
    """Where built libraries are kept: $XDG_CACHE_HOME/smalllm, by default ~/.cache/smalllm."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "smalllm"


def _build(source: Path, compiler: str, library: Path) -> None:
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [compiler, *FLAGS, str(source), "-o", str(built)]
        subprocess.run(command, capture_output=True, check=True, timeout=SECONDS)
        os.replace(built, library)


def _fingerprint(source: Path, compiler: str) -> str:
    """-march=native makes a library that other CPUs may not run: a home folder may be shared between machines."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=SECONDS).stdout
    texts = [source.read_bytes(), *(header.read_bytes() for header in sorted(FOLDER.glob("*.h")))]
    parts = (*texts, version, " ".join(FLAGS).encode(), platform.machine().encode(), _cpu())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu() -> bytes:
    """Model and instruction sets of the first processor."""
    wanted = (b"model name", b"cpu family", b"model\t", b"flags", b"Features", b"CPU part")
    first = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0]
    return b"\n".join(line for line in first.splitlines() if line.startswith(wanted))


def _reason(error: Exception) -> str:
    said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
    return next((line for line in said if "error" in line), str(error))
