"""Which model's host is loaded, which stays, and whose turn it is. Hosts of the echo engine, which load at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from promptmill.types import Request, SamplingParams
from promptmill_workers import host_keeper
from promptmill_workers.devices import parse_devices
from promptmill_workers.engines.contract import EngineOptions
from promptmill_workers.host import HostConfig, HostDied
from promptmill_workers.host_keeper import HostKeeper, NotWanted


@pytest.fixture
def keepers() -> Iterator[list[HostKeeper]]:
    made: list[HostKeeper] = []
    yield made
    for each in made:
        each.close()


def keeper(keepers: list[HostKeeper], loaded_models: int) -> HostKeeper:
    config = HostConfig("echo", parse_devices("cpu")[0], EngineOptions(slots=2), loaded_models=loaded_models)
    keepers.append(HostKeeper(config))
    return keepers[-1]


def use(hosts: HostKeeper, model: str) -> int | None:
    with hosts.session(model):
        return hosts.pid


def test_a_host_stays_loaded_while_there_is_room(keepers: list[HostKeeper]) -> None:
    hosts = keeper(keepers, loaded_models=2)

    first = use(hosts, "echo")
    second = use(hosts, "echo:token_s=0")

    assert use(hosts, "echo") == first
    assert use(hosts, "echo:token_s=0") == second


def lose_host(hosts: HostKeeper, *, answer_first: bool) -> None:
    """The host is killed in the middle of a session."""
    with hosts.session("echo") as session:
        if answer_first:
            assert next(session.answer([Request(0, "a", SamplingParams(), prompt="one")]))
        assert hosts.pid is not None
        os.kill(hosts.pid, signal.SIGKILL)
        session.counters()


@pytest.mark.parametrize(("answer_first", "deaths"), [(True, 1), (False, 8)])
def test_deaths_in_a_row_have_no_answer_between(keepers: list[HostKeeper], answer_first: bool, deaths: int) -> None:
    hosts = keeper(keepers, loaded_models=1)
    hosts.deaths = 7
    with pytest.raises(HostDied):
        lose_host(hosts, answer_first=answer_first)
    assert hosts.deaths == deaths


def test_who_is_not_wanted_any_more_waits_for_no_host(keepers: list[HostKeeper]) -> None:
    hosts = keeper(keepers, loaded_models=1)
    hosts.deaths = 20
    with pytest.raises(HostDied):
        lose_host(hosts, answer_first=False)
    assert hosts.is_backing_off
    unwanted = threading.Event()
    unwanted.set()
    with pytest.raises(NotWanted), hosts.session("echo", unwanted=unwanted):
        pytest.fail("a host was started")


def test_the_least_recently_used_goes_first(keepers: list[HostKeeper]) -> None:
    hosts = keeper(keepers, loaded_models=2)
    first = use(hosts, "echo")
    second = use(hosts, "echo:token_s=0")
    use(hosts, "echo")
    use(hosts, "echo:prefill_s=0")  # the second one goes

    assert use(hosts, "echo") == first
    assert use(hosts, "echo:token_s=0") != second


def test_one_model_at_a_time_unless_told_otherwise(keepers: list[HostKeeper]) -> None:
    hosts = keeper(keepers, loaded_models=1)
    first = use(hosts, "echo")
    use(hosts, "echo:token_s=0")

    assert use(hosts, "echo") != first


def test_the_loaded_model_goes_first_and_the_other_one_not_too_late(
    keepers: list[HostKeeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = keeper(keepers, loaded_models=1)
    assert hosts.turn_of("echo:token_s=0")  # nothing is loaded yet
    use(hosts, "echo")

    assert hosts.turn_of("echo")
    assert not hosts.turn_of("echo:token_s=0")
    monkeypatch.setattr(host_keeper, "FAIR_S", -1.0)
    assert hosts.turn_of("echo:token_s=0")
