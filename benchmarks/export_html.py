"""Does the page of `smalllm export --to html` tell, in Chromium, what smalllm tells? How fast, and from how large a file?

    uv run python benchmarks/export_html.py
    uv run python benchmarks/export_html.py --run runs/quickstart --prompts 50 --tokens 200

The beginnings of stories are continued greedily by the page, opened from disk, and by smalllm: with the weights that the page
holds (its matrices rounded to int8, all arithmetic in float32), which must give the same text; with the run's own weights in
float32; and with int8, which rounds the inputs of matrices too. Loading is from the opening of the file until it can tell;
tokens per second are all tokens by all the time in which the page was asked. Exit 1 when a text differs from the first of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peers.models import SHAPES, random_run
from train_throughput import run as run_script

from smalllm.checkpoint import open_run
from smalllm.config import UserError
from smalllm.data import storyworld
from smalllm.decoder import Weights
from smalllm.export import html
from smalllm.generation import Generator, SamplingParams
from smalllm.model import GPT
from smalllm.tokenizer import Tokenizer

WORDS = 5  # of a story, that are its beginning
GREEDY = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "stop": []}
TELL = """([prompts, params]) => prompts.reduce(async (before, prompt, index) => [...await before, await new Promise((resolve, reject) => {
  let text = "";
  port.addEventListener("message", function listen({ data }) {
    if (data.trouble) reject(new Error(data.trouble));
    if (data.told !== index + 1e6) return;
    text += data.text;
    if (!data.finish) return;
    port.removeEventListener("message", listen);
    resolve([text, data.tokens]);
  });
  port.postMessage({ tell: index + 1e6, prompt, params });
})], Promise.resolve([]))"""
"""Asks the page's engine as the page does, a prompt after the other; [text, tokens] of each."""


@dataclass(frozen=True)
class Result:
    """What was measured; of ``prompts``, how many texts of the page are those of each kind of weights."""

    parameters: int
    megabytes: float
    load_seconds: float
    tokens: int
    tokens_per_second: float
    prompts: int
    equal_rounded: int
    equal_float32: int
    equal_int8: int


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", help="a trained run; without it, random weights")
    options.add_argument("--shape", choices=SHAPES, default="smalllm-20m", help="of random weights")
    options.add_argument("--prompts", type=int, default=50)
    options.add_argument("--tokens", type=int, default=100, help="of each text, at most")
    options.add_argument("--json", type=Path, help="write the figures here")
    return options


def told_by_page(file: Path, prompts: list[str], tokens: int) -> tuple[float, list[str], int, float]:
    """Seconds to load, the texts, how many tokens they are and in how many seconds they came."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        raise UserError("there is no chromium here; install it: apt-get install chromium")
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        began = time.perf_counter()
        page.goto(file.resolve().as_uri())
        expect(page.locator("#state")).to_have_text("works offline", timeout=60_000)
        loaded = time.perf_counter()
        told = page.evaluate(TELL, [prompts, {**GREEDY, "max_tokens": tokens, "seed": 1}])
        seconds = time.perf_counter() - loaded
        browser.close()
    return loaded - began, [text for text, _ in told], sum(count for _, count in told), seconds


def equal(texts: list[str], model: GPT, tokenizer: Tokenizer, weights: Weights, prompts: list[str], tokens: int) -> int:
    """How many of the texts smalllm tells as well."""
    own = Generator(model, tokenizer, weights).batch(prompts, SamplingParams(max_tokens=tokens, temperature=0.0))
    return sum(text == completion.text for text, completion in zip(texts, own, strict=True))


def measure(run_path: str | Path, folder: Path, options: argparse.Namespace) -> Result:
    """Export a run into a folder, ask the page, compare."""
    run, file = open_run(run_path), folder / "page.html"
    html.write(run, file)
    stories = storyworld.stories(seed=7, count=options.prompts)
    prompts = [" ".join(story.split(" ")[:WORDS]) for story in stories]
    seconds, texts, tokens, telling = told_by_page(file, prompts, options.tokens)
    asked = (prompts, options.tokens)
    return Result(
        run.model.parameters_count(), file.stat().st_size / 1e6, seconds, tokens, tokens / telling, len(prompts),
        equal(texts, *html.read(file), "fp32", *asked), equal(texts, run.model, run.tokenizer, "fp32", *asked),
        equal(texts, run.model, run.tokenizer, "int8", *asked),
    )  # fmt: skip


def table(result: Result) -> str:
    """The figures as Markdown."""
    r = result
    return (
        "| parameters | MB | load | tokens/s | texts | equal, weights of the page | run in float32 | run in int8 |\n"
        "|---|---|---|---|---|---|---|---|\n"
        f"| {r.parameters:,} | {r.megabytes:.1f} | {r.load_seconds:.2f} s | {r.tokens_per_second:,.0f} | {r.prompts} |"
        f" {r.equal_rounded} | {r.equal_float32} | {r.equal_int8} |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, ask, compare; 1 when the page tells something else than its own weights do here."""
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="html-") as name:
        result = measure(options.run or random_run(options.shape, Path(name) / "run"), Path(name), options)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    return int(result.equal_rounded < result.prompts)


if __name__ == "__main__":
    run_script(main)
