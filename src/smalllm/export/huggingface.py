"""A run as a Hugging Face folder, which transformers, vLLM, SGLang and MLX read; and such a folder as a model again.

    PATH/
    ├── config.json  generation_config.json      what the model is, how it is sampled
    ├── model.safetensors                        its weights under the names of transformers
    ├── tokenizer.model                          the SentencePiece model, as it is
    ├── tokenizer.json  tokenizer_config.json  special_tokens_map.json   the same as a fast tokenizer
    ├── chat_template.jinja                      only where the vocabulary has turn markers
    └── README.md  curve.png                     the model card

Reading believes nothing and runs nothing: config.json has a closed schema, weights are safetensors only, and every name,
shape and size is compared with the file before anything is allocated.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from smalllm.checkpoint import LoadedRun, assemble, model_weights
from smalllm.config import ModelConfig, UserError
from smalllm.conversation import stop_ids
from smalllm.export import fast_tokenizer, huggingface_config
from smalllm.export.card import CURVE, Card, card_of, page
from smalllm.export.destination import replacing
from smalllm.export.huggingface_config import LARGEST, Told, strict_json
from smalllm.export.names import Weights, from_huggingface, huggingface_shapes, to_huggingface
from smalllm.hardware import total_memory
from smalllm.model import GPT, NORM_EPS
from smalllm.tokenizer import EOS, LARGEST_MODEL, UNK, Tokenizer
from smalllm.untrusted import content, opened

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types of safetensors that are read."""
LARGEST_HEADER = 1 << 26
MOST_DIMENSIONS = 4
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")
"""Tensors of older versions that are not weights."""

# ── writing ──


