"""``api``: the REST API and the live page."""

from __future__ import annotations

import ipaddress

import click


@click.command(
    epilog="""\b
Examples:
  promptmill api
  promptmill api --port 9000
  promptmill api --host 0.0.0.0                 other machines may call it, with a key (promptmill keys create)
"""
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port to listen at.")
@click.option("--require-key", is_flag=True, help="Ask for an API key on this machine too.")
def api(host: str, port: int, require_key: bool) -> None:
    """Serve the REST API, OpenAI-compatible, and the live page in a browser.

    It listens on this machine only, unless told otherwise; then every call needs an API key.
    """
    from promptmill.errors import PromptmillError

    try:
        from promptmill.api.http.serve import serve
    except ModuleNotFoundError as problem:
        raise PromptmillError(
            f"the API needs {problem.name}, which is not installed", hint="pip install 'promptmill[api]'"
        ) from None
    serve(host, port, locked=require_key or not _is_loopback(host))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
