"""The log survives crashes; throughput counts steps; a dead tracker never stops training."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from smalllm.config import UserError
from smalllm.metrics import MetricsLog, Sinks, Throughput, model_flops_utilization, read_records


def test_one_object_per_line_and_no_nan_in_json(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": 2.5, "norm": math.nan, "top": math.inf})
    log.append({"step": 2})
    lines = log.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 2.5, "norm": None, "top": None}, {"step": 2}]


def test_a_torn_line_and_strangers_are_passed_over(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[1]\n{"x": 2}\n\xff\xfe\n{"step": 2}\n{"step": 3, "lo')
    assert [record["step"] for record in read_records(path)] == [1, 2]
    MetricsLog(path).rewind(1)
    assert path.read_bytes() == b'{"step": 1}\n'
    assert list(read_records(tmp_path / "missing")) == []


def test_throughput_by_hand():
    now = [0.0]
    timer = Throughput(lambda: now[0])
    timer.add(50.0, 100)  # the first step compiles and does not count
    assert timer.tokens_per_second() == 2.0
    timer.add(1.0, 100)
    timer.add(3.0, 100)
    assert timer.tokens_per_second() == 50.0 and timer.seconds_per_step() == 2.0 and timer.seconds_per_token() == 0.02
    timer.start_window()
    assert timer.tokens_per_second() == 50.0
    timer.add(1.0, 500)
    assert timer.tokens_per_second() == 500.0


def test_a_resumed_timer_goes_on_as_the_one_before_and_does_not_mind_a_slow_first_step():
    now = [100.0]
    before = Throughput(lambda: now[0])
    for tokens in (10, 20, 30, 40):
        before.add(2.0, tokens)
    assert before.due_to_plan(40.0)
    now[0] += 0.5
    after = Throughput(lambda: now[0])
    after.restore(json.loads(json.dumps(before.to_json())))
    assert after.seconds_per_token() == before.seconds_per_token() == 6.0 / 90
    before.add(2.0, 50)
    after.add(70.0, 50)  # compiles again
    assert after.seconds_per_token() == before.seconds_per_token() and after.seconds_per_step() == 2.0
    assert not after.due_to_plan(40.0)
    now[0] += 0.5
    assert after.due_to_plan(40.0)


def test_planning_is_due_after_three_steps_and_then_every_fortieth_of_the_budget():
    now = [0.0]
    timer = Throughput(lambda: now[0])
    due = []
    for _ in range(5):
        timer.add(1.0, 1)
        due.append(timer.due_to_plan(40.0))
    assert due == [False, False, True, False, False]
    now[0] += 1.0
    assert timer.due_to_plan(40.0)


def test_mfu_by_hand():
    assert model_flops_utilization(1000.0, 6_000_000, 12e9) == 0.5


def test_a_tracker_that_raises_is_dropped_with_one_line(tmp_path: Path):
    notes: list[str] = []
    sinks = Sinks("none", tmp_path, "run", {}, notes.append)
    written = []

    def broken(record: dict) -> None:
        raise RuntimeError("the server is gone")

    sinks.writers = [("broken", broken), ("good", written.append)]
    sinks.write({"step": 1})
    sinks.write({"step": 2})
    assert notes == ["broken failed and is off from now on: the server is gone"]
    assert written == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(("kind", "package"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_tracker_says_how_to_install_it(
    kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=f"train.track = {kind} needs a package that is not installed; run: uv sync --extra track"
    ):
        Sinks(kind, tmp_path, "run", {}, print)


def test_trackers_are_off_and_not_imported_by_default(tmp_path: Path):
    assert Sinks("none", tmp_path, "run", {}, print).writers == []
    assert "wandb" not in sys.modules and "tensorboard" not in sys.modules
