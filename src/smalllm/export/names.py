"""The one table of names: our tensors and those of transformers and of GGUF, both ways, bit for bit.

Pure functions on dicts of tensors. Ours hold query, key and value in one matrix, and gate and up in one; the others
mostly have them apart. GPT-2 of transformers stores its matrices transposed (Conv1D). The llama of GGUF rotates
neighbouring pairs and not halves, so the rows of its queries and keys stand in that order; all others keep ours. A tied
head is nowhere stored twice. The names are those of transformers 5 (models/{llama,qwen3,starcoder2,gpt2}) and of
llama.cpp (gguf-py/gguf/constants.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from smalllm.checkpoint import model_weights
from smalllm.config import ModelConfig, UserError
from smalllm.model import GPT

Weights = dict[str, Tensor]

_LLAMA = {
    "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "blocks.*.attention_norm": "model.layers.*.input_layernorm",
    "blocks.*.attention.query": "model.layers.*.self_attn.q_proj",
    "blocks.*.attention.key": "model.layers.*.self_attn.k_proj",
    "blocks.*.attention.value": "model.layers.*.self_attn.v_proj",
    "blocks.*.attention.out": "model.layers.*.self_attn.o_proj",
    "blocks.*.mlp_norm": "model.layers.*.post_attention_layernorm",
    "blocks.*.mlp.gate": "model.layers.*.mlp.gate_proj",
    "blocks.*.mlp.up": "model.layers.*.mlp.up_proj",
    "blocks.*.mlp.down": "model.layers.*.mlp.down_proj",
}  # fmt: skip
HUGGINGFACE: dict[str, dict[str, str]] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA | {
        "blocks.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
        "blocks.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
    },
    "starcoder2": _LLAMA | {
        "blocks.*.mlp.up": "model.layers.*.mlp.c_fc",
        "blocks.*.mlp.down": "model.layers.*.mlp.c_proj",
    },
    "gpt2": {
        "embedding": "transformer.wte", "position_embedding": "transformer.wpe", "norm": "transformer.ln_f",
        "head": "lm_head",
        "blocks.*.attention_norm": "transformer.h.*.ln_1",
        "blocks.*.attention.qkv": "transformer.h.*.attn.c_attn",
        "blocks.*.attention.out": "transformer.h.*.attn.c_proj",
        "blocks.*.mlp_norm": "transformer.h.*.ln_2",
        "blocks.*.mlp.up": "transformer.h.*.mlp.c_fc",
        "blocks.*.mlp.down": "transformer.h.*.mlp.c_proj",
    },
}  # fmt: skip
"""Their module for each of ours; ``*`` is the number of a block."""

GGUF = {
    "embedding": "token_embd", "position_embedding": "position_embd", "norm": "output_norm", "head": "output",
    "blocks.*.attention_norm": "blk.*.attn_norm",
    "blocks.*.attention.qkv": "blk.*.attn_qkv",
    "blocks.*.attention.query": "blk.*.attn_q",
    "blocks.*.attention.key": "blk.*.attn_k",
    "blocks.*.attention.value": "blk.*.attn_v",
    "blocks.*.attention.q_norm": "blk.*.attn_q_norm",
    "blocks.*.attention.k_norm": "blk.*.attn_k_norm",
    "blocks.*.attention.out": "blk.*.attn_output",
    "blocks.*.mlp_norm": "blk.*.ffn_norm",
    "blocks.*.mlp.gate": "blk.*.ffn_gate",
    "blocks.*.mlp.up": "blk.*.ffn_up",
    "blocks.*.mlp.down": "blk.*.ffn_down",
}  # fmt: skip
"""One table for all architectures: each has some of these."""

# ── transformers ──


def to_huggingface(weights: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """Our weights under the names and in the layout of transformers. Biases that its model always has, and ours has not,
    are zeros."""
    table = HUGGINGFACE[config.architecture]
    found = {}
    for name, tensor in with_biases(split(weights, config), config, always=_always_biased(config)).items():
        transposed = config.architecture == "gpt2" and _in_block(name) and tensor.dim() == 2
        found[_renamed(name, table)] = tensor.T.contiguous() if transposed else tensor
    return found


def from_huggingface(weights: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """The inverse of `to_huggingface`: names must be exactly those, else UserError."""
    table = _inverse(HUGGINGFACE[config.architecture], huggingface_shapes(config))
    found = {}
    for name, tensor in _expected(weights, table).items():
        transposed = config.architecture == "gpt2" and _in_block(name) and tensor.dim() == 2
        found[name] = tensor.T.contiguous() if transposed else tensor
    return fuse(without_biases(found, config), config)


def huggingface_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every tensor that transformers' model of these settings has, without a byte of memory for it."""
    return {name: tensor.shape for name, tensor in to_huggingface(meta_weights(config), config).items()}


# ── GGUF ──


