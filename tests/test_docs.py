"""Documentation cannot rot: generated parts are fresh, commands parse and run, links lead somewhere."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from test_server import serving

from smalllm.cli import VERBS, build_app, function_name, run
from smalllm.config import load_recipe, recipe_names
from smalllm.data.storyworld import check, entropy_bits_per_byte, stories

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "DEPLOYMENT.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^ {0,3}```([a-z]*)[^\n]*\n(.*?)^ {0,3}```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)|(?:src|href|srcset)=\"([^\"]+)\"")
SHELLS = ("console", "bash", "sh", "shell")


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# ── reading commands ──


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `smalllm` of each command in the page's shell blocks; pipes and assignments are understood."""
    for language, block in FENCE.findall(_text(page)):
        if language in SHELLS:
            for line in block.replace("\\\n", " ").splitlines():
                yield from _of_line(line.strip().removeprefix("$ "))


def _of_line(line: str) -> Iterator[list[str]]:
    """The commands of one line: `a | b`, `a && b`, `NAME=value a`, `uv run a`, `a > file`, `a &`, `a # why`.

    >>> list(_of_line("HF_HUB_OFFLINE=1 uv run smalllm prepare - --out d | smalllm plot > x  # why"))
    [['prepare', '-', '--out', 'd'], ['plot']]
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;"):
            yield from _smalllm(words)
            words = []
        else:
            words.append(word)


def _smalllm(words: list[str]) -> Iterator[list[str]]:
    redirected = next((i for i, word in enumerate(words) if set(word) <= set("<>") and word), len(words))
    words = words[:redirected]
    while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
        words = words[1:]
    if words[:2] == ["uv", "run"]:
        words = words[2:]
        while words and words[0].startswith("--"):  # --no-sync and the like
            words = words[1:]
    if words[:1] == ["smalllm"]:
        yield words[1:]


def test_commands_are_found():
    line = "HF_HUB_OFFLINE=1 uv run smalllm prepare - --out d | smalllm plot > x  # why"
    assert list(_of_line(line)) == [["prepare", "-", "--out", "d"], ["plot"]]
    assert list(_of_line('uv run smalllm sample --prompt "A | b" &')) == [["sample", "--prompt", "A | b"]]
    assert list(_of_line("uv run pytest && uv sync")) == []


COMMANDS = [pytest.param(words, id=f"{page.name}: {shlex.join(words)}") for page in PAGES for words in commands(page)]


def test_documentation_has_commands():
    assert len(COMMANDS) > 20


# ── they parse ──


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_parses(words):
    if words in ([], ["--help"], ["--version"]):
        return
    assert words[0] in VERBS
    words = ["22" if word == "PORT" else word for word in words]  # a placeholder of DEPLOYMENT.md
    function, bound, ignored = build_app().parse_args(words, exit_on_error=False, print_error=False)
    if "--help" in words:
        return
    assert function.__name__ == function_name(words[0]) and not ignored
    if words[0] in ("train", "deploy"):
        _check_settings(*bound.arguments.get("words", ()))
    for key in ("run", "runs"):  # an option that was misspelled must not pass for a run
        assert not [run for run in _as_list(bound.arguments.get(key)) if run.startswith("-")]


def _as_list(value: str | tuple[str, ...] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _check_settings(*words: str) -> None:
    """The recipe and its overrides are legal; the file of the reader's own recipe stands for the quickstart."""
    recipe = words[0] if words and "=" not in words[0] else "quickstart"
    overrides = [word for word in words if word != recipe]
    load_recipe("quickstart" if recipe.endswith(".toml") else recipe, overrides)


def test_a_wrong_command_does_not_parse():
    with pytest.raises(Exception, match="nonsense"):
        test_every_command_parses(["sample", "--nonsense", "3"])
    with pytest.raises(ValueError, match=r"train\.stepz"):
        test_every_command_parses(["train", "laptop", "train.stepz=3"])
    with pytest.raises(AssertionError):
        test_every_command_parses(["teleport"])


# ── they run ──

