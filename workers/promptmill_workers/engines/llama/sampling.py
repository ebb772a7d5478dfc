"""Samplers of llama.cpp: what draws a token from logits, in its compute graph or beside it."""

from __future__ import annotations

from typing import Any

import llama_cpp

from promptmill.types import SamplingParams

#: Everything of the sampling parameters but the seed: samplers of one shape can be reused. None: the logits come to the
#: host, and no sampler runs in the graph.
Shape = tuple[float, int, float, float] | None

GREEDY = (0.0, 0, 1.0, 0.0)

#: A min_p from here on leaves the likeliest token alone.
LARGEST_MIN_P = 0.9999


def shape_of(sampling: SamplingParams) -> Shape:
    """How a sampler in the graph draws for these parameters."""
    # The samplers of the graph keep what is likelier than the bound: at a min_p of 1 that would be nothing.
    if sampling.temperature <= 0 or sampling.top_k == 1 or sampling.min_p >= LARGEST_MIN_P:
        return GREEDY
    return (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)


#: The top-k of the graph leaves its tokens in any order, that of the host likeliest first, and a draw depends on it. A
#: top-p orders them, and this one takes away what has a probability of 1e-7.
ORDERING_TOP_P = 0.9999999


def make_sampler(shape: Shape, seed: int) -> Any:
    """A chain with a random stream of its own."""
    if shape is None:
        return None
    temperature, top_k, top_p, min_p = shape
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    if shape == GREEDY:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
        return chain
    if top_k > 0:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_k(top_k))
    if top_p < 1.0 or top_k > 0:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_p(min(top_p, ORDERING_TOP_P), 1))
    if min_p > 0.0:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_min_p(min_p, 1))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(temperature))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(_in_32_bits(seed)))
    return chain


def _in_32_bits(seed: int) -> int:
    """A seed of 64 bits as llama.cpp takes it. Its largest one means "draw one" there.

    Neighbours stay different: the high half of a product with an odd constant (Fibonacci hashing, Knuth 6.4).
    """
    if not 0 <= seed < llama_cpp.LLAMA_DEFAULT_SEED:
        seed = (seed * 0x9E3779B97F4A7C15) % 2**64 >> 32
    return int(min(seed, llama_cpp.LLAMA_DEFAULT_SEED - 1))
