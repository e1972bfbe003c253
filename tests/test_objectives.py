"""Losses, drawn labels and classifiers, against plain autograd in float64."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import classifier_of, config_of, language_model
from fisher_oracles import assert_exact, draw_samples
from fisher_oracles import own_loss_oracle as each_own_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AlbertForPreTraining,
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BigBirdConfig,
    BigBirdForPreTraining,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    T5ForConditionalGeneration,
)

from guided_dropout import estimate_fisher
from guided_dropout.detection import NotFiniteError, detect_objective
from guided_dropout.errors import DataError, ModelError
from guided_dropout.objectives import Batch, Objective
from guided_dropout.samples import check_samples

CLASSIFIERS = ("bert", "roberta", "albert", "distilbert", "modernbert", "gpt2", "llama", "opt", "t5", "bart")


def labelled(lengths, labels, *, seed=0, eos=2):
    """Token rows that end in `eos`, which BART's and T5's classifiers look for."""
    g = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.cat([torch.randint(5, 64, (n - 1,), generator=g), torch.tensor([eos])]), "labels": y}
        for n, y in zip(lengths, labels, strict=True)
    ]


def tokens(lengths, *, seed=0, share=0.5, low=5):
    g = torch.Generator().manual_seed(seed)
    samples = []
    for n in lengths:
        ids = torch.randint(low, 64, (n,), generator=g)
        labels = torch.where(torch.rand(n, generator=g) < share, ids, -100)
        labels[-1] = ids[-1]
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def own_loss_oracle(model, samples, dtype):
    """Mean of the squared gradients of the model's own loss, one sample at a time."""
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for s in samples:
        model.zero_grad()
        model(input_ids=s["input_ids"][None], labels=torch.tensor([s["labels"]], dtype=dtype)).loss.backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                total[n] += p.grad**2
    model.zero_grad()
    model.config.problem_type = None
    return {n: (t / len(samples)).mean().item() for n, t in total.items()}


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifier_is_exact_with_its_own_loss_as_oracle(family):
    model = classifier_of(family, num_labels=3).double()
    samples = labelled([9, 5, 11, 7, 9], [0, 2, 1, 1, 0])
    profile = estimate_fisher(model, samples, batch_size=3)
    assert profile.objective == "classification"
    assert [n for n in profile.coverage["fallback"] if "relative_attention" not in n] == []
    assert profile.tensor_means == pytest.approx(own_loss_oracle(model, samples, torch.long), rel=1e-9, abs=1e-16)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_regression_is_exact_with_its_own_loss_as_oracle(family):
    model = classifier_of(family, num_labels=1).double()
    samples = labelled([9, 5, 11, 7, 9], [0.25, 3, -100.0, -1.5, 0])  # −100 is a score like any other
    profile = estimate_fisher(model, samples, batch_size=3)
    assert (profile.objective, profile.num_samples, profile.num_skipped) == ("regression", 5, 0)
    assert model.config.problem_type is None
    assert profile.tensor_means == pytest.approx(own_loss_oracle(model, samples, torch.double), rel=1e-9, abs=1e-16)


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart"])
@pytest.mark.parametrize("lengths", [[32, 32], [32, 20], [32]])
def test_samples_may_be_as_long_as_a_classifier_has_positions(family, lengths):
    model = classifier_of(family, num_labels=3).double()
    samples = labelled(lengths, [0, 2][: len(lengths)])
    profile = estimate_fisher(model, samples)
    assert profile.coverage["fallback"] == []
    assert profile.tensor_means == pytest.approx(own_loss_oracle(model, samples, torch.long), rel=1e-9, abs=1e-16)


def test_samples_may_be_as_long_as_a_language_model_has_positions():
    """With a target at their end alone."""
    samples = tokens([32, 32], share=0.0)
    profile = estimate_fisher(language_model("bert"), samples)
    assert (profile.num_samples, profile.coverage["fallback"]) == (2, [])


def test_a_sample_whose_class_is_unknown_is_skipped():
    model = classifier_of("bert", num_labels=3)
    samples = labelled([9, 5, 11], [-100, 2, 1])
    profile = estimate_fisher(model, samples, batch_size=2)
    assert (profile.num_samples, profile.num_skipped) == (2, 1)
    assert profile.tensor_means == pytest.approx(estimate_fisher(model, samples[1:]).tensor_means, rel=1e-5, abs=1e-14)


