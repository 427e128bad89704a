"""SmallLM's server beside llama.cpp's: one run, one machine, the same weights, the same client over HTTP.

    uv run --with xllamacpp python benchmarks/serve.py
    uv run python benchmarks/serve.py --contenders smalllm
    uv run --with xllamacpp python benchmarks/serve.py --run runs/quickstart --contenders smalllm llama.cpp-q8_0 --parts together

Servers and client are processes of their own; servers take turns, so that a machine whose speed drifts is as fast for one
as for the other. Every answer is greedy and has its full length: the end of text is ruled out. Four parts:

together  --slots requests at once, --tokens tokens each, streamed and not: tokens per second of all of them
first     seconds until the first event of a stream, one request at a time, from a warm server
crowd     --crowd streams at once: how many are answered whole, how many are told to come again, what memory that takes
leave     clients of --slots long streams hang up: seconds until /metrics tells that nothing runs any more
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from peers.models import PROMPT_TOKENS, SHAPES, prompts, random_run
from peers.race import Racer, ratio
from peers.servers import Server, llama_server, smalllm_server
from train_throughput import run as run_script

from smalllm import hardware
from smalllm.checkpoint import LoadedRun, open_run
from smalllm.config import UserError
from smalllm.export import gguf

PEERS = ("llama.cpp-q8_0", "llama.cpp-f16")
NATIVE = ("llama-server-q8_0", "llama-server-f16")
PARTS = ("together", "first", "crowd", "leave")
WARM_UP = 3
"""Requests before the time to the first token is taken."""
Bodies = list[dict[str, Any]]


class Bench:
    """The servers, the client, and what they are asked."""

    def __init__(self, run: LoadedRun, servers: Sequence[Server], client: Racer, options: argparse.Namespace) -> None:
        self.servers, self.client, self.options = servers, client, options
        count = max(options.slots, options.firsts + WARM_UP)
        self.texts = [run.tokenizer.decode(ids[1:]) for ids in prompts(run.tokenizer, count)]
        self.eos, self.context = run.tokenizer.eos_id, run.model.config.context

    def bodies(self, server: Server, count: int, tokens: int, stream: bool, start: int = 0) -> Bodies:
        """So many requests, for texts from ``start`` on; each server rules the end of text out in its own way."""
        own: dict[str, Any] = (
            {"logit_bias": {str(self.eos): -100}} if server.name == "smalllm" else {"ignore_eos": True}
        )
        if stream:
            own |= {"stream": True, "stream_options": {"include_usage": True}}
        texts = (self.texts[index % len(self.texts)] for index in range(start, start + count))
        return [{"prompt": text, "max_tokens": tokens, "temperature": 0, **own} for text in texts]

    def together(self, server: Server, count: int, tokens: int, stream: bool, start: int = 0) -> dict[str, Any]:
        """All at once; UserError unless every answer is whole and has so many tokens."""
        found = self.ask(server, count, tokens, stream, start)
        odd = [one for one in found["answers"] if not one["whole"] or one["tokens"] != tokens]
        if odd:
            raise UserError(
                f"{server.name}: {len(odd)} of {count} answers are not {tokens} tokens long, such as {odd[0]}"
            )
        return found

    def ask(self, server: Server, count: int, tokens: int, stream: bool, start: int = 0) -> dict[str, Any]:
        """All at once, however it ends."""
        bodies = self.bodies(server, count, tokens, stream, start)
        return self.client.ask({"verb": "together", "address": server.address, "bodies": bodies})

    def turns(self, number: int) -> list[Server]:
        """The servers in the order of one round; nobody always follows the same one."""
        first = number % len(self.servers)
        return [*self.servers[first:], *self.servers[:first]]


# ── the parts: each returns its figures by server, and prints a table of them ──


def together(bench: Bench) -> dict[str, Any]:
    """Tokens per second of --slots requests at once."""
    slots, tokens = bench.options.slots, bench.options.tokens
    ways = {"not streamed": False, "streamed": True}
    rates: dict[str, dict[str, list[float]]] = {way: {server.name: [] for server in bench.servers} for way in ways}
    for number in range(bench.options.repeats + 1):
        for way, stream in ways.items():
            for server in bench.turns(number):
                rate = slots * tokens / bench.together(server, slots, tokens, stream)["seconds"]
                if number:  # the first round warms up
                    rates[way][server.name].append(rate)
    base = bench.servers[0].name
    print_table(
        ["who", f"{slots} at once", "tokens/s", "slowest - fastest", f"times {base}"],
        [
            [name, way, f"{median(own):,.0f}", f"{min(own):,.0f} - {max(own):,.0f}", f"{ratio(own, rates[way][base]):.2f}"]
            for way in ways for name, own in rates[way].items()
        ],
    )  # fmt: skip
    return rates


def first(bench: Bench) -> dict[str, Any]:
    """Seconds until the first event, one request at a time, each with a prompt that the server has not seen."""
    seconds: dict[str, list[float]] = {server.name: [] for server in bench.servers}
    for number in range(bench.options.firsts + WARM_UP):
        for server in bench.turns(number):
            (answer,) = bench.together(server, 1, 8, stream=True, start=number)["answers"]
            if number >= WARM_UP:
                seconds[server.name].append(answer["first"])
    print_table(
        ["who", "first token: p50", "p95", "of"],
        [
            [name, f"{1000 * median(own):.1f} ms", f"{1000 * percentile(own, 95):.1f} ms", str(len(own))]
            for name, own in seconds.items()
        ],
    )
    return seconds


def percentile(values: Sequence[float], which: int) -> float:
    """Of at least two values."""
    return quantiles(values, n=100, method="inclusive")[which - 1]


def crowd(bench: Bench) -> dict[str, Any]:
    """Far more streams at once than slots."""
    found: dict[str, dict[str, Any]] = {}
    for server in bench.servers:
        before = server.memory()
        with server.watched() as readings:
            asked = bench.ask(server, bench.options.crowd, bench.options.crowd_tokens, stream=True)
        bench.together(server, 1, 8, stream=True)  # it lives
        found[server.name] = {**judged(asked), "before": before, "peak": max(readings), "after": server.memory()}
    columns = ["whole", "told to come again", "within seconds", "otherwise", "seconds in all"]
    print_table(
        ["who", f"{bench.options.crowd:,} streams: whole", *columns[1:], "memory before", "peak", "after"],
        [
            [name, *(f"{own[column]:,.4g}" for column in columns), *megabytes(own["before"], own["peak"], own["after"])]
            for name, own in found.items()
        ],
    )
    return found


def judged(asked: dict[str, Any]) -> dict[str, float]:
    """How many answers were whole, 503 with Retry-After (the last of them after so many seconds), and otherwise."""
    answers = asked["answers"]
    whole = [one for one in answers if one["whole"]]
    again = [one for one in answers if one["status"] == 503 and one["retry_after"]]
    return {
        "whole": len(whole), "told to come again": len(again),
        "within seconds": max((one["seconds"] for one in again), default=0.0),
        "otherwise": len(answers) - len(whole) - len(again), "seconds in all": asked["seconds"],
    }  # fmt: skip


def megabytes(*sizes: int) -> list[str]:
    """For a table."""
    return [f"{size / 1e6:,.0f} MB" for size in sizes]


def leave(bench: Bench) -> dict[str, Any]:
    """How soon the slots of clients that hang up are free."""
    seconds: dict[str, list[float]] = {server.name: [] for server in bench.servers}
    long = bench.context - 2 * PROMPT_TOKENS
    for number in range(bench.options.repeats):
        for server in bench.turns(number):
            question = {"verb": "leave", "address": server.address, "metric": server.metric}
            done = bench.client.ask(
                {**question, "bodies": bench.bodies(server, bench.options.slots, long, stream=True)}
            )
            seconds[server.name].append(done["seconds"])
    print_table(
        ["who", f"{bench.options.slots} clients left: free after", "fastest - slowest"],
        [
            [name, f"{1000 * median(own):.0f} ms", f"{1000 * min(own):.0f} - {1000 * max(own):.0f} ms"]
            for name, own in seconds.items()
        ],
    )
    return seconds


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Markdown."""
    for row in [head, ["---"] * len(head), *rows]:
        print(f"| {' | '.join(row)} |".replace("| --- ", "|---").replace("--- |", "---|"))
    print(flush=True)


