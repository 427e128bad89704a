"""The Python API: the verbs as functions, and a trained model that completes text.

model = smalllm.load("runs/quickstart")
print(model.complete("Once upon a time", max_tokens=120, seed=1))
for piece in model.stream("One day"):
    print(piece, end="")
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from smalllm.checkpoint import LoadedRun, open_run
from smalllm.config import UserError, load_recipe
from smalllm.decoder import Weights
from smalllm.evaluation import evaluate_run
from smalllm.generation import Completion, Generator, SamplingParams
from smalllm.judging.scorecard import STORY_SAMPLING, score_run, tell
from smalllm.training.state import Summary
from smalllm.training.trainer import train as train_run


class Options(TypedDict, total=False):
    """How text is told: the fields of generation.SamplingParams."""

    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    no_repeat_ngram: int
    stop: str | Sequence[str]
    seed: int | None
    logit_bias: Mapping[int, float]


class StoryTeller:
    """A trained model with its tokenizer. Every method continues text and returns the continuation, decoded exactly.

    The options of all of them, with their defaults: ``max_tokens=200``, ``temperature=0.8`` (0: always the most likely token),
    ``top_k=None``, ``top_p=None``, ``min_p=None``, ``repetition_penalty=1.0``, ``no_repeat_ngram=0``, ``stop=()``,
    ``seed=None`` (the same seed tells the same text), ``logit_bias={}``. UserError for values out of range.
    """

    def __init__(self, run: LoadedRun, weights: Weights = "auto") -> None:
        self.run = run
        self.generator = Generator(run.model, run.tokenizer, weights)

    @property
    def step(self) -> int:
        """Training steps of the checkpoint."""
        return self.run.step

    def complete(self, prompt: str = "Once upon a time", **options: Unpack[Options]) -> str:
        """Text that continues the prompt."""
        return self.generator.complete(prompt, _params(options)).text

    def stream(self, prompt: str = "Once upon a time", **options: Unpack[Options]) -> Iterator[str]:
        """The same in pieces of whole characters, as they are decided."""
        for chunk in self.generator.stream(prompt, _params(options)):
            yield chunk.text

    def batch(self, prompts: Sequence[str], **options: Unpack[Options]) -> list[str]:
        """A continuation for each prompt, decoded together; a text does not depend on its neighbours."""
        return [done.text for done in self.generator.batch(prompts, _params(options))]

    def story(self, about: str = "", tries: int = 4, **options: Unpack[Options]) -> str:
        """A whole story, with its beginning, of at most ``max_tokens=300``.

        ``about`` is a theme such as "a brave rabbit named Tilly". The first sentence names it, and of ``tries`` stories, told
        together, the one is returned that comes to an end and comes back to the theme's words most often."""
        if tries < 1:
            raise UserError(f"tries = {tries} is not possible; use 1 or more")
        theme = about.strip().rstrip(".")
        opening = f"Once upon a time, there was {theme}." if theme else "Once upon a time"
        told = self.generator.batch([opening] * (tries if theme else 1), _params({"max_tokens": 300, **options}))
        words = set(_words(theme)) - _SMALL_WORDS
        return opening + max(told, key=lambda story: _faithfulness(story, words)).text


_SMALL_WORDS = {
    "a", "an", "and", "at", "by", "called", "for", "from", "in", "is", "little", "named", "of", "on", "or", "the", "to", "was",
    "were", "who", "with",
}  # fmt: skip


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def _faithfulness(story: Completion, theme: set[str]) -> tuple[bool, int, int]:
    """Does it end, how many of the theme's words come back, and how often."""
    said = [word for word in _words(story.text) if word in theme]
    return story.finish_reason == "stop", len(set(said)), len(said)


def _params(options: Mapping[str, Any]) -> SamplingParams:
    known = {field.name for field in dataclasses.fields(SamplingParams)} - {"logprobs"}
    for name in options:
        if name not in known:
            raise UserError(f"there is no option {name!r}; the options are {', '.join(sorted(known))}")
    return SamplingParams(**options)


def load(
    run: str | Path | None = None, checkpoint: str = "best", device: str = "cpu", weights: Weights = "auto"
) -> StoryTeller:
    """The model of a run folder (None: the newest run); ``checkpoint`` is best, latest or a step, ``weights`` as in
    decoder.make_decoder: auto, fp32, bf16 or int8."""
    return StoryTeller(open_run(run, checkpoint, device), weights)


def train(
    recipe: str | Path = "quickstart",
    overrides: Iterable[str] = (),
    *,
    out: str | Path | None = None,
    fresh: bool = False,
) -> Summary:
    """Train a recipe with ``section.key=value`` overrides, or continue its run; returns how it went."""
    return train_run(load_recipe(recipe, overrides), Path(out) if out else None, fresh=fresh)


def evaluate(
    run: str | Path | None = None, text: str | None = None, checkpoint: str = "best", stories: int = 0
) -> dict[str, Any]:
    """What ``smalllm evaluate --json`` prints. ``text`` is a source of documents such as a file; left out, the validation
    documents of the run's data."""
    loaded = open_run(run, checkpoint)
    result = evaluate_run(loaded, text=text)
    if stories:
        of_storyworld = "floor_bits_per_byte" in result
        result["stories"] = score_run(loaded, tell(loaded, stories, STORY_SAMPLING), of_storyworld=of_storyworld)
    return result
