"""Trials of the command line: wrong arguments and strange surroundings, missing packages, no network, secrets, and foreign
text in everything that is printed or written for others to read."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import random
import re
import socket
import subprocess
import sys
import tomllib
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from commands_apart import Outcome, Place, command, drop_rights, listing
from conftest import tiny_settings
from export_runs import random_run
from markdown_it import MarkdownIt
from rich.console import Console
from test_generation import save_run

from smalllm.checkpoint import RunFolder, open_run
from smalllm.cli import VERBS, run
from smalllm.commands import bench, chat, doctor, evaluate, export, import_, plot, prepare, sample, serve, train  # noqa: F401
from smalllm.config import RunConfig, UserError
from smalllm.data.prepare import PrepareProgress, PrepareResult
from smalllm.data.prepare import prepare as prepare_dataset
from smalllm.export import card
from smalllm.generation import Chunk, Completion, SamplingParams
from smalllm.reliability.trials import Trial

TINY = [
    "model.layers=1", "model.width=32", "model.heads=2", "model.context=64", "train.batch_tokens=256", "train.minutes=0", "train.steps=4",
    "train.compile=off", "train.precision=fp32", "train.sample_tokens=8", "train.log_every=2", "train.preflight=false", "train.evaluate_tokens=500",
]  # fmt: skip
QUIET = {"SMALLLM_NATIVE": "0"}  # no compiler runs


def set_up(given: Path) -> None:
    """Data, a run with metrics, and one whose weights bear rounding to int8."""
    random_run(given / "shape")
    prepare_dataset(["storyworld:300"], given / "data", vocab_size=512, seed=1)
    save_run(given / "tale", tiny_settings(given / "data", model={"context": 128}, train={"micro_batch": 2}), 4)
    records = [
        {"step": step, "tokens": 9 * step, "train_loss": 2.0, "valid_bits_per_byte": 1.0, "lr": 1e-3} for step in (1, 2)
    ]
    RunFolder(given / "tale").metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))


# ── C1: wrong arguments in strange surroundings ──

TARGETS: dict[str, Callable[[str], list[str]]] = {verb: lambda it: [it] for verb in VERBS} | {
    "train": lambda it: [f"{it}.toml"],
    "prepare": lambda it: [f"{it}.txt", "--out", "made"],
    "serve": lambda it: [it, "--port", "0"],
    "export": lambda it: [it, "--to", "gguf", "--out", "made.gguf"],
    "import": lambda it: [it, "--out", "made"],
    "bench": lambda it: ["decode", it],
}
MISTAKES = ("help", "nothing", "unknown option", "typo", "missing", "directory", "forbidden", "binary", "empty", "odd")
SURROUNDINGS: dict[str, dict[str, Any]] = {
    "home that cannot be written": {"before": drop_rights},
    "no home": {"without": ("HOME",)},
    "not UTF-8": {"encoding": "ascii", "environment": {"LC_ALL": "C"}},
    "one column": {"environment": {"COLUMNS": "1"}},
    "dumb terminal": {"environment": {"TERM": "dumb"}, "stdin": "tty", "stdout": "tty", "stderr": "tty"},
    "no colour": {"environment": {"NO_COLOR": "1"}, "stdin": "tty", "stdout": "tty", "stderr": "tty"},
    "terminal": {"stdin": "tty", "stdout": "tty", "stderr": "tty"},
    "closed input": {"stdin": "closed"},
    "closed output": {"stdout": "closed"},
    "closed errors": {"stderr": "closed"},
    "all closed": {"stdin": "closed", "stdout": "closed", "stderr": "closed"},
    "full disk": {"stdout": "/dev/full"},
    "errors to a full disk": {"stderr": "/dev/full"},
    "binary input": {"stdin": "/dev/urandom"},
}
PAIRS = [
    *((verb, mistake, "none") for verb in VERBS for mistake in MISTAKES if (verb, mistake) != ("doctor", "nothing")),
    *((verb, mistake, about) for verb in VERBS for about in SURROUNDINGS for mistake in ("help", "missing")),
]
random.Random(0).shuffle(PAIRS)  # so that the first hundred are of all kinds
REAL = [(verb, stream) for verb in VERBS for stream in ("1>&-", "1>/dev/full", "0<&-")]


def misuse(number: int, folder: Path, given: Path) -> None:
    """A pair of a mistake and its surroundings; the last ones by a shell and a new interpreter."""
    here, home, temporary = folder / "here", folder / "home", folder / "tmp"
    for made in (here, home, temporary):
        made.mkdir()
    _obstacles(here)
    home.chmod(0o500)
    surroundings = {"HOME": str(home), "TMPDIR": str(temporary), "XDG_CACHE_HOME": str(temporary / "cache")} | QUIET
    before = listing(folder)
    if number < len(PAIRS):
        verb, mistake, about = PAIRS[number]
        options = dict(SURROUNDINGS.get(about, {}))
        surroundings |= options.pop("environment", {})
        if mistake in ("forbidden", "nothing"):
            options["before"] = drop_rights
            here.chmod(0o500)
        before = listing(folder)
        done = command([verb, *_arguments(verb, mistake)], Place(here, surroundings, **options), folder / "said")
        name = f"{verb}, {mistake}, {about}"
    else:
        verb, stream = REAL[number - len(PAIRS)]
        line = f'"$0" -m smalllm {verb} --help {stream}'
        process = subprocess.run(
            ["sh", "-c", line, sys.executable], cwd=here, env=os.environ | surroundings, capture_output=True, text=True
        )
        done, mistake, about, name = Outcome(process.returncode, process.stdout, process.stderr), "help", stream, line
    after = {path: size for path, size in listing(folder).items() if not path.startswith("said")}
    assert after == before, f"{name}: written: {sorted(set(after) ^ set(before))}"
    _check_said(done, mistake, about, name)


def _obstacles(here: Path) -> None:
    (here / "directory").mkdir()
    (here / "directory.toml").mkdir()
    (here / "directory.txt").mkdir()
    for name in ("binary", "binary.toml", "binary.txt"):
        (here / name).write_bytes(bytes(range(256)) * 9)
    for name in ("forbidden", "forbidden.toml", "forbidden.txt"):
        (here / name).write_text("x")
        (here / name).chmod(0)


def _arguments(verb: str, mistake: str) -> list[str]:
    match mistake:
        case "help":
            return ["--help"]
        case "nothing":
            return []
        case "unknown option":
            return [*TARGETS[verb]("missing"), "--nonsense"]
        case "typo":
            return [*TARGETS[verb]("missing"), "--jsn", "--chekpoint=1"]
        case "empty":
            return ["", *TARGETS[verb]("")]
        case "odd":
            return TARGETS[verb]("\x1b[2J\u202e\n\n[/b] \udcff" + "x" * 300)
    return TARGETS[verb](mistake)


def _check_said(done: Outcome, mistake: str, about: str, name: str) -> None:
    words = f"{name}: exit code {done.code}: {done.out[-800:]!r} {done.err[-800:]!r}"
    codes = {0, 1, 2} if about in ("full disk", "1>/dev/full") else {0} if mistake == "help" else {1, 2}
    assert done.code in codes, words
    said = done.out + done.err
    assert "Traceback" not in said and "Exception ignored" not in said and "bug of smalllm" not in said, words
    if "tty" in str(SURROUNDINGS.get(about)):
        return  # bars and colours stand around the message
    assert not controls(said), words
    if done.code and "closed" not in about and "errors to a" not in about:
        message = done.err.strip()
        assert message and "\n\n" not in message and len(message) < 1500, words


def controls(text: str) -> set[str]:
    """Characters that a terminal would obey."""
    bidi = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return {c for c in text if c not in "\n\t" and (unicodedata.category(c) in ("Cc", "Cs") or c in bidi)}


# ── C2: packages that are missing ──

ABSENT = {
    "torch": ["sample", "nowhere"], "numpy": ["prepare", "storyworld:50", "--out", "d"], "safetensors": ["sample", "nowhere"],
    "sentencepiece": ["sample", "nowhere"], "pydantic": ["plot", "nowhere"], "cyclopts": ["plot", "nowhere"], "rich": ["sample", "nowhere"],
    "huggingface_hub": ["prepare", "hf://datasets/a/b", "--out", "d"], "pyarrow": ["prepare", "x.parquet", "--out", "d"],
    "starlette": ["serve", "nowhere"], "uvicorn": ["serve", "nowhere"], "matplotlib": ["plot", "RUN", "--out", "c.png"],
    "gguf": ["export", "RUN", "--to", "gguf", "--out", "m.gguf"], "tomli_w": ["train", "quickstart", *TINY, "--data", "DATA"],
    "wandb": ["train", "quickstart", *TINY, "--data", "DATA", "train.track=wandb"],
    "tensorboard": ["train", "quickstart", *TINY, "--data", "DATA", "train.track=tensorboard"],
}  # fmt: skip
BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from smalllm.cli import main
main(sys.argv[2:])
"""


