"""What a run knows besides its tensors, and what it says when it has ended."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from smalllm.training.schedule import Plan

UNPLANNED = 10**9
"""Steps of a run whose length is not known yet."""


@dataclass
class State:
    """The numbers of a run, besides its tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    plan: Plan = field(default_factory=lambda: Plan(UNPLANNED))
    window_loss: float = 0.0
    window_tokens: int = 0
    best_step: int | None = None
    best_bits_per_byte: float = math.inf
    evaluations_without_gain: int = 0
    evaluate_tokens: int = 0
    evaluation_due: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    spikes_in_a_row: int = 0
    rollbacks: int = 0
    passed_over: int = 0
    """Steps whose data a rollback left out: step s reads the batch of step s + passed_over."""
    spike_window: list[tuple[float, float]] = field(default_factory=list)
    timer: dict[str, Any] = field(default_factory=dict)
    evaluation_seconds: float = 0.0
    stopping: str = ""
    floors: list[dict[str, Any]] = field(default_factory=list)
    """n-gram models on the validation documents of this run: name, loss, bits_per_byte; and the best that was beaten."""
    beaten: str = ""
    alarm: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return values | {"best_bits_per_byte": None if math.isinf(self.best_bits_per_byte) else self.best_bits_per_byte}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> State:
        """The inverse of ``to_json``."""
        best = values["best_bits_per_byte"]
        return cls(
            **values | {"plan": Plan(**values["plan"]), "best_bits_per_byte": math.inf if best is None else best}
        )


@dataclass(frozen=True)
class Summary:
    """How a run ended: the keys of ``smalllm train --json``."""

    run: str
    step: int
    tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float
    train_loss: float | None
    valid_loss: float
    valid_bits_per_byte: float
    best_step: int | None
    stopped_because: str
    floor_bits_per_byte: float | None = None  # the exact entropy of the same documents, where the corpus has one
