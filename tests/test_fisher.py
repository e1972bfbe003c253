"""The batched Fisher against slow, obviously right ones in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, FISHER_ONLY, PARTLY_FLOAT32, language_model
from fisher_oracles import assert_exact, draw_samples, own_loss_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from guided_dropout import FisherProfile, estimate_fisher
from guided_dropout.detection import detect_objective
from guided_dropout.errors import DataError, ModelError
from guided_dropout.fisher.check import checked_plan
from guided_dropout.fisher.fast import BatchedSquares
from guided_dropout.fisher.ranking import RankingTest
from guided_dropout.fisher.totals import Totals
from guided_dropout.fisher.variants import SHORT
from guided_dropout.sites import find_sites

VOCAB = 61


def assert_close(found, expected, *, rtol=1e-5):
    """Per tensor, in the norm; a tensor whose true value is zero may hold rounding noise, squared."""
    assert found.keys() == expected.keys()
    largest = max(t.norm() for t in expected.values())
    for name, want in expected.items():
        error = (found[name].double() - want).norm()
        assert error <= rtol * want.norm() + 1e-11 * largest, f"{name}: {error:.2e} of {want.norm():.2e}"


def bert(width, layers, heads, seed, pad=0, positions=24):
    torch.manual_seed(seed)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB, hidden_size=width * heads, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=20, max_position_embeddings=positions, pad_token_id=pad,
        )
    )  # fmt: skip


def gpt2(width, layers, heads, seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_embd=width * heads, n_layer=layers, n_head=heads, n_positions=24,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def llama(width, layers, heads, seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=2 * width * heads, num_hidden_layers=layers, num_attention_heads=2 * heads,
            num_key_value_heads=heads, intermediate_size=20, max_position_embeddings=24,
            tie_word_embeddings=bool(seed % 2),
        )
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    make=st.sampled_from([bert, gpt2, llama]),
    width=st.sampled_from([4, 8]),
    layers=st.integers(1, 2),
    heads=st.integers(2, 3),
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=7),
    batch_size=st.integers(1, 8),
    share=st.floats(0, 1),
    seed=st.integers(0, 10_000),
)
def test_equals_the_models_own_loss_one_sample_at_a_time(make, width, layers, heads, lengths, batch_size, share, seed):
    model = make(width, layers, heads, seed)
    samples = draw_samples(lengths, seed=seed, share=share)
    profile = estimate_fisher(model, samples, batch_size=batch_size)
    assert profile.coverage["fallback"] == []
    assert profile.num_samples == len(samples)
    assert_close(profile.diagonal, own_loss_oracle(model, samples))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_padding_given_by_the_caller_is_ignored(family):
    model = language_model(family).double()
    bare = draw_samples([6, 9])
    padded = [
        {
            "input_ids": nn.functional.pad(s["input_ids"], (0, 4)),
            "labels": nn.functional.pad(s["labels"], (0, 4), value=-100),
            "attention_mask": torch.tensor([1] * len(s["labels"]) + [0] * 4),
        }
        for s in bare
    ]
    expected = estimate_fisher(model, bare).tensor_means
    for name, mean in estimate_fisher(model, padded).tensor_means.items():
        assert mean == pytest.approx(expected[name], rel=1e-9, abs=1e-16)


def test_a_pad_token_in_the_text_gets_no_lookup_gradient_but_counts_at_the_head():
    """As in autograd: the embedding's padding row is constant, the tied head's row is not."""
    model = bert(4, 1, 2, seed=3)
    samples = draw_samples([8, 6], low=0)
    samples[0]["input_ids"][2] = samples[1]["input_ids"][0] = 0
    profile = estimate_fisher(model, samples)
    assert profile.coverage["fallback"] == []
    assert_close(profile.diagonal, own_loss_oracle(model, samples))


def test_sum_reduction_scales_each_sample_by_its_targets():
    model = bert(4, 1, 2, seed=5).double()
    samples = draw_samples([7, 7, 12], share=1.0)
    expected = estimate_fisher(model, samples, reduction="sum", method="reference").tensor_means
    found = estimate_fisher(model, samples, reduction="sum").tensor_means
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert (
        found["bert.embeddings.LayerNorm.weight"]
        > estimate_fisher(model, samples).tensor_means["bert.embeddings.LayerNorm.weight"]
    )


def test_samples_without_a_target_are_skipped_and_counted():
    model = bert(4, 1, 2, seed=1)
    samples = draw_samples([6, 8, 5])
    blank = {"input_ids": torch.arange(5, 10), "labels": torch.full((5,), -100)}
    with_blanks = estimate_fisher(model, [blank, samples[0], blank, *samples[1:]], batch_size=2)
    assert (with_blanks.num_samples, with_blanks.num_skipped) == (3, 2)
    assert with_blanks.tensor_means == pytest.approx(estimate_fisher(model, samples).tensor_means, rel=1e-5, abs=1e-14)


def test_accepts_lists_and_a_generator_and_reports_progress():
    model = gpt2(4, 1, 2, seed=1)
    samples = draw_samples([6, 8, 5])
    seen = []
    lists = ({k: v.tolist() for k, v in s.items()} for s in samples)
    profile = estimate_fisher(model, lists, batch_size=2, progress=seen.append)
    assert seen == [2, 3]
    assert profile.tensor_means == pytest.approx(estimate_fisher(model, samples).tensor_means, rel=1e-5, abs=1e-14)


def test_the_model_comes_back_as_it_was():
    model = bert(4, 2, 2, seed=1).train()
    model.bert.embeddings.eval()
    frozen = model.bert.encoder.layer[0].output.dense.weight.requires_grad_(False)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    model.cls.predictions.bias.grad = torch.ones(VOCAB)
    rng = torch.get_rng_state()
    with torch.no_grad():
        estimate_fisher(model, draw_samples([6, 8]))
    assert [m.training for m in model.modules()] == modes
    assert {p for p in model.parameters() if not p.requires_grad} == {frozen}
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["cls.predictions.bias"]
    assert torch.equal(rng, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Recurrent(nn.Module):
    """A next-token model; notes whether cuDNN, whose RNNs take no backward in evaluation mode, has a part in it."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.rnn = nn.Embedding(VOCAB, 4), kind(4, 4, batch_first=True)
        self.head, self.with_cudnn = nn.Linear(4, VOCAB), []

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels=None):
        self.with_cudnn.append(torch.backends.cudnn.enabled)
        x = self.embedding(input_ids)
        logits = self.head(self.rnn(x)[0] if isinstance(self.rnn, nn.RNNBase) else self.rnn(x))
        loss = None if labels is None else nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
        return SimpleNamespace(logits=logits, loss=loss)


