"""Our vocabulary as the files of a fast tokenizer of transformers, which gives the ids that ours gives.

Two things make the ids equal for every text. Pieces are spelled with real spaces and nothing is normalized, so that a
U+2581 in a text is just a character without a piece, in bytes, as ours writes it. And the special tokens are not listed
among the added ones: transformers adds them itself, and ``split_special_tokens`` keeps it from finding them in a text, so
that "</s>" in a text stays text.

A vocabulary with turn markers is the exception. Transformers renders a conversation into one text and finds the markers
there, so they must be found in texts, those of users too. The chat template breaks up what looks like a marker in a
message; for other texts give ``split_special_tokens=True`` to the tokenizer, which then agrees with ours.
"""

from __future__ import annotations

import json
from typing import Any

from smalllm.conversation import CHAT_TEMPLATE, CONTROL, has_turns
from smalllm.export.pieces import Kind, Piece, pieces_of
from smalllm.tokenizer import BOS, EOS, SPACE_MARK, UNK, Tokenizer

Json = dict[str, Any]


def files(tokenizer: Tokenizer, context: int) -> dict[str, bytes]:
    """Every file of the tokenizer by its name."""
    found = {
        "tokenizer.model": tokenizer.model_bytes,
        "tokenizer.json": _json(tokenizer_json(tokenizer)),
        "tokenizer_config.json": _json(_config(tokenizer, context)),
        "special_tokens_map.json": _json(_special(tokenizer)),
    }
    if has_turns(tokenizer):
        found["chat_template.jinja"] = chat_template(tokenizer).encode()
    return found


def tokenizer_json(tokenizer: Tokenizer) -> Json:
    """The `tokenizers` library's description: a BPE with byte fallback whose merges are all pairs of pieces that are one."""
    pieces = pieces_of(tokenizer.model_bytes)
    begin = pieces[BOS].text
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(pieces) if has_turns(tokenizer) else [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": begin, "type_id": 0}}]
            + [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
            "special_tokens": {begin: {"id": begin, "ids": [BOS], "tokens": [begin]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[UNK].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {_spelled(piece): id for id, piece in enumerate(pieces)},
            "merges": merges(pieces),
        },
    }


def merges(pieces: list[Piece]) -> list[list[str]]:
    """All pairs of pieces that make a third one, by the third one's score, the greatest first, as SentencePiece joins them.

    >>> a, b, ab = Piece("a", -9, Kind.NORMAL), Piece("b", -9, Kind.NORMAL), Piece("ab", 0, Kind.NORMAL)
    >>> merges([a, b, ab])
    [['a', 'b']]
    """
    scores = {_spelled(piece): piece.score for piece in pieces if piece.kind is Kind.NORMAL}
    longer = sorted((text for text in scores if len(text) > 1), key=lambda text: -scores[text])
    halves = ([text[:cut], text[cut:]] for text in longer for cut in range(1, len(text)))
    return [pair for pair in halves if pair[0] in scores and pair[1] in scores]


def chat_template(tokenizer: Tokenizer) -> str:
    """`conversation.CHAT_TEMPLATE`; what looks like a special token in a message gets a space inside, so that nobody can
    speak in another's name."""
    special = [tokenizer.piece(id) for id in (UNK, BOS, EOS)] + list(CONTROL)
    guarded = "".join(f" | replace('{text}', '{text[0]} {text[1:]}')" for text in special)
    return CHAT_TEMPLATE.replace("message['content']", f"message['content']{guarded}")


def _config(tokenizer: Tokenizer, context: int) -> Json:
    return _special(tokenizer) | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "split_special_tokens": not has_turns(tokenizer),
    }


def _special(tokenizer: Tokenizer) -> Json:
    names = {"unk_token": UNK, "bos_token": BOS, "eos_token": EOS, "pad_token": UNK}
    return {name: tokenizer.piece(id) for name, id in names.items()}


def _added(pieces: list[Piece]) -> list[Json]:
    """The unknown and the control pieces, to be found in texts."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = (Kind.UNKNOWN, Kind.CONTROL)
    return [{"id": id, "content": piece.text, **flags} for id, piece in enumerate(pieces) if piece.kind in special]


def _spelled(piece: Piece) -> str:
    return piece.text.replace(SPACE_MARK, " ") if piece.kind is Kind.NORMAL else piece.text


def _json(value: Json) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
