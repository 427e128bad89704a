"""Is one side better than the other, or was it luck? Paired over documents, with the variance between seeds where it
is known.

y[r, d] are the bits of run r on document d, s[d] its bytes. A run's bits per byte are sum(y[r]) / sum(s), those of a
side the mean over its runs, and the difference is the second side minus the first: negative where the second is
better. Two things would come out otherwise next time:

- the documents. Both sides score the same ones, so what is drawn anew is the difference on a document: a paired
  bootstrap of sum(mean y second - mean y first) / sum(s), with percentiles that are expanded as for Student's t
  (Hesterberg 2015, "What teachers should know about the bootstrap", The American Statistician 69; arXiv 1411.5279),
  because those of few documents are too near to each other.
- the seeds, when a side has two runs or more. v is the pooled variance of runs about the mean of their side, with n1
  + n2 - 2 degrees of freedom, and the half width is t * sqrt(v / n1 + v / n2).

The half widths of both are combined as the root of the sum of their squares, below and above the difference each
(MOVER: Zou 2008, American Journal of Epidemiology 168, 212-224). It is the crossed random effects "run within side"
and "document" (Baayen et al. 2008, Journal of Memory and Language 59, 390-412), each with its own Student's t. The
interaction of run and document is in both parts, which errs on the side of caution. A two-level bootstrap is not
used: with two or three seeds it has nothing to draw from, and its intervals are too short (Bouthillier et al. 2021,
arXiv 2103.03098, on why seeds must count at all).

The module knows arrays; which runs and documents they came from is known to `sides`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from smalllm.config import UserError

RESAMPLES = 4000
DRAWS_AT_ONCE = 1 << 20  # indices that the bootstrap holds at once: 8 MB
LEAST_DOCUMENTS = 10
ERROR = 0.05
"""How often the interval may miss the difference."""
STRICT = 0.01
"""How often ``real`` may be said of nothing. Stricter than the interval, since people make many comparisons and tell
of one."""
POWER = 0.8
MOST_SEEDS = 1000
SMALLEST = 0.01
"""Share of the bits per byte below which nobody minds a difference."""
MANY = 1000  # degrees of freedom from which Student's t is taken for normal: 1.962 and 1.960


@dataclass(frozen=True)
class Comparison:
    """What can be said about second minus first, in bits per byte: the 95 % interval, and the 99 % one of which the
    verdict is made. Standard errors are those of the two sources of luck; that of the seeds is None where no side has
    two. ``smallest`` is where a difference begins to matter. ``needed`` counts are for a difference of ``sought`` to
    be found in four of five tries: seeds of each side, with these documents; documents, if the seeds were known
    exactly. None: not known, or never.
    """

    difference: float
    interval: tuple[float, float]
    strict_interval: tuple[float, float]
    verdict: str
    relative: float
    seeds: tuple[int, int]
    documents: int
    error_of_documents: float
    error_of_seeds: float | None
    smallest: float
    sought: float
    seeds_needed: int | None
    documents_needed: int | None

    @property
    def real(self) -> bool:
        return self.verdict == "real"

    @property
    def about(self) -> str:
        """Whether the verdict is one about the settings, or only about these two models."""
        return "settings" if self.error_of_seeds is not None else "models"


def compare(
    first: np.ndarray, second: np.ndarray, sizes: np.ndarray, *, smallest: float = SMALLEST, comparisons: int = 1
) -> Comparison:
    """Compare bits [runs, documents] of two sides on documents of ``sizes`` bytes; UserError for too few documents.

    ``smallest`` is a share of the first side's bits per byte. The verdict is ``real`` (the strict interval leaves out
    0); else, when seeds are known, it reaches beyond the smallest difference and more seeds can help, ``N more seeds
    needed`` (of each side); else ``not distinguishable``. With several ``comparisons`` all their intervals hold
    together (Bonferroni).
    """
    _check(first, second, sizes)
    per_document = second.mean(axis=0) - first.mean(axis=0)
    level, ahead = float(first.mean(axis=0).sum() / sizes.sum()), float(per_document.sum() / sizes.sum())
    luck = _Luck(ahead, resampled(per_document, sizes), len(sizes), *variance_of_seeds(first, second, sizes))
    seeds, sought = (len(first), len(second)), max(smallest * level, abs(ahead))
    strict, spread = luck.interval(STRICT / comparisons, *seeds), float(luck.documents.std())
    needed = seeds_needed(sought, luck.variance, spread, STRICT / comparisons) if luck.freedom else None
    return Comparison(
        difference=ahead, interval=luck.interval(ERROR / comparisons, *seeds), strict_interval=strict,
        verdict=_verdict(*strict, smallest * level, needed, min(seeds)), relative=ahead / level, seeds=seeds,
        documents=len(sizes), error_of_documents=spread,
        error_of_seeds=math.sqrt(luck.variance / seeds[0] + luck.variance / seeds[1]) if luck.freedom else None,
        smallest=smallest * level, sought=sought, seeds_needed=needed,
        documents_needed=_documents_needed(sought, spread, len(sizes), STRICT / comparisons),
    )  # fmt: skip


def against_first(sides: Sequence[np.ndarray], sizes: np.ndarray, smallest: float = SMALLEST) -> list[Comparison]:
    """Every other side against the first."""
    return [compare(sides[0], side, sizes, smallest=smallest, comparisons=len(sides) - 1) for side in sides[1:]]


@dataclass(frozen=True)
class _Luck:
    """Where the difference might have come out: over documents drawn anew, and over seeds."""

    ahead: float
    documents: np.ndarray  # [RESAMPLES]
    count: int
    variance: float
    freedom: int

    def interval(self, error: float, n1: int, n2: int) -> tuple[float, float]:
        """What misses the difference in a share ``error`` of cases."""
        low, high = expanded_percentiles(self.documents, self.count, error)
        if not self.freedom:
            return low, high
        of_seeds = student(1 - error / 2, self.freedom) * math.sqrt(self.variance / n1 + self.variance / n2)
        return self.ahead - math.hypot(self.ahead - low, of_seeds), self.ahead + math.hypot(high - self.ahead, of_seeds)


def _check(first: np.ndarray, second: np.ndarray, sizes: np.ndarray) -> None:
    assert first.shape[1] == second.shape[1] == len(sizes), "sides must score the same documents"
    if len(sizes) < LEAST_DOCUMENTS:
        raise UserError(
            f"{len(sizes)} documents are too few to tell a difference from luck; give {LEAST_DOCUMENTS} or more, hundreds if"
            " you can (in a .txt file a line <|endoftext|> separates them)"
        )


def _verdict(low: float, high: float, smallest: float, needed: int | None, seeds: int) -> str:
    if low > 0 or high < 0:
        return "real"
    if needed is not None and needed > seeds and not -smallest < low <= high < smallest:
        return f"{needed - seeds} more seeds needed"
    return "not distinguishable"


# ── documents ──


def resampled(differences: np.ndarray, sizes: np.ndarray, seed: int = 0) -> np.ndarray:
    """sum(differences) / sum(sizes), both [documents], of documents drawn anew with replacement, RESAMPLES times."""
    generator, count = np.random.default_rng(seed), len(sizes)
    at_once = max(1, DRAWS_AT_ONCE // count)
    ratios = []
    for start in range(0, RESAMPLES, at_once):
        drawn = generator.integers(count, size=(min(at_once, RESAMPLES - start), count))
        ratios.append(differences[drawn].sum(axis=1) / np.maximum(sizes[drawn].sum(axis=1), 1))
    return np.concatenate(ratios)


def expanded_percentiles(ratios: np.ndarray, documents: int, error: float) -> tuple[float, float]:
    """The percentiles of a bootstrap that cover what Student's t covers (Hesterberg 2015)."""
    reach = math.sqrt(documents / (documents - 1)) * student(1 - error / 2, documents - 1)
    tail = 100 * NormalDist().cdf(-reach)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return float(low), float(high)


