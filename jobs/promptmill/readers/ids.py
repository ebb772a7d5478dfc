"""Which ids were seen, and in which line first: in constant memory, and in time that a fast reader does not notice."""

from __future__ import annotations

import sqlite3
from array import array

#: Share of the table that may be filled. Above it, looking for a free place takes ever longer.
FULLEST = 0.66

#: Places of the table in memory, 12 bytes each: 2.7 million ids in 50 MB. What comes later goes to a temporary file.
MOST_PLACES = 1 << 22

#: KiB of the temporary file that are kept in memory.
FILE_CACHE_KIB = 16_384


class IdTable:
    """A hash table in two flat arrays, with linear probing, and a file behind it.

    An id is known by its 64-bit hash alone. Python keys that hash anew in every process, so collisions cannot be aimed
    at. By chance, one in 4 * 10^7 datasets of a million ids has one.
    """

    def __init__(self, places: int = 1 << 12, most_places: int = MOST_PLACES) -> None:
        """Both numbers of places are powers of two."""
        self._hashes = array("Q", bytes(8 * places))
        self._lines = array("I", bytes(4 * places))
        self._most_places = most_places
        self._used = 0
        self._later: _IdFile | None = None

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
        if self._later is not None:
            return self._later.first_line(wanted, line)
        hashes[place] = wanted
        self._lines[place] = line
        self._used += 1
        if self._used > FULLEST * mask:
            self._make_room()
        return line

    def _make_room(self) -> None:
        old_hashes, old_lines = self._hashes, self._lines
        places = 2 * len(old_hashes)
        if places > self._most_places:
            self._later = _IdFile()
            return
        mask = places - 1
        hashes, lines = array("Q", bytes(8 * places)), array("I", bytes(4 * places))
        for wanted, line in zip(old_hashes, old_lines, strict=True):
            if wanted:
                place = wanted & mask
                while hashes[place]:
                    place = (place + 1) & mask
                hashes[place], lines[place] = wanted, line
        self._hashes, self._lines = hashes, lines


class _IdFile:
    """The same in a temporary file, which goes with this object."""

    def __init__(self) -> None:
        # An empty name is a private database on disk that SQLite itself removes.
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute(f"PRAGMA cache_size = -{FILE_CACHE_KIB}")
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("CREATE TABLE ids (hash INTEGER PRIMARY KEY, line INTEGER NOT NULL)")
        self._db.execute("BEGIN")

    def first_line(self, wanted: int, line: int) -> int:
        # SQLite's whole numbers have a sign.
        key = wanted - (1 << 63)
        if self._db.execute("INSERT INTO ids VALUES (?, ?) ON CONFLICT DO NOTHING", (key, line)).rowcount:
            return line
        first: int = self._db.execute("SELECT line FROM ids WHERE hash = ?", (key,)).fetchone()[0]
        return first

    def __del__(self) -> None:
        self._db.close()
