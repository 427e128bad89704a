"""`smalllm sample`: print text that a trained model writes. The work is `generation`; here are words and styles."""

from __future__ import annotations

import json
import sys
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from smalllm.checkpoint import open_run
from smalllm.config import UserError
from smalllm.generation import ROWS, Completion, Generator, SamplingParams
from smalllm.hardware import pick_device
from smalllm.terminal import plain

SEPARATOR = "\n\n---\n\n"


def sample(
    run: Annotated[str | None, Parameter(name="RUN", show_default=False)] = None,
    *,
    prompt: Annotated[str, Parameter(name="--prompt", allow_leading_hyphen=True)] = "Once upon a time",
    count: Annotated[int, Parameter(name="--count")] = 1,
    max_tokens: Annotated[int, Parameter(name="--max-tokens")] = 200,
    temperature: Annotated[float, Parameter(name="--temperature")] = 0.8,
    top_k: Annotated[int | None, Parameter(name="--top-k")] = None,
    top_p: Annotated[float | None, Parameter(name="--top-p")] = None,
    min_p: Annotated[float | None, Parameter(name="--min-p")] = None,
    repetition_penalty: Annotated[float, Parameter(name="--repetition-penalty")] = 1.0,
    no_repeat_ngram: Annotated[int, Parameter(name="--no-repeat-ngram")] = 0,
    stop: Annotated[list[str] | None, Parameter(name="--stop", consume_multiple=True, negative="")] = None,
    seed: Annotated[int | None, Parameter(name="--seed")] = None,
    checkpoint: Annotated[str, Parameter(name="--checkpoint")] = "best",
    device: Annotated[str, Parameter(name="--device")] = "auto",
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Print text that a trained model writes.

    Parameters
    ----------
    run
        A run folder, or one checkpoint folder of a run [default: the newest run under runs/].
    prompt
        How the text begins; - reads it from standard input.
    count
        How many texts.
    max_tokens
        The longest continuation; beyond its context the model goes on from the last half of it.
    temperature
        0 always takes the most likely token, 1 samples as the model learned, more is wilder.
    top_k
        Choose among the K most likely tokens.
    top_p
        Choose among the most likely tokens that together have probability P.
    min_p
        Choose among tokens with at least P times the probability of the most likely one.
    repetition_penalty
        Above 1, tokens that were said become less likely.
    no_repeat_ngram
        Never say the same N tokens in a row twice.
    stop
        End before this text (one or several).
    seed
        The same seed gives the same texts; left out, they differ each time.
    checkpoint
        best, latest or a step.
    device
        auto, cpu, mps, cuda or cuda:N.
    json_output
        Print one JSON object per text: prompt, text, tokens, finish_reason, seconds.
    """
    params = SamplingParams(
        max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram, stop or (), seed
    )  # fmt: skip
    if count < 1:
        raise UserError(f"count = {count} is not possible; use 1 or more")
    text = _standard_input() if prompt == "-" else prompt
    loaded = open_run(run, checkpoint, pick_device(device))
    generator = Generator(loaded.model, loaded.tokenizer)
    console = Console(highlight=False)
    if count == 1 and console.is_terminal and not json_output:
        _stream(generator, text, params, console)
    else:
        _write_all(generator, text, count, params, console, json_output)


def _standard_input() -> str:
    """All of standard input without the newline that ends it."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt -: standard input is not UTF-8 text at byte {error.start}; convert it first"
        ) from None


def _stream(generator: Generator, prompt: str, params: SamplingParams, console: Console) -> None:
    _write_prompt(console, prompt)
    for chunk in generator.stream(prompt, params):
        console.file.write(plain(chunk.text))
        console.file.flush()
    console.file.write("\n")


def _write_all(
    generator: Generator, prompt: str, count: int, params: SamplingParams, console: Console, as_json: bool
) -> None:
    """Texts in groups that are decoded together, each printed when its group is done."""
    for start in range(0, count, ROWS):
        indices = range(start, min(start + ROWS, count))
        for index, completion in zip(indices, generator.batch([prompt] * len(indices), params, indices), strict=True):
            if as_json:
                console.file.write(_json_line(completion))
            else:
                console.file.write(SEPARATOR if index else "")
                _write_prompt(console, prompt)
                console.file.write(plain(completion.text))
        console.file.flush()
    console.file.write("" if as_json else "\n")


def _write_prompt(console: Console, prompt: str) -> None:
    """The prompt, in bold on a terminal; as Text, because markup in it is text."""
    if console.is_terminal:
        console.print(Text(plain(prompt), style="bold"), end="", soft_wrap=True)
    else:
        console.file.write(plain(prompt))


def _json_line(completion: Completion) -> str:
    keys = ("prompt", "text", "tokens", "finish_reason", "seconds")
    return json.dumps({key: getattr(completion, key) for key in keys}) + "\n"
