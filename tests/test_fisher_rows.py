"""Rows that a model picks from a batch by what the samples say, and samples that padding on the right would change."""

import pytest
import torch
import torch.nn.functional as F
from families import language_model
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.modeling_outputs import MaskedLMOutput

from guided_dropout import estimate_fisher


def draw_samples(lengths, *, left=0, seed=3):
    """`left` places of padding come before each sample's tokens; its first token is predicted from the last of them."""
    g, samples = torch.Generator().manual_seed(seed), []
    for n in lengths:
        ids, padding = torch.randint(4, 60, (n,), generator=g), torch.zeros(left, dtype=torch.long)
        samples.append({
            "input_ids": torch.cat([padding, ids]), "labels": torch.cat([padding - 100, ids]),
            "attention_mask": torch.cat([padding, torch.ones_like(ids)]),
        })  # fmt: skip
    return samples


LENGTHS = [9, 4, 17, 12, 5, 5, 28, 13, 4, 21, 9, 26]


def assert_is_the_loop(model, samples, *, sizes=(1, 2, 4, 8), by_rule=None, dtype=torch.float64, **options):
    model, far = model.to(dtype), 1e-6 if dtype == torch.float64 else 1e-4
    want = estimate_fisher(model, samples, method="reference", **options)
    for size in sizes:
        found = estimate_fisher(model, samples, batch_size=size, **options)
        for name, t in want.diagonal.items():
            if name not in found.noise:
                assert (found.diagonal[name] - t).norm() <= far * t.norm(), (size, name)
        if by_rule is not None:
            assert found.coverage["parameters_by_rule"] == by_rule
    return want


class ByMask(PreTrainedModel):
    """Each token goes through one of four layers, picked in one of many ways."""

    config_class = type("ByMaskConfig", (PretrainedConfig,), {"model_type": "by-mask"})

    def __init__(self, pick):
        torch.manual_seed(0)
        super().__init__(self.config_class())
        self.pick, self.emb, self.head = pick, nn.Embedding(60, 16), nn.Linear(16, 60)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.post_init()

    def _init_weights(self, module):
        pass

    def get_input_embeddings(self):
        return self.emb

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        h = torch.tanh(self.emb(input_ids))
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            mask = input_ids % 4 == i
            out = out.masked_scatter(mask[..., None], self.pick(h, mask, expert))
        logits = self.head(h + out)
        loss = None if labels is None else F.cross_entropy(logits.view(-1, 60), labels.view(-1))
        return MaskedLMOutput(loss=loss, logits=logits)


def flat(h, mask):
    return h.reshape(-1, 16), mask.reshape(-1).nonzero()[:, 0]


PICKS = {
    "mask": lambda h, m, f: f(h[m]),
    "pair": lambda h, m, f: f(h[m.nonzero(as_tuple=True)]),
    "row numbers": lambda h, m, f: f(flat(h, m)[0][flat(h, m)[1]]),
    "below a new dimension": lambda h, m, f: f(flat(h, m)[0][None, flat(h, m)[1]].reshape(-1, 16)),
    "index_select": lambda h, m, f: f(flat(h, m)[0].index_select(0, flat(h, m)[1])),
    "look-up": lambda h, m, f: f(F.embedding(flat(h, m)[1], flat(h, m)[0])),
}
LOST = {
    "gather": lambda h, m, f: f(flat(h, m)[0].gather(0, flat(h, m)[1][:, None].expand(-1, 16))),
    "take_along_dim": lambda h, m, f: f(torch.take_along_dim(flat(h, m)[0], flat(h, m)[1][:, None], 0)),
    "masked_select": lambda h, m, f: f(h.masked_select(m[..., None]).view(-1, 16)),
    "there and back": lambda h, m, f: f(h[m].flip(0)).flip(0),
    "joined": lambda h, m, f: f(torch.cat([h[m][1:], h[m][:1]])).roll(1, 0),
}


@pytest.mark.parametrize("way", [*PICKS, *LOST])
def test_picked_rows_are_their_samples_own(way):
    by_rule = 1.0 if way in PICKS else None
    assert_is_the_loop(ByMask((PICKS | LOST)[way]), draw_samples(LENGTHS * 2), by_rule=by_rule)


@pytest.mark.parametrize("way", [*PICKS, *LOST])
def test_they_are_where_nothing_before_them_needs_a_gradient(way):
    samples = draw_samples([*LENGTHS, 9, 9, 9, 9])
    assert_is_the_loop(ByMask((PICKS | LOST)[way]), samples, parameters=lambda name, _: "experts" in name)


