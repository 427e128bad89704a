"""The index that finds what a story has copied: seconds and memory to build it, and to ask it, against the size of the data.

    uv run python benchmarks/novelty.py --megabytes 8 40 200

Each size is measured in a process of its own. Its text are stretches of 8 to 64 tokens of a real dataset (`--data`, by default
stories of the built-in world), taken at random: full of repetitions, which is what makes sorting slow. The last line is
computed from the largest size.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from smalllm.data.prepare import prepare
from smalllm.data.shards import TokenDataset
from smalllm.hardware import memory_now, peak_memory
from smalllm.judging.novelty import TrainingText
from smalllm.native.build import load

STORY_TOKENS = 250
STORIES = 200
COMPUTED = 2000  # megabytes


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[8, 40], help="text of the data, ascending")
    parser.add_argument("--data", type=Path, help="a folder that `smalllm prepare` made")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    load("suffixes")  # compiled before the clock runs
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or Path(folder) / "stories"
        if options.data is None:
            prepare(["storyworld:3000"], data, vocab_size=4096)
        rows = [alone(data, megabytes) for megabytes in sorted(options.megabytes)]
    rows.append(computed(rows[-1]))
    print(
        f"{'MB of text':>10} {'tokens':>13} {'build s':>9} {'MB kept':>9} {'MB at most':>10} {'B/token':>8} {'ms/story':>9}"
    )
    for row in rows:
        print(
            f"{row['megabytes']:>10,.0f} {row['tokens']:>13,} {row['build_seconds']:>9.2f} {row['kept_megabytes']:>9,.0f}"
            f" {row['peak_megabytes']:>10,.0f} {row['peak_bytes_per_token']:>8.2f} {row['story_milliseconds']:>9.3f}"
            f"{'  (computed)' if row['computed'] else ''}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def alone(data: Path, megabytes: float) -> dict[str, float]:
    """`measure` in a fresh process, whose largest memory is that of this size."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (data, megabytes))


def measure(data: Path, megabytes: float) -> dict[str, float]:
    """Build the index for so many megabytes of text, and look up stories: half of each is copied."""
    dataset = TokenDataset.open(data, verify=False)
    vocabulary = dataset.manifest.vocab_size
    base = dataset.train.read(0, dataset.train.tokens)
    tokens = int(megabytes * 1e6 * dataset.train.tokens / dataset.train.text_bytes)
    chance = np.random.default_rng(0)
    text = stretches(base, tokens, chance)
    before = memory_now(torch.device("cpu"))
    began = time.perf_counter()
    training = TrainingText([text], tokens, vocabulary)
    build_seconds, peak = time.perf_counter() - began, peak_memory(torch.device("cpu")) - before
    stories = [story(text, vocabulary, chance) for _ in range(STORIES)]
    began = time.perf_counter()
    for ids in stories:
        training.matches(ids)
    milliseconds = 1000 * (time.perf_counter() - began) / STORIES
    return {
        "megabytes": megabytes, "tokens": tokens, "build_seconds": build_seconds, "kept_megabytes": training.bytes / 1e6,
        "peak_megabytes": peak / 1e6, "peak_bytes_per_token": peak / tokens, "story_milliseconds": milliseconds,
        "computed": False,
    }  # fmt: skip


def stretches(base: np.ndarray, tokens: int, chance: np.random.Generator) -> np.ndarray:
    """So many tokens, stretches of 8 to 64 of the base one after another."""
    text, filled = np.empty(tokens, base.dtype), 0
    while filled < tokens:
        size = min(int(chance.integers(8, 65)), tokens - filled, len(base))
        start = int(chance.integers(0, len(base) - size + 1))
        text[filled : filled + size] = base[start : start + size]
        filled += size
    return text


def story(text: np.ndarray, vocabulary: int, chance: np.random.Generator) -> list[int]:
    """Ids of which the first half stands in the text, and the second hardly anywhere."""
    half = STORY_TOKENS // 2
    start = int(chance.integers(0, max(1, len(text) - half)))
    return [*text[start : start + half].tolist(), *chance.integers(0, vocabulary, half).tolist()]


def computed(row: dict[str, float]) -> dict[str, float]:
    """`COMPUTED` megabytes from the largest size: sorting and memory grow as the tokens do, a search as their logarithm."""
    scale = COMPUTED / row["megabytes"]
    tokens = int(row["tokens"] * scale)
    steps = math.log(tokens) / math.log(row["tokens"])
    return {
        "megabytes": COMPUTED, "tokens": tokens, "build_seconds": row["build_seconds"] * scale,
        "kept_megabytes": row["kept_megabytes"] * scale, "peak_megabytes": row["peak_megabytes"] * scale,
        "peak_bytes_per_token": row["peak_bytes_per_token"], "story_milliseconds": row["story_milliseconds"] * steps,
        "computed": True,
    }  # fmt: skip


if __name__ == "__main__":
    main()
