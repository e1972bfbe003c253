"""Dropout sites of models that PEFT has wrapped, and schedules from the base model's profile on them."""

from __future__ import annotations

import pytest
import torch
from families import classifier_of, language_model, profile_of
from peft import AdaLoraConfig, BOFTConfig, IA3Config, LoraConfig, OFTConfig, PeftConfig, PeftModel, get_peft_model
from test_sites_families import random_states, state_of
from torch import nn

from guided_dropout import DropoutSchedule, add_residual_sites, apply_dropout, find_sites
from guided_dropout.errors import ScheduleError, SiteError
from guided_dropout.schedule import controls

# PEFT reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LAYERS = {"bert": ["query", "value"], "llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def with_lora(family: str, rate: float = 0.1, model: nn.Module | None = None, **options: object) -> PeftModel:
    config = LoraConfig(r=4, target_modules=LAYERS[family], lora_dropout=rate, init_lora_weights=False, **options)
    if family == "gpt2":
        config.fan_in_fan_out = True
    with torch.random.fork_rng():
        return get_peft_model(model or language_model(family), config).eval()


def inner_name(path: str) -> str:
    return path.removeprefix("base_model.model.").replace(".base_layer", "")


@pytest.mark.parametrize("rate", [0.1, 0.0])
@pytest.mark.parametrize("family", LAYERS)
def test_the_sites_are_the_base_models_and_one_for_each_adapted_layer(family: str, rate: float) -> None:
    base = {site.path: site for site in find_sites(language_model(family))}
    model = with_lora(family, rate)
    sites = find_sites(model)
    assert {inner_name(site.path) for site in sites if not site.in_adapter} == set(base)
    adapters = [site for site in sites if site.in_adapter]
    assert len(adapters) == 2 * (2 if family != "gpt2" else 3)  # two layers; c_proj stands in two places
    for site in adapters:
        assert (site.rate, site.kind, site.calls, site.in_head) == (rate, "module", 1, False)
        layer = site.path.removesuffix(".lora_dropout.default")
        assert site.parameters == tuple(n for n, _ in model.named_parameters() if n.startswith(f"{layer}.base_layer."))
        assert site.parameters
    for site in sites:
        assert not any("lora_" in name for name in (*site.parameters, *site.dataflow))
        if not site.in_adapter:
            assert tuple(map(inner_name, site.parameters)) == base[inner_name(site.path)].parameters
            assert tuple(map(inner_name, site.dataflow)) == base[inner_name(site.path)].dataflow


@pytest.mark.parametrize("rate", [0.1, 0.0])
@pytest.mark.parametrize("family", LAYERS)
def test_looking_and_applying_leave_the_model_as_it_was(family: str, rate: float) -> None:
    model = with_lora(family, rate)
    before, states = state_of(model), random_states()
    with apply_dropout(model, DropoutSchedule.uniform(model, 0.3)):
        assert all(site.rate == 0.3 for site in find_sites(model))
        assert all(not module.training for module in model.modules())
    assert state_of(model) == before
    assert random_states() == states


@pytest.mark.parametrize("family", LAYERS)
def test_a_schedule_from_the_base_models_profile_scores_each_adapter_by_the_weight_that_it_adapts(family: str) -> None:
    base = language_model(family)
    profile = profile_of(base)
    model = with_lora(family, 0.0)
    schedule = DropoutSchedule.from_profile(profile, model, upper=0.4, lower=0.05)
    of_base = DropoutSchedule.from_profile(profile, base)
    for site in find_sites(model):
        if site.in_adapter:
            names = [inner_name(name) for name in site.parameters]
            assert schedule.scores[site.path] == sum(profile.tensor_means[n] for n in names) / len(names)
        else:
            assert schedule.scores[site.path] == of_base.scores[inner_name(site.path)]
    with apply_dropout(model, schedule):
        assert {site.path: site.rate for site in find_sites(model)} == schedule.rates
    assert controls.magnitude(schedule, model).rates.keys() == schedule.rates.keys()


def test_a_schedule_of_the_base_model_goes_on_and_leaves_the_adapters_alone() -> None:
    base, model = language_model("bert"), with_lora("bert", 0.15)
    schedule = DropoutSchedule.from_profile(profile_of(base), base, upper=0.4, lower=0.05)
    with apply_dropout(model, schedule):
        now = {inner_name(site.path): site.rate for site in find_sites(model)}
        assert {path: now[path] for path in schedule.rates} == schedule.rates
        assert {site.rate for site in find_sites(model) if site.in_adapter} == {0.15}
    with pytest.raises(ScheduleError, match=r"lora_dropout\.default is no dropout site"):
        apply_dropout(base, DropoutSchedule.uniform(model, 0.2))


