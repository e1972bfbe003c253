"""How long runs will take: by model and task where they were seen, else by what is nearest."""

import pytest
from tiny import colour_examples, save_tiny_bert

from guided_dropout.bench import cost
from guided_dropout.bench.cost import Clock, Work, trial
from guided_dropout.bench.grid import RunKey
from guided_dropout.bench.plan import BenchModel, Plan
from guided_dropout.data.task_data import DataSource
from guided_dropout.finetune import finetune
from guided_dropout.recipe import Recipe

WORK = {"short": Work(train=1000, evaluation=100, epochs=2), "long": Work(train=5000, evaluation=500, epochs=2)}
SIZES = {"small": 10, "large": 40}


def key(model, task, fraction=1.0):
    return RunKey(model=model, task=task, arm="dropout", fraction=fraction, seed=0)


def test_a_unit_is_text_times_parameters_and_a_step_back_costs_two_forward():
    clock = Clock(WORK, SIZES)
    assert clock.units(key("small", "short")) == pytest.approx((3 * 2 * 1000 + 100) * 10)
    assert clock.units(key("large", "long", fraction=0.1)) == pytest.approx((3 * 2 * 500 + 500) * 40)


def test_each_model_and_task_has_its_pace_and_others_the_nearest():
    clock = Clock(WORK, SIZES)
    assert clock.seconds([key("small", "short")]) is None
    clock.saw(key("small", "short"), 61.0)  # 1 ms for 1000 units
    per_unit = 61.0 / clock.units(key("small", "short"))
    for other in (key("small", "long"), key("large", "short")):
        assert clock.seconds([other]) == pytest.approx(per_unit * clock.units(other))
    clock.saw_trial("small", "long", seconds=2.0, read=1000)
    slow = 2.0 / (1000 * 10)
    assert clock.seconds([key("small", "long")]) == pytest.approx(slow * clock.units(key("small", "long")))
    assert clock.seconds([key("small", "short")]) == pytest.approx(61.0)
    clock.saw(key("small", "short"), 183.0)
    assert clock.seconds([key("small", "short")] * 2) == pytest.approx(61.0 + 183.0)


@pytest.mark.parametrize(("examples", "steps"), [(5, 1), (100, 5)])
def test_a_trial_trains_a_few_steps_and_counts_what_they_read(tmp_path, monkeypatch, examples, steps):
    data = colour_examples(examples, seed=0)
    (tmp_path / "CoLA").mkdir()
    for name in ("train", "dev"):
        lines = (f"s\t{label}\t\t{text}\n" for (text,), label in data)
        (tmp_path / "CoLA" / f"{name}.tsv").write_text("".join(lines))
    model = BenchModel(str(save_tiny_bert(tmp_path / "bert")))
    recipe = Recipe(batch_size=16, epochs=7)
    plan = Plan.of([model], ["cola"], ["dropout"], [1.0], [0], source=DataSource(str(tmp_path)), recipe=recipe)
    trained = []

    def watched(*args, **options):
        trained.append(finetune(*args, **options))
        return trained[-1]

    monkeypatch.setattr(cost, "finetune", watched)
    seconds, read = trial(plan, "bert", "cola")
    some = data.take(range(min(examples, 16 * steps)))
    assert trained[0].recipe["n_train"] == len(some)
    assert trained[0].recipe["epochs"] == 1
    assert 0 < seconds <= trained[0].times["train"]
    assert read == pytest.approx(3 * sum(len(text) for (text,), _ in some) * max(1, steps - 1) / steps)
