"""The report claims what its intervals support, escapes what it is given and needs nothing outside itself."""

import re
from html.parser import HTMLParser

import pytest
from samples_of_results import profile, run, site

from guided_dropout.bench.arms import compare_arms, group_by_arm
from guided_dropout.bench.document import Paragraph, to_markdown
from guided_dropout.bench.report import verdict_sentence, write_report
from guided_dropout.errors import DataError

BASE = [0.700, 0.710, 0.720, 0.705, 0.715]
TABLE = [site("a.dropout", 1e-6, 0.1), site("b.dropout", 1e-4, 0.0), site("head", None, None)]


def arms(**values):
    return [run(arm, seed, v) for arm, series in values.items() for seed, v in enumerate(series)]


def sentence(guided, **options):
    dropout, other = group_by_arm(arms(dropout=BASE, guided=guided))
    return verdict_sentence(compare_arms(other, dropout), **options)


def test_a_clear_gain_is_called_better():
    text = sentence([0.750, 0.761, 0.768, 0.756, 0.764])
    assert "guided − dropout = +0.0498 on average over 5 seeds" in text
    assert "guided is better than dropout here" in text


def test_a_clear_loss_is_called_worse():
    assert "guided is worse than dropout here" in sentence([0.650, 0.661, 0.668, 0.656, 0.664])


def test_a_gain_within_the_noise_is_not_claimed():
    text = sentence([0.760, 0.690, 0.740, 0.760, 0.700])
    assert "+0.0200" in text
    assert "these 5 seeds do not show that guided is better or worse than dropout" in text
    assert "guided is better than dropout here" not in text


def test_equivalence_needs_a_margin():
    near = [0.701, 0.709, 0.721, 0.704, 0.715]
    assert "undecided at this n" in sentence(near)
    assert "no difference within ±0.01" in sentence(near, margin=0.01)


def test_too_few_seeds_give_no_interval():
    dropout, guided = group_by_arm(arms(dropout=[0.5, 0.6], guided=[0.9, 0.95]))
    text = verdict_sentence(compare_arms(guided, dropout))
    assert "undecided at this n" in text
    assert "at least 3 seeds" in text


def test_pairs_are_made_by_seed_not_by_position_and_diverged_runs_are_counted():
    results = [*arms(dropout=[0.5, 0.6, 0.7]), run("guided", 2, 0.8), run("guided", 1, None), run("guided", 0, 0.4)]
    dropout, guided = group_by_arm(results)
    comparison = compare_arms(guided, dropout)
    assert comparison.statistics is not None
    assert comparison.statistics.differences == pytest.approx((0.1, -0.1))
    assert comparison.left_out == 1
    assert guided.diverged == 1


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (run("guided", 0, 0.5, task="shape"), "differ in their task"),
        (run("guided", 0, 0.5, recipe={"epochs": 3}), "differ in their recipe"),
        (run("guided", 0, 0.5, model={"name_or_path": "other"}), "differ in their model: name is 'other'"),
        (run("guided", 0, 0.5, model={"name_or_path": "demo", "num_parameters": 7}), "model: num_parameters is 7"),
        (run("guided", 0, 0.5, pairing={"weights": "other", "batches": "b0"}), "weights is 'other'"),
        (run("dropout", 0, 0.5), "two runs of the arm dropout"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(odd, words):
    with pytest.raises(DataError, match=re.escape(words)):
        group_by_arm([run("dropout", 0, 0.5), odd])


def test_all_seeds_are_evaluated_on_the_same_examples_but_where_each_is_dealt_its_own():
    def of(seed, value, split, evaluation):
        recipe = {"epochs": 2} | ({"split": split} if split else {})
        pairing = {"weights": f"w{seed}", "batches": f"b{seed}", "evaluation": evaluation}
        return run("dropout", seed, value, recipe=recipe, pairing=pairing)

    for split in ("glue", None):  # as of when nothing else could be chosen
        for value in (0.5, None):
            with pytest.raises(DataError, match=r"evaluated on different examples.* is two in one and one in another"):
                group_by_arm([of(0, 0.5, split, "one"), of(1, value, split, "two")])
        assert len(group_by_arm([of(0, 0.5, split, "one"), of(1, 0.5, split, "one")])[0].runs) == 2
    for split in ("paper", "holdout:0.2"):
        assert len(group_by_arm([of(0, 0.5, split, "one"), of(1, 0.5, split, "two")])[0].runs) == 2


@pytest.mark.parametrize("name", ["elsewhere/m", "/home/me/models/m/"])
def test_a_model_may_lie_in_another_folder(name):
    there = run("dropout", 0, 0.5, model={"name_or_path": "m"})
    assert len(group_by_arm([there, run("guided", 0, 0.5, model={"name_or_path": name})])) == 2


def test_no_runs():
    with pytest.raises(DataError, match="found no runs"):
        group_by_arm([])


class Outline(HTMLParser):
    """Tags opened and not closed, and what the page would fetch."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.seen = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def report(folder, **changes):
    values = {
        "dropout": BASE,
        "uniform": [0.71, 0.70, 0.73, 0.70, 0.71],
        "guided": [0.750, 0.761, 0.768, 0.756, 0.764],
    }
    facts = {"title": "A report", "results": arms(**values), "profile": profile(), "table": TABLE, **changes}
    return write_report(folder, **facts)


def test_report_is_whole_and_self_contained(tmp_path):
    html, markdown = report(tmp_path, commands=["guided-dropout quickstart"], notes=["It is a toy."])
    outline = Outline()
    outline.feed(html.read_text())
    assert outline.open == []
    assert outline.fetched == []
    assert {"table", "svg", "figure"} <= outline.seen
    assert not outline.seen & {"script", "link", "img", "iframe"}
    assert "url(" not in re.sub(r"url\(#", "", html.read_text())
    text = markdown.read_text()
    for name in re.findall(r"\]\((figures/\w+\.svg)\)", text):
        assert (tmp_path / name).read_text().startswith("<svg")
    assert len(list((tmp_path / "figures").iterdir())) == 3
    for words in ("guided − uniform", "It is a toy.", "guided-dropout quickstart", "0.7100"):
        assert words in text
        assert words in html.read_text()


def test_report_escapes_what_it_is_given(tmp_path):
    evil = "<script>alert(1)</script> | *x*"
    html, markdown = report(
        tmp_path, title=evil, notes=[evil], introduction=[evil], commands=[evil], table=[site(evil, 1.0, 0.1)]
    )
    assert "<script" not in html.read_text()
    outside_code = re.sub(r"```.*?```|`[^`]*`", "", markdown.read_text(), flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<script", outside_code)
    row = next(line for line in markdown.read_text().splitlines() if "1.000e+00" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 6


def test_markdown_shows_signs_as_they_are():
    assert to_markdown([Paragraph("a&lt;b ~c~ $d$ `$e$`")]) == "a\\&lt;b \\~c\\~ \\$d\\$ `$e$`\n"


def test_report_without_guided_runs_compares_nothing(tmp_path):
    html, _ = report(tmp_path, results=arms(dropout=BASE, none=BASE))
    assert "better than" not in html.read_text()
    assert "no dropout" in html.read_text()


def test_report_names_diverged_and_collapsed_runs(tmp_path):
    results = [*arms(dropout=BASE), *(run("guided", s, None) for s in range(4)), run("guided", 4, 0.5, collapsed=True)]
    text = report(tmp_path, results=results)[1].read_text()
    assert "4 of 5 guided runs diverged" in text
    assert "1 of 5 guided runs predict a single class" in text
    assert "4 seeds are left out" in text
