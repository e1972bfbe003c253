"""Several processes give what one gives, and an error in one ends all; models that are not on one device."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from families import language_model
from processes_script import BAD, RANDOM, RULES, SAMPLES, draw_samples, found, ranked, told, with_nan
from test_cli import exit_code
from tiny import WORDS, save_tiny_bert

from guided_dropout import FisherProfile, estimate_fisher
from guided_dropout.errors import ModelError
from guided_dropout.fisher.processes import ProcessError, Processes, current_processes

HERE = Path(__file__).parent
WITHOUT_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]


def launch(launcher, *args, folder):
    """On CPUs, also where there are GPUs."""
    return subprocess.run(
        [*launcher, *map(str, args)], cwd=folder, env=WITHOUT_GPU, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip


def close(means):
    """To 1e-6; what is zero but for rounding is not compared."""
    return pytest.approx(means, rel=1e-6, abs=1e-11 * max(means.values()))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(what each of two processes reported, their stderr)."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(TORCHRUN, HERE / "processes_script.py", folder, folder=folder)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"report-{i}.json").read_text()) for i in range(2)], done.stderr


def test_two_processes_give_the_profile_of_one(two):
    model = language_model("gpt2")
    expected = estimate_fisher(model, SAMPLES, batch_size=2)
    for index, report in enumerate(two[0]):
        assert (report["index"], report["count"], report["device"]) == (index, 2, "cpu")
        assert report["num"] == [len(SAMPLES), 1]
        assert report["means"] == close(expected.tensor_means)
        assert report["one"] == close(estimate_fisher(model, SAMPLES[:1]).tensor_means)


def test_an_error_in_one_ends_all_with_its_message(two):
    main, second = two[0]
    assert second["nan"].startswith("NotFiniteError the loss of sample 1 (from 0) is nan")
    assert main["nan"].startswith("ProcessError process 1 of 2: the loss of sample 1 (from 0) is nan")
    assert main["skipped"] == second["skipped"] == [59, [1]]
    for report in two[0]:
        assert "process 1 works on something else than process 0: weights was" in report["other"]
    assert (main["stopped"], second["stopped"]) == (
        "ProcessError process 1 of 2: RuntimeError stopped",
        "RuntimeError stopped",
    )


def test_each_process_goes_on_from_its_own_state(two):
    expected = estimate_fisher(language_model("gpt2"), SAMPLES * 4).tensor_means
    for report in two[0]:
        assert report["files"] == ["process-1-of-2.safetensors", "process-2-of-2.safetensors"]
        assert report["seen"] >= 4
        assert report["resumed"] == close(expected)


def alike(reported):
    """What `found` gives, to compare with: the ranking as it is, means to 1e-6."""
    return {**reported, "means": close(reported["means"])}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_stops_two_processes_where_it_stops_one(two, rule):
    expected = found(ranked(language_model("bert"), rule))
    assert expected["ranking"]["settled"] == (rule != "never")
    if expected["ranking"]["settled"]:
        batch_size = RULES[rule][2]["batch_size"]
        assert expected["num"][0] // batch_size % 2  # there is something to take back
        assert expected["num"][0] < len(RANDOM) / 2
    assert expected["noise"]
    for report in two[0]:
        assert report["rules"][rule] == alike(expected)


def test_a_rule_is_told_the_samples_of_all_processes_in_their_order(two):
    expected = told(language_model("bert"))
    assert len({f"{value:.4g}" for value in expected}) > 90
    for report in two[0]:
        assert report["told"] == pytest.approx(expected, rel=1e-5)


def test_a_rule_goes_on_where_each_process_stopped(two):
    expected = found(ranked(language_model("bert"), "ranked"))
    main, second = two[0]
    stopped, elsewhere = "RuntimeError stopped", "ProcessError process {} of 2: RuntimeError stopped"
    assert main["ranked_stops"] == [elsewhere.format(1), stopped, elsewhere.format(1), stopped]
    assert second["ranked_stops"] == [stopped, elsewhere.format(0), stopped, elsewhere.format(0)]
    assert main["ranked_resumed"] == second["ranked_resumed"] == alike(expected)


@pytest.mark.parametrize("what", ["ranked_lost", "ranked_settled"])
def test_a_rule_goes_on_where_one_state_is_lost_or_settled(two, what):
    expected = found(ranked(language_model("bert"), "ranked"))
    for report in two[0]:
        assert report[what] == alike(expected)


def test_an_error_ends_all_that_a_rule_would_stop(two):
    main, second = two[0]
    assert second["ranked_nan"].startswith("NotFiniteError the loss of sample 7 (from 0) is nan")
    assert main["ranked_nan"].startswith("ProcessError process 1 of 2: the loss of sample 7 (from 0) is nan")
    bad = [*RANDOM]
    bad[7] = BAD
    expected = found(ranked(with_nan(language_model("llama")), "ranked", bad, nonfinite="skip"))
    assert expected["nonfinite"] == [7]
    assert main["ranked_skipped"] == second["ranked_skipped"] == alike(expected)


def test_only_the_main_process_prints(two):
    reports, stderr = two
    assert [report["cli"] for report in reports] == ["SystemExit 2"] * 2
    assert stderr.count("cannot read the text nowhere.txt") == 1


def test_the_command_runs_under_accelerate(tmp_path, monkeypatch, capsys):
    save_tiny_bert(tmp_path / "model")
    lines = [" ".join(WORDS[(i * i + 3 * j + i) % 17] for j in range(12)) for i in range(90)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    options = "--text text.txt --samples 60 --max-length 12 --batch-size 4 --device cpu --out"
    line = ["fisher", "model", *options.split()]
    done = launch(ACCELERATE, "-m", "guided_dropout", *line, "two", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("samples (mlm)") == 1
    assert exit_code(tmp_path, *line, "one", monkeypatch=monkeypatch) == 0, capsys.readouterr().err
    one, both = FisherProfile.from_pretrained(tmp_path / "one"), FisherProfile.from_pretrained(tmp_path / "two")
    assert (both.num_samples, both.num_skipped) == (one.num_samples, one.num_skipped)
    assert both.tensor_means == close(one.tensor_means)
    assert (one.provenance["processes"], both.provenance["processes"]) == (1, 2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model", "one", "text.txt", "two"]


def test_a_ranked_command_that_is_killed_goes_on_under_accelerate(tmp_path, monkeypatch, capsys):
    """All processes are killed with SIGKILL, whatever they do; the command with --resume ends as one process does."""
    save_tiny_bert(tmp_path / "model")
    rng = random.Random(3)
    lines = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(6, 14))) for _ in range(500)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    options = (
        "--text text.txt --samples 300 --max-length 12 --batch-size 4 --device cpu --until-stable --stable-tau 0.3"
    )
    line = ["fisher", "model", *options.split(), "--resume", "--checkpoint-every", "0", "--out"]
    command = [*ACCELERATE, "-m", "guided_dropout", *line, "two"]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, cwd=tmp_path, env=WITHOUT_GPU, stdout=log, stderr=log) as first,
    ):
        seen, end = set(), time.monotonic() + 200
        while len(seen) < 9 and first.poll() is None and time.monotonic() < end:
            for file in (tmp_path / "two.checkpoint").glob("process-*"):
                with contextlib.suppress(FileNotFoundError):
                    seen.add(file.stat().st_mtime_ns)
            time.sleep(0.002)
        started = psutil.Process(first.pid).children(recursive=True)
        for process in [*started, first]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
    assert len(seen) >= 9, (tmp_path / "log").read_text()
    assert not (tmp_path / "two").exists()
    done = launch(ACCELERATE, "-m", "guided_dropout", *line, "two", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert exit_code(tmp_path, *line, "one", monkeypatch=monkeypatch) == 0, capsys.readouterr().err
    one, both = (found(FisherProfile.from_pretrained(tmp_path / out)) for out in ("one", "two"))
    assert one["ranking"]["settled"]
    assert one["num"][0] < 300
    assert both == alike(one)
    assert f"stable after {one['num'][0]} samples" in done.stdout.replace("\n", " ")
    assert not (tmp_path / "two.checkpoint").exists()


def test_a_launcher_that_starts_one_process_of_several_is_told(monkeypatch):
    for name, value in {"MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"started one process of several; .*use `torchrun"):
        estimate_fisher(language_model("bert"), SAMPLES, distributed=True)


@pytest.fixture
def gpus(monkeypatch):
    """A launcher's environment of the second of three processes, and as many GPUs as are asked for."""
    for name, value in {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)

    def there_are(number):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)

    return there_are


