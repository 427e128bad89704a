"""The model that is measured: a run folder, trained or made here with random weights, and its transformers twin."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor, nn

from smalllm.checkpoint import LoadedRun, RunFolder, Snapshot, model_weights
from smalllm.config import ModelConfig, UserError, load_recipe
from smalllm.data import storyworld
from smalllm.model import GPT, NORM_EPS
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


def transformers_model(model: GPT) -> nn.Module:
    """A transformers model that computes what ours does, with its weights."""
    import transformers

    shape = model.config
    tied, rope = shape.tie_embeddings, {"rope_theta": shape.theta, "rope_type": "default"}
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab_size, "hidden_size": shape.width, "intermediate_size": shape.hidden_width,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "head_dim": shape.head_width,
        "num_key_value_heads": shape.key_value_heads, "max_position_embeddings": shape.context, "rope_parameters": rope,
        "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    match shape.architecture:
        case "llama":
            config = transformers.LlamaConfig(**sizes, rms_norm_eps=NORM_EPS)
            twin = transformers.LlamaForCausalLM(config)
        case "qwen3":
            config = transformers.Qwen3Config(**sizes, rms_norm_eps=NORM_EPS)
            twin = transformers.Qwen3ForCausalLM(config)
        case "starcoder2":
            del sizes["head_dim"]
            config = transformers.Starcoder2Config(**sizes, norm_epsilon=NORM_EPS, use_bias=shape.bias)
            twin = transformers.Starcoder2ForCausalLM(config)
        case other:
            raise UserError(f"there is no {other} contender of transformers here; leave the transformers ones out")
    weights = transformers_weights(model)
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    left = set(missing) - ({"lm_head.weight"} if tied else set())
    if left or unexpected:
        raise UserError(
            f"transformers has other names for {sorted([*left, *unexpected])[0]}; use the version of uv.lock"
        )
    return twin.eval()


def transformers_weights(model: GPT) -> dict[str, Tensor]:
    """Our weights under the names of transformers."""
    names = TRANSFORMERS_NAMES | (STARCODER2_NAMES if model.config.architecture == "starcoder2" else {})
    found = {}
    for name, tensor in parts(model).items():
        theirs = ".".join(names.get(part, part) for part in name.split("."))
        found[theirs if name.startswith("head.") else f"model.{theirs}"] = tensor
    if model.config.architecture == "starcoder2":  # its LayerNorms always have a bias
        for name in [name for name in found if name.endswith("norm.weight")]:
            found.setdefault(name.replace("weight", "bias"), torch.zeros_like(found[name]))
    return found


TRANSFORMERS_NAMES = {
    "blocks": "layers", "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attention": "self_attn", "query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj",
    "gate": "gate_proj", "up": "up_proj", "down": "down_proj", "embedding": "embed_tokens", "head": "lm_head",
}  # fmt: skip
STARCODER2_NAMES = {"up": "c_fc", "down": "c_proj"}


# ── matrices apart ──


def parts(model: GPT) -> dict[str, Tensor]:
    """Our weights with the matrices that hold several apart: query, key and value; gate and up."""
    fused = fused_matrices(model.config)
    found: dict[str, Tensor] = {}
    for name, tensor in model_weights(model).items():
        *place, matrix, kind = name.split(".")
        names, sizes = fused.get(matrix, ([matrix], [len(tensor)]))
        for part, piece in zip(names, tensor.split(sizes), strict=True):
            found[".".join([*place, part, kind])] = piece
    return found


def fused_matrices(config: ModelConfig) -> dict[str, tuple[list[str], list[int]]]:
    """Names of the parts and their rows, for each of our matrices that holds several."""
    kept = config.key_value_heads * config.head_width
    found = {"qkv": (["query", "key", "value"], [config.width, kept, kept])}
    if config.activation == "swiglu":
        found["up"] = (["gate", "up"], [config.hidden_width] * 2)
    return found
