"""Turn what a terminal shows into a picture for the README.

tmux capture-pane -e -p | uv run python docs/capture.py docs/quickstart.svg
"""

from __future__ import annotations

import io
import sys

from rich.console import Console
from rich.text import Text


def main(out: str, width: int = 110) -> None:
    """Read a screen with ANSI colours from standard input and write it as SVG."""
    screen = Text.from_ansi(sys.stdin.read().rstrip("\n"))
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print(screen)
    console.save_svg(out, title="uv run smalllm train")


if __name__ == "__main__":
    main(sys.argv[1])
