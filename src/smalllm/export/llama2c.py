"""llama2.c's files: a folder with ``model.bin`` and ``tokenizer.bin``, written and read.

The formats are those of karpathy/llama2.c: version 0 (float32, ``run.c``) and version 2 (int8 in groups that share a scale,
``runq.c``) of its export.py, and the vocabulary of its tokenizer.py. Everything is little-endian.

    version 0   7 int32: width, MLP width, layers, heads, key/value heads, vocabulary (negative: the head is untied), context;
                then float32, in `FLOATS` order, two RoPE tables of which no reader makes use, the head if untied
    version 2   256 bytes: "ak42", 2, the same 7 int32 (vocabulary positive), uint8 tied, int32 group; then the norms in
                float32 and every matrix as its int8 values followed by its float32 scales, in `QUANTIZED` order
    tokenizer   int32 longest piece; then float32 score, int32 length and the bytes of each piece

llama2.c rotates neighbouring pairs, as the llama of GGUF does, so the tensors are those of `names.to_gguf` in another order.
RoPE's base is 10,000, the norms' epsilon 1e-5, and byte pieces stand at 3 to 258: run.c has these numbers in its code, so a
model that needs others is refused. A reader believes nothing: every size is checked against the file's before it is used.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from smalllm.checkpoint import LoadedRun, assemble, model_weights
from smalllm.config import ModelConfig, UserError
from smalllm.export.card import Card
from smalllm.export.destination import replacing
from smalllm.export.names import Weights, from_gguf, to_gguf
from smalllm.export.pieces import Kind, Piece, model_of, pieces_of
from smalllm.model import GPT, rope_tables
from smalllm.tokenizer import BOS, EOS, FIXED_PIECES, SPACE_MARK, UNK, Tokenizer
from smalllm.untrusted import content, opened

MODEL, TOKENIZER = "model.bin", "tokenizer.bin"
DTYPES = ("f32", "q8_0")
THETA = 10_000.0
MAGIC = 0x616B3432  # "ak42"
HEADER_V0, HEADER_V2, V2_BYTES = struct.Struct("<7i"), struct.Struct("<Ii7iBi"), 256
GROUPS = (64, 32, 16, 8)  # weights that share a scale; smaller ones would hardly save anything
PICKLES, WIDEST = (b"PK\3\4", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"), 1 << 16  # 640 begins like one, too
LENGTH, RECORD = struct.Struct("<i"), struct.Struct("<fi")
BYTES = range(3, FIXED_PIECES)
MOST_TOKENIZER_BYTES = 1 << 26
MOST_ROTATIONS = 1 << 26  # of RoPE's tables, which a file of version 2 asks for without holding them

NORMS = ("attn_norm", "ffn_norm", "output_norm")
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ffn_up")
FLOATS = ("token_embd", "attn_norm", *MATRICES[:4], "ffn_norm", *MATRICES[4:], "output_norm")
QUANTIZED = ("token_embd", *MATRICES)
"""The order of the files in GGUF's names; of those that every layer has, all layers one after another."""


# ── writing ──


def write(run: LoadedRun, out: Path, dtype: str, card: Card | None = None) -> None:
    """Write the folder ``out`` with ``model.bin`` and ``tokenizer.bin``, whole or not at all; `dtype` is one of `DTYPES`. A
    card has no place in these files. UserError for a run that llama2.c cannot express."""
    check_exportable(run.model.config, dtype)
    words = tokenizer_bytes(run.tokenizer)
    with replacing(out) as temporary:
        temporary.mkdir()
        (temporary / TOKENIZER).write_bytes(words)
        write_model(temporary / MODEL, run.model, dtype)


def write_model(path: Path, model: GPT, dtype: str) -> None:
    """Write ``model.bin``; UserError for weights that are not finite."""
    config = model.config
    weights = {name: _finite(name, tensor) for name, tensor in to_gguf(model_weights(model), config).items()}
    with open(path, "wb") as file:
        if dtype == "f32":
            _write_floats(file, weights, config)
        else:
            _write_quantized(file, weights, config, group_size(config))


def check_exportable(config: ModelConfig, dtype: str) -> None:
    """UserError, naming the setting that would make it possible, unless llama2.c can compute this model in this type."""
    if config.architecture == "qwen3":
        raise UserError(
            "model.qk_norm = true has no place in llama2.c; train with model.qk_norm=false, or export to gguf"
        )
    if config.architecture != "llama":
        raise UserError(
            f"a model of architecture {config.architecture} has no place in llama2.c; train with model.positions=rope,"
            " model.norm=rmsnorm, model.activation=swiglu and model.bias=false, or export to gguf"
        )
    if config.theta != THETA:
        raise UserError(
            f"model.rope_theta = {config.theta:g} has no place in llama2.c, which computes with {THETA:g};"
            f" train with model.rope_theta={THETA:.0f}, or export to gguf"
        )
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} has no place in llama2.c; use {' or '.join(DTYPES)}")
    if dtype == "q8_0":
        group_size(config)


