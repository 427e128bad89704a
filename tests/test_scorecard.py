"""The scorecard: figures worked by hand, intervals that cover what they should, and a model that has learned by heart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_settings
from hypothesis import given
from hypothesis import strategies as st
from test_generation import save_run

from smalllm.checkpoint import open_run
from smalllm.config import UserError
from smalllm.data import storyworld
from smalllm.data.prepare import prepare
from smalllm.data.shards import TokenDataset
from smalllm.generation import Completion, SamplingParams
from smalllm.judging.novelty import Copy
from smalllm.judging.scorecard import (
    Story,
    distinct,
    length_distance,
    longest_repeat,
    prompt_followed,
    quotes_balanced,
    read_prompts,
    score_run,
    scorecard,
    share_interval,
    tell,
)
from smalllm.training.trainer import train

# ── one story ──


@pytest.mark.parametrize(
    ("text", "words"),
    [("", 0), ("one", 0), ("one two", 0), ("a b a", 1), ("a b c a b d", 2), ("a a a a a", 4), ("a b a b a", 3)],
)
def test_longest_repeat_by_hand(text: str, words: int):
    assert longest_repeat(text.split()) == words


@given(st.lists(st.sampled_from("abc"), max_size=25))
def test_longest_repeat_is_that_of_looking_everywhere(words: list[str]):
    spans = [
        n for n in range(1, len(words)) for i in range(len(words) - n + 1) for j in range(i) if words[i : i + n] == words[j : j + n]
    ]  # fmt: skip
    assert longest_repeat(words) == max(spans, default=0)


@pytest.mark.parametrize(
    ("text", "balanced"),
    [
        ('"Hi," said Tom. "Bye."', True), ('"Hi, said Tom.', False), ("", True), ("It's Tom's.", True),
        ('He said, "First.\n"Second," and left.', True), ('He said, "First.\nSecond," and left.', False),
        ("“Hi.” «Ho.»", True), ("“Hi.", False), ("«Ho.", False), ('"A"\n\n"B"', True),
    ],
)  # fmt: skip
def test_quotes(text: str, balanced: bool):
    assert quotes_balanced(text) is balanced


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("The end.", True), ("The end", False), ('"Bye!"', True), ("“Bye?”\n", True), ("Well…", True), ("so he (ran.)", True),
        ("", False), ("and then,", False),
    ],
)  # fmt: skip
def test_sentences_are_finished(text: str, finished: bool):
    assert Story(text).measures().sentences_finished is finished


def test_prompts_are_followed_by_their_content_words():
    asked = "Write a story about a brave rabbit and two kites."
    assert prompt_followed(asked, "The rabbit was brave. He had kites, two of them.") == 1.0
    assert prompt_followed(asked, "The rabbits ran.") == pytest.approx(1 / 4)
    assert prompt_followed(asked, "") == 0.0
    assert prompt_followed("Once upon a time", "a fox") is None
    story = Story.told(Completion("A brave fox", " ran away.", 3, "stop", 0.1))
    assert story.measures().prompt_followed == 0.0 and story.text == "A brave fox ran away."


def test_measures_by_hand():
    story = Story("The cat sat. The cat sat down! The", ended=False)
    measured = story.measures(Copy(51, 9, "some text"))
    assert (measured.mean_words, measured.longest_repeat, measured.looping) == (8, 3, False)
    assert (measured.ended, measured.sentences_finished, measured.repeated_4grams) == (False, False, 0.0)
    assert (measured.copied_tokens, measured.copied_words, measured.copied_over_50) == (51, 9, True)
    assert story.measures(Copy(50, 9, "")).copied_over_50 is False
    assert story.measures().copied_over_50 is None
    loop = "and then he ran to the very old tree by the river in the wood again " * 2
    assert Story(loop).measures().looping


def test_invented_words_are_not_known() -> None:
    known = {"the", "cat", "sat", "once"}
    assert Story("Once the cat glimbled.").measures(known=known).known_words == 0.75
    assert (
        Story("Xyzzy the cat", prompt="Xyzzy").measures(known=known).known_words == 1.0
    )  # the prompt is not the model's
    assert Story("...").measures(known=known).known_words is None and Story("The cat.").measures().known_words is None
    card = scorecard([Story("The cat glimbled."), Story("The cat.")], data=[Story("Once a cat sat.")], known=known)
    assert card["known_words"] == pytest.approx(5 / 6) and card["data"]["known_words"] == 0.75
    low, high = card["intervals"]["known_words"]
    assert low <= 5 / 6 <= high


# ── many stories ──


def test_scorecard_by_hand() -> None:
    stories = [
        Story.told(Completion("", "One two three four. One two three four!", 9, "stop", 0.1)),
        Story.told(Completion("The cat", " sat", 2, "length", 0.1)),
    ]
    card = scorecard(stories)
    intervals = card.pop("intervals")
    # 8 words hold 5 four-word sequences, the last of which is the first again; 3 words hold none.
    assert card == {
        "count": 2, "ended": 0.5, "mean_words": 5.5, "median_words": 5.5, "repeated_4grams": pytest.approx(0.1),
        "longest_repeat": 2.0, "looping": 0.0, "quotes_balanced": 1.0, "sentences_finished": 0.5, "names_kept": 1.0,
        "pronouns_kept": 1.0, "prompt_followed": 0.0, "distinct_words": 7,
        "distinct_1": pytest.approx(7 / 11), "distinct_2": pytest.approx(6 / 9), "distinct_3": pytest.approx(5 / 7),
    }  # fmt: skip
    assert intervals["mean_words"] == (3.0, 8.0) and intervals["ended"] == share_interval(0.5, 2)
    assert all(low <= card[name] <= high for name, (low, high) in intervals.items())
    json.dumps(card | {"intervals": intervals}, allow_nan=False)


def test_the_data_stands_beside_the_stories():
    data = [Story(f"One day Lily ran {'far ' * n}.") for n in range(6)] + [Story("A dog met Tom.")]
    told = [Story("One day Tom ran."), Story("One day Lily ran.")]
    card = scorecard(told, data=data, copies=lambda story: Copy(len(story.words), 1, story.text))
    assert (card["commonest_name"], card["commonest_name_share"]) == ("Lily", 0.5)
    assert card["data"]["commonest_name_share"] == pytest.approx(6 / 7)
    assert (card["data"]["count"], card["data"]["median_words"]) == (7, 6)
    assert card["length_distance"] == pytest.approx(5 / 7) and card["length_distance_by_chance"] == 1.0
    assert card["data"]["distinct_1"] == pytest.approx(5 / 9)  # of the first two stories of the data
    assert (card["copied_tokens"], card["longest_copied_tokens"], card["data"]["longest_copied_tokens"]) == (4.0, 4, 9)
    assert "ended" not in card["data"] and "prompt_followed" not in card


def test_scorecard_of_the_story_world() -> None:
    first, second = storyworld.stories(seed=3, count=2)
    card = scorecard([Story(text) for text in (first, second, second[:-30], "Nonsense.")], of_storyworld=True)
    assert (card["consistent"], card["parsed"], card["violations"]) == (0.5, 0.5, {"grammar": 2})
    assert card["intervals"]["consistent"] == share_interval(0.5, 4)


def test_odd_texts_are_counted_without_an_error():
    odd = ["", " ", "\n\n\n", '"', "🙂" * 50, "a" * 5000, "the " * 900, "\x00\ufffd", "named named named", '«“"']
    for data in ([], [Story(text) for text in odd]):
        card = scorecard([Story(text, ended=True) for text in odd], data=data, copies=lambda _: Copy(0, 0, ""))
        json.dumps(card, allow_nan=False)
        assert card["count"] == 10


def test_wilson_by_hand():
    """p = 8/10, z = 1.96: (0.8 + 0.192 ± 1.96 sqrt(0.016 + 0.0096)) / 1.384."""
    assert share_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert (
        share_interval(0.0, 5)[0] == 0.0 and share_interval(1.0, 5)[1] == 1.0 and share_interval(0.0, 0) == (0.0, 1.0)
    )


def test_the_jackknife_covers_what_another_sample_says():
    """Words drawn from a law like Zipf's: the interval of one sample holds the mean of many in about 95 of 100."""
    random = np.random.default_rng(0)
    law = 1 / np.arange(1, 2001)
    samples = []
    for _ in range(100):
        words = random.choice(2000, size=(40, 30), p=law / law.sum())
        samples.append(distinct([Story(" ".join(f"w{word}" for word in story)) for story in words], 1))
    middle = np.mean([share for share, _ in samples])
    assert 85 <= sum(low <= middle <= high for _, (low, high) in samples) <= 100
    assert np.mean([high - low for _, (low, high) in samples]) < 0.1


