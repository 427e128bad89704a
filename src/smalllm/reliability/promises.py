"""What is promised of runs and checkpoints, as trials: a tiny run is killed, its disk crashes, fails and loses power, its
files are damaged, and every time it must end with the bits of the run to which nothing happened.

Used by `smalllm doctor --reliability` on the user's own disk, and at full length by the tests.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch

import smalllm.training.optimizer  # noqa: F401  (what the first step imports: children inherit it)
from smalllm.checkpoint import Checkpoint, DamagedCheckpoint, RunFolder, Snapshot, model_weights
from smalllm.config import ModelConfig, RunConfig, UserError, parse_config
from smalllm.data.prepare import prepare
from smalllm.files import FileSystem
from smalllm.metrics import MetricsLog, read_records
from smalllm.model import GPT
from smalllm.reliability.disks import CRASHED, CountingDisk, CrashingDisk, Event, FailingDisk, PowerLoss, RecordingDisk
from smalllm.reliability.trials import Trial
from smalllm.training.saver import Saver
from smalllm.training.trainer import Trainer

STEPS = 40
CONFIGURATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "accumulation": {"train": {"micro_batch": 3}},
    "dropout": {"model": {"dropout": 0.2}, "train": {"micro_batch": 4}},
    "muon": {"optim": {"kind": "muon", "lr": 0.02}, "model": {"qk_norm": True}},
    "fp16 with loss scaling": {"train": {"precision": "fp16"}},
    "wsd, minutes": {"optim": {"schedule": "wsd"}, "train": {"steps": 0, "minutes": 1.0}},
    "untied, bf16": {"model": {"tie_embeddings": False}, "train": {"precision": "bf16"}},
    "learned positions, recomputed": {
        "model": {"positions": "learned", "norm": "layernorm", "activation": "gelu"},
        "train": {"recompute": True, "micro_batch": 4},
    },
}
"""Ways to train whose state differs."""
TIMES = {"seconds", "tokens_per_second", "mfu", "memory_bytes", "started", "timer", "evaluation_seconds", "data_wait"}
"""What no two runs have in common."""


def settings(data: Path, name: str = "plain", **train: Any) -> RunConfig:
    """A run that is over in a quarter of a second."""
    chosen = CONFIGURATIONS[name]
    return parse_config({
        "name": "tiny", "seed": 7, "data": {"path": str(data)},
        "model": {"layers": 2, "width": 32, "heads": 2, "context": 32} | chosen.get("model", {}),
        "optim": {"lr": 3e-3, "warmup_steps": 2} | chosen.get("optim", {}),
        "train": {
            "steps": STEPS, "batch_tokens": 256, "micro_batch": 8, "precision": "fp32", "compile": "off", "device": "cpu",
            "log_every": 1, "evaluate_every": 10, "evaluate_tokens": 500, "sample_tokens": 4, "preflight": False,
            "checkpoint_every": 5, "keep": 2, "milestones": False,
        } | chosen.get("train", {}) | train,
    })  # fmt: skip


def make_data(given: Path) -> None:
    """A few hundred stories in ``given``/data."""
    prepare(["storyworld:200"], given / "data", vocab_size=512, seed=1, workers=1)


class Recorder:
    """A display that remembers."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.stories: list[tuple[int, str, str]] = []
        self.notes: list[str] = []

    def progress(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def story(self, step: int, prompt: str, text: str) -> None:
        self.stories.append((step, prompt, text))

    def note(self, message: str) -> None:
        self.notes.append(message)


class SteppedClock:
    """A clock that knows only steps: what depends on time is then a function of the step as well."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Unsynced(FileSystem):
    """Waits for no device: for runs that only have to be there."""

    def sync(self, file: IO[bytes]) -> None: ...
    def sync_folder(self, path: Path) -> None: ...


def train(config: RunConfig, run: Path, files: FileSystem | None = None, display: Any = None) -> Trainer:
    """Train or continue a run as `smalllm train` does; with a budget of minutes, by a clock that steps."""
    folder, clock = RunFolder(run, files), SteppedClock()
    folder.lock()
    try:
        trainer = Trainer(config, folder, display=display, clock=clock if config.train.minutes else time.monotonic)
        if trainer.scaler is not None:  # so small that it grows, and so matters, within these few steps
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
        if config.train.minutes:
            _step_by_step(
                trainer, clock, 60.0 * config.train.minutes / (1.2 * STEPS)
            )  # the end is judged within the budget
        trainer.fit()
        return trainer
    finally:
        folder.unlock()


def _step_by_step(trainer: Trainer, clock: SteppedClock, seconds: float) -> None:
    accumulate = trainer.accumulate

    def counted(tokens: int) -> float:
        clock.now += seconds
        return accumulate(tokens)

    trainer.accumulate = counted  # type: ignore[method-assign]


def digest(run: Path) -> str:
    """All that a run leaves behind and that must not depend on what happened to it: newest checkpoint, lines, stories."""
    folder = RunFolder(run)
    newest = folder.checkpoints()[-1]
    parts = [newest.read("model.safetensors"), newest.read("optimizer.safetensors")]
    parts.append(_untimed(newest.state()))
    parts += [_untimed(record) for record in read_records(folder.metrics_file)]
    parts.append(folder.samples_file.read_bytes() if folder.samples_file.exists() else b"")
    parts.append(str(folder.best_step()).encode())
    return hashlib.sha256(b"|".join(parts)).hexdigest()


def _untimed(value: Any) -> bytes:
    def clean(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {key: clean(part) for key, part in inner.items() if key not in TIMES}
        return inner

    return json.dumps(clean(value), sort_keys=True).encode()


def straight(given: Path, name: str) -> Path:
    """The run to which nothing happened."""
    return given / "straight" / name.replace(" ", "-").replace(",", "")


def check_same(run: Path, expected: Path) -> None:
    """The run has the bits of the other one, and nothing half-finished is left in it."""
    assert digest(run) == digest(expected), "not the bits of the run to which nothing happened"
    steps = [record["step"] for record in read_records(RunFolder(run).metrics_file)]
    assert steps == sorted(set(steps)) and steps[0] == 1, "steps are missing or there twice"
    left = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith((".tmp", ".trash"))]
    assert not left, f"left behind: {left}"


# ── T1: kill -9 ──


def _set_up_kills(given: Path) -> None:
    make_data(given)
    for name in CONFIGURATIONS:
        train(settings(given / "data", name), straight(given, name), Unsynced())


def _kills(number: int, folder: Path, given: Path) -> int:
    """Kill a run at random moments, start it again, until five kills did not stop it from ending; returns the kills."""
    name = list(CONFIGURATIONS)[number % len(CONFIGURATIONS)]
    chance, kills, config = random.Random(number), 0, settings(given / "data", name)
    longest = 0.35
    while True:
        pid = in_child(lambda: train(config, folder / "run"))
        if kills < 5:
            time.sleep(chance.uniform(0.02, longest))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "a run that was killed before did not go on"
            break
        kills += 1
    check_same(folder / "run", straight(given, name))
    return kills


def in_child(work: Callable[[], object]) -> int:
    """Do something in a forked process, which ends with 0, or with 1 and a traceback; its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


# ── T2: a crash at every event of a save ──

CONFIG = ModelConfig(layers=1, width=16, heads=2, context=8, vocab_size=32)
EVENTS, WAYS = 70, 6
"""More events than a save and its rotation have, and the ways to crash at each."""


def snapshot(step: int) -> Snapshot:
    """A state that is a function of its step."""
    torch.manual_seed(step)
    model = GPT(CONFIG)
    return Snapshot(step, CONFIG, model_weights(model), {"a.exp_avg": torch.randn(3)}, {"training": {"step": step}})


def _before(run: Path) -> None:
    folder = RunFolder(run)
    for step in (1, 2):
        folder.save(snapshot(step), keep=2)
    folder.mark_best(2)
    MetricsLog(folder.metrics_file).append({"step": 2})


def _save_third(run: Path, files: FileSystem) -> None:
    """Append a line, save, rotate, leave the hint: all that happens to a disk between two steps."""
    folder = RunFolder(run, files)
    log = MetricsLog(folder.metrics_file, files)
    log.append({"step": 3})
    saver = Saver(folder, 1, (log,))
    saver._save(snapshot(3))
    saver._mark_best(3)


def _set_up_crashes(given: Path) -> None:
    _before(given / "run")
    shutil.copytree(given / "run", given / "counted")
    disk = CountingDisk()
    _save_third(given / "counted", disk)
    assert len(disk.events) < EVENTS
    (given / "events.json").write_text(json.dumps(disk.events))


def _crash(number: int, folder: Path, given: Path) -> int:
    """The process dies at event ``number`` // 6 of a save: before it, after it, or with 0, 1, half or all but one of the bytes
    of a write on the disk."""
    events = json.loads((given / "events.json").read_text())
    at, way = divmod(number, WAYS)
    if at >= len(events) or (way >= 2 and events[at][0] != "put"):
        return 0
    size = events[at][1]
    disk = CrashingDisk(
        at, ("before", "after", "torn", "torn", "torn", "torn")[way], (0, 0, 0, 1, size // 2, size - 1)[way]
    )
    run = folder / "run"
    shutil.copytree(given / "run", run)
    _, status = os.waitpid(in_child(lambda: _save_third(run, disk)), 0)
    assert os.WEXITSTATUS(status) == CRASHED
    kinds = [kind for kind, _ in events]
    announced = at > kinds.index("rename") + 1 or (at == kinds.index("rename") + 1 and way == 1)
    check_survivor(run, 3 if announced else 2)
    return 1


def check_survivor(run: Path, least: int) -> None:
    """Every checkpoint that shows is whole, the newest is not older than ``least``, and the next save works and cleans up."""
    folder, warnings = RunFolder(run), list[str]()
    for checkpoint in folder.checkpoints():
        checkpoint.verify()
    newest = folder.newest_valid(warnings.append)
    assert newest is not None and newest.step >= least and not warnings, f"{newest and newest.step} {warnings}"
    check_content(newest)
    best = folder.choose("best")
    assert best.step in (newest.step, newest.step - 1)
    records = [record["step"] for record in read_records(folder.metrics_file)]
    assert [step for step in records if step <= newest.step] == list(range(2, newest.step + 1)), records
    after = newest.step + 1
    folder.save(snapshot(after), keep=1)
    assert folder.choose("latest").step == after
    assert not [path for path in folder.checkpoints_folder.iterdir() if path.name.startswith(".")]


def check_content(checkpoint: Checkpoint) -> None:
    """The bits that were saved."""
    expected = snapshot(checkpoint.step)
    weights, optimizer = checkpoint.weights(), checkpoint.optimizer()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.weights.items())
    assert all(torch.equal(optimizer[name], tensor) for name, tensor in expected.optimizer.items())
    assert checkpoint.state() == expected.state


# ── T3: power loss ──


def _set_up_power(given: Path) -> None:
    """Record what a run of ten steps does to the disk, and when each checkpoint was announced."""
    make_data(given)
    disk, save = RecordingDisk(), Saver._save

    def announced(saver: Saver, state: Snapshot) -> None:
        save(saver, state)
        disk.mark(state.step)

    (given / "recorded").mkdir()
    with replaced(Saver, "_save", announced):
        train(_short(given), given / "recorded" / "runs" / "run", disk)
    train(_short(given), given / "straight")
    root = given / "recorded"
    events = [
        {"kind": e.kind, "path": str(e.path.relative_to(root)), "other": str(e.other.relative_to(root)) if e.other else None,
         "data": e.data.hex(), "offset": e.offset}
        for e in disk.events
    ]  # fmt: skip
    (given / "trace.json").write_text(json.dumps({"events": events, "marks": disk.marks}))


def _short(given: Path) -> RunConfig:
    return settings(given / "data", steps=10, checkpoint_every=2, evaluate_every=5)


def _power(number: int, folder: Path, given: Path) -> None:
    """The power goes after some event; one of the disks that may be left behind is what training goes on from."""
    events, marks = _trace(given)
    chance = random.Random(number)
    cut = number % (len(events) + 1)
    PowerLoss(events[:cut], RECORDED).write_to(folder, chance)
    promised = max((step for place, step in marks if place <= cut), default=0)
    run = folder / "runs" / "run"
    found = RunFolder(run)
    if promised:
        newest = next((c for c in reversed(found.checkpoints()) if _whole(c)), None)
        assert newest is not None and newest.step >= promised, f"step {promised} was announced and is gone"
        lines = {record["step"] for record in read_records(found.metrics_file)}
        assert lines >= set(range(1, newest.step)), f"lines of steps before {newest.step} are gone"
        assert found.config() and found.tokenizer()
    if number % 10 == 0:
        train(_short(given), run)
        check_same(run, given / "straight")


RECORDED = Path("/recorded")


@cache
def _trace(given: Path) -> tuple[list[Event], list[tuple[int, int]]]:
    """What was recorded; read once for all cases of a process."""
    trace = json.loads((given / "trace.json").read_text())
    return [_event(record) for record in trace["events"]], trace["marks"]


def _event(record: Mapping[str, Any]) -> Event:
    other = RECORDED / record["other"] if record["other"] else None
    return Event(record["kind"], RECORDED / record["path"], other, bytes.fromhex(record["data"]), record["offset"])


def _whole(checkpoint: Checkpoint) -> bool:
    try:
        checkpoint.verify()
    except DamagedCheckpoint:
        return False
    return True


# ── T4: errors of the disk ──

ERRORS = [(number, False) for number in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES)]
ERRORS += [(errno.ENOSPC, True), (errno.EROFS, True)]
"""What fails, and whether for good."""
LIFE = 400
"""More events than a run of six steps has."""


