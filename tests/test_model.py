"""The model against transformers (which no one here wrote), known sizes, causality and the cache."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from smalllm.config import ModelConfig
from smalllm.model import GPT, KVCache, apply_rope, rope_tables

SHAPES = {
    "llama": ModelConfig(layers=2, width=48, heads=4, context=40, vocab_size=101),
    "llama-grouped": ModelConfig(layers=2, width=48, heads=4, kv_heads=2, context=40, vocab_size=101, rope_theta=500.0),
    "llama-untied": ModelConfig(layers=2, width=48, heads=4, context=40, vocab_size=101, tie_embeddings=False),
    "qwen3": ModelConfig(layers=2, width=48, heads=4, kv_heads=2, context=40, vocab_size=101, qk_norm=True),
    "starcoder2": ModelConfig(layers=2, width=48, heads=4, context=40, vocab_size=101, norm="layernorm", activation="gelu", bias=True),
    "gpt2": ModelConfig(layers=2, width=48, heads=4, context=40, vocab_size=101, norm="layernorm", activation="gelu", positions="learned"),
}  # fmt: skip


def stirred(config: ModelConfig, seed: int = 0) -> GPT:
    """A model whose every parameter is random, biases and norms included, so that nothing hides behind a zero or a one."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ids_for(config: ModelConfig, rows: int = 3, length: int = 33) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def test_parameter_counts_of_the_ancestors_are_exact():
    from smalllm.config import load_recipe

    big, small = GPT(load_recipe("smalllm-20m").model), GPT(load_recipe("smolergpt-12m").model)
    assert big.parameters_count() == 20_340_480 and big.embedding_parameters() == 16_000 * 384
    assert small.parameters_count() == 12_292_992 and small.embedding_parameters() == (4096 + 256) * 384
    assert big.flops_per_token() == pytest.approx(131.48e6, rel=1e-3)  # 6 N + causal attention


@pytest.mark.parametrize("name", SHAPES)
def test_first_loss_is_ln_vocab_within_two_percent(name: str):
    torch.manual_seed(0)
    config = SHAPES[name]
    logits = GPT(config)(ids_for(config, 8, 40))
    targets = torch.randint(0, config.vocab_size, (8 * 40,), generator=torch.Generator().manual_seed(2))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).item()
    assert loss == pytest.approx(math.log(config.vocab_size), rel=0.02)


@pytest.mark.parametrize("recipe", ["smalllm-20m", "smolergpt-12m", "laptop", "quickstart"])
def test_first_loss_of_the_recipes(recipe: str):
    from smalllm.config import load_recipe

    config = load_recipe(recipe).model
    config = config.model_copy(update={"vocab_size": config.vocab_size or 4096})
    torch.manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, 65))
    logits = GPT(config)(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(config.vocab_size), rel=0.02)


@pytest.mark.parametrize("name", SHAPES)
def test_no_logit_sees_the_future(name: str):
    model, ids = stirred(SHAPES[name]), ids_for(SHAPES[name])
    before = model(ids)
    for position in (0, 1, 16, 32):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 101
        moved = (model(changed) - before).abs().amax(dim=(0, 2))
        assert moved[:position].max() == 0 if position else True
        assert moved[position:].min() > 1e-4


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cuts", [[1] * 33, [33], [10, 1, 1, 1, 20], [5, 28]])
def test_cached_logits_are_the_uncached_ones(name: str, cuts: list[int]):
    model, ids = stirred(SHAPES[name]), ids_for(SHAPES[name])
    cache = KVCache(model.config, batch=len(ids))
    parts, start = [], 0
    for cut in cuts:
        parts.append(model(ids[:, start : start + cut], cache))
        start += cut
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_different_length_share_a_cache(name: str):
    """Right-padded prompts are prefilled together; each row goes on as if it were alone."""
    model, ids = stirred(SHAPES[name]), ids_for(SHAPES[name])
    lengths = [7, 20, 13]
    cache = KVCache(model.config, batch=3)
    padded = torch.zeros(3, 20, dtype=torch.long)
    for row, length in enumerate(lengths):
        padded[row, :length] = ids[row, :length]
    model(padded, cache)
    cache = cache.at(range(3), lengths)
    for extra in range(3):
        step = torch.stack([ids[row, length + extra] for row, length in enumerate(lengths)])[:, None]
        together = model(step, cache)
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, : length + extra + 1])[0, -1]
            torch.testing.assert_close(together[row, 0], alone, atol=1e-5, rtol=1e-4)
    some = model(ids[[2, 1], 16:18], cache.at([2, 1], [16, 16]))  # back in their rows, in another order
    for place, row in enumerate((2, 1)):
        torch.testing.assert_close(some[place], model(ids[row : row + 1, :18])[0, 16:], atol=1e-5, rtol=1e-4)


def test_more_than_the_context_is_refused():
    model = stirred(SHAPES["gpt2"])
    with pytest.raises(ValueError, match="41 positions do not fit into a context of 40"):
        model(ids_for(model.config, 1, 41))
    cache = KVCache(model.config, 1, capacity=10)
    model(ids_for(model.config, 1, 10), cache)
    with pytest.raises(ValueError, match="11 positions do not fit"):
        model(ids_for(model.config, 1, 1), cache)


def test_rope_turns_by_hand():
    """D = 2, theta irrelevant: position p turns the plane by p radians."""
    cos, sin = rope_tables(4, 2, theta=10_000.0)
    turned = apply_rope(torch.tensor([[[[1.0, 0.0]] * 4]]), cos, sin)[0, 0]
    expected = torch.tensor([[math.cos(p), math.sin(p)] for p in range(4)])
    torch.testing.assert_close(turned, expected)


