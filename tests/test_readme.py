"""The README's Python lines do what they say."""

import re
from pathlib import Path

from tiny import WORDS, save_tiny_bert

from guided_dropout.models import load_classifier

README = Path(__file__).parents[1] / "README.md"


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
