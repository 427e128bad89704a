"""Every setting of a run, as frozen data with a schema.

A recipe is a TOML file; overrides are ``section.key=value``; defaults < recipe < overrides. An unknown
or impossible setting stops with the nearest valid one, and a setting that would be ignored is an error.
This module knows nothing about torch: ``smalllm --help`` and ``plan`` may read it for free.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from smalllm.untrusted import content, printable


class UserError(ValueError):
    """A mistake that the user can mend: one sentence with the setting, the value and the fix."""

    exit_code = 1
    said = False  # by another process of the same run


class Section(BaseModel):
    """A frozen section: unknown keys are refused, numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """The shape of a decoder-only GPT. The legal combinations are those that a known architecture
    (llama, qwen3, starcoder2, gpt2) can express, so that every model trained here runs elsewhere."""

    layers: int = Field(6, ge=1, le=1024, description="transformer blocks")
    width: int = Field(384, ge=8, le=65536, description="size of the residual stream")
    heads: int = Field(6, ge=1, le=1024, description="attention heads; width / heads is the width of one")
    kv_heads: int = Field(0, ge=0, le=1024, description="key/value heads; 0: as many as heads (no grouping)")
    mlp_width: int = Field(
        0, ge=0, le=1_048_576, description="hidden size of the MLP; 0: 4 x width, or 8/3 x width for swiglu"
    )
    context: int = Field(256, ge=2, le=1_048_576, description="longest sequence, in tokens")
    vocab_size: int = Field(0, ge=0, le=1_048_576, description="0: that of the data")
    positions: Literal["rope", "learned"] = Field("rope", description="rotary, or a learned embedding per position")
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="normalization before each part of a block")
    activation: Literal["swiglu", "gelu"] = Field("swiglu", description="of the MLP; gelu is the tanh form")
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys; steadier at high learning rates")
    bias: bool = Field(False, description="biases in linear layers and layer norms")
    tie_embeddings: bool = Field(True, description="the head reads the token embedding")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="share of activations dropped in training")
    rope_theta: float | None = Field(None, gt=1.0, description="base of RoPE; default 10000 when positions = rope")

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(_divide("model.width", self.width, "model.heads", self.heads))
        if self.heads % self.key_value_heads:
            raise ValueError(_divide("model.heads", self.heads, "model.kv_heads", self.key_value_heads))
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"model.width / model.heads = {self.head_width} must be even for positions = rope")
        if self.positions == "learned" and self.rope_theta is not None:
            raise ValueError("model.rope_theta has no effect with model.positions = learned; leave it out")
        self.architecture  # noqa: B018  refuses what no known architecture can express
        return self

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden_width(self) -> int:
        """Hidden size of the MLP. For swiglu 8/3 x width (equal parameters to 4 x GELU), rounded up to 64."""
        if self.mlp_width:
            return self.mlp_width
        return 4 * self.width if self.activation == "gelu" else -(-8 * self.width // (3 * 64)) * 64

    @property
    def theta(self) -> float:
        return self.rope_theta or 10_000.0

    @property
    def architecture(self) -> Literal["llama", "qwen3", "starcoder2", "gpt2"]:
        """The known architecture that these settings are (docs/models.md)."""
        match self.positions, self.norm, self.activation:
            case "rope", "rmsnorm", "swiglu":
                if self.bias:
                    raise ValueError("model.bias = true exports nowhere with rmsnorm + swiglu; set model.bias=false")
                return "qwen3" if self.qk_norm else "llama"
            case (("rope" | "learned"), "layernorm", "gelu"):
                if self.qk_norm:
                    raise ValueError(
                        "model.qk_norm exports only with norm = rmsnorm, activation = swiglu, positions = rope"
                    )
                if self.positions == "rope":
                    return "starcoder2"
                if self.key_value_heads != self.heads:
                    raise ValueError("model.kv_heads exports only with model.positions = rope; leave it out")
                return "gpt2"
        raise ValueError(
            f"model.positions = {self.positions}, norm = {self.norm}, activation = {self.activation} exports nowhere;"
            " use rope + rmsnorm + swiglu, rope + layernorm + gelu, or learned + layernorm + gelu"
        )


class DataConfig(Section):
    """Where the tokens come from. ``path`` is a prepared folder; when it is missing, ``source`` is prepared into it."""

    path: str = Field("", description="folder of prepared data; empty: data/<name of the recipe>")
    source: str = Field(
        "", description="storyworld[-small][:STORIES], tinystories, hf://..., or files; prepared when path is missing"
    )
    valid: str = Field(
        "", description="source of the validation documents; empty: the source's own, else a fraction is split off"
    )
    vocab_size: int = Field(4096, ge=260, le=1_048_576, description="pieces of the tokenizer that is trained")
    limit: int = Field(0, ge=0, description="documents at most; 0: all")
    sample_rate: float = Field(1.0, gt=0.0, le=1.0, description="share of the documents that is kept")
    num_files: int = Field(0, ge=0, description="files at most; 0: all")
    packing: Literal["stream", "documents"] = Field(
        "documents", description="training rows: whole documents packed, or the stream of tokens cut anywhere"
    )


class OptimConfig(Section):
    """Optimizer and learning-rate schedule. With muon, ``lr`` is for the matrices of the blocks and ``adam_lr``
    (AdamW) for embeddings, norms and biases."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for the matrices of the blocks, with adamw for the rest"
    )
    lr: float = Field(1e-3, gt=0.0, le=10.0, description="peak learning rate")
    adam_lr: float | None = Field(None, gt=0.0, le=10.0, description="with muon: that of adamw; default 0.2 x lr")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of adamw")
    weight_decay: float = Field(0.1, ge=0.0, lt=10.0, description="on matrices only")
    clip: float = Field(1.0, ge=0.0, description="largest gradient norm; 0: no clipping")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after warmup; wsd: stable, then a linear cooldown"
    )
    warmup_steps: int = Field(100, ge=0, description="steps of linear warmup")
    final_lr_fraction: float | None = Field(None, ge=0.0, le=1.0, description="default 0.1 for cosine, 0 for wsd")
    cooldown_fraction: float | None = Field(None, gt=0.0, le=1.0, description="wsd: share of the run that cools down")

    @model_validator(mode="after")
    def _possible(self) -> OptimConfig:
        if self.kind == "adamw" and self.adam_lr is not None:
            raise ValueError("optim.adam_lr has no effect with optim.kind = adamw; set optim.lr, or optim.kind=muon")
        if self.schedule != "wsd" and self.cooldown_fraction is not None:
            raise ValueError(
                f"optim.cooldown_fraction has no effect with optim.schedule = {self.schedule}; use schedule=wsd"
            )
        if self.schedule == "constant" and self.final_lr_fraction is not None:
            raise ValueError("optim.final_lr_fraction has no effect with optim.schedule = constant; leave it out")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"optim.betas = {list(self.betas)} must lie in [0, 1)")
        return self

    @property
    def final_fraction(self) -> float:
        """What is left of the learning rate at the end of the run."""
        default = {"cosine": 0.1, "wsd": 0.0, "constant": 1.0}[self.schedule]
        return default if self.final_lr_fraction is None else self.final_lr_fraction

    @property
    def cooldown(self) -> float:
        return 0.4 if self.cooldown_fraction is None else self.cooldown_fraction

    @property
    def adamw_lr(self) -> float:
        """The AdamW learning rate of what Muon does not train; 0.2 x lr unless given."""
        return self.lr if self.kind == "adamw" else (self.adam_lr or 0.2 * self.lr)


class TrainConfig(Section):
    """The loop. A run ends at ``steps`` or after ``minutes``, whichever comes first."""

    steps: int = Field(
        0, ge=0, le=1_000_000_000, description="optimizer steps at most; 0: as many as the minutes allow"
    )
    minutes: float = Field(0.0, ge=0.0, le=1e6, description="wall-clock budget; 0: none")
    batch_tokens: int = Field(16_384, ge=1, description="tokens per optimizer step, over all ranks")
    micro_batch: int = Field(0, ge=0, description="sequences per forward pass; 0: chosen for this machine")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of matrix products; auto: what this device does fastest"
    )
    recompute: bool = Field(False, description="activation checkpointing: recompute blocks in the backward pass")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="fused kernels on a CPU, torch.compile on CUDA; auto: where they pay"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="several ranks: a whole model at each, or its parameters in parts (for what fits in no single GPU)",
    )
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    evaluate_every: int = Field(0, ge=0, description="steps; 0: ten times a run")
    evaluate_tokens: int = Field(
        0, ge=0, description="validation tokens per evaluation; 0: what 2 % of the time allows"
    )
    checkpoint_every: int = Field(
        0, ge=0, description="steps, besides those of the evaluations, before which one is always written; 0: no others"
    )
    keep: int = Field(3, ge=1, description="checkpoints kept besides the best")
    milestones: bool = Field(True, description="keep the models of steps 100, 300, 1,000, 3,000 ... to look back at")
    patience: int = Field(0, ge=0, description="evaluations without improvement before stopping; 0: never")
    spike_sigmas: float = Field(
        0.0,
        ge=0.0,
        le=100.0,
        description="leave out updates whose loss or gradient norm is so many standard deviations above the mean of the last"
        " 128, and go back to the last checkpoint after ten in a row; 0: never",
    )
    verify_every: int = Field(
        0,
        ge=0,
        description="compute the gradient of every so many steps twice, and compare weights and optimizer state between all"
        " updates, to notice memory and processors that err; 0: never",
    )
    memory_gb: float = Field(
        0.0,
        ge=0.0,
        description="memory the run may take, kept by micro-batch and recomputation; 0: half of the device's memory",
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N")
    sample_prompt: str = Field("Once upon a time", description="prompt of the sample story at each evaluation")
    sample_tokens: int = Field(120, ge=0, description="length of that story; 0: none")
    preflight: bool = Field(True, description="checks before the first step")
    track: Literal["none", "tensorboard", "wandb"] = Field("none", description="optional tracker; off unless asked for")

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if not self.steps and not self.minutes:
            raise ValueError("train.steps = 0 and train.minutes = 0: the run would never end; set one of them")
        return self


class RunConfig(Section):
    """A whole run. ``RunConfig.to_toml()`` re-runs it."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="the run folder is runs/NAME")
    seed: int = Field(42, ge=0, lt=2**63, description="of weights, data order and dropout")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig(steps=1000)

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        if self.train.batch_tokens % self.model.context:
            raise ValueError(
                _divide("train.batch_tokens", self.train.batch_tokens, "model.context", self.model.context)
            )
        sequences = self.train.batch_tokens // self.model.context
        if self.train.micro_batch > sequences:
            raise ValueError(
                f"train.micro_batch = {self.train.micro_batch} is more than the {sequences} sequences of a step"
                f" (batch_tokens / context); set train.micro_batch={sequences} or less"
            )
        return self

    @property
    def data_path(self) -> Path:
        return Path(self.data.path or f"data/{self.name}")

    def to_toml(self) -> str:
        """The resolved settings as TOML; ``None`` (not set) is left out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True, mode="json"))

    def replace(self, **sections: Mapping[str, Any]) -> RunConfig:
        """A checked copy with some keys of some sections changed: ``config.replace(train={"steps": 5})``."""
        settings = self.model_dump(exclude_none=True)
        for section, values in sections.items():
            settings[section] = {**settings[section], **values}
        return parse_config(settings)


def _divide(name: str, value: int, by_name: str, by: int) -> str:
    below, above = value // by * by, -(-value // by) * by
    near = f"{below} or {above}" if below else f"{above}"
    return f"{name} = {value} must be divisible by {by_name} = {by}; try {name}={near}"


def recipe_names() -> list[str]:
    """Names of the recipes inside the package."""
    folder = resources.files("smalllm") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(recipe: str | Path = "quickstart", overrides: Iterable[str] = ()) -> RunConfig:
    """The settings of a recipe (a name in recipes/, or the path of a TOML file) with ``section.key=value`` overrides.

    >>> load_recipe("smolergpt-12m", ["optim.lr=3e-4", "train.steps=20"]).train.steps
    20
    """
    settings = _read_toml(recipe)
    for override in overrides:
        _apply(settings, override)
    return parse_config(settings)


LARGEST_RECIPE = 1 << 20
_DEEP_KEY = re.compile(r"""(?:^|[\n{,\[])[ \t]*(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){8}""")
"""A key of more than eight parts: tomllib takes time and memory with the square of them (50,000: 30 s and 9.5 GB)."""


def _read_toml(recipe: str | Path) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix == ".toml" or path.parent != Path("."):
        name = path.stem
        try:
            text = content(path, LARGEST_RECIPE).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UserError(
                f"recipe {path}: {reason}; give a readable TOML file or one of {_listed(recipe_names())}"
            ) from None
    elif (name := str(recipe)) in recipe_names():
        text = (resources.files("smalllm") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise UserError(
            f"no recipe is called {name!r}{_nearest(name, recipe_names())}; the recipes are {_listed(recipe_names())}"
        )
    if _DEEP_KEY.search(text):
        raise UserError(f"recipe {recipe} has keys of many parts and is no recipe; write [section] and key = value")
    try:
        settings = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"recipe {recipe} is not valid TOML: {printable(str(error))}") from None
    settings.setdefault("name", name)
    return settings


def parse_config(settings: Mapping[str, Any]) -> RunConfig:
    """Check plain settings; UserError names the key, the value and the fix."""
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise UserError(_sentence(error)) from None


def _apply(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"{override!r} is not an override; write section.key=value, for example train.steps=100")
    section, _, name = key.rpartition(".")
    if key not in setting_names():
        raise UserError(f"there is no setting {key!r}{_nearest(key, setting_names())}")
    target = settings.setdefault(section, {}) if section else settings
    target[name] = _literal(text.strip())


def _literal(text: str) -> Any:
    """A TOML value (1e-3, true, [0.9, 0.95]); anything else is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError, KeyError):
        return text


def setting_names() -> list[str]:
    """Every key as it is written in overrides: ``seed``, ``model.layers``, ..."""
    names = []
    for key, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            names += [f"{key}.{inner}" for inner in field.annotation.model_fields]
        else:
            names.append(key)
    return names


RESUME: dict[str, Literal["free", "force", "fixed"]] = {
    **dict.fromkeys((
        "name", "data.path", "optim.lr", "optim.adam_lr", "optim.betas", "optim.weight_decay", "optim.clip", "optim.schedule",
        "optim.warmup_steps", "optim.final_lr_fraction", "optim.cooldown_fraction", "train.steps", "train.minutes",
        "train.micro_batch", "train.recompute", "train.compile", "train.parallel", "train.log_every", "train.evaluate_every",
        "train.checkpoint_every", "train.keep", "train.milestones", "train.patience", "train.memory_gb", "train.device",
        "train.sample_prompt", "train.sample_tokens", "train.preflight", "train.track", "train.spike_sigmas",
        "train.verify_every",
    ), "free"),
    **dict.fromkeys((
        "seed", "data.packing", "model.dropout", "train.batch_tokens", "train.precision", "train.evaluate_tokens",
    ), "force"),
    **dict.fromkeys((
        "data.source", "data.valid", "data.vocab_size", "data.limit", "data.sample_rate", "data.num_files", "model.layers",
        "model.width", "model.heads", "model.kv_heads", "model.mlp_width", "model.context", "model.vocab_size",
        "model.positions", "model.norm", "model.activation", "model.qk_norm", "model.bias", "model.tie_embeddings",
        "model.rope_theta", "optim.kind",
    ), "fixed"),
}  # fmt: skip
"""What becomes of a setting that differs when a run is continued. ``free``: it holds from now on, which is said. ``force``:
so too, but only when asked for, since the figures before and after do not compare. ``fixed``: it would be another run."""


def changed_settings(old: RunConfig, new: RunConfig, force: bool = False) -> list[str]:
    """What differs between a run's settings and those it is to continue with, as ``key=new (was old)``. UserError for a
    setting that makes it another run. The folder of the data may move: the data itself is compared by fingerprint."""
    changes = []
    for key in setting_names():
        before, after = _get(old, key), _get(new, key)
        if before == after or key == "data.path":
            continue
        ways = f"give {key}={before}, another --out, or --fresh"
        if RESUME[key] == "fixed":
            raise UserError(f"{key} = {after} but the run was begun with {before}; {ways}")
        if RESUME[key] == "force" and not force:
            raise UserError(
                f"{key} = {after} but the run was begun with {before}; {ways}, or go on all the same by --force"
            )
        changes.append(f"{key}={after} (was {before})")
    return changes


def _get(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _sentence(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "extra_forbidden":
        return f"there is no setting {key[:80]!r}{_nearest(key[:80], setting_names())}"
    reason = problem["msg"].replace("Input should be", "it should be")
    return f"{key} = {_shown(problem['input'])} is not possible: {reason[0].lower() + reason[1:]}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(name: str, names: list[str]) -> str:
    """A hint that names the closest valid key, also when only its last part was written."""
    by_tail = {full.rpartition(".")[2]: full for full in names}
    close = difflib.get_close_matches(name, names, n=1) or [
        by_tail[tail] for tail in difflib.get_close_matches(name.rpartition(".")[2], list(by_tail), n=1)
    ]
    return f"; did you mean {close[0]!r}?" if close else ""


def _listed(names: list[str]) -> str:
    return ", ".join(names)
