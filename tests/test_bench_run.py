"""An experiment: what is missing is run, whatever happened before or happens beside it."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import psutil
import pytest
from families import measured_on
from test_regularizers_pull import random_profile
from tiny import WORDS, save_tiny_bert

from guided_dropout.arms import ARMS
from guided_dropout.artefacts import read_json, write_json
from guided_dropout.bench import run as bench_run
from guided_dropout.bench.controls import name_of
from guided_dropout.bench.folder import Experiment, Failure, Run, shared_facts
from guided_dropout.bench.grid import Grid, RunKey
from guided_dropout.bench.plan import BenchModel, Plan, Runner
from guided_dropout.bench.recipes import RECIPES
from guided_dropout.bench.run import check_joining, run_experiment
from guided_dropout.cli import app as cli
from guided_dropout.data.task_data import DataSource
from guided_dropout.errors import ArtefactError, GuidedDropoutError, ScheduleError
from guided_dropout.finetune import finetune
from guided_dropout.models import load_lm
from guided_dropout.recipe import Recipe
from guided_dropout.schedule import DropoutSchedule

RECIPE = Recipe(
    epochs=1, learning_rate=1e-3, max_length=16, device="cpu", evaluate="end"
)  # too little to learn: some runs collapse


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its profile, and two tasks; the third is not there."""
    folder = tmp_path_factory.mktemp("bench")
    save_tiny_bert(folder / "model")
    model = load_lm(folder / "model")
    random_profile(model).save_pretrained(folder / "profile")
    for split, number in (("train", 64), ("dev", 24)):
        cola = [f"x\t{i % 2}\t\tthe {'red' if i % 2 else 'green'} cat sees a {WORDS[i % 17]}\n" for i in range(number)]
        (folder / "glue" / "CoLA").mkdir(parents=True, exist_ok=True)
        (folder / "glue" / "CoLA" / f"{split}.tsv").write_text("".join(cola))
    return folder


def plan_of(folder, **changes):
    axes = {"tasks": ["cola"], "arms": ["dropout", "guided"], "fractions": [1.0, 0.5], "seeds": range(2)} | changes
    model = BenchModel(str(folder / "model"), str(folder / "profile"))
    return Plan.of([model], **axes, source=DataSource(str(folder / "glue")), recipe=RECIPE)


def split_by(plan, split):
    return replace(plan, source=replace(plan.source, split=split))


@pytest.fixture(scope="module")
def finished(folder):
    """All runs of a small plan, made in one process."""
    plan = plan_of(folder)
    experiment = Experiment.start(folder / "finished", plan.check())
    done = []
    run_experiment(plan, experiment, list(plan.grid), threads=1, told=done.append)
    assert {d.status for d in done} <= {"ok", "collapsed"}
    assert len(done) == 8
    assert list(experiment.path.rglob("*.lock")) == []
    return plan, experiment


def outcomes(experiment):
    """What decides a run, without what differs from one making to the next."""
    return {r.key: (r.result.value, r.result.history, r.result.pairing) for r in experiment.runs()}


def test_a_run_of_an_experiment_is_the_same_as_one_alone(folder, finished):
    _, experiment = finished
    (run,) = [r for r in experiment.runs() if r.key == RunKey("model", "cola", 0.5, "guided", 1)]
    plan = plan_of(folder)
    profile, schedule = plan.models["model"].known()
    alone = finetune(
        folder / "model", "cola", data=folder / "glue", arm="guided", profile=profile, schedule=schedule, seed=1,
        train_fraction=0.5, epochs=1, learning_rate=1e-3, max_length=16, device="cpu",
    )  # fmt: skip
    assert run.result.value == alone.value
    assert run.result.metrics == alone.metrics
    assert run.result.pairing == alone.pairing
    assert run.result.rates == alone.rates
    assert run.result.recipe["n_train"] == 32


def test_runs_are_paired_over_the_arms_and_subsets_nested(finished):
    by_key = {r.key: r.result for r in finished[1].runs()}
    for key, result in by_key.items():
        assert result.pairing == by_key[replace(key, arm="dropout")].pairing
        assert result.pairing["weights"] == by_key[replace(key, fraction=1.0)].pairing["weights"]
        assert result.pairing["batches"] != by_key[replace(key, seed=1 - key.seed)].pairing["batches"]


def test_the_schedule_is_the_papers_where_none_is_given(folder, finished):
    model = load_lm(folder / "model")
    expected = DropoutSchedule.from_profile(random_profile(model), model)
    facts = finished[1].facts["models"]["model"]["schedule"]
    assert facts["rates"] == pytest.approx(dict(expected.rates))
    assert (max(facts["rates"].values()), min(facts["rates"].values())) == (0.1, 0.0)


