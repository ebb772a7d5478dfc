"""Identical greedy requests of one job are computed once; the others get a copy of the answer."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import lru_cache

from promptmill.types import ErrorClass, Extras, SamplingParams
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

#: Finished greedy answers that are remembered, and the longest text among them, in characters.
REMEMBERED = 8_192
LONGEST_REMEMBERED = 4_096

#: Errors that the same request has again.
LASTING = (ErrorClass.CONTEXT_OVERFLOW, ErrorClass.INVALID_REQUEST, ErrorClass.GRAMMAR, ErrorClass.TOKENIZE)

#: What two requests have in common that have the same answer.
Identity = bytes


class Deduplication(EngineWrapper):
    """The first of identical requests runs; those that come meanwhile, or soon after, have its answer."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._leaders: dict[Identity, RequestKey] = {}
        self._identities: dict[RequestKey, Identity] = {}
        self._followers: dict[RequestKey, list[EngineRequest]] = {}
        self._remembered: OrderedDict[Identity, Finished] = OrderedDict()
        self._ready: list[Event] = []

    @property
    def waiting(self) -> int:
        return self._engine.waiting + len(self._ready)

    def waiting_keys(self) -> Collection[RequestKey]:
        own = set(self._engine.waiting_keys())
        return own | {each.key for key in own for each in self._followers.get(key, ())}

    def add(self, requests: Sequence[EngineRequest]) -> None:
        self._engine.add([each for each in requests if not self._attach(each)])

    def step(self) -> Sequence[Event]:
        events, self._ready = self._ready, []
        for event in self._engine.step():
            events.append(event)
            if event.key in self._identities and not isinstance(event, TokenEvent):
                events.extend(self._settle(event))
        return events

    def cancel(self, key: RequestKey) -> None:
        self._ready = [each for each in self._ready if each.key != key]
        if not self._leave(key):
            self._engine.cancel(key)
            self._promote(key)

    def _attach(self, request: EngineRequest) -> bool:
        """Whether the request gets the answer of an identical one, which is known or under way."""
        sampling = request.sampling
        if not sampling.is_greedy or request.stream or request.urgent or sampling.ignore_eos:
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
            self._engine.add([first])

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


def _copy(event: Finished, key: RequestKey) -> Finished:
    """The same answer for an identical request, all of whose prompt was at hand."""
    usage = replace(event.usage, cached_tokens=event.usage.prompt_tokens)
    return replace(event, key=key, usage=usage, extras=replace(event.extras or Extras(), deduplicated=True))
