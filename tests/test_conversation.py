"""Conversations: markers that no text can forge, the loss mask, and models without turns."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalllm.config import UserError
from smalllm.conversation import (
    CONTROL,
    END,
    MARKERS,
    Message,
    answer_prompt,
    has_turns,
    render,
    role_ids,
    stop_ids,
    story_so_far,
)
from smalllm.tokenizer import BOS, EOS, UNK, Tokenizer

TEXTS = ["the cat sat on the mat and said hello\n"] * 9
TURNS = Tokenizer.train(TEXTS, 290, control=CONTROL)
PLAIN = Tokenizer.train(TEXTS, 290)
ROLES = st.sampled_from(["system", "user", "assistant"])
MESSAGES = st.lists(st.builds(Message, ROLES, st.text(max_size=20) | st.sampled_from(CONTROL)), max_size=5)


def marker(piece: str) -> int:
    id = TURNS.control_id(piece)
    assert id is not None
    return id


def test_markers_are_control_pieces_after_the_special_ones():
    assert [TURNS.piece(id) for id in (UNK, BOS, EOS)] == ["<unk>", "<s>", "</s>"]
    assert sorted(map(marker, CONTROL)) == [3, 4, 5, 6]
    assert has_turns(TURNS) and stop_ids(TURNS) == [marker(END)]
    assert sorted(role_ids(TURNS)) == sorted(marker(piece) for piece in MARKERS.values())


def test_a_plain_tokenizer_has_no_turns():
    assert not has_turns(PLAIN) and stop_ids(PLAIN) == [] and role_ids(PLAIN) == []
    with pytest.raises(UserError, match=r"no turn marker <\|user\|>"):
        render([Message("user", "hi")], PLAIN)


def test_the_same_texts_with_and_without_markers_are_the_same_bytes_for_a_plain_tokenizer():
    assert Tokenizer.train(TEXTS, 290, control=()).fingerprint == PLAIN.fingerprint


def test_control_pieces_need_room():
    with pytest.raises(UserError, match="choose from 264"):
        Tokenizer.train(TEXTS, 262, control=CONTROL)


@pytest.mark.parametrize("text", [*CONTROL, "<|user|>hi<|end|>", "<s></s><unk>", "\u2581<|end|>"])
def test_text_never_becomes_a_marker(text):
    ids = TURNS.encode(text)
    assert not {UNK, BOS, EOS, *map(marker, CONTROL)} & set(ids)
    assert TURNS.decode(ids) == text


def test_a_conversation_worked_by_hand():
    ids, mask = render([Message("user", "cat"), Message("assistant", "mat")], TURNS)
    cat, mat = TURNS.encode("cat"), TURNS.encode("mat")
    user, assistant, end = marker("<|user|>"), marker("<|assistant|>"), marker(END)
    assert ids == [BOS, user, *cat, end, assistant, *mat, end]
    assert mask == [False] * (4 + len(cat)) + [True] * (len(mat) + 1)


@settings(max_examples=100, deadline=None)
@given(MESSAGES)
def test_a_conversation_keeps_its_words_and_its_turns(messages):
    try:
        "".join(message.content for message in messages).encode()
    except UnicodeEncodeError:
        return
    ids, mask = render(messages, TURNS)
    assert TURNS.decode(ids) == "".join(message.content for message in messages)
    assert len(ids) == len(mask) and ids.count(marker(END)) == len(messages)
    told = TURNS.decode([id for id, learned in zip(ids, mask, strict=True) if learned])
    assert told == "".join(message.content for message in messages if message.role == "assistant")
    assert answer_prompt(messages, TURNS) == [*ids, marker("<|assistant|>")]


@pytest.mark.parametrize(
    ("contents", "story"),
    [
        (["One day", "it rained."], "One day it rained."),
        (["One day ", "it rained."], "One day it rained."),
        (["One day", "\nit rained."], "One day\nit rained."),
        (["", "One", "", "two"], "One two"),
        ([], ""),
    ],
)
def test_without_turns_a_conversation_is_a_story(contents, story):
    messages = [Message("user", content) for content in contents]
    assert story_so_far(messages) == story
    assert answer_prompt(messages, PLAIN) == [BOS, *PLAIN.encode(story)]


def test_fewest_ids_is_a_bound():
    for text in ("", "the cat sat on the mat", "é" * 50, "xyz" * 40):
        assert PLAIN.fewest_ids(text) <= len(PLAIN.encode(text))
    assert PLAIN.fewest_ids("x" * 1_000_000) > 10_000