@pytest.mark.parametrize(
    ("model", "samples", "message"),
    [
        (classifier_of("bert", num_labels=3), labelled([5], [3]), "the label 3; expected an integer from 0 to 2"),
        (classifier_of("bert", num_labels=3), labelled([5], [0.5]), "the label 0.5; expected an integer from 0 to 2"),
        (classifier_of("bert", num_labels=1), labelled([5], [float("nan")]), "the label nan; expected a finite number"),
        (classifier_of("bert"), tokens([5]), "has 5 labels; expected a single number, as BertForSeq"),
        (language_model("bert"), labelled([5], [1]), "one label; expected one for each token, as BertForMaskedLM"),
        (classifier_of("bert"), labelled([5, 5], [0, "no"]), "labels is no sequence of integers"),
    ],
)
def test_labels_of_another_kind_are_named(model, samples, message):
    with pytest.raises(DataError, match=message):
        estimate_fisher(model, samples)


def test_classifiers_that_cannot_be_measured_are_refused():
    samples = labelled([5, 6], [0, 1])
    with pytest.raises(ModelError, match=r"no padding token is defined.*with config.pad_token_id set"):
        estimate_fisher(classifier_of("gpt2", pad_token_id=None), samples)
    with pytest.raises(ModelError, match="one label each"):
        estimate_fisher(classifier_of("bert", problem_type="multi_label_classification"), samples)
    with pytest.raises(ModelError, match="computes the classification loss itself, not mlm"):
        estimate_fisher(classifier_of("bert"), samples, objective="mlm")
    with pytest.raises(DataError, match="labels from 'both'; expected one of data, model"):
        estimate_fisher(classifier_of("bert"), samples, labels="both")


class PassingOn(BertForSequenceClassification):
    """Takes its labels through keywords, as Qwen 3.5's classifier does."""

    def forward(self, input_ids, attention_mask=None, **others):
        return super().forward(input_ids, attention_mask, **others)


class Deaf(BertForSequenceClassification):
    def forward(self, input_ids, attention_mask=None, **others):
        return super().forward(input_ids, attention_mask)


def test_labels_may_be_passed_on_as_keywords():
    config = config_of("bert", num_labels=3)
    assert detect_objective(PassingOn(config), labelled([9], [2])[0]).name == "classification"
    with pytest.raises(ModelError, match="Deaf has no language-model head; expected a masked or causal"):
        detect_objective(Deaf(config), labelled([9], [2])[0])


@pytest.mark.parametrize("error", [ValueError, AssertionError, AttributeError, torch.OutOfMemoryError])
@pytest.mark.parametrize(
    ("model", "sample"),
    [
        (language_model("gpt2"), tokens([9])[0]),
        (language_model("t5"), tokens([9])[0]),
        (classifier_of("bert"), labelled([9], [1])[0]),
    ],
    ids=["gpt2", "t5", "classifier"],
)
def test_a_model_that_does_not_run_is_told_and_full_memory_stays_what_it_is(model, sample, error):
    def fail(module, args, kwargs):
        raise error("no\npicture")

    handle = model.register_forward_pre_hook(fail, with_kwargs=True)
    expected, told = (
        (error, "picture") if error is torch.OutOfMemoryError else (ModelError, r"run .* \(no picture\); exp")
    )
    with handle, pytest.raises(expected, match=told):
        detect_objective(model, sample)


