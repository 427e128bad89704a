"""Ranks without torchrun: processes forked from this one, which have imported all they need and are there at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from smalllm.config import RunConfig, UserError
from smalllm.training.trainer import train

Work = Callable[[], Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Group:
    """Processes forked from this one, as torchrun would start them; each writes its result, or its error, as JSON."""

    def __init__(self, world: int, work: Work, folder: Path, environment: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.world, port = folder, world, free_port()
        self.pids = [self._start(rank, work, port, environment or {}) for rank in range(world)]
        self.codes: dict[int, int] = {}

    def _start(self, rank: int, work: Work, port: int, environment: dict[str, str]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world), "LOCAL_WORLD_SIZE": str(self.world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            } | environment  # fmt: skip
            torch.set_num_threads(1)
            try:
                result, code = {"result": work()}, 0
            except UserError as error:
                result, code = {"error": str(error), "said": error.said}, error.exit_code
            (self.folder / f"{rank}.json").write_text(json.dumps(result))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def end(self, seconds: float = 60.0) -> list[int]:
        """Exit codes, negative for signals; a process that does not end in time is killed and -9."""
        ends = time.monotonic() + seconds
        for rank, pid in enumerate(self.pids):
            while rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > ends:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)
        return [self.codes[rank] for rank in range(self.world)]

    def said(self, rank: int) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads((self.folder / f"{rank}.json").read_text())
        return answer


def run_ranks(world: int, config: RunConfig, run: Path) -> None:
    """A run, or the rest of it, by so many ranks; all of them must end well, with one figure."""
    group = Group(world, lambda: train(config, run).valid_bits_per_byte, run.parent / f"{run.name}-said")
    codes = group.end(120)
    assert codes == [0] * world, f"{codes}: {[group.said(rank) for rank in range(world) if codes[rank] == 1]}"
    assert len({group.said(rank)["result"] for rank in range(world)}) == 1, "ranks disagree about the final figure"
