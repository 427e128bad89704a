"""Who may speak, and for how long: what stands between the network and the program.

``Door`` is the listening socket, and turns away who is too many. ``Guard`` is an ASGI middleware: Host, Origin, key, content type and size are checked before anything is read, every
answer carries the headers of a careful page, and every request is one line of the log. ``GuardedProtocol`` is uvicorn's
HTTP/1.1 with deadlines, which it lacks: a client that sends or reads too slowly is let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import re
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from smalllm.serve.meters import Meters
from smalllm.serve.protocol import Refusal, new_id
from smalllm.untrusted import printable

BODY_BYTES = 1 << 20
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'none'"
)
SECURITY_HEADERS = [
    (b"content-security-policy", CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]
CLIENT_LEFT = 499  # for the log alone, as in nginx
log = logging.getLogger("smalllm.serve")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to this address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Hosts:
    """The Host headers that are ours. Checking them stops a foreign page whose name was made to resolve to this machine.

    >>> hosts = Hosts("127.0.0.1", 8000, ["story.example"])
    >>> [hosts.allow(host) for host in ("localhost:8000", "localhost.evil:8000", "story.example", "story.example:443")]
    [True, False, True, True]
    """

    def __init__(self, bound: str, port: int, allowed: Iterable[str] = ()) -> None:
        names = {"127.0.0.1", "localhost", "[::1]", f"[{bound}]" if ":" in bound else bound}
        self._exact = {f"{name}:{port}" for name in names} | (names if port == 80 else set())
        given = {name.lower() for name in allowed}
        self._exact |= given
        self._any_port = {name for name in given if not re.search(r":\d+$", name)}

    def allow(self, host: str) -> bool:
        """Whether a Host header is one of ours."""
        host = host.lower()
        name, _, port = host.rpartition(":")
        return host in self._exact or (name in self._any_port and port.isascii() and port.isdigit())


@dataclass(frozen=True)
class Rules:
    """What ``Guard`` asks of a request."""

    hosts: Hosts
    key: str | None = None
    body_bytes: int = BODY_BYTES
    open_paths: Sequence[str] = ("/health", "/")
    open_prefix: str = "/page/"

    def check(self, scope: Scope) -> None:
        """Refusal for a request that is not let in."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        named: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            named.setdefault(name, []).append(value)
        self._check_host(named)
        self._check_key(scope["path"], named)
        if scope["method"] == "POST":
            self._check_body(named)

    def _check_host(self, named: dict[bytes, list[bytes]]) -> None:
        hosts = named.get(b"host", [])
        if len(hosts) != 1 or not self.hosts.allow(host := hosts[0].decode("latin-1")):
            raise Refusal(421, "this Host is not served here; start the server with --allow-host NAME", code="host")
        for origin in named.get(b"origin", []):
            if origin.decode("latin-1").lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
                raise Refusal(403, "this server answers only its own page and programs", code="origin")

    def _check_key(self, path: str, named: dict[bytes, list[bytes]]) -> None:
        if self.key is None or path in self.open_paths or path.startswith(self.open_prefix):
            return
        given = named.get(b"authorization", [])
        expected = f"Bearer {self.key}".encode()
        if len(given) != 1 or not hmac.compare_digest(given[0], expected):
            raise Refusal(
                401, "an API key is needed: send the header Authorization: Bearer KEY", code="invalid_api_key"
            )

    def _check_body(self, named: dict[bytes, list[bytes]]) -> None:
        lengths = named.get(b"content-length", [])
        if b"transfer-encoding" in named and lengths:
            raise Refusal(400, "Content-Length and Transfer-Encoding exclude each other", code="framing")
        if lengths and int(lengths[0]) > self.body_bytes:  # h11 has made sure that it is a number
            raise self.too_large()
        kind, _, charset = b",".join(named.get(b"content-type", [])).decode("latin-1").lower().partition(";")
        if kind.strip() != "application/json" or charset.replace('"', "").strip() not in ("", "charset=utf-8"):
            raise Refusal(415, "send Content-Type: application/json, in UTF-8", code="content_type")
        if named.get(b"content-encoding", [b"identity"]) != [b"identity"]:
            raise Refusal(415, "send the body as it is, without Content-Encoding", code="content_encoding")

    def too_large(self) -> Refusal:
        """For a body beyond the cap."""
        return Refusal(413, f"the body is larger than {self.body_bytes} bytes; shorten it", code="too_large")


