"""A run that was stopped, whatever stopped it, goes on to the profile of one that was not."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import language_model
from tiny import WORDS, save_tiny_bert

from guided_dropout import FisherProfile, estimate_fisher, find_sites
from guided_dropout.errors import ArtefactError
from guided_dropout.fisher.checkpoint import holds_state, remove_checkpoint
from guided_dropout.fisher.kernels import backend
from guided_dropout.fisher.ranking import RankingTest


def draw_samples(lengths, *, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": (ids := torch.randint(5, 64, (n,), generator=g)), "labels": ids} for n in lengths]


SAMPLES = draw_samples([9, 4, 7, 12, 5, 5, 8, 3, 11, 6, 6, 10, 4, 9, 7])


class StopError(Exception):
    pass


def stopped_after(number):
    def progress(done):
        if done >= number:
            raise StopError

    return progress


def assert_same(found, expected):
    """To 1e-6 of each tensor; one whose true value is zero holds nothing but rounding noise, squared."""
    assert (found.num_samples, found.num_skipped) == (expected.num_samples, expected.num_skipped)
    largest = max(expected.tensor_means.values())
    assert found.tensor_means == pytest.approx(expected.tensor_means, rel=1e-6, abs=1e-11 * largest)
    assert found.diagonal.keys() == expected.diagonal.keys()
    largest = max((t.norm() for t in expected.diagonal.values()), default=0)
    for name, want in expected.diagonal.items():
        assert (found.diagonal[name] - want).norm() <= 1e-6 * want.norm() + 1e-11 * largest, name


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2")


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 2},
        {"tokens_per_batch": 25},
        {"batch_size": 3, "method": "reference"},
        {"nonfinite": "skip"},
        {"scores_only": True},
        {"scores_only": True, "method": "reference"},
    ],
    ids=str,
)
def test_stopped_twice_and_resumed_is_as_if_never_stopped(model, tmp_path, options):
    blank = {"input_ids": [5, 6], "labels": [-100, -100]}
    samples = [*SAMPLES, blank, *draw_samples([6] * 9, seed=1)]
    kept = {"checkpoint": tmp_path / "c", "resume": True, **options}
    for number in (1, 14):
        with pytest.raises(StopError):
            estimate_fisher(model, iter(samples), progress=stopped_after(number), **kept)
        assert holds_state(tmp_path / "c")
    seen = []
    profile = estimate_fisher(model, iter(samples), progress=seen.append, **kept)
    assert seen[0] >= 14  # the number that was done when it was stopped
    assert len(seen) > 1
    assert_same(profile, estimate_fisher(model, samples, **options))
    (tmp_path / "c" / ".tmpa1B2c3").touch()  # what safetensors leaves behind when it is killed
    remove_checkpoint(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_ranked_run_is_resumed_without_its_noise(tmp_path):
    """Which the state names: what is left out is known before the first batch after it."""
    model = language_model("bert")
    samples = draw_samples([9, 5, 7, 12] * 60)
    sites = {s.path: s.parameters for s in find_sites(model) if not s.in_head}

    def run(**options):
        test = RankingTest(sites, tolerance=3.0)
        return estimate_fisher(model, samples, batch_size=10, scores_only=True, until_ranked=test, **options)

    with pytest.raises(StopError):
        run(checkpoint=tmp_path / "c", progress=stopped_after(60))
    found, expected = run(checkpoint=tmp_path / "c", resume=True), run()
    assert found.noise
    assert 100 <= found.num_samples < len(samples)
    assert found.provenance["ranking"] == expected.provenance["ranking"]
    assert_same(found, expected)


def test_a_long_run_is_resumed_with_its_float64_sums(model, tmp_path):
    samples = draw_samples([3] * 30) * 50
    with pytest.raises(StopError):
        estimate_fisher(model, samples, batch_size=100, checkpoint=tmp_path / "c", progress=stopped_after(1200))
    profile = estimate_fisher(model, samples, batch_size=100, checkpoint=tmp_path / "c", resume=True)
    assert_same(profile, estimate_fisher(model, samples, batch_size=100))


def test_what_was_left_out_before_is_still_told_after(tmp_path):
    model = language_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[63] = float("nan")
        model.lm_head.weight[63] = 0
    samples = [{k: v.clamp(max=62) for k, v in s.items()} for s in SAMPLES]
    samples[3]["input_ids"] = torch.tensor([5, 63, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5])
    samples[3]["labels"] = torch.full((12,), 5)
    kept = {"checkpoint": tmp_path / "c", "batch_size": 2, "nonfinite": "skip"}
    with pytest.raises(StopError):
        estimate_fisher(model, samples, progress=stopped_after(4), **kept)
    profile = estimate_fisher(model, samples, resume=True, **kept)
    assert profile.coverage["nonfinite"] == [3]
    assert profile.num_samples == 14


def test_a_profile_names_the_kernel_and_all_of_them_where_the_run_went_on_with_another(model, tmp_path, monkeypatch):
    here = backend(torch.device("cpu"), torch.float32)
    assert estimate_fisher(model, SAMPLES).provenance["kernel"] == here
    kept = {"batch_size": 2, "checkpoint": tmp_path / "c"}
    with monkeypatch.context() as patch:
        patch.setenv("GUIDED_DROPOUT_KERNEL", "off")
        assert estimate_fisher(model, SAMPLES).provenance["kernel"] == "torch"
        with pytest.raises(StopError):
            estimate_fisher(model, SAMPLES, progress=stopped_after(6), **kept)
    profile = estimate_fisher(model, SAMPLES, resume=True, **kept)
    assert profile.provenance["kernel"] == ", ".join(sorted({here, "torch"}))
    assert estimate_fisher(model, SAMPLES, method="reference").provenance["kernel"] == "torch"


@pytest.fixture
def stopped(model, tmp_path):
    """A function that goes on with a run of seed 1, with changes."""
    given = {"batch_size": 2, "facts": {"seed": 1, "text": "a.txt"}, "checkpoint": tmp_path / "c"}
    with pytest.raises(StopError):
        estimate_fisher(model, SAMPLES, progress=stopped_after(6), **given)

    def again(model=model, samples=SAMPLES, **changes):
        return estimate_fisher(model, samples, **{**given, "resume": True, **changes})

    return again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"facts": {"seed": 2, "text": "a.txt"}}, "of another run: seed was 1, is 2; expected the same"),
        ({"facts": {"seed": 1, "text": "b.txt"}}, 'text was "a.txt", is "b.txt"'),
        ({"facts": {"seed": 1}}, 'text was "a.txt", is not given'),
        ({"batch_size": 4}, "batch_size was 2, is 4"),
        ({"tokens_per_batch": 50}, "batch_size was 2, is null; tokens_per_batch was null, is 50"),
        ({"reduction": "sum"}, 'reduction was "mean", is "sum"'),
        ({"method": "reference"}, 'method was "batched", is "reference"'),
        ({"samples": SAMPLES[::-1]}, "the first 6 samples .* are not the 6 that the checkpoint was made from"),
        ({"samples": SAMPLES[:3]}, "the first 3 samples .* are not the 6 that"),
    ],
)
def test_another_run_is_refused_and_both_sides_are_shown(stopped, changes, message):
    with pytest.raises(ArtefactError, match=message):
        stopped(**changes)
    assert_same(stopped(), stopped(resume=False))  # it was not touched


def test_another_commit_of_the_hub_with_the_same_weights_goes_on_and_is_recorded(stopped, model):
    copy = language_model("gpt2")
    copy.config._commit_hash = "c0ffee"
    profile = stopped(model=copy)
    assert profile.model["revision"] == "c0ffee"
    assert_same(profile, stopped(resume=False))
    assert "revision" not in estimate_fisher(model, SAMPLES).model


def test_other_weights_and_another_model_are_refused(stopped):
    with pytest.raises(ArtefactError, match=r'weights was "[0-9a-f]{32}", is "[0-9a-f]{32}"'):
        stopped(model=language_model("gpt2", seed=3))
    with pytest.raises(ArtefactError, match=r'model.architecture was "GPT2LMHeadModel", is "BertForMaskedLM"'):
        stopped(model=language_model("bert"))


@pytest.mark.parametrize("choice", ["trainable", lambda _, p: p.requires_grad])
def test_other_weights_beneath_those_that_are_measured_are_refused(tmp_path, choice):
    model = language_model("bert").requires_grad_(False)
    model.register_buffer("packed", torch.arange(8, dtype=torch.int8))  # as quantised weights may be kept
    model.bert.embeddings.LayerNorm.requires_grad_(True)
    given = {"parameters": choice, "batch_size": 2, "checkpoint": tmp_path / "c"}
    with pytest.raises(StopError):
        estimate_fisher(model, SAMPLES, progress=stopped_after(6), **given)
    beneath = [model.bert.encoder.layer[0].output.dense.weight, model.get_buffer("packed")]
    for weight in beneath:
        with torch.no_grad():
            weight.add_(1)
        with pytest.raises(ArtefactError, match=r'of another run: weights was "[0-9a-f]{32}", is "[0-9a-f]{32}"'):
            estimate_fisher(model, SAMPLES, resume=True, **given)
        with torch.no_grad():
            weight.sub_(1)
    model.bert.embeddings.LayerNorm.requires_grad_(False)
    model.bert.encoder.layer[0].output.LayerNorm.requires_grad_(True)
    with pytest.raises(ArtefactError, match="of another run: weights was"):
        estimate_fisher(model, SAMPLES, resume=True, **given)


def test_a_state_is_neither_used_nor_lost_unless_that_is_asked_for(model, stopped, tmp_path):
    with pytest.raises(
        ArtefactError, match=r"unfinished run \(6 samples\); .*--resume to go on .*--no-resume to start"
    ):
        stopped(resume=None)
    seen = []
    afresh = stopped(resume=False, progress=seen.append)
    assert seen[0] == 2
    assert_same(afresh, estimate_fisher(model, SAMPLES, batch_size=2))
    assert not holds_state(tmp_path / "c")
    stopped(resume=True)  # begins where there is nothing to go on from


def test_a_damaged_file_is_told(stopped, tmp_path):
    (file,) = (tmp_path / "c").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtefactError, match=r"is not a whole .*--no-resume"):
        stopped()
    assert stopped(resume=False).num_samples == len(SAMPLES)


def test_it_is_written_as_often_as_asked(model, tmp_path):
    files = set()

    def progress(_):
        files.update(f.stat().st_ino for f in (tmp_path / "c").glob("*"))

    kept = {"batch_size": 5, "checkpoint": tmp_path / "c", "progress": progress}
    estimate_fisher(model, SAMPLES, checkpoint_every=3600, **kept)
    assert not files
    estimate_fisher(model, SAMPLES, checkpoint_every=0, **kept)
    assert len(files) >= 2


def test_killed_again_and_again_a_run_still_ends_with_the_same_profile(tmp_path):
    """SIGKILL at random points, before the first state is written, while one is written, between two."""
    save_tiny_bert(tmp_path / "model")
    lines = [" ".join(WORDS[(i * i + 3 * j + i) % 17] for j in range(3 + i % 9)) for i in range(600)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    script = Path(__file__).with_name("kill_script.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, check=False, timeout=300
    )  # fmt: skip
    logs = "\n".join(f"--- {f.name}\n{f.read_text()}" for f in sorted(tmp_path.glob("*.log")))
    told = f"exit code {done.returncode}\n{done.stdout}{done.stderr}\n{logs}"
    assert done.returncode == 0, told
    codes = json.loads(done.stdout)
    *killed, last = codes["killed"]
    assert (codes["whole"], last) == (0, 0), told
    assert set(killed) == {-signal.SIGKILL}, told
    assert len(killed) >= 3, told
    assert_same(FisherProfile.from_pretrained(tmp_path / "killed"), FisherProfile.from_pretrained(tmp_path / "whole"))
    assert not (tmp_path / "killed.checkpoint").exists()
