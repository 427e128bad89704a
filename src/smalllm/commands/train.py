"""`smalllm train`: what a run looks like while it learns. The work is `training.trainer`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO, cast

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from smalllm.config import RunConfig, UserError, load_recipe
from smalllm.data.prepare import PrepareProgress
from smalllm.metrics import Record, json_safe
from smalllm.native import build
from smalllm.terminal import LastingOutput, plain

if TYPE_CHECKING:
    from smalllm.training.state import Summary

PROGRAM = "uv run smalllm" if "UV_RUN_RECURSION_DEPTH" in os.environ else "smalllm"
"""How the user called us, so that hints can be copied."""
STAGES = {"read": "reading documents", "tokenizer": "learning the vocabulary", "encode": "encoding"}


def train(
    *words: Annotated[str, Parameter(name="RECIPE section.key=value", show_default=False)],
    data: Annotated[Path | None, Parameter(name="--data")] = None,
    out: Annotated[Path | None, Parameter(name="--out")] = None,
    minutes: Annotated[float | None, Parameter(name="--minutes")] = None,
    fresh: Annotated[bool, Parameter(name="--fresh", negative="")] = False,
    force: Annotated[bool, Parameter(name="--force", negative="")] = False,
    gpus: Annotated[int | None, Parameter(name="--gpus")] = None,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Train a model, or continue a run that was stopped.

    Parameters
    ----------
    words
        A recipe (a name, or a TOML file; default quickstart) and settings such as train.steps=100 optim.lr=3e-4.
    data
        A folder made by `smalllm prepare`; left out, the recipe's own data, prepared first when it is missing.
    out
        The run folder; left out, runs/NAME.
    minutes
        Wall-clock budget; the run plans its steps to end on time.
    fresh
        Start again; an old run is moved aside.
    force
        Continue a run even with settings or data after which its figures do not compare with those before.
    gpus
        Train on so many GPUs of this machine, a process each (with train.device=cpu: so many processes on the CPU).
    json_output
        Print one JSON object to standard output, everything else to standard error.
    """
    config = settings(words, data, minutes)
    if gpus is not None:
        flags = [flag for flag, given in (("--force", force), ("--json", json_output)) if given]
        return start_ranks(config, gpus, [*words, *_given(data=data, out=out, minutes=minutes), *flags], fresh)
    build.begin("kernels", "decode")  # while torch is imported and data is prepared
    from smalllm.ranks import is_first
    from smalllm.training.trainer import train as train_run

    if not is_first():
        return _code(train_run(config, out, fresh=fresh, force=force).stopped_because)
    console = Console(file=cast(TextIO, LastingOutput(sys.stderr if json_output else sys.stdout)))
    display = Bars(console, config) if console.is_terminal else Lines(console, config)
    command = shlex.join(["smalllm", "train", *words, *_given(data=data, out=out, minutes=minutes)])
    try:
        summary = train_run(
            config, out, fresh=fresh, display=display, progress=display.preparing, command=command, force=force
        )
    finally:
        display.close()
    if json_output:
        print(json.dumps(json_safe(dataclasses.asdict(summary))))
    else:
        closing(console, summary)
    return _code(summary.stopped_because)


def _code(stopped_because: str) -> int:
    return {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}.get(stopped_because, 0)


def start_ranks(config: RunConfig, gpus: int, arguments: list[str], fresh: bool) -> int:
    """The same command as so many ranks under torchrun's agent; the exit code. UserError when there are fewer GPUs."""
    from smalllm.hardware import gpu_count
    from smalllm.ranks import launch

    if gpus < 1 or (config.train.device != "cpu" and gpus > gpu_count()):
        raise UserError(
            f"--gpus {gpus}: PyTorch sees {gpu_count()} GPUs here; give a number from 1 to that, or start processes on the CPU"
            " with train.device=cpu"
        )
    first = ["train", *arguments, *(["--fresh"] if fresh else [])]
    return launch(first, ["train", *arguments], gpus, lambda words: print(plain(words), file=sys.stderr, flush=True))


def settings(words: tuple[str, ...], data: Path | None, minutes: float | None) -> RunConfig:
    """The run's settings from the words of the command line; an option wins over the same key as a word."""
    recipe, overrides = "quickstart", list(words)
    if words and "=" not in words[0]:
        recipe, overrides = words[0], list(words[1:])
    if data is not None:
        if not (data / "manifest.json").exists():
            raise UserError(f"--data {data} holds no prepared data; run: smalllm prepare SOURCE --out {data}")
        overrides.append(f"data.path={data}")
    if minutes is not None:
        overrides.append(f"train.minutes={minutes}")
    return load_recipe(recipe, overrides)


def _given(**options: object) -> list[str]:
    """The options that were given, as words of a command line."""
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


class Lines:
    """Plain lines, for logs and pipes."""

    def __init__(self, console: Console, config: RunConfig) -> None:
        self.console = console
        self.said: str = ""
        self.bits: Record = {}
        self.note(heading(config))

    def preparing(self, state: PrepareProgress) -> None:
        if state.stage != self.said:
            self.said = state.stage
            self.note(f"data: {STAGES[state.stage]}")

    def progress(self, record: Record) -> None:
        self.console.print(Text(line(self.remembered(record))), soft_wrap=True)

    def remembered(self, record: Record) -> Record:
        """The record with the bits per byte of the last evaluation."""
        self.bits = (
            {"valid_bits_per_byte": record["valid_bits_per_byte"]} if "valid_bits_per_byte" in record else self.bits
        )
        return self.bits | record

    def story(self, step: int, prompt: str, text: str) -> None:
        self.console.print(
            Text.assemble((f"[step {step}] ", "dim"), (plain(prompt), "bold"), plain(text)), soft_wrap=True
        )

    def note(self, message: str) -> None:
        self.console.print(Text(plain(message)), soft_wrap=True)

    def close(self) -> None:
        pass


