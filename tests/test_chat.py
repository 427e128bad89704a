"""Chat: the session without a terminal, a run that moves on under it, and the terminal around it."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_generation import make_model, save_run

from smalllm import cli, generation
from smalllm.checkpoint import open_run
from smalllm.commands import chat
from smalllm.commands.chat import ChatSession
from smalllm.config import RunConfig, UserError
from smalllm.conversation import CONTROL, Message, answer_prompt, role_ids, stop_ids
from smalllm.generation import Generator, Row, SamplingParams
from smalllm.native.decode import Choice
from smalllm.tokenizer import Tokenizer

PARAMS = SamplingParams(max_tokens=12, temperature=1.0, seed=1)


@pytest.fixture
def settings(tiny: Callable[..., RunConfig]) -> RunConfig:
    return tiny()


@pytest.fixture
def folder(tmp_path: Path, settings: RunConfig) -> Path:
    return save_run(tmp_path / "run", settings, step=4)


@pytest.fixture
def session(folder: Path) -> ChatSession:
    return ChatSession(open_run(folder, "latest"), lambda: open_run(folder, "latest"), PARAMS)


def said(session: ChatSession, line: str) -> str:
    return "".join(session.handle(line))


def expected(session: ChatSession, prompt: str) -> str:
    return Generator(session.run.model, session.run.tokenizer).complete(prompt, session.params).text


# ── answers ──


def test_a_line_is_continued_and_an_empty_line_goes_on(session: ChatSession) -> None:
    first = expected(session, "Once upon")
    assert said(session, "Once upon") == first + "\n"
    second = expected(session, "Once upon" + first)
    assert said(session, "") == second + "\n"
    assert session.texts == ["Once upon" + first + second]
    said(session, "Another")
    assert len(session.texts) == 2


def test_an_empty_line_at_the_beginning_asks_for_one(session: ChatSession) -> None:
    assert "type something" in said(session, "  ")
    assert session.texts == []


def test_an_interrupted_answer_stays_and_can_be_continued(session: ChatSession) -> None:
    whole = expected(session, "Once")
    answer = session.handle("Once")
    shown = next(answer) + next(answer) + next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert whole.startswith(shown) and shown != whole
    assert session.texts == ["Once" + shown]
    assert said(session, "") == expected(session, "Once" + shown) + "\n"


def test_a_text_that_has_ended_says_so(session: ChatSession) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "choose", lambda logits, rows, forbidden: [Choice(2)] * len(rows))
        assert said(session, "The end.") == "(the text ends here; type another beginning)\n"
    assert session.texts == ["The end."]


def test_broken_weights_are_a_sentence(session: ChatSession) -> None:
    session.run.model.norm.weight.data[0] = float("nan")  # type: ignore[operator]
    assert "logits are not finite" in said(session, "Once")
    assert not session.done


# ── models that take turns ──


@pytest.fixture
def turns(session: ChatSession, folder: Path) -> ChatSession:
    """A session with a model whose vocabulary has turn markers."""
    tokenizer = Tokenizer.train(["say hi to the cat\n"] * 9, 280, control=CONTROL)
    run = dataclasses.replace(session.run, tokenizer=tokenizer, model=make_model(vocab_size=280, context=128))
    return ChatSession(run, lambda: run, dataclasses.replace(PARAMS, max_tokens=40), follow=False)


def scripted(monkeypatch: pytest.MonkeyPatch, session: ChatSession, *answers: str) -> list[Row]:
    """The model says these answers, each with the end of its turn; returns the rows that it read."""
    tokenizer, rows = session.run.tokenizer, []
    ids = iter([id for answer in answers for id in (*tokenizer.encode(answer), *stop_ids(tokenizer))])

    def choose(logits: Any, some: list[Row], forbidden: Any) -> list[Choice]:
        if not some[0].generated:
            rows.append(some[0])
        return [Choice(next(ids))]

    monkeypatch.setattr(generation, "choose", choose)
    return rows


def test_messages_are_answered_in_turns(turns: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = scripted(monkeypatch, turns, "hi", "the cat", "hi")
    assert said(turns, "say hi") == "hi\n" and said(turns, "") == "" and said(turns, "to who") == "the cat\n"
    spoken = [
        Message("user", "say hi"),
        Message("assistant", "hi"),
        Message("user", "to who"),
        Message("assistant", "the cat"),
    ]
    assert turns.messages == spoken and turns.texts == []
    assert rows[1].ids[: rows[1].prompt_length] == answer_prompt(spoken[:3], turns.run.tokenizer)
    assert set(rows[1].params.logit_bias) == set(role_ids(turns.run.tokenizer))
    assert "the model answers" in said(turns, "/help")
    assert "forgotten" in said(turns, "/new") and turns.messages == []
    assert said(turns, "say hi") == "hi\n" and rows[2].prompt_length == rows[0].prompt_length


def test_a_conversation_is_saved_as_messages(
    turns: ChatSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, turns, "hi")
    said(turns, "say é")
    assert said(turns, f"/save {tmp_path / 'chat.jsonl'}") == f"(saved 2 messages to {tmp_path / 'chat.jsonl'})\n"
    saved = json.loads((tmp_path / "chat.jsonl").read_text(encoding="utf-8"))
    assert saved == {"messages": [{"role": "user", "content": "say é"}, {"role": "assistant", "content": "hi"}]}


def test_a_long_conversation_forgets_its_oldest_messages(turns: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = scripted(monkeypatch, turns, *["hi"] * 12)
    for _ in range(12):
        assert said(turns, "say hi") == "hi\n"
    assert len(turns.messages) == 24
    assert max(row.prompt_length for row in rows) <= turns.run.model.config.context // 2
    spoken, tokenizer = turns.messages[:-1], turns.run.tokenizer
    shorter = [answer_prompt(spoken[start:], tokenizer) for start in range(2, len(spoken), 2)]
    assert rows[-1].ids[: rows[-1].prompt_length] in shorter


@pytest.mark.parametrize(("environment", "faint"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_what_the_model_did_not_say_is_faint_where_colours_are_wanted(
    environment: dict[str, str], faint: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NO_COLOR": "", "TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    chat._show(chat.Note("(now step 3)\n"))
    chat._show("Once")
    assert capsys.readouterr().out == ("\x1b[2m(now step 3)\n\x1b[0mOnce" if faint else "(now step 3)\nOnce")


# ── a run that trains ──


def test_a_newer_checkpoint_is_used_for_the_next_answer(
    session: ChatSession, folder: Path, settings: RunConfig
) -> None:
    old = expected(session, "Once")
    save_run(folder, settings, step=8, seed=1)
    answer = said(session, "Once")
    assert answer.startswith("(now step 8)\n") and session.run.step == 8
    assert answer == "(now step 8)\n" + expected(session, "Once") + "\n"
    assert old not in answer
    assert "(now step" not in said(session, "Once")


def damage(folder: Path, step: int) -> None:
    file = folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def test_a_broken_checkpoint_is_named_once_and_the_old_model_stays(
    session: ChatSession, folder: Path, settings: RunConfig
) -> None:
    before = expected(session, "Once")
    save_run(folder, settings, step=8, seed=1)
    damage(folder, 8)
    assert said(session, "Once") == "(step 8 is damaged; now step 4)\n" + before + "\n"
    assert said(session, "Once") == before + "\n"
    save_run(folder, settings, step=12, seed=2)
    assert said(session, "Once").startswith("(now step 12)\n")


@pytest.mark.parametrize("error", [UserError("gone"), OSError("gone"), RuntimeError("gone"), KeyError("gone")])
def test_whatever_fails_while_loading_the_chat_goes_on(
    session: ChatSession, folder: Path, settings: RunConfig, error: Exception
) -> None:
    before = expected(session, "Once")

    def fail() -> Any:
        raise error

    session._open_newest = fail
    save_run(folder, settings, step=8, seed=1)
    first, rest = said(session, "Once").split("\n", 1)
    assert first.startswith("(step 8 cannot be loaded, still at step 4: ") and "gone" in first
    assert rest == before + "\n" and said(session, "Once") == before + "\n"


def test_a_run_that_began_anew_is_followed(folder: Path, settings: RunConfig, tmp_path: Path) -> None:
    save_run(folder, settings, step=8, seed=1)
    session = ChatSession(open_run(folder, "latest"), lambda: open_run(folder, "latest"), PARAMS)
    (folder / "checkpoints").rename(tmp_path / "aside")
    said(session, "Once")
    assert session.run.step == 8  # nothing there yet
    save_run(folder, settings, step=2, seed=3)
    assert said(session, "Once").startswith("(now step 2)\n")


def test_a_chosen_checkpoint_is_not_left_but_by_reload(folder: Path, settings: RunConfig) -> None:
    session = ChatSession(open_run(folder, "4"), lambda: open_run(folder, "latest"), PARAMS, follow=False)
    save_run(folder, settings, step=8, seed=1)
    said(session, "Once")
    assert session.run.step == 4
    assert said(session, "/reload") == "(now step 8)\n"
    assert session.run.step == 8


# ── commands ──


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("/temp 0.5", "temperature", 0.5), ("/topk 40", "top_k", 40), ("/topk off", "top_k", None),
        ("/topp 0.9", "top_p", 0.9), ("/minp 0.1", "min_p", 0.1), ("/penalty 1.2", "repetition_penalty", 1.2),
        ("/ngram 3", "no_repeat_ngram", 3), ("/tokens 7", "max_tokens", 7), ("/seed 9", "seed", 9),
        ("/seed off", "seed", None), ("/temp off", "temperature", 0.8),
    ],
)  # fmt: skip
def test_a_setting_is_set_and_shown(session: ChatSession, line: str, field: str, value: object) -> None:
    shown = said(session, line)
    assert getattr(session.params, field) == value
    assert ("off" if value is None else str(value)) in shown
    assert shown in said(session, "/settings")


def test_settings_reach_the_answer(session: ChatSession) -> None:
    said(session, "/tokens 3")
    assert len(session.run.tokenizer.encode(said(session, "Once").rstrip("\n"))) <= 3
    plain = said(session, "Once")
    said(session, "/temp 0")
    assert said(session, "Once") != plain


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/temp hot", "/temp hot is not a number; for example /temp 0.9"),
        ("/topk 2.5", "/topk 2.5 is not a whole number; for example /topk 1"),
        ("/topp 3", "top_p = 3.0 is not possible; use 0 to 1"),
        ("/temp nan", "temperature = nan is not possible"),
        ("/tokens 0", "max_tokens = 0 is not possible"),
        ("/seed " + "9" * 5000, "is not a whole number"),
        ("/tmep 1", "there is no command /tmep; did you mean /temp?"),
        ("/", "/help lists them"),
        ("/save", "write /save FILE"),
    ],
)
def test_bad_commands_are_answered_with_a_sentence(session: ChatSession, line: str, sentence: str) -> None:
    answer = said(session, line)
    assert sentence in answer and answer.count("\n") == 1
    assert session.params == PARAMS and not session.done


def test_help_names_every_command(session: ChatSession) -> None:
    shown = said(session, "/help")
    assert all(f"/{command}" in shown for command in chat.COMMANDS if command != "help")


def test_save_writes_what_prepare_reads_and_never_overwrites(session: ChatSession, tmp_path: Path) -> None:
    from smalllm.data.sources import documents

    file = tmp_path / "texts.txt"
    assert "no text yet" in said(session, f"/save {file}")
    said(session, "One day")
    said(session, "Once 🙂")
    assert said(session, f"/save {file}") == f"(saved 2 texts to {file})\n"
    assert list(documents(str(file))) == [text.strip("\r\n") for text in session.texts]
    assert "exists; choose another name" in said(session, f"/save {file}")
    assert "cannot write" in said(session, f"/save {tmp_path / 'none' / 'x.txt'}")
    assert "cannot write" in said(session, "/save a\0b")


def test_quit_ends(session: ChatSession) -> None:
    assert said(session, "/quit") == "" and session.done


# ── the terminal ──


def test_chat_reads_a_pipe_to_its_end(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/tokens 5\n/temp 2\nOnce\n\n/nonsense\nOne"))
    assert cli.run(["chat", str(folder), "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{folder}, step 4. ")
    assert "/tokens   5" in printed and "there is no command /nonsense" in printed


def test_shown_text_holds_no_control_characters(
    session: ChatSession, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dangerous = session.run.tokenizer.encode("\x1b]0;t\x07\x9b2J\rx")
    says = itertools.cycle(dangerous)
    monkeypatch.setattr(generation, "choose", lambda logits, rows, forbidden: [Choice(next(says))])
    monkeypatch.setattr(sys, "stdin", io.StringIO("/tokens 40\nOnce\n/\x1b[2J\n"))
    chat._converse(session)
    assert "\x1b]0;t\x07" in session.texts[0]  # the model said it, and /save keeps it
    printed = capsys.readouterr().out
    assert "]0;t2Jx" in printed
    assert not [c for c in printed if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0]


def test_nothing_is_read_after_quit(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n/settings\n"))
    assert cli.run(["chat", str(folder)]) == 0
    assert "/temp" not in capsys.readouterr().out


def test_control_c_ends_an_answer_or_a_line_and_not_the_chat(
    session: ChatSession, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: Iterator[Any] = iter(
        ["Once", KeyboardInterrupt(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, ""), "/settings"]
    )
    choose, calls = generation.choose, []

    def read(_prompt: str) -> str:
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    def interrupted(*arguments: Any) -> list[Choice]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return choose(*arguments)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(generation, "choose", interrupted)
    chat._converse(session)
    printed = capsys.readouterr().out
    assert len(calls) == 4 and session.texts[0].startswith("Once")
    assert printed.index("(Ctrl-D or /quit ends the chat)") < printed.index("not UTF-8") < printed.index("/temp")


def test_a_checkpoint_folder_or_step_is_not_followed(
    folder: Path, settings: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(folder, settings, step=8, seed=1)
    for arguments in ([str(folder / "checkpoints" / "step-00000004")], [str(folder), "--checkpoint", "4"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Once\n"))
        assert cli.run(["chat", *arguments, "--max-tokens", "3"]) == 0
        assert "step 4" in (printed := capsys.readouterr().out) and "now step" not in printed


def test_no_run_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["chat"]) == 1
    assert "there is no run" in capsys.readouterr().err
