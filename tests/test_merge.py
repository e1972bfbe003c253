"""A merged profile is the one that all samples together would have given."""

from dataclasses import replace

import pytest
import torch
from families import VOCAB, language_model
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_profile import NAMES, assert_same, profile

from guided_dropout import FisherProfile, estimate_fisher
from guided_dropout.errors import ArtefactError
from guided_dropout.fisher import merge
from guided_dropout.fisher.prefixes import Prefixes, common_start


@given(
    seed=st.integers(0, 99),
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=5),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
)
@settings(max_examples=30, deadline=None)
def test_merged_is_the_profile_over_the_union(seed, sizes, scale):
    generator = torch.Generator().manual_seed(seed)
    squares = [
        {n: scale * torch.randn(size, *shape, generator=generator).double() ** 2 for n, shape in NAMES.items()}
        for size in sizes
    ]

    def measured(squares):
        size = len(squares["a.bias"])
        diagonal = {n: s.mean(0) for n, s in squares.items()}
        means = {n: d.mean().item() for n, d in diagonal.items()}
        return profile(diagonal=diagonal, tensor_means=means, num_samples=size, num_skipped=1)

    merged = merge(*map(measured, squares))
    whole = measured({n: torch.cat([s[n] for s in squares]) for n in NAMES})
    assert merged.num_samples == whole.num_samples
    assert merged.num_skipped == len(sizes)
    assert merged.tensor_means == pytest.approx(whole.tensor_means, rel=1e-12, abs=0)
    for name, values in whole.diagonal.items():
        torch.testing.assert_close(merged.diagonal[name], values, rtol=1e-12, atol=0)


def test_merging_two_measurements_of_a_model():
    model = language_model("bert").double()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (7, 9), generator=generator).tolist()
    samples = [{"input_ids": row, "labels": [*row[:4], *[-100] * 5]} for row in ids]
    parts = [estimate_fisher(model, part, batch_size=2) for part in (samples[:2], samples[2:])]
    merged, whole = merge(*parts), estimate_fisher(model, samples)
    assert merged.tensor_means == pytest.approx(whole.tensor_means, rel=1e-12, abs=1e-20)
    for name, values in whole.diagonal.items():
        assert merged.diagonal[name].dtype == torch.float32
        torch.testing.assert_close(merged.diagonal[name], values, rtol=2e-7, atol=1e-20)


def test_merging_one_without_values_has_means_only():
    merged = merge(profile(), replace(profile(1), diagonal={}))
    assert merged.diagonal == {}
    assert merged.tensor_means == merge(profile(), profile(1)).tensor_means


def test_merged_keeps_what_is_shared_and_where_each_part_came_from(tmp_path):
    merged = merge(merge(profile(0), profile(1)), profile(2))
    assert merged.provenance["text"] == "t.txt"
    assert "seed" not in merged.provenance
    parts = merged.provenance["merged"]
    assert [(p["seed"], p["num_samples"], p["num_skipped"]) for p in parts] == [(0, 7, 0), (1, 8, 1), (2, 9, 2)]
    assert_same(FisherProfile.from_pretrained(merged.save_pretrained(tmp_path / "m")), merged)
    assert "Merged from 3 measurements." in merged.card()


def test_profiles_of_other_kernels_and_of_none_that_is_known_are_merged():
    sources = [{"text": f"{k}.txt", **kernel} for k, kernel in enumerate([{"kernel": "amx"}, {"kernel": "native"}, {}])]
    merged = merge(*(profile(k, provenance=source) for k, source in enumerate(sources)))
    assert [part.get("kernel") for part in merged.provenance["merged"]] == ["amx", "native", None]
    assert "kernel" not in merged.provenance
    assert "Squared by `amx` and `native` (" in merged.card()
    assert "Squared by" not in profile().card()


def test_noise_is_what_is_noise_in_each_and_fallback_in_any():
    slow = {"fallback": ["b.weight"], "parameters_by_rule": 8 / 13}
    a = profile(noise=["a.bias", "b.weight"], coverage=slow)
    merged = merge(a, profile(1, noise=["a.bias"], coverage={"nonfinite": [4]}))
    assert merged.noise == ("a.bias",)
    assert merged.coverage == {"fallback": ["b.weight"], "parameters_by_rule": pytest.approx(8 / 13)}
    assert [part["coverage"] for part in merged.provenance["merged"]] == [slow, {"nonfinite": [4]}]


