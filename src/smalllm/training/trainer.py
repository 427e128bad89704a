"""The loop. What happens in training stands in ``Trainer.fit`` and ``Trainer.step``, each on one screen.

Everything that will happen is a function of (settings, seed, step): data order, dropout, learning rate. A checkpoint
holds tensors and a few numbers, and a resumed run has the weights, bit for bit, of the run that was never stopped.
The trainer prints nothing: it tells a ``Display``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smalllm import hardware
from smalllm.checkpoint import (
    RunFolder,
    Snapshot,
    assemble,
    check_weights,
    copy_weights,
    is_milestone,
    model_weights,
)
from smalllm.config import RunConfig, UserError, changed_settings
from smalllm.data.batches import Batches, Prefetch
from smalllm.data.prepare import PrepareProgress
from smalllm.evaluation import Evaluation, storyworld_floor
from smalllm.files import Untouched, no_space_left
from smalllm.generation import Generator, SamplingParams
from smalllm.metrics import Display, MetricsLog, Record, Silence, Sinks, Throughput, json_safe, model_flops_utilization
from smalllm.model import GPT
from smalllm.native import build
from smalllm.ngrams import Floors, floors, newly_beaten
from smalllm.preflight import preflight, require
from smalllm.ranks import ALONE, Ranks, gathered, joined, local
from smalllm.runtime import (
    Execution,
    Runtime,
    accelerate,
    eager,
    fit_memory,
    forget_compiled,
    make_runtime,
    seed_everything,
    set_deterministic,
)  # fmt: skip
from smalllm.training.alarm import Alarm, zero_share
from smalllm.training.guards import SpikeGuard, TrainingFailure, failure_report, gradient_norms, signals
from smalllm.training.objectives import SummedLoss
from smalllm.training.optimizer import Optimizer
from smalllm.training.past import Past, newest
from smalllm.training.saver import Saver
from smalllm.training.schedule import Plan, lr_fraction
from smalllm.training.setting_out import common_facts, divisible, open_data, settled
from smalllm.training.state import UNPLANNED, State, Summary
from smalllm.training.validation import EVALUATIONS, FINAL_TOKENS, affordable_tokens, first_documents, score_together
from smalllm.training.verify import Verifier

SKIPS_IN_A_ROW = 10
ROLLBACKS = 3
"""Times that a run goes back to its last checkpoint because of spikes, before it gives up."""


class _Interrupted(Exception):
    """A signal came during an evaluation."""


class Trainer:
    """One run: made once, ``fit`` once. The folder must be locked by the caller. With several ``ranks`` each has a trainer, and
    all of them come to the same calls in the same order; the first writes and speaks."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, *, display: Display | None = None,
        progress: Callable[[PrepareProgress], None] | None = None, clock: Callable[[], float] = time.monotonic,
        command: str = "", force: bool = False, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.clock, self.force, self.ranks = clock, force, ranks
        self.folder, self.display, self.command = folder, display or Silence(), command
        self.runtime: Runtime = make_runtime(config.train.device, config.train.precision, ranks)
        set_deterministic(self.runtime.device)
        self.dataset = open_data(config, progress, ranks)
        self.started = clock()  # preparing the data is not training time
        self.config = settled(config, self.dataset)
        self.tokenizer = self.dataset.tokenizer()
        model, train = self.config.model, self.config.train
        divisible(self.config, ranks)
        ranks.must_agree(common_facts(self.config, self.dataset, self.runtime))
        self.batches = Batches(
            self.dataset.train, model.context, train.batch_tokens, self.config.seed, self.config.data.packing
        )
        self.prefetch = Prefetch(
            self.batches,
            pin=self.runtime.device.type == "cuda",
            warn=self.display.note,
            rank=ranks.rank,
            world=ranks.world,
        )
        seed_everything(self.config.seed)
        self.model = GPT(model).to(self.runtime.device).train()
        self.sharded = train.parallel == "fsdp" and not ranks.lone
        if self.sharded:
            ranks.shard(self.model, list(self.model.blocks), self.runtime.device)
        self.optimizer = Optimizer(self.model, self.config.optim, self.runtime.device, ranks)
        self.scaler = self.runtime.make_scaler()
        fit = fit_memory(self.model, self.runtime, self.config)
        self.micro_batch = -int(ranks.most(-fit.micro_batch)[0])
        self.model.recompute = bool(ranks.most(fit.recompute)[0])
        self.state = State(plan=Plan(train.steps or UNPLANNED))
        self.spikes = SpikeGuard(train.spike_sigmas)
        self.verifier = Verifier(train.verify_every, self.model, self.optimizer, ranks)
        self.floors: Floors | None = None
        self.alarm = self.make_alarm()
        self.log_file = MetricsLog(folder.metrics_file, folder.files)
        self.sample_file = MetricsLog(folder.samples_file, folder.files)
        self.saver = Saver(folder, train.keep, (self.log_file, self.sample_file))
        self.record: Record = {}
        self.execution: Execution = "plain"
        self.loss: torch.nn.Module = SummedLoss(self.model, self.runtime.dtype, self.execution)
        self.signal = self.heard = 0  # what came here, and what all ranks know of

    # ── the loop ──

    def fit(self) -> Summary:
        """Train to the end of the plan, or until stopped; returns how it went. The last checkpoint is always written."""
        echo = not self.ranks.lone
        with signals(self.heed, echo), contextlib.closing(self.prefetch), self._reported():
            self.count_floors()
            self.begin()
            while not self.finished():
                self.step()
                self.hear_of_failures()
                self.state.evaluation_due = self.due_evaluation()
                if self.state.evaluation_due or self.due(self.config.train.log_every):
                    self.log()
                if self.config.train.milestones and is_milestone(self.state.step):
                    self.save_milestone()
                if self.due_checkpoint():
                    self.save()  # before evaluation: a failing evaluation loses nothing
                if self.state.evaluation_due:
                    self.validate()
                self.write_record()
                self.replan()
            return self.end()

    def step(self) -> None:
        """One optimizer step: accumulate, unscale, clip, check, update. What is not finite never reaches the weights."""
        state, train_start = self.state, self.clock()
        lr = self.optimizer.set_lr(lr_fraction(self.config.optim, state.step, state.plan.progress(state.step)))
        tokens = self.batches.tokens(self.data_step)
        loss = self.gradient(tokens)
        norm = self.unscaled_norm()
        while self.scaler is not None and not math.isfinite(norm) and self.scaler.get_scale() > 1.0:
            self.scaler.update()  # fp16 overflowed: the same step again with a smaller scale, so nothing is lost
            self.optimizer.zero_grad()
            loss = self.gradient(tokens)
            norm = self.unscaled_norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skip(loss, norm)
        elif self.spikes.is_spike(loss, norm):
            self.skip_spike(loss, norm)
        else:
            self.clip(norm)
            self.optimizer.step()
            self.verifier.seal()
            state.skipped_in_a_row = state.spikes_in_a_row = 0
            state.window_loss += loss * tokens
            state.window_tokens += tokens
        if self.scaler is not None:
            self.scaler.update()
        self.listen(loss, lr)
        self.optimizer.zero_grad()
        state.step += 1
        state.tokens += tokens
        self.timer.add(self.clock() - train_start, tokens)
        self.record = {"lr": lr, "gradient_norm": norm}
        if self.saver.thread is None and self.ranks.first and not self.sharded:
            self.saver.make_room(self.snapshot())  # the first step of a session: the optimizer has its state now

    def gradient(self, tokens: int) -> float:
        """Accumulate the step's gradient; every ``train.verify_every`` steps a second time, which must give the same bits."""
        step, loss = self.state.step + 1, self.accumulate(tokens)
        if self.verifier.due(step):
            micro_batch, first = self.micro_batch, self.verifier.gradient()
            self.optimizer.zero_grad()
            loss = self.accumulate(tokens)
            if self.micro_batch == micro_batch:
                self.verifier.check_gradient(first, step)
        self.verifier.check_resting(step)
        return loss

    def accumulate(self, tokens: int) -> float:
        """Gradient of (sum of losses) / tokens over the micro-batches of the step; returns that loss."""
        try:
            return self._accumulate(tokens)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not hardware.is_out_of_memory(error):
                self._forget_compiler(error)
            elif self.micro_batch == 1:
                raise TrainingFailure(
                    "out of memory with one sequence at a time; set model.context or model.width lower, or train.recompute=true"
                ) from None
            elif not self.ranks.lone:  # the others are in the midst of their exchange and cannot begin the step anew
                raise TrainingFailure(
                    f"rank {self.ranks.rank} is out of memory with train.micro_batch = {self.micro_batch}; set it to"
                    f" {self.micro_batch // 2}, the mathematics is the same"
                ) from None
            else:
                self.micro_batch //= 2
                self.display.note(
                    f"out of memory: going on with train.micro_batch={self.micro_batch} (the same mathematics)"
                )
        except Exception as error:
            self._forget_compiler(error)
        self.optimizer.zero_grad()
        return self.accumulate(tokens)

    def _forget_compiler(self, error: Exception) -> None:
        """Go on without torch.compile if that may be what failed; else raise."""
        if not (self.execution == "compiled" and self.timer.steps == 0 and self.ranks.lone):
            raise error
        forget_compiled(self.model)
        self.execution = "plain"
        self.loss = SummedLoss(self.model, self.runtime.dtype, "plain")
        self.display.note(f"torch.compile failed ({type(error).__name__}); going on without it")

    def _accumulate(self, tokens: int) -> float:
        total = torch.zeros((), device=self.runtime.device)
        batches = self.prefetch.step(self.data_step, self.micro_batch)
        share = tokens / self.ranks.world  # gradients are averaged over ranks
        for index, batch in enumerate(batches):
            if self.config.model.dropout:
                place = () if self.ranks.lone else (self.ranks.rank,)
                seed_everything(self.config.seed, self.state.step, index, *place)
            with self.ranks.micro_batch(self.loss, self.model, index + 1 == len(batches)):
                with self.runtime.autocast():
                    loss = self.loss(batch.to(self.runtime.device)) / share
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total += loss.detach()
        return self.ranks.sum(total.item() / self.ranks.world)[0]

    def unscaled_norm(self) -> float:
        """Norm of the whole gradient, after loss scaling is undone."""
        if self.scaler is not None:
            for part in self.optimizer.parts:
                self.scaler.unscale_(part)  # type: ignore[arg-type]  # it reads param_groups alone
        norm = torch.nn.utils.get_total_norm(self._gradients()).item()
        return math.sqrt(self.ranks.sum(norm**2)[0]) if self.sharded else norm

    def _gradients(self) -> list[torch.Tensor]:
        return [local(p.grad) for p in self.model.parameters() if p.grad is not None]

    def clip(self, norm: float) -> None:
        """Scale the gradient down to norm ``optim.clip`` if it is longer (Pascanu et al., arXiv 1211.5063)."""
        limit = self.config.optim.clip
        if limit and norm > limit:
            torch._foreach_mul_(self._gradients(), limit / (norm + 1e-6))

    def skip(self, loss: float, norm: float) -> None:
        """Count a step whose loss or gradient is not finite; ten in a row end the run."""
        self.state.skipped += 1
        self.state.skipped_in_a_row += 1
        self.display.note(
            f"step {self.state.step + 1} skipped: loss {loss}, gradient norm {norm}; the weights are as before"
        )
        if self.state.skipped_in_a_row >= SKIPS_IN_A_ROW:
            raise TrainingFailure(
                f"{SKIPS_IN_A_ROW} steps in a row had a loss or gradient that is not finite, the last at step"
                f" {self.state.step + 1}; lower optim.lr, or set train.precision=fp32"
            )

    def skip_spike(self, loss: float, norm: float) -> None:
        """Leave out the update of a step that stands out; ten in a row lead back to the last checkpoint."""
        state = self.state
        state.skipped += 1
        state.spikes_in_a_row += 1
        self.display.note(
            f"step {state.step + 1} skipped: loss {loss:.3f} or gradient norm {norm:.3f} stands out by more than"
            f" train.spike_sigmas={self.spikes.sigmas:g}; the weights are as before"
        )
        if state.spikes_in_a_row >= SKIPS_IN_A_ROW:
            self.roll_back()

    def roll_back(self) -> None:
        """Go on from the last checkpoint, with other data than led here."""
        step, rollbacks, seconds, plan = self.state.step, self.state.rollbacks, self.seconds(), self.state.plan
        self.saver.wait()
        self.folder.drop_after(
            step + 1 - self.state.spikes_in_a_row
        )  # what was saved among the spikes leads there again
        checkpoint = self.newest()
        if checkpoint is None or rollbacks >= ROLLBACKS:
            raise TrainingFailure(
                f"{SKIPS_IN_A_ROW} steps in a row stood out, the last at step {step + 1}, after {rollbacks} rollbacks;"
                " lower optim.lr, look at the data, or set train.spike_sigmas=0"
            )
        self.restore(checkpoint)
        state = self.state
        state.rollbacks, state.seconds, state.spikes_in_a_row = rollbacks + 1, seconds, 0
        state.passed_over += step + 1 - state.step
        state.plan, self.started = plan if self.config.train.minutes else state.plan, self.clock()
        self.rewind_logs()
        self.optimizer.zero_grad()
        self.display.note(f"back to step {state.step}; the data of the {step + 1 - state.step} steps since is left out")

    def listen(self, loss: float, lr: float) -> None:
        """Say it when the run is behind what a healthy one has learned by now. Only looks."""
        step = self.state.step + 1
        progress = self.state.plan.progress(step) if self.state.plan.steps < UNPLANNED else 0.0
        for words in self.alarm.hear(step, loss, lr / self.config.optim.lr, progress, lambda: zero_share(self.model)):
            self.display.note(words)

    # ── beginning and end ──

    def count_floors(self) -> None:
        """Learn what counting n-grams predicts of this data; the second that it takes once is not training time."""
        began = self.clock()
        with self.ranks.one_by_one("floors"):
            self.floors = floors(self.dataset)
        self.state.floors = [dataclasses.asdict(floor) for floor in self.floors.on()] if self.floors else []
        self.alarm = self.make_alarm()
        self.started += self.clock() - began

    def make_alarm(self) -> Alarm:
        return Alarm(self.floors.on() if self.floors else [], self.runtime.precision, self.config.optim.lr)

    def begin(self) -> None:
        """Resume from the newest checkpoint that verifies, or check everything and start."""
        self.timer = Throughput(self.clock)
        self.folder.sweep()
        checkpoint = self.newest()
        if checkpoint is not None:
            self.resume(checkpoint)
        else:
            self.folder.files.mkdir(self.folder.path)
            self.rewind_logs()  # of a run that was killed before its first checkpoint
            self.folder.write_bytes(self.folder.tokenizer_file, self.tokenizer.model_bytes)
        self.check_room()
        self.accelerate(checkpoint)
        if self.model.recompute and not self.config.train.recompute:
            self.display.note(
                f"to fit into memory: train.recompute=true with train.micro_batch={self.micro_batch}"
                " (the same mathematics, slower)"
            )
        if checkpoint is None and self.config.train.preflight:
            self.preflight()
        self.verifier.seal()
        self.folder.write_text(self.folder.config_file, self.config.to_toml())
        self.folder.write_text(self.folder.environment_file, json.dumps(self.environment(), indent=1) + "\n")
        self.sinks = Sinks(
            self.config.train.track, self.folder.path, self.config.name, self.config.model_dump(), self.display.note
        )
        if self.state.evaluation_due:  # the run was killed between a checkpoint and its evaluation
            self.validate()
        self.write_record()
        self.replan()  # as the run that was not killed did after its checkpoint

    def preflight(self) -> None:
        """Find in seconds what would cost the run; UserError that names the check."""
        batch = next(self.batches.micro_batches(0, 2)).to(self.runtime.device)
        model = assemble(self.config.model, self._weights(), "").to(self.runtime.device) if self.sharded else self.model
        with eager(self.execution == "compiled"):
            checks = preflight(model, self.tokenizer, self.dataset, batch)
        require(checks)
        self.display.note(
            f"preflight: {len(checks)} checks passed ({next(c.detail for c in checks if 'first loss' in c.name)})"
        )

    def accelerate(self, checkpoint: Past | None) -> None:
        """Run the blocks as fast as this machine can; a resumed run as it did before, since other kernels round otherwise."""
        build.wait()
        wish, before = self.config.train.compile, checkpoint.state().get("execution") if checkpoint else None
        if wish == "auto" and (before == "plain" or (self.sharded and self.runtime.device.type == "cpu")):
            wish = "off"  # fused kernels read whole weights
        pays = before == "compiled" or self.compile_pays()
        self.execution, reason = accelerate(self.model, wish, pays, self.runtime)
        self.ranks.must_agree({"how their blocks run (a C++ compiler, train.compile)": self.execution})
        self.loss = SummedLoss(self.model, self.runtime.dtype, self.execution)
        if not self.ranks.lone and not self.sharded:
            self.loss = self.ranks.shared(self.loss)
        if checkpoint is None and self.execution == "plain":
            self.display.note(f"training runs without fused kernels: {reason}")
        elif before not in (None, self.execution):
            self.display.note(f"blocks run {self.execution} instead of {before}: the run goes on, but not bit for bit")

    def compile_pays(self) -> bool:
        """Compiling costs 15 to 40 s and gains about a fifth: it pays from some four minutes of training."""
        train = self.config.train
        speed = 0.3 * self.ranks.world * self.runtime.peak_flops() / self.model.flops_per_token()
        seconds = train.steps * train.batch_tokens / speed if train.steps else math.inf
        return min(seconds, train.minutes * 60 or math.inf) > 240

    def newest(self) -> Past | None:
        """The newest checkpoint that verifies, found and read by the first rank."""
        return newest(self.folder, self.ranks, self.display.note)

    def resume(self, checkpoint: Past) -> None:
        """Restore everything that the future depends on; say what has changed since."""
        stored = checkpoint.state()
        if "training" not in stored:
            return self.adopt(checkpoint)
        self._refuse_other_run(stored)
        old = checkpoint.settings()
        for change in changed_settings(old, self.config, self.force):
            self.display.note(f"continuing with {change}")
        self.restore(checkpoint)
        if stored["flavour"] != self.optimizer.flavour or stored["precision"] != self.runtime.precision:
            self.display.note(
                f"this machine computes with {self.optimizer.flavour}, {self.runtime.precision} instead of"
                f" {stored['flavour']}, {stored['precision']}: the run goes on, but not bit for bit"
            )
        if not self.config.train.micro_batch:  # the same division gives the same bits; a smaller budget wins
            fewer = self.config.train.memory_gb or not self.ranks.lone
            self.micro_batch = min(stored["micro_batch"], self.micro_batch) if fewer else stored["micro_batch"]
        self._keep_plan(old)
        if self.state.best_step != self.folder.best_step():  # the hint of a checkpoint that was never finished
            self.folder.mark_best(self.state.best_step)
        self.rewind_logs()
        self.display.note(f"resumed from step {self.state.step}")

    def restore(self, checkpoint: Past) -> None:
        """Weights, optimizer, loss scaling and numbers as they were when the checkpoint was saved."""
        stored = checkpoint.state()
        self._copy_weights(checkpoint)
        self.optimizer.load_state_tensors(checkpoint.optimizer())
        if self.scaler is not None and stored["scaler"]:
            self.scaler.load_state_dict(stored["scaler"])
        self.state, self.record = State.from_json(stored["training"]), stored["record"]
        self.spikes.restore(self.state.spike_window)
        self.alarm.restore(self.state.alarm)
        if self.state.timer:
            self.timer.restore(self.state.timer)
        self.verifier.seal()

    @torch.no_grad()
    def _copy_weights(self, checkpoint: Past) -> None:
        weights = checkpoint.weights()
        if not self.sharded:
            return copy_weights(self.model, weights, str(checkpoint.path))
        check_weights(self.model, weights, str(checkpoint.path))
        for name, parameter in self.model.named_parameters():
            local(parameter).copy_(self.ranks.part_of(weights[name], parameter))

    def adopt(self, checkpoint: Past) -> None:
        """Begin with the weights of a model that was imported: they are all that its checkpoint holds."""
        self._refuse_other_tokenizer(checkpoint.state())
        if checkpoint.model_config() != self.config.model.model_copy(update={"dropout": 0.0}):
            raise UserError(f"{checkpoint.path} has another shape than [model] says; train {self.folder.config_file}")
        self._copy_weights(checkpoint)
        self.display.note("training goes on from the imported model")

    def rewind_logs(self) -> None:
        """Drop what was logged after the state that training goes on from: no step twice, none missing. A checkpoint is
        written before the record of its step, which it holds, so that the record is written again."""
        self.log_file.rewind(self.state.step - 1)
        self.sample_file.rewind(self.state.step - 1 if self.state.evaluation_due else self.state.step)

    def _refuse_other_tokenizer(self, stored: dict[str, Any]) -> None:
        if stored["tokenizer_fingerprint"] != self.tokenizer.fingerprint:
            raise UserError(
                f"run {self.folder.path} was trained with another tokenizer than the data in {self.dataset.folder};"
                f" prepare data with --tokenizer {self.folder.tokenizer_file}, or start another run with --out"
            )

    def _refuse_other_run(self, stored: dict[str, Any]) -> None:
        self._refuse_other_tokenizer(stored)
        if stored["data_fingerprint"] == self.dataset.fingerprint:
            return
        if not self.force:
            raise UserError(
                f"run {self.folder.path} was trained on other data than {self.dataset.folder} holds; give its own data with"
                " --data, start another run with --out, or go on with this data by --force"
            )
        self.display.note(f"continuing with other data: {self.dataset.folder}")

    def _keep_plan(self, old: RunConfig) -> None:
        """A run continued as it was keeps its plan; one with another length gets a new one."""
        train, before = self.config.train, old.train
        if (train.steps, train.minutes) != (before.steps, before.minutes):
            self.state.stopping = ""
            done = min(0.99, self.state.seconds / (60 * train.minutes)) if train.minutes else 0.0
            self.state.plan = Plan(train.steps or UNPLANNED, self.state.step if done else 0, done)

    def finished(self) -> bool:
        """Whether to stop before the next step; notes why."""
        state = self.state
        self.heard = int(self.ranks.most(self.signal)[0])
        if self.heard:
            return True
        if state.step >= state.plan.steps:
            state.stopping = state.stopping or ("minutes" if self._limited_by_time() else "steps")
        return bool(state.stopping) and (state.stopping != "patience" or state.step >= state.plan.steps)

    def end(self) -> Summary:
        """Save what is not saved, judge the model on the whole validation split, and sum up."""
        self.save_for_good()
        for log in (self.log_file, self.sample_file):
            self._written(log, log.flush)
        if self.heard:
            return self._summary(signal.Signals(self.heard).name, None, None)
        documents = first_documents(self.dataset, max(FINAL_TOKENS, self.state.evaluate_tokens))
        try:
            evaluation = self.evaluate(documents)
        except _Interrupted:
            return self._summary(signal.Signals(self.signal).name, None, None)
        because = self.state.stopping
        self.sinks.write({"step": self.state.step, "final_bits_per_byte": evaluation.bits_per_byte})
        return self._summary(
            because, evaluation, storyworld_floor([self.tokenizer.decode(ids.tolist()) for ids in documents])
        )

    def _summary(self, because: str, evaluation: Evaluation | None, floor: float | None) -> Summary:
        records = (
            [json.loads(line) for line in self.folder.metrics_file.read_text().splitlines()]
            if self.folder.metrics_file.exists()
            else []
        )
        train_losses = [record["train_loss"] for record in records if "train_loss" in record]
        speed = self.state.tokens / max(self.seconds(), 1e-9)
        return Summary(
            run=str(self.folder.path), step=self.state.step, tokens=self.state.tokens, seconds=round(self.seconds(), 3),
            tokens_per_second=round(speed, 1), mfu=round(self.mfu(speed), 4),
            train_loss=train_losses[-1] if train_losses else None,
            valid_loss=evaluation.loss if evaluation else math.nan,
            valid_bits_per_byte=evaluation.bits_per_byte if evaluation else self.state.best_bits_per_byte,
            best_step=self.state.best_step, stopped_because=because, floor_bits_per_byte=floor,
        )  # fmt: skip

    # ── cadence ──

    @property
    def data_step(self) -> int:
        """The step of the data that this step reads."""
        return self.state.step + self.state.passed_over

    def due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step >= self.state.plan.steps

    def due_evaluation(self) -> bool:
        """Every ``evaluate_every`` steps, or ten times a run; always after the last step."""
        every, state = self.config.train.evaluate_every, self.state
        now, before = (
            math.floor(EVALUATIONS * state.plan.progress(step) + 1e-9) for step in (state.step, state.step - 1)
        )
        return self.due(every) if every else now > before

    def due_checkpoint(self) -> bool:
        """Every ``checkpoint_every`` steps, and before each evaluation, so that the best one can be kept."""
        every, calm = self.config.train.checkpoint_every, not self.state.spikes_in_a_row
        return self.state.evaluation_due or bool(every) and calm and self.due(every)

    def seconds(self) -> float:
        """Training time of all sessions of the run."""
        return self.state.seconds + self.clock() - self.started

    def _limited_by_time(self) -> bool:
        train = self.config.train
        return bool(train.minutes) and self.state.step != train.steps

    def replan(self) -> None:
        """With a time budget: from the speed so far, find the step at which the budget is used up."""
        if self.config.train.minutes:
            self._replan()
            self.state.plan = Plan(**self.ranks.tell(dataclasses.asdict(self.state.plan)))  # clocks differ

    def _replan(self) -> None:
        train, state = self.config.train, self.state
        if state.stopping or not self.timer.due_to_plan(train.minutes * 60):
            return
        evaluations_left = EVALUATIONS * (1.0 - state.plan.progress(state.step))
        left = (
            train.minutes * 60
            - self.seconds()
            - evaluations_left * self.state.evaluation_seconds
            - self.final_seconds()
        )
        steps = state.step + max(1, int(left / self.timer.seconds_per_step()))
        if state.step < state.plan.steps:
            state.plan = state.plan.replanned(state.step, min(steps, train.steps or UNPLANNED))

    def final_seconds(self) -> float:
        """What the evaluation at the end will take: scoring a token costs about half of training on it."""
        return 0.5 * min(self.dataset.valid.tokens, FINAL_TOKENS) * self.timer.seconds_per_token()

    # ── saying and keeping ──

    def log(self) -> None:
        """Fill the record of this step: the loss is the mean over all steps since the last log."""
        state, speed = self.state, self.timer.tokens_per_second()
        self.record |= {
            "tokens": state.tokens, "epoch": round(self.batches.epoch(state.step), 4), "seconds": round(self.seconds(), 3),
            "train_loss": state.window_loss / state.window_tokens if state.window_tokens else math.nan,
            "tokens_per_second": round(speed, 1), "mfu": round(self.mfu(speed), 4),
            "memory_bytes": hardware.peak_memory(self.runtime.device), "skipped": state.skipped,
            "data_wait": round(self.timer.share(self.prefetch.waited), 4),
        }  # fmt: skip
        state.window_loss, state.window_tokens = 0.0, 0
        self.timer.start_window()
        if not state.evaluation_due:  # the evaluation will show it
            self.show()

    def show(self) -> None:
        """Tell the display where the run stands."""
        progress = self.state.plan.progress(self.state.step) if self.state.plan.steps < UNPLANNED else 0.0
        left = (self.state.plan.steps - self.state.step) * self.timer.seconds_per_step()
        eta = left + EVALUATIONS * (1.0 - progress) * self.state.evaluation_seconds if progress else math.nan
        self.display.progress({"step": self.state.step, **self.record, "progress": progress, "eta_seconds": eta})

    def write_record(self) -> None:
        """Append the object of this step to metrics.jsonl, if it was logged or evaluated."""
        if "train_loss" in self.record or "valid_loss" in self.record:
            self.folder.check_locked()
            record = {"step": self.state.step, **self.record}
            self._written(self.log_file, lambda: self.log_file.append(record))
            self.sinks.write(record)

    def _written(self, log: MetricsLog, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self.display.note(f"{log.path} cannot be written now: {_reason(error)}; its lines are kept until it can")

    def mfu(self, tokens_per_second: float) -> float:
        peak = self.ranks.world * self.runtime.peak_flops()
        return model_flops_utilization(tokens_per_second, self.model.flops_per_token(), peak)

    def save(self) -> None:
        """Have a checkpoint of this step written while training goes on."""
        self.folder.check_locked()
        self.verifier.check_resting(self.state.step)
        snapshot = self.snapshot()  # all ranks: parts of it may lie with any of them
        if self.ranks.first:
            self.saver.save(snapshot)

    def save_milestone(self) -> None:
        """Have the weights of this step kept to be looked back at."""
        self.verifier.check_resting(self.state.step)
        snapshot = self.snapshot()
        if self.ranks.first:
            self.saver.save_milestone(snapshot)

    def save_for_good(self) -> None:
        """The checkpoint of this step is on the disk when this returns; TrainingFailure when it cannot be."""
        self.saver.wait()
        self.hear_of_failures()
        if self.ranks.tell(
            self.state.step in (0, self.folder.newest_step())
        ):  # a signal may come before the first step
            return
        self.save()
        self.saver.wait()
        for unsaved in self.saver.failures():
            raise TrainingFailure(
                f"{unsaved.what} could not be written to {self.folder.path}: {_reason(unsaved.error)}; mend that and run the"
                f" same command again to go on from step {self.folder.newest_step() or 0}"
            )

    def hear_of_failures(self) -> None:
        """A checkpoint that could not be written costs that checkpoint, not the run."""
        for unsaved in self.saver.failures():
            self.display.note(
                f"{unsaved.what} could not be written to {self.folder.path}: {_reason(unsaved.error)}; the older ones are whole,"
                " training goes on"
            )

    def check_room(self) -> None:
        """UserError when the disk has no room for a single checkpoint."""
        need, free = 12 * self.model.parameters_count(), self.folder.files.free_bytes(self.folder.path)
        if free < need:
            raise UserError(
                f"{self.folder.path} has {free / 2**20:.0f} MiB of free space and a checkpoint of this model takes"
                f" {need / 2**20:.0f} MiB; free some, or choose a folder on another disk with --out"
            )

    def snapshot(self) -> Snapshot:
        """All that training needs to go on from here."""
        state = dataclasses.replace(
            self.state, seconds=self.seconds(), spike_window=self.spikes.to_json(), timer=self.timer.to_json(),
            alarm=self.alarm.to_json(),
        )  # fmt: skip
        return Snapshot(
            step=state.step, model=self.config.model, weights=self._weights(),
            optimizer=self.optimizer.state_tensors(),
            state={
                "training": state.to_json(), "record": json_safe(self.record),
                "scaler": self.scaler.state_dict() if self.scaler else None, "micro_batch": self.micro_batch,
                "execution": self.execution, "flavour": self.optimizer.flavour, "precision": self.runtime.precision,
                "tokenizer_fingerprint": self.tokenizer.fingerprint, "data_fingerprint": self.dataset.fingerprint,
            },
        )  # fmt: skip

    def _weights(self) -> dict[str, torch.Tensor]:
        """Of the whole model; all ranks must call this."""
        if not self.sharded:
            return model_weights(self.model)
        named = self.model.named_parameters()
        return {name: self.ranks.whole(local(weight.detach()), weight).cpu() for name, weight in named}

    def validate(self) -> None:
        """Score the validation set, tell a story, note whether this is the best so far."""
        state, began = self.state, self.clock()
        documents = self._validation_documents()
        try:
            evaluation = self.evaluate(documents)
        except _Interrupted:
            return  # it is still due, and the first thing that the next session does
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not hardware.is_out_of_memory(error):
                raise
            state.evaluation_due = False
            return self.display.note("out of memory in the evaluation: training goes on without it")
        self.record |= {"valid_loss": evaluation.loss, "valid_bits_per_byte": evaluation.bits_per_byte}
        if evaluation.bits_per_byte < state.best_bits_per_byte:
            state.best_bits_per_byte, state.best_step, state.evaluations_without_gain = (
                evaluation.bits_per_byte,
                state.step,
                0,
            )
            self.saver.mark_best(state.step)
        else:
            state.evaluations_without_gain += 1
        state.evaluation_due = False
        self.show()
        self.compare_with_floors(evaluation.bits_per_byte, len(documents))
        self.sample()
        self.state.evaluation_seconds = self.clock() - began
        if 0 < self.config.train.patience <= state.evaluations_without_gain and not state.stopping:
            self.stop_early()

    def compare_with_floors(self, bits_per_byte: float, documents: int) -> None:
        """Say it when the model is better than a larger n-gram model than before, on the same documents."""
        found = self.floors.on(documents) if self.floors else []
        self.state.floors = [dataclasses.asdict(floor) for floor in found]
        best = newly_beaten(found, bits_per_byte, self.state.beaten)
        if best is None or self.floors is None:
            return
        self.state.beaten = best.name
        counted = "" if self.floors.whole else f" of {self.floors.train_tokens / 1e6:.1f}M training tokens"
        self.display.note(f"now better than a {best.name}{counted} ({best.bits_per_byte:.2f} bits per byte)")

    def stop_early(self) -> None:
        """Out of patience: a schedule with a cooldown goes through it first, since most of the gain comes there."""
        state, optim = self.state, self.config.optim
        state.stopping = "patience"
        progress = state.plan.progress(state.step)
        if optim.schedule == "wsd" and progress < 1.0 - optim.cooldown:
            left = max(1, round(optim.cooldown * state.step / (1.0 - optim.cooldown)))
            state.plan = state.plan.hurried(state.step, 1.0 - optim.cooldown, left)
        elif optim.schedule != "wsd":
            state.plan = dataclasses.replace(state.plan.replanned(state.step, state.step), steps=state.step)
        self.display.note(
            f"no gain in {state.evaluations_without_gain} evaluations: stopping at step {state.plan.steps};"
            f" the best checkpoint is step {state.best_step} with {state.best_bits_per_byte:.4f} bits per byte"
        )

    def evaluate(self, documents: list[np.ndarray]) -> Evaluation:
        """Bits per byte of these documents; a signal ends it between two batches (of a lone rank)."""
        sizes = [len(self.tokenizer.decode(ids.tolist()).encode()) for ids in documents]
        with eager(self.execution == "compiled"), gathered(self.model):
            return score_together(
                self.model, documents, sizes, self.ranks, autocast=self.runtime.autocast(), between=self._heed_signal
            )

    def heed(self, number: int) -> None:
        """Training shall end with the next step."""
        self.signal = number
        self.display.note(f"{signal.Signals(number).name}: saving after this step (once more to stop at once)")

    def _heed_signal(self) -> None:
        if self.signal and self.ranks.lone:
            raise _Interrupted

    def _validation_documents(self) -> list[np.ndarray]:
        """The fixed set of this run: as many validation documents as 2 % of the time can score. Chosen once."""
        if not self.state.evaluate_tokens:
            train = self.config.train
            self.state.evaluate_tokens = train.evaluate_tokens or affordable_tokens(train, self.state.plan)
        return first_documents(self.dataset, self.state.evaluate_tokens)

    def sample(self) -> None:
        """A story at this point of training, also kept in samples.jsonl."""
        train = self.config.train
        if not train.sample_tokens:
            return
        params = SamplingParams(max_tokens=train.sample_tokens, seed=self.config.seed)
        with eager(self.execution == "compiled"), gathered(self.model), self.runtime.autocast():
            if not self.ranks.first:
                return
            completion = Generator(self.model, self.tokenizer).complete(train.sample_prompt, params)
        record = {"step": self.state.step, "prompt": completion.prompt, "text": completion.text}
        self._written(self.sample_file, lambda: self.sample_file.append(record))
        self.display.story(self.state.step, completion.prompt, completion.text)

    def environment(self) -> dict[str, Any]:
        """What this session ran on; nothing of the user's environment variables."""
        return {
            **hardware.describe(self.runtime.device), "precision": self.runtime.precision, "execution": self.execution,
            "optimizer": self.optimizer.flavour, "micro_batch": self.micro_batch, "recompute": self.model.recompute,
            "command": self.command, "data_fingerprint": self.dataset.fingerprint, "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "parameters": self.model.parameters_count(), "ranks": self.ranks.world,
            "parallel": "none" if self.ranks.lone else self.config.train.parallel,
        }  # fmt: skip

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """The end of a run, however it comes: what is being saved is finished, and a failure leaves its report."""
        try:
            yield
        except KeyboardInterrupt:  # twice: at once
            raise
        except TrainingFailure as failure:
            self.saver.close()
            self.report(failure)
            raise
        except BaseException:
            self.saver.close()
            raise
        self.saver.close()

    def report(self, failure: TrainingFailure) -> None:
        """Write failure.md and add where it lies to the message."""
        latest = self.folder.newest_step()
        facts = {
            "step": self.state.step + 1, "tokens so far": self.state.tokens, "skipped steps": self.state.skipped,
            "learning rate": self.record.get("lr"), "precision": self.runtime.precision, "micro-batch": self.micro_batch,
            "last whole checkpoint": "none" if latest is None else f"step {latest}", "command": self.command or "-",
        }  # fmt: skip
        norms = gradient_norms(self.model)
        page = failure_report(str(failure), facts, norms, self.batches, self.data_step, self.tokenizer)
        with contextlib.suppress(OSError):  # a full disk may be what the failure is about
            self.folder.write_text(self.folder.failure_file, page)
            failure.args = (f"{failure}; more in {self.folder.failure_file}",)


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    return "the disk is full" if no_space_left(error) else error.strerror or str(error)


def train(
    config: RunConfig, out: Path | None = None, *, fresh: bool = False, display: Display | None = None,
    progress: Callable[[PrepareProgress], None] | None = None, command: str = "", force: bool = False,
) -> Summary:  # fmt: skip
    """Train a run to its end, or continue it when its folder has checkpoints. ``fresh`` moves an old run aside; ``force``
    continues it with settings or data that it was not begun with. Under torchrun this process is one of the run's ranks."""
    path, display = Path(out) if out else Path("runs") / config.name, display or Silence()
    with joined() as ranks:
        if not ranks.first:
            display = Silence()
            return Trainer(config, RunFolder(path, Untouched()), display=display, force=force, ranks=ranks).fit()
        folder = RunFolder(path)
        folder.lock(warn=display.note)
        try:
            if fresh and not ranks.restarted and (aside := folder.set_aside()) is not None:
                display.note(f"the old run is now {aside}")
                folder.unlock()
                folder.lock()
            trainer = Trainer(
                config, folder, display=display, progress=progress, command=command, force=force, ranks=ranks
            )
            return trainer.fit()
        finally:
            folder.unlock()