class TwoTables(ByMask):
    """Tokens from 50 on have a table of their own, in which they are looked up by themselves."""

    def __init__(self, project, flat):
        super().__init__(None)
        self.extra, self.own = nn.Embedding(12, 16), nn.Linear(16, 16) if project else nn.Identity()
        self.flat = flat

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        h, mask = self.emb(input_ids), input_ids >= 50
        picked = input_ids.view(-1)[mask.view(-1).nonzero()[:, 0]] if self.flat else input_ids[mask]
        h = h.masked_scatter(mask[..., None], self.own(self.extra(picked - 50)))
        logits = self.head(torch.tanh(self.experts[0](h)))
        loss = None if labels is None else F.cross_entropy(logits.view(-1, 60), labels.view(-1))
        return MaskedLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("project", [True, False])
def test_picked_tokens_are_their_samples_own(project, flat):
    """The first two samples have equally many, as those that come after have not."""
    samples = []
    for number, picked in enumerate([2, 2, 5, 1, 3, 1, 0, 4]):
        ids = torch.arange(9) + 5 * (number + 1) % 40
        ids[torch.arange(picked) * 2 % 9] = 50 + torch.arange(picked)
        samples.append({"input_ids": ids, "labels": ids.clone()})
    assert_is_the_loop(TwoTables(project, flat), samples, sizes=(1, 2, 4))


def switch():
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=60, d_model=32, d_kv=16, num_heads=2, num_layers=2, num_sparse_encoder_layers=1,
        num_decoder_layers=2, num_sparse_decoder_layers=1, d_ff=48, num_experts=4, decoder_start_token_id=0,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config)


def test_a_switch_transformer_is_measured_by_rule():
    samples = [s | {"labels": s["input_ids"][:5]} for s in draw_samples(LENGTHS)]
    assert_is_the_loop(switch(), samples, by_rule=1.0)


def test_a_router_that_casts_its_weights_has_its_own_again():
    model = switch().bfloat16()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    estimate_fisher(model, [s | {"labels": s["input_ids"][:5]} for s in draw_samples(LENGTHS)])
    after = model.state_dict()
    assert {name: p.dtype for name, p in after.items()} == {name: p.dtype for name, p in before.items()}
    assert all(torch.equal(after[name], p) for name, p in before.items())


def test_a_parameter_that_some_samples_do_not_reach():
    samples = [s | {"labels": s["input_ids"][:5]} for s in draw_samples(LENGTHS[:5])]
    model, name = switch(), "encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight"
    assert_is_the_loop(model, samples, sizes=(1, 4), parameters=lambda n, _: n == name)
    lost = ByMask(LOST["gather"])
    assert_is_the_loop(lost, draw_samples([4, 9, 5, 7]), parameters=lambda n, _: n == "experts.2.weight")


EAGER = {
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=2)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, attn_implementation="eager")
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            attn_implementation="eager",
        )
    ),
}


@pytest.mark.parametrize("family", EAGER)
def test_a_target_after_padding_on_the_left_sees_no_padding_on_the_right(family):
    torch.manual_seed(0)
    # In float64 masks of transformers make NaN of rows that see nothing.
    samples = draw_samples(LENGTHS, left=3)
    assert_is_the_loop(EAGER[family](), samples, sizes=(1, 4), by_rule=1.0, dtype=torch.float32)


def with_rope(kind):
    torch.manual_seed(0)
    size = {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    if kind == "dynamic":
        return LlamaForCausalLM(LlamaConfig(**size, max_position_embeddings=16, rope_parameters=rope))
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    return Phi3ForCausalLM(Phi3Config(**size, **lengths, rope_parameters=rope))


def test_embeddings_that_go_by_the_longest_sample_see_each_by_itself():
    assert not assert_is_the_loop(with_rope("longrope"), draw_samples(LENGTHS), sizes=(1, 4), by_rule=1.0).noise
    assert not estimate_fisher(with_rope("longrope"), draw_samples(LENGTHS), batch_size=1).noise


def test_rotary_embeddings_come_back_as_they_were():
    model = with_rope("dynamic")
    before = {name: b.clone() for name, b in model.named_buffers()}
    estimate_fisher(model, draw_samples([28, 9, 30]))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_other_samples_are_batched_with_longer_ones_as_before():
    seen, model = [], language_model("gpt2")
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    estimate_fisher(model, draw_samples([9, 8, 7, 6] * 4, left=0), batch_size=4, tokens_per_batch=None)
    assert (4, 9) in [tuple(shape) for shape in seen]
