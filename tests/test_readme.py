"""The README's Python lines do what they say, and so does its command on files of one's own, on those that CI makes."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from tiny import WORDS, save_tiny_bert

from guided_dropout.cli import app
from guided_dropout.models import load_classifier
from guided_dropout.results import RunResult

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_python_lines_run(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    folder = str(save_tiny_bert(tmp_path / "model", max_position_embeddings=128))
    classifier = load_classifier(folder, 2, head_seed=0)
    seen = []

    class Trainer:
        def train(self):
            seen.append(classifier.bert.embeddings.dropout.p)

    monkeypatch.chdir(tmp_path)
    scope = {
        "name": folder,
        "texts": [" ".join(WORDS)] * 40,
        "classifier": classifier,
        "trainer": Trainer(),
    }
    exec(compile(code, str(README), "exec"), scope)

    assert (tmp_path / "profile" / "fisher.safetensors").exists()
    assert seen == [scope["schedule"].rates["bert.embeddings.dropout"]]
    assert classifier.bert.embeddings.dropout.p == 0.1
    assert "bert.encoder.layer.1.output.dropout module 0.1 1 (" in capsys.readouterr().out


def readme_commands():
    spec = importlib.util.spec_from_file_location("readme_commands", ROOT / ".ci" / "readme_commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_on_files_of_ones_own_is_run_by_ci_on_files_that_fit(tmp_path, monkeypatch):
    script = readme_commands()
    (command,) = [c for c in script.commands(README.read_text(encoding="utf-8")) if "--data train.csv" in c]
    monkeypatch.chdir(tmp_path)
    assert [file.name for file in script.own_files(Path())] == ["train.csv", "dev.csv"]
    assert script.own_files(Path()) == []  # a reader's own are left as they are
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as end:
        app.main()
    assert not end.value.code
    result = RunResult.load(tmp_path / "build" / "own")
    assert result.recipe["labels"] == ["0", "1"]
    assert (result.recipe["n_train"], result.recipe["n_eval"]) == (32, 8)
