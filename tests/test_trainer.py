"""Training: one gradient however a step is cut, exact resume, what is not finite never reaches the weights."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from smalllm import hardware
from smalllm.checkpoint import RunFolder, open_run
from smalllm.config import RunConfig, UserError
from smalllm.metrics import read_records
from smalllm.native import kernels
from smalllm.reliability.promises import TIMES, Recorder, SteppedClock
from smalllm.runtime import Fit
from smalllm.training import trainer as trainer_module
from smalllm.training.guards import TrainingFailure
from smalllm.training.schedule import Plan
from smalllm.training.trainer import Trainer, train


def digest(run: Path) -> str:
    """SHA-256 over weights and optimizer of the newest checkpoint."""
    checkpoint = RunFolder(run).choose("latest")
    return hashlib.sha256(checkpoint.read("model.safetensors") + checkpoint.read("optimizer.safetensors")).hexdigest()


def untimed(run: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_records(run / "metrics.jsonl")]


def test_a_run_from_beginning_to_end(tiny, tmp_path: Path):
    display = Recorder()
    summary = train(tiny(train={"preflight": True}), tmp_path / "run", display=display)
    assert summary.step == 12 and 12 * 256 * 0.95 < summary.tokens <= 12 * 256 and summary.stopped_because == "steps"
    records = list(read_records(tmp_path / "run/metrics.jsonl"))
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[-1]["train_loss"] < records[0]["train_loss"] < 1.1 * math.log(512)
    assert [record["step"] for record in records if "valid_loss" in record] == [4, 8, 12]
    assert set(records[0]) >= {
        "step",
        "tokens",
        "seconds",
        "train_loss",
        "lr",
        "gradient_norm",
        "tokens_per_second",
        "mfu",
        "memory_bytes",
    }
    assert records[0]["lr"] == pytest.approx(3e-3 / 2)
    assert [step for step, _, _ in display.stories] == [4, 8, 12]
    assert any("preflight: 7 checks passed" in note for note in display.notes)
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {
        "config.toml",
        "environment.json",
        "tokenizer.model",
        "metrics.jsonl",
        "samples.jsonl",
        "best",
        "latest",
        "checkpoints",
    }
    assert open_run(tmp_path / "run").step == summary.best_step
    assert summary.floor_bits_per_byte is not None and summary.floor_bits_per_byte < summary.valid_bits_per_byte


@pytest.mark.parametrize("wanted", [True, False])
def test_early_models_are_kept_to_look_back_at(wanted: bool, tiny, tmp_path: Path):
    settings = tiny(
        model={"layers": 1, "width": 16, "context": 16},
        train={
            "steps": 101,
            "batch_tokens": 32,
            "micro_batch": 2,
            "evaluate_every": 101,
            "keep": 1,
            "milestones": wanted,
        },
    )
    train(settings, tmp_path / "run")
    assert RunFolder(tmp_path / "run").steps() == ([100, 101] if wanted else [101])
    if wanted:
        assert open_run(tmp_path / "run", "100").step == 100


def test_same_seed_same_bytes_and_another_seed_other_bytes(tiny, tmp_path: Path):
    digests = []
    for name, config in (("a", tiny()), ("b", tiny()), ("c", tiny().model_copy(update={"seed": 8}))):
        train(config, tmp_path / name)
        digests.append(digest(tmp_path / name))
    assert digests[0] == digests[1] != digests[2]


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"train": {"micro_batch": 3}},
    "dropout": {"model": {"dropout": 0.2}, "train": {"micro_batch": 2}},
    "muon, wsd": {"optim": {"kind": "muon", "lr": 0.02, "schedule": "wsd"}, "model": {"qk_norm": True}},
    "bf16": {"train": {"precision": "bf16"}},
    "fused kernels": {"train": {"compile": "auto", "precision": "bf16", "micro_batch": 4}},
    "fp16 with loss scaling": {"train": {"precision": "fp16"}},
    "untied, recomputed, learned positions": {
        "model": {"tie_embeddings": False, "positions": "learned", "norm": "layernorm", "activation": "gelu"},
        "train": {"recompute": True, "micro_batch": 4},
    },
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(name: str, stop: int, tiny, tmp_path: Path):
    config = tiny(**CONFIGURATIONS[name])
    train(config, tmp_path / "straight")
    interrupt_at(config, tmp_path / "resumed", stop)
    display = Recorder()
    train(config, tmp_path / "resumed", display=display)
    assert f"resumed from step {stop}" in display.notes
    assert digest(tmp_path / "straight") == digest(tmp_path / "resumed")
    assert untimed(tmp_path / "straight") == untimed(tmp_path / "resumed")


def interrupt_at(config: RunConfig, run: Path, step: int) -> None:
    """Train until ``step`` updates are done, as a SIGTERM would."""
    folder = RunFolder(run)
    folder.lock()
    trainer = Trainer(config, folder)
    original = trainer.step

    def step_then_stop() -> None:
        original()
        if trainer.state.step == step:
            trainer.signal = signal.SIGTERM

    trainer.step = step_then_stop  # type: ignore[method-assign]
    summary = trainer.fit()
    folder.unlock()
    assert summary.stopped_because == "SIGTERM" and summary.step == step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_says_so(number: signal.Signals, tiny, tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.lock()
    display = Recorder()
    trainer = Trainer(tiny(train={"steps": 1000}), folder, display=display)
    original = trainer.step

    def step() -> None:
        original()
        if trainer.state.step == 3:
            os.kill(os.getpid(), number)

    trainer.step = step  # type: ignore[method-assign]
    before = signal.getsignal(number)
    summary = trainer.fit()
    folder.unlock()
    assert summary.stopped_because == number.name and summary.step == 3
    assert folder.choose("latest").step == 3
    assert signal.getsignal(number) is before
    assert any(number.name in note for note in display.notes)


# ── one gradient ──


def gradients(config: RunConfig, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    trainer = Trainer(config, RunFolder(folder))
    trainer.timer = trainer_module.Throughput(time.monotonic)
    torch.manual_seed(3)
    for parameter in trainer.model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    loss = trainer.accumulate(trainer.batches.tokens(0))
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 7])
def test_loss_and_gradient_do_not_depend_on_the_micro_batch(micro_batch: int, tiny, tmp_path: Path):
    loss, whole = gradients(tiny(train={"micro_batch": 8}), tmp_path)
    cut_loss, cut = gradients(tiny(train={"micro_batch": micro_batch}), tmp_path)
    assert cut_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, atol=1e-6, rtol=1e-3)


def test_the_loss_is_the_plain_mean_cross_entropy(tiny, tmp_path: Path):
    trainer = Trainer(tiny(), RunFolder(tmp_path))
    trainer.timer = trainer_module.Throughput(time.monotonic)
    batch = next(trainer.batches.micro_batches(0, 8))
    expected = torch.nn.functional.cross_entropy(
        trainer.model(batch.inputs).flatten(0, 1), batch.targets.flatten(), ignore_index=-100
    )
    assert trainer.accumulate(trainer.batches.tokens(0)) == pytest.approx(expected.item(), rel=1e-5)


def test_the_logged_loss_is_the_mean_of_all_steps_since_the_last_log(tiny, tmp_path: Path):
    train(tiny(), tmp_path / "every")
    train(tiny(train={"log_every": 4}), tmp_path / "fourth")
    each = list(read_records(tmp_path / "every/metrics.jsonl"))
    fourth = [record["train_loss"] for record in read_records(tmp_path / "fourth/metrics.jsonl")]
    ends = [0, *(record["tokens"] for record in each)]
    weights = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    expected = [
        sum(weights[i] * each[i]["train_loss"] for i in range(start, start + 4)) / sum(weights[start : start + 4])
        for start in (0, 4, 8)
    ]
    assert fourth == pytest.approx(expected, rel=1e-6)


def test_training_in_bf16_follows_fp32(tiny, tmp_path: Path):
    losses = []
    for precision in ("fp32", "bf16", "fp16"):
        train(tiny(train={"precision": precision}), tmp_path / precision)
        losses.append([record["train_loss"] for record in read_records(tmp_path / precision / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], abs=2e-2) and losses[2] == pytest.approx(losses[0], abs=2e-2)
    assert losses[1] != losses[0]


def test_clipping_scales_the_whole_gradient_to_the_limit(tiny, tmp_path: Path):
    trainer = Trainer(tiny(optim={"clip": 0.01}), RunFolder(tmp_path))
    trainer.timer = trainer_module.Throughput(time.monotonic)
    trainer.accumulate(trainer.batches.tokens(0))
    before = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    norm = trainer.unscaled_norm()
    assert norm == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in before.values())), rel=1e-5)
    trainer.clip(norm)
    assert trainer.unscaled_norm() == pytest.approx(0.01, rel=1e-3)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name] * (0.01 / norm), rtol=1e-3, atol=1e-9)


# ── what is not finite ──


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_what_is_not_finite_never_reaches_the_weights(
    poison: float, where: str, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    display = Recorder()
    trainer = Trainer(tiny(), RunFolder(tmp_path), display=display)
    trainer.timer = trainer_module.Throughput(time.monotonic)
    trainer.step()
    before = {
        name: tensor.clone()
        for name, tensor in (trainer.model.state_dict() | trainer.optimizer.state_tensors()).items()
    }
    original = trainer.accumulate

    def poisoned(tokens: int) -> float:
        loss = original(tokens)
        if where == "gradient":
            trainer.model.blocks[1].mlp.up.weight.grad[3, 5] = poison  # type: ignore[index, union-attr]
            return loss
        return poison

    monkeypatch.setattr(trainer, "accumulate", poisoned)
    trainer.step()
    after = trainer.model.state_dict() | trainer.optimizer.state_tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert trainer.state.skipped == 1 and "the weights are as before" in display.notes[-1]
    monkeypatch.undo()
    trainer.step()
    assert trainer.state.skipped_in_a_row == 0
    assert any(not torch.equal(trainer.model.state_dict()[name], before[name]) for name in trainer.model.state_dict())


def test_ten_bad_steps_in_a_row_end_the_run(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Trainer, "accumulate", lambda self, tokens: math.nan)
    monkeypatch.setattr(Trainer, "unscaled_norm", lambda self: math.nan)
    with pytest.raises(TrainingFailure, match="10 steps in a row .* lower optim.lr"):
        train(tiny(train={"steps": 50}), tmp_path)


def test_an_fp16_overflow_repeats_the_step_with_a_smaller_scale(tiny, tmp_path: Path):
    trainer = Trainer(tiny(train={"precision": "fp16"}), RunFolder(tmp_path))
    trainer.timer = trainer_module.Throughput(time.monotonic)
    assert trainer.scaler is not None
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    trainer.step()
    assert trainer.state.step == 1 and trainer.state.skipped == 0
    assert trainer.scaler.get_scale() < 2.0**60
    assert any(state for state in trainer.optimizer.parts[0].state.values())  # the update was made


def test_the_scale_is_saved_and_restored(tiny, tmp_path: Path):
    config = tiny(train={"precision": "fp16"})
    folder = RunFolder(tmp_path)
    first = Trainer(config, folder)
    first.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=7)
    first.begin()
    first.step()
    first.save()
    first.saver.wait()
    second = Trainer(config, folder)
    second.begin()
    assert second.scaler is not None and second.scaler.state_dict() == first.scaler.state_dict()
    assert second.scaler.get_scale() == 512.0


# ── stopping ──


def test_early_stopping_says_why_and_which_is_best(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bits = iter([3.0, 2.0, 2.5, 2.4, 2.2, 2.1])
    summary, notes = run_with_bits(
        tiny(train={"steps": 100, "evaluate_every": 2, "patience": 3}), tmp_path, bits, monkeypatch
    )
    assert summary.stopped_because == "patience" and summary.step == 10 and summary.best_step == 4
    assert any("no gain in 3 evaluations" in note and "best checkpoint is step 4" in note for note in notes)
    assert open_run(tmp_path, "best").step == 4 and open_run(tmp_path, "latest").step == 10


def test_early_stopping_finishes_the_cooldown(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """WSD without gain at step 6: the cooldown (half of a run) begins now and lasts as long as what was before it."""
    config = tiny(
        train={"steps": 1000, "evaluate_every": 2, "patience": 2},
        optim={"schedule": "wsd", "cooldown_fraction": 0.5, "lr": 1e-3},
    )
    summary, _ = run_with_bits(config, tmp_path, iter([2.0] + [3.0] * 50), monkeypatch)
    rates = [record["lr"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert summary.stopped_because == "patience" and summary.step == 12
    assert rates[5] == pytest.approx(1e-3)
    assert rates[6:] == pytest.approx([1e-3 * left / 6 for left in (6, 5, 4, 3, 2, 1)])


def run_with_bits(config: RunConfig, run: Path, bits, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A run whose evaluations give these bits per byte."""
    import dataclasses

    original = Trainer.evaluate

    def evaluate(self: Trainer, documents: list) -> Any:
        return dataclasses.replace(original(self, documents), bits_per_byte=next(bits, 9.0))

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    display = Recorder()
    return train(config, run, display=display), display.notes


