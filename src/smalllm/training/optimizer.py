"""AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

State goes in and out as tensors by name, so that a checkpoint needs no pickle. Knows nothing about schedules: the caller
sets ``lr_fraction`` before each step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from smalllm.config import OptimConfig, UserError
from smalllm.model import GPT, MLP, Attention
from smalllm.ranks import ALONE, Ranks, is_sharded, local

Polynomials = tuple[tuple[float, float, float], ...]
"""(a, b, c) of each iteration x -> a x + b (x x') x + c (x x')^2 x."""
QUINTIC: Polynomials = ((3.4445, -4.7750, 2.0315),) * 5
"""Those of Jordan et al. 2024: singular values from 0.003 to 1 come to lie in 0.7 ... 1.2."""
POLAR: Polynomials = ((8.0933, -23.6200, 17.4456), (3.6365, -2.7218, 0.5365), (2.6613, -1.9770, 0.4525))
"""Each the best of its degree for the interval that the one before leaves (Polar Express, Amsel et al., arXiv 2505.16932):
singular values from 0.01 to 1 come to lie in 0.73 ... 1.27 after three iterations instead of five."""


class Part(ABC):
    """Some parameters with their learning rates and state, as in ``torch.optim.Optimizer``; which it is not, because that
    one imports the compiler: a second and more before the first step."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        self.param_groups = [{"lr": lr, "peak_lr": lr, **group} for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @abstractmethod
    def step(self) -> None:
        """Update the parameters that have a gradient."""