def group_size(config: ModelConfig) -> int:
    """How many weights share a scale: the largest of `GROUPS` that divides every row, else UserError."""
    for group in GROUPS:
        if config.width % group == 0 == config.hidden_width % group:
            return group
    raise UserError(
        f"model.width = {config.width} and an MLP of {config.hidden_width} cannot be written as q8_0: {GROUPS[-1]} must"
        " divide both; set model.width and model.mlp_width so, or use --dtype f32"
    )


def _write_floats(file: IO[bytes], weights: Weights, config: ModelConfig) -> None:
    file.write(HEADER_V0.pack(*_numbers(config, config.vocab_size if config.tie_embeddings else -config.vocab_size)))
    for name in _in_order(FLOATS, config):
        _write(file, weights[name])
    for table in rope_tables(config.context, config.head_width, THETA):
        _write(file, table)
    if not config.tie_embeddings:
        _write(file, weights["output.weight"])


def _write_quantized(file: IO[bytes], weights: Weights, config: ModelConfig, group: int) -> None:
    numbers = _numbers(config, config.vocab_size)
    file.write(HEADER_V2.pack(MAGIC, 2, *numbers, config.tie_embeddings, group).ljust(V2_BYTES, b"\0"))
    for name in _in_order(NORMS, config):
        _write(file, weights[name])
    for name in _in_order(_quantized(config), config):
        for part in quantize(weights[name], group):
            _write(file, part)


def _quantized(config: ModelConfig) -> tuple[str, ...]:
    return QUANTIZED if config.tie_embeddings else (*QUANTIZED, "output")


