"""Who is compared with whom, and on which documents: runs that differ by their seed stand on one side, and everybody
scores the same documents, of which nobody has learned any. Knows nothing of statistics; that is `comparison`."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smalllm.checkpoint import RunFolder, find_run, open_run
from smalllm.config import UserError
from smalllm.data.shards import TokenDataset
from smalllm.data.sources import documents as read_documents
from smalllm.evaluation import Evaluation, bits_per_byte

SAME_FOR_ALL = ("name", "seed")
"""What may differ between runs of one side, besides where the data lies."""
SEARCHED_TOKENS = 100_000_000  # of training data that is looked through for the scored documents; more takes minutes
MOST_SEEN = 0.01
"""Share of the documents that a run may have learned from; so few are left out, more is an error."""


@dataclass(frozen=True)
class Entrant:
    """A run, or one checkpoint of it (``step``), as it was named on the command line."""

    target: str
    folder: RunFolder
    step: str | None
    name: str
    seed: int
    settings: str  # JSON of all that decides what is learned, the seed left out
    data: str  # fingerprint of the data, or its folder

    @property
    def place(self) -> tuple[Path, str | None]:
        return self.folder.path.resolve(), self.step


@dataclass(frozen=True)
class Side:
    """Runs of the same settings. ``name`` is the name of its run, or what the names of its runs begin with."""

    name: str
    entrants: tuple[Entrant, ...]


@dataclass(frozen=True)
class Documents:
    """Texts that no entrant learned from as far as can be told, and what should be said about them."""

    texts: list[str]
    origin: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """How an entrant did on the documents."""

    entrant: Entrant
    step: int
    parameters: int
    evaluation: Evaluation


# ── who ──


def entrant(target: str) -> Entrant:
    """Read what a run is; nothing is loaded."""
    folder, step = find_run(target)
    config = folder.config()
    settings = config.model_dump(mode="json", exclude={*SAME_FOR_ALL})
    settings["data"].pop("path")
    fingerprint = environment(folder).get("data_fingerprint")
    data = fingerprint if isinstance(fingerprint, str) else str(folder.data())
    name = folder.path.resolve().name
    return Entrant(
        target, folder, step, f"{name} step {int(step)}" if step else name, config.seed,
        json.dumps(settings, sort_keys=True), data,
    )  # fmt: skip


def environment(folder: RunFolder) -> dict[str, Any]:
    """What environment.json says; nothing where there is none."""
    try:
        found = json.loads(folder.environment_file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def form_sides(targets: Sequence[str], against: Sequence[str] = ()) -> list[Side]:
    """Two sides or more. With ``against``: the first runs against these. Else two runs are two sides, and of more
    those are on one side that differ in nothing but seed and name, in the order in which they were named.

    UserError when there are no two sides, or when runs of one side are no two seeds.
    """
    if against:
        sides = [[entrant(target) for target in part] for part in (targets, against)]
    elif len(targets) == 2:
        sides = [[entrant(target)] for target in targets]
    else:
        sides = _by_settings([entrant(target) for target in targets])
    if len(sides) < 2 or not all(sides):
        raise UserError(_no_sides(targets))
    for members in sides:
        _check_seeds(members)
    return [Side(name, tuple(members)) for name, members in zip(_names(sides), sides, strict=True)]


def _by_settings(entrants: Sequence[Entrant]) -> list[list[Entrant]]:
    found: dict[tuple[str, str], list[Entrant]] = {}
    for member in entrants:
        found.setdefault((member.settings, member.data), []).append(member)
    return list(found.values())


def _no_sides(targets: Sequence[str]) -> str:
    if len(targets) < 2:
        return f"{len(targets)} run is nothing to compare; name two or more: smalllm compare RUN RUN"
    return (
        f"these {len(targets)} runs have the same settings and data, so they are one side; say which are compared:"
        " smalllm compare RUN RUN --against RUN RUN"
    )


def _check_seeds(members: Sequence[Entrant]) -> None:
    for one, other in itertools.combinations(members, 2):
        if one.place == other.place:
            raise UserError(f"{one.target} is named twice on one side; name each run once")
        if (one.settings, one.data, one.seed) == (other.settings, other.data, other.seed):
            raise UserError(
                f"{one.target} and {other.target} have the same settings and the same seed {one.seed}, so they are no two"
                " seeds of one side; train one with another seed, or compare them alone"
            )


def _names(sides: Sequence[Sequence[Entrant]]) -> list[str]:
    """Names that tell the sides apart, else those of all runs."""
    names = [_shared_name([member.name for member in members]) for members in sides]
    if len(set(names)) < len(names) or not all(names):
        return [" + ".join(member.name for member in members) for members in sides]
    return names


def _shared_name(names: Sequence[str]) -> str:
    """
    >>> _shared_name(["big-1", "big-2"]), _shared_name(["big-1"])
    ('big', 'big-1')
    """
    shared = "".join(
        one[0] for one in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    )
    return names[0] if len(names) == 1 else shared.rstrip("-_. ").removesuffix("seed").rstrip("-_. ")


# ── on which documents ──


def shared_documents(sides: Sequence[Side], text: str | None = None, limit: int | None = None) -> Documents:
    """The documents of a source, by default the validation documents of the first run. Those in the training data of an
    entrant are left out; UserError when they are many."""
    entrants = [member for side in sides for member in side.entrants]
    if text is not None:
        texts, origin = list(read_documents(text, limit=limit)), text
    else:
        texts, origin = first_validation(entrants[0], limit), f"validation documents of {entrants[0].name}"
    seen: set[int] = set()
    notes: list[str] = []
    own = None if text is not None else _dataset(entrants[0])
    for members in _by_data(entrants):
        found, note = _learned(members[0], texts, own)
        notes += [note] if note else []
        if len(found) > MOST_SEEN * len(texts):
            raise UserError(
                f"{members[0].target} was trained on {len(found):,} of the {len(texts):,} documents ({origin}), so it would"
                " not be a fair comparison; give documents that no run has seen with --text FILE"
            )
        seen |= found
    if seen:
        notes.append(f"{len(seen):,} documents were left out because a run was trained on them")
    return Documents([one for place, one in enumerate(texts) if place not in seen], origin, tuple(notes))


def first_validation(member: Entrant, limit: int | None) -> list[str]:
    """The validation documents of a run's data; UserError that says what to do where they are gone."""
    try:
        dataset = TokenDataset.open(member.folder.data(), verify=False)
        tokenizer = dataset.tokenizer()
        return [tokenizer.decode(ids.tolist()) for ids in itertools.islice(dataset.valid.iterate_documents(), limit)]
    except UserError as error:
        raise UserError(
            f"the validation documents of {member.target} cannot be read ({error}); give others with --text FILE"
        ) from None


