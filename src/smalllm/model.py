"""A decoder-only GPT in one file: norms, positions, cache, attention, MLP, block, GPT.

Pre-norm transformer with RoPE or learned positions, RMSNorm or LayerNorm, SwiGLU or GELU, optional QK-norm and
grouped key/value heads (Vaswani 2017, Radford 2019, Su 2021, Zhang & Sennrich 2019, Shazeer 2020, Ainslie 2023,
Henry 2020). The file knows nothing about text, devices, precision or training; shapes stand at the ends of lines:
B batch, T positions, C width, H heads, G key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from smalllm.config import ModelConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask  # half a second to import

Visible: TypeAlias = "Tensor | BlockMask | None"
NORM_EPS = 1e-5


# ── norms ──


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) over the last dimension."""
    match config.norm:
        case "rmsnorm":
            return nn.RMSNorm(width, eps=NORM_EPS)
        case "layernorm":
            return nn.LayerNorm(width, eps=NORM_EPS, bias=config.bias)


# ── positions ──


def rope_tables(context: int, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x frequency, each [context, head_width / 2], float32 (Su et al., arXiv 2104.09864)."""
    frequencies = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.outer(torch.arange(context, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, T, D] by cos and sin, [T, D/2] or [B, 1, T, D/2]: the half-split form of transformers."""
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


# ── cache ──


class KVCache:
    """Keys and values of the positions seen so far, for every layer and row: two tensors [layers, B, G, capacity, D].

    Rows may be filled to different lengths, and ``at`` continues some of them from any length: what lies beyond a row's
    length is masked and overwritten, so that right-padded prompts need no care. ``extent`` is the greatest length, a
    plain number, so that reading it never waits for a device.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.capacity = min(capacity or config.context, config.context)
        shape = (config.layers, batch, config.key_value_heads, self.capacity, config.head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.rows, self._whole = torch.arange(batch, device=device), True
        self.lengths = torch.zeros(batch, device=device, dtype=torch.long)
        self.extent = 0

    def at(self, rows: Sequence[int], lengths: Sequence[int]) -> KVCache:
        """The same memory as a batch of some of its rows, which hold so many positions."""
        chosen = copy(self)
        chosen.rows = torch.tensor(rows, device=self.rows.device)
        chosen._whole = list(rows) == list(range(self.keys.shape[1]))
        chosen.lengths = torch.tensor(lengths, device=self.rows.device)
        chosen.extent = max(lengths)
        return chosen

    def positions(self, new: int) -> Tensor:
        """Positions [B, T] that the next ``new`` tokens of each row take."""
        return self.lengths[:, None] + torch.arange(new, device=self.lengths.device)

    def advance(self, new: int) -> None:
        self.lengths = self.lengths + new
        self.extent += new

    def write(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, G, T, D] at positions [B, T]; returns all of them up to the extent."""
        rows, end = self.rows[:, None], self.extent + positions.shape[1]
        self.keys[layer][rows, :, positions] = keys.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][rows, :, positions] = values.transpose(1, 2).to(self.values.dtype)
        if self._whole:  # a view, no copy
            return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        return self.keys[layer][self.rows, :, :end], self.values[layer][self.rows, :, :end]


