"""Several processes train one model: the same losses as one, nothing lost when one dies, one sentence when they disagree."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import wait_for
from ranked import Group, run_ranks

from smalllm.checkpoint import RunFolder
from smalllm.config import UserError, parse_config
from smalllm.metrics import read_records
from smalllm.model import GPT
from smalllm.ranks import ALONE, RankLost, Ranks, joined, local
from smalllm.reliability.promises import check_same, make_data, settings
from smalllm.runtime import Runtime, fit_memory, make_runtime, seed_everything, step_memory
from smalllm.training.guards import TrainingFailure
from smalllm.training.setting_out import divisible
from smalllm.training.trainer import Trainer, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_data(folder)
    return folder / "data"


def losses(run: Path) -> list[float]:
    return [record["train_loss"] for record in read_records(RunFolder(run).metrics_file)]


def assert_close(run: Path, other: Path, relative: float = 1e-6) -> None:
    assert len(losses(run)) == len(losses(other)) > 5
    assert losses(run) == pytest.approx(losses(other), rel=relative)


# ── one run, cut in different ways ──


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_and_accumulation_give_the_same_losses(parallel: str, data: Path, tmp_path: Path):
    for world, micro_batch in ((1, 2), (2, 2), (4, 2)):
        config = settings(data, steps=20, micro_batch=micro_batch, parallel=parallel)
        if world == 1:
            train(config, tmp_path / "1")
        else:
            run_ranks(world, config, tmp_path / str(world))
            assert_close(tmp_path / str(world), tmp_path / "1")
    weights = [RunFolder(tmp_path / name).choose("latest").weights() for name in ("1", "2", "4")]
    for name, tensor in weights[0].items():
        for other in weights[1:]:
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_muon_shares_its_matrices_out(parallel: str, data: Path, tmp_path: Path):
    """Its iterations are bfloat16, which makes much of a last bit: hence a wider tolerance than for AdamW."""
    config = settings(data, "muon", steps=10, micro_batch=2, parallel=parallel)
    train(config, tmp_path / "1")
    run_ranks(3 if parallel == "ddp" else 2, config, tmp_path / "2")
    assert_close(tmp_path / "2", tmp_path / "1", relative=1e-4)


def test_uneven_shares(data: Path, tmp_path: Path):
    config = settings(data, steps=8, batch_tokens=7 * 32, micro_batch=2)
    train(config, tmp_path / "1")
    run_ranks(3, config, tmp_path / "3")
    assert_close(tmp_path / "3", tmp_path / "1")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_resumed_by_another_number_of_ranks(parallel: str, data: Path, tmp_path: Path):
    straight, run = tmp_path / "straight", tmp_path / "run"
    config = settings(data, steps=20, micro_batch=2, parallel=parallel)
    train(config, straight)
    for world, steps in ((1, 5), (2, 10), (4, 15), (1, 20)):
        part = config.replace(train={"steps": steps})
        part = part.replace(optim={"schedule": "constant"})
        run_ranks(world, part, run) if world > 1 else train(part, run)
    train(config.replace(optim={"schedule": "constant"}), tmp_path / "constant")
    assert_close(run, tmp_path / "constant")


def test_fp16_overflows_at_all_ranks_or_none(data: Path, tmp_path: Path):
    config = settings(data, "fp16 with loss scaling", steps=8, micro_batch=2)
    run_ranks(2, config, tmp_path / "2")
    train(config, tmp_path / "1")
    assert_close(tmp_path / "2", tmp_path / "1", relative=1e-2)


def test_a_budget_of_minutes_ends_all_ranks_at_one_step(data: Path, tmp_path: Path):
    config = settings(data, steps=0, minutes=0.05, micro_batch=2)
    run_ranks(2, config, tmp_path / "run")
    assert RunFolder(tmp_path / "run").newest_step() == len(losses(tmp_path / "run")) > 0


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_errs_at_one_rank_ends_all(parallel: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``train.verify_every`` changes nothing of a sound run, and each rank looks at its own memory."""
    config = settings(data, steps=6, micro_batch=2, parallel=parallel)
    run_ranks(2, config, tmp_path / "plain")
    config = config.replace(train={"verify_every": 2})
    run_ranks(2, config, tmp_path / "verified")
    assert losses(tmp_path / "verified") == losses(tmp_path / "plain")

    def erring(trainer: Trainer) -> None:
        log(trainer)
        if trainer.ranks.rank == 1 and trainer.state.step == 3:
            with torch.no_grad():
                local(trainer.model.embedding.weight)[1, 1] *= -1.0

    log = Trainer.log
    monkeypatch.setattr(Trainer, "log", erring)
    group = Group(2, lambda: train(config, tmp_path / "erring").step, tmp_path / "said")
    assert group.end() == [1, 1]
    said = [group.said(rank)["error"] for rank in range(2)]
    assert "something else has changed embedding.weight: the processor or its memory errs" in said[1]
    assert "something else has changed another rank" in said[0] and RunFolder(tmp_path / "erring").newest_step() in (
        None,
        3,
    )


