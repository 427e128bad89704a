"""The forward pass of a GPT on a CPU with fused C++ between its matrix products: the mathematics of model.py, faster.

Activations are [rows, width] with rows = B x T, in the dtype of the matrix products; the residual stream, norms and sums
are float32. Gradients agree with autograd through model.py to rounding (tests/test_native_kernels.py).
"""

from __future__ import annotations

import ctypes
import functools
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from smalllm.config import ModelConfig
from smalllm.model import GPT, NORM_EPS, Attention, Block
from smalllm.native import build

SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def supports(config: ModelConfig) -> bool:
    """Heads are read in vectors of 16; dropout is left to model.py."""
    return config.head_width % 16 == 0 and not config.dropout


def hidden(model: GPT, x: Tensor, starts: Tensor | None) -> Tensor:
    """The normed residual stream [B, T, C] from embeddings x [B, T, C]: what ``GPT.hidden`` computes, in the dtype that
    autocast gives matrix products (one of ``SUFFIXES``), and in float32 without autocast.

    ``starts`` [B, T], int32: the first position that each may attend to (where its story begins), not decreasing in a row."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    shape, delta, bounds = x.shape, None, bounds_of(starts, x.shape[:2])
    with torch.autocast("cpu", enabled=False):
        x = x.float().reshape(-1, shape[-1])
        for block in model.blocks:
            run = functools.partial(_block, model, block, bounds=bounds, dtype=dtype)
            if model.recompute and model.training:
                x, delta = checkpoint(run, x, delta, use_reentrant=False)
            else:
                x, delta = run(x, delta)
        return add_norm(x, delta, model.norm, dtype)[1].view(shape)


def _block(
    model: GPT, block: nn.Module, x: Tensor, delta: Tensor | None, *, bounds: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The residual stream [rows, C], float32, and what the block's MLP is about to add to it, in ``dtype``."""
    assert isinstance(block, Block)
    x, y = add_norm(x, delta, block.attention_norm, dtype)
    y = attention(linear(y, block.attention.qkv), model, block.attention, bounds)
    x, y = add_norm(x, linear(y, block.attention.out), block.mlp_norm, dtype)
    y = _Activation.apply(linear(y, block.mlp.up), "swiglu" if block.mlp.gated else "gelu")
    return x, linear(y, block.mlp.down)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """x W' + b in x's dtype."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


# ── residual sum and norm ──


def add_norm(x: Tensor, delta: Tensor | None, norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x + delta in float32, and its norm in ``dtype``."""
    result: tuple[Tensor, Tensor] = _AddNorm.apply(
        x, delta, norm.weight, getattr(norm, "bias", None), isinstance(norm, nn.LayerNorm), dtype
    )
    return result


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, centre: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        rows, width = x.shape
        total, y = torch.empty_like(x), x.new_empty(x.shape, dtype=dtype)
        statistics = x.new_empty(rows, 2)
        _call(
            "add_norm_forward", dtype, x, delta, weight, bias, total, y, statistics, rows, width, int(centre), NORM_EPS
        )
        ctx.save_for_backward(total, weight, statistics)
        ctx.centre, ctx.dtype, ctx.has_bias, ctx.has_delta = centre, dtype, bias is not None, delta is not None
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total_slope: Tensor | None, y_slope: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, statistics = ctx.saved_tensors
        rows, width = total.shape
        x_slope = torch.empty_like(total)
        delta_slope = total.new_empty(total.shape, dtype=ctx.dtype) if ctx.has_delta else None
        parts = total.new_empty(torch.get_num_threads(), 2, width)
        _call(
            "add_norm_backward", ctx.dtype, y_slope.contiguous(), total_slope, total, weight, statistics,
            x_slope, delta_slope, parts, rows, width, int(ctx.centre),
        )  # fmt: skip
        of_weight, of_bias = parts.sum(0)
        return x_slope, delta_slope, of_weight, of_bias if ctx.has_bias else None, None, None


# ── attention ──


def attention(qkv: Tensor, model: GPT, layer: Attention, bounds: Tensor) -> Tensor:
    """Causal attention of projected rows [rows, (H + 2 G) D] -> [rows, H D] within documents, with QK-norm and RoPE where
    the model has them; ``bounds`` [documents + 1], int64, are the documents' first rows and the number of rows."""
    sizes = (layer.heads, layer.kv_heads, layer.head_width)
    norms = (layer.q_norm.weight, layer.k_norm.weight) if layer.q_norm and layer.k_norm else (None, None)
    rope = (model.cos, model.sin) if model.config.positions == "rope" else (None, None)
    result: Tensor = _Attention.apply(qkv, *norms, *rope, bounds, sizes)
    return result


