"""The learning rate at hand-worked steps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalllm.config import OptimConfig
from smalllm.training.schedule import Plan, lr_fraction

COSINE = OptimConfig(schedule="cosine", warmup_steps=2000, final_lr_fraction=0.1)
WSD = OptimConfig(schedule="wsd", warmup_steps=10, cooldown_fraction=0.5)


def at(optim: OptimConfig, step: int, steps: int) -> float:
    return lr_fraction(optim, step, Plan(steps).progress(step))


@pytest.mark.parametrize(
    ("step", "fraction"),
    [
        (0, 1 / 2000),  # the first update is not lost to a learning rate of zero
        (999, 0.5),
        (1999, 1.0),
        (2000, 1.0),
        (6000, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.25))),
        (10_000, 0.55),  # half way down: the middle between 1 and 0.1, not a clipped floor
        (14_000, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.75))),
        (17_999, 0.1),
    ],
)
def test_cosine_of_the_ancestors_by_hand(step: int, fraction: float):
    assert at(COSINE, step, steps=18_000) == pytest.approx(fraction, abs=1e-7)


def test_cosine_equals_torch_after_warmup():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.1)
    optim = OptimConfig(schedule="cosine", warmup_steps=10)
    for step in range(10, 100):
        assert at(optim, step, 100) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    ("step", "fraction"), [(0, 0.1), (9, 1.0), (10, 1.0), (49, 1.0), (50, 1.0), (75, 0.5), (99, 0.02)]
)
def test_wsd_by_hand(step: int, fraction: float):
    assert at(WSD, step, steps=100) == pytest.approx(fraction)


def test_constant_is_constant_after_warmup():
    optim = OptimConfig(schedule="constant", warmup_steps=4)
    assert [at(optim, step, 8) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_a_run_shorter_than_its_warmup_only_warms_up():
    assert [at(COSINE, step, 3) for step in range(3)] == [1 / 2000, 2 / 2000, 3 / 2000]


@given(st.sampled_from(["cosine", "wsd", "constant"]), st.integers(0, 50), st.integers(1, 200), st.integers(0, 220))
def test_the_fraction_stays_between_zero_and_one_and_falls_after_warmup(kind, warmup, steps, step):
    optim = OptimConfig(schedule=kind, warmup_steps=warmup)
    now, later = at(optim, step, steps), at(optim, step + 1, steps)
    assert 0.0 <= now <= 1.0
    if step >= warmup:
        assert later <= now + 1e-12


@given(st.integers(1, 300), st.lists(st.tuples(st.integers(1, 40), st.integers(1, 300)), max_size=6))
def test_progress_never_jumps_when_a_run_is_planned_anew(steps: int, changes: list[tuple[int, int]]):
    plan, step = Plan(steps), 0
    for forward, new_steps in changes:
        step += forward
        if step >= plan.steps:
            break
        before = plan.progress(step)
        plan = plan.replanned(step, new_steps)
        assert plan.progress(step) == pytest.approx(before)
        assert plan.steps > step
    assert plan.progress(plan.steps) == 1.0
    values = [plan.progress(s) for s in range(plan.anchor_step, plan.steps + 1)]
    assert values == sorted(values)


def test_hurrying_jumps_to_the_cooldown():
    plan = Plan(1000).hurried(200, progress=0.5, steps_left=100)
    assert (plan.progress(200), plan.progress(250), plan.progress(300)) == (0.5, 0.75, 1.0)
    assert lr_fraction(WSD, 250, plan.progress(250)) == pytest.approx(0.5)
