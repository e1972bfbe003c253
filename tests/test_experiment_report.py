"""The report of an experiment: whole or not, it says what its runs support, what is missing, and nothing else."""

import csv
import re
import shlex

import pytest
from samples_of_experiments import accuracy_like, write_experiment
from test_report import Outline

from guided_dropout.arms import ARMS
from guided_dropout.bench import experiment_figures
from guided_dropout.bench.experiment_report import report_experiment
from guided_dropout.bench.experiment_verdicts import claims
from guided_dropout.bench.published import published
from guided_dropout.errors import ArtefactError, DataError

MAIN = ("dropout", "uniform", "shuffled", "guided")


def report(folder, **options):
    """Text of report.md, rows of a CSV by name, and the folder."""
    experiment = write_experiment(folder / "e", **options)
    analysis, files = report_experiment(experiment.path)
    assert all(file.is_file() for file in files)
    assert [file.name for file in files] == [
        "report.html", "report.md", "runs.csv", "arms.csv", "comparisons.csv", "tables.tex",
    ]  # fmt: skip
    return analysis, (files[1]).read_text(), files[0].parent


def rows(folder, name):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def clear(tmp_path_factory):
    """An experiment in which guidance helps on both tasks at 10 % of the data, and nothing does at 100 %."""

    def value(key):
        helped = key.arm == "guided" and key.fraction == 0.1
        return accuracy_like(key, {}, spread=0.002) + 0.05 * helped

    return report(tmp_path_factory.mktemp("clear"), arms=MAIN, seeds=6, value=value)


def test_the_verdicts_come_first(clear):
    analysis, text, _ = clear
    said = list(claims(analysis))
    assert len(said) == 4
    assert "10 % of the training data. Against standard dropout. Mean over 2 tasks: guided − dropout = +0.0" in said[2]
    assert "helps on cola† and rte†" in said[2]
    assert "Guidance helps: guided is better than uniform and shuffled, all at the same mean rate." in said[3]
    assert "Guidance is undecided at this n" in said[1]
    position = [
        text.index(words) for words in ("What it shows", "Maximum and mean", "Effects", "What became of the runs")
    ]
    assert position == sorted(position)
    assert "96 runs of 96" in text
    assert "Not finished" not in text
    assert "collapsed on" not in text


def test_that_no_dropout_is_better_is_said_beside_that_guidance_helps(tmp_path):
    better = {"guided": 0.05, "none": 0.1}

    def value(key):
        return accuracy_like(key, {}, spread=0.002) + better.get(key.arm, 0.0)

    analysis, text, _ = report(tmp_path, arms=[*MAIN, "none"], seeds=6, fractions=[0.1], value=value)
    standard, none, guidance = claims(analysis)
    assert "Against standard dropout." in standard
    assert "Against no dropout. Mean over 2 tasks: guided − none = -0.0" in none
    assert "hurts on cola† and rte†" in none
    assert "Guidance helps" in guidance
    assert text.index("Against no dropout") < text.index("Maximum and mean")


def test_the_page_is_whole_and_needs_nothing_outside(clear):
    html = (clear[2] / "report.html").read_text()
    outline = Outline()
    outline.feed(html)
    assert outline.open == []
    assert outline.fetched == []
    assert {"table", "svg", "figure", "details"} <= outline.seen
    assert not outline.seen & {"script", "link", "img", "iframe"}


def test_each_figure_is_there(clear):
    _, text, folder = clear
    names = re.findall(r"\]\((figures/[\w.-]+\.svg)\)", text)
    assert [name.partition("/")[2] for name in names] == [
        "curves-demo-1.svg", "effects-demo-controls-1.svg", "runs-demo-cola-1.svg", "runs-demo-rte-1.svg",
    ]  # fmt: skip
    assert {f"figures/{f.name}" for f in (folder / "figures").iterdir()} == set(names)


def test_no_panel_is_drawn_without_an_effect(tmp_path, monkeypatch):
    drawn = []
    plot = experiment_figures.plot_forest
    monkeypatch.setattr(experiment_figures, "plot_forest", lambda c, **kw: drawn.append(c) or plot(c, **kw))
    report(
        tmp_path,
        tasks=["cola", "mrpc", "rte", "stsb"],
        arms=[*MAIN, "reversed", "role-mean", "top-only", "none"],
        seeds=3,
        missing=lambda key: key.fraction == 1.0 and key.task != "cola",
    )
    assert len(drawn) > 1
    assert all(any(effects for effects in tasks.values()) for columns in drawn for tasks in columns.values())
    assert sum(len(effects) for columns in drawn for tasks in columns.values() for effects in tasks.values()) == 42


