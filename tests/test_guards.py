"""What stands out is left out; what ends a run is explained."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from smalllm.checkpoint import RunFolder
from smalllm.config import UserError
from smalllm.data.batches import Batches
from smalllm.data.shards import TokenDataset
from smalllm.metrics import read_records
from smalllm.reliability.promises import Recorder, replaced
from smalllm.training.guards import WINDOW, SpikeGuard, TrainingFailure, gradient_norms, signals
from smalllm.training.trainer import Trainer, train


def guard_after(losses: list[float], sigmas: float = 6.0) -> SpikeGuard:
    guard = SpikeGuard(sigmas)
    for loss in losses:
        assert not guard.is_spike(loss, 1.0)
    return guard


def test_a_spike_by_hand():
    """64 losses, half 1 and half 3: mean 2, deviation 1, so that the limit of 6 deviations is 8."""
    guard = guard_after([1.0, 3.0] * 32)
    assert guard.is_spike(8.01, 1.0) and not guard.is_spike(7.99, 1.0)
    assert guard_after([1.0, 3.0] * 32).is_spike(2.0, 1.01)  # norms that never changed: any other one stands out
    assert len(guard.seen) == 65  # what stood out is not what others are compared with


def test_it_takes_half_a_window_to_know_what_is_usual():
    guard = guard_after([1.0, 3.0] * (WINDOW // 4 - 1) + [2.0])
    assert not guard.is_spike(1000.0, 1.0)


def test_off_it_remembers_nothing_that_is_saved():
    guard = guard_after([1.0] * 200, sigmas=0.0)
    assert not guard.is_spike(1e9, 1e9) and guard.to_json() == []


def test_a_restored_guard_knows_what_it_knew():
    guard = guard_after([1.0, 3.0] * 50)
    other = SpikeGuard(6.0)
    other.restore(guard.to_json())
    assert other.seen == guard.seen and other.is_spike(9.0, 1.0)


def test_ten_bad_steps_leave_a_report(tiny, tmp_path: Path):
    """The cause and its fix, the gradient that was not finite, and the text of the batch."""
    display, step = Recorder(), Trainer.accumulate

    def poisoned(self: Trainer, tokens: int) -> float:
        loss = step(self, tokens)
        if self.state.step >= 3:
            self.model.blocks[1].mlp.up.weight.grad[0, 0] = math.nan  # type: ignore[union-attr,index]
        return loss

    with (
        replaced(Trainer, "accumulate", poisoned),
        pytest.raises(TrainingFailure, match=r"10 steps in a row .* lower optim.lr.*; more in .*failure.md"),
    ):
        train(tiny(train={"steps": 50, "checkpoint_every": 2}), tmp_path, display=display, command="smalllm train tiny")
    page = (tmp_path / "failure.md").read_text()
    assert "10 steps in a row" in page and "smalllm train tiny" in page and "last whole checkpoint | step 12" in page
    assert "| `blocks.1.mlp.up.weight` | nan | not finite |" in page
    assert page.count("not finite |") == 1
    data = TokenDataset.open(tiny().data_path)
    row = next(Batches(data.train, 32, 256, 7, "documents").micro_batches(12, 1)).inputs[0]
    assert data.tokenizer().decode(row.tolist())[:40].splitlines()[0] in page
    assert RunFolder(tmp_path).choose("latest").step == 12


def test_gradient_norms_by_hand():
    from smalllm.config import ModelConfig
    from smalllm.model import GPT

    model = GPT(ModelConfig(layers=1, width=16, heads=2, context=8, vocab_size=32))
    assert gradient_norms(model) == {}
    model.norm.weight.grad = torch.full((16,), 0.5)
    assert gradient_norms(model) == {"norm.weight": pytest.approx(2.0)}


def test_other_data_is_taken_by_force(tiny, tmp_path: Path):
    from smalllm.data.prepare import prepare

    train(tiny(train={"steps": 2}), tmp_path / "run")
    prepare(["storyworld:150"], tmp_path / "other", seed=9, tokenizer=tmp_path / "run/tokenizer.model")
    config = tiny(train={"steps": 4}).replace(data={"path": str(tmp_path / "other")})
    with pytest.raises(UserError, match="was trained on other data .* go on with this data by --force"):
        train(config, tmp_path / "run")
    display = Recorder()
    assert train(config, tmp_path / "run", display=display, force=True).step == 4
    assert any("continuing with other data" in note for note in display.notes)


def test_a_seed_is_changed_only_by_force(tiny, tmp_path: Path):
    train(tiny(train={"steps": 2}), tmp_path)
    other = tiny(train={"steps": 4}).model_copy(update={"seed": 8})
    with pytest.raises(UserError, match="seed = 8 but the run was begun with 7; .* by --force"):
        train(other, tmp_path)
    display = Recorder()
    train(other, tmp_path, display=display, force=True)
    assert "continuing with seed=8 (was 7)" in display.notes


def test_under_nohup_a_closed_terminal_does_not_end_training(tiny, tmp_path: Path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    original = Trainer.step

    def step(self: Trainer) -> None:
        original(self)
        signal.raise_signal(signal.SIGHUP)

    try:
        with replaced(Trainer, "step", step):
            assert train(tiny(), tmp_path).stopped_because == "steps"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_does_not_wait_for_an_evaluation(tiny, tmp_path: Path):
    """It ends between two batches, and is the first thing that the next session does."""
    config = tiny(train={"evaluate_every": 4, "evaluate_tokens": 20_000})
    calls, original = [0], Trainer._heed_signal

    def heed(self: Trainer) -> None:
        calls[0] += 1
        if calls[0] == 2:
            self.signal = signal.SIGTERM
        original(self)

    with replaced(Trainer, "_heed_signal", heed):
        summary = train(config, tmp_path / "run")
    assert (summary.stopped_because, summary.step) == ("SIGTERM", 4)
    assert "valid_loss" not in list(read_records(tmp_path / "run/metrics.jsonl"))[-1]
    train(config, tmp_path / "run")
    train(config, tmp_path / "straight")
    assert (tmp_path / "run/samples.jsonl").read_bytes() == (tmp_path / "straight/samples.jsonl").read_bytes()


@pytest.mark.parametrize("echo", [False, True])
def test_a_second_signal_ends_at_once_unless_it_is_an_echo(echo: bool) -> None:
    heard: list[int] = []
    twice = contextlib.nullcontext() if echo else pytest.raises(KeyboardInterrupt)
    with twice, signals(heard.append, echo):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert heard == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