def _by_data(entrants: Sequence[Entrant]) -> Iterator[list[Entrant]]:
    """Entrants that learned from the same data, together."""
    found: dict[str, list[Entrant]] = {}
    for member in entrants:
        found.setdefault(member.data, []).append(member)
    yield from found.values()


def _dataset(member: Entrant) -> TokenDataset | None:
    """The data that a run was trained on, if it is still there and still the same."""
    try:
        dataset = TokenDataset.open(member.folder.data(), verify=False)
    except UserError:
        return None
    known = environment(member.folder).get("data_fingerprint")
    return dataset if known in (None, dataset.fingerprint) else None


def _learned(member: Entrant, texts: Sequence[str], own: TokenDataset | None) -> tuple[set[int], str]:
    """Places of the texts that the run was trained on, and a note where that cannot be told. ``own`` is the data of
    which the texts are the validation documents: what holds the same ones keeps them out of training
    (`data.prepare`)."""
    dataset = _dataset(member)
    if dataset is None:
        return (
            set(),
            f"the data of {member.name} is gone, so it cannot be told whether it was trained on these documents",
        )
    mine, theirs = dataset.manifest.valid.text_sha256, own.manifest.valid.text_sha256 if own else None
    if mine is not None and mine == theirs:
        return set(), ""
    if dataset.train.tokens > SEARCHED_TOKENS:
        return set(), f"the data of {member.name} is too large to look for these documents in it"
    return _found(dataset, texts), ""


def _found(dataset: TokenDataset, texts: Sequence[str]) -> set[int]:
    """Places of texts that are training documents, compared by their ids."""
    tokenizer = dataset.tokenizer()
    places: dict[bytes, list[int]] = {}
    for place, text in enumerate(texts):
        ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]).astype(dataset.train.dtype)
        places.setdefault(ids.tobytes(), []).append(place)
    found: set[int] = set()
    for document in dataset.train.iterate_documents():
        found.update(places.get(document.tobytes(), ()))
    return found


# ── how well ──


def score(member: Entrant, texts: Sequence[str], checkpoint: str = "best", device: str = "cpu") -> Score:
    """Score documents by a run, with its own tokenizer; UserError when its weights are broken."""
    run = open_run(member.target, checkpoint, device)
    evaluation = bits_per_byte(run.model, run.tokenizer, texts)
    if not math.isfinite(evaluation.loss):
        raise UserError(
            f"the loss of {run.checkpoint.path} is {evaluation.loss}; its weights are broken, use another one"
        )
    return Score(member, run.step, run.model.parameters_count(), evaluation)


def bits_of(scores: Sequence[Score]) -> np.ndarray:
    """Bits [runs, documents] of the runs of one side."""
    return np.stack([one.evaluation.document_bits for one in scores])