def test_an_encoder_decoder_without_a_start_token_is_told():
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("longt5", vocab_size=64, **shape))
    with pytest.raises(ModelError, match=r"no attribute 'decoder_start_token_id'.*: give decoder_input_ids"):
        detect_objective(model, tokens([9])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_objectives_are_found_in_each_precision(dtype):
    for family, name in (("bert", "mlm"), ("gpt2", "causal"), ("llama", "causal"), ("t5", "seq2seq")):
        assert detect_objective(language_model(family).to(dtype), tokens([9])[0]).name == name
    for num_labels, label, name in ((3, 2, "classification"), (1, 0.7, "regression")):
        model = classifier_of("bert", num_labels=num_labels).to(dtype)
        assert detect_objective(model, labelled([9], [label])[0]).name == name


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gpt2", "bert", "modernbert"])
@pytest.mark.parametrize("ids", [[5], [7] * 20, [0] * 16 + [5, 6, 7]])
def test_equal_tokens_do_not_hide_what_a_model_predicts(family, ids):
    name = "mlm" if family in ("bert", "modernbert") else "causal"
    sample = {"input_ids": ids, "labels": [-100 if i == 0 else i for i in ids]}
    assert detect_objective(language_model(family), sample).name == name


def spoilt_logits(model, change):
    """`change` is called with the logits, to change them in place."""

    def hook(module, args, logits):
        change(logits)

    model.get_output_embeddings().register_forward_hook(hook)
    return model


def test_a_loss_that_is_not_finite_tells_nothing():
    nan = spoilt_logits(language_model("gpt2"), lambda z: z.fill_(torch.nan))
    with pytest.raises(NotFiniteError, match="GPT2LMHeadModel computes a loss of nan for a sample; expected a finite"):
        detect_objective(nan, tokens([9])[0])
    endless = spoilt_logits(language_model("bert"), lambda z: z[..., 5:].fill_(-torch.inf))
    with pytest.raises(NotFiniteError, match="BertForMaskedLM computes a loss of inf"):
        detect_objective(endless, tokens([9])[0])
    classifier = classifier_of("bert")
    classifier.classifier.bias.data.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="BertForSequenceClassification computes a loss of nan"):
        detect_objective(classifier, labelled([9], [1])[0])


def test_a_nan_that_a_loss_does_not_see_does_not_mislead():
    """A next-token model's last logits predict nothing."""
    model = spoilt_logits(language_model("gpt2"), lambda z: z[:, -1].fill_(torch.nan))
    assert detect_objective(model, tokens([9])[0]).name == "causal"


# --- labels drawn from the model's own prediction


