"""The command line as a stranger meets it: the whole chain, and one line and exit code 2 for each mistake."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from families import language_model
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, WORDS, save, save_tiny_bert, tiny_bert_config
from transformers import (
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    T5Tokenizer,
)

from guided_dropout import fisher
from guided_dropout.arms import ARMS
from guided_dropout.cli import app as cli
from guided_dropout.fisher import FisherProfile
from guided_dropout.inputs import task_inputs, text_inputs
from guided_dropout.models import load_lm, load_tokenizer, quiet
from guided_dropout.results import RunResult
from guided_dropout.schedule import DropoutSchedule
from guided_dropout.texts import stream_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_bert(folder / "model")
    (folder / "text.txt").write_text("\n".join(" ".join(WORDS[(i + j) % 17] for j in range(12)) for i in range(40)))
    rows = [f"x\t{i % 2}\t\tthe {'red' if i % 2 else 'green'} cat sees a {WORDS[i % 17]}\n" for i in range(40)]
    for split in ("train", "dev"):
        (folder / "glue" / "CoLA").mkdir(parents=True, exist_ok=True)
        (folder / "glue" / "CoLA" / f"{split}.tsv").write_text("".join(rows))
    (folder / "blank.txt").write_text("\n")
    return folder


@contextlib.contextmanager
def own_signals():
    """Within, the command line may handle signals; one that it does not handle ends the test, not pytest."""

    def unexpected(number, _):
        pytest.fail(f"signal {number} came to nobody")

    before = {number: signal.signal(number, unexpected) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(folder, *args, monkeypatch):
    """Of the command line, run in `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["guided-dropout", *map(str, args)])
    with own_signals(), pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0


def run(folder, *args, monkeypatch, capsys):
    """(exit code, stdout, stderr) of the command line, run in `folder`."""
    return (exit_code(folder, *args, monkeypatch=monkeypatch), *capsys.readouterr())


@pytest.fixture
def command(folder, monkeypatch, capsys):
    return lambda *args: run(folder, *args, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture(scope="module")
def chain(folder):
    """A profile and a schedule, made on the command line."""
    for line in (
        "fisher model --text text.txt --samples 20 --max-length 12 --batch-size 4 --seed 1 --device cpu --out profile",
        "schedule profile --upper 0.2 --lower 0.01 --out schedule.json",
    ):
        with pytest.MonkeyPatch.context() as patch:
            assert exit_code(folder, *line.split(), monkeypatch=patch) == 0
    return folder


def test_the_chain_from_text_to_a_result(chain, command):
    profile = FisherProfile.from_pretrained(chain / "profile")
    assert profile.num_samples + profile.num_skipped == 20
    assert {"seed": 1, "max_length": 12, "source": "model"}.items() <= profile.provenance.items()
    assert profile.model["name_or_path"] == "model"
    schedule = DropoutSchedule.load(chain / "schedule.json")
    assert (max(schedule.rates.values()), min(schedule.rates.values())) == (0.2, 0.01)
    code, out, err = command(
        "finetune", "model", "--task", "cola", "--data", "glue", "--arm", "guided", "--schedule", "schedule.json",
        "--seed", 3, "--train-fraction", 0.5, "--epochs", 1, "--out", "run",
    )  # fmt: skip
    assert code == 0, err
    assert "cola guided seed 3: matthews_correlation" in out
    assert RunResult.load(chain / "run").recipe["train_fraction"] == 0.5


def test_inspect_prints_a_table_and_json_with_scores_and_rates(chain, command):
    code, out, _ = command("inspect", "model", "--profile", "profile", "--schedule", "schedule.json", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [r["path"] for r in rows][:2] == ["bert.embeddings.dropout", "bert.encoder.layer.0.attention.self.dropout"]
    assert {r["kind"] for r in rows} == {"module", "attention"}
    assert rows[0]["parameters"][0] == "bert.embeddings.word_embeddings.weight"
    assert {r["scheduled_rate"] for r in rows} >= {0.2, 0.01}
    assert all(r["score"] > 0 and r["rate"] == 0.1 and r["calls"] == 1 for r in rows)
    code, out, _ = command("inspect", "model", "--profile", "profile")
    assert code == 0
    assert "encoder.layer.1.output.dropout" in out
    assert f"{rows[-1]['score']:.1e}" in out


def test_inspect_needs_no_language_model_head(chain, command):
    with quiet():
        BertModel(tiny_bert_config()).save_pretrained(chain / "encoder")
    code, out, err = command("inspect", "encoder", "--profile", "profile", "--json")
    assert code == 0, err
    assert {row["path"] for row in json.loads(out)} >= {"embeddings.dropout", "encoder.layer.0.output.dropout"}
    assert all(row["score"] > 0 for row in json.loads(out))
    code, _, err = command("fisher", "encoder", "--text", "text.txt", "--max-length", 12, "--out", "new")
    assert code == 2
    assert "does not hold the language-model head" in err


def test_an_arm_with_a_parameter_and_a_profile(chain, command):
    code, out, err = command(
        "finetune", "model", "--task", "cola", "--data", "glue", "--arm", "ewc", "--arm-param", "strength=5",
        "--profile", "profile", "--weight-decay", 0.01, "--epochs", 1, "--out", "run-ewc",
    )  # fmt: skip
    assert code == 0, err
    assert "cola ewc:strength=5 seed 0" in out
    result = RunResult.load(chain / "run-ewc")
    assert (result.arm_parameters, result.recipe["weight_decay"]) == ({"strength": 5.0}, 0.01)


def test_a_profile_of_other_weights_is_told(chain, command, tmp_path):
    other = load_lm(str(chain / "model"))
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight.mul_(2)
    save(other, tmp_path / "other")
    for model, told in (("model", False), (tmp_path / "other", True)):
        note = f"note: the profile was measured on other weights (model) than those of {model}"
        code, out, err = command("inspect", model, "--profile", "profile")
        assert code == 0, err
        assert (note in " ".join(out.split())) == told
        code, out, err = command(
            "finetune", model, "--task", "cola", "--data", "glue", "--arm", "ewc", "--profile", "profile",
            "--epochs", 1, "--out", tmp_path / f"run-{told}",
        )  # fmt: skip
        assert code == 0, err
        assert (note in " ".join(out.split())) == told
        assert ("other weights" in out) == told


def test_a_length_beyond_the_models_is_told_where_it_was_given(chain, command, tmp_path):
    for more, told in (("", False), ("--max-length 99", True)):
        code, out, err = command(
            *f"finetune model --task cola --data glue --arm none --epochs 1 {more} --out".split(), tmp_path / f"{told}"
        )
        assert code == 0, err
        assert ("texts are cut at 24 tokens, all that the model has positions for" in " ".join(out.split())) == told


def test_a_file_of_ones_own_by_its_columns(chain, command):
    rows = [f"the {colour} cat sees a {WORDS[i % 17]},{colour}\n" for i in range(40) for colour in ("red", "green")]
    (chain / "own.csv").write_text("".join(["words,colour\n", *rows]))
    line = "finetune model --data own.csv --columns text=words:label=colour --arm none --epochs 1"
    code, out, err = command(*line.split(), "--split", "holdout:0.25", "--metrics", "f1,accuracy", "--out", "run-own")
    assert code == 0, err
    assert "own.csv none seed 0: f1 " in out
    result = RunResult.load(chain / "run-own")
    assert (result.recipe["labels"], result.recipe["n_train"], result.recipe["n_eval"]) == (["green", "red"], 60, 20)
    line = (
        "fisher classifier-own --task own --data own.csv --columns text=words:label=colour --max-length 12 --out own-p"
    )
    torch.manual_seed(0)
    save(BertForSequenceClassification(tiny_bert_config()), chain / "classifier-own")
    code, out, err = command(*line.split())
    assert code == 0, err
    assert "own has 80 examples, fewer than 1,000" in out


NLI = ("entailment", "neutral", "contradiction")


def test_mnli_is_evaluated_on_both_of_its_dev_splits(chain, command):
    folder = chain / "nli" / "MNLI"
    folder.mkdir(parents=True)
    rows = [f"the {word}\ta cat\t{NLI[i % 3]}\n" for i, word in enumerate(WORDS)]
    for name in ("train", "dev_matched", "dev_mismatched"):
        (folder / f"{name}.tsv").write_text("".join(["sentence1\tsentence2\tgold_label\n", *rows]))
    line = "finetune model --task mnli --data nli --arm none --epochs 1 --out run-nli"
    code, out, err = command(*line.split())
    assert code == 0, err
    value = RunResult.load(chain / "run-nli").value
    assert f"mnli none seed 0: accuracy {value:.4f}, accuracy_mismatched {value:.4f} (" in out


def test_help_lists_the_arms_a_line_each(command):
    _, out, _ = command("finetune", "--help")
    listed = [line.split()[0] for line in out.partition("Arms")[2].splitlines()[1:] if line.strip()]
    assert listed == list(ARMS)


def test_the_version_is_that_of_the_package(command):
    assert command("--version") == (0, f"guided-dropout {metadata.version('guided-dropout')}\n", "")


def test_the_same_arguments_give_the_same_profile(chain, command):
    line = "fisher model --text text.txt --samples 20 --max-length 12 --batch-size 9 --seed 1 --device cpu --out again"
    assert command(*line.split())[0] == 0
    a, b = (FisherProfile.from_pretrained(chain / name).tensor_means for name in ("profile", "again"))
    assert a == pytest.approx(b, rel=1e-4, abs=1e-12)


def test_all_of_a_folder_and_labels_drawn_from_the_model(chain, command):
    (chain / "texts").mkdir(exist_ok=True)
    for name in ("a.txt", "b.txt"):
        (chain / "texts" / name).write_text((chain / "text.txt").read_text())
    (chain / "texts" / "notes.md").write_text("no text")
    line = "fisher model --text texts --samples all --fisher sampled --seed 4 --max-length 12 --out all"
    code, out, err = command(*line.split())
    assert code == 0, err
    assert "texts: 1 files that are no text left out (notes.md)" in out
    profile = FisherProfile.from_pretrained(chain / "all")
    assert profile.num_samples + profile.num_skipped == 96  # 2 files of 480 words, 10 in a block
    assert (profile.labels, profile.provenance["seed"]) == ("model", 4)
    assert "sampled Fisher" in (chain / "all" / "README.md").read_text()
    code, out, err = command(
        *line.replace("all", "96").replace("sampled", "empirical").split(), "--max-characters", 300
    )
    assert code == 0, err
    assert "samples drawn from its first 300 characters" in out
    assert "fewer than 96: using them all" in out
    assert FisherProfile.from_pretrained(chain / "96").provenance["max_characters"] == 300


def test_a_t5_is_measured_by_span_corruption(chain, command):
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in WORDS)]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(5))]
    save(language_model("t5"), chain / "t5", tokenizer=False)
    T5Tokenizer(vocab=vocabulary + sentinels, extra_ids=5).save_pretrained(chain / "t5")
    line = "fisher t5 --text text.txt --samples 20 --max-length 12 --out t5-profile"
    code, out, err = command(*line.split())
    assert code == 0, err
    assert "20 samples (seq2seq), 0 without a target skipped" in out
    code, _, err = command(*line.replace("12", "400").split())
    assert code == 2
    assert "sentinels; the tokenizer (T5Tokenizer) has 5: use a smaller --max-length" in err


def test_a_classifier_is_measured_on_its_task(chain, command):
    labels = {"id2label": {0: "acceptable", 1: "unacceptable"}, "label2id": {"acceptable": 0, "unacceptable": 1}}
    for name, options in (("classifier", {}), ("renamed", labels)):
        torch.manual_seed(0)
        save(BertForSequenceClassification(tiny_bert_config(**options)), chain / name)
        line = f"fisher {name} --task cola --data glue --samples 30 --max-length 12 --out {name}-p"
        code, out, err = command(*line.split())
        assert code == 0, err
        assert "30 samples (classification), 0 without a target skipped" in out
    by_index, by_name = (FisherProfile.from_pretrained(chain / f"{name}-p") for name in ("classifier", "renamed"))
    assert by_index.provenance["task"] == "cola"
    assert by_index.tensor_means != pytest.approx(by_name.tensor_means, rel=1e-3)  # the labels are the other way round
    code, _, err = command(
        "fisher", "classifier", "--task", "stsb", "--data", "glue", "--max-length", 12, "--out", "new"
    )
    assert code == 2
    assert "BertForSequenceClassification has 2 classes; stsb has 1: expected a model fine-tuned on the task" in err


def test_what_a_tokenizer_gives_and_a_classifier_does_not_take_is_left_out(folder, command, tmp_path):
    config = DistilBertConfig(
        vocab_size=len(VOCABULARY), dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=24
    )
    save(DistilBertForSequenceClassification(config), tmp_path / "distil")
    assert "token_type_ids" in load_tokenizer(tmp_path / "distil")("the cat")
    code, _, err = command(
        "fisher", tmp_path / "distil", "--task", "cola", "--data", folder / "glue", "--samples", 4,
        "--max-length", 12, "--out", tmp_path / "profile",
    )  # fmt: skip
    assert code == 0, err
    assert FisherProfile.from_pretrained(tmp_path / "profile").num_samples == 4


def test_random_tokens_come_from_those_that_the_model_knows(folder):
    tokenizer, model = load_tokenizer(folder / "model"), load_lm(folder / "model")
    tokenizer.add_tokens([f"new{i}" for i in range(200)])
    given = text_inputs(model, tokenizer, stream_text(folder / "text.txt"), num_samples=None, max_length=12, seed=0)
    assert max(token for sample in given.samples for token in sample["input_ids"]) < len(VOCABULARY)


def test_classes_go_by_their_numbers_not_by_the_order_in_which_they_are_named(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(folder / "model")
    model = BertForSequenceClassification(tiny_bert_config())
    examples = [("w1", "b"), ("w2", "a"), ("w3", "B")]

    def numbers(named, texts):
        model.config.id2label = named
        table = "".join(f"{text},{label}\n" for text, label in texts)
        Path("own.csv").write_text(f"text,label\n{table}")
        given = task_inputs(model, tokenizer, "own", "own.csv", num_samples=None, max_length=12, seed=0)
        return [sample["labels"] for sample in given.samples]

    assert numbers({1: "b", 0: "a"}, examples[:2]) == [1, 0]
    assert numbers({0: "b", 1: "a"}, examples[:2]) == [0, 1]
    assert numbers({1: "B", 0: "A"}, examples[:2]) == [1, 0]
    assert numbers({0: "b", 1: "B"}, [examples[0], examples[2]]) == [0, 1]
    assert numbers({0: "LABEL_0", 1: "LABEL_1"}, examples[:2]) == [1, 0]


@pytest.mark.parametrize(("number", "message"), [("--seed", "seed -4"), ("--max-length", "max length -4")])
def test_numbers_for_a_task_are_checked_before_its_data_are_read(number, message, chain, command):
    line = f"fisher classifier --task cola --data nowhere {number} -4 --out new"
    if not (chain / "classifier").exists():
        save(BertForSequenceClassification(tiny_bert_config()), chain / "classifier")
    code, _, err = command(*line.split())
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_profiles_are_merged_and_stored_smaller(chain, command):
    line = "fisher model --text text.txt --samples 10 --max-length 12 --seed 2 --save-dtype bfloat16 --out half"
    assert command(*line.split())[0] == 0
    half = FisherProfile.from_pretrained(chain / "half")
    assert {str(t.dtype) for t in half.diagonal.values()} == {"torch.bfloat16"}
    code, out, err = command("merge", "profile", "half", "--out", "both")
    assert code == 0, err
    both, whole = (FisherProfile.from_pretrained(chain / name) for name in ("both", "profile"))
    assert both.num_samples == half.num_samples + whole.num_samples
    assert both.provenance["source"] == "model"
    assert f"{both.num_samples} samples" in out
    assert [part["seed"] for part in both.provenance["merged"]] == [1, 2]
    before = (chain / "half" / "profile.json").read_bytes()
    code, _, err = command("merge", "profile", "half", "--out", "half")
    assert (code, err.count("\n")) == (2, 1)
    assert "half is what the result is made from, and would be gone; expected another place" in err
    assert (chain / "half" / "profile.json").read_bytes() == before
    assert command("schedule", "both", "--out", "both.json")[0] == 0
    for also in ("profile", "both"):  # whose first samples these are
        line = f"fisher model --text text.txt --samples 7 --max-length 12 --seed 1 --out fewer-of-{also}"
        assert command(*line.split())[0] == 0
        code, _, err = command("merge", also, f"fewer-of-{also}", "--out", "twice")
        assert code == 2
        assert "profiles 1 and 2 were both measured on samples of 12 tokens of" in err


def test_inspect_names_the_noise(chain, command):
    profile = FisherProfile.from_pretrained(chain / "profile")
    name = "bert.encoder.layer.0.attention.self.key.bias"
    replace(profile, noise=[name]).save_pretrained(chain / "noisy")
    code, out, _ = command("inspect", "model", "--profile", "noisy")
    assert code == 0
    assert f"rounding noise alone, left out of the scores: {name}" in " ".join(out.split())


FISHER = "fisher model --text text.txt --max-length 12 --out new"
FINETUNE = "finetune model --task cola --data glue --out new --arm guided --schedule schedule.json"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (FISHER.replace("text.txt", "nowhere.txt"), "cannot read the text nowhere.txt: No such file"),
        (FISHER.replace("text.txt", "blank.txt"), "blank.txt has no text; expected"),
        (FISHER.replace("12", "128"), "BertForMaskedLM has positions for 24 tokens: use --max-length 24 or less"),
        (f"{FISHER} --samples 0", "number of samples 0; expected at least 1"),
        (f"{FISHER} --samples some", "number of samples some; expected at least 1, or all"),
        (f"{FISHER} --fisher true", "unknown --fisher 'true'; expected one of: empirical, sampled"),
        (f"{FISHER} --columns text=a:label=b", "--data None, --columns text=a:label=b; expected --text, or --task"),
        (f"{FISHER} --stable-tau 0.9", "--stable-tau 0.9 without --until-stable, whose option it is"),
        (f"{FISHER} --rank-tolerance 0.1 --until-stable", "--rank-tolerance 0.1 without --until-ranked"),
        (f"{FISHER} --rank-confidence 0.9", "--rank-confidence 0.9 without --until-ranked or --until-stable"),
        (f"{FISHER} --scores-only --save-dtype bfloat16", "--save-dtype bfloat16 with --scores-only"),
        (
            "schedule profile --shape exponential:-3 --out new",
            "decay -3 of shape exponential; expected",
        ),
        (f"{FISHER} --max-characters 0", "at most 0 characters; expected at least 1"),
        (f"{FISHER} --task cola", "--task cola, --data None; expected --text, or --task with its --data"),
        (FISHER.replace("--text text.txt", "--task cola --data glue"), "BertForMaskedLM has no classes"),
        (f"{FISHER} --checkpoint-every -1", "checkpoint every -1 seconds; expected 0 (after each batch) or more"),
        (f"{FISHER} --checkpoint-every nan", "checkpoint every nan seconds; expected 0"),
        (f"{FISHER} --batch-size 0", "batch size 0; expected at least 1"),
        (f"{FISHER} --tokens-per-batch 0", "tokens per batch 0; expected at least 1"),
        (f"{FISHER} --objective causal", "choose another objective or model"),
        (f"{FISHER} --objective hope", "unknown objective 'hope'; expected one of auto"),
        (FISHER.replace("model", "./nobody"), "no folder './nobody'; expected"),
        (FISHER.replace("new", "/proc/new"), "cannot write /proc/new"),
        (FISHER + " --save-dtype float16", "float16 cannot hold Fisher values"),
        ("merge profile profile --out new", "profiles 1 and 2 were measured on the same"),
        ("merge profile --out new", "1 profile to merge; expected two or more"),
        ("schedule no/where --out new", "no folder no/where, and the hub says"),
        (FISHER.replace("new", "glue"), "glue holds other files and no profile.json"),
        ("schedule profile --upper 1.0 --out new", r"dropout rate of upper is 1.0; expected a number in [0, 1)"),
        ("schedule profile --upper 0.1 --lower 0.2 --out new", "lower rate 0.2 is above upper rate 0.1"),
        ("schedule profile --shape linaer --out new", "did you mean 'linear'?"),
        ("schedule nowhere --out new", "no folder nowhere; expected one that `guided-dropout fisher"),
        ("inspect model --schedule text.txt", "text.txt is not valid JSON"),
        ("inspect model --grouping owners", "unknown grouping 'owners' (did you mean 'owner'?)"),
        (f"{FINETUNE} --seed -1", "the seed -1; expected 0 or more"),
        (FINETUNE.replace("cola", "kola"), "did you mean 'cola'"),
        (FINETUNE.replace("cola", "rte"), "RTE"),
        (FINETUNE.replace("guided", "guidde"), "did you mean 'guided'"),
        (FINETUNE.replace("guided --schedule schedule.json", "ewc"), "the arm 'ewc' has no profile; expected"),
        (
            FINETUNE.replace("guided", "none"),
            "--schedule schedule.json with the arm 'none', which uses no schedule; expected one that does (guided, ",
        ),
        (
            FINETUNE.replace("guided", "mixout:p=0.5"),
            "the arm 'mixout', which uses no schedule; expected",
        ),
        (f"{FINETUNE} --profile profile", "--profile profile with the arm 'guided', which uses no profile; expected"),
        (FINETUNE.replace("guided", "mixout:p=2"), "p is 2.0; expected a number from 0 to 1"),
        (f"{FINETUNE} --arm-param p=1", "the arm 'guided' has no parameters; found 'p'"),
        (FINETUNE.replace(" --schedule schedule.json", ""), "schedule"),
        (f"{FINETUNE} --train-fraction 0", "fraction"),
        (f"{FINETUNE} --metrics accuracy,accuracy", "has the metric accuracy twice; expected each once"),
        (f"{FINETUNE} --split papr", "did you mean 'paper'"),
        (f"{FINETUNE} --columns text=a:label=b", "found --columns text=a:label=b with the task cola; expected none"),
        (FINETUNE.replace("--data glue", "--data text.csv"), "expected a GLUE folder, or --columns"),
        (FINETUNE.replace("--task cola --data glue", ""), "without a --task; expected a task, or --data FILE"),
        (
            FINETUNE.replace("--task cola --data glue", "--data no.csv"),
            "expected --eval-data FILE, or --split holdout:0.2",
        ),
        (
            FINETUNE.replace("--task cola --data glue", "--data no.csv --split holdout:0.2"),
            "cannot read no.csv (No such",
        ),
        (FINETUNE.replace("--out new", "--out glue"), "glue holds other files and no result.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_nothing(chain, command, line, message):
    before = sorted(chain.rglob("*"))
    code, _, err = command(*line.split())
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert message in err
    assert sorted(chain.rglob("*")) == before


def test_a_malformed_row_is_named_by_file_and_line(chain, command, tmp_path):
    cola = tmp_path / "CoLA"
    cola.mkdir()
    good = (chain / "glue" / "CoLA" / "dev.tsv").read_text()
    (cola / "dev.tsv").write_text(good)
    (cola / "train.tsv").write_text(good + "x\tmaybe\t\tthe cat\n")
    code, _, err = command(*FINETUNE.replace("glue", str(tmp_path)).split())
    assert code == 2
    assert "train.tsv:41: found" in err


def test_a_schedule_for_another_model_is_refused(chain, command):
    save_tiny_bert(chain / "wider", hidden_size=64)
    code, _, err = command(*FINETUNE.replace("model", "wider").split())
    assert code == 2
    assert "another model" in err


def signalling(monkeypatch, *, before=(), after=()):
    """Have `fisher` send these signals to itself before the first batch, and after each."""
    estimate = fisher.estimate_fisher

    def send(numbers):
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0)

    def signalled(*args, progress, **options):
        send(before)
        return estimate(*args, progress=lambda done: (send(after), progress(done)), **options)

    monkeypatch.setattr(fisher, "estimate_fisher", signalled)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on_and_does(chain, command, monkeypatch, number):
    line = "fisher model --text text.txt --samples 20 --max-length 12 --batch-size 4 --seed 1 --device cpu"
    line += " --out interrupted"
    before = sorted(chain.rglob("*"))
    with monkeypatch.context() as patch:
        signalling(patch, after=[number])
        code, _, err = command(*line.split())
    assert code == 2, err
    state = "interrupted.checkpoint"
    assert err == (
        f"error: interrupted; the state is in {state}: run the same command with --resume to go on from there\n"
    )
    assert set(chain.rglob("*")) - set(before) == {chain / state, chain / state / "process-1-of-1.safetensors"}
    code, _, err = command(*line.split())
    assert code == 2
    assert "interrupted.checkpoint holds the state of an unfinished run (4 samples)" in err
    assert command(*line.split(), "--resume")[0] == 0
    profiles = [FisherProfile.from_pretrained(chain / name) for name in ("interrupted", "profile")]
    assert profiles[0].tensor_means == pytest.approx(profiles[1].tensor_means, rel=1e-6, abs=1e-12)
    assert not (chain / state).exists()
    shutil.rmtree(chain / "interrupted")


