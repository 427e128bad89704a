"""The checkpoint that a run goes on from, as every rank of it sees it: the first one reads, and tells the others, who need
not reach its disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from smalllm.checkpoint import Checkpoint, RunFolder
from smalllm.config import ModelConfig, RunConfig, parse_config
from smalllm.ranks import Ranks


class Past:
    """A checkpoint and the settings of its run. Every rank must ask the same things in the same order."""

    def __init__(self, checkpoint: Checkpoint | None, header: dict[str, Any], ranks: Ranks) -> None:
        self.checkpoint, self.header, self.ranks = checkpoint, header, ranks
        self.path = Path(header["path"])

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.header["state"]
        return state

    def settings(self) -> RunConfig:
        return parse_config(self.header["settings"])

    def model_config(self) -> ModelConfig:
        return ModelConfig(**self.header["model"])

    def weights(self) -> dict[str, Tensor]:
        return self.ranks.tensors(self.checkpoint.weights() if self.checkpoint else None)

    def optimizer(self) -> dict[str, Tensor]:
        return self.ranks.tensors(self.checkpoint.optimizer() if self.checkpoint else None)


def newest(folder: RunFolder, ranks: Ranks, warn: Callable[[str], None]) -> Past | None:
    """The newest checkpoint of a run that verifies; None when there is none yet."""
    checkpoint, header = None, None
    if ranks.first and (checkpoint := folder.newest_valid(warn=warn)) is not None:
        header = {
            "path": str(checkpoint.path), "state": checkpoint.state(), "settings": folder.config().model_dump(mode="json"),
            "model": checkpoint.model_config().model_dump(mode="json"),
        }  # fmt: skip
    header = ranks.tell(header)
    return Past(checkpoint, header, ranks) if header else None