class Bars(Lines):
    """A live bar with the figures of the last logged step; stories scroll by above it."""

    def __init__(self, console: Console, config: RunConfig) -> None:
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            Figures(),
            console=console,
            expand=True,
        )
        super().__init__(console, config)
        self.task = self.bars.add_task("preparing", total=1.0, figures="")
        self.bars.start()

    def preparing(self, state: PrepareProgress) -> None:
        """Show how far the preparation of the data has come."""
        share = min(1.0, state.done_bytes / state.total_bytes) if state.total_bytes else 0.0
        self.bars.update(
            self.task, description=STAGES[state.stage], completed=share, figures=f"{state.documents} documents"
        )

    def progress(self, record: Record) -> None:
        self.bars.update(
            self.task,
            description=f"step {record['step']}",
            completed=record["progress"],
            figures=figures(self.remembered(record)),
        )

    def note(self, message: str) -> None:
        self.bars.console.print(Text(plain(message), "dim"))

    def story(self, step: int, prompt: str, text: str) -> None:
        story = Text.assemble((f"{_step(step)}  ", "cyan"), (plain(prompt), "bold"), plain(text).replace("\n", " "))
        self.bars.console.print(story)
        self.bars.console.print()

    def close(self) -> None:
        self.bars.stop()


class Figures(ProgressColumn):
    """Text at the right of the bar."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("figures", ""))


def heading(config: RunConfig) -> str:
    """What is about to be trained, in one line."""
    model, train = config.model, config.train
    length = " or ".join(
        part
        for part in (
            f"{train.steps} steps" if train.steps else "",
            f"{train.minutes:g} minutes" if train.minutes else "",
        )
        if part
    )
    return (
        f"{config.name}: {model.layers} layers x {model.width} wide, context {model.context}, {model.architecture} shape,"
        f" {config.optim.kind}, {train.batch_tokens} tokens a step, {length}"
    )


def figures(record: Record) -> str:
    """What stands beside the bar: loss, bits per byte, speed, MFU, memory, time left."""
    parts = []
    if record.get("train_loss") is not None:
        parts.append(f"loss {record['train_loss']:.3f}")
    if record.get("valid_bits_per_byte") is not None:
        parts.append(f"{record['valid_bits_per_byte']:.3f} bits/byte")
    if "tokens_per_second" in record:
        parts.append(f"{_thousands(record['tokens_per_second'])} tokens/s")
        parts.append(f"MFU {record['mfu']:.0%}")
        parts.append(f"{record['memory_bytes'] / 2**30:.1f} GiB")
    if math.isfinite(record.get("eta_seconds", math.nan)):
        parts.append(f"ETA {_clock(record['eta_seconds'])}")
    return "  ".join(parts)


def line(record: Record) -> str:
    """A logged step where there is no bar."""
    return f"{_step(record['step'])}  {record['progress']:4.0%}  {figures(record)}"


def closing(console: Console, summary: Summary) -> None:
    """How it went, a whole story, the curve, and what to do next."""
    run = Path(summary.run)
    console.print(Text(plain(f"\n{outcome(summary)}")), soft_wrap=True)
    if summary.stopped_because.startswith("SIG"):
        console.print(
            Text(plain(f"The run is saved; go on with the same command, or read: {PROGRAM} sample {run}")),
            soft_wrap=True,
        )
        return
    console.print(Text(f"\n{last_story(run)}\n"), soft_wrap=False)
    console.print(Text(plain(f"The curve is in {draw(run)}")), soft_wrap=True)
    console.print(
        Text(plain(f"Next: {PROGRAM} chat {run}     (more stories: {PROGRAM} sample {run} --count 3)")), soft_wrap=True
    )


def outcome(summary: Summary) -> str:
    """How a run ended, in sentences."""
    words = [
        f"{summary.run}: step {summary.step}, {_thousands(summary.tokens)} tokens in {_clock(summary.seconds)}"
        f" ({_thousands(summary.tokens_per_second)} tokens/s, MFU {summary.mfu:.0%}); stopped because of: {summary.stopped_because}."
    ]
    if math.isfinite(summary.valid_loss):
        words.append(f"On held-out stories: {summary.valid_bits_per_byte:.4f} bits per byte.")
    if summary.floor_bits_per_byte:
        excess = summary.valid_bits_per_byte / summary.floor_bits_per_byte - 1
        words.append(
            f"The exact entropy of this corpus, which no model can beat, is {summary.floor_bits_per_byte:.4f}: {excess:.1%} above it."
        )
    return " ".join(words)


def last_story(run: Path) -> str:
    """A whole story by the best checkpoint."""
    from smalllm.checkpoint import open_run
    from smalllm.generation import Generator, SamplingParams

    loaded = open_run(run)
    completion = Generator(loaded.model, loaded.tokenizer).complete(
        "Once upon a time", SamplingParams(max_tokens=300, seed=7)
    )
    return plain(completion.prompt + completion.text)


def draw(run: Path) -> Path:
    """The curve of the run, as a picture in its folder."""
    from smalllm.plots import plot_runs

    return plot_runs([run], run / "curve.png")


def _step(step: int) -> str:
    return f"step {step:>6}"


def _thousands(number: float) -> str:
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.1f}k" if number >= 1e4 else f"{number:.0f}"


def _clock(seconds: float) -> str:
    whole = round(max(0.0, seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
