"""The head that runs after its model's forward, on some samples' targets at a time."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import VOCAB, language_model
from fisher_oracles import assert_exact, draw_samples, own_loss_oracle
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from guided_dropout import estimate_fisher
from guided_dropout.detection import detect_objective
from guided_dropout.fisher.check import checked_plan
from guided_dropout.fisher.fast import BatchedSquares
from guided_dropout.fisher.late import LateHead
from guided_dropout.objectives import Objective
from guided_dropout.samples import INDEX

# Tied, tied with a bias, untied; masked, next token, sequence to sequence.
LATE = ("bert", "roberta", "distilbert", "modernbert", "gpt2", "opt", "llama", "qwen3", "xlnet", "t5")
# What the head makes is not what the model gives out: a bias is added, it is capped, or made float32.
NOT_LATE = ("bart", "gemma2", "mamba")


def squares_of(model, samples, at_once, *, batch_size=5, objective=None, parts=None, **options):
    """`BatchedSquares` of these samples, with so many targets at a time, and what each batch gave."""
    parameters = {n: p for n, p in model.requires_grad_(False).named_parameters() if parts is None or parts in n}
    goal = objective or detect_objective(model, samples[0])
    plan = checked_plan(model, goal, parameters, samples)
    squares = BatchedSquares(model, goal, parameters, plan, targets_at_once=at_once, **options)
    return squares, [squares.add(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]


def diagonal_of(squares, number):
    return {n: squares.totals.total(n) / number for n in squares.totals}


class LargestLogits(TorchDispatchMode):
    """How many rows of the vocabulary's size are made at once."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and out.shape[1] == VOCAB:
            self.rows = max(self.rows, len(out))
        return out


