"""Device, precision and seeds are probed and repeatable."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from smalllm import hardware
from smalllm.config import ModelConfig, RunConfig, TrainConfig, UserError
from smalllm.model import GPT
from smalllm.native import build
from smalllm.runtime import (
    Fit,
    Runtime,
    accelerate,
    compile_blocks,
    fit_memory,
    heap_factor,
    make_runtime,
    pick_precision,
    seed_everything,
    step_memory,
)
from smalllm.training.optimizer import Optimizer

CPU = torch.device("cpu")


def test_the_cpu_is_right_and_described():
    assert max(hardware.self_test(CPU).values()) < 1e-4
    described = hardware.describe(CPU)
    assert (
        described["device"] == "cpu" and described["memory_bytes"] > 2**28 and described["torch"] == torch.__version__
    )
    assert hardware.peak_memory(CPU) > 2**25
    assert hardware.peak_flops(CPU, torch.float32, 128) > 1e8


def test_other_work_on_the_machine_does_not_decide_the_precision(monkeypatch: pytest.MonkeyPatch):
    """Six of seven products take ten times as long."""
    clock, calls = [0.0], [0]

    def mm(a: torch.Tensor, b: torch.Tensor) -> None:
        calls[0] += 1
        clock[0] += (1.0 if a.dtype == torch.bfloat16 else 2.0) * (10.0 if calls[0] % 7 else 1.0)

    monkeypatch.setattr(hardware.torch, "mm", mm)
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: clock[0])
    assert hardware._speedup(torch.bfloat16, 8) == pytest.approx(2.0)


def test_a_device_that_computes_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda t, shape: t * 0.0)
    original = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda t, dim: original(t, dim) * (2.0 if t.dtype == torch.float32 else 1.0)
    )
    with pytest.raises(UserError, match="computes softmax wrongly"):
        hardware.self_test(CPU)


@pytest.mark.parametrize("wish", ["banana", "cuda:99", "cpu:3", "", "mps0"])
def test_a_wrong_device_is_one_sentence(wish: str):
    with pytest.raises(UserError, match="^device = "):
        hardware.pick_device(wish)


@pytest.mark.parametrize(
    ("fast", "device", "precision"),
    [((torch.bfloat16,), "cpu", "bf16"), ((), "cpu", "fp32"), ((torch.bfloat16, torch.float16), "cuda", "bf16"),
     ((torch.float16,), "cuda", "fp16"), ((torch.float16,), "mps", "fp32")],
)  # fmt: skip
def test_precision_follows_what_the_machine_is_good_at(
    fast: tuple, device: str, precision: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hardware, "fast_dtypes", lambda device: fast)
    assert pick_precision(torch.device(device), "auto") == precision
    assert pick_precision(CPU, "fp32") == "fp32"


def test_fp16_switches_the_scaler_on_and_others_do_not():
    """The ancestor compared torch.float16 with "float16" and trained without loss scaling."""
    assert make_runtime("cpu", "fp16").make_scaler() is not None
    assert make_runtime("cpu", "fp32").make_scaler() is None
    assert make_runtime("cpu", "bf16").make_scaler() is None
    assert make_runtime("cpu", "fp16").dtype == torch.float16


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_computes_in_the_precision_that_it_names(precision: str):
    runtime = make_runtime("cpu", precision)
    with runtime.autocast():
        assert (torch.ones(4, 4) @ torch.ones(4, 4)).dtype == runtime.dtype


def test_seeds_are_a_function_of_their_parts():
    draws = []
    for parts in ((42, 3, 1), (42, 3, 1), (42, 31), (42, 3, 2)):
        seed_everything(*parts)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])


def small_model(heads: int = 1) -> GPT:
    return GPT(ModelConfig(layers=1, width=16, heads=heads, context=8, vocab_size=16))


def test_a_cpu_runs_fused_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("smalllm.native.build.load", lambda name: None)
    model = small_model()
    assert accelerate(model, "auto", False, Runtime(CPU, "bf16")) == ("native", "")
    assert model.fused is not None


def test_why_a_model_runs_plainly_is_said(monkeypatch: pytest.MonkeyPatch):
    runtime = Runtime(CPU, "fp32")
    assert accelerate(small_model(), "off", True, runtime) == ("plain", "off in the settings")
    assert accelerate(small_model(heads=4), "auto", False, runtime) == (
        "plain", "the run is too short to earn the compile time back",
    )  # fmt: skip
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("SMALLLM_NATIVE", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("smalllm.native.build.load", build._load.__wrapped__)
    for model in (small_model(), small_model(heads=4)):
        assert accelerate(model, "on", True, runtime) == ("plain", build.NO_COMPILER)
        assert model.fused is None
    assert compile_blocks(small_model(), torch.device("mps"))[0] == "plain"


def budget(gigabytes: float, **settings: Any) -> RunConfig:
    train = TrainConfig(steps=1, batch_tokens=128 * 64, memory_gb=gigabytes, **settings)
    return RunConfig(model=ModelConfig(context=128), train=train)


def step_bytes(model: GPT, runtime: Runtime, size: int, config: RunConfig, recompute: bool = False) -> int:
    return step_memory(model, runtime, config, size * 128, recompute).total


def test_a_step_fits_the_memory_it_is_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "memory_now", lambda device: 40_000_000)
    model = GPT(ModelConfig(layers=4, width=128, heads=4, context=128, vocab_size=512))
    runtime = Runtime(CPU, "fp32")
    for size in (1, 4, 16):
        needed = step_bytes(model, runtime, size, budget(0.0))
        assert fit_memory(model, runtime, budget(needed / 1e9)) == Fit(size, False, needed)
        assert fit_memory(model, runtime, budget(1.2 * needed / 1e9)).bytes <= 1.2 * needed
    assert fit_memory(model, runtime, budget(64.0)).micro_batch == 32  # what caches like
    assert fit_memory(model, runtime, budget(0.0), device_bytes=2 * needed).micro_batch == 16


def test_recomputation_is_the_last_resort(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "memory_now", lambda device: 40_000_000)
    monkeypatch.setattr("smalllm.runtime.CHECKPOINTING_BYTES", 1_000_000)  # a model that earns it back is a large one
    model = GPT(ModelConfig(layers=16, width=64, heads=4, context=128, vocab_size=512))
    runtime = Runtime(CPU, "fp32")
    least = step_bytes(model, runtime, 1, budget(0.0))
    assert fit_memory(model, runtime, budget(least / 1e9)) == Fit(1, False, least)
    assert fit_memory(model, runtime, budget(0.97 * least / 1e9)).recompute
    with pytest.raises(
        UserError, match=r"train.memory_gb = 0.001: this model needs about 0.\d+ GB with micro_batch=1 and"
    ):
        fit_memory(model, runtime, budget(0.001))


def test_recomputation_that_costs_more_than_it_saves_is_not_advised(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "memory_now", lambda device: 40_000_000)
    model = GPT(ModelConfig(layers=2, width=32, heads=2, context=128, vocab_size=512))
    with pytest.raises(UserError, match="with micro_batch=1; raise train.memory_gb"):
        fit_memory(model, Runtime(CPU, "fp32"), budget(0.001))


def test_memory_by_part_is_what_is_kept(monkeypatch: pytest.MonkeyPatch):
    """Against the tensors of a real optimizer and, for activations, against what autograd saves."""
    monkeypatch.setattr(hardware, "memory_now", lambda device: 40_000_000)
    model = GPT(ModelConfig(layers=2, width=64, heads=4, context=128, vocab_size=512))
    parameters = model.parameters_count()
    for kind in ("adamw", "muon"):
        config = budget(0.0).replace(optim={"kind": kind})
        memory = step_memory(model, Runtime(CPU, "fp32"), config, 128, recompute=False)
        optimizer = Optimizer(model, config.optim, CPU)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state = sum(tensor.nbytes for tensor in optimizer.state_tensors().values() if tensor.dim())
        assert (memory.optimizer, memory.weights, memory.gradients) == (state, 4 * parameters, 4 * parameters)
        assert memory.checkpoint == state + 4 * parameters and memory.process == 70_000_000 - 4 * parameters
        assert memory.total == sum(asdict(memory).values())
    on_gpu = step_memory(model, Runtime(torch.device("cuda"), "bf16"), config, 128, recompute=False, held=0)
    assert on_gpu.checkpoint == 0 and on_gpu.activations < memory.activations


def test_saved_activations_are_counted(native: None):
    """The bytes that autograd keeps in a forward pass through the fused kernels, weights left out."""
    shape = ModelConfig(layers=3, width=64, heads=4, context=128, vocab_size=512)
    model, runtime = GPT(shape), Runtime(CPU, "fp32")
    accelerate(model, "on", True, runtime)
    weights, kept = {p.data_ptr() for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = 8 * 128
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(torch.zeros(8, 128, dtype=torch.long))
    config = budget(0.0)
    block = (
        step_memory(model, runtime, config, tokens, False).activations / heap_factor(runtime) / 4
    )  # one for the backward pass
    assert hidden.shape == (8, 128, 64) and sum(kept.values()) == pytest.approx(3 * block, rel=0.1)


def test_a_micro_batch_that_was_asked_for_is_kept():
    model = GPT(ModelConfig(layers=1, width=64, heads=4, context=128, vocab_size=512))
    fit = fit_memory(model, Runtime(CPU, "fp32"), budget(0.0, micro_batch=64))
    assert (fit.micro_batch, fit.recompute) == (64, False)
    assert fit_memory(model, Runtime(CPU, "fp32"), budget(0.0, micro_batch=64, recompute=True)).recompute


def test_peak_memory_is_that_of_this_program_alone() -> None:
    """Linux keeps ru_maxrss over exec: a small program that a large one starts would seem as large."""
    ballast = bytearray(b"x") * 400_000_000
    code = "from smalllm import hardware; import torch; print(hardware.peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    cpu = torch.device("cpu")
    assert hardware.peak_memory(cpu) > len(ballast)
    if Path("/proc/self/status").exists():
        assert 5e7 < int(done.stdout) < hardware.peak_memory(cpu) - 1e8
