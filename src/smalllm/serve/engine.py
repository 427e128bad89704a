"""One thread makes all texts: requests wait in a bounded queue, share the slots of the batches fairly, and can be left.

The event loop submits a job and takes tokens from it; the thread steps the batches. What a step made is handed to the
loop in one go, at once when it was idle and then every few milliseconds: more tokens at a time, not more wake-ups. Nothing that goes wrong in one row, or in one step, ends the thread. The module knows nothing of HTTP.

**Fairness.** Waiting rows start in turns, one of each client. A client may fill all slots when nobody else waits; a
few more, which only a client without any running row may take, keep a newcomer from waiting for another's long texts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from smalllm.generation import Row, SamplingParams, Token
from smalllm.serve.meters import Meters
from smalllm.serve.models import Served

QUEUE = 64
DEADLINE_SECONDS = 600.0
UNHEALTHY_FAILURES, FAILURE_SECONDS = 3, 60.0
CHECK_SECONDS = 0.1
GATHER_SECONDS = 0.005  # between two pieces of a stream: nobody sees it, and a write costs as much as several tokens
SHUTTING_DOWN = "the server is shutting down"
log = logging.getLogger("smalllm.serve")


class Busy(Exception):
    """The queue is full; try again a little later."""


class Closing(Exception):
    """The engine takes no more work."""


@dataclass(frozen=True)
class End:
    """A choice has ended, with so many tokens; ``error`` is a sentence when ``reason`` is "error"."""

    index: int
    reason: str
    tokens: int
    error: str = ""


class Job:
    """A request in the engine. Made by ``Engine.submit``; its methods are for the event loop alone."""

    def __init__(self, engine: Engine, client: str, served: Served, rows: Sequence[Row], stream: bool) -> None:
        self.client, self.served = client, served
        self.began = time.monotonic()
        self.waiting = deque(rows)  # rows without a slot; the engine's, under its lock
        self.open = len(rows)  # choices whose end the engine has not seen; the engine's
        self.told = False  # whether its first token has been made; the engine's
        self._engine, self._stream = engine, stream
        self._gathered: list[Token | End] = []
        self._expected = len(rows)  # choices whose end the loop has not seen
        self._waiter: asyncio.Future[None] | None = None

    async def more(self) -> list[Token | End]:
        """What has come since the last call, waiting for something; when not streaming, for everything. Empty at the
        end, and after ``cancel``."""
        if self._expected and not (self._stream and self._gathered):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        taken, self._gathered = self._gathered, []
        return taken

    def cancel(self) -> None:
        """Leave: the slots are free within a step. Nothing happens at the second time, and after the end."""
        if self._expected:
            self._expected = 0
            self._gathered.clear()
            self._awake()
            self._engine.leave(self)

    def take(self, item: Token | End) -> None:
        """The engine hands something over, in the event loop."""
        if not self._expected:
            return
        self._gathered.append(item)
        if isinstance(item, End):
            self._expected -= 1
        if self._stream or not self._expected:
            self._awake()

    def _awake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Engine:
    """``slots`` rows at once, ``reserve(slots)`` more for newcomers, and ``queue`` requests that wait."""

    def __init__(
        self, meters: Meters, slots: int = 16, queue: int = QUEUE, deadline_seconds: float = DEADLINE_SECONDS
    ) -> None:
        self.meters, self.slots, self.queue = meters, slots, queue
        self._total, self._deadline = slots + reserve(slots), deadline_seconds
        self._lock = threading.RLock()
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # by client, in turns; under the lock
        self._coming = 0  # places kept; under the lock
        self._left: deque[Job] = deque()
        self._outbox: deque[tuple[Job, Token | End]] = deque()
        self._flushing = False
        self._running: dict[Row, Job] = {}  # what follows is the thread's
        self._held: Counter[str] = Counter()  # slots by client
        self._active: dict[Served, int] = {}  # running rows by batch
        self._failures: deque[float] = deque(maxlen=UNHEALTHY_FAILURES)
        self._checked = 0.0
        self._wake, self._idle, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ── for the event loop ──

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def submit(
        self, client: str, served: Served, ids: Sequence[int], params: SamplingParams, *,
        choices: int = 1, stop_ids: Iterable[int] = (), stream: bool = False,
    ) -> Job:  # fmt: skip
        """Continue a prompt ``choices`` times. Busy when the queue is full, Closing at the end."""
        rows = [Row(ids, params, served.tokenizer, index, stop_ids) for index in range(choices)]
        job = Job(self, client, served, rows, stream)
        with self._lock:
            if self._closing or not self._thread.is_alive():
                raise Closing
            if self._queued() >= self._room(client):
                raise Busy
            served.users += 1
            self._waiting.setdefault(client, deque()).append(job)
            self._idle.clear()
        self._wake.set()
        return job

    @contextlib.contextmanager
    def place(self, client: str) -> Iterator[None]:
        """A place in the queue, kept while a request is read that will be submitted. Busy, Closing."""
        with self._lock:
            self.check_room(client)
            self._coming += 1
        try:
            yield
        finally:
            with self._lock:
                self._coming -= 1

    def check_room(self, client: str) -> None:
        """Busy or Closing, where ``place`` would raise it now."""
        if self._closing or not self._thread.is_alive():
            raise Closing
        if self.busy(client):
            raise Busy

    def busy(self, client: str) -> bool:
        """Whether the queue is full for this client."""
        with self._lock:
            return self._queued() + self._coming >= self._room(client)

    def leave(self, job: Job) -> None:
        """The client of a job has gone."""
        self._left.append(job)
        self._wake.set()

    def gauges(self) -> dict[str, float]:
        """Figures of now, for Prometheus."""
        with self._lock:
            return {"active_slots": len(self._running), "slots": self.slots, "queue_length": self._queued()}

    def healthy(self) -> bool:
        """False while closing, and when the last steps failed: three within a minute."""
        recent = [at for at in self._failures if time.monotonic() - at < FAILURE_SECONDS]
        return self._thread.is_alive() and not self._closing and len(recent) < UNHEALTHY_FAILURES

    # ── for any thread ──

    def refuse(self) -> None:
        """Take no more work."""
        self._closing = True

    def close(self, seconds: float = 0.0) -> None:
        """Let what is running or waiting finish for so long, end the rest with an error, and stop the thread."""
        self.refuse()
        if self._thread.is_alive():
            self._idle.wait(seconds)
            self._stop.set()
            self._wake.set()
            self._thread.join(10.0)

    def _room(self, client: str) -> int:
        """How long the queue may be for this client to join: a client that waits for nothing yet is let in where others,
        who fill the queue, are not."""
        free = max(0, self.slots - len(self._running))
        return free + (self.queue if client in self._waiting else 2 * self.queue)

    def _queued(self) -> int:
        return sum(map(len, self._waiting.values()))

    # ── the thread ──

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._turn()
        finally:
            self._end_everything(SHUTTING_DOWN)

    def _turn(self) -> None:
        """Let go, let in, one step of every batch, hand over; or wait for something to do."""
        try:
            self._let_go()
            self._let_in()
            for served in list(self._active):
                self._step(served)
            self._hand_over()
        except Exception:  # a mistake of this module: no request may end the thread
            log.exception("the engine failed")
            self._failures.append(time.monotonic())
            self._end_everything("the engine failed")
        if not self._active:
            self._rest()

    def _rest(self) -> None:
        with self._lock:
            if not self._waiting:
                self._idle.set()
        self._wake.wait(CHECK_SECONDS)
        self._wake.clear()

    # rows come and go

    def _let_in(self) -> None:
        """Give free slots to waiting rows, clients in turns."""
        with self._lock:
            passed = 0
            while passed < len(self._waiting):
                client = next(iter(self._waiting))
                self._waiting.move_to_end(client)
                if not self._may_start(client):
                    passed += 1
                    continue
                passed = 0
                jobs = self._waiting[client]
                job, row = jobs[0], jobs[0].waiting.popleft()
                if not job.waiting:
                    jobs.popleft()
                if not jobs:
                    del self._waiting[client]
                self._begin(job, row)

    def _may_start(self, client: str) -> bool:
        taken = len(self._running)
        return taken < self.slots or (taken < self._total and not self._held[client])

    def _begin(self, job: Job, row: Row) -> None:
        self._running[row] = job
        self._held[job.client] += 1
        self._active[job.served] = self._active.get(job.served, 0) + 1
        try:
            job.served.batch.add(row)
        except Exception as error:  # of this row alone
            log.warning("a row could not begin: %s", type(error).__name__)
            self._end(row, "error", "the text could not be begun")

    def _let_go(self) -> None:
        """Free the slots of those who have left; now and then, end what has taken too long."""
        while self._left:
            self._drop(self._left.popleft(), None)
        if (now := time.monotonic()) - self._checked > CHECK_SECONDS:
            self._checked = now
            with self._lock:
                jobs = {*self._running.values(), *(job for jobs in self._waiting.values() for job in jobs)}
            for job in jobs:
                if now - job.began > self._deadline:
                    self._drop(job, f"the answer took longer than {self._deadline:g} s")

    def _drop(self, job: Job, error: str | None) -> None:
        """End all rows of a job, running or waiting; ``error`` is None when nobody listens any more."""
        with self._lock:
            jobs = self._waiting.get(job.client)
            if jobs is not None and job in jobs:
                jobs.remove(job)
                if not jobs:
                    del self._waiting[job.client]
            waiting = list(job.waiting)
            job.waiting.clear()
        for row in [row for row, owner in self._running.items() if owner is job]:
            job.served.batch.remove(row)
            self._end(row, "error", error or "")
        for row in waiting:
            self._tell_end(job, row, "error", error or "")

    def _end(self, row: Row, reason: str, error: str = "") -> None:
        """A running row has left its batch."""
        job = self._running.pop(row)
        self._held[job.client] -= 1
        if not self._held[job.client]:
            del self._held[job.client]
        self._active[job.served] -= 1
        if not self._active[job.served]:
            del self._active[job.served]
        self._tell_end(job, row, reason, error)

    def _tell_end(self, job: Job, row: Row, reason: str, error: str) -> None:
        job.open -= 1
        if not job.open:
            with self._lock:
                job.served.users -= 1
        self._outbox.append((job, End(row.index, reason, len(row.ids) - row.prompt_length, error)))

    def _end_everything(self, error: str) -> None:
        with self._lock:
            jobs = {*self._running.values(), *(job for jobs in self._waiting.values() for job in jobs)}
        for job in jobs:
            try:
                self._drop(job, error)
            except Exception:
                log.exception("a job could not be ended")
        self._hand_over()

    # tokens

    def _step(self, served: Served) -> None:
        try:
            tokens = served.batch.step()
        except Exception:  # whatever a step raises, MemoryError too, ends its rows and nothing else
            log.exception("a step of %s failed", served.name)
            self._fail(served)
            return
        self.meters.tokens += len(tokens)
        self.meters.rate.add(len(tokens))
        outbox, running = self._outbox, self._running
        for token in tokens:
            row = token.row
            job = running[row]
            outbox.append((job, token))
            if not job.told:
                job.told = True
                self.meters.first_token.observe(time.monotonic() - job.began)
            if row.finish_reason is not None:
                self._end(row, row.finish_reason, row.error)

    def _fail(self, served: Served) -> None:
        """End the rows of a batch whose step raised, and begin another batch."""
        self.meters.failures += 1
        self._failures.append(time.monotonic())
        served.batch = served.new_batch()
        for row in [row for row, job in self._running.items() if job.served is served]:
            self._end(row, "error", "the model failed")

    def _hand_over(self) -> None:
        """Wake the loop, unless it has been woken and has not come round yet."""
        if self._outbox and not self._flushing:
            self._flushing = True
            try:
                self._loop.call_soon_threadsafe(self._flush)
            except RuntimeError:  # the loop has ended, and with it all who listened
                self._outbox.clear()

    def _flush(self) -> None:
        """In the event loop: everything that has gathered, to those who wait for it; then again a little later, until
        nothing comes any more."""
        if not self._outbox:
            self._flushing = False
            if self._outbox:  # came between the two lines
                self._hand_over()
            return
        while self._outbox:
            job, item = self._outbox.popleft()
            job.take(item)
        self._loop.call_later(GATHER_SECONDS, self._flush)


def reserve(slots: int) -> int:
    """Slots beyond ``slots`` for clients that have none."""
    return max(1, slots // 8)
