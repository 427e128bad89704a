"""One self-contained page: a .html file with int8 weights, a WebAssembly decoder and sliders, that tells stories offline.

The page's own parts lie in ``export/page/``: style, template, scripts, and ``decoder.wat``, the hot part of the model in
WebAssembly's text form, beside the ``decoder.wasm`` that is built from it. A written page holds them with two blocks of data:

    about   JSON: the model's settings and name, and where its tensors lie
    model   base64: the SentencePiece model, decoder.wasm and the tensors, each from a multiple of 64 bytes on

Matrices and the token embedding are int8 with a float32 scale for every 64 weights of a row, rounded as in
``native/decode.cpp``, and lie in panels of 16 rows: for each group 16 steps of (four rows x two weights, the next two weights
of these rows) x four, then 16 scales. Everything else is float32, vectors end in zeros up to a multiple of 16. Inputs are not
rounded: a page tells what `read` of it tells in float32. A page asks for nothing from any network, which its
Content-Security-Policy also forbids: only its own script may run, known by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from smalllm.checkpoint import LoadedRun, copy_weights, model_weights
from smalllm.config import ModelConfig, UserError
from smalllm.export.card import Card
from smalllm.export.destination import replacing
from smalllm.export.pieces import Kind, model_of, pieces_of
from smalllm.model import GPT
from smalllm.tokenizer import SPACE_MARK, Tokenizer

DTYPES = ("int8",)
GROUP, LANES, ALIGNMENT = 64, 16, 64
GROUP_BYTES = GROUP * LANES + 4 * LANES  # of a panel
MOST_BYTES = 300 << 20  # a browser's longest text is 512 MiB, and base64 makes it a third longer
MOST_MEMORY = 3 << 30  # WebAssembly has 4 GiB
MOST_ROTATIONS = 1 << 26  # of RoPE's tables, which a page asks for without holding them
ENGINE = ("tokenizer.js", "random.js", "sampler.js", "model.js", "engine.js")
BEGINNINGS = (
    "Once upon a time",
    "One day, a little rabbit",
    "It was raining, and",
    "“Look!” said",
    "Deep in the forest",
)
LONGEST_NAME = 120


# ── writing ──


def write(run: LoadedRun, out: Path, dtype: str = "int8", card: Card | None = None) -> None:
    """Write the page ``out``, whole or not at all, and read it back. UserError for a type other than int8, a model that no page
    can hold and a vocabulary that does more than merge."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} has no place in a page; use {DTYPES[0]}")
    name = card.name if card else run.folder.path.name
    page = page_of(run.model, run.tokenizer, name[:LONGEST_NAME], run.step)
    with replacing(out) as temporary:
        temporary.write_bytes(page)
        check(temporary, run.model, run.tokenizer)


