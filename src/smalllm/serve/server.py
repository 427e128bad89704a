"""The HTTP server: routes, streams, start and end. What may be asked is in ``protocol``, who may ask in ``guard``, and
the texts are made in ``engine``; everything slow happens off the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from smalllm.checkpoint import DamagedCheckpoint
from smalllm.config import UserError
from smalllm.conversation import answer_prompt, stop_ids, story_so_far
from smalllm.generation import SamplingParams, Token
from smalllm.serve import protocol
from smalllm.serve.engine import DEADLINE_SECONDS, QUEUE, SHUTTING_DOWN, Busy, Closing, End, Engine, Job, reserve
from smalllm.serve.guard import (
    CLIENT_LEFT,
    Deadlines,
    Door,
    Guard,
    Hosts,
    Rules,
    guarded_protocol,
    is_loopback,
    queue_full,
    send_refusal,
)
from smalllm.serve.meters import Meters
from smalllm.serve.models import AllInUse, Models, NoSuchModel, Served
from smalllm.serve.protocol import Answer, ChatAnswer, ChatRequest, CompletionAnswer, CompletionRequest, Refusal
from smalllm.serve.report import RunReport

DRAIN_SECONDS = 8.0
SWITCH_SECONDS = 0.0002  # of Python's threads: neither the engine nor the event loop may wait 5 ms for the other
BACKLOG = 4096  # connections that wait to be let in; beyond that the system has them try again a second later
SMALL_BYTES = 4096  # of text and JSON take the event loop a fraction of a millisecond
ANSWER_BYTES = 64  # of JSON for a token, more or less
UNREAD_BYTES = (
    1 << 17
)  # that the system keeps for a client who does not read; by itself it would take megabytes for each
FILES_SPARE = 128  # file descriptors that are not connections
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml", ".png": "image/png", ".ico": "image/x-icon", ".json": "application/json",
    ".woff2": "font/woff2",
}  # fmt: skip
log = logging.getLogger("smalllm.serve")
R = TypeVar("R", CompletionRequest, ChatRequest)
T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True)
class Settings:
    """How to serve. ``allow_hosts`` are names by which a proxy or a network reaches this machine."""

    run: str | Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    slots: int = 16
    allow_hosts: Sequence[str] = ()
    device: str = "cpu"
    queue: int = QUEUE
    request_seconds: float = DEADLINE_SECONDS
    deadlines: Deadlines = field(default_factory=Deadlines)

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.api_key:
            raise UserError(
                f"host = {self.host} lets other machines in; set an API key with --api-key or SMALLLM_API_KEY, or use 127.0.0.1"
            )
        if not 1 <= self.slots <= 1024:
            raise UserError(f"slots = {self.slots} is not possible; use 1 to 1024")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port = {self.port} is not possible; use 1 to 65535, or 0 for any that is free")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError("api-key has characters that a header cannot carry; use letters, digits and punctuation")


# ── requests ──


@dataclass(frozen=True)
class Work:
    """A request that was understood: what the engine needs, and the answer to be filled."""

    served: Served
    ids: list[int]
    params: SamplingParams
    answer: Answer
    stream: bool
    stop_ids: Sequence[int]


class Routes:
    """The endpoints, over the parts that answer them."""

    def __init__(self, engine: Engine, models: Models, meters: Meters, page: dict[str, Response]) -> None:
        self._engine, self._models, self._meters, self._page = engine, models, meters, page
        self._loader = ThreadPoolExecutor(1, "load")
        self.report = RunReport(models)

    def table(self) -> list[Route]:
        """The route table; the tests walk through it."""
        return [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/run", self.run),
            Route("/run/metrics", self.run_metrics),
            Route("/run/samples", self.run_samples),
            Route("/", self.page),
            Route("/page/{name:path}", self.page),
        ]

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, CompletionRequest, self._understand_completion)

    async def chat(self, request: Request) -> Response:
        return await self._complete(request, ChatRequest, self._understand_chat)

    def models(self, request: Request) -> Response:
        """NAME and every NAME@STEP; ``created`` is when the checkpoint was written."""
        folder = self._models.folder
        kept = folder.milestones() + folder.checkpoints()
        times = {f"{self._models.name}@{checkpoint.step}": _written(checkpoint.path) for checkpoint in kept}
        names = self._models.names()
        body = protocol.models_list(names, lambda name: times.get(name) or max(times.values(), default=0))
        return Response(body, media_type="application/json")

    async def health(self, request: Request) -> Response:
        healthy = self._engine.healthy()
        return JSONResponse({"status": "ok" if healthy else "unhealthy"}, 200 if healthy else 503)

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(
            self._meters.exposition(self._engine.gauges()), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    def run(self, request: Request) -> Response:
        return JSONResponse(self.report.state())

    def run_metrics(self, request: Request) -> Response:
        """?after=STEP"""
        after = request.query_params.get("after", "-1")
        if not (after.removeprefix("-").isdigit() and after.isascii() and len(after) < 16):
            raise Refusal(400, "after is not a step; for example /run/metrics?after=100", param="after")
        return Response(self.report.metrics(int(after)), media_type="application/json")

    def run_samples(self, request: Request) -> Response:
        return Response(self.report.samples(), media_type="application/json")

    async def page(self, request: Request) -> Response:
        """A file of the page, from memory."""
        found = self._page.get(request.path_params.get("name", "index.html"))
        if found is None:
            raise Refusal(404, "there is no such page")
        return found

    # completions and chat

    async def _complete(self, request: Request, kind: type[R], understand: Callable[[R, Served], Work]) -> Response:
        client = request.client.host if request.client else ""
        with _refusing():
            self._engine.check_room(client)  # before anything is read
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        with _refusing(), self._engine.place(client):
            work = await self._work(body, kind, understand)
            job = self._submit(work, client)
        if work.stream:
            return EventStream(job, work.answer)
        async with cancelled_when_gone(request.receive, job):
            items = await job.more()
        return await _apart(ANSWER_BYTES * len(items), whole_answer, items, work.answer)

    async def _work(self, body: bytes, kind: type[R], understand: Callable[[R, Served], Work]) -> Work:
        asked = await _apart(len(body), protocol.parse, kind, body)
        served = self._models.loaded(asked.model) or await self._load(str(asked.model))
        return await _apart(len(body), understand, asked, served)

    async def _load(self, name: str) -> Served:
        """A checkpoint that is not in memory, in a thread of its own: nobody else waits for it."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._loader, self._models.get, name)
        except NoSuchModel as error:
            raise Refusal(404, str(error), param="model", code="model_not_found") from None
        except AllInUse:
            raise Refusal(503, "too many checkpoints are in use", code="overloaded", retry_after=2) from None
        except DamagedCheckpoint:
            raise Refusal(404, "this checkpoint is damaged or gone", param="model", code="model_not_found") from None

    def _submit(self, work: Work, client: str) -> Job:
        return self._engine.submit(
            client, work.served, work.ids, work.params,
            choices=work.answer.request.choices, stop_ids=work.stop_ids, stream=work.stream,
        )  # fmt: skip

    @staticmethod
    def _understand_completion(request: CompletionRequest, served: Served) -> Work:
        """In a thread: a long text takes its time."""
        prompt, tokenizer = request.single_prompt(), served.tokenizer
        if isinstance(prompt, str):
            _check_length(prompt, served, "prompt")
            ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        else:
            ids = _checked_ids(prompt, tokenizer.vocab_size) or [tokenizer.bos_id]
            prompt = tokenizer.decode(ids) if request.echo else ""
        params = request.params(len(ids), served.context, tokenizer)
        answer = CompletionAnswer(request, served.name, len(ids), tokenizer, prompt)
        return Work(served, ids, params, answer, bool(request.stream), stop_ids(tokenizer))

    @staticmethod
    def _understand_chat(request: ChatRequest, served: Served) -> Work:
        messages = request.conversation()
        _check_length(story_so_far(messages), served, "messages")
        ids = answer_prompt(messages, served.tokenizer)
        params = request.params(len(ids), served.context, served.tokenizer)
        answer = ChatAnswer(request, served.name, len(ids), served.tokenizer)
        return Work(served, ids, params, answer, bool(request.stream), stop_ids(served.tokenizer))


