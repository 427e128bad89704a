"""config.json of a Hugging Face folder: from our settings, and back with a closed schema.

Every key that is read is known here: it is the shape, or it must have the one value that our models compute with, or it
has no part in what a model computes. Any other key is refused, so that nothing that a model needs is passed over and
nothing in a file is ever run. The keys are those of transformers 4 and 5 (models/*/configuration_*.py); ``rope_theta`` is
written both ways, at the top for 4 and in ``rope_parameters`` for 5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from pydantic import ValidationError

from smalllm.config import ModelConfig, UserError
from smalllm.model import NORM_EPS

Settings = dict[str, Any]

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
LARGEST = 1 << 20  # bytes of a config.json
LARGEST_NUMBER = 1 << 20  # of any size in it
EPSILON = {"llama": "rms_norm_eps", "qwen3": "rms_norm_eps", "starcoder2": "norm_epsilon", "gpt2": "layer_norm_epsilon"}
SHAPE = {
    "vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "mlp_width": "intermediate_size", "context": "max_position_embeddings",
}  # fmt: skip
GPT2_SHAPE = {
    "vocab_size": "vocab_size", "width": "n_embd", "layers": "n_layer", "heads": "n_head", "mlp_width": "n_inner",
    "context": "n_positions",
}  # fmt: skip
"""Their key for each of our settings that is a size."""

_NO_DROPOUT = {"attention_dropout": 0.0}
FIXED: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "qwen3": {"hidden_act": "silu", "attention_bias": False, "sliding_window": None, "use_sliding_window": False},
    "starcoder2": {"hidden_act": "gelu_pytorch_tanh", "sliding_window": None},
    "gpt2": {
        "activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False, "add_cross_attention": False,
    },
}  # fmt: skip
"""Keys that are written with these values, and must have them when they are read."""
SAME = {"gelu_new": ("gelu_pytorch_tanh",), "gelu_pytorch_tanh": ("gelu_new",)}
"""Other names of the same function."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 4096, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "qwen3": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "head_dim": 128},
    "starcoder2": {
        "max_position_embeddings": 4096, "norm_epsilon": 1e-5, "tie_word_embeddings": True, "use_bias": True,
        "num_key_value_heads": 2,
    },
    "gpt2": {"n_positions": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
}  # fmt: skip
"""What a key means when it is not there, where models leave it out."""
IGNORED = frozenset((
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "residual_dropout",
    "embedding_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "pretraining_tp", "n_ctx",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "task_specific_params", "gradient_checkpointing", "max_window_layers", "max_sequence_length", "id2label", "label2id",
    "num_labels", "return_dict", "output_attentions", "output_hidden_states", "torchscript", "is_decoder", "problem_type",
    "norm_type", "mlp_type", "unk_token_id", "name", "chunk_size_feed_forward", "is_encoder_decoder",
))  # fmt: skip
"""Keys without a part in what a model computes, or that only repeat what another key says."""


