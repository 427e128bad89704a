"""Files that somebody else may have made: what is no regular file, or larger than its kind ever is, is not read at all.

Raises OSError alone, with a reason in ``strerror``, for the caller's sentence. Knows nothing about what files hold.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO


def opened(path: Path) -> IO[bytes]:
    """A regular file, open for reading. A pipe or a device, which could keep its reader waiting for ever, is an OSError; so
    is a name that no file can have."""
    try:
        file = open(path, "rb", opener=_at_once)  # noqa: SIM115 (the caller closes it)
    except ValueError:  # NUL, or characters that the file system cannot spell
        raise OSError(errno.EINVAL, "no file can have this name") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def content(path: Path, largest: int) -> bytes:
    """The bytes of a regular file of at most so many."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than the {largest:,} of any such file")
        return file.read(size)


def printable(text: str, most: int = 80) -> str:
    """Foreign text for one line of a message: what no terminal should get is escaped, and so much of it is enough.

    >>> printable("a\\nb\\x1b[2J")
    'a\\\\nb\\\\x1b[2J'
    """
    shown = text[:most] + ("..." if len(text) > most else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
