"""A model and its cache, in slots: tokens go in, logits of the next ones come out. Plain PyTorch here, C++ in native.decode.

A slot holds one text. A step may read prompts into some slots and add one token to others; it knows nothing of what the
tokens mean or how the next is chosen. Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from smalllm.config import UserError
from smalllm.model import GPT, KVCache
from smalllm.native import decode
from smalllm.native.build import Unavailable
from smalllm.native.decode import Part

Weights = Literal["auto", "fp32", "bf16", "int8"]


class Decoder(Protocol):
    """Continues texts. A slot is free to be used again: whoever begins at position 0 forgets what it held."""

    slots: int
    context: int
    weights: str  # their type: fp32, bf16, int8 or another of the model's own

    def forward(self, parts: Sequence[Part]) -> Tensor:
        """Add the parts to their slots; logits [wanted, V], float32, of the parts' wanted tokens in turn."""


def make_decoder(model: GPT, slots: int, weights: Weights = "auto") -> Decoder:
    """A copy of the weights in C++ on a CPU, the model itself elsewhere or where there is no compiler.

    ``auto``: int8 in C++ (the fastest everywhere it was measured, within 0.1 % of float32 in bits per byte), and the model as
    it is in PyTorch. UserError for weights that are not to be had here."""
    if isinstance(model, GPT) and model.embedding.weight.device.type == "cpu":
        try:
            return decode.Decoder(model, slots, "int8" if weights == "auto" else weights)
        except Unavailable as error:
            reason = str(error)
    else:
        reason = "this is not a CPU"
    if weights not in ("auto", "fp32"):
        raise UserError(f"weights = {weights} need the C++ decoder ({reason}); use auto or fp32")
    return TorchDecoder(model, slots)


class TorchDecoder:
    """The model in plain PyTorch on its device, in the dtype of its weights; dropout is off while it decodes."""

    def __init__(self, model: GPT, slots: int) -> None:
        self.model, self.slots, self.context = model, slots, model.config.context
        weight = model.embedding.weight
        self.weights = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[weight.dtype]
        self._cache = KVCache(model.config, slots, device=weight.device, dtype=weight.dtype)

    @torch.inference_mode()
    def forward(self, parts: Sequence[Part]) -> Tensor:
        training = self.model.training
        self.model.eval()
        try:
            logits: dict[int, Tensor] = {}
            for group in _groups(parts):
                for place, hidden in zip(group, self._hidden([parts[place] for place in group]), strict=True):
                    logits[place] = self.model.head(hidden[len(hidden) - parts[place].wanted :])
            return torch.cat([logits[place] for place in range(len(parts))]).float()
        finally:
            self.model.train(training)

    def _hidden(self, parts: Sequence[Part]) -> list[Tensor]:
        """The residual stream [T, C] of each part, all read at once, right-padded."""
        longest = max(len(part.ids) for part in parts)
        ids = torch.tensor([[*part.ids, *[0] * (longest - len(part.ids))] for part in parts])
        cache = self._cache.at([part.slot for part in parts], [part.position for part in parts])
        hidden = self.model.hidden(ids.to(self._cache.keys.device), cache)
        return [row[: len(part.ids)] for row, part in zip(hidden, parts, strict=True)]


def _groups(parts: Sequence[Part]) -> list[list[int]]:
    """Places of parts that can be read at once: beginnings of texts, single tokens; all others alone (padding them might
    not fit into the context)."""
    fresh = [place for place, part in enumerate(parts) if part.position == 0]
    single = [place for place, part in enumerate(parts) if part.position > 0 and len(part.ids) == 1]
    rest = [[place] for place, part in enumerate(parts) if part.position > 0 and len(part.ids) > 1]
    return [group for group in (fresh, single, *rest) if group]