def quantize(weights: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """int8 values [N / group, group] and float32 scales [N / group]: the greatest of a group becomes 127 or -127.

    >>> [part.tolist() for part in quantize(torch.tensor([1.0, -254.0, 0.0, 0.0]), group=2)]
    [[[0, -127], [0, 0]], [2.0, 0.0]]
    """
    groups = weights.float().reshape(-1, group)
    scales = groups.abs().amax(dim=1) / 127
    values = groups / torch.where(scales > 0, scales, 1.0)[:, None]
    return values.round().clamp(-127, 127).to(torch.int8), scales


def _write(file: IO[bytes], tensor: Tensor) -> None:
    kind = "i1" if tensor.dtype == torch.int8 else "<f4"
    file.write(tensor.detach().cpu().numpy().astype(kind).tobytes())


def _numbers(config: ModelConfig, vocab_size: int) -> tuple[int, ...]:
    """The seven numbers of a header."""
    return (
        config.width, config.hidden_width, config.layers, config.heads, config.key_value_heads, vocab_size, config.context,
    )  # fmt: skip


def _in_order(modules: tuple[str, ...], config: ModelConfig) -> Iterator[str]:
    """Names of tensors as they follow each other in a file."""
    for module in modules:
        if module in ("token_embd", "output_norm", "output"):
            yield f"{module}.weight"
        else:
            yield from (f"blk.{layer}.{module}.weight" for layer in range(config.layers))


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        raise UserError(f"tensor {name} holds NaN or infinity; export another checkpoint")
    return tensor.float()


# ── writing the vocabulary ──


def tokenizer_bytes(tokenizer: Tokenizer) -> bytes:
    """``tokenizer.bin``; UserError for a vocabulary that it cannot express."""
    texts, records = [], []
    for id, piece in enumerate(pieces_of(tokenizer.model_bytes)):
        if piece.kind != _kind(id) or (piece.kind == Kind.BYTE and piece.text != _byte_piece(id)):
            raise UserError(
                f"the tokenizer's piece {id}, {piece.text!r}, is {_article(piece.kind)}, where llama2.c has"
                f" {_article(_kind(id))}; train with a tokenizer without turn markers, or export to gguf"
            )
        texts.append(_SPECIAL.get(id, piece.text.replace(SPACE_MARK, " ")).encode())
        records.append(RECORD.pack(piece.score, len(texts[-1])) + texts[-1])
    return LENGTH.pack(max(map(len, texts))) + b"".join(records)


_SPECIAL = {BOS: "\n<s>\n", EOS: "\n</s>\n"}  # as llama2.c's tokenizer.py spells them, so that their output can be read


def _kind(id: int) -> Kind:
    """What the piece of an id is in llama2.c, which has no word for it in its files."""
    if id < BYTES[0]:
        return Kind.UNKNOWN if id == UNK else Kind.CONTROL
    return Kind.BYTE if id in BYTES else Kind.NORMAL


def _byte_piece(id: int) -> str:
    return f"<0x{id - BYTES[0]:02X}>"


def _article(kind: Kind) -> str:
    words = {Kind.NORMAL: "text", Kind.BYTE: "this byte"}
    return words.get(kind, f"a piece of kind {kind.name.lower().replace('_', ' ')}")


# ── reading ──


def read(path: Path, tokenizer: Path | None = None) -> tuple[GPT, Tokenizer]:
    """A model and its vocabulary: a folder that `write` made, or a ``model.bin`` with the file of its vocabulary, a
    ``tokenizer.bin`` or the SentencePiece ``.model`` that it was made from. UserError for files that are not these.

    A ``tokenizer.bin`` does not say whether its model was trained on texts with a space put before them, as llama2.c's own
    were; SmallLM never puts one there, so prompts for such a model begin with a space.
    """
    if path.is_dir():
        path, tokenizer = path / MODEL, tokenizer or path / TOKENIZER
    model = read_model(path)
    if tokenizer is None:
        raise UserError(f"{path} holds no vocabulary; give --tokenizer FILE, its tokenizer.bin or SentencePiece .model")
    vocab_size = model.config.vocab_size
    words = Tokenizer.load(tokenizer) if tokenizer.suffix == ".model" else read_tokenizer(tokenizer, vocab_size)
    if words.vocab_size != vocab_size:
        raise UserError(f"{tokenizer} has {words.vocab_size:,} pieces but {path} {vocab_size:,}; give the right one")
    return model, words


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The vocabulary of a ``tokenizer.bin`` with exactly so many pieces, as a SentencePiece model that encodes as run.c does
    apart from the space that run.c puts first; UserError for a file that is not one."""
    try:
        data = content(path, MOST_TOKENIZER_BYTES)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a tokenizer.bin of llama2.c") from None
    place, pieces = LENGTH.size, list[Piece]()
    while place < len(data) and len(pieces) < vocab_size:
        if place + RECORD.size > len(data):
            break
        score, length = RECORD.unpack_from(data, place)
        place += RECORD.size
        if not (0 < length <= len(data) - place and math.isfinite(score)):
            raise UserError(
                f"{path}: piece {len(pieces)} has length {length} and score {score:g}; give a tokenizer.bin"
            )
        pieces.append(_piece(len(pieces), score, data[place : place + length], path))
        place += length
    if len(pieces) != vocab_size or place != len(data):
        more = "fewer" if len(pieces) < vocab_size else "more"
        raise UserError(f"{path} has {more} pieces than the {vocab_size:,} of the model; give the model's own")
    return Tokenizer(model_of(pieces), str(path))


def _piece(id: int, score: float, data: bytes, path: Path) -> Piece:
    """The piece of a record, of the kind that its place implies."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: piece {id} is not UTF-8; give a tokenizer.bin of llama2.c") from None
    text = text.strip("\n") if id in _SPECIAL else text.replace(" ", SPACE_MARK)
    fixed = _byte_piece(id) if id in BYTES else _FIRST.get(id, text)
    if text != fixed:
        raise UserError(
            f"{path}: piece {id} is {text[:20]!r} and must be {fixed!r}; only SentencePiece with bytes is read"
        )
    return Piece(text, score, _kind(id))


_FIRST = {UNK: "<unk>", BOS: "<s>", EOS: "</s>"}