def absent(number: int, folder: Path, given: Path) -> None:
    """Without the package the verb names the command that installs it, and the first page still comes."""
    package = list(ABSENT)[number]
    names = {"RUN": str(given / "tale"), "DATA": str(given / "data")}
    (folder / "x.parquet").write_bytes(b"PAR1")
    for arguments in (["--help"], [names.get(word, word) for word in ABSENT[package]]):
        done = subprocess.run(
            [sys.executable, "-c", BLOCKED, package, *arguments],
            cwd=folder,
            env=os.environ | QUIET,
            capture_output=True,
            text=True,
        )
        told = f"{package}: {arguments}: {done.returncode}: {done.stderr[-800:]}"
        assert "Traceback" not in done.stderr and "bug of smalllm" not in done.stderr, told
        install = "uv sync --extra track" if package in ("wandb", "tensorboard") else "uv sync"
        assert done.returncode == 0 if arguments == ["--help"] else done.returncode == 1 and install in done.stderr, (
            told
        )


# ── C3, C4: nothing is told to anybody ──

WORK: list[list[str]] = [
    ["sample", "RUN", "--max-tokens", "5", "--count", "2"],
    ["prepare", "storyworld:200", "--out", "made", "--vocab-size", "512"],
    ["train", "quickstart", *TINY, "--data", "DATA"],
    ["evaluate", "RUN", "--limit", "5", "--stories", "1", "--max-tokens", "10"],
    ["plot", "RUN", "--out", "curve.png"],
    ["chat", "RUN", "--max-tokens", "5"],
    ["export", "SHAPE", "--to", "html", "--out", "page.html"],
    ["export", "RUN", "--to", "gguf", "--out", "model.gguf"],
    ["export", "RUN", "--to", "llama2c", "--out", "llama2c"],
    ["export", "RUN", "--to", "huggingface", "--out", "model"],
    ["bench", "train", "quickstart", *TINY, "--seconds", "0.1"],
    ["bench", "decode", "RUN", "--seconds", "0.1"],
    ["doctor"],
    ["train", "quickstart", *TINY, "--data", "DATA", "optim.lr=nonsense"],
    ["sample", "nowhere"],
    ["import", "MODEL", "--out", "imported"],
]


