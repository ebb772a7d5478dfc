"""The cookie of the pages: a signed id of a key, strict, readable by no script. Nothing is stored for it."""

from __future__ import annotations

import hmac
import time

from fastapi import Request
from sqlalchemy.engine import Engine

from promptmill.api import keys
from promptmill.api.bodies import number_in
from promptmill.api.keys import Principal
from promptmill.tables import api_keys

COOKIE = "promptmill"

#: Seconds that a login lasts.
LASTS_S = 12 * 3600


def cookie_of(key_id: str, key_sha256: str, now: float | None = None) -> str:
    """``id.expiry.signature``. The key's hash signs it: a revoked key takes its cookies along."""
    ends = int((time.time() if now is None else now) + LASTS_S)
    return f"{key_id}.{ends}.{_signature(key_id, ends, key_sha256)}"


def _signature(key_id: str, ends: int, key_sha256: str) -> str:
    return hmac.new(key_sha256.encode(), f"{key_id}.{ends}".encode(), "sha256").hexdigest()


def principal_of_cookie(db: Engine, request: Request) -> Principal | None:
    """Who logged in here, if the cookie is ours and has not run out."""
    key_id, _, rest = request.cookies.get(COOKIE, "").partition(".")
    ends, _, signature = rest.partition(".")
    until = number_in(ends)
    if not signature or not key_id.isalnum() or until is None or until < time.time():
        return None
    found = keys.find(db, api_keys.c.id, key_id)
    if found is None or not hmac.compare_digest(signature.encode(), _signature(key_id, until, found[1]).encode()):
        return None
    return found[0]
