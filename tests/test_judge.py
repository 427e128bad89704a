"""The judge: answers of every kind are read, a canned server and our own are asked, nothing is asked twice, the key stays."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_settings
from test_generation import save_run
from test_server import serving

from smalllm.config import UserError
from smalllm.judging import judge as judges
from smalllm.judging.judge import ASPECTS, CACHE, KEY_VARIABLE, Judge, JudgeFailure, grades_of, judge_stories

KEY = "sk-secret-of-the-judge"
GOOD = '{"grammar": 8, "creativity": 6, "consistency": 7, "plot": 5}'
STORIES = [("Once", " upon a time."), ("", "A cat sat."), ("", "A dog ran.")]


class Canned:
    """A server that answers as it was told: (status, headers, body) in turn, the last one for ever."""

    def __init__(self, *answers: tuple[int, dict[str, str], str]) -> None:
        self.answers, self.requests = list(answers), list[tuple[str, dict[str, str], Any]]()
        self._lock = threading.Lock()

    def next(self, request: tuple[str, dict[str, str], Any]) -> tuple[int, dict[str, str], str]:
        with self._lock:
            self.requests.append(request)
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def said(text: str) -> tuple[int, dict[str, str], str]:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@contextlib.contextmanager
def listening(canned: Canned) -> Iterator[str]:
    """The address of a canned server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            status, headers, text = canned.next((self.path, dict(self.headers), body))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# ── what an answer says ──


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Let me think: {{hm}}. {GOOD} Bye.",
        '{"Grammar": "8/10", "CREATIVITY": 6.0, "consistency": "7", "plot": "5 / 10", "why": "so"}',
        "Grammar: 8/10, Creativity: 6/10, Consistency: 7/10, Plot: 5/10",
        "**Grammar:** 8\n\n- creativity = 6\n| Consistency | 7 |\nPLOT - 5.",
        '{"grammar": 1, "creativity": 1, "consistency": 1, "plot": 1} No: ' + GOOD,
    ],
)
def test_grades_are_read_from_many_kinds_of_answers(answer: str):
    assert grades_of(answer) == {"grammar": 8, "creativity": 6, "consistency": 7, "plot": 5}


@pytest.mark.parametrize(
    "answer",
    [
        "", "I cannot grade this.", "Grammar: 8/10", '{"grammar": 8, "creativity": 6, "consistency": 7}', "[1, 2, 3, 4]",
        GOOD.replace("8", "11"), GOOD.replace("8", "0"), GOOD.replace("8", "-3"), GOOD.replace("8", "true"),
        GOOD.replace("8", '"1e1"'), GOOD.replace("8", "NaN"), "{" * 5000, "Grammar: 8/20 Creativity: 6 Consistency: 7 Plot: 5",
    ],
)  # fmt: skip
def test_what_is_no_four_grades_is_none(answer: str):
    assert grades_of(answer) is None


# ── a canned server ──


def test_means_and_intervals_by_hand(tmp_path: Path):
    canned = Canned(said(GOOD), said(GOOD.replace("8", "4")), said("No idea."))
    with listening(canned) as url:
        result = judge_stories(Judge(url, "big"), STORIES, tmp_path)
    assert (result["model"], result["count"], result["asked"], result["unreadable"]) == ("big", 2, 3, 1)
    assert (result["grammar"], result["creativity"], result["mean"]) == (6.0, 6.0, 6.0)
    assert result["intervals"]["grammar"] == (4.0, 8.0) and result["intervals"]["plot"] == (5.0, 5.0)
    path, headers, body = canned.requests[0]
    assert path == "/v1/chat/completions" and "authorization" not in {name.lower() for name in headers}
    assert (body["model"], body["temperature"]) == ("big", 0)
    asked = {body["messages"][1]["content"] for _, _, body in canned.requests}
    assert asked == {"Once*** upon a time.", "A cat sat.", "A dog ran."}


def test_nothing_is_asked_twice(tmp_path: Path):
    canned = Canned(said(GOOD))
    with listening(canned) as url:
        first = judge_stories(Judge(url, "big"), STORIES, tmp_path)
        again = judge_stories(Judge(url, "big"), [*STORIES, STORIES[0]], tmp_path)
        assert len(canned.requests) == 3 and again["asked"] == 0 and again["count"] == 4
        assert again["grammar"] == first["grammar"]
        judge_stories(Judge(url, "another"), STORIES, tmp_path)
        assert len(canned.requests) == 6
    lines = (tmp_path / CACHE).read_text().splitlines()
    (tmp_path / CACHE).write_text("\n".join(["{torn", "[]", "{}", *lines[1:3], lines[3][:20]]))
    with listening(canned) as other:
        assert judge_stories(Judge(other, "big"), STORIES, tmp_path)["asked"] == 3  # another address is another judge
        assert judge_stories(Judge(url, "big"), STORIES[:0], tmp_path)["count"] == 0


