"""Text from files, folders and data sets, read as it is asked for."""

import bz2
import errno
import gzip
import json
import lzma
import os
import sys
import threading
import tracemalloc

import pytest

from guided_dropout.errors import DataError
from guided_dropout.texts import Text, stream_text


@pytest.mark.parametrize(("suffix", "opener"), [(".txt", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_reads_plain_and_compressed_text(tmp_path, suffix, opener):
    path = tmp_path / f"t{suffix}"
    with opener(path, "wt", encoding="utf-8") as f:
        f.write("\n Élan vital \n\nzwei\n")
    assert list(stream_text(path)) == ["Élan vital", "zwei"]


def test_bad_text_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the text .*nowhere.txt: No such file"):
        stream_text(tmp_path / "nowhere.txt")
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n\n")
    with pytest.raises(DataError, match=r"blank\.txt has no text"):
        stream_text(blank)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Élan".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8"):
        stream_text(latin)
    cut = tmp_path / "cut.xz"
    cut.write_bytes(lzma.compress(b"words " * 1000)[:-20])
    with pytest.raises(DataError, match=r"cannot read the text .*cut.xz"):
        list(stream_text(cut))
    torn = tmp_path / "torn.gz"
    whole = gzip.compress(b"words " * 1000 + b"\n" * 50_000)
    torn.write_bytes(whole[:40] + b"\xff" * 20 + whole[60:])
    with pytest.raises(DataError, match=r"cannot read the text .*torn.gz"):
        list(stream_text(torn))
    late = tmp_path / "late.txt"
    late.write_bytes(b"fine\n" * 5000 + b"\xff\n")
    with pytest.raises(DataError, match=r"late\.txt is not UTF-8 \(after line \d{4}\)"):
        list(stream_text(late))


def test_a_folder_is_read_in_the_order_of_its_paths_and_again(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt.gz").write_bytes(gzip.compress(b"three\n"))
    (tmp_path / "a.jsonl").write_text('{"text": "one\\n\\ntwo", "id": 1}\n\n')
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(json.dumps({"text": "Élan"}).encode()))
    (tmp_path / "d.txt").write_text("")
    (tmp_path / "notes.md").write_text("no text")
    (tmp_path / "e.tar.gz").write_bytes(b"no text")
    (tmp_path / "f.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n"))
    text = stream_text(tmp_path)
    assert list(text) == list(text) == ["one", "two", "three", "Élan"]
    assert text.ignored == ("e.tar.gz", "f.csv.gz", "notes.md")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "x.bz2").write_bytes(bz2.compress(b"words"))
    with pytest.raises(DataError, match=r"no text in the folder .*; expected .txt, .jsonl, .gz or .xz"):
        stream_text(empty)