SHRUNK = [
    "train.steps=6", "train.minutes=0", "train.evaluate_every=3", "train.batch_tokens=256", "train.sample_tokens=8",
    "train.compile=off", "train.precision=fp32", "train.device=cpu",
    "model.layers=1", "model.width=32", "model.heads=2", "model.context=64", "data.vocab_size=400",
]  # fmt: skip
SMALLER = {
    "train": {"--minutes": "0"},
    "prepare": {"--vocab-size": "400", "--limit": "120"},
    "sample": {"--max-tokens": "12", "--device": "cpu"},
    "chat": {"--max-tokens": "12", "--device": "cpu"},
    "evaluate": {"--max-tokens": "12", "--limit": "3", "--stories": "2", "--device": "cpu"},
    "plot": {},
}
TYPED = "One day\n\n/temp 0.5\n/settings\n/quit\n"


def shrunk(words: list[str]) -> list[str]:
    """The command with the options and settings that make it a matter of a second."""
    kept = list(words)
    for option in SMALLER[words[0]]:
        if option in kept:
            place = kept.index(option)
            del kept[place : place + 2]
    if words[0] != "train":
        return kept + [part for option, value in SMALLER[words[0]].items() for part in (option, value)]
    recipe = kept[1] if len(kept) > 1 and "=" not in kept[1] and not kept[1].startswith("-") else "quickstart"
    source = [] if recipe.endswith(".toml") else ["data.source=storyworld:120"]
    return [*kept, *SHRUNK, *source]


def test_tutorial_runs_from_the_first_command_to_the_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts = list(stories(count=120))
    (tmp_path / "mine.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    (tmp_path / "texts").mkdir()
    for part in range(3):
        (tmp_path / "texts" / f"part{part}.txt").write_text("\n<|endoftext|>\n".join(texts[part::3]), encoding="utf-8")
    walk = list(commands(ROOT / "docs" / "tutorial.md"))
    assert {words[0] for words in walk} >= {"train", "sample", "chat", "prepare", "evaluate", "plot"}
    for words in walk:
        monkeypatch.setattr(sys, "stdin", io.StringIO(TYPED))
        code = run(shrunk(words))
        told = capsys.readouterr()
        assert code == 0, f"smalllm {shlex.join(words)}\n{told.out}\n{told.err}"
        assert told.out.strip(), f"smalllm {shlex.join(words)} says nothing"
    _check_tree(tmp_path)
    assert (
        run(["export", "runs/quickstart", "--to", "huggingface", "--out", "my-stories"]) == 0
    )  # docs/export.md reads it
    with serving(tmp_path / "runs" / "quickstart") as service:
        for page in (ROOT / "docs").glob("*.md"):
            for number, block in enumerate(_python_blocks(page)):
                script = tmp_path / f"{page.stem}{number}.py"
                script.write_text(block.replace("http://127.0.0.1:8000", service.url), encoding="utf-8")
                runpy.run_path(str(script))


def _python_blocks(page: Path) -> list[str]:
    return [block for language, block in FENCE.findall(_text(page)) if language == "python"]


def _check_tree(folder: Path) -> None:
    """The tutorial's drawing of the run folder is what is there."""
    drawing = _text(ROOT / "docs" / "tutorial.md").partition("## 9.")[2]
    for name in re.findall(r"[├└]── ([\w.]+)", drawing):
        assert (folder / "runs" / "quickstart" / name).exists(), name
    assert (folder / "data" / "quickstart" / "manifest.json").exists()


# ── what is generated, counted or shown ──


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_fresh(generate):
    for path, expected in generate.pages().items():
        assert _text(path) == expected, f"{path.name} is stale; run: uv run python docs/generate.py"


def test_every_setting_is_in_the_table(generate):
    from smalllm.config import setting_names

    shown = re.findall(r"^\| `([a-z_.]+)` \|", generate.settings_tables(), re.MULTILINE)
    assert shown == setting_names()


def test_check_finds_a_stale_page(generate, tmp_path, monkeypatch, capsys):
    for name in ("cli.md", "training.md"):
        shutil.copy(ROOT / "docs" / name, tmp_path)
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    assert generate.main(["--check"]) == 0
    (tmp_path / "cli.md").write_text("old")
    assert generate.main(["--check"]) == 1 and (tmp_path / "cli.md").read_text() == "old"
    assert generate.main([]) == 0 and generate.main(["--check"]) == 0
    assert generate.main(["--wrong"]) == 2
    capsys.readouterr()


def test_parameter_counts_are_true():
    """Each row of the table of recipes in docs/models.md."""
    import torch

    from smalllm.model import GPT

    rows = re.findall(
        r"^\| `([\w-]+)` \| `(\w+)` ((?:\| [\d,]+ ){7})\|$", _text(ROOT / "docs" / "models.md"), re.MULTILINE
    )
    assert sorted(name for name, _, _ in rows) == recipe_names()
    for name, architecture, cells in rows:
        recipe = load_recipe(name)
        model = recipe.replace(model={"vocab_size": recipe.data.vocab_size}).model
        with torch.device("meta"):
            gpt = GPT(model)
        numbers = [int(cell.replace(",", "")) for cell in cells.strip("| ").split(" | ")]
        expected = [model.layers, model.width, model.heads, model.context, model.vocab_size]
        assert (architecture, numbers) == (
            model.architecture,
            [*expected, gpt.parameters_count(), gpt.embedding_parameters()],
        )


def test_story_world_example_is_true():
    """The Python block of docs/data.md, by what it claims."""
    one = next(stories(seed=42))
    assert check(one).consistent and not check(one + " And then?").parses
    assert 0.1 < entropy_bits_per_byte([one]) < 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page):
    for language, block in FENCE.findall(_text(page)):
        if language == "python":
            compile(block, page.name, "exec")
        if language == "toml":
            tomllib.loads(block)


