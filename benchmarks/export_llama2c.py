"""Is what `smalllm export --to llama2c` writes the same model in llama2.c? Its own programs, compiled here, are asked.

    git clone https://github.com/karpathy/llama2.c ../llama2.c
    uv run python benchmarks/export_llama2c.py --llama2c ../llama2.c
    uv run python benchmarks/export_llama2c.py --llama2c ../llama2.c --run runs/stories --text storyworld:200

- greedy: `run model.bin -t 0` and our model in float32 continue the same prompts; what run prints must be equal, byte by byte
- tokenizer: the ids that run's `encode` makes of strings, and ours of the same with the space that it always puts first
- logits and bits per byte: of stories, by `forward` of run.c (float32) and of runq.c (int8, activations too), against ours

run.c and runq.c are compiled as they are, twice: as programs, and into one of ours that calls their functions. Exit 1 when a
float32 answer, or an id, differs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from peers.models import SHAPES, random_run
from torch.nn.functional import cross_entropy
from train_throughput import run as run_script

from smalllm.checkpoint import LoadedRun, open_run
from smalllm.config import UserError
from smalllm.data import storyworld
from smalllm.data.sources import documents
from smalllm.export import llama2c
from smalllm.model import GPT, KVCache

FLAGS = ("-O3",)  # as llama2.c's Makefile says; -Ofast would let the compiler reorder sums
PROGRAMS = {"f32": "run", "q8_0": "runq"}
ASK = """
#define TESTING
#include "%s"
/* Requests on standard input: 0, N, N int32 ids -> their logits; 1, N, N bytes of text -> how many ids, ids. */
int main(int count, char **words) {
    Transformer model;
    Tokenizer tokenizer;
    build_transformer(&model, words[1]);
    build_tokenizer(&tokenizer, words[2], model.config.vocab_size);
    int request[2];
    while (fread(request, sizeof(int), 2, stdin) == 2) {
        int n = request[1], *ids = malloc((n + 3) * sizeof(int));
        if (request[0]) {
            char *text = calloc(n + 1, 1);
            if (fread(text, 1, n, stdin) != n) return 1;
            encode(&tokenizer, text, 1, 0, ids, &n);
            fwrite(&n, sizeof(int), 1, stdout);
            fwrite(ids, sizeof(int), n, stdout);
            free(text);
        } else {
            if (fread(ids, sizeof(int), n, stdin) != n) return 1;
            for (int i = 0; i < n; i++)
                fwrite(forward(&model, ids[i], i), sizeof(float), model.config.vocab_size, stdout);
        }
        free(ids);
    }
    return 0;
}
"""


@dataclass(frozen=True)
class Result:
    """One row of the table; ``equal`` of ``prompts`` greedy answers are ours, to the last byte."""

    program: str
    bytes: int
    prompts: int
    equal: int
    strings: int
    encoded: int
    max_logit_difference: float
    token_agreement: float
    bits_per_byte: float
    bits_per_byte_difference: float


# ── their programs ──


def compile_programs(source: Path, folder: Path, dtype: str) -> tuple[Path, Path]:
    """llama2.c's program for this type, and ours around its functions."""
    name = PROGRAMS[dtype]
    file = (source / f"{name}.c").resolve()
    if not file.is_file():
        raise UserError(f"there is no {file}; clone https://github.com/karpathy/llama2.c and give --llama2c its folder")
    ask, own = folder / f"ask-{name}.c", folder / f"{name}.program"
    ask.write_text(ASK % file, encoding="utf-8")
    for code, program in ((file, own), (ask, ask.with_suffix(""))):
        command = ["gcc", *FLAGS, "-w", "-o", str(program), str(code), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"gcc cannot compile {code}: {done.stderr.strip().splitlines()[-1]}")
    return own, ask.with_suffix("")


