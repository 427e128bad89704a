"""Where an export goes: written beside its place under another name, moved there in one step when it is whole.

Nothing half-written stays on any error, and what is there is replaced only when it is an earlier export, which its
certificate says. It knows nothing of formats.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smalllm.config import UserError
from smalllm.files import FileSystem
from smalllm.untrusted import printable

CERTIFICATE = "certificate.json"


def certificate_file(out: Path) -> Path:
    """Where the certificate of an export stands: inside of a folder, beside a file. Where another file's certificate has
    that name already, the name of this one stands before it."""
    if out.is_dir():
        return out / CERTIFICATE
    beside = out.with_name(CERTIFICATE)
    own = out.with_name(f"{out.name}.{CERTIFICATE}")
    return own if own.exists() or _certified(beside) not in (None, out.name) else beside


def check_free(out: Path) -> None:
    """UserError when something is at this place that is not an earlier export, or the place cannot be."""
    if not out.name:
        raise UserError(f"--out {out} names no file or folder; give the path of a new one")
    if not _possible(out):
        raise UserError(f"--out {printable(str(out))}: no file can have this name; give a shorter or plainer one")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    if (out.exists() or out.is_symlink()) and _certified(certificate_file(out)) != out.name:
        raise UserError(f"{out} exists and is not an earlier export; choose another --out, or move it away")


def _possible(out: Path) -> bool:
    """Whether a file can be called so, and those beside it that exist for a moment."""
    try:
        os.lstat(out.with_name(f".trash-{out.name}-{os.getpid()}"))
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    except ValueError:  # NUL, or characters that the file system cannot spell
        return False
    return True


@contextmanager
def replacing(out: Path, files: FileSystem | None = None) -> Iterator[Path]:
    """A path beside ``out`` to write a file or a folder at. When the block ends it takes the place of ``out``, on disk to
    the last byte; when the block fails it is removed and ``out`` is as it was. UserError as `check_free`."""
    files = files or FileSystem()
    check_free(out)
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    aside = out.with_name(f".trash-{out.name}-{os.getpid()}")
    _remove(temporary, files)
    try:
        yield temporary
        _sync(temporary, files)
        if out.is_dir():
            files.rename(out, aside)
        files.rename(temporary, out)
        files.sync_folder(out.parent)
    except BaseException:
        if aside.exists() and not out.exists():
            files.rename(aside, out)
        raise
    finally:
        _remove(temporary, files)
        _remove(aside, files)


def _certified(certificate: Path) -> str | None:
    """The name of the export that a certificate is for; None when there is no certificate that can be read."""
    try:
        path = json.loads(certificate.read_bytes())["path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return Path(path).name if isinstance(path, str) else None


def _sync(path: Path, files: FileSystem) -> None:
    """All bytes and names below a path are on the device when this returns."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        else:
            files.sync_folder(file)
    if path.is_dir():
        files.sync_folder(path)


def _remove(path: Path, files: FileSystem) -> None:
    if path.exists() or path.is_symlink():
        files.remove_tree(path)
