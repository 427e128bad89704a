"""Sides that were scored on the same documents, and what can be said about them, as figures and as sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smalllm.config import UserError
from smalllm.judging.comparison import SMALLEST, Comparison, against_first
from smalllm.judging.sides import Documents, Score, Side, bits_of


@dataclass(frozen=True)
class Contest:
    """Scores of each side, and every other side compared with the first."""

    sides: tuple[Side, ...]
    scores: tuple[tuple[Score, ...], ...]  # by side
    comparisons: tuple[Comparison, ...]
    documents: Documents
    smallest: float

    def level(self, side: int) -> float:
        """Bits per byte of a side: the mean over its runs."""
        return float(np.mean([score.evaluation.bits_per_byte for score in self.scores[side]]))

    def figures(self) -> dict[str, Any]:
        """The object of ``smalllm compare --json``: the second side against the first, and all of them."""
        entries = [self._entry(number) for number in range(len(self.comparisons))]
        everyone = self.scores[0][0].evaluation
        return {
            **entries[0], "comparisons": entries, "runs": self._runs(), "documents": everyone.documents, "bytes": everyone.bytes,
            "text": self.documents.origin, "smallest": self.smallest, "notes": self.notes(),
        }  # fmt: skip

    def _entry(self, number: int) -> dict[str, Any]:
        found = self.comparisons[number]
        return {
            "difference": found.difference, "interval": list(found.interval), "verdict": found.verdict,
            "relative": found.relative, "strict_interval": list(found.strict_interval), "about": found.about,
            "sides": [self.sides[0].name, self.sides[number + 1].name],
            "bits_per_byte": [self.level(0), self.level(number + 1)], "seeds": list(found.seeds),
            "error_of_documents": found.error_of_documents, "error_of_seeds": found.error_of_seeds,
            "sought": found.sought, "seeds_needed": found.seeds_needed, "documents_needed": found.documents_needed,
        }  # fmt: skip

    def _runs(self) -> list[dict[str, Any]]:
        return [
            {
                "run": score.entrant.name, "side": side.name, "seed": score.entrant.seed, "step": score.step,
                "parameters": score.parameters, "bits_per_byte": score.evaluation.bits_per_byte,
                "bits_per_byte_interval": list(score.evaluation.bits_per_byte_interval),
            }
            for side, scores in zip(self.sides, self.scores, strict=True)
            for score in scores
        ]  # fmt: skip

    def notes(self) -> list[str]:
        """What a reader must know before believing the figures."""
        notes = list(self.documents.notes)
        every = [member for side in self.sides for member in side.entrants]
        if len({(member.settings, member.data) for member in every}) == 1:
            notes.append("all runs have the same settings: what differs is the seed, the steps or the machine")
        for side in self.sides:
            if len({(member.settings, member.data) for member in side.entrants}) > 1:
                notes.append(f"the runs of {side.name} differ in more than their seed")
        if len(self.comparisons) > 1:
            notes.append(
                f"the intervals are so wide that all {len(self.comparisons)} of them hold together (Bonferroni)"
            )
        return notes

    def sentences(self, number: int) -> tuple[str, str]:
        """What was found about a comparison, and what it means."""
        found, first, second = self.comparisons[number], self.sides[0].name, self.sides[number + 1].name
        low, high = found.interval
        return (
            f"{second} needs {abs(found.difference):.4f} bits per byte {'less' if found.difference < 0 else 'more'} than"
            f" {first} ({100 * found.relative:+.2f} %), 95 % interval {low:+.4f} to {high:+.4f}",
            _meaning(found, self.smallest),
        )


def hold(
    sides: Sequence[Side], scores: Sequence[Sequence[Score]], documents: Documents, smallest: float = SMALLEST
) -> Contest:
    """Compare scored sides; UserError when two runs of one side are one model."""
    sizes = scores[0][0].evaluation.document_bytes
    for side, mine in zip(sides, scores, strict=True):
        bits = bits_of(mine)
        for row in range(1, len(bits)):
            if any(np.array_equal(bits[row], bits[before]) for before in range(row)):
                raise UserError(
                    f"two runs of {side.name} score exactly alike: they are copies, not seeds; name one of them"
                )
    found = against_first([bits_of(mine) for mine in scores], sizes, smallest)
    return Contest(tuple(sides), tuple(map(tuple, scores)), tuple(found), documents, smallest)


def _meaning(found: Comparison, smallest: float) -> str:
    if found.real and found.about == "models":
        return (
            "Real, as to these two models: other documents of the kind would show it too. Whether the settings or the luck of"
            " a seed made it, one seed of each cannot tell; train two or three with other seeds and name them as well."
        )
    if found.real:
        return f"Real, as to the settings: neither other documents nor other seeds ({_seeds(found)}) explain it."
    if found.verdict != "not distinguishable":
        return (
            f"It may be luck. To find a difference of {found.sought:.4f} in four of five tries each side needs"
            f" {found.seeds_needed} seeds; here are {_seeds(found)}."
        )
    low, high = found.strict_interval
    if max(-low, high) < found.smallest:
        return f"Not distinguishable, and if there is a difference it is below {100 * smallest:g} %."
    wanted = found.documents_needed
    more = (
        f" {wanted:,} documents would be enough to find one of {found.sought:.4f}."
        if wanted and wanted > found.documents
        else ""
    )
    return f"Not distinguishable: luck alone makes such a difference often enough.{more}"


def _seeds(found: Comparison) -> str:
    return f"{found.seeds[0]} and {found.seeds[1]}"
