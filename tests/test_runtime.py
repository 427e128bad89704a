"""Device, precision and seeds are probed and repeatable."""

from __future__ import annotations

import pytest
import torch

from smalllm import hardware
from smalllm.config import ModelConfig, UserError
from smalllm.model import GPT
from smalllm.runtime import compile_blocks, make_runtime, pick_micro_batch, pick_precision, seed_everything

CPU = torch.device("cpu")


def test_the_cpu_is_right_and_described():
    assert max(hardware.self_test(CPU).values()) < 1e-4
    described = hardware.describe(CPU)
    assert (
        described["device"] == "cpu" and described["memory_bytes"] > 2**28 and described["torch"] == torch.__version__
    )
    assert hardware.peak_memory(CPU) > 2**25
    assert hardware.peak_flops(CPU, torch.float32, 128) > 1e8


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


def test_why_nothing_is_compiled_is_said(monkeypatch: pytest.MonkeyPatch):
    model = GPT(ModelConfig(layers=1, width=16, heads=2, context=8, vocab_size=16))
    assert compile_blocks(model, "off", True, CPU) == (False, "off in the settings")
    assert compile_blocks(model, "auto", False, CPU)[0] is False
    monkeypatch.setattr("shutil.which", lambda name: None)
    done, why = compile_blocks(model, "on", True, CPU)
    assert not done and "C++ compiler" in why
    assert compile_blocks(model, "on", True, torch.device("mps"))[0] is False


def test_the_micro_batch_fits_the_memory_it_is_given():
    model = GPT(ModelConfig(layers=4, width=128, heads=4, context=128, vocab_size=512))
    runtime = make_runtime("cpu", "fp32")
    sizes = [pick_micro_batch(model, runtime, 128 * 64, gigabytes) for gigabytes in (0.001, 0.05, 0.2, 8.0)]
    assert sizes[0] == 1 and sizes == sorted(sizes) and sizes[-1] <= 64
