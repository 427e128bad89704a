"""Text from a model: sampling parameters, pure logit filters, and a Generator that prefills, decodes, streams, batches.

A text begins at the begin-of-document token and ends at the end-of-text token, at a stop string or after
``max_tokens``. What a row says depends on its prompt, the seed and its index, never on its neighbours. The module
knows nothing about files, terminals or sockets. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from smalllm.config import UserError
from smalllm.model import GPT, KVCache
from smalllm.tokenizer import UNK, StreamDecoder, Tokenizer

ROWS = 64  # texts decoded together by Generator.batch: bounds the memory of the cache
LONGEST_NGRAM = 1024

# ── parameters ──


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when a text ends; UserError names a setting that cannot be.

    ``temperature`` 0 is greedy. ``None`` (for ``top_k`` and ``no_repeat_ngram`` also 0) switches a filter off. The
    same ``seed`` gives the same text; ``None`` gives another one each time. ``stop`` is one string or several.

    >>> SamplingParams(top_p=1.5)
    Traceback (most recent call last):
    smalllm.config.UserError: top_p = 1.5 is not possible; use 0 to 1
    """

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    stop: Sequence[str] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        self._require("max_tokens", self.max_tokens >= 1, "1 or more")
        self._require("temperature", 0.0 <= self.temperature < math.inf, "0 (greedy) or more, usually 0.5 to 1")
        self._require("top_k", self.top_k is None or self.top_k >= 0, "1 or more, or 0 for no limit")
        self._require("top_p", self.top_p is None or 0.0 <= self.top_p <= 1.0, "0 to 1")
        self._require("min_p", self.min_p is None or 0.0 <= self.min_p <= 1.0, "0 to 1")
        self._require("repetition_penalty", 0.01 <= self.repetition_penalty <= 100.0, "0.01 to 100, where 1 is none")
        self._require("no_repeat_ngram", 0 <= self.no_repeat_ngram <= LONGEST_NGRAM, f"0 (off) to {LONGEST_NGRAM}")
        self._require("stop", all(self.stop), "strings that are not empty, or leave it out")

    def _require(self, setting: str, possible: bool, fix: str) -> None:
        if not possible:
            raise UserError(f"{setting} = {getattr(self, setting)!r} is not possible; use {fix}")


# ── filters: logits [B, V] -> logits [B, V], what is ruled out at -inf ──


def forbid(logits: Tensor, ids: Tensor) -> Tensor:
    """Rule out the tokens ``ids`` [N] in every row."""
    return logits.index_fill(1, ids, -math.inf)


