"""The application, put together."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import subprocess
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

from fastapi import FastAPI
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError
from starlette.staticfiles import StaticFiles

from promptmill.api import health, prometheus
from promptmill.api.batches import batches
from promptmill.api.dependencies import Services, in_thread
from promptmill.api.http import errors
from promptmill.api.http.evaluation import Evaluation
from promptmill.api.http.middleware import Gate, Timings
from promptmill.api.interactive.live import Live
from promptmill.api.jobs import routes
from promptmill.api.limits import KeyLimits
from promptmill.api.openai import chat, files, models, own_folder
from promptmill.api.openai.file_store import FileStore
from promptmill.api.openai.model_directory import ModelDirectory
from promptmill.api.pages import pages
from promptmill.core import programs
from promptmill.core.backoff import Backoff
from promptmill.core.settings import Settings
from promptmill.database.engine import reading
from promptmill.errors import DatabaseError
from promptmill.ledger import Ledger

log = logging.getLogger("promptmill.api")

#: Threads that wait for the database: as many as its pool has connections.
THREADS = 16

#: Before the process that looks after batches is started again, and the seconds after which its life was a long one.
RESTART = Backoff(0.5, 30.0)
STEADY_S = 60.0

#: Seconds between two readings of the database's clock.
CLOCK_S = 5.0

DESCRIPTION = """OpenAI-compatible files, batches, models, chat completions, completions and embeddings, and the jobs
of promptmill, on one queue. Set the base URL of a client to this server's address and `/v1`."""


def create_app(settings: Settings, db: Engine, *, locked: bool) -> FastAPI:
    """The application over an open database. ``locked``: a key is asked for."""
    timings = Timings()
    store = FileStore(settings, db)
    parts = Services(
        settings=settings,
        db=db,
        ledger=Ledger(db, lease_s=settings.lease_s, max_attempts=settings.max_attempts),
        store=store,
        limits=KeyLimits(settings),
        models=ModelDirectory(db),
        live=Live(settings.redis_url, settings.api_timeout_s),
        quick=Evaluation(),
        slow=Evaluation(),
        locked=locked,
        login_secret=own_folder.secret(store.root, db),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="db"))
        parts.live.start()
        # What the start made stays: looking through it for garbage again and again would hold every answer up.
        gc.collect()
        gc.freeze()
        tasks = [asyncio.create_task(_keep_batches()), asyncio.create_task(_keep_time(parts))]
        try:
            yield
        finally:
            await parts.live.close()
            parts.quick.close()
            parts.slow.close()
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    app = FastAPI(
        title="promptmill", version=version("promptmill"), description=DESCRIPTION, lifespan=lifespan,
        docs_url=None, redoc_url=None, redirect_slashes=False,
    )  # fmt: skip
    app.state.services = parts
    app.state.timings = timings
    app.state.scores = {}
    app.state.scraping = asyncio.Lock()
    errors.install(app, pages.error_page)
    for module in (chat, files, batches, routes, models, health, prometheus, pages):
        app.include_router(module.router)
    app.mount("/static", StaticFiles(directory=pages.STATIC), name="static")
    app.add_middleware(
        Gate, timings=timings, largest_body=settings.api_max_body_bytes, largest_upload=settings.api_max_file_bytes,
        locked=locked,
    )  # fmt: skip
    return app


async def _keep_time(parts: Services) -> None:
    """Read the database's clock, by which workers say when an answer was ready."""

    def read() -> None:
        with reading(parts.db) as connection:
            parts.ledger.database_clock.read(connection)

    while True:
        with contextlib.suppress(SQLAlchemyError, DatabaseError):
            await in_thread(read)
        await asyncio.sleep(CLOCK_S)


async def _keep_batches() -> None:
    """Batches are looked after by a process of their own: a million lines must not slow an answer down."""
    deaths = 0
    while True:
        process = programs.start("promptmill.api.batches.worker", {}, start_new_session=True)
        started = asyncio.get_running_loop().time()
        try:
            while process.poll() is None:
                await asyncio.sleep(0.5)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=6)
        deaths = 1 if asyncio.get_running_loop().time() - started > STEADY_S else deaths + 1
        delay = RESTART.delay_s(deaths)
        log.warning("the process that looks after batches ended (%s); next start in %g s", process.returncode, delay)
        await asyncio.sleep(delay)
