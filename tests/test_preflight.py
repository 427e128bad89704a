"""Each check passes on what is sound and fails on the fault it is there for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smalllm.config import ModelConfig, UserError
from smalllm.data.batches import Batch, Batches
from smalllm.data.shards import TokenDataset
from smalllm.model import GPT, Attention
from smalllm.preflight import can_overfit, causality, first_loss, ids_in_range, preflight, require

CONFIG = ModelConfig(layers=2, width=32, heads=2, context=64, vocab_size=512)


@pytest.fixture
def sound(dataset_folder: Path):
    dataset = TokenDataset.open(dataset_folder)
    torch.manual_seed(0)
    batch = next(Batches(dataset.train, 64, 128, 0).micro_batches(0, 2))
    return GPT(CONFIG), dataset.tokenizer(), dataset, batch


def failed(checks) -> list[str]:  # type: ignore[no-untyped-def]
    return [check.name for check in checks if not check.passed]


@pytest.mark.parametrize(
    "shape", [{}, {"positions": "learned", "norm": "layernorm", "activation": "gelu"}, {"qk_norm": True, "kv_heads": 1}]
)
def test_a_sound_run_passes_and_the_model_is_left_as_it_was(shape: dict, sound):
    _, tokenizer, dataset, batch = sound
    model = GPT(CONFIG.model_copy(update=shape)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checks = preflight(model, tokenizer, dataset, batch)
    assert len(checks) == 7 and failed(checks) == []
    require(checks)
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_attention_that_sees_the_future_is_caught(sound, monkeypatch: pytest.MonkeyPatch):
    model, _, _, batch = sound

    def all_see_all(self, q, k, v, visible):  # type: ignore[no-untyped-def]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    assert causality(model, Batch(batch.inputs[:2], batch.targets[:2])).passed
    monkeypatch.setattr(Attention, "attend", all_see_all)
    check = causality(model, Batch(batch.inputs[:2], batch.targets[:2]))
    assert not check.passed
    with pytest.raises(UserError, match="preflight check failed: no logit sees the future"):
        require([check])


def test_a_cache_that_forgets_its_position_is_caught(sound, monkeypatch: pytest.MonkeyPatch):
    """RoPE restarted at position 0 was the ancestor's fault."""
    model, tokenizer, dataset, batch = sound
    original = GPT._rope
    monkeypatch.setattr(GPT, "_rope", lambda self, positions: original(self, positions - positions.min()))
    assert "cached logits are the uncached ones" in failed(preflight(model, tokenizer, dataset, batch))


def test_weights_that_are_too_large_at_the_start_are_caught(sound):
    model, *_, batch = sound
    with torch.no_grad():
        model.embedding.weight.mul_(30)
    assert not first_loss(model, batch).passed


def test_a_model_that_cannot_learn_is_caught(sound, monkeypatch: pytest.MonkeyPatch):
    model, _, _, batch = sound
    small = Batch(batch.inputs[:2], batch.targets[:2])
    assert can_overfit(model, small).passed
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    assert not can_overfit(model, small).passed


def test_another_tokenizer_is_caught(sound, tmp_path: Path):
    from smalllm.data.prepare import prepare

    model, _, dataset, batch = sound
    prepare(["storyworld:100"], tmp_path / "other", vocab_size=500, seed=3)
    other = TokenDataset.open(tmp_path / "other").tokenizer()
    assert "tokenizer of data and model are one" in failed(preflight(model, other, dataset, batch))


def test_ids_outside_the_vocabulary_are_caught(sound):
    _, tokenizer, dataset, batch = sound
    assert not ids_in_range(GPT(CONFIG.model_copy(update={"vocab_size": 20})), batch).passed
