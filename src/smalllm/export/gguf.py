"""A run as one GGUF file, which llama.cpp, Ollama and LM Studio run; and such a file as a model again.

The format is github.com/ggml-org/ggml, docs/gguf.md. Matrices are in the type asked for, vectors and learned positions in
float32, as llama.cpp's own converter writes them. The vocabulary is a `llama` one: llama.cpp merges its pieces exactly as
SentencePiece does, puts no space before a text and adds the begin-of-document token itself. One character differs: U+2581,
which in a `llama` vocabulary is the space, so that llama.cpp reads it as one (docs/export.md).

Reading trusts no number of a file: sizes are compared with the file's before anything is allocated.
"""

from __future__ import annotations

import errno
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import gguf
import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from smalllm.checkpoint import LoadedRun, assemble, model_weights
from smalllm.config import ModelConfig, UserError
from smalllm.conversation import CONTROL, has_turns, stop_ids
from smalllm.export.card import UNKNOWN_LICENCE, Card
from smalllm.export.destination import replacing
from smalllm.export.fast_tokenizer import chat_template
from smalllm.export.names import Weights, from_gguf, meta_weights, to_gguf
from smalllm.export.pieces import Kind, Piece, formable, model_of, pieces_of
from smalllm.model import GPT, NORM_EPS
from smalllm.tokenizer import BOS, EOS, SPACE_MARK, UNK, Tokenizer
from smalllm.untrusted import opened

Type = gguf.GGMLQuantizationType
DTYPES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16, "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}  # fmt: skip
BLOCK = 32  # weights of a row of Q8_0 that share a scale
MAGIC, VERSION, ALIGNMENT = 0x46554747, 3, 32
ROPE_BYTES = 1 << 31  # of tables that a file may ask for
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": True},
    "starcoder2": {"norm": "layernorm", "activation": "gelu"},
    "gpt2": {"norm": "layernorm", "activation": "gelu", "positions": "learned"},
}
"""What of our settings an architecture is."""

# ── writing ──


def write(run: LoadedRun, out: Path, dtype: str, card: Card | None = None) -> None:
    """Write the file, whole or not at all; UserError for an unknown dtype, weights that it cannot hold, or a place that is
    taken. The same run gives the same bytes."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} has no place in GGUF; use {', '.join(DTYPES)}")
    config = run.model.config
    tensors = to_gguf(model_weights(run.model), config)
    with replacing(out) as temporary:
        writer = gguf.GGUFWriter(temporary, config.architecture)
        add_description(writer, run, dtype, card or Card(run.folder.config().name))
        add_shape(writer, config)
        add_vocabulary(writer, run.tokenizer)
        for name, tensor in tensors.items():
            kind = type_of(name, tensor.shape, dtype)
            writer.add_tensor(name, quantized(name, tensor, kind), raw_dtype=kind)
        _write_file(writer, out)


def type_of(name: str, shape: Sequence[int], dtype: str) -> gguf.GGMLQuantizationType:
    """The type of a tensor in a file of this dtype. A row that is no whole number of blocks of Q8_0 is float16, as in
    llama.cpp's own quantization."""
    if len(shape) < 2 or name == "position_embd.weight":
        return Type.F32
    return Type.F16 if dtype == "q8_0" and shape[-1] % BLOCK else DTYPES[dtype]


