"""How well ranks share a step: tokens per second of 1, 2, 4 ranks of one thread each, and the bytes that they exchange.

    uv run python benchmarks/ranks.py --recipe smolergpt-12m --worlds 1 2 4

Every figure is of the recipe's own step (``--batch-tokens`` for another one) on random tokens, in turns; ranks are started
by torchrun and exchange by gloo over the loopback device, whose counters give the bytes. More ranks than cores only show that
it works. Efficiency is the speed of n ranks divided by n times that of one, or by as many as there are cores.

    uv run python benchmarks/ranks.py --paper

computes instead, from the bytes that are measured here and makers' figures, what larger machines would give.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median

import torch

from smalllm.cards import NVLINK_4, PCIE, find_card
from smalllm.checkpoint import RunFolder
from smalllm.config import RunConfig, load_recipe
from smalllm.files import Untouched
from smalllm.planner import BACKWARD_SHARE, efficiency
from smalllm.ranks import joined
from smalllm.speed.training import random_data
from smalllm.training.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="smolergpt-12m")
    parser.add_argument("--settings", nargs="*", default=[], help="section.key=value")
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--batch-tokens", type=int, default=0, help="0: the recipe's")
    parser.add_argument("--steps", type=int, default=2, help="measured steps in a turn, after one that is not")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--paper", action="store_true", help="compute what larger machines would give")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    if options.paper:
        return print(paper())
    config = load_recipe(options.recipe, options.settings)
    if options.batch_tokens:
        config = config.replace(train={"batch_tokens": options.batch_tokens})
    if options.worker:
        return work(config, options.worker, options.steps)
    found: dict[int, list[dict[str, float]]] = {world: [] for world in options.worlds}
    for _ in range(options.repeats):
        for world, answers in found.items():
            answers.append(one_turn(world, words))
    figures = {world: summary(answers) for world, answers in found.items()}
    print(table(figures, config))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def one_turn(world: int, words: Sequence[str]) -> dict[str, float]:
    """So many ranks, started by torchrun with this script's own arguments."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    with tempfile.TemporaryDirectory(prefix="ranks-bench-") as folder:
        command = [*agent, __file__, *words, "--worker", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        answer: dict[str, float] = json.loads((Path(folder) / "answer.json").read_text())
    return answer


def work(config: RunConfig, folder: Path, steps: int) -> None:
    """A rank: the trainer's own steps, timed."""
    torch.set_num_threads(1)
    with joined() as ranks:
        data = folder / "data"
        with ranks.one_by_one("random data"):
            if not data.exists():
                random_data(data, config.model.vocab_size or config.data.vocab_size, config.model.context)
        train = {"preflight": False, "track": "none", "device": "cpu"}
        config = config.replace(data={"path": str(data)}, train=train)
        trainer = Trainer(config, RunFolder(folder / "run", None if ranks.first else Untouched()), ranks=ranks)
        with closing(trainer.prefetch), closing(trainer.saver):
            trainer.begin()
            trainer.step()
            trainer.saver.wait()
            ranks.sum(0)
            before, began, times = exchanged_bytes(), time.perf_counter(), []
            for _ in range(steps):
                trainer.step()
                ranks.sum(0)
                times.append(time.perf_counter() - began)
                began = time.perf_counter()
            answer = {
                "tokens_per_second": config.train.batch_tokens / median(times),
                "bytes_per_step": (exchanged_bytes() - before) / steps,
                "parameters": trainer.model.parameters_count(),
            }
            if ranks.first:
                (folder / "answer.json").write_text(json.dumps(answer))


def exchanged_bytes() -> int:
    """What the loopback device has carried so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def summary(answers: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: median(answer[name] for answer in answers) for name in answers[0]}


def table(figures: dict[int, dict[str, float]], config: RunConfig) -> str:
    """Markdown."""
    cores, alone = os.cpu_count() or 1, figures.get(1, {}).get("tokens_per_second")
    lines = [
        f"{config.name}, steps of {config.train.batch_tokens} tokens, {cores} cores, one thread a rank", "",
        "| ranks | tokens/s | efficiency | bytes exchanged a step | of the gradient's bytes |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for world, figure in figures.items():
        efficiency = f"{figure['tokens_per_second'] / (min(world, cores) * alone):.1%}" if alone else ""
        size = figure["bytes_per_step"]
        lines.append(
            f"| {world} | {figure['tokens_per_second']:,.0f} | {efficiency} | {size / 1e6:,.1f} MB |"
            f" {size / (4 * figure['parameters']):.2f} |"
        )
    return "\n".join(lines)


# ── on paper ──

MODELS = {"20 M": (20e6, 131_072), "124 M": (124e6, 524_288), "350 M": (350e6, 524_288), "1.3 B": (1.3e9, 1_048_576)}
"""Parameters, and tokens of a step."""
CLUSTERS = (
    ("8 x RTX 4090, PCIe", "RTX 4090", 8, PCIE),
    ("8 x H100, NVLink", "H100", 8, NVLINK_4),
    ("64 x H100, 8 to a machine, 400 Gb/s each", "H100", 64, (20e9, 45e9)),
)
"""Bytes a second that a ring all-reduce moves through each GPU (the bus bandwidth of nccl-tests), from bad to good: assumed."""
REACHED = 0.4
MICRO_BATCH = 32_768


def paper() -> str:
    """Markdown: speed relative to as many GPUs that exchange nothing, when nothing of the exchange is hidden behind the backward
    pass, and when all that can be is (the backward pass of the last micro-batch, two thirds of its arithmetic)."""
    lines = [
        "| cluster | model | tokens a step | arithmetic | exchange | efficiency, none hidden | hidden |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, card, world, (bad, good) in CLUSTERS:
        for model, (parameters, tokens) in MODELS.items():
            rank_tokens = tokens / world
            arithmetic = 6 * parameters * rank_tokens / (REACHED * find_card(card).peak_flops)
            last = BACKWARD_SHARE * arithmetic * min(1.0, MICRO_BATCH / rank_tokens)
            size = 2 * (world - 1) / world * 4 * parameters
            times = [size / bandwidth for bandwidth in (bad, good)]
            plain = [efficiency(arithmetic, seconds) for seconds in times]
            hidden = [efficiency(arithmetic, seconds, last) for seconds in times]
            lines.append(
                f"| {name} | {model} | {tokens:,} | {1000 * arithmetic:,.1f} ms | {1000 * times[1]:,.1f} to {1000 * times[0]:,.1f} ms |"
                f" {plain[0]:.0%} to {plain[1]:.0%} | {hidden[0]:.0%} to {hidden[1]:.0%} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
