"""Checkpoints written beside training: the trainer waits for a copy in memory, a thread hashes, writes, verifies, prunes.

One checkpoint is under way at a time, and everything happens in the order in which it was asked for: the hint `best` is
written when the checkpoint that it names is. What fails is kept for the trainer, which is told between two steps.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smalllm.checkpoint import RunFolder, Snapshot
from smalllm.metrics import MetricsLog


@dataclass(frozen=True)
class Unsaved:
    """Something that could not be written, and why."""

    what: str
    error: Exception


class Saver:
    """Writes the checkpoints of a run, ``keep`` of them kept. ``logs`` are made durable before each: a step that is saved
    has its line. Call ``close`` at the end; a program that ends without it loses what is under way, and nothing else."""

    def __init__(self, folder: RunFolder, keep: int, logs: Iterable[MetricsLog] = ()) -> None:
        self.folder, self.keep, self.logs = folder, keep, tuple(logs)
        self.unsaved: queue.SimpleQueue[Unsaved] = queue.SimpleQueue()
        self.jobs: queue.Queue[tuple[str, Callable[[], object]] | None] = queue.Queue()
        self.thread: threading.Thread | None = None
        self.copies: dict[str, Tensor] = {}

    def save(self, snapshot: Snapshot) -> None:
        """Copy a state and have it written as a checkpoint. Waits for the one before."""
        copy = self._copied(snapshot)
        self._ask(f"the checkpoint of step {snapshot.step}", lambda: self._save(copy))

    def save_milestone(self, snapshot: Snapshot) -> None:
        """Copy a model and have it kept to look back at. Waits for the one before."""
        copy = self._copied(replace(snapshot, optimizer={}))
        self._ask(f"the model of step {snapshot.step} to look back at", lambda: self.folder.save_milestone(copy))

    def mark_best(self, step: int) -> None:
        """Have the hint written that this step is the best, if its checkpoint is there by then."""
        self._ask("the hint which checkpoint is best", lambda: self._mark_best(step))

    def make_room(self, snapshot: Snapshot) -> None:
        """Have the memory for copies prepared while training goes on: the first save would wait for it."""
        self._ask("memory for checkpoints", lambda: self._fill(snapshot))

    def failures(self) -> list[Unsaved]:
        """What could not be written since this was asked last."""
        found = []
        while not self.unsaved.empty():
            found.append(self.unsaved.get())
        return found

    def wait(self) -> None:
        """Return when all that was asked for is on the disk, or has failed."""
        self.jobs.join()

    def close(self) -> None:
        """Finish what is under way and end the thread."""
        if self.thread is not None:
            self.jobs.put(None)
            self.thread.join()
            self.thread = None

    def _save(self, snapshot: Snapshot) -> None:
        for log in self.logs:
            log.sync()
        self.folder.save(snapshot, self.keep)

    def _mark_best(self, step: int) -> None:
        if any(checkpoint.step == step for checkpoint in self.folder.checkpoints()):
            self.folder.mark_best(step)

    def _ask(self, what: str, job: Callable[[], object]) -> None:
        if self.thread is None:
            # A daemon: a second Ctrl-C ends the program at once, and what was under way was never announced.
            self.thread = threading.Thread(target=self._work, name="saver", daemon=True)
            self.thread.start()
        self.jobs.put((what, job))

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            try:
                job[1]()
            except Exception as error:  # a disk, or memory, may fail in many ways; training decides what that means
                self.unsaved.put(Unsaved(job[0], error))
            finally:
                self.jobs.task_done()
        self.jobs.task_done()

    def _copied(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot in memory of our own, which the next one will use again."""
        self.wait()
        return self._fill(snapshot)

    def _fill(self, snapshot: Snapshot) -> Snapshot:
        weights, optimizer = self._copy("model.", snapshot.weights), self._copy("optimizer.", snapshot.optimizer)
        if any(tensor.is_cuda for tensor in snapshot.weights.values()):
            torch.cuda.synchronize()
        return replace(snapshot, weights=weights, optimizer=optimizer)

    @torch.no_grad()
    def _copy(self, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copied = {}
        for name, tensor in tensors.items():
            room = self.copies.get(prefix + name)
            if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
                room = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                self.copies[prefix + name] = room
            copied[name] = room.copy_(tensor, non_blocking=True)
        return copied
