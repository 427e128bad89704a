"""The loss against torch's cross-entropy: value, gradients, padding, chunks, precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from smalllm.config import ModelConfig
from smalllm.data.batches import IGNORE, Batch
from smalllm.model import GPT
from smalllm.training import objectives
from smalllm.training.objectives import cross_entropy_sum, linear_cross_entropy


def inputs(rows: int = 37, width: int = 16, vocab: int = 50, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[::5] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 50 * 10, 2**20])
def test_value_and_gradients_equal_torchs(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(objectives.CHUNK_BYTES, "cpu", chunk_bytes)
    hidden, weight, targets = inputs(dtype=torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets)
    reference = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(loss, reference)
    ours = torch.autograd.grad(loss * 0.37, (hidden, weight))
    theirs = torch.autograd.grad(reference * 0.37, (hidden, weight))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_uniform_logits_by_hand():
    loss = linear_cross_entropy(torch.zeros(3, 4), torch.randn(8, 4), torch.tensor([1, IGNORE, 7]))
    assert loss.item() == pytest.approx(2 * 2.0794415)  # two targets count, ln 8 each


def test_huge_logits_do_not_overflow():
    hidden = torch.full((2, 4), 1e4, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.eye(4) * 10, torch.tensor([0, 3]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all()


def test_bf16_products_are_near_fp32():
    hidden, weight, targets = inputs(dtype=torch.float32)
    exact = linear_cross_entropy(hidden, weight, targets)
    near = linear_cross_entropy(hidden, weight, targets, torch.bfloat16)
    assert near.dtype == torch.float32
    assert near.item() == pytest.approx(exact.item(), rel=2e-2)


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_through_the_model_equals_the_plain_one(tied: bool):
    """The head's weight is reached on two ways when it is tied."""
    config = ModelConfig(layers=1, width=16, heads=2, context=12, vocab_size=30, tie_embeddings=tied)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 30, (3, 13), generator=generator)
    batch = Batch(ids[:, :-1], ids[:, 1:].clone())
    batch.targets[0, 4:] = IGNORE
    gradients = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = GPT(config)
        if ours:
            loss = cross_entropy_sum(model, batch)
        else:
            loss = F.cross_entropy(
                model(batch.inputs).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"
            )
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_memory_does_not_grow_with_the_logits():
    """All logits of this case would take 400 MB; the chunk may take 8."""
    hidden = torch.randn(2000, 8, requires_grad=True)
    weight = torch.randn(50_000, 8, requires_grad=True)
    largest = 0
    original = objectives.chunk_loss

    def watched(logits, targets, with_slope):  # type: ignore[no-untyped-def]
        nonlocal largest
        largest = max(largest, logits.numel() * 4)
        return original(logits, targets, with_slope)

    objectives.chunk_loss = watched
    try:
        linear_cross_entropy(hidden, weight, torch.zeros(2000, dtype=torch.long)).backward()
    finally:
        objectives.chunk_loss = original
    assert 0 < largest <= objectives.CHUNK_BYTES["cpu"]


def test_an_id_outside_the_vocabulary_is_an_error_never_clamped():
    with pytest.raises((RuntimeError, IndexError)):
        linear_cross_entropy(torch.zeros(1, 4), torch.zeros(8, 4), torch.tensor([8]))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("chunk_bytes", [1, 4000, 2**25])
def test_the_fused_loss_is_the_plain_one(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(objectives.CHUNK_BYTES, "native", chunk_bytes)
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(0, 70, (29,), generator=generator)
    targets[::7] = IGNORE
    found = {}
    for execution in ("plain", "native"):
        hidden, weight = (torch.randn(n, 16, generator=generator.manual_seed(n)).requires_grad_() for n in (29, 70))
        loss = linear_cross_entropy(hidden, weight, targets, execution=execution)
        (loss * 3).backward()
        found[execution] = (loss.detach(), hidden.grad, weight.grad)
    for native, plain in zip(found["native"], found["plain"], strict=True):
        torch.testing.assert_close(native, plain, rtol=1e-5, atol=1e-5)