def test_untouched_is_what_is_untouched_in_each_and_how_many_were_asked_for_is_each_parts_own():
    why = {"b.weight": "a shared row"}
    first = {"fallback": ["b.weight"], "reasons": why, "untouched": ["a.weight", "a.bias", "b.weight[0]"]}
    second = {"fallback": [], "reasons": {}, "untouched": ["a.weight[1]", "a.bias", "b.weight[2]"]}
    asked = {"samples": "1000", "text": "t.txt"}
    merged = merge(profile(coverage=first, provenance=asked), profile(1, coverage=second, provenance=asked))
    assert merged.coverage["untouched"] == ["a.bias", "a.weight[1]"]
    assert merged.coverage["reasons"] == why
    assert merged.provenance["text"] == "t.txt"
    assert "samples" not in merged.provenance
    assert [part["samples"] for part in merged.provenance["merged"]] == ["1000", "1000"]
    known = merge(profile(coverage=first), profile(1)).coverage
    assert "untouched" not in known


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "causal"}, "objective is 'mlm' in profile 1, 'causal' in profile 3"),
        ({"reduction": "sum"}, "reduction is 'mean' in profile 1, 'sum' in profile 3"),
        ({"labels": "model"}, "labels is 'data' in profile 1, 'model' in profile 3"),
        (
            {"model": {"architecture": "Toy", "name_or_path": "x/y"}},
            "name_or_path is 'someone/toy' in .*, 'x/y' in",
        ),
        (
            {"diagonal": {}, "shapes": {**NAMES, "b.weight": (6,)}},
            r"shape of b\.weight is \(5,\) in profile 1, \(6,\) in profile 3",
        ),
    ],
)
def test_refuses_what_does_not_belong_together(changes, message):
    with pytest.raises(ArtefactError, match=message):
        merge(profile(), profile(1), profile(2, **changes))


def with_weights(seed, digest=None, name="someone/toy"):
    model = {"architecture": "Toy", "name_or_path": name, "num_parameters": 13}
    return profile(seed, model=model if digest is None else {**model, "digest": digest})


def test_the_weights_decide_what_is_one_model_and_where_they_are_unknown_the_name():
    merged = merge(with_weights(0, "aaaa"), with_weights(1, "aaaa", name="a/copy"))
    assert merged.model == with_weights(0, "aaaa").model
    assert (
        merge(with_weights(0, "aaaa"), with_weights(1)).model == with_weights(0).model
    )  # not all that is in it is known
    known = {"digest": "aaaa", "backbone": {"digest": "bbbb", "tensors": 2}}
    newer = [profile(seed, model={**with_weights(0).model, **known}) for seed in (0, 1)]
    assert merge(*newer).model == newer[0].model
    assert merge(newer[0], with_weights(1, "aaaa")).model == with_weights(0, "aaaa").model
    with pytest.raises(ArtefactError, match="name_or_path is 'someone/toy' in profile 1, 'a/copy' in profile 2"):
        merge(with_weights(0, "aaaa"), with_weights(1, name="a/copy"))
    message = (
        r"profile 1 was measured on someone/toy with weights aaaa, profile 2 on .* bbbb; expected the same weights"
    )
    with pytest.raises(ArtefactError, match=message):
        merge(with_weights(0, "aaaa"), with_weights(1, "bbbb"))
    with pytest.raises(ArtefactError, match=r"profile 2 was measured on .* aaaa, profile 3 on .* bbbb"):
        merge(with_weights(0), with_weights(1, "aaaa"), with_weights(2, "bbbb"))


def test_the_commit_of_the_hub_is_kept_where_it_is_one_and_tells_models_apart_only_where_no_digest_does():
    def of(seed, revision=None, digest=None):
        found = with_weights(seed, digest)
        return replace(found, model={**found.model, **({"revision": revision} if revision else {})})

    assert merge(of(0, "c0", "aaaa"), of(1, "c0", "aaaa")).model == of(0, "c0", "aaaa").model
    assert merge(of(0, "c0", "aaaa"), of(1, "c1", "aaaa")).model == of(0, None, "aaaa").model
    assert merge(of(0, "c0", "aaaa"), of(1)).model == merge(of(0), of(1, "c0")).model == of(0).model
    with pytest.raises(ArtefactError, match="the model's revision is 'c0' in profile 1, 'c1' in profile 2"):
        merge(of(0, "c0"), of(1, "c1"))