def penalize_repetition(logits: Tensor, rows: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of the tokens that a row holds (CTRL, arXiv 1909.05858)."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(_membership(logits, rows), penalized, logits)


def forbid_repeated_ngrams(logits: Tensor, rows: Sequence[Sequence[int]], n: int) -> Tensor:
    """Rule out each token that would complete an n-gram which the row already holds."""
    return logits.masked_fill(_membership(logits, [_completions(row, n) for row in rows]), -math.inf)


def scale_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide by a temperature above 0. The greatest logit becomes 0 first, so that a tiny temperature overflows to
    -inf (greedy) and not to NaN; probabilities do not see the shift. Beyond float32 it has no more effect."""
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return shifted / min(max(temperature, 1e-30), 1e30)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k most likely tokens, with all that tie with the last of them."""
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose mass reaches p, the token that crosses p included and at
    least one (nucleus sampling, arXiv 1904.09751)."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    dropped = probabilities.cumsum(dim=-1) - probabilities >= p
    dropped[:, 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens with at least p times the probability of the most likely one (arXiv 2407.01082)."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -math.inf)


def filter_logits(logits: Tensor, rows: Sequence[Sequence[int]], params: SamplingParams) -> Tensor:
    """All filters that ``params`` asks for, in the order of transformers: repetition penalty, n-grams, temperature,
    top-k, top-p, min-p. ``rows`` are the ids of each row so far, prompt included."""
    if params.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, rows, params.repetition_penalty)
    if params.no_repeat_ngram:
        logits = forbid_repeated_ngrams(logits, rows, params.no_repeat_ngram)
    if params.temperature == 0.0:
        return logits  # greedy: what follows never removes the most likely token
    logits = scale_temperature(logits, params.temperature)
    if params.top_k:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p is not None and params.top_p < 1.0:
        logits = keep_top_p(logits, params.top_p)
    return keep_min_p(logits, params.min_p) if params.min_p else logits


def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row [B], where the cumulative distribution passes a number ``uniforms`` [B] in [0, 1).

    One number per token, drawn by the caller, makes a row independent of its neighbours and of the device.
    """
    probabilities = logits.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    picked = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    # A parallel sum on a GPU need not be monotone, so rounding could land on a token of probability 0.
    picked = picked.clamp(max=logits.shape[-1] - 1)
    possible = probabilities.gather(1, picked) > 0
    return torch.where(possible, picked, probabilities.argmax(dim=-1, keepdim=True))[:, 0]


def _membership(logits: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """Mask [B, V], true at the ids of each row."""
    mask = torch.zeros(logits.shape, dtype=torch.bool)
    for row, ids in enumerate(rows):
        mask[row, torch.tensor(ids, dtype=torch.long)] = True
    return mask.to(logits.device)


def _completions(row: Sequence[int], n: int) -> list[int]:
    """Tokens that followed, earlier in the row, the n - 1 tokens at its end."""
    ids = list(row)
    last = ids[len(ids) - n + 1 :] if n > 1 else []
    return [ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == last]


def _check_numbers(logits: Tensor) -> None:
    """UserError for a row with NaN or +infinity, which the filters carry to its maximum, or with no token left."""
    if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
        raise UserError(
            "the logits are not finite (NaN or infinity), the model's weights are broken; use another checkpoint"
        )


# ── text ──


class StopSearch:
    """Finds the first stop string to be completed in a text that comes in pieces, wherever the pieces are cut.

    >>> search = StopSearch(["END"])
    >>> search.push("the E"), search.push("ND of"), search.found
    ('the ', '', True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.found = stops, "", False

    def push(self, text: str) -> str:
        """What can be shown: everything before a stop string, without an end that may be the beginning of one."""
        text, self._held = self._held + text, ""
        if ends := [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]:
            self.found = True
            return text[: min(ends)[1]]
        shown = len(text) - self._undecided(text)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back, now that no stop string follows."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)


class Row:
    """One text in the making: its ids, its randomness, and the part of its text that is certain."""

    def __init__(self, ids: list[int], params: SamplingParams, tokenizer: Tokenizer, index: int) -> None:
        self.ids, self.prompt_length = ids, len(ids)
        self.cached = 0  # positions of the cache that this row fills
        self.finish_reason: Literal["stop", "length"] | None = None
        self._max_tokens, self._eos = params.max_tokens, tokenizer.eos_id
        self._random = random.Random(None if params.seed is None else f"{params.seed} {index}")
        self._decoder, self._stops = StreamDecoder(tokenizer), StopSearch(params.stop)

    @property
    def generated(self) -> list[int]:
        return self.ids[self.prompt_length :]

    def uniform(self) -> float:
        """The next number in [0, 1); 24 bits, so that it is the same in float32."""
        return self._random.getrandbits(24) / (1 << 24)

    def push(self, id: int) -> str:
        """Take the next token; returns the text that it makes certain and sets ``finish_reason`` at the end."""
        if id == self._eos:
            return self._end("stop")
        self.ids.append(id)
        text = self._stops.push(self._decoder.push(id))
        if self._stops.found:
            self.finish_reason = "stop"
        elif len(self.ids) - self.prompt_length >= self._max_tokens:
            text += self._end("length")
        return text

    def _end(self, reason: Literal["stop", "length"]) -> str:
        text = self._stops.push(self._decoder.finish())
        self.finish_reason = "stop" if self._stops.found else reason
        return text if self._stops.found else text + self._stops.finish()


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed text: whole characters, perhaps none; the last one carries ``finish_reason``."""

    text: str
    tokens: int  # generated so far
    finish_reason: Literal["stop", "length"] | None = None


@dataclass(frozen=True)
class Completion:
    """A finished text: the continuation without its prompt. ``text`` is ``decode(ids)``, cut before a stop string."""

    prompt: str
    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]
    seconds: float
    ids: tuple[int, ...] = ()


# ── generator ──


class Generator:
    """Continues prompts with a model and its tokenizer, on the model's device and in the precision of its weights.

    A text may be longer than the context: when the cache is full, the last half of the context is read again and
    the text rolls on; what is older is forgotten. A prompt longer than the context keeps its last half context.
    Dropout is off while a text is made.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.context = model.config.context
        self.device, self.dtype = model.embedding.weight.device, model.embedding.weight.dtype
        unknown = range(tokenizer.vocab_size, model.config.vocab_size)
        self._forbidden = torch.tensor([UNK, tokenizer.bos_id, *unknown], device=self.device)

    # the units

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[KVCache, Tensor]:
        """Read prompts of any lengths from 1 to the context; returns their cache, with room for ``capacity``
        positions, and the logits [B, V] of the next token of each."""
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        # Right padding: a causal model does not see it, and the cache forgets it in set_lengths.
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self.device)
        cache = KVCache(self.model.config, len(prompts), capacity=capacity, device=self.device, dtype=self.dtype)
        hidden = self.model.hidden(ids, cache)
        cache.set_lengths(lengths)
        last = hidden[torch.arange(len(prompts)), torch.tensor(lengths) - 1]
        return cache, self.model.head(last)

    @torch.inference_mode()
    def decode_one_token(self, ids: Sequence[int], cache: KVCache) -> Tensor:
        """Add one token to each row of the cache; returns the logits [B, V] of the next."""
        logits: Tensor = self.model(torch.tensor(ids, device=self.device)[:, None], cache)
        return logits[:, -1]

    @torch.inference_mode()
    def choose(self, logits: Tensor, rows: Sequence[Row], params: SamplingParams) -> list[int]:
        """The next id of each row, from logits [B, V]; UserError when they are not numbers."""
        logits = forbid(logits.float(), self._forbidden)
        logits = filter_logits(logits, [row.ids for row in rows], params)
        _check_numbers(logits)
        if params.temperature == 0.0:
            return logits.argmax(dim=-1).tolist()
        uniforms = torch.tensor([row.uniform() for row in rows], device=self.device)
        return sample(logits, uniforms).tolist()

    # the faces

    def stream(self, prompt: str, params: SamplingParams = SamplingParams()) -> Iterator[Chunk]:
        """The continuation in pieces of whole characters; joined they are the text of ``complete``. A piece that may
        be the beginning of a stop string is held back until that is decided."""
        for row, text in self._run([self._row(prompt, params, 0)], params):
            yield Chunk(text, len(row.ids) - row.prompt_length, row.finish_reason)

    def complete(self, prompt: str, params: SamplingParams = SamplingParams()) -> Completion:
        return self.batch([prompt], params)[0]

    def batch(
        self, prompts: Sequence[str], params: SamplingParams = SamplingParams(), indices: Sequence[int] | None = None
    ) -> list[Completion]:
        """A continuation for each prompt, ``ROWS`` at a time. ``indices`` number the rows for the seed (default 0, 1,
        2 ...): the text of a row is the same alone with its index and among others."""
        indices = range(len(prompts)) if indices is None else indices
        completions: list[Completion] = []
        for start in range(0, len(prompts), ROWS):
            part = slice(start, start + ROWS)
            completions += self._batch(prompts[part], params, indices[part])
        return completions

    def _batch(self, prompts: Sequence[str], params: SamplingParams, indices: Sequence[int]) -> list[Completion]:
        began = time.perf_counter()
        rows = [self._row(prompt, params, index) for prompt, index in zip(prompts, indices, strict=True)]
        texts = {row: "" for row in rows}
        seconds = {}
        for row, text in self._run(rows, params):
            texts[row] += text
            seconds[row] = time.perf_counter() - began
        return [
            Completion(
                prompt, texts[row], len(ids := row.generated), row.finish_reason or "length", seconds[row], tuple(ids)
            )
            for prompt, row in zip(prompts, rows, strict=True)
        ]

    # the loop

    def _row(self, prompt: str, params: SamplingParams, index: int) -> Row:
        return Row([self.tokenizer.bos_id, *self.tokenizer.encode(prompt)], params, self.tokenizer, index)

    def _run(self, rows: Sequence[Row], params: SamplingParams) -> Iterator[tuple[Row, str]]:
        """Generate until every row has ended; yields each row with the text that its newest token made certain."""
        training = self.model.training
        self.model.eval()
        try:
            yield from self._decode(list(rows), params)
        finally:
            self.model.train(training)

    def _decode(self, rows: list[Row], params: SamplingParams) -> Iterator[tuple[Row, str]]:
        windows = [self._window(row.ids) for row in rows]
        cache, logits = self.prefill(windows, max(map(len, windows)) + params.max_tokens)
        for row, window in zip(rows, windows, strict=True):
            row.cached = len(window)
        while True:
            for row, id in zip(rows, self.choose(logits, rows, params), strict=True):
                yield row, row.push(id)
            self._drop_ended(rows, cache)
            if not rows:
                return
            self._roll(rows, cache)
            logits = self.decode_one_token([row.ids[-1] for row in rows], cache)
            for row in rows:
                row.cached += 1

    def _window(self, ids: list[int]) -> list[int]:
        """What the model sees of a long text: all of it while it fits, then the last half of the context."""
        return ids if len(ids) <= self.context else ids[-(self.context // 2) :]

    @torch.inference_mode()
    def _drop_ended(self, rows: list[Row], cache: KVCache) -> None:
        """Remove ended rows from the list and the cache. The last row takes the place of each, so that one row is
        copied and not the whole cache."""
        before = len(rows)
        for place in reversed(range(before)):
            if rows[place].finish_reason is not None:
                last = rows.pop()
                if place < len(rows):
                    rows[place] = last
                    cache.keys[:, place], cache.values[:, place] = cache.keys[:, len(rows)], cache.values[:, len(rows)]
        if rows and len(rows) < before:
            cache.keys, cache.values = cache.keys[:, : len(rows)], cache.values[:, : len(rows)]
            cache.lengths = cache.lengths[: len(rows)]
            cache.set_lengths([row.cached for row in rows])

    @torch.inference_mode()
    def _roll(self, rows: list[Row], cache: KVCache) -> None:
        """Make room in full rows: read the last half of the context again, all but its newest token, which the next
        ``decode_one_token`` adds."""
        full = [place for place, row in enumerate(rows) if row.cached == self.context]
        for place in full:
            row = rows[place]
            window = row.ids[-(self.context // 2) : -1]
            if window:
                fresh, _ = self.prefill([window], len(window))
                cache.keys[:, place, :, : len(window)] = fresh.keys[:, 0]
                cache.values[:, place, :, : len(window)] = fresh.values[:, 0]
            row.cached = len(window)
        if full:
            cache.set_lengths([row.cached for row in rows])
