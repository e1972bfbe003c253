import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from guided_dropout.data.tasks import TASKS, Examples, Task, compute_metrics, get_task, load_task, subset
from guided_dropout.errors import DataError

COLA = get_task("cola")
QQP = get_task("qqp")
RTE = get_task("rte")
STSB = get_task("stsb")


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return folder


# --- the table


@pytest.mark.parametrize(("wrong", "meant"), [("cloa", "cola"), ("SST-2", "sst2"), ("STS-B", "stsb")])
def test_an_unknown_task_is_answered_with_the_nearest(wrong: str, meant: str) -> None:
    with pytest.raises(DataError, match=f"did you mean '{meant}'"):
        get_task(wrong)


def test_main_metrics_are_those_of_the_papers_table() -> None:
    assert {name: task.main_metric for name, task in TASKS.items()} == {
        "cola": "matthews_correlation",
        "stsb": "pearson",
        **dict.fromkeys(("sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli"), "accuracy"),
    }
    assert {task.num_labels for task in TASKS.values()} == {1, 2, 3}
    assert TASKS["mnli"].num_labels == 3
    assert STSB.is_regression


@pytest.mark.parametrize(
    ("labels", "metrics", "message"),
    [
        (("a", "b"), ("accurcy",), "did you mean 'accuracy'"),
        (("a", "b"), ("pearson",), "expects regression"),
        (None, ("accuracy",), "expects classes"),
        (("a", "b", "c"), ("f1",), "expects two classes"),
        (("a", "b"), (), "no metric"),
    ],
)
def test_a_metric_must_suit_the_labels(labels: tuple[str, ...] | None, metrics: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Task("own", labels, metrics)


# --- examples


def test_examples_are_a_sequence() -> None:
    examples = Examples([("a",), ("b",), ("c",)], [0, 1, 0])
    assert len(examples) == 3
    assert examples[1] == (("b",), 1)
    assert list(examples[1:]) == [(("b",), 1), (("c",), 0)]
    assert examples.take([2, 0]).texts == [("c",), ("a",)]


def test_each_text_has_a_label() -> None:
    with pytest.raises(DataError, match="2 texts and 1 labels"):
        Examples([("a",), ("b",)], [0])


@given(n=st.integers(1, 300), a=st.floats(0.001, 1), b=st.floats(0.001, 1), seed=st.integers(0, 2**32 - 1))
def test_a_smaller_subset_is_contained_in_a_larger_one(n: int, a: float, b: float, seed: int) -> None:
    examples = Examples([(str(i),) for i in range(n)], list(range(n)))
    small, large = (subset(examples, fraction, seed) for fraction in sorted((a, b)))
    assert large.labels[: len(small)] == small.labels
    assert len(set(large.labels)) == len(large)
    assert len(large) == max(1, round(n * max(a, b)))


def test_the_whole_is_a_subset_and_seeds_differ() -> None:
    examples = Examples([(str(i),) for i in range(50)], list(range(50)))
    assert sorted(subset(examples, 1.0, 0).labels) == examples.labels
    assert subset(examples, 0.2, 0).labels == subset(examples, 0.2, 0).labels
    assert subset(examples, 0.2, 0).labels != subset(examples, 0.2, 1).labels


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match="more than 0 and at most 1"):
        subset(Examples([("a",)], [0]), fraction, 0)


# --- GLUE folders


def test_cola_has_no_header_and_quotes_are_text(tmp_path: Path) -> None:
    write(tmp_path, "CoLA/train.tsv", 'gj04\t1\t\tHe said "yes.\nks08\t0\t*\tIt "was" he\u2028who left\x85 .\n')
    examples = load_task(COLA, tmp_path, "train")
    assert examples.texts == [('He said "yes.',), ('It "was" he\u2028who left\x85 .',)]
    assert examples.labels == [1, 0]
    assert load_task(COLA, tmp_path / "CoLA", "train").labels == [1, 0]