def test_a_failed_run_is_recorded_and_the_rest_goes_on(folder):
    plan = plan_of(folder, tasks=["rte", "cola"], fractions=[0.5], seeds=[0], arms=["dropout"])
    experiment = Experiment.start(folder / "failing", plan.check())
    done = []
    run_experiment(plan, experiment, list(plan.grid), threads=1, told=done.append)
    assert done[0].status == "failed" != done[1].status
    (failed,) = [r for r in experiment.runs() if r.status == "failed"]
    assert failed.failure.error == "DataError"
    assert "RTE" in failed.failure.message
    assert "load_task" in failed.failure.traceback
    assert experiment.forget_failures() == 1
    assert [r.key.task for r in experiment.runs()] == ["cola"]


def test_results_of_another_recipe_are_refused_and_both_sides_shown(folder, finished):
    other = replace(plan_of(folder), recipe=replace(RECIPE, learning_rate=2e-3, epochs=2))
    with pytest.raises(
        ArtefactError, match=r"epochs: 1 there, 2 given; recipe.learning_rate: 0.001 there, 0.002 given"
    ):
        Experiment.start(folder / "finished", other.check())
    Experiment.start(folder / "finished", plan_of(folder, seeds=range(9)).check())  # more of the same is welcome


def test_models_and_schedules_may_join_but_not_change(tmp_path):
    def started(**models):
        return Experiment.start(tmp_path / "out", {"recipe": {"epochs": 1}, "models": models}).facts["models"]

    bare, known = {"source": "a", "schedule": None}, {"source": "a", "schedule": {"rates": {"x": 0.1}}}
    assert started(a=bare) == {"a": bare}
    assert started(b=known) == {"a": bare, "b": known}
    assert started(a=known)["a"] == known
    assert started(a=bare, b=bare) == {"a": known, "b": known}
    with pytest.raises(ArtefactError, match=r"\(models.a.schedule.rates.x: 0.1 there, 0.2 given\)"):
        started(a={"source": "a", "schedule": {"rates": {"x": 0.2}}})
    with pytest.raises(ArtefactError, match=r"recipe.epochs: 1 there, 2 given"):
        Experiment.start(tmp_path / "out", {"recipe": {"epochs": 2}, "models": {"c": known}})
    assert started() == {"a": known, "b": known}


def test_what_an_older_version_did_not_write_is_as_good_as_none(tmp_path):
    experiment = Experiment.start(tmp_path / "out", {"recipe": {"betas": (0.9, 0.999), "epochs": 1}})
    experiment.check({"recipe": {"betas": (0.9, 0.999), "epochs": 1, "new": None}})
    with pytest.raises(
        ArtefactError, match=r"\(recipe.betas: \[0.9, 0.999\] there, \(0.9, 0.99\) given; recipe.new: None th"
    ):
        experiment.check({"recipe": {"betas": (0.9, 0.99), "epochs": 1, "new": 1}})


def test_what_was_asked_for_grows(tmp_path):
    """By whole grids: nobody asked for the second's seeds of the first's tasks."""
    experiment = Experiment.start(tmp_path / "out", {"recipe": {}})
    assert experiment.grids == []
    first = Grid(["m"], ["cola"], ["dropout"], [0.1], [0, 1])
    second = Grid(["m"], ["rte"], ["guided", "dropout"], [1.0, 0.1], [0, 1, 2])
    experiment.note_grid(first)
    experiment.note_grid(second)
    experiment.note_grid(replace(second, seeds=[2]))
    assert experiment.grids == [first, second]
    wider = replace(first, tasks=["cola", "sst2"], arms=["dropout", "guided"])
    experiment.note_grid(wider)
    assert experiment.grids == [second, wider]


def test_a_single_grid_as_it_used_to_be_noted_is_read(tmp_path):
    experiment = Experiment.start(tmp_path / "out", {"recipe": {}})
    grid = Grid(["m"], ["cola"], ["dropout"], [0.1], [0, 1])
    write_json(experiment.path / "grid.json", {"kind": "bench-grid", "schema": 1, **asdict(grid)})
    assert experiment.grids == [grid]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fractions": [2]}, "a train fraction of 2; expected more than 0 and at most 1"),
        ({"seeds": [1, 1]}, "found 1 twice in the seeds; .*"),
        ({"tasks": []}, "found no tasks; .*"),
        ({"arms": [1]}, ".*"),
        ({"seeds": 3}, ".*"),
    ],
)
def test_a_grid_with_values_that_none_has_is_named_by_its_file(tmp_path, values, message):
    experiment = Experiment.start(tmp_path / "out", {"recipe": {}})
    grid = {"models": ["m"], "tasks": ["cola"], "arms": ["dropout"], "fractions": [0.1], "seeds": [0]} | values
    write_json(experiment.path / "grid.json", {"kind": "bench-grid", "schema": 1, "grids": [grid]})
    with pytest.raises(ArtefactError, match=rf"grid\.json is damaged \({message}\); expected what .*: delete the file"):
        _ = experiment.grids