def _worked(number: int, folder: Path, given: Path, before: Callable[[], Any], environment: dict[str, str]) -> Outcome:
    names = {
        "RUN": str(given / "tale"),
        "SHAPE": str(given / "shape"),
        "DATA": str(given / "data"),
        "MODEL": str(folder / "model.gguf"),
    }
    arguments = [names.get(word, word) for word in WORK[number]]
    (folder / "lines").write_text("Once upon a time\n/settings\n/temp x\n\n/save said.txt\n/quit\n")
    stdin = str(folder / "lines") if arguments[0] == "chat" else os.devnull
    place = Place(folder, QUIET | {"HOME": str(folder)} | environment, stdin=stdin, before=before)
    if "MODEL" in WORK[number]:
        command(["export", names["RUN"], "--to", "gguf", "--out", names["MODEL"]], place, folder / "said")
    done = command(arguments, place, folder / "said")
    failing = "nowhere" in arguments or "optim.lr=nonsense" in arguments
    assert done.code == (1 if failing else 0), f"{arguments}: {done}"
    return done


def offline(number: int, folder: Path, given: Path) -> None:
    """The verbs that need no network do without it: whoever wants to reach another machine is written down."""
    tried = folder / "tried"
    _worked(number, folder, given, lambda: _no_network(tried), {})
    assert not tried.exists(), f"{WORK[number]} wanted the network: {tried.read_text()}"


