from __future__ import annotations

import random
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from families import FAMILIES, classifier_of, language_model
from torch import nn

from guided_dropout import DropoutHandle, DropoutSchedule, apply_dropout
from guided_dropout.errors import SiteError
from guided_dropout.sites import find_sites, trace, verify_rates

ATTENTION = ["sdpa", "eager"]
SITES = {  # of the two-layer backbone, counted by reading the models' code: (sites, calls, on attention)
    "bert": (7, 7, 2),
    "roberta": (7, 7, 2),
    "electra": (7, 7, 2),
    "albert": (3, 5, 1),  # one set of weights for both layers
    "deberta-v2": (9, 9, 2),  # one more a layer, on the relative positions
    "modernbert": (7, 7, 2),
    "distilbert": (5, 5, 2),  # none after attention
    "gpt2": (7, 7, 2),
    "gpt_neox": (7, 7, 2),
    "opt": (4, 6, 2),  # one float for two places in a layer, none on the embeddings
    "llama": (2, 2, 2),
    "qwen3": (2, 2, 2),
    "t5": (22, 24, 6),  # each stack uses its own twice
    "bart": (16, 22, 6),
}


def attention_of(family: str) -> list[str]:
    return ATTENTION if family != "deberta-v2" else ["eager"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_live_site_is_found_in_both_attention_implementations(family: str) -> None:
    for attn in attention_of(family):
        seen = trace(language_model(family, attn_implementation=attn))
        attention = sum(site.kind == "attention" for site in seen.sites)
        assert (len(seen.sites), len(seen.calls), attention) == SITES[family]
        assert sum(site.calls for site in seen.sites) == len(seen.calls)
        assert all(site.parameters and site.dataflow for site in seen.sites)
        rate = 0.1 if family == "t5" else 0.2
        assert all(site.rate == rate for site in seen.sites if site.kind == "attention")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_site_is_where_dropout_really_happens(family: str) -> None:
    """Independent of the probe: with one site's rate at 0.9 and all others at 0, two runs differ; with all at 0 not."""
    model = language_model(family).train()
    batch = {"input_ids": torch.arange(3, 19).reshape(2, 8)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]

    def noisy() -> bool:
        torch.manual_seed(0)
        with torch.no_grad():
            return not torch.equal(model(**batch).logits, model(**batch).logits)

    places = [_place(model, site.path) for site in find_sites(model)]
    for module, name in places:
        setattr(module, name, 0.0)
    assert not noisy()
    for module, name in places:
        setattr(module, name, 0.9)
        assert noisy()
        setattr(module, name, 0.0)


def _place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    at = getattr(owner, name)
    return (at, "p") if isinstance(at, nn.Module) else (owner, name)


def test_the_published_layout_of_bert_base() -> None:
    model = language_model("bert", num_hidden_layers=12)
    sites = {site.path.removeprefix("bert."): site for site in find_sites(model)}
    names = ["attention.self.dropout", "attention.output.dropout", "output.dropout"]
    layers = [f"encoder.layer.{i}.{name}" for i in range(12) for name in names]
    assert list(sites) == ["embeddings.dropout", *layers]
    assert len(sites) == 37
    assert len(sites["embeddings.dropout"].parameters) == 5
    assert [len(sites[path].parameters) for path in layers] == [6, 4, 4] * 12
    assert not any("intermediate" in name for site in sites.values() for name in site.parameters)
    assert {n for s in sites.values() for n in s.dataflow if "intermediate" in n} == {
        f"bert.encoder.layer.{i}.intermediate.dense.{kind}" for i in range(12) for kind in ("weight", "bias")
    }


def test_dataflow_is_what_was_used_since_the_dropout_before() -> None:
    layer = "bert.encoder.layer.1."
    site = {s.path: s for s in find_sites(language_model("bert"))}[f"{layer}attention.self.dropout"]
    before = "bert.encoder.layer.0.output.LayerNorm."
    qkv = [f"{layer}attention.self.{part}.{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")]
    assert site.dataflow == (f"{before}weight", f"{before}bias", *qkv)
    assert site.parameters == tuple(qkv) == site.parameters_by("owner")
    assert site.parameters_by("dataflow") == site.dataflow


