"""From an experiment's runs to verdicts: which arms are compared, what is corrected, what is said of guidance."""

from dataclasses import replace

import numpy as np
import pytest
from samples_of_experiments import made, write_experiment

from guided_dropout.arms import ARMS
from guided_dropout.bench import controls
from guided_dropout.bench.analysis import analyse
from guided_dropout.bench.document import to_markdown
from guided_dropout.bench.experiment_verdicts import claims, verdicts
from guided_dropout.bench.folder import Failure, Run
from guided_dropout.bench.grid import Grid, RunKey
from guided_dropout.bench.phrases import cell_text, guidance_sentence
from guided_dropout.bench.restarts import restarts, to_latex
from guided_dropout.errors import DataError
from guided_dropout.stats import holm

SAME_MEAN = ("uniform", "top-only", "role-mean", "shuffled", "reversed", "depth-linear", "magnitude")


def runs(values, *, tasks=("cola",), seeds=8, fraction=1.0, **changes):
    """Runs whose metric is that of `values` by arm, plus a seed's and a run's own share."""
    made_runs = []
    for t, task in enumerate(tasks):
        for arm, mean in values.items():
            for seed in range(seeds):
                shared = np.random.default_rng([seed, t]).normal(0, 0.02)
                own = np.random.default_rng([seed, t, *map(ord, arm)]).normal(0, 0.002)
                key = RunKey("demo", task, fraction, arm, seed)
                made_runs.append(Run(key, made(key, mean + shared + own, **changes.get(arm.replace("-", "_"), {}))))
    return made_runs


def comparison(analysis, control, task="cola"):
    (found,) = [c for c in (*analysis.comparisons, *analysis.overall)
                if (c.pair.a, c.pair.b, c.task) == ("guided", control, task)]  # fmt: skip
    return found


def test_a_real_effect_is_found_and_nothing_else():
    a = analyse(runs({"dropout": 0.6, "uniform": 0.6, "shuffled": 0.6, "guided": 0.62}))
    assert {c.pair.b: c.verdict for c in a.comparisons} == dict.fromkeys(("dropout", "uniform", "shuffled"), "helps")
    a = analyse(runs({"dropout": 0.6, "uniform": 0.6, "guided": 0.6}), margin=0.01)
    assert {c.verdict for c in a.comparisons} == {"no difference within ±0.01"}
    assert comparison(a, "uniform").pair.statistics.mean == pytest.approx(0, abs=0.003)


def test_every_arm_is_compared_with_what_it_needs():
    found = controls.pairs(list(ARMS))
    assert {b for a, b in found if a == "guided"} == set(ARMS) - {"guided"}
    assert ("guided-decay", "dropout") in found
    assert ("guided-l2-sp", "l2-sp") in found
    assert {b for a, b in found if a == "guided-gaussian"} == {"gaussian", "guided", "dropout", "none"}
    assert {b for a, b in found if controls.role("guided", b) == controls.CONTROL and a == "guided"} == set(SAME_MEAN)
    assert controls.role("guided", "none") == controls.NONE
    assert controls.role("guided", "mixout:p=0.9") == controls.OTHER
    labels = ["guided-l2-sp", "guided-l2-sp:alpha=1", "l2-sp", "l2-sp:alpha=1", "shuffled", "shuffled:seed=1", "guided"]
    found = controls.pairs(labels)
    assert ("guided-l2-sp:alpha=1", "l2-sp") not in found
    assert ("guided-l2-sp:alpha=1", "l2-sp:alpha=1") in found
    assert ("guided", "shuffled:seed=1") in found


def test_guidance_needs_all_controls_at_the_same_mean():
    equal = dict.fromkeys(("dropout", "uniform", "shuffled", "depth-linear"), 0.6)
    (g,) = analyse(runs(equal | {"guided": 0.62})).guidance
    assert g.verdict == "helps"
    assert "Guidance helps: guided is better than uniform, shuffled and depth-linear" in guidance_sentence(g)
    (g,) = analyse(runs(equal | {"guided": 0.58})).guidance
    assert "Guidance hurts" in guidance_sentence(g)
    (g,) = analyse(runs(equal | {"guided": 0.62, "depth-linear": 0.62})).guidance
    assert g.verdict == "undecided at this n"
    assert "better than uniform and shuffled; undecided against depth-linear" in guidance_sentence(g)
    (g,) = analyse(runs(equal | {"guided": 0.6}), margin=0.02).guidance
    assert "Guidance makes no difference within ±0.02" in guidance_sentence(g)


