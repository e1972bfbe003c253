"""Files that may be compressed, read to their end: damage within one is an error, never a shorter text."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import BinaryIO

SUFFIXES = (".xz", ".gz")
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""What reading raises where there is no such file, or it is damaged or cut short."""


def open_bytes(path: Path) -> BinaryIO | gzip.GzipFile | io.BufferedReader:
    """Open a file for reading, uncompressed where its ending says that it is compressed."""
    ending = path.suffix.lower()
    if ending == ".xz":
        return io.BufferedReader(_Xz(path))
    return gzip.open(path) if ending == ".gz" else path.open("rb")


class _Xz(io.RawIOBase):
    """All streams of an .xz file. `lzma.open` takes a stream that is damaged at its start for the end of the file."""

    def __init__(self, path: Path):
        self._file, self._stream = path.open("rb"), lzma.LZMADecompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        got = b""
        while not got:
            if self._stream.eof:
                data = self._stream.unused_data.lstrip(b"\0")  # nothing else may stand between streams
                while not data:
                    if not (block := self._file.read(io.DEFAULT_BUFFER_SIZE)):
                        return 0
                    data = block.lstrip(b"\0")
                self._stream = lzma.LZMADecompressor()
            else:
                data = self._file.read(io.DEFAULT_BUFFER_SIZE) if self._stream.needs_input else b""
                if not data and self._stream.needs_input:
                    raise EOFError("it ends before its end-of-stream marker")
            got = self._stream.decompress(data, len(buffer))
        buffer[: len(got)] = got
        return len(got)

    def close(self) -> None:
        self._file.close()
        super().close()
