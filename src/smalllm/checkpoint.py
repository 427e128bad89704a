"""The run folder: every path of a run, and how a checkpoint is written, verified, loaded and pruned.

    runs/NAME/
    ├── config.toml        resolved settings; re-runs the run      ├── environment.json  versions, device, command, data fingerprint
    ├── tokenizer.model                                            ├── metrics.jsonl     one object per logged step
    ├── samples.jsonl      a sample story per evaluation           ├── best, latest      hints: one line, the name of a checkpoint
    ├── checkpoints/step-00001000/{model.safetensors, model.json, optimizer.safetensors, state.json, manifest.json}
    └── milestones/step-00000100/ the same without an optimizer, weights in bfloat16: to look back at, never pruned

A checkpoint appears by one rename after all its bytes are on disk, so that a reader or a crash never meets half of
one; the truth is the newest checkpoint whose manifest verifies. Files are safetensors, JSON and TOML: loading never
executes anything. The module knows nothing about training: state is a plain dict.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from smalllm.config import ModelConfig, RunConfig, UserError, load_recipe
from smalllm.model import GPT
from smalllm.tokenizer import Tokenizer

MANIFEST_VERSION = 1
PAYLOAD = ("model.safetensors", "model.json", "optimizer.safetensors", "state.json")


class DamagedCheckpoint(UserError):
    """A checkpoint whose bytes are not the ones that were written; the message names the file."""


class FileSystem:
    """Every change to the disk goes through these few calls, so that a test can crash, tear, fill or record them."""

    def mkdir(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        """Write and flush to the device: the bytes survive a power cut when this returns."""
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        """Make names (created, renamed) durable; Windows and some network file systems cannot, and need not."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds. ``state`` is JSON: step, tokens, plan, best, scaler ... whatever the trainer needs."""

    step: int
    model: ModelConfig
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


class Checkpoint:
    """One folder ``step-NNNNNNNN``. Reading verifies size and SHA-256 of every file that is used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = int(path.name.removeprefix("step-"))

    def read(self, name: str) -> bytes:
        """The bytes of one file, equal to those that the manifest promises, or DamagedCheckpoint."""
        promised = self.manifest()["files"].get(name)
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise DamagedCheckpoint(f"{self.path / name}: {error.strerror}") from None
        if promised is None or len(data) != promised["size"] or hashlib.sha256(data).hexdigest() != promised["sha256"]:
            raise DamagedCheckpoint(f"{self.path / name} is damaged: size or SHA-256 differs from its manifest.json")
        return data

    def manifest(self) -> dict[str, Any]:
        """Sizes and digests of the files; DamagedCheckpoint when they cannot be told."""
        try:
            manifest = json.loads((self.path / "manifest.json").read_bytes())
            whole = {name: (record["size"], record["sha256"]) for name, record in manifest["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DamagedCheckpoint(f"{self.path / 'manifest.json'} is missing or damaged") from None
        if manifest.get("version") != MANIFEST_VERSION or manifest.get("step") != self.step or not whole:
            raise DamagedCheckpoint(
                f"{self.path / 'manifest.json'} is for step {manifest.get('step')}, version {manifest.get('version')};"
                f" this is version {MANIFEST_VERSION}: upgrade smalllm, or remove the folder"
            )
        return manifest

    def verify(self) -> None:
        """Raise DamagedCheckpoint unless every file is whole."""
        for name in PAYLOAD:
            self.read(name)

    def state(self) -> dict[str, Any]:
        return json.loads(self.read("state.json"))

    def model_config(self) -> ModelConfig:
        """The shape of the model; UserError when the file holds another thing."""
        try:
            return ModelConfig.model_validate(json.loads(self.read("model.json"))["model"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{self.path / 'model.json'} does not describe a model: {error}") from None

    def weights(self) -> dict[str, Tensor]:
        return self._tensors("model.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        return self._tensors("optimizer.safetensors")

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return parse_safetensors(self.read(name))
        except SafetensorError as error:
            raise DamagedCheckpoint(f"{self.path / name} is not a safetensors file: {error}") from None

    def load_model(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> GPT:
        """The model in eval mode. Nothing is allocated before names and shapes are known to fit."""
        config = self.model_config()
        weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in self.weights().items()}
        return assemble(config, weights, str(self.path / "model.safetensors")).to(device)


def assemble(config: ModelConfig, weights: Mapping[str, Tensor], origin: str) -> GPT:
    """A model in eval mode that holds these very tensors; UserError naming ``origin`` unless names and shapes are its own."""
    with torch.device("meta"):
        model = GPT(config)
    check_weights(model, weights, origin)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie()
    model.rebuild_tables()
    return model.eval()


def model_weights(model: GPT) -> dict[str, Tensor]:
    """Weights by name; a tied head is the embedding and not stored twice."""
    tied = model.config.tie_embeddings
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "head.weight")}


def check_weights(model: GPT, weights: Mapping[str, Tensor], origin: str) -> None:
    """Names and shapes must be exactly the model's."""
    own = model_weights(model)
    if own.keys() != weights.keys():
        name = sorted(own.keys() ^ weights.keys())[0]
        raise UserError(f"{origin}: tensor {name!r} is {'missing' if name in own else 'not of this model'}")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise UserError(f"{origin}: {name} has shape {list(weights[name].shape)}, the model {list(tensor.shape)}")


