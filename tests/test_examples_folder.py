"""The scripts in examples/: the light ones are run; the others where their library is installed, else read."""

from __future__ import annotations

import json
import py_compile
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import language_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, set_seed

from guided_dropout import DropoutSchedule, estimate_fisher, find_sites
from guided_dropout.models import load_lm, quiet

EXAMPLES = Path(__file__).parents[1] / "examples"
LIGHT = ["plain_pytorch.py", "with_accelerate.py", "with_trainer.py"]
OTHERS = ["with_lightning.py", "with_trl.py"]


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
def test_it_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    set_seed(0)
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert "loss" in capsys.readouterr().out


@pytest.mark.parametrize("name", OTHERS)
def test_its_syntax_is_right(name: str, tmp_path: Path) -> None:
    py_compile.compile(str(EXAMPLES / name), cfile=str(tmp_path / "compiled"), doraise=True)


def _prepare(folder: Path) -> None:
    """A tiny Llama with a tokenizer, its profile, and a data set of texts."""
    model = language_model("llama")
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    with quiet():
        model.save_pretrained(folder / "model")
        PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(folder / "model")
    ids = torch.randint(4, 64, (8, 12), generator=torch.Generator().manual_seed(0))
    estimate_fisher(model, [{"input_ids": row, "labels": row} for row in ids]).save_pretrained(folder / "profile")
    texts = [{"text": " ".join(f"w{i * j % 60}" for j in range(12))} for i in range(32)]
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))


@pytest.mark.filterwarnings("ignore")
def test_trl_trains_with_the_schedule_on_adapters_and_residual_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    _prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["with_trl.py", "model", "profile", "data"])
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / "with_trl.py"), run_name="__main__")
    checkpoint = tmp_path / "sft" / "checkpoint-100"
    schedule = DropoutSchedule.load(checkpoint / "schedule.json")
    kinds = [path.rpartition(".")[2] for path in schedule.rates]
    assert {kind: kinds.count(kind) for kind in kinds} == {"default": 4, "attention_dropout": 2, "residual_dropout": 4}
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert [entry["guided_dropout/mean_rate"] for entry in history if "guided_dropout/mean_rate" in entry] == [
        pytest.approx(schedule.mean_rate)
    ]


class Lit:
    """The Lightning example's module, and what it is trained with."""

    def __init__(self, lightning: Any):
        self.lightning = lightning
        self.kind = runpy.run_path(str(EXAMPLES / "with_lightning.py"), run_name="example")["Model"]
        self.model = load_lm("demo")
        self.schedule = DropoutSchedule.uniform(self.model, 0.3)
        self.loader = torch.utils.data.DataLoader(torch.arange(5, 101).reshape(8, 12), batch_size=4)

    def trainer(self, **options: Any) -> Any:
        return self.lightning.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, **options)


@pytest.fixture
def lit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lit]:
    """After the test, the rates must be the model's own again."""
    made = Lit(pytest.importorskip("lightning"))
    monkeypatch.chdir(tmp_path)
    rates = {site.path: site.rate for site in find_sites(made.model)}
    yield made
    assert {site.path: site.rate for site in find_sites(made.model)} == rates


@pytest.mark.filterwarnings("ignore")
def test_lightnings_finder_of_a_learning_rate_trains_with_the_schedule_on(lit: Lit) -> None:
    seen: list[float] = []

    class Watched(lit.kind):
        lr = 1e-4

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            seen.append(next(module.p for module in self.model.modules() if isinstance(module, torch.nn.Dropout)))
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.model.parameters(), lr=self.lr)

    finder = lit.lightning.pytorch.callbacks.LearningRateFinder(num_training_steps=4, early_stop_threshold=None)
    with torch.random.fork_rng():
        lit.trainer(max_epochs=1, callbacks=[finder]).fit(Watched(lit.model, lit.schedule), lit.loader)
    assert len(seen) > 2
    assert set(seen) == {0.3}


@pytest.mark.filterwarnings("ignore")
def test_lightning_takes_the_schedule_off_after_a_fit_that_an_error_ended(lit: Lit) -> None:
    class Failing(lit.kind):
        fails = True

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            if self.fails:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module = Failing(lit.model, lit.schedule)
    with torch.random.fork_rng():
        with pytest.raises(ZeroDivisionError):
            lit.trainer(max_steps=2).fit(module, lit.loader)
        module.fails = False
        lit.trainer(max_steps=2).fit(module, lit.loader)


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_with_the_schedule_on(lit: Lit) -> None:
    seen: list[tuple[bool, set[float]]] = []

    class Watched(lit.kind):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            seen.append((self.model.training, {site.rate for site in find_sites(self.model)}))
            return super().training_step(batch, batch_idx)

    with torch.random.fork_rng():
        lit.trainer(max_steps=2).fit(Watched(lit.model, lit.schedule), lit.loader)
    assert seen == [(True, {0.3})] * 2


@pytest.mark.filterwarnings("ignore")
def test_lightning_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / "with_lightning.py"), run_name="__main__")


def test_each_is_checked_and_listed() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted([*LIGHT, *OTHERS])
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"]({name})" in listed for name in [*LIGHT, *OTHERS])
