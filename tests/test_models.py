import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from families import language_model
from safetensors.torch import load_file
from tiny import VOCABULARY, save, save_tiny_bert, tiny_bert_config
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from guided_dropout import models
from guided_dropout.errors import ModelError
from guided_dropout.models import load_classifier, load_lm, load_model, load_tokenizer, resolve_model

V = len(VOCABULARY)
LLAMA = LlamaConfig(
    vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, eos_token_id=[3, 4]
)
GPT2 = GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=2, eos_token_id=3)
T5 = T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
BART = BartConfig(
    vocab_size=V,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    max_position_embeddings=32,
    forced_eos_token_id=None,
)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return save_tiny_bert(tmp_path / "bert")


def test_names_resolve_to_folders_and_hub_names(bert: Path) -> None:
    assert resolve_model(bert) == str(bert)
    assert resolve_model("bert-base-uncased") == "bert-base-uncased"
    assert resolve_model("google/bert") == "google/bert"


def test_demo_is_the_folder_inside_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "files", lambda package: tmp_path)
    with pytest.raises(ModelError, match="install guided-dropout again"):
        resolve_model("demo")
    folder = save_tiny_bert(tmp_path / "demo" / "model")
    assert resolve_model("demo") == str(folder)
    assert load_lm("demo").config.vocab_size == V


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", ""])
def test_a_path_without_a_folder_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=r"no folder .*check the path"):
        resolve_model(name)


