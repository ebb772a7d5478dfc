"""``worker``: this machine's workers."""

from __future__ import annotations

import logging
import sys

import click


@click.command(
    epilog="""\b
Examples:
  promptmill worker --model demo
  promptmill worker --device cuda:0,cuda:1 --model model.gguf
  promptmill worker --device sim:4 --model demo      four simulated devices, to try things out
"""
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cpu:0-3, cuda, cuda:0, metal, sim:4.")
@click.option("-m", "--model", "models", multiple=True, help="Model to serve; may be repeated.  [env: JOBS_MODEL]")
@click.option("--slots", type=click.IntRange(1), help="Sequences decoded together on a device.  [env: JOBS_SLOTS]")
@click.option(
    "--context", type=click.IntRange(16), help="Most tokens of a request.  [default: what jobs need, and 4096]"
)
@click.option(
    "--grace",
    type=click.FloatRange(0),
    help="Seconds that requests get to end at SIGTERM.  [env: JOBS_GRACE_S]",
)
def worker(device: str, models: tuple[str, ...], slots: int | None, context: int | None, grace: float | None) -> None:
    """Start the workers of this machine, one per device, and keep them alive until Ctrl-C or SIGTERM."""
    from promptmill.core.settings import load_settings
    from promptmill.core.terminal import for_people
    from promptmill.database.revision import open_database
    from promptmill_workers.checkpoints import locate
    from promptmill_workers.devices import parse_devices, require_offload, usable
    from promptmill_workers.supervisor import Supervisor

    settings = load_settings()
    logging.basicConfig(
        level=settings.log_level,
        format="%(asctime)s %(levelname)s [pool] %(message)s",
        stream=for_people(sys.stderr),
    )
    open_database(settings.database_url).dispose()
    found = [locate(name) for name in models or _default_model(settings.model)]
    devices = parse_devices(device)
    if device == "auto":
        devices = usable(devices, found[0].engine)
    for checkpoint in found:
        for each in devices:
            require_offload(each, checkpoint.engine)
    pool = Supervisor(
        devices, [checkpoint.name for checkpoint in found], slots or settings.slots, context or settings.context_tokens,
        settings.grace_s if grace is None else grace,
    )  # fmt: skip
    raise click.exceptions.Exit(pool.run())


def _default_model(model: str | None) -> tuple[str, ...]:
    if model is not None:
        return (model,)
    from promptmill.errors import ModelError
    from promptmill_workers.checkpoints import available

    here = ", ".join(checkpoint.name for checkpoint in available())
    raise ModelError("no model was named", hint=f"Give --model or set JOBS_MODEL. At hand: {here}.")
