"""How many sequences and KV cells a device gets: what was asked for, else what its memory holds."""

from __future__ import annotations

from dataclasses import dataclass

from promptmill.errors import ModelError

#: Sequences decoded together when no number was asked for: a CPU is busy with few, a GPU idles with as few.
CPU_SLOTS = 16
GPU_SLOTS = 64

#: KV cells that a slot is given on average.
CELLS_PER_SLOT = 1024

#: Share of the free memory that the KV cache may take: the forward pass needs some, and so do others.
SHARE = 0.8


@dataclass(frozen=True, slots=True)
class KVBudget:
    """Slots and KV cells of an engine."""

    slots: int
    cells: int


def fit(
    *, slots: int | None, cells: int | None, context_tokens: int, cell_bytes: int, free_bytes: int | None, gpu: bool
) -> KVBudget:
    """Slots and cells as asked for, else as the memory allows; never fewer cells than one request may need.

    ``cell_bytes``: memory of one token over all layers. ``free_bytes``: of the device, None when unknown.
    Raises ModelError when not even one request of ``context_tokens`` fits.
    """
    wanted = slots or (GPU_SLOTS if gpu else CPU_SLOTS)
    per_slot = min(context_tokens, CELLS_PER_SLOT)
    if cells is not None:
        return KVBudget(wanted, max(cells, context_tokens))
    enough = max(context_tokens, wanted * per_slot)
    if free_bytes is None or cell_bytes <= 0:
        return KVBudget(wanted, enough)
    most = int(free_bytes * SHARE) // cell_bytes
    if most < context_tokens:
        raise ModelError(
            f"no memory for a context of {context_tokens:,} tokens: its KV cache takes "
            f"{context_tokens * cell_bytes / 2**30:.1f} GiB, and {free_bytes / 2**30:.1f} GiB are free",
            hint="Give a smaller --context, or choose a smaller model.",
        )
    found = min(enough, most)
    # Slots that were asked for are kept: requests then wait for cells instead of for slots.
    return KVBudget(slots or max(1, min(wanted, found // per_slot)), found)
