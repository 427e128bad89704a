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
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from smalllm.config import ModelConfig, RunConfig, UserError, load_recipe
from smalllm.files import FileSystem, Piece
from smalllm.locks import Lock, holder, is_held
from smalllm.model import GPT
from smalllm.tokenizer import Tokenizer
from smalllm.untrusted import content, opened, printable

MANIFEST_VERSION = 1
PAYLOAD = ("model.safetensors", "model.json", "optimizer.safetensors", "state.json")
SMALL = 1 << 20
"""Bytes at most of a manifest."""
PIECE = 4 << 20
"""Bytes that are hashed and written, or read and hashed, at a time."""
ROOM = 1.1
"""Free space that a checkpoint wants before it is begun, in times its size."""
PATIENCE = 50
"""Times that a reader looks again for a checkpoint when those it saw were pruned before it had read them."""
DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of safetensors, for what checkpoints hold."""
Result = TypeVar("Result")


class DamagedCheckpoint(UserError):
    """A checkpoint whose bytes are not the ones that were written; the message names the file."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds. ``state`` is JSON: step, tokens, plan, best, scaler ... whatever the trainer needs."""

    step: int
    model: ModelConfig
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]

    def bytes(self) -> int:
        """Size on disk, the small files not counted."""
        return sum(tensor.nbytes for tensors in (self.weights, self.optimizer) for tensor in tensors.values())


