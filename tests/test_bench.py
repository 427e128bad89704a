"""`smalllm bench train`: what it prints, and that it measures the recipe's own step and nothing smaller."""

from __future__ import annotations

import json
import statistics
import threading
from pathlib import Path

import pytest
import torch
from conftest import tiny_settings
from test_generation import save_run

from smalllm import hardware
from smalllm.checkpoint import open_run
from smalllm.cli import run
from smalllm.config import load_recipe
from smalllm.data.batches import IGNORE
from smalllm.data.shards import TokenDataset
from smalllm.model import GPT
from smalllm.speed.training import STEPS, TrainingBench, random_data
from smalllm.training.trainer import train

TINY = [
    "model.layers=1", "model.width=32", "model.heads=2", "model.context=64", "train.batch_tokens=512", "train.micro_batch=2",
    "train.compile=off", "train.precision=fp32", "train.device=cpu",
]  # fmt: skip


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a peak that takes no time: 1 GFLOP/s."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hardware, "peak_flops", PeakOfPaper())
    return tmp_path


class PeakOfPaper:
    """Stands for ``hardware.peak_flops``, cache included."""

    def __call__(self, device: torch.device, dtype: torch.dtype, size: int = 0) -> float:
        return 1e9

    def cache_clear(self) -> None: ...


def batch_threads() -> set[threading.Thread]:
    """Those that make batches ahead."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("batches")}


def tiny_bench(folder: Path, *overrides: str) -> TrainingBench:
    return TrainingBench(load_recipe("quickstart", [*TINY, *overrides]), folder)


def test_json_holds_the_figures_of_the_contract(nowhere: Path, capsys: pytest.CaptureFixture):
    before = batch_threads()
    assert run(["bench", "train", "smolergpt-12m", *TINY, "--seconds", "0.1", "--json"]) == 0
    assert batch_threads() == before
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert list(figures) == [
        "tokens_per_second", "mfu", "peak_flops", "flops_per_token", "first_step_seconds", "memory_bytes",
    ]  # fmt: skip
    assert all(value > 0 for value in figures.values())
    config = load_recipe("smolergpt-12m", TINY).model
    assert figures["flops_per_token"] == GPT(config).flops_per_token()
    assert figures["peak_flops"] == 1e9
    assert figures["mfu"] == pytest.approx(figures["tokens_per_second"] * figures["flops_per_token"] / 1e9, abs=1e-4)
    assert "smolergpt-12m: 1 layers x 32 wide" in captured.err and list(nowhere.iterdir()) == []


def test_a_person_reads_a_table(nowhere: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert run(["bench", "train", *TINY, "--seconds", "0.01"]) == 0
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert [line.split("  ")[0] for line in captured.out.splitlines()] == [
        "speed", "MFU", "arithmetic", "first step", "memory", "a step", "machine",
    ]  # fmt: skip
    assert "of 1 GFLOP/s" in captured.out and "1 x 2 x 64 tokens" in captured.out
    assert "1 of the recipe's 4 micro-batches" in captured.out


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["train", "nosuch"], 1, "no recipe is called 'nosuch'"),
        (["train", "quickstart", "model.widht=3"], 1, "did you mean 'model.width'"),
        (["train", "--seconds", "0"], 1, "--seconds 0 must be"),
        (["train", "--seconds", "inf"], 1, "--seconds inf must be"),
        (["train", "--seconds", "soon"], 2, "soon"),
        (["cook"], 2, '"cook"'),
        ([], 2, "WHAT"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture):
    assert run(["bench", *words]) == code
    captured = capsys.readouterr()
    assert sentence in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_a_step_is_the_trainers_own(nowhere: Path):
    measured = tiny_bench(nowhere)
    before = {name: tensor.clone() for name, tensor in measured.trainer.model.state_dict().items()}
    measured.take(3)
    seconds, tokens = measured.step()
    assert seconds > 0 and tokens == 3 * 2 * 64 == measured.trainer.state.tokens
    after = measured.trainer.model.state_dict()
    assert measured.trainer.state.step == 1 and any(not torch.equal(before[name], after[name]) for name in before)


def test_micro_batches_and_compilation_are_chosen_for_the_whole_step(nowhere: Path):
    """The recipe's batch decides, although a measured step is a part of it."""
    measured = tiny_bench(nowhere, "train.micro_batch=0", "train.batch_tokens=65536")
    assert measured.trainer.config.train.batch_tokens == 65536
    assert measured.micro_batches == 1 and measured.trainer.micro_batch == 4096 // 64
    assert measured.recipe_micro_batches == 65536 // 4096


