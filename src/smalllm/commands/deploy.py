"""`smalllm deploy`: a run on a rented machine, as if it were here. The work is `deploy`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smalllm import deploy as deployment
from smalllm.commands.train import PROGRAM, settings
from smalllm.config import UserError
from smalllm.deploy import Deployment, Host, Mark
from smalllm.terminal import plain


def deploy(
    *words: Annotated[str, Parameter(name="RECIPE section.key=value", show_default=False)],
    host: Annotated[str, Parameter(name="--host")],
    port: Annotated[int | None, Parameter(name="--port", show_default=False)] = None,
    identity: Annotated[Path | None, Parameter(name="--identity", show_default=False)] = None,
    folder: Annotated[str, Parameter(name="--dir")] = "smalllm",
    data: Annotated[Path | None, Parameter(name="--data", show_default=False)] = None,
    out: Annotated[Path | None, Parameter(name="--out", show_default=False)] = None,
    gpus: Annotated[int | None, Parameter(name="--gpus", show_default=False)] = None,
    python: Annotated[str, Parameter(name="--python", show_default=False)] = "",
    follow: Annotated[bool, Parameter(name="--follow", negative="")] = False,
    fetch: Annotated[bool, Parameter(name="--fetch", negative="")] = False,
    stop: Annotated[bool, Parameter(name="--stop", negative="")] = False,
    dry_run: Annotated[bool, Parameter(name="--dry-run", negative="")] = False,
) -> int:
    """Train on another machine: check it, push the code, set it up with uv, train in tmux, follow, fetch the run.

    The run does not depend on the connection. The same command again goes on wherever the last one ended: it follows a
    run that trains, resumes one that was stopped, and fetches one that has ended. Exits with the run's exit code.

    Parameters
    ----------
    words
        A recipe (a name, or a TOML file; default quickstart) and settings such as train.steps=100 optim.lr=3e-4.
    host
        USER@HOST, or a name of ~/.ssh/config. ssh must get in with a key and ask nothing.
    port
        Of ssh there [default: 22, or as ~/.ssh/config says].
    identity
        The private key [default: ssh's own].
    folder
        For code, data and runs there, relative to the home or absolute.
    data
        A folder made by `smalllm prepare` here, to be pushed; left out, the recipe's source is prepared there.
    out
        Where the run is fetched to [default: runs/NAME].
    gpus
        That must be there and are used; 0: train on the CPU [default: 1, or 0 with train.device=cpu].
    python
        The Python there of an environment with smalllm's packages; left out, uv makes one.
    follow
        Only follow the run there, and fetch it when it ends.
    fetch
        Only fetch the run as it is now, also while it trains.
    stop
        Only stop the run; it saves a checkpoint first.
    dry_run
        Only print the commands, changing nothing; each can be copied into a shell.
    """
    if follow + fetch + stop > 1:
        raise UserError("--follow, --fetch and --stop exclude one another; give one of them")
    config = settings(words, data, None)
    recipe, overrides = (words[0], words[1:]) if words and "=" not in words[0] else ("quickstart", words)
    if gpus is None:
        gpus = 0 if config.train.device == "cpu" else 1
    there = Host(host, port, identity.expanduser() if identity is not None else None, folder)
    plan = Deployment(
        there, config, recipe, overrides, out or Path("runs") / config.name, deployment.checkout(), data, gpus, python
    )
    if dry_run:
        return _print_commands(plan, follow, fetch, stop)
    if stop:
        return _stop(plan)
    if fetch:
        return _fetch(plan)
    if not follow and not _begin(plan):
        return 1
    return _follow_to_the_end(plan, relaunch=not follow)


def _begin(plan: Deployment) -> bool:
    """Check the machine and launch the run unless it runs; False when the machine will not do."""
    found = plan.probe()
    if session := found.get("session"):
        _note(f"the run {plan.name} trains there already, in the tmux session {session}: following it")
        return True
    problems = list(plan.problems(found))
    for problem in problems:
        _note(f"error: {plan.host.address}: {problem}")
    if problems:
        return False
    plan.refuse_other_run(found)
    gpus = ", ".join(deployment.gpu_names(found)) or "no GPU"
    free = int(found["free_kib"]) / 2**20
    _note(f"{plan.host.address}: Python {found['python'] or 'by uv'}, {gpus}, {free:.0f} GiB free")
    plan.prepare(_note)
    begun = plan.start(_note)
    _note(f"the run {plan.name} {'has begun' if begun else 'trains already'}; Ctrl-C ends the following, not the run")
    return True


def _follow_to_the_end(plan: Deployment, relaunch: bool) -> int:
    """Show what the run says until it ends, and fetch it; its exit code. When its session is gone without one (the machine was
    restarted), it is launched again as long as it gets on."""
    reached = -1
    try:
        while (code := plan.follow(_show, _note)) is None:
            before, reached = reached, Mark.read(plan.mark, plan.host.place).offset
            if not relaunch or reached == before:
                raise UserError(
                    f"the run {plan.name} is gone from {plan.host.address} without an exit code, as after a restart; this"
                    f" resumes it: {command_line(plan)}"
                )
            _note(f"the run {plan.name} is gone, as after a restart: launching it again")
            plan.start(_note)
    except KeyboardInterrupt:
        again = command_line(plan)
        _note(f"\nThe run goes on at {plan.host.address}. To follow it: {again} --follow")
        _note(f"To fetch it as it is: {again} --fetch\nTo stop it, saved: {again} --stop")
        return 130
    if code:
        _note(f"the run {plan.name} ended with exit code {code}")
    try:
        _fetch(plan)
    except UserError as error:
        if not code:
            raise
        _note(f"not fetched: {error}")
    return code


def _fetch(plan: Deployment) -> int:
    _note(f"fetching the run to {plan.out}")
    fetched = plan.fetch(_note)
    for damaged in fetched.damaged:
        _note(f"damaged there as well: {damaged}")
    count = f"{len(fetched.steps)} checkpoints, each" if len(fetched.steps) > 1 else "1 checkpoint,"
    print(plain(
        f"{fetched.folder}: {count} verified, the newest of step {fetched.steps[-1]}\n"
        f"Next: {PROGRAM} chat {fetched.folder}     (a rented machine costs money until you give it back)"
    ))  # fmt: skip
    return 0


def _stop(plan: Deployment) -> int:
    match plan.stop():
        case "stopped":
            print(plain(f"the run {plan.name} is stopped and saved; the same command without --stop goes on with it"))
        case "none":
            print(plain(f"the run {plan.name} does not run at {plan.host.address}"))
        case _:
            raise UserError(f"the run {plan.name} has not ended within two minutes; look with --follow and try again")
    return 0


def _print_commands(plan: Deployment, follow: bool, fetch: bool, stop: bool) -> int:
    listen, pull = plan.listen(Mark.read(plan.mark, plan.host.place)), plan.pull()
    following = [
        ("follow it: its lines, framed as remote/follow.sh says", listen),
        ("fetch it; then it is verified", pull),
    ]
    steps = [("check the machine", plan.check())]
    steps += [(f"push {what}", command) for what, command in plan.push()]
    steps += [("set it up", plan.set_up()), ("launch the run", plan.launch()), *following]
    if stop:
        steps = [("stop the run", plan.end())]
    elif fetch:
        steps = following[1:]
    elif follow:
        steps = following
    for what, command in steps:
        print(f"# {what}\n{command}")
    return 0


def command_line(plan: Deployment) -> str:
    """What to type for the same deployment, to which --follow, --fetch or --stop can be added."""
    host, words = plan.host, [plan.recipe, *plan.overrides]
    options = {
        "--host": host.address, "--port": host.port, "--identity": host.identity, "--data": plan.data,
        "--dir": host.folder if host.folder != "smalllm" else None,
        "--out": plan.out if plan.out != Path("runs") / plan.name else None,
        "--gpus": plan.gpus if plan.gpus != 1 else None, "--python": plan.python or None,
    }  # fmt: skip
    given = [part for option, value in options.items() if value is not None for part in (option, str(value))]
    return f"{PROGRAM} {shlex.join(['deploy', *words, *given])}"


def _show(line: str) -> None:
    print(line, flush=True)


def _note(message: str) -> None:
    print(plain(message), file=sys.stderr, flush=True)
