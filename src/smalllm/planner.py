"""What a run will take before it begins: memory by part, the division of a step, speed, hours, money.

The model is made on the meta device, so that nothing is allocated, and memory is divided by the functions that training
itself uses (runtime). Speed is given by who measured it; else it is estimated, from a card's published figures or from
this machine's matrix product, and the plan says so. Knows nothing about terminals.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from smalllm import hardware
from smalllm.cards import Card, find_card, link_of, smallest_card
from smalllm.config import RunConfig, UserError
from smalllm.data.shards import MANIFEST, Manifest
from smalllm.model import GPT
from smalllm.ranks import ALONE, Ranks
from smalllm.runtime import Precision, Runtime, StepMemory, fit_memory, muon_entries, pick_precision, step_memory
from smalllm.training.setting_out import divisible

REACHED = (0.4, 0.8)
"""Share of a card's limit (arithmetic plus traffic, one after the other) that training is assumed to reach: an assumption,
not a measurement of ours."""
REACHED_HERE = (0.25, 0.6)
"""MFU assumed on this machine where it is not measured; `smalllm bench train` measured 0.3 to 0.6 with our recipes."""
PASSES = 3
"""Times that memory sees a kept activation: written, read backward, and once more between kernels."""
TRAINING_SHARE = 0.98
"""Of the time; the rest goes to evaluations."""
MEASURED_MICRO_BATCH_SECONDS = 8.0
"""A forward and backward pass that is expected to take longer is not measured."""


@dataclass(frozen=True)
class Place:
    """Where a run is planned for: this machine (``card`` is None) or a card of the table."""

    name: str
    runtime: Runtime
    memory_bytes: int
    card: Card | None = None

    @property
    def gpus(self) -> int:
        """Devices that train together; ``name``, ``memory_bytes`` and ``card`` are of each."""
        return self.runtime.ranks.world

    def __str__(self) -> str:
        return self.name if self.gpus == 1 else f"{self.gpus} x {self.name}"


@dataclass(frozen=True)
class Speed:
    """Tokens per second: the expected figure and what it may lie between; how it is known."""

    tokens_per_second: float
    low: float
    high: float
    source: Literal["measured", "card", "peak"]


@dataclass(frozen=True)
class RunPlan:
    """A planned run. ``tokens`` are those of ``steps`` whole steps; ``epochs`` is None where the data is not prepared."""

    config: RunConfig
    place: Place
    speed: Speed
    parameters: int
    embedding_parameters: int
    flops_per_token: int
    memory: StepMemory
    micro_batch: int
    accumulation: int
    recompute: bool
    steps: int
    hours: float
    epochs: float | None
    price: float | None = None
    efficiency: tuple[float, float] = (1.0, 1.0)
    """Of several GPUs, from bad to good: their speed over that of as many which exchange nothing."""
    instead: str = ""
    """What would fit, where this does not."""

    @property
    def tokens(self) -> int:
        return self.steps * self.config.train.batch_tokens

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.place.memory_bytes

    @property
    def cost(self) -> float | None:
        """Hours times the price of one, in its currency."""
        return None if self.price is None else self.hours * self.price

    def figures(self) -> dict[str, Any]:
        """The keys of ``smalllm plan --json``."""
        train, card = self.config.train, self.place.card
        return {
            "parameters": self.parameters, "embedding_parameters": self.embedding_parameters,
            "flops_per_token": self.flops_per_token,
            "memory_bytes": {**asdict(self.memory), "total": self.memory.total},
            "micro_batch": self.micro_batch, "accumulation": self.accumulation,
            "tokens_per_second": round(self.speed.tokens_per_second, 1), "hours": round(self.hours, 4),
            "tokens_per_second_range": [round(self.speed.low, 1), round(self.speed.high, 1)],
            "speed_source": self.speed.source, "recompute": self.recompute, "precision": self.place.runtime.precision,
            "device": self.place.runtime.device.type, "device_name": self.place.name,
            "device_memory_bytes": self.place.memory_bytes, "fits": self.fits, "card_source": card.source if card else None,
            "gpus": self.place.gpus, "efficiency_range": [round(share, 3) for share in self.efficiency],
            "vocab_size": self.config.model.vocab_size, "batch_tokens": train.batch_tokens, "steps": self.steps,
            "tokens": self.tokens, "epochs": None if self.epochs is None else round(self.epochs, 3),
            "price_per_hour": self.price, "cost": None if self.cost is None else round(self.cost, 4),
        }  # fmt: skip


# ── what is planned, and where ──


def settle(config: RunConfig) -> RunConfig:
    """The settings with a vocabulary: their own, else that of the prepared data, else the one that will be learned."""
    manifest = read_manifest(config)
    known = config.model.vocab_size or (manifest.vocab_size if manifest else config.data.vocab_size)
    return config.replace(model={"vocab_size": known})


def read_manifest(config: RunConfig) -> Manifest | None:
    """What the run's data holds, where it is prepared."""
    return Manifest.load(config.data_path) if (config.data_path / MANIFEST).exists() else None


