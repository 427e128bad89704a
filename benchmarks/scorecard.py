"""Whether the measures of the scorecard follow how good a model is: over the checkpoints of a run, and over models of several sizes.

    uv run python benchmarks/scorecard.py --run runs/large --models runs/small runs/middle runs/large

Each measure that the data has too is judged by how near it comes to the data's figure, `ended` by itself. The order is that of
bits per byte on the first validation documents, and the table gives Spearman's rank correlation with it: 1 is a measure that
never contradicts it, 0 one that knows nothing of it. Measures that a model without names or speech passes by saying nothing
(`names_kept`) can only be read beside the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smalllm.checkpoint import RunFolder, open_run
from smalllm.evaluation import evaluate_run
from smalllm.generation import SamplingParams
from smalllm.judging.scorecard import score_run, tell

BY_ITSELF = ("ended", "length_distance")
OTHER = {"count", "searched_tokens", "searched_share", "length_distance_by_chance", "violations"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run whose checkpoints are compared")
    parser.add_argument("--models", nargs="+", default=[], help="runs of several sizes")
    parser.add_argument("--stories", type=int, default=200)
    parser.add_argument("--documents", type=int, default=200, help="validation documents for the bits per byte")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    found: dict[str, list[dict[str, Any]]] = {}
    if options.run:
        steps = RunFolder(Path(options.run)).steps()
        found["checkpoints"] = [card(options.run, str(step), options.stories, options.documents) for step in steps]
    if options.models:
        found["models"] = [card(run, "latest", options.stories, options.documents) for run in options.models]
    for title, cards in found.items():
        print(table(title, cards))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def card(run: str, checkpoint: str, stories: int, documents: int) -> dict[str, Any]:
    """A scorecard with the bits per byte."""
    loaded = open_run(run, checkpoint)
    told = tell(loaded, stories, SamplingParams(max_tokens=1000, temperature=0.8, seed=0), [""])
    figures = score_run(loaded, told, novelty=True, of_storyworld=False)
    bits = evaluate_run(loaded, limit=documents)["bits_per_byte"]
    return {"name": f"{Path(run).name} {loaded.step}", "bits_per_byte": bits, **figures}


def table(title: str, cards: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each measure, its figures from the worst model to the best, the data's, and the correlation."""
    cards = sorted(cards, key=lambda one: -float(one["bits_per_byte"]))
    order = np.array([-one["bits_per_byte"] for one in cards])
    names = [one["name"] for one in cards]
    lines = [f"| {title} | {' | '.join(names)} | data | rank correlation |", "|---" * (len(cards) + 3) + "|"]
    lines.append(f"| bits per byte | {' | '.join(f'{-value:.3f}' for value in order)} | | |")
    for name in measures(cards[0]):
        values = np.array([float(one[name]) for one in cards])
        data = cards[0].get("data", {}).get(name)
        nearness = -np.abs(values - data) if data is not None else values if name == "ended" else -values
        shown = " | ".join(f"{value:.3g}" for value in values)
        lines.append(
            f"| `{name}` | {shown} | {'' if data is None else f'{data:.3g}'} | {spearman(nearness, order):+.2f} |"
        )
    return "\n".join([*lines, ""])


def measures(card: Mapping[str, Any]) -> list[str]:
    """Those that are numbers, and that the data has too or that speak for themselves."""
    data = card.get("data", {})
    numbers = [name for name, value in card.items() if isinstance(value, int | float) and name not in OTHER]
    return [name for name in numbers if name in BY_ITSELF or isinstance(data.get(name), int | float)]


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation, ties with their mean rank (Spearman 1904); 0 where all values are equal."""
    ranks = [ranked(values) - (len(values) - 1) / 2 for values in (one, other)]
    size = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float(ranks[0] @ ranks[1]) / size if size else 0.0


def ranked(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values their mean: [3, 1, 1] -> [2, 0.5, 0.5]."""
    below = (values[None, :] < values[:, None]).sum(axis=1)
    return np.asarray(below + ((values[None, :] == values[:, None]).sum(axis=1) - 1) / 2, dtype=float)


if __name__ == "__main__":
    main()
