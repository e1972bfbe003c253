"""The benchmark of the batched Fisher runs end to end on tiny models, and its numbers make sense."""

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.fisher import cases, measure, methods, summary, table

    return {"cases": cases, "measure": measure, "methods": methods, "summary": summary, "table": table}


@pytest.mark.parametrize("name", ["bert-2x32-16-padded", "gpt2-2x32-16-padded", "llama-2x32-16"])
def test_all_ways_agree_with_the_oracle(benchmark, name):
    (case,) = benchmark["cases"].find_cases([name], quick=True)
    names = ("batched", "batched-scores", "estimate", "loop", "published-512", "vmap-in-twos")
    entries = [benchmark["table"].entry(n) for n in ("floor-a", *names)]
    truth = benchmark["measure"].oracle(case, None)
    results = benchmark["measure"].time_methods(case, entries, truth, rounds=2, seconds=60, folder=None)
    for n in names:
        found = results[n]["accuracy"]
        assert found["worst"] < 1e-5, n
        assert found["covered"] == 1, n
        assert len(results[n]["timing"]["ratio_to_floor_b"]["all"]) == 2
    assert set(results["floor-a"]["timing"]["ratio_to_floor_a"]["all"]) == {1.0}


def test_beside_a_step_of_several_batches_the_others_take_as_many(benchmark, monkeypatch):
    (case,) = benchmark["cases"].find_cases(["bert-2x32-16"], quick=True)
    steps = []
    monkeypatch.setattr(benchmark["methods"].PlainBackward, "step", lambda self, samples: steps.append(len(samples)))
    entries = [benchmark["table"].entry("estimate")]
    benchmark["measure"].time_methods(case, entries, None, rounds=2, seconds=60, folder=None)
    assert steps == [case.check] + [len(case.samples())] * 2 * 4


def test_the_second_floor_sees_the_same_loss(benchmark):
    (case,) = benchmark["cases"].find_cases(["bert-2x32-16"], quick=True)
    seen = []
    for name in ("PlainBackward", "TargetBackward"):
        method = getattr(benchmark["methods"], name)(case.model(), case.objective, case.samples())
        method.model.zero_grad = lambda set_to_none, m=method.model: seen.append(
            {n: p.grad.clone() for n, p in m.named_parameters()}
        )
        method.step(case.samples())
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-7)


def test_an_error_is_measured_as_one(benchmark):
    truth = {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(2), "key.bias": torch.full((2,), 1e-30)}
    found = {"a": torch.tensor([3.0, 4.5]), "key.bias": torch.full((2,), 1e-14)}
    result = benchmark["measure"].accuracy(found, {n: t.double() for n, t in truth.items()})
    assert result["worst"] == pytest.approx(0.1)
    assert result["wrong"]["tensors"] == ["a"]
    assert result["missing"] == ["b"]
    assert result["true_zeros"]["tensors"] == ["key.bias"]


def test_the_command_writes_results_and_a_summary_and_resumes(benchmark, tmp_path, capsys):
    from benchmarks.fisher.__main__ import main

    command = [
        *("--quick", "--cases", "bert-2x32-16", "--methods", "floor-a"),
        *("--rounds", "2", "--threads", "1", "--out", str(tmp_path)),
    ]
    main(command)
    assert "timing floor-a" in capsys.readouterr().out
    result = json.loads((tmp_path / "bert-2x32-16" / "floor-a.json").read_text())
    assert result["timing"]["seconds_per_sample"]["median"] > 0
    if "peak_mib" in result["memory"]:  # Linux
        assert 0 < result["memory"]["peak_mib"] < 500
    assert "floor A" in (tmp_path / "README.md").read_text()

    main(command)
    assert "timing" not in capsys.readouterr().out


def test_bars_are_judged(benchmark):
    case = {"family": "bert", "layers": 6, "tokens": [128], "name": "x"}
    timing = {"ratio_to_floor_a": {"median": 0.5}, "ratio_to_floor_b": {"median": 1.2}}
    results = {"batched": {"case": case, "timing": timing}, "vmap": {"timing": {"ratio_to_batched": {"median": 4.0}}}}
    bars = [b for b in benchmark["summary"].BARS if b.is_for(case)]
    judged = {b.text: None if (v := b.measure(results)) is None else b.reached(v) for b in bars}
    assert judged["time ÷ floor A"] is True
    assert judged["time ÷ floor B"] is False
    assert judged["times faster than vmap"] is True
    assert judged["times faster than the published way"] is None
