"""``bench``: how fast the engine is, and how much of it a whole job keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from promptmill.cli.common import json_option, print_json, stderr_console, table
from promptmill.core.terminal import say

if TYPE_CHECKING:
    from promptmill.experiments.bench import Way

WORKLOADS = ("short", "shared", "json")


@click.command(epilog="Example: promptmill bench --model demo --workload short --requests 64")
@click.option("-m", "--model", required=True, help="GGUF file, MLX folder, demo, or hf:owner/repo[:file].")
@click.option("--workload", type=click.Choice(WORKLOADS), multiple=True, help="One of them; may be repeated.  [all]")
@click.option("--requests", type=click.IntRange(1, 100_000), default=64, show_default=True)
@click.option("--slots", type=click.IntRange(1), help="Sequences decoded together, and clients of a peer.")
@click.option("--device", default="auto", show_default=True)
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Runs of each, in turns.")
@click.option("--peer", help="Address of any OpenAI-compatible server, measured with the same requests.")
@json_option
def bench(
    model: str, workload: tuple[str, ...], requests: int, slots: int | None, device: str, repeat: int,
    peer: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Run noise through the bare engine, through a whole job and, with --peer, through a server: side by side.

    Figures are those of the median of --repeat runs, with the lowest and the highest; ratios are to the bare engine.
    The whole job's figures come from its rows. Weights need not be trained: speed depends on shapes and lengths.
    """
    from promptmill.core.settings import load_settings
    from promptmill.experiments.bench import bench as run

    settings, found, console = load_settings(), {}, stderr_console()
    for name in workload or WORKLOADS:
        found[name] = run(
            name, model, requests, slots, settings, device=device, peer=peer, repeat=repeat, on_start=console.print,
        )  # fmt: skip
    if as_json:
        print_json({name: [each.to_json() for each in ways] for name, ways in found.items()})
        return
    for name, ways in found.items():
        _print(name, requests, ways)


def _print(workload: str, requests: int, ways: list[Way]) -> None:
    from promptmill.experiments.bench import PARTS, SHORTEST_S
    from promptmill.experiments.bench import WORKLOADS as KNOWN

    say(f"{workload}: {requests} requests, {KNOWN[workload].about}; medians of {len(ways[0].runs)}")
    bare = ways[0].median
    rows: list[list[Any]] = [
        [way.median.name, f"{way.median.output_tps:,.1f}", f"{way.rates[0]:,.1f}-{way.rates[1]:,.1f}",
         f"{way.median.requests_per_s:,.2f}", f"{way.median.seconds:,.2f}",
         f"{way.median.output_tps / bare.output_tps:.3f}"]
        for way in ways
    ]  # fmt: skip
    columns = ["", "output tok/s", "min-max", "requests/s", "seconds", "ratio"]
    table(columns, rows, set(columns[1:]))
    spent = [
        [
            way.median.name,
            *(f"{way.median.budget_s[part]:.3f}" if part in way.median.budget_s else None for part in PARTS),
        ]
        for way in ways
        if way.median.budget_s
    ]
    table(["seconds of the engine", *PARTS], spent, set(PARTS))
    say("Python of the whole job holds its sampling and its grammar.")
    if any(way.is_short for way in ways):
        say(f"a run took less than {SHORTEST_S:g} s: its ratio means little; give more --requests")
    say()
