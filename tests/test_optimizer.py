"""AdamW and Muon against torch.optim, decay groups, and state in and out."""

from __future__ import annotations

import pytest
import torch

from smalllm.config import ModelConfig, OptimConfig, UserError
from smalllm.model import GPT
from smalllm.training.optimizer import POLAR, QUINTIC, Muon, Optimizer, block_matrices, decay_groups, orthogonalize

CPU = torch.device("cpu")
CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, context=16, vocab_size=64, qk_norm=True)


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


def one_step(target: GPT, optimizer: Optimizer, seed: int) -> None:
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(seed))
    target(ids).logsumexp(-1).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_weight_decay_is_on_matrices_only():
    groups = decay_groups(list(model().parameters()), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {p.dim() for p in groups[0]["params"]} == {2} and {p.dim() for p in groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in groups) == len(list(model().parameters()))


def test_a_decayed_matrix_shrinks_and_a_norm_does_not():
    """With no gradient but decay: w * (1 - lr * decay)."""
    ours = model()
    optimizer = Optimizer(ours, OptimConfig(lr=0.5, weight_decay=0.1), CPU)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for parameter in ours.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in ours.named_parameters():
        factor = 0.95 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


def test_adamw_equals_torchs():
    ours, theirs = model(), model()
    optimizer = Optimizer(ours, OptimConfig(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1), CPU)
    reference = torch.optim.AdamW(
        [{"params": [p for p in theirs.parameters() if p.dim() == 2], "weight_decay": 0.1},
         {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.95))  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_muon_equals_torchs(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for _ in range(3)]
    ours = [torch.nn.Parameter(w.clone()) for w in start]
    theirs = [torch.nn.Parameter(w.clone()) for w in start]
    optimizer = Muon(ours, {}, lr=0.02, weight_decay=0.1, polynomials=QUINTIC)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(shape, generator=generator)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-3, rtol=1e-2)  # both iterate in bfloat16
        assert not torch.allclose(mine, start[0], atol=1e-2)


def test_stacked_matrices_are_orthogonalized_one_by_one():
    generator = torch.Generator().manual_seed(0)
    whole = torch.nn.Parameter(torch.zeros(40, 16))
    parts = [torch.nn.Parameter(torch.zeros(rows, 16)) for rows in (24, 8, 8)]
    whole.grad = torch.randn(40, 16, generator=generator)
    for part, piece in zip(parts, whole.grad.split([24, 8, 8]), strict=True):
        part.grad = piece.clone()
    Muon([whole], {whole: [24, 8, 8]}, lr=1.0).step()
    Muon(parts, {}, lr=1.0).step()
    torch.testing.assert_close(whole.detach(), torch.cat([part.detach() for part in parts]), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("polynomials", "low", "high"), [(QUINTIC, 0.65, 1.25), (POLAR, 0.7, 1.3)])
def test_orthogonalized_matrices_have_singular_values_near_one(polynomials, low: float, high: float):
    """From 0.01 of the matrix's norm on, as the coefficients promise; the vectors stay what they were."""
    left, _ = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0)))
    right, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))
    values = torch.logspace(-1.6, 0, 48)
    found = orthogonalize((left * values @ right[:48])[None], polynomials)[0].float()
    assert values.min() / values.norm() > 0.005
    diagonal = (left.T @ found @ right[:48].T).diagonal()
    assert low < diagonal[8:].min() and diagonal.max() < high  # the first lie below 0.01


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    ours = model()
    matrices = block_matrices(ours)
    assert len(matrices) == 4 * CONFIG.layers
    assert all(sum(rows) == parameter.shape[0] for parameter, rows in matrices.items())
    optimizer = Optimizer(ours, OptimConfig(kind="muon", lr=0.02, adam_lr=0.004), CPU)
    muon, adam = optimizer.parts
    held = [p for part in optimizer.parts for group in part.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(ours.parameters()))
    assert ours.embedding.weight in {p for group in adam.param_groups for p in group["params"]}
    optimizer.set_lr(0.5)
    assert muon.param_groups[0]["lr"] == 0.01 and adam.param_groups[0]["lr"] == 0.002


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_survives_the_round_trip_bit_for_bit(kind: str):
    config = OptimConfig(kind=kind, lr=1e-2)
    straight, first = model(), model()
    for optimizer, target, seeds in (
        (Optimizer(straight, config, CPU), straight, range(6)),
        (opt := Optimizer(first, config, CPU), first, range(3)),
    ):
        for seed in seeds:
            one_step(target, optimizer, seed)
    resumed = model()
    resumed.load_state_dict(first.state_dict())
    again = Optimizer(resumed, config, CPU)
    again.load_state_tensors({name: tensor.clone() for name, tensor in opt.state_tensors().items()})
    for seed in range(3, 6):
        one_step(resumed, again, seed)
    for mine, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_the_state_of_another_optimizer_is_refused():
    adam, muon = (Optimizer(model(), OptimConfig(kind=kind), CPU) for kind in ("adamw", "muon"))
    one_step(model_of := model(), Optimizer(model_of, OptimConfig(), CPU), 0)
    with pytest.raises(UserError, match="it is the state of another optimizer or model"):
        muon.load_state_tensors(adam.state_tensors())
