"""`fidelity`, `plot` and `fisher --until-stable` on the command line."""

import signal
import sys

import pytest
from tiny import WORDS, save_tiny_bert

from guided_dropout import FisherProfile
from guided_dropout.cli import app as cli
from guided_dropout.fidelity import Fidelity


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_bert(folder / "model")
    (folder / "text.txt").write_text("\n".join(" ".join(WORDS[(i * j + j) % 17] for j in range(12)) for i in range(90)))
    return folder


@pytest.fixture
def command(folder, monkeypatch, capsys):
    def run(line):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["guided-dropout", *line.split()])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run


LINE = (
    "fidelity model --text text.txt --samples 80 --max-length 12 --fractions 0.33,0.05 --top 0.05,0.01 --draws 2 "
    "--device cpu --out f.json"
)


def test_from_text_to_figures(folder, command):
    code, out, err = command(f"{LINE} --profile-out profile")
    assert code == 0, err
    assert " samples in one pass, 2 draws of 2 sizes" in out
    assert "of memory for the sums" in out
    assert "paper's four" in out
    assert "0.986 0.041" in out
    assert "samples: from there on, at least 95 %" in out
    result = Fidelity.load(folder / "f.json")
    assert (result.num_samples + result.num_skipped, result.draws, result.fractions) == (80, 2, (0.33, 0.05))
    assert f"{result.num_skipped} samples without a target were left out." in out
    assert {"source": "model", "max_length": 12}.items() <= result.provenance.items()
    assert FisherProfile.from_pretrained(folder / "profile").num_samples == result.num_samples
    assert not (folder / "f.json.checkpoint").exists()
    for line in (
        "plot fidelity f.json --out f.png",
        "plot spectrum profile --out spectrum.svg --normalise",
        "plot lorenz profile --out lorenz.pdf",
        "plot layers profile profile --labels a,b --measure mean --out layers.png",
        "plot layers profile --by-size --out sorted.svg",
    ):
        code, out, err = command(line)
        assert code == 0, err
        assert (folder / out.strip()).stat().st_size > 1000


def test_schedules_alone(folder, command):
    code, out, err = command(f"{LINE} --scores-only")
    assert code == 0, err
    assert "no sums of the parameters' size" in out
    assert "Spearman" not in out
    assert Fidelity.load(folder / "f.json").cells == ()


def test_until_stable_says_how_many_samples_it_took(command):
    line = "fisher model --text text.txt --samples 105 --max-length 12 --until-stable --stable-tau 0.01 --out stable"
    code, out, err = command(f"{line} --scores-only --device cpu")
    assert code == 0, err
    assert "order of the sites" in out
    assert "of the bootstrap replicates have a Kendall's tau of" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (LINE.replace("0.33,0.05", "a"), "--fractions a; expected numbers with commas between them"),
        (LINE.replace("0.33,0.05", "2"), "fraction 2 of the samples; expected a number between 0 and 1"),
        (LINE.replace("f.json", "model"), "model is a folder; expected a file"),
        (LINE.replace("f.json", "text.txt"), "text.txt is there already and holds other data; expected a new file"),
        (f"{LINE} --max-memory 0.0001", "expected no more than the 0.1 MB allowed: lower the number of draws"),
        (f"{LINE} --max-memory nan", "--max-memory nan; expected gigabytes, a number above 0"),
        (f"{LINE} --max-memory inf", "--max-memory inf; expected gigabytes"),
        (f"{LINE} --max-memory -1", "--max-memory -1; expected gigabytes"),
        (LINE.replace("f.json", "text.txt/f.json"), "cannot write text.txt/f.json"),
        (f"{LINE} --profile-out model", "model holds other files and no profile.json"),
        (LINE.replace("text.txt", "nowhere"), "cannot read the text nowhere"),
        ("plot fidelity text.txt --out a.png", "text.txt is not valid JSON"),
        ("plot fidelity text.txt --out a.jpg", "expected a name that ends in .png, .svg or .pdf"),
        (f"{LINE} --out run/f.json --profile-out ./run", "--profile-out run with --out run/f.json; expected a folder"),
        (f"{LINE} --out run --profile-out f/../run", "--profile-out f/../run with --out run; expected a folder of the"),
        (f"{LINE} --out run --profile-out run/f", "beside the result: --profile-out profile"),
        ("plot spectrum nowhere --out a.png", "no folder nowhere"),
        (
            "fisher model --text text.txt --max-length 12 --until-stable --until-ranked --out new",
            "expected one rule to stop by",
        ),
        (
            "fisher model --text text.txt --max-length 12 --until-stable --samples all --out new",
            "--until-stable with --samples all; expected samples drawn at random",
        ),
        (
            "fisher model --text text.txt --max-length 12 --until-ranked --rank-confidence 95 --out new",
            "--rank-confidence 95; expected a number between 0 and 1, as 0.95",
        ),
        ("fisher model --text text.txt --samples=--5 --out new", "number of samples --5; expected at least 1, or all"),
        ("fisher model --text hub:a:b:train:c --out new", "hub:a:b:train:c"),
    ],
)
def test_mistakes_are_one_line(command, line, message):
    code, out, err = command(line)
    assert code == 2
    assert message in " ".join(err.split())
    assert "samples in one pass" not in out


def test_what_is_finished_is_not_measured_again(folder, command):
    line = LINE.replace("f.json", "finished.json")
    assert command(line)[0] == 0
    written = (folder / "finished.json").read_bytes()
    code, out, err = command(f"{line} --resume")
    assert code == 0, err
    assert "nothing was measured" in out
    assert "samples: from there on, at least 95 %" in out
    for change, told in (("--draws 3", "draws was 2, is 3"), ("--tau 0.5", "tau was 0.95, is 0.5")):
        code, _, err = command(f"{line} {change} --resume")
        assert code == 2
        assert told in err
    assert (folder / "finished.json").read_bytes() == written
    (folder / "empty").mkdir()
    assert command(f"{line} --profile-out empty --resume")[0] == 0
    made = (folder / "empty" / "profile.json").read_bytes()
    code, out, _ = command(f"{line} --profile-out empty --resume")
    assert code == 0
    assert "nothing was measured" in out
    assert (folder / "empty" / "profile.json").read_bytes() == made
    assert command(f"{line} --seed 5 --profile-out others --no-resume".replace("finished", "other"))[0] == 0
    code, _, err = command(f"{line} --profile-out others --resume")
    assert code == 2
    assert "others holds the profile of another run" in err
    assert "seed was 5, is 0" in err
    code, out, _ = command(f"{line} --draws 3 --no-resume")
    assert code == 0
    assert Fidelity.load(folder / "finished.json").draws == 3