def test_attention_by_rope_depends_on_distance_only():
    cos, sin = rope_tables(64, 16, theta=10_000.0)
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> float:
        return (
            (
                apply_rope(q.view(1, 1, 1, 16), cos[i : i + 1], sin[i : i + 1])
                * apply_rope(k.view(1, 1, 1, 16), cos[j : j + 1], sin[j : j + 1])
            )
            .sum()
            .item()
        )

    assert score(5, 2) == pytest.approx(score(45, 42), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-4)


def test_recomputation_gives_equal_gradients_dropout_included():
    config = SHAPES["llama"].model_copy(update={"dropout": 0.3})
    gradients = []
    for recompute in (False, True):
        model = stirred(config).train()
        model.recompute = recompute
        torch.manual_seed(5)
        model(ids_for(config)).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_dropout_is_off_in_evaluation():
    model = stirred(SHAPES["gpt2"].model_copy(update={"dropout": 0.5}))
    ids = ids_for(model.config)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


# ── equality with transformers ──


def as_transformers(model: GPT):  # type: ignore[no-untyped-def]
    """The same weights in the class of transformers that the architecture names."""
    import transformers

    c = model.config
    common = {"vocab_size": c.vocab_size, "tie_word_embeddings": c.tie_embeddings}
    wide = common | {
        "hidden_size": c.width, "intermediate_size": c.hidden_width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.key_value_heads, "max_position_embeddings": c.context, "head_dim": c.head_width,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.theta},
    }  # fmt: skip
    match c.architecture:
        case "llama":
            theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**wide, rms_norm_eps=1e-5))
        case "qwen3":
            theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**wide, rms_norm_eps=1e-5))
        case "starcoder2":
            theirs = transformers.Starcoder2ForCausalLM(
                transformers.Starcoder2Config(
                    **wide, norm_epsilon=1e-5, use_bias=c.bias, hidden_act="gelu_pytorch_tanh", sliding_window=None
                )
            )
        case "gpt2":
            theirs = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    **common, n_embd=c.width, n_layer=c.layers, n_head=c.heads, n_positions=c.context
                )
            )
    copy_into(theirs, model)
    return theirs.eval()


@torch.no_grad()
def copy_into(theirs, model: GPT) -> None:  # type: ignore[no-untyped-def]
    ours, c = dict(model.named_parameters()), model.config
    target = dict(theirs.named_parameters())
    filled = set()

    def put(name: str, value: torch.Tensor) -> None:
        target[name].copy_(value)
        filled.add(name)

    gpt2 = c.architecture == "gpt2"
    put("transformer.wte.weight" if gpt2 else "model.embed_tokens.weight", ours["embedding.weight"])
    if gpt2:
        put("transformer.wpe.weight", ours["position_embedding.weight"])
    if not c.tie_embeddings:
        put("lm_head.weight", ours["head.weight"])
    names = ({"attention_norm": "ln_1", "mlp_norm": "ln_2", "attention.out": "attn.c_proj", "mlp.down": "mlp.c_proj", "attention.qkv": "attn.c_attn", "mlp.up": "mlp.c_fc"}
             if gpt2 else {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attention.out": "self_attn.o_proj",
                           "mlp.down": "mlp.c_proj" if c.architecture == "starcoder2" else "mlp.down_proj", "mlp.up": "mlp.c_fc",
                           "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"})  # fmt: skip
    kv = c.key_value_heads * c.head_width
    for name, value in ours.items():
        if name.startswith("blocks."):
            _, layer, part = name.split(".", 2)
            prefix, kind = f"{'transformer.h' if gpt2 else 'model.layers'}.{layer}.", part.rpartition(".")[2]
            part = part.rpartition(".")[0]
            if part == "attention.qkv" and not gpt2:
                for letter, piece in zip("qkv", value.split([c.width, kv, kv]), strict=True):
                    put(f"{prefix}self_attn.{letter}_proj.{kind}", piece)
            elif part == "mlp.up" and c.activation == "swiglu":
                for half, piece in zip(("gate", "up"), value.chunk(2), strict=True):
                    put(f"{prefix}mlp.{half}_proj.{kind}", piece)
            else:
                turn = gpt2 and value.dim() == 2
                put(f"{prefix}{names[part]}.{kind}", value.T if turn else value)
        elif name.startswith("norm."):
            put(f"{'transformer.ln_f' if gpt2 else 'model.norm'}.{name[5:]}", value)
    for name, value in target.items():
        if name not in filled:
            assert name.endswith("bias") and not c.bias, name
            value.zero_()


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_those_of_transformers(name: str):
    model = stirred(SHAPES[name])
    ids = ids_for(model.config)
    theirs = as_transformers(model)(ids).logits
    torch.testing.assert_close(model(ids), theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_documents_in_one_row_are_read_as_if_alone(name: str):
    model = stirred(SHAPES[name])
    ids = ids_for(model.config)[:1]
    cut = ids.shape[1] // 3
    starts = torch.tensor([[0] * cut + [cut] * (ids.shape[1] - cut)], dtype=torch.int32)
    packed = model.hidden(ids, starts=starts)
    torch.testing.assert_close(packed[:, :cut], model.hidden(ids[:, :cut]), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(packed[:, cut:], model.hidden(ids[:, cut:]), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(packed[:, cut:], model.hidden(ids)[:, cut:], atol=1e-2)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_flex_attention_keeps_documents_apart_as_the_mask_does(name: str):
    """What a GPU does, without its compiled kernels."""
    model = stirred(SHAPES[name])
    ids = ids_for(model.config)
    cut = ids.shape[1] // 2
    starts = torch.zeros(ids.shape, dtype=torch.int32)
    starts[0, cut:], starts[-1, 1:] = cut, 1
    expected = model.hidden(ids, starts=starts)
    model.flex = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is slow uncompiled
        found = model.hidden(ids, starts=starts)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
