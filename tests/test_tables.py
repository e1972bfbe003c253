"""Tables in files: what was written is read, and each mistake is named by its place."""

import csv
import gzip
import io
import json
import lzma
import sys
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guided_dropout.data.tables import read_table, read_tsv, table_files, table_kind
from guided_dropout.errors import DataError

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ONE_LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r"), max_size=20)


def rows(table, *names: str) -> list[tuple]:
    return list(zip(*(table.columns[name] for name in names), strict=True))


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


# --- what was written is read


@given(st.lists(st.tuples(ANY, ANY), max_size=5))
def test_csv_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *pairs])
    path = write(tmp_path_factory.getbasetemp() / "any.csv", out.getvalue())
    assert rows(read_table(path, ["b", "a"]), "a", "b") == pairs


@given(st.lists(st.tuples(ONE_LINE, ONE_LINE), max_size=5))
def test_tsv_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    lines = ["a\tb", *map("\t".join, pairs)]
    path = write(tmp_path_factory.getbasetemp() / "any.tsv", "".join(f"{line}\n" for line in lines))
    assert rows(read_table(path, ["a", "b"]), "a", "b") == pairs


@given(st.lists(st.fixed_dictionaries({"a": ANY, "b": st.none() | st.integers() | st.booleans() | ANY}), max_size=5))
def test_json_lines_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, objects: list) -> None:
    lines = [json.dumps(o, ensure_ascii=i % 2 == 0) for i, o in enumerate(objects)]
    path = write(tmp_path_factory.getbasetemp() / "any.jsonl", "".join(f"{line}\n" for line in lines))
    assert rows(read_table(path, ["a", "b"]), "a", "b") == [(o["a"], o["b"]) for o in objects]


