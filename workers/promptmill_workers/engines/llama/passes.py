"""One forward pass: what goes into it, and what its outputs say.

A token of every decoding sequence, or tokens of prefixes and prompts, go in. The next token of an answer, or the
log-probability of a continuation, comes out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from promptmill.types import Extras, FinishReason
from promptmill_workers.engines.answer import Generation
from promptmill_workers.engines.host_sampling import log_sum
from promptmill_workers.engines.llama.batch import Batch
from promptmill_workers.engines.llama.binding import SCORED_OUTPUTS, Context
from promptmill_workers.engines.llama.prefixes import LlamaPrefix
from promptmill_workers.engines.llama.sequence import LlamaSequence
from promptmill_workers.engines.prefix_plan import Tokens
from promptmill_workers.engines.scheduler import Computed


@dataclass(slots=True)
class BatchPlan:
    """What one forward pass computed, in tokens, and how long it took."""

    decoded: int = 0
    prefilled: int = 0
    seconds: float = 0.0
    decodes: list[LlamaSequence] = field(default_factory=list)
    #: Pieces of prompts, prefixes and forced tokens, with their sizes.
    pieces: list[tuple[LlamaPrefix | LlamaSequence, int]] = field(default_factory=list)

    def settle(self) -> None:
        """The batch was computed: its tokens are in the KV cache."""
        for running in self.decodes:
            running.done += 1
            running.pending = []
        for owner, size in self.pieces:
            owner.done += size
            if isinstance(owner, LlamaSequence) and owner.pending:
                owner.pending = owner.pending[size:]


def fill(
    batch: Batch, running: Collection[LlamaSequence], prefixes: Iterable[LlamaPrefix], *, decode: bool, prefill: bool
) -> BatchPlan:
    """Fill the batch with tokens of answers, with those of prompts, or with both.

    ``prefixes`` are unfinished ones: they come before prompts, because requests wait for them.
    """
    done = BatchPlan()
    batch.clear()
    done.decodes = [each for each in running if decode and len(each.pending) == 1 and not each.in_prefill]
    outputs = batch.put_outputs(
        [each.slot for each in done.decodes],
        [each.done for each in done.decodes],
        [each.pending[0] for each in done.decodes],
    )
    for each, output in zip(done.decodes, outputs, strict=True):
        each.output = output
    done.decoded = len(done.decodes)
    room = batch.size - done.decoded
    for prefix in prefixes if prefill else ():
        size = min(room, len(prefix.tokens) - prefix.done)
        _put(batch, done, prefix, prefix.sequence, prefix.tokens[prefix.done :], size, 0)
        room -= size
    others = [each for each in running if each.output < 0 and (prefill if each.in_prefill else decode)]
    _put_requests(batch, done, others, room)
    return done


def _put_requests(batch: Batch, done: BatchPlan, running: Iterable[LlamaSequence], room: int) -> None:
    """The next tokens of prompts and of forced tokens; with the last one of each an output."""
    scored = SCORED_OUTPUTS
    for each in running:
        if room <= 0:
            return
        work = each.work()
        size = min(room, len(work))
        if each.scored:
            size, scored = _put_scored(batch, done, each, work, size, scored)
        else:
            complete = size == len(work)
            last = _put(batch, done, each, each.slot, work, size, int(complete))
            each.output = last if complete else -1
        room -= size


def _put_scored(
    batch: Batch, done: BatchPlan, running: LlamaSequence, work: Tokens, size: int, outputs: int
) -> tuple[int, int]:
    """A piece that ends in a continuation, as far as there are outputs left; returns its size, and what is left."""
    unscored = max(0, len(running.question) - 1 - running.done)
    size = min(size, unscored + outputs)
    wanted = max(0, size - unscored)
    last = _put(batch, done, running, running.slot, work, size, wanted)
    running.outputs = range(last + 1 - wanted, last + 1)
    return size, outputs - wanted


def _put(
    batch: Batch,
    done: BatchPlan,
    owner: LlamaPrefix | LlamaSequence,
    sequence: int,
    tokens: Tokens,
    size: int,
    wanted: int,
) -> int:
    """The first ``size`` of the tokens; returns the batch index of the last."""
    if size <= 0:
        return -1
    done.pieces.append((owner, size))
    if isinstance(owner, LlamaSequence) and not owner.in_prefill:
        done.decoded += size  # Forced tokens of an answer.
    else:
        done.prefilled += size
    return batch.put(sequence, owner.done, tokens[:size], wanted=wanted)


def sample(context: Context, sequence: LlamaSequence) -> FinishReason | None:
    """Draw a token, and take those that must follow it; why the answer has ended with one. Raises GrammarError."""
    answer, output, sequence.output = sequence.answer, sequence.output, -1
    assert isinstance(answer, Generation)
    sequence.pending = [_drawn(context, sequence, answer, output)]
    reason = answer.take(sequence.pending[0])
    if reason is None and (answer.draws or sequence.thinks):
        for each in answer.forced():
            sequence.pending.append(each)
            reason = answer.take(each)
            if reason is not None:
                break
    return reason


def _drawn(context: Context, sequence: LlamaSequence, answer: Generation, output: int) -> int:
    """The next token, by the output at this batch index. Raises GrammarError."""
    if not sequence.hosted:
        return context.sampled(sequence.slot, output)
    logits = context.logits(output)
    if answer.draws:
        return answer.draw(logits)
    is_greedy = sequence.request.sampling.is_greedy
    token = int(logits.argmax()) if is_greedy else context.drawn_aside(sequence.slot, output)
    answer.observe(logits, token)
    return token


def score(context: Context, sequence: LlamaSequence) -> FinishReason | None:
    """Add up what the pass says of the continuation; a reason when all of it was seen."""
    # The output after position p is about the token at p + 1.
    following = sequence.done - len(sequence.outputs) + 1
    for index, output in enumerate(sequence.outputs):
        logits, token = context.logits(output), int(sequence.prompt[following + index])
        sequence.logprob += float(logits[token]) - log_sum(logits)
        sequence.likeliest &= int(logits.argmax()) == token
    sequence.outputs = range(0)
    if sequence.in_prefill:
        return None
    text = sequence.request.continuation or ""
    scores = {
        "text": text, "logprob": sequence.logprob, "tokens": sequence.scored, "greedy": sequence.likeliest,
    }  # fmt: skip
    sequence.answer = Computed(text, Extras(continuations=[scores]))
    return FinishReason.STOP
