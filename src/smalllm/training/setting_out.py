"""What must be there, fit together and be the same at all ranks before a run begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from smalllm import __version__
from smalllm.config import RunConfig, UserError
from smalllm.data.prepare import PrepareProgress, prepare
from smalllm.data.shards import TokenDataset
from smalllm.ranks import ALONE, Ranks
from smalllm.runtime import Runtime


def open_data(
    config: RunConfig, progress: Callable[[PrepareProgress], None] | None = None, ranks: Ranks = ALONE
) -> TokenDataset:
    """The run's prepared data; prepared from its source first when it is missing, by one rank of a machine."""
    path, data = config.data_path, config.data
    with ranks.one_by_one("data"):
        if not (path / "manifest.json").exists():
            if not data.source:
                raise UserError(f"data.path = {path} holds no prepared data; run: smalllm prepare SOURCE --out {path}")
            prepare(
                [data.source], path, vocab_size=data.vocab_size, valid=data.valid or None, num_files=data.num_files or None,
                sample_rate=data.sample_rate, limit=data.limit or None, seed=config.seed, progress=progress,
            )  # fmt: skip
    return TokenDataset.open(path)


def settled(config: RunConfig, dataset: TokenDataset) -> RunConfig:
    """The settings with the vocabulary of the data; UserError when the recipe insists on another one."""
    vocab_size = dataset.manifest.vocab_size
    if config.model.vocab_size not in (0, vocab_size):
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size} but the data in {dataset.folder} has {vocab_size} pieces;"
            f" set model.vocab_size={vocab_size}, or prepare with --vocab-size {config.model.vocab_size}"
        )
    return config.replace(model={"vocab_size": vocab_size}, data={"path": str(dataset.folder)})


def divisible(config: RunConfig, ranks: Ranks) -> None:
    """UserError when a step cannot be shared out among the ranks."""
    rows, sharded = config.train.batch_tokens // config.model.context, config.train.parallel == "fsdp"
    if rows < ranks.world or (sharded and rows % ranks.world):
        raise UserError(
            f"train.batch_tokens = {config.train.batch_tokens} is {rows} rows of model.context = {config.model.context}, which"
            f" {ranks.world} ranks cannot share{' equally, as train.parallel = fsdp needs it' if sharded else ''}; set"
            f" train.batch_tokens to a multiple of {ranks.world * config.model.context}"
        )
    if sharded and not ranks.lone and config.train.precision == "fp16":
        raise UserError(
            "train.parallel = fsdp does not go with train.precision = fp16; use bf16, fp32 or train.parallel=ddp"
        )


def common_facts(config: RunConfig, dataset: TokenDataset, runtime: Runtime) -> dict[str, Any]:
    """What the ranks of a run must have in common, for ``Ranks.must_agree``. Where the data lies may differ."""
    settings = config.model_dump(mode="json")
    sections = {name: section for name, section in settings.items() if isinstance(section, dict)}
    flat = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return {
        "the version of smalllm": __version__, "the version of torch": torch.__version__, "seed": config.seed, **flat,
        "data.path": None, "the fingerprint of the data": dataset.fingerprint, "precision": runtime.precision,
    }  # fmt: skip
