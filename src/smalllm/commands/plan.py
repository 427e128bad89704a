"""`smalllm plan`: what a run will take, before it begins. The work is `planner` and `forecast`."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from smalllm.config import RunConfig, UserError
from smalllm.metrics import Silence
from smalllm.native import build
from smalllm.terminal import plain

if TYPE_CHECKING:
    from smalllm.forecast import Forecast
    from smalllm.planner import RunPlan, Speed

SECONDS, PROXY_SECONDS = 5.0, 60.0
PIPE_COLUMNS = 120
SOURCES = {
    "measured": "measured here on random tokens",
    "card": "40 to 80 % of what the maker's figures allow, assumed",
    "peak": "estimated from this machine's matrix product, not measured",
}


def plan(
    *words: Annotated[str, Parameter(name="RECIPE section.key=value", show_default=False)],
    data: Annotated[Path | None, Parameter(name="--data")] = None,
    minutes: Annotated[float | None, Parameter(name="--minutes")] = None,
    card: Annotated[str | None, Parameter(name="--card")] = None,
    vram: Annotated[str | None, Parameter(name="--vram")] = None,
    gpus: Annotated[int, Parameter(name="--gpus")] = 1,
    price: Annotated[float | None, Parameter(name="--price")] = None,
    seconds: Annotated[float, Parameter(name="--seconds")] = SECONDS,
    forecast: Annotated[bool, Parameter(name="--forecast", negative="")] = False,
    proxy_seconds: Annotated[float, Parameter(name="--proxy-seconds")] = PROXY_SECONDS,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Tell what a run will take before it begins: memory by part, how a step is divided, speed, hours, money.

    Parameters
    ----------
    words
        A recipe (a name, or a TOML file; default quickstart) and settings such as model.layers=8 train.minutes=60.
    data
        A folder made by `smalllm prepare`; left out, the recipe's own data, if it is prepared.
    minutes
        Wall-clock budget, as in `smalllm train`.
    card
        Plan for a card such as "RTX 4090", T4, H100 or "M2 Max", by its maker's figures; left out, for this machine.
    vram
        Memory that the run may take, such as 8G; without a GPU here and without --card, on the smallest card that has it.
    gpus
        So many of them in one machine, as in `smalllm train --gpus`.
    price
        Of an hour of the machine, in any currency: tells what the run costs.
    seconds
        How long to measure the speed of this machine; 0: estimate it.
    forecast
        Train a ladder of short runs here and forecast the bits per byte of the planned run, with an interval. The data is
        prepared first when it is missing; short runs are kept in the user's cache.
    proxy_seconds
        How long the longest of these short runs may take, about.
    json_output
        Print one JSON object to standard output, everything else to standard error.
    """
    _check(seconds, price, proxy_seconds)
    config = _settings(words, data, minutes, forecast)
    made = make_plan(config, card, vram, price, seconds, gpus)
    told = make_forecast(made, proxy_seconds) if forecast else None
    if json_output:
        print(json.dumps({**made.figures(), "forecast": told.figures()} if told else made.figures()))
    else:
        _print(made, told, _training(words, data, minutes, made))
    return 0


def _check(seconds: float, price: float | None, proxy_seconds: float) -> None:
    if not 0.0 < proxy_seconds < math.inf:
        raise UserError(
            f"--proxy-seconds {proxy_seconds:g} must be a number of seconds above 0; try --proxy-seconds 60"
        )
    if not 0.0 <= seconds < math.inf:
        raise UserError(f"--seconds {seconds:g} must be a number of seconds, or 0 to estimate; try --seconds 5")
    if price is not None and not 0.0 <= price < math.inf:
        raise UserError(f"--price {price:g} is not the price of an hour; give a number such as 0.35")


def _settings(words: tuple[str, ...], data: Path | None, minutes: float | None, prepared: bool) -> RunConfig:
    """The settings with a vocabulary; ``prepared``: that of the data, which is made when it is missing."""
    from smalllm.commands.train import Lines, settings
    from smalllm.planner import settle

    config = settings(words, data, minutes)
    if not prepared:
        return settle(config)
    from smalllm.training.setting_out import open_data, settled

    return settled(config, open_data(config, Lines(Console(stderr=True), config).preparing))


