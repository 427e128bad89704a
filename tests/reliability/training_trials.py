"""Trials of runs, checkpoints and numbers."""

from __future__ import annotations

from smalllm.reliability import promises

TRIALS = [*promises.TRIALS]