def test_an_adapter_built_without_dropout_trains_as_one_built_with_it() -> None:
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        without = with_lora("llama", 0.0)
        torch.manual_seed(3)
        built = with_lora("llama", 0.4)
    built.load_state_dict(without.state_dict())
    rates = {site.path: 0.4 if site.in_adapter else 0.2 for site in find_sites(without)}
    with apply_dropout(without, DropoutSchedule.from_rates(rates, without)):
        outputs = []
        for model in (without, built):
            torch.manual_seed(0)
            outputs.append(model.train()(input_ids=ids).logits)
        assert torch.equal(*outputs)
    assert all(isinstance(m, nn.Identity) for n, m in without.named_modules() if n.endswith("lora_dropout.default"))


def test_two_schedules_come_off_in_any_order() -> None:
    for first_off in (0, 1):
        model = with_lora("bert", 0.0)
        before = state_of(model)
        handles = [apply_dropout(model, DropoutSchedule.uniform(model, rate)) for rate in (0.2, 0.3)]
        handles[first_off].remove()
        assert {site.rate for site in find_sites(model)} == {0.3 if first_off == 0 else 0.2}
        handles[1 - first_off].remove()
        assert state_of(model) == before


def test_a_classifier_with_a_head_to_train() -> None:
    profile = profile_of(language_model("bert"))
    model = with_lora("bert", 0.1, classifier_of("bert"), modules_to_save=["classifier"], task_type="SEQ_CLS")
    schedule = DropoutSchedule.from_profile(profile, model, include_head=True)
    with apply_dropout(model, schedule):
        assert {site.path: site.rate for site in find_sites(model)} == schedule.rates


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_a_schedule_with_the_heads_sites_goes_both_ways(task: str | None) -> None:
    base, model = classifier_of("bert"), with_lora("bert", 0.1, classifier_of("bert"), task_type=task)
    of_base = DropoutSchedule.uniform(base, 0.3, include_head=True)
    with apply_dropout(model, of_base) as handle:
        assert {inner_name(path) for path in handle.rates} == set(of_base.rates)
        assert model.base_model.model.dropout.p == 0.3
    rates = {site.path: 0.2 for site in find_sites(model) if not site.in_adapter}
    with apply_dropout(base, DropoutSchedule.from_rates(rates, model)):
        assert base.dropout.p == 0.2


def test_residual_sites_drop_what_the_adapter_writes_too() -> None:
    model = with_lora("llama", 0.0)
    handle = add_residual_sites(model, 0.2)
    assert [path.split(".", 5)[-1] for path in handle.sites[:2]] == [
        "self_attn.o_proj.residual_dropout",
        "mlp.down_proj.residual_dropout",
    ]
    sites = {site.path: site for site in find_sites(model)}
    layer = "base_model.model.model.layers.0.mlp."
    assert sites[handle.sites[1]].parameters == (
        f"{layer}gate_proj.weight",
        f"{layer}up_proj.weight",
        f"{layer}down_proj.base_layer.weight",
    )
    base = language_model("llama")
    with add_residual_sites(base):
        schedule = DropoutSchedule.from_profile(profile_of(base), base)
        with apply_dropout(model, schedule) as applied:
            assert set(map(inner_name, applied.rates)) == set(schedule.rates)


def test_residual_sites_from_before_the_wrapping_which_the_adapter_would_pass_by_are_refused() -> None:
    base = language_model("llama")
    add_residual_sites(base)
    model = with_lora("llama", 0.0, base)  # adapts down_proj and not o_proj
    before = {site.path: site.rate for site in find_sites(model)}
    with pytest.raises(SiteError, match=r"layers\.0\.mlp\.down_proj\.base_layer\.residual_dropout .*wrap first"):
        apply_dropout(model, DropoutSchedule.uniform(model, 0.2))
    assert {site.path: site.rate for site in find_sites(model)} == before
    harmless = {path: 0.0 if "down_proj" in path else 0.2 for path in before}
    with apply_dropout(model, DropoutSchedule.from_rates(harmless, model)):
        assert {site.path: site.rate for site in find_sites(model)} == harmless


def test_the_base_models_weights_are_found_again_under_the_adapters() -> None:
    base = language_model("bert")
    schedule = DropoutSchedule.uniform(base, 0.2)
    model = with_lora("bert", 0.1, modules_to_save=["dense"])
    assert schedule.has_weights_of(model) is True
    assert DropoutSchedule.uniform(model, 0.2).has_weights_of(base) is True
    with torch.no_grad():
        model.get_parameter("base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.weight").mul_(2)
    assert schedule.has_weights_of(model) is False