def test_more_processes_than_gpus_are_refused(gpus):
    gpus(2)
    with pytest.raises(ProcessError, match="3 processes were started where there are 2 GPUs; expected one") as told:
        current_processes()
    assert told.value.told_elsewhere  # the first of them prints it


class Joined:
    """In accelerate's place: takes the backends that it is made with, and keeps what it was asked for."""

    taken, asked = ("cuda:nccl,cpu:gloo", None), []
    process_index, num_processes, device = 1, 3, torch.device("cuda", 1)

    def __init__(self, backend=None):
        assert not self.asked or self.asked[-1] == "reset"
        self.asked.append(backend)
        if backend not in self.taken:
            raise ValueError(f"Your assigned backend {backend} is not available, please use nccl")

    @classmethod
    def _reset_state(cls):
        cls.asked.append("reset")


@pytest.mark.parametrize(
    ("taken", "asked"),
    [
        (Joined.taken, ["cuda:nccl,cpu:gloo"]),
        ((None,), ["cuda:nccl,cpu:gloo", "reset", None]),  # an older accelerate
    ],
)
def test_on_gpus_processes_meet_through_their_cpus(taken, asked, gpus, monkeypatch):
    gpus(3)
    kind = type("Joined", (Joined,), {"taken": taken, "asked": []})
    monkeypatch.setattr("accelerate.PartialState", kind)
    assert current_processes() == Processes(1, 3, torch.device("cuda", 1))
    assert kind.asked == asked


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_model_that_is_spread_by_hooks_is_exact(family):
    """The hooks that accelerate puts on a model of several devices, here all the CPU."""
    samples = draw_samples([9, 5, 7])
    expected = estimate_fisher(language_model(family).double(), samples, method="reference")
    model = language_model(family).double()
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    found = estimate_fisher(model, samples, batch_size=2)
    assert found.tensor_means == pytest.approx(expected.tensor_means, rel=1e-9, abs=1e-16)