class Checkpoint:
    """One folder ``step-NNNNNNNN``. Reading verifies size and SHA-256 of every file that is used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = int(path.name.removeprefix("step-"))

    def read(self, name: str) -> bytes:
        """The bytes of one file, equal to those that the manifest promises, or DamagedCheckpoint."""
        promised = self.manifest()["files"].get(name)
        try:
            with opened(self.path / name) as file:
                data = file.read()
        except OSError as error:
            raise DamagedCheckpoint(f"{self.path / name}: {error.strerror}") from None
        if promised is None or len(data) != promised["size"] or hashlib.sha256(data).hexdigest() != promised["sha256"]:
            raise DamagedCheckpoint(f"{self.path / name} is damaged: size or SHA-256 differs from its manifest.json")
        return data

    def manifest(self) -> dict[str, Any]:
        """Sizes and digests of the files; DamagedCheckpoint when they cannot be told."""
        try:
            manifest = json.loads(content(self.path / "manifest.json", SMALL))
            whole = {name: (record["size"], record["sha256"]) for name, record in manifest["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DamagedCheckpoint(f"{self.path / 'manifest.json'} is missing or damaged") from None
        if type(manifest.get("step")) is not int or type(manifest.get("version")) is not int:
            raise DamagedCheckpoint(f"{self.path / 'manifest.json'} is missing or damaged")
        if manifest.get("version") != MANIFEST_VERSION or manifest.get("step") != self.step or not whole:
            raise DamagedCheckpoint(
                f"{self.path / 'manifest.json'} is for step {manifest.get('step')}, version {manifest.get('version')};"
                f" this is version {MANIFEST_VERSION}: upgrade smalllm, or remove the folder"
            )
        return manifest

    def verify(self) -> None:
        """Raise DamagedCheckpoint unless every file is whole."""
        promised = self.manifest()["files"]
        for name in PAYLOAD:
            self._check(name, promised.get(name))

    def _check(self, name: str, promised: Any) -> None:
        digest, size = hashlib.sha256(), 0
        try:
            with opened(self.path / name) as file:
                while piece := file.read(PIECE):
                    digest.update(piece)
                    size += len(piece)
        except OSError as error:
            raise DamagedCheckpoint(f"{self.path / name}: {error.strerror}") from None
        if promised is None or size != promised["size"] or digest.hexdigest() != promised["sha256"]:
            raise DamagedCheckpoint(f"{self.path / name} is damaged: size or SHA-256 differs from its manifest.json")

    def state(self) -> dict[str, Any]:
        return self._object("state.json")

    def model_config(self) -> ModelConfig:
        """The shape of the model; UserError when the file holds another thing."""
        place = self.path / "model.json"
        try:
            config = ModelConfig.model_validate(self._object("model.json").get("model"))
        except ValidationError as error:
            reason = printable(error.errors()[0]["msg"])
            raise UserError(f"{place} does not describe a model: {reason}; take another checkpoint") from None
        if not config.vocab_size:
            raise UserError(f"{place} does not describe a model: it has no vocabulary; take another checkpoint")
        return config

    def _object(self, name: str) -> dict[str, Any]:
        """A JSON object; DamagedCheckpoint when the file is not one, even if its digest is right."""
        data = self.read(name)
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise DamagedCheckpoint(f"{self.path / name} is not a JSON object")
        return value

    def weights(self) -> dict[str, Tensor]:
        return self._tensors("model.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        return self._tensors("optimizer.safetensors")

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return parse_safetensors(self.read(name))
        except SafetensorError as error:
            raise DamagedCheckpoint(f"{self.path / name} is not a safetensors file: {printable(str(error))}") from None

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
        self._lock: Lock | None = None

    config_file = property(lambda self: self.path / "config.toml")
    environment_file = property(lambda self: self.path / "environment.json")
    tokenizer_file = property(lambda self: self.path / "tokenizer.model")
    metrics_file = property(lambda self: self.path / "metrics.jsonl")
    samples_file = property(lambda self: self.path / "samples.jsonl")
    failure_file = property(lambda self: self.path / "failure.md")
    _lock_file = property(lambda self: self.path / ".lock")
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

        def verified(checkpoint: Checkpoint) -> Checkpoint:
            checkpoint.verify()
            return checkpoint

        return self.first(which, verified)

    def first(self, which: str, use: Callable[[Checkpoint], Result]) -> Result:
        """What ``use`` makes of the first of the candidates that is not damaged. One that a trainer prunes just then is not
        damaged: the list is read again. UserError when there is none."""
        for _ in range(PATIENCE):
            candidates = self.candidates(which)
            for checkpoint in candidates:
                try:
                    return use(checkpoint)
                except DamagedCheckpoint:
                    if len(candidates) == 1 and checkpoint.path.exists():
                        raise
            if all(checkpoint.path.exists() for checkpoint in candidates):
                break
        raise DamagedCheckpoint(f"all {len(candidates)} checkpoints of {self.path} are damaged")

    def newest_valid(self, warn: Callable[[str], None] | None = None) -> Checkpoint | None:
        """The newest checkpoint that verifies, for resuming. Damaged ones that are newer are moved aside to ``.bad-*`` and named
        through ``warn``. When all are damaged that is an error, this time and the next, never a silent start from step 0."""
        damaged: list[tuple[Checkpoint, DamagedCheckpoint]] = []
        for checkpoint in reversed(self.checkpoints()):
            try:
                checkpoint.verify()
            except DamagedCheckpoint as damage:
                damaged.append((checkpoint, damage))
                continue
            for bad, reason in damaged:
                self._set_aside_damaged(bad, reason, warn)
            return checkpoint
        if damaged:
            raise DamagedCheckpoint(
                f"all {len(damaged)} checkpoints of {self.path} are damaged, the newest because {damaged[0][1]};"
                " put back a copy of one, or start again with --fresh"
            )
        return None

    def _set_aside_damaged(self, bad: Checkpoint, damage: Exception, warn: Callable[[str], None] | None) -> None:
        aside = _free_name(bad.path.with_name(f".bad-{bad.path.name}"))
        self.files.rename(bad.path, aside)
        if warn is not None:
            warn(f"{damage}; moved it to {aside.name} and took the one before")

    # ── writing ──

    def lock(self, warn: Callable[[str], None] | None = None) -> None:
        """Be the only trainer of this run, until ``unlock`` or the end of the process; readers never lock. Where the file
        system has no locks, that is said through ``warn``."""
        self.files.mkdir(self.path)
        self._lock = Lock.acquire(self._lock_file, warn)
        if self._lock is None:
            raise UserError(
                f"run {self.path} is being trained by process {holder(self._lock_file)}; wait for it, or choose another folder"
                " with --out"
            )

    def check_locked(self) -> None:
        """UserError when another trainer has taken over, which only a file system without locks allows."""
        if self._lock is not None and self._lock.lost():
            raise UserError(
                f"run {self.path} was taken over by process {holder(self._lock_file)} while this one stood still; nothing more is"
                " written to it from here"
            )

    def is_locked(self) -> bool:
        """Whether a trainer, this process or another, holds the run; leaves no trace."""
        return is_held(self._lock_file)

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def write_text(self, path: Path, text: str) -> None:
        """Replace a small file atomically."""
        self.write_bytes(path, text.encode())

    def write_bytes(self, path: Path, data: bytes) -> None:
        """Replace a small file atomically."""
        self.files.replace(path, [data])

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
        need, free = int(ROOM * snapshot.bytes()), self.files.free_bytes(parent)
        if free < need:
            raise OSError(errno.ENOSPC, f"{free / 2**20:.0f} MiB free, {need / 2**20:.0f} MiB needed", str(parent))
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
        """Every file, hashed while it is written; the manifest last, when all bytes are on the device."""
        self.files.mkdir(folder)
        payload: dict[str, Iterable[Piece]] = {
            "model.safetensors": safetensors_pieces(snapshot.weights),
            "model.json": [_json({"model": snapshot.model.model_dump(exclude_none=True), "step": snapshot.step})],
            "optimizer.safetensors": safetensors_pieces(snapshot.optimizer),
            "state.json": [_json(dict(snapshot.state))],
        }
        records = {}
        for name, pieces in payload.items():
            hashed = _Hashed(pieces)
            self.files.write(folder / name, hashed)
            records[name] = {"size": hashed.size, "sha256": hashed.digest.hexdigest()}
        self.files.write(
            folder / "manifest.json", [_json({"version": MANIFEST_VERSION, "step": snapshot.step, "files": records})]
        )
        self.files.sync_folder(folder)

    def mark_best(self, step: int | None) -> None:
        """Leave the hint that this is the best step; None: that none is known."""
        if step is not None:
            self.write_text(self.path / "best", f"step-{step:08d}\n")
        elif (self.path / "best").exists():
            self.files.unlink(self.path / "best")

    def prune(self, keep: int, just_written: Checkpoint) -> None:
        """Delete old checkpoints, after the newest one has been read back whole; leftovers of crashes go too."""
        just_written.verify()
        found = self.checkpoints()
        staying = {checkpoint.step for checkpoint in found[-keep:]} | {self.best_step(), just_written.step}
        for checkpoint in found:
            if checkpoint.step not in staying:
                trash = _free_name(checkpoint.path.with_name(f".trash-{checkpoint.path.name}"))
                self.files.rename(checkpoint.path, trash)
        self.sweep()

    def sweep(self) -> None:
        """Delete what crashes and pruning left; only for who holds the lock."""
        for folder in (self.checkpoints_folder, self.milestones_folder):
            leftovers = [path for path in folder.glob(".t*-*") if path.name.startswith((".tmp-", ".trash-"))]
            if leftovers:
                self.files.sync_folder(folder)  # no name of a checkpoint may come back without its files
            for leftover in leftovers:
                self.files.remove_tree(leftover)

    def drop_after(self, step: int) -> None:
        """Take back the checkpoints of later steps; the next ``prune`` deletes them."""
        for checkpoint in self.checkpoints():
            if checkpoint.step > step:
                self.files.rename(
                    checkpoint.path, _free_name(checkpoint.path.with_name(f".trash-{checkpoint.path.name}"))
                )
        if self.checkpoints_folder.exists():
            self.files.sync_folder(self.checkpoints_folder)

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
    try:
        path.exists()
    except (OSError, ValueError):  # NUL, 5,000 characters, what the file system cannot spell
        raise UserError(f"{printable(str(target))!r} is not a path") from None
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
    checkpoint, model = folder.first(step or which, lambda found: (found, found.load_model(device, dtype)))
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


def is_milestone(step: int) -> bool:
    """100, 300, 1,000, 3,000, 10,000 ..."""
    digits = str(step)
    return step >= 100 and digits[0] in "13" and digits[1:].strip("0") == ""


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
    steps = [name for name in names if name.startswith("step-") and _is_step(name[5:])]
    return [Checkpoint(folder / name) for name in sorted(steps, key=lambda name: int(name[5:]))]


def _is_step(digits: str) -> bool:
    """Whether these are the digits of a step: not ² and not 5,000 of them, which ``isdigit`` takes."""
    return digits.isascii() and digits.isdigit() and len(digits) < 16


def _at_step(found: list[Checkpoint], which: str, path: Path) -> Checkpoint:
    steps = ", ".join(map(str, sorted({checkpoint.step for checkpoint in found}))) or "none yet"
    if not _is_step(which):
        raise UserError(
            f"--checkpoint {printable(which)} is neither best, latest nor a step; the steps of {path} are {steps}"
        )
    for checkpoint in reversed(found):
        if checkpoint.step == int(which):
            return checkpoint
    raise UserError(f"run {path} has no checkpoint at step {int(which)}; it has {steps}")


def _hinted_step(path: Path) -> int | None:
    try:
        digits = path.read_text(encoding="ascii").strip().removeprefix("step-")
    except (OSError, UnicodeDecodeError):
        return None
    return int(digits) if _is_step(digits) else None


def _free_name(path: Path) -> Path:
    """NAME, or NAME.1, NAME.2 ... : the first that is not taken."""
    candidate, count = path, 0
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}.{count}")
    return candidate


class _Hashed:
    """Pieces on their way to the disk, counted and hashed as they pass."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.pieces, self.digest, self.size = pieces, hashlib.sha256(), 0

    def __iter__(self) -> Iterator[Piece]:
        for piece in self.pieces:
            self.digest.update(piece)
            self.size += len(piece)
            yield piece


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> Iterator[Piece]:
    """The bytes of a safetensors file (https://github.com/huggingface/safetensors#format) piece by piece, so that the file is
    never in memory a second time: a JSON header with its length before it, then the tensors, widest elements first."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, end = {}, 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        flat = tensors[name].detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        data = flat.numpy().data
        yield from (data[start : start + PIECE] for start in range(0, len(data), PIECE))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
