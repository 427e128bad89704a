"""What a page may ask about the run that is served: its state, its curve, its samples. Reads the files of the run while
a trainer writes them; every figure is one that the trainer wrote."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from smalllm.config import UserError
from smalllm.conversation import has_turns
from smalllm.evaluation import run_floor
from smalllm.serve.models import Models

MAX_ROWS, MAX_SAMPLES, SAMPLES_BYTES = 2000, 50, 1 << 20
FLOOR_DOCUMENTS = 200


class RunReport:
    """Answers of GET /run, /run/metrics and /run/samples. May be asked from several threads."""

    def __init__(self, models: Models) -> None:
        self._models, self._folder = models, models.folder
        self._metrics = MetricsTail(self._folder.metrics_file)
        self._floor: float | None = None

    def measure_floor(self) -> None:
        """Find the exact entropy of the run's validation documents, where the corpus has one; a second or two."""
        self._floor = run_floor(self._models.current.run, limit=FLOOR_DOCUMENTS)

    def state(self) -> dict[str, Any]:
        """The run and its newest checkpoint. ``total_steps`` is the plan at that checkpoint, null when not known."""
        run = self._models.current.run
        training = self._checkpoint_state().get("training", {})
        train = self._folder.config().train
        return {
            "name": self._models.name, "step": run.step, "steps": self._models.steps(),
            "training": self._folder.is_locked(),
            "context": run.model.config.context, "vocab_size": run.model.config.vocab_size,
            "parameters": run.model.parameters_count(), "has_turns": has_turns(run.tokenizer),
            "floor_bits_per_byte": self._floor, "floors": training.get("floors", []), "minutes": train.minutes,
            "total_steps": training.get("plan", {}).get("steps") or train.steps or None,
        }  # fmt: skip

    def _checkpoint_state(self) -> dict[str, Any]:
        try:
            return self._models.current.run.checkpoint.state()
        except UserError:  # pruned meanwhile
            return {}

    def metrics(self, after: int) -> bytes:
        """The records after a step, at most 2000; those of evaluations are all there."""
        return _rows(thinned(self._metrics.after(after), MAX_ROWS))

    def samples(self) -> bytes:
        """The last 50 samples."""
        try:
            with open(self._folder.samples_file, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - SAMPLES_BYTES))
                lines = file.read().split(b"\n")
        except OSError:
            return _rows([])
        return _rows([line for line in lines if _parsed(line) is not None][-MAX_SAMPLES:])


class MetricsTail:
    """The lines of a metrics file that grows; each is read once. A file that was replaced or cut is read anew."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._forget()

    def after(self, step: int) -> list[tuple[bool, bytes]]:
        """Of the records after a step, whether each has an evaluation, and its line."""
        with self._lock:
            self._read()
            return [(evaluated, line) for at, evaluated, line in self._rows if at > step]

    def _forget(self) -> None:
        self._rows: list[tuple[int, bool, bytes]] = []
        self._offset, self._file = 0, 0

    def _read(self) -> None:
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._file or status.st_size < self._offset:
                    self._forget()
                    self._file = status.st_ino
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")  # a last line without its end comes next time
        except OSError:
            self._forget()
            return
        self._offset += len(whole) + len(newline)
        for line in whole.split(b"\n"):
            record = _parsed(line)
            if record is not None and isinstance(record.get("step"), int):
                self._rows.append((record["step"], "valid_loss" in record, line))


def thinned(rows: list[tuple[bool, bytes]], limit: int) -> list[bytes]:
    """At most ``limit`` lines, evenly chosen; lines with an evaluation and the last one always.

    >>> thinned([(False, b"1"), (True, b"2"), (False, b"3"), (False, b"4")], 3)
    [b'2', b'4']
    """
    plain = sum(not evaluated for evaluated, _ in rows)
    stride = -(-plain // max(1, limit - (len(rows) - plain) - 1)) if len(rows) > limit else 1
    chosen, seen = [], 0
    for place, (evaluated, line) in enumerate(rows):
        seen += not evaluated
        if evaluated or place == len(rows) - 1 or seen % stride == 0:
            chosen.append(line)
    return chosen


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object in a line; None for a torn one."""
    try:
        record = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _rows(lines: list[bytes]) -> bytes:
    return b'{"rows":[' + b",".join(lines) + b"]}"
