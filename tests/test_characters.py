"""Who is named, and whether names and pronouns stay: stories written by hand, right ones and wrong ones."""

from __future__ import annotations

import pytest

from smalllm.data import storyworld
from smalllm.judging.characters import changed_pronoun, evidence, lost_name, names, without_speech

GOOD = [
    # the genuine kinds of trouble: somebody else of the other gender, a name that comes late, nicknames, speech
    "Once there was a girl named Mia. Mia saw a boy. He was sad. Mia gave him a cake. He smiled.",
    "Tom and Sue played. Tom laughed. She laughed too.",
    'There was a boy named Ben. Ben saw Lily. "She is nice," Ben said. He ran to her.',
    "There was a boy named Tim. Tim ran after her. She was fast.",
    "Mia ran home. Her dog was there. He barked.\nMia was happy. She hugged the dog.",
    "There was a bird named Blue. Blue sang. She was happy. Then Blue met Red. Red was sad. He wanted to sing too. Blue sang with Red.",
    "One day, a girl named Amy went out. In the park she met Tom. Amy and Tom played. Tom went home. Amy waved to Tom.",
    "There was a cat named Moss. Then a girl named Zoe came. Zoe smiled. The cat came to Zoe.",
    "There was a girl named Mia. Mia ran home. There she saw Zoe.",
    "Mom called Tom. He came. Mom smiled. She was glad.",
]
LOST = [
    ("There was a girl named Mia. Mia ran. Then Zoe fell down. The tree saw Zoe cry.", ("Mia", "Zoe")),
    ("Once there was a boy called Tim. Tim had a red ball. At night Tom lost the ball. Mom saw Tom and smiled.", ("Tim", "Tom")),
]  # fmt: skip
CHANGED = [
    "Once there was a girl named Mia. Mia went out. He saw a tree.",
    "In a house far away Tom lived.\nTom ran home. He was tired.\nTom slept. She dreamed.",
    "There was a boy called Ben. Ben was glad because she had a ball.",
    "A little girl named Sue had a kite. Sue laughed.\nSue's mom came. Sue was proud that he could fly it.",
]


@pytest.mark.parametrize("story", GOOD)
def test_good_stories_keep_everything(story: str):
    assert lost_name(story) is None
    assert changed_pronoun(story) is None


@pytest.mark.parametrize(("story", "switched"), LOST)
def test_a_name_that_is_replaced_is_found(story: str, switched: tuple[str, str]):
    assert lost_name(story) == switched


@pytest.mark.parametrize("story", CHANGED)
def test_a_pronoun_that_changes_is_found(story: str):
    assert changed_pronoun(story) is not None


def test_names_are_not_days_relatives_or_words_at_the_beginning():
    text = 'Today Mom and Zed met Blue on Monday. The sky was blue. Ann slept. "Hey Bob," said Zed to a cat called Fay.'
    assert names(text) == {"Zed", "Fay"}


def test_speech_is_left_out_in_all_its_quotes():
    assert without_speech('a "b c" d “e” f «g» h').split() == ["a", "d", "f", "h"]
    assert without_speech('a "b\nc d').split() == ["a", "c", "d"]  # one that is never closed ends with its paragraph


def test_evidence_of_a_noun_is_that_of_the_nearest_one():
    assert list(evidence("The queen met a little boy named Tim.")) == [("Tim", "he")]
    assert list(evidence("There was a girl whose dog had a name. Nobody was named Zed.")) == []


def test_broken_texts_are_no_error():
    for text in (
        "",
        " ",
        "\n\n",
        '"',
        "... !",
        "He",
        "named",
        "named Tim",
        "Tim " * 200,
        "'s Tim's 's",
        "\x00 He She\n.",
    ):
        assert names(text) is not None
        assert lost_name(text) is None and changed_pronoun(text) is None


def test_the_story_world_keeps_its_people():
    """Its stories are right by construction; 3 of 1,000 may be alarms."""
    told = list(storyworld.stories(seed=5, count=1000))
    assert sum(lost_name(story) is not None or changed_pronoun(story) is not None for story in told) <= 3
