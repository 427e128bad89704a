"""The trials on trial: ways to write checkpoints that are wrong, each of which at least one trial must catch.

uv run python tests/reliability/mutants.py
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402

torch.set_num_threads(1)

from smalllm import checkpoint as checkpoint_module  # noqa: E402
from smalllm.checkpoint import Checkpoint, DamagedCheckpoint, RunFolder, Snapshot  # noqa: E402
from smalllm.files import FileSystem  # noqa: E402
from smalllm.reliability import promises, trials  # noqa: E402
from smalllm.reliability.promises import replaced  # noqa: E402
from smalllm.training.trainer import Trainer  # noqa: E402


def no_fsync() -> Any:
    """Files are written and named, and never told to the device."""

    def write(self: FileSystem, path: Path, pieces: Any) -> None:
        with self.open(path, "wb") as file:
            for piece in pieces:
                self.put(file, piece)

    return replaced(FileSystem, "write", write)


def in_place() -> Any:
    """The folder has its final name from the beginning."""

    def write(self: RunFolder, parent: Path, snapshot: Snapshot) -> Checkpoint:
        self.files.mkdir(parent)
        target = parent / f"step-{snapshot.step:08d}"
        self._write_checkpoint(target, snapshot)
        self.files.sync_folder(parent)
        return Checkpoint(target)

    return replaced(RunFolder, "_write_atomically", write)


def rotate_first() -> Any:
    """Old checkpoints go before the new one is there."""
    original = RunFolder.save

    def save(self: RunFolder, snapshot: Snapshot, keep: int) -> Checkpoint:
        found = self.checkpoints()
        for old in found[: len(found) - keep + 1]:
            self.files.remove_tree(old.path)
        return original(self, snapshot, keep)

    return replaced(RunFolder, "save", save)


@contextmanager
def no_manifest() -> Iterator[None]:
    """None is written, and every folder is taken for whole."""
    original = FileSystem.write

    def write(self: FileSystem, path: Path, pieces: Any) -> None:
        if path.name != "manifest.json":
            original(self, path, pieces)

    def read(self: Checkpoint, name: str) -> bytes:
        return (self.path / name).read_bytes()

    with (
        replaced(FileSystem, "write", write), replaced(Checkpoint, "read", read),
        replaced(Checkpoint, "verify", lambda self: None), replaced(Checkpoint, "manifest", lambda self: {}),
    ):  # fmt: skip
        yield


def no_parent_fsync() -> Any:
    """Names are never told to the device."""
    original = FileSystem.mkdir

    def write(self: RunFolder, parent: Path, snapshot: Snapshot) -> Checkpoint:
        original(self.files, parent)
        target, temporary = parent / f"step-{snapshot.step:08d}", parent / f".tmp-{snapshot.step}"
        self._write_checkpoint(temporary, snapshot)
        self.files.rename(temporary, target)
        return Checkpoint(target)

    return replaced(RunFolder, "_write_atomically", write)


def hint_only() -> Any:
    """The newest checkpoint is the one that `latest` names."""

    def newest(self: RunFolder, warn: Any = None) -> Checkpoint | None:
        step = checkpoint_module._hinted_step(self.path / "latest")
        return None if step is None else Checkpoint(self.checkpoints_folder / f"step-{step:08d}")

    return replaced(RunFolder, "newest_valid", newest)


def unverified_digest() -> Any:
    """Sizes are compared and digests not."""

    def check(self: Checkpoint, name: str, promised: Any) -> None:
        path = self.path / name
        if promised is None or not path.exists() or path.stat().st_size != promised["size"]:
            raise DamagedCheckpoint(f"{path} is damaged")

    return replaced(Checkpoint, "_check", check)


def scaler_not_restored() -> Any:
    """The scale of losses begins anew."""
    original = Trainer.restore

    def restore(self: Trainer, found: Checkpoint) -> None:
        scaler, self.scaler = self.scaler, None
        original(self, found)
        self.scaler = scaler

    return replaced(Trainer, "restore", restore)


MUTANTS: dict[Callable[[], Any], tuple[str, ...]] = {
    no_fsync: ("T3",), in_place: ("T2",), rotate_first: ("T2",), no_manifest: ("T5",), no_parent_fsync: ("T3",),
    hint_only: ("T2",), unverified_digest: ("T5",), scaler_not_restored: ("T7",),
}  # fmt: skip
"""Each with the trials that are asked."""
CASES = {"T7": 48}
"""More than the short ones, where the configuration that matters is one of eight."""


def caught(mutant: Callable[[], Any], folder: Path) -> list[str]:
    """Names of the trials that fail when the code is wrong in this way."""
    found = []
    for trial in promises.TRIALS:
        if trial.name in MUTANTS[mutant]:
            with mutant():
                outcome = trials.run(
                    trial, trials.some(trial, CASES.get(trial.name, trial.short)), folder / mutant.__name__ / trial.name
                )
            broken = [failure for failure in outcome.failures if failure.case >= 0]  # not merely one that cannot begin
            found += [trial.name] if broken else []
    return found


def main() -> int:
    chosen = [mutant for mutant in MUTANTS if mutant.__name__ in (sys.argv[1:] or [m.__name__ for m in MUTANTS])]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        for mutant in chosen:
            names = caught(mutant, Path(folder))
            survivors += not names
            print(f"{mutant.__name__:<20} {'caught by ' + ', '.join(names) if names else 'SURVIVED'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants caught")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