def test_a_finished_profile_is_not_measured_again(chain, command, monkeypatch):
    line = "fisher model --text text.txt --samples 20 --max-length 12 --batch-size 4 --seed 1 --out profile --resume"
    before = {path: path.stat().st_mtime_ns for path in chain.rglob("*") if path.is_file()}
    monkeypatch.setattr(fisher, "estimate_fisher", lambda *args, **options: pytest.fail("measured again"))
    code, out, err = command(*line.split())
    assert code == 0, err
    assert "the profile of this run is there already: nothing was measured" in " ".join(out.split())
    assert out.splitlines()[-1] == "profile"
    with monkeypatch.context() as patch:
        patch.setenv("GUIDED_DROPOUT_KERNEL", "off")  # as on a machine with another kernel
        assert command(*line.split())[0] == 0
    file = chain / "profile" / "profile.json"
    own = file.read_text()
    facts = json.loads(own)
    file.write_text(json.dumps({**facts, "model": {**facts["model"], "revision": "c0ffee"}}))  # from the hub
    assert command(*line.split())[0] == 0
    file.write_text(own)
    os.utime(file, ns=(before[file], before[file]))
    for change, message in {
        "--seed 2": "seed was 1, is 2",
        "--max-length 10 --reduction sum": 'reduction was "mean", is "sum"; max_length was 12, is 10',
        "--samples 10": 'samples was "20", is "10"',
        "--batch-size 8": "batch_size was 4, is 8",
        "--tokens-per-batch 64": "batch_size was 4, is null; tokens_per_batch was null, is 64",
        "--scores-only": 'save_dtype was "float32", is null',
        "--save-dtype bfloat16": 'save_dtype was "float32", is "bfloat16"',
        "--dtype float64": 'dtype was "float32", is "float64"',
        "--fisher sampled": 'labels was "data", is "model"',
        "--until-stable": 'until.rule was not given, is "stable"',
    }.items():
        code, _, err = command(*line.split(), *change.split())
        assert code == 2, change
        assert err.startswith("error: profile holds the profile of another run: ")
        assert message in err
    assert {path: path.stat().st_mtime_ns for path in chain.rglob("*") if path.is_file()} == before


