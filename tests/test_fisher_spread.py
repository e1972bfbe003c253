"""A model spread over two devices by accelerate's hooks, which are pretended."""

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from families import language_model
from fisher_oracles import assert_exact, draw_samples, own_loss_oracle
from two_devices import pretending, put

from guided_dropout.detection import detect_objective
from guided_dropout.fisher import kernels
from guided_dropout.fisher.check import checked_plan
from guided_dropout.fisher.fast import BatchedSquares
from guided_dropout.undisturbed import evaluating

PLACES = {
    "bert": {"bert.embeddings": 0, "bert.encoder.layer.0": 0, "bert.encoder.layer.1": 1, "cls": 0},
    "llama": {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1}
    | {"model.norm": 1, "lm_head": 1},  # the logits go back to the first
}


def spread(model, places):
    """As `accelerate.dispatch_model` spreads it where nothing is offloaded."""
    devices = {"": torch.device("cuda", 0)} | {name: torch.device("cuda", k) for name, k in places.items()}
    for name in places:
        part = model.get_submodule(name)
        for t in (*part.parameters(), *part.buffers()):
            put(t, devices[name])
    skipped = getattr(model, "_skip_keys_device_placement", None)
    attach_align_device_hook_on_blocks(
        model, execution_device=devices, offload=dict.fromkeys(places, False), skip_keys=skipped
    )
    return model


@pytest.mark.parametrize("family", PLACES)
def test_a_model_on_two_devices_is_exact_with_all_shortcuts(family, monkeypatch):
    monkeypatch.setattr(kernels, "triton", None)
    samples = draw_samples([9, 5, 11, 7])
    expected = own_loss_oracle(language_model(family, tie_word_embeddings=False).double(), samples)
    model = language_model(family, tie_word_embeddings=False).double()
    with pretending(monkeypatch), evaluating(spread(model, PLACES[family])):
        assert {str(p.device) for p in model.parameters()} == {"cuda:0", "cuda:1"}
        objective, parameters = detect_objective(model, samples[0]), dict(model.named_parameters())
        plan = checked_plan(model, objective, parameters, samples)
        squares = BatchedSquares(model, objective, parameters, plan, targets_at_once=4)
        squares.add(samples)
        assert squares.fallback == {}
        assert squares.plan.head is not None
        assert squares.plan.late is not None
        assert squares.plan.start is not None
        found = {n: squares.totals.total(n) / 4 for n in parameters}
        assert {n: t.device for n, t in found.items()} == {n: p.device for n, p in parameters.items()}
    assert_exact(found, expected)
