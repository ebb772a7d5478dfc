"""A model's name becomes files, and files become an engine.

Names: ``demo`` and ``demo:mlx`` (bundled), ``echo[:options]``, a path to a GGUF or an MLX folder, and
``hf:owner/repo[:file]``.
"""

from __future__ import annotations

import errno
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from promptmill.core.registry import resolve, suggestion
from promptmill.errors import ModelError
from promptmill_workers.engines import ENGINES
from promptmill_workers.engines.contract import Engine, EngineOptions, TokenCounter
from promptmill_workers.engines.scheduler import Scheduler
from promptmill_workers.model_files import MLX_FILES, LoadedFiles, fingerprint_of, states_of

#: Seconds for the hub to answer what files a repository has.
ANSWER_TIMEOUT_S = 15.0

#: Errors of the disk, as against those of the network, which are OSErrors too.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model that can be loaded."""

    name: str
    engine: str
    path: Path | None = None
    options: dict[str, str] = field(default_factory=dict)

    @property
    def why(self) -> str:
        """Why this engine runs it."""
        return {"llamacpp": "a GGUF file", "mlx": "a folder of an MLX model"}.get(self.engine, "asked for by name")


def bundled(name: str) -> Path:
    """A file or folder of the demo model."""
    return Path(__file__).parent / "demo_model" / name


BUNDLED = {"demo": ("llamacpp", "demo.gguf"), "demo:mlx": ("mlx", "mlx")}


def canonical(name: str) -> str:
    """The name that everybody uses for this model: paths become absolute. Touches no file but to see if it exists."""
    if name in BUNDLED or name.startswith("hf:") or name.partition(":")[0] == "echo":
        return name
    looks_like_path = os.sep in name or name.endswith(".gguf") or Path(name).exists()
    return str(Path(name).expanduser().absolute()) if looks_like_path else name


def engine_of(name: str) -> str:
    """The engine of a canonical name, as far as the name tells. Raises ModelError for a name that is none."""
    if name in BUNDLED:
        return BUNDLED[name][0]
    if name.partition(":")[0] == "echo":
        return "echo"
    if name.startswith("hf:"):
        return "llamacpp" if name.endswith(".gguf") else "mlx" if "mlx" in name.lower() else "llamacpp"
    return "mlx" if Path(name).is_dir() else "llamacpp"


def locate(name: str) -> Checkpoint:
    """The model's files; those of a repository are fetched, with progress on stderr.

    Raises :class:`ModelError` for an unknown name, a file that is missing or no model, or a repository that cannot be
    fetched.
    """
    known = canonical(name)
    if known in BUNDLED:
        engine, file = BUNDLED[known]
        return Checkpoint(known, engine, bundled(file))
    kind, _, rest = known.partition(":")
    if kind == "echo":
        return Checkpoint(known, "echo", None, _options(rest))
    if kind == "hf":
        return replace(_from_path(_fetch(rest), known), name=known)
    if os.sep not in known:
        here = [checkpoint.name for checkpoint in available()]
        raise ModelError(f"unknown model '{name}'", hint=f"{suggestion(name, here)} Or give a path or hf:owner/repo.")
    return _from_path(Path(known), known)


def _options(text: str) -> dict[str, str]:
    """``a=1,b=2`` as a dictionary."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    if not all(name and equals for name, equals, _ in pairs):
        raise ModelError(f"echo:{text} is not understood", hint="Example: echo:prefill_s=0.001,token_s=0.01")
    return {name: value for name, _, value in pairs}


def _from_path(path: Path, name: str) -> Checkpoint:
    if not path.exists():
        raise ModelError(
            f"there is no model at {path}", hint="Check the path. 'promptmill models list' shows what is here."
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} has no config.json: it is no MLX model folder", hint="Give a .gguf file or such a folder."
            )
        return Checkpoint(name, "mlx", path)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{path.name} is not a GGUF file", hint="llama.cpp reads GGUF; MLX models are folders.")
    return Checkpoint(name, "llamacpp", path)


def build_engine(checkpoint: Checkpoint, options: EngineOptions) -> Engine:
    """Load the model. Raises ModelError or DeviceError."""
    require_mlx(checkpoint)
    kind: Any = resolve("engine", checkpoint.engine, ENGINES)
    return Scheduler(kind.load(checkpoint.path, checkpoint.name, replace(options, model_options=checkpoint.options)))


#: Loads of a file that is written to meanwhile, before it is given up.
LOADS = 3


def load_engine(name: str, options: EngineOptions) -> tuple[Engine, LoadedFiles | None]:
    """The engine of a model's name, and the files that it has loaded; None for echo.

    Raises ModelError or DeviceError; a file that another one takes the place of meanwhile is loaded again.
    """
    for _ in range(LOADS):
        checkpoint = locate(name)
        if checkpoint.path is None:
            return build_engine(checkpoint, options), None
        states = states_of(checkpoint.path)
        found = LoadedFiles(str(checkpoint.path), states, fingerprint_of(states))
        engine = build_engine(checkpoint, options)
        if found.are_current:
            return engine, found
        engine.close()
    raise ModelError(f"{name} is being written to", hint="Put its files there in one step: copy, then rename.")


def check_options(checkpoint: Checkpoint, options: EngineOptions) -> None:
    """Raises ModelError for options that the model's engine cannot have; loads nothing."""
    require_mlx(checkpoint)
    kind: Any = resolve("engine", checkpoint.engine, ENGINES)
    kind.check(replace(options, model_options=checkpoint.options))


@lru_cache(maxsize=1)
def counter_here(engine: str, path: Path | None) -> TokenCounter:
    """The model's tokeniser without its weights, in this process and without limits. Raises ModelError."""
    kind: Any = resolve("engine", engine, ENGINES)
    counter: TokenCounter = kind.token_counter(path)
    return counter


