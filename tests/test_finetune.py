import contextlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import COLOUR, VOCABULARY, colour_examples, save, save_tiny_bert, tiny_bert_config
from transformers import (
    BertForMaskedLM,
    CanineConfig,
    CanineModel,
    CanineTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from guided_dropout import finetune as finetune_module
from guided_dropout import training
from guided_dropout import workbench as module
from guided_dropout.bench.arms import group_by_arm
from guided_dropout.data.encoding import encode
from guided_dropout.data.task_data import TaskData
from guided_dropout.data.tasks import Examples, Task, get_task
from guided_dropout.errors import ArtefactError, DataError, GuidedDropoutError, ModelError, ScheduleError
from guided_dropout.finetune import RunResult, Seeds, finetune
from guided_dropout.masks import bernoulli
from guided_dropout.models import load_classifier, load_tokenizer
from guided_dropout.parts import parts_of_like_lengths
from guided_dropout.schedule import DropoutSchedule
from guided_dropout.vocabulary import occurring_rows
from guided_dropout.workbench import Workbench

DATA = (colour_examples(48, seed=1), colour_examples(20, seed=2))
RATE_ARMS = ("guided", "uniform", "dropout", "none")  # the others: test_arms.py
# On a CPU everywhere: what is compared to the last digits is not so on a GPU, which tests/test_gpu.py trains on.
SHORT = {"data": DATA, "epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "device": "cpu"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its configuration pads with the end of text, its tokenizer does not."""
    sizes = {"vocab_size": len(VOCABULARY), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=2, eos_token_id=3))
    return save(model, tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its classifier returns more than the logits."""
    sizes = {"vocab_size": len(VOCABULARY), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=3))
    return save(model, tmp_path_factory.mktemp("models") / "t5")


@pytest.fixture(scope="module")
def schedule(bert: Path) -> DropoutSchedule:
    """A schedule with a different rate at each site, as a profile would give it."""
    uniform = DropoutSchedule.uniform(load_classifier(bert, 2, head_seed=0), 0.1)
    steps = len(uniform.rates) - 1
    rates = {path: 0.3 * k / steps for k, path in enumerate(uniform.rates)}
    return replace(uniform, rates=rates, shape="linear", upper=0.3, lower=0.0)


@pytest.fixture(scope="module")
def runs(bert: Path, schedule: DropoutSchedule) -> dict[str, RunResult]:
    return {arm: finetune(bert, COLOUR, arm=arm, schedule=schedule, **SHORT) for arm in RATE_ARMS}


def test_arms_start_from_the_same_weights_and_see_the_same_batches(runs: dict[str, RunResult]) -> None:
    assert len({(r.pairing["weights"], r.pairing["batches"], r.seeds) for r in runs.values()}) == 1
    losses = {arm: r.history[0]["train_loss"] for arm, r in runs.items()}
    assert len(set(losses.values())) == len(RATE_ARMS), losses


def test_each_arm_has_its_rates(runs: dict[str, RunResult], schedule: DropoutSchedule) -> None:
    mean = schedule.mean_rate
    found = {arm: (r.rates["min"], r.rates["mean"], r.rates["max"]) for arm, r in runs.items()}
    assert found == {
        "guided": pytest.approx((0.0, mean, 0.3)),
        "uniform": pytest.approx((mean, mean, mean)),
        "dropout": pytest.approx((0.1, 0.1, 0.1)),
        "none": (0.0, 0.0, 0.0),
    }
    assert {r.rates["sites"] for r in runs.values()} == {len(schedule.rates)}


@pytest.mark.parametrize("arm", ["dropout", "guided"])
def test_the_rates_are_on_the_model_while_it_trains(
    arm: str, bert: Path, schedule: DropoutSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(module, "load_classifier", lambda *a, **k: seen.append(load_classifier(*a, **k)) or seen[0])

    def rates() -> dict[str, float]:
        return {n: m.p for n, m in seen[0].bert.named_modules() if isinstance(m, torch.nn.Dropout)}

    during = []
    wanted = {path.removeprefix("bert."): rate for path, rate in schedule.rates.items()}
    finetune(bert, COLOUR, arm=arm, schedule=schedule, rate=0.25, progress=lambda *_: during.append(rates()), **SHORT)
    assert during[-1] == (wanted if arm == "guided" else dict.fromkeys(wanted, 0.25))
    assert set(rates().values()) == {0.1}
    assert seen[0].dropout.p == 0.1


def test_masks_of_dropout_are_drawn_quickly_while_it_trains_and_by_torch_after(bert: Path) -> None:
    def drawn() -> torch.Tensor:
        return torch.empty(100).bernoulli_(0.5, generator=torch.Generator().manual_seed(0))

    during, torchs = [], drawn()
    finetune(bert, COLOUR, arm="none", progress=lambda *_: during.append(drawn()), **SHORT)
    ours = bernoulli(torch.empty(100), generator=torch.Generator().manual_seed(0))
    assert during
    assert all(torch.equal(found, ours) for found in during)
    assert torch.equal(drawn(), torchs)
    assert not torch.equal(torchs, ours)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="about machines without an accelerator")
def test_half_precision_needs_no_accelerator(bert: Path) -> None:
    assert finetune(bert, COLOUR, arm="none", precision="bfloat16", **SHORT).recipe["precision"] == "bfloat16"


def test_examples_that_share_their_noise_share_a_forward(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[int] = []

    def watched(inputs: Any) -> Any:
        cut.append(len(inputs["labels"]))
        return parts_of_like_lengths(inputs)

    monkeypatch.setattr(training, "parts_of_like_lengths", watched)
    finetune(bert, COLOUR, arm="mixout", **SHORT)
    assert cut == []
    finetune(bert, COLOUR, arm="dropout", **SHORT)
    assert sum(cut) == 2 * len(DATA[0])


def test_a_model_without_a_table_of_tokens_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    save(CanineModel(CanineConfig(**size, num_hash_buckets=64)), tmp_path, tokenizer=False)
    CanineTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="CanineForSequenceClassification has no table of its tokens"):
        finetune(tmp_path, COLOUR, arm="none", **SHORT)


def test_a_run_is_repeatable_and_seeds_matter(bert: Path) -> None:
    first, again, other = (finetune(bert, COLOUR, arm="dropout", seed=s, **SHORT) for s in (0, 0, 1))
    assert first.history == again.history
    assert first.pairing == again.pairing
    assert other.pairing["weights"] != first.pairing["weights"]
    assert other.pairing["batches"] != first.pairing["batches"]


def test_each_seed_changes_its_own_thing(bert: Path) -> None:
    base = Seeds.derive(0)
    reference = finetune(bert, COLOUR, arm="dropout", seeds=base, **SHORT)
    noise = finetune(bert, COLOUR, arm="dropout", seeds=replace(base, noise=1), **SHORT)
    assert noise.pairing == reference.pairing
    assert noise.history != reference.history
    head = finetune(bert, COLOUR, arm="dropout", seeds=replace(base, head=1), **SHORT)
    assert head.pairing["weights"] != reference.pairing["weights"]
    assert head.pairing["batches"] == reference.pairing["batches"]
    order = finetune(bert, COLOUR, arm="dropout", seeds=replace(base, order=1), **SHORT)
    assert order.pairing["weights"] == reference.pairing["weights"]
    assert order.pairing["batches"] != reference.pairing["batches"]


def test_derived_seeds_are_far_apart() -> None:
    seeds = [value for s in range(50) for value in vars(Seeds.derive(s)).values()]
    assert min(np.diff(sorted(seeds))) > 100


def test_it_learns_and_reports_the_last_epoch(bert: Path) -> None:
    data = (colour_examples(200, seed=3), colour_examples(60, seed=4))
    steps = []
    result = finetune(
        bert, COLOUR, data=data, arm="none", epochs=8, learning_rate=3e-3, progress=lambda *step: steps.append(step)
    )
    assert result.value == result.history[-1]["metrics"]["accuracy"] == result.metrics["accuracy"]
    assert result.value > 0.9
    assert [epoch["epoch"] for epoch in result.history] == list(range(1, 9))
    assert result.history[-1]["train_loss"] < 0.5 < result.history[0]["train_loss"]
    assert steps == [(i, 104) for i in range(1, 105)]
    assert not result.diverged
    assert not result.collapsed


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_an_evaluation_is_the_mean_over_single_examples(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, models = request.getfixturevalue(name), []
    monkeypatch.setattr(module, "load_classifier", lambda *a, **k: models.append(load_classifier(*a, **k)) or models[0])
    validation = colour_examples(70, seed=5)  # one full evaluation batch and a small rest
    result = finetune(folder, COLOUR, arm="none", **{**SHORT, "data": (DATA[0], validation)})
    tokenizer, model = load_tokenizer(folder), models[0].eval()
    losses, hits = [], []
    for (text,), label in validation:
        logits = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=name != "t5")).logits
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([label])).item())
        hits.append(logits.argmax().item() == label)
    assert result.history[-1]["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert result.value == pytest.approx(np.mean(hits))


def test_a_batch_is_padded_to_its_longest_text(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []

    def watched(*args: Any, **options: Any) -> torch.nn.Module:
        model = load_classifier(*args, **options)
        model.bert.embeddings.register_forward_hook(lambda _, __, output: widths.append(output.shape[1]))
        return model

    monkeypatch.setattr(module, "load_classifier", watched)
    finetune(bert, COLOUR, arm="none", data=DATA, batch_size=2, epochs=1)
    assert len(set(widths)) > 3


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("arm", ["none", "r-drop", "l2-sp"])
def test_parts_and_fewer_rows_train_what_whole_batches_and_tables_do(
    name: str, arm: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A copy without any dropout: in parts, its noise would be drawn in another order.
    folder, models, passes = tmp_path / "model", [], []
    shutil.copytree(request.getfixturevalue(name), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {key: 0.0 for key in config if key.endswith(("_pdrop", "dropout_prob", "dropout_rate", "_dropout"))}
    (folder / "config.json").write_text(json.dumps(config | {"classifier_dropout": 0.0}))

    def watched(*args: Any, **options: Any) -> torch.nn.Module:
        models.append(load_classifier(*args, **options))
        models[-1].register_forward_pre_hook(lambda model, _: passes.append(model.training))
        return models[-1]

    monkeypatch.setattr(module, "load_classifier", watched)

    def run(overhead: int, rows: Callable[..., Any]) -> tuple[RunResult, int]:
        monkeypatch.setattr(training, "parts_of_like_lengths", partial(parts_of_like_lengths, overhead=overhead))
        monkeypatch.setattr(finetune_module, "occurring_rows", rows)
        passes.clear()
        # 37 examples: the last batch is a small one.
        data = (DATA[0].take(range(37)), DATA[1])
        return finetune(folder, COLOUR, arm=arm, rate=0.0, **{**SHORT, "data": data}), sum(passes)

    whole, few_passes = run(10**9, lambda *_: contextlib.nullcontext())
    parts, many_passes = run(1, occurring_rows)
    assert many_passes > few_passes + 6
    assert parts.pairing == whole.pairing
    for found, wanted in zip(parts.history, whole.history, strict=True):
        assert found["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-5)
        assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=1e-5)
    one, other = (torch.nn.utils.parameters_to_vector(model.parameters()) for model in models)
    moved = one - torch.nn.utils.parameters_to_vector(
        load_classifier(folder, 2, head_seed=Seeds.derive(0).head).parameters()
    )
    assert (one - other).norm() < 0.01 * moved.norm()


def test_the_learning_rate_warms_up_and_decays(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    step = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *args: object, **options: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        assert self.param_groups[0]["betas"] == (0.9, 0.999)
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    finetune(bert, COLOUR, arm="none", data=DATA, epochs=4, batch_size=5, learning_rate=1e-4)
    warm = math.ceil(0.1 * 40)
    expected = [1e-4 * min(k / warm, (40 - k) / (40 - warm)) for k in range(40)]
    assert rates == pytest.approx(expected)


def test_a_single_step_trains(bert: Path) -> None:
    one = finetune(bert, COLOUR, arm="none", data=(DATA[0][:12], DATA[1]), epochs=1, batch_size=12, learning_rate=1e-2)
    two = finetune(bert, COLOUR, arm="none", data=(DATA[0][:12], DATA[1]), epochs=1, batch_size=12, learning_rate=1e-9)
    assert one.history[0]["train_loss"] == two.history[0]["train_loss"]
    assert one.history[0]["eval_loss"] != pytest.approx(two.history[0]["eval_loss"], abs=1e-4)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_one_of_several_processes_is_refused(name: str, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(GuidedDropoutError, match=rf"found 2 processes \({name}\); expected one.*`bench run --jobs`"):
        finetune(bert, COLOUR, arm="none", **SHORT)


def test_the_recipe_alone_says_the_precision(
    bert: Path, runs: dict[str, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert finetune(bert, COLOUR, arm="none", **SHORT).history == runs["none"].history
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_a_pair_of_texts_and_regression(bert: Path) -> None:
    task = Task("likeness", labels=None, metrics=("pearson", "spearman"))
    pairs = Examples([("the cat", "the dog"), ("a bird", "a bird"), ("red", "green tree")] * 5, [1.0, 5.0, 0.5] * 5)
    result = finetune(bert, task, data=(pairs, pairs), arm="dropout", epochs=3, learning_rate=3e-3)
    assert result.metric == "pearson"
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert not result.collapsed


def test_a_causal_model_trains(gpt2: Path) -> None:
    result = finetune(gpt2, COLOUR, arm="dropout", **SHORT)
    assert result.model["architecture"] == "GPT2ForSequenceClassification"
    assert not result.diverged


def test_a_fraction_of_the_training_data(bert: Path) -> None:
    result = finetune(bert, COLOUR, arm="none", train_fraction=0.5, **SHORT)
    assert (result.recipe["n_train"], result.recipe["n_eval"]) == (24, 20)


def test_a_file_of_ones_own(bert: Path, tmp_path: Path) -> None:
    for name, examples in zip(("train", "dev"), DATA, strict=True):
        rows = [f"{text},{COLOUR.labels[label]}\n" for (text,), label in examples]
        (tmp_path / f"{name}.csv").write_text("".join(["words,colour\n", *rows]))
    columns = "text=words:label=colour"
    files = {"data": tmp_path / "train.csv", "columns": columns}
    own = finetune(bert, arm="none", eval_data=tmp_path / "dev.csv", **{**SHORT, **files})
    assert (own.task, own.metric, own.recipe["labels"]) == ("train.csv", "accuracy", ["green", "red"])
    assert (own.recipe["split"], own.recipe["n_train"], own.recipe["n_eval"]) == ("glue", 48, 20)
    held = finetune(bert, "mine", arm="none", split="holdout:0.25", metrics="f1", **{**SHORT, **files})
    assert (held.task, held.recipe["n_train"], held.recipe["n_eval"]) == ("mine", 36, 12)
    assert held.metrics == {"f1": held.value}


def test_tasks_and_lists_may_stand_for_their_names(bert: Path, tmp_path: Path) -> None:
    """Data that are read once for many runs are kept by what was asked for, which need not be hashable."""
    (tmp_path / "CoLA").mkdir()
    for name, examples in zip(("train", "dev"), DATA, strict=True):
        rows = [f"x\t{label}\t\t{text}\n" for (text,), label in examples]
        (tmp_path / "CoLA" / f"{name}.tsv").write_text("".join(rows))
    bench, options = Workbench(bert), {"arm": "none", **SHORT, "data": tmp_path}
    cola = finetune(bench, get_task("cola"), **options)
    assert cola.value == finetune(bench, "cola", **options).value
    other = finetune(bench, replace(get_task("cola"), metrics=("f1",)), **options)
    assert (cola.metric, other.metric) == ("matthews_correlation", "f1")
    assert finetune(bench, "cola", metrics=["f1", "accuracy"], **options).metrics["f1"] == other.value


@pytest.mark.parametrize("split", ["paper", "holdout:0.25"])
def test_a_new_split_is_the_same_in_all_arms_and_another_for_another_seed(split: str, bert: Path) -> None:
    first, arm, other = (
        finetune(bert, COLOUR, arm=arm, seed=seed, split=split, train_fraction=0.5, **SHORT)
        for arm, seed in (("none", 0), ("dropout", 0), ("none", 1))
    )
    assert arm.pairing == first.pairing
    assert other.pairing["evaluation"] != first.pairing["evaluation"]
    assert other.recipe == first.recipe
    group_by_arm([first, arm, other])  # refuses what cannot be paired


def test_further_splits_are_evaluated_after_the_last_epoch_and_change_nothing(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    monkeypatch.setattr(
        module, "load_classifier", lambda *a, **k: models.append(load_classifier(*a, **k)) or models[-1]
    )
    further = colour_examples(30, seed=6)
    pair = (colour_examples(200, seed=3), DATA[1])
    options = {"arm": "dropout", "epochs": 8, "learning_rate": 3e-3, "device": "cpu"}
    plain = finetune(bert, COLOUR, data=pair, **options)
    assert not plain.collapsed
    one = colour_examples(1, seed=7)  # predictions that are all alike, which is not what `collapsed` is about
    data = TaskData(COLOUR, *pair, more={"mismatched": further, "one": one})
    result = finetune(bert, data=data, **options)
    assert (result.history, result.value, result.collapsed) == (plain.history, plain.value, plain.collapsed)
    assert list(result.metrics) == [f"{m}{s}" for s in ("", "_mismatched", "_one") for m in COLOUR.metrics]
    tokenizer, model = load_tokenizer(bert), models[-1].eval()
    hits = [model(**tokenizer(t, return_tensors="pt")).logits.argmax().item() == label for (t,), label in further]
    assert result.metrics["accuracy_mismatched"] == pytest.approx(np.mean(hits))
    assert (result.recipe["n_eval"], result.recipe["n_eval_mismatched"]) == (20, 30)


def test_long_texts_are_cut_at_the_models_own_limit(bert: Path) -> None:
    long = Examples([("the cat sees " * 20 + "red",), ("a dog " * 30,)] * 4, [0, 1] * 4)
    options = {**SHORT, "data": (long, long), "epochs": 1}
    for given, told in (
        (None, []),
        (24, []),
        (25, ["note: max length 25; texts are cut at 24 tokens, all that the model has positions for"]),
    ):
        said: list[str] = []
        result = finetune(bert, COLOUR, arm="none", told=said.append, **{**options, "max_length": given})
        assert result.recipe["max_length"] == 24
        assert said == told


# --- what can go wrong


def test_a_diverged_run_is_recorded(bert: Path, tmp_path: Path) -> None:
    result = finetune(bert, COLOUR, arm="none", out=tmp_path / "run", **{**SHORT, "learning_rate": 1e30, "epochs": 4})
    assert result.diverged
    assert result.value is None
    assert len(result.history) < 4
    assert RunResult.load(tmp_path / "run") == result


def test_a_collapsed_run_is_recorded(bert: Path) -> None:
    one = Examples([(text,) for (text,), _ in DATA[0]], [1] * len(DATA[0]))
    result = finetune(bert, COLOUR, arm="none", **{**SHORT, "data": (one, DATA[1]), "epochs": 3})
    assert result.collapsed
    assert not result.diverged


@pytest.mark.parametrize("arm", ["guided", "uniform"])
def test_an_arm_without_its_schedule_says_how_to_make_one(arm: str, bert: Path) -> None:
    with pytest.raises(ScheduleError, match=r"run `guided-dropout schedule`"):
        finetune(bert, COLOUR, arm=arm, **SHORT)


def test_a_schedule_of_another_model_is_refused(schedule: DropoutSchedule, tmp_path: Path) -> None:
    other = save_tiny_bert(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(ScheduleError):
        finetune(other, COLOUR, schedule=schedule, **SHORT)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"arm": "droput"}, ScheduleError, "did you mean 'dropout'"),
        ({"task": "cloa"}, DataError, "did you mean 'cola'"),
        ({"rate": 1.0}, ScheduleError, "1"),
        ({"seed": -1}, DataError, "the seed -1; expected 0 or more"),
        ({"epochs": 0}, GuidedDropoutError, "epochs is 0; expected at least 1"),
        ({"learning_rate": math.nan}, GuidedDropoutError, "learning_rate is nan"),
        ({"warmup_ratio": 1.0}, GuidedDropoutError, "warmup_ratio is 1"),
        ({"device": "gpu"}, GuidedDropoutError, "'auto' or 'cpu'"),
        ({"train_fraction": 0.0}, DataError, "train fraction"),
        ({"data": (Examples([], []), DATA[1])}, DataError, "no examples"),
        ({"data": (Examples([("a", "b"), ("c",)], [0, 1]), DATA[1])}, DataError, "expected 1 or 2 in all"),
        (
            {"data": (Examples([("a",), ("c",)], [0, 2]), DATA[1])},
            DataError,
            "the label 2; expected a class index below 2",
        ),
    ],
)
def test_a_users_mistake_is_named(options: dict, error: type[Exception], message: str, bert: Path) -> None:
    with pytest.raises(error, match=message):
        finetune(bert, **{"task": COLOUR, "arm": "dropout", **SHORT, **options})


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save(BertForMaskedLM(tiny_bert_config(vocab_size=12)), tmp_path / "small")
    with pytest.raises(ModelError, match=r"gives the token \d+; expected less than 12"):
        finetune(folder, COLOUR, arm="none", **SHORT)


def test_an_output_folder_is_checked_before_training(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ArtefactError, match=r"holds other files and no result\.json"):
        finetune(bert, COLOUR, arm="none", out=tmp_path, progress=lambda *_: pytest.fail("trained"), **SHORT)


def test_an_interrupted_run_writes_nothing(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def interrupt(step: int, _: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(bert, COLOUR, arm="dropout", out=tmp_path / "run", progress=interrupt, **SHORT)
    assert list(tmp_path.iterdir()) == []


def test_what_a_person_should_know_of_the_data_is_told_before_training(bert: Path) -> None:
    said: list[str] = []

    def interrupt(*_: int) -> None:
        assert said == ["12 examples without a label left out"]
        raise KeyboardInterrupt

    data = TaskData(COLOUR, *DATA, notes=("12 examples without a label left out",))
    with pytest.raises(KeyboardInterrupt):
        finetune(bert, arm="none", told=said.append, progress=interrupt, **{**SHORT, "data": data})


def test_a_schedule_made_on_other_weights_is_told(bert: Path, schedule: DropoutSchedule) -> None:
    elsewhere = replace(schedule, model={**schedule.model, "digest": "of others"})
    for planned, told in ((schedule, False), (elsewhere, True)):
        said: list[str] = []
        finetune(bert, COLOUR, schedule=planned, told=said.append, **{**SHORT, "epochs": 1})
        assert any("made on other weights" in note for note in said) == told


# --- what it leaves behind


def test_it_leaves_nothing_but_its_result(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = finetune(bert, COLOUR, arm="dropout", out="runs/dropout-0", **SHORT)
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()] == [
        "runs/dropout-0/result.json"
    ]
    assert capfd.readouterr() == ("", "")
    assert RunResult.load("runs/dropout-0") == RunResult.load("runs/dropout-0/result.json") == result


def test_the_random_state_is_given_back(bert: Path) -> None:
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    finetune(bert, COLOUR, arm="dropout", **SHORT)
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


def test_a_damaged_result_is_refused(runs: dict[str, RunResult], tmp_path: Path) -> None:
    path = runs["none"].save(tmp_path / "run")
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in facts.items() if k != "seeds"}))
    with pytest.raises(ArtefactError, match="not a whole run-result"):
        RunResult.load(path)
    with pytest.raises(ArtefactError, match="cannot read"):
        RunResult.load(tmp_path / "nowhere")


def test_examples_are_cut_and_paired_by_the_tokenizer(bert: Path) -> None:
    tokenizer = load_tokenizer(bert)
    rows = encode(Examples([("the cat", "a dog"), ("red", "green tree")], [0, 1]), COLOUR, tokenizer, 5)
    assert tokenizer.decode(rows[0]["input_ids"]) == "[CLS] the [SEP] a [SEP]"
    assert rows[1]["token_type_ids"] == [0, 0, 0, 1, 1]
    assert [len(row["input_ids"]) for row in (rows.by_length()[i] for i in range(2))] == [5, 5]
