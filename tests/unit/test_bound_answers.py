"""A bound answer that is finished keeps to what binds it, whatever a model would say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from promptmill.tasks.grammars import grammar_problem
from promptmill.types import FinishReason, SamplingParams
from promptmill_workers.engines.answer import Generation, Tools
from promptmill_workers.engines.constraint import Grammars
from promptmill_workers.engines.contract import GrammarError
from promptmill_workers.engines.llama.binding import LlamaModel
from promptmill_workers.engines.llama.text import LlamaAnswerText
from tests.unit.tiny_models import write_tiny_gguf

#: Most tokens of an answer: some end before they are complete.
LIMIT = 120

NAMES = st.sampled_from(["a", "b", "ad", "score"])


def _object(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects whose keys are named, or match a pattern, or both: rules that may contradict one another."""
    return st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(NAMES, inner, max_size=3)},
        optional={
            "required": st.lists(NAMES, max_size=2, unique=True),
            "additionalProperties": st.booleans(),
            "patternProperties": st.dictionaries(st.sampled_from(["^a$", "^score$", "^s"]), inner, max_size=1),
            "minProperties": st.integers(0, 2),
            "maxProperties": st.integers(1, 3),
        },
    )


LEAVES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("integer")},
        optional={"minimum": st.integers(-9, 9), "maximum": st.integers(-9, 99), "multipleOf": st.integers(1, 7)},
    ),
    st.fixed_dictionaries(
        {"type": st.just("string")},
        optional={
            "minLength": st.integers(0, 3),
            "maxLength": st.integers(0, 6),
            "pattern": st.sampled_from(["^[ab]+$", "x", "^(ad|not ad)$"]),
        },
    ),
    st.builds(lambda each: {"enum": each}, st.lists(st.sampled_from(["yes", "no", 1, None, "广告"]), min_size=1)),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": "ad"}]),
)

SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        _object(inner),
        st.fixed_dictionaries(
            {"type": st.just("array"), "items": inner},
            optional={"minItems": st.integers(0, 2), "maxItems": st.integers(0, 3)},
        ),
        st.builds(lambda each: {"anyOf": each}, st.lists(inner, min_size=1, max_size=2)),
        st.builds(lambda each: {"allOf": each}, st.lists(inner, min_size=1, max_size=2)),
    ),
    max_leaves=5,
)


#: Of these two rules for one key llguidance lets a comma follow the number, and then nothing.
DEAD_END: dict[str, Any] = {
    "type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"],
    "patternProperties": {"^score$": {"type": "integer"}}, "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tools]:
    """What answers are written with, of a model without weights."""
    model = LlamaModel(write_tiny_gguf(tmp_path_factory.mktemp("bound") / "tiny.gguf"), vocab_only=True)
    words = model.vocabulary
    yield Tools(
        ends=words.ends,
        piece=words.piece,
        tokens=lambda text: words.tokens(text, parse_special=True, start=False).tolist(),
        text=lambda stops: LlamaAnswerText(words.piece, stops),
        grammars=Grammars(words.constraint_tokenizer, words.size),
    )
    model.close()


def drawn(tools: Tools, sampling: SamplingParams, vocabulary: int) -> tuple[str, FinishReason]:
    """The answer of a model that knows nothing. Raises GrammarError."""
    random = np.random.default_rng(sampling.seed)
    answer = Generation(tools, sampling, np.zeros(1, np.int32), LIMIT)
    reason = None
    while reason is None:
        reason = answer.take(answer.draw(random.normal(0, 2, vocabulary).astype(np.float32)))
        for token in answer.forced() if reason is None else ():
            reason = answer.take(token)
            if reason is not None:
                break
    return answer.finish(reason)[:2]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
@example(schema=DEAD_END, seed=0)
@example(schema=DEAD_END, seed=1)
@example(schema=DEAD_END, seed=2)
def test_a_finished_answer_is_json_of_its_schema(tools: Tools, schema: dict[str, Any], seed: int) -> None:
    text = json.dumps(schema)
    if grammar_problem("json_schema", text):
        return
    sampling = SamplingParams(json_schema=text, temperature=1.5, seed=seed)

    try:
        said, reason = drawn(tools, sampling, tools.grammars.vocabulary)
    except GrammarError:
        return

    if reason is FinishReason.STOP:
        jsonschema.validate(json.loads(said), schema)


def test_a_dead_end_is_told_without_the_answer(tools: Tools) -> None:
    failures = []
    for seed in range(40):
        sampling = SamplingParams(json_schema=json.dumps(DEAD_END), temperature=1.5, seed=seed)
        try:
            said, reason = drawn(tools, sampling, tools.grammars.vocabulary)
        except GrammarError as problem:
            failures.append(problem.message)
        else:
            assert reason is FinishReason.LENGTH or set(json.loads(said)) == {"score"}

    assert set(failures) == {"the grammar came to a dead end: nothing may follow what is written"}
