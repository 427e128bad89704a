"""The model that is measured: a run folder, trained or made here with random weights, and its transformers twin."""

from __future__ import annotations

import math
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sentencepiece
import torch
from torch import nn

from smalllm.checkpoint import LoadedRun, RunFolder, Snapshot, model_weights
from smalllm.config import load_recipe
from smalllm.data import storyworld
from smalllm.export import huggingface
from smalllm.model import GPT
from smalllm.tokenizer import Tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "llama-20m": {"activation": "swiglu", "norm": "rmsnorm", "bias": False, "mlp_width": 1024},
    "smalllm-20m": {},  # the recipe as it is: LayerNorm, GELU, biases
}
PROMPT_TOKENS = 10

# ── a run with random weights ──


def random_run(shape: str, folder: Path, seed: int = 0) -> Path:
    """A run folder of this shape with random weights: speed does not depend on what a model says."""
    config = load_recipe("smalllm-20m").replace(model=SHAPES[shape], data={"path": "none"})
    tokenizer = random_tokenizer(config.model.vocab_size, seed)
    torch.manual_seed(seed)
    model = GPT(config.model)
    randomize(model)
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    run.write_text(run.config_file, config.to_toml())
    tokenizer.save(run.tokenizer_file)
    state = {"step": 0, "tokens": 0, "tokenizer_fingerprint": tokenizer.fingerprint}
    run.save(Snapshot(0, config.model, model_weights(model), {}, state), keep=1)
    return folder


def random_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """A tokenizer of so many pieces. Stories alone have too few words for that, so made-up words follow them."""
    draw = random.Random(seed)

    def word() -> str:
        return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(draw.randint(2, 5)))

    words = " ".join(word() for _ in range(2 * vocab_size))
    return Tokenizer.train([*storyworld.stories(count=200), words], vocab_size)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Weights that make every part matter. SmallLM's own would make an untrained model repeat its last token, whatever
    its attention computes, and hide a peer that reads its weights wrongly."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
        else:
            nn.init.normal_(parameter, std=0.02 if "embedding" in name else parameter.shape[1] ** -0.5)


# ── prompts and answers ──


def prompts(tokenizer: Tokenizer, count: int, tokens: int = PROMPT_TOKENS) -> list[list[int]]:
    """The beginnings of so many stories: the begin-of-document token and what follows, ``tokens`` in all."""
    texts = storyworld.stories(seed=7, count=count)
    return [[tokenizer.bos_id, *tokenizer.encode(text)][:tokens] for text in texts]


@torch.inference_mode()
def regret(run: LoadedRun, prompt: list[int], answer: list[int]) -> float:
    """How far a greedy answer is from what our model would have chosen in float32: the most nats of probability that any
    of its tokens gave away against the likeliest token at that place, special tokens aside."""
    logits = run.model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1].float()
    logits[:, forbidden(run.tokenizer)] = -math.inf
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return float((logits.amax(dim=-1) - chosen).max())


def forbidden(tokenizer: Tokenizer) -> list[int]:
    """Ids that nobody may produce here, so that every answer has its full length: the unknown and the control pieces."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    return [id for id in range(tokenizer.vocab_size) if pieces.is_unknown(id) or pieces.is_control(id)]


# ── the same weights in transformers ──


def transformers_model(run: LoadedRun) -> nn.Module:
    """The run's export as transformers reads it, in float32."""
    import transformers

    with TemporaryDirectory(prefix="transformers-") as folder:
        huggingface.write(run, Path(folder) / "model", "f32")
        return transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
