"""How fast a model tells texts: the generator's own batch, on texts that none of which ends before it is as long as planned.

What loads torch is imported inside functions: the time to the first token counts from the start of the verb.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from smalllm.decoder import Weights
    from smalllm.model import GPT
    from smalllm.tokenizer import Tokenizer


@dataclass(frozen=True)
class DecodingSpeed:
    """The figures of `smalllm bench decode --json`. ``tokens_per_second`` of ``batch`` texts at once, all together, the
    median of several texts of up to half a context; ``dtype``: of the weights; ``first_token_seconds`` since the start of the
    verb."""

    tokens_per_second: float
    batch: int
    dtype: str
    first_token_seconds: float


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
