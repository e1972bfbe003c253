from __future__ import annotations

from itertools import combinations

import pytest
from families import classifier_of, language_model, profile_of
from random_profiles import random_profile

from guided_dropout.schedule import DropoutSchedule, controls
from guided_dropout.schedule.compare import diff
from guided_dropout.schedule.places import Place, by_role, place_of, places


def test_a_schedule_against_itself_its_reverse_and_chance() -> None:
    model = language_model("bert")
    schedule = DropoutSchedule.from_profile(random_profile(model), model)
    assert diff(schedule, schedule).tau == 1
    assert diff(schedule, controls.reversed(schedule)).tau == -1
    other = controls.shuffled(schedule, 1)
    found = diff(schedule, other)
    a, b = list(schedule.rates.values()), list(other.rates.values())
    pairs = [(a[i] - a[j]) * (b[i] - b[j]) for i, j in combinations(range(len(a)), 2)]
    assert found.tau == pytest.approx(sum((p > 0) - (p < 0) for p in pairs) / len(pairs))
    assert [c.rates for c in found.changes] == list(zip(a, b, strict=True))
    assert [c.ranks[0] for c in found.changes] == [sorted(a, reverse=True).index(rate) + 1 for rate in a]
    assert found.mean_rates == (schedule.mean_rate, other.mean_rate)


def test_sites_are_matched_relative_to_the_backbone() -> None:
    model, classifier = language_model("bert"), classifier_of("bert")
    there = DropoutSchedule.from_profile(profile_of(model), model)
    here = DropoutSchedule.from_profile(profile_of(model), classifier, include_head=True)
    found = diff(there, here)
    assert len(found.changes) == 7
    assert all(a == b for a, b in (c.rates for c in found.changes))
    assert (found.only_first, found.only_second) == ((), ("dropout",))
    deeper = DropoutSchedule.uniform(language_model("bert", num_hidden_layers=3), 0.1)
    assert diff(deeper, there).only_first == tuple(
        f"encoder.layer.2.{name}.dropout" for name in ("attention.self", "attention.output", "output")
    )


def test_the_order_of_equal_rates_is_not_defined() -> None:
    model = language_model("gpt2")
    schedule = DropoutSchedule.from_profile(random_profile(model), model)
    found = diff(schedule, schedule.at_uniform())
    assert found.tau is None
    assert len({c.ranks[1] for c in found.changes}) == 1
    apart = diff(schedule, DropoutSchedule.uniform(language_model("bert"), 0.1))
    assert (apart.changes, apart.tau) == ((), None)
    assert len(apart.only_first) == len(schedule.rates)


def test_places() -> None:
    assert place_of("encoder.layer.3.output.dropout") == Place("encoder.layer.*.output.dropout", 3)
    assert place_of("decoder.block.1.layer.2.dropout") == Place("decoder.block.*.layer.2.dropout", 1)
    assert place_of("embeddings.dropout") == Place("embeddings.dropout", None)
    called = [f"h.{h}.{x}[{k}]" for h in (0, 1) for k in (0, 1) for x in "ab"]
    assert [place.layer for place in places(["e", *called]).values()] == [None, 0, 0, 1, 1, 2, 2, 3, 3]
    assert places(called)["h.1.b[0]"] == Place("h.*.b[*]", 2)
    assert places(["e[0]", "h.0.a[0]", "h.0.a[1]", "e[1]"])["h.0.a[1]"] == Place("h.*.a[1]", 0)
    assert by_role(["e", "h.0.a", "h.0.b", "h.1.a"]) == {"e": ["e"], "h.*.a": ["h.0.a", "h.1.a"], "h.*.b": ["h.0.b"]}