def test_a_row_for_each_run_and_each_comparison(clear):
    analysis, _, folder = clear
    held = rows(folder, "runs.csv")
    assert len(held) == 96
    by_key = {(r["task"], float(r["fraction"]), r["arm"], int(r["seed"])): float(r["value"]) for r in held}
    assert by_key == {(r.key.task, r.key.fraction, r.key.arm, r.key.seed): r.result.value for r in analysis.runs}
    found = rows(folder, "comparisons.csv")
    assert len(found) == 2 * 2 * 3 + 2 * 3
    (one,) = [c for c in found if (c["task"], c["fraction"], c["control"]) == ("rte", "0.1", "uniform")]
    differences = [by_key["rte", 0.1, "guided", s] - by_key["rte", 0.1, "uniform", s] for s in range(6)]
    assert float(one["mean"]) == pytest.approx(sum(differences) / 6)
    assert (one["verdict"], one["role"], one["same_mean"]) == ("helps", "control at the same mean", "True")
    assert len(rows(folder, "arms.csv")) == 16


def test_maximum_and_mean_beside_the_papers(clear):
    analysis, text, folder = clear
    values = [
        r.result.value for r in analysis.runs if (r.key.task, r.key.fraction, r.key.arm) == ("rte", 1.0, "guided")
    ]
    ours = f"{max(values):.4f} / {sum(values) / 6:.4f}"
    assert re.search(rf"^\| guided \| 6 \|.*\| {ours} \|", text, re.MULTILINE)
    assert "| published, bert-base-uncased: guided | 5 | 0.6096 / 0.6045 | 0.6877 / 0.6303 |" in text
    assert "are of another model (bert-base-uncased) than demo" in text
    latex = (folder / "tables.tex").read_text()
    assert f"& {ours} " in latex
    assert latex.count(r"\begin{tabular}{lrcc}") == latex.count(r"\end{table}") == 2
    for line in latex.splitlines():
        if line.endswith(r"\\"):
            assert line.count("&") == 3
    assert r"100 \% of the training data" in latex


def test_published_figures_are_not_another_models_where_they_are_not(tmp_path):
    _, text, _ = report(tmp_path, models=["bert-base-uncased"], arms=["dropout", "guided"], seeds=1, tasks=["mrpc"])
    assert "are of the same model" in text
    means = {r.arm: r.values for r in published().rows if r.fraction == 1.0}
    assert means["guided"]["cola"] == [0.6096, 0.6045]
    assert means["dropout"]["sst2"] == [0.9498, 0.9493]


def test_an_unfinished_experiment_says_so(tmp_path):
    analysis, text, _ = report(tmp_path, fractions=[0.1], seeds=4, missing=lambda k: k.seed > 1 and k.task == "rte")
    assert (len(analysis.runs), len(analysis.missing)) == (24, 8)
    assert "**Not finished: 24 of 32 runs are there." in text
    assert "24 runs of 32: 1 model (demo), 2 tasks (cola, rte)" in text
    assert "2 to 4 seeds." in text
    assert re.search(r"^\| guided \| 6 \| 0 \| 0 \| 0 \| 2 \|$", text, re.MULTILINE)


def test_the_first_run_of_many_makes_a_report(tmp_path):
    _, text, _ = report(tmp_path, missing=lambda k: (k.seed, k.task, k.arm, k.fraction) != (0, "cola", "dropout", 1.0))
    assert "1 run of 80" in text
    assert "nothing is compared" in text


def test_what_went_wrong_is_counted_and_named(tmp_path):
    def value(key):
        if key.arm == "guided" and key.seed == 0:
            return RuntimeError("CUDA out of memory\nsecond line | with a pipe")
        return None if key.arm == "dropout" and key.seed == 1 else accuracy_like(key, {})

    _, text, folder = report(
        tmp_path, tasks=["cola"], fractions=[0.1], value=value, collapsed=lambda k: k.arm == "uniform" and k.seed == 2
    )
    assert re.search(r"^\| dropout \| 4 \| 0 \| 1 \| 0 \|", text, re.MULTILINE)
    assert re.search(r"^\| uniform \| 4 \| 1 \| 0 \| 0 \|", text, re.MULTILINE)
    assert re.search(r"^\| guided \| 4 \| 0 \| 0 \| 1 \|", text, re.MULTILINE)
    assert "| RuntimeError: CUDA out of memory | 1 | `demo_cola_0.1_guided_000`" in text
    assert "second line" not in text
    statuses = [r["status"] for r in rows(folder, "runs.csv")]
    assert (statuses.count("failed"), statuses.count("diverged"), statuses.count("collapsed")) == (1, 1, 1)


def test_runs_that_are_in_no_line_are_told_below_the_lines(tmp_path):
    def value(key):
        if key.arm == "uniform" and key.fraction == 0.1 and key.seed < 2:
            return None if key.seed else RuntimeError("lost")
        return accuracy_like(key, {})

    _, text, _ = report(tmp_path, tasks=["cola"], seeds=4, value=value)
    assert "shuffled. Without a metric (diverged or failed), and in no line: uniform on cola 2 of 4 at 10 %." in text


def test_a_task_on_which_little_is_learned_is_named(tmp_path):
    _, text, _ = report(tmp_path, fractions=[0.1], seeds=4, collapsed=lambda k: k.task == "rte" and k.seed > 1)
    assert "Half of the runs or more collapsed on rte (10 % of the training data)." in text


