"""`smalllm chat`: tell stories together with a model, also while it trains.

A model without turns goes on from where you stop; one with turn markers (conversation.py) answers. ChatSession holds the
conversation and has no terminal in it; the rest of the file is the terminal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from smalllm.checkpoint import LoadedRun, find_run, open_run
from smalllm.config import UserError
from smalllm.conversation import Message, answer_prompt, has_turns, role_ids, stop_ids
from smalllm.generation import Generator, Row, SamplingParams
from smalllm.hardware import pick_device
from smalllm.terminal import plain

STORY_HELP = "Type how a text begins and the model continues it; an empty line continues the last text.\n"
TURNS_HELP = "Type something and the model answers; /new begins another conversation.\n"
HELP = """\
  /temp 0.8     temperature: 0 most likely, 1 as learned     /topk 40     the 40 most likely tokens, or off
  /topp 0.95    the tokens with 95 % of the mass, or off     /minp 0.05   5 % of the most likely one, or off
  /penalty 1.1  make repetition less likely                  /ngram 4     never the same 4 tokens twice
  /tokens 200   the longest answer                           /seed 7      repeatable answers, or off
  /settings     what is set                                  /reload      load the newest checkpoint
  /new          forget what was said                         /save FILE   write this chat to a file
  /quit         end (also Ctrl-D); Ctrl-C stops an answer
