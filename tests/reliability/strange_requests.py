"""Requests that nobody should send, each a function of its number: values of every kind in every field of the schema,
bytes that are no HTTP, valid requests with flipped bits; and what is wrong with an answer."""

from __future__ import annotations

import gzip
import json
import random
import re
from typing import Any

from smalllm.serve.protocol import ChatRequest, CompletionRequest

PATHS = [
    "/", "/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/run", "/run/metrics", "/run/samples",
    "/run/metrics?after=1", "/run/metrics?after=x", "/page/app.js", "/page/../server.py", "/page/%2e%2e/x", "/page//etc/passwd",
    "/nothing", "//", "/%00", "/%ff%fe", "/v1/models/tale", "/?q=x", "*", "http://evil.example/", "/" + "a" * 9000, "/v1/completions/",
]  # fmt: skip
METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "CONNECT", "FOO", "get"]
TEXTS = [
    "", "Once", "</s>", "<|end|>", "\0", "🙂", "e\u0301" * 50, "\u2028\u200d\u202e", "\ud800", "a" * 5000, "../../etc/passwd",
    "$(id)", "'; drop", "<script>", "%s%n", "\r\nX: y", "\x1b[2J", "NaN", "-0", "1e999",
]  # fmt: skip
NUMBERS = [0, -1, 1, 2, 5, 1 << 31, 1 << 63, -(1 << 63), 10**400, 0.5, -0.0, 1e308, 1e-320, 100, 65536, 1 << 20]
OTHERS: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": ""},
    [1, "a"],
    [[1, 2]],
    ["x"],
    {"1": 1},
    {"5": -100.0},
]
RAW = [
    b"GET /\r\n\r\n", b"\r\n\r\n", b"GET / HTTP/0.9\r\n\r\n", b"GET / HTTP/9.9\r\n{host}\r\n", b"\0" * 100 + b"\r\n\r\n",
    b"GET http://evil.example/ HTTP/1.1\r\n{host}\r\n", b"G\xffT / HTTP/1.1\r\n{host}\r\n", b"GET /a b HTTP/1.1\r\n{host}\r\n",
    b"GET / HTTP/1.1\r\n{host}X y: 1\r\n\r\n", b"GET / HTTP/1.1\r\n{host}X: a\0b\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\n{host}Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"POST /v1/completions HTTP/1.1\r\n{host}Content-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\n{host}Content-Length: 99999999999999999999\r\n{json}\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\n{host}Content-Length: 2\r\nTransfer-Encoding: chunked\r\n{json}\r\n2\r\n{}\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\n{host}Transfer-Encoding: gzip\r\n{json}\r\nzz\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"POST /v1/completions HTTP/1.1\r\n{host}{json}Content-Length: 2\r\n\r\n{}GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n{host}Upgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Key: x\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\n{host}\r\n", b"GET / HTTP/1.1\r\n{host}{host}\r\n", b"GET / HTTP/1.1\r\n{host} folded: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\n{host}{json}Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
]  # fmt: skip
JSON = b"Content-Type: application/json\r\n"
SECRETS = re.compile(rb"Traceback|\.py\b|/work|/tmp|/home|/root|site-packages")


def strange_request(number: str, host: bytes) -> bytes:
    """The bytes of one; ``host`` is the line of a Host header."""
    chance = random.Random(number)
    kinds = (
        [_schema] * 8
        + [_anything] * 3
        + [_damaged] * 3
        + [_raw] * 2
        + [_chunked, _headers, _headers, _pipelined, _broken_json]
    )
    return chance.choice(kinds)(chance, host)


def _schema(chance: random.Random, host: bytes) -> bytes:
    """Well-formed JSON, some of its fields wrong."""
    kind, path = chance.choice([(CompletionRequest, "/v1/completions"), (ChatRequest, "/v1/chat/completions")])
    good: dict[str, Any] = (
        {"messages": [{"role": "user", "content": "Once"}]} if kind is ChatRequest else {"prompt": "Once"}
    )
    fields = good | {"max_tokens": chance.randrange(1, 9)}
    for name in chance.sample([*kind.model_fields, "x", "nested.name", "__class__"], chance.randrange(1, 5)):
        fields[name] = _value(chance)
    return post(path, json.dumps(fields).encode(), host)


