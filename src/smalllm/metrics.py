"""What a run reports: metrics.jsonl, throughput and MFU, optional sinks. The only module that knows TensorBoard and W&B.

It prints nothing: a face (commands/train.py) hands the trainer a ``Display`` and decides how things look.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from smalllm.config import UserError
from smalllm.files import FileSystem

Record = dict[str, Any]


class Display(Protocol):
    """How the trainer speaks to whoever watches."""

    def progress(self, record: Record) -> None:
        """A logged step: the object of metrics.jsonl plus ``progress`` in [0, 1] and ``eta_seconds``."""

    def story(self, step: int, prompt: str, text: str) -> None:
        """A sample at an evaluation."""

    def note(self, message: str) -> None:
        """One line that a person should read."""


class Silence:
    """The display of library calls."""

    def progress(self, record: Record) -> None: ...
    def story(self, step: int, prompt: str, text: str) -> None: ...
    def note(self, message: str) -> None: ...


class MetricsLog:
    """Appends one JSON object per logged step; ``rewind`` drops what a crash left beyond the resumed step."""

    def __init__(self, path: Path, files: FileSystem | None = None) -> None:
        self.path, self.files = path, files or FileSystem()
        self.unwritten = b""

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record. On an error (a full disk) it is kept and written with the next one: no step is missing later."""
        self.unwritten += (json.dumps(json_safe(record), allow_nan=False) + "\n").encode()
        self.flush()

    def flush(self) -> None:
        """Write what an error kept back."""
        if self.unwritten:
            self.files.append(self.path, self.unwritten)
            self.unwritten = b""

    def sync(self) -> None:
        """What was appended survives a power cut when this returns."""
        self.files.sync_file(self.path)

    def rewind(self, step: int) -> None:
        """Keep the records up to and including ``step``, each once; a torn last line goes as well."""
        if not self.path.exists():
            return
        kept = {record["step"]: record for record in read_records(self.path) if record["step"] <= step}
        self.files.replace(self.path, [(json.dumps(kept[number]) + "\n").encode() for number in sorted(kept)])


def read_records(path: Path) -> Iterator[Record]:
    """The objects of a JSONL file that have a step; lines that do not parse (torn by a crash) are passed over."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def json_safe(record: Mapping[str, Any]) -> Record:
    """JSON has no NaN and no infinity; both become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


def model_flops_utilization(tokens_per_second: float, flops_per_token: int, peak_flops: float) -> float:
    """MFU: useful floating-point work over the measured peak (PaLM, arXiv 2204.02311).

    >>> model_flops_utilization(100.0, 6_000_000, 1.2e9)
    0.5
    """
    return tokens_per_second * flops_per_token / peak_flops


class Throughput:
    """Seconds and tokens of the steps of this session. The first step (compilation, cold caches) is not typical and does
    not count, unless there is no other."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.steps = 0
        self.step_seconds: deque[tuple[float, int]] = deque(maxlen=64)
        self.window: list[tuple[float, int]] = []
        self.planned = -math.inf
        self.fresh = True
        self.waited = 0.0

    def to_json(self) -> dict[str, Any]:
        """What a resumed session needs in order to plan as this one would have gone on planning."""
        since = None if math.isinf(self.planned) else self.clock() - self.planned
        return {"steps": self.steps, "recent": list(self.step_seconds), "since_plan": since}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from ``to_json`` of an earlier session."""
        self.steps = saved["steps"]
        self.step_seconds.extend((seconds, tokens) for seconds, tokens in saved["recent"])
        self.planned = -math.inf if saved["since_plan"] is None else self.clock() - saved["since_plan"]

    def add(self, seconds: float, tokens: int) -> None:
        """A step took so long and trained on so many tokens."""
        self.steps += 1
        if self.fresh and self.steps > 1:  # the first of a session that was resumed: not slower than those before
            seconds = min(seconds, self.seconds_per_step())
        self.fresh = False
        if self.steps == 2:
            self.step_seconds.clear()
            self.window.clear()
        self.step_seconds.append((seconds, tokens))
        self.window.append((seconds, tokens))

    def share(self, waited: float) -> float:
        """Of the time since the window began, what was spent waiting; ``waited`` is seconds since the beginning."""
        since, self.waited = waited - self.waited, waited
        return since / max(1e-9, sum(seconds for seconds, _ in self.window)) if self.window else 0.0

    def start_window(self) -> None:
        self.window.clear()

    def tokens_per_second(self) -> float:
        """Of the steps since the window began, evaluations and saving not counted; of the last 64 when it has none."""
        steps = self.window or self.step_seconds
        seconds = sum(seconds for seconds, _ in steps)
        return sum(tokens for _, tokens in steps) / seconds if seconds > 0 else 0.0

    def seconds_per_step(self) -> float:
        """Mean of the last 64 steps."""
        return sum(seconds for seconds, _ in self.step_seconds) / max(1, len(self.step_seconds))

    def seconds_per_token(self) -> float:
        return sum(seconds for seconds, _ in self.step_seconds) / max(1, sum(tokens for _, tokens in self.step_seconds))

    def due_to_plan(self, budget: float) -> bool:
        """After the third step, then every fortieth of the budget in seconds."""
        if self.steps < 3 or self.clock() - self.planned < budget / 40:
            return False
        self.planned = self.clock()
        return True


class Sinks:
    """Optional trackers. Loaded only when asked for; one that fails is dropped with one line and never stops training."""

    def __init__(
        self, kind: str, folder: Path, name: str, settings: Mapping[str, Any], note: Callable[[str], None]
    ) -> None:
        self.note = note
        self.writers: list[tuple[str, Callable[[Record], None]]] = []
        if kind == "tensorboard":
            self._add("tensorboard", lambda: _tensorboard(folder))
        elif kind == "wandb":
            self._add("wandb", lambda: _wandb(folder, name, settings))

    def _add(self, kind: str, open_writer: Callable[[], Callable[[Record], None]]) -> None:
        try:
            self.writers.append((kind, open_writer()))
        except ImportError:
            raise UserError(
                f"train.track = {kind} needs a package that is not installed; run: uv sync --extra track"
            ) from None
        except Exception as error:  # a tracker may raise anything; training goes on without it
            self.note(f"{kind} is off: {error}")

    def write(self, record: Record) -> None:
        """Hand a record to every tracker that still works."""
        for kind, writer in list(self.writers):
            try:
                writer(record)
            except Exception as error:
                self.note(f"{kind} failed and is off from now on: {error}")
                self.writers.remove((kind, writer))


def _tensorboard(folder: Path) -> Callable[[Record], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(record: Record) -> None:
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                writer.add_scalar(key, value, record["step"])
        writer.flush()

    return write


def _wandb(folder: Path, name: str, settings: Mapping[str, Any]) -> Callable[[Record], None]:
    import wandb  # type: ignore[import-not-found,unused-ignore]

    run = wandb.init(project="smalllm", name=name, dir=str(folder), config=dict(settings), resume="allow")
    return lambda record: run.log({key: value for key, value in record.items() if key != "step"}, step=record["step"])
