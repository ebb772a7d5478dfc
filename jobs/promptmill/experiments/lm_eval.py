"""A model of lm-evaluation-harness whose requests run as jobs: ``promptmill[harness]``.

import lm_eval
from promptmill.experiments.lm_eval import PromptmillLM

lm_eval.simple_evaluate(model=PromptmillLM(model="demo"), tasks=["arc_easy"])
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from promptmill.errors import JobError
from promptmill.service import python_api
from promptmill.tasks.openai import CHAT, COMPLETIONS

try:
    from lm_eval.api.model import LM
except ImportError:
    raise ImportError("lm-evaluation-harness is not installed: pip install 'promptmill[harness]'") from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

#: Tokens of an answer where a task names no limit; the harness's own models use the same number.
MAX_TOKENS = 256

#: Parameters of the harness's ``generation_kwargs`` -> ours. Others are refused, so that none is silently ignored.
PARAMETERS = {
    "max_gen_toks": "max_tokens", "max_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p",
    "top_k": "top_k", "min_p": "min_p", "seed": "seed", "repetition_penalty": "repetition_penalty",
}  # fmt: skip

#: Continuations of one line: as many as a line may have.
MOST_CONTINUATIONS = 64


class PromptmillLM(LM):  # type: ignore[misc]
    """Requests of the harness as lines of jobs; results are those of the jobs' rows, in the harness's order."""

    def __init__(
        self,
        model: str,
        *,
        queue: bool = False,
        name: str = "lm-eval",
        database_url: str | None = None,
        slots: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """``queue``: hand the jobs to workers instead of running them in this process, and wait ``timeout_s``."""
        super().__init__()
        self._model, self._queue, self._name = model, queue, name
        self._database_url, self._slots, self._timeout_s = database_url, slots, timeout_s
        #: Ids of the jobs that were run, for reports and queries.
        self.jobs: list[str] = []

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of the harness's own cache."""
        return self._model.replace("/", "--")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as JSON: the engine applies the model's own template to it."""
        if not add_generation_prompt:
            raise JobError("the engine's chat template always asks for an answer", hint="Do not prefill answers.")
        return _CHAT_MARK + json.dumps(chat_history, ensure_ascii=False)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each cut before the first of its task's stop texts."""
        lines = [_line(str(index), *self._asked(*each.args)) for index, each in enumerate(requests)]
        return [str(result["text"]) for result in self._answers(lines)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each continuation, and whether greedy decoding would have written it.

        Continuations of one context are scored in one line: the context is computed once.
        """
        found: dict[tuple[str, str], tuple[float, bool]] = {}
        lines = [
            _line(str(index), context, {"continuations": texts})
            for index, (context, texts) in enumerate(_grouped(each.args for each in requests))
        ]
        for line, result in zip(lines, self._answers(lines), strict=True):
            for each in result["continuations"]:
                found[_context(line), each["text"]] = (each["logprob"], each["greedy"])
        return [found[_key(*each.args)] for each in requests]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text after what every text begins with. It must fit into the model's context."""
        lines = [_line(str(index), "", {"continuations": [each.args[0]]}) for index, each in enumerate(requests)]
        return [float(result["continuations"][0]["logprob"]) for result in self._answers(lines)]

    def _asked(self, context: str, said: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Context and sampling parameters of one ``generate_until``."""
        given = dict(said)
        until = given.pop("until", [])
        stops = [until] if isinstance(until, str) else [each for each in until if each]
        greedy = not given.pop("do_sample", given.get("temperature", 0) > 0)
        unknown = given.keys() - PARAMETERS.keys()
        if unknown:
            raise JobError(f"generation_kwargs has '{min(unknown)}', which no job can obey", hint="Leave it out.")
        asked = {PARAMETERS[key]: value for key, value in given.items()}
        asked |= {"temperature": 0.0} if greedy else {}
        return context, {"max_tokens": MAX_TOKENS, **asked, **({"stop": stops} if stops else {})}

    def _answers(self, lines: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One result for each line, in their order. Raises :class:`JobError` for a line without an answer."""
        if not lines:
            return
        job = self._run(lines)
        self.jobs.append(job.id)
        for result in job.results():
            if result["state"] != "ok":
                error = result.get("error", {})
                raise JobError(
                    f"request {result['id']} of job {job.id} has no answer: {error.get('class')}: "
                    f"{error.get('message')}"
                )
            yield result

    def _run(self, lines: Sequence[dict[str, Any]]) -> python_api.Job:
        asked: python_api.JobKeywords = {
            "model": self._model, "name": self._name, "slots": self._slots, "format": "openai_batch",
        }  # fmt: skip
        if not self._queue:
            return python_api.run(lines, database_url=self._database_url, **asked)
        return python_api.submit(lines, database_url=self._database_url, **asked).wait(self._timeout_s)


#: Before a chat that stands where the harness has the text of a prompt.
_CHAT_MARK = "\x01promptmill chat "


def _line(custom_id: str, context: str, asked: dict[str, Any]) -> dict[str, Any]:
    """A line of OpenAI's batch format: plain text as a completion, a chat as a chat."""
    if context.startswith(_CHAT_MARK):
        body = {"messages": json.loads(context.removeprefix(_CHAT_MARK)), **asked}
        return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}
    body = {"prompt": context, **asked}
    return {"custom_id": custom_id, "method": "POST", "url": COMPLETIONS, "body": body}


def _key(context: str, continuation: str) -> tuple[str, str]:
    """Context and continuation as they are asked: spaces at the end of a context belong to what follows it."""
    if context.startswith(_CHAT_MARK):
        return context, continuation
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def _context(line: dict[str, Any]) -> str:
    body = line["body"]
    return body["prompt"] if "prompt" in body else _CHAT_MARK + json.dumps(body["messages"], ensure_ascii=False)


def _grouped(asked: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Each context with its different continuations, at most MOST_CONTINUATIONS at a time."""
    groups: dict[str, dict[str, None]] = {}
    for pair in asked:
        context, continuation = _key(*pair)
        groups.setdefault(context, {})[continuation] = None
    for context, texts in groups.items():
        listed = list(texts)
        for first in range(0, len(listed), MOST_CONTINUATIONS):
            yield context, listed[first : first + MOST_CONTINUATIONS]
