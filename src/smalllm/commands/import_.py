"""`smalllm import`: the model of another program as a run folder. The work is `export.huggingface` and its siblings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from smalllm.checkpoint import RunFolder, Snapshot, model_weights
from smalllm.config import ModelConfig, RunConfig, UserError, parse_config
from smalllm.export import gguf, huggingface, llama2c
from smalllm.export.destination import check_free, replacing
from smalllm.export.pieces import puts_space_first
from smalllm.model import GPT
from smalllm.terminal import plain
from smalllm.tokenizer import Tokenizer

BATCH_TOKENS = 16_384


def import_(
    path: Annotated[Path, Parameter(name="PATH")],
    *,
    out: Annotated[Path, Parameter(name="--out")],
    tokenizer: Annotated[Path | None, Parameter(name="--tokenizer")] = None,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Make a run of a model of another program, to sample, chat with, evaluate, serve and train on.

    Parameters
    ----------
    path
        A Hugging Face folder of a llama, qwen3, starcoder2 or gpt2 model with safetensors weights and a tokenizer.model, a
        model.bin of llama2.c or the folder that holds it, or a GGUF file that SmallLM wrote.
    out
        The run folder to write.
    tokenizer
        The SentencePiece .model or, for llama2.c, the tokenizer.bin, where it does not lie beside the model.
    json_output
        Print one JSON object to standard output.
    """
    check_free(out)
    model, words = read(path, tokenizer)
    write_run(model, words, out)
    told = {
        "run": str(out), "architecture": model.config.architecture, "parameters": model.parameters_count(),
        "context": model.config.context, "vocab_size": words.vocab_size,
        "space_first": puts_space_first(words.model_bytes),
    }  # fmt: skip
    print(json.dumps(told)) if json_output else _print(told)


def read(path: Path, tokenizer: Path | None = None) -> tuple[GPT, Tokenizer]:
    """The model and the vocabulary at a path, of whichever format it is."""
    if path.is_dir() and not (path / llama2c.MODEL).exists():
        return huggingface.read(path, tokenizer)
    if path.suffix == ".gguf":
        if tokenizer is not None:
            raise UserError(f"--tokenizer has no effect with {path}, which holds its own; leave it out")
        return gguf.read(path)
    if path.is_dir() or path.suffix == ".bin":
        return llama2c.read(path, tokenizer)
    return huggingface.read(path, tokenizer)


def write_run(model: GPT, tokenizer: Tokenizer, out: Path) -> None:
    """A run folder whose only checkpoint, of step 0, holds this model."""
    with replacing(out) as temporary:
        folder = RunFolder(temporary)
        config = run_config(model.config, out.name)
        folder.files.mkdir(temporary)
        folder.write_text(folder.config_file, config.to_toml())
        tokenizer.save(folder.tokenizer_file)
        state = {"step": 0, "imported": True, "tokenizer_fingerprint": tokenizer.fingerprint}
        folder.save(Snapshot(0, config.model, model_weights(model), {}, state), keep=1)


def run_config(model: ModelConfig, name: str) -> RunConfig:
    """Settings with which training can go on: a thousand steps of gentle AdamW on data that is to be given."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:100] or "imported"
    batch = max(1, BATCH_TOKENS // model.context) * model.context
    return parse_config(
        {
            "name": safe,
            "model": model.model_dump(exclude_none=True),
            "optim": {"lr": 3e-4, "warmup_steps": 100},
            "train": {"steps": 1000, "batch_tokens": batch, "preflight": False},
        }
    )


def _print(told: dict[str, Any]) -> None:
    out = told["run"]
    lines = [
        f"{out}: {told['architecture']}, {told['parameters']:,} parameters, a context of {told['context']:,} tokens",
        f"Tell a story:   smalllm sample {out}",
        f"Train it on:    smalllm prepare SOURCE --out DATA --tokenizer {out}/tokenizer.model",
        f"                smalllm train {out}/config.toml --data DATA --out {out}",
    ]
    if told["space_first"]:
        lines.append("Its tokenizer put a space before every text; SmallLM does not: begin prompts with a space.")
    for line in lines:
        Console(highlight=False, soft_wrap=True).print(Text(plain(line)))
