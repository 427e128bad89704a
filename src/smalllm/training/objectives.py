"""What training minimizes: summed cross-entropy over the targets that count, without ever holding all logits.

The sum is divided by the tokens of the whole global batch by the caller, so that accumulation, ranks and padding give
one gradient. Knows nothing about data or optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smalllm.data.batches import IGNORE, Batch
from smalllm.model import GPT
from smalllm.native import kernels
from smalllm.runtime import CHUNK_BYTES, Execution


def cross_entropy_sum(
    model: GPT, batch: Batch, dtype: torch.dtype = torch.float32, execution: Execution = "plain"
) -> Tensor:
    """Sum of -ln p(target) over the targets that count: a scalar, float32. ``dtype`` is that of the head's products."""
    hidden = model.hidden(batch.inputs, starts=batch.starts)
    with torch.autocast(batch.inputs.device.type, enabled=False):
        return linear_cross_entropy(hidden.flatten(0, 1), model.head.weight, batch.targets.flatten(), dtype, execution)


class SummedLoss(nn.Module):
    """``cross_entropy_sum`` of a model as a module, which is what can be shared among ranks."""

    def __init__(self, model: GPT, dtype: torch.dtype, execution: Execution) -> None:
        super().__init__()
        self.model, self.dtype, self.execution = model, dtype, execution

    def forward(self, batch: Batch) -> Tensor:
        return cross_entropy_sum(self.model, batch, self.dtype, self.execution)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype = torch.float32, execution: Execution = "plain"
) -> Tensor:
    """Sum over rows of the cross-entropy of softmax(hidden @ weight') [N, C] x [V, C] at targets [N].

    Works through chunks of rows and computes the gradient in the forward pass, so memory does not grow with N x V and no
    product is made twice (Hsu et al., Liger Kernel, arXiv 2410.10989). The sum and the softmax are float32.
    """
    result: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, dtype, execution)
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, execution: Execution
    ) -> Tensor:
        held = CHUNK_BYTES["native" if execution == "native" else hidden.device.type]
        most = max(1, held // (4 * weight.shape[0]))
        rows = -(-hidden.shape[0] // -(-hidden.shape[0] // most))  # equal chunks: one shape to compile
        chunk = chunk_function(execution)
        needs_gradient = any(ctx.needs_input_grad)
        hidden_gradient = torch.empty_like(hidden) if needs_gradient else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs_gradient else None
        low_weight = weight.to(dtype)
        total = torch.zeros((), device=hidden.device, dtype=torch.float32)
        for start in range(0, hidden.shape[0], rows):
            piece, wanted = hidden[start : start + rows].to(dtype), targets[start : start + rows]
            loss, slope = chunk(piece @ low_weight.T, wanted, needs_gradient)
            total += loss
            if hidden_gradient is not None and weight_gradient is not None:
                hidden_gradient[start : start + rows] = slope @ low_weight
                weight_gradient += slope.T @ piece
        ctx.gradients = (hidden_gradient, weight_gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_gradient, weight_gradient = ctx.gradients
        return hidden_gradient * gradient, weight_gradient * gradient, None, None, None


def chunk_loss(logits: Tensor, targets: Tensor, with_slope: bool) -> tuple[Tensor, Tensor]:
    """Summed loss of a chunk and its derivative by the logits, softmax - one-hot, in the logits' dtype."""
    counts = targets != IGNORE
    safe = targets.where(counts, 0)[:, None]
    wide = logits.float()
    log_sum = torch.logsumexp(wide, dim=-1)
    loss = ((log_sum - wide.gather(1, safe)[:, 0]) * counts).sum()
    if not with_slope:
        return loss, logits
    # Rows that do not count get a slope of exp(-inf) - 0, with no pass over the logits of its own.
    slope = (wide - log_sum.masked_fill(~counts, torch.inf)[:, None]).exp_()
    slope.scatter_add_(1, safe, -counts[:, None].to(slope.dtype))
    return loss, slope.to(logits.dtype)


def chunk_function(execution: Execution) -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]:
    """``chunk_loss``, or what does the same faster."""
    match execution:
        case "native":
            return kernels.cross_entropy
        case "compiled":
            return compiled_chunk_loss()
        case "plain":
            return chunk_loss


@cache
def compiled_chunk_loss() -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]:
    """``chunk_loss`` with its passes over the logits fused."""
    compiled: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]] = torch.compile(chunk_loss, dynamic=False)
    return compiled