def _value(chance: random.Random) -> Any:
    pool = chance.choice([TEXTS, NUMBERS, NUMBERS, OTHERS])
    value = chance.choice(pool)
    if chance.random() < 0.15:
        return [value] * chance.choice([1, 2, 5, 400])
    if chance.random() < 0.1:
        return [
            {
                "role": chance.choice(["user", "system", "evil", value]),
                "content": value,
                **({"x": 1} if chance.random() < 0.3 else {}),
            }
        ]
    return {str(chance.choice(NUMBERS)): value} if chance.random() < 0.1 else value


def post(path: str, body: bytes, host: bytes, headers: bytes = JSON) -> bytes:
    """A POST that closes its connection."""
    head = b"POST %s HTTP/1.1\r\n%sConnection: close\r\n%sContent-Length: %d\r\n\r\n"
    return head % (path.encode(), host, headers, len(body)) + body


def _anything(chance: random.Random, host: bytes) -> bytes:
    """Any method on any path, with or without a body."""
    line = f"{chance.choice(METHODS)} {chance.choice(PATHS)} HTTP/{chance.choice(['1.1', '1.1', '1.1', '1.0'])}\r\n".encode()
    body = chance.choice(
        [b"", b"", b"{}", chance.randbytes(chance.randrange(200)), b'{"prompt":"Once","max_tokens":1}']
    )
    return (
        line
        + host
        + b"Connection: close\r\n"
        + JSON
        + (b"Content-Length: %d\r\n\r\n" % len(body) if body else b"\r\n")
        + body
    )


def _damaged(chance: random.Random, host: bytes) -> bytes:
    """A valid request in which bits are flipped, or a piece is lost, doubled or moved."""
    whole = bytearray(
        _schema(chance, host)
        if chance.random() < 0.3
        else post("/v1/completions", b'{"prompt":"Once","max_tokens":2}', host)
    )
    for _ in range(chance.choice([1, 1, 2, 8])):
        place, kind = chance.randrange(len(whole)), chance.randrange(4)
        piece = whole[place : place + chance.randrange(1, 20)]
        if kind == 0:
            whole[place] ^= 1 << chance.randrange(8)
        elif kind == 1 and len(piece) < len(whole):
            del whole[place : place + len(piece)]
        elif kind == 2:
            whole[place:place] = piece * chance.randrange(1, 4)
        else:
            whole[place:place] = chance.randbytes(chance.randrange(1, 9))
    return bytes(whole)


def _raw(chance: random.Random, host: bytes) -> bytes:
    """What is hardly HTTP."""
    if chance.random() < 0.2:
        return chance.randbytes(chance.randrange(1, 300))
    return chance.choice(RAW).replace(b"{host}", host).replace(b"{json}", JSON)


def _chunked(chance: random.Random, host: bytes) -> bytes:
    """Chunks whose sizes are wrong."""
    size = chance.choice(
        [b"2", b"02", b"zz", b"-1", b"2;x=y", b"ffffffffffffffffff", b"0x2", b" 2", b"", b"1", b"3", b"100000"]
    )
    end = chance.choice([b"0\r\n\r\n", b"", b"0\r\nX: y\r\n\r\n", b"0\n\n", b"x\r\n"])
    chunk = size + b"\r\n" + chance.choice([b"{}", chance.randbytes(3)]) + chance.choice([b"\r\n", b"\n", b""])
    head = b"POST /v1/completions HTTP/1.1\r\n" + host + JSON + b"Connection: close\r\nTransfer-Encoding: "
    return (
        head
        + chance.choice([b"chunked", b"Chunked", b"chunked, chunked", b"identity"])
        + b"\r\n\r\n"
        + chunk * chance.randrange(1, 4)
        + end
    )