async def _apart(size: int, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Call it in a thread, unless it has so few bytes to do with that going there and back would take longer."""
    if size <= SMALL_BYTES:
        return function(*arguments, **named)
    return await asyncio.to_thread(function, *arguments, **named)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """The engine's refusals as answers."""
    try:
        yield
    except Busy:
        raise queue_full() from None
    except Closing:
        raise _closing() from None


def _closing() -> Refusal:
    return Refusal(503, SHUTTING_DOWN, code="closing", retry_after=10)


def _check_length(text: str, served: Served, param: str) -> None:
    """Refuse what is much too long before it is tokenized, which takes a second for a megabyte."""
    if (fewest := served.tokenizer.fewest_ids(text)) >= served.context:
        raise protocol.too_long(f"has at least {fewest} tokens", served.context, param)


def _checked_ids(ids: list[int], vocab_size: int) -> list[int]:
    wrong = next((id for id in ids if id >= vocab_size), None)
    if wrong is not None:
        raise Refusal(400, f"prompt has the id {wrong}; use token ids from 0 to {vocab_size - 1}", param="prompt")
    return ids


# ── answers ──


def whole_answer(items: Sequence[Token | End], answer: Answer) -> Response:
    """The answer when all choices have ended; nobody reads it when the client has left."""
    if not items:
        return Response(status_code=CLIENT_LEFT)
    choices = answer.request.choices
    tokens: list[list[Token]] = [[] for _ in range(choices)]
    reasons = [""] * choices
    for item in items:
        if isinstance(item, End):
            _check_end(item)
            reasons[item.index] = item.reason
            answer.count(item.tokens)
        else:
            tokens[item.row.index].append(item)
    body = answer.whole(list(zip(tokens, reasons, strict=True)))
    return Response(body, media_type="application/json")


def events(items: Sequence[Token | End], answer: Answer) -> bytes:
    """The events for what has gathered: one for each choice, with its text in one piece."""
    tokens: dict[int, list[Token]] = {}
    reasons: dict[int, str] = {}
    for item in items:
        if isinstance(item, End):
            _check_end(item)
            reasons[item.index] = item.reason
            answer.count(item.tokens)
            tokens.setdefault(item.index, [])
        else:
            tokens.setdefault(item.row.index, []).append(item)
    return b"".join([answer.event(index, some, reasons.get(index)) for index, some in tokens.items()])


def _check_end(end: End) -> None:
    if end.error == SHUTTING_DOWN:
        raise _closing()
    if end.reason == "error":
        raise Refusal(500, f"{end.error or 'the text could not be made'} ({protocol.new_id('req')})", code="engine")


class EventStream(Response):
    """Server-sent events as the tokens come, one write for what has gathered."""

    def __init__(self, job: Job, answer: Answer) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._job, self._answer = job, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with cancelled_when_gone(receive, self._job):
            if opening := self._answer.opening():
                await send({"type": "http.response.body", "body": opening, "more_body": True})
            last = self._answer.closing
            try:
                while items := await self._job.more():
                    if piece := events(items, self._answer):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
            except Refusal as refusal:
                last = refusal.event
        await send({"type": "http.response.body", "body": last()})


@contextlib.asynccontextmanager
async def cancelled_when_gone(receive: Receive, job: Job) -> AsyncIterator[None]:
    """Cancel the job when the client leaves, which only ``receive`` tells, and at the end in any case."""
    watch = asyncio.ensure_future(_gone(receive, job))
    try:
        yield
    finally:
        watch.cancel()
        job.cancel()


async def _gone(receive: Receive, job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()


# ── the page ──


def page_files() -> dict[str, Response]:
    """Every file of the page, read once."""
    folder = resources.files("smalllm.serve") / "page"
    if not folder.is_dir():
        return {}
    files = [file for file in folder.iterdir() if file.is_file() and Path(file.name).suffix in CONTENT_TYPES]
    return {file.name: Response(file.read_bytes(), media_type=CONTENT_TYPES[Path(file.name).suffix]) for file in files}


def _written(checkpoint: Path) -> int:
    try:
        return int((checkpoint / "manifest.json").stat().st_mtime)
    except OSError:
        return 0


# ── start and end ──


class Server(uvicorn.Server):
    """uvicorn with a drain: at the end new requests are refused, running ones finish or are ended with an error."""

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_seconds: float) -> None:
        super().__init__(config)
        self._engine, self._drain_seconds = engine, drain_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.start(asyncio.get_running_loop())
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """From this moment on new requests are refused; uvicorn itself looks around ten times a second."""
        self._engine.refuse()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """The socket stays open meanwhile, so that who comes is told."""
        self._engine.refuse()
        closing = asyncio.ensure_future(asyncio.to_thread(self._engine.close, self._drain_seconds))
        while not closing.done() and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


class Service:
    """Everything that serves one run. ``run`` blocks until SIGTERM, Ctrl-C or ``stop``.

    UserError when the run cannot be opened, the port is taken, or other machines would be let in without a key.
    """

    def __init__(self, settings: Settings, drain_seconds: float = DRAIN_SECONDS) -> None:
        self.settings, self.meters = settings, Meters()
        self.socket = listen(settings.host, settings.port)
        try:
            self.models = Models(settings.run, settings.slots + reserve(settings.slots), settings.device, log.info)
        except BaseException:
            self.socket.close()
            raise
        self.port = self.socket.getsockname()[1]
        self.engine = Engine(self.meters, settings.slots, settings.queue, settings.request_seconds)
        self.socket.limit, self.socket.meters, self.socket.busy = self._guests(), self.meters, self.engine.busy
        self.routes = Routes(self.engine, self.models, self.meters, page_files())
        config = uvicorn.Config(
            self._app(), http=guarded_protocol(settings.deadlines, self.socket), ws="none", lifespan="off", log_config=None,
            access_log=False, server_header=False, backlog=BACKLOG, timeout_keep_alive=settings.deadlines.idle,  # type: ignore[arg-type]
             timeout_graceful_shutdown=2,
        )  # fmt: skip
        self.server = Server(config, self.engine, drain_seconds)

    @property
    def url(self) -> str:
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        return f"http://{host}:{self.port}"

    def run(self) -> None:
        """Serve until the end; the process keeps its own signal handlers afterwards."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        self.models.follow()
        threading.Thread(target=self.routes.report.measure_floor, name="floor", daemon=True).start()
        try:
            self.server.run(sockets=[self.socket])
        finally:
            self.models.stop()
            self.engine.close()
            self.socket.close()
            sys.setswitchinterval(before)

    def stop(self) -> None:
        """As SIGTERM does; from any thread."""
        self.server.should_exit = True

    def _app(self) -> Guard:
        table = self.routes.table()
        app = Starlette(routes=table, exception_handlers={HTTPException: _refuse_http, Refusal: _refuse})
        app.router.redirect_slashes = (
            False  # a redirect would be to whatever the Host header says, and no error in our words
        )
        rules = Rules(Hosts(self.settings.host, self.port, self.settings.allow_hosts), self.settings.api_key)
        return Guard(app, rules, self.meters, [route.path for route in table])

    def _guests(self) -> int:
        """No more connections than there are file descriptors for."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return max(8, min(self.settings.deadlines.connections, files - FILES_SPARE))


def listen(host: str, port: int) -> Door:
    """A listening socket; UserError when the address cannot be had."""
    try:
        family = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0][0]
        plain = socket.create_server((host.strip("[]"), port), family=family, backlog=BACKLOG)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD_BYTES)
        return Door(plain.family, plain.type, plain.proto, plain.detach())
    except OSError as error:
        if isinstance(error, socket.gaierror):
            raise UserError(f"host = {host} is no address of this machine; use 127.0.0.1") from None
        raise UserError(
            f"port {port} of {host} cannot be had ({os.strerror(error.errno or 0)}); choose another with --port, or end what uses it"
        ) from None


async def _refuse(request: Request, refusal: Any) -> Response:
    return _Refused(refusal)


async def _refuse_http(request: Request, error: Any) -> Response:
    """What Starlette refuses itself: an unknown path, a wrong method."""
    messages = {404: "there is no such path", 405: f"{request.method[:20]} is not possible here"}
    return _Refused(Refusal(error.status_code, messages.get(error.status_code, "the request is wrong")))


class _Refused(Response):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(status_code=refusal.status)
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_refusal(self._refusal, send)
