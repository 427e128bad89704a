"""`smalllm evaluate`: measure a model in bits per byte. The work is `evaluation`; here are words and a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from smalllm.checkpoint import open_run
from smalllm.config import UserError
from smalllm.evaluation import evaluate_run
from smalllm.generation import SamplingParams
from smalllm.hardware import pick_device
from smalllm.terminal import plain


def evaluate(
    run: Annotated[str | None, Parameter(name="RUN", show_default=False)] = None,
    *,
    text: Annotated[str | None, Parameter(name="--text")] = None,
    limit: Annotated[int | None, Parameter(name="--limit")] = None,
    checkpoint: Annotated[str, Parameter(name="--checkpoint")] = "best",
    stories: Annotated[int, Parameter(name="--stories")] = 0,
    temperature: Annotated[float, Parameter(name="--temperature")] = 0.8,
    max_tokens: Annotated[int, Parameter(name="--max-tokens")] = 1000,
    seed: Annotated[int, Parameter(name="--seed")] = 0,
    device: Annotated[str, Parameter(name="--device")] = "auto",
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Measure a model: loss, perplexity, and bits per byte with its 95 % interval.

    Parameters
    ----------
    run
        A run folder, or one checkpoint folder of a run [default: the newest run under runs/].
    text
        A file to score, its documents separated by a line <|endoftext|> [default: the validation documents of the run].
    limit
        Score the first N documents only.
    checkpoint
        best, latest or a step.
    stories
        Let the model tell N stories as well and report on them.
    temperature
        Temperature of these stories.
    max_tokens
        The longest of these stories.
    seed
        The same seed gives the same stories.
    device
        auto, cpu, mps, cuda or cuda:N.
    json_output
        Print one JSON object to standard output.
    """
    if stories < 0 or (limit is not None and limit < 1):
        setting, value, least = ("stories", stories, 0) if stories < 0 else ("limit", limit, 1)
        raise UserError(f"{setting} = {value} is not possible; use {least} or more")
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    loaded = open_run(run, checkpoint, pick_device(device))
    result = evaluate_run(loaded, text=text, limit=limit, stories=stories, sampling=sampling)
    if json_output:
        print(json.dumps(result))
    else:
        _print_table(result, f"{loaded.folder.path.name}, step {result['step']}")


def _print_table(result: dict[str, Any], title: str) -> None:
    table = Table(title=Text(plain(title)), show_header=False)
    for name, value in _lines(result):
        table.add_row(Text(name), Text(plain(value)))
    Console(highlight=False).print(table)


def _lines(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values for people, the headline figure first."""
    low, high = result["bits_per_byte_interval"]
    yield "bits per byte", f"{result['bits_per_byte']:.4f}  (95 % interval {low:.4f} to {high:.4f})"
    if "floor_bits_per_byte" in result:
        yield "floor", f"{result['floor_bits_per_byte']:.4f}  (the exact distribution of the story world)"
    yield "loss", f"{result['loss']:.4f} nats per token"
    yield "perplexity", f"{result['perplexity']:.2f}"
    yield "scored", f"{result['tokens']:,} tokens, {result['bytes']:,} bytes, {result['documents']:,} documents"
    for name, value in result.get("stories", {}).items():
        yield f"stories: {name.replace('_', ' ')}", _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{kind} {count}" for kind, count in value.items()) or "none"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