def test_labels_may_be_names_and_files_may_come_from_windows(tmp_path: Path) -> None:
    lines = ("\ufefflabel\tsentence1\tsentence2", "not_entailment\ta b\tc", "0\td\te")
    write(tmp_path, "RTE/dev.tsv", "\r\n".join(lines))
    examples = load_task(RTE, tmp_path, "validation")
    assert examples.texts == [("a b", "c"), ("d", "e")]
    assert examples.labels == [1, 0]


def test_scores_are_numbers(tmp_path: Path) -> None:
    header = "index\tgenre\tsentence1\tsentence2\tscore\n"
    write(tmp_path, "STS-B/train.tsv", header + "0\tx\ta\tb\t3.800\n")
    assert load_task(STSB, tmp_path, "train").labels == [3.8]
    write(tmp_path, "STS-B/train.tsv", header + "0\tx\ta\tb\tnan\n")
    with pytest.raises(DataError, match=r"train\.tsv:2: found label 'nan'; expected a number"):
        load_task(STSB, tmp_path, "train")


def test_mnli_has_two_validation_splits(tmp_path: Path) -> None:
    header = "index\tsentence1\tsentence2\tlabel1\tgold_label\n"
    write(tmp_path, "MNLI/dev_matched.tsv", header + "0\ta\tb\tneutral\tcontradiction\n")
    write(tmp_path, "MNLI/dev_mismatched.tsv", header + "0\ta\tb\tneutral\tentailment\n")
    assert load_task(TASKS["mnli"], tmp_path, "validation").labels == [2]
    assert load_task(TASKS["mnli"], tmp_path, "validation_mismatched").labels == [0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\t1\t\tfine\nb\t1\tonly three\n", r"train\.tsv:2: found 3 fields; expected 4"),
        ("a\t1\t\tfine\nb\t2\t\tword\n", r"train\.tsv:2: found label '2'; expected one of 0 \(unacceptable\), 1"),
        ("a\t1\t\t \n", r"train\.tsv:1: found ' ' for a text"),
        ("a\t1\t\tfine\n\n", r"train\.tsv:2: found 1 fields"),
        ("", r"train\.tsv: found no examples"),
    ],
)
def test_a_malformed_line_is_named(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, "CoLA/train.tsv", text)
    with pytest.raises(DataError, match=message):
        load_task(COLA, tmp_path, "train")


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    write(tmp_path, "RTE/train.tsv", "index\tsentence1\tlabel\n0\ta\tentailment\n")
    with pytest.raises(
        DataError, match=r"train\.tsv:1: found columns 'index, sentence1, label'; expected .*'sentence2'"
    ):
        load_task(RTE, tmp_path, "train")
    write(tmp_path, "RTE/train.tsv", "index\tsentence1\tsentence2\tlabel\n")
    with pytest.raises(DataError, match="no examples"):
        load_task(RTE, tmp_path, "train")


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    write(tmp_path, "CoLA/train.tsv", "")
    (tmp_path / "CoLA" / "train.tsv").write_bytes(b"a\t1\t\t\xff\xfe\n")
    with pytest.raises(DataError, match=r"cannot read .*train\.tsv"):
        load_task(COLA, tmp_path, "train")


def test_missing_files_and_folders_are_named_with_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "CoLA/train.tsv", "a\t1\t\tfine\n")
    with pytest.raises(DataError, match=r"no dev\.tsv in .*CoLA, which holds train\.tsv"):
        load_task(COLA, tmp_path, "validation")
    with pytest.raises(DataError, match=r"no RTE/train\.tsv in .*, which holds CoLA"):
        load_task(RTE, tmp_path, "train")
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        load_task(RTE, tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="no folder"):
        load_task(RTE, tmp_path / "CoLA" / "train.tsv", "train")
    with pytest.raises(DataError, match="did you mean 'validation'"):
        load_task(RTE, tmp_path, "valid")


QQP_HEADER = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"