# ── the command ──


def start(name: str, run: LoadedRun, folder: Path, options: argparse.Namespace) -> Server:
    """The server of this name."""
    print(f"starting {name}", file=sys.stderr, flush=True)
    if name == "smalllm":
        return smalllm_server(run.checkpoint.path, options.threads, options.slots)
    who, _, precision = name.rpartition("-")
    file = folder / f"{precision}.gguf"
    if not file.exists():
        gguf.write(run, file, precision)
    binary = options.llama_server if who == "llama-server" else None
    return llama_server(name, file, options.threads, options.slots, run.model.config.context, binary)


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = found.add_mutually_exclusive_group()
    what.add_argument("--run", type=Path, help="a trained run; left out: random weights")
    what.add_argument("--shape", choices=SHAPES, default="llama-20m", help="of the random weights; default llama-20m")
    found.add_argument("--contenders", nargs="+", choices=["smalllm", *PEERS, *NATIVE], help="the first is the measure")
    found.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    found.add_argument("--slots", type=int, default=16, help="texts at once; default 16")
    found.add_argument("--tokens", type=int, default=128, help="of each of them; default 128")
    found.add_argument("--firsts", type=int, default=50, help="requests for the time to the first token; default 50")
    found.add_argument("--crowd", type=int, default=1000, help="streams of the crowd; default 1,000")
    found.add_argument("--crowd-tokens", type=int, default=16, help="of each of them; default 16")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--repeats", type=int, default=5, help="rounds; default 5")
    found.add_argument(
        "--llama-server", type=Path, metavar="FILE", help="a llama-server that was built for this machine"
    )
    found.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the servers and measure the parts that are wanted."""
    options = parser().parse_args(arguments)
    names = options.contenders or ["smalllm", *PEERS, *(NATIVE if options.llama_server else ())]
    if options.llama_server is None and any(name in NATIVE for name in names):
        parser().error("the llama-server contenders need --llama-server FILE")
    allow_sockets()
    parts = {"together": together, "first": first, "crowd": crowd, "leave": leave}
    report: dict[str, Any] = {"machine": hardware.describe(hardware.pick_device("cpu"))}
    running: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="serve-") as folder:
        run = open_run(options.run or random_run(options.shape, Path(folder) / "run"))
        try:
            for name in names:
                running.append(start(name, run, Path(folder), options))
            client = Racer("the client", [sys.executable, "-m", "peers.client"], options.threads)
            running.append(client)
            bench = Bench(run, running[:-1], client, options)
            for part in options.parts:
                report[part] = parts[part](bench)
        finally:
            for process in running:
                process.close()
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def allow_sockets() -> None:
    """As many open files as this machine lets a process have, for the client and for every server."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    run_script(main)