@pytest.mark.parametrize("at_once", [1, 8])
@pytest.mark.parametrize("family", LATE)
def test_groups_are_exact(family, at_once):
    model = language_model(family).double()
    samples = draw_samples([9, 5, 11, 7, 9])
    squares, added = squares_of(model, samples, at_once, per_sample=True)
    assert squares.plan.late is not None
    assert squares.fallback == {}
    assert_exact(diagonal_of(squares, 5), own_loss_oracle(model, samples))
    scores, scored = squares_of(model, samples, at_once, per_sample=True, scores_only=True)
    whole, expected = squares_of(model, samples, 10_000, per_sample=True)
    torch.testing.assert_close(added[0].losses, expected[0].losses)
    for name, sums in expected[0].tensor_sums.items():
        torch.testing.assert_close(added[0].tensor_sums[name], sums, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(scored[0].tensor_sums[name], sums, rtol=1e-9, atol=1e-14)
        assert scores.totals[name].item() == pytest.approx(whole.totals[name].sum().item(), rel=1e-9, abs=1e-14)


def test_an_untied_head_is_exact_in_groups():
    model = language_model("bert", tie_word_embeddings=False).double()
    samples = draw_samples([9, 5, 11, 7, 9])
    squares, _ = squares_of(model, samples, 8)
    assert squares.plan.late is not None
    assert_exact(diagonal_of(squares, 5), own_loss_oracle(model, samples))


@pytest.mark.parametrize("family", NOT_LATE)
def test_logits_that_are_changed_after_the_head_take_the_way_through_the_model(family):
    squares, _ = squares_of(language_model(family).double(), draw_samples([9, 5, 11]), 1)
    assert squares.plan.late is None
    assert squares.fallback == {}


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("scores_only", [False, True])
def test_no_more_logits_than_asked_for_are_made(family, scores_only):
    samples = draw_samples([9, 5, 11, 7, 9, 8, 8, 4], share=0.5)
    model = language_model(family)
    most = max(int((detect_objective(model, s).targets(s["labels"]) != -100).sum()) for s in samples)
    squares, _ = squares_of(model, samples, 8, scores_only=scores_only)
    with LargestLogits() as seen:
        squares.add(samples)
    assert 0 < seen.rows < 8 + most
    squares.targets_at_once = None
    with LargestLogits() as seen:
        squares.add(samples)
    assert seen.rows > 8 + most


class Bigram(nn.Module):
    """A next-token model as small as can be; `after` is what it does to its logits."""

    def __init__(self, after=lambda logits: logits, before=lambda model, x: x, tied=True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCAB, 6), nn.Linear(6, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.after, self.before = after, before

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels=None):
        logits = self.after(self.head(self.before(self, self.embedding(input_ids))))
        loss = None if labels is None else nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
        return SimpleNamespace(logits=logits, loss=loss)


@pytest.mark.parametrize(
    "after",
    [
        lambda z: z * 1.0,
        lambda z: z.mul_(0.5),
        lambda z: 30 * torch.tanh(z / 30),
        lambda z: z.copy_(1e3 * torch.tanh(z / 1e3)),
        lambda z: z.clone(),
    ],
    ids=["product", "in place", "cap", "cap in place", "copy"],
)
def test_whatever_happens_to_the_logits_is_seen(after):
    model, samples = Bigram(after).double(), draw_samples([9, 5, 11])
    squares, _ = squares_of(model, samples, 1)
    assert squares.plan.late is None
    assert_exact(diagonal_of(squares, 3), own_loss_oracle(model, samples))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last", [torch.tanh, torch.relu, lambda z: z.log_softmax(-1)])
def test_logits_that_their_own_backward_needs_are_left_alone(last, dtype):
    model, samples = Bigram(last).to(dtype), draw_samples([9, 5, 11, 7])
    profile = estimate_fisher(model, samples, batch_size=3)
    assert profile.coverage["fallback"] == []
    assert_exact(profile.diagonal, own_loss_oracle(model, samples), rtol=1e-6 if dtype == torch.float64 else 1e-4)


def test_a_head_that_something_hooks_into_stays_in_its_model():
    model, samples = Bigram().double(), draw_samples([9, 5, 11])
    model.head.register_forward_hook(lambda m, args, out: out / 2)
    squares, _ = squares_of(model, samples, 1)
    assert squares.plan.late is None
    assert_exact(diagonal_of(squares, 3), own_loss_oracle(model, samples))


def test_logits_that_are_changed_only_later_are_seen_then():
    """The plan was made on other batches."""
    state = SimpleNamespace(factor=1)
    model = Bigram(lambda z: z if state.factor == 1 else z * state.factor).double()
    samples = draw_samples([9, 5, 11, 7])
    squares, _ = squares_of(model, samples[:2], 1)
    assert squares.plan.late is not None
    squares.totals.clear()
    state.factor = 2
    squares.add(samples)
    assert squares.plan.late is None
    assert_exact(diagonal_of(squares, 4), own_loss_oracle(model, samples))


@pytest.mark.parametrize(
    "before",
    [
        lambda m, x: x @ m.embedding.weight.T @ m.embedding.weight,
        lambda m, x: x * m.embedding.weight[3],
        lambda m, x: x * m.embedding.weight.exp().mean(0),
    ],
    ids=["products", "a row of it", "made of it"],
)
def test_a_table_of_which_all_uses_must_be_added_up_first_is_exact(before):
    """Its products cannot be squared group by group."""
    model, samples = Bigram(before=before).double(), draw_samples([9, 5, 11, 7])
    squares, _ = squares_of(model, samples, 1)
    assert squares.plan.late is not None
    assert squares.fallback == {}
    assert_exact(diagonal_of(squares, 4), own_loss_oracle(model, samples))


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_nothing_is_added_where_a_loss_is_not_finite(family, place):
    """Whichever sample it is, also when others were there to be squared before it."""
    model, samples = language_model(family), draw_samples([9, 5, 11, 7, 9])
    bad = VOCAB - 1
    model.get_input_embeddings().register_forward_hook(
        lambda m, args, out: torch.where(args[0][..., None] == bad, torch.nan, out)
    )
    squares, _ = squares_of(model, samples, 1)
    assert squares.plan.late is not None
    squares.totals.clear()
    samples[place]["input_ids"][0] = bad
    added = squares.add(samples)
    assert added.losses.isfinite().tolist() == [i != place for i in range(5)]
    assert all(not squares.totals.total(n).any() for n in squares.totals)
    squares.add(samples[:place] + samples[place + 1 :])
    assert any(squares.totals.total(n).any() for n in squares.totals)


@pytest.mark.parametrize("bias", [False, True])
def test_nothing_is_added_where_only_the_logits_overflow(bias):
    """The hidden states are finite, and those of the first sample give finite logits."""
    model, samples = Bigram(tied=False), draw_samples([9, 5], share=1)
    if bias:
        model.head.bias = nn.Parameter(torch.zeros(VOCAB))
    squares, _ = squares_of(model, samples, 1)
    squares.totals.clear()
    samples[1]["input_ids"][0] = VOCAB - 1
    with torch.no_grad():
        model.embedding.weight[VOCAB - 1] = 1e38
        if bias:
            model.head.bias[4] = 3e38
        model.head.weight[4] = 1 if bias else 10
    squares.plan = replace(squares.plan, late=LateHead.of(model.head))
    added = squares.add(samples)
    assert added.losses.isfinite().tolist() == [True, False]
    assert all(not squares.totals.total(n).any() for n in squares.totals)


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_sample_without_targets_adds_nothing(family, place):
    model = language_model(family).double()
    samples = draw_samples([9, 5, 11, 7])
    expected, _ = squares_of(model, samples, 1)
    none = {**samples[1], "labels": torch.full_like(samples[1]["labels"], -100)}
    squares = BatchedSquares(
        model, expected.objective, expected.parameters, expected.plan, targets_at_once=1, per_sample=True
    )
    added = squares.add([*samples[:place], none, *samples[place:]])
    assert added.losses[place] == 0
    for name in squares.totals:
        torch.testing.assert_close(squares.totals.total(name), expected.totals.total(name), rtol=1e-9, atol=1e-14)
        assert added.tensor_sums[name][place] == 0


def test_drawn_labels_do_not_depend_on_the_groups():
    model = language_model("gpt2").double()
    samples = [{**s, INDEX: i} for i, s in enumerate(draw_samples([9, 5, 11, 7]))]
    objective = Objective("causal", labels="model", seed=3)
    small, whole = (squares_of(model, samples, n, objective=objective)[0] for n in (1, 10_000))
    for name in whole.totals:
        torch.testing.assert_close(small.totals.total(name), whole.totals.total(name), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("parts", ["lm_head", "layers.0", "embed_tokens"])
def test_some_of_the_parameters(parts):
    """Where none below the head are asked for, its input needs no gradient."""
    model, samples = language_model("llama").double(), draw_samples([9, 5, 11, 7])
    squares, _ = squares_of(model, samples, 1, parts=parts)
    expected = own_loss_oracle(model, samples)
    assert squares.plan.late is not None
    assert_exact(diagonal_of(squares, 4), {n: t for n, t in expected.items() if parts in n})


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_bfloat16_in_groups_is_as_good_as_whole(family):
    samples = draw_samples([9, 14, 11, 7, 9, 12])
    model = language_model(family).to(torch.bfloat16)
    small, whole = (squares_of(model, samples, n, batch_size=6)[0] for n in (1, 10_000))
    assert small.plan.late is not None
    for name in whole.totals:
        if name not in small.plan.noise:
            error = (small.totals.total(name) - whole.totals.total(name)).norm()
            assert error <= 0.05 * whole.totals.total(name).norm()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 40))
@example([0, 9, 0], 4)
@example([2, 0, 2], 1)
@example([77] * 8, 512)
def test_groups_are_whole_samples_in_order_and_about_as_large_as_asked_for(counts, at_once):
    offsets = (0, *itertools.accumulate(counts))
    groups = LateHead(nn.Linear(2, 3), 1.0, 1.0).groups(offsets, at_once)
    assert [i for g in groups for i in range(len(counts))[g]] == list(range(len(counts)))
    for g in groups:
        assert sum(counts[g]) < at_once + max(max(counts), 1)
    assert len(groups) == 1 or all(sum(counts[g]) for g in groups)
    assert len(groups) <= max(1, -(-sum(counts) // at_once))