# ── seeds ──


def variance_of_seeds(first: np.ndarray, second: np.ndarray, sizes: np.ndarray) -> tuple[float, int]:
    """Pooled variance of the bits per byte of runs about the mean of their side, and its degrees of freedom, 0 where
    no side has two runs.

    >>> variance_of_seeds(np.array([[1.0], [3.0]]), np.array([[4.0], [6.0]]), np.array([1]))
    (2.0, 2)
    """
    sides = [side.sum(axis=1) / sizes.sum() for side in (first, second)]
    freedom = sum(len(side) - 1 for side in sides)
    squares = sum(float(((side - side.mean()) ** 2).sum()) for side in sides)
    return (squares / freedom, freedom) if freedom else (0.0, 0)


# ── power ──


def seeds_needed(sought: float, variance: float, error_of_documents: float, error: float = STRICT) -> int | None:
    """Seeds of each side with which a true difference of ``sought`` is found in four of five tries; None above 1,000
    and where the documents alone hide it. With n on each side the half width of the interval is sqrt(t² · 2 v / n +
    z² · e²), and the standard error sqrt(2 v / n + e²), of which POWER wants 0.84 more.

    >>> seeds_needed(1.0, variance=1.0, error_of_documents=0.0, error=0.05)  # the textbook's
    17
    """
    if _shortest_sight(MOST_SEEDS, variance, error_of_documents, error) > sought:
        return None
    few, enough = 1, MOST_SEEDS
    while enough - few > 1:
        middle = (few + enough) // 2
        far = _shortest_sight(middle, variance, error_of_documents, error) > sought
        few, enough = (middle, enough) if far else (few, middle)
    return enough


def _shortest_sight(n: int, variance: float, error_of_documents: float, error: float) -> float:
    """The smallest difference that n seeds of each side find in four of five tries."""
    normal, of_seeds = NormalDist(), math.sqrt(2 * variance / n)
    z = normal.inv_cdf(1 - error / 2)
    half = math.hypot(student(1 - error / 2, 2 * n - 2) * of_seeds, z * error_of_documents)
    return half + normal.inv_cdf(POWER) * math.hypot(of_seeds, error_of_documents)


def _documents_needed(sought: float, error_of_documents: float, documents: int, error: float) -> int | None:
    """Documents with which ``sought`` is found in four of five tries, seeds aside; never fewer than LEAST_DOCUMENTS."""
    if sought <= 0:
        return None
    normal = NormalDist()
    reach = normal.inv_cdf(1 - error / 2) + normal.inv_cdf(POWER)
    return max(LEAST_DOCUMENTS, math.ceil(documents * (reach * error_of_documents / sought) ** 2))


def student(probability: float, freedom: int) -> float:
    """The quantile of Student's t for a whole number of degrees of freedom, by halving (no SciPy for one number).

    >>> [round(student(0.975, freedom), 3) for freedom in (1, 2, 3, 10, 30)]
    [12.706, 4.303, 3.182, 2.228, 2.042]
    """
    if freedom >= MANY:
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return high


def _student_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0 (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    angle, odd = math.atan2(t, math.sqrt(freedom)), freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return 0.5 + inside / 2
