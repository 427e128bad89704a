"""What is safe to print: text of models and data may hold escape codes that move cursors, set titles or fill clipboards."""

from __future__ import annotations

import unicodedata


def plain(text: str) -> str:
    """The text without control and format-override characters, except newline and tab.

    >>> plain("a\\x1b[2Jb\\nc")
    'a[2Jb\\nc'
    """
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") and c not in _BIDI)


_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