def enumerated(model, objective, sample):
    r"""The true Fisher of one sample: \sum_t \sum_c p_t(c) (d w_t log p_t(c))^2, in float64.

    The targets are drawn independently of each other and a score has mean zero, so nothing is left of mixed products.
    """
    parameters = dict(model.named_parameters())
    batch = objective.collate(model, [sample])
    logits = batch.at_targets(model(**batch.inputs).logits)
    weights = batch.weights[batch.mask].double()
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for t, c in itertools.product(*map(range, logits.shape)):
        score = logits[t].log_softmax(-1)[c]
        grads = torch.autograd.grad(score, list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, g in zip(parameters, grads, strict=True):
            if g is not None:
                total[name] += score.exp().detach() * (weights[t] * g) ** 2
    return {n: v.mean().item() for n, v in total.items()}


def sharpened(model, factor):
    """Far from uniform predictions, so that the empirical Fisher and the true one differ."""
    for p in model.parameters():
        p.data.mul_(factor)
    return model.double()


@pytest.mark.parametrize(
    ("model", "sample"),
    [
        (sharpened(classifier_of("bert", num_labels=3), 3), labelled([6], [0])[0]),
        (sharpened(language_model("gpt2", vocab_size=7), 4), {"input_ids": [3, 5, 4, 6], "labels": [3, 5, 4, 6]}),
        (sharpened(language_model("bert", vocab_size=7), 2), {"input_ids": [3, 5, 4], "labels": [-100, 6, 2]}),
    ],
    ids=["classifier", "causal", "mlm"],
)
def test_the_mean_over_many_draws_is_the_true_fisher(model, sample):
    draws = 3000
    means = estimate_fisher(model, [sample] * draws, batch_size=250, labels="model", seed=1)
    exact = enumerated(model, detect_objective(model, sample), sample)
    empirical = estimate_fisher(model, [sample]).tensor_means
    for name, want in exact.items():
        assert means.tensor_means[name] == pytest.approx(want, rel=0.1, abs=1e-9), name
    assert sum(abs(empirical[n] - want) > 0.2 * want for n, want in exact.items()) > len(exact) / 2


def test_the_true_fisher_of_a_regression_is_that_of_a_normal_of_variance_one_half():
    """-log N(y; f, 1/2) = (f - y)^2 + constant, whose Fisher is 2 (df)^2."""
    model = classifier_of("bert", num_labels=1).double()
    (sample,) = labelled([6], [40.0])
    drawn = estimate_fisher(model, [sample] * 4000, batch_size=500, labels="model")
    score = model(input_ids=sample["input_ids"][None]).logits[0, 0]
    grads = torch.autograd.grad(score, list(model.parameters()), allow_unused=True)
    for (name, p), g in zip(model.named_parameters(), grads, strict=True):
        want = 0.0 if g is None else 2 * (g**2).mean().item()
        assert drawn.tensor_means[name] == pytest.approx(want, rel=0.1, abs=1e-12 * p.numel())


@pytest.mark.parametrize(
    ("model", "samples"),
    [
        (language_model("bert"), tokens([4, 13, 6, 9, 9, 12, 3])),
        (language_model("gpt2"), tokens([4, 13, 6, 9, 9, 12, 3])),
        (language_model("t5"), tokens([4, 13, 6, 9, 9, 12, 3])),
        (classifier_of("llama", num_labels=5), labelled([4, 13, 6, 9, 9, 12, 3], [0, 1, 2, 3, 4, 0, 1])),
        (classifier_of("bert", num_labels=1), labelled([4, 13, 6, 9, 9, 12, 3], [0.5, 1, 2, 3, 4, 0, 1])),
    ],
    ids=["mlm", "causal", "seq2seq", "classification", "regression"],
)
def test_draws_do_not_depend_on_batching_order_or_method(model, samples):
    model = model.double()
    slow = estimate_fisher(model, samples, method="reference", labels="model", seed=5)
    assert (slow.labels, slow.provenance["seed"]) == ("model", 5)
    numbered = [{**s, "index": i} for i, s in enumerate(samples)]
    for batch_size, order in ((3, range(7)), (7, [3, 0, 6, 5, 1, 4, 2])):
        fast = estimate_fisher(model, [numbered[i] for i in order], batch_size=batch_size, labels="model", seed=5)
        assert fast.tensor_means == pytest.approx(slow.tensor_means, rel=1e-9, abs=1e-16)
    other = estimate_fisher(model, samples, labels="model", seed=6)
    assert other.tensor_means != pytest.approx(slow.tensor_means, rel=1e-2, abs=1e-16)


def test_a_seed_below_zero_is_named():
    with pytest.raises(DataError, match="seed -1; expected 0 or more"):
        estimate_fisher(language_model("bert"), tokens([4]), labels="model", seed=-1)


@settings(max_examples=25, deadline=None)
@given(classes=st.integers(1, 9), seed=st.integers(0, 99), scale=st.floats(0, 30))
def test_draws_follow_the_softmax(classes, seed, scale):
    logits = torch.randn(classes, generator=torch.Generator().manual_seed(seed)) * scale
    n = 2000
    batch = Batch({}, torch.zeros(n, 1), torch.ones(n, 1), tuple(range(n)))
    drawn = Objective("classification", labels="model", seed=seed).draw(logits.expand(n, -1), batch)
    p = logits.double().softmax(-1)
    found = torch.bincount(drawn, minlength=classes) / n
    assert found.shape == p.shape
    assert ((found - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 4 / n).all()  # 4 of n: a rare class


def test_many_targets_are_drawn_as_few_are(monkeypatch):
    logits = torch.randn(11, 7)
    batch = Batch({}, torch.zeros(1, 11), torch.ones(1, 11), (4,))
    whole = Objective("causal", labels="model").draw(logits, batch)
    monkeypatch.setattr("guided_dropout.objectives._DRAW_AT_ONCE", 15)
    assert torch.equal(Objective("causal", labels="model").draw(logits, batch), whole)


# --- the form of samples


def test_samples_come_back_as_tensors_and_numbered():
    model = language_model("bert")
    rows = [{"input_ids": [5, 6], "labels": np.array([-100, 6], dtype=np.int32)}, {"input_ids": [7], "labels": [7]}]
    first, second = check_samples(model, rows, first=10)
    assert first["input_ids"].dtype == first["labels"].dtype == torch.int64
    assert (first["index"], second["index"]) == (10, 11)
    assert [s["index"] for s in check_samples(model, [{**rows[0], "index": 3}, rows[1]])] == [3, 1]


ROW = {"input_ids": [5, 6], "labels": [5, 6]}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({**ROW, "text": "a b"}, "sample 8 holds 'text', which BertForMaskedLM does not take; .*: rename or drop it"),
        ({**ROW, "idx": 3}, "sample 8 holds 'idx', which BertForMaskedLM does not take; .*: rename or drop it"),
        ({**ROW, "labels": None}, "sample 8: labels is no sequence of integers, but None .* leave the sample out"),
        ({**ROW, "input_ids": "a b"}, "sample 8: input_ids is no sequence of integers, but a str, 'a b' .*: tokenise"),
        ({**ROW, "index": -1}, "sample 8 has the index -1; expected a whole number from 0, or none"),
        ({**ROW, "index": "a"}, "sample 8 has the index 'a'; expected a whole number"),
        ({**ROW, "index": 1.5}, "sample 8 has the index 1.5; expected a whole number"),
        ({**ROW, "input_ids": 5}, r"sample 8: input_ids has shape \(\) .*: give token numbers"),
        (
            {"input_ids": torch.ones(2, 15, dtype=torch.long), "labels": torch.ones(2, 15, dtype=torch.long)},
            r"sample 8: input_ids has shape \(2, 15\) .*: give single samples, without a dimension for a batch",
        ),
    ],
)
def test_first_mistakes_are_named_by_their_sample_with_a_remedy(second, message):
    with pytest.raises(DataError, match=message):
        list(check_samples(language_model("bert"), [ROW, second], first=7))


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "opt", "bart"])
def test_a_sample_longer_than_a_table_of_positions_is_refused(family):
    model = language_model(family)
    most = 31 if family == "roberta" else 32  # one is padding's
    (fits, beyond) = tokens([most, most + 1], share=1.0)
    assert estimate_fisher(model, [fits]).num_samples == 1
    with pytest.raises(DataError, match=rf"sample 1 has {most + 1} input_ids; expected at most {most}, the positions"):
        estimate_fisher(model, [fits, beyond])
    if family == "bart":
        with pytest.raises(DataError, match="sample 0 has 33 labels; expected at most 32"):
            estimate_fisher(model, [{**beyond, "input_ids": fits["input_ids"]}])


