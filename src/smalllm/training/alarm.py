"""Whether a run learns as a healthy one does, asked after steps 8, 16, 32 and so on: it looks and changes nothing.

Three signs, each said once, in a sentence with likely causes:

1. The gradient starves: a tenth of the entries of the blocks' matrices, or more, have a gradient of exactly zero. In a healthy run
   none has once the projections have left zero; in fp16 without loss scaling most have.
2. The loss is not below that of a unigram: after a twentieth of the run, not even how frequent tokens are has been learned.
3. The loss stands above that of a bigram: after a twentieth of the run it has fallen by less than 3 % since half as many
   steps. What needs more than the last token, attention and the blocks, is not learned.

Signs 2 and 3 wait for as many updates as 32 at the full learning rate make, so that no warmup and no short run rings. Between a
twentieth and a tenth of any run lies one of the steps asked at. It knows numbers and n-gram floors, nothing of data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from smalllm.model import GPT
from smalllm.ngrams import Floor
from smalllm.ranks import local

FIRST_STEP = 8
STARVED = 0.1
STALLED = 0.97
SHARE = 0.05
"""Of the run, before which the loss may be anything."""
FULL_STEPS = 32.0
"""Updates at the full learning rate, before which the loss may be anything; 2 of them before the gradient may not be zero."""


@dataclass
class Heard:
    """What the alarm remembers, also across a resume."""

    full_steps: float = 0.0
    loss: float = 0.0
    steps: int = 0
    before: float | None = None
    rung: list[str] = field(default_factory=list)


class Alarm:
    """Is told every step, and answers with the sentences to say, mostly none."""

    def __init__(self, floors: Sequence[Floor], precision: str, lr: float) -> None:
        self._floors = {floor.name: floor for floor in floors}
        self._precision, self._lr = precision, lr
        self._heard = Heard()

    def hear(self, step: int, loss: float, lr_share: float, progress: float, zeros: Callable[[], float]) -> list[str]:
        """After finished step ``step`` of loss ``loss`` (nats per token), made at ``lr_share`` of the peak learning rate, at
        ``progress`` of the run; ``zeros`` gives the share of the gradient that is exactly zero."""
        heard, ask_at = self._heard, 1 << (step - 1).bit_length()
        heard.full_steps += lr_share
        if math.isfinite(loss) and 4 * step > 3 * ask_at:  # the mean over the last quarter before each question
            heard.loss, heard.steps = heard.loss + loss, heard.steps + 1
        if step != ask_at or step < FIRST_STEP:
            return []
        mean = heard.loss / heard.steps if heard.steps else math.nan
        signs = {"starved": self._starved(zeros), "behind": self._behind(mean, heard.before, progress)}
        heard.before, heard.loss, heard.steps = mean, 0.0, 0
        new = {sign: words for sign, words in signs.items() if words and sign not in heard.rung}
        heard.rung += new
        return [f"alarm at step {step}: {words}" for words in new.values()]

    def to_json(self) -> dict[str, Any]:
        return asdict(self._heard)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from ``to_json`` of an earlier session."""
        self._heard = Heard(**saved)

    def _starved(self, zeros: Callable[[], float]) -> str:
        if self._heard.full_steps < 2.0 or (share := zeros()) < STARVED:
            return ""
        cause, fix = (
            ("it is too small for fp16", "set train.precision=bf16 or fp32; fp16 learns only with loss scaling")
            if self._precision == "fp16"
            else ("part of the model is cut off from the loss", "train with the defaults of [model] and compare")
        )
        return f"{share:.0%} of the gradient of the blocks is exactly zero, so they do not learn; likely {cause}: {fix}"

    def _behind(self, loss: float, before: float | None, progress: float) -> str:
        if not self._floors or progress < SHARE or self._heard.full_steps < FULL_STEPS or math.isnan(loss):
            return ""
        unigram, bigram = self._floors["unigram"].loss, self._floors["bigram"].loss
        if loss >= unigram:
            return (
                f"after {progress:.0%} of the run the loss is {loss:.2f}, and counting how frequent tokens are gives"
                f" {unigram:.2f}; {self._causes()}"
            )
        if before is not None and loss > bigram and loss > STALLED * before:
            return (
                f"after {progress:.0%} of the run the loss stands at {loss:.2f}, and counting pairs of tokens gives"
                f" {bigram:.2f}; {self._causes()}"
            )
        return ""

    def _causes(self) -> str:
        lr = f"a learning rate far too high or low (now optim.lr={self._lr:g}; 1e-3 suits adamw, 0.02 muon)"
        if self._precision == "fp16":
            lr = f"gradients too small for fp16 (set train.precision=bf16 or fp32) or {lr}"
        return f"likely {lr}, or text without order; change it and start again with --fresh"


def zero_share(model: GPT) -> float:
    """The share of exact zeros in the gradients of the blocks' matrices; embeddings are left out, since most of their rows
    are of tokens that a batch does not have."""
    gradients = [local(p.grad) for p in model.blocks.parameters() if p.dim() == 2 and p.grad is not None]
    size = sum(gradient.numel() for gradient in gradients)
    if not size:
        return 0.0
    zeros = torch.stack([(gradient == 0).sum() for gradient in gradients]).sum().item()
    return float(zeros) / size
