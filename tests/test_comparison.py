"""Comparison: intervals worked by hand, rates of false alarms, verdicts, power; sentences and figures of a contest."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from smalllm.config import UserError
from smalllm.evaluation import summarize
from smalllm.judging.comparison import (
    against_first,
    compare,
    expanded_percentiles,
    seeds_needed,
    student,
    variance_of_seeds,
)
from smalllm.judging.contest import Contest, hold
from smalllm.judging.sides import Documents, Score, Side


def normal(seed: int, runs: int, documents: int = 60, seeds: float = 0.0, ahead: float = 0.0) -> np.ndarray:
    """Bits of documents of one byte: runs that differ by ``seeds`` as wholes and by 0.05 on a document."""
    generator = np.random.default_rng(seed)
    return 1 + ahead + generator.normal(0, seeds, (runs, 1)) + generator.normal(0, 0.05, (runs, documents))


ONES = np.ones(60)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),  # of printed tables
    [
        (0.975, 1, 12.706),
        (0.975, 4, 2.776),
        (0.995, 3, 5.841),
        (0.995, 10, 3.169),
        (0.95, 120, 1.658),
        (0.975, 5000, 1.960),
    ],
)
def test_students_t_is_that_of_the_tables(probability: float, freedom: int, expected: float) -> None:
    assert student(probability, freedom) == pytest.approx(expected, abs=5e-4)


def test_difference_is_second_minus_first_by_bytes() -> None:
    """Bits 10 and 30 against 20 and 30 on documents of 10 and 30 bytes, five times each: 1.25 - 1.00 bits per byte."""
    first, second, sizes = (np.tile(values, 5).astype(float) for values in ([10, 30], [20, 30], [10, 30]))
    found = compare(first[None], second[None], sizes)
    assert found.difference == pytest.approx(0.25) and found.relative == pytest.approx(0.25)
    assert found.about == "models" and found.error_of_seeds is None and found.seeds == (1, 1)


def test_a_model_against_itself_differs_by_nothing() -> None:
    found = compare(normal(0, 1), normal(0, 1), ONES)
    assert (found.difference, found.interval, found.verdict) == (0.0, (0.0, 0.0), "not distinguishable")
    assert compare(normal(0, 1), normal(0, 1), ONES, smallest=0.0).verdict == "not distinguishable"


def test_sides_exchanged_change_the_sign_alone() -> None:
    first, second = normal(1, 2, seeds=0.01), normal(2, 3, seeds=0.01, ahead=0.05)
    there, back = compare(first, second, ONES), compare(second, first, ONES)
    assert there.difference == pytest.approx(-back.difference)
    assert there.error_of_seeds == pytest.approx(back.error_of_seeds)
    assert there.interval[0] == pytest.approx(
        -back.interval[1], abs=2e-3
    )  # the resamples are the same, the percentiles mirrored


def test_the_interval_is_that_of_students_t_where_both_are_right() -> None:
    """Of many documents of one byte with a normal difference: mean plus and minus t standard errors."""
    differences = np.random.default_rng(3).normal(0.1, 1.0, 400)
    found = compare(np.zeros((1, 400)) + 1, 1 + differences[None], np.ones(400))
    half = student(0.975, 399) * differences.std(ddof=1) / math.sqrt(400)
    assert found.interval == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.006)


def test_pairing_finds_what_lies_far_below_the_spread_of_documents() -> None:
    """Documents differ by 50 %, the models by 1 % on each of them, give or take 1 %."""
    generator = np.random.default_rng(4)
    hard = generator.normal(2, 0.5, 200).clip(0.5)
    found = compare(hard[None], (hard * generator.normal(1.01, 0.01, 200))[None], np.ones(200))
    assert found.real and 0.005 < found.relative < 0.015


def test_seeds_enter_with_their_own_t() -> None:
    """Two seeds of each side, 1.0 and 1.2 against 1.1 and 1.3 on every document: v = 0.02, t of 2 degrees, no spread of documents."""
    first, second = np.array([[1.0], [1.2]]) * ONES, np.array([[1.1], [1.3]]) * ONES
    assert variance_of_seeds(first, second, ONES) == (pytest.approx(0.02), 2)
    found = compare(first, second, ONES)
    half = student(0.975, 2) * math.sqrt(0.02 / 2 + 0.02 / 2)
    assert found.interval == pytest.approx((0.1 - half, 0.1 + half))
    assert found.about == "settings" and found.verdict.endswith("more seeds needed") and not found.real
    assert found.seeds_needed is not None and found.verdict == f"{found.seeds_needed - 2} more seeds needed"
    alone = compare(first.mean(0, keepdims=True), second.mean(0, keepdims=True), ONES)
    assert alone.real  # as to the models, which is all that one run of each can say


def test_one_seed_against_three_borrows_their_variance() -> None:
    first, second = np.array([[1.0]]) * ONES, np.array([[1.0], [1.1], [1.2]]) * ONES
    found = compare(first, second, ONES)
    assert found.error_of_seeds == pytest.approx(math.sqrt(0.01 + 0.01 / 3)) and not found.real


@pytest.mark.parametrize("seeds", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("runs", [(1, 1), (2, 2), (3, 5)])
def test_false_alarms_are_rare(runs: tuple[int, int], seeds: float) -> None:
    """At most 1 % is promised; 6 of 200 happen to such a rule once in 60 times, and the trials are fixed."""
    seeds = 0.0 if runs == (1, 1) else seeds
    alarms = [
        compare(normal(2 * n, runs[0], seeds=seeds), normal(2 * n + 1, runs[1], seeds=seeds), ONES) for n in range(200)
    ]
    assert sum(alarm.real for alarm in alarms) <= 6


def test_the_interval_covers_what_it_says() -> None:
    missed = 0
    for number in range(200):
        found = compare(normal(2 * number, 3, seeds=0.02), normal(2 * number + 1, 3, seeds=0.02, ahead=0.03), ONES)
        missed += not found.interval[0] <= 0.03 <= found.interval[1]
    assert missed <= 19  # 5 % would be 10


def test_percentiles_of_few_documents_are_farther_apart() -> None:
    ratios = np.random.default_rng(0).normal(size=4000)
    few, many = expanded_percentiles(ratios, 10, 0.05), expanded_percentiles(ratios, 1000, 0.05)
    assert few[0] < many[0] - 0.2 and few[1] > many[1] + 0.2
    assert many == pytest.approx((-1.96, 1.96), abs=0.12)


def test_power_asks_for_more_where_luck_is_larger_and_gives_up_in_time() -> None:
    counts = [seeds_needed(0.01, variance, 0.0) for variance in (1e-6, 1e-5, 1e-4)]
    assert None not in counts and counts == sorted(counts, key=lambda count: count or 0) and counts[0] != counts[2]
    assert seeds_needed(0.01, 1e-4, error_of_documents=0.01) is None  # the documents alone hide it
    assert seeds_needed(1e-6, 1.0, 0.0) is None


def test_power_is_what_it_says() -> None:
    """Four in five tries are real with as many seeds as calculated."""
    ahead, seeds = 0.02, 0.01
    needed = seeds_needed(ahead, seeds**2, 0.05 / math.sqrt(60) / 2)
    assert needed is not None
    found = [
        compare(normal(2 * n, needed, seeds=seeds), normal(2 * n + 1, needed, seeds=seeds, ahead=ahead), ONES).real
        for n in range(100)
    ]
    assert 70 <= sum(found) <= 98


def test_several_comparisons_have_wider_intervals() -> None:
    sides = [normal(seed, 1) for seed in range(4)]
    one, three = compare(sides[0], sides[1], ONES), against_first(sides, ONES)
    assert len(three) == 3 and three[0].difference == one.difference
    assert three[0].interval[0] < one.interval[0] and three[0].interval[1] > one.interval[1]


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(UserError, match="9 documents are too few"):
        compare(normal(0, 1, 9), normal(1, 1, 9), np.ones(9))


# ── contests ──


def contest(*sides: np.ndarray) -> Contest:
    """Sides a, b ... of runs with these bits on documents of one byte."""
    members, scores = [], []
    for number, bits in enumerate(sides):
        name = "abc"[number]
        runs = [SimpleNamespace(name=f"{name}{row}", seed=row, settings=name, data="d") for row in range(len(bits))]
        members.append(Side(name, tuple(runs)))  # type: ignore[arg-type]
        sizes = np.ones(bits.shape[1], dtype=np.int64)
        scores.append(
            [
                Score(run, 5, 100, summarize(row * math.log(2), len(row), sizes))
                for run, row in zip(runs, bits, strict=True)
            ]
        )  # type: ignore[arg-type]
    return hold(members, scores, Documents(["x"] * sides[0].shape[1], "mine.txt", ("a note",)))


def test_figures_have_the_keys_of_the_contract() -> None:
    figures = json.loads(json.dumps(contest(normal(0, 1), normal(1, 1, ahead=0.1)).figures()))
    assert set(figures) >= {"difference", "interval", "verdict"} and figures["verdict"] == "real"
    assert figures["sides"] == ["a", "b"] and figures["seeds"] == [1, 1] and figures["documents"] == 60
    assert figures["bits_per_byte"][1] - figures["bits_per_byte"][0] == pytest.approx(figures["difference"])
    assert [run["run"] for run in figures["runs"]] == ["a0", "b0"] and figures["notes"] == ["a note"]


def test_sentences_say_which_way_and_of_what() -> None:
    found, meaning = contest(normal(0, 1), normal(1, 1, ahead=-0.1)).sentences(0)
    assert found.startswith("b needs 0.1") and "less than a" in found and "as to these two models" in meaning
    assert "as to the settings" in contest(normal(0, 3), normal(1, 3, ahead=0.1)).sentences(0)[1]
    assert "seeds; here are 2 and 2" in contest(normal(0, 2, seeds=0.1), normal(1, 2, seeds=0.1)).sentences(0)[1]
    calm = contest(np.ones((1, 60)), np.ones((1, 60)) + np.random.default_rng(0).normal(0, 1e-4, (1, 60)))
    assert "it is below 1 %" in calm.sentences(0)[1]


def test_copies_of_a_run_are_no_seeds() -> None:
    with pytest.raises(UserError, match="copies, not seeds"):
        contest(np.concatenate([normal(0, 1)] * 2), normal(1, 2))


def test_notes_tell_of_many_comparisons() -> None:
    assert any("Bonferroni" in note for note in contest(normal(0, 1), normal(1, 1), normal(2, 1)).notes())


def test_the_benchmark_runs(tmp_path: Path) -> None:
    import comparison as benchmark

    out: Any = tmp_path / "found.json"
    assert benchmark.main(["--trials", "4", "--simulated", "20", "--json", str(out)]) in (0, 1)
    assert {"name", "trials", "real", "share", "interval", "bound"} == set(json.loads(out.read_text())[0])