def to_gguf(weights: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """Our weights under the names and in the order of rows of llama.cpp, which wants every bias of starcoder2 and gpt2."""
    parts = with_biases(split(weights, config), config, always=_BIASED if _is_biased(config) else ())
    return {_renamed(name, GGUF): _paired(name, tensor, config, pairs_of) for name, tensor in parts.items()}


def from_gguf(weights: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """The inverse of `to_gguf`: names must be exactly those, else UserError."""
    parts = _expected(weights, _inverse(GGUF, to_gguf(meta_weights(config), config)))
    parts = {name: _paired(name, tensor, config, halves_of) for name, tensor in parts.items()}
    return fuse(without_biases(parts, config), config)


def pairs_of(matrix: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order 0, D/2, 1, D/2 + 1, ...: the two that RoPE rotates together become neighbours.

    >>> pairs_of(torch.arange(8), heads=2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return matrix.view(heads, 2, -1, *matrix.shape[1:]).transpose(1, 2).reshape(matrix.shape).contiguous()


def halves_of(matrix: Tensor, heads: int) -> Tensor:
    """The inverse of `pairs_of`.

    >>> halves_of(torch.tensor([0, 2, 1, 3, 4, 6, 5, 7]), heads=2).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return matrix.view(heads, -1, 2, *matrix.shape[1:]).transpose(1, 2).reshape(matrix.shape).contiguous()


# ── matrices apart and together ──


def fused_parts(config: ModelConfig) -> dict[str, dict[str, int]]:
    """For each module of ours that is apart elsewhere: its parts with their rows, in order. GPT-2 keeps its own."""
    if config.architecture == "gpt2":
        return {}
    kept = config.key_value_heads * config.head_width
    found = {"attention.qkv": {"attention.query": config.width, "attention.key": kept, "attention.value": kept}}
    if config.activation == "swiglu":
        found["mlp.up"] = {"mlp.gate": config.hidden_width, "mlp.up": config.hidden_width}
    return found


def split(weights: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """Query, key and value apart, and gate and up: ``blocks.0.attention.query.weight`` ..."""
    fused = fused_parts(config)
    found: Weights = {}
    for name, tensor in weights.items():
        block, module, kind = _place(name)
        parts = fused.get(module, {module: tensor.shape[0]})
        for part, piece in zip(parts, tensor.split(list(parts.values())), strict=True):
            found[f"{block}{part}.{kind}"] = piece
    return found


def fuse(parts: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """The inverse of `split`."""
    whole = {part: module for module, inner in fused_parts(config).items() for part in inner}
    grouped: dict[str, list[Tensor]] = {}
    order = {name: place for place, name in enumerate(split(meta_weights(config), config))}
    for name in sorted(parts, key=order.__getitem__):
        block, module, kind = _place(name)
        grouped.setdefault(f"{block}{whole.get(module, module)}.{kind}", []).append(parts[name])
    return {name: torch.cat(pieces) if len(pieces) > 1 else pieces[0] for name, pieces in grouped.items()}


# ── biases ──

_BIASED = ("norm", "attention_norm", "mlp_norm", "query", "key", "value", "qkv", "out", "up", "down")


def with_biases(parts: Weights, config: ModelConfig, always: tuple[str, ...]) -> Weights:
    """Zero biases for those modules that always have one elsewhere."""
    found: Weights = {}
    for name, tensor in parts.items():
        found[name] = tensor
        _, module, kind = _place(name)
        if not config.bias and kind == "weight" and module.rpartition(".")[2] in always:
            found[name.removesuffix("weight") + "bias"] = torch.zeros(
                tensor.shape[0], dtype=tensor.dtype, device=tensor.device
            )
    return found


def without_biases(parts: Weights, config: ModelConfig) -> Weights:
    """Biases left out where the model has none; UserError if one of them is not zero."""
    if config.bias:
        return parts
    for name, tensor in parts.items():
        if name.endswith(".bias") and tensor.any():
            raise UserError(f"{name} is not zero, so the model needs model.bias = true")
    return {name: tensor for name, tensor in parts.items() if not name.endswith(".bias")}


def _is_biased(config: ModelConfig) -> bool:
    return config.architecture in ("starcoder2", "gpt2")


def _always_biased(config: ModelConfig) -> tuple[str, ...]:
    """Modules that always have a bias in transformers: all of GPT-2, and the norms of StarCoder2."""
    return {"gpt2": _BIASED, "starcoder2": _BIASED[:3]}.get(config.architecture, ())


# ── names ──


def meta_weights(config: ModelConfig) -> Weights:
    """The weights of a model of these settings without memory: names and shapes."""
    with torch.device("meta"):
        return model_weights(GPT(config))


def _place(name: str) -> tuple[str, str, str]:
    """``blocks.0.mlp.up.weight`` -> ``("blocks.0.", "mlp.up", "weight")``; outside of blocks the first is empty."""
    module, _, kind = name.rpartition(".")
    if not _in_block(name):
        return "", module, kind
    blocks, number, inner = module.split(".", 2)
    return f"{blocks}.{number}.", inner, kind


def _in_block(name: str) -> bool:
    return name.startswith("blocks.")


def _renamed(name: str, table: Mapping[str, str]) -> str:
    block, module, kind = _place(name)
    if not block:
        return f"{table[module]}.{kind}"
    number = block.split(".")[1]
    return f"{table[f'blocks.*.{module}'].replace('*', number)}.{kind}"


def _inverse(table: Mapping[str, str], theirs: Mapping[str, object]) -> dict[str, str]:
    """Our name for each of theirs."""
    ours = {other: own for own, other in table.items()}
    found = {}
    for name in theirs:
        module, _, kind = name.rpartition(".")
        number = next((part for part in module.split(".") if part.isdigit()), "")
        general = ".".join("*" if part.isdigit() else part for part in module.split("."))
        found[name] = f"{ours[general].replace('*', number)}.{kind}"
    return found


def _expected(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> Weights:
    """The weights under our names; UserError unless they are exactly those."""
    if weights.keys() != names.keys():
        name = sorted(weights.keys() ^ names.keys())[0]
        raise UserError(f"tensor {name!r} is {'missing' if name in names else 'not of this architecture'}")
    return {own: weights[name] for name, own in names.items()}


def _paired(name: str, tensor: Tensor, config: ModelConfig, order: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Queries and keys of llama with their rows in another order."""
    heads = {"attention.query": config.heads, "attention.key": config.key_value_heads}
    module = _place(name)[1]
    return order(tensor, heads[module]) if config.architecture == "llama" and module in heads else tensor
