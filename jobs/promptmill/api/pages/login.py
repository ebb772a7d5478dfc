"""The cookie of the pages: a signed id of a key, strict, readable by no script. Nothing is stored for it.

It is signed by a secret of the servers, which is in no table: who reads the database cannot log in.
"""

from __future__ import annotations

import hmac
import time

from fastapi import Request
from sqlalchemy.engine import Engine

from promptmill.api import keys
from promptmill.api.http.validation import number_in
from promptmill.api.keys import Principal
from promptmill.database.tables import api_keys

COOKIE = "promptmill"

#: Seconds that a login lasts.
LASTS_S = 12 * 3600


#: Seconds that the clocks of two servers may differ.
CLOCKS_S = 60


def cookie_of(secret: bytes, key_id: str, key_sha256: str, now: float | None = None) -> str:
    """``id.expiry.signature``. The key's hash is signed too: another key under this id has other cookies."""
    ends = int((time.time() if now is None else now) + LASTS_S)
    return f"{key_id}.{ends}.{_signature(secret, key_id, ends, key_sha256)}"


def _signature(secret: bytes, key_id: str, ends: int, key_sha256: str) -> str:
    return hmac.new(secret, f"{key_id}.{ends}.{key_sha256}".encode(), "sha256").hexdigest()


def principal_of_cookie(secret: bytes, db: Engine, request: Request) -> Principal | None:
    """Who logged in here, if the cookie is ours, has not run out and runs for no longer than ours do."""
    key_id, _, rest = request.cookies.get(COOKIE, "").partition(".")
    ends, _, signature = rest.partition(".")
    until, now = number_in(ends), time.time()
    if not signature or not key_id.isalnum() or until is None or not now < until < now + LASTS_S + CLOCKS_S:
        return None
    found = keys.find(db, api_keys.c.id, key_id)
    if found is None:
        return None
    wanted = _signature(secret, key_id, until, found[1])
    return found[0] if hmac.compare_digest(signature.encode(), wanted.encode()) else None


def is_over_tls(request: Request) -> bool:
    """Whether the browser came by TLS: here, or to a proxy in front.

    A proxy says so, and so does the page's own origin. A client that lies harms itself alone:
    its cookie is withheld from connections in the clear.
    """
    said = request.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    return "https" in (request.url.scheme, said) or request.headers.get("origin", "").startswith("https://")
