"""How well a model knows a text: bits per byte with its interval.

Bits per byte does not depend on the tokenizer: every document is scored on its own from the begin-of-document token;
all its tokens and the end-of-text token count; a document longer than the context is scored in windows that advance
by half a context, so that each token sees at least half a context; the sum of -log2 probabilities is divided by the
UTF-8 bytes of the text. The module knows nothing about terminals.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from smalllm.checkpoint import LoadedRun
from smalllm.config import UserError
from smalllm.data import storyworld
from smalllm.data.duplicates import audit
from smalllm.data.shards import TokenDataset
from smalllm.data.sources import documents as read_documents
from smalllm.model import GPT
from smalllm.tokenizer import Tokenizer

BATCH_TOKENS = 4096  # positions of a forward pass, padding included
LOGITS_AT_ONCE = 1 << 23  # float32 logits that exist at once: 32 MB
RESAMPLES = 1000
LEAK_BYTES = 256_000_000  # training text that evaluated documents are compared with
DRAWS_AT_ONCE = 1 << 20  # indices that the bootstrap holds at once: 8 MB


@dataclass(frozen=True)
class Evaluation:
    """The figures of a set of documents. ``loss`` is nats per token; ``tokens`` counts what was predicted, the
    end-of-text tokens included and the begin tokens not; the interval is a 95 % bootstrap over documents."""

    loss: float
    perplexity: float
    bits_per_byte: float
    bits_per_byte_interval: tuple[float, float]
    tokens: int
    bytes: int
    documents: int
    document_bits: np.ndarray = field(repr=False, compare=False)  # [documents], float64
    document_bytes: np.ndarray = field(repr=False, compare=False)  # [documents], int64

    def figures(self) -> dict[str, Any]:
        """The keys of ``smalllm evaluate --json``."""
        names = ("loss", "perplexity", "bits_per_byte", "bits_per_byte_interval", "tokens", "bytes", "documents")
        return {name: getattr(self, name) for name in names}


# ── bits per byte ──


def bits_per_byte(
    model: GPT,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    autocast: contextlib.AbstractContextManager[Any] | None = None,
) -> Evaluation:
    """Score texts, each a whole document."""
    documents = [np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]) for text in texts]
    sizes = [len(text.encode()) for text in texts]
    return score_documents(model, documents, sizes, batch_tokens=batch_tokens, autocast=autocast)


def score_documents(
    model: GPT,
    documents: Sequence[np.ndarray],
    text_bytes: Sequence[int],
    *,
    batch_tokens: int = BATCH_TOKENS,
    autocast: contextlib.AbstractContextManager[Any] | None = None,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score documents given as ids from begin to end of text, and the UTF-8 bytes of the text of each.

    ``autocast`` is entered around the body of the model; the head and the softmax are float32. The result depends on
    ``batch_tokens`` by rounding only. ``between`` is called before each batch and may end the scoring by raising.
    UserError when there is no document or no text.
    """
    if not documents or not sum(text_bytes):
        raise UserError(f"there is no text to evaluate in {len(documents)} documents; give a file with text")
    training = model.training
    model.eval()
    try:
        with autocast or contextlib.nullcontext():
            nats = _document_nats(model, documents, batch_tokens, between)
    finally:
        model.train(training)
    return summarize(nats, sum(len(ids) - 1 for ids in documents), np.asarray(text_bytes, dtype=np.int64))


def summarize(nats: np.ndarray, tokens: int, text_bytes: np.ndarray) -> Evaluation:
    """The evaluation of documents with summed losses ``nats`` and sizes ``text_bytes``, both [documents]."""
    bits, loss = nats / math.log(2), float(nats.sum()) / tokens
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=float(bits.sum() / text_bytes.sum()),
        bits_per_byte_interval=bootstrap_interval(bits, text_bytes),
        tokens=tokens,
        bytes=int(text_bytes.sum()),
        documents=len(nats),
        document_bits=bits,
        document_bytes=text_bytes,
    )


