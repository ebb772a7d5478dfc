"""``show --wrong``, ``--unparsed`` and ``--flipped``: rows by what their scores say."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from promptmill.cli.common import open_all, print_json
from promptmill.core.terminal import say

if TYPE_CHECKING:
    from promptmill.scoring.mistakes import Flip, JudgedRow

#: Characters of an answer that are shown.
EXCERPT = 160


def show_wrong(job: str, score: str | None, unread_only: bool, limit: int, as_json: bool) -> None:
    """Print rows whose answers are wrong, or could not be read."""
    from promptmill.scoring.mistakes import wrong_rows

    _, db = open_all()
    # One more than is shown tells whether there are more.
    found = list(islice(wrong_rows(db, job, score, unread_only), limit + 1))
    if as_json:
        print_json([asdict(each) for each in found[:limit]])
        return
    for each in found[:limit]:
        say(_line(each))
    if not found:
        say("no such row")
    elif len(found) > limit:
        say(f"... and more; see them with --limit {limit * 10}")


def _line(each: JudgedRow) -> str:
    said = f"{each.outcome}" if each.predicted is None else f"answered {each.predicted}"
    worth = "" if each.value in (None, 0.0) else f", worth {each.value:.3g}"
    about = f" ({each.error})" if each.error else ""
    head = f"row {each.row}, {each.id}: {each.score}: expected {each.expected}, {said}{worth}{about}"
    return f"{head}\n    {_text(each.text)}"


def _text(text: str | None) -> str:
    line = json.dumps(text or "", ensure_ascii=False)[1:-1]
    return line if len(line) <= EXCERPT else line[: EXCERPT - 1] + "…"


def show_flipped(before: str, after: str, score: str | None, limit: int, as_json: bool) -> None:
    """Print rows that one has right and the other wrong, how many go each way, and how likely that is by chance."""
    from promptmill.scoring.mistakes import flipped_rows

    _, db = open_all()
    flips = flipped_rows(db, before, after, score)
    names = sorted({each.score for each in flips})
    tests = {name: _test([each for each in flips if each.score == name]) for name in names}
    if as_json:
        print_json({"scores": tests, "rows": [asdict(each) for each in flips[:limit]]})
        return
    if not flips:
        say("no row is right in the one and wrong in the other")
    for name, each in tests.items():
        say(
            f"{name}: {each['losses']:,} right in {before} and wrong in {after}, {each['gains']:,} the other way; "
            f"McNemar's exact test p = {each['mcnemar_p']:.3g}"
        )
    for flip in flips[:limit]:
        way = "lost" if flip.is_loss else "won"
        say(
            f"{way}: {flip.id}: {flip.score}: expected {flip.expected}, "
            f"{flip.before.predicted or flip.before.outcome} -> {flip.after.predicted or flip.after.outcome}"
        )
    if len(flips) > limit:
        say(f"... and {len(flips) - limit:,} more; see them with --limit {len(flips)}")


def _test(flips: list[Flip]) -> dict[str, Any]:
    """How many go each way, and McNemar's exact test, to which copies of a row are one."""
    import numpy as np

    from promptmill.scoring.statistics.clusters import Clusters
    from promptmill.scoring.statistics.paired import signs

    changes = np.array([-1.0 if each.is_loss else 1.0 for each in flips])
    clusters = Clusters.of(np.array([each.after.input_key for each in flips]))
    losses = int((changes < 0).sum())
    return {"losses": losses, "gains": len(flips) - losses, "mcnemar_p": signs(clusters.sums(changes))}
