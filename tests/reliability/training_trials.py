"""Trials of runs, checkpoints and numbers: those of `smalllm doctor --reliability`, and what takes signals, clocks, memory and
poison."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from smalllm import cli, hardware, locks
from smalllm.checkpoint import RunFolder
from smalllm.config import UserError
from smalllm.files import FileSystem
from smalllm.metrics import read_records
from smalllm.reliability import promises
from smalllm.reliability.promises import (
    STEPS,
    Recorder,
    check_same,
    in_child,
    make_data,
    replaced,
    settings,
    straight,
    train,
)
from smalllm.reliability.trials import Trial
from smalllm.training import trainer as trainer_module
from smalllm.training.guards import WINDOW, TrainingFailure
from smalllm.training.saver import Saver
from smalllm.training.trainer import Trainer

NAMES = list(promises.CONFIGURATIONS)


def make_straight(given: Path) -> None:
    """Data, and the run to which nothing happens."""
    make_data(given)
    train(settings(given / "data"), straight(given, "plain"))


def make_all_straight(given: Path) -> None:
    """The same for every configuration."""
    make_data(given)
    for name in NAMES:
        train(settings(given / "data", name), straight(given, name))


# ── T6: all checkpoints damaged ──


def all_damaged(number: int, folder: Path, given: Path) -> None:
    """It says so and never begins at step 0."""
    chance, run = random.Random(number), folder / "run"
    train(settings(given / "data", steps=10, checkpoint_every=2, keep=9), run)
    for checkpoint in RunFolder(run).checkpoints():
        ways = promises.DAMAGES[:-1]  # the manifest of step 2 is right for step 2
        promises.damage(checkpoint.path, random.Random(chance.randrange(2**32)), ways)
    lines = (run / "metrics.jsonl").read_bytes()
    for _ in range(2):
        try:
            train(settings(given / "data", steps=20), run)
        except UserError as error:
            assert "damaged" in str(error) and "--fresh" in str(error), error
        else:
            raise AssertionError("a run whose checkpoints were all damaged went on")
        assert (run / "metrics.jsonl").read_bytes() == lines


# ── T8: the same twice ──


def twice(number: int, folder: Path, given: Path) -> None:
    """Two runs at once, one with a thread that sleeps whenever it makes a batch."""
    name = NAMES[number % len(NAMES)]
    chance, make = random.Random(number), trainer_module.Prefetch._make

    def slow(self: Any, *which: int) -> Any:
        time.sleep(chance.uniform(0.0, 0.01))
        return make(self, *which)

    other = in_child(lambda: train(settings(given / "data", name), folder / "other"))
    with replaced(trainer_module.Prefetch, "_make", slow):
        train(settings(given / "data", name), folder / "slow")
    assert os.waitpid(other, 0)[1] == 0
    check_same(folder / "slow", folder / "other")


# ── T9, T10: signals and terminals ──

KINDS = ("SIGTERM", "SIGINT", "SIGHUP", "twice", "stopped", "no reader", "no terminal")
CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}


def signalled(number: int, folder: Path, given: Path) -> None:
    """`smalllm train` gets a signal at a random moment, or loses its terminal; then it goes on to the same bits."""
    kind, chance, run = KINDS[number % len(KINDS)], random.Random(number), folder / "run"
    recipe = folder / "tiny.toml"
    recipe.write_text(settings(given / "data").to_toml())
    command = ["train", str(recipe), "--out", str(run)]
    moment = chance.uniform(0.05, 0.5)
    code, seconds, said = SENT[kind](command, folder, moment)
    assert "Traceback" not in said, said
    hurried = kind == "twice" and code != 0  # with 0 it was drawing its curve already
    # asked is 1 s, and held 300 times of 300 on a quiet machine; where tests run beside one another it may be late
    assert seconds < (2.0 if hurried else 3.0), f"{kind}: it took {seconds:.2f} s to end"
    if kind in CODES and code == CODES[kind] and _child_output(folder):  # else it came before training began
        step = int(json.loads(_child_output(folder))["step"])
        newest = RunFolder(run).newest_step() or 0
        assert newest == step, f"it ended at step {step} but the newest checkpoint is of step {newest}"
    elif kind == "twice":
        assert code in (0, 1, 130, -signal.SIGINT), code
    else:  # it was over before the signal, or never meant to end
        assert code in (0, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT, 130), (code, said)
    train(settings(given / "data"), run)
    check_same(run, straight(given, "plain"))


def _child_output(folder: Path) -> str:
    return (folder / "stdout").read_text()


def _start(command: list[str], folder: Path) -> int:
    """`smalllm` in a process of its own, as it is started from a shell: default signals, outputs in files."""

    def work() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, descriptor)
        os._exit(_run(command))

    return in_child(work)


def _run(command: list[str]) -> int:
    import sys

    try:
        code = cli.run(command)
    except SystemExit as end:
        code = int(end.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _wait(pid: int, began: float, folder: Path) -> tuple[int, float, str]:
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - began, (folder / "stderr").read_text()


def _one(number: signal.Signals) -> Callable[[list[str], Path, float], tuple[int, float, str]]:
    def send(command: list[str], folder: Path, moment: float) -> tuple[int, float, str]:
        pid = _start([*command, "--json"], folder)
        time.sleep(moment)
        began = time.monotonic()
        os.kill(pid, number)
        return _wait(pid, began, folder)

    return send


def _twice(command: list[str], folder: Path, moment: float) -> tuple[int, float, str]:
    pid = _start(command, folder)
    time.sleep(moment)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.01)
    began = time.monotonic()
    os.kill(pid, signal.SIGINT)
    return _wait(pid, began, folder)


def _stopped(command: list[str], folder: Path, moment: float) -> tuple[int, float, str]:
    pid = _start(command, folder)
    time.sleep(moment)
    os.kill(pid, signal.SIGTSTP)
    time.sleep(0.2)
    os.kill(pid, signal.SIGCONT)
    code, _, said = _wait(pid, time.monotonic(), folder)
    assert code == 0, (code, said)
    return code, 0.0, said


def _without(end: str) -> Callable[[list[str], Path, float], tuple[int, float, str]]:
    """Nobody reads what is printed, or standard input and output are closed: training ends as ever."""

    def send(command: list[str], folder: Path, moment: float) -> tuple[int, float, str]:
        def work() -> None:
            import sys

            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            file = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(file, 2)
            if end == "no reader":
                read, write = os.pipe()
                os.close(read)
                os.dup2(write, 1)
                sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)  # one that knows it is a pipe
            else:
                sys.stdin = sys.stdout = None  # type: ignore[assignment]  # as Python does for `<&- >&-`
                os.close(0)
                os.close(1)
            os._exit(cli.run(command))

        code, _, said = _wait(in_child(work), time.monotonic(), folder)
        assert code == 0, (code, said)
        return code, 0.0, said

    return send


SENT = {
    "SIGTERM": _one(signal.SIGTERM), "SIGINT": _one(signal.SIGINT), "SIGHUP": _one(signal.SIGHUP), "twice": _twice,
    "stopped": _stopped, "no reader": _without("no reader"), "no terminal": _without("no terminal"),
}  # fmt: skip


# ── T13: clocks ──


def strange_clocks(number: int, folder: Path, given: Path) -> None:
    """Wall clocks jump and files are dated anyhow; order is by step, time by a clock that only goes on."""
    chance, run = random.Random(number), folder / "run"
    jump = (0.0, 3.15e8, -86_400.0, -3.0e9)[number % 4]
    watching = Recorder()
    with replaced(time, "time", lambda: 1e9 + jump):
        train(settings(given / "data", steps=12, checkpoint_every=2, keep=9), run)
        for checkpoint in RunFolder(run).checkpoints():
            stamp = chance.uniform(0, 4e9)
            os.utime(checkpoint.path, (stamp, stamp))
            os.utime(checkpoint.path / "manifest.json", (stamp, stamp))
        assert RunFolder(run).choose("latest").step == 12
        train(settings(given / "data"), run, display=watching)
    shown = watching.records
    assert shown and all(not record["eta_seconds"] < 0 and record["tokens_per_second"] >= 0 for record in shown)
    assert all(math.isfinite(record["tokens_per_second"]) for record in shown)
    times = [record["seconds"] for record in read_records(run / "metrics.jsonl")]
    assert times == sorted(times)


# ── T14, T16: memory and the thread that saves ──


def saving_fails(number: int, folder: Path, given: Path) -> None:
    """Something goes wrong on the thread that saves: it is said at the next step, and costs that checkpoint."""
    chance, notes, run = random.Random(number), Recorder(), folder / "run"
    error = chance.choice([MemoryError(), RuntimeError("bad_alloc"), OSError(errno.EIO, "broken"), ValueError("x")])
    left, save = [chance.randrange(1, 8)], Saver._save

    def failing(self: Saver, state: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error
        save(self, state)

    with replaced(Saver, "_save", failing):
        train(settings(given / "data"), run, display=notes)
    assert any("could not be written" in note and "training goes on" in note for note in notes.notes), notes.notes
    check_same(run, straight(given, "plain"))


def out_of_memory(number: int, folder: Path, given: Path) -> None:
    """Memory runs out in a forward pass, or in an evaluation: smaller pieces, and the same losses."""
    chance, run, notes = random.Random(number), folder / "run", Recorder()
    name = ("_accumulate", "evaluate")[number % 2]
    original, error = (
        getattr(Trainer, name),
        (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"))[number // 2 % 2],
    )
    left = [chance.randrange(1, 4 if name == "evaluate" else 30)]

    def tight(self: Trainer, *given: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise error
        return original(self, *given)

    with replaced(Trainer, name, tight):
        train(settings(given / "data"), run, display=notes)
    assert any("out of memory" in note for note in notes.notes), notes.notes
    mine, theirs = (
        [record["train_loss"] for record in read_records(path / "metrics.jsonl")]
        for path in (run, straight(given, "plain"))
    )
    assert len(mine) == len(theirs) and all(abs(a / b - 1) < 1e-4 for a, b in zip(mine, theirs, strict=True))


# ── N1: poison ──

POISONS = (math.nan, math.inf, -math.inf)
INJECTIONS = 25


def poisoned(number: int, folder: Path, given: Path) -> int:
    """NaN and infinity in a loss, in one element of a gradient, in one activation: no weight and no moment changes."""
    chance = random.Random(number)
    trainer = Trainer(
        settings(given / "data", NAMES[number % len(NAMES)], steps=1000), RunFolder(folder / "run"), display=Recorder()
    )
    trainer.begin()
    for _ in range(INJECTIONS):
        for _ in range(chance.randrange(1, 3)):
            trainer.step()
        before = _tensors(trainer)
        count = trainer.state.skipped
        _inject(trainer, chance)
        after = _tensors(trainer)
        assert trainer.state.skipped == count + 1, "the step was not skipped"
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trainer.saver.close()
    trainer.prefetch.close()
    return INJECTIONS


def _tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = trainer.model.state_dict() | trainer.optimizer.state_tensors()
    return {name: tensor.clone() for name, tensor in state.items()}


def _inject(trainer: Trainer, chance: random.Random) -> None:
    """One step with poison somewhere."""
    poison, where = chance.choice(POISONS), chance.choice(("loss", "gradient", "activation"))
    if trainer.scaler is not None:  # else a smaller scale would be tried for a loss that no scale can help
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**6)
    if where == "activation":
        block = chance.choice(list(trainer.model.blocks))

        def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            spoilt = output.clone()
            spoilt.view(-1)[chance.randrange(spoilt.numel())] = poison
            return spoilt

        handle = block.register_forward_hook(spoil)
        trainer.step()
        handle.remove()
        return
    original = trainer.accumulate

    def spoilt(tokens: int) -> float:
        loss = original(tokens)
        if where == "loss":
            return poison
        parameter = chance.choice([p for p in trainer.model.parameters() if p.grad is not None])
        assert parameter.grad is not None
        parameter.grad.view(-1)[chance.randrange(parameter.numel())] = poison
        return loss

    with replaced(trainer, "accumulate", spoilt):
        trainer.step()


# ── N2: spikes ──


def spikes(number: int, folder: Path, given: Path) -> None:
    """A batch that stands out makes no update; ten in a row lead back to the last checkpoint and past the data. What follows
    a kill in between has the same bits."""
    chance, first = random.Random(number), WINDOW // 2 + 10
    at = chance.randrange(first, first + 20)
    length = chance.choice((1, 3, 9, 10, 13))
    config = settings(given / "data", steps=first + 40, spike_sigmas=6.0, sample_tokens=0, evaluate_every=1000)
    original = Trainer._accumulate

    def spiky(self: Trainer, tokens: int) -> float:
        loss = original(self, tokens)
        return loss * 50.0 if at <= self.data_step < at + length else loss

    notes = Recorder()
    with replaced(Trainer, "_accumulate", spiky):
        done = train(config, folder / "whole", display=notes)
        killed = in_child(lambda: train(config, folder / "killed"))
        time.sleep(chance.uniform(0.1, 0.8))
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        train(config, folder / "killed")
    skipped = [note for note in notes.notes if "stands out" in note]
    assert len(skipped) == length, (length, notes.notes)
    assert done.state.rollbacks == (length >= 10) and done.state.step == first + 40
    assert (done.state.passed_over > 0) == (length >= 10)
    check_same(folder / "killed", folder / "whole")


# ── N3: fp16 ──


def overflows(number: int, folder: Path, given: Path) -> None:
    """The scale is too large at a random step: the step is repeated with a smaller one, and nothing is lost."""
    chance = random.Random(number)
    trainer = Trainer(settings(given / "data", "fp16 with loss scaling"), RunFolder(folder / "run"), display=Recorder())
    trainer.begin()
    for _ in range(chance.randrange(1, 10)):
        trainer.step()
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** chance.randrange(40, 100))
    before, step = _tensors(trainer), trainer.state.step
    trainer.step()
    assert trainer.scaler is not None and trainer.scaler.get_scale() < 2.0**40
    assert trainer.state.step == step + 1 and trainer.state.skipped == 0
    assert any(not torch.equal(tensor, before[name]) for name, tensor in _tensors(trainer).items())
    trainer.saver.close()
    trainer.prefetch.close()


# ── N9: bits that flip ──

MOMENTS = ("accumulate", "log", "save", "validate")
"""Calls of a trainer before which memory may err."""


def flips(number: int, folder: Path, given: Path) -> None:
    """One bit of a weight, of a moment or of a gradient flips while every step is verified: it is noticed before it gets into
    an update or a checkpoint, and the run then goes on to the bits of the one to which nothing happened."""
    chance, run = random.Random(number), folder / "run"
    names = [name for name in NAMES if "minutes" not in name]  # twice the work is half as many steps
    name, what = names[number % len(names)], chance.choice(("weight", "moment", "gradient"))
    config = settings(given / "data", name, verify_every=1)
    moment = "_accumulate" if what == "gradient" else chance.choice(MOMENTS)
    at, original, flipped = chance.randrange(2, STEPS - 10), getattr(Trainer, moment), list[int]()

    def erring(self: Trainer, *arguments: Any) -> Any:
        hit = not flipped and self.state.step >= at
        if hit and what != "gradient":
            flipped.append(self.state.step)
            tensors = {
                "weight": list(self.model.parameters()),
                "moment": [value for part in self.optimizer.parts for slots in part.state.values() for value in slots.values()],
            }[what]  # fmt: skip
            _flip(chance.choice(tensors), chance)
        result = original(self, *arguments)
        if hit and what == "gradient" and chance.random() < 0.5:  # else in the second of the two
            flipped.append(self.state.step)
            _flip(chance.choice([p.grad for p in self.model.parameters() if p.grad is not None]), chance)
        return result

    with replaced(Trainer, moment, erring):
        try:
            train(config, run)
        except TrainingFailure as failure:
            assert "the processor or its memory errs" in str(failure), failure
        else:
            raise AssertionError(f"nobody noticed that a {what} changed before {moment} of step {flipped}")
    assert (RunFolder(run).newest_step() or 0) <= flipped[0]
    train(config, run)
    check_same(run, straight(given, name))


@torch.no_grad()
def _flip(tensor: torch.Tensor, chance: random.Random) -> None:
    """Any bit of any element."""
    size = tensor.element_size()
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    bits = tensor.detach().view(kind).view(-1)
    bits[chance.randrange(bits.numel())] ^= (
        torch.tensor(1, dtype=torch.int64).bitwise_left_shift(chance.randrange(8 * size)).to(kind)
    )


# ── T18: trackers ──


def trackers(number: int, folder: Path, given: Path) -> None:
    """A tracker that fails at a random step is dropped with one line."""
    left, notes = [random.Random(number).randrange(1, 30)], Recorder()

    def broken(record: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "no space left")

    original = trainer_module.Sinks.__init__

    def with_a_tracker(self: Any, *given: Any) -> None:
        original(self, *given)
        self.writers.append(("broken", broken))

    with replaced(trainer_module.Sinks, "__init__", with_a_tracker):
        train(settings(given / "data"), folder / "run", display=notes)
    assert len([note for note in notes.notes if "failed and is off" in note]) == 1
    check_same(folder / "run", straight(given, "plain"))


# ── X4: a network file system ──


def without_locks(number: int, folder: Path, given: Path) -> None:
    """No locks, and files that show what they held up to 0.1 s ago: a second trainer is refused, and after a kill another one
    goes on to the same bits."""
    chance, run, began = random.Random(number), folder / "run", time.monotonic()
    seen: dict[Path, tuple[float, bytes]] = {}

    def unsupported(descriptor: int, flags: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def cached(path: Path) -> bytes:
        if path.name != ".lock-beat":
            return read(path)
        kept = seen.get(path)
        if kept is None or time.monotonic() - kept[0] > 0.1:
            seen[path] = kept = time.monotonic(), read(path)
        return kept[1]

    read, config = Path.read_bytes, settings(given / "data")
    with ExitStack() as stack:
        stack.enter_context(replaced(fcntl, "flock", unsupported))
        stack.enter_context(replaced(Path, "read_bytes", cached))
        for name, seconds in (("BEAT_SECONDS", 0.1), ("DEAD_SECONDS", 1.5), ("SETTLE_SECONDS", 0.3)):
            stack.enter_context(replaced(locks, name, seconds))
        slow = in_child(lambda: train(config.replace(train={"steps": 100_000}), folder / "other"))
        while not (folder / "other" / "metrics.jsonl").exists():
            assert time.monotonic() - began < 60
            time.sleep(0.01)
        try:
            train(config, folder / "other")
        except UserError as error:
            assert f"process {slow} on" in str(error), error
        else:
            raise AssertionError("two trained one run")
        finally:
            os.kill(slow, signal.SIGKILL)
            os.waitpid(slow, 0)
        for _ in range(3):
            pid = in_child(lambda: train(config, run))
            time.sleep(0.3 + chance.uniform(0.02, 0.5))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        train(config, run)
    check_same(run, straight(given, "plain"))


# ── T23: for long ──


class Weary(FileSystem):
    """A disk that is slow, and so many times full; not before the run has begun, which would not."""

    def __init__(self, number: int, failures: int) -> None:
        self.chance, self.failures, self.synced = random.Random(number), failures, 0

    def sync(self, file: IO[bytes]) -> None:
        self.synced += 1
        if self.failures and self.synced > 20 and self.chance.random() < 0.05:
            self.failures -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(0.002 * self.chance.random())


class Held(Recorder):
    """Notes what the process holds at each evaluation: bytes of memory, descriptors, threads."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[tuple[int, int, int]] = []

    def story(self, step: int, prompt: str, text: str) -> None:
        memory = hardware.memory_now(torch.device("cpu"))
        self.held.append((memory, len(os.listdir("/proc/self/fd")), threading.active_count()))


