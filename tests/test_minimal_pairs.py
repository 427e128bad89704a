"""Minimal pairs: what they are made of, and that models which know nothing are right in half of them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import tiny_settings
from test_evaluation import Bigram, make_model

from smalllm.checkpoint import open_run
from smalllm.data.prepare import prepare
from smalllm.judging.minimal_pairs import Pair, pairs, score_pairs
from smalllm.tokenizer import Tokenizer
from smalllm.training.trainer import train

PAIRS = pairs()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([text for pair in PAIRS for text in (pair.right, pair.wrong)], vocab_size=320)


def test_pairs_are_seeded_and_different():
    assert pairs() == PAIRS and pairs(seed=1) != PAIRS
    assert Counter(pair.kind for pair in PAIRS) == {"agreement": 200, "pronoun": 200, "ending": 200}
    assert len(set(PAIRS)) == len(PAIRS) and not any(pair.right == pair.wrong for pair in PAIRS)
    assert not {pair.right for pair in PAIRS} & {pair.wrong for pair in PAIRS}


def test_right_and_wrong_differ_in_few_words():
    for pair in PAIRS:
        one, other = pair.right.split(), pair.wrong.split()
        if len(one) == len(other):
            assert 1 <= sum(a != b for a, b in zip(one, other, strict=True)) <= 3
        assert one[:2] == other[:2]


def test_agreement_is_right_by_the_rules_of_english():
    """The verb is that of the first noun, whatever stands between them."""
    for pair in (pair for pair in PAIRS if pair.kind == "agreement"):
        plural = pair.right.split()[1].endswith("s")
        assert plural == bool(re.search(r"\b(were|are|have)\b", pair.right))
        assert plural != bool(re.search(r"\b(were|are|have)\b", pair.wrong))


def test_pronouns_are_right_by_the_noun():
    for pair in (pair for pair in PAIRS if pair.kind == "pronoun"):
        assert bool(re.search(r"\bgirl\b", pair.right)) == bool(re.search(r"\bshe\b", pair.right))
        assert bool(re.search(r"\bboy\b", pair.wrong)) == bool(re.search(r"\bshe\b", pair.wrong))


def test_a_model_that_knows_how_often_each_token_comes_is_right_in_half(tokenizer: Tokenizer):
    """Each couple has the same words to choose from, mirrored: a liking for one of them is right once and wrong once."""
    torch.manual_seed(0)
    row = torch.rand(320).softmax(0).tolist()
    model = Bigram([row] * 320)
    found = score_pairs(model, tokenizer, PAIRS)  # type: ignore[arg-type]
    assert [found[kind]["accuracy"] for kind in ("agreement", "pronoun", "ending")] == pytest.approx(
        [0.5] * 3, abs=0.03
    )


def test_a_uniform_model_takes_the_shorter_one_and_ties_count_half(tokenizer: Tokenizer):
    model = make_model(vocab_size=320)
    with torch.no_grad():
        model.embedding.weight.zero_()
    asked = [Pair("a", "the cat", "the cat"), Pair("a", "the", "the cat"), Pair("b", "the cat sat", "a")]
    found = score_pairs(model, tokenizer, asked)
    assert (found["a"]["accuracy"], found["b"]["accuracy"], found["all"]["count"]) == (0.75, 0.0, 3)
    low, high = found["all"]["interval"]
    assert 0 <= low < found["all"]["accuracy"] < high <= 1


def test_a_model_that_has_read_the_right_ones_knows_them(tmp_path: Path):
    """Trained on right texts of another seed, of agreement and pronouns."""
    asked = [pair for pair in pairs(100, seed=5) if pair.kind != "ending"]
    texts = [pair.right for seed in range(6) for pair in pairs(200, seed=10 + seed) if pair.kind != "ending"]
    (tmp_path / "right.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    prepare([str(tmp_path / "right.txt")], tmp_path / "data", vocab_size=400)
    settings = {
        "model": {"layers": 2, "width": 64, "heads": 4, "context": 64},
        "optim": {"lr": 1e-2, "warmup_steps": 5},
        "train": {"steps": 150, "batch_tokens": 1024, "micro_batch": 16, "evaluate_every": 150, "log_every": 50},
    }
    train(tiny_settings(tmp_path / "data", **settings), tmp_path / "run")
    run = open_run(tmp_path / "run", "latest")
    found = score_pairs(run.model, run.tokenizer, asked)
    assert found["agreement"]["accuracy"] > 0.9 and found["pronoun"]["accuracy"] > 0.9
