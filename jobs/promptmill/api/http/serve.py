"""The server process: settings, database, logging, uvicorn."""

from __future__ import annotations

import logging
import socket
import sys
from functools import partial

import uvicorn

from promptmill.api import keys
from promptmill.api.app import create_app
from promptmill.api.http.connections import Connection, crowd
from promptmill.core.settings import load_settings
from promptmill.core.terminal import for_people, say
from promptmill.database.revision import open_database
from promptmill.errors import PromptmillError

#: Seconds that answers under way may take when the server stops.
GOODBYE_S = 20

#: Seconds that an idle connection is kept.
KEEP_ALIVE_S = 30


def serve(host: str, port: int, *, locked: bool) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises PromptmillError for an address that cannot be used."""
    settings = load_settings()
    logging.basicConfig(
        level=settings.log_level,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=for_people(sys.stderr),
    )
    db = open_database(settings.database_url)
    listening = _listen(host, port)
    if locked and not any(not each["revoked"] for each in keys.listed(db)):
        say("every call needs a key, and there is none yet: promptmill keys create --name NAME", err=True)
    everybody = crowd()
    config = uvicorn.Config(
        create_app(settings, db, locked=locked), log_config=None, access_log=False, server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S, backlog=everybody.backlog, timeout_graceful_shutdown=GOODBYE_S,
        http=partial(Connection, crowd=everybody), proxy_headers=False,  # type: ignore[arg-type]
    )  # fmt: skip
    shown = f"[{host}]" if ":" in host else host
    say(f"http://{shown}:{listening.getsockname()[1]}/  (OpenAI clients: add /v1)", err=True)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        db.dispose()


def _listen(host: str, port: int) -> socket.socket:
    """Bound before anything is started, so that a port in use is one clear error."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as problem:
        raise PromptmillError(
            f"cannot listen at {host}:{port}: {problem.strerror or problem}",
            hint="Give another --port, or end what listens there.",
        ) from None
    return listening
