"""Contenders that take turns, each in a process of its own for the whole run.

In one process they would share threads, allocators and OpenMP (llama.cpp decodes at a third of its speed in a process that
has loaded torch). A contender says with a line of JSON that it is ready, then answers every line with a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from operator import truediv
from pathlib import Path
from statistics import median
from typing import IO, Any

from smalllm.config import UserError

SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Would keep a contender that waits busy, so they are taken from its environment."""


class Racer:
    """A contender's process, as seen from the one that measures."""

    def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
        self.name, self.answers = name, list[dict[str, Any]]()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read when the process fails)
        self.process = subprocess.Popen(
            command, env=environment(threads), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer to one question."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, and ``_answer`` tells why
            print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._answer()

    def turn(self, question: Mapping[str, Any]) -> None:
        """Ask, and remember the answer."""
        self.answers.append(self.ask(question))

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            words = self.log.read().strip().splitlines()[-3:]
            raise UserError(f"{self.name} failed: {' / '.join(words)}")
        return json.loads(line)

    def close(self) -> None:
        """It ends when nothing more comes in, or is ended."""
        with self.log, suppress(BrokenPipeError), self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()


def environment(threads: int) -> dict[str, str]:
    """For a contender that has so many threads."""
    kept = {key: value for key, value in os.environ.items() if key not in SPINNING}
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}


def own_output() -> IO[str]:
    """Standard output for answers alone: what a library prints goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def answer_questions(
    ready: Mapping[str, Any], answer: Callable[[dict[str, Any]], Mapping[str, Any]], out: IO[str]
) -> None:
    """The life of a contender's process."""
    print(json.dumps(ready), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)


def race(racers: Sequence[Racer], question: Mapping[str, Any], repeats: int) -> None:
    """A turn each in every round; nobody always follows the same one."""
    for number in range(repeats):
        first = number % len(racers)
        for racer in [*racers[first:], *racers[:first]]:
            racer.turn(question)


def ratio(rates: Sequence[float], base: Sequence[float]) -> float:
    """How many times as fast as the base: the median of the ratios inside a round, which a drifting machine leaves alone."""
    return median(map(truediv, rates, base))
