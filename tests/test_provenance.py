"""What a result says it was made with."""

import re

from guided_dropout import provenance as module
from guided_dropout.bench.sections import origins
from guided_dropout.provenance import provenance


def test_a_result_says_which_code_it_was_made_with(tmp_path, monkeypatch):
    assert re.fullmatch("[0-9a-f]{12}", provenance()["code"])
    monkeypatch.setattr(module, "__file__", str(tmp_path / "provenance.py"))
    seen = set()
    for content in ("a = 1\n", "a = 2\n"):
        (tmp_path / "inner").mkdir(exist_ok=True)
        (tmp_path / "inner" / "a.py").write_text(content)
        seen.add(module.code_digest.__wrapped__())
        (tmp_path / "notes.txt").write_text(content)  # no code
        seen.add(module.code_digest.__wrapped__())
    (tmp_path / "inner" / "kernel.c").write_text("int x;")
    assert len({*seen, module.code_digest.__wrapped__()}) == 3


def test_a_report_tells_runs_of_one_version_and_different_code_apart():
    made = {"versions": {"guided-dropout": "0.1.0", "torch": "2.13"}, "python": "3.11"}
    lines = origins([made, {**made, "code": "0123456789ab"}, {**made, "code": "0123456789ab"}])
    assert lines[0].startswith("Made with guided-dropout 0.1.0, torch 2.13")
    assert lines[1].startswith("Made with guided-dropout 0.1.0 (code 0123456789ab), torch 2.13")
    assert len(lines) == 2