RESIDUAL = ["q_proj", "o_proj", "down_proj"]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=RESIDUAL, use_dora=True),
        LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
        IA3Config(target_modules=RESIDUAL, feedforward_modules=["down_proj"]),
        AdaLoraConfig(target_modules=RESIDUAL, total_step=10),
        OFTConfig(target_modules=RESIDUAL, oft_block_size=4),
    ],
    ids=["dora", "dora of queries", "ia3", "adalora", "oft"],
)
def test_residual_sites_are_where_the_base_model_has_them_whatever_the_adapter(config: PeftConfig) -> None:
    base, model = language_model("llama"), get_peft_model(language_model("llama"), config)
    sites = add_residual_sites(model).sites
    assert tuple(map(inner_name, sites)) == add_residual_sites(base).sites
    assert not any(".base_layer." in path for path in sites)
    apply_dropout(model, DropoutSchedule.uniform(model, 0.1)).remove()


def test_a_dropout_of_rotations_that_was_left_out_is_no_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)  # builds an extension otherwise
    for rate in (0.0, 0.1):
        config = BOFTConfig(target_modules=["query"], boft_block_size=4, boft_dropout=rate)
        sites = find_sites(get_peft_model(language_model("bert"), config))
        assert {inner_name(site.path) for site in sites} == {site.path for site in find_sites(language_model("bert"))}


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(target_modules=["query"], total_step=10),
        LoraConfig(target_modules=["query"], trainable_token_indices={"word_embeddings": [1, 2]}),
        LoraConfig(target_modules=["query"], modules_to_save=["LayerNorm", "dense"]),
    ],
    ids=["adalora", "tokens", "copies"],
)
@pytest.mark.parametrize("grouping", ["owner", "dataflow"])
def test_the_base_models_profile_scores_its_sites_as_there(config: PeftConfig, grouping: str) -> None:
    base = language_model("bert")
    profile, model = profile_of(base), get_peft_model(language_model("bert"), config)
    of_base = DropoutSchedule.from_profile(profile, base, grouping=grouping)
    sites = {site.path: inner_name(site.path) for site in find_sites(model) if not site.in_adapter}
    schedule = DropoutSchedule.from_profile(profile, model, grouping=grouping)
    assert {sites[path]: score for path, score in schedule.scores.items() if path in sites} == of_base.scores
    apply_dropout(model, of_base).remove()


def test_a_copy_of_a_layer_stands_for_it_where_it_trains() -> None:
    model = with_lora("bert", 0.1, modules_to_save=["dense"])
    site = next(site for site in find_sites(model) if site.path.endswith("layer.0.attention.output.dropout"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len([name for name in site.parameters if ".dense." in name]) == 2
    assert {name for name in site.parameters if ".dense." in name} <= trained


def test_of_copies_of_a_layer_the_active_adapters_alone_has_sites() -> None:
    config = LoraConfig(target_modules=["query"], modules_to_save=["output"])
    model = get_peft_model(language_model("bert"), config)
    model.add_adapter("b", config)
    model.set_adapter("b")
    copies = [site.path for site in find_sites(model) if "modules_to_save" in site.path]
    assert copies
    assert all("modules_to_save.b." in path for path in copies)
    apply_dropout(model, DropoutSchedule.uniform(language_model("bert"), 0.2)).remove()


class Packed(nn.Linear):
    """A linear layer whose weight is stored as 4-bit weights are: two to a byte, frozen."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self._whole = layer.weight.detach()
        packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self._whole)


def test_quantised_weights_take_the_schedule_and_the_profile_of_whole_ones() -> None:
    base, packed = language_model("llama"), language_model("llama")
    for layer in packed.model.layers:
        layer.self_attn.q_proj = Packed(layer.self_attn.q_proj)
    model = with_lora("llama", 0.1, packed)
    add_residual_sites(base)
    add_residual_sites(model)
    profile = profile_of(base)
    for aggregate in ("tensor_mean", "sum"):
        whole = DropoutSchedule.from_profile(profile, base, aggregate=aggregate)
        schedule = DropoutSchedule.from_profile(profile, model, aggregate=aggregate)
        scores = {inner_name(path): score for path, score in schedule.scores.items()}
        assert whole.scores.items() <= scores.items()
        apply_dropout(model, whole).remove()
    rates = {path: 0.1 for path in schedule.rates if "lora" not in path}
    apply_dropout(base, DropoutSchedule.from_rates(rates, model)).remove()


def test_an_adapter_that_is_turned_off_has_no_site() -> None:
    config = LoraConfig(target_modules=["query"], lora_dropout=0.1)
    model = get_peft_model(language_model("bert"), config)
    before = [site.path for site in find_sites(model)]
    assert any(path.endswith("lora_dropout.default") for path in before)
    model.add_adapter("off", config)
    assert [site.path for site in find_sites(model)] == before