def test_positions_that_are_given_may_begin_anew_within_a_sample():
    (packed,) = tokens([40], share=1.0)
    packed["position_ids"] = torch.arange(40) % 20
    assert estimate_fisher(language_model("gpt2"), [packed]).num_samples == 1


@pytest.mark.parametrize("family", ["llama", "modernbert", "gpt_neox", "t5", "bloom"])
def test_without_a_table_of_positions_a_sample_may_be_longer_than_the_configuration_says(family):
    assert estimate_fisher(language_model(family), tokens([33], share=1.0)).num_samples == 1


@pytest.mark.parametrize("more", [{"decoder_input_ids": [0, 9, 8, 7]}, {"decoder_attention_mask": [1]}])
def test_what_the_decoder_reads_is_as_long_as_what_it_should_say(more):
    sample = {"input_ids": [5, 6, 7, 8], "labels": [9, 8], **more}
    with pytest.raises(DataError, match=rf"sample 0 has \d {next(iter(more))} for 2 labels"):
        estimate_fisher(language_model("t5"), [sample])


@pytest.mark.parametrize(("encoder", "decoder"), [(40, 64), (64, 40)])
def test_labels_are_of_the_decoders_vocabulary(encoder, decoder):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    both = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(vocab_size=encoder, **shape), BertConfig(vocab_size=decoder, **shape)
    )
    both.decoder_start_token_id, both.pad_token_id = 1, 0
    model = EncoderDecoderModel(config=both).double().eval()
    fits = {"input_ids": [5, encoder - 1, 7], "labels": [5, decoder - 1, 7]}
    profile = estimate_fisher(model, [fits, {"input_ids": [9, 8, 7], "labels": [6, 5, 4, 9]}])
    assert profile.objective == "seq2seq"
    with pytest.raises(DataError, match=f"sample 1 has {decoder} in its labels; expected 0 to {decoder - 1}"):
        estimate_fisher(model, [fits, {**fits, "labels": [5, decoder, 7]}])
    with pytest.raises(DataError, match=f"sample 1 has {encoder} in its input_ids; expected 0 to {encoder - 1}"):
        estimate_fisher(model, [fits, {**fits, "input_ids": [5, encoder, 7]}])