# ── the same bits after a loss ──


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_end_when_a_rank_is_killed_and_the_run_goes_on_exactly(rank: int, data: Path, tmp_path: Path):
    config = settings(data, steps=120, micro_batch=4, checkpoint_every=20, evaluate_every=60)
    run_ranks(2, config, tmp_path / "straight")
    run = tmp_path / "run"
    run.parent.mkdir(exist_ok=True)
    group = Group(2, lambda: train(config, run).step, tmp_path / "killed")
    wait_for(lambda: (RunFolder(run).newest_step() or 0) >= 40)
    os.kill(group.pids[rank], signal.SIGKILL)
    began = time.monotonic()
    codes = group.end(60)
    assert time.monotonic() - began < 20 and codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == RankLost.exit_code
    said = group.said(1 - rank)
    assert re.match(rf"rank {1 - rank} of 2 lost the others \(.+\); what ended them stands above", said["error"])
    assert RunFolder(run).newest_step() < 120
    run_ranks(2, config, run)
    check_same(run, tmp_path / "straight")


def test_a_signal_to_one_rank_saves_and_ends_all(data: Path, tmp_path: Path):
    config = settings(data, steps=100_000, micro_batch=4, checkpoint_every=0, evaluate_every=100_000)
    run = tmp_path / "run"
    group = Group(2, lambda: train(config, run).stopped_because, tmp_path / "said")
    wait_for(RunFolder(run).metrics_file.exists)
    os.kill(group.pids[1], signal.SIGTERM)
    assert group.end() == [0, 0]
    assert group.said(0)["result"] == group.said(1)["result"] == "SIGTERM"
    assert RunFolder(run).newest_step() == losses(run).__len__() > 0


