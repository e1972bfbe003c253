"""`guided-dropout landscape` as a stranger meets it; killed, and in several processes."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_cli import run
from tiny import WORDS, save_tiny_bert

from guided_dropout import landscape
from guided_dropout.cli import app as cli
from guided_dropout.landscape import Landscape, loss_landscape, record

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
BASE = "landscape model --text text.txt --samples 12 --max-length 12 --batch-size 4 --device cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("landscapes")
    save_tiny_bert(folder / "model")
    (folder / "text.txt").write_text("\n".join(" ".join(WORDS[(i + j) % 17] for j in range(12)) for i in range(40)))
    return folder


@pytest.fixture
def command(folder, monkeypatch, capsys):
    return lambda *args: run(folder, *args, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture
def chain(folder, command):
    """A profile, and lines under several masks."""
    if not (folder / "lines").exists():
        code, _, err = command(
            "fisher", "model", "--text", "text.txt", "--samples", 20, "--max-length", 12, "--out", "profile"
        )
        assert code == 0, err
        code, _, err = command(
            *f"{BASE} --dims 1 --points 5 --seeds 3 --profile profile --mask all --mask top:0.5 --mask random:0.5 "
            "--mask top:0.1 --mask random:0.1 --both-norms --out lines".split()
        )
        assert code == 0, err
    return folder


def test_lines_numbers_and_figure(chain, command, tmp_path):
    made = Landscape.from_pretrained(chain / "lines")
    assert [m.name for m in made.masks] == [
        "all", "top:0.5", "top:0.5=", "random:0.5", "random:0.5=", "top:0.1", "top:0.1=", "random:0.1", "random:0.1="
    ]  # fmt: skip
    assert list(made.seeds) == [0, 1, 2]
    assert made.provenance["text"] == "text.txt"
    assert made.provenance["source"] == "model"
    code, out, err = command("landscape", "show", "lines", "--plot", tmp_path / "lines.pdf")
    assert code == 0, err
    assert "5 points on [-1, 1]; directions gaussian (normalise filter, vectors held" in out
    assert "9 intervals, each at 95 %" not in out
    assert "top:0.1=" in out
    assert "intervals, each at 95 %, not corrected for their number" in out
    assert (tmp_path / "lines.pdf").read_bytes().startswith(b"%PDF")
    code, out, err = command("landscape", "show", "lines", "--json")
    assert code == 0, err
    numbers = json.loads(out)
    assert numbers["origin_loss"] == made.origin_loss
    assert numbers["masks"][1]["numbers"]["rise at 1"]["values"] == pytest.approx(made.rises("top:0.5")[0].tolist())


def test_a_profile_of_other_weights_is_told(chain, command, tmp_path):
    save_tiny_bert(tmp_path / "other", initializer_range=0.05)
    for model, told in (("model", False), (tmp_path / "other", True)):
        line = [*BASE.replace("model", str(model), 1).split(), "--mask", "top:0.5", "--profile", "profile"]
        code, out, err = command(*line, "--dims", 1, "--points", 3, "--out", tmp_path / f"{told}")
        assert code == 0, err
        note = f"note: the profile was measured on other weights (model) than those of {model}"
        assert (note in " ".join(out.split())) == told


def test_a_plane_by_default_make_left_out(command, folder, tmp_path):
    line = f"{BASE} --points 3 --vectors moved --normalise tensor --keep-directions --seed 5"
    code, _, err = command(*line.split(), "--out", tmp_path / "plane", "--plot", tmp_path / "plane.png")
    assert code == 0, err
    made = Landscape.from_pretrained(tmp_path / "plane", directions=True)
    assert made.surface().shape == (3, 3)
    assert made.directions["vectors"] == "moved"
    assert made.kept.keys() == {(5, 0), (5, 1)}
    assert (tmp_path / "plane.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "plane.checkpoint").exists()


def test_toward_a_model_and_along_the_hessian(command, folder, tmp_path):
    save_tiny_bert(tmp_path / "other", initializer_range=0.05)
    code, _, err = command(
        *BASE.split(), "--to", tmp_path / "other", "--dims", 1, "--points", 3, "--out", tmp_path / "t"
    )
    assert code == 0, err
    assert Landscape.from_pretrained(tmp_path / "t").directions["kind"] == "toward"
    code, _, err = command(
        *f"{BASE} --direction hessian --dims 1 --points 3 --radius 0.1 --out".split(), tmp_path / "h"
    )
    assert code == 0, err
    made = Landscape.from_pretrained(tmp_path / "h", directions=True)
    assert made.kept[0, 0].norm == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--points 16", "16 points along an axis; expected an odd number, so that the origin is one of them: 15 or 17"),
        ("--mask top:0.5", "mask top:0.5 without a Fisher profile; expected one of this model: give --profile"),
        ("--mask half", "unknown mask 'half'"),
        ("--dims 1 --html a.html", "an interactive page of a line; expected a plane"),
        ("--plot a.jpg", "expected a name that ends in .png, .svg or .pdf"),
        ("--seeds 0", "--seeds 0; expected at least 1"),
        ("--level nan", "level nan; expected a number of nats above 0"),
        ("--level -1", "level -1; expected a number of nats above 0"),
        ("--radius 1e-12", "radius 1e-12; expected a number above 0 and at most 1e+06, 1e-06 at least"),
        ("--direction uphill", "unknown directions 'uphill'"),
        ("--direction hessian --to model", "--direction hessian with --to, which is a direction itself"),
        ("--task cola", "--text text.txt, --task cola"),
        ("--mask-level layer", "unknown mask level 'layer'"),
        ("--dtype int8", "unknown --dtype 'int8'"),
    ],
)
def test_mistakes_are_one_line(options, message, command, tmp_path):
    code, _, err = command(*BASE.split(), "--out", tmp_path / "new", *options.split())
    assert code == 2
    assert message in " ".join(err.split())
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_finished_is_not_measured_again(command, tmp_path):
    line, file = [*BASE.split(), "--points", 3, "--out", tmp_path / "new"], tmp_path / "new" / "landscape.json"
    assert command(*line)[0] == 0
    written = file.read_bytes()
    code, out, err = command(*line, "--resume")
    assert code == 0, err
    assert "nothing was measured" in out
    refused = {("--seeds", 2): "seeds was [0], is [0, 1]", ("--keep-directions",): "keep_directions was false"}
    for change, told in refused.items():
        code, _, err = command(*line, *change, "--resume")
        assert code == 2
        assert told in err
    assert file.read_bytes() == written
    assert command(*line, "--seeds", 2, "--no-resume")[0] == 0
    assert len(Landscape.from_pretrained(tmp_path / "new").seeds) == 2


def test_an_interrupted_run_says_how_to_go_on(command, tmp_path, monkeypatch):
    line, state = [*BASE.split(), "--points", 3, "--out", tmp_path / "new"], tmp_path / "new.checkpoint"

    def signalled(*args, progress, **options):
        def signal_first(*done):
            os.kill(os.getpid(), signal.SIGINT)
            progress(*done)

        return loss_landscape(*args, progress=signal_first, **options)

    with monkeypatch.context() as patch:
        patch.setattr(landscape, "loss_landscape", signalled)
        code, _, err = command(*line)
    assert code == 2
    assert err == (
        f"error: interrupted; the state is in {state}: run the same command with --resume to go on from there\n"
    )
    code, _, err = command(*line)
    assert code == 2
    assert "holds the state of an unfinished run (1 points)" in err
    code, _, err = command(*line, "--resume")
    assert code == 0, err
    assert not state.exists()


def make(folder, out):
    sys.stdout = sys.stderr = open(folder / f"{out.name}.log", "a")  # noqa: SIM115
    record.WRITE_EVERY = 0.0
    with contextlib.chdir(folder):
        line = f"{BASE} --points 9 --mask all --mask random:0.5 --resume --out {out}"
        sys.argv = ["guided-dropout", *line.split()]
        cli.main()


def test_killed_again_and_again_a_run_ends_with_the_same_landscape(folder, tmp_path):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["guided_dropout.landscape", "guided_dropout.models", "test_cli_landscape"])
    state, kills = tmp_path / "killed.checkpoint", 0
    whole = processes.Process(target=make, args=(folder, tmp_path / "whole"))
    whole.start()
    while True:
        process = processes.Process(target=make, args=(folder, tmp_path / "killed"))
        process.start()
        if kills < 3:
            written = state_times(state)
            end = time.monotonic() + 60
            while process.is_alive() and state_times(state) == written and time.monotonic() < end:
                time.sleep(0.01)
        else:
            process.join(120)
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    whole.join(120)
    log = (folder / "killed.log").read_text()
    assert (whole.exitcode, process.exitcode) == (0, 0), log
    assert kills == 3
    a, b = (Landscape.from_pretrained(tmp_path / name) for name in ("killed", "whole"))
    assert (a.losses == b.losses).all()
    assert (a.lengths == b.lengths).all()
    assert not record.holds_points(state)


def state_times(state: Path):
    return sorted(f.stat().st_mtime_ns for f in state.glob("points-*")) if state.exists() else []


def test_two_processes_share_a_grid(folder, command, tmp_path):
    line = f"{BASE} --points 5 --seeds 2 --mask all --mask random:0.5"
    done = subprocess.run(
        [*TORCHRUN, "-m", "guided_dropout", *line.split(), "--out", str(tmp_path / "two")],
        cwd=folder, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("samples (mlm)") == 1
    code, _, err = command(*line.split(), "--out", tmp_path / "one")
    assert code == 0, err
    one, two = (Landscape.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert two.provenance["processes"] == 2
    assert two.losses == pytest.approx(one.losses, rel=1e-6)
    assert (two.lengths == one.lengths).all()
    assert (two.moved == one.moved).all()
    assert np.isfinite(two.losses).all()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["one", "two"]
