"""The Python API: the same texts as the command line, options that are checked, stories that keep to their theme."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import smalllm
from smalllm import cli
from smalllm.api import StoryTeller
from smalllm.generation import Completion
from smalllm.native import decode
from smalllm.native.build import Unavailable
from smalllm.training.trainer import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, dataset_folder: Path) -> Path:
    from conftest import tiny_settings

    path = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_settings(dataset_folder), path)
    return path


@pytest.fixture
def model(folder: Path) -> StoryTeller:
    return smalllm.load(folder)


def test_api_and_command_line_tell_the_same(folder: Path, model: StoryTeller, capsys: pytest.CaptureFixture) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "seed": 5, "top_k": 50, "temperature": 0.9}
    words = ["--max-tokens", "30", "--seed", "5", "--top-k", "50", "--temperature", "0.9", "--count", "2", "--json"]
    assert cli.run(["sample", str(folder), "--prompt", "One day", *words]) == 0
    printed = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert model.batch(["One day"] * 2, **options) == printed
    assert model.complete("One day", **options) == printed[0] == "".join(model.stream("One day", **options))
    assert printed[0] != printed[1]


def test_weights_can_be_chosen(folder: Path, native: None) -> None:
    texts = [smalllm.load(folder, weights=weights).complete(temperature=0.0) for weights in ("fp32", "bf16", "int8")]
    assert all(texts)


def test_without_a_compiler_the_model_itself_decodes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = smalllm.load(folder, weights="fp32").complete(temperature=0.0)

    def unavailable(*arguments: Any) -> None:
        raise Unavailable("no compiler here")

    monkeypatch.setattr(decode, "Decoder", unavailable)
    monkeypatch.setattr(decode, "available", lambda: False)
    assert smalllm.load(folder).complete(temperature=0.0) == exact
    with pytest.raises(smalllm.UserError, match=r"weights = int8 need the C\+\+ decoder \(no compiler here\)"):
        smalllm.load(folder, weights="int8").complete()


def test_unknown_options_and_impossible_values_are_sentences(model: StoryTeller) -> None:
    with pytest.raises(smalllm.UserError, match="there is no option 'temprature'; the options are"):
        model.complete("One", temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(smalllm.UserError, match="top_p = 2 is not possible"):
        model.batch(["One"], top_p=2)
    with pytest.raises(smalllm.UserError, match="tries = 0"):
        model.story(about="a cat", tries=0)


def test_a_story_begins_with_its_theme_and_the_most_faithful_one_is_told(
    model: StoryTeller, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [
        Completion("", " The rabbit Tilly was brave, Tilly ran and", 9, "length", 0.0),
        Completion("", " A dog came. The end.", 9, "stop", 0.0),
        Completion("", " The rabbit ran. Tilly slept.", 9, "stop", 0.0),
        Completion("", " The rabbit ran. A rabbit slept. The rabbit", 9, "stop", 0.0),
    ]
    asked: list[list[str]] = []

    def batch(prompts: list[str], params: Any) -> list[Completion]:
        asked.append(prompts)
        assert params.max_tokens == 300 and params.seed == 3
        return told[: len(prompts)]

    monkeypatch.setattr(model.generator, "batch", batch)
    opening = "Once upon a time, there was a brave rabbit named Tilly."
    assert model.story(about=" a brave rabbit named Tilly. ", seed=3) == opening + told[2].text
    assert model.story(about="a brave rabbit named Tilly", tries=1, seed=3) == opening + told[0].text
    assert model.story(seed=3) == "Once upon a time" + told[0].text
    assert asked == [[opening] * 4, [opening], ["Once upon a time"]]


def test_a_real_story_is_whole_and_repeatable(model: StoryTeller) -> None:
    one, two = (model.story(about="a red ball", seed=1, max_tokens=40) for _ in range(2))
    assert one == two and one.startswith("Once upon a time, there was a red ball.") and len(one) > 60
