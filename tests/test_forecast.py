"""The ladder is what it should be, and the curve through it is honest about what it does not know."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from smalllm import forecast as module
from smalllm.cli import run
from smalllm.config import RunConfig, UserError, load_recipe
from smalllm.data.shards import TokenDataset
from smalllm.forecast import TEXT, WITH_FLOOR, Prior, Proxy, forecast, predict, run_ladder, rungs, shapes
from smalllm.planner import make_model, settle

SIZE, TOKENS = 1e7, 4e6


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "proxies"


def proxy(size: float, tokens: float, bits_per_byte: float, floor: float | None = None) -> Proxy:
    return Proxy(2, 64, 1000, 64, round(tokens), size * round(tokens), bits_per_byte, floor, 1.0)


def ladder(law: Callable[[float, float], float], floor: float | None = None) -> list[Proxy]:
    """Proxies down to a 32nd of the tokens and a quarter of the size that follow a law exactly."""
    places = [(SIZE * scale, TOKENS / short) for scale in (0.25, 0.5, 1.0) for short in (4, 8, 16, 32)]
    return [proxy(size, tokens, law(size, tokens), floor) for size, tokens in places]


# ── the ladder ──


def test_shapes_keep_the_width_of_a_head():
    config = settle(load_recipe("smalllm-20m"))
    found = [(s.model.layers, s.model.heads, s.model.width, s.model.mlp_width) for s in shapes(config)]
    assert found == [(2, 2, 128, 512), (4, 3, 192, 768), (8, 6, 384, 1536)]
    grouped = settle(load_recipe("stories-fast", ["model.heads=8", "model.kv_heads=4"]))
    assert [(s.model.heads, s.model.kv_heads) for s in shapes(grouped)] == [(2, 1), (4, 2), (8, 4)]
    smallest = config.replace(model={"layers": 1, "heads": 1, "width": 64})
    assert [s.model for s in shapes(smallest)] == [smallest.model]


def test_rungs_double_and_end_before_the_run():
    config = settle(load_recipe("laptop", ["train.minutes=0", "train.steps=1024"]))
    own = list(rungs(config, config))
    assert [rung.train.steps for rung in own] == [64, 128, 256]  # a quarter of the arithmetic, at most
    assert [rung.optim.warmup_steps for rung in own] == [6, 12, 20]  # a tenth, or what the run has
    assert len({rung.seed for rung in own}) == 3 and own[0].train.batch_tokens == config.train.batch_tokens
    small = next(iter(shapes(config)))
    assert [rung.train.steps for rung in rungs(small, config)] == [64, 128, 256, 512]  # 3.9 times as small
    huge = settle(load_recipe("smalllm-20m"))
    assert next(rungs(huge, huge)).train.batch_tokens == 16_384


def test_a_ladder_is_trained_once(tiny: Callable[..., RunConfig], dataset_folder: Path, cache: Path, monkeypatch):
    config, dataset = (
        settle(tiny(train={"steps": 300, "batch_tokens": 128, "micro_batch": 0})),
        TokenDataset.open(dataset_folder),
    )
    told: list[str] = []
    flops = 1.1 * make_model(config).flops_per_token() * 64 * 128
    first = run_ladder(config, dataset, flops, told.append)
    assert [(p.layers, p.width, p.steps) for p in first] == [(2, 16, 64), (2, 16, 128), (2, 32, 64)]
    assert len(told) == 3 == len(list(cache.iterdir())) and all(0 < p.bits_per_byte < 8 for p in first)
    assert all(p.floor is not None and p.floor < p.bits_per_byte for p in first)  # stories have an exact entropy
    assert first[0].bits_per_byte > first[1].bits_per_byte and first[0].tokens == 64 * 128

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "train", refuse)
    assert run_ladder(config, dataset, 1.0, told.append) == first  # known ones count however little time there is
    assert run_ladder(config.replace(optim={"weight_decay": 0.2}), dataset, 1.0) == []
    assert run_ladder(config.model_copy(update={"name": "other", "seed": 99}), dataset, 1.0) == first
    for file in cache.iterdir():
        file.write_text("{}")
    with pytest.raises(AssertionError, match="trained again"):  # what is damaged is no result
        run_ladder(config, dataset, flops)


def test_too_few_proxies_are_no_forecast(tiny: Callable[..., RunConfig], dataset_folder: Path):
    with pytest.raises(UserError, match="tiny has 0 proxies and a forecast needs 3: train it"):
        forecast(settle(tiny()), TokenDataset.open(dataset_folder), 1e15)


def test_what_is_beyond_the_validation_is_said(tiny, dataset_folder, monkeypatch: pytest.MonkeyPatch):
    config, dataset = settle(tiny(train={"steps": 300})), TokenDataset.open(dataset_folder)
    known = [dataclasses.replace(p, flops=1e6 * p.tokens) for p in ladder(lambda size, tokens: 1.0)[:4]]
    monkeypatch.setattr(module, "run_ladder", lambda *given: known)
    told = forecast(config, dataset, 1e15)
    beyond = ("parameters", "76,800 tokens", "256 tokens a step")
    assert all(words in note for words, note in zip(beyond, told.notes, strict=True))
    long = forecast(config.replace(train={"steps": 10**6, "batch_tokens": 32_768}), dataset, 1e15)
    assert [
        words
        for words in ("arithmetic", "epochs", "a step (proxies have 16,384 at most)")
        if not any(words in note for note in long.notes)
    ] == []


# ── the curve ──


@pytest.mark.parametrize(
    "law, floor",
    [
        (lambda size, tokens: 0.95 * (size / SIZE) ** -0.06 * (tokens / TOKENS) ** -0.15, None),
        (lambda size, tokens: 0.4 + 0.3 * (size / SIZE) ** -0.2 + 0.3 * (tokens / TOKENS) ** -0.4, None),
        (lambda size, tokens: 0.2 + 0.1 * (size / SIZE) ** -0.3 * (tokens / TOKENS) ** -1.5, 0.2),
        (lambda size, tokens: 0.204 + 0.01 * (size / SIZE) ** -0.3 * (tokens / TOKENS) ** -1.5, 0.2),
    ],
)
def test_a_law_is_continued(law, floor):
    draws = predict(ladder(law, floor), SIZE, TOKENS)
    low, median, high = np.quantile(draws, [0.05, 0.5, 0.95])
    assert low < law(SIZE, TOKENS) < high and median == pytest.approx(
        law(SIZE, TOKENS), rel=0.03 if floor is None else 0.1
    )
    assert (high - low) / 2 < (0.08 if floor is None else 0.15) * median and draws.min() >= (floor or 0)
    assert np.array_equal(draws, predict(ladder(law, floor), SIZE, TOKENS))


def test_what_is_farther_is_less_certain():
    proxies = ladder(lambda size, tokens: 0.95 * (size / SIZE) ** -0.06 * (tokens / TOKENS) ** -0.15)
    widths = [np.log(predict(proxies, SIZE * far, TOKENS * far)).std() for far in (1, 4, 16)]
    assert widths[0] < 0.6 * widths[1] < 0.4 * widths[2]
    assert np.log(predict(proxies[:4], SIZE, TOKENS)).std() > widths[0]
    assert np.log(predict(proxies, SIZE, TOKENS, spread=0.3)).std() > 1.3 * widths[0]


def test_the_posterior_is_that_of_the_textbook():
    """Bishop 2006, equations 3.50 and 3.51, in the form with precisions."""
    random = np.random.default_rng(3)
    d, n, y = random.normal(-1, 0.5, 7), random.normal(-1, 0.5, 7), random.normal(0, 0.2, 7)
    prior = Prior((-0.1, 0.2), (-0.2, 0.1), (0.03, 0.1), (0.02, 0.1), 0.1, 0.05, 0.02)
    found = module._posterior(0.3 + np.exp(y), 0.3, d, n, prior, 2.0, 0.0)
    features = np.stack([np.ones(7), d, n, d**2 / 2, d * n, n**2 / 2], axis=1)
    means, deviations = 2 * np.array([0, -0.1, -0.2, 0.03, 0.02, 0]), np.array([3, 0.4, 0.2, 0.2, 0.2, 0.2])
    noise = (0.006 * (0.3 + np.exp(y)) / np.exp(y)) ** 2 + 0.1**2 + 0.04**2 * (d**2 + n**2)
    precision = np.diag(deviations**-2.0) + features.T @ np.diag(1 / noise) @ features
    mean = np.linalg.solve(precision, means / deviations**2 + features.T @ (y / noise))
    assert found.mean == pytest.approx(mean[0])
    assert found.deviation == pytest.approx(math.sqrt(np.linalg.inv(precision)[0, 0] + 0.1**2))


@pytest.mark.parametrize("prior, floor", [(TEXT, None), (WITH_FLOOR, 0.2)])
def test_intervals_hold_for_what_the_prior_expects(prior: Prior, floor: float | None):
    """Losses drawn from the prior, noise and all, lie in the interval at least as often as it says."""
    random, held = np.random.default_rng(5), 0
    places = ladder(lambda size, tokens: 1.0)
    d = np.log([p.tokens / TOKENS for p in places])
    n = np.log([p.flops / p.tokens / SIZE for p in places])
    features = np.stack([np.ones_like(d), d, n, d**2 / 2, d * n, n**2 / 2], axis=1)
    for _ in range(200):
        scale = random.choice(prior.scales)
        expected = [(math.log(0.5), 0.2), *(tuple(scale * np.array(pair)) for pair in (prior.tokens, prior.size, prior.curvature, prior.interaction)), (0.0, scale * prior.size_curvature)]  # fmt: skip
        drawn = np.array([random.normal(*pair) for pair in expected])
        y = features @ drawn + scale * prior.misfit * random.standard_normal(len(d))
        told = [
            dataclasses.replace(p, bits_per_byte=(floor or 0) + math.exp(v), floor=floor)
            for p, v in zip(places, y, strict=True)
        ]
        low, high = np.quantile(predict(told, SIZE, TOKENS, draws=2000), [0.05, 0.95])
        held += low <= (floor or 0) + math.exp(drawn[0]) <= high
    assert held >= 180


# ── the command ──


def test_a_forecast_is_printed(tiny: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture):
    config = tiny(train={"steps": 300, "batch_tokens": 128, "micro_batch": 0})
    (tmp_path / "tiny.toml").write_text(config.to_toml())
    asked = ["plan", str(tmp_path / "tiny.toml"), "--seconds", "0", "--forecast", "--proxy-seconds", "2"]
    assert run([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["forecast"]
    low, high = told["interval"]
    assert told["floor"] < low < told["bits_per_byte"] < high and told["level"] == 0.9
    assert told["bits_per_byte"] < told["last_proxy"] and len(told["proxies"]) >= 3 and told["reach"] >= 4
    assert run(asked) == 0
    printed = capsys.readouterr().out
    assert f"{told['bits_per_byte']:.3f} bits/byte" in printed and "in 90% of cases" in printed
    assert "outside of what the forecast was validated on" in printed and "exact entropy" in printed


def test_a_forecast_needs_data(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    assert run(["plan", "laptop", "data.source=", "--forecast"]) == 1
    assert "holds no prepared data" in capsys.readouterr().err
    assert run(["plan", "laptop", "--forecast", "--proxy-seconds", "0"]) == 1
    assert "--proxy-seconds 0 must be a number of seconds above 0" in capsys.readouterr().err


# ── benchmarks/forecast.py ──


def test_what_is_held_out_is_what_it_says():
    benchmark = importlib.import_module("forecast")
    lists = (benchmark.HELD_OUT, benchmark.FIRST_TEN, benchmark.CALIBRATION)
    runs = [benchmark.run_config(line, Path("work")) for chosen in lists for line in chosen]
    assert len({line for chosen in lists for line in chosen}) == len(runs) == 40
    sizes = [make_model(config).parameters_count() for config in runs[:10]]
    tokens = [config.train.steps * config.train.batch_tokens for config in runs[:10]]
    assert 2e5 < min(sizes) < 4e5 and 5e6 < max(sizes) < 6e6 and min(tokens) >= 2**19 and max(tokens) == 2**23
    assert len({config.seed for config in runs}) == 40


def test_a_score_counts_what_was_held():
    benchmark, law = importlib.import_module("forecast"), lambda size, tokens: 0.9 * (tokens / TOKENS) ** -0.12
    proxies = [dataclasses.asdict(p) for p in ladder(law)]
    result = {"proxies": proxies, "reach": 4.0, "tokens": TOKENS, "outcome": 0.9, "held": True, "half_width": 0.05}
    far = benchmark.from_afar(result, 16.0)
    assert far["held"] and abs(far["error"]) < 0.1 and far["naive_error"] > 0.1
    assert not benchmark.from_afar({**result, "outcome": 2.0}, 16.0)["held"]
    assert benchmark.from_afar(result, 1000.0) is None
    both = [{**far, "half_width": 0.04}, {**far, "half_width": 0.06, "held": False}]
    assert benchmark.summary(both).startswith("held 1 of 2; half width 5.0%")
