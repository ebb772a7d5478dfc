"""The border to mlx-lm: its continuous batcher, its caches and its samplers, behind names of ours.

Written against mlx-lm 0.32; what its ``BatchGenerator`` does inside is noted where it forced something here.
"""

from __future__ import annotations

import copy
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, StopSequences
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p
from mlx_lm.utils import load_model
from numpy.typing import NDArray

from promptmill.errors import DeviceError, ModelError, RequestError
from promptmill.types import FinishReason, SamplingParams
from promptmill_workers.engines.answer import Generation
from promptmill_workers.engines.contract import GrammarError
from promptmill_workers.engines.prefix_plan import Tokens

#: Names a sequence inside the batcher.
SequenceId = int

#: The KV cache of one sequence: an object for each layer.
Cache = list[Any]


def open_device(asked: str) -> tuple[Any, str]:
    """The MLX device for ``cpu``, ``metal`` or ``cuda:0``, and its name. Raises DeviceError when it is not here.

    It becomes the default device of the process: MLX computes nowhere else unless told so array by array.
    """
    kind = asked.partition(":")[0]
    known = {"cpu": True, "metal": mx.metal.is_available(), "cuda": mx.cuda.is_available()}
    if not known.get(kind, False):
        raise DeviceError(
            f"{asked} was asked for, but the installed MLX cannot use it",
            hint="Install the MLX that was built for this device (README, 'GPUs'), or ask for --device cpu.",
        )
    device = mx.Device(mx.cpu if kind == "cpu" else mx.gpu, 0)
    mx.set_default_device(device)
    if kind == "cpu":
        return device, "cpu"
    return device, f"{asked} ({mx.device_info(device).get('device_name', 'unknown')})"


class MlxModel:
    """The weights of an MLX folder on the default device."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError."""
        try:
            self.network, config = load_model(folder, trust_remote_code=False)
        except Exception as problem:
            # Damage shows as anything from KeyError to RuntimeError, and each means the same to a person.
            reason = str(problem).strip().split("\n")[0][:200]
            raise ModelError(
                f"{folder.name} cannot be loaded: {reason or type(problem).__name__}",
                hint="The files may be damaged or of a kind that mlx-lm does not know.",
            ) from None
        if not all(hasattr(layer, "merge") for layer in make_prompt_cache(self.network)):
            raise ModelError(f"{folder.name} cannot be batched by mlx-lm {version('mlx-lm')}")
        self.version = version("mlx-lm")
        self.layers = len(self.network.layers)
        self.facts = _facts(self.network, config)

    def cell_bytes(self) -> int:
        """Memory of the KV cache for one token over all layers: measured, because every family names its sizes anew."""
        cache = make_prompt_cache(self.network)
        mx.eval(self.network(mx.array([[0]]), cache=cache))
        sizes = [array.nbytes // max(1, array.shape[2]) for _, array in tree_flatten([each.state for each in cache])
                 if getattr(array, "ndim", 0) == 4]  # fmt: skip
        return sum(sizes)


def _facts(network: Any, config: dict[str, Any]) -> dict[str, Any]:
    arrays = [array for _, array in tree_flatten(network.parameters())]
    quantization = config.get("quantization") or {}
    return {
        "mlx": version("mlx"),
        "weight_bytes": sum(array.nbytes for array in arrays),
        "dtypes": sorted({str(array.dtype).removeprefix("mlx.core.") for array in arrays}),
        "bits": quantization.get("bits"),
    }


class SeededSampler:
    """Draws the tokens of one request from a random stream of its own, so that its neighbours change nothing.

    mlx-lm's samplers share one global random state. The order is llama.cpp's: top-k, top-p, min-p, temperature.
    """

    def __init__(self, sampling: SamplingParams, vocabulary: int) -> None:
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._key = mx.random.key(seed & 0xFFFFFFFFFFFFFFFF)
        self._sampling = sampling
        # mlx-lm refuses a top-k that keeps everything.
        self._top_k = sampling.top_k if sampling.top_k < vocabulary else 0

    def __call__(self, logprobs: Any) -> Any:
        """``logprobs`` has one row; called once for each token of the answer, in order."""
        scores = logprobs.astype(mx.float32)
        if self._top_k > 0:
            scores = apply_top_k(scores, self._top_k)
        if 0.0 < self._sampling.top_p < 1.0:
            scores = apply_top_p(scores, self._sampling.top_p)
        if self._sampling.min_p > 0.0:
            scores = apply_min_p(scores, self._sampling.min_p)
        keys = mx.random.split(self._key)
        self._key = keys[0]
        return mx.random.categorical(scores / self._sampling.temperature, key=keys[1])


