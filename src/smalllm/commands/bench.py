"""`smalllm bench`: how fast this machine prepares text, trains a recipe, decodes with a model and serves it. The work is `speed`.

Nothing is downloaded or kept. What loads torch is imported inside functions here: the time to the first step or token counts
from the start of the verb, imports included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from smalllm.config import UserError
from smalllm.native import build

if TYPE_CHECKING:
    from smalllm.decoder import Weights
    from smalllm.model import GPT
    from smalllm.tokenizer import Tokenizer

MOST_BATCH = 1024
MEGABYTES_PER_SECOND = 1.0
"""Of text that `bench prepare` takes for each of --seconds; most of the time it is made."""
TOKENS = 128
"""Of an answer in `bench serve`."""
SECONDS = {"train": 20.0, "decode": 5.0, "prepare": 20.0, "serve": 10.0}


def bench(
    what: Annotated[Literal["train", "decode", "prepare", "serve"], Parameter(name="WHAT")],
    /,
    *words: Annotated[str, Parameter(name="RUN|RECIPE section.key=value", show_default=False)],
    seconds: Annotated[float | None, Parameter(name="--seconds", show_default=False)] = None,
    batch: Annotated[int | None, Parameter(name="--batch", show_default=False)] = None,
    weights: Annotated[
        Literal["auto", "fp32", "bf16", "int8"] | None, Parameter(name="--weights", show_default=False)
    ] = None,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Measure how fast this machine prepares text, trains a recipe, decodes with a model, or serves it; nothing is kept.

    Parameters
    ----------
    what
        What to measure.
    words
        train: a recipe (a name, or a TOML file; default quickstart) and settings such as train.precision=fp32
        model.context=1024. decode: a run folder, or a recipe and settings, whose weights are then random (default: the
        newest run, or quickstart). prepare: a recipe, whose vocabulary is taken. serve: a run folder (default: the newest).
    seconds
        How long to measure after the first step or token (train: 20, and five steps at least; decode: 5; serve: 10;
        prepare: 20, for 20 MB of stories, most of which is making them).
    batch
        decode: how many texts at once (1). serve: how many clients at once (16).
    weights
        decode: auto, fp32, bf16 or int8.
    json_output
        Print one JSON object to standard output, everything else to standard error.
    """
    started = time.monotonic()
    if seconds is not None and not 0.0 < seconds < math.inf:
        raise UserError(f"--seconds {seconds:g} must be a number of seconds above 0; try --seconds 20")
    if what not in ("decode", "serve") and batch is not None:
        raise UserError(
            "--batch belongs to bench decode and serve; for training set train.micro_batch=N in place of it"
        )
    if what != "decode" and weights is not None:
        raise UserError("--weights belongs to bench decode; for training set train.precision in place of it")
    if batch is not None and not 1 <= batch <= MOST_BATCH:
        raise UserError(f"--batch {batch} must be 1 to {MOST_BATCH}; try --batch 16")
    seconds = seconds or SECONDS[what]
    match what:
        case "train":
            return _train(words, seconds, json_output, started)
        case "decode":
            return _decode(words, seconds, batch or 1, weights or "auto", json_output, started)
        case "prepare":
            return _prepare(words, seconds, json_output)
        case "serve":
            return _serve(words, seconds, batch or 16, json_output)


def _train(words: tuple[str, ...], seconds: float, json_output: bool, started: float) -> int:
    build.begin("kernels")
    from smalllm.commands.train import Lines, settings
    from smalllm.speed.training import TrainingBench

    config = settings(words, None, None)
    display = Lines(Console(stderr=True), config)
    with (
        tempfile.TemporaryDirectory(prefix="smalllm-bench-") as folder,
        closing(TrainingBench(config, Path(folder), display, started)) as measured,
    ):
        speed = measured.speed(seconds)
    return _tell(speed, measured.table(speed), json_output)


def _decode(
    words: tuple[str, ...], seconds: float, batch: int, weights: Weights, json_output: bool, started: float
) -> int:
    build.begin("decode")
    from smalllm.speed.decoding import DecodingBench

    measured = DecodingBench(*model_of(words), batch, weights, started)
    speed = measured.speed(seconds)
    return _tell(speed, measured.table(speed), json_output)


def _prepare(words: tuple[str, ...], seconds: float, json_output: bool) -> int:
    from smalllm.commands.train import settings
    from smalllm.speed.preparing import preparing_speed, table

    config = settings(words, None, None)
    speed = preparing_speed(MEGABYTES_PER_SECOND * seconds, config.model.vocab_size or config.data.vocab_size)
    return _tell(speed, table(speed), json_output)


def _serve(words: tuple[str, ...], seconds: float, clients: int, json_output: bool) -> int:
    from smalllm.checkpoint import find_run
    from smalllm.config import recipe_names
    from smalllm.speed.serving import serving_speed, table

    if len(words) > 1 or (words and words[0] in recipe_names() and not Path(words[0]).exists()):
        raise UserError(
            f"bench serve {' '.join(words)}: give one run, such as runs/quickstart; a recipe has no weights to serve"
        )
    run = words[0] if words else str(find_run()[0].path)
    speed = serving_speed(run, clients, TOKENS, seconds)
    return _tell(speed, table(speed), json_output)


def _tell(speed: Any, table: Table, as_json: bool) -> int:
    if as_json:
        print(json.dumps(dataclasses.asdict(speed)))
    else:
        Console(markup=False, emoji=False, highlight=False).print(table)
    return 0


def model_of(words: tuple[str, ...]) -> tuple[GPT, Tokenizer]:
    """The model and tokenizer of a run, or of a recipe with settings: then with random weights."""
    from smalllm.checkpoint import find_run, open_run
    from smalllm.commands.train import settings
    from smalllm.config import recipe_names
    from smalllm.model import GPT
    from smalllm.tokenizer import Tokenizer

    first = words[0] if words else None
    if first is None:
        with contextlib.suppress(UserError):
            first = str(find_run()[0].path)
    if first is not None and "=" not in first and first not in recipe_names() and not first.endswith(".toml"):
        if len(words) > 1:
            raise UserError(
                f"{words[1]} cannot change the model of a run; leave it out, or give a recipe in place of {first}"
            )
        loaded = open_run(first)
        return loaded.model, loaded.tokenizer
    config = settings(words, None, None)
    shape = config.model.model_copy(update={"vocab_size": config.model.vocab_size or config.data.vocab_size})
    return GPT(shape), Tokenizer.train(["random tokens have no text\n"] * 9, vocab_size=280)