def for_long(number: int, folder: Path, given: Path, steps: int = 1_500) -> None:
    """Thousands of steps in one process, with a checkpoint every twenty and an evaluation every fifty, on a disk that fails now
    and then: what the process holds does not grow, and no line is missing."""
    config = settings(
        given / "data", steps=steps, checkpoint_every=20, evaluate_every=50, log_every=10, sample_tokens=2,
        evaluate_tokens=100,
    )  # fmt: skip
    display, disk, run = Held(), Weary(number, steps // 150), folder / "run"
    train(config, run, disk, display)
    assert disk.failures == 0, "too few checkpoints failed"
    assert any("could not be written" in note for note in display.notes)
    early, late = display.held[len(display.held) // 4 : len(display.held) // 2], display.held[-len(display.held) // 4 :]
    memory, descriptors, threads = ([max(row[kind] for row in part) for part in (early, late)] for kind in range(3))
    assert memory[1] <= 1.02 * memory[0] + 2e6, f"memory grew from {memory[0]:,} to {memory[1]:,} bytes"
    assert descriptors[1] <= descriptors[0] and threads[1] <= threads[0], (descriptors, threads)
    lines = [record["step"] for record in read_records(run / "metrics.jsonl")]
    assert lines == sorted({1, steps, *range(10, steps + 1, 10)} & set(lines)) and len(lines) >= steps // 10
    assert RunFolder(run).choose("latest").step == steps


class Full(FileSystem):
    """A disk with no room."""

    def free_bytes(self, path: Path) -> int:
        return 1000


def no_room(number: int, folder: Path, given: Path) -> None:
    """A disk without room for a checkpoint is noticed before the first step."""
    try:
        train(settings(given / "data"), folder / "run", Full())
    except UserError as error:
        assert "free" in str(error) and "--out" in str(error) and not isinstance(error, TrainingFailure)
    else:
        raise AssertionError("the run began")
    assert not RunFolder(folder / "run").checkpoints() and not read_lines(folder / "run" / "metrics.jsonl")


def read_lines(path: Path) -> list[Any]:
    return list(read_records(path))


TRIALS = [
    *promises.TRIALS,
    Trial("T6", "when all checkpoints are damaged it says so, and never begins at step 0", all_damaged, 2, 20, make_data),
    Trial("T8", "twice the same run, at once and with slow data, has the same bits", twice, 2, 24, make_data),
    Trial("T9", "a signal, a closed terminal: saved, told by the exit code, and no bit lost", signalled, 14, 300, make_straight),
    Trial("T13", "clocks that jump and files of any date change nothing", strange_clocks, 4, 12, make_data),
    Trial("T14", "memory that runs out costs an evaluation or a division, not the run", out_of_memory, 4, 40, make_straight),
    Trial("T16", "an error on the thread that saves is told and costs that checkpoint", saving_fails, 4, 60, make_straight),
    Trial("T18", "a tracker that fails is dropped", trackers, 2, 20, make_straight),
    Trial("T4b", "a disk without room is refused before the first step", no_room, 1, 5, make_data),
    Trial("T23", "thousands of steps on a disk that fails now and then: nothing grows, nothing is missing", for_long, 1, 10, make_data),
    Trial("T23b", "and 60,000", partial(for_long, steps=60_000), 0, 2, make_data, seconds=1800.0),
    Trial("X4", "without locks of the file system there is still one trainer, and a killed one blocks nobody", without_locks, 1, 10,
          make_straight),
    Trial("N1", "what is not finite never reaches weights or moments", poisoned, 8, 24, make_data),
    Trial("N2", "spikes are left out, ten in a row lead back; exact under kills", spikes, 3, 50, make_data),
    Trial("N9", "a bit that flips in memory is noticed before it is learned or saved", flips, 8, 200, make_all_straight),
    Trial("N3", "an overflow in fp16 repeats the step with a smaller scale", overflows, 4, 50, make_data, together=4),
]  # fmt: skip
