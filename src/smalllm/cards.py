"""What makers publish about cards that a run may be planned for: memory, bandwidth, arithmetic. Nothing here was measured by
this project. In November 2026 most figures were found again on public pages of others and agreed, but for the bandwidth of the
T4, which some have as 320 GB/s. Not found again: the arithmetic of RTX 3060, H100 and H200, the bandwidths of L4 and M1.

Peaks are those of dense matrix products in 16-bit inputs with sums in float32, without sparsity; of Apple's, which train
in float32 here, those of float32. Where a maker prints only float32, the peak of a GeForce is twice that: the ratio in
both whitepapers (a GeForce RTX 3080: 29.8 and 59.5; a 4090: 82.6 and 165.2 TFLOP/s).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smalllm.config import UserError

AMPERE = "NVIDIA Ampere GA102 GPU architecture whitepaper, 2021, and the card's page at nvidia.com/geforce"
ADA = "NVIDIA Ada GPU architecture whitepaper, 2022, and the card's page at nvidia.com/geforce"
APPLE = "Apple's announcement of the chip, apple.com/newsroom"

PCIE = (5e9, 20e9)
"""Assumed, without peer-to-peer; users report 28 to 35 GB/s for the RTX 5090 (github.com/NVIDIA/nccl/issues/1639)."""
NVLINK_3 = (200e9, 230e9)
"""NCCL's own test on eight A100: about 200 (github.com/NVIDIA/nccl-tests/issues/149); the upper end is assumed."""
NVLINK_4 = (300e9, 475e9)
"""NCCL's own test on eight H200: 475 at best (github.com/NVIDIA/nccl-tests/issues/272); the lower end is assumed."""


@dataclass(frozen=True)
class Card:
    """``memory_gb`` in 10^9 bytes is what may be planned with: a maker's GB are GiB, and the difference is what the driver
    takes. ``bandwidth`` in bytes/s, ``peak_flops`` in FLOP/s."""

    name: str
    memory_gb: float
    bandwidth: float
    peak_flops: float
    source: str
    device: Literal["cuda", "mps"] = "cuda"
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    link: tuple[float, float] = PCIE
    """Bytes a second that an all-reduce moves through each of eight in one machine, from bad to good."""

    @property
    def memory_bytes(self) -> int:
        return round(self.memory_gb * 1e9)


def _nvidia(
    name: str, memory_gb: float, gigabytes: float, teraflops: float, source: str, link: tuple[float, float] = PCIE
) -> Card:
    return Card(name, memory_gb, gigabytes * 1e9, teraflops * 1e12, source, link=link)


def _apple(name: str, memory_gb: float, gigabytes: float, teraflops: float) -> Card:
    return Card(name, memory_gb, gigabytes * 1e9, teraflops * 1e12, APPLE, "mps", "fp32")


CARDS = (
    _nvidia("RTX 3050", 8, 224, 18.2, AMPERE),
    _nvidia("RTX 3060", 12, 360, 25.5, AMPERE),
    _nvidia("RTX 4070", 12, 504, 58.3, ADA),
    _nvidia("RTX 4090", 24, 1008, 165.2, ADA),
    Card("T4", 16, 300e9, 65e12, "NVIDIA T4 product brief and datasheet, 2019 (no bfloat16)", precision="fp16"),
    _nvidia("L4", 24, 300, 121, "NVIDIA L4 datasheet, 2023 (it prints 242 TFLOP/s with sparsity)"),
    _nvidia("A100 40GB", 40, 1555, 312, "NVIDIA A100 datasheet, 2021 (40 GB)", NVLINK_3),
    _nvidia("A100", 80, 2039, 312, "NVIDIA A100 datasheet, 2021 (80 GB, SXM)", NVLINK_3),
    _nvidia(
        "H100", 80, 3350, 989, "NVIDIA H100 datasheet, 2023 (SXM; it prints 1,979 TFLOP/s with sparsity)", NVLINK_4
    ),
    _nvidia(
        "H200", 141, 4800, 989, "NVIDIA H200 datasheet, 2024 (SXM; it prints 1,979 TFLOP/s with sparsity)", NVLINK_4
    ),
    _apple("M1", 16, 68, 2.6),
    _apple("M1 Max", 64, 400, 10.4),
    _apple("M2", 24, 100, 3.6),
    _apple("M2 Max", 96, 400, 13.6),
    _apple("M2 Ultra", 192, 800, 27.2),
)
"""Of Apple's chips the largest memory that they are sold with; later ones have no published arithmetic."""


def find_card(name: str) -> Card:
    """The card of this name; capitals, spaces and hyphens do not matter. UserError that lists those known.

    >>> find_card("rtx4090").memory_gb
    24
    """
    by_name = {_plain(card.name): card for card in CARDS}
    found = by_name.get(_plain(name)) or by_name.get(f"rtx{_plain(name)}")
    if found is None:
        raise UserError(f"--card {name} is not in the table; the cards are {', '.join(card.name for card in CARDS)}")
    return found


def link_of(device_name: str) -> tuple[float, float]:
    """What joins several devices of this name; PCIe unless they are known to have better.

    >>> link_of("NVIDIA H200") == NVLINK_4, link_of("NVIDIA GeForce RTX 4090") == PCIE
    (True, True)
    """
    return next((card.link for card in CARDS if _plain(card.name) in _plain(device_name)), PCIE)


def smallest_card(memory_bytes: float) -> Card:
    """The NVIDIA card with the least memory that has so much, of equals the slowest; the largest when none has."""
    nvidia = sorted(
        (card for card in CARDS if card.device == "cuda"), key=lambda card: (card.memory_gb, card.peak_flops)
    )
    return next((card for card in nvidia if card.memory_bytes >= memory_bytes), nvidia[-1])


def _plain(name: str) -> str:
    return "".join(name.lower().split()).replace("-", "").replace("_", "")
