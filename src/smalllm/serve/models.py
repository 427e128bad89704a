"""The checkpoints of a run that answer requests: ``NAME`` is the newest, ``NAME@STEP`` any one.

The newest is followed while the run trains: a newer checkpoint is loaded beside the one that answers and takes over when
it is whole; what was begun is finished on the old one. A damaged one is named once and passed over.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch

from smalllm.checkpoint import LoadedRun, find_run, open_run
from smalllm.generation import Batch
from smalllm.tokenizer import Tokenizer

KEPT = 3  # checkpoints loaded by number, besides the newest: bounds memory
FOLLOW_SECONDS = 3.0


class NoSuchModel(LookupError):
    """There is no checkpoint of that name; the message lists the names."""


class AllInUse(Exception):
    """As many checkpoints as are kept have requests of their own."""


class Served:
    """One checkpoint with the batch in which its texts are made. ``users`` counts requests; the engine's own."""

    def __init__(self, name: str, run: LoadedRun, slots: int) -> None:
        self.name, self.run, self.slots, self.users = name, run, slots, 0
        self.batch = self.new_batch()

    tokenizer: Tokenizer = property(lambda self: self.run.tokenizer)  # type: ignore[assignment]
    context: int = property(lambda self: self.run.model.config.context)  # type: ignore[assignment]

    def new_batch(self) -> Batch:
        """An empty one; also after a step has failed, because nobody knows what it left behind."""
        return Batch(self.run.model, self.run.tokenizer, self.slots)


class Models:
    """Which checkpoint answers to which name. ``note`` is told one line when another takes over or cannot be loaded."""

    def __init__(
        self, target: str | Path | None, slots: int, device: torch.device | str, note: Callable[[str], None]
    ) -> None:
        self.folder, step = find_run(target)
        self.name = self.folder.path.resolve().name
        self._slots, self._device, self._note = slots, device, note
        self._follows = step is None
        self._lock = threading.Lock()  # one checkpoint is loaded at a time
        self._numbered: OrderedDict[int, Served] = OrderedDict()
        self.current = self._serve(open_run(target, "latest", device))
        self._seen = self.current.run.step
        self._stopped = threading.Event()

    def names(self) -> list[str]:
        """NAME, then NAME@STEP of every checkpoint and milestone, newest first."""
        return [self.name, *(f"{self.name}@{step}" for step in reversed(self.steps()))]

    def steps(self) -> list[int]:
        return self.folder.steps()

    def loaded(self, name: str | None) -> Served | None:
        """The checkpoint of that name (None: the newest) if it is in memory; at once."""
        if name in (None, self.name, self.current.name):
            return self.current
        for served in list(self._numbered.values()):
            if served.name == name:
                with contextlib.suppress(KeyError):  # forgotten just now
                    self._numbered.move_to_end(served.run.step)
                return served
        return None

    def get(self, name: str | None) -> Served:
        """The same, loaded if it must be: call it where waiting is allowed. NoSuchModel, AllInUse, or DamagedCheckpoint."""
        if (served := self.loaded(name)) is not None:
            return served
        step = self._step_of(str(name))
        with self._lock:
            if step not in self._numbered:
                self._make_room()
                self._numbered[step] = self._serve(open_run(self.folder.path, str(step), self._device))
            self._numbered.move_to_end(step)
            return self._numbered[step]

    # the run that is followed

    def follow(self, every: float = FOLLOW_SECONDS) -> None:
        """Look for newer checkpoints in a thread until ``stop``."""
        if self._follows:
            threading.Thread(target=self._follow, args=(every,), name="follow", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def look(self) -> None:
        """Take the newest checkpoint if it has not been looked at; whatever is wrong with it, the old one goes on."""
        newest = self.folder.newest_step()
        if newest is None or newest == self._seen:
            return
        self._seen = newest
        try:
            with self._lock:
                self.current = self._serve(open_run(self.folder.path, str(newest), self._device))
        except Exception as error:  # what a training run leaves on the disk must never end the server
            self._note(f"step {newest} cannot be loaded, still at step {self.current.run.step}: {error}")
        else:
            self._note(f"now step {newest}")

    def _follow(self, every: float) -> None:
        while not self._stopped.wait(every):
            self.look()

    # loading

    def _serve(self, run: LoadedRun) -> Served:
        return Served(f"{self.name}@{run.step}", run, self._slots)

    def _step_of(self, name: str) -> int:
        run, at, digits = name.rpartition("@")
        steps = self.steps()
        if (
            at
            and run == self.name
            and digits.isascii()
            and digits.isdigit()
            and len(digits) < 16
            and int(digits) in steps
        ):
            return int(digits)
        raise NoSuchModel(f"there is no such model; there are {self.name} and {self.name}@STEP for {_listed(steps)}")

    def _make_room(self) -> None:
        """Forget the one unused for longest when there are as many as are kept."""
        if len(self._numbered) < KEPT:
            return
        idle = next((step for step, served in self._numbered.items() if not served.users), None)
        if idle is None:
            raise AllInUse
        del self._numbered[idle]


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps[-20:])) or "no step yet"
