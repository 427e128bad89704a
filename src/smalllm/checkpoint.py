"""The run folder: every path of a run, and how a checkpoint is written, verified, loaded and pruned.

    runs/NAME/
    ├── config.toml        resolved settings; re-runs the run      ├── environment.json  versions, device, command, data fingerprint
    ├── tokenizer.model                                            ├── metrics.jsonl     one object per logged step
    ├── samples.jsonl      a sample story per evaluation           ├── best, latest      hints: one line, the name of a checkpoint
    └── checkpoints/step-00001000/{model.safetensors, model.json, optimizer.safetensors, state.json, manifest.json}

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
from collections.abc import Mapping
from dataclasses import dataclass
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
        with torch.device("meta"):
            model = GPT(self.model_config())
        weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in self.weights().items()}
        check_weights(model, weights, str(self.path / "model.safetensors"))
        model.load_state_dict(weights, strict=False, assign=True)
        model.tie()
        model.rebuild_tables()
        return model.to(device).eval()


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
        try:
            names = os.listdir(self.checkpoints_folder)
        except OSError:
            return []
        steps = sorted(name for name in names if name.startswith("step-") and name[5:].isdigit())
        return [Checkpoint(self.checkpoints_folder / name) for name in sorted(steps, key=lambda name: int(name[5:]))]

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint; cheap, for readers that follow a run."""
        found = self.checkpoints()
        return found[-1].step if found else None

    def best_step(self) -> int | None:
        return _hinted_step(self.path / "best")

    def choose(self, which: str = "best") -> Checkpoint:
        """``best``, ``latest`` or a step. A damaged one is skipped for an older one, except when named by step."""
        found = self.checkpoints()
        if not found:
            raise UserError(f"run {self.path} has no checkpoint yet; wait for the first, or train longer")
        if which not in ("best", "latest"):
            return _at_step(found, which, self.path)
        best = self.best_step() if which == "best" else None
        ordered = [c for c in found if c.step == best] + found[::-1]
        for checkpoint in ordered:
            try:
                checkpoint.verify()
                return checkpoint
            except DamagedCheckpoint:
                continue
        raise DamagedCheckpoint(f"all {len(found)} checkpoints of {self.path} are damaged")

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
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "?"
            os.close(descriptor)
            raise UserError(
                f"run {self.path} is being trained by process {holder}; wait for it, or choose another folder with --out"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        self._lock = descriptor

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
        self.files.mkdir(self.checkpoints_folder)
        target = self.checkpoints_folder / f"step-{snapshot.step:08d}"
        temporary = self.checkpoints_folder / f".tmp-{snapshot.step}-{os.getpid()}"
        try:
            self._write_checkpoint(temporary, snapshot)
            if target.exists():
                self.files.rename(target, _free_name(target.with_name(f".trash-{target.name}")))
            self.files.rename(temporary, target)
        except OSError:
            self.files.remove_tree(temporary)
            raise
        self.files.sync_folder(self.checkpoints_folder)
        self.write_text(self.path / "latest", f"{target.name}\n")
        checkpoint = Checkpoint(target)
        self.prune(keep, just_written=checkpoint)
        return checkpoint

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
        for leftover in self.checkpoints_folder.glob(".t*-*"):
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
    if path.name.startswith("step-") and path.parent.name == "checkpoints":
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
    for attempt in range(2):
        checkpoint = folder.choose(step or which)
        try:
            model = checkpoint.load_model(device, dtype)
            break
        except DamagedCheckpoint:
            if attempt:
                raise
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


def no_space_left(error: OSError) -> bool:
    """Whether an error of the file system means that the disk, or the quota, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def _at_step(found: list[Checkpoint], which: str, path: Path) -> Checkpoint:
    steps = ", ".join(str(checkpoint.step) for checkpoint in found)
    if not which.isdigit():
        raise UserError(f"--checkpoint {which} is neither best, latest nor a step; the steps of {path} are {steps}")
    for checkpoint in found:
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
