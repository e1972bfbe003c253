"""The end of a model, in which each position is by itself, run on the targets alone."""

from types import SimpleNamespace

import pytest
import torch
from families import VOCAB, language_model
from fisher_oracles import assert_exact, draw_samples, own_loss_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from guided_dropout import estimate_fisher
from guided_dropout.detection import detect_objective
from guided_dropout.fisher.check import checked_plan
from guided_dropout.fisher.fast import BatchedSquares

# Where a family's last attention has ended: what it gives out goes through this.
STARTS = {
    **{"bert": "encoder.layer.1.attention.output.dense", "roberta": "encoder.layer.1.attention.output.dense"},
    **{"electra": "encoder.layer.1.attention.output.dense", "deberta-v2": "encoder.layer.1.attention.output.dense"},
    **{"distilbert": "layer.1.attention.out_lin", "modernbert": "layers.1.attn.Wo"},
    **{"albert": "albert_layers.0.attention.dense", "llama": "layers.1.self_attn.o_proj"},
    **{"mixtral": "layers.1.self_attn.o_proj", "qwen2_moe": "layers.1.self_attn.o_proj"},
    **{"falcon": "h.1.self_attention.dense", "gpt_neox": "layers.1.attention.dense"},
    **{"bart": "decoder.layers.1.encoder_attn.out_proj", "t5": "decoder.block.1.layer.1.EncDecAttention.o"},
}


def squares_of(model, samples, **options):
    """`BatchedSquares` with a plan made on these samples, and nothing added."""
    if isinstance(model, PreTrainedModel):
        model.set_experts_implementation("eager")  # the grouped one takes no float64
    parameters = dict(model.requires_grad_(False).named_parameters())
    objective = detect_objective(model, samples[0])
    plan = checked_plan(model, objective, parameters, samples)
    return BatchedSquares(model, objective, parameters, plan, per_sample=True, **options)


def diagonal_of(squares, number):
    return {n: squares.totals.total(n) / number for n in squares.totals}


def start_of(squares):
    """The path of the module that the targets are taken before."""
    start = squares.plan.start
    return start and next(path for path, module in squares.model.named_modules() if module is start.module)


@pytest.mark.parametrize("family", STARTS)
def test_it_begins_after_the_last_attention_and_is_exact(family):
    model, samples = language_model(family).double(), draw_samples([9, 5, 11, 7, 9], share=0.2)
    squares = squares_of(model, samples)
    assert start_of(squares).endswith(STARTS[family])
    added = squares.add(samples)
    assert squares.plan.start is not None
    assert squares.fallback == {}
    assert_exact(diagonal_of(squares, 5), own_loss_oracle(model, samples))
    scores = squares_of(model, samples, scores_only=True)
    for name, sums in scores.add(samples).tensor_sums.items():
        torch.testing.assert_close(sums, added.tensor_sums[name], rtol=1e-9, atol=1e-14)


@given(st.lists(st.tuples(st.integers(4, 12), st.integers(1, 4)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=15)
@pytest.mark.parametrize("family", ["bert", "mixtral", "falcon"])
def test_any_number_of_targets_is_exact(family, sizes):
    """Also where there are as many of them as samples, or as tokens in one."""
    model = language_model(family).double()
    samples = draw_samples([length for length, _ in sizes], share=0)
    for sample, (length, number) in zip(samples, sizes, strict=True):
        at = torch.arange(length - number, length)
        sample["labels"][at] = sample["input_ids"][at]
    squares = squares_of(model, draw_samples([9, 5, 11]))
    squares.totals.clear()
    squares.add(samples)
    assert squares.plan.start is not None
    assert_exact(diagonal_of(squares, len(samples)), own_loss_oracle(model, samples))


@pytest.mark.parametrize("family", ["bert", "roberta", "bart"])
@pytest.mark.parametrize("length", [5, 9, 30])
def test_it_begins_there_too_where_the_first_samples_have_one_target_each(family, length):
    model, samples = language_model(family).double(), draw_samples([length, length - 1, length], share=0)
    squares = squares_of(model, samples)
    assert start_of(squares).endswith(STARTS[family])
    squares.totals.clear()
    squares.add(samples)
    assert_exact(diagonal_of(squares, 3), own_loss_oracle(model, samples))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", STARTS)
def test_it_begins_there_in_half_precision(family, dtype):
    """Where fewer positions are rounded otherwise than many."""
    squares = squares_of(language_model(family).to(dtype), draw_samples([29, 20, 27]))
    assert start_of(squares).endswith(STARTS[family])


@pytest.mark.parametrize(
    "name", ["sums of what was before", "one place on", "how many there are", "as many as were given"]
)
def test_half_precision_does_not_hide_what_is_not_by_itself(name):
    end, _ = ENDS[name]
    assert start_of(squares_of(Mixing(end).bfloat16(), draw_samples([9, 9, 9, 9]))) is None


def test_only_the_targets_are_run():
    model, samples = language_model("bert"), draw_samples([9, 5, 11, 7, 9], share=0.2)
    rows = []
    model.bert.encoder.layer[1].intermediate.dense.register_forward_hook(
        lambda m, args, out: rows.append(args[0].shape[:-1].numel())
    )
    squares = squares_of(model, samples)
    rows.clear()
    squares.add(samples)
    assert rows == [sum(int((s["labels"] >= 0).sum()) for s in samples)]


def test_shapes_that_a_model_takes_from_its_input_leave_it_as_it_is():
    """GPT-2 lays out its last states in as many positions as it was given."""
    model, samples = language_model("gpt2").double(), draw_samples([9, 5, 11])
    squares = squares_of(model, samples)
    assert start_of(squares) is None
    squares.totals.clear()
    squares.add(samples)
    assert_exact(diagonal_of(squares, 3), own_loss_oracle(model, samples))


class Mixing(nn.Module):
    """A next-token model that ends with what `end` does to its hidden states [B, T, d]."""

    def __init__(self, end):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCAB, 6), nn.Linear(6, VOCAB, bias=False)
        self.past, self.last, self.end = nn.Linear(6, 6), nn.Linear(6, 6), end

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels=None):
        x = self.embedding(input_ids)
        x = x + self.past(x).cumsum(1)
        logits = self.head(self.end(self, x))
        loss = None if labels is None else nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
        return SimpleNamespace(logits=logits, loss=loss)


