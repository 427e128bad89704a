"""How fast a recipe trains: the trainer's own steps on random tokens, since speed does not depend on what they say.

What loads torch is imported inside functions: the time to the first step counts from the start of the verb, imports included.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from smalllm.config import RunConfig
from smalllm.metrics import Display, model_flops_utilization

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
        self.fill(seconds)
        memory_bytes = hardware.peak_memory(device)  # before ``peak_flops`` adds its own matrices
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

    def fill(self, seconds: float) -> None:
        """Take one more step, and make the next ones as large as lets ``STEPS`` of them fit into the time."""
        alone, _ = self.step()
        self.take(max(1, min(self.recipe_micro_batches, int(seconds / (STEPS * alone)))))

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
