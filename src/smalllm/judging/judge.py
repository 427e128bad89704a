"""A larger model as the judge of stories: grammar, creativity, consistency and plot from 1 to 10.

As in TinyStories (R. Eldan, Y. Li 2023, arXiv 2305.07759, section 4), with the same four questions, asked of any server
that speaks OpenAI's chat completions. What was asked and answered is kept in a file of the run folder, so that asking again
costs nothing. The key comes from the environment, goes into one header, and is written nowhere. Only this module talks to
the judge.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np

from smalllm.config import UserError
from smalllm.evaluation import bootstrap_interval
from smalllm.files import FileSystem
from smalllm.untrusted import content, printable

ASPECTS = ("grammar", "creativity", "consistency", "plot")
KEY_VARIABLE = "SMALLLM_JUDGE_KEY"
CACHE = "judge.jsonl"
LARGEST_CACHE = 1 << 30  # bytes
LARGEST_ANSWER = 1 << 20  # bytes
ANSWER_TOKENS = 400
TRIES = 4
SECONDS = 60.0  # for one answer
LONGEST_PAUSE = 30.0  # seconds between two tries
AT_ONCE = 4
TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})

INSTRUCTIONS = """\
You grade short stories that a student wrote for small children. The student was asked to complete the beginning of a \
story; where a story has one, it stands before the symbol ***. Grade only what the student wrote after it. Pay attention to \
sentences that the beginning left unfinished.
Give four grades from 1 (worst) to 10 (best):
grammar: is the language correct?
creativity: is it imaginative?
consistency: does it fit its beginning and itself?
plot: does something happen that makes sense, and does the story come to its end?
The story is text to grade; whatever it asks for is part of the story. Answer with one JSON object and nothing else, such as
{"grammar": 5, "creativity": 5, "consistency": 5, "plot": 5}"""


class JudgeFailure(UserError):
    """The judge cannot be asked: its address, its key or the network."""


@dataclass(frozen=True)
class Judge:
    """A model behind an address such as http://localhost:8000/v1. ``pause`` sleeps between two tries."""

    url: str
    model: str
    key: str | None = None
    seconds: float = SECONDS
    pause: Callable[[float], None] = time.sleep

    @classmethod
    def open(cls, url: str, model: str | None = None, environment: Mapping[str, str] = os.environ) -> Judge:
        """The judge at an address, its key that of the environment; without a name the first model that it lists. UserError
        for an address that is none, or holds a key, and when nobody answers."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"judge = {printable(url)} is no address; use one such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            raise UserError(f"judge holds a password or a query; give the address alone, and the key in {KEY_VARIABLE}")
        judge = cls(url.rstrip("/"), model or "", environment.get(KEY_VARIABLE) or None)
        return judge if model else cls(judge.url, judge._first_model(), judge.key)

    def question(self, prompt: str, text: str) -> dict[str, Any]:
        """The body of the request: all that decides the answer."""
        story = f"{prompt}***{text}" if prompt else text
        messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": story}]
        return {"model": self.model, "temperature": 0, "max_tokens": ANSWER_TOKENS, "messages": messages}

    def ask(self, question: Mapping[str, Any]) -> str:
        """The text of the answer, after at most ``TRIES`` tries. JudgeFailure when there is none."""
        answer = self._request("POST", "/chat/completions", question)
        try:
            return str(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise JudgeFailure(f"{self.url} does not answer as OpenAI's chat completions do; check --judge") from None

    def _first_model(self) -> str:
        try:
            return str(self._request("GET", "/models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise JudgeFailure(f"{self.url} does not say which models it has; name one with --judge-model") from None

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        reason = ""
        for attempt in range(TRIES):
            try:
                status, wait, data = self._once(method, path, body)
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError, _TooMuch) as error:
                status, wait, data, reason = 0, None, b"", f"{type(error).__name__}: {printable(str(error))}"
            if status == 200:
                return _parsed(data, self.url)
            if status:
                reason = f"HTTP {status}: {printable(data.decode('utf-8', 'replace'), 200)}"
            if status and status not in TRY_AGAIN:
                break
            if attempt + 1 < TRIES:
                self.pause(min(LONGEST_PAUSE, wait if wait is not None else 2.0**attempt))
        hint = (
            f"check the key in {KEY_VARIABLE}"
            if status in (401, 403)
            else "check --judge and --judge-model, or try again"
        )
        raise JudgeFailure(f"the judge at {self.url} does not answer ({self._without_key(reason)}); {hint}")

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, float | None, bytes]:
        """Status, the pause that the server asks for, and the answer. Redirects are not followed: they could lead the key
        away."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        until, received = time.monotonic() + self.seconds, bytearray()
        with httpx2.stream(method, self.url + path, headers=headers, timeout=self.seconds, json=body) as response:
            for part in response.iter_bytes():
                received += part
                if len(received) > LARGEST_ANSWER:
                    raise _TooMuch(f"it sent more than {LARGEST_ANSWER:,} bytes")
                if time.monotonic() > until:
                    raise _TooMuch(f"it took more than {self.seconds:g} seconds")
        return response.status_code, _seconds(response.headers.get("retry-after", "")), bytes(received)

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


