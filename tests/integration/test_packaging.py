"""The wheel: what it installs, and that it runs where nothing of the checkout is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from redis import Redis

from promptmill.api.http.serve import GOODBYE_S
from promptmill.core.settings import Settings
from promptmill.core.spans import span_s
from promptmill.database.engine import connect
from tests.conftest import ROOT, answers, free_port, redis_binary, wait_until


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and an sdist of the checkout."""
    out = tmp_path_factory.mktemp("dist")
    uv = ROOT / ".uv" / "bin" / "uv"
    command = [str(uv) if uv.exists() else "uv", "build", "--out-dir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONSAFEPATH": "1"})
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_the_wheel_installs_two_names_and_no_other(built: tuple[Path, Path]) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(built[0]).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"promptmill", "promptmill_workers"}


def test_a_wheel_that_is_built_from_the_sdist_has_its_version(built: tuple[Path, Path], tmp_path: Path) -> None:
    """The sdist holds no git repository."""
    version = built[1].name.removeprefix("promptmill-").removesuffix(".tar.gz")
    assert built[0].name == f"promptmill-{version}-py3-none-any.whl"
    with tarfile.open(built[1]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    about = (tmp_path / f"promptmill-{version}" / "PKG-INFO").read_text()
    assert f"\nVersion: {version}\n" in about


def test_the_wheel_carries_data_and_no_stray_files(built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[0]).namelist()
    for wanted in (
        "promptmill/_migrations/versions/0001_initial.py", "promptmill/_datasets/ad_comments.jsonl",
        "promptmill/_datasets/ad_comments.task.yaml", "promptmill_workers/demo_model/demo.gguf",
        "promptmill_workers/demo_model/mlx/model.safetensors", "promptmill_workers/demo_model/README.md",
    ):  # fmt: skip
        assert wanted in names
    assert not [name for name in names if name.endswith((".pt", ".pyc"))]
    with tarfile.open(built[1]) as sdist:
        assert any(name.endswith("/docker-compose.yml") for name in sdist.getnames())


def test_the_wheel_runs_the_bundled_model_elsewhere(built: tuple[Path, Path], tmp_path: Path) -> None:
    """A clean environment: the wheel alone in its site-packages, its dependencies lent by this one."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False)
    site = next((home / "lib").glob("python*")) / "site-packages"
    zipfile.ZipFile(built[0]).extractall(site)
    lent = next(path for path in map(Path, sys.path) if path.name == "site-packages")
    for dependency in lent.iterdir():
        if not dependency.name.startswith(("promptmill", "_promptmill", "_editable")):
            target = site / dependency.name
            if not target.exists():
                target.symlink_to(dependency)
    script = "import promptmill.cli, sys; print(promptmill.__file__); sys.exit(promptmill.cli.main())"
    data = site / "promptmill" / "_datasets"
    done = subprocess.run(
        [str(home / "bin" / "python"), "-P", "-c", script, "run", str(data / "ad_comments.jsonl"), "--task",
         str(data / "ad_comments.task.yaml"), "--model", "demo", "--limit", "8", "-o", str(tmp_path / "out.jsonl")],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "JOBS_DATABASE_URL": f"sqlite:///{tmp_path}/j.sqlite"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all("is_ad" in json.loads(answer["text"]) for answer in answers)


def test_the_datasets_folder_holds_no_python() -> None:
    assert not list((ROOT / "datasets").rglob("*.py"))


def test_another_package_named_datasets_wins_from_the_repositorys_root(tmp_path: Path) -> None:
    package = tmp_path / "datasets"
    package.mkdir()
    (package / "__init__.py").write_text("ORIGIN = 'the other one'")
    probe = "import promptmill.service.service, datasets; assert datasets.ORIGIN == 'the other one'"
    environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_compose_file_is_sound_and_holds_no_secret() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    services = yaml.safe_load(text)["services"]
    assert {"redis", "postgres", "migrate", "worker-cpu", "worker-cuda"} <= services.keys()
    assert services["worker-cpu"]["profiles"] == ["cpu"]
    assert services["worker-cuda"]["profiles"] == ["cuda"]
    assert all("healthcheck" in services[name] for name in ("redis", "postgres", "worker-cpu", "worker-cuda"))
    assert "POSTGRES_PASSWORD: ${POSTGRES_PASSWORD:?" in text
    assert all(each["logging"]["options"].keys() == {"max-size", "max-file"} for each in services.values())


def test_containers_get_longer_to_end_than_what_runs_in_them() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name, seconds in (("api", GOODBYE_S), ("worker-cpu", Settings().grace_s), ("worker-cuda", Settings().grace_s)):
        assert (span_s(services[name].get("stop_grace_period"), name) or 10.0) >= seconds + 5, name


def test_any_password_of_the_compose_file_reaches_postgresql(
    migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    password = compose["services"]["postgres"]["environment"]["POSTGRES_PASSWORD"]
    for name in ("migrate", "api", "worker-cpu", "worker-cuda"):
        environment = compose["services"][name]["environment"]
        assert environment["JOBS_DATABASE_URL"] == "postgresql://promptmill@postgres/promptmill"
        assert environment["PGPASSWORD"] == password
    monkeypatch.setenv("PGPASSWORD", "a%41@b/c")
    engine = connect(migrated_postgres_url)
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        assert driver.pgconn.password == b"a%41@b/c"
    engine.dispose()


def test_redis_of_the_compose_file_keeps_no_prompt_on_the_disk(tmp_path: Path) -> None:
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["redis"]
    assert "volumes" not in service
    options, port = service["command"][1:], free_port()
    process = subprocess.Popen(
        [redis_binary(), *options, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )
    with Redis(port=port) as client:
        wait_until(lambda: answers(client), "Redis starts")
        client.set("live", "the prompt of a chat")
        process.terminate()
        process.wait()
    assert list(tmp_path.rglob("*")) == []


def test_the_image_makes_the_folder_of_models_for_its_user_and_sees_gpus() -> None:
    """A volume that is empty takes the owner of the image's folder."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    image = (ROOT / "Dockerfile").read_text()
    (mount,) = services["services"]["worker-cpu"]["volumes"]
    name, _, folder = mount.replace("${MODELS_DIR:-models}", "models").partition(":")
    assert name in services["volumes"]
    (made,) = [line for line in image.splitlines() if "install -d -o promptmill" in line]
    assert folder in made.split()
    assert services["x-settings"]["HF_HOME"].startswith(f"{folder}/")
    synced = [line for line in image.splitlines() if "uv sync" in line]
    assert len(synced) == 2
    assert all("--extra nvidia" in line and "--extra api" in line for line in synced)


def test_docker_compose_accepts_the_file() -> None:
    probe = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("the docker compose plugin is not here")
    environment = os.environ | {"POSTGRES_PASSWORD": "x"}
    done = subprocess.run(
        ["docker", "compose", "-f", str(ROOT / "docker-compose.yml"), "--profile", "cpu", "config", "--quiet"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
