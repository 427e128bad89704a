"""`smalllm evaluate`: bits per byte, scorecard, judge and minimal pairs. The work is theirs; here are words and tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from smalllm.checkpoint import LoadedRun, open_run
from smalllm.config import UserError
from smalllm.evaluation import evaluate_run
from smalllm.generation import SamplingParams
from smalllm.hardware import pick_device
from smalllm.judging.judge import Judge, judge_stories
from smalllm.judging.minimal_pairs import pairs as make_pairs
from smalllm.judging.minimal_pairs import score_pairs
from smalllm.judging.scorecard import read_prompts, score_run, tell
from smalllm.terminal import plain


def evaluate(
    run: Annotated[str | None, Parameter(name="RUN", show_default=False)] = None,
    *,
    text: Annotated[str | None, Parameter(name="--text")] = None,
    limit: Annotated[int | None, Parameter(name="--limit")] = None,
    checkpoint: Annotated[str, Parameter(name="--checkpoint")] = "best",
    stories: Annotated[int, Parameter(name="--stories")] = 0,
    prompts: Annotated[Path | None, Parameter(name="--prompts")] = None,
    temperature: Annotated[float, Parameter(name="--temperature")] = 0.8,
    max_tokens: Annotated[int, Parameter(name="--max-tokens")] = 1000,
    seed: Annotated[int, Parameter(name="--seed")] = 0,
    novelty: Annotated[bool, Parameter(name="--novelty", negative="--no-novelty")] = True,
    judge: Annotated[str | None, Parameter(name="--judge")] = None,
    judge_model: Annotated[str | None, Parameter(name="--judge-model")] = None,
    pairs: Annotated[bool, Parameter(name="--pairs", negative="")] = False,
    device: Annotated[str, Parameter(name="--device")] = "auto",
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Measure a model: loss, perplexity, and bits per byte with its 95 % interval; if wanted, the stories that it tells.

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
    prompts
        A file of beginnings for these stories, one a line, taken in turn [default: stories begin from nothing].
    temperature
        Temperature of these stories.
    max_tokens
        The longest of these stories.
    seed
        The same seed gives the same stories.
    novelty
        Search the training data for what these stories have copied from it.
    judge
        Let the model at this address grade these stories, such as http://localhost:8000/v1; its key is read from
        SMALLLM_JUDGE_KEY.
    judge_model
        The name of the judge [default: the first that it lists].
    pairs
        Ask which of two sentences is more probable, the right one or the wrong one: agreement, pronouns, endings.
    device
        auto, cpu, mps, cuda or cuda:N.
    json_output
        Print one JSON object to standard output.
    """
    beginnings = read_prompts(prompts) if prompts else [""]
    stories = stories or (len(beginnings) if prompts else 0)
    _check(stories, limit, judge, judge_model)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    asked = Judge.open(judge, judge_model) if judge else None
    loaded = open_run(run, checkpoint, pick_device(device))
    result = evaluate_run(loaded, text=text, limit=limit)
    if stories:
        result["stories"] = _stories(
            loaded, stories, beginnings, sampling, novelty, "floor_bits_per_byte" in result, asked
        )
    if pairs:
        result["pairs"] = score_pairs(loaded.model, loaded.tokenizer, make_pairs())
    if json_output:
        print(json.dumps(result))
    else:
        _print(result, f"{loaded.folder.path.name}, step {result['step']}")


def _check(stories: int, limit: int | None, judge: str | None, judge_model: str | None) -> None:
    if stories < 0 or (limit is not None and limit < 1):
        setting, value, least = ("stories", stories, 0) if stories < 0 else ("limit", limit, 1)
        raise UserError(f"{setting} = {value} is not possible; use {least} or more")
    if judge and not stories:
        raise UserError("judge needs stories to grade; add --stories 50")
    if judge_model and not judge:
        raise UserError(f"judge_model = {judge_model} has no address; add --judge URL")


