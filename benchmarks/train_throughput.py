"""Training speed of SmallLM beside a plain transformers loop and nanoGPT: one run, one machine, the same random tokens.

    uv run python benchmarks/train_throughput.py --nanogpt ../nanoGPT --json throughput.json
    uv run python benchmarks/train_throughput.py --shapes smolergpt-12m:16 --repeats 3 --contenders smalllm transformers-bf16

A measured step is one optimizer step over one micro-batch: forward, backward, clipping to norm 1, AdamW. Contenders take
turns, a step each (A B C A B C ...), and a matrix product is measured in every round, so that a machine whose speed drifts
is as fast for one as for the other. Figures are medians over the rounds; ratios are medians of the ratios inside a round.

Each contender lives in a process of its own for the whole run. In one process they would share the allocator, the number of
threads, the compiler's caches and whatever a library sets globally; a new process for each step would compile each time.
A contender that waits reads from a pipe: its OpenMP threads sleep a millisecond after their last work, unless the
environment tells them to spin, which is therefore taken out of it.

MFU counts for everybody the arithmetic of SmallLM's model of that shape (``GPT.flops_per_token``, causal attention halved).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from operator import truediv
from pathlib import Path
from statistics import median
from typing import IO, Any, NoReturn

import torch
from torch import Tensor, nn

from smalllm import hardware
from smalllm.config import ModelConfig, RunConfig, UserError, load_recipe
from smalllm.data.batches import Batch, Batches
from smalllm.data.shards import TokenDataset
from smalllm.model import GPT
from smalllm.speed.training import TrainingBench, random_data

CONTENDERS = (
    "smalllm", "transformers-bf16", "transformers-fp32", "nanogpt-fp32", "nanogpt-bf16-compiled",
)  # fmt: skip
SHAPES = ("smalllm-20m:8", "smolergpt-12m:16")
SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
Step = Callable[[], float]
"""One optimizer step; returns its loss."""


@dataclass(frozen=True)
class Shape:
    """What is trained: the model of a recipe, ``micro_batch`` rows of its context at a time."""

    recipe: str
    micro_batch: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``smalllm-20m:8``; a recipe may be a path."""
        recipe, _, micro_batch = text.rpartition(":")
        if not recipe or not micro_batch.isdigit() or int(micro_batch) < 1:
            raise UserError(f"--shapes {text}: write RECIPE:MICRO_BATCH, for example smalllm-20m:8")
        return cls(recipe, int(micro_batch))

    def config(self) -> RunConfig:
        """The recipe with a step of one micro-batch and the vocabulary filled in."""
        recipe = load_recipe(self.recipe)
        vocab_size = recipe.model.vocab_size or recipe.data.vocab_size
        train = {"batch_tokens": self.micro_batch * recipe.model.context, "micro_batch": self.micro_batch}
        return recipe.replace(train=train, model={"vocab_size": vocab_size})

    def flops_per_token(self) -> int:
        with torch.device("meta"):
            return GPT(self.config().model).flops_per_token()


# ── a contender, in its own process ──


@dataclass
class Contender:
    """What takes a turn: its step and how many parameters that trains."""

    step: Step
    parameters: int


def make_contender(name: str, config: RunConfig, folder: Path, nanogpt: Path | None) -> Contender:
    """The contender of this name on the device that training would choose."""
    device = hardware.pick_device(config.train.device)
    match name:
        case "smalllm":
            return smalllm_contender(config, folder)
        case "transformers-bf16" | "transformers-fp32":
            model = transformers_model(config.model).to(device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, betas=config.optim.betas)
            loss_of = transformers_loss(model)
        case "nanogpt-fp32" | "nanogpt-bf16-compiled":
            assert nanogpt is not None
            model = nanogpt_model(nanogpt, config.model).to(device)
            optimizer = model.configure_optimizers(0.1, config.optim.lr, config.optim.betas, device.type)
            loss_of = nanogpt_loss(torch.compile(model) if name.endswith("compiled") else model)
        case _:
            raise ValueError(name)
    batches = random_batches(config, folder, device)
    step = plain_step(model, optimizer, loss_of, batches, bf16="bf16" in name)
    return Contender(step, sum(parameter.numel() for parameter in model.parameters()))


def smalllm_contender(config: RunConfig, folder: Path) -> Contender:
    """SmallLM: the trainer's own step, with what it chooses for this machine."""
    measured = TrainingBench(config, folder)

    def step() -> float:
        before = measured.trainer.state.window_loss
        _, tokens = measured.step()
        return (measured.trainer.state.window_loss - before) / tokens

    return Contender(step, measured.trainer.model.parameters_count())


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[Batch], Tensor], batches: Iterator[Batch], bf16: bool
) -> Step:  # fmt: skip
    """The loop that everybody writes: zero_grad, forward under autocast, backward, clip, step."""
    device_type = next(model.parameters()).device.type

    def step() -> float:
        batch = next(batches)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device_type, torch.bfloat16) if bf16 else nullcontext():
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def random_batches(config: RunConfig, folder: Path, device: torch.device) -> Iterator[Batch]:
    """The batches that SmallLM's trainer sees at steps 0, 1, 2 ..., in its order."""
    data = TokenDataset.open(random_data(folder / "data", config.model.vocab_size, config.model.context))
    batches = Batches(data.train, config.model.context, config.train.batch_tokens, config.seed, config.data.packing)
    step = 0
    while True:
        yield next(batches.micro_batches(step, config.train.micro_batch)).to(device)
        step += 1