def test_less_dropout_is_not_guidance():
    a = analyse(runs({"dropout": 0.6, "none": 0.6, "guided": 0.65}))
    assert comparison(a, "dropout").verdict == "helps"
    (g,) = a.guidance
    assert (g.verdict, g.by_verdict) == ("undecided at this n", {})
    assert "Nothing can be said of guidance" in guidance_sentence(g)


def test_uneven_rates_alone_are_not_guidance():
    (g,) = analyse(runs({"uniform": 0.6, "guided": 0.65})).guidance
    assert g.lacking == ("uneven",)
    assert "better than uniform. That is no verdict on guidance" in guidance_sentence(g)
    (g,) = analyse(runs({"shuffled": 0.6, "guided": 0.65})).guidance
    assert g.lacking == ("even",)


def test_a_control_that_goes_by_part_of_the_fisher_information_must_be_beaten_and_is_not_enough():
    own = {"role_mean": {"rates": {"mean": 0.05}}}
    (g,) = analyse(runs({"uniform": 0.6, "role-mean": 0.6, "guided": 0.65}, **own)).guidance
    assert (g.verdict, g.lacking) == ("undecided at this n", ("uneven",))
    (g,) = analyse(runs({"uniform": 0.6, "role-mean": 0.65, "shuffled": 0.6, "guided": 0.65}, **own)).guidance
    assert (g.verdict, g.lacking) == ("undecided at this n", ())
    assert "undecided against role-mean" in guidance_sentence(g)


def failed(run):
    return Run(run.key, failure=Failure("RuntimeError", "out of memory", ""))


@pytest.mark.parametrize("gone", ["failed on rte", "not run on rte"])
def test_plain_dropout_of_the_same_mean_is_not_passed_over_either(gone):
    """It is the even control there, though its role is another."""
    same = {"dropout": {"rates": {"mean": 0.05}}}
    held = []
    for run in runs({"dropout": 0.6, "shuffled": 0.6, "guided": 0.65}, tasks=("cola", "mrpc", "rte"), **same):
        if (run.key.arm, run.key.task) != ("dropout", "rte"):
            held.append(run)
        elif gone == "failed on rte":
            held.append(failed(run))
    a = analyse(held)
    overall = next(g for g in a.guidance if g.task is None)
    assert overall.verdict == "undecided at this n"
    assert "dropout" in guidance_sentence(overall).partition("That is no verdict on guidance:")[2]
    verdicts_by_task = {g.task: g.verdict for g in a.guidance if g.task}
    assert verdicts_by_task == {"cola": "helps", "mrpc": "helps", "rte": "undecided at this n"}
    if gone == "failed on rte":
        first = next(iter(claims(a)))
        assert "helps on cola† and mrpc†; no seed has a result in both arms on rte" in first


@pytest.mark.parametrize("gone", ["failed on rte", "run on cola alone", "failed on all"])
def test_a_control_without_results_on_each_task_is_not_passed_over(gone):
    arms = {"dropout": 0.6, "uniform": 0.6, "shuffled": 0.6, "reversed": 0.7, "guided": 0.65}
    held = []
    for run in runs(arms, tasks=("cola", "mrpc", "rte")):
        here = run.key.arm == "reversed"
        if here and (gone == "failed on all" or (gone, run.key.task) == ("failed on rte", "rte")):
            held.append(failed(run))
        elif not (here and gone == "run on cola alone" and run.key.task != "cola"):
            held.append(run)
    a = analyse(held)
    overall = next(g for g in a.guidance if g.task is None)
    assert overall.verdict == "undecided at this n"
    assert "reversed" in guidance_sentence(overall).partition("That is no verdict on guidance:")[2]
    on_rte = next(g for g in a.guidance if g.task == "rte")
    assert on_rte.verdict == ("helps" if gone == "run on cola alone" else "undecided at this n")


def test_a_control_that_ran_on_all_tasks_but_one_seed_is_no_hindrance():
    held = runs({"dropout": 0.6, "uniform": 0.6, "shuffled": 0.6, "guided": 0.65}, tasks=("cola", "rte"))
    a = analyse([failed(r) if (r.key.arm, r.key.task, r.key.seed) == ("uniform", "rte", 0) else r for r in held])
    assert next(g for g in a.guidance if g.task is None).verdict == "helps"


def test_over_the_tasks_a_diverged_run_is_worse_than_any_too():
    held = runs({"dropout": 0.6, "guided": 0.65}, tasks=("cola", "rte"), seeds=10)
    a = analyse([
        Run(r.key, result=made(r.key, None, diverged=True))
        if (r.key.arm, r.key.task) == ("guided", "cola") and r.key.seed < 5 else r for r in held
    ])  # fmt: skip
    better = {task: comparison(a, "dropout", task).pair.better for task in ("cola", "rte", None)}
    assert better == {"cola": 0.5, "rte": 1.0, None: 0.5}
    (table,) = restarts(a)
    note = "Of 10 runs of guided on cola, 5 have no metric (diverged or failed)."
    assert table.notes[0] == note
    assert note in to_latex([table], "x")