@pytest.mark.parametrize(
    ("kind", "with_cudnn"), [(nn.LSTM, False), (nn.GRU, False), (lambda m, n, **_: nn.Linear(m, n), True)]
)
def test_recurrent_layers_are_exact_and_not_left_to_cudnn(kind, with_cudnn):
    model, samples = Recurrent(kind).double(), draw_samples([6, 8, 5])
    profile = estimate_fisher(model, samples, batch_size=2)
    assert set(model.with_cudnn) == {with_cudnn}
    assert torch.backends.cudnn.enabled
    assert_close(profile.diagonal, own_loss_oracle(model, samples), rtol=1e-6)


class OddLayer(nn.Module):
    """Has the samples in the opposite order in one operation, and not in another."""

    def __init__(self, width):
        super().__init__()
        self.gate = nn.Linear(width, width)
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(self.gate(x.flip(0)).flip(0))


def test_parameters_whose_samples_cannot_be_told_apart_take_the_loop_and_are_named():
    model = bert(4, 1, 2, seed=2)
    odd = OddLayer(8)
    model.bert.encoder.layer[0].output.register_forward_hook(lambda m, a, out: odd(out))
    model.bert.encoder.layer[0].output.odd = odd
    samples = draw_samples([6, 8, 5])
    profile = estimate_fisher(model.double(), samples, batch_size=3)
    path = "bert.encoder.layer.0.output.odd."
    assert profile.coverage["reasons"][f"{path}gate.weight"] == "rows of linear are not in the samples' order"
    assert 0 < profile.coverage["parameters_by_rule"] < 1
    want = estimate_fisher(model, samples, method="reference")
    assert profile.tensor_means == pytest.approx(want.tensor_means, rel=1e-9, abs=1e-14)
    assert f"{path}linear.weight" not in profile.coverage["fallback"]


