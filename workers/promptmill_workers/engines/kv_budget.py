"""How many sequences and KV cells a device gets, and how long one may be: as asked for, else what memory holds."""

from __future__ import annotations

from dataclasses import dataclass

from promptmill.errors import ModelError

#: Sequences decoded together when no number was asked for: a CPU is busy with few, a GPU idles with as few.
CPU_SLOTS = 16
GPU_SLOTS = 64

#: KV cells that a slot is given on average.
CELLS_PER_SLOT = 1024

#: Most tokens of one request where none were asked for and none are needed: clients may ask a host that a job loaded.
CONTEXT_TOKENS = 4096

#: The context is not made smaller than this for want of memory.
SMALLEST_CONTEXT = 512

#: Share of the free memory that the KV cache may take: the forward pass needs some, and so do others.
SHARE = 0.8


@dataclass(frozen=True, slots=True)
class KVBudget:
    """Slots and KV cells of an engine, and the most tokens of one request."""

    slots: int
    cells: int
    context: int


def fit(
    *,
    slots: int | None,
    cells: int | None,
    context: int | None,
    needed: int | None,
    trained: int,
    cell_bytes: int,
    free_bytes: int | None,
    gpu: bool,
) -> KVBudget:
    """Slots, cells and context as asked for, else as the memory allows; never fewer cells than one request may need.

    ``context``: tokens of one request that were asked for; else it has what is ``needed``, and CONTEXT_TOKENS where the
    model was ``trained`` for so many and there is room. ``cell_bytes``: memory of one token over all layers.
    ``free_bytes``: of the device, None when unknown.
    Raises ModelError when not even one request of the context fits.
    """
    wanted = slots or (GPU_SLOTS if gpu else CPU_SLOTS)
    most = int(free_bytes * SHARE) // cell_bytes if free_bytes is not None and cell_bytes > 0 else None
    usual = min([CONTEXT_TOKENS, *(max(SMALLEST_CONTEXT, room) for room in (cells, most) if room is not None)])
    tokens = min(trained, context or max(usual, needed or 0))
    per_slot = min(tokens, context or needed or tokens, CELLS_PER_SLOT)
    if cells is not None:
        return KVBudget(wanted, max(cells, tokens), tokens)
    enough = max(tokens, wanted * per_slot)
    if free_bytes is None or most is None:
        return KVBudget(wanted, enough, tokens)
    if most < tokens:
        raise ModelError(
            f"no memory for a context of {tokens:,} tokens: its KV cache takes "
            f"{tokens * cell_bytes / 2**30:.1f} GiB, and {free_bytes / 2**30:.1f} GiB are free",
            hint="Give a smaller --context, or choose a smaller model.",
        )
    found = min(enough, most)
    # Slots that were asked for are kept: requests then wait for cells instead of for slots.
    return KVBudget(slots or max(1, min(wanted, found // per_slot)), found, tokens)
