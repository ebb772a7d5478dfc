"""Check the wheel and the sdist of a folder: their names and versions, and a run in a new environment.

python tools/check_release.py dist
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = {"promptmill", "promptmill_workers"}


def main() -> None:
    folder = Path(sys.argv[1])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    version = sdist.name.removeprefix("promptmill-").removesuffix(".tar.gz")
    if not wheel.name.startswith(f"promptmill-{version}-"):
        raise SystemExit(f"the wheel {wheel.name} and the sdist {sdist.name} have different versions")
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    if {name for name in names if not name.endswith(".dist-info")} != PACKAGES:
        raise SystemExit(f"the wheel installs other names than {sorted(PACKAGES)}: {sorted(names)}")
    with tempfile.TemporaryDirectory() as place:
        _run_installed(wheel.resolve(), version, Path(place))
    print(f"promptmill {version}: wheel and sdist are sound")


def _run_installed(wheel: Path, version: str, place: Path) -> None:
    """Install the wheel into a new environment and run the bundled dataset there, outside the checkout."""
    uv, python = os.environ.get("UV", "uv"), place / "env" / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, place / "env"], check=True)
    locked = place / "locked.txt"
    export = [uv, "export", "--quiet", "--frozen", "--no-dev", "--no-emit-project", "--no-hashes", "-o", locked]
    subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "-c", locked, wheel], check=True)
    promptmill = python.with_name("promptmill")
    told = subprocess.run([promptmill, "--version"], check=True, capture_output=True, text=True, cwd=place).stdout
    if not told.strip().endswith(f"version {version}"):
        raise SystemExit(f"'promptmill --version' says {told.strip()!r}, not {version}")
    find = "import promptmill, promptmill_workers; print(promptmill.__path__[0])"
    found = subprocess.run([python, "-P", "-c", find], check=True, capture_output=True, text=True, cwd=place).stdout
    data = Path(found.strip()) / "_datasets"
    subprocess.run(
        [promptmill, "run", data / "ad_comments.jsonl", "--task", data / "ad_comments.task.yaml", "--model", "demo",
         "--limit", "8"],
        check=True, cwd=place, stdout=subprocess.DEVNULL,
        env=os.environ | {"JOBS_DATABASE_URL": f"sqlite:///{place}/jobs.sqlite"},
    )  # fmt: skip


if __name__ == "__main__":
    main()
