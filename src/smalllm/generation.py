"""Text from a model: sampling parameters, pure logit filters, a Batch of rows that come and go, and a Generator.

A text begins at the begin-of-document token and ends at the end-of-text token, at a stop string or after
``max_tokens``. What a row says depends on its prompt, the seed and its index, never on its neighbours. The module
knows nothing about files, terminals or sockets. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from smalllm.config import UserError
from smalllm.decoder import Weights, make_decoder
from smalllm.model import GPT
from smalllm.native import decode
from smalllm.native.decode import Choice, Part, Wish
from smalllm.tokenizer import UNK, StreamDecoder, Tokenizer

ROWS = 64  # texts decoded together by Generator.batch: bounds the memory of the cache
CHUNK = 256  # tokens of prompts read in one step, so that rows that are decoding wait for milliseconds only
NOT_FINITE = "the logits are not finite (NaN or infinity), the model's weights are broken; use another checkpoint"
LONGEST_NGRAM = 1024
MOST_LOGPROBS = 20

# ── parameters ──


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when a text ends; UserError names a setting that cannot be.

    ``temperature`` 0 is greedy. ``None`` (for ``top_k`` and ``no_repeat_ngram`` also 0) switches a filter off. The
    same ``seed`` gives the same text; ``None`` gives another one each time. ``stop`` is one string or several.
    ``logprobs`` asks for each token's log probability and those of so many most likely ones, as the model gives them,
    before any filter. ``logit_bias`` adds numbers to the logits of ids.

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
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

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
        possible = self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS
        self._require("logprobs", possible, f"0 to {MOST_LOGPROBS}, or None")
        self._require("logit_bias", not any(map(math.isnan, self.logit_bias.values())), "numbers, -inf to forbid an id")

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


def bias(logits: Tensor, changes: Mapping[int, float]) -> Tensor:
    """Add a number to the logits of each of some ids in every row."""
    changed = logits.clone()
    changed[:, list(changes)] += torch.tensor(list(changes.values()), device=logits.device)
    return changed


def filter_logits(logits: Tensor, rows: Sequence[Sequence[int]], params: SamplingParams) -> Tensor:
    """All filters that ``params`` asks for, in the order of transformers: bias, repetition penalty, n-grams, temperature,
    top-k, top-p, min-p. ``rows`` are the ids of each row so far, prompt included."""
    if params.logit_bias:
        logits = bias(logits, params.logit_bias)
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


# ── the next token ──


def choose(logits: Tensor, rows: Sequence[Row], forbidden: Tensor) -> list[Choice]:
    """The next token of each row, from logits [B, V] in float32, which may be overwritten; ``forbidden`` ids, int32, are
    never chosen. Choice.id is -1 where the numbers are not finite or nothing is left to choose."""
    if decode.available():  # for a GPU too: one copy instead of many small operations for every row
        return decode.choose(logits.cpu(), [_wish(row) for row in rows], forbidden)
    logits = forbid(logits, forbidden.to(logits.device, torch.long))
    return [_choose_plainly(logits[place : place + 1], row) for place, row in enumerate(rows)]


def _wish(row: Row) -> Wish:
    params = row.params
    edits = list(params.logit_bias.items())
    if params.no_repeat_ngram:
        edits += [(id, -math.inf) for id in _completions(row.ids, params.no_repeat_ngram)]
    return Wish(
        params.temperature, params.top_k or 0, 1.0 if params.top_p is None else params.top_p, params.min_p or 0.0,
        params.repetition_penalty, 0.0 if params.temperature == 0.0 else row.uniform(),
        row.ids if params.repetition_penalty != 1.0 else (), edits, -1 if params.logprobs is None else params.logprobs,
    )  # fmt: skip


@torch.inference_mode()
def _choose_plainly(logits: Tensor, row: Row) -> Choice:
    """The same by the filters of this file, where there is no compiler."""
    filtered = filter_logits(logits, [row.ids], row.params)
    if not bool(torch.isfinite(logits.amax()) & torch.isfinite(filtered.amax())):
        return Choice(-1)
    greedy = row.params.temperature == 0.0
    uniform = torch.tensor([0.0 if greedy else row.uniform()], device=logits.device)
    id = int(filtered.argmax() if greedy else sample(filtered, uniform))
    if row.params.logprobs is None:
        return Choice(id)
    logs = logits[0].log_softmax(dim=-1)
    best = logs.topk(row.params.logprobs)
    return Choice(id, float(logs[id]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


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
    """One text in the making: its ids, its randomness, and the part of its text that is certain.

    It ends at the end-of-text token and at any of ``stop_ids``. ``finish_reason`` "error" comes with a sentence in
    ``error``."""

    def __init__(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        index: int = 0,
        stop_ids: Iterable[int] = (),
    ) -> None:
        self.ids, self.params, self.prompt_length, self.index = list(ids), params, len(ids), index
        self.finish_reason: Literal["stop", "length", "error"] | None = None
        self.error = ""
        self._ends = {tokenizer.eos_id, *stop_ids}
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
        if id < 0:
            self.finish_reason, self.error = "error", NOT_FINITE
            return ""
        if id in self._ends:
            return self._end("stop")
        self.ids.append(id)
        text = self._stops.push(self._decoder.push(id))
        if self._stops.found:
            self.finish_reason = "stop"
        elif len(self.ids) - self.prompt_length >= self.params.max_tokens:
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


# ── batch ──


@dataclass(frozen=True, eq=False)
class Token:
    """What a step decided for a row: an id, and the characters that it made certain (often none or several).

    ``logprob`` and ``alternatives``, (id, logprob) from the most likely on, where SamplingParams.logprobs asks for them."""

    row: Row
    id: int
    text: str
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


class _Seat:
    """A row in its slot: ``first`` is the place among its ids of the cache's position 0, ``cached`` how many are read."""

    def __init__(self, row: Row, slot: int) -> None:
        self.row, self.slot, self.first, self.cached = row, slot, 0, 0

    def part(self, context: int, most: int) -> Part:
        """What to read next, at most so many tokens. When a text outgrows the context, it goes on from its last half."""
        ids = self.row.ids
        if len(ids) - self.first > context:
            self.first, self.cached = len(ids) - max(1, context // 2), 0
        start = self.first + self.cached
        end = min(len(ids), start + most)
        return Part(self.slot, self.cached, ids[start:end], int(end == len(ids)))


class Batch:
    """Rows that are decoded together, a token a step each. They come and go at any time (continuous batching, Yu et al.,
    Orca, OSDI 2022); prompts are read beside them, ``CHUNK`` tokens a step.

    A text may be longer than the context: when the cache is full, the last half of the context is read again and the
    text rolls on; what is older is forgotten. A prompt longer than the context keeps its last half context.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, slots: int = ROWS, weights: Weights = "auto") -> None:
        self.decoder = make_decoder(model, slots, weights)
        self.slots = slots
        self._free = list(reversed(range(slots)))
        self._seats: dict[Row, _Seat] = {}
        unknown = range(tokenizer.vocab_size, model.config.vocab_size)
        self._forbidden = torch.tensor([UNK, tokenizer.bos_id, *unknown], dtype=torch.int32)

    @property
    def rows(self) -> list[Row]:
        """The rows inside, in the order in which they came."""
        return list(self._seats)

    @property
    def free(self) -> int:
        """How many rows can be added."""
        return len(self._free)

    def add(self, row: Row) -> None:
        """Give a row a slot; the next steps read its prompt."""
        assert row.ids and row.finish_reason is None, "a row has at least the begin token, and is not finished"
        self._seats[row] = _Seat(row, self._free.pop())

    def remove(self, row: Row) -> None:
        """Let a row go, finished or not."""
        self._free.append(self._seats.pop(row).slot)

    def step(self) -> list[Token]:
        """One pass through the model: the tokens of the rows that got one. Finished rows have left."""
        seats, parts = self._plan()
        if not parts:
            return []
        logits = self.decoder.forward(parts)
        ready = []
        for seat, part in zip(seats, parts, strict=True):
            seat.cached += len(part.ids)
            if part.wanted:
                ready.append(seat.row)
        return [
            self._give(row, choice) for row, choice in zip(ready, choose(logits, ready, self._forbidden), strict=True)
        ]

    def _plan(self) -> tuple[list[_Seat], list[Part]]:
        """The seats of this step and what each reads: all that decode, and prompts until ``CHUNK`` is used up."""
        left, seats, parts = CHUNK, [], []
        for seat in self._seats.values():
            part = seat.part(self.decoder.context, max(1, left))
            if len(part.ids) > 1 or not part.wanted:
                if left <= 0:
                    continue
                left -= len(part.ids)
            seats.append(seat)
            parts.append(part)
        return seats, parts

    def _give(self, row: Row, choice: Choice) -> Token:
        text = row.push(choice.id)
        if row.finish_reason is not None:
            self.remove(row)
        return Token(row, choice.id, text, choice.logprob, choice.alternatives)


# ── generator ──


class Generator:
    """Continues prompts with a model and its tokenizer, on the model's device. The weights are those of the moment in
    which it is made: training goes on without it noticing."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, weights: Weights = "auto") -> None:
        self.model, self.tokenizer, self.weights = model, tokenizer, weights
        self._batch: Batch | None = None

    def stream(self, prompt: str, params: SamplingParams = SamplingParams()) -> Iterator[Chunk]:
        """The continuation in pieces of whole characters; joined they are the text of ``complete``. A piece that may
        be the beginning of a stop string is held back until that is decided."""
        yield from self.stream_row(self._row(prompt, params, 0))

    def stream_row(self, row: Row) -> Iterator[Chunk]:
        """The same for a row that is not a plain prompt."""
        for token in self._run([row]):
            yield Chunk(token.text, len(token.row.ids) - token.row.prompt_length, _reason(token.row))

    def complete(self, prompt: str, params: SamplingParams = SamplingParams()) -> Completion:
        return self.batch([prompt], params)[0]

    def batch(
        self, prompts: Sequence[str], params: SamplingParams = SamplingParams(), indices: Sequence[int] | None = None
    ) -> list[Completion]:
        """A continuation for each prompt, up to ``ROWS`` at a time. ``indices`` number the rows for the seed (default 0,
        1, 2 ...): the text of a row is the same alone with its index and among others."""
        began = time.perf_counter()
        indices = range(len(prompts)) if indices is None else indices
        rows = [self._row(prompt, params, index) for prompt, index in zip(prompts, indices, strict=True)]
        texts, seconds = dict.fromkeys(rows, ""), {}
        for token in self._run(rows):
            texts[token.row] += token.text
            seconds[token.row] = time.perf_counter() - began
        return [
            Completion(
                prompt, texts[row], len(ids := row.generated), _reason(row) or "length", seconds[row], tuple(ids)
            )
            for prompt, row in zip(prompts, rows, strict=True)
        ]

    def _row(self, prompt: str, params: SamplingParams, index: int) -> Row:
        return Row([self.tokenizer.bos_id, *self.tokenizer.encode(prompt)], params, self.tokenizer, index)

    def _run(self, rows: Iterable[Row]) -> Iterator[Token]:
        """The tokens of all rows until each has ended; UserError when the model's numbers are broken."""
        waiting = deque(rows)
        batch = self._seats_for(len(waiting))
        try:
            while waiting or batch.rows:
                while waiting and batch.free:
                    batch.add(waiting.popleft())
                for token in batch.step():
                    if token.row.finish_reason == "error":
                        raise UserError(token.row.error)
                    yield token
        finally:
            for row in batch.rows:
                batch.remove(row)

    def _seats_for(self, rows: int) -> Batch:
        """A batch with room for so many rows, or for ``ROWS``; an empty one that is there is taken again."""
        wanted = min(max(1, rows), ROWS)
        if self._batch is None or self._batch.slots < wanted or self._batch.rows:
            self._batch = Batch(self.model, self.tokenizer, wanted, self.weights)
        return self._batch


def _reason(row: Row) -> Literal["stop", "length"] | None:
    return None if row.finish_reason == "error" else row.finish_reason
