"""A run on another machine: check the machine, push the code, set it up, launch, follow, fetch. Alone runs ssh and rsync.

    HOST:DIR/
    ├── the tracked files of this checkout, .venv/
    ├── data/NAME               data that was pushed
    ├── runs/NAME               the run, as `smalllm train` makes it
    └── .deploy/NAME/{log, exit, pid, born}   what the run said, its exit code, its process, when the log began

What happens there stands in remote/*.sh, read by the machine's sh from its standard input; what happens here is a ``Command``,
which can be printed in place of run. The run belongs to tmux there and not to the connection: nothing here ends it but ``stop``.
The module prints nothing; how a run trains it does not know.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

from smalllm.config import RunConfig, UserError
from smalllm.files import FileSystem
from smalllm.metrics import read_records
from smalllm.terminal import plain
from smalllm.untrusted import printable

if TYPE_CHECKING:
    from smalllm.checkpoint import RunFolder  # with PyTorch, which takes seconds that only fetching needs

LEAST_PYTHON = (3, 11)
"""requires-python of pyproject.toml."""
ENVIRONMENT_BYTES = 8 << 30
"""Room that `uv sync` wants: torch with CUDA and the rest were 6.1 GB with torch 2.15."""
RUN_BYTES = 2 << 30
"""Room for the run; training measures it for itself before its first step."""
GIVE_UP_SECONDS = 3600.0
LONGEST_PAUSE = 60.0
PASSES = 5
"""Of rsync over a run that goes on training."""
SSH_OPTIONS = (
    "-a", "-x",  # neither agent nor display: the machine is not ours
    "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3",
    "-o", "StrictHostKeyChecking=accept-new",
)  # fmt: skip
"""OpenSSH's (man ssh_config): never ask; notice within a minute that nobody answers; learn a new host's key, refuse a changed one."""
NEVER_PUSHED = (
    "runs/**", "data/**", "**/.env*", "**/.netrc", "**/*.pem", "**/*.key", "**/id_rsa*", "**/id_ecdsa*", "**/id_ed25519*",
)  # fmt: skip
"""Not even if git tracks it (pathspecs, `man gitglossary`)."""
NOT_FETCHED = (".lock", ".lock-beat", ".tmp-*", ".trash-*", ".bad-*")
ANYWHERE = ("storyworld", "tinystories", "hf://")
"""How sources of text begin that another machine can read as well."""
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)
SCRIPTS = Path(__file__).parent / "remote"
Result = TypeVar("Result")
Note = Callable[[str], None]


class Lost(UserError):
    """The connection could not be made or ended early; another try may go better."""


@dataclass(frozen=True)
class Command:
    """A command of this machine; ``str`` is what to type into a shell in its place."""

    words: tuple[str, ...]
    script: Path | None = None
    """Standard input."""
    source: tuple[str, ...] = ()
    """A command whose output is the standard input."""

    def __str__(self) -> str:
        before = f"{shlex.join(self.source)} | " if self.source else ""
        after = f" < {shlex.quote(str(self.script))}" if self.script else ""
        return f"{before}{shlex.join(self.words)}{after}"

    @contextlib.contextmanager
    def started(self) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
        """The process, with its output to be read, and the file of its errors. It does not outlive the block."""
        with tempfile.TemporaryFile() as errors, contextlib.ExitStack() as stack:
            feed: IO[bytes] | int = subprocess.DEVNULL
            if self.script is not None:
                feed = stack.enter_context(open(self.script, "rb"))
            elif self.source:
                feed = stack.enter_context(tempfile.TemporaryFile())
                if subprocess.run(self.source, stdout=feed, stderr=errors).returncode:
                    errors.seek(0)
                    raise UserError(f"{shlex.join(self.source)}: {printable(errors.read().decode().strip(), 300)}")
                feed.seek(0)
            try:
                process = subprocess.Popen(
                    self.words, stdin=feed, stdout=subprocess.PIPE, stderr=errors, env=_environment()
                )
            except FileNotFoundError:
                raise UserError(
                    f"{self.words[0]} is not installed on this machine; install it, for example with: apt-get install"
                    " openssh-client rsync"
                ) from None
            with process:
                try:
                    yield process, errors
                finally:
                    if process.poll() is None:
                        process.terminate()


@dataclass(frozen=True)
class Host:
    """Where to: ``address`` is [USER@]HOST or a name of ~/.ssh/config; ``folder`` is relative to the home there, or absolute."""

    address: str
    port: int | None = None
    identity: Path | None = None
    folder: str = "smalllm"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(?:[A-Za-z0-9_][\w.+-]*@)?[A-Za-z0-9_\[:][\w.:%\[\]-]*", self.address, re.ASCII):
            raise UserError(f"--host {printable(self.address)!r} is not a host; write HOST or USER@HOST")
        if not re.fullmatch(r"[\w./][\w./+-]*", self.folder, re.ASCII) or ".." in self.folder.split("/"):
            raise UserError(
                f"--dir {printable(self.folder)!r} is not possible; write a folder relative to the home there, or an absolute"
                " one, of letters, digits and . _ + - /"
            )
        if self.port is not None and not 0 < self.port < 65536:
            raise UserError(f"--port {self.port} is not a port; the ports are 1 to 65535")
        if self.identity is not None and not self.identity.is_file():
            raise UserError(f"--identity {self.identity}: there is no such file; give the private key")

    @property
    def place(self) -> str:
        """The folder, as a word that differs from that of every other place."""
        return f"{self.address}:{self.port or ''}:{self.folder}"

    def ssh(self) -> tuple[str, ...]:
        """ssh and its options, up to where the host is to follow."""
        port = ("-p", str(self.port)) if self.port is not None else ()
        identity = ("-o", "IdentitiesOnly=yes", "-i", str(self.identity)) if self.identity is not None else ()
        return ("ssh", *SSH_OPTIONS, *port, *identity)

    def command(self, script: str, *arguments: str) -> Command:
        """Have the machine run one of remote/*.sh; an argument that is empty is written as -."""
        there = shlex.join(["sh", "-s", "--", self.folder, *(argument or "-" for argument in arguments)])
        return Command((*self.ssh(), "--", self.address, there), script=SCRIPTS / script)

    def rsync(self, *words: str, source: tuple[str, ...] = ()) -> Command:
        return Command(("rsync", "-e", shlex.join(self.ssh()), *words), source=source)

    def path(self, *parts: str) -> str:
        """A folder there, for rsync."""
        user, at, name = self.address.rpartition("@")
        name = f"[{name}]" if ":" in name and not name.startswith("[") else name
        return f"{user}{at}{name}:{'/'.join([self.folder.rstrip('/'), *parts])}/"

    def answer(self, command: Command, on_line: Note | None = None) -> str:
        """What a command says, its lines handed to ``on_line`` as they come; UserError when it fails, Lost when it may be that
        only the connection did."""
        with command.started() as (process, errors):
            said = []
            for line in process.stdout or ():
                said.append(line.decode("utf-8", "replace"))
                if on_line is not None:
                    on_line(plain(said[-1].rstrip("\n")))
            code = process.wait()
            if code:
                errors.seek(0)
                told = errors.read().decode("utf-8", "replace") or "".join(said)
                raise self.failure(told, code, of_script=command.words[0] == "ssh" and code != 255)
            return "".join(said)

    def failure(self, told: str, code: int, of_script: bool = False) -> UserError:
        """What ssh, rsync or a script there said when it failed, as a sentence."""
        for pattern, lost, sentence in FAILURES:
            if not of_script and (found := re.search(pattern, told)):
                reason = printable(found[found.lastindex or 0].strip())
                words = {"host": self.address, "reason": reason, "identity": self.identity, "key": self._known_as()}
                return (Lost if lost else UserError)(sentence.format(**words))
        lines = [line.strip() for line in reversed(told.splitlines()) if line.strip()] or [f"exit code {code}"]
        last = next((line for line in lines if line.lower().startswith("error:")), lines[0])
        kind = Lost if not of_script and code in (255, 12, 30, 35) or code < 0 else UserError
        return kind(f"{self.address}: {printable(last.removeprefix('error: '), 300)}")

    def _known_as(self) -> str:
        """How known_hosts spells the host."""
        name = self.address.rpartition("@")[2]
        return f"[{name}]:{self.port}" if self.port not in (None, 22) else name


FAILURES = (
    (r"No space left on device|Disk quota exceeded", False,
     "a disk is full, there ({host}) or here: {reason}; make room and repeat the command"),
    (r"change_dir .* failed: No such file", False, "{host} has no run of this name in the folder given by --dir"),
    (r"rsync: command not found|rsync: not found", False,
     "rsync is not installed on {host}; run there: apt-get update && apt-get install -y rsync"),
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key verification failed", False,
     "{host} shows another host key than before: another machine answers there. If it is a newly rented one, run:"
     " ssh-keygen -R '{key}'"),
    (r"UNPROTECTED PRIVATE KEY FILE|bad permissions", False,
     "ssh does not use a private key that others can read; run: chmod 600 {identity}"),
    (r"Permission denied \([a-z][^)\n]*\)|Too many authentication failures", False,
     "{host} does not accept your ssh key ({reason}); add your public key there, or give the right key with --identity FILE"),
    (r"Could not resolve hostname [^\n]*|connect to (?:host|address) [^\n]*?: ([A-Z][^\n]*)|Network is unreachable|No route to host", True,
     "{host} does not answer ({reason}); see to it that the machine runs and that --host and --port are right"),
    (r"(?:Connection (?:closed|reset|to \S+ closed)|Broken pipe|kex_exchange_identification|Timeout, server)[^\n]*", True,
     "the connection to {host} ended ({reason})"),
)  # fmt: skip
"""(pattern, whether to try again, sentence): what OpenSSH and rsync say, most telling first."""


def _environment() -> dict[str, str]:
    """The environment without what could be a secret, and without the name of this machine's tmux: a line `SendEnv *` in
    somebody's ssh_config must not tell the one, nor lead tmux astray there."""
    kept = (name for name in os.environ if not SECRET.search(name) and not name.startswith("TMUX"))
    return {name: os.environ[name] for name in kept}


class Patience:
    """Pauses between tries: 1 s, 2 s, 4 s ... 60 s, until nothing has gone well for an hour."""

    def __init__(self, note: Note) -> None:
        self.note = note
        self.well()

    def well(self) -> None:
        self.since: float | None = None
        self.pause = 1.0

    def wait(self, error: Lost) -> None:
        """Say what happened and pause; after an hour, raise it."""
        if self.since is None:
            self.since = time.monotonic()
        if time.monotonic() - self.since > GIVE_UP_SECONDS:
            raise UserError(f"{error}; no connection for an hour. The same command goes on from here") from None
        self.note(f"{error}; trying again in {self.pause:.0f} s")
        time.sleep(self.pause)
        self.pause = min(LONGEST_PAUSE, 2 * self.pause)

    def __call__(self, attempt: Callable[[], Result]) -> Result:
        """The result of the first attempt that the connection lasts for."""
        self.well()
        while True:
            try:
                return attempt()
            except Lost as error:
                self.wait(error)


@dataclass
class Mark:
    """How much of a run's log has been shown, kept beside the local run, so that another call goes on there."""

    file: Path
    place: str
    offset: int = 0
    """Bytes."""
    born: str = ""
    """Which log: another one begins at 0."""

    @classmethod
    def read(cls, file: Path, place: str) -> Mark:
        """What the file says, or the beginning."""
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["place"] == place:
                return cls(file, place, int(kept["offset"]), str(kept["born"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return cls(file, place)

    def write(self) -> None:
        """Keep it; a disk that is full costs only that lines are shown twice later."""
        values = {"place": self.place, "born": self.born, "offset": self.offset}
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(values) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Fetched:
    """A run that has arrived."""

    folder: Path
    steps: list[int]
    """Of the checkpoints that are whole."""
    damaged: list[str]


@dataclass(frozen=True)
class Deployment:
    """One run and its place there. ``recipe`` is a recipe's name or a TOML file, ``overrides`` as for `smalllm train`."""

    host: Host
    config: RunConfig
    recipe: str
    overrides: tuple[str, ...]
    out: Path
    checkout: Path
    data: Path | None = None
    gpus: int = 1
    python: str = ""
    """Of an environment there; empty: uv makes one."""

    def __post_init__(self) -> None:
        if self.gpus < 0:
            raise UserError(f"--gpus {self.gpus} is not possible; give the number of GPUs, or 0 to train on the CPU")
        if self.python and not re.fullmatch(r"/[\w./+-]+|\w[\w.+-]*", self.python, re.ASCII):
            raise UserError(
                f"--python {printable(self.python)!r} is not possible; give the absolute path of a Python there, or a command"
            )
        if self.data is not None and not re.fullmatch(r"\w[\w.+-]*", self.data.resolve().name, re.ASCII):
            raise UserError(
                f"--data {self.data}: the folder's name has letters that a shell reads otherwise; rename it"
            )
        self._refuse_local_source()

    def _refuse_local_source(self) -> None:
        for key in ("source", "valid"):
            source = getattr(self.config.data, key)
            if self.data is None and source and not source.startswith(ANYWHERE):
                raise UserError(
                    f"data.{key} = {source} is on this machine only; prepare it here (smalllm prepare {source} --out data/"
                    f"{self.config.name}) and give --data data/{self.config.name}"
                )
        if self.data is None and not self.config.data.source:
            raise UserError(f"recipe {self.recipe} has no data.source; give prepared data with --data DIR")

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def mark(self) -> Path:
        """The file of what has been shown of the run."""
        return self.out.with_name(f".{self.out.name}.deploy.json")

    @property
    def staging(self) -> Path:
        """Where the run arrives."""
        return self.out.with_name(f".fetch-{self.out.name}")

    # ── the commands ──

    def check(self) -> Command:
        return self.host.command("probe.sh", self.name, self.python)

    def push(self) -> list[tuple[str, Command]]:
        """What is pushed, and how: code, a recipe of one's own, data."""
        excluded = (f":(exclude,glob){pattern}" for pattern in NEVER_PUSHED)
        tracked = ("git", "-C", str(self.checkout), "ls-files", "-z", "--", ".", *excluded)
        code = self.host.rsync(
            "-rlptz", "--from0", "--files-from=-", "--ignore-missing-args", self._making(), "--", f"{self.checkout}/",
            self.host.path(), source=tracked,
        )  # fmt: skip
        commands = [("the code", code)]
        if self._own_recipe():
            there = self.host.path(".deploy", self.name) + f"{self.name}.toml"
            making = self._making(".deploy", self.name)
            commands.append(
                ("the recipe", self.host.rsync("-lpt", making, "--", str(Path(self.recipe).resolve()), there))
            )
        if self.data is not None:
            folder = self.data.resolve()
            data = self.host.rsync(
                "-rlpt", "--partial-dir=.partial", "--delete", self._making("data", folder.name), "--",
                f"{folder}/", self.host.path("data", folder.name),
            )  # fmt: skip
            commands.append(("the data", data))
        return commands

    def _making(self, *parts: str) -> str:
        """An option of rsync: make the folder there first."""
        folder = "/".join([self.host.folder.rstrip("/"), *parts])
        return f"--rsync-path=mkdir -p {shlex.quote(folder)} && rsync"

    def set_up(self) -> Command:
        return self.host.command("setup.sh", self.python, str(self.gpus))

    def launch(self) -> Command:
        """Start `smalllm train` in tmux, unless it runs."""
        recipe = f".deploy/{self.name}/{self.name}.toml" if self._own_recipe() else self.recipe
        data = ("--data", f"data/{self.data.resolve().name}") if self.data is not None else ()
        gpus = ("--gpus", str(self.gpus)) if self.gpus > 1 else ()
        return self.host.command("launch.sh", self.name, self.python, recipe, *self.overrides, *data, *gpus)

    def listen(self, mark: Mark) -> Command:
        return self.host.command("follow.sh", self.name, str(mark.offset), mark.born)

    def pull(self, checksum: bool = False) -> Command:
        """Make a folder the same as the run there: files and folders only, since a link from there could lead anywhere here.
        Files that did not change since the last time are linked to those."""
        excluded = [f"--exclude={pattern}" for pattern in NOT_FETCHED]
        known = [f"--link-dest={self.out.resolve()}"] if self.out.is_dir() else []
        compare = ["--checksum"] if checksum else []
        return self.host.rsync(
            "-rt", "--partial-dir=.partial", "--delete", *compare, *excluded, *known, "--",
            self.host.path("runs", self.name), f"{self.staging}/",
        )  # fmt: skip

    def end(self) -> Command:
        return self.host.command("stop.sh", self.name)

    def _own_recipe(self) -> bool:
        return self.recipe.endswith(".toml") or "/" in self.recipe

    # ── what they do ──

    def probe(self) -> dict[str, str]:
        """What the machine is and has, by the names of remote/probe.sh."""
        _, marker, told = self.host.answer(self.check()).partition("smalllm-probe\n")
        if not marker:
            raise UserError(
                f"{self.host.address} has no shell for commands; see what this says: ssh {self.host.address} true"
            )
        pairs = (line.partition(" ") for line in told.splitlines())
        return {key: printable(value.strip()) for key, _, value in pairs}

    def problems(self, found: Mapping[str, str]) -> Iterator[str]:
        """What is wrong with a machine, a sentence each."""
        yield from self._problem_of_python(found)
        for tool in ("rsync", "tmux"):
            if not found.get(tool):
                yield f"{tool} is not installed there; run there: apt-get update && apt-get install -y {tool}"
        gpus = gpu_names(found)
        if len(gpus) < self.gpus:
            there = f"{len(gpus)} GPU of {self.gpus} is" if gpus else "no GPU is"
            yield f"{there} there, as far as nvidia-smi tells; take another machine, or give --gpus {len(gpus)}"
        need, free = self._need(found), int(found.get("free_kib") or 0) << 10
        if free < need:
            yield (
                f"the disk there has {_gibibytes(free)} free and {_gibibytes(need)} are needed; make room, rent a larger one, or"
                " take another folder with --dir"
            )
        if not found.get("writable"):
            yield f"the folder {self.host.folder} cannot be made or written there; take another with --dir"

    def _problem_of_python(self, found: Mapping[str, str]) -> Iterator[str]:
        version = found.get("python", "")
        least = ".".join(map(str, LEAST_PYTHON))
        fit = version and tuple(int(part) for part in version.split(".")[:2]) >= LEAST_PYTHON
        if self.python and not fit:
            reason = f"is {version}, older than {least}" if version else "is not a Python"
            yield f"{self.python} {reason} there; give another with --python, or leave it out: uv brings its own"
        elif not self.python and not any(found.get(tool) for tool in ("uv", "pip", "curl", "wget")):
            has = (
                f"Python {version} is there, older than {least}, and" if version and not fit else "uv is not there, and"
            )
            yield f"{has} nothing to get it with; run there: apt-get update && apt-get install -y curl"

    def _need(self, found: Mapping[str, str]) -> int:
        """Free bytes that a first deployment wants."""
        data = sum(path.stat().st_size for path in self.data.rglob("*")) if self.data is not None else 0
        made = self.python or found.get("environment")
        return (RUN_BYTES if not found.get("run") else 0) + (0 if made else ENVIRONMENT_BYTES) + data

    def refuse_other_run(self, found: Mapping[str, str]) -> None:
        """Before anything costs money: a run of this name here, which is none there, would be in the way of the one to fetch."""
        if self.out.exists() and any(self.out.iterdir()) and not found.get("run"):
            raise UserError(
                f"{self.out} is another run than the one to begin there; give name=ANOTHER, or --out FOLDER"
            )

    def prepare(self, note: Note) -> None:
        """Push and set up."""
        patience = Patience(note)
        for what, command in self.push():
            note(f"pushing {what}")
            patience(partial(self.host.answer, command))
        note(f"trying {self.python}" if self.python else "setting up")
        patience(lambda: self.host.answer(self.set_up(), on_line=note))

    def start(self, note: Note) -> bool:
        """Launch the run there; False when it trained already."""
        said = Patience(note)(lambda: self.host.answer(self.launch())).splitlines()
        return bool(said) and said[-1].startswith("started")

    def follow(self, show: Note, note: Note) -> int | None:
        """Hand each line that the run says to ``show``, once, over lost connections and several calls; its exit code at the
        end, or None when its session is gone without one. ``note`` hears of lost connections."""
        mark, patience = Mark.read(self.mark, self.host.place), Patience(note)
        return patience(lambda: self._listen(mark, show, patience))

    def _listen(self, mark: Mark, show: Note, patience: Patience) -> int | None:
        """One connection; Lost when it ends before the run."""
        with self.listen(mark).started() as (process, errors):
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(b"smalllm-follow "):
                    offset, mark.born = line.decode("ascii", "replace").split()[1:]
                    mark.offset = int(offset)
                    patience.well()
                    with contextlib.suppress(EOFError):
                        return _hear(process.stdout, mark, show)
            code = process.wait()
            errors.seek(0)
            told = errors.read().decode("utf-8", "replace")
        if code == 3:
            raise UserError(f"{self.host.address} has no run {self.name} that was deployed to {self.host.folder}")
        failed = self.host.failure(told, code)
        raise failed if told.strip() else Lost(f"the connection to {self.host.address} ended")

    def fetch(self, note: Note) -> Fetched:
        """Bring the run here. It arrives beside its place, is verified, and takes its place by a rename; what was fetched
        before is given up only then. UserError when another run is in that place, or nothing whole has arrived."""
        from smalllm.checkpoint import RunFolder

        here = RunFolder(self.out)
        if here.is_locked():
            raise UserError(f"{self.out} is being trained on this machine; give another place with --out")
        files = FileSystem()
        files.mkdir(self.out.parent)
        arrived, patience = RunFolder(self.staging), Patience(note)
        self._pull(patience)
        if damage(arrived):  # a file that was damaged here looks like the right one by size and time
            self._pull(patience, checksum=True)
        damaged = damage(arrived)
        steps = [checkpoint.step for checkpoint in arrived.checkpoints() if checkpoint.step not in damaged]
        if not steps:
            reason = next(iter(damaged.values()), "it has none yet; wait for the first")
            raise UserError(f"run {self.name} on {self.host.address} has no whole checkpoint: {reason}")
        if self.out.exists() and any(self.out.iterdir()) and not continues(arrived, here):
            raise UserError(
                f"{self.out} is not an earlier state of the run on {self.host.address}, and is kept; give another place with --out"
            )
        self._take_place(files)
        return Fetched(self.out, steps, list(damaged.values()))

    def _pull(self, patience: Patience, checksum: bool = False) -> None:
        """rsync, again when files have vanished meanwhile, which is what a run that trains does to its oldest checkpoint."""
        for _ in range(PASSES):
            try:
                patience(lambda: self.host.answer(self.pull(checksum)))
                return
            except UserError as error:
                if "vanished" not in str(error):
                    raise

    def _take_place(self, files: FileSystem) -> None:
        old = self.out.with_name(f".old-{self.out.name}")
        files.remove_tree(old)
        if self.out.exists():
            files.rename(self.out, old)
        files.rename(self.staging, self.out)
        files.sync_folder(self.out.parent)
        files.remove_tree(old)

    def stop(self) -> str:
        """Have the run save a checkpoint and end: "stopped", "none" when it did not run, or "busy" when it takes minutes."""
        return self.host.answer(self.end()).split()[-1]


def checkout() -> Path:
    """The folder of the code that is running, whose tracked files are pushed; UserError when it is no checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or not (root / "pyproject.toml").exists() or shutil.which("git") is None:
        raise UserError(
            "deploy pushes a checkout of smalllm, and this smalllm is installed without one, or git is missing; clone the"
            " repository and run there: uv run smalllm deploy"
        )
    return root


def gpu_names(found: Mapping[str, str]) -> list[str]:
    """Of the GPUs that a probe has found."""
    return [name for name in found.get("gpus", "").split(",") if name.strip()]


def damage(run: RunFolder) -> dict[int, str]:
    """Steps whose checkpoint or milestone is not what its manifest promises, and why."""
    from smalllm.checkpoint import DamagedCheckpoint

    found = {}
    for checkpoint in run.checkpoints() + run.milestones():
        try:
            checkpoint.verify()
        except DamagedCheckpoint as error:
            found[checkpoint.step] = str(error)
    return found


def continues(later: RunFolder, earlier: RunFolder) -> bool:
    """Whether a run is a later state of another: what that one logged up to its newest checkpoint is the same here, the
    seconds included, which no two runs share."""
    step = earlier.newest_step()
    if step is None or (later.newest_step() or 0) < step:
        return False
    before, after = (
        {
            record["step"]: [record.get(key) for key in ("tokens", "seconds", "train_loss")]
            for record in read_records(run.metrics_file)
            if record["step"] <= step
        }
        for run in (earlier, later)
    )
    return bool(before) and all(after.get(number) == figures for number, figures in before.items())


def _hear(stream: IO[bytes], mark: Mark, show: Note) -> int | None:
    """Read what remote/follow.sh sends. EOFError when it ends too early; lines that were whole have been shown then."""
    pending = b""
    for line in stream:
        kind, rest = line[:1], line[1:].strip()
        if kind == b"+" and rest.isdigit():
            *whole, pending = (pending + stream.read(int(rest))).split(b"\n")
            _tell(whole, 1, mark, show)
        elif kind == b"=" and rest.isdigit() and line.endswith(b"\n"):
            if pending:
                _tell([pending], 0, mark, show)
            return int(rest)
        elif kind == b"?":
            return None
    raise EOFError


def _tell(lines: list[bytes], end: int, mark: Mark, show: Note) -> None:
    """Show lines, each with an end of so many bytes, and mark them as shown, whenever Ctrl-C comes."""
    with postponed(signal.SIGINT) as came:
        for line in lines:
            show(plain(line.decode("utf-8", "replace")))
            mark.offset += len(line) + end
            if came:
                break
        mark.write()


@contextlib.contextmanager
def postponed(number: signal.Signals) -> Iterator[list[int]]:
    """A signal takes effect when the block ends; a second one at once. The list is not empty any more when it has come."""
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(number, before)

    before = signal.signal(number, note)
    try:
        yield came
    finally:
        signal.signal(number, before)
    if came:
        signal.raise_signal(number)


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