class Guard:
    """ASGI middleware; the outermost. ``routes`` are the paths that are told apart in the metrics."""

    def __init__(self, app: ASGIApp, rules: Rules, meters: Meters, routes: Iterable[str]) -> None:
        self._app, self._rules, self._meters, self._routes = app, rules, meters, frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.monotonic(), CLIENT_LEFT

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *SECURITY_HEADERS]
            await send(message)

        try:
            self._rules.check(scope)
            await self._app(scope, self._capped(scope, receive), send_marked)
        except Refusal as refusal:
            await send_refusal(refusal, send_marked)
        except Exception:
            name = new_id("req")
            log.exception("request %s failed", name)
            if status == CLIENT_LEFT:  # nothing has been sent
                await send_refusal(Refusal(500, f"the server failed at request {name}", code="internal"), send_marked)
            else:
                raise
        finally:
            self._record(scope, status, time.monotonic() - began)

    def _capped(self, scope: Scope, receive: Receive) -> Receive:
        """``receive`` that refuses a body beyond the cap, told beforehand or not."""
        seen = 0

        async def receive_capped() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._rules.body_bytes:
                raise self._rules.too_large()
            return message

        return receive_capped

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        route = path if path in self._routes else "/page/*" if path.startswith("/page/") else "other"
        self._meters.requests[(route, status)] += 1
        if scope["method"] == "POST" and route != "other":
            self._meters.request.observe(seconds)
        client = scope["client"][0] if scope.get("client") else "-"
        log.info("%s %s %s %d %.0f ms", client, scope["method"][:10], printable(path, 200), status, seconds * 1000)


async def send_refusal(refusal: Refusal, send: Send) -> None:
    """The answer to a request that is refused; the connection ends with it, because a body may still be on its way."""
    body = refusal.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if refusal.status in (400, 413, 415, 421):
        headers.append((b"connection", b"close"))
    if refusal.retry_after:
        headers.append((b"retry-after", b"%d" % refusal.retry_after))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# ── connections ──

REFUSING_SECONDS = 0.1  # then whoever is inside gets a turn
HANG_UP = struct.pack("ii", 1, 0)  # SO_LINGER: drop what the client has not read, instead of keeping it for him


class Door(socket.socket):
    """A listening socket that lets in ``limit`` guests at a time, and nobody who asks for a text while ``busy(address)``.

    Others are answered with 503 before anything is made for them, which costs a tenth of what it would cost later: of ten
    thousand that come within a second, each hears within another.
    """

    limit = 1 << 30
    inside = 0
    meters: Meters | None = None
    busy: Callable[[str], bool] = staticmethod(lambda address: False)

    def accept(self) -> tuple[socket.socket, Any]:
        """The next guest; BlockingIOError when nobody waits, or others should have a turn."""
        until = time.monotonic() + REFUSING_SECONDS
        while time.monotonic() < until:
            connection, address = super().accept()
            connection.setblocking(False)
            answer = TOO_MANY if self.inside >= self.limit else BUSY if self._in_vain(connection, address[0]) else None
            if answer is None:
                self.inside += 1
                return _Guest(connection, self), address
            self._refuse(connection, answer)
        raise BlockingIOError

    def refused(self, address: str) -> bool:
        """Whether a text cannot be made now for who has just asked; if so, he is counted."""
        if busy := self.busy(address):
            self._count()
        return busy

    def _count(self) -> None:
        if self.meters is not None:
            self.meters.refused += 1

    def _in_vain(self, connection: socket.socket, address: str) -> bool:
        """Whether he asks for a text that cannot be made now. Who has not spoken yet is let in and told later."""
        try:
            return self.busy(address) and connection.recv(len(TEXT_REQUEST), socket.MSG_PEEK) == TEXT_REQUEST
        except OSError:
            return False

    def _refuse(self, connection: socket.socket, answer: bytes) -> None:
        self._count()
        with connection, contextlib.suppress(OSError):  # gone already
            connection.send(answer)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1 << 16)  # closing with something unread would be a reset, which may overtake the answer


