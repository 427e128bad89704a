"""What is known of runs: everything that a page about them tells, as data. Knows nothing about how it is told."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalllm.checkpoint import RunFolder, open_run
from smalllm.config import RunConfig, UserError, setting_names
from smalllm.evaluation import storyworld_floor
from smalllm.judging.contest import Contest, hold
from smalllm.judging.scorecard import STORY_SAMPLING, score_run, tell
from smalllm.judging.sides import (
    Documents,
    Entrant,
    Score,
    Side,
    entrant,
    environment,
    form_sides,
    score,
    shared_documents,
)
from smalllm.metrics import Record, read_records

DOCUMENTS = 500
STORIES = 20
SAMPLES = 8


@dataclass(frozen=True)
class Story:
    """A sample that was told while the run was trained."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class RunFacts:
    """What a run's own files say, and how it did. ``settings`` are values as in TOML, by their name; ``side`` is the
    place of its side in the comparison, or its own place."""

    entrant: Entrant
    side: int
    settings: Mapping[str, str]
    usual: Mapping[str, str]
    environment: Mapping[str, str]
    records: Sequence[Record]
    samples: Sequence[Story]
    score: Score | None
    stories: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.entrant.name

    def last(self, key: str) -> float | None:
        """The last value that was logged."""
        found = [record[key] for record in self.records if isinstance(record.get(key), int | float)]
        return float(found[-1]) if found else None

    def command(self) -> str:
        """What trains it once more."""
        settings = shlex.quote(str(self.entrant.folder.config_file))
        again = shlex.quote(f"{self.entrant.folder.path}-again")
        return f"smalllm train {settings} --out {again}"


@dataclass(frozen=True)
class Dossier:
    """Several runs. ``contest`` is None for one run, and where they cannot be compared, which ``notes`` tell."""

    runs: tuple[RunFacts, ...]
    sides: tuple[str, ...]
    contest: Contest | None
    documents: Documents | None
    floor: float | None
    notes: tuple[str, ...]

    def differing(self) -> set[str]:
        """Names of settings that are not the same in all runs."""
        return {name for name in self.runs[0].settings if len({run.settings[name] for run in self.runs}) > 1}


def gather(
    targets: Sequence[str], *, text: str | None = None, limit: int = DOCUMENTS, stories: int = STORIES, device: str = "cpu",
    say: Callable[[str], None] = lambda message: None,
) -> Dossier:  # fmt: skip
    """Read the runs, score them on the same documents, let each tell stories, and compare them. What cannot be scored
    (the data is gone) is told in ``notes`` and the rest is there. UserError for a run that cannot be read."""
    sides, notes = _sides(targets)
    documents, why = _documents(sides, text, limit)
    scores, stories_of = [], {}
    for side in sides:
        mine = []
        for member in side.entrants:
            say(f"measuring {member.name}")
            mine += [score(member, documents.texts, device=device)] if documents else []
            stories_of[member.place] = _stories(member, stories, device)
        scores.append(mine)
    contest, unfair = _contest(sides, scores, documents)
    by_place = {one.entrant.place: one for mine in scores for one in mine}
    runs = tuple(
        _facts(member, number, by_place.get(member.place), stories_of[member.place])
        for number, side in enumerate(sides) for member in side.entrants
    )  # fmt: skip
    floor = storyworld_floor(documents.texts) if documents else None
    told = contest.notes() if contest else list(documents.notes if documents else ())
    return Dossier(runs, tuple(side.name for side in sides), contest, documents, floor, (*notes, *why, *unfair, *told))


def _sides(targets: Sequence[str]) -> tuple[list[Side], list[str]]:
    """Sides; every run its own where the runs cannot be put on two."""
    members = [entrant(target) for target in targets]
    if len(members) < 2:
        return [Side(member.name, (member,)) for member in members], []
    try:
        return form_sides(targets), []
    except UserError as error:
        return [Side("all runs", tuple(members))], [f"not compared: {error}"]


def _documents(sides: Sequence[Side], text: str | None, limit: int) -> tuple[Documents | None, list[str]]:
    try:
        return shared_documents(sides, text, limit), []
    except UserError as error:
        if text is not None:
            raise
        return None, [f"not scored: {error}"]


def _contest(
    sides: Sequence[Side], scores: Sequence[Sequence[Score]], documents: Documents | None
) -> tuple[Contest | None, list[str]]:
    """The comparison, or why there is none."""
    if documents is None or len(sides) < 2:
        return None, []
    try:
        return hold(sides, scores, documents), []
    except UserError as error:
        return None, [f"not compared: {error}"]


def _stories(member: Entrant, count: int, device: str) -> Mapping[str, Any]:
    """The scorecard of so many stories; nothing without stories."""
    if not count:
        return {}
    run = open_run(member.target, device=device)
    return score_run(run, tell(run, count, STORY_SAMPLING))


def _facts(member: Entrant, side: int, scored: Score | None, stories: Mapping[str, Any]) -> RunFacts:
    folder = member.folder
    return RunFacts(
        entrant=member, side=side, settings=_settings(folder.config()), usual=_settings(RunConfig()),
        environment={name: _told(value) for name, value in environment(folder).items()},
        records=list(read_records(folder.metrics_file)), samples=read_samples(folder), score=scored, stories=stories,
    )  # fmt: skip


def _settings(config: RunConfig) -> dict[str, str]:
    """Every setting by its name; one that is not set is empty."""
    values = config.model_dump(mode="json")
    found = {}
    for name in setting_names():
        section, _, key = name.rpartition(".")
        value = values[section][key] if section else values[key]
        found[name] = "" if value is None else _told(value)
    return found


def _told(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def read_samples(folder: RunFolder) -> list[Story]:
    """The samples of a run, oldest first; lines that hold something else are passed over."""
    return [
        Story(record["step"], record["prompt"], record["text"])
        for record in read_records(folder.samples_file)
        if isinstance(record.get("prompt"), str) and isinstance(record.get("text"), str)
    ]


def spread(stories: Sequence[Story], most: int = SAMPLES) -> list[Story]:
    """At most so many, the first and the last among them, the others evenly between.

    >>> [story.step for story in spread([Story(step, "", "") for step in range(10)], 4)]
    [0, 3, 6, 9]
    """
    if len(stories) <= most:
        return list(stories)
    return [stories[round(place * (len(stories) - 1) / (most - 1))] for place in range(most)]


def default_out(targets: Sequence[str]) -> Path:
    """report.html in the folder of the first run."""
    return entrant(targets[0]).folder.path / "report.html"