def test_qqps_own_gaps_are_no_errors(tmp_path: Path) -> None:
    """As published, some questions lack a second one, and some lines of the training file are in pieces."""
    lines = '1\t2\t3\tWhy?\t\t0\n4\t5\t6\tWho is\n"\tWho?\t1\n7\t8\t9\tHow?\tHow so?\t1\n'
    write(tmp_path, "QQP/train.tsv", QQP_HEADER + lines)
    train = load_task(QQP, tmp_path)
    assert list(train) == [(("Why?", ""), 0), (("How?", "How so?"), 1)]
    assert len(train.notes) == 1
    assert train.notes[0].endswith("QQP/train.tsv: lines of another number of fields left out: 2")


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("dev", "4\t5\t6\tWho is\n", r"dev\.tsv:2: found 4 fields; expected 6"),
        ("train", "1\t2\t3\t\tWhy?\t0\n", r"train\.tsv:2: found '' for a text"),
        ("train", "1\t2\t3\t\t\t0\n", r"train\.tsv:2: found '' for a text"),
        ("train", "1\t2\t3\tWhy?\tWhy?\t2\n", r"train\.tsv:2: found label '2'"),
        ("train", "4\t5\t6\tWho is\n", r"train\.tsv: found no examples"),
    ],
)
def test_other_faults_of_qqps_files_are_errors(name: str, lines: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, f"QQP/{name}.tsv", QQP_HEADER + lines)
    with pytest.raises(DataError, match=message):
        load_task(QQP, tmp_path, {"dev": "validation"}.get(name, name))


def test_a_task_of_ones_own_in_glues_layout_is_read_strictly(tmp_path: Path) -> None:
    own = Task("own", QQP.labels, QQP.metrics, RTE.files)
    write(tmp_path, "RTE/train.tsv", "sentence1\tsentence2\tlabel\na\t\t1\n")
    with pytest.raises(DataError, match=r"train\.tsv:2: found '' for a text"):
        load_task(own, tmp_path)


# --- hub data sets, on a folder laid out like the repository


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import pandas as pd

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "glue"
    frames = {
        "cola": {"sentence": ["One.", "Two two."], "label": [1, 0], "idx": [0, 1]},
        "stsb": {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [2.5, 0.0], "idx": [0, 1]},
        "mnli": {"premise": ["a"], "hypothesis": ["b"], "label": [2], "idx": [0]},
        "qqp": {"question1": ["a", "b"], "question2": ["", "c"], "label": [0, 1], "idx": [0, 1]},
        "rte": {"sentence1": ["a"], "sentence2": ["b"], "label": [-1], "idx": [0]},
        "wnli": {"sentence1": ["a"], "label": [0], "idx": [0]},
    }
    yaml = ["---", "configs:"]
    for config, frame in frames.items():
        (folder / config).mkdir(parents=True)
        splits = ("train", "validation_matched") if config == "mnli" else ("train", "validation")
        yaml += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            yaml += [f"  - split: {split}", f"    path: {config}/{split}-*"]
            pd.DataFrame(frame).to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("\n".join([*yaml, "---", ""]))
    return folder


def test_a_data_set_laid_out_like_the_hubs_is_read(repository: Path) -> None:
    cola = load_task(COLA, repository, "validation")
    assert (cola.texts, cola.labels) == ([("One.",), ("Two two.",)], [1, 0])
    assert cola.source.endswith("cola/validation")
    assert list(load_task(STSB, repository)) == [(("a", "c"), 2.5), (("b", "d"), 0.0)]
    assert list(load_task(TASKS["mnli"], repository, "validation")) == [(("a", "b"), 2)]
    assert list(load_task(QQP, repository)) == [(("a", ""), 0), (("b", "c"), 1)]


def test_faults_of_a_data_set_are_named(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"rte/train\[0\]: found label -1"):
        load_task(RTE, repository)
    with pytest.raises(DataError, match="expected one named 'sentence2'"):
        load_task(TASKS["wnli"], repository)
    with pytest.raises(DataError, match=r"cannot read qnli/train of .*glue"):
        load_task(TASKS["qnli"], repository)
    assert capfd.readouterr().err == ""


