"""A profile comes back as it was saved, says what is wrong with a damaged one, and ranks no noise."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import language_model, profile_of
from toy_profile import NAMES, assert_same, profile

from guided_dropout import DropoutSchedule, FisherProfile, find_sites
from guided_dropout.errors import ArtefactError, DataError, ScheduleError
from guided_dropout.fisher import merge
from guided_dropout.fisher.facts import check_facts
from guided_dropout.fisher.spectrum import spectrum
from guided_dropout.schedule import site_scores


def test_comes_back_as_it_was(tmp_path):
    p = profile(noise=["a.bias"])
    assert_same(FisherProfile.from_pretrained(p.save_pretrained(tmp_path / "p")), p)


def test_tensor_means_alone(tmp_path):
    p = replace(profile(), diagonal={})
    folder = p.save_pretrained(tmp_path / "p")
    assert sorted(f.name for f in folder.iterdir()) == ["README.md", "profile.json"]
    back = FisherProfile.from_pretrained(folder)
    assert_same(back, p)
    assert back.shapes == NAMES
    rows = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert rows == [line for line in profile().card().splitlines() if line.startswith("| `")]
    assert "no value per parameter" in back.card()


def test_a_profile_of_means_replaces_one_of_values(tmp_path):
    profile().save_pretrained(tmp_path / "p")
    replace(profile(), diagonal={}).save_pretrained(tmp_path / "p")
    assert not (tmp_path / "p" / "fisher.safetensors").exists()


def test_what_needs_values_says_that_there_are_none():
    p = replace(profile(), diagonal={})
    for use in (lambda: p.topk(0.1), lambda: spectrum(p)):
        with pytest.raises(ArtefactError, match=r"profile of someone/toy holds tensor means only.*--scores-only"):
            use()


def test_means_need_shapes_and_noise_needs_a_tensor():
    with pytest.raises(ArtefactError, match=r"shapes and tensor means differ in a\.bias"):
        profile(diagonal={}, shapes={"a.weight": (3, 2), "b.weight": (5,)})
    means = profile().tensor_means
    with pytest.raises(ArtefactError, match=r"shapes and tensor means differ in b\.weight"):
        profile(tensor_means={name: means[name] for name in ("a.weight", "a.bias")})
    with pytest.raises(ArtefactError, match=r"names c\.bias as noise but holds no such tensor"):
        profile(noise=["c.bias"])
    with pytest.raises(ArtefactError, match="a profile of 0 samples; expected at least 1"):
        profile(num_samples=0)


def test_bfloat16_halves_the_file_and_is_off_by_less_than_it_says(tmp_path):
    values = torch.exp(60 * torch.rand(20_000, generator=torch.Generator().manual_seed(1)) - 80)
    p = profile(diagonal={"w": values}, tensor_means={"w": values.double().mean().item()})
    files = [p.save_pretrained(tmp_path / str(d), dtype=d) / "fisher.safetensors" for d in ("float32", "bfloat16")]
    whole, half = (f.stat().st_size for f in files)
    assert half == pytest.approx(whole / 2, rel=0.01)
    back = FisherProfile.from_pretrained(files[1].parent)
    off = (back.diagonal["w"].double() / values.double() - 1).abs().max().item()
    assert 0.002 < off < 0.004
    assert back.tensor_means == p.tensor_means
    assert "bfloat16: each is off by at most 0.4 %" in back.card()
    assert "bfloat16" not in p.card()
    again = back.save_pretrained(tmp_path / "again")
    assert torch.equal(FisherProfile.from_pretrained(again).diagonal["w"], back.diagonal["w"])


def test_a_dtype_of_torch_is_taken(tmp_path):
    folder = profile().save_pretrained(tmp_path / "p", dtype=torch.bfloat16)
    assert {t.dtype for t in FisherProfile.from_pretrained(folder).diagonal.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("float16", "float16 cannot hold Fisher values.*bfloat16"),
        ("bfloat17", "did you mean 'bfloat16'"),
        (torch.float16, "float16 cannot hold Fisher values.*bfloat16"),
        (torch.float64, "unknown dtype 'float64'"),
        (16, "a int for a dtype; expected its name, one of: float32, bfloat16"),
    ],
)
def test_other_dtypes_are_refused(tmp_path, dtype, message):
    with pytest.raises(DataError, match=message):
        profile().save_pretrained(tmp_path / "p", dtype=dtype)
    assert not (tmp_path / "p").exists()


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_one_changed_bit_is_seen_unless_told_not_to_look(tmp_path):
    folder = profile().save_pretrained(tmp_path / "p")
    flip(folder / "fisher.safetensors")
    with pytest.raises(ArtefactError, match=r"fisher\.safetensors is damaged or another profile's: its sha256"):
        FisherProfile.from_pretrained(folder)
    assert list(FisherProfile.from_pretrained(folder, verify=False).diagonal) == list(NAMES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mean_that_is_not_that_of_its_values_is_seen_unless_told_not_to_look(tmp_path, dtype):
    folder = profile().save_pretrained(tmp_path / "p", dtype=dtype)
    facts = json.loads((folder / "profile.json").read_text())
    facts["tensor_means"]["b.weight"] *= 1.1
    (folder / "profile.json").write_text(json.dumps(facts))
    with pytest.raises(ArtefactError, match=r"profile\.json has .* for the mean of b\.weight; expected .*: copy or"):
        FisherProfile.from_pretrained(folder)
    assert FisherProfile.from_pretrained(folder, verify=False).tensor_means == facts["tensor_means"]


def test_rounded_and_merged_profiles_have_the_means_of_their_values(tmp_path):
    parts = [profile(seed, diagonal=profile(seed).diagonal | {"a.bias": torch.zeros(2)}) for seed in range(4)]
    parts = [replace(p, tensor_means=p.tensor_means | {"a.bias": 1e-60}) for p in parts]  # too small for float32
    merged = parts[0]
    for number, part in enumerate(parts[1:3]):
        folder = merge(merged, part).save_pretrained(tmp_path / str(number), dtype="bfloat16")
        merged = FisherProfile.from_pretrained(folder)
    folder = merge(merged, parts[3]).save_pretrained(tmp_path / "p", dtype="float32")
    assert FisherProfile.from_pretrained(folder).num_samples == 34


def test_a_swapped_file_is_seen(tmp_path):
    folder, other = profile().save_pretrained(tmp_path / "p"), profile(1).save_pretrained(tmp_path / "q")
    shutil.copy(other / "fisher.safetensors", folder)
    with pytest.raises(ArtefactError, match="damaged or another profile's"):
        FisherProfile.from_pretrained(folder)


def test_a_truncated_file_is_seen_even_unverified(tmp_path):
    folder = profile().save_pretrained(tmp_path / "p")
    file = folder / "fisher.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ArtefactError, match="not a whole safetensors file"):
        FisherProfile.from_pretrained(folder, verify=False)


def test_missing_facts_and_former_schemas_are_named(tmp_path):
    folder = profile().save_pretrained(tmp_path / "p")
    facts = json.loads((folder / "profile.json").read_text())
    for change, message in (({"noise": None}, "has no 'noise'"), ({"schema": 1}, "schema version 1; .* reads 2")):
        changed = {k: v for k, v in {**facts, **change}.items() if v is not None}
        (folder / "profile.json").write_text(json.dumps(changed))
        with pytest.raises(ArtefactError, match=message):
            FisherProfile.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("values", {}, "a dict for 'values'"),
        ("values", {"file": "fisher.safetensors"}, "a dict for 'values'"),
        ("values", {"sha256": 3}, "a dict for 'values'"),
        ("shapes", None, "None for 'shapes'"),
        ("shapes", {"a.weight": 3}, "a dict for 'shapes'"),
        ("noise", None, "None for 'noise'"),
        ("noise", "a.bias", "'a.bias' for 'noise'"),
        ("tensor_means", [1], "a list for 'tensor_means'"),
        ("tensor_means", {"a.weight": "1"}, "a dict for 'tensor_means'"),
        ("tensor_means", {"a.weight": -0.5}, "a dict for 'tensor_means'"),
        ("num_samples", "8", "'8' for 'num_samples'"),
        ("num_samples", -8, "-8 for 'num_samples'"),
        ("num_samples", 0, "0 for 'num_samples'"),
        ("num_skipped", True, "True for 'num_skipped'"),
        ("labels", "none", "'none' for 'labels'"),
        ("model", [], "a list for 'model'"),
        ("provenance", "x", "'x' for 'provenance'"),
    ],
)
def test_facts_of_another_form_are_named(tmp_path, name, value, found):
    folder = profile().save_pretrained(tmp_path / "p")
    facts = json.loads((folder / "profile.json").read_text())
    (folder / "profile.json").write_text(json.dumps({**facts, name: value}))
    with pytest.raises(
        ArtefactError, match=rf"profile\.json has {re.escape(found)}; expected .*: copy or make it again"
    ):
        FisherProfile.from_pretrained(folder)


@pytest.mark.parametrize(
    ("without", "message"), [("tensor_means", "shape but no mean"), ("shapes", "mean but no shape")]
)
def test_a_tensor_that_is_missing_from_the_facts_is_named(tmp_path, without, message):
    folder = profile().save_pretrained(tmp_path / "p")
    facts = json.loads((folder / "profile.json").read_text())
    del facts[without]["a.bias"]
    (folder / "profile.json").write_text(json.dumps(facts))
    with pytest.raises(ArtefactError, match=rf"profile\.json has a {message} of a\.bias"):
        FisherProfile.from_pretrained(folder)


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "benchmarks/results").glob("*/profile.json")))
def test_committed_profiles_are_whole(file):
    facts = json.loads(file.read_text())
    check_facts(file, facts, [*FisherProfile.__dataclass_fields__.keys() - {"diagonal"}, "values"])


def test_noise_takes_no_part_in_scores():
    model = language_model("bert")
    site = find_sites(model)[1]
    key = next(n for n in site.parameters if n.endswith("key.bias"))
    plain = profile_of(model)
    quiet = replace(plain, noise=[key])
    others = [plain.tensor_means[n] for n in site.parameters if n != key]
    assert site_scores(quiet, model, [site]) == {site.path: pytest.approx(sum(others) / 5)}
    assert site_scores(plain, model, [site]) != site_scores(quiet, model, [site])
    assert site_scores(replace(quiet, diagonal={}), model, [site]) == site_scores(quiet, model, [site])


def test_a_site_of_noise_alone_is_an_error_unless_it_lies_in_a_head():
    model = language_model("bert")
    site = find_sites(model)[1]
    silent = replace(profile_of(model), noise=list(site.parameters))
    with pytest.raises(ScheduleError, match=rf"no parameter with a gradient feeds dropout site {site.path} by owner"):
        DropoutSchedule.from_profile(silent, model)
    assert site_scores(silent, model, [replace(site, in_head=True)]) == {site.path: None}


def test_noise_takes_no_part_in_rankings():
    p = profile(noise=["a.weight"])
    assert spectrum(p).num_parameters == 7
    top, bottom = p.topk(1 / 7), p.topk(1 / 7, largest=False)
    assert (top.count, bottom.count, top.num_ranked) == (1, 1, 7)
    assert not top.mask("a.weight").any()
    everything = torch.cat([p.diagonal["a.bias"], p.diagonal["b.weight"]])
    assert (top.threshold, bottom.threshold) == (everything.max().item(), everything.min().item())


def test_noise_is_named_on_the_card_and_not_among_the_heaviest():
    text = profile(noise=["a.weight"]).card()
    assert "left out of rankings and scores: `a.weight`." in text
    assert "| `a.weight` |" not in text
    assert "| `b.weight` |" in text


def test_the_card_says_what_took_the_loop_and_why_and_what_no_sample_reached():
    reasons = {"a.bias": "no rule for sin", "a.weight": "rows of linear unknown", "b.weight": "no rule for sin"}
    idle = [f"experts.up[{k}]" for k in range(12)]
    text = profile(coverage={"fallback": sorted(reasons), "reasons": reasons, "untouched": idle}).card()
    assert " One sample at a time (no rule for sin): `a.bias`, `b.weight`." in text
    assert " One sample at a time (rows of linear unknown): `a.weight`." in text
    assert " Reached by no sample, so that their values are 0: `experts.up[0]`, `experts.up[1]`, " in text
    assert ", `experts.up[9]` and 2 more." in text
    early = profile(coverage={"fallback": ["a.bias"], "parameters_by_rule": 0.9}).card()
    assert " One sample at a time: `a.bias`." in early
    nothing = profile(coverage={"fallback": [], "reasons": {}, "untouched": []}).card()
    assert " No parameter needed the per-sample loop." in nothing
    assert "ne sample at a time" not in nothing
    assert "eached by no sample" not in nothing
