"""The learning rate as a pure function of the step, and the plan that says how far a run has come.

Knows nothing about optimizers: it returns fractions of the peak learning rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from smalllm.config import OptimConfig


@dataclass(frozen=True)
class Plan:
    """Progress of a run as a function of the step: a straight line from (anchor_step, anchor_progress) to (steps, 1).

    A run with a fixed number of steps has one plan. A run with a time budget is planned anew as its speed becomes known:
    the line gets a new slope from where it stands, so that progress, and the learning rate, never jump.
    """

    steps: int
    anchor_step: int = 0
    anchor_progress: float = 0.0

    def progress(self, step: int) -> float:
        """Share of the run done after ``step`` steps, in [0, 1].

        >>> Plan(steps=200).progress(50)
        0.25
        >>> Plan(steps=200).replanned(50, steps=100).progress(75)
        0.625
        """
        if step >= self.steps:
            return 1.0
        share = (step - self.anchor_step) / (self.steps - self.anchor_step)
        return self.anchor_progress + (1.0 - self.anchor_progress) * share

    def replanned(self, step: int, steps: int) -> Plan:
        """The same run, to end after ``steps`` steps instead, known at ``step``."""
        return Plan(max(steps, step + 1), step, self.progress(step))

    def hurried(self, step: int, progress: float, steps_left: int) -> Plan:
        """Jump ahead to ``progress`` (the beginning of a cooldown), with ``steps_left`` steps to the end."""
        return Plan(step + steps_left, step, progress)


def lr_fraction(optim: OptimConfig, step: int, progress: float) -> float:
    """Share of the peak learning rate for the update that follows ``step`` finished ones.

    Warmup is linear over ``warmup_steps`` and its first update is not lost to zero: (step + 1) / warmup_steps. After it,
    cosine falls from 1 to the final fraction over the rest of the run (Loshchilov & Hutter, arXiv 1608.03983; the amplitude
    is scaled, so the floor is reached smoothly at the end); wsd stays at 1 and falls in a straight line over the last
    ``cooldown`` share (Hu et al., arXiv 2404.06395); constant stays at 1. In a run shorter than its warmup only warmup is seen.
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    return decay(optim, step, progress)


def decay(optim: OptimConfig, step: int, progress: float) -> float:
    """What comes after warmup: a share of the peak."""
    match optim.schedule:
        case "constant":
            return 1.0
        case "wsd":
            left = min(1.0, (1.0 - progress) / optim.cooldown)
            return optim.final_fraction + (1.0 - optim.final_fraction) * left
        case "cosine":
            after_warmup = _after_warmup(optim, step, progress)
            return optim.final_fraction + (1.0 - optim.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * after_warmup))


def _after_warmup(optim: OptimConfig, step: int, progress: float) -> float:
    """Share of the run after warmup that is done: 0 when warmup ends, 1 at the end. With s steps done at progress p of a
    run of s / p steps, that is (s - warmup) / (s / p - warmup)."""
    if progress <= 0.0 or step <= optim.warmup_steps:
        return 0.0
    return min(1.0, (step - optim.warmup_steps) / (step / progress - optim.warmup_steps))
