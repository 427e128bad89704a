"""Speed of decoding beside transformers and llama.cpp: one run, one machine, the same weights, greedy.

    uv run --with xllamacpp python benchmarks/decode.py
    uv run python benchmarks/decode.py --contenders smalllm-int8 transformers-fp32 --rows 1
    uv run --with xllamacpp python benchmarks/decode.py --run runs/quickstart --text storyworld-small:300

Every contender continues the same prompts of 10 tokens by exactly --tokens tokens: greedily, with the end of text ruled out.
Contenders take turns (A B C A B C ...), each in a process of its own. Figures are medians over the rounds; ratios are medians
of the ratios inside a round, so that a machine whose speed drifts is as fast for one as for the other.

One prompt: tokens per second after the first one, without reading the prompt; for llama.cpp by its own timings. Several at
once: all tokens over the whole time of the call. First, every contender's greedy answer is judged by our model in float32:
"off by" is the most nats that any of its tokens gave away against the likeliest one. A contender in float32 must be right.

xllamacpp's wheel uses AVX2 alone. Where --llama-server names a llama-server that was compiled for this machine
(cmake -DGGML_NATIVE=ON), that one takes part too.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peers.models import SHAPES, forbidden, prompts, random_run, regret
from peers.race import Racer, environment, race, ratio
from torch.nn.functional import cross_entropy
from train_throughput import run as run_script

from smalllm import hardware
from smalllm.checkpoint import LoadedRun, open_run
from smalllm.config import UserError
from smalllm.data.sources import documents
from smalllm.decoder import Decoder, make_decoder
from smalllm.evaluation import bootstrap_interval, windows
from smalllm.export import gguf
from smalllm.native.decode import Part

OURS = ("smalllm-int8", "smalllm-bf16", "smalllm-fp32")
PEERS = ("llama.cpp-q8_0", "llama.cpp-f16", "llama.cpp-f32", "transformers-bf16", "transformers-fp32")
NATIVE = ("llama-server-q8_0", "llama-server-bf16", "llama-server-f16", "llama-server-f32")
CHECKED_TOKENS = 64
RIGHT = 0.01
"""Nats that a float32 contender may be off by: another order of summation chooses otherwise only between equals."""


@dataclass(frozen=True)
class Result:
    """One row of the table. ``relative`` is against the first contender, ``off_by`` in nats."""

    contender: str
    rows: int
    tokens_per_second: float
    slowest: float
    fastest: float
    relative: float
    off_by: float
    rates: list[float]


# ── the race ──


def command(name: str, run: LoadedRun, folder: Path, rows: int, options: argparse.Namespace) -> list[str]:
    """How the process of a contender is started."""
    sizes = ["--threads", str(options.threads)]
    if name.startswith(("smalllm", "transformers")):
        place = str(run.checkpoint.path)
        return [sys.executable, "-m", "peers.decoders", name, place, "--rows", str(rows), *sizes]
    who, _, precision = name.rpartition("-")
    file = folder / f"{precision}.gguf"
    if not file.exists():
        gguf.write(run, file, precision)
    sizes += ["--slots", str(rows), "--context", str(run.model.config.context)]
    native = ["--binary", str(options.llama_server)] if who == "llama-server" else []
    return [sys.executable, "-m", "peers.llamacpp", str(file), *sizes, *native]


def measure(names: Sequence[str], run: LoadedRun, folder: Path, rows: int, options: argparse.Namespace) -> list[Result]:
    """All contenders with so many prompts at once."""
    question = {
        "prompts": prompts(run.tokenizer, rows),
        "forbidden": forbidden(run.tokenizer),
        "tokens": options.tokens,
    }
    racers: list[Racer] = []
    try:
        for name in names:
            print(f"starting {name}, {rows} at once", file=sys.stderr, flush=True)
            racers.append(Racer(name, command(name, run, folder, rows, options), options.threads))
        off = [check(racer, run, question) for racer in racers]
        race(racers, question, options.repeats)
    finally:
        for racer in racers:
            racer.close()
    rates = [[answer["tokens"] / answer["seconds"] for answer in racer.answers] for racer in racers]
    return [
        Result(racer.name, rows, median(own), min(own), max(own), ratio(own, rates[0]), wrong, own)
        for racer, own, wrong in zip(racers, rates, off, strict=True)
    ]


def check(racer: Racer, run: LoadedRun, question: dict[str, Any]) -> float:
    """Warm a contender up and judge its first answer; UserError when it computes another model."""
    answer = racer.ask({**question, "judged": True, "tokens": min(CHECKED_TOKENS, question["tokens"])})
    found = regret(run, question["prompts"][0], answer["ids"])
    if found > RIGHT and racer.name.endswith(("fp32", "f32")):
        raise UserError(f"{racer.name} computes another model: a token is {found:.3f} nats from the likeliest one")
    return found


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    lines = [
        f"| who | at once | tokens/s | slowest - fastest | times {results[0].contender} | off by |", "|---|---|---|---|---|---|",
        *(
            f"| {r.contender} | {r.rows} | {r.tokens_per_second:,.0f} | {r.slowest:,.0f} - {r.fastest:,.0f}"
            f" | {r.relative:.2f} | {r.off_by:.4f} |"
            for r in results
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


# ── the first token of a new process ──


def first_token(run: LoadedRun, threads: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of `smalllm sample --max-tokens 1` and of `import torch`, as whole processes that take turns, after one round
    that warms the caches of the disk."""
    sample = ["-m", "smalllm", "sample", str(run.checkpoint.path), "--max-tokens", "1", "--temperature", "0"]
    commands = {"smalllm sample, 1 token": sample, "import torch": ["-c", "import torch"]}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats + 1):
        for name, words in commands.items():
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *words], env=environment(threads), capture_output=True, text=True, check=False
            )
            seconds[name].append(time.perf_counter() - began)
            if done.returncode:
                raise UserError(f"{name} failed: {' / '.join(done.stderr.strip().splitlines()[-3:])}")
    return {name: values[1:] for name, values in seconds.items()}