def test_the_hub_is_asked_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def offline(*args: object, **options: object) -> None:
        asked.append(args)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", offline)
    for data in (None, "someone/else"):
        with pytest.raises(DataError, match=r"\(no route\).*check the name and the connection"):
            load_task(COLA, data)
    assert asked == [("nyu-mll/glue", "cola"), ("someone/else", "cola")]


def test_without_datasets_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'guided-dropout\[hub\]'"):
        load_task(COLA)


def test_a_task_of_ones_own_needs_examples() -> None:
    with pytest.raises(DataError, match=r"own has no data .*give a pair \(train, validation\)"):
        load_task(Task("own", ("a", "b"), ("accuracy",)))


# --- metrics


def test_metrics_on_worked_examples() -> None:
    predictions, labels = [1, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 1]
    assert compute_metrics(get_task("mrpc"), predictions, labels) == {"accuracy": 4 / 6, "f1": 0.75}
    # TP 3, TN 1, FP 1, FN 1: (3·1 − 1·1) / √(4·4·2·2)
    assert compute_metrics(COLA, predictions, labels)["matthews_correlation"] == pytest.approx(0.25)
    assert compute_metrics(STSB, [1.0, 2.0, 4.0], [1.0, 3.0, 2.0]) == {
        "pearson": pytest.approx(0.3273268354),
        "spearman": pytest.approx(0.5),
    }


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_classification_metrics_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    predictions, labels = np.array(pairs).T
    ours = compute_metrics(get_task("mrpc"), predictions, labels)
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(labels, predictions))
    assert ours["f1"] == pytest.approx(sk.f1_score(labels, predictions, zero_division=0))
    if len(set(predictions)) > 1 and len(set(labels)) > 1:
        expected = sk.matthews_corrcoef(labels, predictions)
        assert compute_metrics(COLA, predictions, labels)["matthews_correlation"] == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0, 5)), min_size=1, max_size=30))
def test_correlations_are_finite_and_within_bounds(pairs: list[tuple[float, float]]) -> None:
    predictions, labels = np.array(pairs).T
    for value in compute_metrics(STSB, predictions, labels).values():
        assert -1 - 1e-9 <= value <= 1 + 1e-9


def test_spearman_is_scipys_with_ties() -> None:
    predictions, labels = [1.0, 2.0, 2.0, 5.0], [0.0, 3.0, 1.0, 3.0]
    assert compute_metrics(STSB, predictions, labels)["spearman"] == stats.spearmanr(predictions, labels).statistic


@pytest.mark.parametrize(
    ("predictions", "labels"), [([1, 1, 1], [0, 1, 1]), ([0, 1, 1], [1, 1, 1]), ([0], [1]), ([1], [1])]
)
def test_a_correlation_with_a_constant_is_zero(predictions: list[int], labels: list[int]) -> None:
    assert compute_metrics(COLA, predictions, labels)["matthews_correlation"] == 0.0
    assert compute_metrics(STSB, predictions, labels) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize(("predictions", "labels"), [([], []), ([1, 0], [1]), ([[1], [0]], [[1], [0]])])
def test_predictions_and_labels_go_together(predictions: list, labels: list) -> None:
    with pytest.raises(DataError, match="two vectors of the same length"):
        compute_metrics(COLA, predictions, labels)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "train", "validation"),
    [
        ("cola", 8551, 1043),
        ("sst2", 67349, 872),
        ("mrpc", 3668, 408),
        ("stsb", 5749, 1500),
        ("rte", 2490, 277),
        ("wnli", 635, 71),
    ],
)
def test_real_glue_tasks_have_their_published_sizes(name: str, train: int, validation: int) -> None:
    folder = Path(os.environ["GUIDED_DROPOUT_SHARED"]) / "data" / "glue"
    for split, size in (("train", train), ("validation", validation)):
        examples = load_task(get_task(name), folder, split)
        assert len(examples) == size
        assert len(set(examples.labels)) >= 2
