"""The plan of shared prefixes: what is shared, what is left alone, and that it stays fast."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from promptmill_workers.engines.prefix_plan import LEAST_TOKENS, PrefixGroup, Tokens, common_length, plan, plan_nested

RULES = list(range(100, 160))


def ids(*values: int) -> Tokens:
    return np.array(values, dtype=np.int32)


def prompts_of(*lines: Sequence[int]) -> list[Tokens]:
    return [np.array(line, dtype=np.int32) for line in lines]


#: Few different tokens, so that prompts often begin alike.
prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(lambda line: ids(*line)), max_size=12)


def test_prompts_of_two_owners_share_nothing() -> None:
    lines = prompts_of([*RULES, 1], [*RULES, 2], [*RULES, 3], [*RULES, 4])
    owners = ["alice", "bob", "alice", "bob"]
    assert plan(lines, owners=owners) == [PrefixGroup(len(RULES), (0, 2)), PrefixGroup(len(RULES), (1, 3))]
    assert plan_nested(lines, owners=["a", "b", "c", "d"]).shared == [0] * 4
    nested = plan_nested(lines, owners=owners)
    assert (nested.shared, nested.order) == ([len(RULES)] * 4, [0, 2, 1, 3])


def test_common_length_ends_at_the_first_difference_or_the_shorter_end() -> None:
    assert common_length(ids(1, 2, 3), ids(1, 2, 4)) == 2
    assert common_length(ids(1, 2), ids(1, 2, 4)) == 2
    assert common_length(ids(5), ids(6)) == 0
    assert common_length(ids(), ids(1)) == 0


def test_a_common_task_is_shared_by_all_its_prompts() -> None:
    assert plan(prompts_of([*RULES, 1], [*RULES, 2], [*RULES, 3])) == [PrefixGroup(len(RULES), (0, 1, 2))]


def test_one_prompt_alone_and_no_prompt_share_nothing() -> None:
    assert plan(prompts_of(RULES)) == []
    assert plan([]) == []
    assert plan_nested([]).order == []


def test_the_last_token_of_a_prompt_is_never_shared() -> None:
    assert plan(prompts_of(RULES, RULES)) == [PrefixGroup(len(RULES) - 1, (0, 1))]


def test_a_prefix_below_the_least_length_is_not_worth_a_step() -> None:
    short = RULES[: LEAST_TOKENS - 1]
    assert plan(prompts_of([*short, 1], [*short, 2])) == []
    assert plan_nested(prompts_of([*short, 1], [*short, 2])).shared == [0, 0]


def test_two_tasks_make_two_groups() -> None:
    other = RULES[::-1]
    found = plan(prompts_of([*RULES, 1], [*other, 1], [*RULES, 2], [*other, 2], [7, 8, 9]))
    assert sorted(found, key=lambda group: group.members) == [
        PrefixGroup(len(RULES), (0, 2)),
        PrefixGroup(len(other), (1, 3)),
    ]


def test_groups_split_where_longer_prefixes_save_more() -> None:
    common, left, right = RULES[:20], list(range(200, 300)), list(range(300, 400))
    found = plan(prompts_of(*[[*common, *left, n] for n in range(3)], *[[*common, *right, n] for n in range(3)]))
    assert sorted(group.length for group in found) == [120, 120]
    assert sum(group.saved for group in found) == 480


def test_nested_prefixes_are_all_used() -> None:
    task, shots = RULES, list(range(200, 240))
    nested = plan_nested(prompts_of([*task, 1, 1], [*task, *shots, 1], [*task, 2, 2], [*task, *shots, 2]))
    assert nested.shared == [60, 100, 60, 100]
    assert nested.order == [0, 1, 3, 2]


def test_requests_of_one_task_come_together_and_tasks_in_the_order_they_came() -> None:
    other = RULES[::-1]
    nested = plan_nested(prompts_of([7, 7], [*other, 1], [*RULES, 1], [*other, 2], [*RULES, 2], [8, 8]))
    assert nested.order == [0, 1, 3, 2, 4, 5]


def best_partition(lines: list[Tokens], least: int) -> int:
    """Tokens saved by the best grouping, by the definition: a run is kept whole, or cut at its first difference."""
    if len(lines) < 2:
        return 0
    length = min(common_length(a[:-1], b[:-1]) for a in lines for b in lines)
    branches: dict[int, list[Tokens]] = {}
    alone = 0
    for line in lines:
        if len(line) - 1 > length:
            branches.setdefault(int(line[length]), []).append(line)
        else:
            alone += 1
    if len(branches) == 1 and not alone:
        raise AssertionError("the common length was not the longest")
    apart = sum(best_partition(branch, least) for branch in branches.values())
    return max(apart, length * (len(lines) - 1) if length >= least else 0)


@given(prompts, st.integers(1, 4))
def test_no_other_partition_saves_more(lines: list[Tokens], least: int) -> None:
    assert sum(group.saved for group in plan(lines, least)) == best_partition(lines, least)


@given(prompts, st.integers(1, 4))
def test_groups_are_disjoint_and_really_share(lines: list[Tokens], least: int) -> None:
    groups = plan(lines, least)
    members = [member for group in groups for member in group.members]
    assert len(members) == len(set(members))
    for group in groups:
        assert len(group.members) > 1
        assert group.length >= least
        heads = {tuple(lines[member][: group.length]) for member in group.members}
        assert len(heads) == 1
        assert all(len(lines[member]) > group.length for member in group.members)


@given(prompts, st.integers(1, 4))
def test_a_nested_prefix_is_common_with_another_prompt(lines: list[Tokens], least: int) -> None:
    nested = plan_nested(lines, least)
    assert sorted(nested.order) == list(range(len(lines)))
    for index, shared in enumerate(nested.shared):
        others = [common_length(lines[index][:-1], other[:-1]) for at, other in enumerate(lines) if at != index]
        assert shared == 0 or shared >= least
        assert shared <= max(others, default=0)
        # What is left unshared would not have been worth it.
        assert max(others, default=0) - shared < least


def test_growing_conversations_are_planned_in_linear_time() -> None:
    """Each prompt continues the one before: the deepest tree there can be."""
    line = np.arange(4000, dtype=np.int32)
    lines = [line[:size] for size in range(20, 4000, 4)]
    started = time.process_time()
    plan(lines)
    plan_nested(lines)
    assert time.process_time() - started < 2.0
