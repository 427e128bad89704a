"""The model card: what a model is, what it learned from, how well it does, what it cannot do. Facts, and their page.

Names and settings come from files and may hold anything. In the YAML front matter every text is quoted with its unusual
characters escaped, and in the page it stands in code, so that it stays the text that it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from smalllm.checkpoint import LoadedRun
from smalllm.config import RunConfig, UserError
from smalllm.evaluation import evaluate_run
from smalllm.generation import Generator, SamplingParams

UNKNOWN_LICENCE = "unknown"  # an identifier of the hub
MEASURED_DOCUMENTS = 100
STORIES = 2
STORY = SamplingParams(max_tokens=200, temperature=0.8, seed=0)
CURVE = "curve.png"


@dataclass(frozen=True)
class Card:
    """Facts about a model. What is not known is None or empty, and not told."""

    name: str
    author: str = ""
    licence: str = UNKNOWN_LICENCE
    data: str = ""  # the source of the text that the model learned from
    recipe: str = ""  # config.toml
    steps: int = 0
    tokens: int = 0
    parameters: int = 0
    context: int = 0
    bits_per_byte: float | None = None
    bits_per_byte_interval: tuple[float, float] | None = None
    evaluated_documents: int = 0
    stories: tuple[str, ...] = ()
    curve: bytes = field(default=b"", repr=False)  # a PNG


def card_of(run: LoadedRun, author: str = "", licence: str = UNKNOWN_LICENCE) -> Card:
    """What the run's own files say, without computing anything."""
    config, curve = run.folder.config(), run.folder.path / CURVE
    training = run.checkpoint.state().get("training", {})
    return Card(
        name=config.name,
        author=author,
        licence=licence,
        data=config.data.source or config.data.path,
        recipe=_shared_settings(config),
        steps=run.step,
        tokens=int(training.get("tokens", 0)),
        parameters=run.model.parameters_count(),
        context=run.model.config.context,
        curve=curve.read_bytes() if curve.is_file() else b"",
    )


def measured(card: Card, run: LoadedRun, text: str | None = None) -> Card:
    """The card with bits per byte, on a file or on the run's first validation documents, and with stories. What the data
    is gone for stays untold."""
    stories = Generator(run.model, run.tokenizer).batch([""] * STORIES, STORY)
    card = replace(card, stories=tuple(story.text.strip() for story in stories))
    try:
        figures = evaluate_run(run, text=text, limit=MEASURED_DOCUMENTS)
    except UserError:
        if text is not None:
            raise
        return card
    return replace(
        card,
        bits_per_byte=figures["bits_per_byte"],
        bits_per_byte_interval=figures["bits_per_byte_interval"],
        evaluated_documents=figures["documents"],
    )


def page(card: Card, architecture: str) -> str:
    """README.md of a model folder, with the front matter that the hub reads (huggingface.co/docs/hub/model-cards)."""
    parts = [_front_matter(card, architecture), f"# {_code(card.name)}", _summary(card, architecture), _usage()]
    if card.stories:
        parts += ["## What it writes", *map(_fenced, card.stories)]
    parts += ["## How well it does", *_quality(card), "## How it was trained", *_training(card), _limits(card)]
    return "\n\n".join(parts) + "\n"


# ── the page ──


def _front_matter(card: Card, architecture: str) -> str:
    tags = "".join(f"\n- {yaml_text(tag)}" for tag in ("smalllm", architecture))
    return (
        f"---\nlicense: {yaml_text(card.licence)}\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        f"model_name: {yaml_text(card.name)}\ntags:{tags}\n---"
    )


def _summary(card: Card, architecture: str) -> str:
    by = f" by {_code(card.author)}" if card.author else ""
    return (
        f"A small language model{by}, trained from scratch with SmallLM: {card.parameters:,} parameters,"
        f" architecture {architecture}, a context of {card.context} tokens. Licence: {_code(card.licence)}."
    )


def _usage() -> str:
    code = (
        "from transformers import pipeline\n\n"
        'tell = pipeline("text-generation", model=".")  # this folder, or its name on the hub\n'
        'print(tell("Once upon a time", max_new_tokens=200, do_sample=True)[0]["generated_text"])'
    )
    return _fenced(code, "python")


def _quality(card: Card) -> list[str]:
    if card.bits_per_byte is None or card.bits_per_byte_interval is None:
        told = "It was not measured: its validation text was not at hand."
    else:
        low, high = card.bits_per_byte_interval
        told = (
            f"**{card.bits_per_byte:.4f} bits per byte** (95 % interval {low:.4f} to {high:.4f}) on"
            f" {card.evaluated_documents} documents. Bits per byte does not depend on"
            " the tokenizer; less is better."
        )
    proof = "`certificate.json` says how closely this export agrees with the model that was trained."
    return [told, *([f"![Loss and learning rate over the steps]({CURVE})"] if card.curve else []), proof]


def _training(card: Card) -> list[str]:
    data = f" on {_code(card.data)}" if card.data else ""
    told = f"{card.steps:,} steps, {card.tokens:,} tokens{data}." if card.steps else f"Not trained here{data}."
    return [told, "The recipe:", _fenced(card.recipe, "toml")]


def _limits(card: Card) -> str:
    return (
        "## Limitations\n\n"
        "It knows nothing but what its training text shows: it states falsehoods fluently, follows no instructions"
        " unless it was trained to, and repeats the biases of its text. It was not made safe for any use that matters."
        f" It reads at most {card.context} tokens at once."
    )


# ── text that stays text ──


def yaml_text(text: str) -> str:
    """A double-quoted YAML scalar: any text, also one of line breaks, colons and control characters.

    >>> yaml_text('a: "b"\\n---')
    '"a: \\\\U00000022b\\\\U00000022\\\\U0000000A---"'
    """
    safe = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08X}" for c in text)
    return f'"{"".join(safe)}"'


def _code(text: str) -> str:
    """A code span: one line, in more backticks than the text has side by side (CommonMark 6.1)."""
    line = "".join(c if c.isprintable() else " " for c in text)
    ticks = "`" * (_longest_run(line) + 1)
    return f"{ticks} {line} {ticks}" if "`" in line else f"`{line}`"


def _fenced(text: str, language: str = "text") -> str:
    """A code block whose fence the text cannot close."""
    safe = "".join(c for c in text if c in "\n\t" or c.isprintable())
    fence = "`" * max(3, _longest_run(safe) + 1)
    return f"{fence}{language}\n{safe.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _shared_settings(config: RunConfig) -> str:
    """config.toml without the folder of the data, which says where someone's files lie."""
    return config.replace(data={"path": ""}).to_toml()
