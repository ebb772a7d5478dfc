"""Which lines of a dataset a job takes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from promptmill.core.settings import Settings
from promptmill.errors import DatasetError
from promptmill.service.job_options import JobOptions
from promptmill.service.prepare import prepare
from promptmill.service.rows import Rows
from promptmill.service.selection import Selection, parse_where
from promptmill.tasks.sampling import resolve_sampling
from promptmill.types import DatasetLine


def lines(count: int = 20) -> list[DatasetLine]:
    return [
        DatasetLine(
            number + 1, f"id-{number}", fields={"text": "t"}, expected={"is_ad": number % 4 == 0},
            meta={"group": "ab"[number % 2]},
        )
        for number in range(count)
    ]  # fmt: skip


def taken(**how: Any) -> list[str | None]:
    return [each.custom_id for each in Selection(**how).apply(iter(lines()))]


def test_every_line_once_unless_told_otherwise() -> None:
    assert taken() == [f"id-{number}" for number in range(20)]
    assert Selection().to_json() == {}


def test_where_looks_at_what_is_asked_expected_and_told() -> None:
    assert taken(where=(("is_ad", "true"),)) == ["id-0", "id-4", "id-8", "id-12", "id-16"]
    assert taken(where=(("group", "b"), ("is_ad", "true"))) == []
    assert taken(where=(("id", "id-7"),)) == ["id-7"]


def test_a_field_that_no_line_has_is_an_error_that_lists_those_it_has() -> None:
    with pytest.raises(DatasetError, match=r"no line has a field 'grup'") as caught:
        taken(where=(("grup", "b"),))
    assert "group, id, is_ad, text" in str(caught.value.hint)


def test_a_line_that_cannot_be_used_is_not_filtered_away() -> None:
    broken = [DatasetLine(1, error="broken"), *lines(2)]
    assert [each.error for each in Selection(where=(("group", "b"),)).apply(iter(broken))] == ["broken", None]


def test_a_sample_keeps_the_order_and_repeats_with_its_seed() -> None:
    first = taken(sample=5, seed=3)

    assert first == taken(sample=5, seed=3)
    assert first == sorted(first, key=lambda name: int(str(name)[3:]))
    assert len(set(first)) == 5
    assert first != taken(sample=5, seed=4)
    assert taken(sample=99) == taken()


def test_every_line_is_as_likely_as_any_other() -> None:
    counts = Counter(name for seed in range(2000) for name in taken(sample=5, seed=seed))

    assert all(400 < counts[f"id-{number}"] < 600 for number in range(20))


def test_a_shuffle_takes_each_once_in_another_order() -> None:
    found = taken(shuffle=True, seed=1)

    assert sorted(map(str, found)) == sorted(map(str, taken()))
    assert found != taken()
    assert found == taken(shuffle=True, seed=1)


def test_a_limit_comes_after_the_rest_and_repeats_after_it() -> None:
    assert taken(where=(("group", "a"),), limit=2, repeat=2) == ["id-0", "id-0~2", "id-2", "id-2~2"]
    assert Selection(sample=3, repeat=2).to_json() == {"sample": 3, "repeat": 2}
    assert Selection(sample=3, seed=9).to_json() == {"sample": 3, "seed": 9}


def test_where_is_a_field_and_a_value() -> None:
    assert parse_where(("a=b=c",)) == (("a", "b=c"),)
    with pytest.raises(DatasetError, match="not FIELD=VALUE"):
        parse_where(("nonsense",))


@pytest.fixture
def seeds(tmp_path: Path) -> Callable[..., list[int | None]]:
    """The seed of each row that one line becomes, as a worker resolves it from what is stored."""

    def of(line: dict[str, Any], repeat: int, **sampling: Any) -> list[int | None]:
        path = tmp_path / "line.jsonl"
        path.write_text(json.dumps({"id": "a", "prompt": "p"} | line) + "\n")
        options = JobOptions(dataset=str(path), model="echo", sampling=sampling, selection=Selection(repeat=repeat))
        with prepare(options, Settings(), "embedded") as prepared:
            stored = [json.loads(row.sampling) if row.sampling else {} for row in Rows(prepared)]
        return [resolve_sampling(sampling, own).seed for own in stored]

    return of


def test_each_repetition_draws_with_a_seed_of_its_own(seeds: Callable[..., list[int | None]]) -> None:
    assert seeds({}, 3, seed=5, temperature=1.0) == [5, 6, 7]
    assert seeds({}, 3, seed=5, temperature=1.0, n=4) == [5, 9, 13]
    assert seeds({"seed": 7, "max_tokens": 3}, 2, seed=5, temperature=1.0) == [7, 8]
    assert seeds({}, 2, seed=2**63 - 1, temperature=1.0) == [2**63 - 1, -(2**63)]


def test_repetitions_without_a_seed_draw_one_and_greedy_ones_stay_the_same_question(
    seeds: Callable[..., list[int | None]],
) -> None:
    assert seeds({}, 2, temperature=1.0) == [None, None]
    assert seeds({}, 2, seed=5) == [5, 5]


def test_the_rows_of_a_repetition_are_the_same_whenever_they_are_made(seeds: Callable[..., list[int | None]]) -> None:
    line = {"seed": 3, "temperature": 1.0}
    assert seeds(line, 5) == seeds(line, 5) == seeds(line, 9)[:5]