def test_measurements_of_one_model_merge_from_two_places_and_those_of_a_trained_one_do_not():
    samples = [{"input_ids": [4, 5, 6, 7], "labels": [4, 5, 6, k]} for k in range(8, 12)]
    profiles = []
    for name, seed, part in (("here", 0, samples[:2]), ("there", 0, samples[2:]), ("here", 1, samples[2:])):
        model = language_model("bert", seed=seed)
        model.config.name_or_path = name
        profiles.append(estimate_fisher(model, part))
    assert merge(profiles[0], profiles[1]).num_samples == 4
    with pytest.raises(ArtefactError, match="measure one checkpoint"):
        merge(profiles[0], profiles[2])


def test_refuses_missing_tensors_the_same_samples_and_a_single_profile():
    less = profile(1, diagonal={}, shapes={"a.bias": (2,)}, tensor_means={"a.bias": 1.0})
    with pytest.raises(ArtefactError, match=r"shape of a\.weight is \(3, 2\) in profile 1, 'missing' in profile 2"):
        merge(profile(), less)
    rounded = {n: m * (1 + 1e-6) for n, m in profile().tensor_means.items()}
    with pytest.raises(ArtefactError, match=r"profiles 1 and 3 were measured on the same 7 samples.*another --seed"):
        merge(profile(), profile(1), profile(tensor_means=rounded))
    noisier = {**rounded, "a.bias": 0.0}
    with pytest.raises(ArtefactError, match=r"profiles 1 and 2 were measured on the same"):
        merge(profile(noise=["a.bias"]), profile(tensor_means=noisier, noise=["a.bias"]))
    with pytest.raises(ArtefactError, match="1 profile to merge; expected two or more"):
        merge(profile())


def test_what_is_no_profile_is_refused():
    with pytest.raises(ArtefactError, match=r"merge was given a list for a profile; .*one by one, merge\(\*profiles\)"):
        merge([profile(), profile(1)])
    with pytest.raises(ArtefactError, match=r"given a str .*FisherProfile\.from_pretrained\('build/a'\)"):
        merge(profile(), "build/a")


def test_of_profiles_that_are_all_noise_nothing_says_that_they_are_the_same():
    noise = [*profile().tensor_means]
    other = profile(1, noise=noise, num_samples=profile().num_samples)
    assert merge(profile(noise=noise), other).num_samples == 2 * other.num_samples


def test_samples_tell_whether_they_overlap_and_names_where_there_are_none():
    model = language_model("bert")
    rows = torch.randint(3, VOCAB, (8, 9), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [{"input_ids": row, "labels": [*row[:4], *[-100] * 5]} for row in rows]
    named = {"text": "text.txt", "seed": 0, "max_length": 9}
    a, b = (estimate_fisher(model, part, facts=named) for part in (samples[:3], samples[3:]))
    merged = merge(a, b)  # other texts of one name
    assert merged.num_samples == 8
    bare = [replace(p, provenance={"sample_digests": p.provenance["sample_digests"]}) for p in (a, b)]
    known, unnamed = merge(*bare), estimate_fisher(model, samples)
    again = "measured on samples of which the first {} are the same, and would count twice"
    for pair, number in (((bare[0], known), 3), ((known, bare[1]), 5), ((a, unnamed), 2)):
        with pytest.raises(ArtefactError, match=again.format(number)):
            merge(*pair)
    all_of_it = estimate_fisher(model, samples[3:], facts={**named, "taken": "all"})  # begins otherwise than some of it
    earlier = replace(b, provenance={k: v for k, v in b.provenance.items() if k != "sample_digests"})
    for other in (all_of_it, earlier, merged):
        with pytest.raises(ArtefactError, match=r"samples of 9 tokens of text\.txt with seed 0: the fewer are among"):
            merge(a, other)


def test_how_samples_begin_is_told_whatever_their_number():
    rows = [{"input_ids": torch.tensor([i, 5]), "labels": torch.tensor([i, 5])} for i in range(11)]
    prefixes, fewer = Prefixes(), Prefixes()
    assert [list(prefixes.passing(rows)), list(fewer.passing(rows[:6]))] == [rows, rows[:6]]
    assert [*prefixes.facts()] == ["1", "2", "4", "8", "11"]
    assert [*prefixes.facts(7)] == ["1", "2", "4"]
    assert common_start(prefixes.facts(), fewer.facts()) == 4
    other = Prefixes()
    list(other.passing([*rows[:3], rows[0]]))
    assert common_start(prefixes.facts(), other.facts()) == 0
    assert common_start({}, fewer.facts()) == 0