def said(program: Path, export: Path, prompt: str, steps: int) -> bytes:
    """What their program prints."""
    files = [str(program), str(export / llama2c.MODEL), "-z", str(export / llama2c.TOKENIZER)]
    done = subprocess.run(
        [*files, "-t", "0", "-n", str(steps), "-i", prompt], capture_output=True, check=True, timeout=600
    )
    return done.stdout


def asked(program: Path, export: Path, requests: Iterable[bytes]) -> bytes:
    """What our program around their functions answers."""
    files = [str(export / llama2c.MODEL), str(export / llama2c.TOKENIZER)]
    return subprocess.run([program, *files], input=b"".join(requests), capture_output=True, check=True).stdout


# ── what they must say ──


@torch.inference_mode()
def greedy(model: GPT, prompt: list[int], steps: int) -> list[int]:
    """The ids that run.c goes through in so many steps, the first included; it stops at the begin of another text."""
    cache, ids, logits = KVCache(model.config, 1), prompt[: steps + 1], torch.empty(0)
    logits = model(torch.tensor([prompt[:steps]]), cache)[0, -1]
    while len(ids) < steps + 1 and (best := int(logits.argmax())) != 1:
        ids.append(best)
        if len(ids) < steps + 1:
            logits = model(torch.tensor([[best]]), cache)[0, -1]
    return ids


def spoken(pieces: Sequence[bytes], ids: Sequence[int]) -> bytes:
    """How run.c prints ids: no space after begin, bytes of byte pieces, nothing of a single byte that cannot be printed."""
    found = b""
    for before, id in pairwise(ids):
        piece = pieces[id].removeprefix(b" ") if before == 1 else pieces[id]
        if byte := re.match(rb"<0x([0-9A-Fa-f]{1,2})", piece):
            piece = bytes([int(byte[1], 16)]).rstrip(b"\0")
        if len(piece) != 1 or 32 <= piece[0] < 127 or piece.isspace():
            found += piece
    return found + b"\n"


def piece_bytes(data: bytes) -> list[bytes]:
    """The texts of a tokenizer.bin."""
    place, found = 4, []
    while place < len(data):
        (length,) = struct.unpack_from("<i", data, place + 4)
        found.append(data[place + 8 : place + 8 + length])
        place += 8 + length
    return found


def equal_answers(program: Path, export: Path, run: LoadedRun, prompts: Sequence[str], steps: int) -> int:
    """How many prompts our model in float32 and theirs continue alike."""
    pieces, equal = piece_bytes((export / llama2c.TOKENIZER).read_bytes()), 0
    for prompt in prompts:
        ids = greedy(run.model, with_space(run, prompt), steps)
        equal += spoken(pieces, ids) == said(program, export, prompt, steps)
    return equal


def with_space(run: LoadedRun, text: str) -> list[int]:
    """The ids of a prompt as run.c is to make them."""
    return [1, *run.tokenizer.encode(f" {text}" if text else "")]


def equal_encodings(program: Path, export: Path, run: LoadedRun, texts: Sequence[str]) -> int:
    """Of how many texts their ids are ours."""
    requests = [struct.pack("<ii", 1, len(text.encode())) + text.encode() for text in texts]
    found, place, equal = np.frombuffer(asked(program, export, requests), np.int32), 0, 0
    for text in texts:
        count = int(found[place])
        equal += found[place + 1 : place + 1 + count].tolist() == with_space(run, text)
        place += 1 + count
    return equal


@torch.inference_mode()
def compare_logits(
    program: Path, export: Path, run: LoadedRun, texts: Sequence[str]
) -> tuple[float, float, float, float]:
    """(greatest difference of logits, share of equal likeliest tokens, bits per byte of theirs, and less ours)."""
    tokenizer, greatest, equal, bits, size, tokens = run.tokenizer, 0.0, 0, np.zeros(2), 0, 0
    for text in texts:
        ids = tokenizer.encode_document(text)[: run.model.config.context]
        answer = asked(program, export, [struct.pack(f"<ii{len(ids)}i", 0, len(ids), *ids)])
        theirs = torch.from_numpy(np.frombuffer(answer, np.float32).reshape(len(ids), -1).copy())
        ours = run.model(torch.tensor([ids]))[0]
        greatest = max(greatest, float((theirs - ours).abs().max()))
        equal += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        targets = torch.tensor(ids[1:])
        bits += [float(cross_entropy(own[:-1], targets, reduction="sum")) / math.log(2) for own in (theirs, ours)]
        size, tokens = size + len(tokenizer.decode(ids).encode()), tokens + len(ids)
    return greatest, equal / tokens, bits[0] / size, (bits[0] - bits[1]) / size