# ── attention ──


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads; query, key and value are one matrix."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.heads, self.kv_heads, self.head_width = config.heads, config.key_value_heads, config.head_width
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)
        self.q_norm = make_norm(config, self.head_width) if config.qk_norm else None
        self.k_norm = make_norm(config, self.head_width) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        visible: Visible = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.project(x, rope)
        if cache is not None and positions is not None:
            fresh = cache.extent == 0
            keys, values = cache.write(self.layer, positions, k, v)
            if not fresh:
                k, v, visible = keys, values, _visible(positions, keys.shape[2])
        y = self.attend(q, k, v, visible)
        return F.dropout(self.out(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, D], keys and values [B, G, T, D], normed and rotated."""
        B, T, _ = x.shape
        groups = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = self.qkv(x).view(B, T, -1, self.head_width).transpose(1, 2).split(groups, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q.float()).to(v.dtype), self.k_norm(k.float()).to(v.dtype)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        return q, k, v

    @torch.no_grad()
    def start_as_copier(self, scale: float) -> None:
        """Let the output projection undo the values, times ``scale``: attention adds what it attended to."""
        width, repeats = self.head_width, self.heads // self.kv_heads
        values = self.qkv.weight[-self.kv_heads * width :].view(self.kv_heads, width, -1)
        copied = values.repeat_interleave(repeats, dim=0) / repeats
        self.out.weight.copy_(scale * copied.flatten(0, 1).T)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        """softmax(q k' / sqrt(D)) v, causal where ``visible`` (a mask [B, 1, T, keys], or its blocks) is None."""
        k, v = k.to(q.dtype), v.to(q.dtype)
        if self.heads != self.kv_heads:
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        if visible is not None and not isinstance(visible, Tensor):
            from torch.nn.attention.flex_attention import flex_attention

            return flex_attention(q, k, v, block_mask=visible)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=visible is None)


def _visible(positions: Tensor, keys: int, starts: Tensor | None = None) -> Tensor:
    """Which keys a query at a position [B, T] may see: [B, 1, T, keys], true up to and including its own position, from
    its start on."""
    key = torch.arange(keys, device=positions.device)
    seen = key <= positions[:, :, None]
    return (seen if starts is None else seen & (key >= starts[:, :, None]))[:, None]


def _visible_blocks(starts: Tensor) -> BlockMask:
    """The same for whole rows, in blocks that FlexAttention skips when nothing in them is seen (Dong et al., arXiv
    2412.05496)."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[batch, query])

    return create_block_mask(sees, starts.shape[0], None, starts.shape[1], starts.shape[1], device=str(starts.device))


# ── MLP ──


class MLP(nn.Module):
    """GELU (tanh form) or SwiGLU; the gate and the value of SwiGLU are one matrix, gate first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated, self.dropout = config.activation == "swiglu", config.dropout
        self.up = nn.Linear(config.width, config.hidden_width * (2 if self.gated else 1), bias=config.bias)
        self.down = nn.Linear(config.hidden_width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, value = self.up(x).chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(self.up(x), approximate="tanh")
        return F.dropout(self.down(hidden), self.dropout, self.training)


# ── block ──


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [B, T, C] -> [B, T, C]."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.width)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        visible: Visible = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, visible, cache, positions)
        return x + self.mlp(self.mlp_norm(x))


# ── GPT ──


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Not drawn yet; `initialize` does that."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


Fused = Callable[["GPT", Tensor, Tensor | None], Tensor]
"""The blocks and the last norm in one, faster: (model, x [B, T, C], starts) -> [B, T, C]. Set by runtime."""


class GPT(nn.Module):
    """ids [B, T] -> logits [B, T, V]. Weights are drawn from torch's default generator: seed it first."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size > 0, "vocab_size is taken from the data before the model is made"
        self.config = config
        self.recompute = False
        self.fused: Fused | None = None
        self.flex = False  # documents apart by FlexAttention: fast when compiled for a GPU
        self.embedding = _embedding(config.vocab_size, config.width)
        self.position_embedding = _embedding(config.context, config.width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = make_norm(config, config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.tie()
        if not self.embedding.weight.is_meta:  # there, arithmetic makes torch load a second's worth of modules
            self.rebuild_tables()
            self.initialize()

    def tie(self) -> None:
        """Let the head read the embedding (again after weights were assigned from outside)."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def rebuild_tables(self) -> None:
        """Compute what is not a weight: the RoPE tables (again after a model was made on the meta device)."""
        if self.config.positions == "rope":
            cos, sin = rope_tables(self.config.context, self.config.head_width, self.config.theta)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def initialize(self) -> None:
        """Weights from which copying is learned at once (measured in docs/log.md).

        Every attention head starts as a copier: its output projection undoes its values (mimetic initialization, Trockman
        & Kolter, arXiv 2305.09828), and the head reads back what the embedding wrote, so that a token which is attended
        to becomes more likely. MLPs start at zero (Fixup, Zhang et al., arXiv 1901.09321). An untied embedding has unit
        scale: tokens stay readable in the residual stream beside what the blocks add. The first loss is near ln(vocab).
        """
        config = self.config
        scale = min(0.02, 4.0 / config.width) if config.tie_embeddings else 1.0
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=config.width**-0.5)
            if parameter.dim() == 1:
                nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.ones_(parameter)
            elif name.endswith("mlp.down.weight"):
                nn.init.zeros_(parameter)
        nn.init.normal_(self.embedding.weight, std=scale)
        if self.position_embedding is not None:
            nn.init.normal_(self.position_embedding.weight, std=0.02 if config.tie_embeddings else 0.3)
        if not config.tie_embeddings:
            logit = math.log(max(2.0, config.vocab_size / 64))  # of a token for itself: adds 1/64 to the first loss
            self.head.weight.copy_(self.embedding.weight * logit / config.width)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention.start_as_copier(scale)

    def hidden(self, ids: Tensor, cache: KVCache | None = None, starts: Tensor | None = None) -> Tensor:
        """The normed residual stream [B, T, C] that the head reads. With a cache, ids continue what it holds. ``starts``
        [B, T], int32, not decreasing in a row, says where each position's document begins: it sees nothing before."""
        if cache is None:
            positions, where = None, torch.arange(ids.shape[1], device=ids.device)
            end = ids.shape[1]
        else:
            positions = where = cache.positions(ids.shape[1])
            end = cache.extent + ids.shape[1]
        if end > (cache.capacity if cache else self.config.context):
            raise ValueError(
                f"{end} positions do not fit into a context of {cache.capacity if cache else self.config.context}"
            )
        x = self.embedding(ids)
        inside = where if starts is None else where - starts
        if self.position_embedding is not None:
            x = x + self.position_embedding(inside)
        x = F.dropout(x, self.config.dropout, self.training)
        if self.fused is not None and cache is None:
            return self.fused(self, x, starts)
        rope = self._rope(inside)
        visible: Visible = None
        if starts is not None:
            visible = _visible_blocks(starts) if self.flex else _visible(where.expand(ids.shape), ids.shape[1], starts)
        for block in self.blocks:
            if self.recompute and self.training:
                x = checkpoint(block, x, rope, visible, use_reentrant=False)
            else:
                x = block(x, rope, visible, cache, positions)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.norm(x)

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.config.positions != "rope":
            return None
        cos, sin = self.cos[positions], self.sin[positions]
        return (cos, sin) if positions.dim() == 1 else (cos[:, None], sin[:, None])

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.head(self.hidden(ids, cache))

    # sizes and costs

    def parameters_count(self) -> int:
        """Parameters, a tied matrix counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def embedding_parameters(self) -> int:
        """Parameters of the token and position embeddings and of an untied head: the rest is the body."""
        own = ("embedding.", "position_embedding.", "head.")
        return sum(parameter.numel() for name, parameter in self.named_parameters() if name.startswith(own))

    def flops_per_token(self, context: int | None = None) -> int:
        """Floating-point operations of a training step per token: 6 per weight that multiplies (the head included,
        look-ups not) plus causal attention, 6 x layers x width x context (PaLM, arXiv 2204.02311, appendix B, halved)."""
        body = self.parameters_count() - self.embedding_parameters() + self.head.weight.numel()
        return 6 * body + 6 * self.config.layers * self.config.width * (context or self.config.context)