def test_busy_servers_are_asked_again_after_the_pause_they_wish():
    pauses: list[float] = []
    canned = Canned((429, {"Retry-After": "7"}, ""), (503, {"Retry-After": "9999"}, ""), (500, {}, "x"), said(GOOD))
    with listening(canned) as url:
        assert Judge(url, "big", pause=pauses.append).ask({}) == GOOD
    assert pauses == [7.0, judges.LONGEST_PAUSE, 4.0]


@pytest.mark.parametrize(
    ("answer", "tries", "sentence"),
    [
        ((401, {}, "wrong key"), 1, f"HTTP 401: wrong key\\); check the key in {KEY_VARIABLE}"),
        ((404, {}, "no such model"), 1, "HTTP 404: no such model"),
        ((302, {"Location": "http://127.0.0.1:9/steal"}, ""), 1, "HTTP 302"),
        ((503, {}, "busy"), 4, "HTTP 503: busy"),
        ((200, {}, "<html>"), 1, "something else than JSON"),
        ((200, {}, '{"choices": []}'), 1, "does not answer as OpenAI's"),
        ((200, {"Content-Length": "900"}, "{"), 4, "does not answer"),
        ((200, {}, " " * 2000), 4, "more than 1,000 bytes"),
    ],
)
def test_a_judge_that_fails_is_a_sentence(
    answer: tuple[int, dict[str, str], str], tries: int, sentence: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(judges, "LARGEST_ANSWER", 1000)
    canned = Canned(answer)
    with listening(canned) as url, pytest.raises(JudgeFailure, match=sentence):
        Judge(url, "big", seconds=0.5, pause=lambda _: None).ask({})
    assert len(canned.requests) == tries


def test_nobody_there_is_a_sentence():
    with pytest.raises(JudgeFailure, match="does not answer"):
        Judge("http://127.0.0.1:9/v1", "big", pause=lambda _: None).ask({})


def test_what_was_answered_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(judges, "AT_ONCE", 1)
    canned = Canned(said(GOOD), (401, {}, "the key has ended"))
    with listening(canned) as url, pytest.raises(JudgeFailure):
        judge_stories(Judge(url, "big"), STORIES, tmp_path)
    assert len((tmp_path / CACHE).read_text().splitlines()) == 1


def test_the_key_goes_into_the_header_and_nowhere_else(tmp_path: Path):
    canned = Canned(said(GOOD), said(GOOD), said(GOOD), (403, {}, f"bad key {KEY}"))
    with listening(canned) as url:
        judge = Judge.open(url, "big", {KEY_VARIABLE: KEY})
        result = judge_stories(judge, STORIES, tmp_path)
        assert {headers["Authorization"] for _, headers, _ in canned.requests} == {f"Bearer {KEY}"}
        with pytest.raises(JudgeFailure) as failure:
            judge.ask({})
    assert KEY not in (tmp_path / CACHE).read_text() + json.dumps(result) + str(failure.value)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("localhost:8000", "is no address"), ("ftp://a/v1", "is no address"), ("http://", "is no address"),
        (f"https://me:{KEY}@a/v1", "the address alone"), (f"https://a/v1?key={KEY}", "the address alone"),
    ],
)  # fmt: skip
def test_addresses_that_are_none_or_hold_a_key_are_refused(url: str, sentence: str):
    with pytest.raises(UserError, match=sentence) as refusal:
        Judge.open(url, "big", {})
    assert KEY not in str(refusal.value)


def test_the_first_model_is_taken_where_none_is_named():
    with listening(Canned((200, {}, '{"data": [{"id": "one"}, {"id": "two"}]}'))) as url:
        assert Judge.open(url + "/", None, {}) == Judge(url, "one")
    with listening(Canned((200, {}, "{}"))) as url, pytest.raises(JudgeFailure, match="--judge-model"):
        Judge.open(url, None, {})


# ── our own server ──


def test_our_own_server_can_be_asked(tmp_path: Path, dataset_folder: Path):
    """A model of random numbers does not grade, and that is said."""
    settings = tiny_settings(dataset_folder, model={"context": 1024}, train={"batch_tokens": 1024, "micro_batch": 1})
    run = save_run(tmp_path / "run", settings, 4)
    with serving(run) as service:
        judge = Judge.open(f"{service.url}/v1", None, {})
        result = judge_stories(judge, STORIES, run)
        assert judge_stories(judge, STORIES, run) == {**result, "asked": 0}
    assert judge.model and (result["asked"], result["count"] + result["unreadable"]) == (3, 3)
    assert result["count"] == 3 or set(ASPECTS) - result.keys() == set(ASPECTS)
