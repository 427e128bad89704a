"""`smalllm serve`: a model over HTTP, as OpenAI's clients expect it, with a page to try it."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Annotated, TextIO

from cyclopts import Parameter

from smalllm.hardware import pick_device
from smalllm.serve.guard import is_loopback
from smalllm.serve.server import Service, Settings
from smalllm.terminal import plain

KEY_VARIABLE = "SMALLLM_API_KEY"


def serve(
    run: Annotated[str | None, Parameter(name="RUN", show_default=False)] = None,
    *,
    host: Annotated[str, Parameter(name="--host")] = "127.0.0.1",
    port: Annotated[int, Parameter(name="--port")] = 8000,
    api_key: Annotated[str | None, Parameter(name="--api-key")] = None,
    slots: Annotated[int, Parameter(name="--slots")] = 16,
    allow_host: Annotated[list[str] | None, Parameter(name="--allow-host", negative="")] = None,
    device: Annotated[str, Parameter(name="--device")] = "auto",
) -> None:
    """Serve a model: OpenAI's /v1/completions and /v1/chat/completions, and a page at /. Follows a run that is training.

    Parameters
    ----------
    run
        A run folder, or one checkpoint folder of a run [default: the newest run under runs/].
    host
        The address to listen at; any but this machine's own needs an API key.
    port
        The port; 0 takes one that is free.
    api_key
        What clients must send as Authorization: Bearer KEY. Better in the variable SMALLLM_API_KEY, which the list of
        processes does not show.
    slots
        Texts that are made at the same time; others wait.
    allow_host
        A name by which this server is reached besides its own, behind a proxy or in a network (repeatable).
    device
        auto, cpu, mps, cuda or cuda:N.
    """
    log_to(sys.stderr)
    key = api_key or os.environ.get(KEY_VARIABLE) or None
    settings = Settings(run, host, port, key, slots, tuple(allow_host or ()), str(pick_device(device)))
    service = Service(settings)
    print(_greeting(service), flush=True)
    # uvicorn drains at a signal and then raises it once more: SIGTERM shall end in 0, Ctrl-C in 130 as everywhere.
    signal.signal(signal.SIGTERM, lambda *_: None)
    service.run()


def log_to(stream: TextIO) -> None:
    """A line for each request, and warnings of others; without the control characters that a checkpoint may hold."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, stream=stream, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_PlainLines("%(asctime)s %(message)s"))
    logging.getLogger("smalllm.serve").setLevel(logging.INFO)


class _PlainLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def _greeting(service: Service) -> str:
    current, url = service.models.current, service.url
    header = '-H "Authorization: Bearer $SMALLLM_API_KEY" ' if service.settings.api_key else ""
    lines = [
        f"Serving {current.name} ({current.run.model.parameters_count() / 1e6:.1f} M parameters) at {url}",
        f"  curl {url}/v1/completions {header}-H 'Content-Type: application/json' -d '{{\"prompt\": \"Once upon a time\"}}'",
        f"  from OpenAI's clients: base_url = {url}/v1",
    ]
    if not is_loopback(service.settings.host) and not service.settings.allow_hosts:
        lines.append("  other machines need --allow-host NAME, the name or address by which they reach this one")
    return plain("\n".join([*lines, "Ctrl-C ends it."]))
