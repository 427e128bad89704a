"""What a checkpoint costs training: how long the loop waits for it, and how much slower the steps beside it are.

    uv run python benchmarks/checkpoint.py --recipe smalllm-20m

Three ways to save the same state, in turns: SmallLM's (a copy, then hashed, written, fsynced, read back and compared on a
thread of its own), the same without the thread, and `torch.save` as most training loops call it, which hashes nothing and
does not wait for the disk. Steps of random tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median

import torch

from smalllm.config import load_recipe
from smalllm.speed.training import TrainingBench


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="smalllm-20m")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(dir=".", prefix=".checkpoint-bench-") as folder,
        closing(TrainingBench(load_recipe(options.recipe), Path(folder))) as bench,
    ):
        bench.take(options.micro_batches)
        result = measure(bench, Path(folder), options.repeats)
    for name, figure in result.items():
        print(f"{name:<32} {figure:10.4f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(bench: TrainingBench, folder: Path, repeats: int) -> dict[str, float]:
    """Seconds, medians of so many, except for the longest."""
    trainer = bench.trainer
    for _ in range(2):
        bench.step()
    trainer.saver.wait()
    alone: list[float] = []
    beside: list[float] = []
    waits: dict[str, list[float]] = {"smalllm": [], "smalllm without the thread": [], "torch.save": []}
    for _ in range(repeats):
        alone.append(seconds(bench.step))
        waits["smalllm"].append(seconds(trainer.save))
        beside += until_done(bench)
        waits["smalllm without the thread"].append(
            seconds(lambda: trainer.folder.save(trainer.snapshot(), trainer.config.train.keep))
        )
        waits["torch.save"].append(seconds(lambda: plain_save(bench, folder / "checkpoint.pt")))
    extra = [total - count * median(alone) for total, count in beside]
    size = trainer.snapshot().bytes()
    return {
        "megabytes": size / 1e6, "step": median(alone),
        **{f"wait, {name}": median(values) for name, values in waits.items()},
        "longest wait, smalllm": max(waits["smalllm"]), "slower steps beside it, in all": median(extra),
    }  # fmt: skip


def until_done(bench: TrainingBench) -> list[tuple[float, int]]:
    """Steps until the checkpoint that is under way is on the disk: their seconds together, and how many."""
    began, count = time.perf_counter(), 0
    while bench.trainer.saver.jobs.unfinished_tasks or not count:
        bench.step()
        count += 1
    return [(time.perf_counter() - began, count)]


def seconds(work: Callable[[], object]) -> float:
    """How long something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def plain_save(bench: TrainingBench, path: Path) -> None:
    """As in nanoGPT's train.py: one dictionary, one call."""
    snapshot = bench.trainer.snapshot()
    torch.save({"model": dict(snapshot.weights), "optimizer": dict(snapshot.optimizer)}, path)


if __name__ == "__main__":
    main()