def _set_up_errors(given: Path) -> None:
    make_data(given)
    disk = CountingDisk()
    train(_shorter(given), given / "straight", disk)
    assert len(disk.events) < LIFE, len(disk.events)
    (given / "events").write_text(str(len(disk.events)))


def _shorter(given: Path) -> RunConfig:
    return settings(given / "data", steps=6, checkpoint_every=2, evaluate_every=3)


def _disk_error(number: int, folder: Path, given: Path) -> int:
    """The k-th change to the disk fails, once or for good. What was saved is whole, and a run with a mended disk ends as ever."""
    at, kind = divmod(number, len(ERRORS))
    if at >= int((given / "events").read_text()):
        return 0
    disk, notes = FailingDisk(at, *ERRORS[kind]), Recorder()
    run, ended = folder / "run", False
    try:
        train(_shorter(given), run, disk, notes)
        ended = True
    except (UserError, OSError) as error:  # at the beginning, or because the last checkpoint could not be written
        assert str(error)
    for checkpoint in RunFolder(run).checkpoints():
        checkpoint.verify()
    if ended:
        assert RunFolder(run).checkpoints()[-1].step == 6
    else:
        assert disk.for_good or not RunFolder(run).checkpoints() or at < 40, "one error ended a run that could go on"
    train(_shorter(given), run)
    mine, expected = RunFolder(run), RunFolder(given / "straight")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert mine.checkpoints()[-1].read(name) == expected.checkpoints()[-1].read(name)
    lines, wanted = (list(map(_untimed, read_records(folder.metrics_file))) for folder in (mine, expected))
    assert lines == wanted
    return 1


