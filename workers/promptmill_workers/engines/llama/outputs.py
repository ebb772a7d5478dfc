"""What the outputs of a pass say: the next token of an answer, the log-probability of a continuation."""

from __future__ import annotations

from promptmill.types import Extras, FinishReason
from promptmill_workers.engines.answer import Generation
from promptmill_workers.engines.host_sampling import log_sum
from promptmill_workers.engines.llama.binding import Context
from promptmill_workers.engines.llama.sequence import LlamaSequence
from promptmill_workers.engines.scheduler import Computed


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