def test_needs_are_checked_before_any_run(folder):
    plan = plan_of(folder)
    bare = replace(plan, models={"model": BenchModel(str(folder / "model"))})
    with pytest.raises(ScheduleError, match="guided"):
        bare.check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "found no tasks"),
        ({"arms": ["mixout:p=0.9", "mixout:p=0.90"]}, "twice in the arms"),
        ({"arms": ["guidd"]}, "did you mean 'guided'"),
        ({"tasks": ["colla"]}, "did you mean 'cola'"),
        ({"fractions": [0.0]}, "a train fraction of 0.0"),
        ({"seeds": [-1]}, "the seed -1"),
    ],
)
def test_bad_grids_are_refused(folder, changes, message):
    with pytest.raises(GuidedDropoutError, match=message):
        plan_of(folder, **changes)


def test_names_of_runs_tell_them_apart():
    grid = Grid(["a", "b-c"], ["cola"], ["mixout:p=0.7", "mixout", "r-drop"], [1.0, 0.1, 0.01], [0, 11, 111])
    names = {key.name for key in grid}
    assert len(names) == len(grid) == 54
    for changes in ({"models": ["my bert", "my-bert"]}, {"fractions": [0.1234567, 0.1234568]}):
        with pytest.raises(GuidedDropoutError, match="would share the file"):
            replace(grid, **changes)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.=_-") for name in names)


@pytest.mark.parametrize("other", [{"model": "my bert"}, {"fraction": 0.1234568}])
def test_a_run_is_never_taken_for_another_whose_file_has_its_name(tmp_path, finished, other):
    experiment = Experiment.start(tmp_path / "out", finished[0].check())
    key = RunKey("my-bert", "cola", 0.1234567, "none", 0)
    experiment.write(Run(key, failure=Failure("A", "b", "")))
    assert experiment.is_done(key)
    with pytest.raises(ArtefactError, match=r"holds the run .*my-bert.*; expected .* another name"):
        experiment.is_done(replace(key, **other))
    assert experiment.read(experiment.file(key)).key == key


def test_data_have_one_name_however_their_path_is_spelled(folder, monkeypatch):
    facts = replace(plan_of(folder), source=DataSource(str(folder / "glue"))).check()
    assert facts["recipe"]["data"] == "glue"
    monkeypatch.chdir(folder / "glue" / "CoLA")
    assert replace(plan_of(folder), source=DataSource("..")).check() == facts
    monkeypatch.chdir(folder / "glue")
    assert replace(plan_of(folder), source=DataSource(".")).check() == facts


@pytest.mark.parametrize("source", [".", "..", ".hidden"])
def test_a_models_name_hides_no_runs(tmp_path, monkeypatch, finished, source):
    (tmp_path / "inner" / ".hidden").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "inner")
    experiment = Experiment.start(tmp_path / "out", finished[0].check())
    key = RunKey(BenchModel(source).label, "cola", 1.0, "none", 0)
    experiment.write(Run(key, failure=Failure("A", "b", "")))
    assert experiment.failed() == {key}


def test_a_run_that_was_written_before_its_process_died_is_kept(tmp_path, finished, monkeypatch):
    plan, made = finished
    run = made.runs()[0]
    experiment = Experiment.start(tmp_path / "out", plan.check())

    def work(channel, plan, folder, threads):
        here = Experiment(folder)
        with here.claim(channel.recv()):
            here.write(run)
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(bench_run, "_work", work)
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
    done = []
    run_experiment(plan, experiment, [run.key], threads=1, told=done.append)
    assert [d.status for d in done] == [run.status]
    assert outcomes(experiment) == {run.key: outcomes(made)[run.key]}


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"\(SIGKILL\); often for want of memory"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), r"\(SIGTERM\); what it printed before"),
        (lambda: os._exit(3), r"\(exit code 3\); what it printed before"),
    ],
)
def test_how_the_process_of_a_run_died_is_told_without_guesses(tmp_path, finished, monkeypatch, end, told):
    plan = finished[0]
    experiment = Experiment.start(tmp_path / "out", plan.check())

    def work(channel, plan, folder, threads):
        channel.recv()
        end()

    monkeypatch.setattr(bench_run, "_work", work)
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
    key = next(iter(plan.grid))
    run_experiment(plan, experiment, [key], threads=1)
    failure = experiment.read(experiment.file(key)).failure
    assert re.search(told, failure.message)


