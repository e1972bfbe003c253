"""Models that change themselves in a forward: each sample has the Fisher that it has alone, and all is put back."""

import copy

import pytest
import torch
from families import language_model
from fisher_oracles import assert_exact, draw_samples, own_loss_oracle
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, RwkvConfig, RwkvForCausalLM

from guided_dropout import find_sites
from guided_dropout.detection import detect_objective
from guided_dropout.errors import ModelError
from guided_dropout.fisher.estimate import estimate_fisher
from guided_dropout.undisturbed import evaluating

BLOCKS = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1, "vocab_size": 64}
_ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_DECODER = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 2,
    "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
# Those of 28 tokens at most are too short for blocks.
LENGTHS = [60, 6, 40, 23, 60, 31, 40, 9]


def big_bird():
    torch.manual_seed(0)
    config = AutoConfig.for_model("big_bird", max_position_embeddings=64, sep_token_id=3, **_ENCODER, **BLOCKS)
    return AutoModelForMaskedLM.from_config(config).double().eval()


def bigbird_pegasus():
    torch.manual_seed(0)
    config = AutoConfig.for_model("bigbird_pegasus", max_position_embeddings=64, **_DECODER, **BLOCKS)
    return AutoModelForSeq2SeqLM.from_config(config).double().eval()


def rwkv():
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 3, "hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 24}
    config = RwkvConfig(vocab_size=64, context_length=64, rescale_every=1, use_cache=False, **shape)
    return RwkvForCausalLM(config).double().eval()


def for_decoder(samples):
    spoken = draw_samples([5, 12, 7, 4, 9, 15, 6, 11], seed=3, share=1.0)
    return [{"input_ids": s["input_ids"], "labels": t["labels"]} for s, t in zip(samples, spoken, strict=False)]


def alone(model, samples):
    """The oracle with a fresh model for each sample."""
    each = [own_loss_oracle(model, [s]) for s in samples]
    return {name: sum(found[name] for found in each) / len(each) for name in each[0]}


@pytest.mark.parametrize("method", ["batched", "reference"])
@pytest.mark.parametrize("lengths", [LENGTHS, [60, 60, 60, 60]])
def test_attention_that_a_model_takes_for_short_input_stays_with_it(lengths, method):
    model, samples = big_bird(), draw_samples(lengths)
    profile = estimate_fisher(model, samples, batch_size=3, method=method)
    assert_exact(profile.diagonal, alone(model, samples))
    assert model.bert.attention_type == "block_sparse"


def test_nor_does_an_encoders_stay():
    model, samples = bigbird_pegasus(), for_decoder(draw_samples(LENGTHS))
    profile = estimate_fisher(model, samples, batch_size=3)
    assert_exact(profile.diagonal, alone(model, samples))
    assert profile.coverage["reasons"] == {}


def test_each_forward_has_the_models_own_parts():
    model = big_bird()
    short, long = torch.arange(5, 13)[None], torch.arange(5, 65)[None] % 64
    with torch.no_grad(), evaluating(model):
        before = model(long).logits
        model(short)
        assert torch.equal(model(long).logits, before)
        with pytest.raises(IndexError):
            model(short + 64)
        assert torch.equal(model(long).logits, before)
    assert not model._forward_hooks


def test_a_model_whose_loss_is_asked_for_comes_back_as_it_was():
    model = big_bird()
    assert detect_objective(model, {"input_ids": list(range(1, 9))}).name == "mlm"
    assert model.bert.attention_type == "block_sparse"


def is_as(model, before):
    return all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_weights_that_are_divided_for_inference_are_measured_undivided():
    model, samples = rwkv(), draw_samples([9, 5, 11])
    before = copy.deepcopy(model.state_dict())
    undivided = copy.deepcopy(model)
    undivided.config.rescale_every = 0
    profile = estimate_fisher(model, samples, batch_size=2)
    assert_exact(profile.diagonal, own_loss_oracle(undivided, samples))
    assert is_as(model, before)
    assert (model.config.rescale_every, model.rwkv.layers_are_rescaled) == (1, False)


@pytest.mark.parametrize("has_run", [False, True])
def test_looking_for_sites_leaves_weights_alone(has_run):
    model, ids = rwkv(), torch.arange(5, 15)[None]
    if has_run:
        with torch.no_grad():
            model(ids)
    before = copy.deepcopy(model.state_dict())
    assert find_sites(model) == []
    assert is_as(model, before)
    assert model.rwkv.layers_are_rescaled is has_run


def test_weights_that_were_divided_before_are_refused():
    model, samples = rwkv(), draw_samples([9, 5])
    with torch.no_grad():
        model(samples[0]["input_ids"][None])
    with pytest.raises(ModelError, match=r"divided its weights for inference .*training mode"):
        estimate_fisher(model, samples)


class Written(nn.Module):
    """A scale that grows with each forward."""

    def __init__(self, through):
        super().__init__()
        self.scale, self.through = nn.Parameter(torch.ones(16)), through

    def forward(self, x):
        with torch.no_grad():
            self.through(self.scale)
        return x * self.scale


@pytest.mark.parametrize(
    "through",
    [lambda p: p.mul_(2), lambda p: p.data.mul_(2), lambda p: p[3:].add_(1), lambda p: torch.add(p, 1, out=p.data)],
)
def test_weights_that_a_forward_writes_to_are_put_back_and_refused(through):
    model = language_model("bert")
    output = model.bert.encoder.layer[0].output
    output.odd = Written(through)
    output.register_forward_hook(lambda m, args, out: m.odd(out))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"writes to 1 of its parameters in its forward, .*output\.odd\.scale"):
        estimate_fisher(model, draw_samples([9, 5]))
    assert is_as(model, before)
    find_sites(model)
    assert is_as(model, before)


@pytest.mark.parametrize("factor", [1.001, 1e9])  # with the larger one the losses are soon not finite
def test_weights_that_only_a_longer_sample_changes_are_told(factor):
    model, lengths = language_model("bert"), []
    output = model.bert.encoder.layer[0].output
    output.odd = Written(lambda p: p.mul_(factor) if lengths[-1] > 20 else None)
    output.register_forward_hook(lambda m, args, out: lengths.append(out.shape[1]) or m.odd(out))
    assert estimate_fisher(model, draw_samples([9, 5])).num_samples == 2
    with pytest.raises(ModelError, match=r"has written to 1 of its parameters in a forward, .*scale .*load it anew"):
        estimate_fisher(model, draw_samples([9, 30]))
