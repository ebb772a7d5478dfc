"""Where the files that travel with the package lie: in the wheel beside the code, in a checkout at its root."""

from __future__ import annotations

from pathlib import Path


def resource_dir(name: str) -> Path:
    """Folder of bundled files, ``name`` being ``"datasets"`` or ``"migrations"``."""
    here = Path(__file__).parents[1]
    packaged = here / f"_{name}"
    return packaged if packaged.is_dir() else here.parents[1] / name