def test_a_run_that_no_file_can_hold_is_a_failure_with_its_own_error(folder, finished, monkeypatch, tmp_path):
    """Of an error or a result; the process goes on to the next run."""
    made = next(run.result for run in finished[1].runs() if run.key.fraction == 1.0)
    odd = [{"name": "so \ud83d"}, {"x": [float("nan")]}, {"x": object()}, {}]

    def run(self, key):
        if key.seed == 4:
            raise ValueError("found 'so \ud83d'")
        return replace(made, arm_facts=odd[key.seed])

    monkeypatch.setattr(Runner, "run", run)
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
    plan = plan_of(folder, arms=["dropout"], fractions=[1.0], seeds=[0, 1, 2, 4, 3])
    experiment = Experiment.start(tmp_path / "out", plan.check())
    done = []
    run_experiment(plan, experiment, list(plan.grid), threads=1, told=done.append)
    assert [d.status for d in done[:4]] == ["failed"] * 4
    assert done[4].status != "failed"
    failures = {run.key.seed: run.failure for run in experiment.runs() if run.failure}
    assert {seed: failure.error for seed, failure in failures.items()} == {
        0: "UnicodeEncodeError", 1: "ValueError", 2: "TypeError", 4: "ValueError",
    }  # fmt: skip
    assert "not JSON compliant" in failures[1].message
    assert "object is not JSON serializable" in failures[2].message
    assert failures[4].message == r"found 'so \ud83d'"
    assert r"ValueError: found 'so \ud83d'" in failures[4].traceback


def test_a_failure_and_a_result_survive_the_disk(tmp_path, finished):
    experiment = Experiment.start(tmp_path / "out", {"recipe": {}})
    key = RunKey("m", "cola", 0.1, "dropout", 3)
    try:
        raise OSError("disk full")
    except OSError as e:
        failed = Run(key, failure=Failure.of(e))
    experiment.write(failed)
    done = replace(finished[1].runs()[0], key=replace(key, seed=4))
    experiment.write(done)
    assert experiment.runs() == [failed, done]
    (tmp_path / "out" / "runs" / f"{key.name}.json").write_text('{"kind": "bench-run", "schema": 1}')
    with pytest.raises(ArtefactError, match="is not a whole run"):
        experiment.runs()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("key.seed", "3"),
        ("key.fraction", 1.5),
        ("key.arm", 7),
        ("result.value", "0.7"),
        ("result.value", True),
        ("result.task", None),
        ("result.collapsed", 1),
        ("result.seeds.noise", 0.5),
        ("result.metrics.matthews_correlation", [0.1]),
        ("result.history", {}),
        ("result.history.0", 3),
        ("result.history.0.metrics", 0.4),
        ("result.times.total", "fast"),
        ("result.rates", []),
    ],
)
def test_a_run_with_something_of_another_type_is_not_whole(tmp_path, finished, where, value):
    experiment = Experiment.start(tmp_path / "out", {"recipe": {}})
    file = experiment.write(finished[1].runs()[0])
    assert experiment.runs()
    facts = json.loads(file.read_text())
    *path, last = [int(part) if part.isdigit() else part for part in where.split(".")]
    place = facts
    for part in path:
        place = place[part]
    assert repr(place[last]) != repr(value)
    place[last] = value
    file.write_text(json.dumps(facts))
    with pytest.raises(ArtefactError, match=r"is not a whole run \(.*\); expected what `bench run` wrote: run"):
        experiment.runs()
    assert experiment.whole_runs() == []


def test_a_claim_is_exclusive(tmp_path):
    experiment = Experiment.start(tmp_path / "out", {})
    key = RunKey("m", "cola", 0.1, "dropout", 3)
    with experiment.claim(key) as mine, Experiment(tmp_path / "out").claim(key) as theirs:
        assert (mine, theirs) == (True, False)
    with experiment.claim(key) as again:
        assert again


def test_many_at_once_make_each_run_once_and_leave_no_locks(tmp_path):
    """Each goes over all runs in an order of its own, as often as it pleases, and comes and goes between."""
    keys = [RunKey("m", "cola", 0.1, "dropout", seed) for seed in range(25)]
    made, start = [], threading.Barrier(8)

    def invocation(number):
        order = random.Random(number)
        start.wait()
        experiment = Experiment.start(tmp_path / "out", {"recipe": {}})
        for _ in range(4):
            for key in order.sample(keys, len(keys)):
                with experiment.claim(key) as mine:
                    if mine and not experiment.is_done(key):
                        made.append(key)
                        experiment.note_grid(Grid(["m"], ["cola"], ["dropout"], [0.1], [key.seed]))
                        experiment.write(Run(key, failure=Failure("ValueError", "it was not to be", "")))
                if order.random() < 0.2:
                    experiment.remove_claims()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(invocation, range(8)))
    experiment = Experiment(tmp_path / "out")
    assert sorted(made) == keys == [run.key for run in experiment.runs()]
    assert {key for grid in experiment.grids for key in grid} == set(keys)
    assert list(experiment.path.rglob("*.lock")) == []