def write(run: LoadedRun, out: Path, dtype: str, card: Card | None = None) -> None:
    """Write the folder, whole or not at all; UserError for a dtype that it cannot have, weights that it cannot hold, or a
    place that is taken."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} has no place in a Hugging Face folder; use {', '.join(DTYPES)}")
    contents = files(run, dtype, card or card_of(run))
    with replacing(out) as temporary:
        temporary.mkdir()
        for name, data in contents.items():
            (temporary / name).write_bytes(data)


def files(run: LoadedRun, dtype: str, card: Card) -> dict[str, bytes]:
    """Every file of the folder by its name."""
    config = run.model.config
    weights = to_huggingface(model_weights(run.model), config)
    found = {
        "config.json": _json(huggingface_config.to_json(config, str(DTYPES[dtype]).removeprefix("torch."))),
        "generation_config.json": _json(_generation(run.tokenizer)),
        WEIGHTS: to_safetensors({name: _stored(name, weights[name], dtype) for name in weights}, {"format": "pt"}),
        **fast_tokenizer.files(run.tokenizer, config.context),
        "README.md": page(card, config.architecture).encode(),
    }
    return found | ({CURVE: card.curve} if card.curve else {})


def _stored(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """The tensor in this type; UserError for NaN and infinity, of the weights or in this type."""
    found = tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
    if found.isfinite().all():
        return found
    if tensor.isfinite().all():
        raise UserError(f"tensor {name} holds {tensor.abs().max():g}, too much for {dtype}; use --dtype bf16 or f32")
    raise UserError(f"tensor {name} holds NaN or infinity; export another checkpoint")


def _generation(tokenizer: Tokenizer) -> dict[str, Any]:
    """How transformers samples when nothing is said: as `smalllm sample` does."""
    end = [EOS, *stop_ids(tokenizer)]
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": end if len(end) > 1 else EOS,
        "pad_token_id": UNK,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 0,
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


# ── reading ──


def read(path: Path, tokenizer: Path | None = None) -> tuple[GPT, Tokenizer]:
    """The model, float32 in eval mode, and its vocabulary: the folder's tokenizer.model, or another file. UserError, in one
    sentence with the file, for everything that is not a model of the four architectures in safetensors."""
    if not path.is_dir():
        reason = "is not a folder; unpack archives first" if path.exists() else "does not exist"
        raise UserError(f"{path} {reason}; give the folder that holds config.json and model.safetensors")
    told = huggingface_config.from_json(_content(path / "config.json", LARGEST), str(path / "config.json"))
    _check_memory(told.config, path)
    words = _tokenizer(tokenizer or path / "tokenizer.model", told.config)
    weights, config = _weights(path, told)
    own = _with_our_epsilon(from_huggingface(weights, config), config, told.epsilon)
    return assemble(config, own, str(path)), words


def _tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    """The vocabulary that the model was trained with, or UserError that says why it cannot be read."""
    if not path.exists():
        raise UserError(f"{path} is missing; SmallLM reads SentencePiece models: give --tokenizer FILE.model")
    found = Tokenizer(_content(path, LARGEST_MODEL), str(path))
    if found.vocab_size != config.vocab_size:
        raise UserError(
            f"{path} has {found.vocab_size:,} pieces but the model {config.vocab_size:,}; give its own with --tokenizer FILE"
        )
    return found


def _check_memory(config: ModelConfig, path: Path) -> None:
    """UserError when the tables that a config.json asks for, which no file holds, would take more than the memory."""
    tables = 24 * config.context * config.head_width if config.positions == "rope" else 0
    if tables > (memory := total_memory(torch.device("cpu"))) // 4:
        raise UserError(
            f"{path / 'config.json'}: a context of {config.context:,} needs {tables >> 20:,} MB for its positions, more"
            f" than a quarter of the {memory >> 20:,} MB here; give a model with a shorter one"
        )


def _with_our_epsilon(weights: Weights, config: ModelConfig, epsilon: float) -> Weights:
    """The same model for norms with our epsilon. A norm of s x with epsilon s^2 e is that of x with epsilon e; so
    everything that a norm reads is scaled by s, and a tied head, scaled as the embedding, reads what is scaled back."""
    if epsilon == NORM_EPS:
        return weights
    scale, kept = (NORM_EPS / epsilon) ** 0.5, (config.heads + config.key_value_heads) * config.head_width
    found = dict(weights)
    for name in weights:
        if "embedding" in name or name.split(".")[-2] in ("out", "down"):
            found[name] = weights[name] * scale
        elif config.qk_norm and name.endswith("qkv.weight"):
            found[name] = torch.cat([weights[name][:kept] * scale, weights[name][kept:]])
        elif config.tie_embeddings and name.startswith("norm."):
            found[name] = weights[name] / scale
    return found


# ── weights ──


def _weights(path: Path, told: Told) -> tuple[Weights, ModelConfig]:
    """All tensors in float32 under the names that `huggingface_shapes` gives, and the settings, which have no biases when
    all of them are zero."""
    config, headers = told.config, [_Header.read(file) for file in _weight_files(path)]
    if config.layers > sum(len(header.shapes) for header in headers):
        _refuse(path, f"it has fewer tensors than the {config.layers} layers of its config.json; download it again")
    wanted = {name: tuple(shape) for name, shape in huggingface_shapes(config).items()}
    prefix = "transformer." if config.architecture == "gpt2" else ""
    found: Weights = {}
    _check_names(headers, wanted, prefix, path, told)
    for header in headers:
        for name, tensor in header.tensors():
            if (known := _known(name, wanted, prefix)) is not None:
                found[known] = tensor.float()
    _drop_tied_head(found, config, path)
    for name, shape in wanted.items():
        found.setdefault(name, torch.zeros(shape))  # biases that its config.json says are not there
    return _unbiased(found, config)


def _known(name: str, wanted: Mapping[str, Any], prefix: str) -> str | None:
    """The name that we know a tensor by; None for what is not a weight."""
    if name in wanted or name == "lm_head.weight":
        return name
    if prefix + name in wanted:
        return prefix + name
    return None if BUFFERS.search(name) else name


def _check_names(
    headers: list[_Header], wanted: Mapping[str, tuple[int, ...]], prefix: str, path: Path, told: Told
) -> None:
    """Every tensor once, of the shape that the model has; UserError before any is read."""
    config, seen = told.config, set[str]()
    for header in headers:
        for name, shape in header.shapes.items():
            known = _known(name, wanted, prefix)
            if known is None:
                continue
            want = wanted.get(known, wanted[_embedding(config)] if known == "lm_head.weight" else None)
            if want is None:
                _refuse(header.path, f"tensor {name[:80]!r} is not of a {config.architecture} of this config.json")
            if shape != want:
                _refuse(header.path, f"{name} has shape {list(shape)}, and by config.json {list(want)}")
            if known in seen:
                _refuse(header.path, f"tensor {name} stands twice")
            seen.add(known)
    missing = sorted(name for name in wanted.keys() - seen if told.biased or not _optional(name, config))
    if missing:
        _refuse(path, f"tensor {missing[0]!r} is missing from its safetensors files; download the model again")


def _optional(name: str, config: ModelConfig) -> bool:
    """The biases of StarCoder2's matrices, which are not there when its config.json has ``use_bias`` = false."""
    return config.architecture == "starcoder2" and name.endswith("bias") and "norm" not in name


