"""What is safe to print: text of models and data may hold escape codes that move cursors, set titles or fill clipboards."""

from __future__ import annotations

import contextlib
import io
import os
import unicodedata
from typing import TextIO


def plain(text: str) -> str:
    """The text without control and format-override characters, except newline and tab.

    >>> plain("a\\x1b[2Jb\\nc")
    'a[2Jb\\nc'
    """
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") and c not in _BIDI)


_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class LastingOutput(io.TextIOBase):
    """A terminal or pipe that may go away (a closed window, `| head`, a full disk behind `>`): from then on what is written
    is lost, and nothing else happens. None stands for a standard stream that was closed from the beginning."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]  # read-only here as there
        return self.stream.encoding if self.stream else "utf-8"

    def write(self, text: str) -> int:
        """All of the text, or nothing once the reader is gone."""
        try:
            return self.stream.write(text) if self.stream else len(text)
        except (OSError, ValueError):
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Hand on what was written, if somebody is there."""
        try:
            if self.stream:
                self.stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def isatty(self) -> bool:
        with contextlib.suppress(ValueError):
            return self.stream is not None and self.stream.isatty()
        return False

    def fileno(self) -> int:
        if self.stream is None:
            raise OSError("the stream is closed")
        return self.stream.fileno()

    def _give_up(self) -> None:
        """What is still in the stream's own buffer must not fail again when Python ends."""
        stream, self.stream = self.stream, None
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno() if stream else nowhere)
            os.close(nowhere)
