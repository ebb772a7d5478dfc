"""Greedy answers that are kept across jobs, for those that ask for it: what was asked once is not computed again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.database.engine import epoch, reading, writing
from promptmill.database.tables import answers
from promptmill.types import Extras, FinishReason, Message, Ok, Request, Usage

#: How prompts are made of what was asked. With another number no answer of an earlier release is taken.
PROMPTS = 2

#: Keys of one query: databases take no endless lists.
KEYS_AT_ONCE = 500


def key_of(answering: Sequence[Any], request: Request) -> str | None:
    """SHA-256 over what answers, who asks, and what is asked; None for an answer that is drawn.

    ``answering``: the fingerprint of the model that is loaded and what else changes its answers. The prompt counts
    before the model's chat template, which is among that.
    """
    if not request.sampling.is_greedy:
        return None
    sampling = asdict(replace(request.sampling, timeout_s=None, seed=None))
    turns = [_turn(each) for each in request.messages] if request.messages is not None else None
    # One key's answers are for no other key: it would learn from them what was asked.
    parts = [PROMPTS, answering, request.sharing.owner, turns, request.prompt, request.own, sampling]
    asked = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(asked.encode(errors="replace")).hexdigest()


def _turn(message: Message) -> list[Any]:
    return [message.role, message.content, message.extra, message.own]


def look_up(db: Engine, keys: Mapping[int, str]) -> list[Ok]:
    """Results for the rows whose keys are known. ``keys``: row -> key."""
    known: dict[str, sa.Row[Any]] = {}
    wanted = sorted(set(keys.values()))
    with reading(db) as connection:
        for start in range(0, len(wanted), KEYS_AT_ONCE):
            part = wanted[start : start + KEYS_AT_ONCE]
            for row in connection.execute(sa.select(answers).where(answers.c.key_sha256.in_(part))):
                known[row.key_sha256] = row
    return [_result(row, known[key]) for row, key in keys.items() if key in known]


def _result(row: int, kept: sa.Row[Any]) -> Ok:
    extras = Extras(**json.loads(kept.extras)) if kept.extras else Extras()
    usage = Usage(kept.prompt_tokens, kept.prompt_tokens, kept.output_tokens, kept.reasoning_tokens)
    return Ok(row, kept.text, FinishReason(kept.finish_reason), usage, None, replace(extras, deduplicated=True))


def keep(db: Engine, found: Sequence[tuple[str, Ok]]) -> None:
    """Keep answers under their keys; what is kept already stays."""
    rows = {key: _row(key, answer) for key, answer in found}
    if not rows:
        return
    with writing(db) as connection:
        connection.execute(_insert(connection), list(rows.values()))


def _row(key: str, answer: Ok) -> dict[str, Any]:
    extras = replace(answer.extras, deduplicated=False) if answer.extras else None
    return {
        "key_sha256": key, "text": answer.text.replace("\x00", "\N{REPLACEMENT CHARACTER}"),
        "finish_reason": answer.finish_reason.value, "prompt_tokens": answer.usage.prompt_tokens,
        "output_tokens": answer.usage.output_tokens, "reasoning_tokens": answer.usage.reasoning_tokens,
        "extras": json.dumps(asdict(extras), ensure_ascii=False) if extras and extras != Extras() else None,
    }  # fmt: skip


def _insert(connection: Connection) -> Any:
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert
    else:
        from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]
    return insert(answers).values(stored_at=epoch()).on_conflict_do_nothing()