class Typed(nn.Module):
    """Asks one parameter for its type, by which another operation of it goes."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width) + 0.1)

    def forward(self, x):
        return nn.functional.linear(x.float().type_as(self.weight).to(self.weight), self.weight)


def test_a_parameter_may_be_asked_for_its_type():
    model = bert(4, 1, 2, seed=2)
    typed = Typed(8)
    model.bert.encoder.layer[0].output.register_forward_hook(lambda m, a, out: typed(out))
    model.bert.encoder.layer[0].output.typed = typed
    samples = draw_samples([6, 8, 5])
    profile = estimate_fisher(model, samples, batch_size=3)
    assert profile.coverage["fallback"] == []
    want = estimate_fisher(model, samples, method="reference")
    assert profile.tensor_means == pytest.approx(want.tensor_means, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("buffer", [torch.ones(1).expand(8), torch.ones(8, requires_grad=True)])
def test_a_buffer_that_cannot_be_written_to_is_left_alone(buffer):
    model = bert(4, 1, 2, seed=2)
    output = model.bert.encoder.layer[0].output
    output.register_buffer("odd", buffer)
    output.register_forward_hook(lambda m, a, out: out * m.odd)
    samples = draw_samples([6, 8, 5])
    assert estimate_fisher(model, samples, batch_size=3).num_samples == 3
    assert output.odd is buffer


class OddWithSome(nn.Module):
    """Has half of each sample in another's place in one operation, for long or for short samples only."""

    def __init__(self, width, long):
        super().__init__()
        self.linear, self.long = nn.Linear(width, width), long

    def exchanged(self, x):
        half = x.shape[1] // 2
        odd = (x.shape[1] > SHORT + 2) == self.long
        return torch.cat([x[:, :half].flip(0), x[:, half:]], 1) if odd else x

    def forward(self, x):
        return x + self.exchanged(self.linear(self.exchanged(x)))


@pytest.mark.parametrize("long", [True, False])
def test_what_a_model_does_with_samples_of_their_own_length_is_proved(long):
    """Although a plan is made on a few tokens."""
    model = bert(4, 2, 2, seed=2)
    odd = OddWithSome(8, long)
    model.bert.encoder.layer[0].output.register_forward_hook(lambda m, a, out: odd(out))
    model.bert.encoder.layer[0].output.odd = odd
    samples = draw_samples([22, 24, 21])
    profile = estimate_fisher(model.double(), samples, batch_size=3)
    path = "bert.encoder.layer.0.output.odd.linear"
    assert profile.coverage["fallback"] == ([f"{path}.bias", f"{path}.weight"] if long else [])
    want = estimate_fisher(model, samples, method="reference")
    assert profile.tensor_means == pytest.approx(want.tensor_means, rel=1e-9, abs=1e-14)


def test_little_is_run_before_the_first_batch():
    """Two samples without gradients, another two in a batch twice, and three alone; the rest is a few tokens each."""
    model = bert(4, 1, 2, seed=2, positions=512).requires_grad_(False)
    samples = draw_samples([512, 500, 490, 480])
    tokens = []
    model.register_forward_pre_hook(lambda m, a, k: tokens.append(k["input_ids"].numel()), with_kwargs=True)
    estimate_fisher(model, samples, batch_size=4)
    assert sum(tokens) - 4 * 512 < 10 * 512


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "no samples"),
        ([{"input_ids": [5, 6]}], "sample 0 holds .*expected a mapping with input_ids and labels"),
        ([{"input_ids": [], "labels": []}], "sample 0 is empty"),
        ([{"input_ids": [5, 6], "labels": [5]}], "sample 0 has 1 labels for 2 input_ids"),
        ([{"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [1]}], "sample 0 has 1 attention_mask for 2"),
        ([{"input_ids": [5, 61], "labels": [5, 6]}], "sample 0 has 61 in its input_ids; expected 0 to 60"),
        ([{"input_ids": [5, 6], "labels": [5, -1]}], "sample 0 has -1 in its labels; expected 0 to 60"),
        (
            [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [5], "labels": [6], "token_type_ids": [1]}],
            "only sample 1 of samples 0 and 1 holds token_type_ids",
        ),
        ([{"input_ids": [[5, 6]], "labels": [5, 6]}], "expected one dimension of integers"),
        ([{"input_ids": [5, 6], "labels": [-100, -100]}], "none of the 1 samples has a target"),
        ([{"input_ids": [5, 6], "labels": [5, 6], "pixels": [1, 2]}], "'pixels', which BertForMaskedLM does not take"),
    ],
)
def test_bad_samples_are_named(samples, message):
    with pytest.raises(DataError, match=message):
        estimate_fisher(bert(4, 1, 2, seed=0), samples)


