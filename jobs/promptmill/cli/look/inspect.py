"""Commands that look at jobs and workers, and end jobs."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from promptmill.cli.common import clock, json_option, open_all, print_json, stdout_console, table
from promptmill.core.terminal import say

if TYPE_CHECKING:
    from promptmill.scoring.mistakes import Flip, JudgedRow

#: Values of a vector that are shown.
SHOWN_VALUES = 8

#: Characters of an answer that are shown in a list.
EXCERPT = 160


@click.command("list", epilog="Example: promptmill list --limit 5")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="How many.")
@json_option
def list_(limit: int, as_json: bool) -> None:
    """List jobs, the newest first."""
    from promptmill.store.catalog import list_jobs

    _, db = open_all()
    found = list_jobs(db, limit)
    if as_json:
        print_json(found)
        return
    if not found:
        say("no jobs yet; start one with: promptmill run DATASET --model MODEL")
        return
    rows = [
        [job["job_id"], job["name"], job["state"], job["dataset"], job["model"],
         f"{job['ok'] + job['errors']}/{job['rows']}", job["errors"], clock(job["submitted_at"])]
        for job in found
    ]  # fmt: skip
    columns = ["job", "name", "state", "dataset", "model", "done", "errors", "submitted"]
    table(columns, rows, right={"done", "errors"})


@click.command(epilog="Example: promptmill status @last")
@click.argument("job", default="@last")
@json_option
def status(job: str, as_json: bool) -> None:
    """Show where JOB stands: an id, a unique prefix of one, a name, or @last."""
    from promptmill.service import service
    from promptmill.store.catalog import find_job

    _, db = open_all()
    found = service.status(db, find_job(db, job))
    if as_json:
        print_json(found)
        return
    console = stdout_console()
    for key, value in found.items():
        if value is None or key == "chunks":
            continue
        text = clock(value) if key.endswith("_at") else value
        console.print(f"{key.replace('_', ' '):<14} {text}", soft_wrap=True)
    chunks = ", ".join(f"{count} {state}" for state, count in sorted(found["chunks"].items()))
    console.print(f"{'chunks':<14} {chunks or 'none'}")


@click.command(epilog="Example: promptmill show @last 0")
@click.argument("job", default="@last")
@click.argument("row", required=False)
@click.option("--wrong", is_flag=True, help="List the rows whose answers are wrong by the task's scores.")
@click.option("--unparsed", is_flag=True, help="List the rows in whose answers nothing could be read.")
@click.option("--flipped", nargs=2, metavar="A B", help="List the rows that A has right and B wrong, or the other way.")
@click.option("--score", help="Only by this score.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Most rows listed.")
@json_option
def show(
    job: str, row: str | None, wrong: bool, unparsed: bool, flipped: tuple[str, str] | None, score: str | None,
    limit: int, as_json: bool,
) -> None:  # fmt: skip
    """Show ROW of JOB: the prompt as the model saw it, the answer, tokens, timings and attempts.

    ROW is a number, counted from 0, or the id of a line.
    Or list rows by what their scores say. There JOB, A and B may name a score run, as JOB@s2.
    """
    if (row is not None) + wrong + unparsed + (flipped is not None) != 1:
        raise click.UsageError("give a row, --wrong, --unparsed or --flipped A B")
    if flipped is not None:
        _show_flipped(*flipped, score, limit, as_json)
    elif row is None:
        _show_wrong(job, score, unparsed, limit, as_json)
    else:
        _show_row(job, row, as_json)


def _show_wrong(job: str, score: str | None, unread_only: bool, limit: int, as_json: bool) -> None:
    """Print rows whose answers are wrong, or could not be read."""
    from promptmill.scoring.mistakes import wrong_rows

    _, db = open_all()
    # One more than is shown tells whether there are more.
    found = list(islice(wrong_rows(db, job, score, unread_only), limit + 1))
    if as_json:
        print_json([_as_json(each) for each in found[:limit]])
        return
    for each in found[:limit]:
        say(_judged(each))
    if not found:
        say("no such row")
    elif len(found) > limit:
        say(f"... and more; see them with --limit {limit * 10}")


def _as_json(each: JudgedRow) -> dict[str, Any]:
    found = asdict(each)
    # Numbers of 64 bits mean nothing elsewhere, and are more than numbers of JSON can be trusted with.
    del found["asked"]
    return found


def _judged(each: JudgedRow) -> str:
    said = f"{each.outcome}" if each.predicted is None else f"answered {each.predicted}"
    worth = "" if each.value in (None, 0.0) else f", worth {each.value:.3g}"
    about = f" ({each.error})" if each.error else ""
    head = f"row {each.row}, {each.id}: {each.score}: expected {each.expected}, {said}{worth}{about}"
    return f"{head}\n    {_excerpt(each.text)}"


def _excerpt(text: str | None) -> str:
    line = json.dumps(text or "", ensure_ascii=False)[1:-1]
    return line if len(line) <= EXCERPT else line[: EXCERPT - 1] + "…"


def _show_flipped(before: str, after: str, score: str | None, limit: int, as_json: bool) -> None:
    """Print rows that one has right and the other wrong, how many go each way, and how likely that is by chance."""
    from promptmill.scoring.mistakes import flipped_rows

    _, db = open_all()
    flips, others = flipped_rows(db, before, after, score)
    names = sorted({each.score for each in flips})
    tests = {name: _tested([each for each in flips if each.score == name]) for name in names}
    if as_json:
        rows = [
            asdict(each) | {"before": _as_json(each.before), "after": _as_json(each.after)} for each in flips[:limit]
        ]
        print_json({"scores": tests, "rows": rows, "not_the_same": others})
        return
    if not flips:
        say("no row is right in the one and wrong in the other")
    for name, each in tests.items():
        say(
            f"{name}: {each['losses']:,} right in {before} and wrong in {after}, {each['gains']:,} the other way; "
            f"McNemar's exact test over inputs, {each['inputs']:,} of them: p = {each['mcnemar_p']:.3g}"
        )
    if others:
        say(f"{others:,} rows of one id ask something else, or another answer is expected: they are left out")
    for flip in flips[:limit]:
        way = "lost" if flip.is_loss else "won"
        say(
            f"{way}: {flip.id}: {flip.score}: expected {flip.expected}, "
            f"{flip.before.predicted or flip.before.outcome} -> {flip.after.predicted or flip.after.outcome}"
        )
    if len(flips) > limit:
        say(f"... and {len(flips) - limit:,} more; see them with --limit {len(flips)}")


def _tested(flips: list[Flip]) -> dict[str, Any]:
    """How many go each way, and McNemar's exact test, to which copies of a row are one."""
    import numpy as np

    from promptmill.scoring.statistics.clusters import Clusters
    from promptmill.scoring.statistics.paired import signs

    changes = np.array([-1.0 if each.is_loss else 1.0 for each in flips])
    clusters = Clusters.of(np.array([each.after.asked.prompt for each in flips]))
    losses = int((changes < 0).sum())
    p = signs(clusters.sums(changes))
    return {"losses": losses, "gains": len(flips) - losses, "inputs": clusters.count, "mcnemar_p": p}


