"""The real pgbouncer in transaction mode before a private PostgreSQL."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import sqlalchemy as sa

#: Server connections of the pool: few, so that transactions of one client get different ones.
POOL_SIZE = 5


def pgbouncer() -> str | None:
    """Its path; None where it is not installed."""
    return shutil.which("pgbouncer", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin")))


class Pooler:
    """A pgbouncer on a port of its own. ``url`` goes through it, ``direct`` past it."""

    def __init__(self, direct: str, users: Mapping[str, str] | None = None) -> None:
        """``users``: who may log in, with passwords; without them everybody may, as the owner of the database."""
        self.direct = direct
        self._users = users
        url = sa.make_url(direct)
        # A short path: the server's socket is found by it.
        self._folder = Path(tempfile.mkdtemp(prefix="pm-pool-", dir="/tmp"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self.url = url.set(host="127.0.0.1", port=self._port, query={}).render_as_string(hide_password=False)
        #: The folder of the server's socket, or its address.
        self._host = str(url.query.get("host") or url.host or "127.0.0.1")
        self._write(f"host={self._host}" + (f" port={url.port}" if url.port else ""), str(url.username or "postgres"))
        self._process: subprocess.Popen[bytes] | None = None

    def url_of(self, user: str) -> str:
        """Through it as one of its users."""
        password = (self._users or {})[user]
        return sa.make_url(self.url).set(username=user, password=password).render_as_string(hide_password=False)

    def _write(self, server: str, user: str) -> None:
        login = f"auth_type = scram-sha-256\nauth_file = {self._folder}/users\n"
        if self._users is None:
            login, server = "auth_type = any\n", f"{server} user={user}"
        else:
            known = "".join(f'"{name}" "{password}"\n' for name, password in self._users.items())
            (self._folder / "users").write_text(known)
        (self._folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = {server}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self._port}\n"
            f"{login}pool_mode = transaction\ndefault_pool_size = {POOL_SIZE}\nmax_client_conn = 500\n"
            f"unix_socket_dir =\nlogfile = {self._folder}/log\nserver_round_robin = 1\n"
        )

    def __enter__(self) -> Pooler:
        binary = pgbouncer()
        assert binary is not None
        command = [binary, str(self._folder / "pgbouncer.ini")]
        user = None
        if os.getuid() == 0:
            # It refuses to run as root. Who owns the server's socket may use it.
            user = Path(self._host).stat().st_uid if self._host.startswith("/") else pwd.getpwnam("nobody").pw_uid
            for path in (self._folder, *self._folder.iterdir()):
                os.chown(path, user, -1)
        with open(os.devnull, "wb") as nowhere:
            self._process = subprocess.Popen(command, user=user, stdout=nowhere, stderr=nowhere)
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.05)
            else:
                return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