def test_inference_mode_is_refused_and_no_grad_changes_nothing():
    model, samples = bert(4, 1, 2, seed=0), draw_samples([5, 7])
    with torch.inference_mode(), pytest.raises(ModelError, match="call estimate_fisher after the block"):
        estimate_fisher(model, samples)
    with torch.no_grad():
        found = estimate_fisher(model, samples)
    assert found.tensor_means == estimate_fisher(model, samples).tensor_means


@pytest.mark.parametrize("family", [bert, gpt2])
def test_an_autocast_around_the_call_changes_nothing(family):
    model, samples = family(4, 1, 2, seed=0), draw_samples([5, 7])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = estimate_fisher(model, samples)
    assert found.tensor_means == estimate_fisher(model, samples).tensor_means


def test_a_model_without_a_head_and_a_wrong_objective_are_refused():
    samples = draw_samples([5])
    with pytest.raises(ModelError, match="BertModel has no language-model head"):
        estimate_fisher(BertModel(bert(4, 1, 2, seed=0).config), samples)
    with pytest.raises(ModelError, match="computes the mlm loss itself, not causal"):
        estimate_fisher(bert(4, 1, 2, seed=0), samples, objective="causal")


BAD = VOCAB - 1


class _Amplified(torch.autograd.Function):
    """The same forward; the gradient of the positions in `mask` beyond what float32 squares can hold."""

    @staticmethod
    def forward(ctx, x, mask):
        ctx.mask = mask
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.where(ctx.mask[..., None], g * 1e30, g), None


def spoilt(how):
    """A model for which a sample that holds the token BAD has a NaN loss, or a finite one and squares that overflow."""
    model = llama(4, 1, 2, seed=0)
    if how == "loss":
        with torch.no_grad():
            model.model.embed_tokens.weight[BAD] = float("nan")
            model.lm_head.weight[BAD] = 0
    else:
        model.model.embed_tokens.register_forward_hook(lambda m, args, out: _Amplified.apply(out, args[0] == BAD))
    return model


def samples_with_bad(lengths, bad):
    samples = draw_samples(lengths, vocab=VOCAB - 1)
    for i in bad:
        samples[i]["input_ids"][0] = BAD
    return samples


@pytest.mark.parametrize("method", ["batched", "reference"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("loss", r"the loss of sample 3 \(from 0\) is nan; .*--skip-nonfinite"),
        ("squares", r"the squared gradients of sample 3 \(from 0\) overflow; .*--skip-nonfinite"),
    ],
)
def test_a_sample_that_is_not_finite_is_named(how, message, method):
    samples = samples_with_bad([5, 6, 7, 20, 5], bad=[3])
    with pytest.raises(ModelError, match=message):
        estimate_fisher(spoilt(how), samples, batch_size=2, method=method)


@pytest.mark.parametrize(
    ("dtype", "advice"), [(torch.float32, "in float32 or float64, leave"), (torch.float64, "in float32, leave")]
)
def test_the_advice_is_of_another_precision(dtype, advice):
    with pytest.raises(ModelError, match=advice):
        estimate_fisher(spoilt("loss").to(dtype), samples_with_bad([5, 6, 7], bad=[1]))


@pytest.mark.parametrize("how", ["loss", "squares"])
def test_several_in_a_batch_are_all_named(how):
    with pytest.raises(ModelError, match="samples 1, 2 and 4 "):
        estimate_fisher(spoilt(how), samples_with_bad([5, 6, 7, 20, 5], bad=[1, 2, 4]))