def test_the_same_mean_is_seen_in_the_results():
    rates = {"rates": {"mean": 0.06}}
    a = analyse(runs({"uniform": 0.6, "shuffled": 0.6, "guided": 0.65}, uniform=rates))
    assert not comparison(a, "uniform").same_mean
    assert comparison(a, "shuffled").same_mean
    a = analyse(runs({"dropout": 0.6, "guided": 0.65}, dropout={"rates": {"mean": 0.05}}))
    assert comparison(a, "dropout").same_mean
    own = {"l2_sp": {"arm_parameters": {"alpha": 0.1}}, "guided_l2_sp": {"arm_parameters": {"alpha": 1.0}}}
    (c,) = analyse(runs({"l2-sp": 0.6, "guided-l2-sp": 0.6}, **own)).comparisons
    assert not c.same_mean


def test_equal_dropout_is_not_enough_where_something_else_differs():
    found = analyse(runs({"dropout": 0.6, "l2-sp": 0.6, "guided-l2-sp": 0.6})).comparisons
    assert {c.pair.b: c.same_mean for c in found} == {"dropout": False, "l2-sp": True}
    found = analyse(runs({"guided-gaussian": 0.6, "guided": 0.6})).comparisons
    assert not any(c.same_mean for c in found)


def test_the_dagger_is_for_verdicts_that_hold_after_holm():
    c = comparison(analyse(runs({"dropout": 0.6, "guided": 0.62})), "dropout")
    assert cell_text(c, 0.05).endswith(" helps†")
    assert cell_text(replace(c, t_holm_with_lost=0.051), 0.05).endswith(" helps")
    assert cell_text(replace(c, verdict="undecided at this n"), 0.05).endswith(" undecided")


def test_the_dagger_is_not_for_verdicts_that_would_not_hold_with_the_lost_runs():
    held = runs({"dropout": 0.5, "guided": 0.6}, tasks=("cola", "rte"), seeds=10)
    held = [
        Run(r.key, result=made(r.key, None, diverged=True)) if r.key == RunKey("demo", "cola", 1.0, "guided", 0) else r
        for r in held
    ]
    c = comparison(analyse(held), "dropout")
    ps = [c.pair.with_lost.t_p, comparison(analyse(held), "dropout", "rte").pair.statistics.t_p]
    assert c.t_holm_with_lost == pytest.approx(holm(ps)[0])
    assert c.t_holm_with_lost > 10 * c.t_holm


def test_holm_is_over_the_tasks_of_a_pair_and_fraction():
    tasks = ("cola", "rte", "mrpc")
    held = runs({"uniform": 0.6, "guided": 0.602}, tasks=tasks) + runs(
        {"uniform": 0.6, "guided": 0.6}, tasks=tasks, fraction=0.1
    )
    a = analyse(held)
    for fraction in (1.0, 0.1):
        family = [c for c in a.comparisons if c.fraction == fraction]
        assert [c.t_holm for c in family] == list(holm([c.pair.statistics.t_p for c in family]))
        assert [c.wilcoxon_holm for c in family] == list(holm([c.pair.statistics.wilcoxon_p for c in family]))
    assert {c.t_holm for c in a.overall} == {None}


def test_the_mean_over_tasks_pairs_seeds_that_are_whole():
    held = runs({"dropout": 0.6, "guided": 0.62}, tasks=("cola", "rte"))
    held = [r for r in held if r.key != RunKey("demo", "rte", 1.0, "guided", 3)]
    a = analyse(held)
    overall = comparison(a, "dropout", None)
    value = {r.key: r.result.value for r in held}
    expected = [
        sum(value[RunKey("demo", t, 1.0, "guided", s)] - value[RunKey("demo", t, 1.0, "dropout", s)]
            for t in ("cola", "rte")) / 2
        for s in range(8) if s != 3
    ]  # fmt: skip
    assert sorted(overall.pair.statistics.differences) == pytest.approx(sorted(expected))
    assert (overall.tasks, overall.pair.left_out, overall.verdict) == (2, 1, "helps")
    chances = [comparison(a, "dropout", t).pair.probability for t in ("cola", "rte")]
    assert overall.pair.probability == pytest.approx(sum(chances) / 2)
    assert analyse(runs({"dropout": 0.6, "guided": 0.62})).overall == ()


