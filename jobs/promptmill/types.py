"""The values that travel between modules and processes: frozen, with units in their names, and no imports of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, NamedTuple

#: Any JSON value, as ``json.loads`` gives it.
JsonValue = Any


#: What ``--store`` asks for -> what ``jobs.store`` says while prompts and answers go, and once they are gone.
GOING = {"hash": "hashing", "none": "removing"}
GONE = {"hash": "hashed", "none": "removed"}

#: ``jobs.store`` of jobs whose prompts and answers are not all there: nothing can be run again, or scored.
WITHOUT_TEXTS = (*GOING.values(), *GONE.values())


class JobState(StrEnum):
    """``queued -> running -> completed | failed | cancelled | expired``, with ``paused`` beside the first two."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        return self in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED)


class ChunkState(StrEnum):
    """``queued -> leased -> done``, and back to ``queued`` when a lease ends."""

    QUEUED = "queued"
    LEASED = "leased"
    DONE = "done"


class FinishReason(StrEnum):
    """Why a sequence ended: by itself or at a stop string, at ``max_tokens``, or by request."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class ErrorClass(StrEnum):
    """Why a request has no answer. Few and stable, so that they can be counted."""

    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "oom"
    STALL = "stall"
    CONTEXT_OVERFLOW = "context_overflow"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_LOAD = "model_load"
    ENGINE_CRASH = "engine_crash"
    GRAMMAR = "grammar"
    TOKENIZE = "tokenize"
    INVALID_REQUEST = "invalid_request"
    CANCELLED = "cancelled"
    WORKER_LOST = "worker_lost"
    DATABASE = "db"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one answer are drawn. The defaults are greedy: an evaluation should repeat itself."""

    max_tokens: int = 256
    temperature: float = 0.0
    #: Keep the k likeliest tokens; 0 keeps all.
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    #: Locally typical sampling (Meister et al. 2022): keep the tokens nearest to the expected surprise; 1 keeps all.
    typical_p: float = 1.0
    #: Divides (multiplies, where negative) the logits of tokens that the prompt or the answer holds; 1 changes nothing.
    repetition_penalty: float = 1.0
    #: Subtracted from the logits of tokens that the answer holds: once, and for each time.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    #: Added to the logits of these token ids.
    logit_bias: tuple[tuple[int, float], ...] = ()
    #: Seed of this request's own random stream; None draws one.
    seed: int | None = None
    #: The answer ends before the first of these texts.
    stop: tuple[str, ...] = ()
    #: Seconds from admission after which the request ends as a ``timeout`` error; None waits for ever.
    timeout_s: float | None = None
    #: Do not stop at the model's own end tokens (benchmarks only).
    ignore_eos: bool = False
    #: Answers to the one prompt.
    n: int = 1
    #: Report the model's own log-probability of each token, before penalties, masks and temperature.
    logprobs: bool = False
    #: And of so many of the likeliest alternatives.
    top_logprobs: int = 0
    #: At most one of these three binds the answer. The schema is JSON text.
    json_schema: str | None = None
    regex: str | None = None
    choices: tuple[str, ...] = ()
    #: ``on``, ``off``, or a budget in tokens as digits; None leaves it to the model's chat template.
    thinking: str | None = None
    #: Texts whose log-probability after the prompt is wanted. Nothing is generated then.
    continuations: tuple[str, ...] = ()
    #: A vector for the prompt is wanted. Nothing is generated then.
    embedding: bool = False
    #: Functions that the model may call, as JSON text: what its chat template is given.
    tools: str | None = None
    #: An answer may hold several calls.
    parallel_tool_calls: bool = True
    #: Whether texts that spell a control token are that token; None: those of raw prompts are, those of messages not.
    parse_special: bool | None = None
    #: The model goes on with the last message, which is an assistant's.
    continue_final_message: bool = False
    #: Whether the prompt ends where the model's own message begins; None: unless the last message is continued.
    add_generation_prompt: bool | None = None

    @property
    def is_constrained(self) -> bool:
        return bool(self.json_schema is not None or self.regex is not None or self.choices)

    @property
    def is_greedy(self) -> bool:
        """Whether the same prompt has the same answer."""
        return self.temperature <= 0 or self.top_k == 1

    @property
    def scores_choices(self) -> bool:
        """Choices are scored, and nothing is drawn, unless a reasoning comes before them."""
        return bool(self.choices) and self.thinking in (None, "off")

    @property
    def thinking_budget(self) -> int | None:
        return int(self.thinking) if self.thinking is not None and self.thinking.isdecimal() else None


#: A part of a text: where it starts, and where it ends.
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str
    #: JSON text of what else the chat template sees: ``tool_calls`` of an assistant, a tool's ``tool_call_id``.
    extra: str | None = None
    #: What of the content the author of a task wrote: control tokens that are spelled there are meant.
    own: tuple[Span, ...] = field(default=(), kw_only=True)


class Sharing(NamedTuple):
    """With whom a request shares what was computed. Nothing of it crosses from one owner to another.

    Prompt prefixes are shared by the requests of one ``owner`` (an API key's id; empty for all that need no key),
    answers to identical requests by those of one ``job``.
    """

    owner: str = ""
    job: str = ""


#: The owner of requests of no key and no job.
COMMON = Sharing()


