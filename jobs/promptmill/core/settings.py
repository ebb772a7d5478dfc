"""Settings, read once from the environment (``JOBS_...``) and ``.env``, validated, frozen, and passed in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from promptmill.core.addresses import masked, secrets_of, sqlite_url
from promptmill.core.redis_client import redis_address
from promptmill.core.registry import suggestion
from promptmill.errors import SettingsError

PREFIX = "JOBS_"

#: Encoding of ``.env``: UTF-8, which some editors begin with a byte order mark.
ENCODING = "utf-8-sig"


def data_dir() -> Path:
    """Where the platform keeps an application's data."""
    return Path(platformdirs.user_data_dir("promptmill", appauthor=False))


def _default_database() -> str:
    return sqlite_url(data_dir() / "promptmill.sqlite")


class Settings(BaseSettings):
    """Every setting; the environment variable is the name in capitals behind ``JOBS_``."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", env_file_encoding=ENCODING, extra="ignore", frozen=True
    )

    database_url: str = Field(default_factory=_default_database, description="Where jobs and results are stored")
    query_database_url: str | None = Field(
        None, description="PostgreSQL user of 'query' that may only read; unset: one is made"
    )
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="The broker that wakes workers")
    model: str | None = Field(None, description="Model of commands that are given none")
    slots: int | None = Field(
        None, ge=1, le=1024, description="Sequences decoded together; unset: 16 on CPUs, 64 on GPUs, as memory allows"
    )
    context_tokens: int | None = Field(
        None, ge=16, description="Most tokens of one request; unset: what the job needs, at least 4096"
    )
    kv_cells: int | None = Field(None, ge=16, description="KV cells in all, shared by the slots; unset: by slots")
    kv_type: Literal["f16", "q8_0"] = Field("f16", description="KV cache of llama.cpp: f16, or q8_0 in half the memory")
    batch_tokens: int = Field(512, ge=16, description="Most tokens of one forward pass")
    threads: int | None = Field(None, ge=1, description="CPU threads of an engine; unset: the cores of its device")
    loaded_models: int = Field(
        1, ge=1, le=64, description="Models that a worker keeps in memory; the least recently used goes first"
    )
    deduplicate: bool = Field(True, description="Compute identical greedy requests once")
    lease_s: float = Field(30.0, ge=6, description="Seconds a chunk stays a worker's without renewal")
    max_attempts: int = Field(3, ge=1, description="Attempts of a chunk before it is split to find the bad request")
    stall_timeout_s: float = Field(300.0, gt=0, description="An engine host that makes no step for so long is killed")
    load_timeout_s: float = Field(1800.0, gt=0, description="Seconds an engine may take to load a model")
    max_queued_requests: int = Field(
        100_000_000, ge=1, description="Waiting requests of all jobs; a submission beyond it is refused"
    )
    grace_s: float = Field(30.0, ge=0, description="Seconds that running requests get to end when a worker stops")
    files_dir: str | None = Field(None, description="Where the API keeps files; unset: beside the platform's app data")
    api_max_file_bytes: int = Field(512 * 2**20, ge=1, description="Largest file that the API takes")
    api_max_body_bytes: int = Field(16 * 2**20, ge=1024, description="Largest body of any other call of the API")
    api_timeout_s: float = Field(600.0, gt=0, description="Seconds that the API waits for an answer of a worker")
    api_requests_per_s: float | None = Field(None, gt=0, description="Calls a second of one API key; unset: any")
    api_queued_requests: int | None = Field(None, ge=1, description="Waiting requests of one API key; unset: any")
    api_stored_bytes: int | None = Field(None, ge=1, description="Bytes of files of one API key; unset: any")
    api_concurrent: int = Field(512, ge=1, description="Answers that one API key may wait for at a time")
    samples_days: float = Field(
        14.0, ge=0.1, description="Days that samples of workers are kept; then reports have no memory and no phases"
    )
    runtime_dir: str | None = Field(None, description="Folder of locks; unset: /tmp/promptmill-UID")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")

    @field_validator("files_dir", "runtime_dir")
    @classmethod
    def _is_path(cls, value: str | None) -> str | None:
        if value and value != value.strip():
            raise PydanticCustomError("path", "a blank or a line break is at an end of the path")
        return value


@dataclass(frozen=True, slots=True)
class SettingSource:
    """One setting as ``promptmill config`` prints it."""

    name: str
    value: Any
    source: str
    description: str


def load_settings() -> Settings:
    """The settings of this process. Raises :class:`SettingsError` naming the variable that is wrong or unknown."""
    _refuse_unknown_names()
    try:
        settings = Settings()
    except ValidationError as problem:
        first = problem.errors()[0]
        name = PREFIX + "_".join(str(part) for part in first["loc"]).upper()
        raise SettingsError(
            f"{name}: {first['msg']}", hint="'promptmill config' lists the settings and where each value comes from."
        ) from None
    # A job is stored first and sent to the workers then: what cannot be used is found out before.
    redis_address(settings.redis_url)
    return settings


def describe(settings: Settings) -> list[SettingSource]:
    """Each value and where it came from, secrets masked."""
    environment, dotenv = _environment_names(), set(_in_dotenv())
    return [
        SettingSource(
            name=PREFIX + name.upper(),
            value=masked(value) if name.endswith("_url") and value else value,
            source=_source_of(PREFIX + name.upper(), environment, dotenv),
            description=field.description or "",
        )
        for name, field in Settings.model_fields.items()
        for value in [getattr(settings, name)]
    ]


def without_secrets(text: str) -> str:
    """``text`` without the secrets of this process's settings, however it came to have them."""
    urls = [value for name, value in _given().items() if name.endswith("_URL") and value]
    for secret in sorted({each for url in urls for each in secrets_of(url)}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _source_of(name: str, environment: set[str], dotenv: set[str]) -> str:
    if name in environment:
        return "environment"
    return ".env" if name in dotenv else "default"


def _given() -> dict[str, str | None]:
    """Our names in the environment and in ``.env``, with their values; the environment goes first."""
    environment = {name.upper(): value for name, value in os.environ.items() if name.upper().startswith(PREFIX)}
    return _in_dotenv() | environment


def _environment_names() -> set[str]:
    return {name.upper() for name in os.environ if name.upper().startswith(PREFIX)}


def _in_dotenv() -> dict[str, str | None]:
    if not Path(".env").is_file():
        return {}
    from dotenv import dotenv_values

    found = dotenv_values(".env", encoding=ENCODING)
    return {name.upper(): value for name, value in found.items() if name.upper().startswith(PREFIX)}


def _refuse_unknown_names() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(set(_given()) - known):
        raise SettingsError(f"unknown setting {name}", hint=suggestion(name, known))