def test_parquet_rows_have_numbers_and_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    pd.DataFrame({"a": ["x", "y"], "b": [1, 2], "c": [0.5, None]}).to_parquet(tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet", ["b", "a"])
    assert dict(table.columns) == {"a": ["x", "y"], "b": [1, 2]}
    assert table.where(1) == f"{tmp_path}/t.parquet[1]"


def test_text_may_be_compressed_come_from_windows_and_lack_the_last_line_end(tmp_path: Path) -> None:
    text = "\ufeffa,b\r\n1,2\r\n3,4"
    for name, pack in (("t.csv", bytes), ("t.csv.gz", gzip.compress), ("t.csv.xz", lzma.compress)):
        (tmp_path / name).write_bytes(pack(text.encode()))
        assert rows(read_table(tmp_path / name, ["a", "b"]), "a", "b") == [("1", "2"), ("3", "4")]


def test_a_record_of_several_lines_is_named_by_its_first(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", 'a,b\n"one\ntwo",1\n"say ""hi"", you",2\n')
    table = read_table(path, ["a"])
    assert table.columns["a"] == ["one\ntwo", 'say "hi", you']
    assert [table.where(i).rpartition(":")[2] for i in range(2)] == ["2", "4"]


def test_a_field_may_be_long_and_the_limit_of_the_process_is_put_back(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    long = "word " * 50_000
    assert read_table(write(tmp_path / "t.csv", f'a,b\n"{long}",1\n'), ["a"]).columns["a"] == [long]
    with pytest.raises(DataError):
        read_table(write(tmp_path / "t.csv", f'a,b\n"{long},1\n'), ["a"])
    assert csv.field_size_limit() == limit


def test_a_pattern_names_files_in_order(tmp_path: Path) -> None:
    for name in ("part-2.csv", "part-1.csv", "other.csv"):
        write(tmp_path / name, "")
    assert [p.name for p in table_files(tmp_path / "part-*.csv")] == ["part-1.csv", "part-2.csv"]
    assert table_files(tmp_path / "one.csv") == [tmp_path / "one.csv"]
    odd = write(tmp_path / "odd[1].csv", "")
    assert table_files(odd) == [odd]
    with pytest.raises(DataError, match="no file matches"):
        table_files(tmp_path / "x*.csv")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.csv", ".csv"),
        ("a.b.TSV", ".tsv"),
        ("a.jsonl.xz", ".jsonl"),
        ("a.parquet", ".parquet"),
        ("a.parquet.gz", None),
        ("a.txt", None),
        ("csv", None),
        ("a.gz", None),
    ],
)
def test_the_ending_says_what_a_file_is(name: str, kind: str | None) -> None:
    assert table_kind(name) == kind


def test_broken_lines_are_left_out_and_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", "a\tb\n1\t2\n3\n4\t5\t6\n7\t8\n")
    table = read_tsv(path, ["b", "a"], broken_lines=True)
    assert rows(table, "a", "b") == [("1", "2"), ("7", "8")]
    assert (table.left_out, table.where(1)) == (2, f"{path}:5")
    with pytest.raises(DataError, match=r"t\.tsv:3: found 1 fields; expected 2"):
        read_tsv(path, ["b", "a"])


# --- mistakes


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "a,b\n1,2\n3\n", r"t\.csv:3: found 1 fields; expected 2: mend or remove the line"),
        ("t.csv", "a,b\n1,2\n\n", r"t\.csv:3: found 0 fields"),
        ("t.csv", 'a,b\n"x\ny",1\n1,2,3\n', r"t\.csv:4: found 3 fields"),
        ("t.csv", 'a,b\n1,2\n"open,3\n4,5\n', r"t\.csv:3: unexpected end of data; expected .*quotation marks closed"),
        ("t.csv", 'a,b\n"x"y,1\n', r"t\.csv:2: ',' expected after '\"'"),
        ("t.csv", "a,c\n1,2\n", r"t\.csv:1: found columns 'a, c'; expected one named 'b': look"),
        ("t.csv", "a,b,b\n1,2,3\n", r"t\.csv:1: found columns 'a, b, b'; expected once: look"),
        ("t.csv", "", r"t\.csv:1: found columns ''"),
        ("t.tsv", "a\tb\n1\n", r"t\.tsv:2: found 1 fields; expected 2"),
        ("t.tsv", "a b\n", r"t\.tsv:1: found columns 'a b'"),
        ("t.jsonl", '{"a": 1, "b": %s}\n' % ("1" * 5000), r"t\.jsonl:1: not valid JSON \(Exceeds the limit"),
        ("t.jsonl", "[" * 100_000, r"t\.jsonl:1: not valid JSON"),
        ("t.jsonl", '{"a": 1, "b": "so \\ud83d"}\n', r"t\.jsonl:1: found '.ud83d', half a character, in 'b'"),
        ("t.jsonl", '{"a": 1, "b": 2}\n{"a": 1\n', r"t\.jsonl:2: not valid JSON \(Expecting ',' delimiter\)"),
        (
            "t.jsonl",
            '{"a": 1, "b": 2}\n{"a": 1, "b": 2, "a": 3}\n',
            r"t\.jsonl:2: not valid JSON \(an object gives a twice",
        ),
        ("t.jsonl", '{"a": 1, "b": 2}\n[1]\n', r"t\.jsonl:2: found '\[1\]'; expected an object"),
        ("t.jsonl", '{"a": 1, "b": 2}\n{"a": 1}\n', r"t\.jsonl:2: found columns 'a'; expected one named 'b'"),
        ("t.parquet", "no", r"cannot read .*t\.parquet \(.*\); expected a Parquet file"),
        ("t.txt", "a,b\n", r"t\.txt is no table; expected a file that ends with \.csv, \.tsv, \.jsonl, \.parquet"),
    ],
)
def test_a_mistake_is_named_by_its_place(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_table(write(tmp_path / name, text), ["a", "b"], advice="look")


@pytest.mark.parametrize("name", ["t.csv", "t.tsv.gz", "t.jsonl.xz", "t.parquet"])
def test_files_that_cannot_be_read_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"cannot read .*{name}"):
        read_table(tmp_path / name, ["a"])
    (tmp_path / name).write_bytes(b"a,b\n\xff\xfe")
    with pytest.raises(DataError, match=rf"cannot read .*{name}"):
        read_table(tmp_path / name, ["a"])


def test_a_missing_parquet_column_is_named(tmp_path: Path) -> None:
    pd.DataFrame({"a": ["x"]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: found columns 'a'; expected one named 'b': check their names"):
        read_table(tmp_path / "t.parquet", ["a", "b"])


def test_without_pyarrow_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'guided-dropout\[hub\]'"):
        read_table(tmp_path / "t.parquet", ["a"])
