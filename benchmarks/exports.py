"""What each export weighs, how long it takes to load and how fast it tells, in every reader that is here.

    uv run python benchmarks/exports.py
    uv run --with xllamacpp python benchmarks/exports.py --run runs/stories --llama2c ../llama2c --json exports.json

A run, given or with random weights, is exported to every format that has its architecture. Every reader is a fresh process in
every round; the readers take turns, and figures are medians over the rounds. Loading is from the first look at the file until
the first token can be made, libraries imported before; that of run and runq is a whole process of one token. Tokens per second
are those of one greedy text, after its first token where the reader says when that came. SmallLM decodes as it does by itself
(int8 on a CPU), whatever the file held. MB are all files of an export, in millions of bytes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from peers.models import SHAPES, prompts, random_run
from peers.race import Racer
from train_throughput import run as run_script

from smalllm import hardware
from smalllm.checkpoint import LoadedRun, open_run
from smalllm.config import UserError

EXPORTS = {
    "run": (None, ""), "huggingface f32": ("huggingface", "f32"), "huggingface bf16": ("huggingface", "bf16"),
    "gguf f32": ("gguf", "f32"), "gguf f16": ("gguf", "f16"), "gguf q8_0": ("gguf", "q8_0"),
    "llama2c f32": ("llama2c", "f32"), "llama2c q8_0": ("llama2c", "q8_0"), "html int8": ("html", "int8"),
}  # fmt: skip
"""Module and dtype of each; the run itself is not an export."""
READERS = {
    None: ("smalllm",), "huggingface": ("transformers", "smalllm"), "gguf": ("llama.cpp", "smalllm"),
    "llama2c": ("run", "smalllm"), "html": ("chromium",),
}  # fmt: skip
OPTIONAL = {"run": "--llama2c", "runq": "--llama2c"}


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    export: str
    megabytes: float
    reader: str
    load_seconds: float
    tokens_per_second: float
    rates: list[float]
    loads: list[float]


def write_all(run: LoadedRun, folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Every export that this run has, and where it lies; the others are told on standard error."""
    for name in names:
        module, dtype = EXPORTS[name]
        out = folder / (name.replace(" ", "-") + {"html": ".html", "gguf": ".gguf"}.get(module or "", ""))
        if module is None:
            yield name, run.checkpoint.path
            continue
        try:
            importlib.import_module(f"smalllm.export.{module}").write(run, out, dtype)
            yield name, out
        except (UserError, ImportError) as error:
            print(f"{name} left out: {error}", file=sys.stderr)


def readers(name: str, options: argparse.Namespace) -> list[str]:
    """Who reads this export here."""
    found = [f"{reader}q" if reader == "run" and "q8_0" in name else reader for reader in READERS[EXPORTS[name][0]]]
    return [reader for reader in found if reader not in OPTIONAL or options.llama2c]


def measure(
    name: str, file: Path, reader: str, question: dict[str, Any], options: argparse.Namespace
) -> dict[str, float]:
    """Load and tell once, in a process of its own."""
    words = [sys.executable, "-m", "peers.readers", reader, str(file), "--format", EXPORTS[name][0] or "run"]
    words += ["--threads", str(options.threads), "--context", str(question["context"])]
    words += ["--llama2c", str(options.llama2c)] if options.llama2c else []
    with closing(Racer(f"{reader} of {name}", words, options.threads)) as racer:
        racer.ask({**question, "tokens": 8})  # warms caches and threads
        answer = racer.ask(question)
        return {"load": racer.ready["seconds"], "rate": answer["tokens"] / answer["seconds"]}


def megabytes(path: Path) -> float:
    """Of a file, or of all files in a folder; of a run, only what reading needs."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if "optimizer" not in file.name) / 1e6


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    lines = [
        "| export | MB | read by | loads in | tokens/s | slowest - fastest |", "|---|---|---|---|---|---|",
        *(
            f"| {r.export} | {r.megabytes:.1f} | {r.reader} | {r.load_seconds:.2f} s | {r.tokens_per_second:,.0f}"
            f" | {min(r.rates):,.0f} - {max(r.rates):,.0f} |"
            for r in results
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def race(exports: dict[str, Path], question: dict[str, Any], options: argparse.Namespace) -> list[Result]:
    """Every reader of every export, in turns."""
    figures: dict[tuple[str, str], list[dict[str, float]]] = {}
    sizes = {name: megabytes(file) for name, file in exports.items()}
    for number in range(options.repeats):
        for name, file in exports.items():
            for reader in readers(name, options):
                print(f"round {number + 1}: {reader} of {name}", file=sys.stderr, flush=True)
                try:
                    figures.setdefault((name, reader), []).append(measure(name, file, reader, question, options))
                except UserError as error:
                    print(f"left out: {error}", file=sys.stderr)
    return [
        Result(
            name, sizes[name], reader, median(one["load"] for one in own),
            median(one["rate"] for one in own), [one["rate"] for one in own], [one["load"] for one in own],
        )
        for (name, reader), own in figures.items() if own
    ]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = found.add_mutually_exclusive_group()
    what.add_argument("--run", type=Path, help="a trained run; left out: random weights")
    what.add_argument("--shape", choices=SHAPES, default="llama-20m", help="of the random weights; default llama-20m")
    found.add_argument("--exports", nargs="+", choices=EXPORTS, default=list(EXPORTS), help="default: all")
    found.add_argument("--tokens", type=int, default=128, help="of the text; default 128")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--repeats", type=int, default=3, help="rounds; default 3")
    found.add_argument(
        "--llama2c", type=Path, metavar="FOLDER", help="a clone of karpathy/llama2.c, whose programs read too"
    )
    found.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, measure, tell."""
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="exports-") as name:
        run = open_run(options.run or random_run(options.shape, Path(name) / "run"))
        exports = dict(write_all(run, Path(name), options.exports))
        (prompt,) = prompts(run.tokenizer, 1)
        shape, text = run.model.config, run.tokenizer.decode(prompt)
        question = {
            "prompts": [prompt], "texts": [text], "tokens": min(options.tokens, shape.context - 2 * len(prompt)),
            "context": shape.context, "forbidden": [0, run.tokenizer.bos_id, run.tokenizer.eos_id],
        }  # fmt: skip
        results = race(exports, question, options)
    what = options.run.name if options.run else options.shape
    print(
        f"**{what}**: {run.model.parameters_count() / 1e6:.1f} M parameters ({shape.architecture}), context"
        f" {shape.context}; {question['tokens']} tokens, {options.threads} threads, median of {options.repeats} rounds\n"
    )
    print(table(results))
    if options.json:
        machine = hardware.describe(hardware.pick_device("cpu"))
        report = {"machine": machine, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_script(main)