@pytest.mark.parametrize(("seconds", "micro_batches"), [(1e-9, 1), (10 * STEPS, 4), (2 * STEPS, 2)])
def test_a_step_has_as_many_micro_batches_as_fit(nowhere: Path, monkeypatch, seconds: float, micro_batches: int):
    """Steps that last a second for each micro-batch: at least five of them, and never more than the recipe's."""
    measured = tiny_bench(nowhere)
    monkeypatch.setattr(measured, "step", lambda: (float(measured.micro_batches), 128 * measured.micro_batches))
    speed = measured.speed(seconds)
    assert measured.micro_batches == micro_batches and speed.tokens_per_second == 128.0
    assert measured.steps == max(STEPS, -(-seconds // micro_batches))


def test_figures_are_medians_of_the_steps(nowhere: Path, monkeypatch):
    measured = tiny_bench(nowhere)
    took = [9.0, 1.0, 1.0, 2.0, 4.0, 50.0, 1.0]  # the first two are not measured
    monkeypatch.setattr(measured, "step", lambda seconds=iter(took): (next(seconds), 100))
    assert measured.speed(1e-9).tokens_per_second == statistics.median(100 / each for each in took[2:]) == 50.0


def test_every_random_token_is_a_target(tmp_path: Path):
    dataset = TokenDataset.open(random_data(tmp_path / "data", vocab_size=70_000, context=64))
    documents = list(dataset.train.iterate_documents())
    assert {len(document) for document in documents} == {65} and dataset.manifest.vocab_size == 70_000
    assert max(int(document.max()) for document in documents) > 65_536
    measured = tiny_bench(tmp_path / "bench")
    batch = next(measured.trainer.batches.micro_batches(0, 2))
    assert batch.inputs.shape == (2, 64) and not bool((batch.targets == IGNORE).any())


def test_random_data_is_the_same_again(tmp_path: Path):
    folders = [random_data(tmp_path / name, 300, 16) for name in ("a", "b")]
    assert len({TokenDataset.open(folder).fingerprint for folder in folders}) == 1


# ── decode ──


@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_a_recipe_prints_the_figures_of_the_contract(batch: int, nowhere: Path, capsys: pytest.CaptureFixture):
    words = ["bench", "decode", "quickstart", "model.layers=1", "--batch", str(batch), "--seconds", "0.1", "--json"]
    assert run(words) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures) == ["tokens_per_second", "batch", "dtype", "first_token_seconds"]
    assert figures["tokens_per_second"] > 0 and figures["batch"] == batch and figures["first_token_seconds"] > 0
    assert list(nowhere.iterdir()) == []


@pytest.mark.parametrize("weights", ["auto", "fp32"])
def test_decoding_a_run_measures_its_own_model(
    weights: str, tiny, nowhere: Path, capsys: pytest.CaptureFixture, native: None
):
    train(tiny(train={"steps": 1}), nowhere / "runs/tiny")
    capsys.readouterr()
    assert run(["bench", "decode", "--seconds", "0.1", "--weights", weights]) == 0  # the newest run
    out = capsys.readouterr().out
    assert f"{open_run(nowhere / 'runs/tiny').model.parameters_count():,} parameters" in out
    assert ("int8" if weights == "auto" else "fp32") in out and "one text, 16 tokens long" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["decode", "--batch", "0"], "--batch 0 must be 1 to 1024"),
        (["decode", "nonesuch"], "there is no run at"),
        (["train", "--batch", "4"], "belongs to bench decode"),
        (["decode", "quickstart", "model.widht=3"], "did you mean 'model.width'"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(
    words: list[str], sentence: str, nowhere: Path, capsys: pytest.CaptureFixture
):
    assert run(["bench", *words]) == 1
    assert sentence in capsys.readouterr().err


def test_a_run_is_measured_as_it_is(tiny, nowhere: Path, capsys: pytest.CaptureFixture):
    train(tiny(train={"steps": 1}), nowhere / "run")
    assert run(["bench", "decode", "run", "model.layers=3"]) == 1
    assert "model.layers=3 cannot change the model of a run" in capsys.readouterr().err


def test_bench_prepare_says_how_fast_text_becomes_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "prepare", "quickstart", "data.vocab_size=512", "--seconds", "0.3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.keys() == {"megabytes_per_second", "bytes", "documents", "tokens", "vocab_size", "seconds"}
    assert 290_000 < told["bytes"] < 320_000 and told["vocab_size"] == 512 and told["documents"] > 200
    assert told["megabytes_per_second"] == pytest.approx(told["bytes"] / told["seconds"] / 1e6, rel=0.1)
    assert run(["bench", "prepare", "data.vocab_size=512", "--seconds", "0.3"]) == 0
    assert "MB/s" in capsys.readouterr().out


def test_bench_serve_asks_a_server_of_its_own(
    tmp_path: Path, dataset_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path / "run", tiny_settings(dataset_folder), step=4)
    assert run(["bench", "serve", str(tmp_path / "run"), "--batch", "3", "--seconds", "0.5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["clients"], told["tokens"]) == (3, 24)
    assert (
        told["tokens_per_second"] == pytest.approx(24 * told["requests_per_second"], rel=0.1)
        and told["tokens_per_second"] > 0
    )
    assert 0 < told["first_token_seconds"] <= told["first_token_seconds_95"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve", "quickstart"], "a recipe has no weights to serve"),
        (["serve", "no-such-run"], "no-such-run"),
        (["prepare", "--batch", "4"], "--batch belongs to bench decode and serve"),
        (["serve", "--weights", "int8"], "--weights belongs to bench decode"),
    ],
)
def test_bench_refuses_in_a_sentence(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["bench", *words]) == 1
    assert said in capsys.readouterr().err