def parse_bytes(text: str) -> int:
    """Bytes from ``8G``, ``8GB`` (10^9), ``8GiB`` (2^30), ``8000M`` or plain gigabytes; UserError for anything else.

    >>> parse_bytes("8G"), parse_bytes("8GiB"), parse_bytes("0.5")
    (8000000000, 8589934592, 500000000)
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(?:([MGT])(i?)B?)?", text.strip(), re.IGNORECASE)
    size = 0.0
    if found:
        number, unit, binary = found.groups()
        power = " MGT".index((unit or "G").upper()) + 1
        size = float(number) * (1024 if binary else 1000) ** power
    if not 1e6 <= size <= 1e15:
        raise UserError(f"--vram {text} is not an amount of memory; write it like 8G, 8GiB or 7500M")
    return round(size)


def find_place(
    config: RunConfig, card: str | None = None, vram: int | None = None, gpus: int = 1
) -> tuple[RunConfig, Place]:
    """Where the run is planned for, and its settings with the memory it may take there.

    A ``card`` is one of the table. ``vram`` alone, in bytes, is a GPU with so much: this machine's, if it has one, else the
    smallest card of the table that has it. With ``train.device = cpu`` it is memory of this machine. ``gpus``: so many of them
    in one machine. UserError for what a card lacks."""
    ranks = _ranks(config, gpus)
    if vram is not None:
        if config.train.memory_gb not in (0.0, vram / 1e9):
            raise UserError(
                f"--vram and train.memory_gb = {config.train.memory_gb:g} are two amounts of memory; leave one of them out"
            )
        config = config.replace(train={"memory_gb": vram / 1e9})
    if card is None and vram is not None and config.train.device == "auto" and hardware.pick_device().type == "cpu":
        card = smallest_card(vram).name
    if card is None:
        device = hardware.pick_device(config.train.device)
        if gpus > 1 and (device.type != "cuda" or gpus > hardware.gpu_count()):
            raise UserError(
                f"--gpus {gpus}: PyTorch sees {hardware.gpu_count()} GPUs here; name the ones to plan for with --card"
            )
        runtime = Runtime(device, pick_precision(device, config.train.precision), ranks)
        memory = vram or hardware.total_memory(device)
        return config, Place(hardware.device_name(device), runtime, memory)
    chosen = find_card(card)
    if config.train.device not in ("auto", chosen.device):
        raise UserError(
            f"--card {card} and train.device = {config.train.device} are two devices; leave one of them out"
        )
    if gpus > 1 and chosen.device != "cuda":
        raise UserError(f"--gpus {gpus}: a machine with {chosen.name} has one GPU; leave it out")
    runtime = Runtime(torch.device(chosen.device), _card_precision(chosen, config.train.precision), ranks)
    return config, Place(chosen.name, runtime, vram or chosen.memory_bytes, chosen)


def _ranks(config: RunConfig, gpus: int) -> Ranks:
    """What training would be divided among; its own check of the division."""
    if gpus < 1:
        raise UserError(f"--gpus {gpus} is not a number of GPUs; give 1 or more")
    ranks = Ranks(0, gpus, 0, gpus) if gpus > 1 else ALONE
    divisible(config, ranks)
    return ranks


def _card_precision(card: Card, wish: str) -> Precision:
    if wish == "bf16" and card.precision == "fp16":
        raise UserError(f"train.precision = bf16: a {card.name} has no bf16; use train.precision=fp16 or auto")
    return card.precision if wish == "auto" else wish  # type: ignore[return-value]  # the schema has checked it


# ── the plan ──


def make_model(config: RunConfig) -> GPT:
    """The model without memory: every size can be asked for."""
    with torch.device("meta"):
        return GPT(config.model)


def plan_run(
    config: RunConfig, place: Place, speed: Speed | None = None, price: float | None = None, held: int | None = None
) -> RunPlan:
    """The plan of settings that have a vocabulary. ``speed``: of one device, measured; None: estimated. ``held``: bytes that
    the process holds before there is a model; None: what this one does now, or on a card nothing. UserError when a card, or
    the memory that was asked for, is too small, with what would do."""
    model = make_model(config)
    held = 0 if place.card else held
    try:
        fit = fit_memory(model, place.runtime, config, held=held, device_bytes=place.memory_bytes)
    except UserError as error:
        raise UserError(f"{error}{what_would_do(model, place, config, held)}") from None
    tokens = fit.micro_batch * config.model.context
    memory = step_memory(model, place.runtime, config, tokens, fit.recompute, held)
    if place.card and memory.total > place.memory_bytes:
        raise UserError(
            f"{config.name} needs about {memory.total / 1e9:.3g} GB and a {place.name} has {place.memory_bytes / 1e9:g} GB"
            f"{what_would_do(model, place, config, held)}"
        )
    alone = speed or estimate_speed(model, place, memory.activations / tokens, fit.recompute)
    accumulation = -(-config.train.batch_tokens // (tokens * place.gpus))
    speed, efficiency = together(alone, model, config, place, accumulation)
    instead = "" if memory.total <= place.memory_bytes else what_would_do(model, place, config, held)
    steps, hours = _length(config, speed.tokens_per_second)
    manifest = read_manifest(config)
    return RunPlan(
        config=config, place=place, speed=speed, parameters=model.parameters_count(),
        embedding_parameters=model.embedding_parameters(), flops_per_token=model.flops_per_token(), memory=memory,
        micro_batch=fit.micro_batch, accumulation=accumulation, recompute=fit.recompute,
        steps=steps, hours=hours, price=price, instead=instead, efficiency=efficiency,
        epochs=steps * config.train.batch_tokens / manifest.train.tokens if manifest and manifest.train.tokens else None,
    )  # fmt: skip


def _length(config: RunConfig, tokens_per_second: float) -> tuple[int, float]:
    """Steps and hours: the settings say the steps, or the minutes, or both, and then what comes first ends the run."""
    train = config.train
    per_hour = TRAINING_SHARE * 3600 * tokens_per_second / train.batch_tokens
    affordable = max(1, math.floor(per_hour * train.minutes / 60)) if train.minutes else math.inf
    if train.steps and train.steps <= affordable:
        return train.steps, train.steps / per_hour
    return int(affordable), train.minutes / 60


def what_would_do(model: GPT, place: Place, config: RunConfig, held: int | None) -> str:
    """The smallest card that could train this model, and the widest model of its kind that fits this memory, as the end
    of a sentence; empty where there is neither."""
    least = _least_bytes(model, place, config, held)
    card, parts = smallest_card(least), []
    if place.runtime.device.type == "cuda" and least <= card.memory_bytes:
        parts.append(f"a card with {card.memory_gb:g} GB ({card.name}) would do")
    if place.gpus > 1 and config.train.parallel == "ddp":
        sharded = config.replace(train={"parallel": "fsdp"})
        if _least_bytes(model, place, sharded, held) <= place.memory_bytes:
            parts.append("train.parallel=fsdp would fit")
    step = config.model.heads * (2 if config.model.positions == "rope" else 1)

    def fits(steps: int) -> bool:
        smaller = config.replace(model={"width": steps * step})
        return _least_bytes(make_model(smaller), place, smaller, held) <= place.memory_bytes

    narrow, wide = -(-8 // step), config.model.width // step
    if narrow < wide and fits(narrow):
        while wide - narrow > 1:
            middle = (narrow + wide) // 2
            narrow, wide = (middle, wide) if fits(middle) else (narrow, middle)
        parts.append(f"model.width={narrow * step} would fit")
    return f"; {', '.join(parts)}" if parts else ""


def _least_bytes(model: GPT, place: Place, config: RunConfig, held: int | None) -> int:
    """Memory of a step of one sequence at a time, recomputed if that saves any."""
    context = config.model.context
    return min(step_memory(model, place.runtime, config, context, again, held).total for again in (False, True))


# ── speed ──


def estimate_speed(model: GPT, place: Place, activation_bytes: float, recompute: bool) -> Speed:
    """Tokens per second from published or measured peaks and an assumption of what is reached (``REACHED``).

    On a card a token takes its arithmetic over the peak plus its traffic over the bandwidth (the two bounds of the
    roofline, Williams et al. 2009, one after the other). ``activation_bytes`` of a token cross memory ``PASSES`` times,
    logits four times; recomputation is a third more arithmetic. The expected figure is the geometric mean of the range."""
    cost = model.flops_per_token() * (4 / 3 if recompute else 1)
    if place.card is None:
        limit, shares = place.runtime.peak_flops() / cost, REACHED_HERE
    else:
        logits = 4 * model.config.vocab_size * place.runtime.dtype.itemsize
        traffic = PASSES * activation_bytes + logits
        limit, shares = 1 / (cost / place.card.peak_flops + traffic / place.card.bandwidth), REACHED
    low, high = (share * limit for share in shares)
    return Speed(math.sqrt(low * high), low, high, "card" if place.card else "peak")


def together(
    alone: Speed, model: GPT, config: RunConfig, place: Place, accumulation: int
) -> tuple[Speed, tuple[float, float]]:
    """Speed of all GPUs from that of one, and their efficiency: between a bad link with nothing of the exchange hidden behind
    the backward pass, and a good one with all hidden that can be. Assumptions, not measurements of ours."""
    if place.gpus == 1:
        return alone, (1.0, 1.0)
    tokens = config.train.batch_tokens / place.gpus
    exchanged = exchanged_bytes(model, config, place.gpus, accumulation)
    bad, good = place.card.link if place.card else link_of(place.name)
    behind = BACKWARD_SHARE * tokens / alone.high / accumulation
    low = efficiency(tokens / alone.low, exchanged / bad)
    high = efficiency(tokens / alone.high, exchanged / good, behind)
    slow, fast = place.gpus * low * alone.low, place.gpus * high * alone.high
    return Speed(math.sqrt(slow * fast), slow, fast, alone.source), (min(low, high), max(low, high))


BACKWARD_SHARE = 2 / 3
"""Of a step's arithmetic; only that of the last micro-batch can hide the exchange."""