def test_best_is_by_validation_and_survives_resume(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tiny(train={"steps": 8, "evaluate_every": 4})
    run_with_bits(config, tmp_path, iter([1.0, 5.0]), monkeypatch)
    monkeypatch.undo()
    summary = train(config.replace(train={"steps": 12}), tmp_path)
    assert summary.best_step == 4  # the bits of an untrained model do not beat 1.0


@pytest.mark.parametrize("speed", [0.06, 0.4, 1.7])
def test_a_time_budget_is_kept_within_five_percent(speed: float, tiny, tmp_path: Path):
    """The clock is ours: a step takes ``speed`` seconds, the first ten times that; scoring a token costs 0.4 of training on it,
    and a story half a second."""
    clock = SteppedClock()
    trainer = Trainer(
        tiny(train={"steps": 0, "minutes": 1.0, "evaluate_every": 0, "log_every": 50}), RunFolder(tmp_path), clock=clock
    )
    original_step, original_sample, original_evaluate = trainer.step, trainer.sample, trainer.evaluate

    def step() -> None:
        began = clock.now
        original_step()
        clock.now += speed * (10 if trainer.state.step == 1 else 1)
        trainer.timer.step_seconds[-1] = trainer.timer.window[-1] = (clock.now - began, 256)

    def sample() -> None:
        original_sample()
        clock.now += 0.5

    def evaluate(documents: list) -> Any:
        clock.now += 0.4 * speed / 256 * sum(len(document) for document in documents)
        return original_evaluate(documents)

    trainer.step, trainer.sample, trainer.evaluate = step, sample, evaluate  # type: ignore[method-assign]
    summary = trainer.fit()
    assert summary.stopped_because == "minutes"
    assert summary.seconds == pytest.approx(60.0, rel=0.05)
    assert trainer.state.plan.progress(summary.step) == 1.0


# ── what cannot be continued ──


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"model": {"layers": 3}}, "model.layers = 3 but the run was begun with 2"),
        ({"optim": {"kind": "muon"}}, "optim.kind = muon but the run was begun with adamw"),
        ({"train": {"batch_tokens": 512}}, "train.batch_tokens = 512 but the run was begun with 256"),
    ],
)
def test_another_run_is_refused(sections: dict, sentence: str, tiny, tmp_path: Path):
    train(tiny(train={"steps": 2}), tmp_path)
    with pytest.raises(UserError, match=sentence):
        train(tiny(train={"steps": 2} | sections.pop("train", {}), **sections), tmp_path)


