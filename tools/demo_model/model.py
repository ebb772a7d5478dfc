"""The demo model: a small Llama in PyTorch, with the layout of weights that Hugging Face's checkpoints have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Keys and values of one layer, [batch, heads, length, head] each.
Past = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. ``width`` is heads x head size."""

    vocab: int
    layers: int = 4
    width: int = 192
    heads: int = 6
    ffn: int = 480
    context: int = 2048
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head(self) -> int:
        return self.width // self.heads


def rope(shape: Shape, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, [length, head]: the halves of a head rotate together."""
    frequency = shape.rope_base ** (-torch.arange(0, shape.head, 2) / shape.head)
    angle = torch.outer(torch.arange(start, start + length), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Layer(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        self.input_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.q_proj, self.k_proj = linear(shape.width, shape.width), linear(shape.width, shape.width)
        self.v_proj, self.o_proj = linear(shape.width, shape.width), linear(shape.width, shape.width)
        self.gate_proj, self.up_proj = linear(shape.width, shape.ffn), linear(shape.width, shape.ffn)
        self.down_proj = linear(shape.ffn, shape.width)

    def forward(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """Hidden states [batch, length, width] after the tokens of ``past``, and the keys and values of all."""
        attended, keys = self._attend(self.input_layernorm(x), past)
        x = x + F.dropout(attended, self.dropout, self.training)
        h = self.post_attention_layernorm(x)
        h = self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))
        return x + F.dropout(h, self.dropout, self.training), keys

    def _attend(self, h: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        batch, length, width = h.shape
        before = past[0].shape[2] if past else 0
        cos, sin = rope(self.shape, before, length)
        q, k, v = (
            proj(h).view(batch, length, self.shape.heads, self.shape.head).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if past:
            k = torch.cat([past[0].expand(batch, -1, -1, -1), k], dim=2)
            v = torch.cat([past[1].expand(batch, -1, -1, -1), v], dim=2)
        mask = torch.ones(length, before + length, dtype=torch.bool).tril(before)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, width))
        return projected, (k, v)


class DemoModel(nn.Module):
    """Token ids -> logits of the next token. Input and output embeddings are one matrix."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        self.embed_tokens = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, prefix: Tensor | None, wanted: Tensor) -> Tensor:
        """Logits [n, vocab] where ``wanted`` [batch, length] is true, for ``ids`` [batch, length].

        ``prefix`` [1, length] stands before every row and is computed once for all of them.
        """
        past: list[Past | None] = [None] * len(self.layers)
        if prefix is not None:
            past = list(self._hidden(prefix, past)[1])
        return F.linear(self.norm(self._hidden(ids, past)[0][wanted]), self.embed_tokens.weight)

    def _hidden(self, ids: Tensor, past: list[Past | None]) -> tuple[Tensor, list[Past]]:
        x = F.dropout(self.embed_tokens(ids), self.dropout, self.training)
        keys: list[Past] = []
        for layer, before in zip(self.layers, past, strict=True):
            x, both = layer(x, before)
            keys.append(both)
        return x, keys
