"""Checkpoints beside training: a copy, one at a time, in order, and nothing that fails is lost sight of."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from safetensors.torch import load

from smalllm.checkpoint import RunFolder, safetensors_pieces
from smalllm.metrics import MetricsLog
from smalllm.reliability.promises import replaced, snapshot
from smalllm.training.saver import Saver


def test_what_is_written_is_the_state_at_the_call(tmp_path: Path):
    folder, state = RunFolder(tmp_path), snapshot(1)
    expected = {name: tensor.clone() for name, tensor in state.weights.items()}
    saver, gate = Saver(folder, keep=2), threading.Event()
    original = RunFolder.save

    def late(self: RunFolder, *given: object) -> object:
        gate.wait(10)
        return original(self, *given)  # type: ignore[arg-type]

    with replaced(RunFolder, "save", late):
        saver.save(state)
        for tensor in state.weights.values():  # training goes on meanwhile
            tensor.zero_()
        gate.set()
        saver.wait()
    weights = folder.choose("latest").weights()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    saver.close()


def test_one_after_the_other_and_the_hint_after_its_checkpoint(tmp_path: Path):
    folder = RunFolder(tmp_path)
    saver = Saver(folder, keep=2)
    for step in (1, 2, 3):
        saver.save(snapshot(step))
        saver.mark_best(step)
    saver.mark_best(9)  # of no checkpoint
    saver.save_milestone(snapshot(3))
    saver.close()
    assert [c.step for c in folder.checkpoints()] == [2, 3] and folder.best_step() == 3
    assert folder.milestones()[0].optimizer() == {}
    assert not saver.failures()


def test_copies_are_made_into_the_same_memory(tmp_path: Path):
    saver = Saver(RunFolder(tmp_path), keep=2)
    saver.make_room(snapshot(1))
    saver.wait()
    places = {name: tensor.data_ptr() for name, tensor in saver.copies.items()}
    saver.save(snapshot(2))
    saver.close()
    assert places and {name: tensor.data_ptr() for name, tensor in saver.copies.items()} == places


def test_failures_are_told_once_and_the_next_save_works(tmp_path: Path):
    folder = RunFolder(tmp_path)
    saver = Saver(folder, keep=2)

    def full(self: RunFolder, *given: object) -> None:
        raise OSError(28, "No space left on device")

    with replaced(RunFolder, "save", full):
        saver.save(snapshot(1))
        saver.wait()
    saver.save(snapshot(2))
    saver.close()
    assert [(failed.what, failed.error.errno) for failed in saver.failures()] == [("the checkpoint of step 1", 28)]  # type: ignore[attr-defined]
    assert not saver.failures() and folder.newest_step() == 2


def test_lines_are_durable_before_their_checkpoint(tmp_path: Path):
    order: list[str] = []

    class Log(MetricsLog):
        def sync(self) -> None:
            order.append("lines")

    original = RunFolder.save

    def noted(self: RunFolder, *given: object) -> object:
        order.append("checkpoint")
        return original(self, *given)  # type: ignore[arg-type]

    with replaced(RunFolder, "save", noted):
        saver = Saver(RunFolder(tmp_path), 2, [Log(tmp_path / "metrics.jsonl")])
        saver.save(snapshot(1))
        saver.close()
    assert order == ["lines", "checkpoint"]


def test_our_safetensors_are_theirs():
    """The reference reader finds every tensor, of every dtype that a checkpoint may hold."""
    torch.manual_seed(0)
    tensors = {
        "b.half": torch.randn(3, 5).half(), "a.bf16": torch.randn(7).bfloat16(), "double": torch.randn(2, 2).double(),
        "step": torch.tensor(3.0), "ids": torch.arange(5), "small": torch.arange(5, dtype=torch.int32), "empty": torch.zeros(0, 4),
        "bytes": torch.arange(6, dtype=torch.uint8), "flag": torch.tensor([True, False]), "turned": torch.randn(4, 6).T,
    }  # fmt: skip
    made = b"".join(bytes(piece) for piece in safetensors_pieces(tensors))
    loaded = load(made)
    assert loaded.keys() == tensors.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