def test_a_seed_that_no_task_has_both_of_is_left_out_of_their_mean_too():
    held = runs({"dropout": 0.6, "guided": 0.62}, tasks=("cola", "rte"))
    a = analyse([r for r in held if (r.key.arm, r.key.seed) != ("guided", 3)])
    assert [comparison(a, "dropout", task).pair.left_out for task in ("cola", "rte", None)] == [1, 1, 1]


def test_means_over_tasks_that_differ_by_rounding_alone_are_ties():
    """One example more on a task and one less on another of its size."""
    rights = np.random.default_rng(0).integers(100, 270, size=(20, 2))
    held = []
    for seed, (cola, rte) in enumerate(rights.tolist()):
        for arm, more in (("dropout", 0), ("guided", 1)):
            for task, right in (("mrpc", cola + more), ("rte", rte - more)):
                key = RunKey("demo", task, 1.0, arm, seed)
                held.append(Run(key, made(key, right / 277)))
    overall = comparison(analyse(held), "dropout", None).pair
    assert overall.better == overall.statistics.improved == 0.5
    assert overall.statistics.wilcoxon_p is None


def test_lost_runs_reach_the_mean_over_tasks():
    held = runs({"dropout": 0.6, "guided": 0.62}, tasks=("cola", "rte"))
    lost = [
        Run(r.key, failure=Failure("RuntimeError", "broken", ""))
        if r.key.arm == "guided" and r.key.task == "rte" and r.key.seed < 3 else r
        for r in held
    ]  # fmt: skip
    overall = comparison(analyse(lost), "dropout", None)
    assert overall.pair.lost == (3, 0)
    assert (overall.pair.statistics.n, overall.pair.with_lost.n) == (5, 8)
    assert overall.verdict == "undecided at this n"


def test_an_arm_that_loses_a_whole_task_does_not_gain_by_it_in_the_mean_over_tasks():
    held = runs({"dropout": 0.6, "uniform": 0.6, "guided": 0.62}, tasks=("cola", "mrpc", "rte"))

    def lose(arm):
        return analyse([
            Run(r.key, result=made(r.key, None, diverged=True)) if (r.key.arm, r.key.task) == (arm, "rte") else r
            for r in held
        ])  # fmt: skip

    overall = comparison(lose("guided"), "dropout", None)
    assert (overall.tasks, overall.pair.statistics.n, overall.pair.lost) == (2, 8, (8, 0))
    means = {arm: [np.mean([r.result.value if (arm, r.key.task) != ("guided", "rte") else 0 for r in held
                            if (r.key.arm, r.key.seed) == (arm, s)]) for s in range(8)]
             for arm in ("guided", "dropout")}  # fmt: skip
    assert overall.pair.with_lost.mean == pytest.approx(np.mean(means["guided"]) - np.mean(means["dropout"]))
    assert overall.verdict == "undecided at this n"
    chances = [comparison(lose("guided"), "dropout", t).pair.probability for t in ("cola", "mrpc", "rte")]
    assert chances[-1] == overall.pair.better == 0
    assert overall.pair.probability == pytest.approx(sum(chances) / 3)
    said = " ".join(claims(lose("guided")))
    assert "8 runs of guided and 0 of dropout were lost" in said
    assert "Mean over 2 tasks. At the same mean rate" in said
    assert "no verdict on guidance: uniform has results on some of the tasks only" in said
    assert comparison(lose("dropout"), "dropout", None).verdict == "helps"
    assert comparison(lose("none"), "dropout", None).pair.lost == (0, 0)


def test_controls_that_were_run_are_not_said_to_be_missing():
    held = runs({"dropout": 0.6, "uniform": 0.6, "shuffled": 0.6, "guided": 0.62})
    for gone in (
        lambda key: Run(key, result=made(key, None, diverged=True)),
        lambda key: Run(key, failure=Failure("RuntimeError", "broken", "")),
    ):
        (g,) = analyse([gone(r.key) if r.key.arm == "guided" else r for r in held]).guidance
        assert guidance_sentence(g) == (
            "Nothing can be said of guidance itself: no seed has a result in both guided and uniform or shuffled."
        )
    (g,) = analyse(runs({"dropout": 0.6, "guided": 0.62})).guidance
    assert "no control at the same mean rate has been run" in guidance_sentence(g)


