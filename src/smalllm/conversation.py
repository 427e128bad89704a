"""Messages and how a model reads them: the only place where turn markers exist.

A model with turns was trained on a vocabulary whose control pieces mark who speaks; text can never produce them, so that
nobody can speak in another's name. A model without them continues a story: it reads what was said as one text. The
module knows nothing of HTTP, prompts on a terminal or training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from smalllm.config import UserError
from smalllm.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]

MARKERS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
END = "<|end|>"
CONTROL = (*MARKERS.values(), END)
"""The control pieces of a tokenizer with turns: ``Tokenizer.train(texts, vocab_size, control=CONTROL)``."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""What `render` and `answer_prompt` do, in Jinja, for programs that read exported models."""


@dataclass(frozen=True)
class Message:
    """What one side said."""

    role: Role
    content: str


def has_turns(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary marks who speaks."""
    return all(tokenizer.control_id(piece) is not None for piece in CONTROL)


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The id that ends a turn; none without turns, where a text ends at the end of text."""
    return [_marker(END, tokenizer)] if has_turns(tokenizer) else []


def role_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that say who speaks, which a model must not choose itself; none without turns."""
    return [id for piece in MARKERS.values() if (id := tokenizer.control_id(piece)) is not None]


def render(messages: Iterable[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, from the begin of a document on, and a loss mask of the same length: true where the
    assistant speaks, the end of its turn included. UserError for a tokenizer without turns.

    >>> tokenizer = Tokenizer.train(["say hi\\n"] * 9, 270, control=CONTROL)
    >>> ids, mask = render([Message("user", "hi"), Message("assistant", "say")], tokenizer)
    >>> [tokenizer.piece(id) for id, told in zip(ids, mask) if told][-1]
    '<|end|>'
    """
    ids, mask = [tokenizer.bos_id], [False]
    for message in messages:
        content = tokenizer.encode(message.content)
        told = message.role == "assistant"
        ids += [_marker(MARKERS[message.role], tokenizer), *content, _marker(END, tokenizer)]
        mask += [False, *[told] * (len(content) + 1)]
    return ids, mask


def answer_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """The ids after which a model answers: with turns the conversation and the assistant's marker, without them the
    story so far."""
    if not has_turns(tokenizer):
        return [tokenizer.bos_id, *tokenizer.encode(story_so_far(messages))]
    return [*render(messages, tokenizer)[0], _marker(MARKERS["assistant"], tokenizer)]


def story_so_far(messages: Iterable[Message]) -> str:
    """What was said as one text, with a space between messages where neither side has white space.

    >>> story_so_far([Message("user", "One day"), Message("assistant", " it rained."), Message("user", "Then")])
    'One day it rained. Then'
    """
    text = ""
    for message in messages:
        between = text and message.content and not (text[-1].isspace() or message.content[0].isspace())
        text += (" " if between else "") + message.content
    return text


def _marker(piece: str, tokenizer: Tokenizer) -> int:
    id = tokenizer.control_id(piece)
    if id is None:
        raise UserError(f"the tokenizer has no turn marker {piece}; train one with control=conversation.CONTROL")
    return id
