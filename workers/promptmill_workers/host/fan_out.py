"""A request that takes several sequences: several answers, a choice among texts, texts that are scored."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from promptmill.types import EngineCounters, Extras, FinishReason, SamplingParams, Usage
from promptmill_workers.engines.contract import (
    Engine,
    EngineRequest,
    EngineWrapper,
    Event,
    Finished,
    Rejected,
    RequestKey,
    TokenEvent,
)


@dataclass(slots=True, eq=False)
class Split:
    """A request in parts, each a sequence of its own."""

    request: EngineRequest
    parts: list[RequestKey]
    finished: dict[RequestKey, Finished] = field(default_factory=dict)


class FanOut(EngineWrapper):
    """Gives the engine the parts of a request, and its caller the whole answer."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        # Parts have keys below zero, which no caller uses.
        self._next_part = -1
        self._groups: dict[RequestKey, Split] = {}
        self._group_of: dict[RequestKey, Split] = {}
        self._wasted = 0

    @property
    def counters(self) -> EngineCounters:
        counters = self._engine.counters
        return replace(counters, wasted_tokens=counters.wasted_tokens + self._wasted) if self._wasted else counters

    def waiting_keys(self) -> Collection[RequestKey]:
        waiting = set(self._engine.waiting_keys())
        whole = {key for key, group in self._groups.items() if waiting.issuperset(group.parts)}
        return {key for key in waiting if key >= 0} | whole

    def add(self, requests: Sequence[EngineRequest]) -> None:
        self._engine.add([part for request in requests for part in self._split(request)])

    def step(self) -> Sequence[Event]:
        events: list[Event] = []
        for event in self._engine.step():
            group = self._group_of.get(event.key)
            whole = event if group is None else self._collect(group, event)
            if whole is not None:
                events.append(whole)
        return events

    def cancel(self, key: RequestKey) -> None:
        group = self._groups.get(key)
        if group is None:
            self._engine.cancel(key)
        else:
            self._dissolve(group)

    def _split(self, request: EngineRequest) -> list[EngineRequest]:
        """The request, or its parts."""
        parts = _parts(request)
        if not parts:
            return [request]
        keys = [self._next_part - number for number in range(len(parts))]
        self._next_part -= len(parts)
        group = self._groups[request.key] = Split(request, keys)
        self._group_of.update(dict.fromkeys(keys, group))
        return [replace(part, key=key) for part, key in zip(parts, keys, strict=True)]

    def _collect(self, group: Split, event: Event) -> Event | None:
        """What a part's event means for the request."""
        key = group.request.key
        match event:
            case TokenEvent():
                return replace(event, key=key, index=group.parts.index(event.key))
            case Finished():
                group.finished[event.key] = event
                if len(group.finished) < len(group.parts):
                    return None
                self._forget(group)
                return _whole(group)
            case Rejected():
                self._dissolve(group)
                return replace(event, key=key)

    def _dissolve(self, group: Split) -> None:
        """End every part; what they have generated is in no answer."""
        for part in group.parts:
            if part not in group.finished:
                self._engine.cancel(part)
        self._wasted += sum(each.usage.output_tokens for each in group.finished.values())
        self._forget(group)

    def _forget(self, group: Split) -> None:
        del self._groups[group.request.key]
        for part in group.parts:
            del self._group_of[part]


def _parts(request: EngineRequest) -> list[EngineRequest]:
    """The sequences that a request takes; none when it is one itself."""
    sampling = request.sampling
    if sampling.continuations:
        plain = replace(sampling, continuations=())
        return [replace(request, sampling=plain, continuation=text) for text in sampling.continuations]
    if sampling.scores_choices:
        # A choice that begins another one is told from it by its end.
        begins = any(a != b and b.startswith(a) for a in sampling.choices for b in sampling.choices)
        plain = replace(sampling, choices=())
        return [replace(request, sampling=plain, continuation=text, closed=begins) for text in sampling.choices]
    if sampling.n > 1:
        seed = sampling.seed
        return [
            replace(request, sampling=replace(sampling, n=1, seed=None if seed is None else seed + index))
            for index in range(sampling.n)
        ]
    return []


def _whole(group: Split) -> Finished:
    """The answer that the finished parts make."""
    parts = [group.finished[key] for key in group.parts]
    sampling = group.request.sampling
    first = replace(
        parts[0], key=group.request.key, usage=_usage(parts), admitted_at=min(each.admitted_at for each in parts),
        first_token_at=min(each.first_token_at for each in parts), finished_at=max(each.finished_at for each in parts),
    )  # fmt: skip
    if sampling.n > 1:
        others = [_choice(each) for each in parts[1:]]
        return replace(first, extras=replace(parts[0].extras or Extras(), choices=others))
    scores = [score for each in parts for score in (each.extras.continuations or [] if each.extras else [])]
    if sampling.continuations:
        return replace(first, text="", extras=Extras(continuations=scores))
    return _chosen(first, scores, sampling)


def _usage(parts: Sequence[Finished]) -> Usage:
    """Prompt tokens are counted once, whatever the number of parts that share them."""
    prompt = parts[0].usage.prompt_tokens
    computed = sum(each.usage.prompt_tokens - each.usage.cached_tokens for each in parts)
    return Usage(
        prompt, max(0, prompt - computed), sum(each.usage.output_tokens for each in parts),
        sum(each.usage.reasoning_tokens for each in parts),
    )  # fmt: skip


def _choice(part: Finished) -> dict[str, Any]:
    found: dict[str, Any] = {"text": part.text, "finish_reason": part.finish_reason.value}
    if part.extras and part.extras.logprobs is not None:
        found["logprobs"] = part.extras.logprobs
    if part.extras and part.extras.reasoning is not None:
        found["reasoning"] = part.extras.reasoning
    return found


def _chosen(first: Finished, scores: Sequence[dict[str, Any]], sampling: SamplingParams) -> Finished:
    """The likeliest choice, or one drawn at the temperature; with the probability of each among the choices."""
    highest = max(each["logprob"] for each in scores)
    weights = [math.exp(each["logprob"] - highest) for each in scores]
    total = sum(weights)
    chances = {each["text"]: weight / total for each, weight in zip(scores, weights, strict=True)}
    text = max(chances, key=chances.__getitem__)
    if not sampling.is_greedy:
        tempered = np.array([(each["logprob"] - highest) / sampling.temperature for each in scores])
        powers = np.exp(tempered - tempered.max())
        text = scores[np.random.default_rng(_seed(sampling)).choice(len(scores), p=powers / powers.sum())]["text"]
    return replace(first, text=text, finish_reason=FinishReason.STOP, extras=Extras(choice_probs=chances))


def _seed(sampling: SamplingParams) -> int | None:
    return None if sampling.seed is None else sampling.seed % 2**64