def make_plan(
    config: RunConfig, card: str | None, vram: str | None, price: float | None, seconds: float, gpus: int = 1
) -> RunPlan:
    """The plan; the speed of this machine is measured where that takes seconds."""
    import smalllm.training.trainer  # noqa: F401  what a training process holds before there is a model
    from smalllm import hardware
    from smalllm.planner import can_be_measured, find_place, parse_bytes, plan_run

    config, place = find_place(config, card, parse_bytes(vram) if vram is not None else None, gpus)
    held = 0 if place.card else hardware.memory_now(place.runtime.device)
    made = plan_run(config, place, price=price, held=held)
    if seconds and can_be_measured(made):
        made = plan_run(config, place, measure(config, seconds), price, held)
    return made


def measure(config: RunConfig, seconds: float) -> Speed:
    """Tokens per second of the trainer's own steps: the median, the slowest and the fastest."""
    build.begin("kernels")
    from smalllm.planner import Speed
    from smalllm.speed.training import TrainingBench

    print(f"measuring {config.name} for {seconds:g} s", file=sys.stderr)
    with (
        tempfile.TemporaryDirectory(prefix="smalllm-plan-") as folder,
        closing(TrainingBench(config, Path(folder), Silence())) as bench,
    ):
        bench.step()
        bench.fill(seconds)
        rates, _ = bench.measure(seconds)
    return Speed(median(rates), min(rates), max(rates), "measured")


def make_forecast(made: RunPlan, proxy_seconds: float) -> Forecast:
    """The forecast of a planned run, from proxies trained on this machine."""
    from smalllm.data.shards import TokenDataset
    from smalllm.forecast import forecast as forecast_run
    from smalllm.planner import REACHED_HERE
    from smalllm.runtime import make_runtime

    config = made.config.replace(train={"steps": made.steps})
    if made.speed.source == "measured":
        flops = proxy_seconds * made.speed.tokens_per_second * made.flops_per_token
    else:
        flops = proxy_seconds * REACHED_HERE[0] * make_runtime(config.train.device, config.train.precision).peak_flops()
    return forecast_run(config, TokenDataset.open(config.data_path), flops, lambda words: print(words, file=sys.stderr))


# ── appearance ──


def _print(made: RunPlan, told: Forecast | None, command: str) -> None:
    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    console = Console(markup=False, emoji=False, highlight=False, width=width)
    console.print(Text(plain(heading(made)), "bold"), soft_wrap=True)
    grid = Table.grid(padding=(0, 2))
    for name, figure, meaning in [*rows(made), *(forecast_rows(told) if told else [])]:
        grid.add_row(Text(name, "dim"), Text(plain(figure)), Text(plain(meaning), "dim"))
    console.print(grid)
    for sentence in [*(told.notes if told else []), *advice(made, command)]:
        console.print(Text(plain(sentence)), soft_wrap=True)


def heading(made: RunPlan) -> str:
    """What is planned, and for where."""
    model, place = made.config.model, made.place
    shape = f"{model.layers} layers x {model.width}, context {model.context}, vocabulary {model.vocab_size:,}"
    return f"{made.config.name}: {shape}, {made.config.optim.kind}, on {place} in {place.runtime.precision}"


