"""Where and in which precision a run computes: device, autocast, loss scaling, ranks, seeds, compilation.

The only module that may know torch.distributed (one rank for now); models and losses are written as for one device in float32.
"""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import AbstractContextManager as ContextManager
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from smalllm import hardware
from smalllm.config import TrainConfig, UserError
from smalllm.model import GPT
from smalllm.native import build, kernels

Precision = Literal["fp32", "bf16", "fp16"]
Execution = Literal["plain", "native", "compiled"]
"""How the blocks run: operation by operation, in fused C++, or through torch.compile."""
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


CHUNK_BYTES = {"native": 32 * 2**20, "cpu": 8 * 2**20, "cuda": 256 * 2**20, "mps": 64 * 2**20}
"""Logits that the loss holds at a time, as if float32. PyTorch goes through them several times, so that on a CPU they
should stay in its cache; the fused kernel goes through a row at a time, and larger products are faster."""


@dataclass(frozen=True)
class Runtime:
    """One process of a run. ``rank`` of ``world`` computes its share of every step."""

    device: torch.device
    precision: Precision
    rank: int = 0
    world: int = 1

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


def make_runtime(device: str = "auto", precision: str = "auto") -> Runtime:
    """Probe the device and choose the precision: bf16 where it is fast, fp16 with loss scaling on other GPUs, else fp32."""
    chosen = hardware.pick_device(device)
    hardware.self_test(chosen)
    return Runtime(chosen, pick_precision(chosen, precision))


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


def fit_memory(model: GPT, runtime: Runtime, train: TrainConfig) -> Fit:
    """The fastest division of a step that stays within ``train.memory_gb`` (0: half of the device's memory): as many
    sequences per forward pass as the device likes, fewer if they do not fit, recomputation if not even one does.

    UserError when the least that can be done needs more than a budget that was asked for."""
    if train.micro_batch and not train.memory_gb:
        tokens = train.micro_batch * model.config.context
        return Fit(train.micro_batch, train.recompute, step_bytes(model, runtime, tokens, train.recompute))
    budget = train.memory_gb * 1e9 or 0.5 * hardware.total_memory(runtime.device)
    context = model.config.context
    sequences = train.batch_tokens // context
    likes = max(1, (4096 if runtime.device.type == "cpu" else 32_768) // context)
    # Equal pieces: one shape to compile.
    sizes = [size for size in range(train.micro_batch or min(sequences, likes), 0, -1) if sequences % size == 0]
    tries = [(size, recompute) for recompute in (False, True) if recompute or not train.recompute for size in sizes]
    fits = [Fit(size, recompute, step_bytes(model, runtime, size * context, recompute)) for size, recompute in tries]
    chosen = next((fit for fit in fits if fit.bytes <= budget), fits[-1])
    if train.memory_gb and chosen.bytes > budget:
        raise UserError(
            f"train.memory_gb = {train.memory_gb:g}: this model needs about {chosen.bytes / 1e9:.2f} GB with"
            f" micro_batch={chosen.micro_batch} and recomputation; raise train.memory_gb, or lower model.context or model.width"
        )
    return chosen


def step_bytes(model: GPT, runtime: Runtime, tokens: int, recompute: bool) -> int:
    """Peak memory of a training step with so many tokens per forward pass, in bytes: what the process holds now, gradients
    and optimizer state, weights in the dtype of products, activations kept for the backward pass, a chunk of the loss.

    Counted from what native/kernels.py and autograd keep; on a CPU within 2 % of what three
    recipes were measured to take (docs/log.md); not compared on a GPU yet."""
    config, low = model.config, runtime.dtype.itemsize
    fused = runtime.device.type == "cpu" and kernels.supports(config)
    qkv = (config.heads + 2 * config.key_value_heads) * config.head_width
    up = config.hidden_width * (2 if config.activation == "swiglu" else 1)
    kept = low * (3 * config.width + qkv + up + config.hidden_width) + 8 * config.width  # of a token in a block
    if not fused:  # norms and products keep float32 copies of what they read
        kept += 8 * config.width + 4 * config.head_width * (config.heads + config.key_value_heads)
    between = (4 + low) * config.width
    blocks = config.layers * between + 2 * kept if recompute else (config.layers + 1) * kept
    head = model.head.weight.numel() * (4 + low) + 2 * CHUNK_BYTES["native" if fused else runtime.device.type]
    held = hardware.memory_now(runtime.device)
    copies = 12 * model.parameters_count()  # of weights and optimizer, while a checkpoint is written beside training
    return held + copies + model.parameters_count() * (12 + low) + tokens * (blocks + 4 * config.width) + head


def eager(compiled: bool) -> ContextManager[Any]:
    """Run compiled modules as plain ones: evaluation and sampling meet many shapes and must not recompile. Where nothing
    is compiled, the compiler (seconds to import) is not touched."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