def test_a_changed_learning_rate_is_said(tiny, tmp_path: Path):
    train(tiny(train={"steps": 2}), tmp_path)
    display = Recorder()
    train(tiny(train={"steps": 4}, optim={"lr": 1e-4}), tmp_path, display=display)
    assert "continuing with optim.lr=0.0001 (was 0.003)" in display.notes
    assert "continuing with train.steps=4 (was 2)" in display.notes


def test_other_data_is_refused(tiny, tmp_path: Path):
    from smalllm.data.prepare import prepare

    train(tiny(train={"steps": 2}), tmp_path / "run")
    prepare(["storyworld:200"], tmp_path / "other", vocab_size=512, seed=9)
    config = tiny(train={"steps": 4}).replace(data={"path": str(tmp_path / "other")})
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        train(config, tmp_path / "run")
    prepare(["storyworld:150"], tmp_path / "same", seed=9, tokenizer=tmp_path / "run/tokenizer.model")
    with pytest.raises(UserError, match="was trained on other data"):
        train(config.replace(data={"path": str(tmp_path / "same")}), tmp_path / "run")


def test_a_recipe_that_insists_on_another_vocabulary_is_refused(tiny, tmp_path: Path):
    with pytest.raises(
        UserError, match="model.vocab_size = 4096 but the data in .* has 512 pieces; set model.vocab_size=512"
    ):
        train(tiny(model={"vocab_size": 4096}), tmp_path)


