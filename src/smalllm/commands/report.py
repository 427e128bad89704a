"""`smalllm report`: a page about runs, as HTML and as Markdown. The work is `reporting`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smalllm.checkpoint import find_run
from smalllm.config import UserError
from smalllm.files import FileSystem
from smalllm.hardware import pick_device
from smalllm.plots import Axis, axis
from smalllm.reporting import html, markdown
from smalllm.reporting.dossier import DOCUMENTS, STORIES, Dossier, default_out, gather
from smalllm.terminal import plain


def report(
    *runs: Annotated[str, Parameter(name="RUN", show_default=False)],
    out: Annotated[Path | None, Parameter(name="--out")] = None,
    stories: Annotated[int, Parameter(name="--stories")] = STORIES,
    text: Annotated[str | None, Parameter(name="--text")] = None,
    limit: Annotated[int, Parameter(name="--limit")] = DOCUMENTS,
    x: Annotated[str, Parameter(name="--x")] = "step",
    device: Annotated[str, Parameter(name="--device")] = "auto",
) -> None:
    """Write one page about runs: curves, scores, verdict, stories, settings, environment.

    Parameters
    ----------
    runs
        Run folders or names; left out, the newest run. Several are compared as `smalllm compare` does.
    out
        A .html, with a .md beside it, or a .md alone; left out, report.html in the first run's folder.
    stories
        Let each model tell N stories and report on them; 0: none.
    text
        Documents to score, in a file [default: the validation documents of the first run].
    limit
        Score the first N documents.
    x
        What the curves run over: step, tokens or time.
    device
        auto, cpu, mps, cuda or cuda:N.
    """
    if stories < 0 or limit < 1:
        setting, value, least = ("stories", stories, 0) if stories < 0 else ("limit", limit, 1)
        raise UserError(f"{setting} = {value} is not possible; use {least} or more")
    below, targets = axis(x), list(runs) or [str(find_run(None)[0].path)]
    target = _checked(out or default_out(targets))
    dossier = gather(targets, text=text, limit=limit, stories=stories, device=str(pick_device(device)), say=_say)
    for path, written in _files(target, dossier, below).items():
        FileSystem().replace(path, [written.encode()])
        print(plain(f"written {path}"))


def _checked(out: Path) -> Path:
    """Said before the minutes of measuring, and not after them."""
    if out.suffix.lower() not in (".html", ".md"):
        raise UserError(f"--out {out}: give a name that ends in .html or .md")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it, or choose another")
    return out


def _files(out: Path, dossier: Dossier, below: Axis) -> dict[Path, str]:
    found = {out.with_suffix(".md"): markdown.text(dossier)}
    return {out: html.page(dossier, below), **found} if out.suffix.lower() == ".html" else found


def _say(message: str) -> None:
    print(plain(message), file=sys.stderr)
