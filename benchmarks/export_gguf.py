"""Is a GGUF file the model? llama.cpp answers: the same greedy texts, bits per byte of each type, and texts cut alike.

    uv run python benchmarks/export_gguf.py
    uv run python benchmarks/export_gguf.py --run runs/quickstart --run runs/stories --text storyworld:200

Without --run the models are small ones of the four architectures with random weights. Greedy: in float32, 64 tokens after each
of 50 beginnings; texts are equal, or part at a tie (our two best logits there are less than 0.001 apart), or differ. Bits per
byte: by llama.cpp's own softmax, of so many tokens. Texts: special words, emoji, NUL, digits, all of Unicode; U+2581 counts as the
space that it is to llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peers.models import forbidden, prompts, random_tokenizer, randomize
from torch import Tensor
from train_throughput import run as run_script

from smalllm import hardware
from smalllm.checkpoint import LoadedRun, RunFolder, Snapshot, model_weights, open_run
from smalllm.config import UserError, load_recipe
from smalllm.data.sources import documents
from smalllm.export import gguf, llamacpp
from smalllm.export.certificate import strings
from smalllm.export.llamacpp import LlamaCpp
from smalllm.model import GPT, KVCache
from smalllm.tokenizer import SPACE_MARK

_GELU: dict[str, Any] = {"norm": "layernorm", "activation": "gelu", "qk_norm": False, "bias": True}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"qk_norm": False, "kv_heads": 1, "tie_embeddings": True},
    "qwen3": {"qk_norm": True, "kv_heads": 1},
    "starcoder2": {**_GELU, "kv_heads": 1, "tie_embeddings": True},
    "gpt2": {**_GELU, "positions": "learned", "tie_embeddings": True},
}
"""What differs from the recipe quickstart."""
TIE = 1e-3
LIKELY = 64  # probabilities that are asked for first: a token is mostly among them
LIMITS = {"f32": 0.0001, "f16": 0.001, "bf16": 0.01, "q8_0": 0.005}


@dataclass(frozen=True)
class Result:
    """What llama.cpp makes of one run. Differences are shares: 0.001 is 0.1 %."""

    run: str
    architecture: str
    equal_texts: int
    ties: int
    different_texts: int
    bits_per_byte: float
    differences: dict[str, float]
    tokens: int
    strings: int
    cut_otherwise: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a limit is broken."""
    options = parser().parse_args(arguments)
    if not llamacpp.installed():
        raise UserError("this needs llama.cpp; run it with `uv run --with xllamacpp python ...`")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for run in runs(options, Path(folder)):
            results.append(measure(run, options, Path(folder)))
            print(row(results[-1]), flush=True)
    if options.json:
        machine = hardware.describe(hardware.pick_device("cpu"))
        report = {"machine": machine, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if broken(results) else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--run", type=Path, action="append", help="a run folder; may be given again")
    found.add_argument("--text", default="storyworld-small:200", help="documents for bits per byte")
    found.add_argument("--prompts", type=int, default=50)
    found.add_argument("--tokens", type=int, default=64, help="of each greedy text")
    found.add_argument("--scored", type=int, default=1000, help="tokens of documents")
    found.add_argument("--strings", type=int, default=10_000)
    found.add_argument("--dtypes", nargs="+", default=list(gguf.DTYPES), choices=gguf.DTYPES)
    found.add_argument("--json", type=Path, help="where to write the results")
    return found


def runs(options: argparse.Namespace, folder: Path) -> Iterator[LoadedRun]:
    """The runs that were given, or random ones."""
    if options.run:
        yield from map(open_run, options.run)
    else:
        yield from (random_run(shape, folder / shape) for shape in SHAPES)


def random_run(shape: str, folder: Path) -> LoadedRun:
    """A small model with random weights that make every part of it matter."""
    config = load_recipe("quickstart")
    tokenizer = random_tokenizer(config.data.vocab_size, seed=0)
    config = config.replace(
        model=SHAPES[shape] | {"vocab_size": tokenizer.vocab_size, "context": 256}, data={"path": "none"}
    )
    torch.manual_seed(0)
    model = GPT(config.model)
    randomize(model)
    run = RunFolder(folder)
    folder.mkdir()
    run.write_text(run.config_file, config.to_toml())
    tokenizer.save(run.tokenizer_file)
    run.save(Snapshot(0, config.model, model_weights(model), {}, {"step": 0}), keep=1)
    return open_run(folder)


# ── measuring ──


def measure(run: LoadedRun, options: argparse.Namespace, folder: Path) -> Result:
    """Everything of one run."""
    texts = scored_texts(run, options)
    size = sum(len(run.tokenizer.bytes_of(id)) for ids in texts for id in ids)
    own = sum(own_nats(run, ids) for ids in texts)
    greedy: Counter[str] = Counter()
    otherwise, differences = 0, {}
    for dtype in options.dtypes:
        path = folder / f"{run.folder.path.name}-{dtype}.gguf"
        gguf.write(run, path, dtype)
        with LlamaCpp(path) as other:
            if dtype == "f32":
                greedy = compare_greedy(run, other, options)
                otherwise = compare_strings(run, other, options.strings)
            differences[dtype] = abs(sum(nats(other, ids) for ids in texts) / own - 1)
        path.unlink()
    return Result(
        run.folder.path.name, run.model.config.architecture, greedy["equal"], greedy["tie"], greedy["different"],
        own / math.log(2) / size, differences, sum(len(ids) - 1 for ids in texts), options.strings, otherwise,
    )  # fmt: skip


def scored_texts(run: LoadedRun, options: argparse.Namespace) -> list[list[int]]:
    """Documents as ids, cut to the context, until there are tokens enough."""
    found: list[list[int]] = []
    for text in documents(options.text):
        left = options.scored - sum(len(ids) - 1 for ids in found)
        if left <= 0:
            break
        found.append(run.tokenizer.encode_document(text)[: min(left + 1, run.model.config.context)])
    return found


@torch.inference_mode()
def own_nats(run: LoadedRun, ids: list[int]) -> float:
    """-ln p of all ids after the first, by our model."""
    logits = run.model(torch.tensor([ids[:-1]]))[0].double()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))


