"""Several ranks on their worst days: one is killed, they disagree, they are another number than before."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ranked import Group, run_ranks

import smalllm
from smalllm.checkpoint import RunFolder
from smalllm.config import RunConfig
from smalllm.metrics import read_records
from smalllm.ranks import RankLost
from smalllm.reliability.promises import check_same, make_data, settings
from smalllm.reliability.trials import Trial
from smalllm.training.trainer import train

KINDS = ("ddp", "fsdp")
STEPS = 60


def run_settings(given: Path, kind: str) -> RunConfig:
    return settings(given / "data", steps=STEPS, micro_batch=2, checkpoint_every=5, parallel=kind)


def make_straight(given: Path) -> None:
    make_data(given)
    for kind in KINDS:
        run_ranks(2, run_settings(given, kind), given / kind)


def killed(number: int, folder: Path, given: Path) -> int:
    """One of two ranks is killed at a random moment; the other ends within a minute and says why; both, started again, end
    with the bits of the run that was not disturbed."""
    chance, kind, run = random.Random(number), KINDS[number % 2], folder / "run"
    config = run_settings(given, kind)
    group = Group(2, lambda: train(config, run).step, folder / "said")
    time.sleep(chance.uniform(0.05, 4.0))
    victim = chance.randrange(2)
    with contextlib.suppress(ProcessLookupError):
        os.kill(group.pids[victim], signal.SIGKILL)
    began = time.monotonic()
    codes = group.end(60)
    took = time.monotonic() - began
    assert took < 60, f"the other rank hung for {took:.0f} s"
    other = codes[1 - victim]
    if codes[victim] == -signal.SIGKILL and other:
        assert other in (1, RankLost.exit_code), f"the other rank ended with {other}"
        assert "lost the others" in group.said(1 - victim)["error"] or "cannot meet" in group.said(1 - victim)["error"]
    run_ranks(2, config, run)
    check_same(run, given / kind)
    return int(codes[victim] == -signal.SIGKILL)


def restarted(number: int, folder: Path, given: Path) -> None:
    """torchrun's agent, started by `--gpus` or by hand, starts the ranks again by itself."""
    chance, kind, run = random.Random(number), KINDS[number // 2 % 2], folder / "run"
    folder.mkdir(exist_ok=True)
    recipe = folder / "tiny.toml"
    recipe.write_text(run_settings(given, kind).to_toml(), encoding="utf-8")
    command = ["-m", "smalllm", "train", str(recipe), "--out", str(run)]
    if number % 2:
        agent = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
        command = [*agent, *command]
    else:
        command += ["--gpus", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(smalllm.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with (folder / "out").open("wb") as out:
        started = subprocess.Popen([sys.executable, *command], stdout=out, stderr=out, env=environment)
    try:
        _wait_for(run, chance.randrange(5, STEPS // 2), started)
        os.kill(chance.choice(_children(started.pid)), signal.SIGKILL)
        code = started.wait(100)
    finally:
        started.kill()
    said = (folder / "out").read_text(encoding="utf-8")
    assert code == 0, said[-2000:]
    assert "resumed from step" in said
    if number % 2 == 0:
        assert "starting all 2 again (1 of 3 times)" in said and "Traceback" not in said, said[-2000:]
    check_same(run, given / kind)


def _wait_for(run: Path, step: int, process: subprocess.Popen[Any]) -> None:
    ends = time.monotonic() + 60
    while (RunFolder(run).newest_step() or 0) < step and process.poll() is None:
        assert time.monotonic() < ends, "the ranks did not begin"
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    """The ranks: children that run Python's -m smalllm."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if b"smalllm" in Path(f"/proc/{child}/cmdline").read_bytes()]


def disagreeing(number: int, folder: Path, given: Path) -> None:
    """Ranks with another setting are refused at once, with both values."""
    name, here, there = [
        ("optim.lr", 3e-3, 4e-3), ("optim.weight_decay", 0.1, 0.2), ("train.steps", 60, 61), ("train.batch_tokens", 256, 512),
        ("model.layers", 2, 3), ("model.dropout", 0.0, 0.1), ("train.precision", "fp32", "bf16"), ("train.parallel", "ddp", "fsdp"),
        ("optim.schedule", "cosine", "wsd"), ("train.evaluate_every", 10, 20),
    ][number % 10]  # fmt: skip
    section, key = name.split(".")
    config = run_settings(given, "ddp").replace(**{section: {key: here}})

    def work() -> int:
        mine = config if os.environ["RANK"] == "0" else config.replace(**{section: {key: there}})
        return train(mine, folder / "run").step

    group = Group(2, work, folder / "said")
    assert group.end(60) == [1, 1]
    for rank in range(2):
        error = group.said(rank)["error"]
        assert f"disagree about {name}: rank 0 has {here!r}, rank 1 has {there!r}" in error, error
    assert not (folder / "run" / "checkpoints").exists()


def other_numbers(number: int, folder: Path, given: Path) -> None:
    """A run continued by 1, 2, 4, 3 ranks in some order reads the same tokens and has the same losses within 1e-5."""
    chance, kind = random.Random(number), KINDS[number % 2]
    worlds = [1, 2, 4, *([3] if kind == "ddp" else [])]
    chance.shuffle(worlds)
    config = run_settings(given, kind).replace(optim={"schedule": "constant"})
    run, straight = folder / "run", folder / "straight"
    run_ranks(2, config.replace(train={"steps": 20}), straight)
    for turn, world in enumerate(worlds, 1):
        part = config.replace(train={"steps": 20 * turn // len(worlds)})
        run_ranks(world, part, run)
    mine, expected = (list(read_records(RunFolder(path).metrics_file)) for path in (run, straight))
    assert [record["step"] for record in mine] == [record["step"] for record in expected] == list(range(1, 21))
    for one, other in zip(mine, expected, strict=True):
        assert one["tokens"] == other["tokens"]
        assert abs(one["train_loss"] - other["train_loss"]) <= 1e-5 * other["train_loss"], (one, other)


TRIALS = [
    Trial("X1", "a rank is killed: the other ends, and both together go on exactly", killed, 2, 50, make_straight, workers=1),
    Trial("X1b", "torchrun's agent starts ranks again, exactly", restarted, 1, 10, make_straight, workers=1),
    Trial("X2", "ranks that disagree are refused with both values", disagreeing, 2, 10, make_data),
    Trial("X3", "continued by another number of ranks: same tokens, same losses", other_numbers, 1, 6, make_data, workers=1),
]  # fmt: skip