@dataclass(frozen=True)
class Header:
    """What the first bytes of a ``model.bin`` say."""

    config: ModelConfig
    group: int  # weights that share a scale; 0: float32

    @property
    def start(self) -> int:
        """Where the tensors begin."""
        return V2_BYTES if self.group else HEADER_V0.size

    @property
    def size(self) -> int:
        """Bytes of the whole file. Python's integers do not overflow."""
        shapes = _shapes(self.config)
        if self.group:
            floats = sum(math.prod(shapes[name]) for name in _in_order(NORMS, self.config))
            bytes_ = sum(math.prod(shapes[name]) for name in _in_order(_quantized(self.config), self.config))
            return self.start + 4 * floats + bytes_ + 4 * (bytes_ // self.group)
        floats = sum(map(math.prod, shapes.values())) + self.config.context * self.config.head_width
        return self.start + 4 * floats


def read_model(path: Path) -> GPT:
    """The model of a ``model.bin`` of version 0 or 2, in eval mode, float32; UserError for a file that is not one."""
    try:
        with opened(path) as file:
            header = read_header(file, path)
            weights = dict(_read_quantized(file, header) if header.group else _read_floats(file, header.config))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a model.bin of llama2.c") from None
    except _Short:
        raise UserError(f"{path} became shorter while it was read; copy it again") from None
    return assemble(header.config, from_gguf(weights, header.config), str(path))


def read_header(file: IO[bytes], path: Path) -> Header:
    """The header of an open file, which has exactly the size that it promises, or UserError."""
    begin = file.read(HEADER_V2.size).ljust(HEADER_V2.size, b"\0")
    magic, version, *numbers, tied, group = HEADER_V2.unpack(begin)
    if magic == MAGIC and version != 2:
        raise UserError(f"{path} has version {version} of llama2.c's formats; export it again as version 0")
    if magic != MAGIC:
        numbers, group = list(HEADER_V0.unpack(begin[: HEADER_V0.size])), 0
        tied, numbers[5] = numbers[5] > 0, abs(numbers[5])
        if numbers[0] > WIDEST and begin.startswith(PICKLES):
            raise UserError(f"{path}: pickle files are refused, since they can run code; convert it to safetensors")
    elif group not in GROUPS:
        raise UserError(f"{path} has groups of {group} weights, not {' or '.join(map(str, GROUPS))}; export it again")
    header = Header(_config(numbers, bool(tied), path), group)
    if group and (header.config.width % group or header.config.hidden_width % group):
        raise UserError(f"{path} has groups of {group} weights, which do not divide its rows; export it again")
    if group and header.config.context * header.config.head_width > MOST_ROTATIONS:
        raise UserError(f"{path} has a context of {header.config.context:,}, too long for its heads; export it again")
    size = os.fstat(file.fileno()).st_size
    if header.size != size:
        raise UserError(f"{path} has {size:,} bytes and must have {header.size:,} by its header; copy it again")
    return header


def _config(numbers: list[int], tied: bool, path: Path) -> ModelConfig:
    """The model that seven numbers describe."""
    width, hidden, layers, heads, kv_heads, vocab_size, context = numbers
    try:
        if min(numbers) < 1:
            raise ValueError(f"{min(numbers)} is among them")
        return ModelConfig(
            width=width, mlp_width=hidden, layers=layers, heads=heads, kv_heads=0 if kv_heads == heads else kv_heads,
            vocab_size=vocab_size, context=context, tie_embeddings=tied,
        )  # fmt: skip
    except ValueError as error:
        told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UserError(
            f"{path} is not a model of llama2.c: its first numbers (width, MLP width, layers, heads, key/value heads,"
            f" vocabulary, context) are {numbers} ({told}); give the model.bin"
        ) from None


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every tensor, under GGUF's names; no model is made, however many layers a header asks for."""
    width, hidden, kept = config.width, config.hidden_width, config.key_value_heads * config.head_width
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (config.vocab_size, width), "output": (config.vocab_size, width),
        "attn_norm": (width,), "ffn_norm": (width,), "output_norm": (width,),
        "attn_q": (width, width), "attn_k": (kept, width), "attn_v": (kept, width), "attn_output": (width, width),
        "ffn_gate": (hidden, width), "ffn_down": (width, hidden), "ffn_up": (hidden, width),
    }  # fmt: skip
    order = FLOATS if config.tie_embeddings else (*FLOATS, "output")
    return {name: shapes[name.split(".")[-2]] for name in _in_order(order, config)}


class _Short(Exception):
    """A file ended before its time."""


def _read_floats(file: IO[bytes], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    shapes = _shapes(config)
    file.seek(HEADER_V0.size)
    for name in _in_order(FLOATS, config):
        yield name, _read(file, shapes[name])
    if not config.tie_embeddings:
        file.seek(4 * config.context * config.head_width, os.SEEK_CUR)  # the tables: RoPE is computed
        yield "output.weight", _read(file, shapes["output.weight"])


def _read_quantized(file: IO[bytes], header: Header) -> Iterator[tuple[str, Tensor]]:
    """Every matrix as value x scale."""
    shapes = _shapes(header.config)
    file.seek(V2_BYTES)
    for name in _in_order(NORMS, header.config):
        yield name, _read(file, shapes[name])
    for name in _in_order(_quantized(header.config), header.config):
        groups = math.prod(shapes[name]) // header.group
        values, scales = _read(file, (groups, header.group), "i1"), _read(file, (groups, 1))
        yield name, (values * scales).view(shapes[name])


def _read(file: IO[bytes], shape: tuple[int, ...], kind: str = "<f4") -> Tensor:
    """The next tensor, float32."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    data = file.read(size)
    if len(data) != size:
        raise _Short
    return torch.from_numpy(np.frombuffer(data, kind).astype(np.float32).reshape(shape))
