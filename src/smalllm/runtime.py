"""Where and in which precision a run computes: device, autocast, loss scaling, ranks, seeds, compilation.

The only module that may know torch.distributed (one rank for now); models and losses are written as for one device in float32.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from contextlib import AbstractContextManager as ContextManager
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from smalllm import hardware
from smalllm.config import UserError
from smalllm.model import GPT
from smalllm.native import build, kernels

Precision = Literal["fp32", "bf16", "fp16"]
Execution = Literal["plain", "native", "compiled"]
"""How the blocks run: operation by operation, in fused C++, or through torch.compile."""
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        model.fused = functools.partial(kernels.hidden, dtype=runtime.dtype)
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
    return "compiled", ""


def forget_compiled(model: GPT) -> None:
    """Fall back to eager execution for good, after a compiler error."""
    for block in model.blocks:
        block._compiled_call_impl = None


def pick_micro_batch(model: GPT, runtime: Runtime, batch_tokens: int, memory_gb: float) -> int:
    """Sequences per forward pass: as many as fit into half of the memory, and on a CPU into what its caches like."""
    context = model.config.context
    sequences = batch_tokens // context
    budget = memory_gb * 1e9 or 0.5 * hardware.total_memory(runtime.device)
    fixed = 16 * model.parameters_count()
    per_token = 4 * model.config.layers * (12 * model.config.width + 3 * model.config.hidden_width)
    fits = max(1, int((budget - fixed) // (per_token * context)))
    likes = max(1, 4096 // context) if runtime.device.type == "cpu" else max(1, 32_768 // context)
    most = min(sequences, fits, likes)
    return next(size for size in range(most, 0, -1) if sequences % size == 0)  # equal pieces: one shape to compile


def eager(compiled: bool) -> ContextManager[Any]:
    """Run compiled modules as plain ones: evaluation and sampling meet many shapes and must not recompile. Where nothing
    is compiled, the compiler (seconds to import) is not touched."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
