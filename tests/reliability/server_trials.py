"""Trials of the server: strange requests, slow and numerous and leaving clients, company, shutdowns, a long day.

The server is a process of its own (``serving``), so that what is measured is not the client. What needs no numbers (hosts,
origins, keys, the page, failures of a step, bodies that are too large) is held by tests/test_server.py and its siblings.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from conftest import tiny_settings
from crowd import Slow, ask_all, hold_on
from serving import CONTEXT, NEVER_END, Serving, exchanged, most_files, serving, wait_until
from strange_requests import fault, strange_request
from test_generation import save_run

from smalllm.data.prepare import prepare
from smalllm.reliability.trials import Trial
from smalllm.serve.guard import Deadlines


def set_up(given: Path) -> None:
    """A run with two checkpoints of random models."""
    prepare(["storyworld:300"], given / "data", vocab_size=512, seed=1)
    for step in (3, 4):
        settings = tiny_settings(given / "data", model={"context": CONTEXT}, train={"micro_batch": 2})
        save_run(given / "tale", settings, step, seed=step)


def text_of(raw: bytes) -> str:
    """The text of an answer of /v1/completions, whole or streamed."""
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), raw[:300]
    if b"event-stream" not in head:
        return json.loads(body)["choices"][0]["text"]
    assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), body[-200:]
    pieces = [json.loads(line) for line in re.findall(rb"data: (\{.*\})\n", body)]
    return "".join(piece["choices"][0]["text"] for piece in pieces if piece["choices"])


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# ── S1: anything at all ──

QUICK = Deadlines(headers=0.4, body=0.4, write=0.4, idle=0.4)
STRANGE = 500


def strange(number: int, folder: Path, given: Path) -> int:
    """500 strange requests to one server, 24 at a time; the message of a failure begins with the number of the request."""
    with serving(given / "tale", folder, deadlines=QUICK) as server:
        wrong = asyncio.run(_answers(server, [f"{number}/{index}" for index in range(STRANGE)]))
    assert not wrong, f"{len(wrong)} requests: " + "\n".join(wrong[:5])
    return STRANGE


async def _answers(server: Serving, numbers: Sequence[str]) -> list[str]:
    few, host = asyncio.Semaphore(24), server.host()

    async def one(number: str) -> str:
        asked = strange_request(number, host)
        async with few:
            try:
                exchange = await exchanged(server.port, asked)
            except TimeoutError:
                return f"{number}: no end within 5 s: {asked[:300]!r}"
        found = fault(asked, exchange.received)
        return f"{number}: {found}: {asked[:300]!r} -> {exchange.received[:300]!r}" if found else ""

    return [wrong for wrong in await asyncio.gather(*map(one, numbers)) if wrong]


# ── S2: slow sockets ──

SLACK = 0.030  # seconds: the client and a thousand sockets share two cores with the server


def slow_sockets(count: int, scale: float, folder: Path, given: Path) -> int:
    """So many sockets, and deadlines that are ``scale`` of the real ones."""
    real = Deadlines()
    scaled = Deadlines(*(scale * seconds for seconds in (real.headers, real.body, real.write, real.idle)))
    most_files()
    with serving(given / "tale", folder, slots=16, deadlines=scaled) as server:
        alone = asked_for(server, 2.0 + 4 * scale)
        files = server.files()
        slow = [_slow(server, index) for index in range(count)]
        opened = threading.Event()
        holder = ThreadPoolExecutor(1).submit(_hold_in_child, server.port, slow, 45 * scale, opened, folder / "held")
        opened.wait()
        among: list[float] = []
        while not holder.done():
            among += asked_for(server, 0.5)
        closed = holder.result()
        left = [index for index, seconds in enumerate(closed) if not 0 <= seconds <= 40 * scale]
        assert not left, f"{len(left)} of {count} held on: {Counter(slow[index].kind for index in left)}"
        wait_until(lambda: server.files() <= files + 2, 2.0)
        before, after = percentile(alone, 0.99), percentile(among, 0.99)
        assert after < 2 * before + SLACK, f"p99 {before * 1e3:.1f} ms alone, {after * 1e3:.1f} ms among {count}"
    return count


def _slow(server: Serving, index: int) -> Slow:
    host, body = server.host(), b"Content-Type: application/json\r\nContent-Length: 500\r\n\r\n{"
    return [
        Slow("idle", b"", b""),
        Slow("headers", b"GET / HTTP/1.1\r\n" + host, b"X: 1\r\n"),
        Slow("body", b"POST /v1/completions HTTP/1.1\r\n" + host + body, b" "),
        Slow("reader", (b"GET /page/app.js HTTP/1.1\r\n" + host + b"\r\n") * 300, b""),
        Slow("answered", b"GET /health HTTP/1.1\r\n" + host + b"\r\n", b""),
    ][index % 5]


def _hold_in_child(port: int, slow: list[Slow], seconds: float, opened: threading.Event, told: Path) -> list[float]:
    """``hold_on`` in a process of its own; how long the server suffered each, -1 where it never closed."""
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        try:
            hold_on(port, slow, seconds, min(1.0, seconds / 20), lambda: os.close(writing))
            told.write_text(json.dumps([one.closed - one.began if one.closed else -1 for one in slow]))
        finally:
            os._exit(0)
    os.close(writing)
    os.read(reading, 1)
    opened.set()
    os.waitpid(pid, 0)
    return json.loads(told.read_text())


def asked_for(server: Serving, seconds: float) -> list[float]:
    """How long short texts take, one after another, each on a connection of its own."""
    took, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.monotonic()
        text_of(server.exchange(server.post(max_tokens=5)))
        took.append(time.monotonic() - began)
    return took


# ── S3: a crowd ──


PACE = 5_000  # connections a second; the system keeps 4,096 waiting and has the others try again a second later


def crowd(count: int, slots: int, folder: Path, given: Path) -> int:
    """So many ask at once for streams that take a second."""
    most_files()
    with serving(given / "tale", folder, slots=slots, step_seconds=0.02) as server:
        server.exchange(server.post())
        before = server.resident()
        asked = [server.post(stream=True, max_tokens=60, logit_bias=NEVER_END) for _ in range(count)]
        askers = ask_all(server.port, asked, PACE, 110)
        lost = Counter((asker.status, asker.error) for asker in askers if asker.status not in (200, 429, 503))
        assert not lost, f"without an answer: {lost}"
        accepted = [asker for asker in askers if asker.status == 200]
        cut = [asker for asker in accepted if not asker.received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")]
        assert len(accepted) >= slots and not cut, f"{len(cut)} of {len(accepted)} accepted were cut"
        refused = [asker for asker in askers if asker.status != 200]
        assert all(b"retry-after: 1\r\n" in asker.received for asker in refused)
        slowest = max(asker.first - asker.began for asker in refused)
        assert slowest < 1.0, f"of {len(refused)} refusals the slowest took {slowest:.2f} s"
        assert server.resident() - before < 1 << 30
    return count


# ── S5: leaving ──

LEAVERS = 50


def leaving(number: int, folder: Path, given: Path) -> int:
    """50 clients leave at a random moment of a text that would take 2.4 s, every other case streaming."""
    chance, stream = random.Random(f"S5 {number}"), number % 2 == 0
    with serving(given / "tale", folder, step_seconds=0.02) as server:
        asked = server.post(stream=stream, max_tokens=120, logit_bias=NEVER_END, n=chance.choice([1, 4]))
        for index in range(LEAVERS):
            with server.connect() as connection:
                connection.sendall(asked)
                if stream:
                    for _ in range(chance.randrange(8)):
                        connection.recv(400)
                else:
                    time.sleep(chance.random() * 0.05)
                if chance.random() < 0.3:
                    connection.setsockopt(*LINGER)
            took = wait_until(lambda: not server.busy(), 5.0)
            assert took < 1.0, f"client {index}: its slot was free after {took:.2f} s"
    return LEAVERS


LINGER = (1, 13, b"\1\0\0\0\0\0\0\0")  # SOL_SOCKET, SO_LINGER: a reset in place of a polite end

# ── S7: company ──

TOGETHER = 10


def company(number: int, folder: Path, given: Path) -> int:
    """Ten requests, each alone and then among fifteen others of which a third leaves."""
    chance = random.Random(f"S7 {number}")
    with serving(given / "tale", folder, slots=16) as server:
        for index in range(TOGETHER):
            options = _options(chance)
            alone = text_of(server.exchange(server.post(**options)))
            with ThreadPoolExecutor(16) as pool:
                others = [pool.submit(_other, server, _options(chance), chance.random()) for _ in range(15)]
                among = pool.submit(server.exchange, server.post(**options, stream=chance.random() < 0.5))
                assert text_of(among.result()) == alone, f"request {index}: {options}"
                for other in others:
                    other.result()
    return TOGETHER


def _options(chance: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "prompt": chance.choice(["Once", "The cat", "", "A day in the", "🙂"]) * chance.randrange(1, 5), "seed": chance.randrange(1 << 40),
        "temperature": chance.choice([0, 0, 0.7, 1, 1.5]), "max_tokens": chance.randrange(1, 60), "logit_bias": NEVER_END,
    }  # fmt: skip
    odd = {
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
        "no_repeat_ngram": 3,
        "stop": ["the"],
        "model": "tale@3",
    }
    return options | dict(chance.sample(sorted(odd.items(), key=str), chance.randrange(3)))


def _other(server: Serving, options: dict[str, Any], patience: float) -> None:
    """Somebody else, who reads everything or leaves."""
    with server.connect() as connection:
        connection.sendall(server.post(**options, stream=patience < 0.5))
        if patience < 0.33:
            time.sleep(patience / 30)
            return
        while connection.recv(1 << 16):
            pass


# ── S8: unicode ──

PROMPTS = 50
SIGNS = "🙂👩\u200d👩\u200d👧\u202e\u2028\u2029é\u0301\u0000\u200b\ufeff\ufffd\U0010ffffאبक्षि中文\u0c95Z\u0335\u0334 a\n\t</s>"


def unicode_prompts(number: int, folder: Path, given: Path) -> int:
    """50 prompts of odd characters, answered in bytes of which few make a character: streamed and whole are one text."""
    chance = random.Random(f"S8 {number}")
    with serving(given / "tale", folder) as server:
        for index in range(PROMPTS):
            prompt = "".join(chance.choice(SIGNS) for _ in range(chance.randrange(12)))
            bias = {
                str(3 + byte): 30 for byte in chance.choice(["🙂", "é", "中文", "\u202e", "👩\u200d👧"]).encode()
            } | NEVER_END
            options = {
                "prompt": prompt,
                "seed": index,
                "max_tokens": 24,
                "temperature": 1.2,
                "logit_bias": bias,
                "echo": index % 3 == 0,
            }
            whole = text_of(server.exchange(server.post(**options)))
            raw = server.exchange(server.post(**options, stream=True))
            assert raw.isascii() and text_of(raw) == whole, f"prompt {index}: {prompt!r}"
            pieces = [json.loads(line)["choices"][0]["text"] for line in re.findall(rb"data: (\{.*\})\n", raw)]
            assert not any(0xD800 <= ord(c) < 0xE000 for piece in pieces for c in piece), f"prompt {index}: {prompt!r}"
            lone = b'{"prompt":"%s\\ud83d","max_tokens":1}' % json.dumps(prompt)[1:-1].encode()
            head = b"POST /v1/completions HTTP/1.1\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            refused = server.exchange(head % (server.host(close=True), len(lone)) + lone)
            assert refused.startswith(b"HTTP/1.1 422"), f"prompt {index}: {refused[:200]!r}"
    return PROMPTS


# ── S14: shutdown ──


def shutdown(number: int, folder: Path, given: Path) -> None:
    """SIGTERM at a random moment with 20 streams: they finish or end with an error event, who comes is told, exit code 0."""
    chance = random.Random(f"S14 {number}")
    drain = chance.choice([0.1, 0.5, 8.0])
    server = Serving(
        given / "tale", folder / "server.log", step_seconds=chance.choice([0.002, 0.01]), drain_seconds=drain, slots=8
    )
    asked = server.post(stream=True, max_tokens=60, logit_bias=NEVER_END)
    with ThreadPoolExecutor(20) as pool:
        streams = [pool.submit(server.exchange, asked) for _ in range(20)]
        wait_until(lambda: server.busy() >= 20 or any(stream.done() for stream in streams))
        time.sleep(chance.random() * 0.1)
        os.kill(server.pid, signal.SIGTERM)
        began = time.monotonic()
        late = []
        with contextlib.suppress(OSError):  # it has ended already
            wait_until(lambda: server.get("/health")[0] != 200, 0.5)
            late.append(server.exchange(server.post()))
        texts = [stream.result() for stream in streams]
    assert os.waitstatus_to_exitcode(os.waitpid(server.pid, 0)[1]) == 0, server.log()
    assert time.monotonic() - began < 10.0
    ends = (b"data: [DONE]\n\n\r\n0\r\n\r\n", b"}}\n\n\r\n0\r\n\r\n")
    assert all(text.startswith(b"HTTP/1.1 200") and text.endswith(ends) for text in texts), [
        text[-200:] for text in texts
    ]
    assert all(text.endswith(ends[0]) for text in texts) or drain < 8
    assert all(reply.startswith(b"HTTP/1.1 503") and b"retry-after" in reply for reply in late if reply), late
    assert "Traceback" not in server.log(), server.log()


# ── S15: a long day ──

CLIENTS = 12


def soak(count: int, folder: Path, given: Path) -> int:
    """So many mixed requests: memory, descriptors and the slowest percentile stay. A slope is seen in a hundred thousand."""
    most_files()
    with serving(given / "tale", folder, slots=16) as server:
        _day(server, 1_000, 0)  # warm
        files, stretches = server.files(), 10
        memory, slow = [server.resident()], []
        for stretch in range(stretches):
            slow.append(percentile(_day(server, count // stretches, 1 + stretch), 0.99))
            wait_until(lambda: not server.busy(), 5.0)
            memory.append(server.resident())
        wait_until(lambda: server.files() <= files + 2, 5.0)
        later = memory[2:]  # the first tenth belongs to the warming up
        slope = statistics.linear_regression(range(len(later)), later).slope * 10_000 * stretches / count
        assert count < 100_000 or slope < 1e6, (
            f"{slope / 1e6:.2f} MB for 10,000 requests: {[round(m / 1e6, 1) for m in memory]}"
        )
        assert memory[-1] - memory[0] < 64e6, memory
        early, late = statistics.median(slow[:3]), statistics.median(slow[-3:])
        assert late < 2 * early + SLACK, f"p99 of the first {early * 1e3:.1f} ms, of the last {late * 1e3:.1f} ms"
        print(f"memory {[round(m / 1e6, 1) for m in memory]} MB, p99 {[round(1e3 * s, 1) for s in slow]} ms")
    return count


def _day(server: Serving, count: int, seed: int) -> list[float]:
    with ThreadPoolExecutor(CLIENTS) as pool:
        share = count // CLIENTS + 1
        days = [
            pool.submit(Client(server, random.Random(f"S15 {seed} {index}")).ask, share) for index in range(CLIENTS)
        ]
        return [seconds for day in days for seconds in day.result()]


class Client:
    """One that keeps its connection, asks for everything there is, is wrong now and then, and leaves in the middle."""

    def __init__(self, server: Serving, chance: random.Random) -> None:
        self.server, self.chance = server, chance
        self.connection, self.got = server.connect(), b""

    def ask(self, count: int) -> list[float]:
        """So many requests; how long those took that were answered."""
        took = []
        for _ in range(count):
            kind = self.chance.random()
            if kind < 0.10:
                self.leave()
                continue
            began = time.monotonic()
            self.invalid() if kind < 0.15 else self.look() if kind < 0.45 else self.complete(stream=kind < 0.75)
            took.append(time.monotonic() - began)
        self.connection.close()
        return took

    def leave(self) -> None:
        self.connection.sendall(
            self.server.post(close=False, stream=self.chance.random() < 0.5, max_tokens=100, logit_bias=NEVER_END)
        )
        if self.chance.random() < 0.5:
            self.connection.recv(100)
        self.connection.close()
        self.connection, self.got = self.server.connect(), b""

    def invalid(self) -> None:
        wrong = self.chance.choice(
            [{"n": 9}, {"nothing": 1}, {"model": "none"}, {"prompt": 7}, {"temperature": -1}, {"prompt": "word " * 900}]
        )
        status, body = self.answer(self.server.post(close=False, **wrong))
        assert 400 <= status < 500 and b'"error"' in body, (status, body)

    def look(self) -> None:
        path = self.chance.choice(
            [b"/", b"/page/app.js", b"/metrics", b"/health", b"/v1/models", b"/run", b"/run/metrics", b"/run/samples"]
        )
        status, _ = self.answer(b"GET %s HTTP/1.1\r\n%s\r\n" % (path, self.server.host()))
        assert status == 200, (path, status)

    def complete(self, stream: bool) -> None:
        model = self.chance.choice(["tale", "tale@3", None])
        status, body = self.answer(
            self.server.post(close=False, stream=stream, max_tokens=self.chance.randrange(1, 12), model=model)
        )
        assert status == 200 and (b"[DONE]" in body if stream else b'"usage"' in body), (status, body)

    def answer(self, request: bytes) -> tuple[int, bytes]:
        """Status and body; a connection that the server closes is opened again."""
        self.connection.sendall(request)
        while b"\r\n\r\n" not in self.got:
            self.read()
        head, _, self.got = self.got.partition(b"\r\n\r\n")
        status, head = int(head[9:12]), head.lower()
        if told := re.search(rb"content-length: (\d+)", head):
            self.read_until(lambda: len(self.got) >= int(told[1]))
            body, self.got = self.got[: int(told[1])], self.got[int(told[1]) :]
        else:
            self.read_until(lambda: self.got.endswith(b"0\r\n\r\n"))
            body, self.got = self.got, b""
        if b"connection: close" in head:
            self.connection.close()
            self.connection = self.server.connect()
        return status, body

    def read_until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.read()

    def read(self) -> None:
        piece = self.connection.recv(1 << 16)
        assert piece, "the server closed the connection"
        self.got += piece


# ── S17: fairness ──


def fairness(number: int, folder: Path, given: Path) -> None:
    """One client posts 64 long texts, another short ones. A step takes 5 ms, so that it is turns that are measured."""
    with serving(given / "tale", folder, slots=16, step_seconds=0.005, queue=64) as server:
        short = server.post(max_tokens=5, seed=number, logit_bias=NEVER_END)
        alone = [_timed(server, short) for _ in range(30)]
        long = server.post(max_tokens=100, logit_bias=NEVER_END)
        with ThreadPoolExecutor(64) as pool:
            jobs = [pool.submit(server.exchange, long, "127.0.0.2") for _ in range(64)]
            wait_until(lambda: server.busy() > 32)
            among = [_timed(server, short) for _ in range(30)]
            still = server.busy()
            assert all(text_of(job.result()) for job in jobs)
        assert still, "the long texts ended before the short ones"
        before, after = percentile(alone, 0.95), percentile(among, 0.95)
        assert after < 3 * before, f"p95 {before * 1e3:.0f} ms alone, {after * 1e3:.0f} ms among 64 long ones"


def _timed(server: Serving, asked: bytes) -> float:
    began = time.monotonic()
    text_of(server.exchange(asked))
    return time.monotonic() - began


def _sized(trial: Callable[..., int], *sizes: float) -> Callable[[int, Path, Path], int]:
    """A case of this size, whatever its number."""
    return lambda number, folder, given: trial(*sizes, folder, given)


SLOW = "sockets that send or read slowly are closed in time, and nobody else notices"
CROWD = "in a crowd each is answered or refused within a second, and nobody is lost"
SOAK = "a long day costs no memory, no descriptors and no time"
TRIALS: list[Trial] = [
    Trial("S1", "any bytes are answered with 2xx, 4xx or the end of the connection, within 5 s", strange, 4, 100, set_up),
    Trial("S2", SLOW + ": 1,000 for 40 s", _sized(slow_sockets, 1000, 1.0), 0, 1, set_up, workers=1),
    Trial("S2-short", SLOW + ": 200 for 4 s", _sized(slow_sockets, 200, 0.1), 1, 1, set_up, workers=1),
    Trial("S3", CROWD + ": 10,000", _sized(crowd, 10_000, 200), 0, 1, set_up, workers=1),
    Trial("S3-short", CROWD + ": 1,500", _sized(crowd, 1_500, 64), 1, 1, set_up, workers=1),
    Trial("S5", "who leaves frees the slot within a second", leaving, 2, 20, set_up),
    Trial("S7", "a text is the one it would be alone, whoever else asks or leaves", company, 2, 30, set_up),
    Trial("S8", "any characters stream as the whole text, in valid UTF-8", unicode_prompts, 1, 10, set_up),
    Trial("S14", "at SIGTERM streams end properly, who comes is told, and the exit code is 0", shutdown, 4, 50, set_up),
    Trial("S15", SOAK + ": 100,000 requests", _sized(soak, 100_000), 0, 1, set_up, seconds=3600, workers=1),
    Trial("S15-short", SOAK + ": 1,000 requests", _sized(soak, 1_000), 1, 1, set_up, workers=1),
    Trial("S17", "sixty-four long texts of one client do not keep another waiting", fairness, 1, 20, set_up, workers=1),
]  # fmt: skip