def _headers(chance: random.Random, host: bytes) -> bytes:
    """A good request in odd headers."""
    body = b'{"prompt":"Once","max_tokens":2}'
    odd = chance.choice([
        b"X: " + b"a" * 70_000, b"\r\n".join(b"X%d: y" % number for number in range(3000)), b"X: \xff\xfe", b"X: a\0b", b"Origin: null",
        b"Origin: http://evil.example", b"Content-Encoding: gzip", b"Content-Encoding: br", b"Range: bytes=0-,0-,0-", b"Cookie: " + b"a=b;" * 500,
        b"Accept-Encoding: gzip", b"Authorization: Bearer " + b"x" * 30_000, b"X-Forwarded-For: ../../x", b"Content-Type: text/plain",
        b"Content-Type: application/json; charset=utf-16", b"Host: evil.example", b"Expect: 100-continue", b"Expect: 42", b"TE: trailers",
        b"Transfer-Encoding: chunked", b"Content-Length: 2", b"Connection: keep-alive, x, \x80", b"Upgrade: h2c", b": empty", b"X" * 300 + b":",
    ])  # fmt: skip
    body = gzip.compress(body) if b"gzip" in odd else body
    return post(
        chance.choice(["/v1/completions", "/v1/chat/completions", "/", "/health"]), body, host, JSON + odd + b"\r\n"
    )


def _pipelined(chance: random.Random, host: bytes) -> bytes:
    """Several requests at once; the last one closes."""
    several = [
        b"GET %s HTTP/1.1\r\n%s\r\n" % (chance.choice(PATHS[:11]).encode(), host) for _ in range(chance.randrange(1, 6))
    ]
    several.insert(
        0, post("/v1/completions", b'{"prompt":"Once","max_tokens":2}', host).replace(b"Connection: close\r\n", b"")
    )
    chance.shuffle(several)
    return b"".join(several) + chance.choice([_schema, _damaged, _anything])(chance, host)


def _broken_json(chance: random.Random, host: bytes) -> bytes:
    """Bodies that are not JSON, or not what one expects of it."""
    whole = b'{"prompt":"Once","max_tokens":2,"stop":["x"]}'
    cut = chance.randrange(len(whole))
    body = chance.choice([
        whole[:cut], whole[cut:], whole + whole, b"[" * 50_000, b'{"a":' * 5_000, b"\xef\xbb\xbf" + whole, whole.decode().encode("utf-16"),
        whole.replace(b"2", b"2" * 5000), whole.replace(b"2", b"NaN"), whole.replace(b"2", b"1e400"), whole.replace(b"2", b"02"), b"null", b'"x"',
        b'{"prompt":"a","prompt":"b","max_tokens":1}', b'{"prompt":"\\ud800"}', b'{"prompt":"\xed\xa0\x80"}', b'{"prompt":"\x00"}', b"", b" " * 9000,
        whole[:cut] + chance.randbytes(3) + whole[cut:], whole.replace(b'"', b"'"), b"/*x*/" + whole, whole[:-1] + b",}",
    ])  # fmt: skip
    return post(chance.choice(["/v1/completions", "/v1/chat/completions"]), body, host)


# ── what is wrong with an answer ──


def fault(asked: bytes, received: bytes) -> str:
    """A word about what is wrong with the answers on a connection; empty when nothing is."""
    parts = re.split(rb"(?=HTTP/1\.1 \d\d\d )", received)
    if parts[0]:
        return "not HTTP"
    return next((wrong for part in parts[1:] if (wrong := _fault(asked, part))), "")


def _fault(asked: bytes, part: bytes) -> str:
    head, end, body = part.partition(b"\r\n\r\n")
    status, told = int(part[9:12]), re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    if not end or status >= 500 or 300 <= status < 400:
        return f"status {status}" if end else "a head without an end"
    if b'data: {"error"' in body:
        return "an error in a stream"
    if told and len(body) != int(told[1]) and not (b"HEAD" in asked and not body):
        return "a body that is cut"
    if b"transfer-encoding: chunked" in head.lower() and not body.endswith(b"0\r\n\r\n") and b"HEAD" not in asked:
        return "a stream that is cut"
    return _wrong_error(body) if status >= 400 and body else ""


def _wrong_error(body: bytes) -> str:
    if SECRETS.search(body):
        return "an error that tells of this machine"
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return "an error that is not OpenAI's"
    return (
        "" if set(error) == {"message", "type", "param", "code"} and error["message"] else "an error without its parts"
    )
