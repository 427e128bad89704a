"""Where and in which precision a run computes: device, autocast, loss scaling, seeds, compilation, memory.

Models and losses are written as for one device in float32.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections import defaultdict
from contextlib import AbstractContextManager as ContextManager
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from smalllm import hardware
from smalllm.config import RunConfig, UserError
from smalllm.model import GPT
from smalllm.native import build, kernels
from smalllm.ranks import ALONE, Ranks

Precision = Literal["fp32", "bf16", "fp16"]
Execution = Literal["plain", "native", "compiled"]
"""How the blocks run: operation by operation, in fused C++, or through torch.compile."""
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


CHUNK_BYTES = {"native": 32 * 2**20, "cpu": 8 * 2**20, "cuda": 256 * 2**20, "mps": 64 * 2**20}
"""Logits that the loss holds at a time, as if float32. PyTorch goes through them several times, so that on a CPU they
should stay in its cache; the fused kernel goes through a row at a time, and larger products are faster."""


@dataclass(frozen=True)
class Runtime:
    """One process of a run, which computes its share of every step."""

    device: torch.device
    precision: Precision
    ranks: Ranks = ALONE

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return DTYPES[self.precision]

    def autocast(self) -> ContextManager[Any]:
        """Matrix products in ``dtype``; weights and sums stay float32."""
        return nullcontext() if self.precision == "fp32" else torch.autocast(self.device.type, self.dtype)

    def make_scaler(self) -> torch.amp.GradScaler | None:
        """Loss scaling (Micikevicius et al., arXiv 1710.03740): only fp16 needs it."""
        return torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None

    def peak_flops(self) -> float:
        return hardware.peak_flops(self.device, self.dtype)

    def synchronize(self) -> None:
        hardware.synchronize(self.device)


def make_runtime(device: str = "auto", precision: str = "auto", ranks: Ranks = ALONE) -> Runtime:
    """Probe the device and choose the precision: bf16 where it is fast, fp16 with loss scaling on other GPUs, else fp32.
    Each rank of a machine gets a GPU of its own; UserError when there are too few."""
    chosen = hardware.pick_device(device)
    if not ranks.lone and chosen.type == "cuda":
        if chosen.index is not None or ranks.local_world > hardware.gpu_count():
            raise UserError(
                f"train.device = {device} and {ranks.local_world} ranks on this machine with {hardware.gpu_count()} GPUs:"
                " start as many ranks as GPUs, with device=cuda or auto"
            )
        chosen = torch.device("cuda", ranks.local)
    hardware.self_test(chosen)
    return Runtime(chosen, pick_precision(chosen, precision), ranks)


def pick_precision(device: torch.device, wish: str) -> Precision:
    """``auto`` is bf16 where it pays, fp16 on other CUDA cards, fp32 elsewhere; UserError for what the device lacks."""
    fast = hardware.fast_dtypes(device)
    match wish:
        case "auto":
            return (
                "bf16"
                if torch.bfloat16 in fast
                else "fp16"
                if torch.float16 in fast and device.type == "cuda"
                else "fp32"
            )
        case "bf16" if device.type == "cuda" and torch.bfloat16 not in fast:
            raise UserError(
                f"train.precision = bf16: {hardware.device_name(device)} has no bf16; use precision=fp16 or auto"
            )
        case "fp32" | "bf16" | "fp16":
            return wish
    raise UserError(f"train.precision = {wish} is not one of auto, fp32, bf16, fp16")


def seed_everything(*parts: int) -> int:
    """Seed torch's generators (CPU and devices) from numbers such as (seed, step, micro-batch): randomness is a function
    of where training stands, so that a resumed run draws what the uninterrupted one drew."""
    seed = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
    torch.manual_seed(seed)
    return seed


def set_deterministic(device: torch.device) -> None:
    """Same seed, same bits. On the CPU every operation of a GPT step is deterministic as it is, for one number of threads;
    CUDA needs to be asked, and cuBLAS needs a fixed workspace as well."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def accelerate(model: GPT, wish: str, worthwhile: bool, runtime: Runtime) -> tuple[Execution, str]:
    """Make a model fast in place, names unchanged: fused C++ on a CPU, torch.compile where that is lacking and on GPUs.
    Returns how it runs now and, if plainly, one line why. ``worthwhile``: the run is long enough for torch.compile."""
    if wish == "off":
        return "plain", "off in the settings"
    if runtime.device.type == "cpu" and runtime.dtype in kernels.SUFFIXES and kernels.supports(model.config):
        try:
            build.load("kernels")
        except build.Unavailable as error:
            return "plain", str(error)
        model.fused = kernels.hidden
        return "native", ""
    if wish == "auto" and not worthwhile:
        return "plain", "the run is too short to earn the compile time back"
    return compile_blocks(model, runtime.device)