def exchanged_bytes(model: GPT, config: RunConfig, gpus: int, accumulation: int) -> float:
    """What goes through each GPU in a step. DDP: float32 gradients, in a ring (reduced and gathered; measured with gloo by
    benchmarks/ranks.py). FSDP: weights gathered for both passes of each micro-batch, gradients reduced. Muon's updates are
    gathered in bfloat16."""
    parameters = model.parameters_count()
    of_muon = sum(muon_entries(model).values()) if config.optim.kind == "muon" else 0
    numbers = 4 * parameters * (2 * accumulation + 1 if config.train.parallel == "fsdp" else 2)
    return (gpus - 1) / gpus * (numbers + 2 * of_muon)


def efficiency(arithmetic: float, exchange: float, hidden_behind: float = 0.0) -> float:
    """Of ranks whose step takes so many seconds of arithmetic and of exchange, some of which passes behind arithmetic.

    >>> efficiency(3.0, 1.0), efficiency(3.0, 1.0, 2.0)
    (0.75, 1.0)
    """
    return arithmetic / (arithmetic + max(0.0, exchange - hidden_behind))


def can_be_measured(plan: RunPlan) -> bool:
    """Whether a few steps can be taken on this machine at no harm to it: they leave a good part of its memory free, and a
    micro-batch takes seconds."""
    if plan.place.card is not None:
        return False
    tokens = plan.micro_batch * plan.config.model.context
    seconds = plan.flops_per_token * tokens / (REACHED_HERE[0] * plan.place.runtime.peak_flops())
    free = 0.6 * hardware.total_memory(plan.place.runtime.device)
    return plan.memory.total <= free and seconds <= MEASURED_MICRO_BATCH_SECONDS