def transformers_model(shape: ModelConfig) -> nn.Module:
    """The architecture of transformers that has this shape."""
    import transformers

    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    match shape.architecture:
        case "starcoder2":
            return transformers.Starcoder2ForCausalLM(transformers.Starcoder2Config(
                vocab_size=shape.vocab_size, hidden_size=shape.width, intermediate_size=shape.hidden_width,
                num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
                max_position_embeddings=shape.context, use_bias=shape.bias, tie_word_embeddings=shape.tie_embeddings, **special,
            ))  # fmt: skip
        case "gpt2":
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(
                vocab_size=shape.vocab_size, n_positions=shape.context, n_embd=shape.width, n_layer=shape.layers,
                n_head=shape.heads, n_inner=shape.hidden_width, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                tie_word_embeddings=shape.tie_embeddings, **special,
            ))  # fmt: skip
        case other:
            raise UserError(f"there is no {other} contender of transformers here; give a shape with activation = gelu")


def transformers_loss(model: nn.Module) -> Callable[[Batch], Tensor]:
    """Labels are the inputs, which transformers shifts by itself."""
    return lambda batch: model(input_ids=batch.inputs, labels=batch.inputs).loss


def nanogpt_model(folder: Path, shape: ModelConfig) -> nn.Module:
    """The model of ``folder``/model.py in this shape; it has learned positions, a tied head and 4 x width in its MLP."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(
        block_size=shape.context, vocab_size=shape.vocab_size, n_layer=shape.layers, n_head=shape.heads,
        n_embd=shape.width, dropout=0.0, bias=shape.bias,
    ))  # fmt: skip


def nanogpt_loss(model: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Batch], Tensor]:
    """nanoGPT's model computes its loss from inputs and targets."""
    return lambda batch: model(batch.inputs, batch.targets)[1]


def take_turns(name: str, shape: Shape, nanogpt: Path | None, answers: IO[str]) -> None:
    """The life of a contender's process: a line says that it is ready, then a line for every line that comes in."""
    started = time.monotonic()
    config = shape.config()
    device = hardware.pick_device(config.train.device)
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        contender = make_contender(name, config, Path(folder), nanogpt)
        contender.step()  # compiles
        ready = {"parameters": contender.parameters, "first_step_seconds": time.monotonic() - started}
        contender.step()  # nothing is new any more
        print(json.dumps(ready), file=answers, flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            loss = contender.step()
            hardware.synchronize(device)
            turn = {"seconds": time.perf_counter() - start, "loss": loss, "memory_bytes": hardware.peak_memory(device)}
            print(json.dumps(turn), file=answers, flush=True)


# ── the race ──


class Racer:
    """A contender's process, as seen from the one that measures."""

    def __init__(self, name: str, shape: Shape, nanogpt: Path | None) -> None:
        command = [sys.executable, __file__, "--turns-of", name, "--shapes", f"{shape.recipe}:{shape.micro_batch}"]
        command += ["--nanogpt", str(nanogpt)] if nanogpt else []
        environment = {key: value for key, value in os.environ.items() if key not in SPINNING}
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read when the process fails)
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.ready = self.answer()
        self.turns: list[dict[str, Any]] = []

    def turn(self) -> None:
        """Let it take one step and remember what it says."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, and ``answer`` tells why
            print("step", file=self.process.stdin, flush=True)
        self.turns.append(self.answer())

    def answer(self) -> dict[str, Any]:
        """Its next line; UserError with its last words when there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            words = self.log.read().strip().splitlines()[-3:]
            self.close()
            raise UserError(f"{self.name} failed: {' / '.join(words)}")
        return json.loads(line)

    def seconds(self) -> list[float]:
        """Of each of its turns."""
        return [turn["seconds"] for turn in self.turns]

    def close(self) -> None:
        """It ends when nothing more comes in."""
        with suppress(BrokenPipeError), self.log, self.process:
            pass


@dataclass(frozen=True)
class Result:
    """One row of the table. ``mfu_bf16`` and ``mfu_fp32`` are against the two peaks, ``relative`` is the speed against
    SmallLM's, and ``first_step_seconds`` counts from when torch is loaded to the end of the first step."""

    contender: str
    parameters: int
    tokens_per_second: float
    mfu_bf16: float
    mfu_fp32: float
    relative: float | None
    first_step_seconds: float
    memory_bytes: int
    seconds: list[float]
    loss: float


Peaks = dict[str, list[float]]
"""Matrix products in FLOP/s, one for each round, by number format."""