def quantized(name: str, tensor: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The values as they are stored; UserError for NaN and infinity, of the weights or in this type."""
    values = tensor.detach().float().cpu().contiguous()
    if not values.isfinite().all():
        raise UserError(f"tensor {name} holds NaN or infinity; export another checkpoint")
    greatest = float(values.abs().max())
    if kind is Type.F16 and greatest > torch.finfo(torch.float16).max:
        raise UserError(f"tensor {name} holds {greatest:g}, too much for f16; use --dtype bf16 or f32")
    if kind is Type.Q8_0 and greatest / 127 > torch.finfo(torch.float16).max:
        raise UserError(f"tensor {name} holds {greatest:g}, too much for the scales of q8_0; use --dtype bf16 or f32")
    stored: np.ndarray = gguf.quantize(values.numpy(), kind)
    return stored


def _write_file(writer: gguf.GGUFWriter, out: Path) -> None:
    """Header, metadata and tensors. numpy tells of a full disk in its own words, without a number."""
    try:
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    except OSError as error:
        code = error.errno or errno.ENOSPC
        raise OSError(code, os.strerror(code), str(out)) from None


def add_description(writer: gguf.GGUFWriter, run: LoadedRun, dtype: str, card: Card) -> None:
    """What programs show of the file."""
    parameters = run.model.parameters_count()
    writer.add_type("model")
    writer.add_name(card.name)
    if card.author:
        writer.add_author(card.author)
    if card.licence != UNKNOWN_LICENCE:
        writer.add_license(card.licence)
    learned = f" on {card.data}" if card.data else ""
    writer.add_description(
        f"A language model of {parameters:,} parameters, trained from scratch with SmallLM{learned}."
    )
    writer.add_size_label(gguf.size_label(parameters, parameters, 0, 0))
    writer.add_tags(["text-generation"])
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_shape(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """The numbers that describe the model."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.hidden_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.key_value_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    if config.positions == "rope":
        writer.add_rope_dimension_count(config.head_width)
        writer.add_rope_freq_base(config.theta)
    if config.norm == "rmsnorm":
        writer.add_layer_norm_rms_eps(NORM_EPS)
    else:
        writer.add_layer_norm_eps(NORM_EPS)


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    """The pieces, the special ones among them, and how a conversation is written where the model knows turns."""
    pieces = pieces_of(tokenizer.model_bytes)
    texts = spellings(pieces)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores([piece.score for piece in pieces])
    writer.add_token_types([int(piece.kind) for piece in pieces])
    writer.add_unk_token_id(UNK)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)
    if has_turns(tokenizer):
        writer.add_eot_token_id(stop_ids(tokenizer)[0])
    if has_turns(tokenizer) and set(CONTROL) <= set(texts):  # else the template's markers would be text
        writer.add_chat_template(chat_template(tokenizer))


def spellings(pieces: Sequence[Piece]) -> list[str]:
    """How each piece is written in the file.

    SentencePiece never merges to a control piece; llama.cpp looks up any text. So one that merges could build, ``</s>``
    where ``</s`` is a piece, gets marks around it until none can. Pieces that a user defined are found in text as it
    came, with spaces as they are.
    """
    texts = [piece.text for piece in pieces]
    reachable = formable(texts)
    for id, piece in enumerate(pieces):
        if piece.kind is Kind.USER_DEFINED:
            texts[id] = piece.text.replace(SPACE_MARK, " ")
        while piece.kind in (Kind.CONTROL, Kind.UNKNOWN) and texts[id] in reachable:
            texts[id] = f"<|{texts[id]}|>"
            reachable = formable(texts)
    return texts


