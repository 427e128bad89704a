"""A hub of datasets on 127.0.0.1: as much of the protocol as the real huggingface_hub client asks of it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One dataset, how the server behaves, and what it was asked: (method, path, range header, authorization)."""

    repo: str
    files: dict[str, bytes]
    status: int = 200  # of every answer
    web_page: bool = False  # answer everything with HTML, as a network login does
    token: str | None = None  # needed, if set
    cut_after: int | None = None  # close the first download after so many bytes
    cut_always: bool = False  # and every other one too
    elsewhere: str | None = None  # address of the server that downloads are redirected to
    silent: bool = False  # take every request and never answer
    seconds: float = 0.0  # that a download takes
    no_ranges: bool = False  # answer with the whole file, whatever was asked for
    sent: int = 0  # bytes of files
    announced: dict[str, str] = field(default_factory=dict)  # file -> a SHA-256 that is not its own
    swapped: dict[str, bytes] = field(default_factory=dict)  # file -> what is served for it
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    endpoint: str = ""

    def sha256(self, name: str) -> str:
        return self.announced.get(name, hashlib.sha256(self.files[name]).hexdigest())

    def info(self) -> bytes:
        siblings = [
            {"rfilename": name, "size": len(data), "blobId": "0" * 40, "lfs": self._lfs(name)}
            for name, data in self.files.items()
        ]
        return json.dumps({"id": self.repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}).encode()

    def _lfs(self, name: str) -> dict[str, str | int]:
        return {"sha256": self.sha256(name), "size": len(self.files[name]), "pointerSize": 130}


@contextmanager
def hub(repo: str, files: dict[str, bytes]) -> Iterator[Hub]:
    """Serve a dataset while the block runs; change the Hub to change the server."""
    state = Hub(repo, files)

    class Handler(_Handler):
        hub = state

    with listening(Handler) as state.endpoint:
        yield state


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server in a thread while the block runs: its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        authorization = self.headers.get("Authorization")
        hub.requests.append((self.command, path, self.headers.get("Range"), authorization))
        if hub.silent:
            return self._stay_silent()
        if hub.web_page:
            return self._send(200, b"<!DOCTYPE html><html>log in to the network</html>", {"Content-Type": "text/html"})
        if hub.status != 200:
            return self._send(hub.status, b"{}", {})
        if hub.token and authorization != f"Bearer {hub.token}":
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path == f"/api/datasets/{hub.repo}":
            return self._send(200, hub.info(), {"Content-Type": "application/json"})
        name = path.removeprefix(f"/datasets/{hub.repo}/resolve/").removeprefix("main/").removeprefix(f"{COMMIT}/")
        if name in hub.files and hub.elsewhere:
            return self._send(302, b"", {**self._headers(name), "Location": hub.elsewhere + path})
        if name in hub.files:
            return self._file(name)
        code = "EntryNotFound" if path.startswith(f"/datasets/{hub.repo}/") else "RepoNotFound"
        return self._send(404, b"{}", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    def _file(self, name: str) -> None:
        data = self.hub.swapped.get(name, self.hub.files[name])
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "bytes=0-")
        start, end = int(asked[1]), int(asked[2]) + 1 if asked[2] else len(data)
        headers = self._headers(name)
        if whole := self.hub.no_ranges or (start, end) == (0, len(data)):
            start, end = 0, len(data)
        else:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self.hub.sent += end - start if self.command == "GET" else 0
        self._send(200 if whole else 206, data[start:end], headers)

    def _headers(self, name: str) -> dict[str, str]:
        data = self.hub.swapped.get(name, self.hub.files[name])
        etag = f'"{self.hub.sha256(name)}"'
        return {"ETag": etag, "X-Linked-Etag": etag, "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data))}

    def _stay_silent(self) -> None:
        while self.hub.silent:
            time.sleep(0.02)
        self.close_connection = True

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut_after is not None and "/resolve/" in self.path:
            self.wfile.write(body[: self.hub.cut_after])
            self.hub.cut_after, self.close_connection = self.hub.cut_after if self.hub.cut_always else None, True
        elif self.hub.seconds and "/resolve/" in self.path:
            for start in range(0, len(body), len(body) // 20 + 1):
                self.wfile.write(body[start : start + len(body) // 20 + 1])
                time.sleep(self.hub.seconds / 20)
        else:
            self.wfile.write(body)