# ── T5: damage ──

DAMAGES = ("flip", "flip", "flip", "flip", "flip", "cut", "grow", "delete", "zero", "swap", "stale")


def _set_up_damage(given: Path) -> None:
    folder = RunFolder(given / "run")
    for step in (1, 2, 3):
        folder.save(snapshot(step), keep=9)


def _damage(number: int, folder: Path, given: Path) -> None:
    """Something happens to the newest checkpoint while nobody looks: it is noticed, named, and the one before taken."""
    chance, run = random.Random(number), RunFolder(folder / "run")
    shutil.copytree(given / "run", run.path)
    newest = run.checkpoints()[-1].path
    name = damage(newest, chance)
    warnings: list[str] = []
    assert run.choose("latest").step == 2, f"{name}: damage was not noticed"
    found = run.newest_valid(warnings.append)
    assert found is not None and found.step == 2 and len(warnings) == 1
    assert newest.name in warnings[0] and (run.checkpoints_folder / f".bad-{newest.name}").is_dir()
    check_content(found)


def damage(checkpoint: Path, chance: random.Random, ways: Sequence[str] = DAMAGES) -> str:
    """Damage one file of a checkpoint; says which and how."""
    way = chance.choice(ways)
    path = checkpoint / ("manifest.json" if way == "stale" else chance.choice(sorted(os.listdir(checkpoint))))
    data = bytearray(path.read_bytes())
    match way:
        case "flip":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case "cut":
            del data[chance.randrange(len(data)) :]
        case "grow":
            data += bytes(chance.randrange(1, 5000))
        case "zero":
            start = chance.randrange(len(data)) // 4096 * 4096
            data[start : start + 4096] = bytes(len(data[start : start + 4096]))
        case "swap":
            others = [other for other in sorted(checkpoint.iterdir()) if other != path]
            other = chance.choice(others)
            data = bytearray(other.read_bytes())
            other.write_bytes(path.read_bytes())
        case "stale":
            data = bytearray((checkpoint.with_name("step-00000002") / "manifest.json").read_bytes())
    path.unlink() if way == "delete" else path.write_bytes(data)
    return f"{way} of {path.name}"