class HostedSampler:
    """Hands out the tokens of one request on the host: those that are bound by a grammar, penalised, reported, or that
    end a reasoning.

    mlx-lm asks for a token one step before it hands the one before over: what a token means is settled here, at once.
    """

    def __init__(self, answer: Generation, end: int, drawer: SeededSampler | None) -> None:
        """``end``: the token to draw when there is nothing more to say. ``drawer`` draws what the answer does not draw
        itself; None: the likeliest."""
        self._answer = answer
        self._drawer = drawer
        self._end = end
        self._forced: deque[int] = deque()
        #: For each token drawn, why the answer has ended with it, or None.
        self.outcomes: deque[FinishReason | GrammarError | None] = deque()
        self._over = False

    def __call__(self, logprobs: Any) -> Any:
        """``logprobs`` has one row; called once for each token of the answer, in order."""
        return mx.array([self._end if self._over else self._next(logprobs)])

    def _next(self, logprobs: Any) -> int:
        answer, token = self._answer, self._end
        outcome: FinishReason | GrammarError | None
        try:
            token = self._forced.popleft() if self._forced else self._drawn(logprobs)
            outcome = answer.take(token)
            if outcome is None and not self._forced:
                self._forced.extend(answer.forced())
        except GrammarError as problem:
            outcome = problem
        self.outcomes.append(outcome)
        self._over = outcome is not None
        return token

    def _drawn(self, logprobs: Any) -> int:
        """Raises GrammarError."""
        if self._answer.draws:
            return self._answer.draw(_on_host(logprobs))
        token = int((logprobs.argmax(axis=-1) if self._drawer is None else self._drawer(logprobs)).item())
        if self._answer.observes:
            self._answer.observe(_on_host(logprobs), token)
        return token


def _on_host(logprobs: Any) -> NDArray[np.float32]:
    return np.array(logprobs.astype(mx.float32)).reshape(-1)


@dataclass(frozen=True, slots=True)
class Token:
    """A token that is on the host. ``ended``: the batcher has dropped its sequence, at an end token or a limit."""

    sequence: SequenceId
    token: int
    ended: bool


@dataclass(frozen=True, slots=True)
class MlxPass:
    """What one step of the batcher did. Times in seconds."""

    tokens: list[Token]
    prefill_tokens: int
    prefill_s: float
    decode_s: float


