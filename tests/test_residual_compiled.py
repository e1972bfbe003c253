"""Residual sites under torch.compile: one graph, and the rate that stands there."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import language_model
from test_residual import IDS
from torch._inductor import config as inductor
from transformers import Trainer, TrainingArguments

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


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def drops(forward: torch.nn.Module) -> bool:
    torch.manual_seed(0)
    first, second = (forward(input_ids=IDS).logits for _ in range(2))
    return not torch.equal(first, second)


@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore")
def test_what_was_compiled_before_drops_while_the_sites_are_there_and_only_then() -> None:
    model = language_model("llama", attention_dropout=0.0, num_hidden_layers=1).train()
    compiled = torch.compile(model, backend="aot_eager")
    assert not drops(compiled)
    for _ in range(2):
        with add_residual_sites(model, 0.5):
            assert drops(compiled)
            model.eval()
            assert not drops(compiled)
            model.train()
        assert not drops(compiled)


@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore")
def test_what_another_model_of_the_class_was_compiled_to_is_not_taken() -> None:
    plain, model = (language_model("llama", attention_dropout=0.0, num_hidden_layers=1).train() for _ in range(2))
    add_residual_sites(model, 0.5)
    assert not drops(torch.compile(plain, backend="eager"))
    assert drops(torch.compile(model, backend="eager"))
    assert drops(torch.compile(pickle.loads(pickle.dumps(model)), backend="eager"))
    assert not drops(torch.compile(plain, backend="eager"))


@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_that_compiles_and_has_trained_before(tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    compiling = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, save_strategy="no", **compiling, **quiet)
    model = language_model("llama", attention_dropout=0.0, num_hidden_layers=1)
    trainer = Trainer(model, args, train_dataset=data)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def loss() -> float:
        model.load_state_dict(start)
        return trainer.train().training_loss

    without = loss()
    with add_residual_sites(model, 0.9):
        assert abs(loss() - without) > 1e-3
    assert loss() == pytest.approx(without, rel=1e-6)
