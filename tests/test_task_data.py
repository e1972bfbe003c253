"""What a run is trained and evaluated on: files of one's own, hub data sets, GLUE; as they come or split anew."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guided_dropout.data.columns import Columns
from guided_dropout.data.examples import hold_out, subset
from guided_dropout.data.task_data import TaskData, load_data, load_training_data
from guided_dropout.data.tasks import Examples, Task, get_task
from guided_dropout.errors import DataError

PAIRS = "text=first,second:label=gold"
ROWS = [("a, b", 'he said "yes"', "neutral"), ("c", "d", "against"), ("e", "f", "for"), ("g", "h", "against")]


def write(folder: Path, name: str, rows: Sequence[tuple], names: Sequence[str] = ("first", "second", "gold")) -> Path:
    """A table whose ending says what it is."""
    import pandas as pd

    path, frame = folder / name, pd.DataFrame([*rows], columns=[*names])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".tsv":
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in (names, *rows)))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    else:
        frame.to_parquet(path)
    return path


def listed(examples: Examples) -> list[tuple[tuple[str, ...], float]]:
    return list(examples)


# --- files of one's own


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_examples(kind: str, tmp_path: Path) -> None:
    train, dev = write(tmp_path, f"train.{kind}", ROWS), write(tmp_path, f"dev.{kind}", ROWS[1:3])
    given = load_data(None, train, eval_data=dev, columns=PAIRS)
    assert given.task == Task(f"train.{kind}", ("against", "for", "neutral"), ("accuracy",))
    assert listed(given.train) == [((a, b), {"against": 0, "for": 1, "neutral": 2}[c]) for a, b, c in ROWS]
    assert listed(given.validation) == [(("c", "d"), 0), (("e", "f"), 1)]
    assert (given.train.source, given.validation.source) == tuple(f"{p.parent.name}/{p.name}" for p in (train, dev))


def test_columns_are_text_and_label_unless_told_and_the_error_says_how(tmp_path: Path) -> None:
    rows = [("good", "yes"), ("bad", "no")]
    train = write(tmp_path, "train.csv", rows, ("text", "label"))
    assert load_data("mine", train, eval_data=train).task == Task(
        "mine", ("no", "yes"), ("accuracy", "matthews_correlation")
    )
    other = write(tmp_path, "other.csv", rows, ("words", "label"))
    with pytest.raises(DataError, match=r"other\.csv:1: found columns 'words, label'.*name yours, --columns text=NAME"):
        load_data("mine", other, eval_data=other)
    with pytest.raises(DataError, match=r"expected one named 'wrods': check --columns"):
        load_data("mine", other, eval_data=other, columns="text=wrods:label=label")


def test_integer_classes_are_sorted_by_value_and_never_taken_for_indices(tmp_path: Path) -> None:
    rows = [(f"t{i}", 10 - 3 * (i % 4)) for i in range(8)]  # 10, 7, 4, 1
    for kind in ("csv", "jsonl", "parquet"):
        train = write(tmp_path, f"train.{kind}", rows, ("text", "label"))
        given = load_data(None, train, eval_data=train)
        assert given.task.labels == ("1", "4", "7", "10")
        assert given.train.labels == [3, 2, 1, 0] * 2
        dev = write(tmp_path, f"dev.{kind}", [("x", 0)], ("text", "label"))  # an index, but no class
        with pytest.raises(DataError, match=r"dev.*found label '0'; expected one of the training data's, 1, 4, 7, 10"):
            load_data(None, train, eval_data=dev)


def test_true_and_false_are_classes(tmp_path: Path) -> None:
    for kind in ("jsonl", "parquet"):
        train = write(tmp_path, f"train.{kind}", [("a", True), ("b", False)], ("text", "label"))
        given = load_data(None, train, eval_data=train)
        assert (given.task.labels, given.train.labels) == (("false", "true"), [1, 0])


def test_whole_numbers_are_classes_however_they_are_written(tmp_path: Path) -> None:
    """What holds a gap somewhere is written with a fraction by many a program."""
    for kind in ("csv", "tsv", "jsonl", "parquet"):
        train = write(tmp_path, f"train.{kind}", [("a", 10.0), ("b", 2.0), ("c", -1.0)], ("text", "label"))
        given = load_data(None, train, eval_data=train)
        assert (given.task.labels, given.train.labels) == (("-1", "2", "10"), [2, 1, 0])
    odd = write(tmp_path, "odd.csv", [("a", "1.0"), ("b", "v2.0"), ("c", "1.0.0")], ("text", "label"))
    assert load_data(None, odd, eval_data=odd).task.labels == ("1", "1.0.0", "v2.0")


def test_a_regression_is_stated(tmp_path: Path) -> None:
    rows = [("a", 0.5), ("b", 3), ("c", -1.25)]
    for kind in ("csv", "jsonl", "parquet"):
        train = write(tmp_path, f"train.{kind}", rows, ("text", "stars"))
        given = load_data(None, train, eval_data=train, columns="text=text:score=stars")
        assert given.task == Task(f"train.{kind}", None, ("pearson", "spearman"))
        assert given.train.labels == [0.5, 3.0, -1.25]
        with pytest.raises(DataError, match=r"numbers with fractions in 'stars'.*state a regression, :score=stars"):
            load_data(None, train, eval_data=train, columns="text=text:label=stars")
    wide = write(tmp_path, "wide.jsonl", [("a", 1.0), ("b", 10**400)], ("text", "stars"))
    with pytest.raises(DataError, match=r"wide\.jsonl:2: found label 1000.*; expected a number"):
        load_data(None, wide, eval_data=wide, columns="text=text:score=stars")
    bad = write(tmp_path, "bad.csv", [("a", 1.0), ("b", "high")], ("text", "stars"))
    with pytest.raises(DataError, match=r"bad\.csv:3: found label 'high'; expected a number"):
        load_data(None, bad, eval_data=bad, columns="text=text:score=stars")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "x"), ("b", "x")], r"one class, 'x', in 'label'; expected at least two"),
        ([(f"t{i}", f"id{i}") for i in range(300)], r"300 different labels in 300 examples in 'label'"),
        ([("a", "x"), ("b", "")], r"train\.csv:3: found label ''; expected a class"),
        ([("a", "x"), (" ", "y")], r"train\.csv:3: found ' ' for a text; expected words"),
        ([], r"found no examples in 'label'"),
        ([("a", "1"), ("b", "1.5"), ("c", "2")], r"numbers with fractions in 'label', such as '1\.5'"),
        ([("a", "1"), ("b", "+1"), ("c", "2")], r"labels '\+1' and '1' in 'label'; expected one spelling of each"),
        ([("a", "1"), ("b", "01"), ("c", "2")], r"labels '01' and '1' in 'label'; expected one spelling of each"),
    ],
)
def test_labels_and_texts_that_are_none_are_named(rows: list, message: str, tmp_path: Path) -> None:
    train = write(tmp_path, "train.csv", rows, ("text", "label"))
    with pytest.raises(DataError, match=message):
        load_data(None, train, eval_data=train)


def test_metrics_are_chosen_and_must_suit(tmp_path: Path) -> None:
    train = write(tmp_path, "train.csv", [("a", "x"), ("b", "y")], ("text", "label"))
    given = load_data(None, train, eval_data=train, metrics="f1,accuracy")
    assert given.task.metrics == ("f1", "accuracy")
    for metrics, message in (("acuracy", "did you mean 'accuracy'"), ("pearson", "expects regression")):
        with pytest.raises(DataError, match=message):
            load_data(None, train, eval_data=train, metrics=metrics)


def test_files_that_match_a_pattern_are_one_split(tmp_path: Path) -> None:
    for i, row in enumerate(ROWS):
        write(tmp_path, f"part-{i}.csv", [row])
    given = load_data(None, tmp_path / "part-*.csv", eval_data=tmp_path / "part-[12].csv", columns=PAIRS)
    assert [text[0] for text in given.train.texts] == ["a, b", "c", "e", "g"]
    assert given.task.labels == ("against", "for", "neutral")
    assert len(given.validation) == 2


def test_evaluation_on_training_data_is_told(tmp_path: Path) -> None:
    for name in ("part-1.csv", "part-2.csv", "dev.csv"):
        write(tmp_path, name, ROWS)
    (note,) = load_data(None, tmp_path / "*.csv", eval_data=tmp_path / "." / "dev.csv", columns=PAIRS).notes
    assert note == "dev.csv is in --data and in --eval-data: evaluated on training data"
    assert load_data(None, tmp_path / "part-*.csv", eval_data=tmp_path / "dev.csv", columns=PAIRS).notes == ()


def test_a_label_that_may_be_missing_is_told(tmp_path: Path) -> None:
    rows = [("a", "yes"), ("b", "no"), ("c", "nan"), ("d", "nan")]
    train = write(tmp_path, "train.csv", rows, ("text", "label"))
    (note,) = load_data(None, train, split="holdout:0.5").notes
    assert "train.csv: 2 labels are 'nan', taken for a class of that name: remove" in note
    assert load_training_data(None, train)[2] == (note,)


@pytest.mark.parametrize("split", ["glue", "paper"])
def test_a_regression_is_not_evaluated_on_placeholders(split: str, tmp_path: Path) -> None:
    train = write(tmp_path, "train.csv", [("a", 1.5), ("b", 2.0)], ("text", "stars"))
    test = write(tmp_path, "test.csv", [("c", -1.0), ("d", -1.0)], ("text", "stars"))
    with pytest.raises(DataError, match=r"the score -1 alone in .*test\.csv \(2 in all\); expected scores that"):
        load_data(None, train, eval_data=test, columns="text=text:score=stars", split=split)


def test_a_correlation_with_a_single_class_is_told(tmp_path: Path) -> None:
    train = write(tmp_path, "train.csv", [("a", "yes"), ("b", "no")], ("text", "label"))
    dev = write(tmp_path, "dev.csv", [("c", "yes"), ("d", "yes")], ("text", "label"))
    (note,) = load_data(None, train, eval_data=dev).notes
    assert note.endswith(
        "all 2 examples to evaluate on are 'yes': whatever is predicted, their Matthews correlation is 0"
    )
    assert load_data(None, train, eval_data=dev, metrics="accuracy").notes == ()


def test_a_known_task_gives_files_its_classes_and_metrics(tmp_path: Path) -> None:
    train = write(tmp_path, "train.jsonl", [("a", "b", "not_entailment"), ("c", "d", 0)])
    given = load_data("rte", train, eval_data=train, columns=PAIRS)
    assert given.task == get_task("rte")
    assert given.train.labels == [1, 0]
    with pytest.raises(DataError, match=r"expected a GLUE folder, or --columns"):
        load_data("rte", train, eval_data=train)
    with pytest.raises(DataError, match=r"expected --columns text=…:score=gold"):
        load_data("stsb", train, eval_data=train, columns=PAIRS)


def test_a_known_tasks_labels_are_written_as_any_classes(tmp_path: Path) -> None:
    rows = [("a", "b", 0.0), ("c", "d", 1), ("e", "f", " not_entailment "), ("g", "h", "1.0")]
    for kind in ("jsonl", "csv"):
        train = write(tmp_path, f"train.{kind}", rows)
        assert load_data("rte", train, eval_data=train, columns=PAIRS).train.labels == [0, 1, 1, 1]
    for label in (0.5, 2.0, -1, None, True):
        train = write(tmp_path, "train.jsonl", [("a", "b", label)])
        with pytest.raises(DataError, match=rf"train\.jsonl:1: found label {label}; expected"):
            load_data("rte", train, eval_data=train, columns=PAIRS)


def test_evaluation_data_are_needed_and_the_error_says_what_to_give(tmp_path: Path) -> None:
    train = write(tmp_path, "train.csv", ROWS)
    with pytest.raises(DataError, match=r"no evaluation data beside .*--eval-data FILE, or --split holdout:0\.2"):
        load_data(None, train, columns=PAIRS)
    with pytest.raises(DataError, match=r"no evaluation data"):
        load_data(None, train, columns=PAIRS, split="paper")
    with pytest.raises(DataError, match=r"found --eval-data .* with --split holdout"):
        load_data(None, train, eval_data=train, columns=PAIRS, split="holdout:0.5")
    with pytest.raises(DataError, match=r"--eval-data dev\.txt; expected a file that ends with"):
        load_data(None, train, eval_data="dev.txt", columns=PAIRS)


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("text=a,b:label=c", Columns(("a", "b"), "c")),
        ("label=c:text=a", Columns(("a",), "c")),
        ("text=a:score=b", Columns(("a",), "b", regression=True)),
        ('text="a, b",c:label=d', Columns(("a, b", "c"), "d")),
        ("text=a:b:label=c:d e", Columns(("a:b",), "c:d e")),
    ],
)
def test_columns_are_read(text: str, columns: Columns) -> None:
    assert Columns.parse(text) == columns


@pytest.mark.parametrize(
    "text",
    ["", "a,b", "text=a", "label=b", "text=:label=b", "text=a:label=", "text=a,b,c:label=d", "text=a:label=a",
     "text=a:label=b:score=c", "text=a:text=b:label=c", "x:text=a:label=b"],
)  # fmt: skip
def test_columns_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"columns .*expected"):
        Columns.parse(text)


# --- hub data sets, on a folder laid out like one


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configurations: named (classes with names), plain (strings; no validation), train (nothing else)."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    classes = datasets.ClassLabel(names=["pos", "neg"])
    features = datasets.Features({"premise": datasets.Value("string"), "gold": classes, "idx": datasets.Value("int64")})
    named = {"premise": ["a", "b", "c"], "gold": [1, -1, 0], "idx": [0, 1, 2]}
    tables = {
        ("named", "train"): datasets.Dataset.from_dict(named, features),
        ("named", "validation_one"): datasets.Dataset.from_dict({**named, "premise": ["d", "e", "f"]}, features),
        ("named", "validation_two"): datasets.Dataset.from_dict({**named, "premise": ["g", "h", "i"]}, features),
        ("named", "unlabelled"): datasets.Dataset.from_dict({**named, "gold": [-1] * 3}, features),
        ("plain", "train"): datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["y", "x"]}),
        ("plain", "test"): datasets.Dataset.from_dict({"text": ["c"], "label": ["x"]}),
        ("train", "train"): datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 5]}),
    }
    folder, yaml = tmp_path / "some" / "set", ["---", "configs:"]
    for config in dict.fromkeys(config for config, _ in tables):
        (folder / config).mkdir(parents=True)
        yaml += [f"- config_name: {config}", "  data_files:"]
        for split in (s for c, s in tables if c == config):
            yaml += [f"  - split: {split}", f"    path: {config}/{split}-*"]
            tables[config, split].to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("\n".join([*yaml, "---", ""]))
    return folder


NAMED = {"columns": "text=premise:label=gold", "hub_splits": "train,validation_one"}


def test_a_hub_data_sets_classes_have_its_names_and_order(repository: Path) -> None:
    given = load_data("some/set:named", **NAMED)
    assert given.task == Task("some/set:named", ("pos", "neg"), ("accuracy", "matthews_correlation"))
    assert listed(given.train) == [(("a",), 1), (("c",), 0)]
    assert listed(given.validation) == [(("d",), 1), (("f",), 0)]
    assert given.notes[0] == "some/set/named/train: 1 examples without a label left out"
    assert given.validation.source == "some/set/named/validation_one"


def test_further_splits_are_evaluated_too(repository: Path) -> None:
    given = load_data("some/set:named", **{**NAMED, "hub_splits": "train,validation_one,validation_two"})
    assert {name: examples.texts for name, examples in given.more.items()} == {"validation_two": [("g",), ("i",)]}


def test_without_a_validation_split_it_is_test_and_said_so(repository: Path) -> None:
    given = load_data("some/set:plain")
    assert given.task.labels == ("x", "y")
    assert (given.validation.texts, given.validation.labels) == ([("c",)], [0])
    assert "some/set has no split named validation: evaluated on test" in given.notes[0]
    held = load_data("some/set:plain", split="holdout:0.5")
    assert held.notes == ()
    assert sorted(held.train.texts + held.validation.texts) == [("a",), ("b",)]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("some/set", {}, r"cannot read .*some/set \(Config name is missing: .*'named', 'plain', 'train'"),
        ("some/set:nmed", {}, r"cannot read .*nmed.* of some/set \("),
        ("some/set:train", {}, r"some/set has the splits train; expected validation or test: .*--hub-splits"),
        ("some/set:plain", {"hub_splits": "train,tset"}, r"unknown split of some/set 'tset' \(did you mean 'test'\?\)"),
        ("some/set:plain", {"hub_splits": "train,train"}, r"--hub-splits train,train; expected each split once"),
        ("some/set:plain", {"hub_splits": "train,test", "split": "holdout:0.5"}, r"expected the training split alone"),
        ("some/set:plain", {"columns": "text=words:label=label"}, r"plain/train: found columns 'text, label'"),
        ("some/set:plain", {"eval_data": "dev.csv"}, r"found --eval-data dev\.csv with a hub data set"),
        ("some/set:plain", {"data": "some"}, r"--task some/set:plain is a data set, --data some another"),
        ("some/set:named", {**NAMED, "hub_splits": "train,unlabelled"}, r"unlabelled: found no example with a label"),
        ("some", NAMED, r"unknown task 'some'.*; the folder of this name is --task \./some"),
        ("some:named", {}, r"unknown task 'some:named'.*; the folder of this name is --task \./some:named"),
        ("ret", NAMED, r"unknown task 'ret' \(did you mean 'rte'\?\).*a name of your own with --data FILE$"),
        ("rte", {"columns": "text=a:label=b"}, r"found --columns .* with the task rte; expected none: leave it out"),
        ("./nowhere", {}, r"--task \./nowhere: no folder \./nowhere; expected one, or a hub data set, owner/name"),
    ],
)
def test_mistakes_about_a_data_set_are_named(task: str, options: dict, message: str, repository: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_data(task, **options)


def test_the_hub_is_asked_for_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []

    def offline(*args: object) -> None:
        asked.append(args)
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.get_dataset_split_names", offline)
    for task in ("some/set", "some/set:one"):
        with pytest.raises(DataError, match=r"\(no route\).*check the name and the connection"):
            load_data(task)
    assert asked == [("some/set", None), ("some/set", "one")]


# --- GLUE, and how it is split


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    cola = tmp_path / "CoLA"
    cola.mkdir()
    for split, numbers in (("train", range(40)), ("dev", range(40, 50))):
        (cola / f"{split}.tsv").write_text("".join(f"x\t{i % 2}\t\tword {i}\n" for i in numbers))
    mnli = tmp_path / "MNLI"
    mnli.mkdir()
    for split, label in (("train", "neutral"), ("dev_matched", "entailment"), ("dev_mismatched", "contradiction")):
        (mnli / f"{split}.tsv").write_text(f"sentence1\tsentence2\tgold_label\n{split}\tb\t{label}\n" * 1)
    return tmp_path


def texts(examples: Examples) -> list[str]:
    return [text for (text,) in examples.texts]


def test_the_official_split_is_the_default(glue: Path) -> None:
    given = load_data("cola", glue)
    assert (texts(given.train), texts(given.validation)) == (
        [f"word {i}" for i in range(40)],
        [f"word {i}" for i in range(40, 50)],
    )
    assert given == load_data("cola", glue, split="glue", seed=7)


@pytest.mark.parametrize("spelled", ["{glue}", "glue", "./glue", "../{here}/glue", "glue/CoLA", "{glue}/CoLA"])
def test_a_file_has_one_name_however_its_path_is_spelled(
    spelled: str, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or runs of the same data would have two recipes."""
    (tmp_path / "glue").symlink_to(glue)
    monkeypatch.chdir(tmp_path)
    given = load_data("cola", spelled.format(glue=glue, here=tmp_path.name))
    assert (given.train.source, given.validation.source) == ("CoLA/train.tsv", "CoLA/dev.tsv")
    monkeypatch.chdir(glue / "CoLA")
    given = load_data("cola", ".")
    assert (given.train.source, given.validation.source) == ("CoLA/train.tsv", "CoLA/dev.tsv")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_so_has_a_file_of_ones_own(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a" / "b", f"train.{kind}", ROWS)
    monkeypatch.chdir(tmp_path)
    for spelled in (file, f"a/b/train.{kind}"):
        assert load_data("mine", spelled, eval_data=spelled, columns=PAIRS).train.source == f"b/train.{kind}"


def test_lines_that_qqp_lacks_are_told_once_and_files_of_ones_own_are_read_strictly(tmp_path: Path) -> None:
    header, gap = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n", "1\t2\t3\tWhy?\t\t0\n"
    (tmp_path / "QQP").mkdir()
    train, dev = tmp_path / "QQP" / "train.tsv", tmp_path / "QQP" / "dev.tsv"
    train.write_text(header + gap * 3 + "4\t5\t6\tWho is\n")
    dev.write_text(header + gap)
    for split in ("glue", "paper", "holdout:0.5"):
        given = load_data("qqp", tmp_path, split=split)
        assert given.notes == (f"{train}: lines of another number of fields left out: 1",)
    assert load_training_data("qqp", tmp_path)[2] == given.notes
    columns = "text=question1,question2:label=is_duplicate"
    with pytest.raises(DataError, match=r"train\.tsv:5: found 4 fields; expected 6: mend or remove the line"):
        load_data("qqp", train, eval_data=dev, columns=columns)
    with pytest.raises(DataError, match=r"dev\.tsv:2: found '' for a text; expected words"):
        load_data("qqp", dev, columns=columns, split="holdout:0.5")


def test_the_papers_split_deals_train_and_dev_anew(glue: Path) -> None:
    given, again, other = (load_data("cola", glue, split="paper", seed=s) for s in (0, 0, 1))
    assert given == again
    assert (len(given.train), len(given.validation)) == (40, 10)
    assert sorted(texts(given.train) + texts(given.validation)) == sorted(f"word {i}" for i in range(50))
    assert set(texts(given.validation)) != {f"word {i}" for i in range(40, 50)}
    assert set(texts(given.validation)) != set(texts(other.validation))
    assert given.train.source == other.train.source  # or no two seeds would be runs of one recipe
    assert given.validation.source == "20 % of CoLA/train.tsv + CoLA/dev.tsv"


def test_a_held_out_share_leaves_the_dev_split_alone(glue: Path) -> None:
    (glue / "CoLA" / "dev.tsv").unlink()
    given = load_data("cola", glue, split="holdout:0.1", seed=3)
    assert (len(given.train), len(given.validation)) == (36, 4)
    assert sorted(texts(given.train) + texts(given.validation)) == sorted(f"word {i}" for i in range(40))


@given(n=st.integers(2, 300), share=st.floats(0.001, 0.999), seed=st.integers(0, 2**32 - 1))
def test_what_is_held_out_and_the_rest_are_all_examples_once(n: int, share: float, seed: int) -> None:
    examples = Examples([(str(i),) for i in range(n)], list(range(n)))
    train, held = hold_out(examples, share, seed)
    assert sorted(train.labels + held.labels) == examples.labels
    assert len(held) == min(max(1, round(share * n)), n - 1)
    assert [int(text) for (text,) in train.texts] == train.labels
    assert hold_out(examples, share, seed) == (train, held)


@given(a=st.floats(0.01, 1), b=st.floats(0.01, 1), seed=st.integers(0, 2**32 - 1))
def test_train_fractions_of_a_new_split_are_nested_and_disjoint_from_what_is_held_out(
    a: float, b: float, seed: int
) -> None:
    train, held = hold_out(Examples([("x",)] * 200, list(range(200))), 0.2, seed)
    small, large = (set(subset(train, fraction, seed).labels) for fraction in sorted((a, b)))
    assert small <= large <= set(train.labels)
    assert not large & set(held.labels)


def test_the_two_draws_of_one_seed_are_independent() -> None:
    """Were they the same permutation, small subsets would lie at one end of it and never meet what is held out."""
    examples = Examples([("x",)] * 1000, list(range(1000)))
    held = set(hold_out(examples, 0.5, 0)[1].labels)
    assert 0.4 < sum(label in held for label in subset(examples, 0.2, 0).labels) / 200 < 0.6


def test_mnli_has_a_further_evaluation_split(glue: Path) -> None:
    given = load_data("mnli", glue)
    assert (given.validation.labels, {k: e.labels for k, e in given.more.items()}) == ([0], {"mismatched": [2]})
    dealt = load_data("mnli", glue, split="paper", seed=1)
    assert sorted(t for t, _ in dealt.train.texts + dealt.validation.texts) == ["dev_matched", "train"]
    assert dealt.more == given.more


def test_a_pair_in_memory_is_split_likewise() -> None:
    pair = tuple(Examples([(f"{name}{i}",) for i in range(8)], [0, 1] * 4, name) for name in ("train", "dev"))
    task = Task("own", ("a", "b"), ("accuracy",))
    assert load_data(task, pair) == TaskData(task, *pair)
    given = load_data(task, pair, split="paper", seed=2, metrics=["f1"])
    assert (len(given.train), len(given.validation), given.task.metrics) == (13, 3, ("f1",))
    assert load_data(None, given) is given is load_data("own", given)


def test_single_texts_and_pairs_do_not_mix() -> None:
    single, pairs = Examples([("a",), ("b",)], [0, 1], "mine"), Examples([("a", "c"), ("b", "d")], [0, 1], "theirs")
    task = Task("own", ("a", "b"), ("accuracy",))
    found = (
        r"own: training examples of 1 \(mine\) and evaluation examples of 2 \(theirs\) texts; expected 1 or 2 in all"
    )
    with pytest.raises(DataError, match=found):
        load_data(task, (single, pairs))
    with pytest.raises(DataError, match=r"training examples of 2 \(theirs\) and further examples of 1 \(mine\) texts"):
        TaskData(task, pairs, pairs, more={"further": single})


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("cloa", {}, r"did you mean 'cola'.*owner/name of a hub data set, or a name of your own with --data FILE"),
        ("cola", {"split": "papr"}, r"unknown --split 'papr' \(did you mean 'paper'\?\)"),
        ("cola", {"split": "holdout"}, r"--split holdout; expected holdout:SHARE"),
        ("cola", {"split": "holdout:1"}, r"--split holdout:1; expected holdout:SHARE, more than 0 and less than 1"),
        ("cola", {"eval_data": "dev.csv"}, r"found --eval-data dev\.csv with the task cola; expected none"),
        ("cola", {"columns": PAIRS}, r"found --columns .* with the task cola"),
        ("cola", {"hub_splits": "a,b"}, r"found --hub-splits a,b with the task cola"),
        ("cola", {"metrics": "pearson"}, r"expects regression"),
        ("cola", {"metrics": "accuracy,,f1"}, r"--metrics accuracy,,f1; expected names with commas between"),
        (None, {}, r"without a --task; expected a task, or --data FILE that ends with \.csv"),
    ],
)
def test_mistakes_about_what_to_load_are_named(task: str | None, options: dict, message: str, glue: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_data(task, glue, **options)


def test_loaded_data_take_no_further_wishes() -> None:
    task = Task("own", ("a", "b"), ("accuracy",))
    examples = Examples([("x",), ("y",)], [0, 1])
    given = TaskData(task, examples, examples)
    for wish in ({"split": "paper"}, {"metrics": "f1"}, {"columns": PAIRS}):
        with pytest.raises(DataError, match=r"loaded before|loading them"):
            load_data(None, given, **wish)
    with pytest.raises(DataError, match="the task cola with loaded data of own"):
        load_data("cola", given)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "train", "dev"),
    [
        ("cola", 8551, 1043),
        ("mrpc", 3668, 408),
        ("rte", 2490, 277),
        ("stsb", 5749, 1500),
        ("wnli", 635, 71),
        ("sst2", 67349, 872),
    ],
)
def test_real_glue_has_its_counts_in_both_splits(name: str, train: int, dev: int) -> None:
    folder = Path(os.environ["GUIDED_DROPOUT_SHARED"]) / "data" / "glue"
    official = load_data(name, folder)
    assert (len(official.train), len(official.validation)) == (train, dev)
    dealt = load_data(name, folder, split="paper", seed=0)
    held = round(0.2 * (train + dev))
    assert (len(dealt.train), len(dealt.validation)) == (train + dev - held, held)
    # As many of each example: some of GLUE's stand in it twice.
    before, after = (Counter([*d.train, *d.validation]) for d in (official, dealt))
    assert before == after
    assert load_data(name, folder, split="paper", seed=1).validation.digest() != dealt.validation.digest()
