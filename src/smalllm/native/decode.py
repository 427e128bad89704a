"""Generation in C++: a GPT's forward pass over a cache of keys and values, and the choice of the next token.

Weights are packed when a decoder is made, as float32, bfloat16, or int8 with a scale for every 32 (inputs are rounded in the
same way: LLM.int8(), arXiv 2208.07339, without its outliers, which groups this small do not need). What a row gives is the
same alone and among others, bit for bit. Shapes: V vocabulary.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from smalllm.model import GPT, Attention, Block
from smalllm.native import build

TYPES = {"fp32": 0, "bf16": 1, "int8": 2}


class Part(NamedTuple):
    """Tokens that a step adds to a slot of the cache, and how many of the last ones' logits are wanted."""

    slot: int
    position: int  # of the first of the ids
    ids: Sequence[int]
    wanted: int = 1


class Threads:
    """How many threads pay, learned from how long steps take: more wait for each other more often, and where another process
    runs on the same cores, threads that wait for one that is not running lose milliseconds. No bit depends on the number.

    >>> threads = Threads(4)
    >>> for _ in range(200):
    ...     count = threads.count(1)
    ...     threads.learn(1, count, {1: 3.0, 2: 2.0, 4: 5.0}[count])
    >>> threads.best(1)
    2
    """

    EXPLORE = 64  # steps between trials of another number
    MEMORY = 0.25  # weight of the newest step

    def __init__(self, most: int) -> None:
        self._choices = sorted({most, *(1 << bit for bit in range(most.bit_length()))})
        self._seconds: dict[int, dict[int, float]] = {}  # rows -> threads -> a moving average
        self._step = 0

    def count(self, rows: int) -> int:
        """How many to use now for a step of so many rows: the best, or now and then one beside it."""
        self._step += 1
        best = self.best(rows)
        if self._step % self.EXPLORE and len(self._seconds.get(rows, ())) > 1:
            return best
        place = self._choices.index(best) + (1 if self._step // self.EXPLORE % 2 else -1)
        return self._choices[min(max(place, 0), len(self._choices) - 1)]

    def learn(self, rows: int, threads: int, seconds: float) -> None:
        """Note how long a step took."""
        known = self._seconds.setdefault(rows, {})
        known[threads] = known.get(threads, seconds) * (1 - self.MEMORY) + seconds * self.MEMORY

    def best(self, rows: int) -> int:
        """The number with the shortest steps so far; the most while nothing is known."""
        known = self._seconds.get(rows)
        return min(known, key=known.__getitem__) if known else self._choices[-1]


class Decoder:
    """A copy of a model's weights in ``TYPES[weights]`` and a cache of ``slots`` texts of up to its context, on the CPU.

    The memory of a slot is taken from the system when it is written to. Raises native.build.Unavailable where C++ cannot be
    compiled, MemoryError when the weights do not fit.
    """

    def __init__(self, model: GPT, slots: int, weights: str) -> None:
        self.slots, self.context, self.weights = slots, model.config.context, weights
        self._vocab, self._threads = model.config.vocab_size, Threads(torch.get_num_threads())
        self._library = _library()
        self._tensors = _tensors(model)  # embeddings and tables are read in place
        pointers = (ctypes.c_void_p * len(self._tensors))(
            *(tensor.data_ptr() if tensor is not None else None for tensor in self._tensors)
        )
        self._handle = self._library.smalllm_decoder(TYPES[weights], _shape(model, slots), pointers)
        if not self._handle:
            raise MemoryError(f"no memory for the weights of {model.parameters_count()} parameters and {slots} slots")
        weakref.finalize(self, self._library.smalllm_decoder_free, self._handle)

    def forward(self, parts: Sequence[Part]) -> Tensor:
        """Add the parts to their slots; logits [wanted, V], float32, of the parts' wanted tokens in turn."""
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        outputs: list[int] = []
        for part in parts:
            ids += part.ids
            slots += [part.slot] * len(part.ids)
            positions += range(part.position, part.position + len(part.ids))
            outputs += range(len(ids) - part.wanted, len(ids))
        assert max(ids) < self._vocab and min(ids) >= 0, "ids are of this vocabulary"
        assert max(positions) < self.context and max(slots) < self.slots, "parts fit into the cache"
        logits = torch.empty(len(outputs), self._vocab)
        few = len(ids) <= self.slots
        threads, began = self._threads.count(len(ids)) if few else torch.get_num_threads(), time.perf_counter()
        self._library.smalllm_forward(
            self._handle, len(ids), _int32(ids), _int32(slots), _int32(positions),
            len(outputs), _int32(outputs), logits.data_ptr(), threads,
        )  # fmt: skip
        if few:
            self._threads.learn(len(ids), threads, time.perf_counter() - began)
        return logits


class Wish(NamedTuple):
    """How a row's next token is to be chosen: the settings of SamplingParams as plain numbers, ``uniform`` in [0, 1).

    ``alternatives`` -1 wants no log probabilities; ``edits`` are (id, number to add to its logit)."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    penalty: float
    uniform: float
    history: Sequence[int] = ()
    edits: Sequence[tuple[int, float]] = ()
    alternatives: int = -1


class Choice(NamedTuple):
    """The chosen id, -1 where the logits were not numbers; natural log probabilities where they were wanted."""

    id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


_WISH = np.dtype(
    [(name, np.float32) for name in ("temperature", "top_p", "min_p", "penalty", "uniform")]
    + [(name, np.int32) for name in ("top_k", "alternatives", "history", "edits")]
)


def choose(logits: Tensor, wishes: Sequence[Wish], forbidden: Tensor) -> list[Choice]:
    """The next token of each row of logits [rows, V], float32, which are overwritten; ``forbidden`` ids, int32, are never
    chosen. The mathematics is that of generation.filter_logits and generation.sample."""
    rows, vocab = logits.shape
    assert logits.is_contiguous() and logits.dtype == torch.float32 and forbidden.dtype == torch.int32
    table = np.array(
        [
            (
                w.temperature,
                w.top_p,
                w.min_p,
                w.penalty,
                w.uniform,
                w.top_k,
                w.alternatives,
                len(w.history),
                len(w.edits),
            )
            for w in wishes
        ],
        _WISH,
    )
    most = max(0, *(w.alternatives for w in wishes)) if wishes else 0
    ids, logs = np.empty(rows, np.int32), np.empty(rows, np.float32)
    best, best_logs = np.empty((rows, most), np.int32), np.empty((rows, most), np.float32)
    history = _int32([id for w in wishes for id in w.history])
    edited, edits = _int32([id for w in wishes for id, _ in w.edits]), [number for w in wishes for _, number in w.edits]
    _library().smalllm_choose(
        logits.data_ptr(), rows, vocab, forbidden.data_ptr(), len(forbidden), table.ctypes.data, history, edited,
        np.array(edits, np.float32).ctypes.data, ids.ctypes.data, logs.ctypes.data, best.ctypes.data, best_logs.ctypes.data,
        most, torch.get_num_threads(),
    )  # fmt: skip
    if all(w.alternatives < 0 for w in wishes):
        return [Choice(id) for id in ids.tolist()]
    return [
        Choice(int(ids[r]), float(logs[r]), tuple(zip(best[r, :n].tolist(), best_logs[r, :n].tolist(), strict=True)))
        if (n := w.alternatives) >= 0 and ids[r] >= 0
        else Choice(int(ids[r]))
        for r, w in enumerate(wishes)
    ]


def available() -> bool:
    """Whether the library can be had here; builds it the first time (seconds)."""
    try:
        _library()
    except build.Unavailable:
        return False
    return True


def _int32(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(numbers))(*numbers)


def _shape(model: GPT, slots: int) -> ctypes.Array[ctypes.c_int64]:
    """struct Shape of decode.cpp."""
    c = model.config
    numbers = (
        c.layers, c.width, c.heads, c.key_value_heads, c.head_width, c.hidden_width, c.vocab_size, c.context, slots,
        c.activation == "swiglu", c.norm == "layernorm", c.positions == "rope", c.positions == "learned", c.qk_norm,
    )  # fmt: skip
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _tensors(model: GPT) -> list[Tensor | None]:
    """Weights in the order in which decode.cpp reads them, None for those that the model does not have."""
    found: list[Tensor | None] = []
    for block in model.blocks:
        assert isinstance(block, Block)
        attention: Attention = block.attention
        found += [*_affine(block.attention_norm), *_affine(attention.qkv)]
        if attention.q_norm is not None and attention.k_norm is not None:
            found += [*_affine(attention.q_norm), *_affine(attention.k_norm)]
        found += [*_affine(attention.out), *_affine(block.mlp_norm), *_affine(block.mlp.up), *_affine(block.mlp.down)]
    positions = model.position_embedding.weight if model.position_embedding is not None else None
    tables = (model.cos, model.sin) if model.config.positions == "rope" else (None, None)
    found += [*_affine(model.norm), *_affine(model.head), model.embedding.weight, positions, *tables]
    return [None if tensor is None else tensor.detach().float().contiguous() for tensor in found]


def _affine(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    return module.weight, getattr(module, "bias", None)  # type: ignore[return-value]


@cache
def _library() -> ctypes.CDLL:
    library = build.load("decode")
    pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.smalllm_decoder.argtypes, library.smalllm_decoder.restype = [flag, pointer, pointer], pointer
    library.smalllm_decoder_free.argtypes, library.smalllm_decoder_free.restype = [pointer], None
    library.smalllm_forward.argtypes = [pointer, size, pointer, pointer, pointer, size, pointer, pointer, flag]
    library.smalllm_forward.restype = None
    library.smalllm_choose.argtypes = [pointer, size, size, pointer, size, *[pointer] * 8, flag, flag]
    library.smalllm_choose.restype = None
    return library
