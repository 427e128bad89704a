"""What nanoGPT's model learns in some minutes on prepared data, judged by SmallLM's own definition of bits per byte.

The peer of `smalllm train laptop --minutes 5`: random windows of the token stream, AdamW as nanoGPT configures it, cosine to a
tenth, bf16 autocast, torch.compile, all inside the time budget. Run it as:

    uv run python benchmarks/quality_nanogpt.py --nanogpt PATH --data data/tinystories --minutes 5
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from train_throughput import nanogpt_model, run

from smalllm.config import ModelConfig
from smalllm.data.shards import TokenDataset
from smalllm.evaluation import Evaluation, score_documents


class Judged:
    """nanoGPT's model with what ``score_documents`` asks of a model: config.context, embedding, head, hidden."""

    training = False

    def __init__(self, model: Any, context: int) -> None:
        self.model, self.config = model, SimpleNamespace(context=context)
        self.embedding, self.head = model.transformer.wte, model.lm_head

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def eval(self) -> None:
        self.model.eval()

    def hidden(self, ids: Tensor) -> Tensor:
        """The normed residual stream [B, T, C]."""
        parts = self.model.transformer
        x = parts.wte(ids) + parts.wpe(torch.arange(ids.shape[1]))
        for block in parts.h:
            x = block(x)
        normed: Tensor = parts.ln_f(x)
        return normed


def train(options: argparse.Namespace, dataset: TokenDataset) -> tuple[Any, list[dict[str, float]]]:
    """The trained model, and (seconds, step, bits per byte) at each evaluation; evaluations do not count as time."""
    began = time.monotonic()
    torch.manual_seed(options.seed)
    model: Any = nanogpt_model(options.nanogpt, ModelConfig(
        layers=options.layers, heads=options.heads, width=options.width, context=options.context,
        vocab_size=dataset.manifest.vocab_size,
    ))  # fmt: skip
    optimizer = model.configure_optimizers(0.1, options.lr, (0.9, 0.99), "cpu")
    compiled = torch.compile(model)
    tokens = np.concatenate([document for document in dataset.train.iterate_documents()]).astype(np.int64)
    generator = np.random.default_rng(options.seed)
    budget, judged, curve, step, paused = options.minutes * 60, Judged(model, options.context), [], 0, 0.0
    while (spent := time.monotonic() - began - paused) < budget:
        fraction = min(1.0, (step + 1) / 100) * (0.1 + 0.45 * (1 + math.cos(math.pi * spent / budget)))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * fraction
        starts = generator.integers(len(tokens) - options.context - 1, size=options.batch)
        windows = torch.from_numpy(np.stack([tokens[start : start + options.context + 1] for start in starts]))
        with torch.autocast("cpu", torch.bfloat16):
            _, loss = compiled(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if len(curve) + 1 < options.evaluations and spent > budget * (len(curve) + 1) / options.evaluations:
            pause = time.monotonic()
            curve.append(report(judged, dataset, spent, step))
            paused += time.monotonic() - pause
    curve.append(report(judged, dataset, budget, step))
    return model, curve


def report(judged: Judged, dataset: TokenDataset, seconds: float, step: int) -> dict[str, float]:
    found = evaluate(judged, dataset)
    print(f"{seconds:6.0f} s  step {step:6d}  {found.bits_per_byte:.4f} bits per byte", file=sys.stderr, flush=True)
    return {"seconds": seconds, "step": step, "bits_per_byte": found.bits_per_byte}


def evaluate(judged: Judged, dataset: TokenDataset) -> Evaluation:
    """All validation documents, each from its beginning."""
    tokenizer = dataset.tokenizer()
    documents = [document.astype(np.int64) for document in dataset.valid.iterate_documents()]
    sizes = [len(tokenizer.decode(ids.tolist()).encode()) for ids in documents]
    return score_documents(judged, documents, sizes, autocast=torch.autocast("cpu", torch.bfloat16))  # type: ignore[arg-type]


def main(arguments: list[str] | None = None) -> int:
    """Train, evaluating on the way; one JSON object at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="folder of nanoGPT, with its model.py")
    parser.add_argument("--data", type=Path, required=True, help="folder made by smalllm prepare")
    for name, default in (("minutes", 5.0), ("lr", 2e-3)):
        parser.add_argument(f"--{name}", type=float, default=default)
    for name, default in (
        ("layers", 4),
        ("width", 128),
        ("heads", 4),
        ("context", 128),
        ("batch", 12),
        ("seed", 42),
        ("evaluations", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    model, curve = train(options, TokenDataset.open(options.data))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        json.dumps(
            {"parameters": parameters, "tokens": curve[-1]["step"] * options.batch * options.context, "curve": curve}
        )
    )
    return 0


if __name__ == "__main__":
    run(main)
