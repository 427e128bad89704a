"""Evaluation: figures worked by hand, windows that count each token once, equality with a naive scorer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_generation import save_run
from test_judge import Canned, listening, said
from torch import Tensor

from smalllm import cli
from smalllm.checkpoint import open_run
from smalllm.config import ModelConfig, RunConfig, UserError
from smalllm.data import storyworld
from smalllm.data.shards import TokenDataset
from smalllm.evaluation import (
    Evaluation,
    bits_per_byte,
    bootstrap_interval,
    score_documents,
    storyworld_floor,
    windows,
)
from smalllm.model import GPT
from smalllm.tokenizer import Tokenizer

TEXTS = ["the cat", "", "a", "the dog sat on the mat. " * 4, "héllo 🙂 wörld", "x" * 100, "the cat sat on it " * 9]


def config(**settings: Any) -> ModelConfig:
    return ModelConfig(**settings)


class Bigram(torch.nn.Module):
    """p(next | last) is a table [V, V] of probabilities; it has the parts of a GPT that scoring reads."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        size = len(table)
        self.config = config(layers=1, width=8, heads=1, context=4, vocab_size=size)
        self.embedding = torch.nn.Embedding(size, size, _weight=torch.eye(size))
        self.head = torch.nn.Linear(size, size, bias=False)
        self.head.weight = torch.nn.Parameter(torch.tensor(table).log().T)

    def hidden(self, ids: Tensor) -> Tensor:
        return self.embedding.weight[ids]


def make_model(context: int = 16, vocab_size: int = 290, **settings: Any) -> GPT:
    torch.manual_seed(1)
    model = GPT(config(layers=2, width=32, heads=4, context=context, vocab_size=vocab_size, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 20, vocab_size=290)


def random_documents(lengths: list[int]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [np.array([1, *generator.integers(3, 280, length - 2), 2]) for length in lengths]


def naive_nats(model: GPT, ids: np.ndarray) -> float:
    """One token at a time: each sees all before it while they fit, else from the last multiple of half a context
    that leaves it within one context."""
    context, half, total = model.config.context, model.config.context // 2, 0.0
    for target in range(1, len(ids)):
        start = 0
        while target - start > context:
            start += half
        with torch.inference_mode():
            logits = model(torch.tensor(ids[None, start:target].astype(np.int64)))[0, -1]
        total -= float(logits.double().log_softmax(-1)[int(ids[target])])
    return total


def test_a_bigram_scored_by_hand() -> None:
    """<s>=0 a=1 </s>=2: <s> a a </s> has p = 1/2 · 1/4 · 3/4 and 2 bytes; <s> </s> has p = 1/8 and none."""
    model: Any = Bigram([[3 / 8, 1 / 2, 1 / 8], [1e-9, 1 / 4, 3 / 4], [1 / 3, 1 / 3, 1 / 3]])
    evaluation = score_documents(model, [np.array([0, 1, 1, 2]), np.array([0, 2])], [2, 0])
    bits = [1 + 2 + math.log2(4 / 3), 3.0]
    assert evaluation.document_bits.tolist() == pytest.approx(bits, rel=1e-6)
    assert evaluation.bits_per_byte == pytest.approx(sum(bits) / 2, rel=1e-6)
    assert evaluation.loss == pytest.approx(sum(bits) * math.log(2) / 4, rel=1e-6)
    assert evaluation.perplexity == pytest.approx(2 ** (sum(bits) / 4), rel=1e-6)
    assert (evaluation.tokens, evaluation.bytes, evaluation.documents) == (4, 2, 2)


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token(tokenizer: Tokenizer) -> None:
    model = make_model()
    with torch.no_grad():
        model.embedding.weight.zero_()
    evaluation = bits_per_byte(model, tokenizer, TEXTS)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert size > sum(map(len, TEXTS))  # multi-byte text is counted in bytes
    assert (evaluation.tokens, evaluation.bytes) == (tokens, size)
    assert evaluation.bits_per_byte == pytest.approx(tokens * math.log2(290) / size, rel=1e-6)
    assert evaluation.perplexity == pytest.approx(290, rel=1e-5)


@pytest.mark.parametrize("context", [2, 3, 4, 7, 16])
def test_windows_count_each_token_once_with_half_a_context_before_it(context: int) -> None:
    for length in [*range(2, 6 * context), 1000]:
        found = windows(length, context)
        counted = [token for window in found for token in range(window.scored, window.end + 1)]
        assert counted == list(range(1, length))
        assert all(window.end - window.start <= context for window in found)
        assert all(window.scored - window.start >= context / 2 for window in found[1:])
        assert [window.start for window in found] == [context // 2 * index for index in range(len(found))]


@pytest.mark.parametrize(
    "settings", [{}, {"positions": "learned", "norm": "layernorm", "activation": "gelu", "bias": True}]
)
def test_scores_equal_those_of_a_naive_scorer(settings: dict[str, Any]) -> None:
    model, documents = make_model(**settings), random_documents([2, 3, 16, 17, 18, 25, 60, 5])
    evaluation = score_documents(model, documents, [len(ids) for ids in documents])
    expected = [naive_nats(model, ids) / math.log(2) for ids in documents]
    assert evaluation.document_bits.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 40, 100_000])
def test_the_batch_size_changes_nothing(batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents = make_model(), random_documents([2, 9, 40, 33, 17, 2, 100])
    expected = [score_documents(model, [ids], [1]).document_bits[0] for ids in documents]
    monkeypatch.setattr("smalllm.evaluation.LOGITS_AT_ONCE", 7 * 290)
    evaluation = score_documents(model, documents, [1] * 7, batch_tokens=batch_tokens)
    assert evaluation.document_bits.tolist() == pytest.approx(expected, rel=1e-5)


def test_passes_stay_within_the_batch_and_padding_is_small() -> None:
    model = make_model()
    shapes: list[tuple[int, ...]] = []
    model.norm.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape[:2])))
    documents = random_documents([3, 12, 4, 11, 3, 12, 4, 11])
    score_documents(model, documents, [1] * 8, batch_tokens=48)
    assert shapes == [(4, 11), (4, 3)]