class Smoothed(BartForConditionalGeneration):
    def forward(self, labels=None, **inputs):
        out = super().forward(labels=labels, **inputs)
        if labels is not None:
            out.loss = F.cross_entropy(out.logits[0], labels[0], label_smoothing=0.3)
        return out


def test_a_decoder_with_a_loss_of_its_own_is_refused():
    sample = {"input_ids": [5, 6, 7, 8], "labels": [9, 8, -100, 7]}
    shape = {"hidden_size": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
    layers = {f"num_{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    torch.manual_seed(0)
    own = ProphetNetForConditionalGeneration(ProphetNetConfig(vocab_size=64, **shape, **layers, ngram=2))
    smoothed = Smoothed(language_model("bart").config)
    for model in (own, smoothed):
        nn.init.normal_(model.get_output_embeddings().weight)
        with pytest.raises(ModelError, match=r"computes a loss .* that is not the cross-entropy of what its decoder"):
            estimate_fisher(model.eval(), [sample])
    for family in ("t5", "bart", "mt5", "pegasus"):
        assert detect_objective(language_model(family), sample).name == "seq2seq"


def test_losses_are_those_of_the_targets_alone():
    objective = Objective("causal")
    model = language_model("gpt2")
    batch = objective.collate(model, tokens([3, 6, 4], share=1.0))
    logits = model(**batch.inputs).logits.double()
    each = [
        nn.functional.cross_entropy(row[: n - 1], s["labels"][1:])
        for row, n, s in zip(logits, (3, 6, 4), tokens([3, 6, 4], share=1.0), strict=True)
    ]
    torch.testing.assert_close(objective.losses(logits, batch), torch.stack(each), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_the_mean_over_any_number_of_targets_has_all_digits_of_float64(family):
    """A third, a seventh, … would have 24 bits in float32. (So have transformers' own next-token losses.)"""
    model = language_model(family).double()
    samples = tokens([4, 8, 12, 14, 20], share=1.0)
    for s, targets in zip(samples, (3, 7, 11, 13, 19), strict=True):
        s["labels"][:-targets] = -100
    found = estimate_fisher(model, samples, batch_size=2).tensor_means
    want = dict.fromkeys(found, 0.0)
    for s in samples:
        inputs = {"decoder_input_ids": nn.functional.pad(s["labels"][None, :-1], (1, 0)).clamp(min=0)}
        logits = model(input_ids=s["input_ids"][None], **(inputs if family == "t5" else {})).logits[0]
        logits, labels = (logits[:-1], s["labels"][1:]) if family == "gpt2" else (logits, s["labels"])
        model.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        for name, p in model.named_parameters():
            want[name] += 0.0 if p.grad is None else p.grad.square().mean().item() / len(samples)
    assert found == pytest.approx(want, rel=1e-12, abs=1e-18 * max(want.values()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "modernbert"])
def test_texts_packed_into_one_sample_are_kept_apart_as_the_model_keeps_them(family):
    model = language_model(family).double()
    model.config.use_cache = False  # with a cache transformers sees one text
    samples = draw_samples([12, 12, 7, 7, 9])
    for sample, anew in zip(samples, (5, 12, 3, 7, 8), strict=True):  # two of them are one text
        sample["position_ids"] = torch.arange(len(sample["input_ids"])) % anew
    profile = estimate_fisher(model, samples, batch_size=3)
    assert_exact(profile.diagonal, each_own_loss(model, samples))
    one_text = [{**s, "attention_mask": torch.ones_like(s["input_ids"])} for s in samples]
    assert_exact(estimate_fisher(model, one_text, batch_size=3).diagonal, each_own_loss(model, one_text))
    with pytest.raises(DataError, match="only sample 1 of samples 0 and 1 holds attention_mask"):
        estimate_fisher(model, [samples[0], one_text[1]])


def _two_berts():
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    both = EncoderDecoderConfig.from_encoder_decoder_configs(*(BertConfig(vocab_size=64, **shape) for _ in range(2)))
    both.decoder_start_token_id, both.pad_token_id = 1, 0
    return EncoderDecoderModel(config=both)


_BARTS = {
    **{"vocab_size": 64, "d_model": 16, "max_position_embeddings": 32, "pad_token_id": 0, "decoder_start_token_id": 2},
    **{f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 24))},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
}


def _encoder_decoder(kind):
    torch.manual_seed(0)
    if kind == "bert2bert":
        return _two_berts().eval().double()
    if kind in ("t5", "bart"):
        return language_model(kind).double()
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **_BARTS)).eval().double()