def test_claims_of_runs_that_are_not_there_stay_and_those_that_are_held(tmp_path):
    experiment = Experiment.start(tmp_path / "out", {})
    keys = [RunKey("m", "cola", 0.1, "dropout", seed) for seed in range(3)]

    def left():
        return [f.stem.removeprefix(".") for f in sorted((experiment.path / "runs").glob(".*"))]

    with experiment.claim(keys[0]):
        pass  # interrupted
    with experiment.claim(keys[1]), Experiment(tmp_path / "out").claim(keys[2]):
        for key in keys[1:]:
            experiment.write(Run(key, failure=Failure("ValueError", "", "")))
        experiment.remove_claims()
        assert left() == [key.name for key in keys]
    assert left() == [keys[0].name]
    experiment.write(Run(keys[0], failure=Failure("ValueError", "", "")))
    experiment.remove_claims()
    assert left() == []


def test_recipes_name_what_exists(folder):
    for recipe in RECIPES.values():
        plan = plan_of(folder, tasks=recipe.tasks, arms=recipe.arms, fractions=recipe.fractions)
        assert len(plan.grid) >= 1
        Recipe(**recipe.recipe)
    assert len(RECIPES["paper_table2"].tasks) == 9
    assert RECIPES["controls"].seeds >= 20
    assert {name_of(arm) for arm in RECIPES["controls"].arms} == {*ARMS}
    assert [arm for arm in RECIPES["controls"].arms if ":" in arm] == ["shuffled:seed=1", "shuffled:seed=2"]


@pytest.mark.parametrize("name", RECIPES)
def test_each_arm_of_a_recipe_can_be_put_on(folder, name):
    recipe = RECIPES[name]
    plan = plan_of(folder, arms=recipe.arms)
    replace(plan, recipe=Recipe(**recipe.recipe)).rehearse()


def test_a_control_that_is_the_guided_arm_itself_on_a_model_is_refused(folder):
    save_tiny_bert(folder / "one-layer", num_hidden_layers=1)
    random_profile(load_lm(folder / "one-layer")).save_pretrained(folder / "one-layer-profile")
    model = BenchModel(str(folder / "one-layer"), str(folder / "one-layer-profile"))
    arms = ["dropout", "guided", "guided-gaussian", "role-mean", "reversed"]
    plan = replace(plan_of(folder, arms=arms), models={"one-layer": model})
    message = r"on one-layer the arm role-mean is guided itself: .* 4 sites.*--arms dropout,guided,guided-gaussian,rev"
    with pytest.raises(GuidedDropoutError, match=message):
        plan.rehearse()
    replace(plan, models={"model": plan_of(folder).models["model"]}).rehearse()


def test_so_is_one_without_the_guided_arm_beside_it(folder):
    with pytest.raises(GuidedDropoutError, match=r"the control top-only:k=50 is the schedule itself: .* 7 sites"):
        plan_of(folder, arms=["dropout", "top-only:k=50"]).rehearse()


@pytest.mark.parametrize(("length", "cut"), [(128, False), (24, False), (25, True)])
def test_a_length_that_was_asked_for_and_is_not_to_be_had_is_told(folder, length, cut):
    said = []
    replace(plan_of(folder), recipe=Recipe(max_length=length)).rehearse(said.append)
    note = f"note: max length {length}; texts are cut at 24 tokens, all that the model has positions for"
    assert said == [note] * cut


LINE = [
    *("--models", "model", "--profile", "profile", "--data", "glue", "--tasks", "cola", "--arms", "dropout,guided"),
    *("--fractions", "1.0,0.5", "--seeds", "2", "--epochs", "1", "--learning-rate", "1e-3", "--max-length", "16"),
    *("--device", "cpu"),
]


def command(folder, out):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "guided_dropout", "bench", "run", *LINE, "--out", str(out)],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True,
    )  # fmt: skip


def workers_of(invocation):
    """The processes in which an invocation makes its runs: those that its server has forked."""
    servers = psutil.Process(invocation.pid).children()
    return [worker for server in servers for worker in server.children()]


def wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no server elsewhere")
def test_a_ctrl_c_while_the_server_still_imports_is_one_line(folder, tmp_path):
    invocation = command(folder, tmp_path / "out")

    def server():
        return any("forkserver" in " ".join(child.cmdline()) for child in psutil.Process(invocation.pid).children())

    wait_for(server, invocation)
    time.sleep(0.3)  # it imports for longer
    os.killpg(invocation.pid, signal.SIGINT)
    _, err = invocation.communicate(timeout=60)
    assert (invocation.returncode, err.count("\n")) == (2, 1), err
    assert err.startswith("error: interrupted; ")