def _embedding(config: ModelConfig) -> str:
    return "transformer.wte.weight" if config.architecture == "gpt2" else "model.embed_tokens.weight"


def _drop_tied_head(found: Weights, config: ModelConfig, path: Path) -> None:
    """A tied head may be stored all the same; then it is the embedding."""
    head = found.pop("lm_head.weight", None) if config.tie_embeddings else None
    if head is not None and not torch.equal(head, found[_embedding(config)]):
        _refuse(path, "lm_head.weight is not the embedding, though config.json has tie_word_embeddings = true")


def _unbiased(found: Weights, config: ModelConfig) -> tuple[Weights, ModelConfig]:
    """Without biases where all are zero: so are ours exported, and so they come back."""
    biases = [tensor for name, tensor in found.items() if name.endswith(".bias")]
    if not biases or any(tensor.any() for tensor in biases):
        return found, config
    bare = config.model_copy(update={"bias": False})
    return {name: found[name] for name in huggingface_shapes(bare)}, bare


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one."""
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    if not (path / INDEX).exists():
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
        if pickles:
            _refuse(path / pickles[0], "pickle files are refused, since they can run code; convert it to safetensors")
        _refuse(path, f"it has no {WEIGHTS}; give a model with safetensors weights")
    names = strict_json(_content(path / INDEX, LARGEST_HEADER), str(path / INDEX), LARGEST_HEADER).get("weight_map")
    if not isinstance(names, dict) or not names:
        _refuse(path / INDEX, "it has no weight_map")
    for name in names.values():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors", name):
            _refuse(path / INDEX, f"{str(name)[:80]!r} is not the name of a safetensors file beside it")
    return [path / name for name in sorted(set(names.values()))]


@dataclass(frozen=True)
class _Header:
    """What a safetensors file says of itself: the shape of each tensor. The file is read when the tensors are."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, path: Path) -> _Header:
        """UserError when the header cannot be, or does not fit the size of the file."""
        try:
            with opened(path) as file:
                size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
                header = file.read(length) if 2 <= length <= min(size - 8, LARGEST_HEADER) else b""
        except OSError as error:
            _refuse(path, f"{error.strerror}; give a folder that holds it")
        if not header:
            _refuse(path, "it is not a safetensors file, or cut off; download it again")
        records = strict_json(header, str(path), LARGEST_HEADER)
        records.pop("__metadata__", None)
        return cls(path, {name: _shape(name, record, size - 8 - length, path) for name, record in records.items()})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        try:
            yield from parse_safetensors(_content(self.path, sys.maxsize)).items()
        except SafetensorError as error:
            _refuse(self.path, f"it is not a safetensors file ({str(error)[:80]}); download it again")


def _shape(name: str, record: Any, room: int, path: Path) -> tuple[int, ...]:
    """The shape of one tensor, whose bytes lie in the file."""
    try:
        dtype, shape, (start, end) = record["dtype"], tuple(record["shape"]), record["data_offsets"]
        if not isinstance(dtype, str) or len(shape) > MOST_DIMENSIONS:  # the product of many sizes takes a minute
            raise TypeError
        numbers = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        _refuse(path, f"the header of tensor {name[:80]!r} is not one of safetensors; download it again")
    if BUFFERS.search(name):
        return ()
    if dtype not in STORED:
        _refuse(path, f"tensor {name[:80]!r} has type {str(dtype)[:20]}; {', '.join(STORED)} are read")
    count = 1
    for number in shape if numbers else ():
        count *= number
    if not numbers or end > room or end - start != count * STORED[dtype].itemsize:
        _refuse(
            path, f"tensor {name[:80]!r} does not fit into the file, which is damaged or cut off; download it again"
        )
    return shape


# ── files ──


def _content(path: Path, largest: int) -> bytes:
    """The bytes of a regular file that is no larger than so many."""
    try:
        return content(path, largest)
    except OSError as error:
        _refuse(path, f"{error.strerror}; give a folder that holds it")


def _refuse(path: Path, reason: str) -> NoReturn:
    raise UserError(f"{path}: {reason}")