@pytest.mark.parametrize("how", ["cpu", "disk", "partly"])
def test_an_offloaded_model_is_refused(how, tmp_path):
    model = language_model("gpt2")
    if how == "cpu":
        cpu_offload(model, torch.device("cpu"))
    elif how == "disk":
        disk_offload(model, tmp_path, torch.device("cpu"))
    else:
        parts = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h": "disk", "transformer.ln_f": "cpu"}
        dispatch_model(model, {**parts, "lm_head": "cpu"}, main_device="cpu", offload_dir=str(tmp_path))
    with pytest.raises(ModelError, match=r"of the \d+ parameters of GPT2LMHeadModel are offloaded .*expected all"):
        estimate_fisher(model, SAMPLES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device cpu --device-map auto", "--device cpu and --device-map auto; expected one of them"),
        ("--device nowhere", "cannot put the model on device nowhere"),
        ("--device-map nowhere", "cannot load demo"),
    ],
)
def test_devices_that_are_not_there_are_told(options, message, tmp_path, monkeypatch, capsys):
    line = f"fisher demo --text demo --samples 2 --out {tmp_path / 'new'} {options}"
    assert exit_code(tmp_path, *line.split(), monkeypatch=monkeypatch) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_device_map_auto_is_the_whole_model_where_it_fits(tmp_path, monkeypatch, capsys):
    save_tiny_bert(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sees the dog and the red bird likes a tree\n" * 9)
    means = []
    for options in ("--device-map auto", "--device cpu"):  # in float64, since the first may be a GPU
        line = (
            f"fisher {tmp_path}/model --text {tmp_path}/text.txt --max-length 12 --samples 5 --dtype float64 {options}"
        )
        code = exit_code(tmp_path, *line.split(), "--out", tmp_path / options, monkeypatch=monkeypatch)
        assert code == 0, capsys.readouterr().err
        means.append(FisherProfile.from_pretrained(tmp_path / options).tensor_means)
    assert means[0] == close(means[1])
