"""How good a run will be, before it begins: bits per byte with an interval, from a ladder of short runs.

Every proxy is a whole run of the same family on the same data: the same settings with fewer heads and layers, or fewer
steps, with its own complete schedule, because the loss in the midst of another run's schedule says little (Hoffmann et
al., arXiv 2203.15556; Hägele et al., arXiv 2405.18392). Results are kept in the user's cache by settings and data, so that
a second forecast is instant.

The logarithm of the loss above its floor is a quadratic form in log tokens and log arithmetic per token around the planned
run: a power law (Kaplan et al., arXiv 2001.08361) whose exponents change slowly and depend on the size. The sum of two
power laws (Hoffmann et al.) was tried first; at the sizes that a minute trains, the gain from size grows with the tokens,
which it cannot express. Coefficients have normal priors, so that the posterior is exact (Bishop 2006, section 3.3), and
what a proxy tells is the less certain the farther it is from the run. Where the priors come from and how often the
interval held: docs/planning.md. Knows nothing about terminals.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smalllm.config import RunConfig, UserError
from smalllm.data.shards import TokenDataset
from smalllm.files import FileSystem
from smalllm.metrics import Silence
from smalllm.native.build import cache_folder
from smalllm.planner import make_model
from smalllm.training.trainer import train
from smalllm.untrusted import content

FIRST_STEPS = 64
"""Of the shortest proxy of a shape; each next one has twice as many."""
SCALES = (1.0, 0.5, 0.25)
"""Of heads and layers, from the planned shape down."""
LEAST_LAYERS = 2
LARGEST_BATCH = 16_384
"""Tokens per step of a proxy at most: with more, a minute would be too few steps."""
CLOSEST = 4
"""A proxy takes this many times less arithmetic than the run, or more times less."""
VERSION = 1  # of the cache: another way to run proxies is another one
LARGEST_CACHE = 1 << 16


LEAST_PROXIES = 3
LEVEL = 0.9
SEED_SPREAD = 0.006
"""Standard deviation of the loss between seeds, relative (docs/planning.md)."""
SPEED_SPREAD = 0.1
"""Of the logarithm of the tokens that a budget of minutes allows: machines are not equally fast every hour."""
DRAWS = 20_000
VALIDATED_PARAMETERS = (2e5, 6e6)
VALIDATED_TOKENS = (5e5, 8.4e6)
VALIDATED_REACH = 16.0
VALIDATED_BATCH = (1024, 4096)
MANY_EPOCHS = 4
"""Data that is read more often teaches less each time (Muennighoff et al., arXiv 2305.16264)."""


@dataclass(frozen=True)
class Prior:
    """What is believed about y = log(bits per byte - floor) before a proxy is run: mean and standard deviation of its slope
    over log tokens and over log arithmetic per token (size), of its curvature over tokens, of the change of the slope over
    tokens with size, and the deviation of its curvature over size (mean 0). ``misfit`` is what the form misses, ``far`` what
    it misses more for every unit of distance. With several ``scales``, all of it times each, and with several ``levels``,
    with a floor so much above the exact entropy, as the data prefers: what a model does not learn in the time it has."""

    tokens: tuple[float, float]
    size: tuple[float, float]
    curvature: tuple[float, float]
    interaction: tuple[float, float]
    size_curvature: float
    misfit: float
    far: float
    scales: tuple[float, ...] = (1.0,)
    levels: tuple[float, ...] = (0.0,)


TEXT = Prior((-0.11, 0.045), (-0.06, 0.045), (0.0, 0.05), (-0.07, 0.025), 0.04, 0.008, 0.005)
WITH_FLOOR = Prior(
    (-0.52, 0.06), (-0.1, 0.06), (0.15, 0.1), (-0.08, 0.06), 0.05, 0.028, 0.018, scales=(3.0, 6.0), levels=(0.0, 0.01, 0.02, 0.03, 0.05)
)  # fmt: skip
"""For a corpus whose exact entropy is known, and left out of y."""


@dataclass(frozen=True)
class Proxy:
    """A short run and how it ended. ``flops`` are those of its whole training; ``floor`` is the exact entropy of the
    validation documents, in bits per byte, where the corpus has one."""

    layers: int
    width: int
    parameters: int
    steps: int
    tokens: int
    flops: float
    bits_per_byte: float
    floor: float | None
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """What a run will score on its validation documents: the median and the interval that holds it in ``level`` of cases.
    ``last_proxy`` is the score of the proxy nearest to the run, which is what one would expect without a forecast;
    ``reach`` how many times more arithmetic the run takes than it. ``notes``: what is beyond what was validated."""

    bits_per_byte: float
    interval: tuple[float, float]
    level: float
    floor: float | None
    last_proxy: float
    reach: float
    proxies: list[Proxy]
    notes: list[str]

    def figures(self) -> dict[str, Any]:
        """The object under ``forecast`` of ``smalllm plan --forecast --json``."""
        rounded = {"bits_per_byte": round(self.bits_per_byte, 4), "interval": [round(end, 4) for end in self.interval]}
        return {**asdict(self), **rounded, "reach": round(self.reach, 2)}


def forecast(
    config: RunConfig, dataset: TokenDataset, flops: float, tell: Callable[[str], None] = lambda words: None
) -> Forecast:
    """Forecast a run with its vocabulary and ``train.steps`` from proxies of so much arithmetic each at most, in FLOP. With
    ``train.minutes`` the steps are taken as uncertain. UserError when there are too few proxies to say anything."""
    proxies = run_ladder(config, dataset, flops, tell)
    if len(proxies) < LEAST_PROXIES:
        raise UserError(
            f"{config.name} has {len(proxies)} proxies and a forecast needs {LEAST_PROXIES}: train it, if it is as short as"
            " its proxies would be; else give them more time with --proxy-seconds"
        )
    size, tokens = float(make_model(config).flops_per_token()), config.train.steps * config.train.batch_tokens
    spread = SPEED_SPREAD if config.train.minutes else 0.0
    low, median, high = np.quantile(
        predict(proxies, size, tokens, spread), [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2]
    ).tolist()
    last = max(proxies, key=lambda proxy: proxy.flops)
    reach = size * tokens / last.flops
    return Forecast(
        bits_per_byte=median, interval=(low, high), level=LEVEL, floor=last.floor, last_proxy=last.bits_per_byte,
        reach=reach, proxies=proxies, notes=_notes(config, dataset, tokens, reach),
    )  # fmt: skip


def _notes(config: RunConfig, dataset: TokenDataset, tokens: int, reach: float) -> list[str]:
    """What of this run is beyond what was validated."""
    parameters, notes = make_model(config).parameters_count(), []
    epochs, batch = tokens / max(1, dataset.train.tokens), config.train.batch_tokens
    fewer = f" (proxies have {LARGEST_BATCH:,} at most)" if batch > LARGEST_BATCH else ""
    for outside, words in (
        (not VALIDATED_PARAMETERS[0] <= parameters <= VALIDATED_PARAMETERS[1], f"{parameters:,} parameters"),
        (not VALIDATED_TOKENS[0] <= tokens <= VALIDATED_TOKENS[1], f"{tokens:,} tokens"),
        (reach > VALIDATED_REACH, f"{reach:.0f} times the arithmetic of the longest proxy"),
        (epochs > MANY_EPOCHS, f"{epochs:.1f} epochs of the data"),
        (not VALIDATED_BATCH[0] <= batch <= VALIDATED_BATCH[1], f"{batch:,} tokens a step{fewer}"),
    ):
        if outside:
            notes.append(f"outside of what the forecast was validated on: {words}")
    return notes


# ── the curve ──


def predict(
    proxies: Sequence[Proxy], size: float, tokens: float, spread: float = 0.0, draws: int = DRAWS
) -> np.ndarray:
    """Draws [draws] of the bits per byte of a run with so much arithmetic per token and so many tokens, whose logarithm has
    the standard deviation ``spread``. Seeded: the same proxies give the same draws."""
    loss = np.array([proxy.bits_per_byte for proxy in proxies])
    exact = proxies[0].floor or 0.0
    prior = TEXT if proxies[0].floor is None else WITH_FLOOR
    d = np.log([proxy.tokens / tokens for proxy in proxies])
    n = np.log([proxy.flops / proxy.tokens / size for proxy in proxies])
    fits = [
        _posterior(loss, exact * (1 + level), d, n, prior, scale, spread)
        for level in prior.levels
        for scale in prior.scales
    ]
    weights = np.exp([fit.evidence - max(fit.evidence for fit in fits) for fit in fits])
    random = np.random.default_rng(0)
    floor, mean, deviation, _ = np.array(fits)[random.choice(len(fits), draws, p=weights / weights.sum())].T
    told = floor + np.exp(mean + deviation * random.standard_normal(draws))
    return np.maximum(exact, told * (1 + SEED_SPREAD * random.standard_normal(draws)))


class _Posterior(NamedTuple):
    """Of y at the planned run above a floor, and the log of the evidence for what was assumed."""

    floor: float
    mean: float
    deviation: float
    evidence: float


def _posterior(
    loss: np.ndarray, floor: float, d: np.ndarray, n: np.ndarray, prior: Prior, scale: float, spread: float
) -> _Posterior:
    """Linear regression with normal priors and known noise. d and n, [proxies], are the logs of tokens and size relative to
    the run, where the form is its constant term."""
    above = np.maximum(loss - floor, 1e-3 * loss)
    y, seeds = np.log(above), SEED_SPREAD * loss / above
    features = np.stack([np.ones_like(d), d, n, d * d / 2, d * n, n * n / 2], axis=1)
    coefficients = np.array([
        (0.0, 3.0 / scale), prior.tokens, prior.size, prior.curvature, prior.interaction, (0.0, prior.size_curvature)
    ])  # fmt: skip
    expected, covariance = scale * coefficients[:, 0], np.diag((scale * coefficients[:, 1]) ** 2)
    noise = seeds**2 + scale**2 * (prior.misfit**2 + prior.far**2 * (d**2 + n**2))
    total = features @ covariance @ features.T + np.diag(noise)
    surprise, gain = y - features @ expected, covariance @ features.T
    mean = expected + gain @ np.linalg.solve(total, surprise)
    variance = (covariance - gain @ np.linalg.solve(total, gain.T))[0, 0] + (scale * prior.misfit) ** 2
    # Of the losses, not of their logarithms: these differ with the floor.
    evidence = -0.5 * (surprise @ np.linalg.solve(total, surprise) + np.linalg.slogdet(total)[1]) - y.sum()
    return _Posterior(floor, float(mean[0]), math.sqrt(variance + (mean[1] * spread) ** 2), float(evidence))


# ── the ladder ──


def run_ladder(
    config: RunConfig, dataset: TokenDataset, flops: float, tell: Callable[[str], None] = lambda words: None
) -> list[Proxy]:
    """The proxies of a planned run (with its vocabulary and ``train.steps``): those that take so much arithmetic at most, in
    FLOP, and any that are in the cache."""
    found = []
    for shape in shapes(config):
        for proxy_config in rungs(shape, config):
            known = _remembered(proxy_config, dataset)
            if known is None and _training_flops(proxy_config) > flops:
                break
            found.append(known or _run(proxy_config, dataset, tell))
    return found


def shapes(config: RunConfig) -> list[RunConfig]:
    """The planned shape and smaller ones with heads of the same width; each once, the smallest first."""
    model, found = config.model, {}
    for scale in SCALES:
        layers, heads = (
            min(model.layers, max(LEAST_LAYERS, round(scale * model.layers))),
            max(1, round(scale * model.heads)),
        )
        groups = max(1, round(heads * model.key_value_heads / model.heads))
        share = {"kv_heads": max(g for g in range(1, groups + 1) if heads % g == 0)} if model.kv_heads else {}
        if model.mlp_width:
            share["mlp_width"] = max(16, 16 * round(model.mlp_width * heads / model.heads / 16))
        changed = {"layers": layers, "heads": heads, "width": heads * model.head_width, **share}
        found[layers, heads] = config.replace(model=changed) if scale < 1 else config
    return sorted(found.values(), key=lambda smaller: make_model(smaller).flops_per_token())


def rungs(shape: RunConfig, config: RunConfig) -> Iterator[RunConfig]:
    """Proxies of a shape, each twice as long as the one before, none longer than the planned run or ``CLOSEST`` to it."""
    context, steps = config.model.context, FIRST_STEPS
    batch = min(config.train.batch_tokens, max(1, LARGEST_BATCH // context) * context)
    most_tokens = config.train.steps * config.train.batch_tokens
    most = most_tokens * make_model(config).flops_per_token() / CLOSEST / make_model(shape).flops_per_token()
    while steps * batch <= min(most, most_tokens):
        warmup = min(config.optim.warmup_steps, steps // 10)
        train = {
            "steps": steps, "minutes": 0.0, "batch_tokens": batch, "micro_batch": 0, "log_every": steps, "evaluate_every": steps,
            "evaluate_tokens": 1, "checkpoint_every": 0, "keep": 1, "milestones": False, "patience": 0, "sample_tokens": 0,
            "preflight": False, "track": "none",
        }  # fmt: skip
        yield shape.replace(train=train, optim={"warmup_steps": warmup}).model_copy(
            update={"name": "proxy", "seed": steps}
        )
        steps *= 2


def _training_flops(config: RunConfig) -> float:
    return float(make_model(config).flops_per_token() * config.train.steps * config.train.batch_tokens)


def _run(config: RunConfig, dataset: TokenDataset, tell: Callable[[str], None]) -> Proxy:
    """Train a proxy in a folder that is gone afterwards, and remember the result."""
    model, run = config.model, config.train
    tell(f"proxy of {model.layers} layers x {model.width}: {run.steps} steps of {run.batch_tokens} tokens")
    with tempfile.TemporaryDirectory(prefix="smalllm-proxy-") as folder:
        summary = train(config.replace(data={"path": str(dataset.folder)}), Path(folder) / "run", display=Silence())
    made, tokens = make_model(config), run.steps * run.batch_tokens
    proxy = Proxy(
        layers=model.layers, width=model.width, parameters=made.parameters_count(), steps=run.steps, tokens=tokens,
        flops=_training_flops(config), bits_per_byte=summary.valid_bits_per_byte,
        floor=summary.floor_bits_per_byte, seconds=summary.seconds,
    )  # fmt: skip
    with contextlib.suppress(OSError):  # a forecast without memory is one all the same
        _cache_file(config, dataset).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        FileSystem().replace(_cache_file(config, dataset), [json.dumps(asdict(proxy)).encode()])
    return proxy


def _remembered(config: RunConfig, dataset: TokenDataset) -> Proxy | None:
    try:
        return Proxy(**json.loads(content(_cache_file(config, dataset), LARGEST_CACHE)))
    except (OSError, ValueError, TypeError):
        return None


def _cache_file(config: RunConfig, dataset: TokenDataset) -> Path:
    """Named by what decides the result: the settings but where things lie, and the data."""
    settings = config.model_dump(mode="json", exclude={"name": True, "data": {"path"}})
    text = json.dumps([VERSION, settings, dataset.fingerprint], sort_keys=True)
    return cache_folder() / "proxies" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