def bootstrap_interval(bits: np.ndarray, sizes: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of sum(bits) / sum(sizes) when documents are drawn anew with replacement
    (Efron & Tibshirani 1993, chapter 13): 1,000 resamples, seeded."""
    generator = np.random.default_rng(seed)
    at_once = max(1, DRAWS_AT_ONCE // len(bits))
    ratios: list[np.ndarray] = []
    for start in range(0, RESAMPLES, at_once):
        drawn = generator.integers(len(bits), size=(min(at_once, RESAMPLES - start), len(bits)))
        ratios.append(bits[drawn].sum(axis=1) / np.maximum(sizes[drawn].sum(axis=1), 1))
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return float(low), float(high)


class Window(NamedTuple):
    """A stretch of a document that is read at once: tokens ``start`` to ``end - 1`` are read and predict tokens
    ``start + 1`` to ``end``, of which those from ``scored`` on count."""

    start: int
    end: int
    scored: int


def windows(length: int, context: int) -> list[Window]:
    """Windows over a document of ``length`` ids that count each id after the first exactly once.

    >>> windows(7, context=4)
    [Window(start=0, end=4, scored=1), Window(start=2, end=6, scored=5)]
    """
    last, step = length - 1, context // 2
    found = [Window(0, min(context, last), 1)]
    while found[-1].end < last:
        start = found[-1].start + step
        found.append(Window(start, min(start + context, last), found[-1].end + 1))
    return found


@torch.inference_mode()
def _document_nats(
    model: GPT, documents: Sequence[np.ndarray], batch_tokens: int, between: Callable[[], None]
) -> np.ndarray:
    """The summed -ln p of each document, float64 [documents]."""
    device = model.embedding.weight.device
    weight = model.head.weight.float()
    nats = np.zeros(len(documents))
    for batch in _batches(documents, model.config.context, batch_tokens):
        between()
        ids, targets = _padded(documents, batch)
        losses = _losses(model, weight, ids.to(device), targets.to(device))
        np.add.at(nats, [document for document, _ in batch], losses.sum(dim=1).cpu().numpy())
    return nats


def _batches(documents: Sequence[np.ndarray], context: int, batch_tokens: int) -> Iterator[list[tuple[int, Window]]]:
    """Windows with the index of their document, the longest first, in groups of at most ``batch_tokens`` padded
    positions (a single window may be longer)."""
    work = [(index, window) for index, ids in enumerate(documents) for window in windows(len(ids), context)]
    work.sort(key=lambda item: item[1].start - item[1].end)
    while work:
        longest = work[0][1].end - work[0][1].start
        rows = max(1, batch_tokens // longest)
        yield work[:rows]
        work = work[rows:]


def _padded(documents: Sequence[np.ndarray], batch: Sequence[tuple[int, Window]]) -> tuple[Tensor, Tensor]:
    """Ids and targets [B, T], padded on the right, where a causal model does not see it; targets that do not count
    are -1."""
    longest = max(window.end - window.start for _, window in batch)
    ids, targets = np.zeros((len(batch), longest), np.int64), np.full((len(batch), longest), -1, np.int64)
    for row, (index, (start, end, scored)) in enumerate(batch):
        ids[row, : end - start] = documents[index][start:end]
        targets[row, scored - start - 1 : end - start] = documents[index][scored : end + 1]
    return torch.from_numpy(ids), torch.from_numpy(targets)


def _losses(model: GPT, weight: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
    """-ln p of each target [B, T], 0 where it does not count; the logits of a few positions exist at a time."""
    counted = targets >= 0
    hidden, wanted = model.hidden(ids)[counted], targets[counted]
    at_once = max(1, LOGITS_AT_ONCE // weight.shape[0])
    with torch.autocast(ids.device.type, enabled=False):
        parts = [
            F.cross_entropy(F.linear(some.float(), weight), target, reduction="none")
            for some, target in zip(torch.split(hidden, at_once), torch.split(wanted, at_once), strict=True)
        ]
    losses = torch.zeros(targets.shape, device=ids.device)
    losses[counted] = torch.cat(parts)
    return losses


# ── a run ──


def storyworld_floor(texts: Sequence[str]) -> float | None:
    """Bits per byte of the exact distribution of the built-in corpus on these texts, below which no model comes on
    average; None when one of them is not of that corpus."""
    try:
        return float(storyworld.entropy_bits_per_byte(texts))
    except ValueError:
        return None


def evaluate_run(run: LoadedRun, *, text: str | None = None, limit: int | None = None) -> dict[str, Any]:
    """The figures that ``smalllm evaluate --json`` prints about a text.

    ``text`` is a source of documents, by default the validation split of the run's data; ``limit`` takes the first
    documents only. For the built-in corpus ``floor_bits_per_byte`` is what the exact distribution scores on the same
    documents.
    """
    texts = list(read_documents(text, limit=limit)) if text is not None else validation_texts(run, limit)
    evaluation = bits_per_byte(run.model, run.tokenizer, texts)
    if not math.isfinite(evaluation.loss):
        raise UserError(
            f"the loss of {run.checkpoint.path} is {evaluation.loss}; its weights are broken, use another one"
        )
    floor = storyworld_floor(texts)
    known = {} if floor is None else {"floor_bits_per_byte": floor}
    return {"step": run.step, **evaluation.figures(), **known, "leaks": training_leaks(run, texts)}


def training_leaks(run: LoadedRun, texts: Sequence[str]) -> dict[str, Any] | None:
    """Which texts stand in the training data of a run, word for word or nearly, as ``data.shards.LeakRecord`` says it; None
    where the run has no data or it is gone. 500 texts and the most that is compared took 3.4 s."""
    try:
        return audit(run.folder.data(), [text.encode() for text in texts], most_bytes=LEAK_BYTES).model_dump()
    except UserError:
        return None


def trained_on_storyworld(run: LoadedRun) -> bool:
    """Whether the validation documents of a run's data are stories of the built-in corpus; false when they are gone."""
    return run_floor(run, limit=20) is not None


def run_floor(run: LoadedRun, limit: int) -> float | None:
    """``storyworld_floor`` of a run's first validation documents; None when they are gone."""
    try:
        return storyworld_floor(validation_texts(run, limit))
    except UserError:
        return None


def validation_texts(run: LoadedRun, limit: int | None) -> list[str]:
    """The first validation documents of a run, read with the tokenizer of the data, which may be another one than the run's."""
    dataset = TokenDataset.open(run.folder.data(), verify=False)
    tokenizer = dataset.tokenizer()
    return [tokenizer.decode(ids.tolist()) for ids in itertools.islice(dataset.valid.iterate_documents(), limit)]