@pytest.mark.parametrize("method", ["batched", "reference"])
@pytest.mark.parametrize("how", ["loss", "squares"])
@pytest.mark.parametrize("bad", [[2], [0, 1, 6], [3, 4, 5]])
def test_what_is_not_finite_can_be_left_out_and_is_counted(how, bad, method):
    model, samples = spoilt(how), samples_with_bad([5, 6, 7, 20, 5, 9, 9], bad=bad)
    profile = estimate_fisher(model, samples, batch_size=3, nonfinite="skip", method=method)
    assert profile.coverage["nonfinite"] == bad
    good = [s for i, s in enumerate(samples) if i not in bad]
    expected = estimate_fisher(model, good)
    assert profile.num_samples == expected.num_samples == len(good)
    assert_close(profile.diagonal, {n: t.double() for n, t in expected.diagonal.items()}, rtol=1e-6)
    assert method == "reference" or profile.coverage["fallback"] == expected.coverage["fallback"] == []
    assert "nonfinite" not in expected.coverage


def test_an_overflow_late_in_a_long_run_takes_nothing_else_with_it():
    """Later than the float32 sums are flushed."""
    model = spoilt("squares")
    samples = draw_samples([4] * 40, vocab=VOCAB - 1)
    overflows = {"input_ids": torch.tensor([BAD, 5]), "labels": torch.tensor([5, 6])}
    profile = estimate_fisher(model, [*samples * 30, overflows], batch_size=100, nonfinite="skip")
    assert (profile.num_samples, profile.coverage["nonfinite"]) == (1200, [1200])
    assert_close(
        profile.diagonal, {n: t.double() for n, t in estimate_fisher(model, samples).diagonal.items()}, rtol=1e-6
    )


def test_an_overflow_after_resuming_takes_nothing_of_the_state_with_it(tmp_path):
    """The first part of the run did not know that samples would be left out."""
    model, samples = spoilt("squares"), samples_with_bad([9, 9, 8, 8, 7, 6], bad=[5])
    kept = {"batch_size": 2, "checkpoint": tmp_path / "c"}

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate_fisher(model, samples, progress=stop, **kept)
    profile = estimate_fisher(model, samples, resume=True, nonfinite="skip", **kept)
    assert profile.coverage["nonfinite"] == [5]
    expected = estimate_fisher(model, samples[:5]).diagonal
    assert_close(profile.diagonal, {n: t.double() for n, t in expected.items()}, rtol=1e-6)


@pytest.mark.parametrize("bad", [[0, 1], [9], [3, 13, 14]])
def test_a_rule_is_not_told_of_a_sample_that_overflows(bad):
    """Neither of it nor twice of those that are run again without it."""
    model, samples = spoilt("squares"), samples_with_bad([5, 6, 7, 20, 5] * 3, bad=bad)
    groups = {name: [name] for name, p in model.named_parameters() if p.dim() > 1}
    found, expected = RankingTest(groups), RankingTest(groups)
    profile = estimate_fisher(model, samples, batch_size=4, nonfinite="skip", until_ranked=found)
    good = [s for i, s in enumerate(samples) if i not in bad]
    estimate_fisher(model, good, batch_size=4, until_ranked=expected)
    assert profile.num_samples == found.samples == expected.samples == len(good)
    assert profile.coverage["nonfinite"] == bad
    np.testing.assert_allclose(found.state()["mean"], expected.state()["mean"], rtol=1e-6)
    np.testing.assert_allclose(found.state()["excess"], expected.state()["excess"], rtol=1e-4, atol=1e-20)


