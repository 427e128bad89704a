"""How fast a model answers over HTTP: `smalllm serve` in a process of its own, asked by so many clients at once.

Every answer has its full length: the end of text is ruled out. A client is a thread that asks again as soon as it was answered.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.table import Table

from smalllm.config import UserError

PATIENCE = 60.0
"""Seconds for the server to start, and for it to send the next token."""


@dataclass(frozen=True)
class ServingSpeed:
    """The figures of `smalllm bench serve --json`: of all ``clients`` together, while they were all asking. ``first_token_seconds``
    is the median from the request to the first event of its stream, ``first_token_seconds_95`` what 95 % stay below."""

    tokens_per_second: float
    requests_per_second: float
    clients: int
    tokens: int
    first_token_seconds: float
    first_token_seconds_95: float


@dataclass
class _Asked:
    """What one client saw."""

    begins: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    error: str = ""

    def answers(self, until: float) -> float:
        """Answers up to a moment, one in the making by its share."""
        return sum(
            min(1.0, max(0.0, until - begin) / (end - begin)) for begin, end in zip(self.begins, self.ends, strict=True)
        )


def serving_speed(run: str, clients: int, tokens: int, seconds: float) -> ServingSpeed:
    """Start a server, let clients ask for texts of so many tokens for about so long, and end it. UserError when it does not
    start or does not answer."""
    from smalllm.checkpoint import open_run

    loaded = open_run(run)
    tokens = min(tokens, loaded.model.config.context - 8)
    body = {
        "prompt": "Once", "max_tokens": tokens, "temperature": 1.0, "stream": True,
        "logit_bias": {str(loaded.tokenizer.eos_id): -100},
    }  # fmt: skip
    with server(str(loaded.checkpoint.path), clients) as port:
        _ask(port, {**body, "max_tokens": 2}, asked := _Asked(), 0.0)  # the first answer waits for what is loaded late
        _check(asked)
        everyone, ends = [_Asked() for _ in range(clients)], time.monotonic() + seconds
        threads = [threading.Thread(target=_ask, args=(port, body, one, ends)) for one in everyone]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for one in everyone:
        _check(one)
    until = min(max(one.ends) for one in everyone)  # from then on not all of them were asking
    rate = sum(one.answers(until) for one in everyone) / (until - start)
    firsts = [first - begin for one in everyone for begin, first in zip(one.begins, one.firsts, strict=True)]
    late = quantiles(firsts, n=20)[-1] if len(firsts) > 1 else firsts[0]
    return ServingSpeed(
        round(tokens * rate, 1), round(rate, 2), clients, tokens, round(median(firsts), 4), round(late, 4)
    )


@contextmanager
def server(run: str | Path, slots: int) -> Iterator[int]:
    """`smalllm serve` of this installation on a free port of this machine; the port."""
    command = [sys.executable, "-m", "smalllm", "serve", str(run), "--port", "0", "--slots", str(slots)]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            greeting = process.stdout.readline() if process.stdout else ""
            if not (found := re.search(r" at http://[^ ]+:([0-9]+)", greeting)):
                log.seek(0)
                raise UserError(f"the server did not start: {log.read().strip()[-300:] or greeting}")
            yield int(found[1])
        finally:
            process.terminate()


def _ask(port: int, body: dict[str, Any], seen: _Asked, ends: float) -> None:
    """Ask until the time is over, once at least."""
    try:
        while not seen.ends or time.monotonic() < ends:
            seen.begins.append(time.monotonic())
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise OSError(answer.read().decode(errors="replace")[:300])
            for line in answer:
                if line.startswith(b"data: {") and len(seen.firsts) == len(seen.ends):
                    seen.firsts.append(time.monotonic())
            seen.ends.append(time.monotonic())
            connection.close()
    except (OSError, http.client.HTTPException) as error:
        seen.error = str(error) or type(error).__name__


def _check(seen: _Asked) -> None:
    if seen.error:
        raise UserError(f"the server did not answer: {seen.error}")


def table(speed: ServingSpeed) -> Table:
    """The figures for a person, with what they stand for."""
    grid = Table.grid(padding=(0, 2))
    first, late = 1000 * speed.first_token_seconds, 1000 * speed.first_token_seconds_95
    for name, figure, meaning in (
        ("speed", f"{speed.tokens_per_second:,.0f} tokens/s", f"{speed.clients} clients at once, together"),
        ("answers", f"{speed.requests_per_second:,.1f} a second", f"of {speed.tokens} tokens each, streamed"),
        ("first token", f"{first:,.0f} ms", f"95 % within {late:,.0f} ms"),
    ):
        grid.add_row(name, figure, meaning)
    return grid
