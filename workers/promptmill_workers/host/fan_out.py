"""Between sessions and engine: requests that take several sequences, and sequences that answer several requests.

An engine runs one sequence for one request. Here a request for several answers becomes several sequences, a choice is
scored by one sequence for each possible answer, and identical greedy requests of one job are computed once.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from promptmill.types import EngineCounters, ErrorClass, Extras, FinishReason, SamplingParams, Usage
from promptmill_workers.engines.contract import (
    Engine,
    EngineInfo,
    EngineRequest,
    Event,
    Finished,
    Rejected,
    RequestKey,
    TokenEvent,
)
from promptmill_workers.host.preemption import Preemption

#: Finished greedy answers that are remembered, and the longest text among them, in characters.
REMEMBERED = 8_192
LONGEST_REMEMBERED = 4_096

#: Errors that the same request has again.
LASTING = (ErrorClass.CONTEXT_OVERFLOW, ErrorClass.INVALID_REQUEST, ErrorClass.GRAMMAR, ErrorClass.TOKENIZE)

#: What two requests have in common that have the same answer.
Identity = bytes


@dataclass(slots=True, eq=False)
class FanOut:
    """A request in parts, each a sequence of its own."""

    request: EngineRequest
    parts: list[RequestKey]
    finished: dict[RequestKey, Finished] = field(default_factory=dict)


class Desk:
    """An engine with a desk in front of it; keeps the engine's contract."""

    def __init__(self, engine: Engine, *, deduplicate: bool = True) -> None:
        self._engine = engine
        self._yielding = Preemption(engine)
        self._deduplicate = deduplicate
        # Parts have keys below zero, which no caller uses.
        self._next_part = -1
        self._groups: dict[RequestKey, FanOut] = {}
        self._group_of: dict[RequestKey, FanOut] = {}
        self._leaders: dict[Identity, RequestKey] = {}
        self._identities: dict[RequestKey, Identity] = {}
        self._followers: dict[RequestKey, list[EngineRequest]] = {}
        self._remembered: OrderedDict[Identity, Finished] = OrderedDict()
        self._ready: list[Event] = []
        self._wasted = 0

    # --- the contract ------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def counters(self) -> EngineCounters:
        counters = self._engine.counters
        return replace(counters, wasted_tokens=counters.wasted_tokens + self._wasted) if self._wasted else counters

    @property
    def active(self) -> int:
        return self._engine.active

    @property
    def waiting(self) -> int:
        return self._engine.waiting + len(self._ready)

    @property
    def kv_cells_used(self) -> int:
        return self._engine.kv_cells_used

    def waiting_keys(self) -> Collection[RequestKey]:
        waiting = set(self._engine.waiting_keys())
        whole = {key for key, group in self._groups.items() if waiting.issuperset(group.parts)}
        own = {key for key in waiting if key >= 0} | whole
        return own | {each.key for key in own for each in self._followers.get(key, ())}

    def add(self, requests: Sequence[EngineRequest]) -> None:
        batch: list[EngineRequest] = []
        for request in requests:
            if not self._attach(request):
                self._put(request, batch)
        self._yielding.add(batch)

    def step(self) -> Sequence[Event]:
        events, self._ready = self._ready, []
        self._yielding.make_way()
        for event in self._engine.step():
            if not isinstance(event, TokenEvent):
                self._yielding.forget(event.key)
            group = self._group_of.get(event.key)
            whole = event if group is None else self._collect(group, event)
            if whole is not None:
                events.append(whole)
                if whole.key in self._identities and not isinstance(whole, TokenEvent):
                    events.extend(self._settle(whole))
        return events

    def cancel(self, key: RequestKey) -> None:
        self._ready = [each for each in self._ready if each.key != key]
        if self._leave(key):
            return
        group = self._groups.get(key)
        if group is None:
            self._end(key)
        else:
            self._dissolve(group)
        self._promote(key)

    def render(self, request: EngineRequest) -> str:
        return self._engine.render(request)

    def close(self) -> None:
        self._engine.close()

    # --- parts -------------------------------------------------------------------------------------------------------

    def _put(self, request: EngineRequest, batch: list[EngineRequest]) -> None:
        """The request, or its parts, for the engine."""
        parts = _parts(request)
        if not parts:
            batch.append(request)
            return
        keys = []
        for part in parts:
            keys.append(self._next_part)
            batch.append(replace(part, key=self._next_part))
            self._next_part -= 1
        group = self._groups[request.key] = FanOut(request, keys)
        self._group_of.update(dict.fromkeys(keys, group))

    def _collect(self, group: FanOut, event: Event) -> Event | None:
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

    def _dissolve(self, group: FanOut) -> None:
        """End every part; what they have generated is in no answer."""
        for part in group.parts:
            if part not in group.finished:
                self._end(part)
        self._wasted += sum(each.usage.output_tokens for each in group.finished.values())
        self._forget(group)

    def _end(self, key: RequestKey) -> None:
        self._engine.cancel(key)
        self._yielding.forget(key)

    def _forget(self, group: FanOut) -> None:
        del self._groups[group.request.key]
        for part in group.parts:
            del self._group_of[part]

    # --- identical requests ------------------------------------------------------------------------------------------

    def _attach(self, request: EngineRequest) -> bool:
        """Whether the request gets the answer of an identical one, which is known or under way."""
        sampling = request.sampling
        if not self._deduplicate or not sampling.is_greedy or request.stream or request.urgent or sampling.ignore_eos:
            return False
        identity = _identity(request)
        known = self._remembered.get(identity)
        if known is not None:
            self._remembered.move_to_end(identity)
            self._ready.append(_copy(known, request.key))
            return True
        leader = self._leaders.get(identity)
        if leader is not None:
            self._followers.setdefault(leader, []).append(request)
            return True
        self._leaders[identity], self._identities[request.key] = request.key, identity
        return False

    def _settle(self, event: Finished | Rejected) -> list[Event]:
        """The events of those that waited for this one."""
        identity = self._identities[event.key]
        if isinstance(event, Rejected) and event.error_class not in LASTING:
            self._promote(event.key)
            return []
        del self._identities[event.key], self._leaders[identity]
        followers = self._followers.pop(event.key, [])
        if isinstance(event, Rejected):
            return [replace(event, key=each.key, usage=None, admitted_at=None) for each in followers]
        if len(event.text) <= LONGEST_REMEMBERED and not _is_bulky(event):
            self._remembered[identity] = event
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return [_copy(event, each.key) for each in followers]

    def _promote(self, key: RequestKey) -> None:
        """The request with ``key`` has no answer: the next one like it is computed."""
        identity = self._identities.pop(key, None)
        if identity is None:
            return
        followers = self._followers.pop(key, [])
        del self._leaders[identity]
        if followers:
            first, *others = followers
            self._leaders[identity], self._identities[first.key] = first.key, identity
            if others:
                self._followers[first.key] = others
            batch: list[EngineRequest] = []
            self._put(first, batch)
            self._yielding.add(batch)

    def _leave(self, key: RequestKey) -> bool:
        """Drop a request that waits for an identical one's answer; False when there is none with this key."""
        for leader, followers in self._followers.items():
            left = [each for each in followers if each.key != key]
            if len(left) < len(followers):
                self._followers[leader] = left
                return True
        return False


def _identity(request: EngineRequest) -> Identity:
    """A digest, so that remembering an answer does not keep its prompt. A request of another job has another one."""
    asked = repr(
        (request.sharing, request.messages, request.prompt, request.own, request.continuation, request.closed,
         _described(request.sampling))
    )  # fmt: skip
    return hashlib.blake2b(asked.encode(errors="surrogatepass"), digest_size=24).digest()


@lru_cache(maxsize=256)
def _described(sampling: SamplingParams) -> str:
    return repr(sampling)


def _is_bulky(event: Finished) -> bool:
    return event.extras is not None and (event.extras.logprobs is not None or event.extras.embedding is not None)


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


def _whole(group: FanOut) -> Finished:
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


def _copy(event: Finished, key: RequestKey) -> Finished:
    """The same answer for an identical request, all of whose prompt was at hand."""
    usage = replace(event.usage, cached_tokens=event.usage.prompt_tokens)
    return replace(event, key=key, usage=usage, extras=replace(event.extras or Extras(), deduplicated=True))
