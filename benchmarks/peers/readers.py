"""Readers of exports in processes of their own: each loads one file or folder, says how long that took, then takes turns."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from peers import llamacpp
from peers.race import answer_questions, own_output
from smalllm.config import UserError

Decode = Callable[[dict[str, Any]], dict[str, Any]]
"""Answers ``prompts`` (one) with ``tokens`` ids, greedily: how many of them it timed, and their seconds."""
READERS = ("smalllm", "transformers", "llama.cpp", "run", "runq", "chromium")


def load(reader: str, file: Path, options: argparse.Namespace, stack: ExitStack) -> tuple[float, Decode]:
    """(seconds of loading, its decoder). What a reader imports is imported before, where it is a library."""
    match reader:
        case "smalllm":
            return load_ours(file, options)
        case "transformers":
            return load_transformers(file)
        case "llama.cpp":
            with suppress(ImportError):  # its absence is told below
                import xllamacpp  # noqa: F401
            sizes = {"model": file, "port": 0, "slots": 1, "context": options.context, "threads": options.threads}
            began = time.perf_counter()
            address = stack.enter_context(llamacpp.wheel(argparse.Namespace(**sizes)))
            return time.perf_counter() - began, lambda question: llamacpp.decode(address, question)
        case "chromium":
            return load_page(file, stack)
    return load_program(reader, file, options, stack)


# ── libraries ──


def load_ours(file: Path, options: argparse.Namespace) -> tuple[float, Decode]:
    """A run, or what SmallLM imports."""
    import torch

    from peers.decoders import smalllm_decoder
    from smalllm.checkpoint import open_run
    from smalllm.export import gguf, huggingface, llama2c

    torch.set_num_threads(options.threads)
    readers: dict[str, Any] = {
        "run": open_run,
        "gguf": gguf.read,
        "huggingface": huggingface.read,
        "llama2c": llama2c.read,
    }
    began = time.perf_counter()
    found = readers[options.format](file)
    run = found if options.format == "run" else argparse.Namespace(model=found[0], tokenizer=found[1])
    decode = smalllm_decoder(run, 1, options.weights)
    return time.perf_counter() - began, decode


def load_transformers(folder: Path) -> tuple[float, Decode]:
    """A Hugging Face folder, in float32."""
    import torch
    import transformers

    from peers.decoders import transformers_decode

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in (*json.loads((folder / "config.json").read_bytes())["architectures"], "PreTrainedTokenizerFast"):
        getattr(transformers, name)  # imported now
    began = time.perf_counter()
    transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return time.perf_counter() - began, lambda question: transformers_decode(model, question)


# ── programs ──


def load_program(name: str, folder: Path, options: argparse.Namespace, stack: ExitStack) -> tuple[float, Decode]:
    """llama2.c's run or runq, compiled as `make runomp` does. Loading is a whole process that says one token."""
    build = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llama2c-")))
    source, program = (options.llama2c / f"{name}.c").resolve(), build / name
    if not source.is_file():
        raise UserError(f"there is no {source}; clone https://github.com/karpathy/llama2.c and give its folder")
    flags = ["-w", "-Ofast", "-fopenmp", "-march=native"]
    subprocess.run(["gcc", *flags, "-o", str(program), str(source), "-lm"], check=True)
    words = [str(program), str(folder / "model.bin"), "-z", str(folder / "tokenizer.bin"), "-t", "0"]
    began = time.perf_counter()
    subprocess.run([*words, "-n", "1"], capture_output=True, check=True)
    seconds = time.perf_counter() - began

    def decode(question: dict[str, Any]) -> dict[str, Any]:
        text, steps = question["texts"][0], question["tokens"] + len(question["prompts"][0])
        done = subprocess.run([*words, "-n", str(steps), "-i", text], capture_output=True, text=True, check=True)
        rates = re.findall(r"tok/s: ([0-9.]+|inf)", done.stderr)
        if not rates:
            raise UserError(f"{name} said nothing after {text!r}; take another run")
        rate = float(rates[-1])
        return {"tokens": question["tokens"], "seconds": question["tokens"] / rate}

    return seconds, decode


# ── a browser ──


TELL = """([prompt, params]) => new Promise((resolve, reject) => {
  let first = null, began = performance.now();
  port.addEventListener("message", function listen({ data }) {
    if (data.trouble) reject(new Error(data.trouble));
    if (data.told !== params.seed || !data.tokens) return;
    const now = performance.now();
    first ??= [data.tokens, now];
    if (!data.finish) return;
    if (first[1] === now) first = [0, began];
    port.removeEventListener("message", listen);
    resolve([data.tokens - first[0], (now - first[1]) / 1000]);
  });
  port.postMessage({ tell: params.seed, prompt, params });
})"""
"""Asks the page's engine as the page does; (tokens, seconds) from the first message with text on, if there is another."""
GREEDY = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "stop": []}


def load_page(file: Path, stack: ExitStack) -> tuple[float, Decode]:
    """The page in Chromium, opened from disk, until it is ready to tell."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        raise UserError("there is no chromium here; install it, or leave html out")
    from playwright.sync_api import expect, sync_playwright

    playwright = stack.enter_context(sync_playwright())
    browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
    stack.callback(browser.close)
    page = browser.new_page()
    began = time.perf_counter()
    page.goto(file.resolve().as_uri())
    expect(page.locator("#state")).to_have_text("works offline", timeout=60_000)
    seconds = time.perf_counter() - began
    numbers = itertools.count(1_000_000)

    def decode(question: dict[str, Any]) -> dict[str, Any]:
        params = {**GREEDY, "max_tokens": question["tokens"] + 50, "seed": next(numbers)}
        tokens, taken = page.evaluate(TELL, [question["texts"][0], params])
        return {"tokens": tokens, "seconds": max(taken, 1e-9)}

    return seconds, decode


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, then take turns until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--format", default="run", help="for smalllm: what the file is")
    parser.add_argument("--weights", default="auto", help="for smalllm: how it decodes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--llama2c", type=Path)
    options = parser.parse_args(arguments)
    answers = own_output()
    with ExitStack() as stack:
        try:
            seconds, decode = load(options.reader, options.file, options, stack)
            answer_questions({"seconds": seconds}, decode, answers)
        except UserError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
