"""The run folder: atomic, verified, pruned; damage is noticed and named."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from smalllm.checkpoint import (
    PAYLOAD,
    Checkpoint,
    DamagedCheckpoint,
    RunFolder,
    Snapshot,
    check_weights,
    find_run,
    is_milestone,
    model_weights,
    open_run,
)
from smalllm.config import ModelConfig, UserError
from smalllm.model import GPT

CONFIG = ModelConfig(layers=1, width=16, heads=2, context=8, vocab_size=32)


def snapshot(step: int) -> Snapshot:
    torch.manual_seed(step)
    model = GPT(CONFIG)
    return Snapshot(step, CONFIG, model_weights(model), {"a.exp_avg": torch.randn(3)}, {"training": {"step": step}})


def filled(path: Path, steps: list[int], keep: int = 10) -> RunFolder:
    folder = RunFolder(path)
    for step in steps:
        folder.save(snapshot(step), keep)
    return folder


def test_what_is_saved_is_what_is_loaded(tmp_path: Path):
    checkpoint = filled(tmp_path, [5]).choose("latest")
    expected = snapshot(5)
    weights = checkpoint.weights()
    assert weights.keys() == expected.weights.keys() and "head.weight" not in weights  # tied: stored once
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.weights.items())
    assert torch.equal(checkpoint.optimizer()["a.exp_avg"], expected.optimizer["a.exp_avg"])
    assert checkpoint.state() == {"training": {"step": 5}} and checkpoint.model_config() == CONFIG
    model = checkpoint.load_model()
    assert torch.equal(model.embedding.weight, expected.weights["embedding.weight"])
    assert model.head.weight is model.embedding.weight and not model.training
    ids = torch.arange(6)[None]
    torch.manual_seed(5)
    assert torch.equal(model(ids), GPT(CONFIG)(ids))


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path):
    folder = filled(tmp_path, [1, 2])
    folder.mark_best(1)
    for step in (3, 4, 5):
        folder.save(snapshot(step), keep=2)
    assert [c.step for c in folder.checkpoints()] == [1, 4, 5]
    assert folder.best_step() == 1 and folder.newest_step() == 5
    assert sorted(os.listdir(folder.checkpoints_folder)) == ["step-00000001", "step-00000004", "step-00000005"]


def test_milestones_stay_and_are_not_resumed_from(tmp_path: Path):
    folder = filled(tmp_path, [1, 2])
    folder.save_milestone(snapshot(1))
    folder.save_milestone(snapshot(1))  # again, by a run that was resumed before it
    for step in (3, 4, 5):
        folder.save(snapshot(step), keep=2)
    assert [c.step for c in folder.checkpoints()] == [4, 5] and [c.step for c in folder.milestones()] == [1]
    assert folder.steps() == [1, 4, 5] and folder.newest_step() == 5
    kept = folder.candidates("1")[0].load_model()
    wanted = snapshot(1).weights["embedding.weight"]
    assert kept.embedding.weight.dtype == torch.float32
    torch.testing.assert_close(kept.embedding.weight.detach(), wanted, rtol=2**-8, atol=0)
    folder.checkpoints()[-1].path.rename(tmp_path / "gone")
    valid = folder.newest_valid()
    assert valid is not None and valid.step == 4


def test_milestones_are_spaced_by_powers():
    steps = [step for step in range(40_001) if is_milestone(step)]
    assert steps == [100, 300, 1000, 3000, 10_000, 30_000]


def test_a_reader_reads_no_more_than_it_needs(tmp_path: Path):
    """A damaged optimizer is no reason not to tell a story; a damaged model is, and the one before tells it."""
    folder = filled(tmp_path, [1, 2])
    for checkpoint, name in zip(folder.checkpoints(), ("optimizer.safetensors", "model.safetensors"), strict=True):
        (checkpoint.path / name).write_bytes(b"damaged")
    assert folder.first("latest", lambda checkpoint: (checkpoint.load_model(), checkpoint.step)[1]) == 1
    with pytest.raises(DamagedCheckpoint, match="model.safetensors"):
        folder.first("2", Checkpoint.load_model)
    (folder.checkpoints()[0].path / "model.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match="all 2 checkpoints"):
        folder.first("latest", Checkpoint.load_model)


def test_order_is_by_step_not_by_time(tmp_path: Path):
    folder = filled(tmp_path, [9, 10, 100])
    os.utime(folder.checkpoints()[0].path, (2e9, 2e9))
    assert [c.step for c in folder.checkpoints()] == [9, 10, 100]
    assert folder.choose("latest").step == 100


@pytest.mark.parametrize("name", [*PAYLOAD, "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "delete", "zero", "swap"])
def test_damage_is_noticed_and_the_checkpoint_before_is_used(name: str, damage: str, tmp_path: Path):
    folder = filled(tmp_path, [1, 2])
    path = folder.checkpoints()[-1].path / name
    data = path.read_bytes()
    match damage:
        case "flip":
            middle = len(data) // 2
            path.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "grow":
            path.write_bytes(data + b"x")
        case "delete":
            path.unlink()
        case "zero":
            path.write_bytes(bytes(len(data)))
        case "swap":
            path.write_bytes((folder.checkpoints()[0].path / name).read_bytes())
    warnings: list[str] = []
    assert folder.choose("latest").step == 1
    assert folder.newest_valid(warnings.append).step == 1  # type: ignore[union-attr]
    assert (
        len(warnings) == 1 and "step-00000002" in warnings[0] and (tmp_path / "checkpoints/.bad-step-00000002").is_dir()
    )


def test_when_all_are_damaged_it_never_starts_from_zero(tmp_path: Path):
    folder = filled(tmp_path, [1, 2])
    for checkpoint in folder.checkpoints():
        (checkpoint.path / "state.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="all 2 checkpoints .* damaged"):
        folder.choose("latest")
    for _ in range(2):
        with pytest.raises(DamagedCheckpoint, match="all 2 .*state.json.* or start again with --fresh"):
            folder.newest_valid()


def test_a_pickle_in_place_of_weights_is_refused_and_never_run(tmp_path: Path):
    folder = filled(tmp_path, [1])
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return os.system, (f"touch {canary}",)

    path = folder.checkpoints()[0].path / "model.safetensors"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DamagedCheckpoint):
        folder.checkpoints()[0].weights()
    reseal(folder.checkpoints()[0])
    with pytest.raises(DamagedCheckpoint, match="is not a safetensors file"):
        folder.checkpoints()[0].weights()
    assert not canary.exists()


def reseal(checkpoint: Checkpoint) -> None:
    """Make the manifest match the files: what an attacker who knows the format would do."""
    import hashlib

    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    for name in PAYLOAD:
        data = (checkpoint.path / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint.path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{}",
        '{"files": 3}',
        '{"files": {"a": []}}',
        "NaN",
        '{"version": 99, "step": 1, "files": {"a": {"size": 1, "sha256": "x"}}}',
    ],
)
def test_a_strange_manifest_is_damage_not_a_traceback(text: str, tmp_path: Path):
    checkpoint = filled(tmp_path, [1]).checkpoints()[0]
    (checkpoint.path / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpoint):
        checkpoint.verify()


def test_huge_dimensions_in_model_json_are_refused_before_allocation(tmp_path: Path):
    checkpoint = filled(tmp_path, [1]).checkpoints()[0]
    path = checkpoint.path / "model.json"
    settings = json.loads(path.read_text())
    settings["model"]["width"] = 65_536
    settings["model"]["mlp_width"] = 10**6
    path.write_text(json.dumps(settings))
    reseal(checkpoint)
    with pytest.raises(UserError, match="has shape"):
        checkpoint.load_model()


def test_weights_that_do_not_fit_are_named(tmp_path: Path):
    weights = dict(snapshot(1).weights)
    del weights["norm.weight"]
    with pytest.raises(UserError, match="tensor 'norm.weight' is missing"):
        check_weights(GPT(CONFIG), weights, "file")
    weights["norm.weight"] = torch.zeros(17)
    with pytest.raises(UserError, match=r"norm.weight has shape \[17\], the model \[16\]"):
        check_weights(GPT(CONFIG), weights, "file")


def test_finding_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no run under runs/ yet; train one with: smalllm train"):
        find_run(None)
    for name in ("old", "new"):
        filled(tmp_path / "runs" / name, [3])
        (tmp_path / "runs" / name / "config.toml").write_text("")
    os.utime(tmp_path / "runs/old/checkpoints", (1, 1))
    assert find_run(None)[0].path == Path("runs/new")
    assert find_run("old")[0].path == Path("runs/old")
    assert find_run("runs/old/checkpoints/step-00000003")[1] == "00000003"
    with pytest.raises(UserError, match="there is no run at elsewhere; the runs here are new, old"):
        find_run("elsewhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a run folder"):
        find_run("empty")
    with pytest.raises(UserError, match="no checkpoint at step 7; it has 3"):
        RunFolder(tmp_path / "runs/new").choose("7")
    with pytest.raises(UserError, match="neither best, latest nor a step"):
        RunFolder(tmp_path / "runs/new").choose("../../etc")


def test_the_tokenizer_of_another_run_is_noticed(tmp_path: Path, dataset_folder: Path):
    from smalllm.tokenizer import Tokenizer

    folder = RunFolder(tmp_path)
    config = CONFIG.model_copy(update={"vocab_size": 512})
    torch.manual_seed(0)
    folder.save(Snapshot(1, config, model_weights(GPT(config)), {}, {"tokenizer_fingerprint": "another"}), keep=1)
    (tmp_path / "config.toml").write_text("")
    Tokenizer.load(dataset_folder / "tokenizer.model").save(folder.tokenizer_file)
    with pytest.raises(UserError, match="is the tokenizer of another run"):
        open_run(tmp_path)


def test_a_damaged_model_json_is_damage_and_the_one_before_tells_the_story(tmp_path: Path):
    folder = filled(tmp_path, [1, 2])
    path = folder.checkpoints()[-1].path / "model.json"
    path.write_bytes(path.read_bytes()[:-3])
    assert folder.first("latest", lambda checkpoint: (checkpoint.load_model(), checkpoint.step)[1]) == 1


def test_digits_that_are_no_step_and_pipes_are_passed_over(tmp_path: Path):
    folder = filled(tmp_path, [1, 2])
    (folder.checkpoints_folder / "step-\u00b2").mkdir()
    (folder.checkpoints_folder / ("step-" + "9" * 200)).mkdir()
    (tmp_path / "best").write_text("step-\u00b2")
    assert [c.step for c in folder.checkpoints()] == [1, 2] and folder.best_step() is None
    newest = folder.checkpoints()[-1].path / "state.json"
    newest.unlink()
    os.mkfifo(newest)
    assert folder.choose("latest").step == 1


def test_leftovers_of_a_crash_go_when_training_begins_again(tmp_path: Path):
    folder = filled(tmp_path, [1])
    for name in (".tmp-7-123", ".trash-step-00000000"):
        (folder.checkpoints_folder / name).mkdir()
    folder.sweep()
    assert os.listdir(folder.checkpoints_folder) == ["step-00000001"]
