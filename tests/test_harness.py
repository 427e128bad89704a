"""The answers to lm-eval's questions: equal to those of the model one token at a time; and the harness itself, where it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_generation import save_run

from smalllm.checkpoint import open_run
from smalllm.config import RunConfig, UserError
from smalllm.generation import Generator, SamplingParams
from smalllm.judging import harness
from smalllm.judging.harness import Answers, Span, register, sampling, split


class Asked(NamedTuple):
    args: tuple[Any, ...]


def asked(*arguments: tuple[Any, ...]) -> list[Asked]:
    return [Asked(args) for args in arguments]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, dataset_folder: Path) -> Answers:
    from conftest import tiny_settings

    return Answers(open_run(save_run(tmp_path_factory.mktemp("harness") / "run", tiny_settings(dataset_folder), 3)))


def log_probabilities(answers: Answers, ids: list[int]) -> torch.Tensor:
    """ln p of every next token after these ids."""
    with torch.inference_mode():
        return answers.model(torch.tensor([ids]))[0, -1].double().log_softmax(-1)


def naive(answers: Answers, given: list[int], wanted: list[int]) -> tuple[float, bool]:
    """One token at a time, each from the last ids that fit."""
    total, greedy, context = 0.0, True, answers.model.config.context
    for id in wanted:
        found = log_probabilities(answers, given[-context:])
        total, greedy, given = total + float(found[id]), greedy and int(found.argmax()) == id, [*given, id]
    return total, greedy


def test_continuations_are_scored_like_one_token_at_a_time(answers: Answers):
    encode, bos = answers.tokenizer.encode, answers.tokenizer.bos_id
    pairs = [
        ("", "Once"),
        ("Once upon a time", " there was a fox."),
        ("The fox ", "ran"),
        ("A", " b c d e"),
        ("The fox", ""),
    ]
    for (context, continuation), (total, greedy) in zip(pairs, answers.loglikelihood(asked(*pairs)), strict=True):
        given = encode(context.rstrip())
        wanted = encode(context + continuation)[len(given) :]
        expected = naive(answers, [bos, *given], wanted)
        assert total == pytest.approx(expected[0], rel=1e-4, abs=1e-6) and greedy == expected[1]


def test_what_greedy_decoding_says_is_greedy(answers: Answers):
    said = Generator(answers.model, answers.tokenizer, "fp32").batch(
        ["Once"], SamplingParams(max_tokens=6, temperature=0)
    )
    ids = [answers.tokenizer.bos_id, *answers.tokenizer.encode("Once"), *said[0].ids]
    span, other = Span(ids, len(ids) - 6), Span([*ids[:-1], (ids[-1] + 1) % 500], len(ids) - 6)
    (_, greedy), (_, changed) = harness.scored(answers.model, [span, other])
    assert greedy and not changed


def test_a_context_that_is_too_long_loses_its_beginning(answers: Answers):
    encode, context = answers.tokenizer.encode, answers.model.config.context
    told = "the fox and the bear ran to the river and " * 9
    ids = [answers.tokenizer.bos_id, *encode(told.rstrip() + " slept well.")]
    first = 1 + len(encode(told.rstrip()))
    ((total, _),) = answers.loglikelihood(asked((told.rstrip(), " slept well.")))
    read = ids[len(ids) - 1 - context :]
    expected = naive(answers, read[: first - len(ids)], ids[first:])
    assert len(ids) > 2 * context and total == pytest.approx(expected[0], rel=1e-4)


@pytest.mark.parametrize("length", [1, 2, 5, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("first", [1, 3, 40])
def test_each_token_is_predicted_once_from_all_that_fits(length: int, first: int):
    parts = list(split(Span(range(length), first), 32))
    predicted = [id for part in parts for id in part.ids[part.first :]]
    assert predicted == list(range(first, length))
    assert all(len(part.ids) <= 33 and part.first >= 1 for part in parts)
    assert all(part.ids[0] == 0 or len(part.ids) == 33 for part in parts)


def test_rolling_texts_of_any_length(answers: Answers):
    texts = ["", "A fox.", "the fox and the bear ran to the river and " * 9]
    totals = answers.loglikelihood_rolling(asked(*((text,) for text in texts)))
    assert totals[0] == 0.0
    ids = answers.tokenizer.encode(texts[1])
    assert totals[1] == pytest.approx(naive(answers, [answers.tokenizer.bos_id], ids)[0], rel=1e-4)
    tokens = len(answers.tokenizer.encode(texts[2]))
    assert tokens > 64 and -3 * math.log(512) < totals[2] / tokens < 0


@pytest.mark.parametrize("batch_tokens", [1, 50, 100_000])
def test_neighbours_change_nothing(answers: Answers, batch_tokens: int, monkeypatch: pytest.MonkeyPatch):
    requests = asked(("Once", " upon"), ("", "The fox ran away."), ("One day the bear", " slept"), ("", "A"))
    alone = [answers.loglikelihood([request])[0][0] for request in requests]
    monkeypatch.setattr(harness, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(harness, "LOGITS_AT_ONCE", 3 * 512)
    assert [total for total, _ in answers.loglikelihood(requests)] == pytest.approx(alone, rel=1e-5)


def test_generation_is_greedy_and_stops_where_it_is_told(answers: Answers):
    plain = SamplingParams(max_tokens=20, temperature=0)
    whole = [told.text for told in Generator(answers.model, answers.tokenizer, "fp32").batch(["Once", "The"], plain)]
    stop = whole[0][5:8]
    settings = {"until": [stop], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0}
    texts = answers.generate_until(
        asked(("Once", settings), ("The", {"max_gen_toks": 20}), ("Once", {**settings, "until": stop}))
    )
    assert texts == [whole[0][: whole[0].find(stop)], whole[1], texts[0]]


def test_settings_of_a_generation():
    assert sampling({}) == SamplingParams(max_tokens=256, temperature=0.0, seed=0)
    told = sampling({"until": ["\n", ""], "do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 9})
    assert told == SamplingParams(max_tokens=9, temperature=0.7, top_p=0.9, stop=("\n",), seed=0)


def test_without_lm_eval_the_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match="uv sync --extra eval"):
        register()


def test_the_harness_takes_the_model(tmp_path: Path, tiny: Callable[..., RunConfig]):
    """A task of two lines, through lm-eval's own evaluator; skipped where the package is not installed."""
    lm_eval = pytest.importorskip("lm_eval")
    run = save_run(tmp_path / "run", tiny(), step=2)
    model = register().create_from_arg_string(f"run={run}", {"batch_size": 1, "device": "cpu"})
    (tmp_path / "pairs.jsonl").write_text('{"good": "The fox ran.", "bad": "fox The ran."}\n' * 2, encoding="utf-8")
    task = {
        "task": "two_pairs", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "pairs.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "", "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    found = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)["results"]["two_pairs"]["acc,none"]
    good, bad = (total for total, _ in model.loglikelihood(asked(("", "The fox ran."), ("", "fox The ran."))))
    assert found == float(good > bad)