# ── T7: resume from every step ──


def _set_up_resumes(given: Path) -> None:
    make_data(given)
    for name in CONFIGURATIONS:
        train(settings(given / "data", name, checkpoint_every=1, keep=2 * STEPS), straight(given, name), Unsynced())


def _resume(number: int, folder: Path, given: Path) -> None:
    """Go on from step k as if it were the last that had been saved."""
    name = list(CONFIGURATIONS)[number % len(CONFIGURATIONS)]
    step = 1 + number // len(CONFIGURATIONS) % (STEPS - 1)
    source, run = straight(given, name), folder / "run"
    shutil.copytree(source, run, ignore=shutil.ignore_patterns("checkpoints"))
    checkpoint = f"step-{step:08d}"
    shutil.copytree(source / "checkpoints" / checkpoint, run / "checkpoints" / checkpoint)
    notes = Recorder()
    train(settings(given / "data", name), run, Unsynced(), notes)
    assert f"resumed from step {step}" in notes.notes
    check_same(run, source)


# ── T11: readers and second writers ──


def _read(number: int, folder: Path, given: Path) -> int:
    """Read a run as fast as possible while its checkpoints are saved and pruned; returns the reads."""
    run = RunFolder(folder / "run")
    run.save(snapshot(1), keep=1)
    writer = in_child(lambda: _write_many(run.path))
    reads, done = 0, 0
    while not done:
        done, status = os.waitpid(writer, os.WNOHANG)
        for which in ("latest", "best"):
            run.first(which, check_content)
            reads += 1
    assert status == 0 and reads > 4
    return reads