@torch.no_grad()
def copy_weights(model: GPT, weights: Mapping[str, Tensor], origin: str) -> None:
    """Copy weights into a model in place (its optimizer keeps its references)."""
    check_weights(model, weights, origin)
    for name, tensor in model_weights(model).items():
        tensor.copy_(weights[name])


class RunFolder:
    """Every path of a run, and the only place that spells their names."""

    def __init__(self, path: Path, files: FileSystem | None = None) -> None:
        self.path = path
        self.files = files or FileSystem()
        self._lock: int | None = None

    config_file = property(lambda self: self.path / "config.toml")
    environment_file = property(lambda self: self.path / "environment.json")
    tokenizer_file = property(lambda self: self.path / "tokenizer.model")
    metrics_file = property(lambda self: self.path / "metrics.jsonl")
    samples_file = property(lambda self: self.path / "samples.jsonl")
    checkpoints_folder = property(lambda self: self.path / "checkpoints")
    milestones_folder = property(lambda self: self.path / "milestones")

    # ── reading ──

    def config(self) -> RunConfig:
        return load_recipe(self.config_file)

    def data(self) -> Path:
        """Folder of the data that the run was trained on: as its settings say, seen from here or from beside runs/."""
        path = self.config().data_path
        beside = self.path.resolve().parent.parent / path
        return beside if beside.exists() and not path.exists() else path

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_file)

    def checkpoints(self) -> list[Checkpoint]:
        """Checkpoints by step, oldest first; not verified."""
        return _in_folder(self.checkpoints_folder)

    def milestones(self) -> list[Checkpoint]:
        """Early models that are kept to be looked at, oldest first; training cannot go on from them."""
        return _in_folder(self.milestones_folder)

    def steps(self) -> list[int]:
        """Every step whose model can be loaded."""
        return sorted({checkpoint.step for checkpoint in self.checkpoints() + self.milestones()})

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint; cheap, for readers that follow a run."""
        found = self.checkpoints()
        return found[-1].step if found else None

    def best_step(self) -> int | None:
        return _hinted_step(self.path / "best")

    def candidates(self, which: str = "best") -> list[Checkpoint]:
        """``best``, ``latest`` or a step: the checkpoint, and those to take instead if it is damaged (none for a step that
        is named). UserError when there is none."""
        found = self.checkpoints()
        if which not in ("best", "latest"):
            return [_at_step(self.milestones() + found, which, self.path)]
        if not found:
            raise UserError(f"run {self.path} has no checkpoint yet; wait for the first, or train longer")
        best = self.best_step() if which == "best" else None
        return [c for c in found if c.step == best] + [c for c in found[::-1] if c.step != best]

    def choose(self, which: str = "best") -> Checkpoint:
        """The first of the candidates that is whole, down to its last file."""
        candidates = self.candidates(which)
        for checkpoint in candidates if which in ("best", "latest") else ():
            try:
                checkpoint.verify()
                return checkpoint
            except DamagedCheckpoint:
                continue
        if which in ("best", "latest"):
            raise DamagedCheckpoint(f"all {len(candidates)} checkpoints of {self.path} are damaged")
        return candidates[0]

    def newest_valid(self, warn: Any = None) -> Checkpoint | None:
        """The newest checkpoint that verifies, for resuming. Damaged ones are moved aside to ``.bad-*`` and named
        through ``warn``; when all are damaged that is an error, never a silent start from step 0."""
        found = self.checkpoints()
        for checkpoint in reversed(found):
            try:
                checkpoint.verify()
                return checkpoint
            except DamagedCheckpoint as damage:
                aside = _free_name(checkpoint.path.with_name(f".bad-{checkpoint.path.name}"))
                self.files.rename(checkpoint.path, aside)
                if warn is not None:
                    warn(f"{damage}; moved it to {aside.name} and took the one before")
        if found:
            raise DamagedCheckpoint(
                f"all {len(found)} checkpoints of {self.path} were damaged and are now .bad-*; start again with --fresh"
            )
        return None

    # ── writing ──

    def lock(self) -> None:
        """Be the only trainer of this run, until ``unlock`` or the end of the process; readers never lock."""
        self.files.mkdir(self.path)
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        if not (_flock(descriptor) or _flock(descriptor, seconds=0.05)):  # a reader may be asking is_locked just now
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "?"
            os.close(descriptor)
            raise UserError(
                f"run {self.path} is being trained by process {holder}; wait for it, or choose another folder with --out"
            )
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        self._lock = descriptor

    def is_locked(self) -> bool:
        """Whether a trainer, this process or another, holds the run; leaves no trace."""
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDONLY)
        except OSError:
            return False
        try:
            return not _flock(descriptor)
        finally:
            os.close(descriptor)

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write_text(self, path: Path, text: str) -> None:
        """Replace a small file atomically."""
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        self.files.write(temporary, text.encode())
        self.files.rename(temporary, path)

    def save(self, snapshot: Snapshot, keep: int) -> Checkpoint:
        """Write a checkpoint atomically, then prune all but the newest ``keep`` and the best. On an error (a full
        disk) what was there before is untouched and the half-written folder is removed."""
        checkpoint = self._write_atomically(self.checkpoints_folder, snapshot)
        self.write_text(self.path / "latest", f"{checkpoint.path.name}\n")
        self.prune(keep, just_written=checkpoint)
        return checkpoint

    def save_milestone(self, snapshot: Snapshot) -> None:
        """Keep a model for good, without its optimizer and at half the size."""
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in snapshot.weights.items()}
        self._write_atomically(self.milestones_folder, replace(snapshot, weights=weights, optimizer={}))

    def _write_atomically(self, parent: Path, snapshot: Snapshot) -> Checkpoint:
        self.files.mkdir(parent)
        target = parent / f"step-{snapshot.step:08d}"
        temporary = parent / f".tmp-{snapshot.step}-{os.getpid()}"
        try:
            self._write_checkpoint(temporary, snapshot)
            if target.exists():
                self.files.rename(target, _free_name(target.with_name(f".trash-{target.name}")))
            self.files.rename(temporary, target)
        except OSError:
            self.files.remove_tree(temporary)
            raise
        self.files.sync_folder(parent)
        return Checkpoint(target)

    def _write_checkpoint(self, folder: Path, snapshot: Snapshot) -> None:
        self.files.mkdir(folder)
        payload = {
            "model.safetensors": lambda: to_safetensors(_plain(snapshot.weights)),
            "model.json": lambda: _json({"model": snapshot.model.model_dump(exclude_none=True), "step": snapshot.step}),
            "optimizer.safetensors": lambda: to_safetensors(_plain(snapshot.optimizer)),
            "state.json": lambda: _json(dict(snapshot.state)),
        }
        records = {}
        for name, make in payload.items():
            data = make()
            records[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            self.files.write(folder / name, data)
        self.files.write(
            folder / "manifest.json", _json({"version": MANIFEST_VERSION, "step": snapshot.step, "files": records})
        )
        self.files.sync_folder(folder)

    def mark_best(self, step: int) -> None:
        self.write_text(self.path / "best", f"step-{step:08d}\n")

    def prune(self, keep: int, just_written: Checkpoint) -> None:
        """Delete old checkpoints, after the newest one has been read back whole; leftovers of crashes go too."""
        just_written.verify()
        found = self.checkpoints()
        staying = {checkpoint.step for checkpoint in found[-keep:]} | {self.best_step(), just_written.step}
        for checkpoint in found:
            if checkpoint.step not in staying:
                trash = _free_name(checkpoint.path.with_name(f".trash-{checkpoint.path.name}"))
                self.files.rename(checkpoint.path, trash)
        for folder in (self.checkpoints_folder, self.milestones_folder):
            for leftover in folder.glob(".t*-*"):
                if leftover.name.startswith((".tmp-", ".trash-")):
                    self.files.remove_tree(leftover)

    def set_aside(self) -> Path | None:
        """Move an existing run to NAME.1, NAME.2 ... so that a fresh one loses nothing."""
        if not self.checkpoints() and not self.metrics_file.exists():
            return None
        aside = _free_name(self.path)
        self.files.rename(self.path, aside)
        return aside


@dataclass(frozen=True)
class LoadedRun:
    """A checkpoint in memory with its tokenizer."""

    folder: RunFolder
    checkpoint: Checkpoint
    model: GPT
    tokenizer: Tokenizer

    @property
    def step(self) -> int:
        return self.checkpoint.step


def find_run(target: str | Path | None = None, runs: Path = Path("runs")) -> tuple[RunFolder, str | None]:
    """A run folder, or one checkpoint folder of a run (then the second value is its step). None: the newest of runs/."""
    if target is None:
        return RunFolder(_newest_run(runs)), None
    path = Path(target)
    if "\0" in str(target):
        raise UserError(f"{str(target)!r} is not a path")
    if path.name.startswith("step-") and path.parent.name in ("checkpoints", "milestones"):
        return RunFolder(path.parent.parent), path.name.removeprefix("step-")
    if not path.is_dir() and (runs / path).is_dir() and not path.is_absolute() and ".." not in path.parts:
        path = runs / path
    if not path.is_dir():
        raise UserError(f"there is no run at {path}; the runs here are {_run_names(runs)}")
    folder = RunFolder(path)
    if not folder.config_file.exists():
        raise UserError(f"{path} is not a run folder (it has no config.toml); the runs here are {_run_names(runs)}")
    return folder, None


def open_run(
    target: str | Path | None = None,
    which: str = "best",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LoadedRun:
    """Load model and tokenizer of a run for sampling; also while it trains (a pruned checkpoint is retried once)."""
    folder, step = find_run(target)
    checkpoint, model = _load_first(folder, step or which, device, dtype)
    tokenizer = folder.tokenizer()
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{folder.tokenizer_file} has {tokenizer.vocab_size} pieces but the model {model.config.vocab_size}:"
            " it is the tokenizer of another run; copy the right one there"
        )
    expected = checkpoint.state().get("tokenizer_fingerprint")
    if expected is not None and expected != tokenizer.fingerprint:
        raise UserError(
            f"{folder.tokenizer_file} is the tokenizer of another run (its fingerprint differs); copy the right one there"
        )
    return LoadedRun(folder, checkpoint, model, tokenizer)


def _load_first(
    folder: RunFolder, which: str, device: torch.device | str, dtype: torch.dtype
) -> tuple[Checkpoint, GPT]:
    """The first candidate whose files are whole, of those that are used. Twice, because a trainer may prune meanwhile."""
    for last_attempt in (False, True):
        candidates = folder.candidates(which)
        for checkpoint in candidates:
            try:
                return checkpoint, checkpoint.load_model(device, dtype)
            except DamagedCheckpoint:
                if last_attempt and len(candidates) == 1:
                    raise
    raise DamagedCheckpoint(f"all {len(candidates)} checkpoints of {folder.path} are damaged")


def is_milestone(step: int) -> bool:
    """100, 300, 1,000, 3,000, 10,000 ..."""
    digits = str(step)
    return step >= 100 and digits[0] in "13" and digits[1:].strip("0") == ""


def no_space_left(error: OSError) -> bool:
    """Whether an error of the file system means that the disk, or the quota, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _flock(descriptor: int, seconds: float = 0.0) -> bool:
    """Lock a file after waiting so long; False when another has it."""
    time.sleep(seconds)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _newest_run(runs: Path) -> Path:
    found = [path.parent for path in runs.glob("*/config.toml") if (path.parent / "checkpoints").is_dir()]
    if not found:
        raise UserError(f"there is no run under {runs}/ yet; train one with: smalllm train")
    return max(found, key=lambda path: (path / "checkpoints").stat().st_mtime_ns)