def nats(other: LlamaCpp, ids: list[int]) -> float:
    """The same by llama.cpp, one token after another."""
    total = 0.0
    for place in range(1, len(ids)):
        likely = float(other.log_probabilities(ids[:place], LIKELY)[ids[place]])
        total -= likely if math.isfinite(likely) else float(other.log_probabilities(ids[:place])[ids[place]])
    return total


def compare_greedy(run: LoadedRun, other: LlamaCpp, options: argparse.Namespace) -> Counter[str]:
    """How many texts are equal, part at a tie, differ."""
    special, found = forbidden(run.tokenizer), Counter[str]()
    for prompt in prompts(run.tokenizer, options.prompts):
        own, gaps = own_greedy(run, prompt, options.tokens, special)
        theirs = other.greedy(prompt, options.tokens, special)
        place = next((place for place, pair in enumerate(zip(own, theirs, strict=True)) if pair[0] != pair[1]), None)
        found["equal" if place is None else "tie" if gaps[place] < TIE else "different"] += 1
    return found


@torch.inference_mode()
def own_greedy(run: LoadedRun, prompt: list[int], tokens: int, special: list[int]) -> tuple[list[int], list[float]]:
    """Our greedy text in float32, and how much better the best logit was than the second, at each of its tokens."""
    cache, read = KVCache(run.model.config, 1), torch.tensor([prompt])
    ids, gaps = [], []
    for _ in range(tokens):
        logits: Tensor = run.model(read, cache)[0, -1]
        logits[special] = -math.inf
        best = logits.topk(2)
        ids.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        read = best.indices[:1][None]
    return ids, gaps


def compare_strings(run: LoadedRun, other: LlamaCpp, count: int) -> int:
    """How many texts llama.cpp cuts otherwise."""
    own = run.tokenizer
    return sum(other.encode(text) != own.encode(text.replace(SPACE_MARK, " ")) for text in strings(count, seed=1))


# ── printing ──


def row(result: Result) -> str:
    """One line of the table."""
    changes = "  ".join(f"{dtype} {share:.4%}" for dtype, share in result.differences.items())
    texts = f"greedy {result.equal_texts} equal, {result.ties} ties, {result.different_texts} different"
    bits = f"{result.bits_per_byte:.4f} bits/byte of {result.tokens} tokens: {changes}"
    cut = f"{result.strings - result.cut_otherwise} of {result.strings} strings alike"
    return f"{result.run:<12} {result.architecture:<11} {texts} | {bits} | {cut}"


def broken(results: Sequence[Result]) -> list[str]:
    """What is not as it must be."""
    return [
        result.run
        for result in results
        if result.different_texts
        or result.cut_otherwise
        or any(share > LIMITS[dtype] for dtype, share in result.differences.items())
    ]


if __name__ == "__main__":
    run_script(main)
