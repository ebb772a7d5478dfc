"""``bench``: how fast the engine is, and how much of it a whole job keeps."""

from __future__ import annotations

from typing import Any

import click

from promptmill.cli.common import json_option, print_json, stderr_console, table

WORKLOADS = ("short", "shared", "json")


@click.command(epilog="Example: promptmill bench --model demo --workload short --requests 64")
@click.option("-m", "--model", required=True, help="GGUF file, MLX folder, demo, or hf:owner/repo[:file].")
@click.option("--workload", type=click.Choice(WORKLOADS), multiple=True, help="One of them; may be repeated.  [all]")
@click.option("--requests", type=click.IntRange(1, 100_000), default=64, show_default=True)
@click.option("--slots", type=click.IntRange(1), help="Sequences decoded together, and clients of a peer.")
@click.option("--device", default="auto", show_default=True)
@click.option("--peer", help="Address of any OpenAI-compatible server, measured with the same requests.")
@json_option
def bench(
    model: str, workload: tuple[str, ...], requests: int, slots: int | None, device: str, peer: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Run noise through the bare engine, through a whole job and, with --peer, through a server: side by side.

    The whole job's figures come from its rows. Weights need not be trained: speed depends on shapes and lengths.
    """
    from promptmill.bench import WORKLOADS as KNOWN
    from promptmill.bench import bench as run
    from promptmill.settings import load_settings

    settings, found, console = load_settings(), {}, stderr_console()
    for name in workload or WORKLOADS:
        found[name] = run(
            name, model, requests, slots, settings, device=device, peer=peer,
            on_start=console.print,
        )  # fmt: skip
    if as_json:
        print_json({name: [each.to_json() for each in ways] for name, ways in found.items()})
        return
    for name, ways in found.items():
        click.echo(f"{name}: {requests} requests, {KNOWN[name].about}")
        bare = ways[0]
        rows: list[list[Any]] = [
            [each.name, f"{each.output_tps:,.1f}", f"{each.requests_per_s:,.2f}", f"{each.seconds:,.2f}",
             f"{each.output_tps / bare.output_tps:.3f}"]
            for each in ways
        ]  # fmt: skip
        columns = ["", "output tok/s", "requests/s", "seconds", "ratio"]
        table(columns, rows, set(columns[1:]))
        if bare.steps:
            parts = [f"{part} {1000 * spent / bare.steps:.3f}" for part, spent in bare.budget_s.items()]
            click.echo(f"  bare engine, ms a step of {bare.steps:,}: {', '.join(parts)}")
        whole = [f"{part} {spent:.3f}" for part, spent in ways[1].budget_s.items()]
        click.echo(f"  whole job, s: {', '.join(whole)}\n")