class _Guest(socket.socket):
    """A connection that says when it leaves."""

    def __init__(self, connection: socket.socket, door: Door) -> None:
        # Named as TCP, or asyncio does not switch Nagle's algorithm off, and every second write waits 40 ms for the client.
        super().__init__(connection.family, connection.type, socket.IPPROTO_TCP, connection.detach())
        self._door: Door | None = door

    def close(self) -> None:
        """Leave; at the second time nothing happens."""
        super().close()
        if self._door is not None:
            self._door.inside -= 1
            self._door = None


def plain_answer(refusal: Refusal) -> bytes:
    """A refusal as the bytes of a whole HTTP answer, where there is no request yet, or none that was understood."""
    body, told = refusal.body(), [(b"content-type", b"application/json"), (b"connection", b"close"), *SECURITY_HEADERS]
    told += [(b"retry-after", b"%d" % refusal.retry_after)] if refusal.retry_after else []
    head = b"".join(b"%s: %s\r\n" % header for header in told)
    return b"HTTP/1.1 %d \r\n%scontent-length: %d\r\n\r\n%s" % (refusal.status, head, len(body), body)


def queue_full() -> Refusal:
    """For who asks while as many as may are waiting."""
    return Refusal(503, "too many requests are waiting; try again soon", code="overloaded", retry_after=1)


TEXT_REQUEST = b"POST /v1/"
BUSY = plain_answer(queue_full())
TOO_MANY = plain_answer(Refusal(503, "too many connections; try again soon", code="overloaded", retry_after=1))


@dataclass(frozen=True)
class Deadlines:
    """Seconds that a client may take for its headers, for its body, to read what it is sent, and between requests; and how
    many connections there may be, for the ``Door``."""

    headers: float = 10.0
    body: float = 30.0
    write: float = 30.0
    idle: float = 30.0
    connections: int = 1024


def guarded_protocol(deadlines: Deadlines, door: Door) -> type[H11Protocol]:
    """uvicorn makes protocols itself, from a class."""
    return type("GuardedProtocol", (GuardedProtocol,), {"deadlines": deadlines, "refused": staticmethod(door.refused)})


class GuardedProtocol(H11Protocol):
    """A connection that cannot be held open by doing nothing."""

    deadlines = Deadlines()
    refused: Callable[[str], bool] = staticmethod(lambda address: False)
    _phase: str | None = None
    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the headers."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing as soon as anything waits to be read
        self._enter("headers")

    def data_received(self, data: bytes) -> None:
        """Read on, and look what the client owes now."""
        if self.cycle is None and self.client and data.startswith(TEXT_REQUEST) and self.refused(self.client[0]):
            self.transport.write(BUSY)
            self.transport.close()
        if not self.transport.is_closing():
            super().data_received(data)
            waits_for = {h11.IDLE: "headers", h11.SEND_BODY: "body"}
            self._enter(waits_for.get(self.conn.their_state))

    def on_response_complete(self) -> None:
        """A body that is still on its way keeps its deadline."""
        super().on_response_complete()
        # Between requests uvicorn's own keep-alive clock runs.
        self._enter("body" if self.conn.their_state is h11.SEND_BODY else None)

    def connection_lost(self, exc: Exception | None) -> None:
        """No clock outlives the connection."""
        self._enter(None)
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the clock of the client's reading."""
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(self.deadlines.write, self._unread)

    def resume_writing(self) -> None:
        """The client has read what it was sent."""
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """The same as uvicorn, in our words; nothing where an answer has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(plain_answer(Refusal(400, "the request is not valid HTTP", code="http")))
        self.transport.close()

    def _enter(self, phase: str | None) -> None:
        """The client owes headers, a body or nothing; each is one deadline, however it trickles."""
        if phase == self._phase and phase is not None:
            return
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        self._phase = phase
        if phase is not None:
            seconds: Any = getattr(self.deadlines, phase)
            self._reading = self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        self._reading = None
        self.transport.abort()

    def _unread(self) -> None:
        """Let go who does not read; the system would keep what was sent for him, perhaps for many minutes."""
        guest: Any = self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            guest.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, HANG_UP)
        self.transport.abort()