def test_killed_processes_and_two_invocations_give_the_same_results(folder, finished):
    """One invocation is killed with all of its work; then two go on side by side, and a worker of one is killed."""
    out = folder / "killed"
    first = command(folder, out)
    wait_for(lambda: list(out.glob("runs/*.json")), first)
    first.kill()
    first.communicate()
    pair = [command(folder, out), command(folder, out)]
    made = len(list(out.glob("runs/*.json")))
    wait_for(lambda: len(list(out.glob("runs/*.json"))) > made, pair[0])
    wait_for(lambda: workers_of(pair[0]), pair[0])[0].kill()
    for process in pair:
        _, err = process.communicate(timeout=240)
        assert process.returncode == int("runs failed" in err), err
    plan, experiment = plan_of(folder), Experiment(out)
    experiment.forget_failures()
    run_experiment(plan, experiment, [k for k in plan.grid if not experiment.is_done(k)], threads=1)
    assert outcomes(experiment) == outcomes(finished[1])
    assert experiment.facts["recipe"] == finished[1].facts["recipe"]
    assert list(out.rglob("*.lock")) == []


@pytest.fixture
def in_process(folder, monkeypatch, capsys):
    """(exit code, stdout, stderr) of the command line."""

    def run(out, *more):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in `finished`: another number of threads rounds in another way
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.setattr(sys, "argv", ["guided-dropout", "bench", "run", *LINE, "--out", out, *more])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return (stopped.value.code or 0, *capsys.readouterr())

    return run


def test_a_dry_run_tells_the_cost_and_writes_nothing(folder, in_process):
    code, text, err = in_process("dry", "--recipe", "controls", "--dry-run")
    assert (code, err) == (0, "")
    assert "8 runs, 0 of them there, 8 to make" in text
    assert "by a few steps of training here" in text
    assert not (folder / "dry").exists()


@pytest.mark.parametrize(("missing", "told"), [("1", "one after the other (as"), ("2", "if 2 side by side do not")])
def test_no_more_runs_are_made_side_by_side_than_there_are(begun, in_process, missing, told):
    for file in sorted(begun.path.glob("runs/*.json"))[: int(missing)]:
        file.unlink()
    code, text, err = in_process("begun", "--dry-run", "--jobs", "8")
    assert (code, err) == (0, "")
    assert told in text


def test_a_second_call_makes_nothing_and_says_so(folder, finished, in_process):
    save_tiny_bert(folder / "other")
    plan, experiment = finished
    assert experiment.grids == []  # as of runs that were brought from elsewhere
    code, text, err = in_process("finished")
    assert code == 0, err
    assert "8 runs, 8 of them there, 0 to make" in text
    assert experiment.grids == [plan.grid]
    code, text, _ = in_process("finished", "--dry-run", "--seeds", "4")
    assert code == 0
    assert "16 runs, 8 of them there, 8 to make" in text
    assert "as fast as the runs that are there" in text
    before = (folder / "finished" / "experiment.json").read_bytes()
    code, text, _ = in_process("finished", "--dry-run", "--models", "other", "--profile", "profile")
    assert (code, text.splitlines()[0]) == (0, "16 runs, 8 of them there, 8 to make")
    assert (folder / "finished" / "experiment.json").read_bytes() == before


def test_a_profile_of_other_weights_is_told_once_and_noted(folder, in_process, monkeypatch):
    save_tiny_bert(folder / "wider", initializer_range=0.05)
    measured_on(load_lm(folder / "model")).save_pretrained(folder / "measured")
    monkeypatch.setattr(bench_run, "run_experiment", lambda *_, **__: None)
    more = ["--models", "wider", "--profile", "measured"]
    note = f"note: the profile was measured on other weights ({folder / 'model'}) than those of wider"
    code, text, err = in_process("noted", *more)
    assert code == 0, err
    assert " ".join(text.split()).count("other weights") == 1
    assert note in " ".join(text.split())
    file = folder / "noted" / "experiment.json"
    facts = read_json(file, kind="bench-experiment", schema=1)
    noted = {label: model.pop("profile_of_these_weights") for label, model in facts["models"].items()}
    assert noted == {"model": None, "wider": False}  # the first profile does not say
    write_json(file, facts)  # as of an experiment that was begun before this was noted: it goes on
    code, text, err = in_process("noted", *more)
    assert code == 0, err
    assert Experiment(folder / "noted").facts["models"]["wider"]["profile_of_these_weights"] is False