def test_what_took_the_loop_and_what_no_sample_reached_is_said_in_a_line_each(chain, command):
    line = "fisher model --text text.txt --samples 20 --max-length 12 --batch-size 4 --seed 1 --out profile --resume"
    said = command(*line.split())[1]
    assert "one sample at a time" not in said
    assert "reached by no sample" not in said
    file = chain / "profile" / "profile.json"
    before = file.read_text()
    facts = json.loads(before)
    names = list(facts["shapes"])[:2]
    loop = {"fallback": names, "reasons": dict.fromkeys(names, "no rule for sin"), "untouched": [f"{names[0]}[3]"]}
    file.write_text(json.dumps({**facts, "coverage": {**facts["coverage"], **loop}}))
    said = " ".join(command(*line.split())[1].split())
    file.write_text(before)
    assert f"one sample at a time (no rule for sin): {names[0]}, {names[1]} " in said
    assert f"reached by no sample, so that their values are 0: {names[0]}[3] profile" in said


def test_a_finished_profile_of_a_rule_is_known_by_what_the_rule_was_asked_for(chain, command):
    line = f"{FISHER.replace('new', 'ranked')} --samples 30 --scores-only --until-ranked --resume"
    assert command(*line.split())[0] == 0
    code, out, _ = command(*line.split())
    assert code == 0
    assert "nothing was measured" in " ".join(out.split())
    code, _, err = command(*line.split(), "--rank-tolerance", "0.2")
    assert code == 2
    assert "until.tolerance was 0.05, is 0.2" in err
    shutil.rmtree(chain / "ranked")


