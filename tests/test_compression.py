"""Compressed files are read to their end, whatever they are made of, and a damaged one is told."""

import gzip
import lzma
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_dropout.compression import UNREADABLE, open_bytes
from guided_dropout.errors import DataError
from guided_dropout.texts import stream_text


def read(content, name="t.xz"):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        with open_bytes(Path(folder) / name) as file:
            return file.read()


PARTS = st.lists(st.tuples(st.binary(max_size=200), st.integers(0, 3)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(parts=PARTS, at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_xz_files_of_several_streams_are_read_whole_or_refused(parts, at, bit):
    streams = [lzma.compress(part) + b"\0" * 4 * padding for part, padding in parts]
    whole = b"".join(streams)
    assert read(whole) == b"".join(part for part, _ in parts)
    damaged = bytearray(whole)
    damaged[at % len(whole)] ^= 1 << bit
    with pytest.raises(UNREADABLE):
        read(bytes(damaged))
    with pytest.raises(UNREADABLE):
        read(whole + streams[-1][: 1 + at % (len(lzma.compress(parts[-1][0])) - 1)])


def test_a_text_of_which_a_later_part_is_damaged_is_refused(tmp_path):
    for name, pack in (("t.xz", lzma.compress), ("t.gz", gzip.compress)):
        first, second = pack(b"one\n"), pack(b"two\n")
        (tmp_path / name).write_bytes(first + second)
        assert list(stream_text(tmp_path / name)) == ["one", "two"]
        (tmp_path / name).write_bytes(first + b"?" + second[1:])
        with pytest.raises(DataError, match="cannot read the text"):
            list(stream_text(tmp_path / name))
