"""`smalllm bench`: how fast this machine trains a recipe, and how fast it decodes a run's or a recipe's model.

The trainer's own steps and the generator's own batch, on random tokens: speed does not depend on what they say, so nothing
is downloaded, prepared or kept. What loads torch is imported inside functions here: the time to the first step or token
counts from the start of the verb, imports included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from smalllm.config import RunConfig, UserError
from smalllm.metrics import Display, model_flops_utilization
from smalllm.native import build

if TYPE_CHECKING:
    from smalllm.decoder import Weights
    from smalllm.model import GPT
    from smalllm.tokenizer import Tokenizer

MOST_BATCH = 1024
STEPS = 5
"""Steps that are measured at least; a median of fewer says little."""
DATA_TOKENS, MOST_ROWS = 1 << 20, 4096
"""Size of the random data: more than caches hold, and made in a moment."""


@dataclass(frozen=True)
class TrainingSpeed:
    """The figures of `smalllm bench train --json`, medians over steps. MFU is the model's arithmetic
    (``GPT.flops_per_token``) over ``peak_flops``, in FLOP/s: matrix products in the run's number format, measured
    between the steps, because a machine that others use as well is not as fast now as it was a minute ago."""

    tokens_per_second: float
    mfu: float
    peak_flops: float
    flops_per_token: int
    first_step_seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class DecodingSpeed:
    """The figures of `smalllm bench decode --json`. ``tokens_per_second`` of ``batch`` texts at once, all together, the
    median of several texts of up to half a context; ``dtype``: of the weights; ``first_token_seconds`` since the start of the
    verb."""

    tokens_per_second: float
    batch: int
    dtype: str
    first_token_seconds: float


def bench(
    what: Annotated[Literal["train", "decode"], Parameter(name="WHAT")],
    /,
    *words: Annotated[str, Parameter(name="RUN|RECIPE section.key=value", show_default=False)],
    seconds: Annotated[float | None, Parameter(name="--seconds", show_default=False)] = None,
    batch: Annotated[int | None, Parameter(name="--batch", show_default=False)] = None,
    weights: Annotated[
        Literal["auto", "fp32", "bf16", "int8"] | None, Parameter(name="--weights", show_default=False)
    ] = None,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Measure how fast this machine trains a recipe, or decodes a model, on random tokens: nothing is downloaded or kept.

    Parameters
    ----------
    what
        What to measure.
    words
        train: a recipe (a name, or a TOML file; default quickstart) and settings such as train.precision=fp32
        model.context=1024. decode: a run folder, or a recipe and settings, whose weights are then random (default: the
        newest run, or quickstart).
    seconds
        How long to measure after the first step or token (train: 20, and five steps at least; decode: 5).
    batch
        decode: how many texts at once (1).
    weights
        decode: auto, fp32, bf16 or int8.
    json_output
        Print one JSON object to standard output, everything else to standard error.
    """
    started = time.monotonic()
    if seconds is not None and not 0.0 < seconds < math.inf:
        raise UserError(f"--seconds {seconds:g} must be a number of seconds above 0; try --seconds 20")
    if what == "decode":
        return _decode(words, seconds or 5.0, 1 if batch is None else batch, weights or "auto", json_output, started)
    if batch is not None or weights is not None:
        raise UserError(
            "--batch and --weights belong to bench decode; for training set train.micro_batch=N in place of them"
        )
    return _train(words, seconds or 20.0, json_output, started)


def _train(words: tuple[str, ...], seconds: float, json_output: bool, started: float) -> int:
    build.begin("kernels")
    from smalllm.commands.train import Lines, settings

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
    if not 1 <= batch <= MOST_BATCH:
        raise UserError(f"--batch {batch} must be 1 to {MOST_BATCH}; try --batch 16")
    build.begin("decode")
    measured = DecodingBench(*model_of(words), batch, weights, started)
    speed = measured.speed(seconds)
    return _tell(speed, measured.table(speed), json_output)


def _tell(speed: TrainingSpeed | DecodingSpeed, table: Table, as_json: bool) -> int:
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