def test_an_interrupt_before_the_first_batch_leaves_nothing(chain, command, monkeypatch):
    before = sorted(chain.rglob("*"))
    signalling(monkeypatch, before=[signal.SIGINT, signal.SIGINT])  # the first waits for a batch
    code, _, err = command(*FISHER.split())
    assert code == 2, err
    assert err == "error: interrupted; nothing was written by the unfinished step: run the command again\n"
    assert sorted(chain.rglob("*")) == before


@pytest.mark.parametrize(
    "line",
    [
        f"{FISHER} --samples 8 --scores-only",
        "fidelity model --text text.txt --samples 8 --max-length 12 --fractions 0.5 --draws 1 --scores-only --out new",
        "landscape model --text text.txt --samples 4 --max-length 12 --dims 1 --points 3 --out new",
    ],
)
def test_an_interrupt_while_the_result_is_saved_waits_for_it(folder, command, monkeypatch, line):
    fsync, sent = os.fsync, []

    def saving(handle):
        if not sent and list(folder.glob(".new.*")):  # the result, not yet in its place
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return fsync(handle)

    monkeypatch.setattr(os, "fsync", saving)
    code, _, err = command(*line.split())
    assert (code, len(sent)) == (0, 1), err
    assert (folder / "new").exists()
    assert not (folder / "new.checkpoint").exists()
    (shutil.rmtree if (folder / "new").is_dir() else os.unlink)(folder / "new")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device here")