def first_token_table(seconds: dict[str, list[float]]) -> str:
    """Markdown, the difference of the two below."""
    (sample, torch) = seconds.values()
    rows = {**seconds, "difference": [one - other for one, other in zip(sample, torch, strict=True)]}
    lines = [
        "| whole process | seconds | fastest - slowest |", "|---|---|---|",
        *(f"| {name} | {median(own):.2f} | {min(own):.2f} - {max(own):.2f} |" for name, own in rows.items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


# ── what smaller weights cost ──


@torch.inference_mode()
def document_nats(decoder: Decoder, texts: Sequence[np.ndarray]) -> np.ndarray:
    """The summed -ln p of each document, read by a decoder as generation does, in the windows of `smalllm evaluate`."""
    nats = np.zeros(len(texts))
    for number, ids in enumerate(texts):
        for start, end, scored in windows(len(ids), decoder.context):
            part = Part(0, 0, ids[start:end].tolist(), wanted=end - scored + 1)
            targets = torch.from_numpy(ids[scored : end + 1])
            nats[number] += float(cross_entropy(decoder.forward([part]), targets, reduction="sum"))
    return nats


def weight_costs(run: LoadedRun, texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Bits per byte of each form of the weights, and its difference from float32 with a 95 % interval over documents."""
    tokenizer = run.tokenizer
    ids = [np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]) for text in texts]
    sizes = np.array([len(text.encode()) for text in texts])
    bits = {
        weights: document_nats(make_decoder(run.model, 1, weights), ids) / math.log(2)
        for weights in ("fp32", "bf16", "int8")
    }
    return {
        weights: {
            "bits_per_byte": float(own.sum() / sizes.sum()),
            "difference": float((own - bits["fp32"]).sum() / sizes.sum()),
            "interval": bootstrap_interval(own - bits["fp32"], sizes),
        }
        for weights, own in bits.items()
    }


def weight_costs_table(costs: dict[str, dict[str, Any]], count: int) -> str:
    """Markdown."""
    base = costs["fp32"]["bits_per_byte"]
    lines = [
        f"| weights | bits per byte of {count:,} documents | difference | of all | 95 % of differences |",
        "|---|---|---|---|---|",
        *(
            f"| {weights} | {own['bits_per_byte']:.5f} | {own['difference']:+.5f} | {own['difference'] / base:+.3%}"
            f" | {own['interval'][0]:+.5f} to {own['interval'][1]:+.5f} |"
            for weights, own in costs.items()
        ),
    ]
    return "\n".join(lines) + "\n"


# ── the command ──


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = found.add_mutually_exclusive_group()
    what.add_argument("--run", type=Path, help="a trained run; left out: random weights")
    what.add_argument("--shape", choices=SHAPES, default="llama-20m", help="of the random weights; default llama-20m")
    found.add_argument("--contenders", nargs="+", choices=[*OURS, *PEERS, *NATIVE], help="the first is the measure")
    found.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="prompts at once; default 1 16")
    found.add_argument("--tokens", type=int, default=256, help="that each makes; default 256")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--repeats", type=int, default=5, help="rounds; default 5")
    found.add_argument(
        "--llama-server", type=Path, metavar="FILE", help="a llama-server that was built for this machine"
    )
    found.add_argument(
        "--text", metavar="SOURCE", help="with --run: also what bf16 and int8 cost in bits per byte on this text"
    )
    found.add_argument("--documents", type=int, default=200, help="of the text, at most; default 200")
    found.add_argument("--no-first-token", action="store_true", help="leave the time to the first token out")
    found.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; a table for each number of prompts, then the first token."""
    options = parser().parse_args(arguments)
    names = options.contenders or [*OURS, *PEERS, *(NATIVE if options.llama_server else ())]
    if options.llama_server is None and any(name in NATIVE for name in names):
        parser().error("the llama-server contenders need --llama-server FILE")
    if options.text and not options.run:
        parser().error("--text is for a trained run; give --run too")
    report: dict[str, Any] = {"machine": hardware.describe(hardware.pick_device("cpu")), "results": []}
    with tempfile.TemporaryDirectory(prefix="decode-") as folder:
        run = open_run(options.run or random_run(options.shape, Path(folder) / "run"))
        print(headline(run, options), flush=True)
        for rows in options.rows:
            results = measure(names, run, Path(folder), rows, options)
            print(table(results), flush=True)
            report["results"] += [asdict(result) for result in results]
        if options.text:
            texts = list(islice(documents(options.text), options.documents))
            report["weights"] = weight_costs(run, texts)
            print(weight_costs_table(report["weights"], len(texts)), flush=True)
        if not options.no_first_token:
            report["first_token"] = first_token(run, options.threads, options.repeats)
            print(first_token_table(report["first_token"]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def headline(run: LoadedRun, options: argparse.Namespace) -> str:
    """What it takes to read the tables."""
    shape = run.model.config
    return (
        f"**{options.run.name if options.run else options.shape}**: {run.model.parameters_count() / 1e6:.1f} M parameters"
        f" ({shape.architecture}), {shape.layers} layers x {shape.width}, vocabulary {shape.vocab_size:,}, context"
        f" {shape.context}; {options.tokens} tokens, {options.threads} threads, median of {options.repeats} rounds\n"
    )


if __name__ == "__main__":
    run_script(main)