def _stories(
    run: LoadedRun,
    count: int,
    beginnings: list[str],
    sampling: SamplingParams,
    novelty: bool,
    of_storyworld: bool,
    judge: Judge | None,
) -> dict[str, Any]:
    """The scorecard, with the judge's grades under ``judge``."""
    told = tell(run, count, sampling, beginnings)
    card = score_run(run, told, novelty=novelty, of_storyworld=of_storyworld)
    if judge:
        card["judge"] = judge_stories(judge, [(story.prompt, story.text) for story in told], run.folder.path)
    return card


# ── for people ──


def _print(result: dict[str, Any], title: str) -> None:
    console = Console(highlight=False)
    table = Table(title=Text(plain(title)), show_header=False)
    for name, value in _lines(result):
        table.add_row(Text(name), Text(plain(value)))
    console.print(table)
    if card := result.get("stories"):
        console.print(_card(card))
    if judged := card and card.get("judge"):
        title = f"{judged['count']} stories graded 1 to 10 by {judged['model']}, {judged['unreadable']} without a grade"
        console.print(_rows(title, judged, ("grade", "95 % interval")))
    if found := result.get("pairs"):
        console.print(_pairs(found))


def _lines(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values, the headline figure first."""
    low, high = result["bits_per_byte_interval"]
    yield "bits per byte", f"{result['bits_per_byte']:.4f}  (95 % interval {low:.4f} to {high:.4f})"
    if "floor_bits_per_byte" in result:
        yield "floor", f"{result['floor_bits_per_byte']:.4f}  (the exact distribution of the story world)"
    yield "loss", f"{result['loss']:.4f} nats per token"
    yield "perplexity", f"{result['perplexity']:.2f}"
    yield "scored", f"{result['tokens']:,} tokens, {result['bytes']:,} bytes, {result['documents']:,} documents"
    if leaks := result["leaks"]:
        yield "leaks", leaks_line(leaks)


def leaks_line(leaks: Mapping[str, Any]) -> str:
    """How many of the scored documents the model has seen in training."""
    compared = f"{leaks['valid_documents']:,} documents against {leaks['train_documents']:,} of the training data"
    if not (leaks["exact"] or leaks["near"]):
        return f"none ({compared})"
    return (
        f"{leaks['exact']:,} word for word, {leaks['near']:,} nearly ({compared}): the figures above are too good by what the"
        " model remembers of them"
    )


def _card(card: dict[str, Any]) -> Table:
    """The scorecard beside the data's, where that is at hand."""
    return _rows(f"{card['count']} stories", card, ("told", "95 % interval", *(("data",) if "data" in card else ())))


def _rows(title: str, figures: Mapping[str, Any], columns: tuple[str, ...]) -> Table:
    """A line for each figure: its name, its value, its interval, the data's value."""
    table = Table("", *columns, title=Text(plain(title)))
    for name, value in figures.items():
        if name in ("count", "intervals", "data", "judge", "model", "unreadable"):
            continue
        interval = figures.get("intervals", {}).get(name)
        spread = f"{_shown(interval[0])} to {_shown(interval[1])}" if interval else ""
        beside = _shown(figures.get("data", {}).get(name, ""))
        table.add_row(
            *(Text(plain(cell)) for cell in (name.replace("_", " "), _shown(value), spread, beside)[: len(columns) + 1])
        )
    return table


def _pairs(found: Mapping[str, Any]) -> Table:
    table = Table("minimal pairs", "right", "95 % interval", "pairs", title=Text("by chance 50 % are right"))
    for kind, figures in found.items():
        low, high = figures["interval"]
        table.add_row(kind, f"{figures['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", f"{figures['count']:,}")
    return table


def _shown(value: Any) -> str:
    match value:
        case dict():
            return ", ".join(f"{kind} {count}" for kind, count in value.items()) or "none"
        case float():
            return f"{value:.1f}" if value >= 100 else f"{value:.3f}"
        case int():
            return f"{value:,}"
    return " ".join(str(value if value is not None else "none").split())