def to_json(config: ModelConfig, dtype: str) -> Settings:
    """The settings that transformers reads; ``dtype`` is its name of one, such as float32."""
    architecture = config.architecture
    sizes = {key: _size_of(config, own) for own, key in _shape_keys(architecture).items()}
    found = {"architectures": [CLASSES[architecture]], "model_type": architecture, **sizes, **FIXED[architecture]}
    found |= {EPSILON[architecture]: NORM_EPS, "tie_word_embeddings": config.tie_embeddings}
    match architecture:
        case "gpt2":
            found |= {"n_inner": config.hidden_width, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        case "starcoder2":
            found |= {"use_bias": config.bias, "residual_dropout": 0.0, "embedding_dropout": 0.0} | _NO_DROPOUT
        case _:
            found |= {"head_dim": config.head_width} | _NO_DROPOUT
    if config.positions == "rope":
        found |= {"rope_theta": config.theta, "rope_parameters": {"rope_type": "default", "rope_theta": config.theta}}
    return found | {"bos_token_id": 1, "eos_token_id": 2, "dtype": dtype, "torch_dtype": dtype}


class Told(NamedTuple):
    """What a config.json says of a model: its shape, the epsilon of its norms, and whether its matrices have biases."""

    config: ModelConfig
    epsilon: float
    biased: bool


def from_json(data: bytes, origin: str) -> Told:
    """The settings of a file; UserError in one sentence for anything that is not one of our models."""
    settings = strict_json(data, origin)
    architecture = _architecture(settings, origin)
    known = _Known(DEFAULTS[architecture] | settings, origin)
    for key, wanted in FIXED[architecture].items():
        known.require(key, (*SAME.get(str(wanted), ()), wanted))
    shape: Settings = {own: known.size(key) for own, key in _shape_keys(architecture).items()}
    epsilon, biased = known.number(EPSILON[architecture]), "use_bias" not in known.left or known.flag("use_bias")
    shape |= {"tie_embeddings": known.flag("tie_word_embeddings"), **_kind(architecture)}
    if architecture != "gpt2":
        shape["rope_theta"] = _theta(known)
    if shape.get("kv_heads") == shape["heads"]:
        shape["kv_heads"] = 0
    try:
        config = ModelConfig.model_validate({key: value for key, value in shape.items() if value is not None})
    except ValidationError as error:
        _refuse(origin, str(error.errors()[0]["msg"]).removeprefix("Value error, "))
    known.require("head_dim", (None, config.head_width))
    known.require("layer_types", (None, ["full_attention"] * config.layers))
    known.nothing_else()
    return Told(config, epsilon, biased)


def strict_json(data: bytes, origin: str, largest: int = LARGEST) -> Settings:
    """A JSON object without doubtful parts: NaN, keys twice, depth without end, numbers of thousands of digits."""
    if len(data) > largest:
        _refuse(origin, f"it has {len(data):,} bytes, more than the {largest:,} of any such file")
    try:
        value = json.loads(data, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _refuse(origin, f"it is not JSON ({str(error)[:80] or 'nested too deeply'})")
    if not isinstance(value, dict):
        _refuse(origin, "it is not a JSON object")
    return value


def _kind(architecture: str) -> Settings:
    """Those of our settings that are not sizes."""
    match architecture:
        case "starcoder2":
            return {"norm": "layernorm", "activation": "gelu", "bias": True}
        case "gpt2":
            return {"norm": "layernorm", "activation": "gelu", "bias": True, "positions": "learned"}
    return {"qk_norm": architecture == "qwen3"}


def _theta(known: _Known) -> float:
    """The base of RoPE, from either of its two places; any scaling of it is refused."""
    places = [known.take(key) or {} for key in ("rope_parameters", "rope_scaling")]
    for place in places:
        if not isinstance(place, dict) or place.keys() - {"rope_type", "rope_theta", "type"}:
            known.refuse("its RoPE is scaled, and that of SmallLM is not")
        if place.get("rope_type", place.get("type", "default")) != "default":
            known.refuse("its RoPE is scaled, and that of SmallLM is not")
    top = known.take("rope_theta")
    inner = next((place["rope_theta"] for place in places if "rope_theta" in place), None)
    found = [value for value in (top, inner) if value is not None] or [10_000.0]
    if any(isinstance(value, bool) or not isinstance(value, int | float) or value != found[0] for value in found):
        known.refuse(f"rope_theta = {_shown(found[0])} is not one number")
    if not 1.0 < found[0] < 1e30:
        known.refuse(f"rope_theta = {_shown(found[0])} is not possible; it must be more than 1")
    return float(found[0])


class _Known:
    """The settings of a file, of which every one must be asked for."""

    def __init__(self, settings: Settings, origin: str) -> None:
        self.left, self.origin = dict(settings), origin

    def take(self, key: str) -> Any:
        return self.left.pop(key, None)

    def refuse(self, reason: str) -> NoReturn:
        _refuse(self.origin, reason)

    def size(self, key: str) -> int | None:
        """A positive number, or None where it is not given."""
        value = self.take(key)
        if value is None and key in ("num_key_value_heads", "n_inner"):
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(f"{key} = {_shown(value)} is not a whole number")
        if not 0 < value <= LARGEST_NUMBER:
            self.refuse(f"{key} = {_shown(value)} is not possible; it must be from 1 to {LARGEST_NUMBER}")
        return value

    def number(self, key: str) -> float:
        """A small positive number."""
        value = self.take(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
            self.refuse(f"{key} = {_shown(value)} is not a number between 0 and 1")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.take(key)
        if not isinstance(value, bool):
            self.refuse(f"{key} = {_shown(value)} is neither true nor false")
        return value

    def require(self, key: str, wanted: tuple[Any, ...]) -> None:
        """One of these values, if the key is there at all."""
        if key not in self.left:
            return
        value = self.take(key)
        if not any(value == allowed and type(value) is type(allowed) for allowed in wanted):
            self.refuse(f"{key} = {_shown(value)}, and models of SmallLM have {_shown(wanted[-1])}")

    def nothing_else(self) -> None:
        """UserError when a key is left that nobody knows."""
        if unknown := sorted(self.left.keys() - IGNORED):
            self.refuse(f"it has the key {_shown(unknown[0])}, which may change what the model computes")


def _architecture(settings: Mapping[str, Any], origin: str) -> str:
    """llama, qwen3, starcoder2 or gpt2; UserError for others, and for files that ask for code of their own."""
    if code := sorted(settings.keys() & {"auto_map", "trust_remote_code", "_attn_implementation_internal"}):
        _refuse(origin, f"it asks for code of its own ({code[0]}), which is never run; take a model without it")
    found = settings.get("model_type")
    if not isinstance(found, str) or found not in CLASSES:
        _refuse(origin, f"its model_type is {_shown(found)}; {', '.join(CLASSES)} can be imported")
    if (classes := settings.get("architectures")) not in (None, [CLASSES[found]]):
        _refuse(origin, f"its architectures are {_shown(classes)} and must be {[CLASSES[found]]}")
    return found


def _shape_keys(architecture: str) -> dict[str, str]:
    return GPT2_SHAPE if architecture == "gpt2" else SHAPE


def _size_of(config: ModelConfig, own: str) -> int:
    whole = {"kv_heads": config.key_value_heads, "mlp_width": config.hidden_width}
    return whole.get(own) or getattr(config, own)


def _once(pairs: list[tuple[str, Any]]) -> Settings:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _refuse(origin: str, reason: str) -> NoReturn:
    raise UserError(f"{origin}: {reason}")