def test_dropout_is_off_and_training_goes_on() -> None:
    model, documents = make_model(dropout=0.5), random_documents([10, 20])
    expected = score_documents(model, documents, [5, 5]).bits_per_byte
    model.train()
    assert score_documents(model, documents, [5, 5]).bits_per_byte == expected
    assert model.training
    model(torch.tensor([[1, 5]])).sum().backward()


def test_autocast_rounds_the_body() -> None:
    model, documents = make_model(), random_documents([30, 20])
    exact = score_documents(model, documents, [5, 5]).bits_per_byte
    rounded = score_documents(model, documents, [5, 5], autocast=torch.autocast("cpu", torch.bfloat16)).bits_per_byte
    assert rounded != exact and rounded == pytest.approx(exact, rel=5e-3)


def test_stored_token_types_are_scored_like_int64() -> None:
    model, documents = make_model(), random_documents([10, 40])
    small = score_documents(model, [ids.astype("<u2") for ids in documents], [5, 5])
    assert small.bits_per_byte == score_documents(model, documents, [5, 5]).bits_per_byte


@pytest.mark.parametrize(("texts", "count"), [([], 0), (["", ""], 2)])
def test_nothing_to_evaluate_is_an_error(texts: list[str], count: int, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=f"no text to evaluate in {count} documents"):
        bits_per_byte(make_model(), tokenizer, texts)


def test_the_interval_is_that_of_the_ratio() -> None:
    """Delta method: the standard error of sum(b)/sum(s) is sqrt(sum((b - r s)^2)) / sum(s)."""
    generator = np.random.default_rng(4)
    sizes = generator.integers(50, 500, 2000)
    bits = sizes * generator.normal(1.5, 0.3, 2000)
    ratio = bits.sum() / sizes.sum()
    error = math.sqrt(((bits - ratio * sizes) ** 2).sum()) / sizes.sum()
    low, high = bootstrap_interval(bits, sizes)
    assert (ratio - low) / error == pytest.approx(1.96, rel=0.15)
    assert (high - ratio) / error == pytest.approx(1.96, rel=0.15)
    assert bootstrap_interval(bits, sizes) == (low, high)


