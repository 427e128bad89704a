"""Runs to export: a shape of each architecture, with random weights that make every part of the model matter."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalllm.checkpoint import LoadedRun, RunFolder, Snapshot, model_weights, open_run
from smalllm.config import ModelConfig, parse_config
from smalllm.data import storyworld
from smalllm.model import GPT
from smalllm.tokenizer import Tokenizer

VOCABULARY = 512
_LLAMA = {"layers": 2, "width": 64, "heads": 4, "context": 64, "vocab_size": VOCABULARY}
_GELU = _LLAMA | {"norm": "layernorm", "activation": "gelu", "bias": True}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"kv_heads": 2},
    "llama-untied": _LLAMA | {"tie_embeddings": False},
    "qwen3": _LLAMA | {"kv_heads": 2, "qk_norm": True},
    "qwen3-untied": _LLAMA | {"qk_norm": True, "tie_embeddings": False, "rope_theta": 500.0},
    "starcoder2": _GELU | {"kv_heads": 2},
    "starcoder2-untied": _GELU | {"tie_embeddings": False, "mlp_width": 96},
    "starcoder2-unbiased": _GELU | {"kv_heads": 1, "bias": False},
    "gpt2": _GELU | {"positions": "learned"},
    "gpt2-untied": _GELU | {"positions": "learned", "tie_embeddings": False, "bias": False, "mlp_width": 96},
}
"""Settings of each architecture: grouped keys or not, tied or not, biased or not."""


def random_model(config: ModelConfig, seed: int = 0) -> GPT:
    """Weights of all sizes: SmallLM's own start with MLPs of zero and would hide a matrix that is read wrongly."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
            else:
                nn.init.normal_(parameter, std=0.3 if "embedding" in name else parameter.shape[1] ** -0.5)
    return model


def random_weights(config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of `random_model`, a tied head left out."""
    return {name: tensor.detach() for name, tensor in model_weights(random_model(config)).items()}


@cache
def tokenizer(control: tuple[str, ...] = ()) -> Tokenizer:
    """A tokenizer of stories, with the emoji and letters of other scripts that tests use."""
    stories = storyworld.stories(count=120)
    return Tokenizer.train([*stories, "\n\n\n   a  b\t1234 é 日本 🙂👩‍👩‍👧\n"], VOCABULARY, control)


def random_run(folder: Path, shape: str = "llama", control: tuple[str, ...] = ()) -> LoadedRun:
    """A run folder of this shape with random weights, opened."""
    words = tokenizer(control)
    config = parse_config(
        {"name": shape, "model": SHAPES[shape], "data": {"path": "none"}, "train": {"steps": 1, "batch_tokens": 256}}
    )
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    run.write_text(run.config_file, config.to_toml())
    words.save(run.tokenizer_file)
    state = {"step": 0, "tokens": 0, "tokenizer_fingerprint": words.fingerprint}
    run.save(Snapshot(0, config.model, model_weights(random_model(config.model)), {}, state), keep=1)
    return open_run(folder)
