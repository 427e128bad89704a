"""A model as a GGUF file, which llama.cpp reads. Its llama computes RoPE on neighbouring pairs and not on halves, so the
rows of query and key are put in that order; the other architectures here keep ours."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import gguf
import sentencepiece
import torch
from gguf.quants import quantize
from torch import Tensor

from peers.models import parts
from smalllm.config import ModelConfig, UserError
from smalllm.model import GPT, NORM_EPS
from smalllm.tokenizer import UNK, Tokenizer

Precision = Literal["f32", "f16", "bf16", "q8_0"]
ARCHITECTURES = ("llama", "qwen3", "starcoder2")
TENSORS = {
    "blocks": "blk", "attention_norm": "attn_norm", "mlp_norm": "ffn_norm", "query": "attn_q", "key": "attn_k",
    "value": "attn_v", "out": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate": "ffn_gate",
    "up": "ffn_up", "down": "ffn_down", "embedding": "token_embd", "norm": "output_norm", "head": "output",
}  # fmt: skip
"""Their name of each part of ours; a layer's ``attention`` and ``mlp`` are not named."""


def write_gguf(path: Path, model: GPT, tokenizer: Tokenizer, precision: Precision) -> Path:
    """Write the file; matrices in this precision, the rest in float32, as llama.cpp's own converter does."""
    if model.config.architecture not in ARCHITECTURES:
        raise UserError(f"a model of architecture {model.config.architecture} is not written here; leave llama.cpp out")
    if precision == "q8_0" and (model.config.width % 32 or model.config.hidden_width % 32):
        raise UserError("q8_0 needs widths that 32 divides; leave it out")
    writer = gguf.GGUFWriter(path, model.config.architecture)
    add_shape(writer, model.config)
    add_vocabulary(writer, tokenizer)
    for name, tensor in gguf_tensors(model).items():
        kind = precision if tensor.dim() == 2 else "f32"
        quantization = gguf.GGMLQuantizationType[kind.upper()]
        writer.add_tensor(name, quantize(tensor.numpy(), quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_shape(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """The numbers that describe the model."""
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.hidden_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.key_value_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.theta)
    writer.add_vocab_size(config.vocab_size)
    if config.norm == "rmsnorm":
        writer.add_layer_norm_rms_eps(NORM_EPS)
    else:
        writer.add_layer_norm_eps(NORM_EPS)


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    """The pieces with their kinds and their scores."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    ids = range(tokenizer.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(id) for id in ids])
    writer.add_token_scores([pieces.get_score(id) for id in ids])
    writer.add_token_types([kind_of(pieces, id) for id in ids])
    writer.add_unk_token_id(UNK)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def kind_of(pieces: sentencepiece.SentencePieceProcessor, id: int) -> gguf.TokenType:
    """What a piece is."""
    if pieces.is_unknown(id):
        return gguf.TokenType.UNKNOWN
    if pieces.is_control(id):
        return gguf.TokenType.CONTROL
    if pieces.is_unused(id):
        return gguf.TokenType.UNUSED
    return gguf.TokenType.BYTE if pieces.is_byte(id) else gguf.TokenType.NORMAL


def gguf_tensors(model: GPT) -> dict[str, Tensor]:
    """Our weights in float32 under the names and in the order of rows of llama.cpp."""
    config = model.config
    heads = {"query": config.heads, "key": config.key_value_heads} if config.architecture == "llama" else {}
    found = {}
    for name, tensor in parts(model).items():
        own = name.split(".")
        theirs = ".".join(TENSORS.get(part, part) for part in own if part not in ("attention", "mlp"))
        tensor = tensor.detach().float().cpu().contiguous()
        found[theirs] = pairs_of(tensor, heads[own[-2]]) if own[-2] in heads else tensor
    if config.architecture == "starcoder2":  # which always has biases
        for name in [name for name in found if name.startswith(("blk", "output_norm")) and name.endswith("weight")]:
            found.setdefault(name.replace("weight", "bias"), torch.zeros(len(found[name])))
    return found


def pairs_of(matrix: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order 0, D/2, 1, D/2 + 1, ...: pairs for RoPE become neighbours."""
    return matrix.view(heads, 2, -1, *matrix.shape[1:]).transpose(1, 2).reshape(matrix.shape).contiguous()