def test_the_interval_does_not_depend_on_how_many_draws_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    bits, sizes = np.arange(1.0, 51.0), np.arange(51, 1, -1)
    whole = bootstrap_interval(bits, sizes)
    monkeypatch.setattr("smalllm.evaluation.DRAWS_AT_ONCE", 333)
    assert bootstrap_interval(bits, sizes) == whole


def test_equal_documents_have_no_spread_and_an_interval_of_none() -> None:
    assert bootstrap_interval(np.full(9, 6.0), np.full(9, 4)) == (1.5, 1.5)


def test_figures_are_the_keys_of_the_contract() -> None:
    zeros = np.zeros(1)
    evaluation = Evaluation(1.0, 2.0, 3.0, (2.0, 4.0), 5, 6, 7, document_bits=zeros, document_bytes=zeros)
    assert evaluation.figures() == {
        "loss": 1.0, "perplexity": 2.0, "bits_per_byte": 3.0, "bits_per_byte_interval": (2.0, 4.0),
        "tokens": 5, "bytes": 6, "documents": 7,
    }  # fmt: skip


def test_the_floor_is_known_for_the_story_world_only() -> None:
    texts = list(storyworld.stories(seed=3, count=5))
    assert storyworld_floor(texts) == storyworld.entropy_bits_per_byte(texts)
    assert storyworld_floor([*texts, "Another text."]) is None
    assert storyworld_floor([]) is None


# ── the command ──