def test_missing_data_says_what_to_run(tiny, tmp_path: Path):
    with pytest.raises(UserError, match="holds no prepared data; run: smalllm prepare SOURCE"):
        train(tiny().replace(data={"path": str(tmp_path / "nothing")}), tmp_path / "run")


def test_fresh_moves_the_old_run_aside(tiny, tmp_path: Path):
    config = tiny(train={"steps": 2})
    train(config, tmp_path / "run")
    old = digest(tmp_path / "run")
    summary = train(config, tmp_path / "run", fresh=True)
    assert summary.step == 2 and digest(tmp_path / "run") == old and digest(tmp_path / "run.1") == old
    assert len(list(read_records(tmp_path / "run/metrics.jsonl"))) == 2


def test_a_finished_run_is_not_trained_further(tiny, tmp_path: Path):
    train(tiny(), tmp_path)
    before = digest(tmp_path), untimed(tmp_path)
    summary = train(tiny(), tmp_path)
    assert summary.step == 12 and (digest(tmp_path), untimed(tmp_path)) == before


def test_a_full_disk_costs_a_checkpoint_not_the_run(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original, failures = RunFolder.save, iter([True, False, False, False])

    def save(self: RunFolder, snapshot, keep):  # type: ignore[no-untyped-def]
        if next(failures):
            raise OSError(28, "No space left on device")
        return original(self, snapshot, keep)

    monkeypatch.setattr(RunFolder, "save", save)
    display = Recorder()
    summary = train(tiny(), tmp_path, display=display)
    assert summary.step == 12 and any("the disk is full; the older ones are whole" in note for note in display.notes)


def test_a_full_disk_at_the_end_is_an_error(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: RunFolder, snapshot, keep):  # type: ignore[no-untyped-def]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "save", full)
    with pytest.raises(TrainingFailure, match="the disk is full; mend that and run the same command again"):
        train(tiny(), tmp_path)


def test_out_of_memory_halves_the_micro_batch_without_losing_the_step(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(tiny(), tmp_path / "straight")
    original = Trainer._accumulate

    def tight(self: Trainer, tokens: int) -> float:
        if self.micro_batch > 2:
            original(self, tokens)  # memory ran out after some gradients were made
            raise torch.OutOfMemoryError("no memory")
        return original(self, tokens)

    monkeypatch.setattr(Trainer, "_accumulate", tight)
    display = Recorder()
    train(tiny(), tmp_path / "tight", display=display)
    assert [note for note in display.notes if "out of memory" in note] == [
        f"out of memory: going on with train.micro_batch={size} (the same mathematics)" for size in (4, 2)]  # fmt: skip
    straight, halved = (
        [r["train_loss"] for r in read_records(tmp_path / name / "metrics.jsonl")] for name in ("straight", "tight")
    )
    assert halved == pytest.approx(straight, rel=1e-4)


def test_a_compiler_that_fails_is_survived(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from smalllm.model import Block

    train(tiny(), tmp_path / "eager")

    def broken(self: Block) -> None:
        def fail(*args: Any) -> None:
            raise RuntimeError("the compiler is broken")

        self._compiled_call_impl = fail  # type: ignore[assignment]

    monkeypatch.setattr(Block, "compile", broken)
    monkeypatch.setattr(kernels, "supports", lambda config: False)
    display = Recorder()
    train(tiny(train={"compile": "on"}), tmp_path / "compiled", display=display)
    assert "torch.compile failed (RuntimeError); going on without it" in display.notes
    assert digest(tmp_path / "eager") == digest(tmp_path / "compiled")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.01)])