def test_distances_of_lengths():
    assert length_distance([1, 2, 3], [1, 2, 3]) == 0.0
    assert length_distance([1, 2], [3, 4]) == 1.0
    assert length_distance([1, 1, 5, 5], [1, 5, 5, 5]) == 0.25


# ── a run ──


def test_a_model_that_has_learned_by_heart_is_seen_to_copy(tmp_path: Path):
    """Four stories, many times: what it tells is one of them, and the data's own held-out stories are not."""
    texts = list(storyworld.stories(seed=1, count=4, small=True))
    held_out = list(storyworld.stories(seed=9, count=20, small=True))
    for name, some in (("few.txt", texts), ("held.txt", held_out)):
        (tmp_path / name).write_text("\n<|endoftext|>\n".join(some), encoding="utf-8")
    prepare([str(tmp_path / "few.txt")], tmp_path / "data", vocab_size=400, valid=str(tmp_path / "held.txt"))
    settings: dict[str, Any] = {
        "model": {"layers": 2, "width": 64, "heads": 2, "context": 256},
        "optim": {"kind": "muon", "lr": 0.02, "adam_lr": 0.01, "warmup_steps": 5},
        "train": {"steps": 150, "batch_tokens": 1024, "micro_batch": 4, "evaluate_every": 150, "log_every": 40},
    }
    train(tiny_settings(tmp_path / "data", **settings), tmp_path / "run")
    run = open_run(tmp_path / "run", "latest")
    told = tell(run, 6, SamplingParams(max_tokens=300, temperature=0.3, seed=1))
    assert tell(run, 6, SamplingParams(max_tokens=300, temperature=0.3, seed=1))[5].text == told[5].text
    card = score_run(run, told)
    assert card["copied_over_50"] >= 5 / 6 and card["longest_copied_text"] in "\n".join(texts)
    assert card["data"]["copied_over_50"] < card["copied_over_50"]
    assert card["searched_share"] == 1.0 and "copied_tokens" not in score_run(run, told, novelty=False)