def check(path: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """UserError unless a page holds this vocabulary and these weights, rounded, bit for bit."""
    found, words = read(path)
    weights = model_weights(found)
    wrong = ["the vocabulary"] if words.model_bytes != tokenizer.model_bytes else []
    for name, tensor in model_weights(model).items():
        numbers = _finite(name, tensor)
        expected = dequantize(*quantize(numbers), numbers.shape[1]) if _packed(name, numbers.shape) else numbers
        if not np.array_equal(weights[name].detach().numpy(), expected):
            wrong.append(name)
    if wrong:
        raise UserError(f"{path} was read back and differs in {wrong[0]}; check the disk, and export it again")


def page_of(model: GPT, tokenizer: Tokenizer, name: str, step: int) -> bytes:
    """The page of a model as UTF-8; the same model gives the same bytes."""
    _check_tokenizer(tokenizer)
    sections = _sections(model.config, len(tokenizer.model_bytes))
    size = sections[-1].end
    if size > MOST_BYTES or not _fits(model.config, size):
        raise UserError(
            f"a model of {model.parameters_count():,} parameters and a context of {model.config.context:,} is too large for"
            " a page in a browser; export to gguf instead"
        )
    about = {
        "name": name, "facts": f"{_compact(model.parameters_count())} parameters · step {step:,}",
        "beginnings": BEGINNINGS, "bytes": size, "model": model.config.model_dump(), "config": _settings(model.config),
        **{s.name: {"offset": s.offset, "size": s.size} for s in sections[:2]},
        "tensors": {s.name: {"offset": s.offset, "size": s.size} for s in sections[2:]},
    }  # fmt: skip
    return _filled(name, about, _payload(model, tokenizer, sections)).encode()


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    """UserError unless the page's merging of pieces gives the ids that this vocabulary gives."""
    pieces = pieces_of(tokenizer.model_bytes)
    merging = Tokenizer(model_of(pieces))
    probes = [
        *BEGINNINGS,
        " ".join(piece.text.replace(SPACE_MARK, " ") for piece in pieces if piece.kind == Kind.NORMAL),
    ]
    if any(piece.kind in (Kind.USER_DEFINED, Kind.UNUSED) for piece in pieces) or any(
        merging.encode(probe) != tokenizer.encode(probe) for probe in probes
    ):
        raise UserError("the tokenizer does more than merge pieces, which a page cannot; use one of `smalllm prepare`")


def _filled(name: str, about: dict[str, Any], payload: bytes) -> str:
    """The template with everything in its place, in one pass: what is put in is never searched."""
    style, script = _part("style.css"), _script()
    parts = {
        "title": html.escape(name), "style": style, "script": script, "policy": _policy(style, script),
        "about": json.dumps(about, ensure_ascii=True).replace("<", "\\u003c"), "model": base64.b64encode(payload).decode(),
    }  # fmt: skip
    return re.sub(r"\{(\w+)\}", lambda found: parts[found[1]], _part("template.html"))


def _policy(style: str, script: str) -> str:
    """Only this style and this script, WebAssembly, and a Worker made of the script's text; nothing from outside."""
    return (
        f"default-src 'none'; script-src '{_digest(script)}' 'wasm-unsafe-eval'; worker-src blob:;"
        f" style-src '{_digest(style)}'; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _script() -> str:
    """The page's script; the engine is one function, so that its text can become a Worker."""
    engine = "\n".join(map(_part, ENGINE))
    return f'"use strict";\nfunction engine(port) {{\n{engine}\nnew Engine(port);\n}}\n\n{_part("app.js")}'


def _part(name: str) -> str:
    return (resources.files("smalllm.export") / "page" / name).read_text(encoding="utf-8")


def decoder_bytes() -> bytes:
    """The WebAssembly module that is built from page/decoder.wat."""
    return (resources.files("smalllm.export") / "page" / "decoder.wasm").read_bytes()


def _settings(config: ModelConfig) -> dict[str, Any]:
    """What model.js wants to know."""
    return {
        "layers": config.layers, "width": config.width, "heads": config.heads, "kv_heads": config.key_value_heads,
        "head_width": config.head_width, "hidden_width": config.hidden_width, "vocab_size": config.vocab_size,
        "context": config.context, "positions": config.positions, "theta": config.theta, "qk_norm": config.qk_norm,
        "gated": config.activation == "swiglu", "centre": config.norm == "layernorm", "tied": config.tie_embeddings,
    }  # fmt: skip


def _compact(number: int) -> str:
    return f"{number / 1e6:.3g} million" if number >= 1e6 else f"{number:,}"


# ── the layout of the bytes ──


@dataclass(frozen=True)
class Section:
    """A part of the payload. ``rows`` and ``columns`` of a matrix in int8; without columns, numbers in float32."""

    name: str
    offset: int
    size: int
    shape: tuple[int, ...] = ()
    packed: bool = False

    @property
    def end(self) -> int:
        return self.offset + _up(self.size, ALIGNMENT)


def _sections(config: ModelConfig, tokenizer_bytes: int) -> list[Section]:
    """Where everything lies: a function of the settings."""
    sections = [Section("tokenizer", 0, tokenizer_bytes)]
    sections.append(Section("decoder", sections[-1].end, len(decoder_bytes())))
    for name, shape in _shapes(config):
        packed = _packed(name, shape)
        size = _packed_bytes(*shape) if packed else 4 * _up(int(np.prod(shape)), LANES)
        sections.append(Section(name, sections[-1].end, size, shape, packed))
    return sections


def _shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a model, a tied head left out."""
    with torch.device("meta"):
        weights = model_weights(GPT(config))
    yield from ((name, tuple(tensor.shape)) for name, tensor in weights.items())


def _packed(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name != "position_embedding.weight"


def _packed_bytes(outputs: int, inputs: int) -> int:
    return _up(outputs, LANES) // LANES * (_up(inputs, GROUP) // GROUP) * GROUP_BYTES


def _cache_bytes(config: ModelConfig) -> int:
    positions, width = _up(config.context, LANES), _up(config.head_width, LANES)
    return 8 * config.layers * config.key_value_heads * positions * width


def _fits(config: ModelConfig, size: int) -> bool:
    """Whether a browser has room for a model of so many bytes with its cache and tables."""
    return size + _cache_bytes(config) <= MOST_MEMORY and config.context * config.head_width <= MOST_ROTATIONS


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _payload(model: GPT, tokenizer: Tokenizer, sections: list[Section]) -> bytes:
    weights = model_weights(model)
    payload = bytearray(sections[-1].end)
    for section in sections:
        match section.name:
            case "tokenizer":
                data = tokenizer.model_bytes
            case "decoder":
                data = decoder_bytes()
            case name:
                numbers = _finite(name, weights[name])
                data = pack(numbers) if section.packed else numbers.astype("<f4").tobytes()
        payload[section.offset : section.offset + len(data)] = data
    return bytes(payload)


def _finite(name: str, tensor: Tensor) -> np.ndarray:
    numbers = tensor.detach().float().cpu().numpy()
    if not np.isfinite(numbers).all():
        raise UserError(f"the weights of {name} are not finite (NaN or infinity); export another checkpoint")
    return numbers


# ── int8 in panels ──


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers [O, G, 64] int8 and scales [O, G] float32 of a matrix [O, I]: as Matrix<int8_t>::pack in native/decode.cpp.

    >>> numbers, scales = quantize(np.array([[0.5, -1.0, 0.25]], np.float32))
    >>> numbers[0, 0, :4].tolist(), float(scales[0, 0] * 127)
    ([64, -127, 32, 0], 1.0)
    """
    outputs, inputs = weight.shape
    padded = np.zeros((outputs, _up(inputs, GROUP)), np.float32)
    padded[:, :inputs] = weight
    groups = padded.reshape(outputs, -1, GROUP)
    most = np.abs(groups).max(axis=2)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    numbers = np.rint(groups * inverse[:, :, None])
    return numbers.clip(-127, 127).astype(np.int8), most / np.float32(127)


def dequantize(numbers: np.ndarray, scales: np.ndarray, inputs: int) -> np.ndarray:
    """The matrix [O, I] that these stand for."""
    return (numbers * scales[:, :, None]).reshape(len(numbers), -1)[:, :inputs].astype(np.float32)


def pack(weight: np.ndarray) -> bytes:
    """A matrix [O, I] in the panels that decoder.wat reads."""
    numbers, scales = quantize(weight)
    outputs, groups, _ = numbers.shape
    rows = _up(outputs, LANES)
    numbers = np.concatenate([numbers, np.zeros((rows - outputs, groups, GROUP), np.int8)])
    scales = np.concatenate([scales, np.zeros((rows - outputs, groups), np.float32)])
    panels = numbers.reshape(-1, 4, 4, groups, 16, 2, 2).transpose(0, 3, 4, 1, 5, 2, 6)
    panels = np.ascontiguousarray(panels).reshape(-1, groups, GROUP * LANES).view(np.uint8)
    shares = np.ascontiguousarray(scales.reshape(-1, LANES, groups).transpose(0, 2, 1)).astype("<f4").view(np.uint8)
    return np.concatenate([panels, shares], axis=2).tobytes()


def unpack(data: bytes, outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [O, G, 64] and scales [O, G] of a matrix in panels."""
    groups = _up(inputs, GROUP) // GROUP
    panels = np.frombuffer(data, np.uint8).reshape(-1, groups, GROUP_BYTES)
    numbers = panels[:, :, : GROUP * LANES].copy().view(np.int8).reshape(-1, groups, 16, 4, 2, 4, 2)
    scales = panels[:, :, GROUP * LANES :].copy().view("<f4")
    numbers = numbers.transpose(0, 3, 5, 1, 2, 4, 6).reshape(-1, groups, GROUP)
    return numbers[:outputs], scales.transpose(0, 2, 1).reshape(-1, groups)[:outputs].astype(np.float32)


# ── reading ──


def read(path: Path) -> tuple[GPT, Tokenizer]:
    """The model and vocabulary of a page that `write` made, its matrices as the page rounds them. UserError for another file."""
    text = _text(path)
    try:
        about = json.loads(_block(text, "application/json", "about"))
        payload = base64.b64decode(_block(text, "text/plain", "model").rstrip("\n"), validate=True)
        config = ModelConfig(**about["model"])
        sections = _sections_of(about, config, payload)
        weights = {section.name: _tensor(section, payload) for section in sections[2:]}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)[:80]
        raise UserError(f"{path} is not a whole page of this version ({told}); export it again") from None
    words = Tokenizer(payload[: sections[0].size], str(path))
    if words.vocab_size > config.vocab_size:
        raise UserError(f"{path} has {words.vocab_size:,} pieces for {config.vocab_size:,} tokens; export it again")
    model = GPT(config)
    copy_weights(model, weights, str(path))
    return model.eval(), words


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():  # a pipe or a device could keep its reader waiting for ever
        raise UserError(f"{path} is not a file; give a page of `smalllm export --to html`")
    try:
        if path.stat().st_size > 2 * MOST_BYTES:
            raise UserError(f"{path} is larger than any page; give a page of `smalllm export --to html`")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path}: {reason}; give a page of `smalllm export --to html`") from None


def _block(text: str, kind: str, id: str) -> str:
    found = re.search(rf'<script type="{kind}" id="{id}">([^<]*)</script>', text)
    if found is None:
        raise ValueError(f"it has no {id}")
    return found[1]


def _sections_of(about: dict[str, Any], config: ModelConfig, payload: bytes) -> list[Section]:
    """The layout, which must be what the settings make it, and the size of the payload with it."""
    tokenizer_bytes = about["tokenizer"]["size"]
    if not isinstance(tokenizer_bytes, int) or not 0 < tokenizer_bytes <= len(payload):
        raise ValueError(f"its vocabulary has {tokenizer_bytes} bytes")
    least = config.layers * config.width * (config.width + config.hidden_width) + config.vocab_size * config.width
    if least > len(payload):  # before a model of such a size is made
        raise ValueError(f"it has {len(payload):,} bytes of weights, too few for its settings")
    if not _fits(config, len(payload)):
        raise ValueError("its context is too long")
    sections = _sections(config, tokenizer_bytes)
    if sections[-1].end != len(payload):
        raise ValueError(f"it has {len(payload):,} bytes of weights and must have {sections[-1].end:,}")
    return sections


def _tensor(section: Section, payload: bytes) -> Tensor:
    data = payload[section.offset : section.offset + section.size]
    if section.packed:
        numbers = dequantize(*unpack(data, *section.shape), section.shape[1])
    else:
        count = int(np.prod(section.shape))
        numbers = np.frombuffer(data, "<f4")[:count].reshape(section.shape).astype(np.float32)
    if not np.isfinite(numbers).all():
        raise ValueError(f"its {section.name} is not finite")
    return torch.from_numpy(numbers.copy())