def sliding_window(layers):
    """In float64 a row of padding beyond the window attends to nothing and is NaN, and then so is all of the sample."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=20, max_position_embeddings=40, sliding_window=4, attn_implementation="eager",
    )  # fmt: skip
    model = MistralForCausalLM(config).double()
    with torch.no_grad():
        model.model.embed_tokens.weight[BAD] = float("nan")
    return model


@pytest.mark.parametrize("layers", [1, 2])  # with one layer the losses are finite, and the gradients are not
@pytest.mark.parametrize("lengths", [[6, 30, 5, 9], [30, 6, 30, 5, 12]])
def test_what_padding_makes_nan_is_no_samples_fault(layers, lengths, tmp_path):
    model, samples = sliding_window(layers), samples_with_bad(lengths, bad=[])
    expected = own_loss_oracle(model, samples)
    profile = estimate_fisher(model, samples)
    assert profile.num_samples == len(samples)
    assert_close(profile.diagonal, expected, rtol=1e-6)
    profile = estimate_fisher(model, samples, batch_size=2, checkpoint=tmp_path, checkpoint_every=0)  # looks at each
    assert_close(profile.diagonal, expected, rtol=1e-6)

    samples.insert(1, samples_with_bad([11], bad=[0])[0])
    rule = RankingTest({name: [name] for name in expected})
    profile = estimate_fisher(model, samples, nonfinite="skip", until_ranked=rule)
    assert (profile.num_samples, rule.samples) == (len(lengths), len(lengths))
    assert profile.coverage["nonfinite"] == [1]
    assert_close(profile.diagonal, expected, rtol=1e-6)
    with pytest.raises(ModelError, match="the loss of sample 1 "):
        estimate_fisher(model, samples)


def test_no_finite_sample_at_all_is_an_error():
    with pytest.raises(ModelError, match="a loss that is NaN or infinite for each of the first 2 samples"):
        estimate_fisher(spoilt("loss"), samples_with_bad([5, 6], bad=[0, 1]), nonfinite="skip")


def test_profile_is_saved_whole_and_read_back(tmp_path):
    profile = estimate_fisher(bert(4, 1, 2, seed=0), draw_samples([5, 9]), facts={"seed": 3})
    folder = profile.save_pretrained(tmp_path / "p")
    assert sorted(f.name for f in folder.iterdir()) == ["README.md", "fisher.safetensors", "profile.json"]
    back = FisherProfile.from_pretrained(folder)
    assert back.tensor_means == profile.tensor_means
    assert list(back.diagonal) == list(profile.diagonal)
    assert all(torch.equal(back.diagonal[n], profile.diagonal[n]) for n in profile.diagonal)
    assert all(t.dtype == torch.float32 for t in back.diagonal.values())
    assert back.provenance["seed"] == 3
    assert "BertForMaskedLM" in (folder / "README.md").read_text()
    assert list(tmp_path.iterdir()) == [folder]


def squares_of(model, samples, **options):
    """`BatchedSquares` after these samples, in batches of three."""
    parameters = dict(model.eval().requires_grad_(False).named_parameters())
    goal = detect_objective(model, samples[0])
    squares = BatchedSquares(model, goal, parameters, checked_plan(model, goal, parameters, samples), **options)
    added = [squares.add(samples[i : i + 3]) for i in range(0, len(samples), 3)]
    return squares, added


@pytest.mark.parametrize("family", sorted({*FAMILIES, *FISHER_ONLY} - PARTLY_FLOAT32))
def test_scores_only_and_sums_per_sample_equal_the_whole(family):
    samples = draw_samples([9, 5, 11, 7, 9])
    model = language_model(family).double()
    model.set_experts_implementation("eager")
    whole, added = squares_of(model, samples, per_sample=True)
    scores, scored = squares_of(model, samples, scores_only=True, per_sample=True)
    expected = whole.totals.element_sums()
    assert scores.totals.element_sums() == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert scores.fallback == whole.fallback
    for name, sum_ in expected.items():
        rows = torch.cat([a.tensor_sums[name] for a in added])
        assert rows.shape == (5,)
        assert rows.sum().item() == pytest.approx(sum_, rel=1e-9, abs=1e-14)
        torch.testing.assert_close(torch.cat([a.tensor_sums[name] for a in scored]), rows, rtol=1e-9, atol=1e-14)
    assert all(scores.totals[name].dim() == 0 for name in scores.totals)


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("bert", "key.bias"),
        ("roberta", "key.bias"),
        ("distilbert", "k_lin.bias"),
        ("opt", "k_proj.bias"),
        ("gpt2", None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[14, 12], [9, 9], [30, 31]])
def test_tensors_without_a_true_gradient_are_found(family, part, dtype, lengths):
    """Softmax does not see what is added to all keys alike."""
    model = language_model(family).to(dtype).requires_grad_(False)
    samples = draw_samples(lengths)
    goal = detect_objective(model, samples[0])
    plan = checked_plan(model, goal, dict(model.named_parameters()), samples)
    assert plan.noise == {n for n, _ in model.named_parameters() if part and n.endswith(part)}
    assert not plan.fallback


def test_float32_sums_are_flushed_so_that_small_squares_are_not_lost():
    parameter = {"w": torch.zeros(3)}
    totals, plain = Totals(parameter), torch.zeros(3)
    big = torch.tensor([1e4, 0.0, 1.0])
    totals["w"].add_(big)
    plain.add_(big)
    for _ in range(50):
        for _ in range(64):
            totals["w"].add_(1e-5)
            plain.add_(1e-5)
            totals.counted(32)
    want = big.double() + 3200 * 1e-5
    assert (plain - want).abs().max() > 1e-2
    torch.testing.assert_close(totals.total("w"), want, rtol=1e-6, atol=0)
    again = Totals(parameter)
    again.load_state(totals.state())
    assert torch.equal(again.total("w"), totals.total("w"))
    assert totals.element_sums() == {"w": pytest.approx(want.sum().item(), rel=1e-6)}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_bfloat16_is_near(family):
    samples = draw_samples([9, 14, 11, 7, 9, 12, 10, 8])
    exact, _ = squares_of(language_model(family).double(), samples)
    half, _ = squares_of(language_model(family).to(torch.bfloat16), samples)
    assert not half.fallback
    assert all(half.totals[n].dtype == torch.float32 for n in half.totals)
    want, found = exact.totals.element_sums(), half.totals.element_sums()
    largest = max(want.values())
    assert all(
        found[n] == pytest.approx(w, rel=0.15, abs=1e-6 * largest) for n, w in want.items() if w > 1e-6 * largest
    )


def test_a_run_ends_when_the_order_of_the_sites_is_settled():
    model = language_model("bert")
    samples = draw_samples([9] * 400, seed=4)
    sites = {s.path: s.parameters for s in find_sites(model) if not s.in_head}
    test = RankingTest(sites, tolerance=3.0)
    profile = estimate_fisher(model, iter(samples), until_ranked=test, scores_only=True)
    ranking = profile.provenance["ranking"]
    assert ranking["settled"]
    assert 100 <= ranking["samples"] == profile.num_samples < 400
    assert list(profile.noise) == sorted(n for n, _ in model.named_parameters() if n.endswith("key.bias"))
    assert not profile.diagonal
    whole = estimate_fisher(model, samples[: profile.num_samples])
    assert profile.tensor_means == pytest.approx(whole.tensor_means, rel=1e-4, abs=1e-14)


class Narrow(nn.Module):
    """A linear layer whose weight is stored in fewer bits, as quantisers store it."""

    def __init__(self, linear, dtype):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / (127 if dtype == torch.int8 else 1)
        stored = linear.weight.detach() / scale
        self.weight = nn.Parameter((stored.round() if dtype == torch.int8 else stored).to(dtype), requires_grad=False)
        self.scale, self.bias = nn.Parameter(scale), linear.bias

    def forward(self, x):
        weight = self.weight.real if self.weight.is_complex() else self.weight
        return F.linear(x, weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_weights_without_a_derivative_are_refused_unless_they_are_not_asked_for(dtype):
    model, samples = language_model("bert").double(), draw_samples([6, 9, 7])
    for layer in model.bert.encoder.layer:
        layer.output.dense = Narrow(layer.output.dense, dtype)
    name = "bert.encoder.layer.0.output.dense.weight"
    kind = str(dtype).removeprefix("torch.")
    for choice in ("all", "base", lambda *_: True):
        message = rf"2 of the \d+ parameters .* have no derivative, {name} of {kind} .*--parameters trainable"
        with pytest.raises(ModelError, match=message):
            estimate_fisher(model, samples, parameters=choice)
    found = estimate_fisher(model, samples, parameters="trainable").diagonal
    chosen = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == chosen.keys() == {n for n, p in model.named_parameters() if p.dtype == torch.float64}
    want = {n: torch.zeros_like(p) for n, p in chosen.items()}
    for sample in samples:
        loss = model(**{k: v[None] for k, v in sample.items()}).loss
        for total, g in zip(
            want.values(), torch.autograd.grad(loss, [*chosen.values()], allow_unused=True), strict=True
        ):
            total += 0 if g is None else g**2 / len(samples)
    assert_exact(found, want)


def test_a_model_that_says_it_is_quantised_is_refused():
    model = language_model("bert")
    model.is_quantized = True  # as transformers sets it; some quantised weights are no parameters
    with pytest.raises(ModelError, match=r"BertForMaskedLM has quantised weights; .*: load it unquantised"):
        estimate_fisher(model, draw_samples([6]))
    assert estimate_fisher(model, draw_samples([6]), parameters="trainable").num_samples == 1
