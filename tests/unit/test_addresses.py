"""URLs of Redis and of databases: which are understood, what is said of the others, and that no secret is shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from promptmill.core.addresses import database_url, masked, secrets_of, sqlite_url
from promptmill.core.redis_client import redis_address
from promptmill.core.settings import load_settings, without_secrets
from promptmill.database.engine import connect
from promptmill.errors import DatabaseError, PromptmillError, SettingsError

#: Passwords as people make them.
PASSWORDS = ["abc#def", "pa[ss", "a/b", "12/34", "1?w=x", "p@ss@word", "a:b", "a b", "密码#1", "x%zz", "=&?#/@:[]"]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("user", ["", "worker"])
def test_a_password_may_hold_any_characters(password: str, user: str) -> None:
    redis = redis_address(f"redis://{user}:{password}@10.0.0.1:6380/3")
    assert (redis.username, redis.password, redis.servers, redis.db) == (
        user or None, password, (("10.0.0.1", 6380),), 3,
    )  # fmt: skip
    database = database_url(f"postgresql://{user}:{password}@10.0.0.1:5433/jobs?sslmode=require")
    assert (database.username, database.password, database.host, database.port, database.database) == (
        user or None, password, "10.0.0.1", 5433, "jobs",
    )  # fmt: skip
    assert database.query == {"sslmode": "require"}


def test_a_password_may_be_encoded_or_an_option() -> None:
    assert redis_address("redis://:a%23b%25@h/0").password == "a#b%"
    assert redis_address("redis://h/0?password=a@b+c").password == "a@b+c"
    assert database_url("postgresql://u@h/d?password=a%23b").query == {"password": "a#b"}


def test_sockets_sentinels_and_tls_are_understood(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.touch()
    socket = redis_address("unix:///run/my%20redis.sock?db=2&password=x")
    assert (socket.path, socket.db, socket.password) == ("/run/my redis.sock", 2, "x")
    asked = redis_address("sentinel://u:p#w@s1:1,s2/mymaster/2?sentinel_password=z")
    assert (asked.servers, asked.service, asked.db) == ((("s1", 1), ("s2", 26379)), "mymaster", 2)
    assert (asked.password, asked.sentinel_login) == ("p#w", {"password": "z"})
    tls = redis_address(f"rediss://h?ssl_ca_certs={authority}&ssl_check_hostname=false")
    assert tls.tls == {"ssl_cert_reqs": "required", "ssl_ca_certs": str(authority), "ssl_check_hostname": False}


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("secret-word", "it is no URL"),
        ("secretword.example:6379", "it is no URL"),
        ("amqp://u:secret-word@h", "'amqp' is no scheme of Redis"),
        ("redis://:secret-word@h:99999/0", "host or port"),
        ("redis://:secret-word@h/x", "its database is no number"),
        ("redis://:secret-word@h/0?foo=1", "unknown option 'foo'"),
        ("redis://h/0?password=secret-word&more", "behind its ?"),
        ("redis://:secret-word@h1,h2/0", "several servers"),
        ("sentinel://:secret-word@h", "for which service"),
        ("unix://:secret-word@", "it names no socket"),
        ("rediss://:secret-word@h?ssl_cert_reqs=maybe", "none, optional or required"),
        ("rediss://:secret-word@h?ssl_ca_certs=/none.pem", "there is no file /none.pem"),
    ],
)
def test_what_is_no_address_of_redis_is_said_when_settings_are_read(
    url: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBS_REDIS_URL", url)
    with pytest.raises(SettingsError, match="JOBS_REDIS_URL") as refused:
        load_settings()
    assert says in refused.value.message
    assert "secret" not in str(refused.value)
    assert "secret" not in masked(url)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("secret-word", "it is no URL"),
        ("mysql://u:secret-word@h/d", "databases of the kind 'mysql' are not supported"),
        ("postgresql://u:secret-word@h:x/d", "host or port"),
        ("postgresql://u:secret-word@h/d?sslmod=x", "unknown option 'sslmod'. Did you mean sslmode?"),
        ("postgresql://u@h/d?password=secret-word&foo=1", "behind its ?"),
        ("sqlite:///x?foo=1", "unknown option 'foo'"),
        ("sqlite:///x?timeout=soon", "the value of an option"),
        ("sqlite://x", "three slashes"),
    ],
)
def test_what_is_no_database_is_one_clear_sentence(url: str, says: str) -> None:
    with pytest.raises(DatabaseError, match="JOBS_DATABASE_URL") as refused:
        connect(url)
    assert says in refused.value.message
    assert "secret" not in str(refused.value)
    assert "secret" not in masked(url)


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("scheme", ["redis", "rediss", "postgresql", "postgres"])
def test_a_password_is_masked_in_every_form_of_url(password: str, scheme: str) -> None:
    for url in (f"{scheme}://u:{password}@h/0", f"{scheme}://u:{password}@h:5/0", f"{scheme}://:{password}@h"):
        assert password not in masked(url)
        assert masked(url).endswith(url.rpartition("@")[2])
        assert "***" in without_secrets_of(url, f"cannot reach {url} with {password}")
        assert password not in without_secrets_of(url, f"cannot reach {url} with {password}")
    assert "hunter2" not in masked(f"{scheme}://h/0?password=hunter2")
    assert "hunter2" not in masked("redis://hunter2@h/0"), "it may be the password"


def without_secrets_of(url: str, text: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JOBS_REDIS_URL", url)
        return without_secrets(text)


def test_a_url_that_cannot_be_read_gives_all_its_pieces_up() -> None:
    assert secrets_of("redis://:longsecret@h:99999/0") == {"longsecret", "99999"}


@pytest.mark.parametrize("name", ["a?b", "a%25b", "a%b", "a#b", "数据 1", "a?mode=ro", "~x", "a&b=c"])
def test_a_sqlite_file_may_lie_in_any_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / name / "jobs.sqlite"
    db = connect(sqlite_url(path))
    with db.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
    db.dispose()
    assert path.is_file()
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_the_default_database_lies_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "what? 100%25 #1 数据"
    monkeypatch.delenv("JOBS_DATABASE_URL", raising=False)
    monkeypatch.setattr("promptmill.core.settings.data_dir", lambda: folder)
    assert database_url(load_settings().database_url).database == str(folder / "promptmill.sqlite")


def test_a_question_mark_that_begins_no_option_belongs_to_the_path() -> None:
    assert database_url("sqlite:////tmp/wh?t/jobs.sqlite").database == "/tmp/wh?t/jobs.sqlite"


def test_an_error_about_redis_shows_no_secret() -> None:
    from promptmill.queue.broker import Broker

    for url in ("redis://u:secret#1@127.0.0.1:1/0", "redis://127.0.0.1:1/0?password=secret"):
        with pytest.raises(PromptmillError, match="cannot reach Redis at redis://") as away:
            Broker(url).waiting(["m"])
        assert "secret" not in str(away.value)


def test_a_redis_that_refuses_is_not_called_out_of_reach(redis_url: str) -> None:
    from promptmill.queue.broker import Broker
    from promptmill.types import ChunkId

    server = redis_url.rpartition("/")[0]
    for url in (f"{server}/99999", server.replace("redis://", "redis://u:secret@")):
        for ask in (Broker.ping, lambda broker: broker.publish([ChunkId("job", 0)], "m", 0)):
            with pytest.raises(PromptmillError, match="refuses: ") as refused:
                ask(Broker(url))
            assert "secret" not in str(refused.value)


def test_sentinels_without_a_master_are_told_in_one_sentence() -> None:
    from promptmill.queue.broker import Broker

    with pytest.raises(PromptmillError, match=r"No master found for 'jobs'\n"):
        Broker("sentinel://127.0.0.1:1,127.0.0.1:2/jobs/0").ping()


def test_arrow_reads_a_sqlite_file_in_any_folder(tmp_path: Path) -> None:
    """Its driver takes a URI of SQLite's own, in which other characters mean something."""
    from promptmill.database import arrow_tables

    db = connect(sqlite_url(tmp_path / "a?b%25c#d 数据&e" / "jobs.sqlite"))
    with db.begin() as connection:
        connection.execute(sa.text("CREATE TABLE t (n INTEGER)"))
        connection.execute(sa.text("INSERT INTO t VALUES (7)"))
    with db.connect() as connection:
        found = list(arrow_tables.tables(connection, ["SELECT n FROM t"]))
    db.dispose()
    assert [table.to_pylist() for table in found] == [[{"n": 7}]]