@pytest.mark.parametrize("gone", ["failed", "not run"])
def test_controls_of_one_task_alone_are_told_with_what_they_say_there(gone):
    held = runs({"dropout": 0.6, "uniform": 0.6, "shuffled": 0.6, "guided": 0.65}, tasks=("cola", "rte"))
    here = [r for r in held if r.key.task == "cola" or r.key.arm in ("dropout", "guided")]
    lost = [failed(r) for r in held if r not in here] if gone == "failed" else []
    said = " ".join(claims(analyse([*here, *lost])))
    assert (
        "Nothing can be said of guidance itself: uniform and shuffled have results on some of the tasks only." in said
    )
    assert "no control" not in said
    assert "Task by task: helps on cola." in said.partition("Nothing can be said")[2]


def test_a_column_is_of_the_same_mean_only_where_all_of_it_is():
    alike = runs({"dropout": 0.6, "uniform": 0.6, "guided": 0.65}, dropout={"rates": {"mean": 0.05}})
    other = [
        Run(replace(r.key, model="other"), replace(r.result, model={"name_or_path": "other"}))
        for r in runs({"dropout": 0.6, "uniform": 0.6, "guided": 0.65})
    ]
    for held in ([*alike, *other], [*other, *alike]):
        page = to_markdown(verdicts(analyse(held)))
        assert "| dropout |" in page
        assert "uniform (same mean)" in page
    assert "| dropout (same mean) |" in to_markdown(verdicts(analyse(alike)))


def test_simulated_effects_are_covered_and_null_effects_seldom_claimed():
    rng = np.random.default_rng(1)
    covered, claims = [], []
    for number in range(120):
        held = []
        for arm, mean in (("dropout", 0.6), ("guided", 0.61), ("uniform", 0.61)):
            for seed in range(6):
                key = RunKey("demo", "cola", 1.0, arm, seed)
                held.append(Run(key, made(key, mean + 0.02 * np.random.default_rng([number, seed]).normal()
                                          + 0.01 * rng.normal())))  # fmt: skip
        a = analyse(held)
        low, high = comparison(a, "dropout").pair.statistics.t_interval
        covered.append(low <= 0.01 <= high)
        claims.append(comparison(a, "uniform").verdict in ("helps", "hurts"))
    assert np.mean(covered) > 0.9
    assert np.mean(claims) < 0.1


def test_both_columns_of_mnli_are_of_the_same_runs():
    held = []
    for seed, value, other in ((0, 0.5, 0.52), (1, None, 0.33)):
        key = RunKey("demo", "mnli", 1.0, "dropout", seed)
        held.append(Run(key, made(key, value, metrics={"accuracy": value, "accuracy_mismatched": other})))
    (table,) = restarts(analyse(held))
    assert table.header[2:] == ("mnli (accuracy)", "mnli-mm (accuracy)")
    assert table.rows[0][2:] == ("0.5000 / 0.5000", "0.5200 / 0.5200")


def test_order_counts_and_expectation(tmp_path):
    experiment = write_experiment(
        tmp_path / "e", tasks=("rte", "cola"), arms=("guided", "dropout", "uniform"), fractions=(0.1, 1.0), seeds=3,
        missing=lambda k: k.task == "cola" and k.seed == 2,
        value=lambda k: ValueError("out of luck") if k.arm == "guided" and k.seed == 0 else 0.6 + 0.01 * k.seed,
        collapsed=lambda k: k.arm == "dropout" and k.seed == 1,
    )  # fmt: skip
    a = analyse(experiment.runs(), experiment.grids)
    assert (a.tasks, a.fractions, a.arms) == (("rte", "cola"), (1.0, 0.1), ("dropout", "guided", "uniform"))
    assert (len(a.runs), {(k.task, k.seed) for k in a.missing}, len(a.missing)) == (30, {("cola", 2)}, 6)
    rte = a.cells["demo", "rte", 0.1].arms
    assert rte["guided"].counts == {"ok": 2, "collapsed": 0, "diverged": 0, "failed": 1}
    assert rte["dropout"].counts == {"ok": 2, "collapsed": 1, "diverged": 0, "failed": 0}
    assert rte["guided"].made == 3


@pytest.mark.parametrize(
    ("held", "options", "words"),
    [
        ([], {}, "found no runs"),
        (runs({"guided": 0.5}, seeds=1), {"margin": 0.0}, "margin of 0.0"),
        (runs({"guided": 0.5}, seeds=1) + runs({"dropout": 0.5}, seeds=1, dropout={"recipe": {"epochs": 5}}), {},
         "demo, cola, fraction 1: the runs differ in their recipe"),
    ],
)  # fmt: skip
def test_what_cannot_be_analysed_is_refused(held, options, words):
    with pytest.raises(DataError, match=words):
        analyse(held, [Grid(["demo"], ["cola"], ["guided"], [1.0], [0])], **options)