def _gaps(*, before=3):
    sources, targets = draw_samples([6, 9, 12, 7]), draw_samples([5, 12, 7, 4], seed=3, share=1.0)
    samples = [{"input_ids": a["input_ids"], "labels": b["labels"]} for a, b in zip(sources, targets, strict=True)]
    for sample in samples[1:]:
        sample["labels"][:before] = -100
    return samples


@pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")  # of the oracle's own forward
@pytest.mark.parametrize("kind", ["bert2bert", "t5", "bart", "m2m_100", "blenderbot", "blenderbot-small"])
def test_a_decoder_reads_labels_that_are_left_out_as_it_does_by_itself(kind):
    model = _encoder_decoder(kind)
    samples = _gaps()
    profile = estimate_fisher(model, samples, batch_size=3)
    assert profile.objective == "seq2seq"
    assert_exact(profile.diagonal, each_own_loss(model, samples))


class Otherwise(T5ForConditionalGeneration):
    def prepare_decoder_input_ids_from_labels(self, labels):
        return torch.zeros_like(labels)


def test_decoder_inputs_other_than_the_models_own_are_refused():
    with pytest.raises(ModelError, match=r"makes other decoder inputs of labels .*: give decoder_input_ids"):
        estimate_fisher(Otherwise(language_model("t5").config).eval(), _gaps())
    config = AutoConfig.for_model("fsmt", **_BARTS, langs=["a", "b"], src_vocab_size=64, tgt_vocab_size=64)
    with pytest.raises(ModelError, match=r"FSMT.* cannot run a sample .*: give decoder_input_ids in each sample"):
        estimate_fisher(AutoModelForSeq2SeqLM.from_config(config).eval(), _gaps())
    model = _encoder_decoder("blenderbot")
    model.config.pad_token_id = None
    with pytest.raises(ModelError, match=r"has no pad_token_id .*: set it in the model's config"):
        estimate_fisher(model, _gaps())


def test_a_mask_that_leaves_out_everything_is_named():
    samples = draw_samples([5, 6])
    samples[0]["attention_mask"] = torch.zeros(5, dtype=torch.long)
    with pytest.raises(DataError, match="sample 0 has an attention_mask that is zero for all of its tokens"):
        estimate_fisher(language_model("bert"), samples)


@pytest.mark.parametrize("kind", [BertForPreTraining, AlbertForPreTraining, BigBirdForPreTraining])
def test_a_model_with_a_second_head_is_refused_with_what_to_load_instead(kind):
    family = {BertForPreTraining: "bert", AlbertForPreTraining: "albert"}.get(kind, "bert")
    config = language_model(family).config
    if kind is BigBirdForPreTraining:
        config = BigBirdConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
    with pytest.raises(ModelError, match=rf"{kind.__name__} gives no lo.* load it with AutoModelForMaskedLM"):
        estimate_fisher(kind(config).eval(), draw_samples([5, 6]))


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("bert", {"return_dict": False}),
        ("modernbert", {"sparse_prediction": True}),
        ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.02}),
        ("mixtral", {"output_router_logits": True}),
    ],
)
def test_settings_change_neither_the_fisher_nor_come_to_an_end(family, setting):
    model, plain = language_model(family, **setting).double(), language_model(family).double()
    samples = draw_samples([5, 9, 7])
    profile = estimate_fisher(model, samples)
    assert_exact(profile.diagonal, each_own_loss(plain, samples))
    assert {name: getattr(model.config, name) for name in setting} == setting
    routers = "output_router_logits" in setting
    assert profile.provenance.get("left_out") == ("the auxiliary loss of its routers" if routers else None)
    assert ("Left out of the loss: the auxiliary loss of its routers." in profile.card()) == routers


class Added(BertForMaskedLM):
    def forward(self, labels=None, **inputs):
        out = super().forward(labels=labels, **inputs)
        if labels is not None:
            out.loss = out.loss + 3e-4
        return out


def test_a_small_term_beside_the_likelihood_is_refused():
    with pytest.raises(ModelError, match="neither masked-LM"):
        detect_objective(Added(copy.deepcopy(language_model("bert").config)).eval(), tokens([9])[0])
