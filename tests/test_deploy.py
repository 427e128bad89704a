"""Deployment: against a real sshd on loopback, from the push to the fetched run, with cut connections, wrong keys and
machines that will not do; the protocol and the sentences by hand; deploy_vast.sh and the SkyPilot task."""

from __future__ import annotations

import contextlib
import getpass
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import tiny_settings, wait_for

from smalllm import cli, deploy
from smalllm.checkpoint import RunFolder
from smalllm.commands.deploy import command_line
from smalllm.config import UserError, load_recipe
from smalllm.deploy import Deployment, Host, Lost, Mark
from smalllm.training.trainer import train

ROOT = Path(__file__).parents[1]
REMOTE = ROOT / "src" / "smalllm" / "remote"
SECRET = "hunter2-is-no-secret"
ADDRESS = f"{getpass.getuser()}@127.0.0.1"

# ── names that are no hosts ──


@pytest.mark.parametrize("address", ["", "-oProxyCommand=touch x", "user@-x", "a b", "a;b", "$(x)", "a\nb", "@host"])
def test_what_is_no_host_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="is not a host; write HOST or USER@HOST"):
        Host(address)


def test_hosts_and_folders() -> None:
    assert (
        Host("root@10.0.0.7", folder="/workspace/smalllm").path("runs", "a")
        == "root@10.0.0.7:/workspace/smalllm/runs/a/"
    )
    assert Host("root@fe80::1").path() == "root@[fe80::1]:smalllm/"
    assert Host("card").ssh() == ("ssh", *deploy.SSH_OPTIONS)
    for wrong in ("-x", "a b", "../up", "a/../b", "~/x", "a;b", ""):
        with pytest.raises(UserError, match="--dir .* is not possible"):
            Host("card", folder=wrong)
    with pytest.raises(UserError, match="--port 70000 is not a port"):
        Host("card", port=70000)
    with pytest.raises(UserError, match="there is no such file; give the private key"):
        Host("card", identity=Path("no/such/key"))


def test_a_command_can_be_copied_into_a_shell(tmp_path: Path) -> None:
    script = tmp_path / "it's a script"
    script.write_text("echo $1-$2")
    command = deploy.Command(("sh", "-s", "--", "a b", "$x"), script=script)
    done = subprocess.run(["sh", "-c", str(command)], capture_output=True, text=True, check=True)
    assert done.stdout == "a b-$x\n"
    piped = deploy.Command(("cat", "-"), source=("printf", "%s", "a'b"))
    assert subprocess.run(["sh", "-c", str(piped)], capture_output=True, text=True, check=True).stdout == "a'b"
    assert Host("card").answer(piped) == "a'b"


# ── what ssh says, as sentences ──

TOLD = [
    ("ssh: connect to host h port 22: Connection refused", 255, Lost, "h does not answer (Connection refused)"),
    ("ssh: connect to host h port 22: Connection timed out", 255, Lost, "h does not answer (Connection timed out)"),
    ("ssh: Could not resolve hostname h: Name or service not known", 255, Lost, "h does not answer (Could not resolve"),
    ("client_loop: send disconnect: Broken pipe", 255, Lost, "the connection to h ended (Broken pipe"),
    ("Timeout, server h not responding.", 255, Lost, "the connection to h ended (Timeout, server h not responding.)"),
    ("Connection to h closed by remote host.", 255, Lost, "the connection to h ended"),
    ("kex_exchange_identification: read: Connection reset by peer", 255, Lost, "the connection to h ended"),
    ("root@h: Permission denied (publickey).", 255, UserError, "does not accept your ssh key (Permission denied (publickey))"),
    ('rsync: mkdir "/x" failed: Permission denied (13)', 11, UserError, 'h: rsync: mkdir "/x" failed: Permission denied (13)'),
    ("@ WARNING: UNPROTECTED PRIVATE KEY FILE! @\nPermission denied (publickey)", 255, UserError, "chmod 600 key"),
    ("WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!", 255, UserError, "ssh-keygen -R '[h]:2222'"),
    ('rsync: write failed on "x": No space left on device (28)\nrsync error (code 11)', 11, UserError, "a disk is full"),
    ('rsync: change_dir "/x" failed: No such file or directory (2)', 23, UserError, "has no run of this name"),
    ("bash: line 1: rsync: command not found", 127, UserError, "rsync is not installed on h; run there"),
    ("error: no such package\n  cause: none\nhint: another", 1, UserError, "h: no such package"),
    ("something\nnew and\x1b[2J strange\n", 7, UserError, r"h: new and\x1b[2J strange"),
    ("", -9, Lost, "h: exit code -9"),
]  # fmt: skip


