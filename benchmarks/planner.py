"""Does `smalllm plan` know what training takes? Predicted peak memory beside the measured one, of runs that differ.

    uv run python benchmarks/planner.py

Predicted by `smalllm plan` in a process of its own, which allocates nothing. Measured as the largest resident memory of
another fresh process that trains four steps of two micro-batches or more, and writes a checkpoint between them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from smalllm import hardware
from smalllm.config import UserError, load_recipe
from smalllm.speed.training import TrainingBench

RUNS = (
    "quickstart",
    "laptop model.vocab_size=32000",
    "laptop model.layers=12 model.context=2048 train.batch_tokens=4096 train.precision=fp32",
    "laptop train.compile=off train.precision=fp32",
    "smolergpt-12m",
    "smolergpt-12m train.precision=fp32",
    "smolergpt-12m model.dropout=0.2 train.micro_batch=4",
    "smalllm-20m train.recompute=true train.micro_batch=4",
    "stories-fast model.width=512 model.heads=8 model.layers=10 train.micro_batch=1",
    "stories-fast model.heads=8 model.kv_heads=2 train.micro_batch=4",
    "quickstart model.layers=8 train.precision=fp32",
    "laptop model.width=320 model.context=256 train.batch_tokens=8192 data.packing=stream",
)
"""Both optimizers, recomputation, three ways to run the blocks, both precisions, vocabularies, contexts and depths.
The factor of the heap (runtime.heap_factor) was chosen on the first nine; the last three are others."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a prediction is more than 10 % away."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=RUNS, help='a recipe with settings each: "laptop model.layers=8"')
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--take", nargs="+", metavar="WORD", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.take:
        print(json.dumps(take(options.take)))
        return 0
    print(
        "| run | parameters | micro-batch | predicted GB | measured GB | predicted / measured |\n|---|---|---|---|---|---|"
    )
    results = []
    for run in options.runs:
        results.append(compare(run.split()))
        print(row(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(abs(result["ratio"] - 1) > 0.1 for result in results))


def compare(words: list[str]) -> dict[str, Any]:
    """The prediction and the measurement of a recipe with settings."""
    planned = _asked([sys.executable, "-m", "smalllm", "plan", *words, "train.device=cpu", "--seconds", "0", "--json"])
    taken = _asked([sys.executable, __file__, "--take", *words])
    predicted = planned["memory_bytes"]["total"]
    if (planned["micro_batch"], planned["recompute"]) != (taken["micro_batch"], taken["recompute"]):
        raise UserError(f"{' '.join(words)}: the plan is micro-batch {planned['micro_batch']}, training takes {taken}")
    return {
        "run": " ".join(words), "parameters": planned["parameters"], "micro_batch": planned["micro_batch"],
        "predicted_bytes": predicted, "measured_bytes": taken["peak_bytes"], "ratio": predicted / taken["peak_bytes"],
        "memory_bytes": planned["memory_bytes"],
    }  # fmt: skip


def row(result: dict[str, Any]) -> str:
    """Of the table."""
    return (
        f"| `{result['run']}` | {result['parameters'] / 1e6:.1f} M | {result['micro_batch']} | {result['predicted_bytes'] / 1e9:.3f}"
        f" | {result['measured_bytes'] / 1e9:.3f} | {result['ratio']:.3f} |"
    )


def take(words: list[str]) -> dict[str, Any]:
    """Train a few steps in this process, with a checkpoint, and tell the most memory it has held."""
    config = load_recipe(words[0], [*words[1:], "train.device=cpu"])
    with (
        tempfile.TemporaryDirectory(prefix="smalllm-planner-") as folder,
        closing(TrainingBench(config, Path(folder))) as bench,
    ):
        trainer = bench.trainer
        bench.take(min(2, bench.recipe_micro_batches))
        for _ in range(2):
            bench.step()
        trainer.save()
        bench.step()
        trainer.saver.wait()
        bench.step()
        return {
            "peak_bytes": hardware.peak_memory(trainer.runtime.device), "micro_batch": trainer.micro_batch,
            "recompute": trainer.model.recompute,
        }  # fmt: skip


def _asked(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    sys.exit(main())
