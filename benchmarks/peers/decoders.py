"""SmallLM and transformers in processes of their own, taking turns at decoding."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peers.models import transformers_model
from peers.race import answer_questions, own_output
from smalllm.checkpoint import LoadedRun, open_run
from smalllm.config import UserError
from smalllm.generation import Batch, Row, SamplingParams

Decode = Callable[[dict[str, Any]], dict[str, Any]]
"""Answers ``prompts`` with exactly ``tokens`` ids each, greedily, never with an id of ``forbidden``."""


def make_decoder(name: str, run: LoadedRun, rows: int) -> Decode:
    """The contender of this name, for so many prompts at once."""
    who, _, weights = name.partition("-")
    if who == "smalllm":
        return smalllm_decoder(run, rows, weights)
    model = transformers_model(run).to(torch.bfloat16 if weights == "bf16" else torch.float32)
    return lambda question: transformers_decode(model, question)


# ── SmallLM ──


def smalllm_decoder(run: LoadedRun, rows: int, weights: str) -> Decode:
    """Our decoder, with weights in this form (fp32, bf16, int8, or auto: what it chooses by itself)."""
    batch = Batch(run.model, run.tokenizer, slots=rows, weights=weights)

    def decode(question: dict[str, Any]) -> dict[str, Any]:
        bias = dict.fromkeys(question["forbidden"], -100.0)
        params = SamplingParams(max_tokens=question["tokens"], temperature=0.0, logit_bias=bias)
        rows = [Row(list(prompt), params, run.tokenizer) for prompt in question["prompts"]]
        times = [time.perf_counter()]
        for row in rows:
            batch.add(row)
        while any(row.finish_reason is None for row in rows):
            batch.step()
            times.append(time.perf_counter())
        return timed([row.ids[row.prompt_length :] for row in rows], times[0], times[1], times[-1])

    return decode


# ── transformers ──


class FirstToken:
    """A logits processor that rules ids out and remembers when it was asked first: when the prompt had been read."""

    def __init__(self, forbidden: list[int]) -> None:
        self.forbidden, self.time = torch.tensor(forbidden), 0.0

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        self.time = self.time or time.perf_counter()
        return logits.index_fill(1, self.forbidden, -float("inf"))


@torch.inference_mode()
def transformers_decode(model: Any, question: dict[str, Any]) -> dict[str, Any]:
    """``generate``, greedy, without an end-of-text token."""
    ids, first = torch.tensor(question["prompts"]), FirstToken(question["forbidden"])
    began = time.perf_counter()
    answers = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=question["tokens"], pad_token_id=0,
        logits_processor=[first],
    )  # fmt: skip
    return timed(answers[:, ids.shape[1] :].tolist(), began, first.time, time.perf_counter())


def timed(answers: list[list[int]], began: float, first: float, ended: float) -> dict[str, Any]:
    """The figures of a turn. One prompt: what came after the first token. Several: everything, reading included."""
    made = sum(map(len, answers))
    whole = {"tokens": made, "seconds": ended - began, "whole_seconds": ended - began, "ids": answers[0]}
    return whole if len(answers) > 1 else {**whole, "tokens": made - 1, "seconds": ended - first}


def main(arguments: Sequence[str] | None = None) -> None:
    """Take turns until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("run", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1)
    options = parser.parse_args(arguments)
    answers = own_output()
    torch.set_num_threads(options.threads)
    try:
        decode = make_decoder(options.name, open_run(options.run), options.rows)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    answer_questions({}, decode, answers)


if __name__ == "__main__":
    main()
