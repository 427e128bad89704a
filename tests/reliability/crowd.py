"""Thousands of sockets of one process, in one poll: those that all ask at once, and those that never let go."""

from __future__ import annotations

import contextlib
import errno
import random
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

IP_BIND_ADDRESS_NO_PORT = 24  # <linux/in.h>: a port is chosen when connecting, so that 10,000 do not run out


@dataclass
class Asker:
    """One connection with one request: when it came, when the first and the last byte of the answer came."""

    data: bytes
    began: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    received: bytearray = field(default_factory=bytearray)
    error: str = ""

    @property
    def status(self) -> int:
        """Of the answer; 0 without one."""
        return int(self.received[9:12]) if self.received.startswith(b"HTTP/1.1 ") else 0


def ask_all(port: int, requests: Sequence[bytes], pace: float, seconds: float) -> list[Asker]:
    """Connect and send, ``pace`` of them a second, and read every answer to its end, for so many seconds at most."""
    askers, poll, came, began = [Asker(data) for data in requests], select.epoll(), 0, time.monotonic()
    open_sockets: dict[int, tuple[socket.socket, Asker]] = {}
    while (came < len(askers) or open_sockets) and time.monotonic() < began + seconds:
        for _ in range(min(50, len(askers) - came, int(pace * (time.monotonic() - began)) + 1 - came)):
            connection = _connecting(port, f"127.0.0.{1 + came % 8}")
            askers[came].began = time.monotonic()
            open_sockets[connection.fileno()] = connection, askers[came]
            poll.register(connection, select.EPOLLOUT)
            came += 1
        for descriptor, _ in poll.poll(0.0005 if came < len(askers) else 0.05):
            connection, asker = open_sockets[descriptor]
            if _attend(poll, connection, asker):
                poll.unregister(descriptor)
                connection.close()
                del open_sockets[descriptor]
    for connection, asker in open_sockets.values():
        asker.error = asker.error or "no end"
        connection.close()
    return askers


def _connecting(port: int, address: str) -> socket.socket:
    connection = socket.socket()
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    connection.bind((address, 0))
    with contextlib.suppress(BlockingIOError):
        connection.connect(("127.0.0.1", port))
    return connection


def _attend(poll: select.epoll, connection: socket.socket, asker: Asker) -> bool:
    """Send, or read; whether this connection is over."""
    if asker.data:
        try:
            sent = connection.send(asker.data)
        except OSError as error:  # the door may have answered and closed before it was asked
            sent = len(asker.data)
            asker.error = errno.errorcode.get(error.errno or 0, "") if error.errno != errno.EPIPE else ""
        asker.data = asker.data[sent:]
        poll.modify(connection, select.EPOLLOUT if asker.data else select.EPOLLIN)
        return False
    try:
        piece = connection.recv(1 << 16)
    except BlockingIOError:
        return False
    except OSError as error:
        piece, asker.error = b"", asker.error or errno.errorcode.get(error.errno or 0, "")
    now = time.monotonic()
    asker.first = asker.first or now
    asker.received += piece
    if not piece:
        asker.ended = now
    return not piece


# ── those that never let go ──


@dataclass
class Slow:
    """A connection that sends ``opening``, then ``drip`` every second, and reads nothing."""

    kind: str
    opening: bytes
    drip: bytes
    began: float = 0.0
    closed: float = 0.0


def hold_on(
    port: int, slow: Sequence[Slow], seconds: float, every: float = 1.0, tell: Callable[[], None] = lambda: None
) -> None:
    """Open them all, tell, and hold on until the server has closed every one, or for so many seconds."""
    poll, held = select.epoll(), {}
    for one in slow:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(5)
        connection.connect(("127.0.0.1", port))
        connection.setblocking(False)
        one.began = time.monotonic()
        with contextlib.suppress(BlockingIOError):
            connection.send(one.opening)
        held[connection.fileno()] = connection, one
        poll.register(connection, select.EPOLLRDHUP)  # and errors and the end, which are always told
    tell()
    until, next_drip = time.monotonic() + seconds, time.monotonic() + every
    random.shuffle(slow := list(slow))
    while held and time.monotonic() < until:
        for descriptor, _ in poll.poll(max(0.0, min(next_drip, until) - time.monotonic())):
            connection, one = held.pop(descriptor)
            one.closed = time.monotonic()
            poll.unregister(descriptor)
            connection.close()
        if time.monotonic() >= next_drip:
            next_drip += every
            for connection, one in held.values():
                with contextlib.suppress(OSError):
                    connection.send(one.drip)
    for connection, _ in held.values():
        connection.close()