def test_the_fast_path_learns_what_the_plain_one_learns(tiny, tmp_path: Path, precision: str, tolerance: float):
    """The same losses step by step, to rounding: 40 steps, at which the loss has fallen by more than a tenth."""
    losses = {}
    for wish in ("auto", "off"):
        optim = {"kind": "muon", "lr": 0.02, "adam_lr": 0.003, "warmup_steps": 2}
        train(tiny(train={"steps": 40, "compile": wish, "precision": precision}, optim=optim), tmp_path / wish)
        losses[wish] = [r["train_loss"] for r in read_records(tmp_path / wish / "metrics.jsonl")]
    assert losses["auto"] == pytest.approx(losses["off"], rel=tolerance)
    assert losses["auto"] != losses["off"] and losses["auto"][-1] < 0.9 * losses["auto"][0]


@pytest.mark.usefixtures("native")
def test_preflight_examines_the_path_that_trains(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = kernels.hidden
    monkeypatch.setattr(kernels, "hidden", lambda model, x, starts: original(model, x.flip(1), starts).flip(1))
    train = {"preflight": True, "compile": "auto", "precision": "bf16"}
    with pytest.raises(UserError, match="preflight check failed: no logit sees the future"):
        Trainer(tiny(train=train), RunFolder(tmp_path)).fit()
    Trainer(tiny(train=train | {"compile": "off"}), RunFolder(tmp_path)).begin()


@pytest.mark.usefixtures("native")
def test_a_run_that_goes_on_with_other_kernels_says_so(tiny, tmp_path: Path):
    interrupt_at(tiny(train={"compile": "auto"}), tmp_path, 4)
    display = Recorder()
    train(tiny(train={"compile": "off"}), tmp_path, display=display)
    assert "blocks run plain instead of native: the run goes on, but not bit for bit" in display.notes


def test_evaluation_set_is_fixed_and_within_its_share(tiny, tmp_path: Path):
    trainer = Trainer(tiny(train={"steps": 1000, "evaluate_tokens": 0, "evaluate_every": 100}), RunFolder(tmp_path))
    chosen = sum(len(document) for document in trainer._validation_documents())
    scored, trained = chosen * 0.5, 100 * 256  # scoring a token costs about half of training on it
    assert 0 < scored / trained < 0.02
    trainer.state.plan = Plan(5)
    assert sum(len(document) for document in trainer._validation_documents()) == chosen


def test_no_secret_reaches_the_run_folder(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    canary = "hf_canary_7d1e"
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, canary)
    train(tiny(train={"steps": 4}), tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8 and not [path for path in files if canary.encode() in path.read_bytes()]


def test_config_in_the_run_folder_runs_it_again(tiny, tmp_path: Path):
    from smalllm.config import load_recipe

    train(tiny(), tmp_path / "first")
    train(load_recipe(tmp_path / "first/config.toml"), tmp_path / "again")
    assert digest(tmp_path / "first") == digest(tmp_path / "again")


@pytest.mark.parametrize("asked", [False, True])
def test_recomputation_that_nobody_asked_for_is_said(asked: bool, tiny, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hardware, "total_memory", lambda device: 1)
    monkeypatch.setattr("smalllm.runtime.CHECKPOINTING_BYTES", 0)  # more than so small a model can save
    display = Recorder()
    trainer = Trainer(tiny(train={"micro_batch": 0, "recompute": asked}), RunFolder(tmp_path), display=display)
    trainer.begin()
    assert trainer.model.recompute and trainer.micro_batch == 1
    said = "to fit into memory: train.recompute=true with train.micro_batch=1 (the same mathematics, slower)"
    assert (said in display.notes) == (not asked)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert (environment["recompute"], environment["micro_batch"]) == (True, 1)


def test_environment_tells_the_machine(tiny, tmp_path: Path):
    train(tiny(train={"steps": 2}), tmp_path, command="smalllm train tiny")
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["command"] == "smalllm train tiny"
    assert environment["precision"] == "fp32" and environment["threads"] == torch.get_num_threads()


def test_a_resumed_run_keeps_its_division_unless_memory_is_scarcer(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = tiny(train={"micro_batch": 0, "memory_gb": 8.0, "steps": 2})
    train(settings, tmp_path / "run")
    for fitting, expected in ((64, 8), (2, 2)):
        monkeypatch.setattr(trainer_module, "fit_memory", lambda *given, size=fitting: Fit(size, False, 0))
        trainer = Trainer(settings, RunFolder(tmp_path / "run"))
        trainer.begin()
        trainer.prefetch.close()
        trainer.folder.unlock()
        assert trainer.micro_batch == expected