EXAMPLES = [
    ".".join(("smalllm", *path.relative_to(ROOT / "src" / "smalllm").with_suffix("").parts))
    for path in sorted((ROOT / "src").rglob("*.py"))
    if ">>> " in _text(path)
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_are_true(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


# ── the messages of docs/troubleshooting.md are the program's ──


def _sentences() -> list[str]:
    """Every text in the source; a NUL stands where a value is put in."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(_text(path))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def _quoted_messages() -> list[str]:
    """Code spans in the first column of the tables of messages."""
    page = _text(ROOT / "docs" / "troubleshooting.md")
    tables = re.findall(r"^\| (?:symptom or )?message \|.*\n\|.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    return [span for row in rows for span in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def test_messages_in_troubleshooting_are_those_of_the_program():
    messages, sentences = _quoted_messages(), _sentences()
    assert len(messages) > 25
    for message in messages:
        for fragment in re.split(r"\.\.\.|\d+|'[^']*'", message):  # values stand where the program puts its own
            known = any(fragment.strip() in sentence for sentence in sentences)
            assert len(fragment) < 6 or known, f"no message of the program has {fragment!r} (from {message!r})"


# ── links ──


def _anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", _text(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in (first or second for first, second in LINK.findall(FENCE.sub("", _text(page)))):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert not Path(path).is_absolute() and target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in _anchors(target), f"{page.name} links to {link}, which is no heading there"


# ── the repository ──


def _git(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is not a checkout")
    return subprocess.run(["git", *arguments], cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=60)


def test_ignore_patterns_are_anchored():
    patterns = [line.strip() for line in _text(ROOT / ".gitignore").splitlines()]
    patterns = [line for line in patterns if line and not line.startswith("#")]
    assert [line for line in patterns if not line.startswith("/")] == ["__pycache__/"]


def test_no_source_file_is_ignored():
    """An unanchored `data/` once swallowed a package of that name."""
    files = [path for folder in ("src", "tests", "docs") for path in (ROOT / folder).rglob("*") if path.is_file()]
    names = [str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts]
    ignored = _git("check-ignore", "--no-index", "--stdin", stdin="\n".join(names))
    assert ignored.stdout.split() == []


def test_no_file_knows_the_machine_it_was_written_on():
    names = _git("ls-files", "--cached", "--others", "--exclude-standard", "-z").stdout.split("\0")
    private = re.compile(rb"(?<![\w/.:~*)$-])/(?:home|root|work|Users|mnt)/\w")
    found = []
    for name in filter(None, names):
        path = ROOT / name
        if path.is_file() and path.suffix not in (".png", ".svg", ".bin", ".model"):
            found += [f"{name}: {match[0].decode()}" for match in private.finditer(path.read_bytes())]
    assert found == []


def test_no_lock_file_with_registry_addresses():
    assert _git("ls-files", "uv.lock", "poetry.lock", "Pipfile.lock", "pdm.lock").stdout.split() == []
    for path in ROOT.glob("requirements*.txt"):
        assert "://" not in _text(path), f"{path.name} holds an address"
