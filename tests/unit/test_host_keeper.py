"""Which model's host is loaded, which stays, and whose turn it is. Hosts of the echo engine, which load at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from promptmill.types import Ok, Request, SamplingParams
from promptmill_workers.checkpoints import fingerprint, locate
from promptmill_workers.devices import parse_devices
from promptmill_workers.engines.contract import EngineInfo, EngineOptions
from promptmill_workers.host import turns
from promptmill_workers.host.client import EngineHost, HostConfig, HostDied, Session
from promptmill_workers.host.model_hosts import ModelHosts, NotWanted
from promptmill_workers.model_files import fingerprint_of, states_of
from tests.conftest import wait_until
from tests.two_models import put


@pytest.fixture
def keepers() -> Iterator[list[ModelHosts]]:
    made: list[ModelHosts] = []
    yield made
    for each in made:
        each.close()


def keeper(keepers: list[ModelHosts], loaded_models: int) -> ModelHosts:
    config = HostConfig("echo", parse_devices("cpu")[0], EngineOptions(slots=2), loaded_models=loaded_models)
    keepers.append(ModelHosts(config))
    return keepers[-1]


def use(hosts: ModelHosts, model: str) -> int | None:
    with hosts.session(model):
        return hosts.pid


def test_a_host_stays_loaded_while_there_is_room(keepers: list[ModelHosts]) -> None:
    hosts = keeper(keepers, loaded_models=2)

    first = use(hosts, "echo")
    second = use(hosts, "echo:token_s=0")

    assert use(hosts, "echo") == first
    assert use(hosts, "echo:token_s=0") == second


def lose_host(hosts: ModelHosts, *, answer_first: bool) -> None:
    """The host is killed in the middle of a session."""
    with hosts.session("echo") as session:
        if answer_first:
            assert next(session.answer([Request(0, "a", SamplingParams(), prompt="one")]))
        assert hosts.pid is not None
        os.kill(hosts.pid, signal.SIGKILL)
        session.counters()


@pytest.mark.parametrize(("answer_first", "deaths"), [(True, 1), (False, 8)])
def test_deaths_in_a_row_have_no_answer_between(keepers: list[ModelHosts], answer_first: bool, deaths: int) -> None:
    hosts = keeper(keepers, loaded_models=1)
    hosts.deaths = 7
    with pytest.raises(HostDied):
        lose_host(hosts, answer_first=answer_first)
    assert hosts.deaths == deaths


def test_who_is_not_wanted_any_more_waits_for_no_host(keepers: list[ModelHosts]) -> None:
    hosts = keeper(keepers, loaded_models=1)
    hosts.deaths = 20
    with pytest.raises(HostDied):
        lose_host(hosts, answer_first=False)
    assert hosts.is_backing_off
    unwanted = threading.Event()
    unwanted.set()
    with pytest.raises(NotWanted), hosts.session("echo", unwanted=unwanted):
        pytest.fail("a host was started")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file that others may take the place of."""
    path = tmp_path / "model.gguf"
    put(path, right=True)
    return path


def fingerprint_at(path: Path) -> str:
    return fingerprint_of(states_of(path))


def test_a_host_tells_which_model_it_loaded_and_how(keepers: list[ModelHosts], model: Path) -> None:
    hosts = keeper(keepers, loaded_models=1)
    with hosts.session(str(model)) as session:
        info = session.info
    assert info.fingerprint == fingerprint_at(model) == fingerprint(locate(str(model)))
    assert set(info.environment) == {"name", "version", "chat_template", "kv_type", "flash_attention"}
    assert (info.environment["name"], info.environment["kv_type"], info.environment["flash_attention"]) == (
        "llamacpp", "f16", "on",
    )  # fmt: skip


def test_a_host_that_a_small_job_loaded_has_room_for_a_client_s_longer_text(
    keepers: list[ModelHosts], model: Path
) -> None:
    hosts = keeper(keepers, loaded_models=1)
    with hosts.session(str(model)) as session:
        unasked = session.info.context_tokens
    assert hosts.unload(str(model))
    with hosts.session(str(model), 64) as session:
        assert session.info.context_tokens == unasked > 64
    loaded = hosts.pid
    with hosts.session(str(model), urgent=True) as session:
        text = "words " * 100
        (answer,) = [
            each
            for batch in session.answer([Request(0, "a", SamplingParams(max_tokens=1), prompt=text)])
            for each in batch
        ]
    assert isinstance(answer, Ok), answer
    assert hosts.pid == loaded, "and nothing is loaded anew for it"


def test_a_host_keeps_its_model_when_another_one_takes_the_file_s_place(keepers: list[ModelHosts], model: Path) -> None:
    hosts = keeper(keepers, loaded_models=1)
    first, right = use(hosts, str(model)), fingerprint_at(model)
    put(model, right=False)
    wrong = fingerprint_at(model)

    with hosts.session(str(model), fingerprint=right) as session:
        assert (hosts.pid, session.info.fingerprint) == (first, right)
    assert not hosts.holds_another(str(model), wrong), "it may load it"
    # Who wants the file that is there now gets it.
    with hosts.session(str(model), fingerprint=wrong) as session:
        assert session.info.fingerprint == wrong
    assert hosts.holds_another(str(model), right)
    second = hosts.pid
    with hosts.session(str(model), fingerprint=right) as session:
        assert (hosts.pid, session.info.fingerprint) == (second, wrong), "nothing is loaded in vain"
    put(model, right=True)
    assert not hosts.holds_another(str(model), right)
    with hosts.session(str(model), fingerprint=right) as session:
        assert session.info.fingerprint == right


