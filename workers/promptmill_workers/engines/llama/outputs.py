"""What the outputs of a pass say: the next token of an answer, the log-probability of a continuation."""

from __future__ import annotations

import time

from promptmill.types import Extras, FinishReason
from promptmill_workers.engines.contract import Finished
from promptmill_workers.engines.host_sampling import log_sum
from promptmill_workers.engines.llama.binding import Context
from promptmill_workers.engines.llama.slots import LlamaRunning


def drawn(context: Context, running: LlamaRunning, output: int) -> int:
    """The next token, by the output at this batch index. Raises GrammarError."""
    if not running.hosted:
        return context.sampled(running.slot, output)
    answer, logits = running.answer, context.logits(output)
    if answer.draws:
        return answer.draw(logits)
    is_greedy = running.request.sampling.is_greedy
    token = int(logits.argmax()) if is_greedy else context.drawn_aside(running.slot, output)
    answer.observe(logits, token)
    return token


def score(context: Context, running: LlamaRunning) -> Finished | None:
    """Add up what the pass says of the continuation; the event when all of it was seen."""
    prompt = running.waiting.prompt
    # The output after position p is about the token at p + 1.
    following = running.done - len(running.outputs) + 1
    for index, output in enumerate(running.outputs):
        logits, token = context.logits(output), int(prompt[following + index])
        running.logprob += float(logits[token]) - log_sum(logits)
        running.likeliest &= int(logits.argmax()) == token
    running.outputs = range(0)
    if running.in_prefill:
        return None
    text = running.request.continuation or ""
    now = running.first_token_at = time.monotonic()
    scores = {
        "text": text, "logprob": running.logprob, "tokens": running.waiting.scored, "greedy": running.likeliest,
    }  # fmt: skip
    return Finished(
        running.request.key, text, FinishReason.STOP, running.usage, running.admitted_at, now, now,
        Extras(continuations=[scores]),
    )  # fmt: skip