def compile_blocks(model: GPT, device: torch.device) -> tuple[Execution, str]:
    """torch.compile block by block: all blocks share one compilation, and no graph grows with the depth."""
    if device.type == "mps":
        return "plain", "torch.compile does not pay on Apple GPUs"
    if device.type == "cpu" and build.compiler() is None:
        return "plain", build.NO_COMPILER
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "no CUDA runtime" on a CPU is no news
    for block in model.blocks:
        block.compile()
    model.flex = device.type == "cuda" and not model.config.dropout
    return "compiled", ""


def forget_compiled(model: GPT) -> None:
    """Fall back to eager execution for good, after a compiler error."""
    for block in model.blocks:
        block._compiled_call_impl = None
    model.flex = False


@dataclass(frozen=True)
class Fit:
    """How a step is divided to fit into memory. The mathematics is the same for every division."""

    micro_batch: int
    recompute: bool
    bytes: int


def fit_memory(
    model: GPT, runtime: Runtime, config: RunConfig, *, held: int | None = None, device_bytes: int | None = None
) -> Fit:
    """The fastest division of a step that stays within ``train.memory_gb`` (0: half of the device's memory): as many
    sequences per forward pass as the device likes, fewer if they do not fit, recomputation if not even one does.

    ``held`` is as in ``step_memory``; ``device_bytes`` is the memory of a device that is not here. UserError when the
    least that can be done needs more than a budget that was asked for."""

    def fit(size: int, recompute: bool) -> Fit:
        tokens = size * model.config.context
        return Fit(size, recompute, step_memory(model, runtime, config, tokens, recompute, held).total)

    train, ranks = config.train, runtime.ranks
    if train.micro_batch and not train.memory_gb:
        return fit(train.micro_batch, train.recompute)
    users = ranks.local_world if runtime.device.type == "cpu" else 1  # ranks that share this memory
    budget = train.memory_gb * 1e9 or 0.5 * (device_bytes or hardware.total_memory(runtime.device)) / users
    sequences = -(-train.batch_tokens // model.config.context // ranks.world)
    likes = max(1, (4096 if runtime.device.type == "cpu" else 32_768) // model.config.context)
    # Equal pieces: one shape to compile.
    sizes = [size for size in range(train.micro_batch or min(sequences, likes), 0, -1) if sequences % size == 0]
    tries = [(size, recompute) for recompute in (False, True) if recompute or not train.recompute for size in sizes]
    fits = [fit(size, recompute) for size, recompute in tries]
    least = min(fits, key=lambda fit: fit.bytes)
    chosen = next((fit for fit in fits if fit.bytes <= budget), least)
    if train.memory_gb and chosen.bytes > budget:
        raise UserError(
            f"train.memory_gb = {train.memory_gb:g}: this model needs about {least.bytes / 1e9:.2f} GB with"
            f" micro_batch={least.micro_batch}{' and recomputation' if least.recompute else ''}; raise train.memory_gb, or"
            " lower model.context or model.width"
        )
    return chosen


PROCESS_BYTES = {"cpu": 30_000_000, "cuda": 500_000_000, "mps": 200_000_000}
"""What a process comes to hold besides: threads and libraries, on a GPU the driver's context, which is assumed."""
CHECKPOINTING_BYTES = 160_000_000
"""Of modules that torch loads when the first block is recomputed: torch._dynamo."""


@dataclass(frozen=True)
class StepMemory:
    """Peak memory of training by what holds it, in bytes. ``process``: all that does not depend on the model;
    ``checkpoint``: the copy that is written while training goes on; ``update``: what the optimizer's update needs for a
    moment beyond activations and logits, which are free by then."""

    process: int
    weights: int
    gradients: int
    optimizer: int
    checkpoint: int
    activations: int
    logits: int
    update: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def step_memory(
    model: GPT, runtime: Runtime, config: RunConfig, tokens: int, recompute: bool, held: int | None = None
) -> StepMemory:
    """Peak memory of training with so many tokens per forward pass, when a step has several of them.

    Counted from what native/kernels.py, autograd and the optimizers keep, for a model that may be on the meta device.
    ``held`` is what the process holds besides the model; None: what this one does now. On a CPU within 9 % of the peak
    resident memory of the runs in docs/planning.md; not compared on a GPU yet."""
    device, heap = runtime.device.type, heap_factor(runtime)
    parameters, matrices = model.parameters_count(), muon_entries(model) if config.optim.kind == "muon" else {}
    shards = runtime.ranks.world if config.train.parallel == "fsdp" else 1
    kept = -(-parameters // shards)  # of weights, gradients and state, at this rank
    gathered = model.embedding_parameters() + 2 * (parameters // model.config.layers) if shards > 1 else 0
    if held is None:
        own = 0 if model.embedding.weight.is_meta else 4 * kept
        held = hardware.memory_now(runtime.device) - own
    of_muon, largest = sum(matrices.values()), max(matrices.values(), default=0)
    state = (8 * parameters - 4 * of_muon) // shards
    activations = heap * _activation_bytes(model, runtime, config, tokens, recompute)
    logits = heap * _logit_bytes(model, runtime, config)
    # Muon: every matrix's direction, and for those of the largest shape stacks in float32 and bfloat16.
    update = heap * (4 * of_muon + 12 * largest)
    return StepMemory(
        process=held + PROCESS_BYTES[device] + (CHECKPOINTING_BYTES if recompute and device == "cpu" else 0),
        weights=4 * (kept + gathered), gradients=4 * kept, optimizer=state,
        checkpoint=4 * parameters + state if device == "cpu" else 0,  # elsewhere in the memory of the host
        activations=round(activations), logits=round(logits), update=max(0, round(update - activations - logits)),
    )  # fmt: skip


def heap_factor(runtime: Runtime) -> float:
    """What comes and goes within a step takes so many times its size, because free memory lies in pieces: on a CPU glibc's
    heap, measured (docs/planning.md), worse with the larger pieces of float32; on GPUs assumed."""
    if runtime.device.type != "cpu":
        return 1.1
    return 1.4 if runtime.precision == "fp32" else 1.3


def _fused(model: GPT, runtime: Runtime, config: RunConfig) -> bool:
    return runtime.device.type == "cpu" and config.train.compile != "off" and kernels.supports(model.config)


def _activation_bytes(model: GPT, runtime: Runtime, config: RunConfig, tokens: int, recompute: bool) -> int:
    """What the forward pass keeps for the backward pass, and what that adds in the block where it begins."""
    shape, low = model.config, runtime.dtype.itemsize
    qkv = (shape.heads + 2 * shape.key_value_heads) * shape.head_width
    up = shape.hidden_width * (2 if shape.activation == "swiglu" else 1)
    kept = low * (3 * shape.width + qkv + up + shape.hidden_width) + 8 * shape.width  # of a token in a block
    if not _fused(model, runtime, config):  # norms and products keep float32 copies of what they read
        kept += 8 * shape.width + 4 * shape.head_width * (shape.heads + shape.key_value_heads)
    if shape.dropout:  # masks; and on a CPU attention keeps its weights
        kept += 2 * (4 + low) * shape.width
        kept += (8 + low) * shape.heads * shape.context if runtime.device.type == "cpu" else 0
    between, ends = (4 + low) * shape.width, (8 + 2 * low) * shape.width
    blocks = shape.layers * between + 2 * kept if recompute else (shape.layers + 1) * kept
    body = model.parameters_count() - model.embedding_parameters()
    weights = 0 if runtime.precision == "fp32" or recompute else low * body  # in the dtype of products
    return tokens * (blocks + ends) + weights


def _logit_bytes(model: GPT, runtime: Runtime, config: RunConfig) -> int:
    """A chunk of the loss, the head in the dtype of products, and its gradient: that of this micro-batch, of the one
    before, and once more where autograd scales it."""
    low, fused = runtime.dtype.itemsize, _fused(model, runtime, config)
    head = model.head.weight.numel() * (12 + (0 if runtime.precision == "fp32" else low))
    # Fused: one buffer in the dtype of products. Else float32 logits, their slope, and what they were made from.
    chunk = CHUNK_BYTES["native"] * low // 4 if fused else 3 * CHUNK_BYTES[runtime.device.type]
    return head + chunk


def muon_entries(model: GPT) -> dict[tuple[int, int], int]:
    """Entries of the blocks' matrices by shape, as Muon gathers them: stacked ones (query, key, value; gate and value)
    apart."""
    found: dict[tuple[int, int], int] = defaultdict(int)
    shape = model.config
    keys, halves = shape.key_value_heads * shape.head_width, 2 if shape.activation == "swiglu" else 1
    for rows, columns, count in (
        (shape.width, shape.width, 2), (keys, shape.width, 2), (shape.hidden_width, shape.width, halves),
        (shape.width, shape.hidden_width, 1),
    ):  # fmt: skip
        found[rows, columns] += shape.layers * count * rows * columns
    return found


def eager(compiled: bool) -> ContextManager[Any]:
    """Run compiled modules as plain ones: evaluation and sampling meet many shapes and must not recompile. Where nothing
    is compiled, the compiler (seconds to import) is not touched."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