class AdamW(Part):
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), by PyTorch's fused kernel where it has one."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], fused: bool) -> None:
        super().__init__(groups, lr)
        self.betas, self.fused = betas, fused

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self._state(parameter) for parameter in parameters]
            adamw(
                [local(parameter) for parameter in parameters], [local(parameter.grad) for parameter in parameters], [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states], [], [state["step"] for state in states],
                foreach=False, fused=self.fused, amsgrad=False, beta1=self.betas[0], beta2=self.betas[1], lr=group["lr"],
                weight_decay=group["weight_decay"], eps=1e-8, maximize=False,
            )  # fmt: skip

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        if parameter not in self.state:
            step = torch.zeros((), device=parameter.device if self.fused else "cpu")
            moments = {name: torch.zeros_like(local(parameter)) for name in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = {"step": step, **moments}
        return self.state[parameter]


class Muon(Part):
    """Momentum orthogonalized by Newton-Schulz iterations (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    With ``QUINTIC`` equal to ``torch.optim.Muon`` (Nesterov momentum 0.95, bfloat16, update scaled by max(1, rows /
    columns) ** 0.5, decoupled weight decay), but matrices of equal shape go through the iterations in one batched product.
    A parameter that stacks several matrices by rows (query, key, value) is split as ``splits`` says. With several ranks each
    does its share of the matrices, and tells the others.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        splits: Mapping[Tensor, list[int]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        polynomials: Polynomials = POLAR,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__([{"params": parameters, "momentum": momentum, "weight_decay": weight_decay}], lr)
        self.splits, self.polynomials, self.ranks = splits, polynomials, ranks

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[tuple[Tensor, int, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                direction = self.ranks.whole(self._direction(parameter, group["momentum"]), parameter)
                rows = self.splits.get(parameter, [parameter.shape[0]])
                for number, piece in enumerate(direction.split(rows)):
                    by_shape[tuple(piece.shape)].append((parameter, number, piece))
            updates: dict[Tensor, dict[int, Tensor]] = defaultdict(dict)
            for pieces in by_shape.values():
                found = self._orthogonalized([piece for _, _, piece in pieces])
                for (parameter, number, _), update in zip(pieces, found, strict=True):
                    updates[parameter][number] = update
            for parameter, parts in updates.items():
                self._update(parameter, [parts[number] for number in sorted(parts)], group["lr"], group["weight_decay"])

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum of the gradient (of this rank's part of it)."""
        assert parameter.grad is not None
        gradient = local(parameter.grad)
        if parameter not in self.state:
            self.state[parameter] = {"momentum_buffer": torch.zeros_like(gradient)}
        buffer = self.state[parameter]["momentum_buffer"].lerp_(gradient, 1.0 - momentum)
        return gradient.lerp(buffer, momentum)

    def _orthogonalized(self, matrices: list[Tensor]) -> Tensor:
        """Matrices of equal shape, stacked; each rank does an equal number of them, some of which may be there to make it so."""
        share = -(-len(matrices) // self.ranks.world)
        mine = matrices[self.ranks.rank * share : (self.ranks.rank + 1) * share]
        mine += [torch.zeros_like(matrices[0])] * (share - len(mine))
        return self.ranks.exchange(orthogonalize(torch.stack(mine), self.polynomials))[: len(matrices)]

    def _update(self, parameter: Tensor, updates: list[Tensor], lr: float, weight_decay: float) -> None:
        """Decay, then go along the updates of the matrices that the parameter stacks, in the rows that this rank has."""
        target, start = local(parameter), 0
        first, end = self.ranks.rows_of(parameter)
        if weight_decay:
            target.mul_(1.0 - lr * weight_decay)
        for update in updates:
            scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
            low, high = max(first, start), min(end, start + len(update))
            if low < high:
                target[low - first : high - first].add_(update[low - start : high - start], alpha=-lr * scale)
            start += len(update)


def orthogonalize(matrices: Tensor, polynomials: Polynomials = POLAR) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: [n, rows, columns] -> the same shape, bfloat16, singular values near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizer:
    """The optimizers of a run behind one face: ``zero_grad``, ``step``, named state in and out."""

    def __init__(self, model: GPT, config: OptimConfig, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.named = dict(model.named_parameters())
        self.fused = device.type in ("cpu", "cuda")
        self.parts: list[Part] = []
        muon = block_matrices(model) if config.kind == "muon" else {}
        if muon:
            self.parts.append(Muon(list(muon), muon, config.lr, weight_decay=config.weight_decay, ranks=ranks))
        rest = [parameter for parameter in model.parameters() if parameter not in muon]
        self.parts.append(
            AdamW(decay_groups(rest, config.weight_decay), config.adamw_lr, config.betas, fused=self.fused)
        )

    @property
    def flavour(self) -> str:
        """What must be equal for a resumed run to have the same bits."""
        names = "+".join(type(part).__name__.lower() for part in self.parts)
        return f"{names}{'-fused' if self.fused else ''}"

    def set_lr(self, fraction: float) -> float:
        """Scale every group's peak learning rate; returns that of the first group."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak_lr"] * fraction
        first: float = self.parts[0].param_groups[0]["lr"]
        return first

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for parameter in self.named.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """``<parameter>.<slot>`` -> tensor; scalars as float32 tensors of no dimension. Of sharded parameters the first rank
        gets all, whole and on the CPU; all ranks must call this."""
        tensors = {}
        for name, parameter in self.named.items():
            for part in self.parts:
                for slot, value in part.state.get(parameter, {}).items():
                    whole = self.ranks.whole(value, parameter)
                    if self.ranks.first:
                        tensors[f"{name}.{slot}"] = whole.cpu() if is_sharded(parameter) else whole
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``state_tensors`` gave; UserError when it is that of another model or optimizer."""
        for name, parameter in self.named.items():
            part = next(
                part for part in self.parts if any(parameter is p for g in part.param_groups for p in g["params"])
            )
            slots = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}
            wanted = {"momentum_buffer"} if isinstance(part, Muon) else {"step", "exp_avg", "exp_avg_sq"}
            if slots.keys() != wanted or any(
                value.dim() and value.shape != parameter.shape for value in slots.values()
            ):
                raise UserError(
                    f"optimizer.safetensors does not fit {name}: it is the state of another optimizer or model"
                )
            part.state[parameter] = {
                slot: value.clone()
                if slot == "step" and not self._step_on_device(parameter)
                else self.ranks.part_of(value, parameter).to(parameter.device).clone()
                for slot, value in slots.items()
            }

    def _step_on_device(self, parameter: nn.Parameter) -> bool:
        """Fused AdamW keeps its step counter beside the parameter."""
        return self.fused and parameter.device.type == "cuda"


def decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only: not on biases and norms."""
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def block_matrices(model: GPT) -> dict[Tensor, list[int]]:
    """The matrices of the blocks, each with the row counts of the matrices that it stacks."""
    found: dict[Tensor, list[int]] = {}
    for module in model.blocks.modules():
        if isinstance(module, Attention):
            keys = module.kv_heads * module.head_width
            found[module.qkv.weight] = [module.heads * module.head_width, keys, keys]
            found[module.out.weight] = [module.out.weight.shape[0]]
        elif isinstance(module, MLP):
            rows = module.up.weight.shape[0]
            found[module.up.weight] = [rows // 2, rows // 2] if module.gated else [rows]
            found[module.down.weight] = [module.down.weight.shape[0]]
    return found