@dataclass(frozen=True, slots=True)
class Request:
    """One line of a job as an engine sees it. Holds ``messages`` (chat template applies) or ``prompt`` (sent as it is).

    The expected answer is not here, and no engine ever sees it.
    """

    row: int
    custom_id: str
    sampling: SamplingParams
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    #: A client waits for the text as it comes.
    stream: bool = False
    #: What of ``prompt`` the author of a task wrote, as in :class:`Message`; None: all of it is meant.
    own: tuple[Span, ...] | None = None
    sharing: Sharing = COMMON


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts, from token ids only. ``cached_tokens`` of the prompt were not computed for this request.

    ``reasoning_tokens`` are among the ``output_tokens``.
    """

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Extras:
    """The parts of an answer that only some requests ask for; all of them values that JSON can hold."""

    #: What the model thought before it answered.
    reasoning: str | None = None
    #: The second and further answers of a request with ``n`` > 1: ``text``, ``finish_reason`` and its ``logprobs``.
    choices: list[dict[str, Any]] | None = None
    #: For each token ``token``, ``logprob`` (nats), ``bytes`` and ``top_logprobs``, as OpenAI's API has them.
    logprobs: list[dict[str, Any]] | None = None
    #: Probability of each of the request's ``choices``; they add up to 1.
    choice_probs: dict[str, float] | None = None
    #: Each continuation with ``text``, ``logprob`` (nats, summed over its tokens), ``tokens``, and ``greedy``: whether
    #: each of its tokens is the likeliest.
    continuations: list[dict[str, Any]] | None = None
    embedding: list[float] | None = None
    #: Copied from an identical request: nothing was computed for this one, and it has no times.
    deduplicated: bool = False


class Timing(NamedTuple):
    """Seconds by ``time.monotonic()`` of the machine that answered; its worker turns them into the database's.

    No machine's wall clock is in them: it may be wrong, or set while the request runs.
    """

    received_at: float
    admitted_at: float
    first_token_at: float
    finished_at: float

    def by(self, clock: Callable[[float], float]) -> Timing:
        """The same by another clock."""
        return Timing(*map(clock, self))

    @property
    def ttft_s(self) -> float:
        """Seconds from the slot to the first token on the host: the prefill."""
        return self.first_token_at - self.admitted_at

    @property
    def latency_s(self) -> float:
        """Seconds from the slot to the last token."""
        return self.finished_at - self.admitted_at


@dataclass(frozen=True, slots=True)
class Ok:
    """The answer to one request."""

    row: int
    text: str
    finish_reason: FinishReason
    usage: Usage
    #: None for an answer that was copied.
    timing: Timing | None
    extras: Extras | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """One request without an answer: a value, never an exception. ``message`` quotes no prompt and no answer."""

    row: int
    error_class: ErrorClass
    message: str
    usage: Usage | None = None
    timing: Timing | None = None


Result = Ok | Failed


@dataclass(frozen=True, slots=True)
class ChunkId:
    """Names a chunk: this is all that travels through Redis."""

    job_id: str
    number: int


@dataclass(frozen=True, slots=True)
class Lease:
    """Attempt ``attempt`` of one worker on one chunk. The number is the fencing token: an older one changes nothing."""

    chunk: ChunkId
    attempt: int
    #: Attempts of the chunk that ended badly before this one.
    failures: int
    worker_id: str
    first_row: int
    rows: int
    model: str
    #: When the chunk's message was published, seconds since the epoch: the start of its requests' queue time.
    enqueued_at: float
    #: Tokens that the job's longest request may need; None when unknown.
    context_tokens: int | None = None
    #: That of the job; 0 is the most urgent.
    priority: int = 5
    #: Which model the job is for; None until the first worker that runs it has said what it has.
    model_fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """What an engine did, cumulative since it was made. Times in seconds.

    A step that mixes prefill and decode is shared out by tokens. ``prefill + decode + overhead + idle`` is its life.
    """

    steps: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    overhead_s: float = 0.0
    idle_s: float = 0.0
    prefill_tokens: int = 0
    #: Tokens sampled, whatever became of them.
    decode_tokens: int = 0
    #: Those among them of requests that were cancelled or ended as an error: in no answer.
    wasted_tokens: int = 0
    #: Seconds with at least one free slot while requests waited.
    starved_s: float = 0.0
    peak_active: int = 0
    peak_kv_cells: int = 0
    #: Requests of the API that ran beside those of jobs meanwhile: all of the above is theirs too.
    live_requests: int = 0

    def plus(self, later: EngineCounters) -> EngineCounters:
        """This span of time and a later one: sums, and the larger of the peaks."""
        return EngineCounters(
            **{
                each.name: max(getattr(self, each.name), getattr(later, each.name))
                if each.name.startswith("peak_")
                else getattr(self, each.name) + getattr(later, each.name)
                for each in fields(EngineCounters)
            }
        )


@dataclass(frozen=True, slots=True)
class DatasetLine:
    """One line as a reader understood it, before any template.

    Exactly one of ``prompt``, ``messages`` and ``fields`` is set, unless ``error`` says why the line cannot be used.
    ``expected`` is kept apart from everything a template or an engine can reach.
    """

    #: 1-based line (or record) in the file, for messages to people.
    line: int
    custom_id: str | None = None
    prompt: str | None = None
    #: The prompt is sent as it is, without the model's chat template.
    raw: bool = False
    messages: tuple[Message, ...] | None = None
    #: Input fields of a template.
    fields: Mapping[str, JsonValue] | None = None
    expected: Mapping[str, JsonValue] | JsonValue | None = None
    meta: Mapping[str, JsonValue] | None = None
    #: Sampling parameters that this line sets for itself; names are those of :class:`SamplingParams`.
    sampling: Mapping[str, JsonValue] = field(default_factory=dict)
    #: Which of the times that ``--repeat`` asks the line, from 0.
    repetition: int = 0
    error: str | None = None
