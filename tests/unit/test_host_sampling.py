"""Drawing tokens on the host: each rule against what it says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmill.types import SamplingParams
from promptmill_workers.engines.host_sampling import HostSampler, likeliest, log_sum

NOTHING = np.array([], dtype=np.int32)

#: Probabilities .5, .25, .15, .1
LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], dtype=np.float32))


def sampler(prompt: Any = NOTHING, **sampling: Any) -> HostSampler:
    return HostSampler(SamplingParams(**sampling), np.asarray(prompt, dtype=np.int32))


def drawn(count: int = 4000, **sampling: Any) -> dict[int, float]:
    """Shares of the tokens in many draws of one seeded stream."""
    one = sampler(**{"temperature": 1.0, "seed": 1, **sampling})
    found = Counter(one.draw(LOGITS, None) for _ in range(count))
    return {token: times / count for token, times in found.items()}


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_k": 2}, [0.5, 0.25]),
        ({"top_p": 0.7}, [0.5, 0.25]),
        ({"top_p": 0.0001}, [0.5]),
        ({"min_p": 0.29}, [0.5, 0.25, 0.15]),
        ({"min_p": 1.0}, [0.5]),
        # The mean surprise is 1.21 nats; 0.25 (1.39) is nearest, then 0.5 (0.69) and 0.15 (1.90).
        ({"typical_p": 0.2}, [0.0, 0.25]),
        ({"typical_p": 0.7}, [0.5, 0.25]),
        ({"temperature": 0.5}, [0.25, 0.0625, 0.0225, 0.01]),
        ({"temperature": 50.0}, [0.5**0.02, 0.25**0.02, 0.15**0.02, 0.1**0.02]),
    ],
)
def test_tokens_come_as_often_as_they_should(rule: dict[str, Any], kept: list[float]) -> None:
    shares = drawn(**rule)

    expected = np.array(kept) / sum(kept)
    for token, share in enumerate(expected):
        assert abs(shares.get(token, 0.0) - share) < 0.03
    assert all(token < len(kept) for token in shares)


def test_a_mask_leaves_the_likeliest_that_is_allowed() -> None:
    assert sampler().draw(LOGITS, np.array([1, 3])) == 1
    assert set(Counter(sampler(temperature=5.0).draw(LOGITS, np.array([2, 3])) for _ in range(99))) == {2, 3}


def test_penalties_are_of_the_answer_and_of_the_prompt() -> None:
    logits = np.array([2.0, 1.5, -1.0, -1.2], dtype=np.float32)
    frequent = sampler(frequency_penalty=0.3)
    for _ in range(2):
        frequent.saw(0)
    present = sampler(presence_penalty=0.6)
    present.saw(0)
    present.saw(0)

    assert frequent.draw(logits, None) == 1  # 2.0 - 2 x 0.3 < 1.5
    assert present.draw(logits, None) == 1  # 2.0 - 0.6 < 1.5
    assert sampler(prompt=[0], repetition_penalty=1.5).draw(logits, None) == 1  # 2.0 / 1.5 < 1.5
    unlikely = np.array([2, 3])
    assert sampler().draw(logits, unlikely) == 2
    assert sampler(prompt=[2], repetition_penalty=1.5).draw(logits, unlikely) == 3  # -1.0 x 1.5 < -1.2
    assert np.array_equal(logits, np.array([2.0, 1.5, -1.0, -1.2], dtype=np.float32))


def test_a_bias_is_added_and_unknown_tokens_are_nobody() -> None:
    assert sampler(logit_bias=((3, 5.0), (99, 50.0))).draw(LOGITS, None) == 3
    assert sampler(logit_bias=((0, -100.0),)).draw(LOGITS, None) == 1


@given(st.integers(0, 2**63), st.floats(0.1, 5.0), st.integers(0, 6), st.floats(0.05, 1.0), st.floats(0.0, 1.0))
@settings(max_examples=150, deadline=None)
def test_any_draw_repeats_with_its_seed(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    how: dict[str, Any] = {"seed": seed, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    logits = np.random.default_rng(seed % 1000).normal(size=50).astype(np.float32)

    first, second = sampler(**how), sampler(**how)

    assert [first.draw(logits, None) for _ in range(5)] == [second.draw(logits, None) for _ in range(5)]


def test_log_probabilities_add_up_and_the_likeliest_come_first() -> None:
    assert np.exp(LOGITS - log_sum(LOGITS)).sum() == pytest.approx(1.0)
    assert likeliest(LOGITS, 3) == [0, 1, 2]
    assert likeliest(LOGITS, 0) == []
    assert likeliest(np.zeros(5, dtype=np.float32), 5) == [0, 1, 2, 3, 4]
