"""The pieces of a vocabulary, out of SentencePiece's bytes and back."""

from __future__ import annotations

import pytest
import sentencepiece
from export_runs import tokenizer
from hypothesis import given
from hypothesis import strategies as st

from smalllm.config import UserError
from smalllm.conversation import CONTROL
from smalllm.export.pieces import Kind, Piece, formable, model_of, pieces_of
from smalllm.tokenizer import Tokenizer


@pytest.mark.parametrize("control", [(), CONTROL])
def test_pieces_are_those_that_sentencepiece_reads(control):
    model = tokenizer(control).model_bytes
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    found = pieces_of(model)
    assert [piece.text for piece in found] == [theirs.id_to_piece(id) for id in range(theirs.vocab_size())]
    assert [piece.score for piece in found] == [theirs.get_score(id) for id in range(theirs.vocab_size())]
    for id, piece in enumerate(found):
        assert (piece.kind is Kind.CONTROL) == theirs.is_control(id)
        assert (piece.kind is Kind.BYTE) == theirs.is_byte(id)
        assert (piece.kind is Kind.UNKNOWN) == theirs.is_unknown(id)
    assert pieces_of(model_of(found)) == found


@given(text=st.text(st.sampled_from("the cat saw a  dog.\n\0</s>\u2581é日🙂0123"), max_size=60))
def test_a_model_made_of_pieces_encodes_like_the_one_they_came_from(text):
    own = tokenizer(CONTROL)
    assert _remade().encode(text) == own.encode(text)


def _remade() -> Tokenizer:
    return Tokenizer(model_of(pieces_of(tokenizer(CONTROL).model_bytes)))


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_in_a_sentence_or_hold_no_pieces(data):
    model = tokenizer().model_bytes
    for damaged in (data, model[: len(model) - 1 - len(data)], data + model):
        try:
            pieces_of(damaged)
        except UserError as error:
            assert "is not a SentencePiece model" in str(error)


@pytest.mark.parametrize(
    "data", [b"\n\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\xff" * 20, b"\n", b"\x0b", b"\n\x02\n\x09"]
)
def test_sizes_beyond_the_bytes_are_refused(data):
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        pieces_of(data)


def test_only_what_merging_reaches_is_formable():
    assert formable(["ab", "abcd", "abc", "xyz", "c"]) == {"ab", "abc", "abcd"}
    assert formable([Piece("</s>", 0, Kind.CONTROL).text, "<", "/s>"]) == set()  # "/s>" itself cannot be built
