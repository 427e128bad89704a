"""A client of OpenAI-compatible servers in a process of its own: plain sockets, so that it is never what is measured.

Each question names a verb below; every request is a connection of its own.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from peers.race import answer_questions, own_output

READ = 1 << 16
PATIENCE = 300.0
"""Seconds until an answer must be whole."""


@dataclass
class Answer:
    """What came of a request: ``tokens`` as the server counted them, ``first`` seconds until the first event or byte of the
    body. ``whole`` when the answer had its end."""

    status: int
    tokens: int
    first: float
    seconds: float
    whole: bool
    retry_after: bool


async def ask(address: str, path: str, body: dict[str, Any] | None) -> Answer:
    """One request, read to its end."""
    began = time.perf_counter()
    reader, writer = await connect(address)
    try:
        writer.write(request(address, path, body))
        head, rest = await read_head(reader)
        first = time.perf_counter() - began
        while piece := await reader.read(READ):
            rest.append(piece)
    except (ConnectionError, asyncio.IncompleteReadError):
        return Answer(0, 0, 0.0, time.perf_counter() - began, False, False)
    finally:
        writer.close()
    seconds, text = time.perf_counter() - began, b"".join(rest)
    status, tokens = int(head.split(maxsplit=2)[1]), tokens_of(text)
    whole = status == 200 and tokens > 0 and (b"data: [DONE]" in text or b"text/event-stream" not in head)
    return Answer(status, tokens, first, seconds, whole, b"\r\nretry-after:" in head)


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection; while a server's queue of them is full, again and again."""
    url = urlsplit(address)
    last = time.monotonic() + PATIENCE
    while True:
        try:
            return await asyncio.open_connection(url.hostname, url.port)
        except OSError:
            if time.monotonic() > last:
                raise
            await asyncio.sleep(0.01)


def request(address: str, path: str, body: dict[str, Any] | None) -> bytes:
    """GET without a body, else POST of JSON."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: {urlsplit(address).netloc}\r\nConnection: close\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"\r\n" + content


async def read_head(reader: asyncio.StreamReader) -> tuple[bytes, list[bytes]]:
    """The head in small letters, and what has come of the body, which is something."""
    text = b""
    while not text.partition(b"\r\n\r\n")[2]:
        if not (piece := await reader.read(READ)):
            raise asyncio.IncompleteReadError(text, None)
        text += piece
    head, _, rest = text.partition(b"\r\n\r\n")
    return head.lower(), [rest]


def tokens_of(text: bytes) -> int:
    """Tokens that were made, by the last usage in the text; 0 where none is told."""
    _, told, after = text.rpartition(b'"completion_tokens":')
    digits = after.split(b",", 1)[0].split(b"}", 1)[0].strip()
    return int(digits) if told and digits.isdigit() else 0


# ── verbs ──


async def together(address: str, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All requests at the same time."""
    began = time.perf_counter()
    tasks = [ask(address, "/v1/completions", body) for body in bodies]
    answers = await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
    return {"seconds": time.perf_counter() - began, "answers": [asdict(answer) for answer in answers]}


async def leave(address: str, bodies: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Begin all streams, leave them after their first event, and look at /metrics until nothing runs any more."""
    connections = [await connect(address) for _ in bodies]
    for (_, writer), body in zip(connections, bodies, strict=True):
        writer.write(request(address, "/v1/completions", body))
    await asyncio.gather(*(read_head(reader) for reader, _ in connections))
    running = await gauge(address, metric)
    began = time.perf_counter()
    for _, writer in connections:
        writer.transport.abort()
    while await gauge(address, metric):
        if time.perf_counter() - began > PATIENCE:
            raise TimeoutError(f"{metric} never came to 0")
        await asyncio.sleep(0.002)
    return {"running": running, "seconds": time.perf_counter() - began}


async def gauge(address: str, metric: str) -> float:
    """A figure of GET /metrics."""
    reader, writer = await connect(address)
    writer.write(request(address, "/metrics", None))
    lines = (await reader.read(-1)).decode().splitlines()
    writer.close()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{metric} "))


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Do what a question says."""
    verbs = {"together": together, "leave": leave}
    return asyncio.run(verbs[question.pop("verb")](**question))


if __name__ == "__main__":
    out = own_output()
    answer_questions({}, answer, out)