def test_a_stack_of_layers_does_not_own_its_dropout() -> None:
    sites = {site.path: site for site in find_sites(language_model("t5"))}
    assert sites["encoder.dropout"].calls == 2
    assert sites["encoder.dropout"].parameters == ("shared.weight", "encoder.final_layer_norm.weight")
    assert sites["encoder.dropout"].kind == "module"
    sites = {site.path: site for site in find_sites(language_model("gpt2"))}
    assert sites["transformer.drop"].parameters == ("transformer.wte.weight", "transformer.wpe.weight")


def test_dead_knobs_are_reported_and_are_no_sites() -> None:
    assert trace(language_model("opt")).dead == ("model.decoder.dropout", "model.decoder.layerdrop")
    assert trace(language_model("albert")).dead == ("albert.encoder.albert_layer_groups.0.albert_layers.0.dropout",)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_has_the_sites_of_its_backbone_and_those_of_its_head(family: str) -> None:
    model = classifier_of(family)
    sites = find_sites(model)
    backbone = [site for site in sites if not site.in_head]
    assert (len(backbone), sum(site.calls for site in backbone)) == SITES[family][:2]
    prefix = f"{model.base_model_prefix}."
    assert all(site.path.startswith(prefix) != site.in_head for site in sites)
    if family not in {"gpt2", "gpt_neox", "opt", "llama", "qwen3"}:
        assert any(site.in_head for site in sites)


@pytest.mark.parametrize("attn", ATTENTION)
def test_the_model_is_left_as_it_was(attn: str) -> None:
    model = classifier_of("bart", attn_implementation=attn, encoder_layerdrop=0.5)
    model.register_module("norm", nn.BatchNorm1d(3))
    model.model.encoder.layers[0].train()
    model.model.shared.weight.requires_grad_(False)
    model.activation_checkpointing_enable()
    before = _state(model)
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    seen = trace(model)
    verify_rates(model, seen, {})
    assert len(seen.calls) == 24
    assert _state(model) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def _state(model: nn.Module) -> dict[str, object]:
    facts: dict[str, object] = {}
    for path, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str | None)}
        facts[path] = (plain, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
    facts["tensors"] = {
        n: (t.requires_grad, t.grad, t.sum().item()) for n, t in model.state_dict(keep_vars=True).items()
    }
    return facts


class Custom(nn.Module):
    """A model outside of transformers, with every kind of place for a rate."""

    def __init__(self, hidden_rate: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Dropout1d(0.25, inplace=True), nn.Linear(4, 4))
        self.shared_drop = nn.Dropout(0)
        self.own = StableDropout(0.15)
        self.drop_ratio = 2.0
        self.num_drops = 3
        self.hidden_rate = hidden_rate

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        if self.training:
            self.noise = random.random() + np.random.random()
        x = self.attention(x, x, x)[0].to(self.body[2].weight.dtype)
        x = self.own(self.shared_drop(self.body(x)))
        x = F.dropout(x, self.hidden_rate, self.training)
        return torch.dropout(x, self.drop_ratio / 1e3, False) * self.num_drops


class StableDropout(nn.Module):
    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep = torch.empty_like(x).bernoulli_(1 - self.drop_prob) if self.training else 1
        return x * keep / (1 - self.drop_prob)


IDS = {"ids": torch.tensor([[1, 2, 3]])}


def test_any_module_works_given_inputs() -> None:
    model = Custom()
    mean = model.norm.running_mean.clone()
    states = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    sites = {site.path: site for site in find_sites(model, IDS)}
    assert list(sites) == ["attention.dropout", "body.1", "shared_drop", "own"]
    assert [site.kind for site in sites.values()] == ["attention", "module", "module", "module"]
    assert [site.rate for site in sites.values()] == [0.3, 0.25, 0.0, 0.15]
    assert sites["body.1"].dataflow == ("body.0.weight", "body.0.bias")
    assert (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]) == states
    assert torch.equal(model.norm.running_mean, mean)
    assert model.norm.num_batches_tracked == 0
    assert type(model.shared_drop.p) is int
    assert trace(model, IDS).dead == ()  # neither a count nor a number above 1 is taken for a rate


