"""Which ids were seen, and in which line first: 16 to 32 bytes an id, where a dict of strings takes 200."""

from __future__ import annotations

from array import array

#: Share of the table that may be filled. Above it, looking for a free place takes ever longer.
FULLEST = 0.66


class IdTable:
    """A hash table in two flat arrays, with linear probing.

    An id is known by its 64-bit hash alone. Python keys that hash anew in every process, so nobody can aim at a
    collision; by chance a million ids hold one in one dataset of 4 * 10^7.
    """

    def __init__(self, places: int = 1 << 12) -> None:
        """``places`` is a power of two."""
        self._hashes = array("Q", bytes(8 * places))
        self._lines = array("I", bytes(4 * places))
        self._used = 0

    def __len__(self) -> int:
        return self._used

    def first_line(self, custom_id: str, line: int) -> int:
        """The line that this id was first seen in: ``line`` itself when the id is new."""
        hashes = self._hashes
        mask = len(hashes) - 1
        # 0 marks a free place.
        wanted = hash(custom_id) & 0xFFFF_FFFF_FFFF_FFFF or 1
        place = wanted & mask
        while found := hashes[place]:
            if found == wanted:
                return self._lines[place]
            place = (place + 1) & mask
        hashes[place] = wanted
        self._lines[place] = line
        self._used += 1
        if self._used > FULLEST * mask:
            self._grow()
        return line

    def _grow(self) -> None:
        old_hashes, old_lines = self._hashes, self._lines
        places = 2 * len(old_hashes)
        mask = places - 1
        hashes, lines = array("Q", bytes(8 * places)), array("I", bytes(4 * places))
        for wanted, line in zip(old_hashes, old_lines, strict=True):
            if wanted:
                place = wanted & mask
                while hashes[place]:
                    place = (place + 1) & mask
                hashes[place], lines[place] = wanted, line
        self._hashes, self._lines = hashes, lines
