"""The promises of docs/reliability.md in short, each trial in processes of its own, as the documented command runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def tried(*options: str) -> list[dict]:
    """What `python tests/reliability --json` says."""
    done = subprocess.run([sys.executable, str(HERE), "--json", *options], capture_output=True, text=True, timeout=580)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def check_group(group: str, folder: Path) -> None:
    """Every trial of a group in short, without a failure."""
    outcomes = tried("--group", group, "--short", "--workers", "1", "--folder", str(folder))
    assert len(outcomes) > 1
    for outcome in outcomes:
        assert not outcome["failures"], f"{outcome['name']}: {outcome['failures'][0]['message']}"
        assert outcome["tries"], outcome["name"]


@pytest.mark.timeout(600)
def test_runs_and_checkpoints_keep_every_promise(tmp_path: Path):
    check_group("training", tmp_path)


@pytest.mark.timeout(600)
def test_a_run_of_several_ranks_survives_the_loss_of_one(tmp_path: Path):
    check_group("ranks", tmp_path)


def test_one_case_can_be_tried_again_and_unknown_names_are_refused(tmp_path: Path):
    assert [(o["name"], o["tries"]) for o in tried("T5:17", "--group", "training", "--folder", str(tmp_path))] == [
        ("T5", 1)
    ]
    done = subprocess.run([sys.executable, str(HERE), "T99"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "there is no trial T99" in done.stderr


@pytest.mark.parametrize("names", [("in_place", "unverified_digest"), pytest.param((), marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_wrong_ways_to_save_are_caught(names: tuple[str, ...]):
    """The trials on trial: all eight when slow tests run."""
    done = subprocess.run(
        [sys.executable, str(HERE / "mutants.py"), *names], capture_output=True, text=True, timeout=880
    )
    assert done.returncode == 0, done.stdout + done.stderr