def _write_many(run: Path) -> None:
    folder = RunFolder(run)
    for step in range(2, 42):
        folder.save(snapshot(step), keep=1)
        if step % 3 == 0:
            folder.mark_best(step)


def _second_writer(number: int, folder: Path, given: Path) -> None:
    """A run that is being trained is refused to others at once, with the number of the process; one whose trainer was
    killed is not."""
    run, ready = folder / "run", folder / "ready"

    def hold() -> None:
        RunFolder(run).lock()
        ready.touch()
        time.sleep(60)

    holder = in_child(hold)
    while not ready.exists():
        time.sleep(0.001)
    began, refused = time.monotonic(), ""
    try:
        RunFolder(run).lock()
    except UserError as error:
        refused = str(error)
    assert f"process {holder}" in refused and time.monotonic() - began < 1.0, refused
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    mine = RunFolder(run)
    mine.lock()
    mine.unlock()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute is another one for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


TRIALS = [
    Trial("T1", "killed at random moments, a run ends with the bits of one that was not", _kills, 4, 100, _set_up_kills),
    Trial("T2", "a crash at any event of a save loses nothing that was saved", _crash, EVENTS * WAYS, EVENTS * WAYS,
          _set_up_crashes, together=20),
    Trial("T3", "a power cut at any event loses nothing that was announced", _power, 300, 5000, _set_up_power, together=50),
    Trial("T4", "an error of the disk costs a checkpoint, not the run", _disk_error, 60, LIFE * len(ERRORS), _set_up_errors,
          together=10),
    Trial("T5", "damage is noticed and named, and the checkpoint before is taken", _damage, 200, 2000, _set_up_damage,
          together=50),
    Trial("T7", "resumed from any step, a run ends with the same bits", _resume, 12, (STEPS - 1) * len(CONFIGURATIONS),
          _set_up_resumes),
    Trial("T11a", "readers never meet a checkpoint that is half there", _read, 1, 5),
    Trial("T11b", "a second trainer is refused, a dead one does not block", _second_writer, 5, 100),
]  # fmt: skip
"""In the order of docs/reliability.md."""