def _show_row(job: str, asked: str, as_json: bool) -> None:
    from promptmill.service import service

    _, db = open_all()
    row = service.row_of(job, asked, db)
    found = service.show(job, row, db)
    if as_json:
        print_json(found)
        return
    console = stdout_console()
    console.print(f"row {row}, id {found['id']}", markup=False)
    missing = "(not kept)" if (found["result"] or {}).get("state") == "ok" else "(the line could not be read)"
    if found["prompt_parts"]:
        _show_prompt(found["prompt_parts"])
    else:
        _section("prompt", found["prompt"] or _plain(found["messages"]) or missing)
    if found["expected"] is not None:
        _section("expected", str(found["expected"]))
    _show_result(found["result"])
    for attempt in found["attempts"]:
        console.print(
            f"attempt {attempt['attempt']} of chunk {attempt['chunk']} on {attempt['worker_id']}: "
            f"{attempt['outcome'] or 'running'}, from {clock(attempt['started_at'])}",
            soft_wrap=True, markup=False,
        )  # fmt: skip


def _plain(messages: list[dict[str, str]] | None) -> str | None:
    return "\n".join(f"{each['role']}: {each['content']}" for each in messages) if messages else None


#: How the parts of a prompt look on a terminal.
PART_STYLES = {"text": "", "control": "cyan", "spelled": "yellow"}


def _show_prompt(parts: list[tuple[str, str]]) -> None:
    """The prompt with its control tokens marked by colour, and told in a line of their own."""
    from collections import Counter

    from rich.text import Text

    console = stdout_console()
    if console.is_terminal:
        console.print(Text("--- prompt", style="bold"))
        console.print(Text.assemble(*((text, PART_STYLES[kind]) for text, kind in parts)), soft_wrap=True)
    else:
        _section("prompt", "".join(text for text, _ in parts))
    for kind, title in (("control", "control tokens"), ("spelled", "only text, though spelled like a control token")):
        counts = Counter(text for text, each in parts if each == kind)
        if counts:
            shown = ", ".join(f"{count} {text}" for text, count in counts.items())
            console.print(Text(f"--- {title}: {shown}"), soft_wrap=True)