def test_failures_are_forgotten_only_to_be_made_again(folder, in_process, monkeypatch):
    plan = plan_of(folder)
    experiment = Experiment.start(folder / "retried", plan.check())
    broken = {k for k in plan.grid if k.seed == 1}
    for key in broken:
        experiment.write(Run(key, failure=Failure("RuntimeError", "broken", "")))
    code, text, _ = in_process("retried", "--dry-run")
    assert (code, text.splitlines()[0]) == (0, "8 runs, 4 of them there, 4 to make")
    code, text, _ = in_process("retried", "--dry-run", "--retry")
    assert (code, text.splitlines()[0]) == (0, "8 runs, 0 of them there, 8 to make")
    code, _, _ = in_process("retried", "--retry", "--tasks", "rte")  # of which there are no data
    assert code == 2
    assert experiment.failed() == broken

    made = []
    monkeypatch.setattr(bench_run, "run_experiment", lambda plan, experiment, keys, **_: made.extend(keys))
    code, _, err = in_process("retried", "--retry", "--seeds", "1")
    assert (code, len(made)) == (0, 4), err
    assert experiment.failed() == broken
    in_process("retried", "--retry")
    assert (len(made), experiment.failed()) == (12, set())


@pytest.mark.parametrize("traceback", ["…", ""])
def test_a_script_sees_that_runs_failed(folder, in_process, monkeypatch, traceback):
    shutil.rmtree(folder / "full", ignore_errors=True)

    def all_fail(plan, experiment, keys, *, told, **_):
        for key in keys:
            experiment.write(Run(key, failure=Failure("OSError", "the disk\nis full", traceback)))
            told(bench_run.Done(key, "failed", None, 0.1))

    monkeypatch.setattr(bench_run, "run_experiment", all_fail)
    code, text, err = in_process("full")
    assert (code, text.splitlines()[-2:]) == (1, ["8 failed", "full"])
    assert "error: 8 of 8 runs failed; the first with OSError: the disk is full (full/runs/" in err
    assert ("has the traceback)" in err) == bool(traceback)
    assert err.count("error:") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--schedule", "nowhere.json"], "nowhere.json"),
        (["--learning-rate", "2e-3"], "0.001 there, 0.002 given"),
        (["--fractions", "many"], "many; expected numbers, such as"),
        (["--recipe", "control"], "did you mean 'controls'"),
        (
            ["--models", "demo"],
            "found 1 --profile for 2 models; expected the option once for each model, in their order: --profile … ",
        ),
    ],
)
def test_errors_of_the_command_line_are_one_line(finished, in_process, more, message):
    code, text, err = in_process("finished", *more)
    assert (code, text) == (2, "")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "no folder nowhere"),
        (["--tasks", "rte"], "no RTE/dev.tsv in glue"),
        (["--models", "nobody", "--profile", "profile"], "cannot load nobody"),
        (["--schedule", "other.json"], "a schedule for another model"),
        (["--arms", "guided-decay"], "it is 0; expected more than 0: set weight_decay"),
        (["--epochs", "0"], "epochs is 0; expected at least 1"),
        (["--rate", "1"], "1.0; expected a number in [0, 1)"),
        (["--device", "gpu"], "device is gpu"),
        (["--split", "papr"], "did you mean 'paper'"),
        (["--seeds", "0"], "found no seeds"),
        (["--jobs", "0"], "--jobs 0; expected at least 1"),
        (["--out", "glue"], "glue holds other files"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(folder, in_process, more, message):
    """What was begun with a mistake would be a folder that refuses the command once it is mended."""
    other = load_lm(save_tiny_bert(folder / "other", num_hidden_layers=3))
    DropoutSchedule.uniform(other, 0.1).save(folder / "other.json")
    before = sorted(folder.rglob("*"))
    for dry in ([], ["--dry-run"]) if "--out" not in more else ([],):
        code, _, err = in_process("mistaken", *more, *dry)
        assert code == 2, err
        assert err.count("\n") == 1
        assert message in err
    assert sorted(folder.rglob("*")) == before


def test_one_of_several_processes_is_refused_before_anything_is_written(folder, in_process, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, text, err = in_process("launched")
    assert (code, text, err.count("\n")) == (2, "", 1)
    assert "found 2 processes (WORLD_SIZE); expected one" in err
    assert not (folder / "launched").exists()


@pytest.fixture
def begun(folder, finished):
    """A copy of the finished experiment, for a test to change."""
    out = folder / "begun"
    shutil.copytree(finished[1].path, out)
    yield Experiment(out)
    shutil.rmtree(out)


def changed_recipe(experiment, **changes):
    """Its runs as if they had been made in another way."""
    for run in experiment.runs():
        experiment.write(replace(run, result=replace(run.result, recipe={**run.result.recipe, **changes})))


@pytest.mark.parametrize("split", ["glue", "paper", "holdout:0.25"])
def test_what_is_foretold_of_a_run_is_what_it_says(folder, split):
    plan, key = split_by(plan_of(folder), split), RunKey("model", "cola", 0.5, "dropout", 1)
    facts = shared_facts(Runner(plan).run(key))
    assert Runner(plan).foretell(key) == facts


@pytest.mark.parametrize(
    ("there", "shown"),
    [
        ({"order": "as it comes"}, "order: 'as it comes' there, 'batches drawn at random' given"),
        ({"precision": "bfloat16"}, "precision: 'bfloat16' there, 'float32' given"),
        ({"device": "auto"}, "device: 'auto' there, 'cpu' given"),
        ({"train_data": "mini/CoLA/train.tsv"}, "train_data: 'mini/CoLA/train.tsv' there, 'CoLA/train.tsv' given"),
    ],
)
def test_runs_that_no_report_could_hold_beside_those_there_are_refused_before_any(begun, in_process, there, shown):
    changed_recipe(begun, **there)
    before = {f: f.read_bytes() for f in begun.path.rglob("*.json")}
    for dry in ([], ["--dry-run"]):
        code, _, err = in_process("begun", "--seeds", "3", *dry)
        assert (code, err.count("\n")) == (2, 1)
        assert f"begun holds runs of model, cola, fraction 1 that were made in another way ({shown})" in err
        assert "choose another --out" in err
    assert {f: f.read_bytes() for f in begun.path.rglob("*.json")} == before
    code, _, err = in_process("begun", "--fractions", "0.75", "--dry-run")  # is reported apart
    assert code == 0, err


def test_other_examples_of_the_same_name_are_refused(folder, begun, in_process, tmp_path):
    shutil.copytree(folder / "glue", tmp_path / "glue")
    dev = tmp_path / "glue" / "CoLA" / "dev.tsv"
    dev.write_text(dev.read_text().replace("cat", "dog"))
    code, _, err = in_process("begun", "--seeds", "3", "--data", str(tmp_path / "glue"), "--dry-run")
    assert (code, err.count("evaluation: ")) == (2, 1)
    code, _, err = in_process("begun", "--seeds", "3", "--data", str(folder / "glue"), "--dry-run")
    assert code == 0, err


def test_new_seeds_of_a_split_that_deals_each_its_own_may_join(folder):
    plan = split_by(plan_of(folder, arms=["dropout"], fractions=[0.5]), "holdout:0.25")
    experiment = Experiment.start(folder / "dealt", plan.check())
    first, second = plan.grid
    experiment.write(Run(first, result=Runner(plan).run(first)))
    check_joining(plan, experiment, [second])


def test_a_run_made_in_a_way_that_was_not_foreseen_is_not_written(folder, begun):
    changed_recipe(begun, optimizer="sgd")
    plan = plan_of(folder, seeds=[2], arms=["dropout"], fractions=[0.5])
    with pytest.raises(ArtefactError, match=r"optimizer: 'sgd' there, 'adamw\(0.9, 0.999\)' given"):
        run_experiment(plan, begun, list(plan.grid), threads=1)
    assert len(begun.runs()) == 8


@pytest.mark.parametrize("left", ["", "\0" * 100, '{"kind": "bench-run", "schema": 1}'], ids=["empty", "zeros", "cut"])
def test_a_damaged_run_is_made_again(begun, finished, in_process, monkeypatch, left):
    key = next(iter(finished[0].grid))
    begun.file(key).write_text(left)
    with pytest.raises(ArtefactError, match="run `guided-dropout bench run` again, or delete the file"):
        begun.runs()
    if left:  # the workers' part is the same for each
        monkeypatch.setattr(bench_run, "run_experiment", lambda plan, experiment, keys, **_: missing.extend(keys))
    missing = []
    code, text, err = in_process("begun")
    assert code == 0, err
    told = text.splitlines()
    assert told[0].startswith("1 run files cannot be read and are made again, the first begun/runs/")
    assert told[1] == "8 runs, 7 of them there, 1 to make"
    if left:
        assert missing == [key]
    else:
        made = json.loads(begun.file(key).read_text())
        assert made["key"] == asdict(key)
        assert made["result"]["provenance"]["threads"] == 1  # as the environment says
        assert outcomes(begun) == outcomes(finished[1])


def test_a_run_of_a_later_version_is_not_written_over(begun, finished, in_process):
    key = next(iter(finished[0].grid))
    later = '{"kind": "bench-run", "schema": 99, "key": {}}'
    begun.file(key).write_text(later)
    code, _, err = in_process("begun")
    assert code == 2
    assert "99" in err
    assert begun.file(key).read_text() == later


def test_with_weight_decay_there_is_some_to_spread(in_process):
    code, _, err = in_process("decayed", "--arms", "guided-decay", "--weight-decay", "0.01", "--dry-run")
    assert code == 0, err