def test_a_model_that_is_written_to_is_loaded_anew(keepers: list[ModelHosts], model: Path) -> None:
    hosts = keeper(keepers, loaded_models=1)
    first = use(hosts, str(model))
    with model.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(bytes(4))
    os.utime(model, ns=(1, 1))

    with hosts.session(str(model)) as session:
        assert hosts.pid != first
        assert session.info.fingerprint == fingerprint_at(model)


def test_the_least_recently_used_goes_first(keepers: list[ModelHosts]) -> None:
    hosts = keeper(keepers, loaded_models=2)
    first = use(hosts, "echo")
    second = use(hosts, "echo:token_s=0")
    use(hosts, "echo")
    use(hosts, "echo:prefill_s=0")  # the second one goes

    assert use(hosts, "echo") == first
    assert use(hosts, "echo:token_s=0") != second


def test_one_model_at_a_time_unless_told_otherwise(keepers: list[ModelHosts]) -> None:
    hosts = keeper(keepers, loaded_models=1)
    first = use(hosts, "echo")
    use(hosts, "echo:token_s=0")

    assert use(hosts, "echo") != first


def test_the_loaded_model_goes_first_and_the_other_one_not_too_late(
    keepers: list[ModelHosts], monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = keeper(keepers, loaded_models=1)
    assert hosts.turn_of("echo:token_s=0")  # nothing is loaded yet
    use(hosts, "echo")

    assert hosts.turn_of("echo")
    assert not hosts.turn_of("echo:token_s=0")
    monkeypatch.setattr(turns, "FAIR_S", -1.0)
    assert hosts.turn_of("echo:token_s=0")


@pytest.fixture
def slow_load(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Hosts that load until this is set, or until they are ended."""
    go, ready = threading.Event(), EngineHost.wait_ready

    def wait(host: EngineHost) -> EngineInfo:
        while host.alive and not go.wait(0.01):
            pass
        return ready(host)

    monkeypatch.setattr(EngineHost, "wait_ready", wait)
    yield go
    go.set()


def loads(hosts: ModelHosts) -> bool:
    return hosts.pid is not None and hosts.info is None


@pytest.mark.parametrize("end", [ModelHosts.close, ModelHosts.stop_loading])
@pytest.mark.parametrize("plain", [True, False])
def test_a_load_is_cut_short_by_the_worker_s_end(
    keepers: list[ModelHosts], slow_load: threading.Event, end: Callable[[ModelHosts], None], plain: bool
) -> None:
    options = EngineOptions(slots=2, plain_kernels=plain)
    hosts = ModelHosts(HostConfig("echo", parse_devices("cpu")[0], options))
    keepers.append(hosts)
    found: list[BaseException] = []

    def run() -> None:
        try:
            use(hosts, "echo")
        except BaseException as problem:
            found.append(problem)

    loader = threading.Thread(target=run)
    loader.start()
    wait_until(lambda: loads(hosts), "the model loads")
    end(hosts)
    loader.join(60)
    assert not loader.is_alive()
    assert [type(each) for each in found] == [HostDied], "a model that was not loaded would end its job"
    assert hosts.pid is None


def test_a_host_that_works_goes_on_when_nothing_more_is_loaded(keepers: list[ModelHosts]) -> None:
    hosts = keeper(keepers, loaded_models=1)
    with hosts.session("echo") as session:
        hosts.stop_loading()
        assert list(session.answer([Request(0, "a", SamplingParams(), prompt="one")]))
    with pytest.raises(HostDied), hosts.session("echo"):
        pytest.fail("work began")


def test_who_must_run_alone_is_let_in_after_a_while(keepers: list[ModelHosts], monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = keeper(keepers, loaded_models=1)
    order: list[str] = []

    def enter(name: str, alone: bool) -> None:
        with hosts.session("echo", alone=alone):
            order.append(name)

    with hosts.session("echo", urgent=True):
        suspect = threading.Thread(target=enter, args=("suspect", True))
        suspect.start()
        wait_until(lambda: hosts.kept_waiting_s("echo") > 0, "the suspect waits")
        enter("before it waited long", alone=False)
        monkeypatch.setattr(turns, "FAIR_S", 0.0)
        # The lane of urgent requests takes no more when it sees this.
        assert hosts.kept_waiting_s("echo") > turns.FAIR_S
        late = threading.Thread(target=enter, args=("late", False))
        late.start()
        late.join(0.5)
        assert order == ["before it waited long"]
    suspect.join(60)
    late.join(60)
    assert order == ["before it waited long", "suspect", "late"]


@pytest.mark.parametrize("told", [Session.abandon, Session.drain])
def test_what_a_session_is_told_before_it_begins_is_not_forgotten(
    keepers: list[ModelHosts], told: Callable[[Session], None]
) -> None:
    hosts = keeper(keepers, loaded_models=1)
    some = [Request(row, f"r{row}", SamplingParams(max_tokens=50), prompt=f"one two {row}") for row in range(20)]
    with hosts.session("echo:token_s=0.05") as session:
        told(session)
        answers = [each for batch in session.answer(some) for each in batch]
    # Those that hold a slot already may run to their end when it is drained.
    assert len(answers) <= 2
    assert session.dropped == len(some) - len(answers)