def at_rates(model: nn.Module, rates: dict[str, float], inputs: dict[str, torch.Tensor] | None = None) -> DropoutHandle:
    return apply_dropout(model, DropoutSchedule.from_rates(rates, model, inputs=inputs), inputs)


class LockedDropout(nn.Dropout):
    """Derives from PyTorch's, and draws a mask of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        return x * x.new_empty(1, x.shape[1]).bernoulli_(1 - self.p) / (1 - self.p)


class Counted(nn.Dropout):
    """Leaves the dropping to PyTorch's, by its forward."""

    calls: ClassVar[list[str]] = []

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        self.calls.append("forward")
        return super().forward(input)


class Lazy(nn.Dropout):
    """Calls PyTorch's function, in a function of its own, at another rate than the one that stands on it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return (lambda x: F.dropout(x, 0.5, self.training))(input)


def test_a_class_derived_from_pytorchs_that_draws_its_own_mask_is_a_site() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), LockedDropout(0.3)), torch.ones(2, 3)
    assert [(site.path, site.rate) for site in find_sites(model, {"input": x})] == [("1", 0.3)]
    assert trace(model, {"input": x}).dead == ()
    with at_rates(model, {"1": 0.0}, {"input": x}):
        assert (model.train()[1](torch.ones(2, 1000)) != 0).all()
    assert (model[1](torch.ones(2, 1000)) == 0).any()


class Disabled(nn.Dropout):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return input if self.training else input * 1


def test_one_that_does_nothing_is_none() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2), Disabled(0.3)), torch.ones(2, 3)
    assert [site.path for site in find_sites(model, {"input": x})] == ["1"]
    assert trace(model, {"input": x}).dead == ("2",)


def test_one_that_leaves_the_dropping_to_pytorch_is_watched_there() -> None:
    x = torch.ones(2, 3)
    model = nn.Sequential(nn.Linear(3, 3), Counted(0.3))
    assert [site.path for site in find_sites(model, {"input": x})] == ["1"]
    assert Counted.calls  # it is its own forward that was run
    with pytest.raises(SiteError, match=r"Lazy \(1\) drops at rate 0\.5"):
        find_sites(nn.Sequential(nn.Linear(3, 3), Lazy(0.3)), {"input": x})


class WordDropout(nn.Module):
    """Keeps the rate that it was made with, and leaves dropping to PyTorch's own."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.inner = nn.Dropout(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_a_dropout_within_a_dropout_is_the_site() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), WordDropout(0.3)), torch.ones(1000, 3)
    assert [site.path for site in find_sites(model, {"input": x})] == ["1.inner"]
    with at_rates(model, {"1.inner": 0.0}, {"input": x}):
        assert (model.train()[1](x) != 0).all()
    assert (model[1](x) == 0).any()


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], packed: bool, layers: int) -> None:
        super().__init__()
        self.inner = kind(3, 3, num_layers=layers, dropout=0.4 if layers > 1 else 0.0, batch_first=True)
        self.packed = packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.packed:
            return self.inner(x)[0]
        packed = nn.utils.rnn.pack_padded_sequence(x, [4, 3], batch_first=True)
        return self.inner(packed)[0].data


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_what_drops_between_recurrent_layers_is_a_site(kind: type[nn.RNNBase], packed: bool) -> None:
    model, inputs = Recurrent(kind, packed, layers=2), {"x": torch.ones(2, 4, 3)}
    (site,) = find_sites(model, inputs)
    assert (site.path, site.rate, site.kind) == ("inner.dropout", 0.4, "attribute")
    model.train()
    with at_rates(model, {"inner.dropout": 0.0}, inputs):
        assert torch.equal(model(**inputs), model(**inputs))
    assert not torch.equal(model(**inputs), model(**inputs))
    assert find_sites(Recurrent(kind, packed, layers=1), inputs) == []


