"""Experiments on files and hub data sets of one's own."""

import json
import sys

import pytest
from test_regularizers_pull import random_profile
from tiny import WORDS, save_tiny_bert

from guided_dropout.bench.cost import trial
from guided_dropout.bench.folder import Experiment
from guided_dropout.bench.plan import BenchModel, Plan, Runner
from guided_dropout.cli import app as cli
from guided_dropout.data.task_data import DataSource
from guided_dropout.errors import GuidedDropoutError
from guided_dropout.models import load_lm
from guided_dropout.recipe import Recipe
from guided_dropout.workbench import Workbench

SHORT = ("--epochs", "1", "--max-length", "16", "--device", "cpu")
OWN = ("--data", "train.csv", "--eval-data", "dev.csv", "--columns", "text=words:label=colour")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    save_tiny_bert(folder / "model")
    random_profile(load_lm(folder / "model")).save_pretrained(folder / "profile")
    for name, number in (("train", 40), ("dev", 16)):
        rows = [(f"the {'red' if i % 2 else 'green'} cat sees a {WORDS[i % 17]}", i) for i in range(number)]
        colours = "".join(f"{text},{'red' if i % 2 else 'green'}\n" for text, i in rows)
        (folder / f"{name}.csv").write_text("words,colour\n" + colours)
        lines = [json.dumps({"text": text, "label": i % 2}) for text, i in rows]
        (folder / "set").mkdir(exist_ok=True)
        (folder / "set" / f"{'train' if name == 'train' else 'test'}.jsonl").write_text("\n".join(lines))
        scores = "".join(f"s\ts\ts\ts\ts\ts\ts\t{text}\t{text}\t{i % 5}.0\n" for text, i in rows)
        head = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        (folder / "glue" / "STS-B").mkdir(parents=True, exist_ok=True)
        (folder / "glue" / "STS-B" / f"{name}.tsv").write_text(head + scores)
    return folder


@pytest.fixture
def bench(folder, monkeypatch, capsys):
    """(exit code, stdout, stderr) of ``guided-dropout bench``."""

    def run(*arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setattr("signal.signal", lambda *_: None)
        monkeypatch.setattr(sys, "argv", ["guided-dropout", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return (stopped.value.code or 0, *capsys.readouterr())

    return run


def runs(*arguments):
    return ("run", "--models", "model", "--profile", "profile", *arguments, *SHORT)


def test_a_file_of_ones_own_is_a_task_from_run_to_report(folder, tmp_path, bench):
    out = tmp_path / "out"
    line = runs(*OWN, "--metrics", "f1,accuracy", "--arms", "dropout,guided", "--seeds", 2, "--out", out)
    code, text, err = bench(*line)
    assert (code, err) == (0, ""), err
    assert "4 runs, 0 of them there, 4 to make" in text
    made = Experiment(out).runs()
    assert {(r.key.task, r.result.task, r.result.metric) for r in made} == {("train.csv", "train.csv", "f1")}
    assert {tuple(r.result.recipe["labels"]) for r in made} == {("green", "red")}
    assert {r.result.recipe["eval_data"] for r in made} == {f"{folder.name}/dev.csv"}
    shared = Experiment(out).facts["recipe"]
    assert (shared["data"], shared["eval_data"], shared["columns"], shared["metrics"]) == (
        "train.csv", "dev.csv", "text=words:label=colour", "f1,accuracy",
    )  # fmt: skip
    assert "4 runs, 4 of them there, 0 to make" in bench(*line)[1]
    other = [a if a != "f1,accuracy" else "accuracy" for a in line]
    code, _, err = bench(*other)
    assert (code, err.count("\n")) == (2, 1)
    assert "metrics: 'f1,accuracy' there, 'accuracy' given" in err
    code, text, err = bench("report", out, "--confidence", "0.9")
    assert (code, err) == (0, ""), err
    report = (out / "report" / "report.md").read_text()
    assert "train.csv" in report
    assert "90% interval" in report
    assert f"guided-dropout bench report {out} --confidence 0.9" in report
    assert r"train.csv" in (out / "report" / "tables.tex").read_text()


def test_a_run_on_a_file_is_the_one_that_finetune_makes(folder):
    source = DataSource(*(str(folder / n) for n in ("train.csv", "dev.csv")), "text=words:label=colour")
    recipe = Recipe(epochs=1, max_length=16, device="cpu", evaluate="end")
    plan = Plan.of([BenchModel(str(folder / "model"))], ["mine"], ["none"], [0.5], [3], source, recipe=recipe)
    (key,) = plan.grid
    result = Runner(plan).run(key)
    assert (result.task, result.recipe["n_train"], result.recipe["train_data"]) == (
        "mine",
        20,
        f"{folder.name}/train.csv",
    )


def test_a_data_set_of_the_hub_is_a_task_by_its_name(folder, tmp_path, bench):
    pytest.importorskip("datasets")
    out = tmp_path / "out"
    code, text, err = bench(*runs("--tasks", "./set", "--arms", "none", "--seeds", 1, "--out", out))
    assert (code, err) == (0, ""), err
    assert "evaluated on test; choose nothing by it" in " ".join(text.split())
    (run,) = Experiment(out).runs()
    assert (run.key.task, run.result.metric) == ("./set", "accuracy")
    assert bench("report", out)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*OWN, "--tasks", "a,b"), "found 2 tasks (a, b) with the files --data train.csv; expected one name"),
        (OWN[:2], "no evaluation data beside train.csv; expected --eval-data FILE"),
        ((*OWN[:4], "--columns", "text=word:label=colour"), "train.csv"),
        (("--data", "glue", "--tasks", "stsb", "--columns", "text=a:label=b"), "with the task stsb; expected none"),
        ((), "found no --tasks, no --recipe and no --data FILE"),
    ],
)
def test_mistakes_are_told_in_one_line_and_nothing_is_written(tmp_path, bench, arguments, message):
    code, _, err = bench(*runs(*arguments, "--arms", "dropout", "--seeds", 1, "--out", tmp_path / "out"))
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_recipe_takes_the_place_of_its_tasks_by_a_file(bench):
    code, text, err = bench(*runs(*OWN, "--recipe", "controls", "--seeds", 1, "--out", "dry", "--dry-run"))
    assert (code, err) == (0, ""), err
    assert "69 runs, 0 of them there" in text  # 21 arms and two more deals of shuffled, three fractions