def _no_network(tried: Path) -> None:
    """Only this machine itself can be reached (llama.cpp, where it is installed, is asked over a port of its own)."""
    near = ("127.0.0.1", "localhost", "::1", None)

    def only_near(function: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            address = arguments[place] if len(arguments) > place else None
            if (address[0] if isinstance(address, tuple) else address) not in near and not isinstance(address, bytes):
                with open(tried, "a") as file:
                    file.write(f"{address}\n")
                raise OSError("no network")
            return function(*arguments, **named)

        return call

    for name in ("connect", "connect_ex"):
        setattr(socket.socket, name, only_near(getattr(socket.socket, name), 1))
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        setattr(socket, name, only_near(getattr(socket, name), 0))


CANARY = "canary-5f1e7"
SECRETS = {
    name: f"{CANARY}-{name}"
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "WANDB_API_KEY",
        "OPENAI_API_KEY",
        "SMALLLM_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
    )
}


def secrets(number: int, folder: Path, given: Path) -> None:
    """Nothing that is printed or written holds a secret of the environment: not the name of a variable's value, anywhere."""
    done = _worked(number, folder, given, lambda: None, SECRETS | {"SMALLLM_DEBUG": "1"})
    assert CANARY not in done.out + done.err, done
    told = [str(path) for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert not told, told


# ── F8: foreign text on a terminal ──

PIECES = [
    "\x1b[2J", "\x1b]0;title\x07", "\x1b]52;c;ZXZpbA==\x07", "\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\", "\x1bc", "\x1b[?1049h",
    "\x9b2J", "\x9d0;t\x9c", "\x90q\x9c", "\x07", "\b\b\b", "\r", "\x00", "\x7f", "\x0e", "\x0b", "\x0c", "\x85", "\u202e", "\u2066", "\u2069", "[/b]",
    "[bold]", "[link=http://evil.example]x[/link]", "[red on blue", "\\[", ":smile:", "{x}", "%s", "\udcff", "\ud800", "é", "名", "a", " ",
]  # fmt: skip


def hostile(number: int, trial: str) -> str:
    """A string of pieces; the first ones are one piece each."""
    chance = random.Random(f"{trial} {number}")
    return f"x{PIECES[number]}y" if number < len(PIECES) else "".join(chance.choices(PIECES, k=chance.randrange(2, 9)))


def injection(number: int, folder: Path, given: Path) -> None:
    """One string through every place that prints foreign text."""
    text, wrong = hostile(number, "F8"), []
    for name, printed in _printed(text, folder, given):
        assert printed, f"{name} printed nothing"
        if found := controls(printed):
            wrong.append(f"{name} printed {found}: {printed[:500]!r}")
    assert not wrong, f"of {text!r}: " + "; ".join(wrong)


def _printed(text: str, folder: Path, given: Path) -> Iterator[tuple[str, str]]:
    yield "chat", _said(lambda: (chat._show(text), chat._show(chat.Note(f"({text})"))))
    yield "chat's commands", _said(lambda: _chat(given, text))
    yield "sample", _said(lambda: _sample(text, False))
    yield "sample --json", _said(lambda: _sample(text, True))
    yield "sample's stream", _said(lambda: sample._stream(_Teller(text), text, SamplingParams(), Console()))  # type: ignore[arg-type]
    yield "train's lines", _said(lambda: _train(text, given, train.Lines, Console()))
    yield (
        "train's bars",
        _own_codes_away(_said(lambda: _train(text, given, train.Bars, Console(force_terminal=True, width=80)))),
    )
    yield "train's end", _said(lambda: _train_end(text, Console()))
    yield "doctor", _said(lambda: _doctor(text))
    yield "evaluate", _said(lambda: evaluate._print(_figures(text), text))
    yield "export", _said(lambda: export._print(_certificate(text), text))
    yield "import", _said(lambda: import_._print(_imported(text)))
    yield "plot", _said(lambda: _plot(text, folder))
    yield "prepare", _said(lambda: print(prepare._summary(_prepared(text))))
    yield "serve", _said(lambda: print(serve._greeting(_service(text))))  # type: ignore[arg-type]
    yield "serve's log", _said(lambda: _log(text))
    for verb in VERBS:
        yield f"{verb}'s errors", _said(lambda verb=verb: run([verb, *TARGETS[verb](text)]))
    yield "an unknown option", _said(lambda: run(["sample", f"--{text}"]))
    yield "an unknown verb", _said(lambda: run([text or "x"]))


def _said(function: Callable[[], Any]) -> str:
    """Everything that it prints; a stream that is UTF-8 cannot take a lone surrogate, so errors are replaced as in the CLI."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="utf-8", errors="replace", newline="")
    with redirect_stdout(stream), redirect_stderr(stream):
        try:
            function()
        except (UserError, SystemExit) as error:
            print(json.dumps(str(error)))
    stream.flush()
    return raw.getvalue().decode()


def _own_codes_away(text: str) -> str:
    """Without what the bar itself needs: colours, the cursor hidden and shown, lines cleared and gone up to."""
    return re.sub(r"\x1b\[(?:[0-9;]*m|\?25[lh]|2K|1A)|\r", "", text)


def _chat(given: Path, text: str) -> None:
    loaded = open_run(given / "tale")
    session = chat.ChatSession(loaded, lambda: loaded, SamplingParams(max_tokens=3), follow=False)
    for line in (f"/{text}", f"/temp {text}", f"/save {text[:20]}/{text}", text):
        for piece in session.handle(line):
            chat._show(piece)


class _Teller:
    """A generator that tells this."""

    def __init__(self, text: str) -> None:
        self.text = text

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[Chunk]:
        yield SimpleNamespace(text=self.text, finish_reason="stop")  # type: ignore[misc]

    def batch(self, prompts: list[str], params: SamplingParams, indices: range) -> list[Completion]:
        told = {"prompt": prompts[0], "text": self.text, "tokens": 1, "finish_reason": "stop", "seconds": 0.0}
        return [SimpleNamespace(**told) for _ in prompts]  # type: ignore[misc]


def _sample(text: str, as_json: bool) -> None:
    sample._write_all(_Teller(text), text, 2, SamplingParams(), Console(), as_json)  # type: ignore[arg-type]


def _train(text: str, given: Path, display: type[train.Lines], console: Console) -> None:
    config: RunConfig = tiny_settings(given / "data").model_copy(update={"name": text})
    shown = display(console, config)
    shown.preparing(PrepareProgress("read", 5, 3, 9, 1.0))
    shown.progress({"step": 1, "progress": 0.5, "train_loss": 2.0})
    shown.note(text)
    shown.story(1, text, text)
    shown.close()


def _train_end(text: str, console: Console) -> None:
    summary = SimpleNamespace(
        run=f"runs/{text}", step=1, tokens=1, seconds=1.0, tokens_per_second=1.0, mfu=0.1, stopped_because=f"SIG{text}",
        valid_loss=1.0, valid_bits_per_byte=1.0, floor_bits_per_byte=None,
    )  # fmt: skip
    train.closing(console, summary)  # type: ignore[arg-type]


def _doctor(text: str) -> None:
    def examine() -> Iterator[doctor.Finding]:
        yield doctor.Finding(text, True, text)
        raise ValueError(text)

    names = ("packages", "device", "formats", "fused_kernels", "disk", "recipes", "tiny_run")
    kept = {name: getattr(doctor, name) for name in names}
    try:
        for name in names:
            setattr(doctor, name, examine)
        doctor.doctor()
    finally:
        for name in names:
            setattr(doctor, name, kept[name])


def _figures(text: str) -> dict[str, Any]:
    numbers = {
        "bits_per_byte": 1.0,
        "bits_per_byte_interval": (1.0, 2.0),
        "loss": 1.0,
        "perplexity": 2.0,
        "tokens": 3,
        "bytes": 4,
        "documents": 5,
        "leaks": None,
    }
    judged = {"count": 1, "model": text, "unreadable": 0, "grammar": 7.0}
    return numbers | {"stories": {"count": 1, "faults": {text: 1}, "name": text, "judge": judged}}


def _certificate(text: str) -> dict[str, Any]:
    names = {"path": text, "architecture": text, "dtype": text, "reader": text}
    return names | dict.fromkeys(
        (
            "max_logit_difference",
            "largest_logit",
            "token_agreement",
            "bits_per_byte_difference",
            "bits_per_byte",
            "tokenizer_agreement",
        ),
        1.0,
    )


def _imported(text: str) -> dict[str, Any]:
    return {"run": text, "architecture": text, "parameters": 1, "context": 1, "vocab_size": 1, "space_first": True}


def _plot(text: str, folder: Path) -> None:
    """A run of that name, as far as a name of a file can be it."""
    name = text.replace("/", "_").replace("\0", "_").encode("utf-8", "replace").decode()
    (folder / name).mkdir(exist_ok=True)
    RunFolder(folder / name).config_file.touch()
    RunFolder(folder / name).metrics_file.write_text('{"step": 1, "train_loss": 1.0}\n')
    plot.plot(str(folder / name), out=folder / f"{name[:40]}.svg")


def _prepared(text: str) -> PrepareResult:
    parts = dataclasses.fields(PrepareResult)
    values = {part.name: 1 if part.default is dataclasses.MISSING else part.default for part in parts} | {"out": text}
    return SimpleNamespace(**values)  # type: ignore[return-value]


def _service(text: str) -> Any:
    model = SimpleNamespace(parameters_count=lambda: 1)
    current = SimpleNamespace(name=text, run=SimpleNamespace(model=model))
    return SimpleNamespace(
        models=SimpleNamespace(current=current),
        url="http://x",
        settings=SimpleNamespace(host="127.0.0.1", api_key=None, allow_hosts=()),
    )


def _log(text: str) -> None:
    """What the server logs: a checkpoint that cannot be loaded, an exception."""
    log = logging.getLogger("smalllm.serve")
    kept, log.handlers = (log.handlers, log.level, log.propagate), []
    try:
        serve.log_to(sys.stderr)
        log.info("step 4 cannot be loaded: %s", text)
        try:
            raise ValueError(text)
        except ValueError:
            log.exception("request %s failed", text)
    finally:
        log.handlers, log.level, log.propagate = kept


# ── F9: foreign text in files that others read ──

BREAKERS = [
    "---", "\n---\n", ": ", "- a", "#", "'", '"', "\\", "{", "[", "&a", "*a", "!!python/object", "|", ">", "%YAML", "=cmd|'/C calc'!A0", "@x", "+1", "-1",
    "\n```\n", "```", "`", "<script>alert(1)</script>", "![x](http://evil.example)", "[x](javascript:x)", "<!--", "\n# Head\n", "| a | b |", "\u2028", "\x85",
    "null", "true", "~", "0x1", "1e3", "2001-01-01", "\t", "é", "🙂", "\ufeff", "\x1b[2J", "]]>", "$(id)",
]  # fmt: skip


def breakers(number: int, folder: Path, given: Path) -> None:
    """Names, authors, sources and settings of breakers: YAML and TOML give them back, Markdown shows them as code."""
    chance = random.Random(f"F9 {number}")

    def text() -> str:
        return (
            BREAKERS[number] if number < len(BREAKERS) else "".join(chance.choices(BREAKERS, k=chance.randrange(1, 6)))
        )

    config = tiny_settings(given / "data").replace(data={"source": text()})
    assert tomllib.loads(config.to_toml())["data"]["source"] == config.data.source
    facts = card.Card(
        text(), text(), text(), text(), config.to_toml(), 5, 5, 5, 5, 1.0, (0.9, 1.1), 3, (text(), text())
    )
    page = card.page(facts, "llama")
    front, _, body = page.removeprefix("---\n").partition("\n---\n")
    told = yaml.safe_load(front)
    assert (told["license"], told["model_name"]) == (facts.licence, facts.name), page
    tokens = [inner for token in MarkdownIt("commonmark").parse(body) for inner in (token, *(token.children or ()))]
    kinds = {token.type for token in tokens}
    assert not kinds & {"html_block", "html_inline", "link_open", "image"}, (kinds, page)
    heads = [
        token.content
        for place, token in enumerate(tokens)
        if token.type == "inline" and tokens[place - 1].type == "heading_open"
    ]
    expected = ["## What it writes", "## How well it does", "## How it was trained", "## Limitations"]
    assert heads[1:] == [head.removeprefix("## ") for head in expected], (heads, page)
    certificate = json.dumps(_certificate(facts.name))
    assert certificate.isascii() and json.loads(certificate)["path"] == facts.name


TRIALS: list[Trial] = [
    Trial("C1", "whatever is typed wherever: exit code 0, 1 or 2 and a paragraph, nothing written", misuse, 80, len(PAIRS) + len(REAL), together=20),
    Trial("C2", "a package that is missing is named with the command that installs it", absent, 2, len(ABSENT), set_up),
    Trial("C3", "what needs no network asks for none", offline, 3, len(WORK), set_up),
    Trial("C4", "no secret of the environment is printed or written", secrets, 3, len(WORK), set_up),
    Trial("F8", "foreign text moves no cursor: no control character but newline and tab is printed", injection, 20, 200, set_up, together=20),
    Trial("F9", "foreign text in cards and settings stays text: YAML, TOML and Markdown give it back", breakers, 100, 100, set_up, together=50),
]  # fmt: skip
