"""Trials: promises, and cases that try to break them. A case is a function of its number, so that what failed can be
tried again, and runs in a process of its own, so that it may crash, hang or be killed.

The caller imports what its cases need and computes nothing before: children inherit the imports by fork (some 0.1 s for
a whole training run) and no threads. Knows nothing about models, disks and servers.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Case = Callable[[int, Path, Path], int | None]
"""``case(number, folder, given)`` tries to break the promise in an empty folder, and raises when it broke. ``given`` is what
``set_up`` made. Returns how many tries that was, if not one."""


@dataclass(frozen=True)
class Trial:
    """A promise and how to try it. ``short`` cases are for a commit or a user's disk, ``full`` ones for a night."""

    name: str
    promise: str
    case: Case
    short: int
    full: int
    set_up: Callable[[Path], None] | None = None
    together: int = 1
    """Cases in one process, one after the other: for cases that are over in a millisecond."""
    seconds: float = 120.0
    """What a process may take; longer is a hang, and a failure."""
    workers: int = 0
    """Processes at a time; 0: as many as asked for. 1 where a case measures time or takes ports."""


@dataclass(frozen=True)
class Failure:
    """A case in which the promise broke, and how."""

    case: int
    message: str


@dataclass
class Outcome:
    """How a trial went so far."""

    trial: Trial
    tries: int = 0
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class _Process:
    pid: int
    cases: Sequence[int]
    report: Path
    until: float


def some(trial: Trial, count: int) -> Sequence[int]:
    """So many cases of a trial: the first ones, which are of every kind, and as many drawn from all, always the same."""
    if count >= trial.full:
        return range(trial.full)
    first = range(count // 2)
    others = random.Random(trial.name).sample(range(len(first), trial.full), count - len(first))
    return [*first, *sorted(others)]


def run(trial: Trial, cases: Sequence[int], folder: Path, workers: int = 0) -> Outcome:
    """Try these cases, in parallel; what they leave in ``folder`` is removed, except for cases that failed."""
    outcome, began = Outcome(trial), time.monotonic()
    given, reports = folder / "given", folder / "reports"
    given.mkdir(parents=True)
    reports.mkdir()
    if trial.set_up is not None:
        set_up = trial.set_up
        _watch(outcome, [[-1]], 1, 600.0, reports, lambda number: set_up(given))
        if outcome.failures:
            return outcome
        outcome.tries = 0
    groups = [cases[start : start + trial.together] for start in range(0, len(cases), trial.together)]
    most = trial.workers or workers or os.cpu_count() or 1
    _watch(outcome, groups, most, trial.seconds, reports, lambda number: _try(trial, number, folder, given))
    outcome.seconds = time.monotonic() - began
    shutil.rmtree(given, ignore_errors=True)
    shutil.rmtree(reports, ignore_errors=True)
    return outcome


def _try(trial: Trial, number: int, folder: Path, given: Path) -> int | None:
    own = folder / f"case-{number}"
    own.mkdir()
    tries = trial.case(number, own, given)
    shutil.rmtree(own, ignore_errors=True)
    return tries


def _watch(
    outcome: Outcome, groups: Sequence[Sequence[int]], workers: int, seconds: float, reports: Path,
    attempt: Callable[[int], int | None],
) -> None:  # fmt: skip
    """Start a process for each group, so many at a time; end those that take too long; gather what they say."""
    waiting = list(reversed(groups))
    running: list[_Process] = []
    with _ended(running):
        _work_off(outcome, waiting, running, workers, seconds, reports, attempt)


@contextmanager
def _ended(running: list[_Process]) -> Iterator[None]:
    """However this ends, by Ctrl-C or SIGTERM too, no process of a case goes on."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in running:
            _end_group(process.pid)


def _work_off(
    outcome: Outcome, waiting: list[Sequence[int]], running: list[_Process], workers: int, seconds: float, reports: Path,
    attempt: Callable[[int], int | None],
) -> None:  # fmt: skip
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(_start(waiting.pop(), seconds, reports, attempt))
        for process in list(running):
            done, status = os.waitpid(process.pid, os.WNOHANG)
            late = not done and time.monotonic() > process.until
            if not done and not late:
                continue
            _end_group(process.pid)
            if late:
                os.waitpid(process.pid, 0)
            running.remove(process)
            _gather(outcome, process, f"no end after {seconds:g} s" if late else _cause(status))
        time.sleep(0.002)


def _start(cases: Sequence[int], seconds: float, reports: Path, attempt: Callable[[int], int | None]) -> _Process:
    report = reports / f"{cases[0]}.jsonl"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return _Process(pid, cases, report, time.monotonic() + seconds)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setpgid(0, 0)  # what a case starts ends with it
        with open(report, "a", encoding="utf-8", buffering=1) as file:
            _silence(report.with_suffix(".log"))
            for number in cases:
                file.write(json.dumps(_said(number, attempt)) + "\n")
        os._exit(0)
    finally:
        os._exit(1)


def _said(number: int, attempt: Callable[[int], int | None]) -> dict[str, object]:
    try:
        tries = attempt(number)
        return {"case": number, "tries": 1 if tries is None else tries}
    except BaseException:  # whatever it is, it is the case that broke
        return {"case": number, "tries": 1, "error": traceback.format_exc(limit=-12)}


def _silence(log: Path) -> None:
    """What a case prints goes into a file."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)


def _end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _cause(status: int) -> str:
    return f"ended by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else ""


def _gather(outcome: Outcome, process: _Process, cause: str) -> None:
    """Count what a process reported; the case at which it ended otherwise than by itself has failed."""
    reported = list(_records(process.report))
    for record in reported:
        outcome.tries += record["tries"]
        if "error" in record:
            outcome.failures.append(Failure(record["case"], record["error"]))
    if len(reported) < len(process.cases):
        log = process.report.with_suffix(".log")
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.exists() else ""
        outcome.tries += 1
        outcome.failures.append(Failure(process.cases[len(reported)], f"{cause or 'the process ended'}\n{tail}"))


def _records(report: Path) -> Iterator[dict[str, Any]]:
    if report.exists():
        yield from map(json.loads, report.read_text(encoding="utf-8").splitlines())
