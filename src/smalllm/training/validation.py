"""Which documents of the validation split a run is judged on, and their score by all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from smalllm.config import TrainConfig
from smalllm.data.shards import TokenDataset, within
from smalllm.evaluation import Evaluation, score_documents, summarize
from smalllm.model import GPT
from smalllm.ranks import Ranks
from smalllm.training.schedule import Plan
from smalllm.training.state import UNPLANNED

EVALUATIONS = 10
"""Evaluations of a run when ``evaluate_every`` is 0."""
EVALUATION_SHARE = 0.012
"""Share of the time for validation loss; the sample stories take about as much again: 2 % in all."""
FINAL_TOKENS = 200_000
"""Validation tokens at most of the figure that ends a run; ``smalllm evaluate`` scores all of them."""


def affordable_tokens(train: TrainConfig, plan: Plan) -> int:
    """Validation tokens of each evaluation, by arithmetic alone (scoring a token costs about half of training on it), so
    that they are the same on resume."""
    steps = train.evaluate_every or -(-min(plan.steps, train.steps or UNPLANNED) // EVALUATIONS)
    return max(500, int(2 * EVALUATION_SHARE * steps * train.batch_tokens))


def first_documents(dataset: TokenDataset, tokens: int) -> list[np.ndarray]:
    """The first validation documents, up to so many tokens; at least one."""
    return [document.astype(np.int64) for document in within(dataset.valid.iterate_documents(), tokens)]


def score_together(
    model: GPT, documents: Sequence[np.ndarray], text_bytes: Sequence[int], ranks: Ranks, *,
    autocast: AbstractContextManager[Any], between: Callable[[], None],
) -> Evaluation:  # fmt: skip
    """``evaluation.score_documents``, each rank its share of the documents; all ranks get the whole result."""
    if ranks.lone:
        return score_documents(model, documents, text_bytes, autocast=autocast, between=between)
    share = slice(ranks.rank, None, ranks.world)
    bits: list[float] = []
    if sum(text_bytes[share]):
        bits = score_documents(model, documents[share], text_bytes[share], autocast=autocast).document_bits.tolist()
    nats = np.zeros(len(documents))
    for rank, theirs in enumerate(ranks.gather(bits)):
        if theirs:
            nats[rank :: ranks.world] = np.array(theirs) * math.log(2)
    return summarize(nats, sum(len(ids) - 1 for ids in documents), np.asarray(text_bytes, dtype=np.int64))
