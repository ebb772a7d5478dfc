"""Zstandard files, read to their end or not at all."""

from __future__ import annotations

from typing import BinaryIO

#: Compressed bytes unpacked at a time. Four bytes can stand for 128 KiB, so this bounds memory at 32 MiB.
STEP = 1024


class ZstFile:
    """Any number of frames, one after another.

    zstandard's own file objects end silently where a file was cut off; here that is an :class:`EOFError`. Bytes that
    are no zstandard are an :class:`OSError`.
    """

    def __init__(self, file: BinaryIO) -> None:
        # Here, because most datasets are not compressed.
        import zstandard

        self._zstandard = zstandard
        self._decompressor = zstandard.ZstdDecompressor()
        self._file = file
        self._frame = self._decompressor.decompressobj()
        self._in_frame = False

    def read(self, size: int, /) -> bytes:
        """At least ``size`` bytes, less at the end only, b"" behind it."""
        unpacked = bytearray()
        while len(unpacked) < size and (packed := self._file.read(STEP)):
            unpacked += self._unpack(packed)
        if not unpacked and self._in_frame:
            raise EOFError("it ends in the middle")
        return bytes(unpacked)

    def _unpack(self, packed: bytes) -> bytes:
        unpacked = b""
        while packed:
            try:
                unpacked += self._frame.decompress(packed)
            except self._zstandard.ZstdError as problem:
                raise OSError(str(problem)) from None
            self._in_frame, packed = not self._frame.eof, b""
            if self._frame.eof:
                packed = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
        return unpacked

    def close(self) -> None:
        self._file.close()
