"""The benchmark of model types runs end to end, resumes, and sees what is wrong."""

import contextlib
import json
from dataclasses import replace

import pytest

from benchmarks.architectures import __main__ as command
from benchmarks.architectures import dropout, fisher, summary
from benchmarks.architectures.measure import measured
from benchmarks.architectures.models import KINDS

TYPES = ("electra", "llama")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("architectures")
    command.main(["--kinds", "causal", "--types", *TYPES, "--out", str(folder)])
    return folder


def rows(folder):
    return json.loads((folder / "rows.json").read_text())["rows"]


def test_the_command_writes_a_row_for_each_type_and_a_page(results):
    assert [row["type"] for row in rows(results)] == list(TYPES)
    electra, llama = rows(results)
    for row in (electra, llama):
        assert row["fisher"]["status"] == "exact"
        assert row["fisher"]["worst"] < 1e-5
        assert row["fisher"]["parameters_by_rule"] == 1.0
        assert row["dropout"]["status"] == "arrives"
    assert electra["dropout"]["sites"] > llama["dropout"]["sites"] == 2
    known = len(KINDS["causal"].types)
    assert f"| causal LM | {known} | 2 | 2 | 0 |" in (results / "README.md").read_text()


def test_rows_of_the_same_versions_stay(results, monkeypatch):
    before = (results / "rows.json").read_bytes()
    monkeypatch.setattr(command, "measured", lambda *_, **__: pytest.fail("measured again"))
    command.main(["--kinds", "causal", "--types", *TYPES, "--out", str(results)])
    assert (results / "rows.json").read_bytes() == before
    fresh = {"not_built": "no such size", "seconds": 0.1}
    monkeypatch.setattr(command, "measured", lambda kind, name, limit: {"kind": kind, "type": name, **fresh})
    record = json.loads(before)
    for session in record["sessions"]:
        session["versions"]["torch"] = "0"
    command.measure(record, [("causal", "llama")], results / "other.json")
    assert [row.get("not_built") for row in record["rows"]] == [None, "no such size"]
    assert "- llama (causal LM): no such size" in summary.summary(record)


def test_a_type_ends_with_its_time():
    row = measured("causal", "llama", limit=0.0)
    assert "0 s" in row["not_built"]


def test_a_wrong_fisher_is_seen(monkeypatch):
    def wrong(*args, **kwargs):
        profile = real(*args, **kwargs)
        name = min(profile.tensor_means)
        return replace(profile, tensor_means={**profile.tensor_means, name: 1.001 * profile.tensor_means[name]})

    real = fisher.estimate_fisher
    monkeypatch.setattr(fisher, "estimate_fisher", wrong)
    row = fisher.fisher_row("causal", "llama")
    assert row["status"] == "wrong"
    assert row["worst"] == pytest.approx(1e-3, rel=0.01)


def test_rates_that_do_not_arrive_and_a_model_that_does_not_come_back_are_seen(monkeypatch):
    monkeypatch.setattr(dropout, "apply_dropout", lambda *_: contextlib.nullcontext())
    row = dropout.dropout_row("causal", "llama")
    assert (row["status"], len(row["unheard"]), row["strays"]) == ("wrong", 2, [0.2])

    def careless(model, schedule):
        handle = real(model, schedule)
        model.config.attention_dropout = 0.5
        return handle

    monkeypatch.undo()
    real = dropout.apply_dropout
    monkeypatch.setattr(dropout, "apply_dropout", careless)
    row = dropout.dropout_row("causal", "llama")
    assert (row["status"], row["changed"]) == ("wrong", ["config attention_dropout"])


def test_the_page_of_nothing_says_so():
    assert "Nothing has been measured" in summary.summary({"rows": [], "sessions": []})