def odd_strings(count: int, seed: int = 0) -> list[str]:
    """Texts that C strings can hold: no NUL."""
    draw = random.Random(seed)
    parts = [
        "Once",
        " upon",
        " a",
        " time",
        "\n",
        "  ",
        "12",
        "3",
        ".",
        '"',
        "é",
        "日本",
        "🙂",
        "👩\u200d👩",
        "</s>",
        "<0x0A>",
        "\t",
        "\u2581",
    ]
    return ["".join(draw.choice(parts) for _ in range(draw.randint(1, 12))) for _ in range(count)]


# ── the command ──


def check(run: LoadedRun, folder: Path, dtype: str, options: argparse.Namespace) -> Result:
    """Export a run in this type and ask llama2.c about it."""
    export = folder / f"export-{dtype}"
    llama2c.write(run, export, dtype)
    program, ask = compile_programs(options.llama2c, folder, dtype)
    stories = enumerate(storyworld.stories(seed=7, count=options.prompts))
    prompts = ["", *(story[: 5 + 7 * number % 60] for number, story in stories)][: options.prompts]
    strings = odd_strings(options.strings)
    texts = list(islice(documents(options.text), options.documents))
    return Result(
        f"{PROGRAMS[dtype]}.c, {dtype}",
        (export / llama2c.MODEL).stat().st_size,
        len(prompts),
        equal_answers(program, export, run, prompts, min(options.tokens, run.model.config.context)),
        len(strings),
        equal_encodings(ask, export, run, strings),
        *compare_logits(ask, export, run, texts),
    )


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    lines = [
        "| read by | MB | greedy answers equal | ids equal | greatest logit difference | likeliest token equal | bits per byte"
        " | difference |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {r.program} | {r.bytes / 1e6:.1f} | {r.equal} of {r.prompts} | {r.encoded} of {r.strings}"
            f" | {r.max_logit_difference:.2g} | {r.token_agreement:.2%} | {r.bits_per_byte:.5f}"
            f" | {r.bits_per_byte_difference / (r.bits_per_byte - r.bits_per_byte_difference):+.4%} |"
            for r in results
        ),
    ]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--llama2c", type=Path, required=True, metavar="FOLDER", help="a clone of karpathy/llama2.c")
    what = found.add_mutually_exclusive_group()
    what.add_argument("--run", type=Path, help="a trained run; left out: random weights")
    what.add_argument("--shape", choices=SHAPES, default="llama-20m", help="of the random weights; default llama-20m")
    found.add_argument("--prompts", type=int, default=50, help="default 50")
    found.add_argument("--tokens", type=int, default=64, help="positions of each answer, prompt included; default 64")
    found.add_argument("--strings", type=int, default=1000, help="for the tokenizer; default 1000")
    found.add_argument(
        "--text", metavar="SOURCE", default="storyworld", help="for logits and bits per byte; default storyworld"
    )
    found.add_argument("--documents", type=int, default=20, help="of the text, at most; default 20")
    found.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, ask, compare; 1 when float32 is not the same model."""
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="llama2c-") as name:
        run = open_run(options.run or random_run(options.shape, Path(name) / "run"))
        results = [check(run, Path(name), dtype, options) for dtype in llama2c.DTYPES]
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")
    exact = results[0]
    return int(exact.equal < exact.prompts or any(result.encoded < result.strings for result in results))


if __name__ == "__main__":
    run_script(main)
