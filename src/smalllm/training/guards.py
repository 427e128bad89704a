"""What stands between a bad step and the weights, and what is told when a run has to give up.

The guard against spikes knows two numbers a step; the report knows the model, its gradients and the batch.
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from smalllm.config import UserError
from smalllm.data.batches import Batches
from smalllm.model import GPT
from smalllm.ranks import local
from smalllm.terminal import plain
from smalllm.tokenizer import Tokenizer

WINDOW = 128
"""Steps that a spike is compared with; no step is one before half of them are known."""
ECHO_SECONDS = 1.0
"""Among ranks, Ctrl-C comes from the terminal and once more from torchrun: what comes so soon is no second one."""
ROWS, CHARACTERS = 8, 500
"""Of the batch that a failure report shows."""


class TrainingFailure(UserError):
    """Training cannot go on; the last checkpoint is good."""


class SpikeGuard:
    """Says which updates not to make: those whose loss or gradient norm lies more than ``sigmas`` standard deviations above
    the mean of the last 128 that were made (the rule of OLMo 2, arXiv 2501.00656, section 3.2, which counts the others too)."""

    def __init__(self, sigmas: float) -> None:
        self.sigmas = sigmas
        self.seen: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def is_spike(self, loss: float, norm: float) -> bool:
        """Whether a step of this loss and gradient norm stands out. Remembers it if not."""
        if self.sigmas and len(self.seen) >= WINDOW // 2:
            known = zip(*self.seen, strict=True)
            if any(value > self._limit(values) for value, values in zip((loss, norm), known, strict=True)):
                return True
        self.seen.append((loss, norm))
        return False

    def _limit(self, values: tuple[float, ...]) -> float:
        return statistics.fmean(values) + self.sigmas * statistics.pstdev(values)

    def to_json(self) -> list[tuple[float, float]]:
        return list(self.seen) if self.sigmas else []

    def restore(self, seen: Iterable[tuple[float, float]]) -> None:
        """Go on from ``to_json`` of an earlier session."""
        self.seen = deque(((loss, norm) for loss, norm in seen), maxlen=WINDOW)


@contextmanager
def signals(hear: Callable[[int], None], echo: bool = False) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP are told to ``hear``; the second one ends the program at once (KeyboardInterrupt). Those that
    are ignored, as SIGHUP under nohup, stay so. ``echo``: somebody repeats each signal."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    names = [name for name in names if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[float] = []

    def note(number: int, frame: Any) -> None:
        now = time.monotonic()
        if heard and echo and now - heard[0] < ECHO_SECONDS:
            return
        if heard:
            raise KeyboardInterrupt
        heard.append(now)
        hear(number)

    previous = {name: signal.signal(getattr(signal, name), note) for name in names}
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(getattr(signal, name), handler)


def gradient_norms(model: GPT) -> dict[str, float]:
    """The L2 norm of each parameter's gradient (of a sharded one: this rank's part), by name; those without one are left out."""
    named = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return {name: torch.linalg.vector_norm(local(grad).float()).item() for name, grad in named if grad is not None}


def failure_report(
    cause: str, facts: Mapping[str, Any], norms: Mapping[str, float], batches: Batches, step: int, tokenizer: Tokenizer
) -> str:
    """The page that a run leaves behind when it gives up: the cause with its fix, where it stood, the gradients by layer,
    and the text that it was reading. Markdown; the texts are foreign and stand in blocks of code."""
    lines = ["# Why this run stopped", "", plain(cause) + ".", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {plain(str(value)).replace('|', '/')} |" for name, value in facts.items()]
    lines += ["", "## Gradient norms", ""]
    if norms:
        lines += ["| parameter | norm | |", "|---|---|---|"]
        lines += [f"| `{name}` | {norm:.4g} | {_remark(norm, norms)} |" for name, norm in norms.items()]
    else:
        lines += ["There was no gradient yet."]
    lines += ["", f"## What it was reading (step {step + 1}, the first {ROWS} rows)", ""]
    for text in _texts(batches, step, tokenizer):
        lines += [*("    " + line for line in text.splitlines() or [""]), "", "---", ""]
    return "\n".join(lines) + "\n"


def _remark(norm: float, norms: Mapping[str, float]) -> str:
    if not math.isfinite(norm):
        return "not finite"
    return "largest" if norm == max((n for n in norms.values() if math.isfinite(n)), default=None) else ""


def _texts(batches: Batches, step: int, tokenizer: Tokenizer) -> list[str]:
    batch = next(batches.micro_batches(step, ROWS))
    return [plain(tokenizer.decode(row.tolist()))[:CHARACTERS] for row in batch.inputs]