class DecodingBench:
    """A batch of texts of random tokens, none of which ends before it is as long as planned."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch: int, weights: Weights, started: float) -> None:
        from smalllm.generation import Batch, SamplingParams

        self.model, self.tokenizer, self.started = model, tokenizer, started
        self.tokens = max(2, model.config.context // 2)
        self.params = SamplingParams(max_tokens=self.tokens, seed=0, logit_bias={tokenizer.eos_id: -math.inf})
        self.batch = Batch(model, tokenizer, batch, weights)

    def speed(self, seconds: float) -> DecodingSpeed:
        """Tell texts for about so many seconds, three at least."""
        rates: list[float] = []
        first_token_seconds = 0.0
        end = time.monotonic() + seconds
        while len(rates) < 3 or time.monotonic() < end:
            rates.append(self.texts())
            first_token_seconds = first_token_seconds or self.first - self.started
        rate = round(median(rates), 1)
        return DecodingSpeed(rate, self.batch.slots, self.batch.decoder.weights, round(first_token_seconds, 3))

    def texts(self) -> float:
        """One text in every slot; tokens per second after the first of each."""
        from smalllm.generation import Row

        for index in range(self.batch.slots):
            self.batch.add(Row([self.tokenizer.bos_id, *range(3, 12)], self.params, self.tokenizer, index))
        while len(self.batch.step()) < self.batch.slots:
            pass
        self.first, done = time.monotonic(), 0
        start = time.perf_counter()
        while self.batch.rows:
            done += len(self.batch.step())
        return done / (time.perf_counter() - start)

    def table(self, speed: DecodingSpeed) -> Table:
        """The figures for a person, with what they stand for."""
        grid = Table.grid(padding=(0, 2))
        texts = "one text" if speed.batch == 1 else f"{speed.batch} texts at once, together"
        for name, figure, meaning in (
            ("speed", f"{speed.tokens_per_second:,.0f} tokens/s", f"{texts}, {self.tokens} tokens long"),
            ("weights", speed.dtype, f"{self.model.parameters_count():,} parameters"),
            ("first token", f"{speed.first_token_seconds:.2f} s", "after the start of the command, imports and all"),
        ):
            grid.add_row(name, figure, meaning)
        return grid


class TrainingBench:
    """A trainer of a recipe on random tokens, measured step by step.

    The step is ``Trainer.step`` with the recipe's shapes, micro-batch, precision and compilation. Only the number of
    micro-batches in it is smaller where a whole step would not fit into the time: ``micro_batches`` of the recipe's
    ``recipe_micro_batches``. ``folder`` takes the data and the files of the run; who makes it removes it. ``started`` is
    the reading of ``time.monotonic`` from which the time to the first step counts. ``close`` it when done.
    """

    def __init__(
        self, config: RunConfig, folder: Path, display: Display | None = None, started: float | None = None
    ) -> None:
        from smalllm.checkpoint import RunFolder
        from smalllm.training.trainer import Trainer

        self.started = time.monotonic() if started is None else started
        data = random_data(folder / "data", config.model.vocab_size or config.data.vocab_size, config.model.context)
        config = config.replace(data={"path": str(data)}, train={"preflight": False, "track": "none"})
        self.trainer = Trainer(config, RunFolder(folder / "run"), display=display)
        self.trainer.begin()
        self.steps = 0
        self.take(1)

    @property
    def recipe_micro_batches(self) -> int:
        """Micro-batches of the recipe's own optimizer step."""
        config = self.trainer.config
        return -(-config.train.batch_tokens // (self.trainer.micro_batch * config.model.context))

    def speed(self, seconds: float) -> TrainingSpeed:
        """Take the first step, then measure for about so many seconds."""
        from smalllm import hardware

        device = self.trainer.runtime.device
        hardware.forget_peak_memory(device)
        self.step()
        first_step_seconds = round(time.monotonic() - self.started, 3)
        alone, _ = self.step()
        memory_bytes = hardware.peak_memory(device)  # before ``peak_flops`` adds its own matrices
        self.take(max(1, min(self.recipe_micro_batches, int(seconds / (STEPS * alone)))))
        rates, peaks = self.measure(seconds)
        rate, peak, cost = median(rates), median(peaks), self.trainer.model.flops_per_token()
        mfu = model_flops_utilization(rate, cost, peak)
        return TrainingSpeed(round(rate, 1), round(mfu, 4), peak, cost, first_step_seconds, memory_bytes)

    def measure(self, seconds: float) -> tuple[list[float], list[float]]:
        """Tokens per second of each of at least ``STEPS`` steps that take about so many seconds, and the peak in FLOP/s
        after each of them."""
        rates: list[float] = []
        peaks: list[float] = []
        left = seconds
        while len(rates) < STEPS or left > 0:
            took, tokens = self.step()
            rates.append(tokens / took)
            peaks.append(self.peak_flops())
            left -= took
        self.steps = len(rates)
        return rates, peaks

    def peak_flops(self) -> float:
        """The peak of this moment."""
        from smalllm import hardware

        hardware.peak_flops.cache_clear()
        return self.trainer.runtime.peak_flops()

    def take(self, micro_batches: int) -> None:
        """Make the steps from now on of so many micro-batches."""
        from smalllm.data.batches import Batches, Prefetch

        self.micro_batches, trainer, config = micro_batches, self.trainer, self.trainer.config
        batch_tokens = micro_batches * trainer.micro_batch * config.model.context
        trainer.batches = Batches(
            trainer.dataset.train, config.model.context, batch_tokens, config.seed, config.data.packing
        )
        trainer.prefetch.close()
        trainer.prefetch = Prefetch(trainer.batches, pin=trainer.runtime.device.type == "cuda")

    def close(self) -> None:
        """End the threads that make batches and save."""
        self.trainer.prefetch.close()
        self.trainer.saver.close()

    def step(self) -> tuple[float, int]:
        """One optimizer step: its seconds and tokens."""
        before, start = self.trainer.state.tokens, time.perf_counter()
        self.trainer.step()
        self.trainer.runtime.synchronize()
        return time.perf_counter() - start, self.trainer.state.tokens - before

    def table(self, speed: TrainingSpeed) -> Table:
        """The figures for a person, with what they stand for."""
        trainer, environment = self.trainer, self.trainer.environment()
        grid = Table.grid(padding=(0, 2))
        for name, figure, meaning in (
            ("speed", f"{speed.tokens_per_second:,.0f} tokens/s", f"median of {self.steps} steps"),
            ("MFU", f"{speed.mfu:.1%}", f"of {speed.peak_flops / 1e9:,.0f} GFLOP/s, the matrix product measured between the steps"),
            ("arithmetic", f"{speed.flops_per_token / 1e6:,.1f} MFLOP a token", "attention counted as causal"),
            ("first step", f"{speed.first_step_seconds:.1f} s", "after the start of the command, imports and all"),
            ("memory", f"{speed.memory_bytes / 2**30:.2f} GiB", "at most"),
            ("a step", f"{self.micro_batches} x {trainer.micro_batch} x {trainer.config.model.context} tokens", self.share()),
            ("machine", f"{environment['precision']}, {environment['threads']} threads", environment["device_name"]),
        ):  # fmt: skip
            grid.add_row(name, figure, meaning)
        return grid

    def share(self) -> str:
        """How much of the recipe's own step was measured: with fewer micro-batches the update weighs more."""
        if self.micro_batches >= self.recipe_micro_batches:
            return "as in the recipe"
        return f"{self.micro_batches} of the recipe's {self.recipe_micro_batches} micro-batches; a longer --seconds takes more"


def random_data(folder: Path, vocab_size: int, context: int) -> Path:
    """A dataset of random token ids in a new ``folder``, the same for the same arguments. Each document fills a row: its
    begin token and ``context`` targets, all of which count.

    The ids span ``vocab_size``; the tokenizer beside them is a tiny one, because training reads it and never uses it."""
    import numpy as np

    from smalllm.data.shards import TOKENIZER, Manifest, ShardWriter, SplitRecord, token_dtype
    from smalllm.tokenizer import Tokenizer

    folder.mkdir(parents=True)
    tokenizer = Tokenizer.train(["random tokens have no text\n"] * 9, vocab_size=280)
    tokenizer.save(folder / TOKENIZER)
    rows, random = max(1, min(MOST_ROWS, DATA_TOKENS // context)), np.random.default_rng(0)
    documents = random.integers(tokenizer.eos_id + 1, vocab_size, (rows, context + 1))
    documents[:, 0], documents[:, -1] = tokenizer.bos_id, tokenizer.eos_id
    writer = ShardWriter(folder, "train", vocab_size)
    writer.add(documents.ravel(), np.full(rows, context + 1))
    shards = writer.close()
    Manifest(
        sources=["random"], inputs=[], settings={}, seed=0, vocab_size=vocab_size, dtype=token_dtype(vocab_size),
        tokenizer_fingerprint=tokenizer.fingerprint, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
        train=SplitRecord(documents=rows, tokens=rows * (context + 1), text_bytes=0, shards=shards),
        valid=SplitRecord(documents=0, tokens=0, text_bytes=0, shards=[]),
    ).save(folder)  # fmt: skip
    return folder
