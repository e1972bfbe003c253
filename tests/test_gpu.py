"""The library with its models on a GPU; where there is none on the CPU, so that the tests are known to work."""

import os

import pytest
import torch
from families import language_model, objective_of
from tiny import COLOUR, colour_examples, save_tiny_bert

from guided_dropout import DropoutSchedule, apply_dropout, estimate_fisher, find_sites
from guided_dropout.finetune import finetune

DEVICE = os.environ.get("GUIDED_DROPOUT_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
FAMILIES = ["bert", "albert", "deberta-v2", "modernbert", "gpt2", "llama", "t5"]


def draw_samples(lengths, device="cpu"):
    g = torch.Generator().manual_seed(0)
    samples = []
    for n in lengths:
        ids = torch.randint(5, 64, (n,), generator=g)
        labels = torch.where(torch.rand(n, generator=g) < 0.4, ids, -100)
        labels[-1] = ids[-1]
        samples.append({"input_ids": ids.to(device), "labels": labels.to(device)})
    return samples


def assert_same(found, expected, *, rtol):
    largest = max(t.norm() for t in expected.values())
    for name, want in expected.items():
        assert found[name].device.type == "cpu"
        error = (found[name].double() - want).norm()
        assert error <= rtol * want.norm() + 1e-9 * largest, f"{name}: {error:.2e} of {want.norm():.2e}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_the_fisher_is_that_of_the_cpu_in_float64(family, dtype, rtol):
    samples = draw_samples([9, 5, 11, 7, 9])
    want = estimate_fisher(language_model(family).double(), samples, method="reference")
    found = estimate_fisher(language_model(family).to(DEVICE, dtype), samples, batch_size=3)
    assert found.objective == objective_of(family)
    assert found.provenance["device"] == DEVICE
    assert_same(found.diagonal, want.diagonal, rtol=rtol)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_the_reference_runs_there_too(family):
    samples = draw_samples([6, 8])
    want = estimate_fisher(language_model(family).double(), samples, method="reference")
    found = estimate_fisher(language_model(family).to(DEVICE).double(), samples, method="reference")
    assert_same(found.diagonal, want.diagonal, rtol=1e-6)


def test_half_precision_is_near():
    samples = draw_samples([9, 5, 11, 7])
    want = estimate_fisher(language_model("llama").double(), samples, method="reference").tensor_means
    found = estimate_fisher(language_model("llama").to(DEVICE, torch.bfloat16), samples).tensor_means
    assert found == pytest.approx(want, rel=0.1, abs=1e-3 * max(want.values()))


def test_samples_may_lie_on_the_gpu():
    want = estimate_fisher(language_model("bert").to(DEVICE), draw_samples([6, 8]))
    found = estimate_fisher(language_model("bert").to(DEVICE), draw_samples([6, 8], DEVICE))
    assert found.tensor_means == pytest.approx(want.tensor_means, rel=1e-5, abs=1e-14)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_those_of_the_cpu_and_no_random_number_is_drawn(family):
    model = language_model(family).to(DEVICE)
    state = torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()
    assert find_sites(model) == find_sites(language_model(family))
    assert torch.equal(state, torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state())


@pytest.mark.parametrize("arm", ["dropout", "mixout"])
def test_a_classifier_trains_there_in_half_precision(arm, tmp_path):
    """In half precision where the GPU has it."""
    data = (colour_examples(200, seed=3), colour_examples(60, seed=4))
    device = "cpu" if DEVICE == "cpu" else "auto"
    result = finetune(
        save_tiny_bert(tmp_path / "bert"), COLOUR, data=data, arm=arm, epochs=8, learning_rate=3e-3, device=device
    )
    half = DEVICE != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False)
    assert result.recipe["precision"] == ("bfloat16" if half else "float32")
    assert result.provenance["device"].startswith(DEVICE)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


def test_rates_arrive_there():
    model = language_model("bert").to(DEVICE)
    schedule = DropoutSchedule.from_profile(estimate_fisher(model, draw_samples([6, 8])), model, upper=0.3, lower=0.1)
    with apply_dropout(model, schedule):
        assert {s.path: s.rate for s in find_sites(model)} == schedule.rates
