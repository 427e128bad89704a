"""Pictures of curves: places on every axis, floors, text that stays text, names that try to be formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import tiny_settings

from smalllm import cli
from smalllm.checkpoint import RunFolder
from smalllm.config import UserError
from smalllm.plots import axis, floor, plot_runs, read_run, series, table

RECORDS = [
    {"step": 10, "tokens": 1000, "seconds": 60, "train_loss": 3.0, "lr": 0.1},
    {"step": 20, "tokens": 2000, "seconds": 120.0, "train_loss": None, "valid_bits_per_byte": 1.5, "lr": True},
    {"step": 30, "train_loss": 2.0},
]


def make_run(folder: Path, data: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(tiny_settings(data).to_toml(), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
    return folder


def test_series_by_hand() -> None:
    assert series(RECORDS, "train_loss") == ([10, 30], [3.0, 2.0])
    assert series(RECORDS, "train_loss", "tokens") == ([1000], [3.0])
    assert series(RECORDS, "valid_bits_per_byte", "time") == ([2.0], [1.5])
    assert series(RECORDS, "lr") == ([10], [0.1])


def test_axes_have_names() -> None:
    assert [axis(name) for name in ("step", "tokens", "time")] == ["step", "tokens", "time"]
    with pytest.raises(UserError, match="--x hours is not known; use step, tokens, time"):
        axis("hours")


def test_an_svg_has_text_and_floor(tmp_path: Path, dataset_folder: Path) -> None:
    runs = [make_run(tmp_path / name, dataset_folder) for name in ("_a$x$", "b & <c>")]
    drawn = plot_runs(runs, tmp_path / "two.svg", "time", {"floor": 0.75}).read_text(encoding="utf-8")
    for words in ("minutes", "floor 0.750", "a$x$", "b &amp; &lt;c&gt;", "learning rate"):
        assert words in drawn, words


def test_the_floor_is_the_entropy_of_the_validation_documents(tmp_path: Path, dataset_folder: Path) -> None:
    found = floor(make_run(tmp_path / "run", dataset_folder))
    assert found is not None and 0.1 < found < 1
    assert floor(make_run(tmp_path / "lost", tmp_path / "nowhere")) is None


def test_the_command_draws_and_tells(tmp_path: Path, dataset_folder: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [str(make_run(tmp_path / name, dataset_folder)) for name in ("a", "b")]
    assert cli.run(["plot", *runs, "--x", "tokens", "--out", str(tmp_path / "two.svg")]) == 0
    assert "drawn in" in capsys.readouterr().out
    drawn = (tmp_path / "two.svg").read_text(encoding="utf-8")
    assert drawn.count(">floor 0.") == 1 and ">tokens<" in drawn  # one, as both have the same data


def test_a_run_without_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no metrics yet"):
        read_run(RunFolder(tmp_path).path)


def test_the_table_has_the_evaluations(tmp_path: Path, dataset_folder: Path) -> None:
    lines = table(make_run(tmp_path / "run", dataset_folder)).splitlines()
    assert lines[0] == "run" and len(lines) == 3 and "1.5000" in lines[2]