"""
SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "temp": ("temperature", float),
    "topk": ("top_k", int),
    "topp": ("top_p", float),
    "minp": ("min_p", float),
    "penalty": ("repetition_penalty", float),
    "ngram": ("no_repeat_ngram", int),
    "tokens": ("max_tokens", int),
    "seed": ("seed", int),
}
COMMANDS = [*SETTINGS, "settings", "reload", "new", "save", "help", "quit"]
OFF = ("off", "none")
DOCUMENT_END = "\n<|endoftext|>\n"  # what `smalllm prepare` reads as the end of a document


class Note(str):
    """Something that the chat says and the model did not."""


class ChatSession:
    """A conversation: ``handle`` takes a line and yields what to show. ``done`` is true after /quit.

    ``open_newest`` loads the newest checkpoint. With ``follow``, a newer one is looked for before each answer; one
    that cannot be loaded is named once, and the model that is there goes on.
    """

    def __init__(
        self, run: LoadedRun, open_newest: Callable[[], LoadedRun], params: SamplingParams, *, follow: bool = True
    ) -> None:
        self.params, self.done = params, False
        self.texts: list[str] = []  # the last one is continued by an empty line
        self.messages: list[Message] = []  # with a model that takes turns, in place of texts
        self.run, self._seen = run, run.step
        self._generator = Generator(run.model, run.tokenizer)
        self._open_newest, self._follow = open_newest, follow

    def handle(self, line: str) -> Iterator[str]:
        """Answer one line: a command beginning with /, a beginning of a text, or nothing to continue the last."""
        line = line.strip()
        if line.startswith("/"):
            name, _, value = line[1:].partition(" ")
            yield from self._command(name, value.strip())
        elif line or self.texts or self.messages:
            yield from self._follow_run() if self._follow else ()
            yield from self._reply(line) if has_turns(self.run.tokenizer) else self._continue(line)
        else:
            yield Note("(type something; /help lists the commands)\n")

    # answers

    def _reply(self, line: str) -> Iterator[str]:
        """The answer to a message, which stays in the conversation even if it is interrupted."""
        if not line:
            return
        self.messages += [Message("user", line), Message("assistant", "")]
        try:
            for chunk in self._generator.stream_row(self._row()):
                self.messages[-1] = Message("assistant", self.messages[-1].content + chunk.text)
                yield chunk.text
        except UserError as error:
            yield Note(f"({error})")
        yield "\n"

    def _row(self) -> Row:
        """The conversation as the model reads it; the oldest messages are left out when it grows beyond the context."""
        tokenizer, said = self.run.tokenizer, self.messages[:-1]
        while len(ids := answer_prompt(said, tokenizer)) > self.run.model.config.context // 2 and len(said) > 1:
            said = said[2:]
        nobody = {id: -math.inf for id in role_ids(tokenizer)}
        params = dataclasses.replace(self.params, logit_bias=nobody)
        return Row(ids, params, tokenizer, stop_ids=stop_ids(tokenizer))

    def _continue(self, line: str) -> Iterator[str]:
        if line:
            self.texts.append(line)
        yield from self._answer()

    def _answer(self) -> Iterator[str]:
        """The continuation of the last text, which grows as it is shown, so that an interrupted answer stays."""
        before, reason = self.texts[-1], None
        try:
            for chunk in self._generator.stream(before, self.params):
                self.texts[-1] += chunk.text
                reason = chunk.finish_reason
                yield chunk.text
        except UserError as error:
            yield Note(f"({error})")
        else:
            ended = reason == "stop" and self.texts[-1] == before
            yield Note("(the text ends here; type another beginning)") if ended else ""
        yield "\n"

    # the run that is followed

    def _follow_run(self) -> Iterator[str]:
        newest = self.run.folder.newest_step()
        if newest is not None and newest != self._seen:
            yield from self._load(newest)

    def _load(self, newest: int | None) -> Iterator[str]:
        """Take the newest checkpoint; whatever is wrong with it, the chat goes on with the model that it has."""
        newest = self.run.step if newest is None else newest
        try:
            run = self._open_newest()
        except Exception as error:  # what a training run leaves on the disk must never end the chat
            self._seen = newest
            yield Note(f"(step {newest} cannot be loaded, still at step {self.run.step}: {error})\n")
            return
        older = run.step < newest
        yield Note(f"(step {newest} is damaged; now step {run.step})\n" if older else f"(now step {run.step})\n")
        self.run, self._seen = run, max(newest, run.step)
        self._generator = Generator(run.model, run.tokenizer)

    # commands

    def _command(self, name: str, value: str) -> Iterator[str]:
        match name:
            case _ if name in SETTINGS:
                yield Note(self._set(name, value))
            case "settings":
                yield from (Note(self._setting(command)) for command in SETTINGS)
                yield Note(f"step {self.run.step} of {self.run.folder.path}\n")
            case "reload":
                yield from self._load(self.run.folder.newest_step())
            case "new":
                self.texts, self.messages = [], []
                yield Note("(what was said is forgotten)\n")
            case "save":
                yield Note(self._save(value))
            case "help":
                yield Note((TURNS_HELP if has_turns(self.run.tokenizer) else STORY_HELP) + HELP)
            case "quit" | "exit":
                self.done = True
            case _:
                close = difflib.get_close_matches(name, COMMANDS, n=1)
                hint = f"did you mean /{close[0]}?" if close else "/help lists them"
                yield Note(f"(there is no command /{name}; {hint})\n")

    def _set(self, name: str, value: str) -> str:
        field, parse = SETTINGS[name]
        default = getattr(SamplingParams(), field)
        if value:
            try:
                self.params = dataclasses.replace(self.params, **{field: default if value in OFF else parse(value)})
            except UserError as error:
                return f"({error})\n"
            except ValueError:
                kind, example = ("whole number", 1) if parse is int else ("number", 0.9)
                return f"(/{name} {value} is not a {kind}; for example /{name} {example})\n"
        return self._setting(name)

    def _setting(self, name: str) -> str:
        field = SETTINGS[name][0]
        value = getattr(self.params, field)
        return f"/{name:<8} {'off' if value is None else value}  ({field.replace('_', ' ')})\n"

    def _save(self, file: str) -> str:
        """Write the texts of the chat to a new file, in the form that ``smalllm prepare`` reads; a conversation with turns
        as a line of JSON, {"messages": [{"role", "content"}, ...]}."""
        count = len(self.texts) or len(self.messages)
        if not count or not file:
            return "(there is no text yet)\n" if file else "(write /save FILE, for example /save story.txt)\n"
        saved = "".join(text + DOCUMENT_END for text in self.texts)
        if self.messages:
            saved += json.dumps({"messages": list(map(dataclasses.asdict, self.messages))}, ensure_ascii=False) + "\n"
        try:
            with open(Path(file).expanduser(), "x", encoding="utf-8", errors="replace") as target:
                target.write(saved)
        except FileExistsError:
            return f"({file} exists; choose another name)\n"
        except (OSError, ValueError, RuntimeError) as error:
            return f"(cannot write {file}: {getattr(error, 'strerror', None) or error})\n"
        kind = "message" if self.messages else "text"
        return f"(saved {count} {kind}{'s' if count > 1 else ''} to {file})\n"


# ── the terminal ──


def chat(
    run: Annotated[str | None, Parameter(name="RUN", show_default=False)] = None,
    *,
    max_tokens: Annotated[int, Parameter(name="--max-tokens")] = 200,
    temperature: Annotated[float, Parameter(name="--temperature")] = 0.8,
    top_k: Annotated[int | None, Parameter(name="--top-k")] = None,
    top_p: Annotated[float | None, Parameter(name="--top-p")] = None,
    min_p: Annotated[float | None, Parameter(name="--min-p")] = None,
    seed: Annotated[int | None, Parameter(name="--seed")] = None,
    checkpoint: Annotated[str, Parameter(name="--checkpoint")] = "latest",
    device: Annotated[str, Parameter(name="--device")] = "auto",
) -> None:
    """Tell stories together with a model: you write a beginning, it goes on. Follows a run that is training.

    Parameters
    ----------
    run
        A run folder, or one checkpoint folder of a run [default: the newest run under runs/].
    max_tokens
        The longest answer.
    temperature
        0 always takes the most likely token, 1 samples as the model learned, more is wilder.
    top_k
        Choose among the K most likely tokens.
    top_p
        Choose among the most likely tokens that together have probability P.
    min_p
        Choose among tokens with at least P times the probability of the most likely one.
    seed
        The same seed gives the same answers.
    checkpoint
        latest (follows the run), best or a step.
    device
        auto, cpu, mps, cuda or cuda:N.
    """
    params = SamplingParams(max_tokens, temperature, top_k, top_p, min_p, seed=seed)
    chosen = pick_device(device)
    folder, step = find_run(run)
    loaded = open_run(run, checkpoint, chosen)
    follow = checkpoint == "latest" and step is None
    session = ChatSession(loaded, lambda: open_run(folder.path, "latest", chosen), params, follow=follow)
    begin = "Type something" if has_turns(loaded.tokenizer) else "Type how a text begins"
    _show(Note(f"{folder.path}, step {loaded.step}. {begin}; /help lists the commands.\n"))
    _converse(session)


def _converse(session: ChatSession) -> None:
    """Read lines and show answers until /quit or the end of the input."""
    if interactive := sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() line editing and history)
    while not session.done:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            break
        except UnicodeDecodeError:
            _show(Note("(this line is not UTF-8 text)\n"))
            continue
        except KeyboardInterrupt:
            _show(Note("\n(Ctrl-D or /quit ends the chat)\n"))
            continue
        _answer(session, line)
    _show("\n" if interactive and not session.done else "")


def _answer(session: ChatSession, line: str) -> None:
    """Show an answer as it comes; Ctrl-C ends the answer and not the chat."""
    with contextlib.closing(session.handle(line)) as pieces:  # type: ignore[type-var]
        try:
            for piece in pieces:
                _show(piece)
        except KeyboardInterrupt:
            _show("\n")


def _show(text: str) -> None:
    """On a terminal with colours, what the model did not say is faint."""
    faint = (
        isinstance(text, Note)
        and sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM") != "dumb"
    )
    sys.stdout.write(f"\x1b[2m{plain(text)}\x1b[0m" if faint else plain(text))
    sys.stdout.flush()
