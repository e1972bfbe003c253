"""The Fisher of models with PEFT adapters against plain autograd through the PEFT model itself."""

import pytest
import torch
from families import language_model
from fisher_oracles import assert_exact, draw_samples, own_loss_oracle
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from guided_dropout import estimate_fisher
from guided_dropout.errors import ModelError

# PEFT reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LAYERS = {"bert": ["query", "value"], "llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def with_lora(family, **options):
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=LAYERS[family], lora_dropout=0.1, init_lora_weights=False, **options)
    if family == "gpt2":
        config.fan_in_fan_out = True
    return get_peft_model(language_model(family).double(), config).double()


@pytest.mark.parametrize("parameters", ["trainable", "base", "all"])
@pytest.mark.parametrize("family", LAYERS)
def test_lora_is_exact_whichever_parameters_are_asked_for(family, parameters):
    model = with_lora(family)
    samples = draw_samples([9, 5, 11, 7])
    profile = estimate_fisher(model, samples, batch_size=3, parameters=parameters)
    adapters = {n for n, p in model.named_parameters() if "lora_" in n}
    others = {n for n, _ in model.named_parameters()} - adapters
    assert adapters
    assert set(profile.diagonal) == {"trainable": adapters, "base": others, "all": adapters | others}[parameters]
    assert profile.coverage["fallback"] == []
    oracle = own_loss_oracle(model, samples)
    assert_exact(profile.diagonal, {n: oracle[n] for n in profile.diagonal})


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["cls"]}])
def test_other_forms_of_lora_are_exact(options):
    model = with_lora("bert", **options)
    samples = draw_samples([9, 5, 11])
    profile = estimate_fisher(model, samples, batch_size=3, parameters="trainable")
    oracle = own_loss_oracle(model, samples)
    assert set(profile.diagonal) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert_exact(profile.diagonal, {n: oracle[n] for n in profile.diagonal})


def test_adapters_in_float32_are_batched_on_a_model_in_half_precision():
    """As PEFT leaves them: what they get is rounded to the model's precision all the same."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape, initializer_range=0.15)).bfloat16().eval()
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    profile = estimate_fisher(model, draw_samples([29, 25]), parameters="trainable")
    assert profile.coverage["fallback"] == []
    assert profile.noise == ()


def test_a_task_type_changes_the_wrapper_and_nothing_else():
    samples = draw_samples([9, 5, 11])
    plain = estimate_fisher(with_lora("llama"), samples, parameters="trainable")
    typed = estimate_fisher(with_lora("llama", task_type=TaskType.CAUSAL_LM), samples, parameters="trainable")
    assert typed.objective == plain.objective == "causal"
    assert typed.tensor_means == pytest.approx(plain.tensor_means, rel=1e-9)


def test_the_profile_says_which_model_it_was():
    profile = estimate_fisher(with_lora("bert"), draw_samples([9]), parameters="trainable")
    assert profile.model["architecture"] == "BertForMaskedLM"
    assert profile.model["model_type"] == "bert"
    assert all(n.startswith(profile.model["backbone_prefix"]) for n in profile.diagonal)


def test_a_function_chooses_and_the_trainable_stay_trainable():
    model = with_lora("bert")
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    profile = estimate_fisher(model, draw_samples([9]), parameters=lambda name, p: "lora_B" in name and p.dim() == 2)
    assert profile.diagonal
    assert all("lora_B" in n for n in profile.diagonal)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_what_was_not_asked_for_costs_no_squares(monkeypatch):
    """A rank-4 adapter's products are a small part of the model's."""
    from guided_dropout.fisher import kernels

    sizes = []
    squares = kernels.square_accumulate

    def counted(total, sums, left, right, layout):
        sizes.append(left.shape[1] * right.shape[1])
        squares(total, sums, left, right, layout)

    monkeypatch.setattr("guided_dropout.fisher.squares.square_accumulate", counted)
    estimate_fisher(with_lora("bert"), draw_samples([9, 7]), parameters="trainable")
    assert sizes
    assert max(sizes) == 4 * 16


def test_a_large_table_alone_is_exact():
    model = language_model("llama", vocab_size=5000).double()
    samples = draw_samples([9, 5, 11])
    profile = estimate_fisher(model, samples, batch_size=3, parameters=lambda name, p: "embed_tokens" in name)
    assert_exact(profile.diagonal, {n: t for n, t in own_loss_oracle(model, samples).items() if "embed_tokens" in n})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("lora", "parameters 'lora'; expected one of all, trainable, base"),
        (lambda name, p: False, "the given function leaves none of the parameters of BertForMaskedLM"),
    ],
)
def test_a_choice_that_leaves_nothing_is_refused(parameters, message):
    with pytest.raises(ModelError, match=message):
        estimate_fisher(language_model("bert"), draw_samples([9]), parameters=parameters)


def test_learned_prompts_are_refused():
    model = get_peft_model(
        language_model("llama"), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    )
    with pytest.raises(ModelError, match="learns a prompt; expected adapters inside the layers"):
        estimate_fisher(model, draw_samples([9]))