@pytest.mark.parametrize("buffered", [True, False])
def test_what_cannot_be_printed_is_one_line(buffered):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    line = f"'{sys.executable}' {'' if buffered else '-u'} -m guided_dropout --version"
    for to, code in ((">/dev/full", 2), (">&-", 0)):
        made = subprocess.run(f"{line} {to}", shell=True, env=env, stderr=subprocess.PIPE, text=True)
        assert made.returncode == code, made.stderr
        assert made.stderr.count("\n") == (code != 0)
        assert ("error: standard output cannot be written (No space left on device); expected" in made.stderr) == (
            code != 0
        )


def test_samples_that_are_not_finite_are_named_and_left_out_if_asked(chain, command, tmp_path):
    model = save_tiny_bert(tmp_path / "nan")
    weights = load_file(model / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][VOCABULARY.index("bird")] = float("nan")
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"].nan_to_num()
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    lines = [f"the cat sees a {'bird' if i == 4 else 'dog'} and a big house or tree\n" for i in range(12)]
    (tmp_path / "text.txt").write_text("".join(lines))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    line = ["fisher", model, "--text", tmp_path / "text.txt", "--max-length", 14, "--out", tmp_path / "out"]
    code, _, err = command(*line)
    assert code == 2
    assert "error: the loss of sample" in err
    assert "--skip-nonfinite" in err
    code, out, err = command(*line, "--skip-nonfinite", "--tokens-per-batch", 60)
    assert code == 0, err
    profile = FisherProfile.from_pretrained(tmp_path / "out")
    (index,) = profile.coverage["nonfinite"]
    assert f"1 not finite left out (number {index} of the stream, from 0)" in out
    assert profile.provenance["tokens_per_batch"] == 60


def test_memory_that_does_not_suffice_is_one_line(command, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of …"
        )

    monkeypatch.setattr(fisher, "estimate_fisher", full)
    code, _, err = command("fisher", "demo", "--text", "demo", "--samples", 4, "--out", "full")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: the device's memory does not suffice (CUDA out of memory. Tried")
    assert "smaller batch" in err