class Batcher:
    """Sequences that are decoded together; new ones join at any step."""

    def __init__(self, model: MlxModel, eos_ids: Sequence[int], device: Any, slots: int, batch_tokens: int) -> None:
        self._network = model.network
        self._batch_tokens = max(batch_tokens, slots)
        self.vocabulary = _warm_up(model.network)
        self._ends = StopSequences([(token,) for token in eos_ids])
        self._endless = StopSequences()
        self._in_prefill: set[SequenceId] = set()
        self._generator = BatchGenerator(
            self._network,
            completion_batch_size=slots,
            prefill_batch_size=slots,
            prefill_step_size=self._batch_tokens,
            # Its default stream belongs to the device that was the default when mlx_lm was imported.
            stream=mx.new_thread_local_stream(device),
        )

    def insert(
        self,
        prompt: Tokens,
        limit: int,
        sampling: SamplingParams,
        cache: Cache | None,
        hosted: HostedSampler | None = None,
    ) -> SequenceId:
        """Add a sequence; ``prompt`` is what follows the tokens that ``cache`` holds, at least one token.

        ``cache`` may be given to many: merging it into a batch copies it.
        """
        # One greedy sampler for all (the generator's own) lets it sample the whole batch in one call.
        sampler = hosted or self.drawer(sampling)
        # A hosted answer says itself when it has ended: with an end token within its reasoning it may not have.
        endless = sampling.ignore_eos or hosted is not None
        (sequence,) = self._generator.insert(
            [prompt.tolist()],
            max_tokens=[limit],
            caches=[cache],
            samplers=[sampler],
            stop_sequences=[self._endless if endless else self._ends],
        )
        self._in_prefill.add(sequence)
        return int(sequence)

    def drawer(self, sampling: SamplingParams) -> SeededSampler | None:
        """What draws the tokens of a request on the device; None: the likeliest is taken."""
        return None if sampling.is_greedy else SeededSampler(sampling, self.vocabulary)

    def remove(self, sequence: SequenceId) -> None:
        """Free the row of a running sequence."""
        self._in_prefill.discard(sequence)
        with mx.stream(self._generator.stream):
            self._generator.remove([sequence])

    def step(self) -> MlxPass:
        """A token of every sequence in decode, then the next prompt tokens of those in prefill.

        The token of a sequence arrives a step after it was drawn: the next one is already being computed by then.
        Where a sequence ends, that one was for nothing; it is counted nowhere.
        """
        # It takes this many tokens of each prompt, and pads to the longest: few prompts get much, many get little each.
        self._generator.prefill_step_size = self._batch_tokens // max(1, len(self._in_prefill))
        with self._generator.stats() as work:
            prefills, decodes = self._generator.next()
        begun = {each.uid for each in prefills if each.end_of_prompt}
        self._in_prefill -= begun
        return MlxPass(
            tokens=[Token(each.uid, int(each.token), each.finish_reason is not None) for each in decodes],
            # The last token of a prompt goes through the model as the first decode, uncounted.
            prefill_tokens=work.prompt_tokens + len(begun),
            prefill_s=work.prompt_time,
            decode_s=work.decode_time,
        )

    def prefill(self, tokens: Tokens, base: Cache | None = None) -> Cache:
        """The cache after ``tokens``, which follow those in ``base``. ``base`` stays as it is."""
        with mx.stream(self._generator.stream):
            cache: Cache = make_prompt_cache(self._network) if base is None else copy.deepcopy(base)
            for start in range(0, len(tokens), self._batch_tokens):
                piece = mx.array(tokens[start : start + self._batch_tokens])
                self._network(piece[None], cache=cache)
                mx.eval([layer.state for layer in cache])
        return cache

    def score(self, prompt: Tokens, scored: int, prefix: Tokens, base: Cache | None) -> tuple[float, bool]:
        """Log-probability (nats) of the last ``scored`` tokens after those before, and whether each is the likeliest.

        ``base`` holds ``prefix``, with which ``prompt`` begins.
        """
        logprob, likeliest = 0.0, True
        with mx.stream(self._generator.stream):
            cache = make_prompt_cache(self._network) if base is None else copy.deepcopy(base)
            for start in range(len(prefix), len(prompt) - 1, self._batch_tokens):
                end = min(start + self._batch_tokens, len(prompt) - 1)
                logits = self._network(mx.array(prompt[start:end])[None], cache=cache)[0].astype(mx.float32)
                first = max(start, len(prompt) - scored - 1)
                if first < end:
                    rows = logits[first - start :]
                    wanted = mx.array(prompt[first + 1 : end + 1])
                    chosen = mx.take_along_axis(rows, wanted[:, None], axis=-1)[:, 0]
                    logprob += float((chosen - mx.logsumexp(rows, axis=-1)).sum())
                    likeliest &= bool((rows.argmax(axis=-1) == wanted).all())
                mx.eval([layer.state for layer in cache])
        return logprob, likeliest

    def embed(self, prompt: Tokens) -> list[float]:
        """The mean of the last layer's states, of length 1. Raises RequestError for a network that hides them."""
        trunk = getattr(self._network, "model", None)
        if trunk is None:
            raise RequestError("this model gives no embeddings")
        with mx.stream(self._generator.stream):
            mean = trunk(mx.array(prompt)[None])[0].astype(mx.float32).mean(axis=0)
            return [float(each) for each in np.array(mean / mx.linalg.norm(mean))]

    def shortened(self, cache: Cache, surplus: int) -> Cache | None:
        """A view of ``cache`` without its last ``surplus`` tokens; None when its layers cannot go back."""
        if surplus == 0:
            return cache
        if not can_trim_prompt_cache(cache):
            return None
        # Trimming moves a mark in the object and touches no array, and merging only reads: a shallow copy suffices.
        view = [copy.copy(layer) for layer in cache]
        return view if trim_prompt_cache(view, surplus) == surplus else None

    def close(self) -> None:
        """Give the memory back."""
        self._generator.close()
        del self._generator, self._network
        mx.clear_cache()


def _warm_up(network: Any) -> int:
    """Run the network once, so that its kernels are compiled before a request waits for them.

    Returns the entries of a row of logits, which may be more than the tokenizer has words.
    """
    logits = network(mx.array([[0, 0]]), cache=make_prompt_cache(network))
    mx.eval(logits)
    return int(logits.shape[-1])
