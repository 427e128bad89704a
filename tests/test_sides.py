"""Sides: who stands with whom, which documents are fair, and the command that compares."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from conftest import tiny_settings
from test_generation import save_run

from smalllm import cli
from smalllm.config import RunConfig, UserError
from smalllm.data import storyworld
from smalllm.data.prepare import prepare
from smalllm.judging.sides import form_sides, shared_documents


def settings(data: Path, seed: int = 1, width: int = 32) -> RunConfig:
    config = tiny_settings(data, model={"width": width, "heads": 4, "context": 32})
    return config.model_copy(update={"seed": seed})


def make(folder: Path, name: str, data: Path, seed: int = 1, width: int = 32) -> str:
    return str(save_run(folder / name, settings(data, seed, width), step=5, seed=seed))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, dataset_folder: Path) -> dict[str, str]:
    """Two settings with two seeds each."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: make(folder, name, dataset_folder, seed, width)
        for name, seed, width in (("thin-1", 1, 32), ("thin-2", 2, 32), ("wide-1", 1, 48), ("wide-2", 2, 48))
    }


def names(sides: list) -> list[tuple[str, list[str]]]:
    return [(side.name, [member.name for member in side.entrants]) for side in sides]


def test_two_runs_are_two_sides_whatever_they_are(runs: dict[str, str]) -> None:
    assert names(form_sides([runs["thin-1"], runs["thin-2"]])) == [("thin-1", ["thin-1"]), ("thin-2", ["thin-2"])]
    assert len(form_sides([runs["thin-1"], runs["thin-1"]])) == 2


def test_more_are_put_together_by_their_settings(runs: dict[str, str]) -> None:
    found = names(form_sides([runs["wide-1"], runs["thin-1"], runs["wide-2"], runs["thin-2"]]))
    assert found == [("wide", ["wide-1", "wide-2"]), ("thin", ["thin-1", "thin-2"])]


def test_against_says_it_explicitly(runs: dict[str, str]) -> None:
    found = names(form_sides([runs["thin-1"], runs["wide-2"]], [runs["thin-2"], runs["wide-1"]]))
    assert found == [("thin-1 + wide-2", ["thin-1", "wide-2"]), ("thin-2 + wide-1", ["thin-2", "wide-1"])]


def test_no_two_sides_is_said(runs: dict[str, str], tmp_path: Path, dataset_folder: Path) -> None:
    third = make(tmp_path, "thin-3", dataset_folder, seed=3)
    with pytest.raises(UserError, match="same settings and data.*--against"):
        form_sides([runs["thin-1"], runs["thin-2"], third])
    with pytest.raises(UserError, match="1 run is nothing to compare"):
        form_sides([runs["thin-1"]])
    copy = make(tmp_path, "thin-copy", dataset_folder, seed=1)
    with pytest.raises(UserError, match="same settings and the same seed 1"):
        form_sides([runs["thin-1"], copy, runs["wide-1"]])
    with pytest.raises(UserError, match="named twice"):
        form_sides([runs["thin-1"], runs["thin-1"]], [runs["wide-1"]])


def test_checkpoints_of_a_run_can_be_sides(runs: dict[str, str]) -> None:
    step = f"{runs['thin-1']}/checkpoints/step-00000005"
    assert [side.name for side in form_sides([runs["wide-1"], step])] == ["wide-1", "thin-1 step 5"]


# ── documents ──


def texts_file(path: Path, texts: list[str]) -> Path:
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return path


def test_the_validation_documents_of_equal_data_are_fair(runs: dict[str, str]) -> None:
    found = shared_documents(form_sides(list(runs.values())), limit=5)
    assert len(found.texts) == 5 and found.notes == () and found.origin == "validation documents of thin-1"


def test_a_run_that_learned_the_documents_is_refused(tmp_path: Path) -> None:
    """The same stories split in another way: most validation documents of one are training documents of the other."""
    stories = list(itertools.islice(storyworld.stories(seed=5), 300))
    source = texts_file(tmp_path / "all.txt", stories)
    for seed in (1, 2):
        prepare([str(source)], tmp_path / f"data{seed}", vocab_size=400, seed=seed, valid_fraction=0.2)
    pair = [make(tmp_path, f"run{seed}", tmp_path / f"data{seed}", seed) for seed in (1, 2)]
    with pytest.raises(UserError, match=r"run2 was trained on \d+ of the \d+ documents.*--text"):
        shared_documents(form_sides(pair))


def test_a_few_learned_documents_are_left_out(runs: dict[str, str], tmp_path: Path, dataset_folder: Path) -> None:
    from smalllm.data.shards import TokenDataset

    dataset = TokenDataset.open(dataset_folder)
    learned = dataset.tokenizer().decode(next(dataset.train.iterate_documents()).tolist())
    fresh = list(itertools.islice(storyworld.stories(seed=99), 150))
    file = texts_file(tmp_path / "mixed.txt", [*fresh[:70], learned, *fresh[70:]])
    found = shared_documents(form_sides([runs["thin-1"], runs["wide-1"]]), str(file))
    assert learned not in found.texts and len(found.texts) == 150
    assert found.notes == ("1 documents were left out because a run was trained on them",)


def test_data_that_is_gone_is_said(tmp_path: Path, dataset_folder: Path, runs: dict[str, str]) -> None:
    import shutil

    shutil.copytree(dataset_folder, tmp_path / "gone")
    lost = make(tmp_path, "lost", tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    file = texts_file(tmp_path / "fresh.txt", list(itertools.islice(storyworld.stories(seed=98), 20)))
    found = shared_documents(form_sides([runs["thin-1"], lost]), str(file))
    assert found.notes == ("the data of lost is gone, so it cannot be told whether it was trained on these documents",)
    with pytest.raises(UserError, match="validation documents of .*lost cannot be read.*--text FILE"):
        shared_documents(form_sides([lost, runs["thin-1"]]))


# ── the command ──


def test_the_command_prints_the_contract(runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = texts_file(tmp_path / "fresh.txt", list(itertools.islice(storyworld.stories(seed=97), 15)))
    assert cli.run(["compare", *runs.values(), "--text", str(file), "--device", "cpu", "--json"]) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert set(result) >= {"difference", "interval", "verdict"} and result["documents"] == 15
    assert result["sides"] == ["thin", "wide"] and result["seeds"] == [2, 2] and result["about"] == "settings"
    assert "scoring 15 documents by thin-1" in told.err


def test_the_command_for_people(runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = texts_file(tmp_path / "fresh.txt", list(itertools.islice(storyworld.stories(seed=97), 12)))
    words = ["compare", runs["thin-1"], "--against", runs["wide-1"], "--text", str(file), "--device", "cpu"]
    assert cli.run(words) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "12 documents" in told and "bits per byte" in told and "than thin-1" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "0"], "limit = 0"),
        (["--smallest", "-1"], "smallest = -1"),
        (["--limit", "4"], "4 documents are too few"),
    ],
)
def test_mistakes_are_sentences(
    runs: dict[str, str], words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert cli.run(["compare", runs["thin-1"], runs["wide-1"], "--device", "cpu", *words]) == 1
    assert message in capsys.readouterr().err