def require_mlx(checkpoint: Checkpoint) -> None:
    """Raises ModelError for an MLX model where MLX is not installed."""
    if checkpoint.engine == "mlx" and not _has_mlx():
        raise ModelError(
            f"{checkpoint.name} needs MLX, which is not installed",
            hint="pip install 'promptmill[mlx]' (Linux); on Apple Silicon it comes with promptmill.",
        )


def _has_mlx() -> bool:
    return importlib.util.find_spec("mlx_lm") is not None


def fingerprint(checkpoint: Checkpoint) -> str | None:
    """Which model the files are: as of :func:`fingerprint_of`; None for echo."""
    return None if checkpoint.path is None else fingerprint_of(states_of(checkpoint.path))


def available() -> list[Checkpoint]:
    """The models on this machine: the bundled ones, and those fetched from a hub before."""
    here = [
        Checkpoint(name, engine, bundled(file))
        for name, (engine, file) in BUNDLED.items()
        if engine != "mlx" or _has_mlx()
    ]
    return [*here, Checkpoint("echo", "echo"), *_cached()]


def _cached() -> Iterator[Checkpoint]:
    for repo, files in _cached_files():
        ggufs = sorted(name for name in files if name.endswith(".gguf"))
        for name in ggufs:
            yield Checkpoint(f"hf:{repo}:{name}", "llamacpp", files[name])
        if not ggufs and "config.json" in files and any(name.endswith(".safetensors") for name in files):
            yield Checkpoint(f"hf:{repo}", "mlx", files["config.json"].parent)


def _cached_files() -> Iterator[tuple[str, dict[str, Path]]]:
    """Each repository that was fetched from before, with the files that are here by their names in it."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repo in sorted(repos, key=lambda each: each.repo_id):
        if repo.repo_type == "model":
            yield (
                repo.repo_id,
                {
                    str(file.file_path.relative_to(revision.snapshot_path)): file.file_path
                    for revision in sorted(repo.revisions, key=lambda each: each.last_modified)
                    for file in revision.files
                },
            )


# --- repositories ----------------------------------------------------------------------------------------------------


def _fetch(reference: str) -> Path:
    """``owner/repo[:file]`` from the hub, or from the cache when the hub does not answer. Raises ModelError."""
    from huggingface_hub import hf_hub_download, snapshot_download

    repo, _, file = reference.partition(":")
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ModelError(f"hf:{reference} is no repository", hint="Examples: hf:owner/repo, hf:owner/repo:model.gguf")
    names, unanswered = _names_on_hub(repo)
    from_cache = unanswered is not None
    try:
        file = file or _only_gguf(repo, _names_in_cache(repo) if from_cache else names)
        if file:
            return Path(hf_hub_download(repo, file, local_files_only=from_cache))
        return Path(snapshot_download(repo, allow_patterns=list(MLX_FILES), local_files_only=from_cache))
    except ModelError:
        raise
    except Exception as problem:
        # The client lets the errors of its HTTP library through, and which library that is depends on its version.
        raise _fetch_error(reference, unanswered or problem) from None


def _names_on_hub(repo: str) -> tuple[list[str], Exception | None]:
    """The files of a repository, or why the hub did not tell."""
    from huggingface_hub import HfApi

    try:
        # Asked before anything else, and once: a download without a network tries for half a minute.
        return [each.rfilename for each in HfApi().model_info(repo, timeout=ANSWER_TIMEOUT_S).siblings or ()], None
    except Exception as problem:
        return [], problem


def _names_in_cache(repo: str) -> list[str]:
    return [name for each, files in _cached_files() if each == repo for name in files]


def _only_gguf(repo: str, names: Sequence[str]) -> str:
    """The one GGUF of a repository, empty for an MLX model. Raises ModelError naming them when there are several."""
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if len(ggufs) > 1:
        raise ModelError(
            f"hf:{repo} has {len(ggufs)} GGUF files", hint="Name one: " + ", ".join(f"hf:{repo}:{g}" for g in ggufs[:8])
        )
    if names and not ggufs and "config.json" not in names:
        raise ModelError(f"hf:{repo} holds neither a GGUF file nor an MLX model", hint="Choose another repository.")
    return ggufs[0] if ggufs else ""


def _fetch_error(reference: str, problem: Exception) -> ModelError:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    name = f"hf:{reference}"
    if isinstance(problem, GatedRepoError):
        return ModelError(f"{name} may not be fetched", hint="Ask for access on the hub and set HF_TOKEN.")
    if isinstance(problem, RepositoryNotFoundError):
        return ModelError(f"there is no repository {name}", hint="Check the name; a private one needs HF_TOKEN.")
    if isinstance(problem, HFValidationError):
        return ModelError(f"{name} is no repository", hint="Examples: hf:owner/repo, hf:owner/repo:model.gguf")
    if isinstance(problem, RemoteEntryNotFoundError):
        return ModelError(f"the repository has no such file: {name}", hint="Check the file's name.")
    if isinstance(problem, HfHubHTTPError):
        return ModelError(
            f"{name} cannot be fetched: the hub answered {problem.response.status_code}",
            hint="Try again later; if you set HF_TOKEN or HF_ENDPOINT, check them.",
        )
    if isinstance(problem, OSError) and problem.errno in DISK_ERRORS:
        return ModelError(f"{name} cannot be stored: {problem.strerror}", hint="HF_HOME says where models are kept.")
    return ModelError(
        f"{name} cannot be fetched: the hub cannot be reached, and it is not in the cache",
        hint="Check the network, or fetch it elsewhere and give its path.",
    )