def test_a_file_is_no_model(bert: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        load_lm(bert / "config.json")


def test_an_unreachable_hub_name_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"cannot load nobody/nothing .*hub.*check the name") as caught:
        load_lm("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_folder_never_asks_the_network(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    load_lm(bert)
    load_classifier(bert, 2, head_seed=0)
    load_tokenizer(bert)


@pytest.mark.parametrize("content", ["{}", "not json"])
def test_a_damaged_config_is_one_line(bert: Path, content: str) -> None:
    (bert / "config.json").write_text(content)
    with pytest.raises(ModelError, match="cannot load") as caught:
        load_lm(bert)
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_one_line(bert: Path) -> None:
    weights = bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load"):
        load_lm(bert)
    weights.unlink()
    with pytest.raises(ModelError, match="cannot load"):
        load_lm(bert)


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        (lambda: GPT2LMHeadModel(GPT2), "GPT2LMHeadModel"),
        (lambda: LlamaForCausalLM(LLAMA), "LlamaForCausalLM"),
        (lambda: T5ForConditionalGeneration(T5), "T5ForConditionalGeneration"),
        (lambda: BartForConditionalGeneration(BART), "BartForConditionalGeneration"),
        (lambda: BertLMHeadModel(tiny_bert_config(is_decoder=True)), "BertLMHeadModel"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_objective_is_the_checkpoints_own(model, objective: str, tmp_path: Path) -> None:
    assert type(load_lm(save(model(), tmp_path / "lm"))).__name__ == objective


def test_a_language_model_comes_in_evaluation_mode_and_float32(bert: Path) -> None:
    model = load_lm(bert)
    assert not model.training
    assert model.dtype == torch.float32
    assert load_lm(bert, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_an_objective_that_the_model_was_not_trained_on_is_refused(bert: Path) -> None:
    with pytest.raises(ModelError, match="objectives: mlm; expected causal"):
        load_lm(bert, "causal")
    with pytest.raises(ModelError, match="unknown objective 'clm'"):
        load_lm(bert, "clm")
    assert load_lm(bert, "mlm").config.model_type == "bert"


@pytest.mark.parametrize(
    "bare", [lambda: BertModel(tiny_bert_config()), lambda: LlamaModel(LLAMA)], ids=["bert", "llama"]
)
def test_weights_without_a_language_model_head_are_refused(bare, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not hold the language-model head .*(cls\.predictions|lm_head)"):
        load_lm(save(bare(), tmp_path / "bare"))


def test_tied_heads_count_as_present(tmp_path: Path) -> None:
    assert load_lm(save(GPT2LMHeadModel(GPT2).transformer, tmp_path / "gpt2")).lm_head is not None


def test_weights_of_another_size_are_refused(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ModelError, match="cannot load"):
        load_lm(bert)
    with pytest.raises(ModelError, match=r"does not hold the weights of bert .*of another shape"):
        load_classifier(bert, 2, head_seed=0)


def head_of(folder: Path, seed: int) -> torch.Tensor:
    return load_classifier(folder, 2, head_seed=seed).classifier.weight


def test_the_head_depends_on_its_seed_alone(bert: Path) -> None:
    torch.manual_seed(1)
    first = head_of(bert, 5)
    torch.manual_seed(2)
    assert torch.equal(head_of(bert, 5), first)
    assert not torch.equal(head_of(bert, 6), first)


def test_a_pooler_that_the_checkpoint_lacks_is_drawn_with_the_head(bert: Path) -> None:
    first, second = (load_classifier(bert, 2, head_seed=5).bert.pooler.dense.weight for _ in range(2))
    assert torch.equal(first, second)
    assert first.std() > 0.01


def test_a_backbone_of_which_layers_are_missing_is_refused(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path, num_hidden_layers=4)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(ModelError, match=r"does not hold the weights of bert \(bert.encoder.layer.4.*15 more missing"):
        load_classifier(tmp_path, 2, head_seed=0)


def test_code_beside_a_model_is_not_run(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    config = json.loads((bert / "config.json").read_text())
    named = {"AutoConfig": "mine.MyConfig", "AutoModelForMaskedLM": "mine.MyModel"}
    (bert / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": named}))
    (bert / "mine.py").write_text("raise AssertionError('run')")
    for load in (load_lm, load_model):
        with pytest.raises(ModelError, match="cannot load"):
            load(bert)


def test_pickled_weights_are_refused_and_nothing_is_sent(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    seen = []
    load = models.AutoConfig.from_pretrained

    def watched(*args: object, **options: object) -> object:
        seen.append(os.environ.get("DISABLE_SAFETENSORS_CONVERSION"))
        return load(*args, **options)

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", watched)
    torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    for load_one in (load_lm, load_model, lambda name: load_classifier(name, 2, head_seed=0)):
        with pytest.raises(ModelError, match="no weights as safetensors; expected those, for pickles may run code"):
            load_one(bert)
    assert {*seen} == {"1"}
    assert "DISABLE_SAFETENSORS_CONVERSION" not in os.environ


def test_loading_leaves_the_random_state_alone(bert: Path) -> None:
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    load_classifier(bert, 2, head_seed=0)
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


def test_the_backbone_is_the_checkpoints(bert: Path) -> None:
    pretrained, classifier = load_lm(bert), load_classifier(bert, 2, head_seed=0)
    for name, parameter in pretrained.bert.named_parameters():
        assert torch.equal(classifier.bert.get_parameter(name), parameter), name


@pytest.mark.parametrize(("num_labels", "problem"), [(1, "regression"), (3, "single_label_classification")])
def test_one_label_is_regression(bert: Path, num_labels: int, problem: str) -> None:
    model = load_classifier(bert, num_labels, head_seed=0)
    assert model.config.problem_type == problem
    assert model.num_labels == num_labels


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_checkpoint_with_a_classification_head_is_refused(num_labels: int, tmp_path: Path) -> None:
    folder = save(BertForSequenceClassification(tiny_bert_config()), tmp_path / "tuned")
    with pytest.raises(ModelError, match="already holds a classification head"):
        load_classifier(folder, num_labels, head_seed=0)
    with pytest.raises(ModelError, match="language-model head"):
        load_lm(folder)


def test_a_causal_model_pads_with_its_end_of_text(tmp_path: Path) -> None:
    assert load_classifier(save(GPT2LMHeadModel(GPT2), tmp_path / "gpt2"), 2, head_seed=0).config.pad_token_id == 3
    assert load_classifier(save(LlamaForCausalLM(LLAMA), tmp_path / "llama"), 2, head_seed=0).config.pad_token_id == 3


def without_pad(folder: Path, **tokens: str) -> None:
    file = folder / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(file.read_text()).items() if k != "pad_token"}
    file.write_text(json.dumps({**settings, "pad_token": None, **tokens}))


def test_a_tokenizer_without_padding_pads_with_its_end_of_text(bert: Path) -> None:
    without_pad(bert, eos_token="[SEP]")
    assert load_tokenizer(bert).pad_token == "[SEP]"
    without_pad(bert, eos_token=None)
    with pytest.raises(ModelError, match="no padding token"):
        load_tokenizer(bert)


def test_a_model_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save(BertModel(tiny_bert_config()), tmp_path / "bare", tokenizer=False)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(folder)


def test_nothing_is_printed(bert: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    load_lm(bert)
    load_classifier(bert, 2, head_seed=0)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.real
def test_a_real_masked_lm_loads_as_lm_and_as_classifier() -> None:
    folder = Path(os.environ["GUIDED_DROPOUT_SHARED"]) / "models" / "minilm-l6-mlm"
    assert sum(p.numel() for p in load_lm(folder).parameters()) > 22e6
    assert load_classifier(folder, 2, head_seed=0).num_labels == 2
    assert load_tokenizer(folder).vocab_size == 30522


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "mpt"])
def test_a_sample_of_all_positions_runs_and_a_longer_one_is_refused(family):
    """RoBERTa's table of positions begins after its padding; MPT's distances are a table of so many."""
    model = language_model(family).eval()
    longest = models.positions_of(model)
    models.check_length(model, longest)
    tokens = torch.full((1, longest + 1), 7)
    with torch.no_grad():
        model(tokens[:, :-1])
        with pytest.raises((IndexError, RuntimeError)):
            model(tokens)
    with pytest.raises(ModelError, match=f"has positions for {longest} tokens: use --max-length {longest} or less"):
        models.check_length(model, longest + 1)
