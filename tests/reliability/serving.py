"""A server in a process of its own, as a client sees it and as the system sees it: sockets, memory, descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from test_engine import Slow

from smalllm.serve.server import Service, Settings

CONTEXT = 128
NEVER_END = {"2": -100}  # no end of text


class Serving:
    """``smalllm serve``'s server, forked. Its log is checked at the end: a traceback is a failure."""

    def __init__(self, run: Path, log: Path, step_seconds: float = 0.0, drain_seconds: float = 1.0, **settings: Any):
        self._log, reading = log, os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _serve(run, log, reading[1], step_seconds, drain_seconds, settings)
        os.close(reading[1])
        with open(reading[0]) as port:
            told = port.readline()
        assert told, f"the server did not start: {self.log()}"
        self.port = int(told)

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def end(self) -> int:
        """SIGTERM; the exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    # what the system sees

    def resident(self) -> int:
        """Bytes in memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    def files(self) -> int:
        """Open descriptors."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    # what a client sees

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        raw = self.exchange(b"GET %s HTTP/1.1\r\n%s\r\n" % (path.encode(), self.host(close=True)))
        head, _, body = raw.partition(b"\r\n\r\n")
        return int(head.split()[1]) if head else 0, body

    def host(self, close: bool = False) -> bytes:
        return b"Host: localhost:%d\r\n%s" % (self.port, b"Connection: close\r\n" if close else b"")

    def post(self, path: str = "/v1/completions", close: bool = True, **fields: Any) -> bytes:
        """The bytes of a request."""
        body = json.dumps({"prompt": "Once", "max_tokens": 3} | fields).encode()
        head = b"POST %s HTTP/1.1\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        return head % (path.encode(), self.host(close), len(body)) + body

    def connect(self, address: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10, source_address=(address, 0))

    def exchange(self, data: bytes, address: str = "127.0.0.1") -> bytes:
        """Send, and read to the end of the connection."""
        with self.connect(address) as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))

    def busy(self) -> float:
        """Rows that run or wait."""
        page = self.get("/metrics")[1].decode()
        return sum(float(value) for value in re.findall(r"^smalllm_(?:active_slots|queue_length) (\S+)$", page, re.M))

    def check(self) -> None:
        """It is well, does nothing, and has logged no mistake of ours."""
        wait_until(lambda: not self.busy(), 5.0)
        assert self.get("/health") == (200, b'{"status":"ok"}')
        status, body = self.get("/run")
        assert status == 200 and json.loads(body)["step"], body
        assert b'"finish_reason"' in self.exchange(self.post())
        assert "Traceback" not in self.log(), self.log()[-3000:]


@contextlib.contextmanager
def serving(run: Path, folder: Path, **options: Any) -> Iterator[Serving]:
    """A server that is well in the end, and ends."""
    server = Serving(run, folder / "server.log", **options)
    yield server  # who fails leaves it to be ended with its process group
    server.check()
    code = server.end()
    assert code == 0, f"the server ended with {code}: {server.log()[-3000:]}"


def _serve(
    run: Path, log: Path, port: int, step_seconds: float, drain_seconds: float, settings: dict[str, Any]
) -> NoReturn:
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr, force=True)
        most_files()
        service = Service(Settings(run, port=0, **{"slots": 4} | settings), drain_seconds)
        if step_seconds:
            served = service.models.current
            served.batch = Slow(served.new_batch(), step_seconds)  # type: ignore[assignment]
        signal.signal(signal.SIGTERM, lambda *_: None)  # as commands/serve.py
        os.write(port, b"%d\n" % service.port)
        os.close(port)
        service.run()
        code = 0
    except BaseException:
        logging.exception("the server broke")
    finally:
        sys.stderr.flush()
        os._exit(code)


def most_files() -> None:
    """As many descriptors as the system lets us have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> float:
    """Wait for something to become true; how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen"
        time.sleep(0.001)
    return time.monotonic() - began


class Exchange(asyncio.Protocol):
    """One connection of an event loop: everything that comes is kept, also what came before a reset."""

    def __init__(self, data: bytes) -> None:
        self.data, self.received, self.reset = data, b"", False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(self.data)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.reset = exc is not None
        if not self.ended.done():
            self.ended.set_result(None)


async def exchanged(port: int, data: bytes, seconds: float = 5.0) -> Exchange:
    """Send, and wait for the end of the connection; TimeoutError when it does not end."""
    _, exchange = await asyncio.get_running_loop().create_connection(lambda: Exchange(data), "127.0.0.1", port)
    try:
        await asyncio.wait_for(exchange.ended, seconds)
    finally:
        exchange.transport.abort()  # type: ignore[attr-defined]
    return exchange
