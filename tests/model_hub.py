"""A hub of models on 127.0.0.1 that takes one upload: as much of the protocol as the real huggingface_hub client asks of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from hub_server import listening


@dataclass
class ModelHub:
    """What was uploaded, and how the server behaves."""

    files: dict[str, bytes] = field(default_factory=dict)
    made: list[dict] = field(default_factory=list)  # repositories, as the client asked for them
    status: int = 200  # of every answer
    token: str | None = None  # needed, if set
    commits: int = 0
    endpoint: str = ""


@contextmanager
def model_hub() -> Iterator[ModelHub]:
    """Serve while the block runs."""
    state = ModelHub()

    class Handler(_Handler):
        hub = state

    with listening(Handler) as state.endpoint:
        yield state


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ModelHub

    def do_POST(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        if self.hub.status != 200:
            return self._send(self.hub.status, {"error": "no"})
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send(401, {"error": "who are you?"})
        if path == "/api/repos/create":
            self.hub.made.append(json.loads(body))
            return self._send(200, {"url": f"{self.hub.endpoint}/me/stories"})
        if path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self._send(200, {"files": files})
        if path.endswith("/commit/main"):
            return self._commit(body)
        return self._send(200, {})

    def do_GET(self) -> None:
        if self.hub.status != 200:
            return self._send(self.hub.status, {"error": "no"})
        self._send(200, {"id": "me/stories", "sha": "0" * 40, "siblings": [], "tags": [], "private": True})

    def log_message(self, *_: object) -> None:
        pass

    def _commit(self, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.hub.commits += 1
        address = f"{self.hub.endpoint}/me/stories/commit/{'1' * 40}"
        self._send(200, {"success": True, "commitOid": "1" * 40, "commitUrl": address, "hookOutput": ""})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _send(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
