"""llama.cpp in a process of its own: it takes turns at decoding, and serves over HTTP. Torch stays out of that process.

It comes from xllamacpp, whose wheel is built for any x86-64 with AVX2, or is a ``llama-server`` built for this machine.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peers.race import answer_questions, own_output
from smalllm.config import UserError

MISSING = "llama.cpp needs xllamacpp; run with `uv run --with xllamacpp python ...`, or leave its contenders out"
PATIENCE = 60.0
"""Seconds until a server must be there."""


@contextmanager
def wheel(options: argparse.Namespace) -> Iterator[str]:
    """The server of xllamacpp, in this process; its address."""
    try:
        import xllamacpp
    except ImportError:
        raise UserError(MISSING) from None
    params = xllamacpp.CommonParams()
    params.model.path, params.port = str(options.model), options.port
    params.n_parallel, params.n_ctx = options.slots, options.slots * options.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.endpoint_metrics, params.verbosity = True, 0
    server = xllamacpp.Server(params)
    yield server.listening_address


@contextmanager
def binary(options: argparse.Namespace) -> Iterator[str]:
    """A ``llama-server`` of the user's; its address."""
    port = options.port or free_port()
    sizes = {"threads": options.threads, "slots": options.slots, "context": options.context}
    command = server_command(options.binary, options.model, port, **sizes)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/health", process)
        yield address
    finally:
        process.terminate()
        process.wait()


def server_command(binary: Path, model: Path, port: int, *, threads: int, slots: int, context: int) -> list[str]:
    """How a ``llama-server`` is started."""
    numbers = {
        "--port": port, "--parallel": slots, "--ctx-size": slots * context, "--threads": threads, "--threads-batch": threads,
    }  # fmt: skip
    words = [word for option, number in numbers.items() for word in (option, str(number))]
    return [str(binary), "--model", str(model), *words, "--metrics", "--log-disable"]


def free_port() -> int:
    """A port that nobody has at this moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen[Any]) -> None:
    """Until a server answers with 200; UserError when it ends or takes too long."""
    last = time.monotonic() + PATIENCE
    while time.monotonic() < last and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise UserError(f"{url} did not answer: the server {'took too long' if process.poll() is None else 'ended'}")


def decode(address: str, question: dict[str, Any]) -> dict[str, Any]:
    """Answer one prompt, or several at once, by one request that is not streamed. One: by llama.cpp's own timings, which
    begin after the first token and know nothing of HTTP. Several: everything, reading and one request included."""
    prompts, tokens = question["prompts"], question["tokens"]
    request = {
        "prompt": prompts if len(prompts) > 1 else prompts[0], "n_predict": tokens, "temperature": 0, "ignore_eos": True,
        "cache_prompt": False, "return_tokens": True,
    }  # fmt: skip
    if question.get("judged"):  # unknown and begin are not said by themselves, and each bias costs llama.cpp some time
        request["logit_bias"] = [[id, False] for id in question["forbidden"]]
    began = time.perf_counter()
    answers = post(f"{address}/completion", request)
    seconds = time.perf_counter() - began
    answers = answers if isinstance(answers, list) else [answers]
    made = [answer["tokens_predicted"] for answer in answers]
    if made != [tokens] * len(prompts):
        raise ValueError(f"llama.cpp made {made} tokens of {tokens}")
    whole = {"tokens": sum(made), "seconds": seconds, "whole_seconds": seconds, "ids": answers[0]["tokens"]}
    if len(prompts) > 1:
        return whole
    return {**whole, "tokens": tokens - 1, "seconds": answers[0]["timings"]["predicted_ms"] / 1000}


def post(url: str, request: dict[str, Any]) -> Any:
    """What JSON comes back."""
    asked = urllib.request.Request(url, json.dumps(request).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked) as answer:
        return json.loads(answer.read())


def main(arguments: Sequence[str] | None = None) -> None:
    """Take turns and serve until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--context", type=int, default=512, help="positions of each slot")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--binary", type=Path, help="a llama-server; left out: xllamacpp")
    options = parser.parse_args(arguments)
    answers = own_output()
    try:
        with binary(options) if options.binary else wheel(options) as address:
            answer_questions({"address": address}, lambda question: decode(address, question), answers)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
