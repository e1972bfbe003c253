"""`guided-dropout schedule` as a stranger meets it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from families import language_model, measured_on, profile_of
from test_cli import run
from tiny import save, save_tiny_bert, tiny_bert_config
from transformers import BertForSequenceClassification

from guided_dropout import add_residual_sites, find_sites
from guided_dropout.models import load_lm
from guided_dropout.schedule import DropoutSchedule, controls


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a profile of it, and two schedules."""
    folder = tmp_path_factory.mktemp("schedules")
    model = load_lm(str(save_tiny_bert(folder / "model")))
    profile = replace(profile_of(model), provenance={"source": "model"})
    profile.save_pretrained(folder / "profile")
    planned = DropoutSchedule.from_profile(profile, model)
    planned.save(folder / "a.json")
    planned.at_uniform().save(folder / "flat.json")
    (folder / "rates.csv").write_text("path,rate\n" + "".join(f"{path},0.25\n" for path in planned.rates))
    (folder / "nested.json").write_text('{"bert": {"embeddings": {"dropout": 0.1}}}')
    (folder / "listed.json").write_text('{"bert": [0.1]}')
    return folder


@pytest.fixture
def command(folder, monkeypatch, capsys):
    return lambda *args: run(folder, *args, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize(
    "line", ["schedule profile --out {}", "schedule make profile --out {}", "schedule --out {0} profile"]
)
def test_make_is_what_schedule_does_by_default(folder, command, tmp_path, line):
    code, out, err = command(*line.format(tmp_path / "new.json").split())
    assert code == 0, err
    assert DropoutSchedule.load(tmp_path / "new.json").rates == DropoutSchedule.load(folder / "a.json").rates
    assert "encoder.layer.1.output.dropout" in out
    assert "7 sites, mean rate 0.0500, from 0 to 0.1" in out


@pytest.mark.parametrize(
    "line",
    [
        "schedule profile --out profile/profile.json",
        "schedule --rates rates.csv --model model --out rates.csv",
        "schedule control a.json --kind uniform --out rates.csv",
    ],
)
def test_what_is_no_schedule_is_not_written_over(folder, command, line):
    file = folder / line.split()[-1]
    before = file.read_bytes()
    code, _, err = command(*line.split())
    assert code == 2
    assert "is there already and holds" in err
    assert "choose another name" in err
    assert file.read_bytes() == before


def test_a_control_does_not_take_the_place_of_its_schedule(folder, command):
    before = (folder / "a.json").read_bytes()
    (folder / "link.json").symlink_to("a.json")
    for out in ("a.json", "model/../a.json", "link.json"):
        code, _, err = command("schedule", "control", "a.json", "--kind", "reversed", "--out", out)
        assert (code, err.count("\n")) == (2, 1)
        assert f"{out} is what the result is made from, and would be gone; expected another place" in err
    (folder / "link.json").unlink()
    assert (folder / "a.json").read_bytes() == before


def test_the_help_calls_the_profile_what_the_usage_does(command):
    for line in ("schedule --help", "schedule make --help"):
        _, out, _ = command(*line.split())
        assert "PROFILE" in out
        assert "DIR" not in out


def test_every_choice_arrives(command, tmp_path):
    new = tmp_path / "new.json"
    code, _, err = command(
        "schedule", "profile", "--out", new, "--shape", "step:3", "--aggregate", "top-share", "--grouping", "dataflow",
        "--upper", 0.4, "--lower", 0.1, "--mean-rate", 0.2,
    )  # fmt: skip
    assert code == 0, err
    made = DropoutSchedule.load(new)
    assert (made.shape, made.aggregate, made.grouping) == ("step:3", "top_share", "dataflow")
    assert made.mean_rate == pytest.approx(0.2)
    assert made.lower == pytest.approx(made.upper / 4)


def test_a_table_of_rates_becomes_a_schedule(command, tmp_path):
    new = tmp_path / "new.json"
    line = ("schedule", "make", "--rates", "rates.csv", "--model", "model", "--out", new)
    assert command(*line)[0] == 0
    assert set(DropoutSchedule.load(new).rates.values()) == {0.25}
    assert (
        command("schedule", "make", "--rates", "rates.csv", "--model", "model", "--mean-rate", 0.1, "--out", new)[0]
        == 0
    )
    assert set(DropoutSchedule.load(new).rates.values()) == {0.1}


def test_a_profile_of_a_classifier_becomes_a_schedule(command, folder, tmp_path):
    model = BertForSequenceClassification(tiny_bert_config())
    save(model, folder / "classifier")
    measured = profile_of(model)
    measured.save_pretrained(folder / "of-classifier")
    new = tmp_path / "new.json"
    for options in ([], ["--model", "model"]):
        code, _, err = command("schedule", "of-classifier", *(options or ["--model", "classifier"]), "--out", new)
        assert code == 0, err
        assert len(DropoutSchedule.load(new).rates) == 7


def test_a_table_may_hold_rates_of_residual_sites(command, folder, tmp_path):
    model = language_model("llama")
    save(model, folder / "llama")
    add_residual_sites(model)
    sites = [site.path for site in find_sites(model)]
    (folder / "residual.json").write_text(json.dumps(dict.fromkeys(sites, 0.1)))
    line = ("schedule", "--rates", "residual.json", "--model", "llama", "--out", tmp_path / "new.json")
    assert command(*line)[0] == 2
    code, _, err = command(*line, "--residual-sites")
    assert code == 0, err
    assert list(DropoutSchedule.load(tmp_path / "new.json").rates) == sites


def test_show_prints_and_draws(folder, command, tmp_path):
    code, out, err = command("schedule", "show", "a.json", "--plot", tmp_path / "a.svg")
    assert code == 0, err
    made = DropoutSchedule.load(folder / "a.json")
    bars = dict(re.findall(r"^(\S+dropout) +\w+ +\S+ +[\d.]+ +(█*)", out, flags=re.M))
    assert {f"bert.{path}": len(bar) for path, bar in bars.items()} == {
        path: int(rate / 0.1 * 24 + 1 / 16) for path, rate in made.rates.items()
    }
    assert "shape linear, grouping owner, aggregate tensor_mean" in out
    assert re.search(r"^encoder\.layer\.\*\.attention\.self\.dropout +[▁▂▃▄▅▆▇█]{2}\s*$", out, flags=re.M)
    assert (tmp_path / "a.svg").read_text().startswith("<svg")


def test_show_a_control_and_a_file_of_schema_1(folder, command, tmp_path):
    _, out, _ = command("schedule", "show", "flat.json")
    digest = DropoutSchedule.load(folder / "a.json").digest
    assert f"uniform: control of schedule {digest} (linear, owner, tensor_mean, mean 0.0500)" in out
    whole = json.loads((folder / "a.json").read_text())
    sites = whole.pop("sites")
    old = {**whole, "schema": 1, **{f"{key}s": {p: s[key] for p, s in sites.items()} for key in ("rate", "score")}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    code, out, err = command("schedule", "show", tmp_path / "old.json")
    assert code == 0, err
    assert "embeddings.dropout" in out


KINDS = ["uniform", "top-only", "role-mean", "reversed", "shuffled", "depth-linear", "magnitude"]


@pytest.mark.parametrize("kind", KINDS)
def test_control_writes_what_the_library_derives(folder, command, tmp_path, kind):
    code, out, err = command("schedule", "control", "a.json", "--kind", kind, "--out", tmp_path / "control.json")
    assert code == 0, err
    planned, made = DropoutSchedule.load(folder / "a.json"), DropoutSchedule.load(tmp_path / "control.json")
    name = kind.replace("-", "_")
    extra = (load_lm(str(folder / "model")),) if kind == "magnitude" else ()
    assert made == getattr(controls, name)(planned, *extra)
    assert made.mean_rate == pytest.approx(planned.mean_rate)
    own = {"shuffled": ", seed 0", "top-only": ", k 1"}.get(kind, "")
    assert f"{name}{own}: control of schedule {planned.digest}" in out
    assert "embeddings.dropout" in out
    assert str(tmp_path / "control.json") in out
    assert "other weights" not in out


def test_control_takes_a_seed_a_number_of_sites_and_a_model(folder, command, tmp_path):
    new = tmp_path / "control.json"
    planned = DropoutSchedule.load(folder / "a.json")
    command("schedule", "control", "a.json", "--kind", "shuffled", "--seed", 7, "--out", new)
    assert DropoutSchedule.load(new) == controls.shuffled(planned, 7)
    _, out, _ = command("schedule", "control", "a.json", "--kind", "top-only", "--k", 3, "--out", new)
    assert "top_only, k 3: control of schedule" in out
    assert DropoutSchedule.load(new) == controls.top_only(planned, 3)
    trained = load_lm(str(folder / "model"))
    with torch.no_grad():
        for k, parameter in enumerate(trained.parameters()):
            parameter.mul_(1 + k % 5)
    save(trained, tmp_path / "trained", tokenizer=False)
    code, out, err = command(
        "schedule", "control", "a.json", "--kind", "magnitude", "--model", tmp_path / "trained", "--out", new
    )
    assert code == 0, err
    assert DropoutSchedule.load(new).rates == controls.magnitude(planned, trained).rates
    assert f"note: the schedule was made on other weights of this backbone ({folder / 'model'})" in out


@pytest.mark.parametrize("options", ["top-only --k 6", "top-only --k 7", "top-only --k 99", "role-mean"])
def test_a_control_that_is_the_schedule_itself_is_refused(folder, command, tmp_path, options):
    source = "flat.json" if options == "role-mean" else "a.json"
    line = ("schedule", "control", source, "--kind", *options.split(), "--out", tmp_path / "control.json")
    code, _, err = command(*line)
    assert code == 2
    assert f"the control {options.split()[0]} is the schedule itself: the same rate at each of 7 sites" in err
    assert ("or k below 6" in err) == ("--k" in options)
    assert not (tmp_path / "control.json").exists()


def test_control_by_magnitude_adds_the_residual_sites_that_the_schedule_has(command, tmp_path):
    model = language_model("llama")
    save(model, tmp_path / "llama", tokenizer=False)
    with add_residual_sites(model):
        planned = DropoutSchedule.from_profile(profile_of(model), model)
        derived = controls.magnitude(planned, model)
    line = ("--kind", "magnitude", "--model", tmp_path / "llama", "--out", tmp_path / "control.json")
    code, _, err = command("schedule", "control", planned.save(tmp_path / "planned.json"), *line)
    assert code == 0, err
    assert DropoutSchedule.load(tmp_path / "control.json").rates == derived.rates
    inspected = ("inspect", tmp_path / "llama", "--schedule", tmp_path / "planned.json")
    code, out, err = command(*inspected, "--residual-sites", "--json")
    assert code == 0, err
    assert {row["path"]: row["scheduled_rate"] for row in json.loads(out)} == planned.rates
    code, _, err = command(*inspected)
    assert code == 2
    assert "before residual sites are added to it; expected a model that has them: --residual-sites" in err


def test_inspect_says_whether_the_schedule_was_made_on_these_weights(folder, command, tmp_path):
    _, out, _ = command("inspect", "model", "--schedule", "a.json")
    assert "other weights" not in out
    other = load_lm(str(folder / "model"))
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight.mul_(2)
    save(other, tmp_path / "other")
    code, out, err = command("inspect", tmp_path / "other", "--schedule", "a.json")
    assert code == 0, err
    assert f"note: the schedule was made on other weights of this backbone ({folder / 'model'})" in out


def test_make_says_whether_the_profile_was_measured_on_the_models_weights(folder, command, tmp_path):
    model = load_lm(str(folder / "model"))
    measured = measured_on(model)
    measured.save_pretrained(tmp_path / "measured")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(2)
    save(model, tmp_path / "other")
    for name, told in ((folder / "model", False), (tmp_path / "other", True)):
        code, out, err = command("schedule", tmp_path / "measured", "--model", name, "--out", tmp_path / "new.json")
        assert code == 0, err
        assert (f"note: the profile was measured on other weights ({measured.title})" in out) == told


def test_diff_prints_both_rates_the_means_and_the_order(command):
    code, out, err = command("schedule", "diff", "a.json", "a.json")
    assert code == 0, err
    assert "Kendall's tau +1.000" in out
    assert len(re.findall(r"\+0\.0000", out)) == 7
    _, out, _ = command("schedule", "diff", "a.json", "flat.json")
    assert "B flat.json: shape uniform, mean rate 0.0500" in out
    assert "Kendall's tau not defined" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "schedule make --out new",
            "no profile; expected a folder that `guided-dropout fisher` wrote",
        ),
        ("schedule make --rates rates.csv --out new", "--rates without a model"),
        ("schedule make profile --rates rates.csv --out new", "expected one of the two: leave one out"),
        ("schedule make --rates rates.csv --model model --shape step --out new", "leave out --upper"),
        ("schedule make --rates a.json --model model --out new", "holds 'dropout-schedule'; expected a plain object"),
        (
            "schedule make --rates nested.json --model model --out new",
            "nested.json gives bert an object; expected a number in [0, 1)",
        ),
        ("schedule make --rates listed.json --model model --out new", "listed.json gives bert an array; expected"),
        ("schedule profile --shape paper-code --out new", "paper_code for 7 sites; expected 37"),
        ("schedule profile --aggregate maximum --out new", "unknown aggregate 'maximum'"),
        ("schedule profile --mean-rate 0.7 --out new", "choose a mean rate below 0.5"),
        ("schedule control a.json --kind revresed --out new", "unknown control 'revresed' (did you mean 'reversed'?)"),
        (
            "schedule control a.json --kind reversed --seed 3 --out new",
            "--seed 3 with --kind reversed; expected it with",
        ),
        ("schedule control a.json --kind uniform --model model --out new", "--kind magnitude only: leave it out"),
        ("schedule control a.json --kind shuffled --seed -3 --out new", "seed -3 of the control shuffled; expected"),
        ("schedule control nowhere.json --kind uniform --out new", "cannot read nowhere.json: No such file"),
        ("schedule show nowhere.json", "cannot read nowhere.json: No such file"),
        ("schedule show a.json --plot new.jpg", "cannot draw to new.jpg"),
        ("schedule show profile/profile.json", "holds 'fisher-profile'; expected 'dropout-schedule'"),
        ("schedule diff a.json nowhere.json", "cannot read nowhere.json"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(folder, command, line, message):
    before = sorted(folder.rglob("*"))
    code, _, err = command(*line.split())
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert message in err
    assert sorted(folder.rglob("*")) == before


def test_a_misspelt_command_is_told(command):
    code, _, err = command("schedule", "shwo", "a.json")
    assert code == 2
    assert "Did you mean 'show'?" in err
