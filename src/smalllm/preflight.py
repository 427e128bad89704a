"""Checks before step 1 that find in seconds what otherwise costs the run. Pure questions: nothing here prints or trains
the real model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from smalllm.config import UserError
from smalllm.data.batches import Batch
from smalllm.data.shards import TokenDataset
from smalllm.model import GPT, KVCache
from smalllm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Check:
    """The answer of one check; ``detail`` is what was measured."""

    name: str
    passed: bool
    detail: str


def preflight(model: GPT, tokenizer: Tokenizer, dataset: TokenDataset, batch: Batch) -> list[Check]:
    """The checks in order, up to the first that fails. ``batch`` is the first that training will see, on the model's device."""
    small = Batch(batch.inputs[:2, :64], batch.targets[:2, :64])
    was_training = model.training
    model.eval()
    try:
        done = []
        for check in _checks(model, tokenizer, dataset, small):
            done.append(check)
            if not check.passed:
                break
        return done
    finally:
        model.train(was_training)


def require(checks: list[Check]) -> None:
    """UserError that names the first check that failed."""
    for check in checks:
        if not check.passed:
            raise UserError(
                f"preflight check failed: {check.name} ({check.detail}); mend it, or skip with train.preflight=false"
            )


def _checks(model: GPT, tokenizer: Tokenizer, dataset: TokenDataset, batch: Batch) -> Iterator[Check]:
    yield special_ids(model, tokenizer, dataset)
    yield round_trip(tokenizer, dataset)
    yield ids_in_range(model, batch)
    yield first_loss(model, batch)
    yield causality(model, batch)
    yield cached_is_uncached(model, batch)
    yield can_overfit(model, batch)


def special_ids(model: GPT, tokenizer: Tokenizer, dataset: TokenDataset) -> Check:
    """Training and sampling use one tokenizer: same fingerprint, vocabulary, begin and end of text."""
    manifest = dataset.manifest
    equal = (
        manifest.tokenizer_fingerprint == tokenizer.fingerprint
        and (manifest.bos_id, manifest.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
        and manifest.vocab_size == tokenizer.vocab_size == model.config.vocab_size
    )
    ends = (
        dataset.train.read(0, 1)[0] == tokenizer.bos_id
        and dataset.train.read(dataset.train.tokens - 1, 1)[0] == tokenizer.eos_id
    )
    return Check(
        "tokenizer of data and model are one",
        bool(equal and ends),
        f"{tokenizer.vocab_size} pieces, bos {tokenizer.bos_id}, eos {tokenizer.eos_id}",
    )


def round_trip(tokenizer: Tokenizer, dataset: TokenDataset) -> Check:
    """Text -> ids -> text is lossless: validation documents encode to the ids that are stored."""
    for count, ids in zip(range(1, 9), dataset.valid.iterate_documents(), strict=False):
        text = tokenizer.decode(ids.tolist())
        if tokenizer.encode_document(text) != ids.tolist() or tokenizer.decode(tokenizer.encode(text)) != text:
            return Check("decode(encode(text)) == text", False, f"validation document {count} comes back otherwise")
    return Check("decode(encode(text)) == text", True, f"{count} documents")


def ids_in_range(model: GPT, batch: Batch) -> Check:
    """No id of the first batch lies outside the model's vocabulary; none is ever clamped."""
    highest = int(max(batch.inputs.max(), batch.targets.max()))
    return Check(
        "ids lie in the vocabulary",
        highest < model.config.vocab_size,
        f"highest {highest} of {model.config.vocab_size}",
    )


@torch.no_grad()
def first_loss(model: GPT, batch: Batch) -> Check:
    """An untrained model is undecided: its loss is ln(vocab_size) within 5 %."""
    loss = _loss(model, batch).item()
    expected = math.log(model.config.vocab_size)
    return Check("first loss is ln(vocab_size)", abs(loss / expected - 1) < 0.05, f"{loss:.3f} against {expected:.3f}")


@torch.no_grad()
def causality(model: GPT, batch: Batch) -> Check:
    """Changing a token moves no earlier logit."""
    ids, middle = _stirred_model_inputs(model, batch)
    changed = ids.clone()
    changed[:, middle] = (changed[:, middle] + 1) % model.config.vocab_size
    stirred = _stirred(model)
    difference = (stirred(ids) - stirred(changed)).abs().amax(dim=(0, 2))
    earlier, own = difference[:middle].max().item(), difference[middle:].max().item()
    return Check(
        "no logit sees the future", earlier < 1e-4 < own, f"earlier logits move by {earlier:.1g}, later by {own:.1g}"
    )


@torch.no_grad()
def cached_is_uncached(model: GPT, batch: Batch) -> Check:
    """Decoding with the key/value cache gives the logits of the whole sequence."""
    ids, middle = _stirred_model_inputs(model, batch)
    stirred = _stirred(model)
    cache = KVCache(model.config, len(ids), capacity=ids.shape[1], device=ids.device)
    parts = [stirred(ids[:, :middle], cache)] + [stirred(ids[:, i : i + 1], cache) for i in range(middle, middle + 4)]
    difference = (torch.cat(parts, 1) - stirred(ids[:, : middle + 4])).abs().max().item()
    return Check("cached logits are the uncached ones", difference < 1e-3, f"they differ by {difference:.1g}")


def can_overfit(model: GPT, batch: Batch, steps: int = 8) -> Check:
    """Gradients reach every part: a few steps on one small batch lower its loss clearly (on a copy of the model)."""
    pupil = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(pupil.parameters(), lr=3e-3, weight_decay=0.0)
    first = last = 0.0
    with torch.enable_grad():
        for step in range(steps):
            loss = _loss(pupil, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            first, last = (loss.item(), loss.item()) if step == 0 else (first, loss.item())
    return Check("one batch can be learned", last < 0.9 * first, f"loss {first:.2f} -> {last:.2f} in {steps} steps")


def _loss(model: GPT, batch: Batch) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch.inputs).flatten(0, 1).float(), batch.targets.flatten())


def _stirred_model_inputs(model: GPT, batch: Batch) -> tuple[torch.Tensor, int]:
    ids = batch.inputs[:1, : min(32, model.config.context)]
    return ids, ids.shape[1] // 2


@torch.no_grad()
def _stirred(model: GPT) -> GPT:
    """A copy whose zero-initialized projections are not zero, so that attention can be seen to work."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in copied.parameters():
        if parameter.dim() == 2 and not parameter.any():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    return copied
