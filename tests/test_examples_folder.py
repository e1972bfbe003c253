"""The scripts in examples/: the light ones are run, of the others the syntax is checked."""

from __future__ import annotations

import py_compile
import runpy
from pathlib import Path

import pytest
import torch
from transformers import set_seed

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


def test_each_is_checked_and_listed() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted([*LIGHT, *OTHERS])
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"]({name})" in listed for name in [*LIGHT, *OTHERS])