def test_a_model_compiled_in_place_is_not_compiled_to_be_probed() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        compiled.append(graph)
        return graph.forward

    model = language_model("bert")
    wanted = find_sites(model)
    model.compile(backend=backend)
    assert find_sites(model) == wanted
    with at_rates(model, dict.fromkeys([site.path for site in wanted], 0.2)):
        assert compiled == []
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert compiled


def test_a_rate_without_a_knob_is_an_error_that_names_the_place() -> None:
    with pytest.raises(SiteError, match=r"Custom \(inner\) drops at rate 0.4"):
        find_sites(Outer(), IDS)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Custom(hidden_rate=0.4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids)


def test_a_model_that_cannot_be_run_is_an_error_that_says_what_to_pass() -> None:
    with pytest.raises(SiteError, match="pass inputs="):
        find_sites(nn.Linear(2, 2))
    model = language_model("bert")
    model.config.vocab_size = 4
    del model.bert.embeddings.word_embeddings.weight
    model.bert.embeddings.word_embeddings.weight = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(SiteError, match=r"does not run on a batch of input_ids.*pass inputs="):
        find_sites(model)
    assert not model.training


@pytest.mark.parametrize("family", ["canine", "clip"])
def test_a_model_without_one_table_of_tokens_says_what_to_pass(family: str) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    if family == "canine":
        model, given = hf.CanineModel(hf.CanineConfig(**size)), {"input_ids": torch.full((1, 8), 60)}
    else:
        parts = {
            "text_config": {**size, "vocab_size": 64},
            "vision_config": {**size, "image_size": 8, "patch_size": 4, "attention_dropout": 0.1},
        }
        model = hf.CLIPModel(hf.CLIPConfig(**parts))
        given = {"input_ids": torch.full((1, 8), 60), "pixel_values": torch.zeros(1, 3, 8, 8)}
    with pytest.raises(SiteError, match=rf"no batch can be made for {type(model).__name__}; .*: pass inputs="):
        find_sites(model)
    assert find_sites(model, given)


def test_a_rate_that_does_not_arrive_is_an_error() -> None:
    model = language_model("bert")
    seen = trace(model)
    path = "bert.encoder.layer.0.output.dropout"
    with pytest.raises(SiteError, match=rf"{path} receives rate 0.1, expected 0.3"):
        verify_rates(model, seen, {path: 0.3})
    with pytest.raises(SiteError, match="7 dropout calls receive a rate, expected 6"):
        verify_rates(model, seen, {"bert.encoder.layer.1.output.dropout": 0.0})
    verify_rates(model, seen, {})


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_half_precision(family: str) -> None:
    for attn in ATTENTION:
        sites = find_sites(language_model(family, attn_implementation=attn).bfloat16())
        assert [s.kind for s in sites] == [s.kind for s in find_sites(language_model(family))]


def test_inputs_may_be_given() -> None:
    model = language_model("bert")
    assert find_sites(model, {"input_ids": torch.ones(3, 5, dtype=torch.long)}) == find_sites(model)


def test_a_tied_parameter_goes_by_the_name_that_named_parameters_gives() -> None:
    model = classifier_of("bart")
    names = {name for name, _ in model.named_parameters()}
    assert {n for s in find_sites(model) for n in (*s.parameters, *s.dataflow)} <= names
    assert "model.shared.weight" in {s.path: s for s in find_sites(model)}["model.encoder.dropout"].parameters