def test_a_regression_can_be_tried_to_tell_its_cost(folder):
    source = DataSource(str(folder / "glue"))
    recipe = Recipe(batch_size=4, max_length=16, device="cpu", evaluate="end")
    plan = Plan.of([BenchModel(str(folder / "model"))], ["stsb"], ["dropout"], [1.0], [0], source, recipe=recipe)
    seconds, read = trial(plan, "model", "stsb")
    assert seconds > 0 < read


@pytest.mark.parametrize("split", ["glue", "paper", "holdout:0.25"])
def test_files_are_read_once_whatever_the_seeds(folder, monkeypatch, split):
    from guided_dropout.data import task_data

    read = []
    table = task_data.read_table
    monkeypatch.setattr(task_data, "read_table", lambda *a, **o: read.append(a) or table(*a, **o))
    bench, dealt = Workbench(folder / "model"), set()
    options = {"columns": "text=words:label=colour"}
    if not split.startswith("holdout"):
        options["eval_data"] = folder / "dev.csv"
    for seed in range(4):
        given = bench.data(None, folder / "train.csv", split=split, seed=seed, **options)
        dealt.add(given.validation.digest())
        alone = task_data.load_data(None, folder / "train.csv", split=split, seed=seed, **options)
        for ours, theirs in ((given.train, alone.train), (given.validation, alone.validation)):
            assert (ours.digest(), ours.source) == (theirs.digest(), theirs.source)
        assert (given.task, given.notes, given.split) == (alone.task, alone.notes, alone.split)
    once = 1 if split.startswith("holdout") else 2
    assert len(read) == once + 4 * once  # ours once, and those that were read to compare with
    assert len(dealt) == (1 if split == "glue" else 4)
    if split.startswith("holdout"):
        with pytest.raises(GuidedDropoutError, match="found --eval-data"):
            bench.data(None, folder / "train.csv", split=split, eval_data=folder / "dev.csv", **options)


def test_another_profile_is_another_experiment_even_beside_a_schedule(folder, tmp_path):
    model = load_lm(folder / "model")
    profile = random_profile(model)
    from guided_dropout.schedule import DropoutSchedule

    schedule = DropoutSchedule.from_profile(profile, model).save(tmp_path / "schedule.json")
    random_profile(model, seed=2).save_pretrained(tmp_path / "other")

    def plan(profile):
        known = BenchModel(str(folder / "model"), str(profile) if profile else None, str(schedule))
        return Plan.of([known], ["cola"], ["dropout", "ewc"] if profile else ["dropout"], [1.0], [0])

    experiment = Experiment.start(tmp_path / "out", plan(folder / "profile").check())
    experiment.check(plan(folder / "profile").check())
    experiment.check(plan(None).check())
    with pytest.raises(GuidedDropoutError, match="profile_digest"):
        experiment.check(plan(tmp_path / "other").check())
