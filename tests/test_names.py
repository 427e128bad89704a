"""Names: every tensor of every architecture goes to its name elsewhere and back, bit for bit."""

from __future__ import annotations

import pytest
import torch
from export_runs import SHAPES, random_weights

from smalllm.config import ModelConfig, UserError
from smalllm.export import names

every_shape = pytest.mark.parametrize("shape", SHAPES)


@every_shape
def test_round_trips_are_exact(shape):
    config = ModelConfig(**SHAPES[shape])
    weights = random_weights(config)
    for there, back in ((names.to_huggingface, names.from_huggingface), (names.to_gguf, names.from_gguf)):
        returned = back(there(weights, config), config)
        assert list(returned) == list(weights)
        assert all(torch.equal(returned[name], tensor) for name, tensor in weights.items())


@every_shape
def test_a_tied_head_is_not_stored_twice(shape):
    config = ModelConfig(**SHAPES[shape])
    weights = random_weights(config)
    assert ("lm_head.weight" in names.to_huggingface(weights, config)) is not config.tie_embeddings
    assert ("output.weight" in names.to_gguf(weights, config)) is not config.tie_embeddings


def test_known_rows():
    """One head of width 4 with grouped keys: rows 0-7 are queries, 8-11 keys, 12-15 values."""
    config = ModelConfig(**SHAPES["llama"] | {"width": 8, "heads": 2, "kv_heads": 1, "layers": 1})
    weights = random_weights(config)
    qkv = weights["blocks.0.attention.qkv.weight"] = torch.arange(16.0)[:, None].expand(16, 8).contiguous()
    theirs = names.to_huggingface(weights, config)
    assert torch.equal(theirs["model.layers.0.self_attn.k_proj.weight"], qkv[8:12])
    assert torch.equal(theirs["model.layers.0.self_attn.v_proj.weight"], qkv[12:])
    pairs = names.to_gguf(weights, config)
    assert pairs["blk.0.attn_q.weight"][:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert pairs["blk.0.attn_k.weight"][:, 0].tolist() == [8, 10, 9, 11]
    assert pairs["blk.0.attn_v.weight"][:, 0].tolist() == [12, 13, 14, 15]


def test_gate_comes_first():
    config = ModelConfig(**SHAPES["llama"])
    weights = random_weights(config)
    up, theirs = weights["blocks.1.mlp.up.weight"], names.to_huggingface(weights, config)
    assert torch.equal(theirs["model.layers.1.mlp.gate_proj.weight"], up[: config.hidden_width])
    assert torch.equal(theirs["model.layers.1.mlp.up_proj.weight"], up[config.hidden_width :])


def test_gpt2_is_transposed_only_within_blocks():
    config = ModelConfig(**SHAPES["gpt2"])
    weights = random_weights(config)
    theirs = names.to_huggingface(weights, config)
    assert torch.equal(theirs["transformer.h.0.attn.c_attn.weight"], weights["blocks.0.attention.qkv.weight"].T)
    assert torch.equal(theirs["transformer.wpe.weight"], weights["position_embedding.weight"])
    assert torch.equal(
        names.to_gguf(weights, config)["blk.0.attn_qkv.weight"], weights["blocks.0.attention.qkv.weight"]
    )


def test_biases_that_must_be_there_are_zeros():
    config = ModelConfig(**SHAPES["starcoder2-unbiased"])
    weights = random_weights(config)
    theirs, pairs = names.to_huggingface(weights, config), names.to_gguf(weights, config)
    assert not theirs["model.layers.0.input_layernorm.bias"].any()
    assert "model.layers.0.self_attn.q_proj.bias" not in theirs and "blk.0.attn_q.bias" in pairs
    theirs["model.norm.bias"] = torch.ones(config.width)
    with pytest.raises(UserError, match=r"norm.bias is not zero, so the model needs model.bias = true"):
        names.from_huggingface(theirs, config)


@every_shape
def test_shapes_are_known_without_weights(shape):
    config = ModelConfig(**SHAPES[shape])
    theirs = names.to_huggingface(random_weights(config), config)
    assert names.huggingface_shapes(config) == {name: tensor.shape for name, tensor in theirs.items()}


def test_other_names_are_refused():
    config = ModelConfig(**SHAPES["qwen3"])
    theirs = names.to_huggingface(random_weights(config), config)
    with pytest.raises(UserError, match=r"'model.norm.weight' is missing"):
        names.from_huggingface({name: theirs[name] for name in theirs if name != "model.norm.weight"}, config)
    with pytest.raises(UserError, match=r"'extra.weight' is not of this architecture"):
        names.from_huggingface(theirs | {"extra.weight": torch.zeros(1)}, config)