def race(shape: Shape, names: Sequence[str], repeats: int, nanogpt: Path | None) -> tuple[list[Result], Peaks]:
    """All contenders of one shape, a step each in every round."""
    racers: list[Racer] = []
    peaks: Peaks = {"bf16": [], "fp32": []}
    try:
        for name in names:
            print(f"{shape.recipe}: starting {name}", file=sys.stderr, flush=True)
            racers.append(Racer(name, shape, nanogpt))
        for number in range(repeats):
            measure_peaks(peaks)
            first = number % len(racers)  # nobody always follows the same one
            for racer in racers[first:] + racers[:first]:
                racer.turn()
    finally:
        for racer in racers:
            racer.close()
    return [result_of(racer, racers, shape, peaks) for racer in racers], peaks


def measure_peaks(peaks: Peaks) -> None:
    """Append the peaks of this moment."""
    device = hardware.pick_device()
    hardware.peak_flops.cache_clear()
    peaks["bf16"].append(hardware.peak_flops(device, torch.bfloat16))
    peaks["fp32"].append(hardware.peak_flops(device, torch.float32))


def result_of(racer: Racer, racers: Sequence[Racer], shape: Shape, peaks: Peaks) -> Result:
    """Medians over the rounds."""
    seconds, tokens = racer.seconds(), shape.config().train.batch_tokens
    smalllm = next((other.seconds() for other in racers if other.name == "smalllm"), None)
    return Result(
        contender=racer.name, parameters=racer.ready["parameters"], tokens_per_second=tokens / median(seconds),
        mfu_bf16=utilization(seconds, peaks["bf16"], shape), mfu_fp32=utilization(seconds, peaks["fp32"], shape),
        relative=median(map(truediv, smalllm, seconds)) if smalllm else None,
        first_step_seconds=racer.ready["first_step_seconds"], memory_bytes=racer.turns[-1]["memory_bytes"],
        seconds=seconds, loss=racer.turns[-1]["loss"],
    )  # fmt: skip


def utilization(seconds: Sequence[float], peaks: Sequence[float], shape: Shape) -> float:
    """Median MFU of steps that took so many seconds, each against the peak of its round."""
    work = shape.config().train.batch_tokens * shape.flops_per_token()
    return median(work / (took * peak) for took, peak in zip(seconds, peaks, strict=True))


def table(shape: Shape, results: Sequence[Result], peaks: Peaks) -> str:
    """A Markdown table with what it takes to read it."""
    model = shape.config().model
    bf16, fp32 = (median(peaks[name]) / 1e9 for name in ("bf16", "fp32"))
    lines = [
        f"**{shape.recipe}**: {model.layers} layers x {model.width}, {model.heads} heads, context {model.context}, vocabulary"
        f" {model.vocab_size:,}, micro-batch {shape.micro_batch}; {shape.flops_per_token() / 1e6:.1f} MFLOP a token;"
        f" peaks {bf16:.0f} (bf16) and {fp32:.0f} (fp32) GFLOP/s; median of {len(peaks['bf16'])} rounds", "",
        "| who | parameters | tokens/s | of SmallLM | of the bf16 peak | of the fp32 peak | first step | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for result in results:
        relative = "" if result.relative is None else f"{result.relative:.2f}"
        lines.append(
            f"| {result.contender} | {result.parameters / 1e6:.2f} M | {result.tokens_per_second:,.0f} | {relative}"
            f" | {result.mfu_bf16:.1%} | {result.mfu_fp32:.1%} | {result.first_step_seconds:.1f} s"
            f" | {result.memory_bytes / 2**30:.2f} GiB |"
        )
    return "\n".join(lines) + "\n"


# ── the command ──


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--shapes", nargs="+", default=SHAPES, metavar="RECIPE:MICRO_BATCH", help=f"default: {' '.join(SHAPES)}"
    )
    found.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="default: all; nanogpt needs --nanogpt")
    found.add_argument("--repeats", type=int, default=9, help="rounds; default 9")
    found.add_argument("--nanogpt", type=Path, metavar="FOLDER", help="a clone of nanoGPT: the folder of its model.py")
    found.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    found.add_argument("--turns-of", choices=CONTENDERS, help=argparse.SUPPRESS)  # how a contender's process is started
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Race every shape; a table for each as soon as it is done."""
    options = parser().parse_args(arguments)
    shapes = [Shape.parse(text) for text in options.shapes]
    if options.turns_of:
        answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not end up between the answers
        take_turns(options.turns_of, shapes[0], options.nanogpt, answers)
        return 0
    names = options.contenders or [name for name in CONTENDERS if options.nanogpt or "nanogpt" not in name]
    if options.nanogpt is None and any("nanogpt" in name for name in names):
        parser().error("the nanogpt contenders need --nanogpt FOLDER")
    report: dict[str, Any] = {"machine": hardware.describe(hardware.pick_device()), "shapes": []}
    for shape in shapes:
        results, peaks = race(shape, names, max(1, options.repeats), options.nanogpt)
        print(table(shape, results, peaks), flush=True)
        report["shapes"].append({
            **asdict(shape), "flops_per_token": shape.flops_per_token(), "peak_flops": peaks,
            "results": [asdict(result) for result in results],
        })  # fmt: skip
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def run(main: Callable[[], int]) -> NoReturn:
    """End a script with what ``main`` returns; a user's mistake is one sentence."""
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run(main)
