"""What this machine is: processor, memory, number formats, measured peaks. Knows nothing about models."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
import time
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from smalllm.config import UserError


def pick_device(wish: str = "auto") -> torch.device:
    """``auto`` is CUDA, then Apple MPS, then the CPU. UserError when the wished device is not here."""
    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", wish):
        raise UserError(f"device = {wish} is not one of auto, cpu, mps, cuda, cuda:N")
    device = torch.device(wish)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(
            f"device = {wish}: PyTorch sees no such GPU here; use device=cpu, or install a CUDA build of torch"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device = {wish}: there is no Apple GPU here; use device=cpu")
    return device


def gpu_count() -> int:
    """CUDA devices that PyTorch can use."""
    return torch.cuda.device_count()


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple GPU" if device.type == "mps" else cpu_name()


def cpu_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def total_memory(device: torch.device) -> int:
    """Bytes of memory of the device; for the CPU what this process may use (a container's limit counts)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_number(Path("/sys/fs/cgroup/memory.max")), _number(Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))]
    return min([physical] + [limit for limit in limits if limit])


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() else None


def peak_memory(device: torch.device) -> int:
    """Largest memory in bytes that this process has held: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if (peak := _resident_peak()) is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident_peak() -> int | None:
    """Of this program alone, in bytes, where there is /proc. Linux keeps ru_maxrss over exec, so that a small program started
    by a large one would seem as large."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+([0-9]+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def memory_now(device: torch.device) -> int:
    """Memory in bytes that this process holds at this moment: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_memory(device)
    return pages * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch, Python or a kernel in C++ means that there was not enough memory."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def forget_peak_memory(device: torch.device) -> None:
    """Count ``peak_memory`` anew, where that can be done: on CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@cache
def peak_flops(device: torch.device, dtype: torch.dtype, size: int = 0) -> float:
    """Measured peak of a square matrix product in FLOP/s: the best that MFU can be compared with. Median of five, after a
    warm-up; about 0.2 s."""
    size = size or (2048 if device.type == "cpu" else 8192)
    if device.type == "cpu" and dtype == torch.float16:
        dtype = torch.float32  # no fp16 kernels worth the name on CPUs
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / median(seconds[1:])


@cache
def fast_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Number formats that are right and faster than float32 here, found by trying, never assumed."""
    if device.type == "cuda":
        return (
            (torch.bfloat16, torch.float16)
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else (torch.float16,)
        )
    if device.type == "mps":
        return (torch.float16,)
    right = _product_error(device, torch.bfloat16) < 0.05
    return (torch.bfloat16,) if right and _speedup(torch.bfloat16) > 1.2 else ()


def _speedup(dtype: torch.dtype, size: int = 512, rounds: int = 15) -> float:
    """How many times faster than float32 a product is on the CPU: formats take turns and the best time of each counts,
    so that other work on the machine decides nothing. Some 50 ms."""
    pairs = [[torch.randn(size, size).to(kind) for _ in range(2)] for kind in (torch.float32, dtype)]
    best = [float("inf"), float("inf")]
    for _ in range(rounds):
        for place, (a, b) in enumerate(pairs):
            start = time.perf_counter()
            torch.mm(a, b)
            best[place] = min(best[place], time.perf_counter() - start)
    return best[0] / best[1]


def _product_error(device: torch.device, dtype: torch.dtype) -> float:
    """Largest error of a 64 x 64 product against float64, relative to the largest entry; inf when the format is missing."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    try:
        product = (a.to(device=device, dtype=dtype) @ b.to(device=device, dtype=dtype)).double().cpu()
    except (RuntimeError, TypeError):
        return float("inf")
    return ((product - a @ b).abs().max() / (a @ b).abs().max()).item()


def self_test(device: torch.device) -> dict[str, float]:
    """Errors of basic operations against float64 on the CPU; UserError when the device computes nonsense."""
    errors = {
        "matmul_fp32": _product_error(device, torch.float32) if device.type != "mps" else _mps_product_error(device)
    }
    x = torch.linspace(-8, 8, 512).view(8, 64)
    for name, function in (
        ("softmax", lambda t: t.softmax(-1)),
        ("layer_norm", lambda t: torch.nn.functional.layer_norm(t, (64,))),
    ):
        errors[name] = (function(x.to(device)).double().cpu() - function(x.double())).abs().max().item()
    for name, error in errors.items():
        if not error < 1e-2:
            raise UserError(
                f"{device_name(device)} computes {name} wrongly (error {error:.2g}); use device=cpu, and update its driver"
            )
    return errors


def _mps_product_error(device: torch.device) -> float:
    a, b = torch.eye(64, device=device) * 3, torch.ones(64, 64, device=device)
    return ((a @ b).cpu() - 3.0).abs().max().item() / 3.0


def describe(device: torch.device) -> dict[str, Any]:
    """What a run should remember about the machine: names, versions, threads."""
    return {
        "device": str(device), "device_name": device_name(device), "memory_bytes": total_memory(device),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "platform": platform.platform(),
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
