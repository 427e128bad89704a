"""The pieces of a vocabulary: out of the bytes of a SentencePiece model, and into such bytes.

Other programs keep a vocabulary as a list of pieces with scores and kinds. The numbers of the fields are those of
sentencepiece_model.proto (github.com/google/sentencepiece). Reading never trusts a length.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from smalllm.config import UserError
from smalllm.tokenizer import BOS, BPE, EOS, UNK, protobuf_fields


class Kind(IntEnum):
    """What a piece is. SentencePiece and GGUF use the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """A piece as SentencePiece spells it, a space as U+2581, a byte as <0x0A>. Of two merges the one with the greater
    score comes first."""

    text: str
    score: float
    kind: Kind


def pieces_of(model: bytes) -> list[Piece]:
    """The pieces of a serialized SentencePiece model by id; UserError for other bytes.

    >>> pieces_of(model_of([Piece("<unk>", 0.0, Kind.UNKNOWN), Piece("▁a", -1.0, Kind.NORMAL)]))[1].text
    '▁a'
    """
    try:
        return [_piece(value) for number, value in protobuf_fields(model) if number == 1 and isinstance(value, bytes)]
    except (ValueError, IndexError, struct.error):
        raise UserError("the tokenizer is not a SentencePiece model; train one with `smalllm prepare`") from None


def model_of(pieces: Iterable[Piece]) -> bytes:
    """A SentencePiece BPE model with these pieces that changes no text: no normalization, no space put before it, bytes
    for what has no piece; unknown, begin and end are the first three ids. `Tokenizer` reads it, and checks it."""
    pieces = list(pieces)
    listed = [_text(1, piece.text) + _float(2, piece.score) + _number(3, piece.kind) for piece in pieces]
    ids = _number(40, UNK) + _number(41, BOS) + _number(42, EOS) + _number(43, -1)
    names = b"".join(_text(45 + id, piece.text) for id, piece in enumerate(pieces[: EOS + 1]))  # which it looks for
    trainer = _number(3, BPE) + _number(4, len(listed)) + _number(35, 1) + ids + names
    normalizer = _text(1, "identity") + _number(3, 0) + _number(4, 0) + _number(5, 1)
    return b"".join([*(_bytes(1, piece) for piece in listed), _bytes(2, trainer), _bytes(3, normalizer)])


def formable(texts: Sequence[str]) -> set[str]:
    """Those of the texts of pieces that merging can build up: from two characters on, each step a piece.

    >>> sorted(formable(["</s>", "</", "s>", "a", "abc"]))
    ['</', '</s>', 's>']
    """
    known, found = set(texts), set[str]()
    for text in sorted((text for text in known if len(text) > 1), key=len):
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        if any(all(len(half) == 1 or half in found for half in pair) for pair in halves):
            found.add(text)
    return found


def puts_space_first(model: bytes) -> bool:
    """Whether SentencePiece puts a space before every text with this model, as it does unless it is told not to. SmallLM
    never puts one there: what was trained so wants prompts that begin with a space.

    >>> puts_space_first(model_of([])), puts_space_first(b"")
    (False, True)
    """
    try:
        normalizer = b"".join(
            value for number, value in protobuf_fields(model) if number == 3 and isinstance(value, bytes)
        )
        return dict(protobuf_fields(normalizer)).get(3, 1) != 0
    except (ValueError, IndexError):
        return False


# ── reading ──


def _piece(message: bytes) -> Piece:
    text, score, kind = "", 0.0, Kind.NORMAL
    for number, value in protobuf_fields(message):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = Kind(value)
    return Piece(text, score, kind)


# ── writing ──


def _number(field: int, value: int) -> bytes:
    return _encoded(field << 3) + _encoded(value & (1 << 64) - 1)


def _float(field: int, value: float) -> bytes:
    return _encoded(field << 3 | 5) + struct.pack("<f", value)


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _bytes(field: int, value: bytes) -> bytes:
    return _encoded(field << 3 | 2) + _encoded(len(value)) + value


def _encoded(value: int) -> bytes:
    """A number as seven bits a byte, the lowest first."""
    found = bytearray()
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