def test_a_rank_that_hangs_is_given_up(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("smalllm.ranks.PATIENCE", timedelta(seconds=3))
    config = settings(data, steps=100_000, micro_batch=4, checkpoint_every=0, evaluate_every=100_000)
    group = Group(2, lambda: train(config, tmp_path / "run").step, tmp_path / "said")
    wait_for(RunFolder(tmp_path / "run").metrics_file.exists)
    os.kill(group.pids[1], signal.SIGSTOP)
    began = time.monotonic()
    while (done := os.waitpid(group.pids[0], os.WNOHANG))[0] == 0 and time.monotonic() < began + 30:
        time.sleep(0.05)
    os.kill(group.pids[1], signal.SIGKILL)
    os.waitpid(group.pids[1], 0)
    assert os.waitstatus_to_exitcode(done[1]) == RankLost.exit_code
    assert "rank 0 of 2 lost the others" in group.said(0)["error"]


def test_each_rank_draws_its_own_dropout(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[tuple[int, ...]] = []

    def note(*parts: int) -> int:
        drawn.append(parts)
        return seed_everything(*parts)

    monkeypatch.setattr("smalllm.training.trainer.seed_everything", note)
    config = settings(data, "dropout", steps=2, micro_batch=2, evaluate_every=100, sample_tokens=0)

    def work() -> Any:
        train(config, tmp_path / "run")
        return drawn

    group = Group(2, work, tmp_path / "said")
    assert group.end() == [0, 0]
    here, there = ({tuple(parts) for parts in group.said(rank)["result"] if len(parts) > 1} for rank in range(2))
    assert len(here) == len(there) == 4 and not here & there


# ── refused at the start ──


def test_ranks_that_disagree_are_refused_with_both_values(data: Path, tmp_path: Path):
    def work() -> Any:
        lr = 3e-3 if os.environ["RANK"] == "0" else 4e-3
        return train(settings(data, steps=5).replace(optim={"lr": lr}), tmp_path / "run").step

    group = Group(2, work, tmp_path / "said")
    assert group.end() == [1, 1]
    told = [group.said(rank) for rank in range(2)]
    assert told[0]["error"] == told[1]["error"]
    assert told[0]["error"].startswith(
        "the ranks of this run disagree about optim.lr: rank 0 has 0.003, rank 1 has 0.004; start all of them"
    )
    assert not all(answer["said"] for answer in told), "one of them tells it"


def test_ranks_with_other_data_are_refused(data: Path, tmp_path: Path):
    make_data(tmp_path)
    (tmp_path / "other").mkdir()
    from smalllm.data.prepare import prepare

    prepare(["storyworld:210"], tmp_path / "other" / "data", vocab_size=512, seed=1, workers=1)

    def work() -> Any:
        return train(
            settings(data if os.environ["RANK"] == "0" else tmp_path / "other" / "data", steps=5), tmp_path / "run"
        ).step

    group = Group(2, work, tmp_path / "said")
    assert group.end() == [1, 1] and "disagree about the fingerprint of the data" in group.said(1)["error"]


@pytest.mark.parametrize(
    ("changes", "world", "words"),
    [
        ({"batch_tokens": 64, "micro_batch": 1}, 3, "train.batch_tokens = 64 is 2 rows of model.context = 32, which 3 ranks cannot"),
        ({"batch_tokens": 96, "micro_batch": 1, "parallel": "fsdp"}, 2, "cannot share equally, as train.parallel = fsdp needs it"),
        ({"parallel": "fsdp", "precision": "fp16"}, 2, "train.parallel = fsdp does not go with train.precision = fp16"),
    ],
)  # fmt: skip
def test_what_ranks_cannot_share(changes: dict[str, Any], world: int, words: str, tmp_path: Path):
    with pytest.raises(UserError, match=re.escape(words)):
        divisible(settings(tmp_path, **changes), Ranks(0, world))


def test_the_first_rank_prepares_and_the_others_wait(tmp_path: Path):
    config = settings(tmp_path / "data", steps=3).replace(data={"source": "storyworld:200", "vocab_size": 512})
    run_ranks(2, config, tmp_path / "run")
    assert RunFolder(tmp_path / "run").newest_step() == 3


def test_memory_that_one_rank_lacks_is_told(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = Trainer(settings(data), RunFolder(tmp_path / "run"), ranks=ALONE)
    trainer.ranks = Ranks(1, 2)

    def no_memory(tokens: int) -> float:
        raise MemoryError

    monkeypatch.setattr(trainer, "_accumulate", no_memory)
    with pytest.raises(TrainingFailure, match="rank 1 is out of memory with train.micro_batch = 8; set it to 4"):
        trainer.accumulate(256)
    trainer.prefetch.close()


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("smalllm.hardware.pick_device", lambda wish: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 ranks on this machine with 1 GPUs"):
        make_runtime("cuda", "fp32", Ranks(0, 2, 0, 2))


def test_a_step_is_divided_among_ranks_and_sharding_takes_less_memory():
    config = parse_config(
        {
            "model": {"layers": 8, "width": 256, "heads": 4, "context": 256, "vocab_size": 512},
            "train": {"batch_tokens": 8192, "steps": 1},
        }
    )
    with torch.device("meta"):
        model = GPT(config.model)
    alone, four = (Runtime(torch.device("cpu"), "fp32", ranks) for ranks in (ALONE, Ranks(1, 4, 1, 4)))
    assert fit_memory(model, alone, config, held=0).micro_batch == 16
    assert fit_memory(model, four, config, held=0).micro_batch == 8, "a rank has eight of the 32 rows"
    sharded = config.replace(train={"parallel": "fsdp"})
    whole, parts = (step_memory(model, four, each, 2048, False, held=0) for each in (config, sharded))
    assert parts.optimizer == whole.optimizer // 4 and parts.gradients == -(-whole.gradients // 4)
    assert parts.weights < whole.weights and parts.activations == whole.activations


# ── what they tell each other ──


def test_exchanges(tmp_path: Path):
    def work() -> Any:
        with joined() as ranks:
            rank = ranks.rank
            given = {"a": torch.arange(3.0), "n": torch.tensor(5, dtype=torch.int64)} if ranks.first else None
            tensors = ranks.tensors(given)
            return {
                "sum": ranks.sum(rank + 1, 0.5), "most": ranks.most(rank, -rank), "told": ranks.tell({"x": "ü"} if ranks.first else None),
                "gathered": ranks.gather([rank] * rank), "tensors": [tensors["a"].tolist(), tensors["n"].item()],
                "exchanged": ranks.exchange(torch.full((1, 2), float(rank))).tolist(),
            }  # fmt: skip

    group = Group(3, work, tmp_path)
    assert group.end() == [0, 0, 0]
    expected = {
        "sum": [6.0, 1.5], "most": [2.0, 0.0], "told": {"x": "ü"}, "gathered": [[], [1], [2, 2]],
        "tensors": [[0.0, 1.0, 2.0], 5], "exchanged": [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]],
    }  # fmt: skip
    assert [group.said(rank)["result"] for rank in range(3)] == [expected] * 3


def test_alone_everything_is_ones_own():
    assert ALONE.sum(1, 2) == [1, 2] and ALONE.most(3) == [3] and ALONE.tell("x") == "x" and ALONE.gather(1) == [1]
    ALONE.must_agree({"a": 1})
    with ALONE.one_by_one("job"), joined() as ranks:
        assert ranks is ALONE


# ── the commands ──


def smalllm(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "smalllm", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def test_gpus_starts_ranks_and_an_error_is_one_sentence(data: Path, tmp_path: Path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(settings(data, steps=6, micro_batch=2).to_toml())
    done = smalllm("train", str(recipe), "--gpus", "2", "--out", str(tmp_path / "run"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 6 and "Traceback" not in done.stderr and "W1" not in done.stderr
    environment = json.loads(RunFolder(tmp_path / "run").environment_file.read_text())
    assert environment["ranks"] == 2 and environment["parallel"] == "ddp"
    refused = smalllm(
        "train",
        str(recipe),
        "train.batch_tokens=32",
        "train.micro_batch=1",
        "--gpus",
        "2",
        "--out",
        str(tmp_path / "no"),
    )
    assert refused.returncode == 1
    assert [line for line in refused.stderr.splitlines() if line.startswith("error")] == [
        "error: train.batch_tokens = 32 is 1 rows of model.context = 32, which 2 ranks cannot share; set train.batch_tokens to a"
        " multiple of 64"
    ]


def test_ctrl_c_in_the_terminal_saves_once(data: Path, tmp_path: Path):
    """It reaches torchrun's agent and every rank, and the agent repeats it: still the first one, which saves."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        settings(data, steps=100_000, micro_batch=2, checkpoint_every=0, evaluate_every=100_000).to_toml()
    )
    command = [sys.executable, "-m", "smalllm", "train", str(recipe), "--gpus", "2", "--out", str(tmp_path / "run")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(RunFolder(tmp_path / "run").metrics_file.exists)
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(60)
    finally:
        process.kill()
    said = (tmp_path / "log").read_text()
    assert code == 130 and "Traceback" not in said, said[-2000:]
    assert RunFolder(tmp_path / "run").newest_step() == len(losses(tmp_path / "run")) > 0


def test_half_of_torchruns_environment_is_refused(tmp_path: Path):
    done = smalllm("train", "--out", str(tmp_path / "run"), env=os.environ | {"WORLD_SIZE": "2"}, cwd=tmp_path)
    assert done.returncode == 1 and "WORLD_SIZE = 2 is set and RANK, LOCAL_RANK" in done.stderr


def test_more_gpus_than_there_are(tmp_path: Path):
    done = smalllm("train", "--gpus", "64", cwd=tmp_path)
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: --gpus 64: PyTorch sees ")
        and "Traceback" not in done.stderr
    )
