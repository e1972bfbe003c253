"""Dropout that a model was built without: an identity in its place is a site at rate 0."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from families import classifier_of, language_model, profile_of
from test_sites_families import random_states, state_of
from torch import Tensor, nn

from guided_dropout import DropoutSchedule, add_residual_sites, apply_dropout, find_sites
from guided_dropout.regularizers import Context, GaussianDropout
from guided_dropout.sites import trace

IDS = torch.arange(3, 19).reshape(2, 8)
WITHOUT = {"attention_dropout": 0.0, "embedding_dropout": 0.0, "mlp_dropout": 0.0}  # ModernBERT's own defaults


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_modernbert_as_it_is_published_has_the_sites_of_one_built_with_dropout(attention: str) -> None:
    built = find_sites(language_model("modernbert", attn_implementation=attention))
    without = find_sites(language_model("modernbert", attn_implementation=attention, **WITHOUT))
    assert [site.path for site in without] == [site.path for site in built]
    assert [site.parameters for site in without] == [site.parameters for site in built]
    assert {site.rate for site in without} == {0.0}
    assert "model.layers.0.attn.out_drop" in {site.path for site in without}


def test_it_trains_as_one_built_with_dropout_and_is_afterwards_as_it_was() -> None:
    built, without = language_model("modernbert"), language_model("modernbert", **WITHOUT)
    built.load_state_dict(without.state_dict())
    before, states = state_of(without), random_states()
    schedule = DropoutSchedule.from_rates({site.path: site.rate for site in find_sites(built)}, without)
    with apply_dropout(without, schedule):
        outputs = []
        for model in (built, without):
            torch.manual_seed(0)
            outputs.append(model.train()(input_ids=IDS).logits)
        assert torch.equal(*outputs)
        without.eval()
        assert torch.equal(without(input_ids=IDS).logits, built.eval()(input_ids=IDS).logits)
    torch.set_rng_state(torch.tensor(states[0], dtype=torch.uint8))
    assert state_of(without) == before


def test_a_schedule_goes_from_one_to_the_other_and_noise_takes_the_place_of_dropout() -> None:
    built, without = language_model("modernbert"), classifier_of("modernbert", **WITHOUT)
    schedule = DropoutSchedule.from_profile(profile_of(built), built, upper=0.4, lower=0.1)
    with apply_dropout(without, schedule) as applied:
        assert applied.rates == schedule.rates
        with GaussianDropout().apply(without, Context()) as noise:
            assert noise.facts["sites"] == len(schedule.rates)


def test_what_is_written_through_it_needs_no_residual_site() -> None:
    added = []
    for rates in ({}, WITHOUT):
        with add_residual_sites(language_model("modernbert", **rates)) as handle:
            added.append(handle.sites)
    assert added[0] == added[1] == tuple(f"model.layers.{layer}.mlp.Wo.residual_dropout" for layer in (0, 1))


class Blocks(nn.Module):
    """Identities under several names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.attn_drop = nn.Identity()
        self.projection_dropout = nn.Identity()
        self.drop_path = nn.Identity()
        self.drop_path1 = nn.Identity()
        self.norm = nn.Identity()
        self.unused_dropout = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_path1(self.drop_path(self.attn_drop(self.layer(x))))
        return self.norm(self.projection_dropout(x))


def test_the_name_says_what_an_identity_stands_for() -> None:
    seen = trace(Blocks(), {"x": torch.randn(2, 4)})
    assert [site.path for site in seen.sites] == ["attn_drop", "projection_dropout"]
    assert [site.parameters for site in seen.sites] == [("layer.weight", "layer.bias")] * 2
    assert seen.dead == ("unused_dropout",)


def test_stochastic_depth_is_no_site() -> None:
    config = {
        "image_size": 16,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 2,
    }
    found = []
    for rate in (0.0, 0.1):
        with torch.random.fork_rng():
            model = hf.SwinModel(hf.SwinConfig(**config, drop_path_rate=rate)).eval()
        found.append([site.path for site in find_sites(model)])
    assert found[0] == found[1]
    assert not any("drop_path" in path for path in found[0])