def test_a_folder_is_read_through_links_to_folders_each_once(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder, name in ((inside / "b", "1.txt"), (outside, "2.txt"), (inside, "c.TXT")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    (inside / "a").symlink_to(inside / "b")
    (inside / "b" / "up").symlink_to(inside)
    (inside / "z").symlink_to(outside)
    text = stream_text(inside)
    assert list(text) == ["1.txt", "c.TXT", "2.txt"]
    assert text.ignored == ()


def test_a_link_in_a_folder_is_read_beside_its_target_once_and_told_where_it_leads_nowhere(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "real.txt").write_text("one\n")
    (tmp_path / "a.txt").symlink_to(tmp_path / "b" / "real.txt")
    (tmp_path / "blob").write_text("two\n")  # as the hub's cache has it
    for link in ("c.txt", "d.txt"):
        (tmp_path / link).symlink_to(tmp_path / "blob")
    (tmp_path / "e.md").symlink_to(tmp_path / "nowhere.md")
    text = stream_text(tmp_path)
    assert list(text) == ["one", "two"]
    assert text.ignored == ("blob", "e.md")
    (tmp_path / "f.txt").symlink_to("/annex/f")
    with pytest.raises(DataError, match=r"f\.txt is a link that leads nowhere \(/annex/f\); expected a text: fetch"):
        stream_text(tmp_path)


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("words\n")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cannot read the folder .*closed: Permission denied"):
        stream_text(tmp_path)


def test_compression_is_known_by_an_ending_in_capitals_too(tmp_path):
    (tmp_path / "a.TXT.GZ").write_bytes(gzip.compress(b"one\n"))
    assert list(stream_text(tmp_path / "a.TXT.GZ")) == list(stream_text(tmp_path)) == ["one"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name")
def test_a_pipe_is_refused_since_its_beginning_would_be_lost(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("words\n" * 10), daemon=True)
    writer.start()
    with pytest.raises(DataError, match="is no file but a pipe or a device, which can be read only once"):
        stream_text(tmp_path / "pipe")
    assert (tmp_path / "pipe").read_text() == "words\n" * 10


def test_no_name_is_not_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("words\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="a text without a name"):
        stream_text("")
    assert list(stream_text(".")) == ["words"]


@pytest.mark.parametrize("name", ["t.csv", "t.TSV", "t.json", "t.parquet", "t.csv.gz", "t.tar"])
def test_tables_and_archives_are_not_taken_for_prose(tmp_path, name):
    path = tmp_path / name
    write = gzip.open if name.endswith(".gz") else open
    with write(path, "wt", encoding="utf-8") as f:
        f.write('{"a": 1}\n')
    with pytest.raises(DataError, match=rf"{name} is a \.\w+ file, whose lines .*expected text: write it to a \.txt"):
        stream_text(path)


@pytest.mark.parametrize("name", ["words", "words.md", "words.text", "v1.csv.words", "words.v2.gz"])
def test_any_other_ending_or_none_is_text(tmp_path, name):
    write = gzip.open if name.endswith(".gz") else open
    with write(tmp_path / name, "wt", encoding="utf-8") as f:
        f.write("one\ntwo\n")
    assert list(stream_text(tmp_path / name)) == ["one", "two"]


def test_lines_of_json_are_known_by_an_ending_in_capitals_too(tmp_path):
    (tmp_path / "a.JSONL").write_text('{"text": "one"}\n')
    assert list(stream_text(tmp_path / "a.JSONL")) == ["one"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"bad.jsonl:2 is not valid JSON"),
        ("1" * 5000, r"bad.jsonl:2 is not valid JSON \(Exceeds the limit"),
        ("[" * 100_000, r"bad.jsonl:2 is not valid JSON \(maximum recursion depth"),
        ('{"text": "one", "text": "two"}', r"bad.jsonl:2 is not valid JSON \(an object gives text twice\)"),
        ('{"body": "words"}', r"bad.jsonl:2 holds body; expected a text named 'text'"),
        ('["words"]', r"bad.jsonl:2 holds an array; expected a text named 'text'"),
        ('{"text": 1, "id": 2}', r"bad.jsonl:2 holds a number named 'text'; expected a text of that name"),
        ('{"text": ["a"]}', r"bad.jsonl:2 holds an array named 'text'"),
        ('{"text": null}', r"bad.jsonl:2 holds null named 'text'"),
        (r'{"text": "half \ud83d a pair"}', r"bad.jsonl:2 holds '\\ud83d', which is no character"),
    ],
)
def test_a_bad_line_of_json_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=message):
        list(stream_text(path))


def test_a_limit_ends_a_text_and_shows():
    text = Text("t", lambda: iter(["one", "", "two", "three"]), max_characters=4)
    assert (list(text), text.cut) == (["one", "two"], True)
    text = Text("t", lambda: iter(["one", "two", " "]), max_characters=6)
    assert (list(text), text.cut) == (["one", "two"], False)
    with pytest.raises(DataError, match="at most 0 characters; expected at least 1"):
        stream_text("nowhere.txt", max_characters=0)


def test_memory_does_not_grow_with_the_text_nor_with_its_lines(tmp_path):
    path = tmp_path / "long.txt"
    path.write_bytes((b"word " * 20 + b"\n") * 50_000 + b"word " * 2_000_000)
    tracemalloc.start()
    try:
        characters = sum(map(len, stream_text(path)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert characters > 14_000_000
    assert peak < 3_000_000


# --- data sets


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    import pandas as pd

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    for config in ("news", "books"):
        (folder / config).mkdir(parents=True)
        for split in ("train", "test"):
            rows = {"text": [f"{config} {split} {i}\nsecond" for i in range(3)], "other": ["a", "b", "c"]}
            pd.DataFrame(rows).to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
    yaml = "".join(
        f"- config_name: {c}\n{'  default: true' * (c == 'news')}\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {c}/{s}-*\n" for s in ("train", "test"))
        for c in ("news", "books")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{yaml}---\n")
    return folder


def test_a_data_set_is_streamed_by_configuration_split_and_column(data_set):
    text = stream_text(f"hub:{data_set}")
    assert list(text)[:3] == ["news train 0", "second", "news train 1"]
    assert list(text) == list(text)
    assert next(iter(stream_text(f"hub:{data_set}:books:test"))) == "books test 0"
    assert list(stream_text(f"hub:{data_set}::test:other")) == ["a", "b", "c"]


def test_faults_of_a_data_set_are_named(data_set, monkeypatch):
    with pytest.raises(DataError, match="row 0 holds text, other; expected a text named 'body'"):
        stream_text(f"hub:{data_set}:::body")
    with pytest.raises(DataError, match=r"cannot read hub:.*set:films .*check its name, configuration and split"):
        stream_text(f"hub:{data_set}:films")
    with pytest.raises(DataError, match=r"cannot read hub:.*:news:dev"):
        stream_text(f"hub:{data_set}:news:dev")
    for bad in ("hub:", "hub:a:b:c:d:e"):
        with pytest.raises(DataError, match="expected hub:NAME, or hub:NAME:CONFIG:SPLIT:COLUMN"):
            stream_text(bad)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'guided-dropout\[hub\]'"):
        stream_text(f"hub:{data_set}")
