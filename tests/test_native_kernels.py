"""The fused kernels compute what model.py computes: values, gradients, documents, precision, odd sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from smalllm.config import ModelConfig
from smalllm.model import GPT
from smalllm.native import kernels

pytestmark = pytest.mark.usefixtures("native")

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, grouped heads": {"kv_heads": 2},
    "qwen3": {"qk_norm": True, "kv_heads": 1},
    "starcoder2": {"norm": "layernorm", "activation": "gelu", "bias": True},
    "gpt2": {"norm": "layernorm", "activation": "gelu", "positions": "learned"},
}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def model_of(architecture: str, width: int = 64, heads: int = 4, seed: int = 0) -> GPT:
    """A model in which every weight matters: none is zero or one, as they are at the start of training."""
    torch.manual_seed(seed)
    settings = {"layers": 2, "width": width, "heads": heads, "context": 200, "vocab_size": 99}
    model = GPT(ModelConfig(**settings, **ARCHITECTURES[architecture])).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.08)
    return model


def results(model: GPT, ids: Tensor, starts: Tensor | None = None, fused: bool = True, bf16: bool = False):
    """Hidden states and gradients of a fixed weighted sum of them, from the kernels or from model.py."""
    model.fused = kernels.hidden if fused else None
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.hidden(ids, starts=starts).float()
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden * weights).sum().backward()
    return {"hidden": hidden.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The greatest relative distance of two sets of tensors (absolute, where the expected is under 1)."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm().clamp(min=1.0)) for name in expected)


def ids_of(rows: int, positions: int) -> Tensor:
    return torch.randint(99, (rows, positions), generator=torch.Generator().manual_seed(2))


STARTS = torch.tensor([[0] * 70, [0] * 3 + [3] * 40 + [43] * 27, [0] + [1] * 68 + [69]], dtype=torch.int32)
"""Three rows of documents: one whole; three; one of a single token at each end."""


@every_architecture
@pytest.mark.parametrize("positions", [1, 15, 16, 33, 100])
def test_values_and_gradients_are_those_of_the_model(architecture: str, positions: int):
    model = model_of(architecture)
    ids = ids_of(3, positions)
    assert worst(results(model, ids), results(model, ids, fused=False)) < 5e-6


@every_architecture
def test_documents_of_a_row_do_not_see_each_other(architecture: str):
    model, ids = model_of(architecture), ids_of(3, 70)
    found = results(model, ids, STARTS)
    assert worst(found, results(model, ids, STARTS, fused=False)) < 5e-6
    alone = results(model, ids[1:2, 3:43])["hidden"]
    torch.testing.assert_close(found["hidden"][1:2, 3:43], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "heads"), [(16, 1), (96, 2), (160, 2), (128, 1)])
def test_heads_of_any_supported_width(width: int, heads: int):
    model, ids = model_of("llama", width, heads), ids_of(2, 50)
    assert kernels.supports(model.config)
    assert worst(results(model, ids), results(model, ids, fused=False)) < 5e-6


@every_architecture
@pytest.mark.parametrize("positions", [48, 64, 150])
def test_bfloat16_is_as_near_to_float32_as_autocast(architecture: str, positions: int):
    model, ids = model_of(architecture, 128), ids_of(2, positions)
    exact = results(model, ids, fused=False)
    plain = worst(results(model, ids, fused=False, bf16=True), exact)
    assert 1e-4 < worst(results(model, ids, bf16=True), exact) < 1.3 * plain


def test_logits_need_no_autocast():
    """The head follows the kernels: float32 alone, bfloat16 in autocast."""
    model, ids = model_of("llama"), ids_of(2, 30)
    plain, model.fused = model(ids), kernels.hidden
    torch.testing.assert_close(model(ids), plain, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(ids)
    assert low.dtype == torch.bfloat16 and not torch.equal(low.float(), plain)
    torch.testing.assert_close(low.float(), plain, rtol=0.05, atol=0.05)


def test_recomputation_changes_nothing():
    model, ids = model_of("qwen3"), ids_of(2, 40)
    expected = results(model, ids)
    model.recompute = True
    assert worst(results(model, ids), expected) == 0.0


def test_a_later_token_changes_nothing_before_it():
    model, ids = model_of("llama"), ids_of(1, 90)
    before = results(model, ids)["hidden"]
    ids[0, 50] = (ids[0, 50] + 1) % 99
    after = results(model, ids)["hidden"]
    assert torch.equal(before[0, :50], after[0, :50]) and not torch.equal(before[0, 50], after[0, 50])


def test_the_number_of_threads_changes_rounding_at_most():
    model, ids, threads = model_of("qwen3"), ids_of(3, 60), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(model, ids)
        torch.set_num_threads(3)
        together, again = (results(model, ids) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert worst(together, alone) < 1e-6
    assert worst(again, together) == 0.0  # bit for bit with as many


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_seen(value: float):
    model = model_of("llama")
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight[3, 4] = value  # type: ignore[union-attr]
    assert not results(model, ids_of(1, 20), bf16=True)["hidden"].isfinite().all()


def test_dropout_and_narrow_heads_are_left_to_the_model():
    assert not kernels.supports(ModelConfig(layers=1, width=32, heads=2, vocab_size=9, dropout=0.1))
    assert not kernels.supports(ModelConfig(layers=1, width=32, heads=4, vocab_size=9))


# ── cross-entropy ──


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 15, 64, 300, 4096])
def test_cross_entropy_is_that_of_torch(vocab: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(37, vocab, generator=generator) * 5).to(dtype)
    targets = torch.randint(vocab, (37,), generator=generator)
    targets[::5] = -100
    wide = logits.float().requires_grad_()
    expected = F.cross_entropy(wide, targets, ignore_index=-100, reduction="sum")
    expected.backward()
    loss, slope = kernels.cross_entropy(logits.clone(), targets, True)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(slope.float(), wide.grad, rtol=tolerance, atol=tolerance)
    assert slope[::5].abs().sum() == 0


def test_cross_entropy_without_slope_leaves_the_logits():
    logits = torch.randn(4, 7)
    before = logits.clone()
    loss, same = kernels.cross_entropy(logits, torch.tensor([0, 1, 2, 3]), False)
    assert torch.equal(same, before)
    torch.testing.assert_close(loss, F.cross_entropy(before, torch.tensor([0, 1, 2, 3]), reduction="sum"))


@pytest.mark.parametrize("size", [1e2, 1e4, 3e38])
def test_extreme_logits_neither_overflow_nor_vanish(size: float):
    logits = torch.tensor([[size, 0.0, -size], [-size, -size, -size]])
    loss, slope = kernels.cross_entropy(logits.clone(), torch.tensor([0, 1]), True)
    torch.testing.assert_close(loss, torch.tensor(math.log(3)))
    torch.testing.assert_close(slope, torch.tensor([[0, 0, 0], [1 / 3, -2 / 3, 1 / 3]]), rtol=1e-5, atol=1e-6)


def test_a_logit_that_is_not_a_number_gives_a_loss_that_is_none():
    loss, _ = kernels.cross_entropy(torch.tensor([[0.0, math.nan, 1.0]]), torch.tensor([0]), True)
    assert loss.isnan()


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_activations_at_extremes(kind: str):
    up = torch.tensor([[-1e4, -90.0, -3.0, 0.0, 2.0, 88.0, 1e4, 30.0]])
    out = kernels._Activation.apply(up, kind)
    gate, value = up.chunk(2, dim=-1)
    torch.testing.assert_close(out, F.gelu(up, approximate="tanh") if kind == "gelu" else F.silu(gate) * value)
