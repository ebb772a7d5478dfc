"""The demo model: a small Llama in PyTorch, with the layout of weights that Hugging Face's checkpoints have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


def rope(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, [length, head]: the halves of a head rotate together."""
    frequency = shape.rope_base ** (-torch.arange(0, shape.head, 2) / shape.head)
    angle = torch.outer(torch.arange(length), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Layer(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        linear = lambda a, b: nn.Linear(a, b, bias=False)  # noqa: E731
        self.input_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.q_proj, self.k_proj = linear(shape.width, shape.width), linear(shape.width, shape.width)
        self.v_proj, self.o_proj = linear(shape.width, shape.width), linear(shape.width, shape.width)
        self.gate_proj, self.up_proj = linear(shape.width, shape.ffn), linear(shape.width, shape.ffn)
        self.down_proj = linear(shape.ffn, shape.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = lambda t: t.view(batch, length, self.shape.heads, self.shape.head).transpose(1, 2)  # noqa: E731
        h = self.input_layernorm(x)
        q, k = rotate(heads(self.q_proj(h)), cos, sin), rotate(heads(self.k_proj(h)), cos, sin)
        attended = F.scaled_dot_product_attention(q, k, heads(self.v_proj(h)), is_causal=True)
        attended = self.o_proj(attended.transpose(1, 2).reshape(batch, length, width))
        x = x + F.dropout(attended, self.dropout, self.training)
        h = self.post_attention_layernorm(x)
        return x + F.dropout(self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h)), self.dropout, self.training)


class DemoModel(nn.Module):
    """Token ids [batch, length] -> logits [batch, length, vocab]. Input and output embeddings are one matrix."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        cos, sin = rope(self.shape, ids.shape[1])
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)
