"""Servers that are measured, each a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peers.llamacpp import free_port, server_command, wait_for
from peers.race import environment
from smalllm.config import UserError

METRICS = {"smalllm": "smalllm_active_slots", "llama": "llamacpp:requests_processing"}
"""Who tells under which name how many texts are being made."""


class Server:
    """A server that answers, until ``close``."""

    def __init__(self, name: str, command: Sequence[str], port: int, threads: int) -> None:
        self.name, self.address = name, f"http://127.0.0.1:{port}"
        self.metric = next(metric for who, metric in METRICS.items() if name.startswith(who))
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read when the process fails)
        self.process = subprocess.Popen(
            command, env=environment(threads), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self.log
        )
        try:
            wait_for(f"{self.address}/health", self.process)
        except UserError as error:
            self.log.seek(0)
            words = " / ".join(self.log.read().strip().splitlines()[-3:])
            self.close()
            raise UserError(f"{name} failed: {words or error}") from None
        except BaseException:
            self.close()
            raise

    def memory(self) -> int:
        """Bytes of memory that it has now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))

    @contextmanager
    def watched(self) -> Iterator[list[int]]:
        """Its memory, a reading 20 times a second."""
        readings, done = [self.memory()], threading.Event()

        def watch() -> None:
            while not done.wait(0.05):
                readings.append(self.memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield readings
        finally:
            done.set()
            watcher.join()

    def close(self) -> None:
        """End it."""
        with self.log, self.process:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()


def smalllm_server(run: Path, threads: int, slots: int) -> Server:
    """`smalllm serve`."""
    port = free_port()
    command = [sys.executable, "-m", "smalllm", "serve", str(run), "--port", str(port), "--slots", str(slots)]
    return Server("smalllm", command, port, threads)


def llama_server(name: str, model: Path, threads: int, slots: int, context: int, binary: Path | None) -> Server:
    """llama.cpp's, by xllamacpp or from a binary."""
    port = free_port()
    sizes = {"threads": threads, "slots": slots, "context": context}
    if binary is not None:
        return Server(name, server_command(binary, model, port, **sizes), port, threads)
    words = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "peers.llamacpp", str(model), "--port", str(port), *words]
    return Server(name, command, port, threads)
