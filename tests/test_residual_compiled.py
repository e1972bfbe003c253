"""Residual sites under torch.compile: one graph, and the rate that stands there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from families import language_model
from test_residual import IDS
from torch._inductor import config as inductor

from guided_dropout import add_residual_sites

BACKENDS = ["eager", "inductor" if shutil.which("g++") else "aot_eager"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore")
def test_compiled_in_one_graph_it_drops_as_without(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = language_model("llama", attention_dropout=0.0, num_hidden_layers=1).train()
    handle = add_residual_sites(model, 0.3)
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: model(input_ids=ids).logits, backend=backend, fullgraph=True)
    for rate in (0.3, 0.0, 0.6) if backend == "eager" else (0.3, 0.6):
        for path in handle.sites:
            model.get_submodule(path.rpartition(".")[0]).residual_dropout = rate
        torch.manual_seed(0)
        expected = model(input_ids=IDS).logits
        torch.manual_seed(0)
        with inductor.patch(fallback_random=True):  # its own random numbers are others
            assert torch.allclose(compiled(IDS), expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