def _run_names(runs: Path) -> str:
    return (
        ", ".join(sorted(path.parent.name for path in runs.glob("*/config.toml")))
        or "none (train one with: smalllm train)"
    )


def _in_folder(folder: Path) -> list[Checkpoint]:
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    steps = [name for name in names if name.startswith("step-") and name[5:].isdigit()]
    return [Checkpoint(folder / name) for name in sorted(steps, key=lambda name: int(name[5:]))]


def _at_step(found: list[Checkpoint], which: str, path: Path) -> Checkpoint:
    steps = ", ".join(map(str, sorted({checkpoint.step for checkpoint in found}))) or "none yet"
    if not which.isdigit():
        raise UserError(f"--checkpoint {which} is neither best, latest nor a step; the steps of {path} are {steps}")
    for checkpoint in reversed(found):
        if checkpoint.step == int(which):
            return checkpoint
    raise UserError(f"run {path} has no checkpoint at step {int(which)}; it has {steps}")


def _hinted_step(path: Path) -> int | None:
    try:
        digits = path.read_text(encoding="ascii").strip().removeprefix("step-")
    except (OSError, UnicodeDecodeError):
        return None
    return int(digits) if digits.isdigit() and len(digits) < 16 else None


def _free_name(path: Path) -> Path:
    """NAME, or NAME.1, NAME.2 ... : the first that is not taken."""
    candidate, count = path, 0
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}.{count}")
    return candidate


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
