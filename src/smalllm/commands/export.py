"""`smalllm export`: a run as the files of another program, with the proof that they are right. The work is `export/`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from smalllm.checkpoint import LoadedRun, open_run
from smalllm.config import UserError
from smalllm.conversation import has_turns
from smalllm.data import storyworld
from smalllm.data.sources import documents
from smalllm.evaluation import validation_texts
from smalllm.export import gguf, html, hub, huggingface, llama2c
from smalllm.export.card import UNKNOWN_LICENCE, Card, card_of, measured
from smalllm.export.certificate import Exported, OwnReader, TransformersReader, certify, faults, installed
from smalllm.export.destination import CERTIFICATE, certificate_file, check_free, replacing
from smalllm.export.llamacpp import LlamaCpp
from smalllm.files import FileSystem
from smalllm.terminal import plain

Format = Literal["huggingface", "gguf", "llama2c", "html"]
DOCUMENTS = 50  # that are read to compare on


def export(
    run: Annotated[str | None, Parameter(name="RUN", show_default=False)] = None,
    *,
    to: Annotated[Format, Parameter(name="--to")],
    out: Annotated[Path, Parameter(name="--out")],
    dtype: Annotated[str | None, Parameter(name="--dtype", show_default=False)] = None,
    checkpoint: Annotated[str, Parameter(name="--checkpoint")] = "best",
    text: Annotated[str | None, Parameter(name="--text")] = None,
    author: Annotated[str, Parameter(name="--author", show_default=False)] = "",
    licence: Annotated[str, Parameter(name=["--licence", "--license"])] = UNKNOWN_LICENCE,
    push: Annotated[str | None, Parameter(name="--push")] = None,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Write a run as the files of another program, and prove that they compute the same.

    Parameters
    ----------
    run
        A run folder, or one checkpoint folder of a run [default: the newest run under runs/].
    to
        huggingface: a folder for transformers, vLLM, SGLang, MLX. gguf: a file for llama.cpp, Ollama, LM Studio. llama2c: a
        folder for llama2.c. html: one page that tells stories offline in a browser.
    out
        The folder or file to write.
    dtype
        f32, f16, bf16 or q8_0, as far as the format has it [default: f32; html: int8].
    checkpoint
        best, latest or a step.
    text
        A file to compare and measure on [default: the validation documents of the run].
    author
        Who made the model, for its card.
    licence
        The model's licence, an identifier of the hub such as mit, for its card.
    push
        Upload the Hugging Face folder as this OWNER/NAME, private if it is new.
    json_output
        Print one JSON object to standard output.
    """
    if push is not None and to != "huggingface":
        raise UserError(f"--push uploads a Hugging Face folder, not {to}; use --to huggingface, or leave --push out")
    if push is not None:
        hub.check_name(push)
    check_free(out)
    loaded = open_run(run, checkpoint)
    dtype = dtype or ("int8" if to == "html" else "f32")
    card = card_of(loaded, author, licence)
    certificate = export_run(
        loaded, to, out, dtype, measured(card, loaded, text) if to == "huggingface" else card, text
    )
    address = hub.push(out, push) if push is not None else None
    if json_output:
        print(json.dumps(certificate | ({"pushed": address} if address else {})))
    else:
        _print(certificate, address)


def export_run(
    run: LoadedRun, to: Format, out: Path, dtype: str, card: Card, text: str | None = None
) -> dict[str, Any]:
    """Write, read back, compare, and only then let the export take its place; returns the certificate. UserError when it
    does not compute what the run computes."""
    files = FileSystem()
    with replacing(out) as temporary:
        write(to, run, temporary, dtype, card)
        with reader(to, temporary, run) as exported:
            certificate = certify(run, exported, comparison_text(run, text), dtype, out)
        if wrong := faults(certificate):
            raise UserError(
                f"{out} was not written: read back by {certificate['reader']}, its {'; its '.join(wrong)}; report this"
            )
        data = (json.dumps(certificate | {"path": out.name}, indent=1) + "\n").encode()  # not where one's files lie
        if temporary.is_dir():
            files.write(temporary / CERTIFICATE, [data])
    if not out.is_dir():
        files.replace(certificate_file(out), [data])
    return certificate


def write(to: Format, run: LoadedRun, out: Path, dtype: str, card: Card) -> None:
    """The writer of each format."""
    match to:
        case "huggingface":
            huggingface.write(run, out, dtype, card)
        case "gguf":
            gguf.write(run, out, dtype, card)
        case "llama2c":
            llama2c.write(run, out, dtype, card)
        case "html":
            html.write(run, out, dtype, card)


@contextmanager
def reader(to: Format, path: Path, run: LoadedRun) -> Iterator[Exported]:
    """The export as somebody else reads it, who is installed here; else as we do."""
    match to:
        case "huggingface" if installed("transformers"):
            logging.getLogger("transformers").setLevel(logging.ERROR)
            yield TransformersReader(path, has_turns(run.tokenizer))
        case "gguf" if installed("xllamacpp"):
            with LlamaCpp(path) as exported:
                yield exported
        case "huggingface":
            yield OwnReader(*huggingface.read(path))
        case "gguf":
            yield OwnReader(*gguf.read(path))
        case "llama2c":
            yield OwnReader(*llama2c.read(path))
        case "html":
            yield OwnReader(*html.read(path))


def comparison_text(run: LoadedRun, text: str | None) -> list[str]:
    """Documents to compare on: those of a file, of the run's validation data, or, when that is gone, built-in stories."""
    if text is not None:
        return list(documents(text, limit=DOCUMENTS))
    try:
        return validation_texts(run, DOCUMENTS)
    except UserError:
        return list(storyworld.stories(count=DOCUMENTS))


def _print(certificate: dict[str, Any], address: str | None) -> None:
    tokenizer = certificate["tokenizer_agreement"]
    lines = [
        f"{certificate['path']}: {certificate['architecture']}, {certificate['dtype']}, read back by {certificate['reader']}",
        f"largest difference of a logit  {certificate['max_logit_difference']:.2g}"
        f" (the largest logit is {certificate['largest_logit']:.3g})",
        f"greedy tokens that agree       {certificate['token_agreement']:.1%}",
        f"bits per byte differ by        {certificate['bits_per_byte_difference']:.2g} of {certificate['bits_per_byte']:.4f}",
    ]
    if tokenizer is not None:
        lines.append(f"strings encoded alike          {tokenizer:.1%}")
    if address:
        lines.append(f"uploaded to {address}")
    for line in lines:
        Console(highlight=False, soft_wrap=True).print(Text(plain(line)))
