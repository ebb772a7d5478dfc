"""Drawing a token from logits on the host, for requests whose next token the device cannot draw by itself."""

from __future__ import annotations

import secrets
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from promptmill.types import SamplingParams

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]


class HostSampler:
    """Penalties, bias, mask, top-k, typical, top-p, min-p, temperature, seed: in this order, as in llama.cpp."""

    def __init__(self, sampling: SamplingParams, prompt: NDArray[np.int32]) -> None:
        self._sampling = sampling
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._random = np.random.Generator(np.random.PCG64(seed % 2**64))
        self._counts: Counter[int] = Counter()
        # The repetition penalty knows the prompt too (Keskar et al. 2019); the other two only the answer, as OpenAI's.
        self._prompt = np.unique(prompt) if sampling.repetition_penalty != 1 else None

    def saw(self, token: int) -> None:
        """The answer holds ``token``, drawn here or forced."""
        self._counts[token] += 1

    def draw(self, logits: Logits, allowed: Ids | None) -> int:
        """``logits`` of the whole vocabulary, left as they are; ``allowed`` token ids, all where None."""
        scores = self._adjusted(logits)
        if allowed is not None:
            scores = scores[allowed]
        index = int(scores.argmax()) if self._sampling.is_greedy else self._drawn(scores)
        return index if allowed is None else int(allowed[index])

    def _adjusted(self, logits: Logits) -> Logits:
        asked = self._sampling
        seen = np.fromiter(self._counts, dtype=np.int64, count=len(self._counts))
        penalised = len(seen) and (asked.presence_penalty or asked.frequency_penalty)
        if self._prompt is None and not penalised and not asked.logit_bias:
            return logits
        scores = logits.copy()
        if self._prompt is not None:
            known = np.union1d(self._prompt, seen)
            values = scores[known]
            factor = asked.repetition_penalty
            scores[known] = np.where(values > 0, values / factor, values * factor)
        if penalised:
            times = np.fromiter(self._counts.values(), dtype=np.float32, count=len(self._counts))
            scores[seen] -= asked.presence_penalty + asked.frequency_penalty * times
        for token, amount in asked.logit_bias:
            if token < len(scores):
                scores[token] += amount
        return scores

    def _drawn(self, scores: Logits) -> int:
        asked = self._sampling
        # Likeliest first, and by id where equal: the draw below must not depend on how a sort breaks ties.
        if 0 < asked.top_k < len(scores):
            kept = np.argpartition(-scores, asked.top_k - 1)[: asked.top_k]
            order = kept[np.lexsort((kept, -scores[kept]))]
        else:
            order = np.argsort(-scores, kind="stable")
        values = scores[order].astype(np.float64)
        chances = softmax(values)
        keep = chances > 0
        if asked.typical_p < 1:
            keep &= _typical(chances, asked.typical_p)
        if asked.top_p < 1:
            keep &= np.cumsum(chances) - chances < asked.top_p
        if asked.min_p > 0:
            keep &= chances >= asked.min_p * chances[0]
        keep[0] |= not keep.any()
        order, values = order[keep], values[keep]
        edges = np.cumsum(softmax(values / asked.temperature))
        drawn = min(int(np.searchsorted(edges, self._random.random() * edges[-1], side="right")), len(order) - 1)
        return int(order[drawn])


def softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(values - values.max())
    return np.asarray(powers / powers.sum())


def _typical(chances: NDArray[np.float64], mass: float) -> NDArray[np.bool_]:
    """The tokens whose surprise is nearest to its mean, up to ``mass`` of probability (Meister et al. 2022)."""
    surprise = -np.log(np.maximum(chances, 1e-300))
    order = np.argsort(np.abs(surprise - (chances * surprise).sum()), kind="stable")
    before = np.cumsum(chances[order]) - chances[order]
    keep = np.zeros(len(chances), dtype=bool)
    keep[order[before < mass]] = True
    return keep


def log_sum(logits: Logits) -> float:
    """Log of the sum of the exponentials: a logit minus this is a log-probability in nats."""
    highest = logits.max()
    return float(highest + np.log(np.exp(logits - highest).sum(dtype=np.float64)))


def likeliest(logits: Logits, count: int) -> list[int]:
    """The ``count`` token ids of the highest logits, highest first."""
    if count <= 0:
        return []
    kept: NDArray[Any] = np.argpartition(-logits, min(count, len(logits)) - 1)[:count]
    return [int(each) for each in kept[np.lexsort((kept, -logits[kept]))]]
