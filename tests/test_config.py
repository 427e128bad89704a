"""Settings: known answers, round trips, and errors that name the nearest valid key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalllm.config import (
    RESUME,
    ModelConfig,
    RunConfig,
    UserError,
    changed_settings,
    load_recipe,
    parse_config,
    recipe_names,
    setting_names,
)


def test_the_four_recipes_exist_and_load():
    assert set(recipe_names()) >= {"quickstart", "smalllm-20m", "smolergpt-12m", "laptop"}
    for name in recipe_names():
        assert load_recipe(name).name == name


def test_ancestors_keep_their_hyper_parameters():
    big, small = load_recipe("smalllm-20m"), load_recipe("smolergpt-12m")
    assert (big.model.layers, big.model.width, big.model.heads, big.model.context) == (8, 384, 6, 512)
    assert (big.model.hidden_width, big.model.vocab_size, big.model.positions) == (1536, 16_000, "rope")
    assert (small.model.layers, small.model.width, small.model.heads, small.model.context) == (6, 384, 8, 256)
    assert (small.model.vocab_size, small.model.positions) == (4096, "learned")
    for recipe in (big, small):
        assert recipe.model.norm == "layernorm" and recipe.model.activation == "gelu" and recipe.model.tie_embeddings
        assert recipe.optim.betas == (0.9, 0.95) and recipe.optim.weight_decay == 0.1 and recipe.optim.clip == 1.0
        assert (
            recipe.optim.schedule == "cosine"
            and recipe.optim.warmup_steps == 2000
            and recipe.optim.final_fraction == 0.1
        )
        assert recipe.train.batch_tokens == 32 * 8 * recipe.model.context
        assert recipe.train.checkpoint_every == 1000 and recipe.train.patience == 5 and recipe.seed == 42


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_being_written_and_read(name: str, tmp_path: Path):
    config = load_recipe(name)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert load_recipe(path) == config


def test_overrides_are_toml_values_or_plain_strings():
    config = load_recipe(
        "smolergpt-12m", ["optim.lr=3e-4", "optim.betas=[0.8, 0.99]", "train.device=cpu", "train.recompute=true"]
    )
    assert config.optim.lr == 3e-4 and config.optim.betas == (0.8, 0.99)
    assert config.train.device == "cpu" and config.train.recompute is True


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.layer=3", "there is no setting 'model.layer'; did you mean 'model.layers'?"),
        ("layers=3", "there is no setting 'layers'; did you mean 'model.layers'?"),
        ("train.stepz=5", "did you mean 'train.steps'?"),
        ("model.width=385", "model.width = 385 must be divisible by model.heads = 8; try model.width=384 or 392"),
        ("model.kv_heads=3", "model.heads = 8 must be divisible by model.kv_heads = 3"),
        ("optim.lr=fast", "optim.lr = 'fast' is not possible"),
        ("optim.lr=-1", "optim.lr = -1 is not possible: it should be greater than 0"),
        ("model.qk_norm=true", "model.qk_norm exports only with norm = rmsnorm"),
        ("model.positions=rotary", "model.positions = 'rotary' is not possible"),
        ("model.norm=rmsnorm", "exports nowhere; use rope + rmsnorm + swiglu"),
        ("model.rope_theta=50000", "model.rope_theta has no effect with model.positions = learned"),
        ("optim.adam_lr=0.1", "optim.adam_lr has no effect with optim.kind = adamw"),
        ("optim.cooldown_fraction=0.5", "optim.cooldown_fraction has no effect with optim.schedule = cosine"),
        (
            "train.batch_tokens=1000",
            "train.batch_tokens = 1000 must be divisible by model.context = 256; try train.batch_tokens=768 or 1024",
        ),
        ("train.micro_batch=999", "train.micro_batch = 999 is more than the 256 sequences of a step"),
        ("train.steps", "'train.steps' is not an override; write section.key=value"),
        ("train.steps=0", "the run would never end"),
        ("name=../evil", "name = '../evil' is not possible"),
        ("train.device=tpu", "train.device = 'tpu' is not possible"),
    ],
)
def test_a_wrong_setting_is_one_sentence_with_the_fix(override: str, sentence: str):
    with pytest.raises(UserError) as caught:
        load_recipe("smolergpt-12m", [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[model]\nlayerz = 3", "name = [", "train = 3", "[model]\nwidth = nan", "x = " + "[" * 5000]
)
def test_a_broken_recipe_file_is_a_user_error(text: str, tmp_path: Path):
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(UserError):
        load_recipe(path)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        load_recipe("quikstart")
    with pytest.raises(UserError, match="give a readable TOML file"):
        load_recipe("missing/recipe.toml")


@given(st.sampled_from(setting_names()), st.text(max_size=20))
def test_no_override_gives_a_traceback(key: str, value: str):
    try:
        load_recipe("quickstart", [f"{key}={value}"])
    except UserError as error:
        assert str(error)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda c: st.lists(c) | st.dictionaries(st.text(), c),
    )
)
def test_any_json_is_settings_or_a_user_error(value: object):
    try:
        parse_config({"model": value})  # type: ignore[dict-item]
    except UserError as error:
        assert str(error)


def test_every_setting_is_classified_for_resume():
    """Allowed and said, only by --force, or refused: none is ignored, and a new setting cannot be forgotten."""
    assert RESUME.keys() == set(setting_names())
    base = parse_config({"train": {"steps": 100}})
    for key, kind in RESUME.items():
        changed = _with_another_value(base, key)
        said = [_changes(base, changed, force) for force in (False, True)]
        if key == "data.path":  # data may move; what it holds is compared
            assert said == [[], []]
            continue
        assert [part is None for part in said] == [kind != "free", kind == "fixed"], key
        assert all(len(part) == 1 and part[0].startswith(f"{key}=") for part in said if part is not None)


def _changes(old: RunConfig, new: RunConfig, force: bool) -> list[str] | None:
    try:
        return changed_settings(old, new, force)
    except UserError:
        return None


def _with_another_value(config: RunConfig, key: str) -> RunConfig:
    section, _, name = key.rpartition(".")
    holder = getattr(config, section) if section else config
    before = getattr(holder, name)
    after = (not before) if isinstance(before, bool) else 65 if isinstance(before, int) else "other"
    changed = holder.model_copy(update={name: after})
    return config.model_copy(update={section: changed}) if section else changed


def test_architecture_is_the_one_that_other_tools_know():
    assert ModelConfig().architecture == "llama"
    assert ModelConfig(qk_norm=True).architecture == "qwen3"
    assert ModelConfig(norm="layernorm", activation="gelu").architecture == "starcoder2"
    assert ModelConfig(norm="layernorm", activation="gelu", positions="learned").architecture == "gpt2"


def test_swiglu_width_has_the_parameters_of_a_gelu_mlp():
    assert ModelConfig(width=384).hidden_width == 1024
    assert ModelConfig(width=384, norm="layernorm", activation="gelu").hidden_width == 1536
    assert ModelConfig(width=384, mlp_width=777).hidden_width == 777


def test_a_key_of_many_parts_is_refused_before_it_takes_all_memory(tmp_path: Path):
    path = tmp_path / "deep.toml"
    path.write_text("a." * 50_000 + "b = 1")
    with pytest.raises(UserError, match="keys of many parts"):
        load_recipe(path)
