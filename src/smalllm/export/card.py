"""The model card: what a model is, learned from, scores and cannot do. Facts, and the Markdown page that tells them.

Names and settings come from files and may hold anything: in the YAML front matter every text is a JSON string, which
YAML reads as the same text, and in the page it is code or quoted, so that it stays text (RELIABILITY F9).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Card:
    """Facts about a model. What is not known is None or empty, and not told."""

    name: str
    author: str = ""
    licence: str = "unknown"  # an identifier of the Hugging Face hub
    data: str = ""  # what the model was trained on, in words
    recipe: str = ""  # config.toml
    steps: int = 0
    tokens: int = 0
    parameters: int = 0
    bits_per_byte: float | None = None
    bits_per_byte_interval: tuple[float, float] | None = None
    evaluated_on: str = ""
    stories: tuple[str, ...] = ()
    curve: bytes = field(default=b"", repr=False)  # a PNG