# ── reading ──


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies in the data of a file, and how it is stored."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of bytes."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return (*self.shape[:-1], self.shape[-1] // block * size)


def read(path: Path) -> tuple[GPT, Tokenizer]:
    """Model, in float32, and tokenizer of a GGUF file in one of `DTYPES` of our architectures; UserError for any other."""
    try:
        with opened(path) as file:
            fields, tensors, start = _header(file)
            config = _config(fields, tensors)
            weights = {name: _weights(file, start, name, tensor) for name, tensor in _checked(tensors, config).items()}
        return _model(weights, config, path), _tokenizer(fields, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a GGUF file") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{path} is not a whole GGUF file of ours: {_reason(error)}; export it again") from None


def _reason(error: Exception) -> str:
    match error:
        case KeyError():
            return f"it lacks {error.args[0]}"
        case UnicodeDecodeError():
            return "a text in its header is not UTF-8"
        case ValueError():
            return str(error)
    return "its metadata are of other types"


class _Cursor:
    """Numbers and texts from the beginning of a file on; ValueError where it ends. The file is read and not mapped into
    memory: a map of a file that someone truncates ends the process."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.place, self.size = file, 0, os.fstat(file.fileno()).st_size

    def take(self, size: int) -> bytes:
        data = self.file.read(size) if size <= self.size - self.place else b""
        if len(data) < size:
            raise ValueError(f"it ends at byte {self.size}, within its header")
        self.place += size
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        match gguf.GGUFValueType(kind):
            case gguf.GGUFValueType.STRING:
                return self.text()
            case gguf.GGUFValueType.ARRAY:
                return self.array(self.number("I"), self.number("Q"))
            case plain:
                return self.number(_CODES[plain])

    def array(self, kind: int, count: int) -> Sequence[Any] | np.ndarray:
        if (inner := gguf.GGUFValueType(kind)) is gguf.GGUFValueType.STRING:
            if count > (self.size - self.place) // 8:  # each has its length
                raise ValueError(f"a list of {count} texts is longer than the file")
            return [self.text() for _ in range(count)]
        if inner not in _CODES:
            raise ValueError("it holds lists of lists")
        form = np.dtype(f"<{_CODES[inner]}")
        return np.frombuffer(self.take(count * form.itemsize), form)


_V = gguf.GGUFValueType
_CODES = {
    _V.UINT8: "B", _V.INT8: "b", _V.UINT16: "H", _V.INT16: "h", _V.UINT32: "I", _V.INT32: "i", _V.FLOAT32: "f",
    _V.BOOL: "?", _V.UINT64: "Q", _V.INT64: "q", _V.FLOAT64: "d",
}  # fmt: skip


def _header(file: IO[bytes]) -> tuple[dict[str, Any], dict[str, _Tensor], int]:
    """Metadata, tensors, and where their data begins."""
    cursor = _Cursor(file)
    if (cursor.number("I"), version := cursor.number("I")) != (MAGIC, VERSION):
        raise ValueError(f"it does not begin like version {VERSION} of GGUF (version {version})")
    tensors_count, fields_count = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(fields_count):
        name = cursor.text()
        if fields.setdefault(name, value := cursor.value(cursor.number("I"))) is not value:
            raise ValueError(f"it has {name} twice")
    tensors: dict[str, _Tensor] = {}
    for _ in range(tensors_count):
        name = cursor.text()
        if tensors.setdefault(name, tensor := _described(cursor, name)) is not tensor:
            raise ValueError(f"it has tensor {name} twice")
    start = -(-cursor.place // ALIGNMENT) * ALIGNMENT
    for name, tensor in tensors.items():
        if tensor.offset + math.prod(tensor.stored_shape) > cursor.size - start:
            raise ValueError(f"tensor {name} ends beyond the file's {cursor.size} bytes")
    return fields, tensors, start


def _described(cursor: _Cursor, name: str) -> _Tensor:
    if not 1 <= (dimensions := cursor.number("I")) <= 4:
        raise ValueError(f"tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    kind, offset = Type(cursor.number("I")), cursor.number("Q")
    if kind not in DTYPES.values():
        raise ValueError(f"tensor {name} is of type {kind.name}, and only {', '.join(DTYPES)} are read")
    if offset % ALIGNMENT or shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        raise ValueError(f"tensor {name} does not begin or end where its type must")
    return _Tensor(shape, kind, offset)


def _config(fields: Mapping[str, Any], tensors: Mapping[str, _Tensor]) -> ModelConfig:
    """The settings of the model; UserError when there are none that make it."""
    architecture = fields["general.architecture"]
    if architecture not in SETTINGS:
        raise UserError(f"architecture {architecture!r} is none of {', '.join(SETTINGS)}; give a model of one of them")
    own = {key.removeprefix(f"{architecture}."): value for key, value in fields.items()}
    settings = SETTINGS[architecture] | {
        "layers": own["block_count"], "width": own["embedding_length"], "context": own["context_length"],
        "heads": own["attention.head_count"], "kv_heads": own["attention.head_count_kv"],
        "mlp_width": own["feed_forward_length"], "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_embeddings": "output.weight" not in tensors, "rope_theta": own.get("rope.freq_base"),
        "bias": architecture in ("starcoder2", "gpt2"),
    }  # fmt: skip
    try:
        config = ModelConfig.model_validate(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, problem['loc'])) or 'its settings'}: {problem['msg']}") from None
    _check_fixed(own, config, tensors)
    return config


def _check_fixed(own: Mapping[str, Any], config: ModelConfig, tensors: Mapping[str, _Tensor]) -> None:
    """What the model has no setting for must be as it is, and nothing large may be asked for by a number alone."""
    norm = own["attention.layer_norm_rms_epsilon" if config.norm == "rmsnorm" else "attention.layer_norm_epsilon"]
    if not math.isclose(norm, NORM_EPS, rel_tol=1e-6):
        raise UserError(f"its norms have an epsilon of {norm:g}, ours {NORM_EPS:g}; give a model with that")
    if own.get("attention.key_length", config.head_width) != config.head_width:
        raise UserError(f"its heads are {own['attention.key_length']} wide, ours width / heads; give a model with that")
    if config.layers > len(tensors):
        raise UserError(f"it has {config.layers} layers but only {len(tensors)} tensors; export it again")
    if config.positions == "rope" and 16 * config.context * config.head_width > ROPE_BYTES:
        raise UserError(
            f"a context of {config.context} is too long for heads {config.head_width} wide; export it again"
        )


def _checked(tensors: Mapping[str, _Tensor], config: ModelConfig) -> Mapping[str, _Tensor]:
    """The tensors; UserError unless their shapes are those of the model. Names are compared later."""
    for name, expected in to_gguf(meta_weights(config), config).items():
        if name in tensors and tensors[name].shape != tuple(expected.shape):
            raise UserError(f"tensor {name} has shape {list(tensors[name].shape)}, not {list(expected.shape)}")
    return tensors


def _weights(file: IO[bytes], start: int, name: str, tensor: _Tensor) -> Tensor:
    stored = tensor.stored_shape
    file.seek(start + tensor.offset)
    stretch = np.empty(stored, np.uint8)
    if file.readinto(stretch.data) < stretch.size:  # type: ignore[attr-defined]
        raise ValueError(f"tensor {name} ends early: the file became shorter while it was read")
    with np.errstate(all="ignore"):  # zero times an infinite scale
        values = gguf.dequantize(stretch, tensor.kind).astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise ValueError(f"tensor {name} holds NaN or infinity")
    return torch.from_numpy(np.ascontiguousarray(values)).reshape(tensor.shape)


def _model(weights: Weights, config: ModelConfig, path: Path) -> GPT:
    """The model in eval mode; biases that are all zero are left out of it."""
    if config.bias and not any(tensor.any() for name, tensor in weights.items() if name.endswith(".bias")):
        config = config.model_copy(update={"bias": False})
    return assemble(config, from_gguf(weights, config), str(path))


def _tokenizer(fields: Mapping[str, Any], path: Path) -> Tokenizer:
    """The vocabulary; UserError unless it encodes as ours do."""
    kind = fields["tokenizer.ggml.model"]
    if kind != "llama" or fields.get("tokenizer.ggml.add_space_prefix", True):
        raise UserError(
            f"its vocabulary ({kind}, or with a space put before each text) is not of SmallLM; export it again"
        )
    columns = (fields[f"tokenizer.ggml.{column}"] for column in ("tokens", "scores", "token_type"))
    pieces = [Piece(text, score, Kind(kind)) for text, score, kind in zip(*columns, strict=True)]
    return Tokenizer(model_of(pieces), str(path))