@pytest.mark.parametrize(("told", "code", "kind", "sentence"), TOLD)
def test_what_ssh_says_becomes_a_sentence(told, code, kind, sentence, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("key").touch()
    error = Host("h", 2222, Path("key")).failure(told, code)
    assert type(error) is kind and sentence in str(error) and "\n" not in str(error)


def test_what_a_script_says_is_not_taken_for_the_connection() -> None:
    error = Host("h").failure("uv: Network is unreachable", 1, of_script=True)
    assert type(error) is UserError and str(error) == "h: uv: Network is unreachable"


# ── what is wrong with a machine ──

GOOD = {
    "python": "3.12.1", "rsync": "/usr/bin/rsync", "tmux": "/usr/bin/tmux", "curl": "/usr/bin/curl", "writable": "yes",
    "gpus": "NVIDIA GeForce RTX 4090,", "free_kib": str(100 << 20),
}  # fmt: skip
WRONG = [
    ({}, {}, None),
    ({"gpus": ""}, {}, "no GPU is there, as far as nvidia-smi tells"),
    ({"gpus": ""}, {"gpus": 0}, None),
    ({}, {"gpus": 2}, "1 GPU of 2 is there"),
    ({"tmux": ""}, {}, "tmux is not installed there; run there: apt-get update && apt-get install -y tmux"),
    ({"rsync": ""}, {}, "rsync is not installed there"),
    ({"free_kib": str(9 << 20)}, {}, "the disk there has 9.0 GiB free and 10.0 GiB are needed"),
    ({"free_kib": str(9 << 20), "environment": "yes"}, {}, None),
    ({"free_kib": ""}, {}, "the disk there has 0.0 GiB free"),
    ({"writable": ""}, {}, "the folder smalllm cannot be made or written there"),
    ({"python": "3.9.2", "curl": ""}, {}, "Python 3.9.2 is there, older than 3.11, and nothing to get it with"),
    ({"python": "", "curl": ""}, {}, "uv is not there, and nothing to get it with"),
    ({"python": "3.9.2"}, {}, None),  # uv brings another
    ({"python": "3.10.4"}, {"python": "/opt/python"}, "/opt/python is 3.10.4, older than 3.11 there"),
    ({"python": ""}, {"python": "/opt/python"}, "/opt/python is not a Python there"),
]  # fmt: skip


def deployment(**settings) -> Deployment:
    """Of the quickstart to a host called card."""
    plan = {"host": Host("card"), "config": load_recipe("quickstart"), "recipe": "quickstart", "overrides": ()}
    return Deployment(**{**plan, "out": Path("runs/quickstart"), "checkout": ROOT, **settings})


@pytest.mark.parametrize(("found", "settings", "sentence"), WRONG)
def test_what_is_wrong_with_a_machine(found, settings, sentence) -> None:
    problems = list(deployment(**settings).problems(GOOD | found))
    assert (len(problems), sentence is None or problems[0].startswith(sentence)) == (int(sentence is not None), True)


def test_the_least_python_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={'.'.join(map(str, deploy.LEAST_PYTHON))}"


def test_text_of_this_machine_is_not_there() -> None:
    own = load_recipe("quickstart", ["data.source=texts/"])
    with pytest.raises(UserError, match=r"data.source = texts/ is on this machine only; prepare it here"):
        deployment(config=own)
    deployment(config=own, data=Path("data/mine"))
    for source in ("tinystories", "hf://datasets/a/b", "storyworld:100"):
        deployment(config=load_recipe("quickstart", [f"data.source={source}"]))
    for wrong in ({"data": Path("data/a b")}, {"python": "python; x"}, {"python": "~/bin/python"}, {"gpus": -1}):
        with pytest.raises(UserError):
            deployment(**wrong)


# ── the protocol of following ──

SAID = [b"heading", b"step 1", "step 2: caf\u00e9 \u2014".encode(), b"", b"torn\x1b[2J escape", b"last"]
LOG = b"\n".join(SAID) + b"\n"
HEARD = [deploy.plain(line.decode()) for line in SAID]


def frames(offset: int, size: int, end: bytes = b"=0\n") -> bytes:
    """What follow.sh sends of the log from an offset on, some bytes at a time."""
    pieces = [LOG[place : place + size] for place in range(offset, len(LOG), size)]
    return b".\n".join(b"+%d\n%b" % (len(piece), piece) for piece in pieces) + end


@pytest.mark.parametrize("size", [5, 1000])
def test_no_line_is_lost_or_repeated_wherever_the_connection_is_cut(tmp_path: Path, size: int) -> None:
    whole = frames(0, size)
    for cut in range(len(whole)):
        mark, heard = Mark(tmp_path / "mark", "there"), []
        with pytest.raises(EOFError):
            deploy._hear(io.BytesIO(whole[:cut]), mark, heard.append)
        assert deploy._hear(io.BytesIO(frames(mark.offset, size)), mark, heard.append) == 0
        assert heard == HEARD and mark.offset == len(LOG), cut


@pytest.mark.parametrize("when", ["shown", "marked"])
def test_lines_shown_before_ctrl_c_are_not_shown_again(when: str, tmp_path: Path, monkeypatch) -> None:
    seen: list[str] = []

    def show(line: str) -> None:
        seen.append(line)
        if when == "shown" and len(seen) == 2:
            signal.raise_signal(signal.SIGINT)

    def write(mark: Mark) -> None:
        signal.raise_signal(signal.SIGINT)
        kept(mark)

    kept = Mark.write
    if when == "marked":
        monkeypatch.setattr(Mark, "write", write)
    mark = Mark(tmp_path / "mark", "place", born="now")
    with pytest.raises(KeyboardInterrupt):
        deploy._hear(io.BytesIO(b"+20\nstep1\nstep2\nstep3\n.."), mark, show)
    assert len(seen) == {"shown": 2, "marked": 3}[when]
    assert Mark.read(tmp_path / "mark", "place").offset == 6 * len(seen)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), deploy.postponed(signal.SIGINT) as came:
        signal.raise_signal(signal.SIGINT)
        assert came == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal was postponed")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deploy.postponed(signal.SIGINT) as came:
            signal.raise_signal(signal.SIGINT)
        assert came == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ends_that_are_heard(tmp_path: Path) -> None:
    mark = Mark(tmp_path / "mark", "there")
    assert deploy._hear(io.BytesIO(frames(0, 9, b"=137\n")), mark, lambda line: None) == 137
    assert deploy._hear(io.BytesIO(b".\n?\n"), mark, lambda line: None) is None
    heard: list[str] = []
    assert deploy._hear(io.BytesIO(b"+4\nhalf=1\n"), mark, heard.append) == 1 and heard == ["half"]
    again = Mark.read(tmp_path / "mark", "there")
    assert again.offset == len(LOG) + 4
    assert Mark.read(tmp_path / "mark", "elsewhere").offset == 0
    (tmp_path / "mark").write_text("{")
    assert Mark.read(tmp_path / "mark", "there").offset == 0


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, notes = [0.0], []
    monkeypatch.setattr(deploy.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(deploy.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    patience = deploy.Patience(notes.append)
    with pytest.raises(UserError, match="no connection for an hour"):
        patience(lambda: (_ for _ in ()).throw(Lost("gone")))
    assert [note[-4:] for note in notes[:8]] == [" 1 s", " 2 s", " 4 s", " 8 s", "16 s", "32 s", "60 s", "60 s"]
    assert 3600 < clock[0] < 3700
    clock[0], tries = clock[0] + 50_000, [Lost("gone")]  # after hours that went well there is an hour again
    patience.well()

    def attempt() -> str:
        if tries:
            raise tries.pop()
        return "well"

    assert patience(attempt) == "well" and notes[-1] == "gone; trying again in 1 s"


# ── a machine: sshd on loopback ──


def own_tmux(folder: Path) -> dict[str, str]:
    """An environment whose tmux is another one than that of whoever runs the tests, perhaps in a tmux of theirs."""
    return {name: value for name, value in os.environ.items() if name not in ("TMUX", "TMUX_PANE")} | {
        "TMUX_TMPDIR": str(folder)
    }


@dataclass
class Machine:
    """An sshd of our own, and what stands around it."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def there(self) -> Path:
        """Where deployments go."""
        return self.folder / "there"

    def options(self, *more: str) -> list[str]:
        return ["--host", ADDRESS, "--port", str(self.port), "--identity", str(self.folder / "key"),
                "--dir", str(self.there), "--gpus", "0", *more]  # fmt: skip

    def authorize(self, environment: dict[str, str]) -> None:
        """Let our key in, with an environment."""
        settings = "".join(f'environment="{name}={value}",' for name, value in environment.items()).rstrip(",")
        key = (self.folder / "key.pub").read_text()
        (self.folder / "authorized").write_text(f"{settings} {key}")

    def tmux(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["tmux", *words], env=own_tmux(self.folder / "tmux"), capture_output=True, text=True, timeout=30
        )

    def calls(self) -> str:
        """The command lines of every ssh that was started."""
        return (self.folder / "calls").read_text()

    def cut(self, of_server: bool) -> None:
        """Kill a connection: our ssh, or sshd's process for it."""
        if of_server:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            for child in map(int, children):
                os.kill(child, signal.SIGKILL)
        else:
            os.kill(int((self.folder / "ssh.pid").read_text()), signal.SIGKILL)


def _requirements() -> str | None:
    sshd = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
    missing = [tool for tool in ("ssh", "ssh-keygen", "rsync", "tmux", "git") if shutil.which(tool) is None]
    missing += [] if sshd else ["sshd"]
    return f"not installed: {', '.join(missing)} (apt-get install openssh-server rsync tmux)" if missing else None


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if reason := _requirements():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("m")
    for name in ("hostkey", "otherkey", "key", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    for name in ("tmux", "bin"):
        (folder / name).mkdir()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/hostkey\nPidFile none\nAuthorizedKeysFile {folder}/authorized\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitUserEnvironment yes\n"
        "AcceptEnv *\n"
    )
    (folder / "ssh_config").write_text(f"UserKnownHostsFile {folder}/known\nSendEnv *\n")
    ssh = folder / "bin" / "ssh"  # OpenSSH's own, with our known_hosts, and a note of each call
    ssh.write_text(
        f'#!/bin/sh\necho "$*" >>{folder}/calls\necho $$ >{folder}/ssh.pid\n'
        f"if [ -e {folder}/fail ]; then rm {folder}/fail; echo 'Connection reset by peer' >&2; exit 255; fi\n"
        f'exec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n'
    )
    ssh.chmod(0o755)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # as root sshd will have it for its less privileged half
    program = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
    with open(folder / "sshd.log", "wb") as log:
        process = subprocess.Popen([str(program), "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    machine = Machine(folder, port, process)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        machine.authorize({"TMUX_TMPDIR": str(folder / "tmux")})
        trial = subprocess.run(
            [ssh, "-p", str(port), "-i", folder / "key", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new",
             ADDRESS, "true"], capture_output=True, text=True,
        )  # fmt: skip
        if trial.returncode:
            pytest.skip(f"sshd does not let this user in: {trial.stderr} {(folder / 'sshd.log').read_text()}")
        yield machine
    finally:
        machine.tmux("kill-server")
        process.terminate()
        process.wait(10)


@pytest.fixture
def machine(sshd: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """The machine as it was, with nothing deployed, seen from a project folder; ssh is ours, pauses are short."""
    monkeypatch.setenv("PATH", f"{sshd.folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("TMUX", "/tmp/of-this-machine,1,0")  # must not get there
    monkeypatch.setattr(deploy, "LONGEST_PAUSE", 0.1)
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    (sshd.folder / "calls").write_text("")
    sshd.authorize({"TMUX_TMPDIR": str(sshd.folder / "tmux")})
    yield sshd
    kill_all(sshd)
    sshd.tmux("kill-server")
    shutil.rmtree(sshd.there, ignore_errors=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of this code, with things in it that must never leave."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in (".env", "server.pem", "id_ed25519", "runs/old/config.toml", "data/x.bin", "deleted.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SECRET)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "-f", "-A"], cwd=folder, check=True)
    (folder / "deleted.txt").unlink()
    (folder / "untracked.txt").write_text(SECRET)
    return folder


TRAINER = """\
#!/bin/sh
# Stands for the Python of an environment there, and for `smalllm train`: counts steps until it is told to end.
case $1$2 in
-c*torch*) echo 0; exit ;;
-c*) echo 3.12.0; exit ;;
-m*) ;;
*) exec PYTHON "$@" ;;
esac
trap 'echo saved; exit 143' TERM INT
step=0
while [ ! -e end ]; do
  step=$((step + 1))
  echo "step $step"
  sleep 0.1
done
exit "$(cat end)"
"""


@pytest.fixture
def trainer(machine: Machine, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a Python there that trains at once; a file ``end`` in the folder there ends it with that exit code."""
    monkeypatch.setattr(deploy, "checkout", lambda: checkout)
    path = machine.folder / "trainer"
    path.write_text(TRAINER.replace("PYTHON", sys.executable))
    path.chmod(0o755)
    return str(path)


def log(machine: Machine, name: str = "quickstart") -> list[str]:
    return (machine.there / ".deploy" / name / "log").read_text().splitlines()


class Client:
    """`smalllm deploy` in a process of its own, without a terminal and without input."""

    def __init__(self, checkout: Path, arguments: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
        self.errors = Path("client.err").open("w+")  # noqa: SIM115 (read and closed by ``end``)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "smalllm", "deploy", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=self.errors, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.stdout = self.process.stdout
        self.lines: list[str] = []

    def until(self, pattern: str) -> None:
        """Read its lines up to one that matches."""
        while line := self.stdout.readline():
            self.lines.append(line.rstrip("\n"))
            if re.search(pattern, line):
                return
        raise AssertionError(f"no {pattern} in {self.lines}: {self.end()[1]}")

    def end(self) -> tuple[int, str]:
        """Its exit code and standard error; one that does not end is killed."""
        watchdog = threading.Timer(120, self.process.kill)
        watchdog.start()
        try:
            self.lines += self.stdout.read().splitlines()
            self.stdout.close()
            code = self.process.wait()
        finally:
            watchdog.cancel()
        with self.errors:
            self.errors.seek(0)
            return code, self.errors.read()


TINY = [
    "name=tiny", "model.layers=1", "model.width=32", "model.heads=2", "model.context=32", "train.steps=150", "train.minutes=0",
    "train.batch_tokens=256", "train.precision=fp32", "train.compile=off", "train.device=cpu", "train.log_every=1",
    "train.evaluate_every=50", "train.evaluate_tokens=500", "train.sample_tokens=4", "train.preflight=false",
]  # fmt: skip


def test_from_the_push_to_the_fetched_run_over_two_cut_connections(machine, checkout, dataset_folder) -> None:
    client = Client(
        checkout, ["quickstart", *TINY, *machine.options("--data", str(dataset_folder), "--python", sys.executable)]
    )
    client.until("step +2 ")
    machine.cut(of_server=False)
    client.until("step +[3-9] ")
    machine.cut(of_server=True)
    code, errors = client.end()
    assert code == 0, errors
    assert errors.count("trying again in") >= 1
    said = log(machine, "tiny")
    assert client.lines[: len(said)] == said  # each line once, in order
    assert [line.split()[1] for line in said if line.startswith("step ")] == [str(step) for step in range(1, 151)]
    assert "runs/tiny: 3 checkpoints, each verified, the newest of step 150" in client.lines
    run = RunFolder(Path("runs/tiny"))
    assert run.choose("latest").step == 150 and len(run.metrics_file.read_text().splitlines()) == 150
    assert (machine.there / "data" / dataset_folder.name / "manifest.json").exists()

    pushed = [path for path in machine.there.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    names = {str(path.relative_to(machine.there)) for path in pushed}
    assert "src/smalllm/remote/run.sh" in names and "runs/tiny/config.toml" in names
    assert not names & {".env", "server.pem", "id_ed25519", "runs/old/config.toml", "data/x.bin", "untracked.txt"}
    assert SECRET not in machine.calls() and not any(SECRET.encode() in path.read_bytes() for path in pushed)


def test_deploying_again_follows_the_run_that_trains(machine, trainer, checkout) -> None:
    arguments = ["quickstart", *machine.options("--python", trainer)]
    first = Client(checkout, arguments)
    first.until("step 3$")
    first.process.send_signal(signal.SIGINT)
    code, errors = first.end()
    assert code == 130 and "The run goes on" in errors and f"{shlex.join(['deploy', *arguments])} --follow" in errors
    pushed = machine.calls().count("rsync")
    wait_for(lambda: len(log(machine)) > 10)
    second = Client(checkout, arguments)
    second.until("step")
    (machine.there / "end").write_text("7")
    code, errors = second.end()
    assert code == 7 and "the run quickstart trains there already, in the tmux session smalllm-quickstart" in errors
    assert first.lines + second.lines == log(machine)  # from where the first stopped to the end
    assert "ended with exit code 7" in errors and "not fetched: " in errors
    assert machine.calls().count("rsync") == pushed + 1  # nothing was pushed under it; the fetch found nothing


def test_two_deployments_at_once_start_one_run(machine, trainer) -> None:
    plan = deployment(
        host=Host(ADDRESS, machine.port, machine.folder / "key", str(machine.there)), checkout=deploy.checkout(), gpus=0,
        python=trainer,
    )  # fmt: skip
    notes: list[str] = []
    plan.prepare(notes.append)
    assert notes[0] == "pushing the code" and plan.start(notes.append) is True
    assert plan.host.answer(plan.launch()).split() == ["running", "smalllm-quickstart"]
    assert plan.probe()["session"] == "smalllm-quickstart"
    other = Host(ADDRESS, machine.port, machine.folder / "key", str(machine.there / "other"))
    shutil.copytree(machine.there / "src", machine.there / "other" / "src")
    with pytest.raises(UserError, match="is busy with a run of this name in"):
        other.answer(deployment(host=other, gpus=0, python=trainer).launch())


def test_stop_saves_and_deploying_again_goes_on(machine, trainer, capsys) -> None:
    plan = ["quickstart", "name=a.b", *machine.options("--python", trainer)]
    assert cli.run(["deploy", *plan, "--stop"]) == 0
    assert "does not run" in capsys.readouterr().out
    assert cli.run(["deploy", *plan, "--follow"]) == 1
    assert "has no run a.b that was deployed to" in capsys.readouterr().err
    host = Host(ADDRESS, machine.port, machine.folder / "key", str(machine.there))
    config = load_recipe("quickstart", ["name=a.b"])
    begun = deployment(
        host=host, config=config, overrides=("name=a.b",), gpus=0, python=trainer, checkout=deploy.checkout()
    )
    begun.prepare(lambda note: None)
    assert begun.start(lambda note: None)
    wait_for(lambda: (machine.there / ".deploy/a.b/log").exists() and len(log(machine, "a.b")) > 1)
    assert cli.run(["deploy", *plan, "--stop"]) == 0
    assert "is stopped and saved" in capsys.readouterr().out
    assert (machine.there / ".deploy/a.b/exit").read_text() == "143\n" and log(machine, "a.b")[-1] == "saved"
    assert begun.start(lambda note: None)  # the same log goes on
    wait_for(lambda: log(machine, "a.b").count("step 1") == 2)
    (machine.there / "end").write_text("0")
    heard: list[str] = []
    assert begun.follow(heard.append, lambda note: None) == 0 and heard == log(machine, "a.b")


def test_a_run_that_is_gone_is_launched_again(machine, trainer, checkout) -> None:
    client = Client(checkout, ["quickstart", *machine.options("--python", trainer)])
    client.until("step 3$")
    restart(machine)
    client.until("step 1$")
    (machine.there / "end").write_text("9")
    code, errors = client.end()
    assert code == 9 and "the run quickstart is gone, as after a restart: launching it again" in errors
    assert client.lines == log(machine) and client.lines.count("step 1") == 2


def restart(machine: Machine) -> None:
    """Kill everything that runs there at once."""
    server = int(machine.tmux("display-message", "-p", "#{pid}").stdout)
    kill_all(machine, server)
    os.kill(server, signal.SIGKILL)


def kill_all(machine: Machine, but: int = 0) -> None:
    """Kill what runs in the folder there."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours
            if place.joinpath("cwd").readlink() == machine.there and int(place.name) != but:
                os.kill(int(place.name), signal.SIGKILL)


def test_a_connection_that_breaks_while_pushing_is_tried_again(machine, trainer, capfd) -> None:
    plan = deployment(
        host=Host(ADDRESS, machine.port, machine.folder / "key", str(machine.there)), checkout=deploy.checkout(), gpus=0,
        python=trainer,
    )  # fmt: skip
    (machine.folder / "fail").touch()
    notes: list[str] = []
    plan.prepare(notes.append)
    assert (machine.there / "pyproject.toml").exists()
    assert any("ended (Connection reset by peer); trying again" in note for note in notes)


# ── machines and keys that will not do: one sentence each ──


def sentence(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """What a deployment that cannot begin says."""
    assert cli.run(["deploy", "quickstart", *arguments]) == 1
    out, errors = capfd.readouterr()
    assert out == "" and errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors


@pytest.fixture
def here(machine: Machine, trainer: str) -> Machine:
    return machine


def test_unreachable(here, capfd) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        options = here.options("--port", str(taken.getsockname()[1]))
        del options[2:4]
        told = sentence(capfd, options)
    assert "127.0.0.1 does not answer (Connection refused); see to it that the machine runs" in told


def test_wrong_key(here, capfd) -> None:
    options = here.options()
    options[options.index("--identity") + 1] = str(here.folder / "stranger")
    assert "does not accept your ssh key (Permission denied (publickey)); add your public key there" in sentence(
        capfd, options
    )


def test_host_key_changed(here, capfd) -> None:
    known = here.folder / "known"
    kept = known.read_text()
    other = (here.folder / "otherkey.pub").read_text().split()
    known.write_text(f"[127.0.0.1]:{here.port} {other[0]} {other[1]}\n")
    try:
        told = sentence(capfd, here.options())
    finally:
        known.write_text(kept)
    assert "shows another host key than before" in told and f"ssh-keygen -R '[127.0.0.1]:{here.port}'" in told


def test_no_gpu(here, capfd) -> None:
    options = [word for word in here.options() if word not in ("--gpus", "0")]
    here.authorize({"PATH": _tools(here, nvidia_smi="echo 'NVIDIA-SMI has failed'; exit 9")})
    assert "no GPU is there, as far as nvidia-smi tells; take another machine, or give --gpus 0" in sentence(
        capfd, options
    )


def test_a_full_disk(here, capfd) -> None:
    here.authorize({"PATH": _tools(here, df="echo Filesystem; echo '/dev/x 9 9 1048576 9% /'")})
    told = sentence(capfd, here.options())
    assert "the disk there has 1.0 GiB free and 10.0 GiB are needed; make room" in told


@pytest.mark.parametrize("tool", ["rsync", "tmux"])
def test_a_tool_is_missing(here, capfd, tool) -> None:
    here.authorize({"PATH": _tools(here, without=tool)})
    assert f"{tool} is not installed there; run there: apt-get update && apt-get install -y {tool}" in sentence(
        capfd, here.options()
    )


def test_an_older_python(here, capfd) -> None:
    old = here.folder / "old-python"
    old.write_text("#!/bin/sh\necho 3.8.10\n")
    old.chmod(0o755)
    told = sentence(capfd, here.options("--python", str(old)))
    assert f"{old} is 3.8.10, older than 3.11 there; give another with --python" in told


def test_an_environment_without_the_packages(here, capfd) -> None:
    empty = here.folder / "empty-python"
    empty.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    empty.chmod(0o755)
    assert cli.run(["deploy", "quickstart", *here.options("--python", str(empty))]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {ADDRESS}: No module named ") and last.endswith("must have the packages of smalllm")


def _tools(machine: Machine, without: str = "", **fakes: str) -> str:
    """A PATH with what the scripts need, without one of them, or with one that is ours."""
    folder = machine.folder / f"tools-{without}{''.join(fakes)}"
    folder.mkdir()
    needed = "sh dirname df awk tr cat printf python3 rsync tmux curl mkdir date touch rm"
    for name in needed.split():
        if name != without and (place := shutil.which(name)):
            (folder / name).symlink_to(place)
    for name, body in fakes.items():
        fake = folder / name.replace("_", "-")
        fake.unlink(missing_ok=True)
        fake.write_text(f"#!{shutil.which('sh')}\n{body}\n")
        fake.chmod(0o755)
    return str(folder)


# ── fetching ──


@pytest.fixture
def trained(machine: Machine, dataset_folder: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run of twelve steps there."""
    monkeypatch.setattr(deploy, "checkout", lambda: checkout)
    train(tiny_settings(dataset_folder), machine.there / "runs" / "tiny")
    return RunFolder(machine.there / "runs" / "tiny")


def fetch(machine: Machine, *more: str) -> int:
    return cli.run(["deploy", "quickstart", "name=tiny", *machine.options("--fetch", *more)])


def test_a_run_is_fetched_again_when_it_went_on(machine, trained, dataset_folder, capfd) -> None:
    assert fetch(machine) == 0
    first = RunFolder(Path("runs/tiny"))
    assert [checkpoint.step for checkpoint in first.checkpoints()] == [4, 8, 12]
    train(tiny_settings(dataset_folder, train={"steps": 16}), trained.path)
    (trained.checkpoints_folder / ".tmp-17-1").mkdir()
    (trained.path / "private").symlink_to("/etc/passwd")
    assert fetch(machine) == 0
    told = capfd.readouterr().out
    assert "the newest of step 12" in told and "the newest of step 16" in told
    assert [record["step"] for record in map(json.loads, first.metrics_file.read_text().splitlines())] == list(
        range(1, 17)
    )
    assert sorted(path.name for path in Path("runs").iterdir()) == ["tiny"]
    assert not list(first.checkpoints_folder.glob(".*")) and not (first.path / "private").is_symlink()


def test_damage_here_is_repaired_and_damage_there_is_named(machine, trained, capfd) -> None:
    assert fetch(machine) == 0
    here = RunFolder(Path("runs/tiny")).checkpoints()[-1].path / "model.safetensors"
    times, data = here.stat(), bytearray(here.read_bytes())
    data[-1] ^= 1
    here.write_bytes(data)
    os.utime(here, ns=(times.st_atime_ns, times.st_mtime_ns))  # rsync takes it for unchanged
    assert fetch(machine) == 0 and "damaged" not in capfd.readouterr().err
    RunFolder(Path("runs/tiny")).checkpoints()[-1].verify()

    there = trained.checkpoints()[0].path / "model.safetensors"
    there.write_bytes(b"x")
    assert fetch(machine) == 0
    told = capfd.readouterr()
    assert "step-00000004/model.safetensors is damaged" in told.err and "2 checkpoints, each verified" in told.out
    for checkpoint in trained.checkpoints():
        (checkpoint.path / "state.json").write_bytes(b"{}")
    assert fetch(machine, "--out", "runs/other") == 1
    assert "has no whole checkpoint" in capfd.readouterr().err and not Path("runs/other").exists()


def test_another_run_is_never_written_over(machine, trained, dataset_folder, capfd) -> None:
    train(tiny_settings(dataset_folder), Path("runs/tiny"))  # the same settings, another run
    kept = Path("runs/tiny/metrics.jsonl").read_bytes()
    assert fetch(machine) == 1
    assert "runs/tiny is not an earlier state of the run on" in capfd.readouterr().err
    assert Path("runs/tiny/metrics.jsonl").read_bytes() == kept
    assert fetch(machine, "--out", "runs/theirs") == 0
    train(tiny_settings(dataset_folder, train={"steps": 20}), Path("runs/theirs"))  # gone on with here
    assert fetch(machine, "--out", "runs/theirs") == 1
    assert RunFolder(Path("runs/theirs")).newest_step() == 20
    busy = RunFolder(Path("runs/busy"))
    busy.lock()
    try:
        assert fetch(machine, "--out", "runs/busy") == 1
    finally:
        busy.unlock()
    assert "runs/busy is being trained on this machine" in capfd.readouterr().err


def test_a_run_in_the_way_is_noticed_before_it_costs_money(here, trainer, dataset_folder, capfd) -> None:
    train(tiny_settings(dataset_folder), Path("runs/quickstart"))
    told = sentence(capfd, here.options("--python", trainer))
    assert "runs/quickstart is another run than the one to begin there; give name=ANOTHER" in told
    assert not here.there.exists()


def test_there_is_no_run_to_fetch(machine, checkout, monkeypatch, capfd) -> None:
    monkeypatch.setattr(deploy, "checkout", lambda: checkout)
    assert fetch(machine) == 1
    assert "has no run of this name in the folder given by --dir" in capfd.readouterr().err
    assert not Path("runs/tiny").exists()


# ── the command ──


def test_a_dry_run_prints_the_commands_and_changes_nothing(tmp_path, monkeypatch, capsys, dataset_folder) -> None:
    monkeypatch.setattr(deploy, "checkout", lambda: ROOT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no ssh and no rsync to run
    recipe = tmp_path / "own.toml"
    recipe.write_text("[train]\nsteps = 5\n")
    before = sorted(tmp_path.rglob("*"))
    arguments = [str(recipe), "optim.lr=1e-3", "--host", "root@card", "--port", "2222", "--data", str(dataset_folder)]
    assert cli.run(["deploy", *arguments, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before and SECRET not in told
    titles, commands = told.splitlines()[0::2], told.splitlines()[1::2]
    assert [title.split()[1] for title in titles] == [
        "check",
        "push",
        "push",
        "push",
        "set",
        "launch",
        "follow",
        "fetch",
    ]
    for command in commands:
        assert {"BatchMode=yes", "2222"} <= set(re.split(r"[\s']+", command)), command
        assert subprocess.run(["/bin/sh", "-n", "-c", command], env={"PATH": ""}).returncode == 0
    launch = shlex.split(shlex.split(commands[5])[-3])
    assert launch[4:] == ["own", "-", ".deploy/own/own.toml", "optim.lr=1e-3", "--data", "data/stories"]
    for option, count in (("--stop", 1), ("--fetch", 1), ("--follow", 2)):
        assert cli.run(["deploy", *arguments, "--dry-run", option]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2 * count


def test_options_that_exclude_one_another(capsys) -> None:
    assert cli.run(["deploy", "--host", "card", "--stop", "--fetch"]) == 1
    assert "exclude one another" in capsys.readouterr().err
    assert cli.run(["deploy", "quickstart"]) == 2


def test_the_command_line_that_is_offered_is_the_one_that_was_given() -> None:
    plan = deployment(overrides=("optim.lr=1e-3",), gpus=2, out=Path("runs/mine"), python="/opt/a")
    assert command_line(plan).endswith(
        "smalllm deploy quickstart optim.lr=1e-3 --host card --out runs/mine --gpus 2 --python /opt/a"
    )


def test_without_a_checkout_there_is_nothing_to_push(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(deploy, "__file__", str(tmp_path / "site-packages" / "smalllm" / "deploy.py"))
    with pytest.raises(UserError, match="deploy pushes a checkout of smalllm"):
        deploy.checkout()


@pytest.mark.parametrize("script", sorted(REMOTE.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_shell(script: Path) -> None:
    subprocess.run(["sh", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


# ── deploy_vast.sh: on the machine itself ──


@pytest.fixture
def rented(machine: Machine, checkout: Path, tmp_path: Path) -> Path:
    """A checkout on a machine that was just rented."""
    shutil.copytree(checkout / "src", tmp_path / "smalllm" / "src")
    shutil.copy(ROOT / "deploy_vast.sh", tmp_path / "smalllm")
    return tmp_path / "smalllm"


def deploy_vast(rented: Path, machine: Machine, *words: str) -> subprocess.CompletedProcess[str]:
    environment = own_tmux(machine.folder / "tmux") | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", rented / "deploy_vast.sh", *words], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def test_deploy_vast_starts_a_run_once_and_deploy_can_follow_it(rented, machine, trainer, capfd) -> None:
    words = ["--cpu", "--python", trainer, "laptop", "name=mine"]
    first = deploy_vast(rented, machine, *words)
    assert first.returncode == 0, first.stderr
    assert "started: the run mine, in the tmux session smalllm-mine" in first.stdout
    said = rented / ".deploy" / "mine" / "log"
    wait_for(lambda: "step 2" in said.read_text())
    again = deploy_vast(rented, machine, *words)
    assert again.returncode == 0 and "running: the run mine" in again.stdout
    options = machine.options("name=mine")
    options[options.index("--dir") + 1] = str(rented)
    assert cli.run(["deploy", "laptop", *options, "--stop"]) == 0
    capfd.readouterr()
    assert cli.run(["deploy", "laptop", *options, "--follow"]) == 143
    assert capfd.readouterr().out.splitlines() == said.read_text().splitlines()
    assert said.read_text().splitlines()[-1] == "saved"


def test_deploy_vast_says_what_is_wrong(rented, machine, trainer) -> None:
    def said(*words: str) -> str:
        done = deploy_vast(rented, machine, *words)
        assert done.returncode == 1
        return done.stderr.splitlines()[-1]

    if shutil.which("nvidia-smi") is None:
        assert said("quickstart") == (
            "error: nvidia-smi shows no GPU here; rent a machine with one, or give --cpu to train without"
        )
    assert said("--gpu").startswith("error: there is no option --gpu")
    assert said("--from") == "error: --from wants a value"
    assert said("--cpu", "--python", trainer, "nonsense").startswith("error: no recipe is called 'nonsense'")
    assert said("--cpu", "--python", trainer, "train.stepz=3").startswith("error: there is no setting 'train.stepz'")
    assert not (rented / ".deploy").exists()
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", ROOT / "deploy_vast.sh"], check=True)


# ── the SkyPilot task ──


def test_the_skypilot_task_is_what_the_command_line_understands() -> None:
    """Without a YAML reader among the dependencies: the lines that matter, by hand."""
    text = (ROOT / "skypilot.yaml").read_text()
    code = re.sub(r" *#.*", "", text)
    assert re.findall(r"^(\w+):", code, re.MULTILINE) == [
        "name", "resources", "envs", "workdir", "file_mounts", "setup", "run",
    ]  # fmt: skip
    assert "use_spot: true" in code and "mode: MOUNT_CACHED" in code and "BUCKET: null" in code
    recipe = re.search(r"^  RECIPE: (\S+)$", code, re.MULTILINE)
    assert recipe is not None and load_recipe(recipe[1]).train.checkpoint_every > 0
    setup = re.search(r"sh (src/\S+)", code)
    assert setup is not None and (ROOT / setup[1]).is_file()
    commands = [shlex.split(line) for line in code.splitlines() if line.strip().startswith("smalllm ")]
    assert len(commands) == 1
    function, bound, ignored = cli.build_app().parse_args(commands[0][1:], exit_on_error=False, print_error=False)
    assert function.__name__ == "train" and not ignored and bound.arguments["words"] == ("$RECIPE",)
    assert bound.arguments["out"] == Path("/runs/$RECIPE")


def test_skypilot_reads_the_task(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed (pip install skypilot)")
    yaml = pytest.importorskip("yaml")
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="BUCKET"):
        sky.Task.from_yaml("skypilot.yaml")
    task = sky.Task.from_yaml_config(
        yaml.safe_load((ROOT / "skypilot.yaml").read_text()), env_overrides=[("BUCKET", "mine")]
    )
    assert all(wish.use_spot and wish.job_recovery["strategy"] == "EAGER_NEXT_REGION" for wish in task.resources)
    assert list(task.storage_mounts) == ["/runs"] and task.storage_mounts["/runs"].name == "mine"