def test_a_prompt_of_the_training_data_is_not_a_copy_of_the_model(tmp_path: Path, dataset_folder: Path):
    run = open_run(save_run(tmp_path / "run", tiny_settings(dataset_folder), step=1))
    ids = next(TokenDataset.open(dataset_folder).train.iterate_documents())
    given = run.tokenizer.decode(ids.tolist())
    card = score_run(run, [Completion(given, " Xyzzy qwfp zxcv!", 9, "stop", 0.1)])
    assert card["copied_tokens"] < 20 and not card["copied_over_50"]
    assert score_run(run, [Completion("", given, 9, "stop", 0.1)])["copied_tokens"] == len(ids) - 2


def test_prompts_are_taken_in_turn(tmp_path: Path, dataset_folder: Path):
    run = open_run(save_run(tmp_path / "run", tiny_settings(dataset_folder), step=1))
    told = tell(run, 3, SamplingParams(max_tokens=3, seed=0), ["One day", "The fox"])
    assert [story.prompt for story in told] == ["One day", "The fox", "One day"]
    assert told[0].text != told[2].text


def test_a_file_of_prompts(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("One day \n\n  \nÉva ran\r\n".encode())
    assert read_prompts(path) == ["One day ", "Éva ran"]
    for data, sentence in ((b"\n", "no line with text"), (b"\xff\xfe", "is not UTF-8")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=sentence):
            read_prompts(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path)
