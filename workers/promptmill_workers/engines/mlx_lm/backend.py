"""MLX through mlx-lm's continuous batcher: waiting requests join the running batch as its rows become free.

Nothing here imports MLX before an engine is loaded: counting tokens must not touch a device, and MLX allows no fork.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

from promptmill.errors import ModelError, RequestError
from promptmill.types import Extras, FinishReason, Usage
from promptmill_workers.engines.answer import Generation, Tools
from promptmill_workers.engines.constraint import Grammars
from promptmill_workers.engines.contract import EngineInfo, EngineOptions, EngineRequest, refuse_slots
from promptmill_workers.engines.kv_budget import fit
from promptmill_workers.engines.mlx_lm.prefixes import MlxPrefixes
from promptmill_workers.engines.mlx_lm.text import MlxAnswerText, MlxTokenizer
from promptmill_workers.engines.prefix_plan import plan
from promptmill_workers.engines.prompts import TokenSequence
from promptmill_workers.engines.scheduler import Admission, Computed, Pass

if TYPE_CHECKING:
    from promptmill_workers.engines.mlx_lm.binding import Batcher, HostedSampler, MlxModel, SequenceId, Token


@dataclass(slots=True, eq=False)
class MlxSequence(TokenSequence):
    """A request on its way through mlx-lm. What follows is known once it runs."""

    #: Its row in the batch; None before, after, and where nothing is generated.
    row: SequenceId | None = field(default=None, init=False)
    #: Draws its tokens, and has seen them before they arrive here.
    hosted: HostedSampler | None = field(default=None, init=False)
    #: Tokens that have arrived.
    count: int = field(default=0, init=False)

    @property
    def cells(self) -> int:
        """KV cells that are set aside for it. A shared prefix saves time and no memory: each row has its copy."""
        return len(self.prompt) + self.limit

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, self.cached, self.count, min(self.count, self.answer.reasoning_tokens))


class MlxBackend:
    """The scheduler's backend over ``mlx_lm.generate.BatchGenerator``."""

    def __init__(self, batcher: Batcher, tokenizer: MlxTokenizer, info: EngineInfo) -> None:
        self._batcher = batcher
        self._tokenizer = tokenizer
        self.info = info
        self.most_running = info.slots
        self._tools = Tools(
            ends=tokenizer.eos_ids.__contains__,
            piece=tokenizer.piece,
            tokens=tokenizer.within,
            text=lambda stops: MlxAnswerText(tokenizer, stops),
            grammars=Grammars(lambda: tokenizer.constraint_tokenizer(batcher.vocabulary), batcher.vocabulary),
        )
        self._rows: dict[SequenceId, MlxSequence] = {}
        self._prefixes = MlxPrefixes(batcher)

    @classmethod
    def load(cls, path: Path | None, model_name: str, options: EngineOptions) -> Self:
        """Raises ModelError or DeviceError."""
        from promptmill_workers.engines.mlx_lm.binding import Batcher, MlxModel, open_device

        assert path is not None
        cls.check(options)
        device, device_got = open_device(options.device)
        tokenizer = MlxTokenizer(path)
        model = MlxModel(path)
        info = _info(model, tokenizer, model_name, options, device_got)
        batcher = Batcher(model, sorted(tokenizer.eos_ids), device, info.slots, options.batch_tokens)
        return cls(batcher, tokenizer, info)

    @staticmethod
    def check(options: EngineOptions) -> None:
        """Raises ModelError for options that cannot be had, whatever the model."""
        refuse_slots(options.slots)
        if options.kv_type != "f16":
            raise ModelError("MLX's continuous batcher keeps no quantised KV cache", hint="Unset JOBS_KV_TYPE.")

    @staticmethod
    def token_counter(path: Path | None) -> MlxTokenizer:
        """Raises ModelError."""
        assert path is not None
        return MlxTokenizer(path)

    @property
    def kv_cells_used(self) -> int:
        return self._row_cells() + self._prefixes.cells

    def render(self, request: EngineRequest) -> str:
        return self._tokenizer.render(request)

    def close(self) -> None:
        self._rows.clear()
        self._prefixes.clear()
        self._batcher.close()

    def prepare(self, request: EngineRequest) -> MlxSequence:
        return MlxSequence.of(request, self._tokenizer, self.info.context_tokens)

    def plan(self, waiting: Sequence[MlxSequence]) -> Iterable[MlxSequence]:
        """Decide which prefixes to share, and bring together requests that share one and are of like length.

        A prefill pass is padded to its longest prompt: in the order of real comments that came to 60 % more tokens,
        in this one to 10 %. No request waits for ever, because no more than a few chunks are ever here.
        """
        found = list(waiting)
        group = [0] * len(found)
        for each in found:
            each.shared = 0
        groups = plan([each.question for each in found], owners=[each.owner for each in found])
        for number, shared in enumerate(groups, start=1):
            for member in shared.members:
                found[member].shared = shared.length
                group[member] = number
        return [found[at] for at in sorted(range(len(found)), key=lambda at: (group[at], -len(found[at].prompt)))]

    # --- admit -------------------------------------------------------------------------------------------------------

    def admit(self, sequence: MlxSequence, waiting: Collection[MlxSequence]) -> Admission:
        """Give the request a row, its prefix computed before it if it is the first that wants it.

        That first one pays for its prefix: so the tokens computed add up over the requests.
        """
        if not self._make_room(sequence):
            return Admission.FULL
        if not sequence.is_generated:
            sequence.answer = Computed()
            return Admission.ADMITTED
        sampling = sequence.request.sampling
        answer = Generation(self._tools, sampling, sequence.prompt, sequence.limit, thinks=sequence.thinks)
        prefix, sequence.cached = self._prefixes.begin(sequence.owner, sequence.prompt, sequence.shared)
        rest = sequence.prompt[len(prefix.tokens) :] if prefix else sequence.prompt
        sequence.answer, sequence.hosted = answer, self._hosted(answer, sequence)
        sequence.row = self._batcher.insert(
            rest, sequence.limit, sampling, prefix.cache if prefix else None, sequence.hosted
        )  # fmt: skip
        self._rows[sequence.row] = sequence
        return Admission.ADMITTED

    def _hosted(self, answer: Generation, sequence: MlxSequence) -> HostedSampler | None:
        """What hands its tokens out on the host, where that is needed."""
        sampling = sequence.request.sampling
        # A budget of reasoning is kept by putting its end into the sampler's mouth.
        has_budget = sequence.thinks and sampling.thinking_budget is not None
        if not (answer.draws or answer.observes or has_budget):
            return None
        from promptmill_workers.engines.mlx_lm.binding import HostedSampler

        return HostedSampler(answer, min(self._tokenizer.eos_ids, default=0), self._batcher.drawer(sampling))

    def _make_room(self, sequence: MlxSequence) -> bool:
        """Whether there are cells for the request and its prefix, after forgetting other prefixes if need be.

        It waits for a row to end rather than lose its own prefix, which those behind it want too. Alone it always
        fits: there are as many cells as a context has.
        """
        wanted = self._prefixes.wanted(sequence.owner, sequence.prompt, sequence.shared)
        own = len(wanted.tokens) if wanted else sequence.shared
        needed = self._row_cells() + sequence.cells + own
        if needed <= self.info.kv_cells:
            others = self._prefixes.cells - (len(wanted.tokens) if wanted else 0)
            self._prefixes.forget(needed + others - self.info.kv_cells, keep=wanted)
            return True
        if self._rows:
            return False
        self._prefixes.clear()
        sequence.shared = 0
        return True

    def _row_cells(self) -> int:
        return sum(each.cells for each in self._rows.values())

    def free(self, sequence: MlxSequence) -> None:
        if sequence.row is not None:
            self._batcher.remove(sequence.row)
            self._forget_row(sequence)

    def _forget_row(self, sequence: MlxSequence) -> None:
        if sequence.row is not None:
            del self._rows[sequence.row]
            sequence.row = None

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(self, running: Collection[MlxSequence], waiting: Collection[MlxSequence]) -> Pass[MlxSequence]:
        """Answer what needs no generation, then run one step of the batcher; its tokens are on the host."""
        done: Pass[MlxSequence] = Pass()
        for each in running:
            if not each.is_generated:
                self._compute(each, done)
        prefixes = self._prefixes.take_work()
        done.prefill_s += prefixes.seconds
        done.prefill_tokens += prefixes.tokens
        if self._rows:
            # mlx-lm's own clock. A decode that is still being computed when a prefill begins is waited for there.
            made = self._batcher.step()
            done.steps += 1
            done.prefill_s += made.prefill_s
            done.decode_s += made.decode_s
            done.prefill_tokens += made.prefill_tokens
            done.decode_tokens += len(made.tokens)
            done.outcomes += [self._received(each) for each in made.tokens]
        return done

    def _received(self, drawn: Token) -> tuple[MlxSequence, FinishReason | RequestError | None]:
        """Add a token to its answer."""
        sequence = self._rows[drawn.sequence]
        assert isinstance(sequence.answer, Generation)
        sequence.count += 1
        outcome = sequence.hosted.outcomes.popleft() if sequence.hosted else sequence.answer.take(drawn.token)
        if drawn.ended and outcome is not None:
            self._forget_row(sequence)
        return sequence, outcome

    def _compute(self, sequence: MlxSequence, done: Pass[MlxSequence]) -> None:
        """Answer a request for which nothing is generated."""
        prefix, prompt, text = None, sequence.prompt, sequence.request.continuation or ""
        if sequence.scored:
            prefix, sequence.cached = self._prefixes.begin(sequence.owner, sequence.question, sequence.shared)
        known, cache = (prefix.tokens, prefix.cache) if prefix else (prompt[:0], None)
        started = time.monotonic()
        outcome: FinishReason | RequestError = FinishReason.STOP
        try:
            if sequence.scored:
                logprob, greedy = self._batcher.score(prompt, sequence.scored, known, cache)
                score = {"text": text, "logprob": logprob, "tokens": sequence.scored, "greedy": greedy}
                sequence.answer = Computed(text, Extras(continuations=[score]))
            else:
                sequence.answer = Computed(extras=Extras(embedding=self._batcher.embed(prompt)))
        except RequestError as problem:
            outcome = problem
        done.steps += 1
        done.prefill_s += time.monotonic() - started
        done.prefill_tokens += sequence.prompt_tokens - len(known)
        done.outcomes.append((sequence, outcome))


def _info(model: MlxModel, tokenizer: MlxTokenizer, name: str, options: EngineOptions, device_got: str) -> EngineInfo:
    room = fit(
        slots=options.slots, cells=options.kv_cells, context=options.context_tokens, needed=options.needed_tokens,
        trained=tokenizer.context_tokens, cell_bytes=model.cell_bytes(),
        free_bytes=psutil.virtual_memory().available, gpu=device_got != "cpu",
    )  # fmt: skip
    return EngineInfo(
        engine="mlx", version=model.version, model_name=name, slots=room.slots, context_tokens=room.context,
        kv_cells=room.cells, device_got=device_got, layers=model.layers,
        layers_offloaded=0 if device_got == "cpu" else model.layers, extra=model.facts,
        exact=device_got == "cpu" and model.facts["dtypes"] == ["float32"],
        settings={"chat_template": tokenizer.template_digest},
    )  # fmt: skip
