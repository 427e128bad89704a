"""A processor or memory that errs raises nothing; it is noticed by looking twice.

Bits flip in memory, and some cores compute wrongly now and then (Hochschild et al., "Cores that don't count", HotOS 2021;
Dixit et al., "Silent data corruptions at scale", arXiv 2102.11245). A step of ours is a function of its bits, so that any
difference between two tries of it is such an error. Between two updates weights and optimizer state rest, and any difference
there is one as well. Costs nothing while it is off; knows nothing of data and losses.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from smalllm.model import GPT
from smalllm.ranks import ALONE, Ranks, local
from smalllm.training.guards import TrainingFailure
from smalllm.training.optimizer import Optimizer

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element."""

Sums = dict[str, Tensor]
"""By name, on the device."""


class Verifier:
    """``every`` so many steps the gradient is computed twice, and at every step weights and optimizer state are compared with
    what the update before left; 0: never."""

    def __init__(self, every: int, model: GPT, optimizer: Optimizer, ranks: Ranks = ALONE) -> None:
        self.every, self.model, self.optimizer, self.ranks = every, model, optimizer, ranks
        self._sealed: Sums | None = None

    def due(self, step: int) -> bool:
        """Whether the gradient of this step, counted from 1, is computed twice."""
        return bool(self.every) and step % self.every == 0

    def gradient(self) -> Sums:
        """Of each parameter's gradient the sum of its bits, read as integers: one flipped bit always changes it."""
        named = self.model.named_parameters()
        return {name: checksum(parameter.grad) for name, parameter in named if parameter.grad is not None}

    def seal(self) -> None:
        """Remember weights and optimizer state as they are: nothing but an update may change them now."""
        self._sealed = dict(self._resting()) if self.every else None

    def check_gradient(self, first: Sums, step: int) -> None:
        """TrainingFailure when the gradient is not what ``gradient`` said of the first one."""
        self._refuse("the gradient, computed twice, differs in", differing(first, self.gradient()), step)

    def check_resting(self, step: int) -> None:
        """TrainingFailure when weights or optimizer state are not as the last update left them."""
        if self.every:
            changed = differing(self._sealed, dict(self._resting())) if self._sealed is not None else []
            self._refuse("since the last update something else has changed", changed, step)

    def _refuse(self, what: str, names: list[str], step: int) -> None:
        """End all ranks when one has found something."""
        if int(self.ranks.most(len(names))[0]):
            found = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names) or "another rank"
            raise TrainingFailure(
                f"step {step}: {what} {found}: the processor or its memory errs, or something on this device does not compute"
                " the same twice (train.verify_every). The same command goes on from the last checkpoint; if it comes again,"
                " test the memory, undo overclocking, or train elsewhere"
            )

    def _resting(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, checksum(parameter)
            for part in self.optimizer.parts:
                for slot, value in part.state.get(parameter, {}).items():
                    yield f"{name}.{slot}", checksum(value)


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Sum of the elements' bits, read as integers, modulo 2^64; on the tensor's device. Of a sharded tensor: of its part here."""
    part = local(tensor).detach()
    return part.contiguous().view(INTEGERS[part.element_size()]).sum(dtype=torch.int64)


def differing(before: Sums, after: Sums) -> list[str]:
    """Names whose sums differ, or that only one has."""
    return [
        name
        for name in sorted(before.keys() | after.keys())
        if name not in before or name not in after or bool(before[name] != after[name])
    ]