def _section(title: str, text: str) -> None:
    from rich.text import Text

    stdout_console().print(Text(f"--- {title}", style="bold"))
    say(text)


def _show_result(result: dict[str, Any] | None) -> None:
    if result is None:
        say("--- no result yet")
        return
    if result["state"] == "error":
        _section("error", f"{result['error']['class']}: {result['error']['message']}")
        return
    for title, text in answer_parts(result):
        _section(title, text or "(empty)")
    took = (
        "copied from an identical request"
        if result["latency_s"] is None
        else f"latency {result['latency_s']:.3f} s, first token after {result['ttft_s']:.3f} s"
    )
    queued = "" if result["queue_s"] is None else f", {result['queue_s']:.3f} s in the queue"
    say(
        f"--- {result['finish_reason']}; {result['prompt_tokens']} prompt tokens ({result['cached_tokens']} cached), "
        f"{result['output_tokens']} output tokens; {took}{queued}"
    )


def answer_parts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Everything that a row was answered with, as titles and texts."""
    parts = []
    if "reasoning" in result:
        parts.append((f"reasoning, {result['reasoning_tokens']} tokens", result["reasoning"]))
    others = result.get("choices", [])
    if "continuations" not in result and "embedding" not in result:
        parts.append((f"answer 1 of {len(others) + 1}" if others else "answer", result["text"]))
    for number, each in enumerate(others, start=2):
        thought = f"({each['reasoning']})\n" if each.get("reasoning") else ""
        parts.append((f"answer {number} of {len(others) + 1}", thought + each["text"]))
    for name, show in (
        ("choice_probs", _probabilities), ("continuations", _continuations), ("embedding", _vector),
        ("logprobs", _logprobs),
    ):  # fmt: skip
        if name in result:
            parts.append((name.replace("_", " "), show(result[name])))
    return parts


def _probabilities(found: dict[str, float]) -> str:
    likeliest = sorted(found.items(), key=lambda each: -each[1])
    return "\n".join(f"{chance:.4f}  {label}" for label, chance in likeliest)


def _continuations(found: list[dict[str, Any]]) -> str:
    greedy = {True: ", what the model would say", False: ""}
    return "\n".join(f"{each['logprob']:.4f} nats ({each['tokens']} tokens{greedy[each['greedy']]})  {each['text']}"
                     for each in found)  # fmt: skip


def _vector(found: list[float]) -> str:
    first = ", ".join(f"{value:.6f}" for value in found[:SHOWN_VALUES])
    return f"{len(found)} dimensions: {first}{', ...' if len(found) > SHOWN_VALUES else ''}"


def _logprobs(found: list[dict[str, Any]]) -> str:
    return " ".join(f"{each['token']!r} {each['logprob']:.3f}" for each in found)


@click.command(epilog="Example: promptmill workers --json")
@json_option
def workers(as_json: bool) -> None:
    """List the workers that are alive: device asked for and got, layers offloaded, model, slots, speed."""
    from promptmill.queue.dispatcher import ALIVE_S, live_workers
    from promptmill.store.catalog import waiting_for_models

    settings, db = open_all()
    found = live_workers(db, settings.redis_url)
    if as_json:
        print_json([dict(worker) for worker in found])
        return
    if not found:
        say("no worker is alive; start this machine's with: promptmill worker --model MODEL")
        return
    rows = [
        [each["id"], each["state"], each["device_asked"], each["device_got"], _layers(each), each["model"],
         each["model_fingerprint"] and each["model_fingerprint"][:12], each["slots"], _rate(each["output_tps"]),
         f"{each['age_s']:.0f} s ago"]
        for each in found
    ]  # fmt: skip
    columns = ["worker", "state", "asked", "got", "layers on GPU", "model", "file", "slots", "tok/s", "heartbeat"]
    table(columns, rows, right={"slots", "tok/s", "layers on GPU"})
    for job_id, words in waiting_for_models(db, ALIVE_S).items():
        say(f"job {job_id} waits for {words}")


def _rate(tokens_s: float | None) -> str | None:
    return None if tokens_s is None else f"{tokens_s:.0f}"


def _layers(worker: Any) -> str | None:
    return None if worker["layers"] is None else f"{worker['layers_offloaded']}/{worker['layers']}"
