"""Writes the parts of the documentation that the program itself knows: docs/cli.md and the table of settings.

    uv run python docs/generate.py            rewrite what is stale
    uv run python docs/generate.py --check    change nothing; exit code 1 if something is stale

tests/test_docs.py runs the check, so that a new option or setting cannot be forgotten here.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from rich.console import Console

from smalllm.cli import VERBS, build_app, overview
from smalllm.config import RunConfig, Section

DOCS = Path(__file__).parent
WIDTH = 100
BEGIN, END = "<!-- settings: made by docs/generate.py -->", "<!-- end of settings -->"

CLI_HEADER = """\
# The command line

Made by `docs/generate.py` from the program's own help; do not edit by hand.

`RUN` is a run folder, the name of a run under `runs/`, or one checkpoint folder of a run; left out, it is the newest
run under `runs/`. With `--json`, standard output holds JSON only and everything else goes to standard error.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | an error, told in one sentence on standard error |
| 2 | the command line could not be understood |
| 129, 130, 143 | ended by SIGHUP, SIGINT (Ctrl-C), SIGTERM; `train` has saved a checkpoint before |
"""


def pages() -> dict[Path, str]:
    """What every generated file should hold."""
    training = DOCS / "training.md"
    return {DOCS / "cli.md": cli_page(), training: with_settings(training.read_text(encoding="utf-8"))}


# the command line


def cli_page() -> str:
    """The help of the program and of every verb."""
    parts = [CLI_HEADER, _block("smalllm --help", overview())]
    parts += [_block(f"smalllm {verb}", help_text(verb)) for verb in VERBS]
    return "\n".join(parts)


def help_text(verb: str) -> str:
    """`smalllm VERB --help` on a terminal of fixed width without colour."""
    file = io.StringIO()
    build_app().help_print([verb], console=Console(file=file, width=WIDTH, color_system=None, legacy_windows=False))
    return "\n".join(line.rstrip() for line in file.getvalue().strip().splitlines())


def _block(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text}\n```\n"


# the settings


def with_settings(page: str) -> str:
    """The page with the table between its markers made new."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit("docs/training.md has lost the markers of its table of settings")
    return f"{before}{BEGIN}\n\n{settings_tables()}\n{END}{after}"


def settings_tables() -> str:
    """One table for the settings of the run itself and one for each section, in the order of the schema."""
    top = {name: field for name, field in RunConfig.model_fields.items() if not _is_section(field)}
    tables = [_table("The run", "", top)]
    for name, field in RunConfig.model_fields.items():
        if _is_section(field):
            tables.append(_table(f"`[{name}]`", f"{name}.", field.annotation.model_fields))  # type: ignore[union-attr]
    return "\n".join(tables)


def _table(title: str, prefix: str, fields: dict[str, FieldInfo]) -> str:
    lines = [f"**{title}**", "", "| setting | default | values | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        cells = (f"`{prefix}{name}`", _default(field), _values(field), field.description or "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _default(field: FieldInfo) -> str:
    value = field.get_default()
    if value is None:
        return "not set"
    return f"`{value if isinstance(value, str) and value else json.dumps(value)}`"


def _values(field: FieldInfo) -> str:
    """What may be written, from the type and its bounds."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
    return " ".join([_type_name(field.annotation), *_bounds(field)])


def _type_name(annotation: Any) -> str:
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    if get_origin(annotation) is tuple:
        return f"{len(kinds)} numbers"
    return {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}[kinds[0]]


def _bounds(field: FieldInfo) -> Iterator[str]:
    words = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}", "pattern": "that matches `{}`"}
    for constraint in field.metadata:
        for name, form in words.items():
            if (bound := getattr(constraint, name, None)) is not None:
                yield form.format(f"{bound:g}" if isinstance(bound, float) else bound)


def main(arguments: list[str]) -> int:
    """Rewrite stale pages, or with --check only name them."""
    if arguments not in ([], ["--check"]):
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    stale = {path: text for path, text in pages().items() if not path.exists() or path.read_text("utf-8") != text}
    for path, text in stale.items():
        if arguments:
            print(f"{path.name} is stale; run: uv run python docs/generate.py", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.name}")
    return 1 if arguments and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
