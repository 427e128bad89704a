"""Counters and histograms of a server, and their text for Prometheus. Labels are few and fixed by the caller's code, so
that no client can make them grow."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """How many observations were at most so large.

    >>> histogram = Histogram((0.1, 1.0))
    >>> for seconds in (0.05, 0.5, 9): histogram.observe(seconds)
    >>> print(*histogram.lines("x"), sep="\\n")
    x_bucket{le="0.1"} 1
    x_bucket{le="1"} 2
    x_bucket{le="+Inf"} 3
    x_sum 9.55
    x_count 3
    """

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """The lines of the exposition format."""
        total = 0
        for bound, count in zip((*(f"{bound:g}" for bound in self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.9g}"
        yield f"{name}_count {total}"


class Rate:
    """Things per second over the last seconds."""

    def __init__(self, window: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._window, self._clock, self._lock = window, clock, threading.Lock()
        self._seen: deque[tuple[float, int]] = deque()  # (second, things in its quarter)

    def add(self, count: int) -> None:
        """So many more, now."""
        now = self._clock()
        with self._lock:
            if self._seen and now - self._seen[-1][0] < 0.25:
                self._seen[-1] = (self._seen[-1][0], self._seen[-1][1] + count)
            else:
                self._seen.append((now, count))
                self._forget(now)

    def value(self) -> float:
        """The mean over the window."""
        with self._lock:
            self._forget(self._clock())
            return sum(count for _, count in self._seen) / self._window

    def _forget(self, now: float) -> None:
        while self._seen and self._seen[0][0] < now - self._window:
            self._seen.popleft()


class Meters:
    """What is counted."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # (route, status)
        self.tokens = 0
        self.failures = 0  # steps that raised
        self.refused = 0  # connections, at the door
        self.rate = Rate()
        self.first_token, self.request = Histogram(), Histogram()

    def exposition(self, gauges: dict[str, float]) -> str:
        """The page of GET /metrics; ``gauges`` are values of now."""
        lines = ["# TYPE smalllm_requests_total counter"]
        lines += [
            f'smalllm_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        for name, total in (
            ("tokens", self.tokens),
            ("step_failures", self.failures),
            ("refused_connections", self.refused),
        ):
            lines += [f"# TYPE smalllm_{name}_total counter", f"smalllm_{name}_total {total}"]
        for name, value in (gauges | {"tokens_per_second": round(self.rate.value(), 1)}).items():
            lines += [f"# TYPE smalllm_{name} gauge", f"smalllm_{name} {value:g}"]
        for name, histogram in (("time_to_first_token", self.first_token), ("request", self.request)):
            lines += [f"# TYPE smalllm_{name}_seconds histogram", *histogram.lines(f"smalllm_{name}_seconds")]
        return "\n".join(lines) + "\n"