def test_an_arm_that_learned_little_is_named(tmp_path):
    _, text, _ = report(
        tmp_path, fractions=[0.1], seeds=4, collapsed=lambda k: (k.task, k.arm) == ("rte", "dropout") and k.seed > 1
    )
    assert "Half of the runs or more collapsed, of dropout on rte (10 % of the training data)." in text


def test_limits_name_what_was_run_at_another_mean(tmp_path):
    words = "from a guided schedule in the mean rate as well"
    assert f"- Standard dropout differs {words}" in report(tmp_path, seeds=3)[1]
    _, text, _ = report(tmp_path / "none", arms=["none", "guided"], seeds=3)
    assert f"- No dropout differs {words}" in text
    assert "deals the guided rates out once" not in text


def test_seeds_of_an_arm_alone_are_not_called_paired(tmp_path):
    _, text, _ = report(tmp_path, seeds=6, missing=lambda k: k.arm == "guided" and k.seed > 1)
    assert "6 seeds." in text
    assert "6 paired seeds" not in text
    assert "`shuffled` deals the guided rates out once, in the same way in all runs" in text


def test_everything_failed(tmp_path):
    _, text, _ = report(tmp_path, value=lambda k: ValueError(""))
    assert "| ValueError | 80 |" in text


def test_no_guided_arm(tmp_path):
    _, text, _ = report(tmp_path, arms=["dropout"], tasks=["cola"], fractions=[1.0], seeds=3)
    assert "nothing is compared" in text
    assert "runs-demo-cola-1.svg" in text


def test_all_arms(tmp_path):
    labels = [*ARMS, "shuffled:seed=1", "mixout:p=0.5"]
    analysis, text, _ = report(tmp_path, arms=labels, tasks=["cola"], fractions=[0.1], seeds=3)
    assert len(analysis.comparisons) == len(labels) - 1 + 9
    for label in labels:
        assert f"| {label} |" in text
    for words in ("guided against other regularizers", "Other guided arms", "guided-l2-sp − l2-sp (same mean)"):
        assert words in text


def test_several_models(tmp_path):
    analysis, text, _ = report(
        tmp_path, models=["demo", "user_model"], arms=["dropout", "guided"], tasks=["cola"], seeds=3
    )
    assert len(analysis.comparisons) == 2 * 2
    assert "user\\_model, 10 % of the training data. Against standard dropout." in text
    assert "| user\\_model | 10 % | cola |" in text
    assert "curves-user_model-1.svg" in text


def test_a_margin_allows_equivalence(tmp_path):
    def value(key):
        return 0.6 + (key.arm == "guided") * 0.001 * ((7 * key.seed) % 5 - 2)

    experiment = write_experiment(tmp_path / "e", arms=MAIN, tasks=["cola"], fractions=[1.0], seeds=6, value=value)
    assert "no difference within" not in " ".join(claims(report_experiment(experiment.path)[0]))
    analysis, files = report_experiment(experiment.path, tmp_path / "out", margin=0.01)
    assert files[0].parent == tmp_path / "out"
    assert "no difference within ±0.01" in " ".join(claims(analysis))


def test_a_report_is_replaced_whole_and_nothing_else_is(tmp_path):
    _, _, folder = report(tmp_path, tasks=["cola"], fractions=[1.0], seeds=3)
    (folder / "figures" / "old.svg").write_text("")
    report_experiment(tmp_path / "e")
    assert not (folder / "figures" / "old.svg").exists()
    with pytest.raises(ArtefactError, match=r"holds other files and no report\.html"):
        report_experiment(tmp_path / "e", tmp_path)


def test_what_is_no_experiment_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match="expected a bench-experiment file"):
        report_experiment(tmp_path)
    experiment = write_experiment(tmp_path / "e", missing=lambda k: True)
    with pytest.raises(DataError, match="found no runs"):
        report_experiment(experiment.path)


def test_names_are_escaped(tmp_path):
    _, text, folder = report(
        tmp_path, models=["a|b<script>"], arms=["dropout", "guided"], tasks=["cola"], seeds=3,
        value=lambda k: ValueError("<script>alert(1)</script> | *x*") if k.seed == 0 else 0.5 + 0.01 * k.seed,
    )  # fmt: skip
    assert "<script" not in (folder / "report.html").read_text()
    latex = (folder / "tables.tex").read_text()
    assert r"e: a\textbar{}b\textless{}script\textgreater{}, 100 \%" in latex  # plain ones are other signs in OT1
    assert not re.search(r"(?<!\\)<script", re.sub(r"`[^`]*`", "", text))


def test_its_command_can_be_pasted_whatever_the_folder_is_called(tmp_path):
    _, text, folder = report(tmp_path / "my $runs", arms=["dropout", "guided"], tasks=["cola"], seeds=1)
    (line,) = [line for line in text.splitlines() if line.startswith("guided-dropout bench report")]
    assert shlex.split(line)[-1] == str(folder.parent)
