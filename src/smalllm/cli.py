"""The table of verbs. A verb's module is imported only when the verb is called, so that ``--help`` answers at once."""

from __future__ import annotations

import contextlib
import io
import keyword
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any, TextIO

from smalllm import __version__

VERBS = {
    "train": "Train a model, or continue a run. The first command to try.",
    "prepare": "Turn text into training data: tokenizer, token shards, manifest.",
    "sample": "Print text that a trained model writes.",
    "chat": "Tell stories together with a model, also while it trains.",
    "serve": "Serve a model over HTTP, as OpenAI's clients expect it, with a page.",
    "evaluate": "Measure a model in bits per byte, with an interval.",
    "compare": "Tell whether the difference between runs is real.",
    "report": "Write a page about runs: curves, scores, stories, settings.",
    "export": "Write a model for transformers, llama.cpp, llama2.c or a browser, with proof.",
    "import": "Make a run of a model of another program.",
    "plan": "Tell what a run will take: memory, hours, money.",
    "plot": "Draw loss and learning rate of runs.",
    "deploy": "Train on another machine over ssh: push, launch, follow, fetch.",
    "bench": "Measure how fast this machine prepares, trains, decodes and serves.",
    "doctor": "Check this installation and this machine.",
}
DEBUG_VARIABLE = "SMALLLM_DEBUG"
LEAST_COLUMNS = 40  # in fewer the tables of --help are never done
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def build_app() -> Any:
    """The cyclopts app with every verb, none of them imported yet."""
    from cyclopts import App
    from rich.console import Console

    width = max(LEAST_COLUMNS, shutil.get_terminal_size().columns)
    app = App(
        name="smalllm", version=__version__, help_format="plaintext", result_action="return_value", console=Console(width=width),
        help="Train a small GPT language model from scratch, watch it learn, chat with it, measure it honestly.",
    )  # fmt: skip
    for verb, help_line in VERBS.items():
        function = function_name(verb)
        app.command(f"smalllm.commands.{function}:{function}", name=verb, help=help_line)
    return app


def function_name(verb: str) -> str:
    """Of a verb's function and module: the verb, with an underscore where Python keeps the word for itself."""
    return f"{verb}_" if keyword.iskeyword(verb) else verb


def main(arguments: list[str] | None = None) -> None:
    """Run one verb and exit with its code: 0 done, 1 error, 2 usage, 130 Ctrl-C, 143 SIGTERM."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """One verb; returns the exit code. Whatever goes wrong is a sentence on standard error and never a traceback, unless
    SMALLLM_DEBUG is set."""
    _mend_streams()
    try:
        with _interruptible():
            code = _run(arguments)
        _flush(sys.stdout, "standard output")  # here, where a full disk or a reader that went away can still be told
    except (Exception, KeyboardInterrupt) as error:
        return _told(error)
    return code


def _run(arguments: list[str]) -> int:
    if arguments in ([], ["-h"], ["--help"]):
        print(overview())
        return 0
    result = build_app()(arguments, exit_on_error=False, print_error=False)
    return result if isinstance(result, int) else 0


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Where compiled code swallows a Ctrl-C, as pydantic's does while it makes a schema, it comes once more."""

    def once_more(ignored: sys.UnraisableHookArgs) -> None:
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            return before(ignored)
        again = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))  # not here: this too is ignored
        again.daemon = True
        again.start()

    before = sys.unraisablehook
    sys.unraisablehook = once_more
    try:
        yield
    finally:
        sys.unraisablehook = before


def _mend_streams() -> None:
    """A terminal that is not UTF-8 shows ? instead of ending the run; a stream that was closed is an empty one."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for as long as the process lives)
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _told(error: BaseException) -> int:
    """Say what went wrong to the person who typed the command; the exit code."""
    if os.environ.get(DEBUG_VARIABLE):
        _say("".join(traceback.format_exception(error)).rstrip())
    with contextlib.suppress(OSError):
        _flush(sys.stdout, "standard output")
    if isinstance(error, BrokenPipeError):  # the reader went away (`| head`)
        return 0
    try:
        sentence, code = _sentence(error)
    except Exception as another:  # cyclopts loads every verb to say which one was meant
        sentence, code = _sentence(another)
    if not getattr(error, "said", False):
        _say(sentence)
    return code


def _sentence(error: BaseException) -> tuple[str, int]:
    """What went wrong, and the exit code."""
    if package := _missing_package(error):
        return f"error: the package {package} is not installed; run: uv sync", EXIT_ERROR
    from cyclopts import CycloptsError

    from smalllm.config import UserError

    match error:
        case CycloptsError():
            return f"{_one_line(error)}\nTry: smalllm --help", EXIT_USAGE
        case UserError():
            return f"error: {_one_line(error)}", error.exit_code
        case KeyboardInterrupt():
            return "interrupted", EXIT_INTERRUPTED
        case OSError():
            return f"error: {_one_line(error.filename or 'file system')}: {error.strerror or error}", EXIT_ERROR
    bug = f"{type(error).__name__}: {_one_line(error)[:500]}".rstrip(": ")
    return f"error: {bug}. This is a bug of smalllm; please report it with what {DEBUG_VARIABLE}=1 shows", EXIT_ERROR


def _missing_package(error: BaseException | None) -> str | None:
    """Of an import that failed, perhaps behind another error."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.partition(".")[0]
            return package if package != "smalllm" else None
        error = error.__cause__
    return None


def _one_line(told: object) -> str:
    """Names in a message may hold line breaks; they shall not look like messages of their own."""
    return " ".join(str(told).split("\n"))


def _flush(stream: TextIO, name: str) -> None:
    """Write out what was printed. Where that fails, the interpreter is kept from trying once more while it closes."""
    try:
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        error.filename = name
        raise


def overview() -> str:
    """The page of ``smalllm --help``, made here without loading the parser: it answers in a tenth of a second."""
    lines = [f"  {verb:<10}{line}" for verb, line in VERBS.items()]
    return "\n".join([
        "Train a small GPT language model from scratch, watch it learn, chat with it, measure it honestly.", "",
        "Usage: smalllm VERB [ARGUMENTS] [OPTIONS]        smalllm VERB --help tells the rest", "",
        *lines, "", "Start with: smalllm train",
    ])  # fmt: skip


def _say(message: str) -> None:
    """To standard error, without control characters; nobody hears it where that is full or gone."""
    with contextlib.suppress(OSError, ValueError):
        print("".join(c for c in message if c == "\n" or c.isprintable()), file=sys.stderr)
    with contextlib.suppress(OSError, ValueError):
        _flush(sys.stderr, "standard error")
