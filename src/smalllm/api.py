"""The Python API: the verbs as functions, and a trained model that completes text.

model = smalllm.load("runs/quickstart")
print(model.complete("Once upon a time", max_tokens=120, seed=1))
for piece in model.stream("One day"):
    print(piece, end="")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from smalllm.checkpoint import LoadedRun, open_run
from smalllm.config import load_recipe
from smalllm.evaluation import evaluate_run
from smalllm.generation import Generator, SamplingParams
from smalllm.training.trainer import Summary
from smalllm.training.trainer import train as train_run


class StoryTeller:
    """A trained model with its tokenizer. Every method continues text and returns the continuation, decoded exactly."""

    def __init__(self, run: LoadedRun) -> None:
        self.run = run
        self.generator = Generator(run.model, run.tokenizer)

    @property
    def step(self) -> int:
        """Training steps of the checkpoint."""
        return self.run.step

    def complete(
        self, prompt: str = "Once upon a time", max_tokens: int = 200, temperature: float = 0.8, **options: object
    ) -> str:
        """Text that continues the prompt. ``options`` are the fields of SamplingParams: top_k, top_p, min_p,
        repetition_penalty, no_repeat_ngram, stop, seed. UserError for values out of range."""
        return self.generator.complete(prompt, _params(max_tokens, temperature, options)).text

    def stream(
        self, prompt: str = "Once upon a time", max_tokens: int = 200, temperature: float = 0.8, **options: object
    ) -> Iterator[str]:
        """The same in pieces of whole characters, as they are decided."""
        for chunk in self.generator.stream(prompt, _params(max_tokens, temperature, options)):
            yield chunk.text

    def batch(
        self, prompts: Sequence[str], max_tokens: int = 200, temperature: float = 0.8, **options: object
    ) -> list[str]:
        """A continuation for each prompt, decoded together; a text does not depend on its neighbours."""
        return [done.text for done in self.generator.batch(prompts, _params(max_tokens, temperature, options))]

    def story(self, about: str = "", max_tokens: int = 300, temperature: float = 0.8, **options: object) -> str:
        """A whole story, with its beginning. ``about`` is a theme ("a brave rabbit") that the first sentence names."""
        opening = f"Once upon a time, there was {about.strip().rstrip('.')}." if about.strip() else "Once upon a time"
        return opening + self.complete(opening, max_tokens, temperature, **options)


def _params(max_tokens: int, temperature: float, options: dict[str, object]) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, **options)  # type: ignore[arg-type]


def load(run: str | Path | None = None, checkpoint: str = "best", device: str = "cpu") -> StoryTeller:
    """The model of a run folder (None: the newest run); ``checkpoint`` is best, latest or a step."""
    return StoryTeller(open_run(run, checkpoint, device))


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
    return evaluate_run(open_run(run, checkpoint), text=text, stories=stories)