ENDS = {
    "each by itself": (lambda m, x: x + torch.tanh(m.last(x)), "last"),
    "in place": (lambda m, x: (m.last(x) * 2).add_(x), "last"),
    "in place, on what a layer gave": (lambda m, x: m.last(x).add_(x), "last"),
    "sums of what was before": (lambda m, x: x + m.last(x).cumsum(1), None),
    "one place on": (lambda m, x: x + nn.functional.pad(m.last(x), (0, 0, 1, 0))[:, :-1], None),
    "how many there are": (lambda m, x: (y := m.last(x)) / y.shape[1], None),
    "as many as were given": (lambda m, x: (y := x.shape[1]) and m.last(x)[:, :y].view(-1, y, 6), None),
}


@pytest.mark.parametrize("name", ENDS)
def test_it_is_found_by_running_what_a_model_does(name):
    end, expected = ENDS[name]
    model, samples = Mixing(end).double(), draw_samples([9, 9, 9, 9])
    squares = squares_of(model, samples)
    assert start_of(squares) == expected
    squares.totals.clear()
    squares.add(samples)
    assert squares.fallback == {}
    assert_exact(diagonal_of(squares, 4), own_loss_oracle(model, samples))


def test_what_does_not_take_fewer_positions_later_is_seen_then():
    """The plan was made on other batches."""
    state = SimpleNamespace(mixes=False)
    model = Mixing(lambda m, x: m.last(x).view(-1, 11, 6) if state.mixes else m.last(x)).double()
    samples = draw_samples([11, 11, 11], share=0.5)
    squares = squares_of(model, samples)
    assert start_of(squares) == "last"
    squares.totals.clear()
    state.mixes = True
    squares.add(samples)
    assert squares.plan.start is None
    assert_exact(diagonal_of(squares, 3), own_loss_oracle(model, samples))


def test_targets_in_another_shape_are_not_taken_for_those_of_equal_samples():
    """DeepSeek-V4 ends in a product in groups. It ranks tokens, so that what is proved has as many targets a sample."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deepseek_v4", vocab_size=64, pad_token_id=0, hidden_size=32, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, q_lora_rank=16, qk_rope_head_dim=4, o_lora_rank=16,
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, sliding_window=8, index_n_heads=2,
        index_head_dim=8, index_topk=4, num_nextn_predict_layers=0, max_position_embeddings=64,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention"], mlp_layer_types=["moe", "moe"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double().eval()
    model.set_experts_implementation("eager")
    samples = draw_samples([24, 9, 9], share=1.0)
    samples[0]["labels"][6:18] = samples[2]["labels"][:5] = -100  # an even number in each batch
    name = "model.layers.1.self_attn.o_a_proj.weight"  # others are computed in float32 by the model itself
    found, want = estimate_fisher(model, samples, batch_size=3).diagonal[name], own_loss_oracle(model, samples)[name]
    assert (found - want).norm() < 1e-5 * want.norm()
