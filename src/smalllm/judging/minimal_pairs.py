"""Minimal pairs: two texts that differ in what is right. A model knows the rule when the right one is more probable to it.

After BLiMP (A. Warstadt et al. 2020, arXiv 1912.00582), in the words of small stories and of three kinds: does the verb
agree with its subject, also across a noun of the other number; does the pronoun fit the person; does the end of a story
follow from its beginning. Pairs come in couples: what is right in one is wrong in the other, so that no liking for a word
or for short texts helps, and a model that does not look back is right in exactly half of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from smalllm.evaluation import bits_per_byte
from smalllm.judging.scorecard import share_interval
from smalllm.model import GPT
from smalllm.tokenizer import Tokenizer

PAIRS_OF_A_KIND = 200

ANIMALS = ("cat", "dog", "bird", "frog", "duck", "bear", "rabbit", "pig", "cow", "monkey")
PLACES = ("tree", "house", "river", "box", "garden", "road", "hill", "door")
GIRLS = ("Lily", "Sara", "Anna", "Mia", "Lucy", "Emma")
BOYS = ("Tom", "Tim", "Ben", "Max", "Sam", "Jack")
ADJECTIVES = ("happy", "sad", "small", "big", "hungry", "tired", "kind", "funny")
TOYS = ("ball", "doll", "car", "boat", "kite", "book", "hat", "cup")
CAME = ("a big dog came", "it began to rain", "the sun came out", "a bird sang")
DID = ("went to the park", "played in the garden", "sat under a tree", "found a red ball", "walked to the shop")
FELT = (
    ("was happy", "smiled"),
    ("was sad", "began to cry"),
    ("was tired", "went to sleep"),
    ("was hungry", "ate some bread"),
)


@dataclass(frozen=True)
class Pair:
    """A text that is right and one that is wrong."""

    kind: str
    right: str
    wrong: str


Couple = tuple[tuple[str, str], tuple[str, str]]
"""Two pairs (right, wrong) that mirror each other."""

# ── the pairs ──


def pairs(count: int = PAIRS_OF_A_KIND, seed: int = 0) -> list[Pair]:
    """So many pairs of each kind, an even number, no pair twice; the same seed gives the same ones."""
    return [pair for kind in KINDS for pair in _pairs_of(kind, count, random.Random(f"{seed} {kind}"))]


def _pairs_of(kind: str, count: int, chance: random.Random) -> list[Pair]:
    found: dict[Pair, None] = {}
    for _ in range(100 * count):
        if len(found) >= count:
            break
        couple = [Pair(kind, right, wrong) for right, wrong in KINDS[kind](chance)]
        if not found.keys() & couple:
            found |= dict.fromkeys(couple)
    assert len(found) == count, f"there are no {count} different pairs of the kind {kind}"
    return list(found)


def _agreement(chance: random.Random) -> Couple:
    """The dogs near the tree were happy, the dog near the tree was happy."""
    animal, place, adjective = chance.choice(ANIMALS), chance.choice(PLACES), chance.choice(ADJECTIVES)
    between = chance.choice(("", f" near the {place}", f" near the {place}s"))
    is_, are = chance.choice((("was", "were"), ("is", "are"), ("has always been", "have always been")))
    one, many = f"The {animal}{between}", f"The {animal}s{between}"
    end = f"very {adjective}."
    return (f"{one} {is_} {end}", f"{one} {are} {end}"), (f"{many} {are} {end}", f"{many} {is_} {end}")


def _pronoun(chance: random.Random) -> Couple:
    """Lily was a happy girl. Then a bird sang, and she sat under a tree; Tom ... and he sat under a tree."""
    adjective, came, did, felt = (chance.choice(words) for words in (ADJECTIVES, CAME, DID, ADJECTIVES))
    told = chance.choice((
        f"Once upon a time, there was a {adjective} {{noun}} named {{name}}. One day, {{pronoun}} {did}.",
        f"{{name}} was a {adjective} {{noun}}. Then {came}, and {{pronoun}} {did}.",
        f"There was a {{noun}} called {{name}}. {{name}} {did}. Then {came}. Soon {{pronoun}} was {felt}.",
    ))  # fmt: skip
    girl, boy = {"noun": "girl", "name": chance.choice(GIRLS)}, {"noun": "boy", "name": chance.choice(BOYS)}
    return (
        (told.format(**girl, pronoun="she"), told.format(**girl, pronoun="he")),
        (told.format(**boy, pronoun="he"), told.format(**boy, pronoun="she")),
    )


def _ending(chance: random.Random) -> Couple:
    """Of things: Tom had a ball and Mia had a kite ... Tom was glad to have the ball, Mia the kite. Of feelings: Tom was sad. So
    he began to cry; Tom was tired. So he went to sleep."""
    one, other = chance.choice(GIRLS), chance.choice(BOYS)
    did, came = chance.choice(DID), chance.choice(CAME)
    if chance.random() < 0.5:
        (felt, acted), (felt_too, acted_too) = chance.sample(FELT, 2)
        told = f"{one} and {other} {did}. Then {came}. {other} {{}}. So he {{}}."
        return (
            (told.format(felt, acted), told.format(felt, acted_too)),
            (told.format(felt_too, acted_too), told.format(felt_too, acted)),
        )
    toy, another = chance.sample(TOYS, 2)
    told = f"{one} had a {toy} and {other} had a {another}. They {did}. Then {came}. {{}} was glad to have the {{}}."
    return (
        (told.format(one, toy), told.format(one, another)),
        (told.format(other, another), told.format(other, toy)),
    )


KINDS: dict[str, Callable[[random.Random], Couple]] = {
    "agreement": _agreement,
    "pronoun": _pronoun,
    "ending": _ending,
}

# ── judging ──


def score_pairs(model: GPT, tokenizer: Tokenizer, asked: Sequence[Pair]) -> dict[str, Any]:
    """For each kind, and for all: accuracy, Wilson's 95 % interval, count. Right is the pair whose right text is the more
    probable one as a whole document, its end included; equal ones count half."""
    texts = [text for pair in asked for text in (pair.right, pair.wrong)]
    bits = bits_per_byte(model, tokenizer, texts).document_bits.reshape(-1, 2)
    points = [1.0 if right < wrong else 0.5 if right == wrong else 0.0 for right, wrong in bits]
    kinds = list(dict.fromkeys(pair.kind for pair in asked))
    result = {
        kind: _accuracy([point for pair, point in zip(asked, points, strict=True) if pair.kind == kind])
        for kind in kinds
    }
    return {**result, "all": _accuracy(points)}


def _accuracy(points: Sequence[float]) -> dict[str, Any]:
    accuracy = sum(points) / len(points)
    return {"accuracy": accuracy, "interval": share_interval(accuracy, len(points)), "count": len(points)}