def rows(made: RunPlan) -> list[tuple[str, str, str]]:
    """Name, figure and meaning of each line."""
    train, memory, speed = made.config.train, made.memory, made.speed
    gpus, (low, high) = made.place.gpus, made.efficiency
    many = gpus > 1
    named = {name: size for name, size in dataclasses.asdict(memory).items() if size}
    found = [
        ("parameters", f"{made.parameters:,}", f"{made.embedding_parameters:,} of them in embeddings and head"),
        ("arithmetic", _unit(made.flops_per_token, "FLOP a token"), "forward and backward"),
        ("memory", _unit(memory.total, "B"), f"at most, of {_unit(made.place.memory_bytes, 'B')}{' of each GPU' if many else ''}; by part:"),
        *(("", f"  {_unit(size, 'B')}", f"  {PARTS[name]}") for name, size in named.items()),
        ("a step", f"{train.batch_tokens:,} tokens", f"{f'{gpus} GPUs x ' if many else ''}{made.accumulation} x micro-batch {made.micro_batch} x context {made.config.model.context}{', recomputed' if made.recompute else ''}"),
        ("speed", f"{_rounded(speed.tokens_per_second)} tokens/s", f"{_rounded(speed.low)} to {_rounded(speed.high)}, {SOURCES[speed.source]}"),
        *([("", f"{low:.0%} to {high:.0%}", f"of {gpus} GPUs that need not exchange gradients; over links assumed")] if many else []),
        ("length", f"{_unit(made.tokens, 'tokens')}", f"{made.steps:,} steps, {_epochs(made)}"),
        ("time", _duration(made.hours), "with evaluations"),
    ]  # fmt: skip
    if made.cost is not None:
        found.append(("cost", f"{made.cost:.2f}", f"at {made.price:g} an hour, the price you gave"))
    return found


def forecast_rows(told: Forecast) -> list[tuple[str, str, str]]:
    """The same of a forecast."""
    low, high = told.interval
    found = [
        ("forecast", f"{told.bits_per_byte:.3f} bits/byte", f"{low:.3f} to {high:.3f} in {told.level:.0%} of cases, from {len(told.proxies)} short runs"),
        ("", "", f"the longest of them, with {1 / told.reach:.1%} of the arithmetic, came to {told.last_proxy:.3f}"),
    ]  # fmt: skip
    if told.floor is not None:
        found.append(("", "", f"the exact entropy of the corpus is {told.floor:.3f}"))
    return found


PARTS = {
    "process": "Python, PyTorch and the driver, before there is a model",
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "state of the optimizer",
    "checkpoint": "the copy that is saved while training goes on",
    "activations": "kept for the backward pass",
    "logits": "a part of the logits, and the head's gradient",
    "update": "the optimizer's update beyond those",
}


def advice(made: RunPlan, command: str) -> list[str]:
    """What to do next; ``command`` trains what was planned."""
    if not made.fits:
        needed, there = _unit(made.memory.total, "B"), _unit(made.place.memory_bytes, "B")
        return [f"It does not fit: it takes {needed} and {made.place.name} has {there}{made.instead}."]
    told = [f"{'There' if made.place.card else 'Next'}: {command}"]
    if made.epochs is not None and made.epochs > MANY_EPOCHS:
        told.insert(
            0,
            f"It reads its data {made.epochs:.0f} times; beyond about {MANY_EPOCHS} more data helps more than more steps"
            " (Muennighoff et al., arXiv 2305.16264).",
        )
    return told


def _training(words: tuple[str, ...], data: Path | None, minutes: float | None, made: RunPlan) -> str:
    """The command that trains what was planned."""
    from smalllm.commands.train import PROGRAM

    options = [] if data is None else ["--data", str(data)]
    options += [] if minutes is None else ["--minutes", f"{minutes:g}"]
    options += [] if made.place.gpus == 1 else ["--gpus", str(made.place.gpus)]
    limit = made.config.train.memory_gb
    given = any(word.startswith("train.memory_gb=") for word in words)
    memory = [f"train.memory_gb={limit:g}"] if limit and not given else []
    return f"{'smalllm' if made.place.card else PROGRAM} {shlex.join(['train', *words, *memory, *options])}"


MANY_EPOCHS = 4


def _epochs(made: RunPlan) -> str:
    return "data not prepared yet" if made.epochs is None else f"the data {made.epochs:.2g} times"


def _unit(number: float, unit: str) -> str:
    """Three digits and a prefix: 1.23 GB, 45.6 MFLOP."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            digits = max(0, 2 - int(math.log10(number / size)))
            return f"{number / size:.{digits}f} {prefix}{' ' if unit == 'tokens' else ''}{unit}"
    return f"{number:.0f} {unit}"


def _rounded(number: float) -> str:
    """Three digits that count: a speed is not known better."""
    digits = max(0, int(math.log10(max(1.0, number))) - 2)
    return f"{round(number, -digits):,.0f}"


def _duration(hours: float) -> str:
    minutes = round(60 * hours)
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{60 * hours:.1f} min"
