"""From a model's name to its files: names, paths, and repositories of a hub that stands in for the real one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from promptmill.errors import ModelError
from promptmill_workers import checkpoints
from promptmill_workers.checkpoints import (
    Checkpoint,
    available,
    build_engine,
    bundled,
    canonical,
    engine_of,
    fingerprint,
    load_engine,
    locate,
)
from promptmill_workers.engines.contract import EngineOptions
from promptmill_workers.limited_counter import token_counter
from promptmill_workers.model_files import LoadedFiles, fingerprint_of, states_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"

GGUF = b"GGUF" + bytes(range(256)) * 40


# --- names and paths -------------------------------------------------------------------------------------------------


def test_the_bundled_models_are_found_by_their_names() -> None:
    assert locate("demo") == Checkpoint("demo", "llamacpp", bundled("demo.gguf"))
    assert locate("demo:mlx") == Checkpoint("demo:mlx", "mlx", bundled("mlx"))
    assert bundled("demo.gguf").is_file()
    assert (bundled("mlx") / "config.json").is_file()


def test_options_of_the_echo_engine_are_part_of_its_name() -> None:
    assert locate("echo") == Checkpoint("echo", "echo")
    found = locate("echo:token_s=0.01,error_on=bad")
    assert (found.name, found.options) == ("echo:token_s=0.01,error_on=bad", {"token_s": "0.01", "error_on": "bad"})


@pytest.mark.parametrize("name", ["echo:token_s", "echo:=1", "echo:,a=1,b"])
def test_options_that_are_not_understood_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="is not understood") as caught:
        locate(name)
    assert caught.value.hint is not None
    assert "echo:prefill_s=" in caught.value.hint


def test_an_unknown_option_of_the_echo_engine_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(ModelError, match="no option 'tokens_s'") as caught:
        build_engine(locate("echo:tokens_s=1"), EngineOptions())
    assert caught.value.hint is not None
    assert "token_s" in caught.value.hint


def test_a_mistyped_name_is_answered_with_the_one_that_was_meant() -> None:
    with pytest.raises(ModelError, match="unknown model 'demp'") as caught:
        locate("demp")
    assert caught.value.hint is not None
    assert "Did you mean demo?" in caught.value.hint


def test_one_model_has_one_name_wherever_it_is_named_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "some.gguf"
    file.write_bytes(GGUF)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    assert {canonical(name) for name in ("some.gguf", "./some.gguf", "~/some.gguf", str(file))} == {str(file)}
    assert [canonical(name) for name in ("demo", "demo:mlx", "echo:a=1", "hf:a/b")] == [
        "demo", "demo:mlx", "echo:a=1", "hf:a/b",
    ]  # fmt: skip


def test_a_name_tells_its_engine(tmp_path: Path) -> None:
    known = {
        "demo": "llamacpp", "demo:mlx": "mlx", "echo:token_s=1": "echo", "hf:a/b:c.gguf": "llamacpp",
        "hf:mlx-community/b": "mlx", str(tmp_path): "mlx", str(tmp_path / "a.gguf"): "llamacpp",
    }  # fmt: skip
    assert {name: engine_of(name) for name in known} == known


def test_a_path_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no model at .*none\.gguf"):
        locate(str(tmp_path / "none.gguf"))


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip", b"FUGG" + bytes(64)])
def test_a_file_that_is_no_gguf_is_refused_by_its_content(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "wrong.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"wrong\.gguf is not a GGUF file"):
        locate(str(file))


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        locate(str(tmp_path))


def test_a_gguf_that_is_cut_short_is_a_model_error_and_no_crash(tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(bundled("demo.gguf").read_bytes()[:100_000])
    with pytest.raises(ModelError, match=r"cut\.gguf cannot be loaded"):
        token_counter(locate(str(file)))


def test_a_fingerprint_changes_with_names_sizes_and_both_ends_of_the_files(tmp_path: Path) -> None:
    def of(name: str, content: bytes) -> str | None:
        folder = tmp_path / hashlib.sha256(name.encode() + content).hexdigest()[:8]
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        return fingerprint(Checkpoint("x", "mlx", folder))

    middle = bytes(3_000_000)
    a, b = "a.safetensors", "b.safetensors"
    prints = [of(a, b"1" + middle + b"1"), of(a, b"2" + middle + b"1"), of(a, b"1" + middle + b"2")]
    prints += [of(b, b"1" + middle + b"1"), of(a, b"1" + middle + b"11")]
    assert len(set(prints)) == 5
    assert of(a, b"1" + middle + b"1") == prints[0]
    assert fingerprint(Checkpoint("echo", "echo")) is None


def test_a_fingerprint_changes_with_the_middle_of_a_large_file(tmp_path: Path) -> None:
    path, content = tmp_path / "model.gguf", bytearray(os.urandom(12 * 2**20))
    path.write_bytes(content)
    before = fingerprint_of(states_of(path))
    # Less than a hundredth of it.
    content[6 * 2**20 : 6 * 2**20 + 100_000] = bytes(100_000)
    path.write_bytes(content)
    assert fingerprint_of(states_of(path)) != before


def test_what_changes_no_answer_is_not_in_the_fingerprint_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = fingerprint(Checkpoint("x", "mlx", tmp_path))
    for name in (".DS_Store", "README.md", ".gitattributes"):
        (tmp_path / name).write_bytes(b"anything")
    assert fingerprint(Checkpoint("x", "mlx", tmp_path)) == before
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ messages }}")
    assert fingerprint(Checkpoint("x", "mlx", tmp_path)) != before


def loaded(path: Path) -> LoadedFiles:
    states = states_of(path)
    return LoadedFiles(str(path), states, fingerprint_of(states))


def test_a_file_in_another_one_s_place_is_told_from_one_that_is_overwritten(tmp_path: Path) -> None:
    path, other = tmp_path / "model.gguf", tmp_path / "other"
    path.write_bytes(b"GGUF one")
    first = loaded(path)
    assert (first.are_current, first.are_overwritten) == (True, False)

    other.write_bytes(b"GGUF two")
    os.replace(other, path)
    assert (first.are_current, first.are_overwritten) == (False, False)

    second = loaded(path)
    assert second.fingerprint != first.fingerprint
    with path.open("r+b") as file:
        file.write(b"GGUF xxx")
    os.utime(path, ns=(1, 1))
    assert (second.are_current, second.are_overwritten) == (False, True)
    path.unlink()
    assert (second.are_current, second.are_overwritten) == (False, False)


def test_a_model_that_is_replaced_while_it_is_loaded_is_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF 0")
    built: list[bytes] = []

    def build(checkpoint: Checkpoint, options: EngineOptions) -> Any:
        built.append(path.read_bytes())
        if len(built) < changes:
            fresh = tmp_path / "fresh"
            fresh.write_bytes(b"GGUF %d" % len(built))
            os.replace(fresh, path)
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(checkpoints, "build_engine", build)
    changes = 2
    _, files = load_engine(str(path), EngineOptions())
    assert files is not None
    assert files.fingerprint == fingerprint(locate(str(path)))
    assert built == [b"GGUF 0", b"GGUF 1"]
    changes = 100
    with pytest.raises(ModelError, match="is being written to"):
        load_engine(str(path), EngineOptions())


def test_the_models_at_hand_begin_with_the_bundled_ones() -> None:
    here = [checkpoint.name for checkpoint in available()]
    assert here[0] == "demo"
    assert "echo" in here


# --- repositories ----------------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """What the hub's HTTP interface says of the repositories in it. ``gated`` wants a token, ``down`` is broken."""

    repositories: dict[str, dict[str, bytes]]
    #: Files that were sent, as ``owner/repo/file``.
    sent: list[str] = field(default_factory=list)

    def info(self, repository: str) -> dict[str, Any]:
        files = [{"rfilename": name} for name in self.repositories[repository]]
        return {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": files, "tags": [], "private": False}

    def tree(self, repository: str) -> list[dict[str, Any]]:
        files = self.repositories[repository].items()
        return [{"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in files]


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if is_api else parts
        repository = f"{owner}/{name}"
        if repository not in self.hub.repositories:
            self._send(401 if with_body else 404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
        elif name == "down":
            self._send(503, b"{}", {}, with_body)
        elif "gated" in repository and rest[:1] != ["tree"] and rest:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, with_body)
        elif is_api:
            found = self.hub.tree(repository) if rest[:1] == ["tree"] else self.hub.info(repository)
            self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, with_body)
        else:
            self._send_file(repository, "/".join(rest[2:]), with_body)

    def _send_file(self, repository: str, name: str, with_body: bool) -> None:
        data = self.hub.repositories[repository].get(name)
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, with_body)
            return
        if with_body:
            self.hub.sent.append(f"{repository}/{name}")
        self._send(200, data, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT}, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[tuple[Hub, str]]:
    """A hub and its address."""
    found = Hub(
        {
            "someone/one": {"model-q8.gguf": GGUF, "README.md": b"read me"},
            "someone/several": {f"model-q{bits}.gguf": GGUF + bytes([bits]) for bits in (4, 5, 8)},
            "someone/folder": {
                "config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"[]",
                "pytorch_model.bin": b"not wanted",
            },
            "someone/notes": {"README.md": b"nothing else"},
            "someone/broken": {"model.gguf": b"this is a page that says sorry"},
            "someone/gated": {"model.gguf": GGUF},
            "someone/down": {"model.gguf": GGUF},
        }
    )  # fmt: skip
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": found}))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield found, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


#: Locates each model in turn and prints what became of it. A process of its own: the client reads its settings once.
PROGRAM = """
import json, sys
from promptmill.errors import ModelError
from promptmill_workers.checkpoints import available, locate

def outcome(name):
    try:
        found = locate(name)
    except ModelError as error:
        return {"error": error.message, "hint": error.hint}
    path = found.path
    files = {each.name: each.stat().st_size for each in ([path] if path.is_file() else path.iterdir())}
    return {"name": found.name, "engine": found.engine, "files": files}

print(json.dumps([outcome(name) for name in sys.argv[1:]]))
print(json.dumps([each.name for each in available()]))
"""


def locate_from(address: str, home: Path, *names: str, **settings: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The outcome of each name, and the models that are at hand afterwards."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "XDG_"))}
    ours = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, *names], env=kept | ours | settings, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes, here = done.stdout.strip().splitlines()[-2:]
    return json.loads(outcomes), json.loads(here)


def test_models_of_a_repository_are_fetched_once_and_listed(hub: tuple[Hub, str], tmp_path: Path) -> None:
    (stand_in, address), size = hub, len(GGUF)
    names = ("hf:someone/one", "hf:someone/one:model-q8.gguf", "hf:someone/several:model-q5.gguf", "hf:someone/folder")

    outcomes, here = locate_from(address, tmp_path, *names)

    assert outcomes == [
        {"name": names[0], "engine": "llamacpp", "files": {"model-q8.gguf": size}},
        {"name": names[1], "engine": "llamacpp", "files": {"model-q8.gguf": size}},
        {"name": names[2], "engine": "llamacpp", "files": {"model-q5.gguf": size + 1}},
        {"name": names[3], "engine": "mlx", "files": {"config.json": 2, "model.safetensors": 7, "tokenizer.json": 2}},
    ]
    assert sorted(stand_in.sent) == [
        "someone/folder/config.json", "someone/folder/model.safetensors", "someone/folder/tokenizer.json",
        "someone/one/model-q8.gguf", "someone/several/model-q5.gguf",
    ]  # fmt: skip
    assert here[-3:] == ["hf:someone/folder", "hf:someone/one:model-q8.gguf", "hf:someone/several:model-q5.gguf"]


def test_what_was_fetched_is_found_without_a_network(hub: tuple[Hub, str], tmp_path: Path) -> None:
    names = ("hf:someone/one", "hf:someone/one:model-q8.gguf", "hf:someone/folder")
    online, _ = locate_from(hub[1], tmp_path, *names)

    offline, _ = locate_from("http://127.0.0.1:9", tmp_path, *names)
    forbidden, _ = locate_from(hub[1], tmp_path, *names, HF_HUB_OFFLINE="1")

    assert offline == forbidden == online


def test_every_way_a_repository_can_fail_is_one_clear_error(hub: tuple[Hub, str], tmp_path: Path) -> None:
    known = {
        "hf:someone/several": "hf:someone/several has 3 GGUF files",
        "hf:someone/nobody": "there is no repository hf:someone/nobody",
        "hf:someone/nobody:model.gguf": "there is no repository hf:someone/nobody:model.gguf",
        "hf:someone/one:other.gguf": "the repository has no such file: hf:someone/one:other.gguf",
        "hf:someone/gated:model.gguf": "hf:someone/gated:model.gguf may not be fetched",
        "hf:someone/broken": "model.gguf is not a GGUF file",
        "hf:noowner": "hf:noowner is no repository",
        "hf:": "hf: is no repository",
        "hf:a/b/c": "hf:a/b/c is no repository",
        "hf:a b/c..d": "hf:a b/c..d is no repository",
        "hf:someone/notes": "hf:someone/notes holds neither a GGUF file nor an MLX model",
        "hf:someone/down": "hf:someone/down cannot be fetched: the hub answered 503",
    }

    outcomes, _ = locate_from(hub[1], tmp_path, *known)

    assert {name: outcome.get("error") for name, outcome in zip(known, outcomes, strict=True)} == known
    assert all(outcome["hint"] for outcome in outcomes)
    assert outcomes[0]["hint"].endswith(", ".join(f"hf:someone/several:model-q{bits}.gguf" for bits in (4, 5, 8)))


@pytest.mark.parametrize("settings", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["unreachable", "offline"])
def test_without_a_network_the_error_says_so(tmp_path: Path, settings: dict[str, str]) -> None:
    names = ("hf:someone/one", "hf:someone/one:model.gguf", "hf:someone/folder")

    outcomes, _ = locate_from("http://127.0.0.1:9", tmp_path, *names, **settings)

    for name, outcome in zip(names, outcomes, strict=True):
        assert outcome["error"] == f"{name} cannot be fetched: the hub cannot be reached, and it is not in the cache"
        assert outcome["hint"]