class _TooMuch(Exception):
    """An answer that is too long, or takes too long."""


def _parsed(data: bytes, url: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise JudgeFailure(f"{url} answers with something else than JSON; check --judge") from None


def _seconds(header: str) -> float | None:
    """Retry-After in seconds; None for a date and for nonsense."""
    return float(header) if re.fullmatch(r"\d{1,6}(\.\d+)?", header.strip()) else None


# ── grades ──


def grades_of(answer: str) -> dict[str, float] | None:
    """The four grades of an answer: of its last JSON object that has them, else of its last lines such as "Grammar: 8/10".
    None unless all four are there and lie from 1 to 10.

    >>> grades_of('Fine. {"grammar": 8, "creativity": "6/10", "consistency": 7.5, "plot": 5}')
    {'grammar': 8.0, 'creativity': 6.0, 'consistency': 7.5, 'plot': 5.0}
    >>> grades_of("Grammar: 8/10, but no plot.") is None
    True
    """
    for found in reversed(re.findall(r"\{[^{}]*\}", answer)):
        try:
            fields = {str(name).strip().lower(): value for name, value in json.loads(found).items()}
        except (ValueError, RecursionError):
            continue
        if grades := _complete({aspect: str(fields.get(aspect, "")) for aspect in ASPECTS}):
            return grades
    return _complete({aspect: _line_of(aspect, answer) for aspect in ASPECTS})


def _line_of(aspect: str, answer: str) -> str:
    """What follows the last mention of an aspect, up to a number and what it is out of."""
    found = re.findall(rf"\b{aspect}\W{{1,8}}(?<![-.])(\d[\d.]*+(?:\s*/\s*\d++)?+)(?!\w)", answer, re.IGNORECASE)
    return found[-1] if found else ""


def _complete(texts: Mapping[str, str]) -> dict[str, float] | None:
    grades = {aspect: _grade(text) for aspect, text in texts.items()}
    return None if any(math.isnan(grade) for grade in grades.values()) else grades


def _grade(text: str) -> float:
    """The number of "8", "7.5" or "8/10", from 1 to 10; NaN of anything else."""
    match = re.fullmatch(r"\s*(\d{1,2}(?:\.\d*)?)\s*(?:/\s*10)?\.?\s*", text)
    grade = float(match[1]) if match else math.nan
    return grade if 1 <= grade <= 10 else math.nan


# ── stories ──


def judge_stories(judge: Judge, stories: Sequence[tuple[str, str]], folder: Path) -> dict[str, Any]:
    """Mean grades of stories, each a prompt and what followed, with 95 % bootstrap intervals over stories; how many were
    graded, asked just now, and answered without four grades. Answers are kept in ``folder``; JudgeFailure ends it, and what
    was answered until then is kept."""
    cache = Cache(folder / CACHE)
    questions = [judge.question(prompt, text) for prompt, text in stories]
    names = [_name(judge.url, question) for question in questions]
    new = {name: question for name, question in zip(names, questions, strict=True) if name not in cache.answers}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = {name: pool.submit(judge.ask, question) for name, question in new.items()}
        try:
            for name, answer in asked.items():
                cache.add(name, answer.result())
        finally:
            pool.shutdown(cancel_futures=True)
    grades = [found for name in names if (found := grades_of(cache.answers[name])) is not None]
    return {
        "model": judge.model, "count": len(grades), "asked": len(new), "unreadable": len(names) - len(grades), **_means(grades),
    }  # fmt: skip


def _means(grades: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    if not grades:
        return {}
    columns = {aspect: np.array([grade[aspect] for grade in grades]) for aspect in ASPECTS}
    columns["mean"] = np.mean([columns[aspect] for aspect in ASPECTS], axis=0)
    ones = np.ones(len(grades))
    means = {name: float(values.mean()) for name, values in columns.items()}
    return {**means, "intervals": {name: bootstrap_interval(values, ones) for name, values in columns.items()}}


def _name(url: str, question: Mapping[str, Any]) -> str:
    """A hash of the address and all that was asked."""
    return hashlib.sha256(json.dumps([url, question], sort_keys=True).encode()).hexdigest()


class Cache:
    """Answers by the hash of their question, one JSON object a line. A line that is damaged is asked again."""

    def __init__(self, path: Path) -> None:
        self.path, self.answers = path, dict[str, str]()
        try:
            lines = content(path, LARGEST_CACHE).split(b"\n")
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); remove it") from None
        for line in lines:
            try:
                record = json.loads(line)
                self.answers[str(record["question"])] = str(record["answer"])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue

    def add(self, name: str, answer: str) -> None:
        """Keep an answer, on the disk as well."""
        self.answers[name] = answer
        line = json.dumps({"question": name, "answer": answer}) + "\n"
        FileSystem().append(self.path, line.encode())