@pytest.fixture
def run_folder(tmp_path: Path, tiny: Callable[..., RunConfig]) -> Path:
    return save_run(tmp_path / "run", tiny(), step=4)


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.run(["evaluate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_scores_the_validation_documents(
    run_folder: Path, dataset_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluated(capsys, str(run_folder), "--stories", "3", "--max-tokens", "10")
    valid = json.loads((dataset_folder / "manifest.json").read_text())["valid"]
    assert (result["documents"], result["bytes"]) == (valid["documents"], valid["text_bytes"])
    assert result["tokens"] == valid["tokens"] - valid["documents"]
    low, high = result["bits_per_byte_interval"]
    assert 0 < result["floor_bits_per_byte"] < low < result["bits_per_byte"] < high
    assert result["leaks"] == json.loads((dataset_folder / "manifest.json").read_text())["leaks"]
    card = result["stories"]
    assert card["count"] == 3 and card["consistent"] == 0.0 and card["violations"] == {"grammar": 3}
    assert card["intervals"]["ended"][0] <= card["ended"] <= card["intervals"]["ended"][1]
    assert card["copied_tokens"] > 0 and card["searched_share"] == 1.0
    assert card["data"]["count"] == valid["documents"] and card["data"]["copied_tokens"] > card["copied_tokens"]
    assert "consistent" not in card["data"] and "judge" not in card and "pairs" not in result


def test_documents_of_the_training_data_are_noticed(
    run_folder: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = TokenDataset.open(dataset_folder)
    known = dataset.tokenizer().decode(next(dataset.train.iterate_documents()).tolist())
    fresh = "The harbour lay grey under rain, and nobody asked where the ferry had gone that winter morning."
    (tmp_path / "some.txt").write_text(f"{known}\n<|endoftext|>\n{fresh}\n", encoding="utf-8")
    leaks = evaluated(capsys, str(run_folder), "--text", str(tmp_path / "some.txt"))["leaks"]
    assert (leaks["exact"], leaks["near"], leaks["valid_documents"]) == (1, 0, 2)
    assert cli.run(["evaluate", str(run_folder), "--text", str(tmp_path / "some.txt")]) == 0
    assert "1 word for word, 0 nearly (2 documents against" in " ".join(capsys.readouterr().out.split())


def test_evaluate_scores_a_file_of_documents(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.txt").write_text("Héllo there.\n<|endoftext|>\nAnother one.\n", encoding="utf-8")
    result = evaluated(
        capsys, str(run_folder), "--text", str(tmp_path / "some.txt"), "--stories", "1", "--max-tokens", "5"
    )
    run = open_run(run_folder)
    expected = bits_per_byte(run.model, run.tokenizer, ["Héllo there.", "Another one."])
    assert result["bits_per_byte"] == expected.bits_per_byte
    assert (result["documents"], result["bytes"]) == (2, 25)
    assert "floor_bits_per_byte" not in result
    assert "consistent" in result["stories"]  # the text is another one, the run is of the story world
    assert evaluated(capsys, str(run_folder), "--text", str(tmp_path / "some.txt"), "--limit", "1")["documents"] == 1


def test_evaluate_prints_a_table(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["evaluate", str(run_folder), "--limit", "2", "--stories", "1", "--max-tokens", "5"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "run, step 4",
        "bits per byte",
        "95 % interval",
        "floor",
        "2 documents",
        "1 stories",
        "consistent",
        "grammar 1",
    ):
        assert words in printed


def test_stories_begin_with_prompts_of_a_file(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("A purple dragon\n\nOne day\n", encoding="utf-8")
    options = ["--limit", "1", "--max-tokens", "5", "--no-novelty"]
    card = evaluated(capsys, str(run_folder), "--prompts", str(tmp_path / "prompts.txt"), *options)["stories"]
    assert card["count"] == 2 and card["prompt_followed"] == 0.0 and "copied_tokens" not in card
    (tmp_path / "prompts.txt").write_text("\n", encoding="utf-8")
    assert cli.run(["evaluate", str(run_folder), "--prompts", str(tmp_path / "prompts.txt")]) == 1
    assert "write one prompt a line" in capsys.readouterr().err


def test_a_run_without_its_data_is_told_without_what_needs_it(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (run_folder / "config.toml").read_text(encoding="utf-8")
    (run_folder / "config.toml").write_text(re.sub(r'(?m)^path = ".*"$', 'path = "gone"', settings), encoding="utf-8")
    (tmp_path / "some.txt").write_text("Another one.\n", encoding="utf-8")
    card = evaluated(
        capsys, str(run_folder), "--text", str(tmp_path / "some.txt"), "--stories", "2", "--max-tokens", "5"
    )["stories"]
    assert card["count"] == 2 and not {"data", "copied_tokens", "consistent", "commonest_name"} & card.keys()


def test_evaluate_asks_the_judge_and_the_pairs(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canned = Canned(said('{"grammar": 2, "creativity": 4, "consistency": 3, "plot": 1}'))
    options = ["--limit", "1", "--stories", "2", "--max-tokens", "5", "--no-novelty", "--judge-model", "big", "--pairs"]
    with listening(canned) as url:
        result = evaluated(capsys, str(run_folder), *options, "--judge", url)
        assert result["stories"]["judge"]["grammar"] == 2.0 and result["stories"]["judge"]["asked"] == 2
        assert (run_folder / "judge.jsonl").exists()
        assert cli.run(["evaluate", str(run_folder), *options, "--judge", url]) == 0
    printed = capsys.readouterr().out
    assert len(canned.requests) == 2
    assert "2 stories graded 1 to 10 by big" in printed and "consistency" in printed and "agreement" in printed
    assert (
        result["pairs"].keys() == {"agreement", "pronoun", "ending", "all"} and result["pairs"]["all"]["count"] == 600
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--text", "no-such-file.txt"], "no-such-file.txt"),
        (["--stories", "-1"], "stories = -1 is not possible; use 0 or more"),
        (["--limit", "0"], "limit = 0 is not possible; use 1 or more"),
        (["--checkpoint", "best?"], "best?"),
        (["--judge", "http://127.0.0.1:9/v1"], "judge needs stories to grade; add --stories 50"),
        (["--judge-model", "big"], "judge_model = big has no address; add --judge URL"),
        (["--stories", "1", "--judge", "nowhere"], "judge = nowhere is no address"),
        (["--prompts", "none.txt"], "prompts = none.txt cannot be read"),
    ],
)
def test_mistakes_are_sentences(
    arguments: list[str], sentence: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["evaluate", str(run_folder), *arguments]) == 1
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1 and not captured.out