def bounds_of(starts: Tensor | None, shape: torch.Size) -> Tensor:
    """First rows of the documents of a batch [B, T] flattened, and the number of rows: int64. Rows without ``starts`` are
    a document each."""
    batch, positions = shape
    ends = torch.tensor([batch * positions])
    if starts is None:
        return torch.cat((torch.arange(batch) * positions, ends))
    return torch.cat(((starts == torch.arange(positions)).flatten().nonzero().flatten(), ends))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor | None, sin: Tensor | None,
        bounds: Tensor, sizes: tuple[int, int, int],
    ) -> Tensor:  # fmt: skip
        heads, _, width = sizes
        y = qkv.new_empty(qkv.shape[0], heads * width)
        log_sums = qkv.new_empty(heads, qkv.shape[0], dtype=torch.float32)
        inputs = (q_norm, k_norm, cos, sin, bounds)
        _call("attention_forward", qkv.dtype, qkv, *inputs, y, log_sums, len(bounds) - 1, *sizes, NORM_EPS)
        ctx.save_for_backward(qkv, y, log_sums, *inputs)
        ctx.sizes = sizes
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_slope: Tensor) -> tuple[Tensor | None, ...]:
        qkv, y, log_sums, *inputs = ctx.saved_tensors
        _, groups, width = ctx.sizes
        documents = len(inputs[-1]) - 1
        slope = torch.empty_like(qkv)
        norm_slopes = log_sums.new_empty(documents * groups, 2, width)
        _call(
            "attention_backward", qkv.dtype, y_slope.contiguous(), qkv, y, log_sums, *inputs, slope, norm_slopes,
            documents, *ctx.sizes, NORM_EPS,
        )  # fmt: skip
        of_norms = norm_slopes.sum(0) if inputs[0] is not None else (None, None)
        return slope, of_norms[0], of_norms[1], None, None, None, None


# ── activations ──


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(up)
        ctx.kind = kind
        rows, width = up.shape
        out = torch.empty_like(up) if kind == "gelu" else up.new_empty(rows, width // 2)
        _call(f"{kind}_forward", up.dtype, up, out, *_sizes(kind, out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (up,) = ctx.saved_tensors
        up_slope = torch.empty_like(up)
        _call(f"{ctx.kind}_backward", up.dtype, slope.contiguous(), up, up_slope, *_sizes(ctx.kind, slope))
        return up_slope, None


def _sizes(kind: str, out: Tensor) -> tuple[int, ...]:
    return (out.numel(),) if kind == "gelu" else (out.shape[0], out.shape[1])


# ── cross-entropy ──


def cross_entropy(logits: Tensor, targets: Tensor, with_slope: bool) -> tuple[Tensor, Tensor]:
    """Summed loss of logits [N, V] at targets [N] (0 where negative), and its derivative by the logits, which it overwrites."""
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    _call("cross_entropy", logits.dtype, logits, targets, losses, logits.shape[0], logits.shape[1], int(with_slope))
    return losses.sum(), logits


# ── calling ──


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Call a C function with pointers and numbers; every one takes the number of threads last."""
    _function(f"{name}_{SUFFIXES[dtype]}")(
        *(_pointer(value) if isinstance(value, Tensor) else value for value in arguments), torch.get_num_threads()
    )


def _pointer(tensor: Tensor) -> int:
    assert tensor.is_contiguous(), "kernels read contiguous memory"
    return tensor.data_ptr()


@cache
def _function(name: str) -> Any:
    """A function of the library with its argument types; the name ends in one of ``SUFFIXES``."""
    function = getattr(build.load("kernels"), name)
    function.restype = None
    pointer, size, flag, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    signatures = {
        "add_norm_forward": [pointer] * 7 + [size] * 2 + [flag, real, flag],
        "add_norm_backward": [pointer] * 8 + [size] * 2 + [flag, flag],
        "swiglu_forward": [pointer] * 2 + [size] * 2 + [flag],
        "swiglu_backward": [pointer] * 3 + [size] * 2 + [flag],
        "gelu_forward": [pointer] * 2 + [size, flag],
        "gelu_backward": [pointer] * 3 + [size, flag],
        "cross_entropy": [pointer] * 3 + [size] * 2 + [flag, flag],
        "attention_forward": [pointer] * 8 + [size] * 4 + [real, flag],
        "attention_backward": [pointer] * 11 + [size] * 4 + [real, flag],
    }
    function.argtypes = signatures[name.rpartition("_")[0]]
    return function
