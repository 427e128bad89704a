"""The table of verbs. A verb's module is imported only when the verb is called, so that ``--help`` answers at once."""

from __future__ import annotations

import io
import keyword
import os
import sys
from typing import Any

from smalllm import __version__

VERBS = {
    "train": "Train a model, or continue a run. The first command to try.",
    "prepare": "Turn text into training data: tokenizer, token shards, manifest.",
    "sample": "Print text that a trained model writes.",
    "chat": "Tell stories together with a model, also while it trains.",
    "serve": "Serve a model over HTTP, as OpenAI's clients expect it, with a page.",
    "evaluate": "Measure a model in bits per byte, with an interval.",
    "export": "Write a model for transformers, llama.cpp, llama2.c or a browser, with proof.",
    "import": "Make a run of a model of another program.",
    "plot": "Draw loss and learning rate of runs.",
    "bench": "Measure how fast this machine trains and decodes.",
    "doctor": "Check this installation and this machine.",
}
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def build_app() -> Any:
    """The cyclopts app with every verb, none of them imported yet."""
    from cyclopts import App

    app = App(
        name="smalllm", version=__version__, help_format="plaintext", result_action="return_value",
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
    """One verb; returns the exit code. A user's mistake is one sentence on standard error, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? instead of ending the run
    if arguments in ([], ["-h"], ["--help"]):
        print(overview())
        return 0
    from cyclopts import CycloptsError

    from smalllm.config import UserError

    try:
        result = build_app()(arguments, exit_on_error=False, print_error=False)
        return result if isinstance(result, int) else 0
    except CycloptsError as error:
        return _fail(f"{error}\nTry: smalllm --help", EXIT_USAGE)
    except UserError as error:
        return _fail(f"error: {error}", EXIT_ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader went away (`| head`); keep the interpreter from complaining while it closes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"error: {error.filename or 'file system'}: {error.strerror or error}", EXIT_ERROR)


def overview() -> str:
    """The page of ``smalllm --help``, made here without loading the parser: it answers in a tenth of a second."""
    lines = [f"  {verb:<10}{line}" for verb, line in VERBS.items()]
    return "\n".join([
        "Train a small GPT language model from scratch, watch it learn, chat with it, measure it honestly.", "",
        "Usage: smalllm VERB [ARGUMENTS] [OPTIONS]        smalllm VERB --help tells the rest", "",
        *lines, "", "Start with: smalllm train",
    ])  # fmt: skip


def _fail(message: str, code: int) -> int:
    printable = "".join(c for c in message if c == "\n" or c.isprintable())
    print(printable, file=sys.stderr)
    return code
