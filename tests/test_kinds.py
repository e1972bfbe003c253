"""Kinds of tensors, read from path and shape alone."""

import pytest
from families import FAMILIES, FISHER_ONLY, language_model, profile_of

from guided_dropout.identity import backbone_prefix
from guided_dropout.schedule.kinds import KINDS, groups, tensor_places


def places(family):
    model = language_model(family)
    return tensor_places({n: tuple(p.shape) for n, p in model.named_parameters()}, backbone_prefix(model))


@pytest.mark.parametrize(
    ("family", "name", "kind", "layer"),
    [
        ("bert", "bert.embeddings.word_embeddings.weight", "embedding", -1),
        ("bert", "bert.embeddings.LayerNorm.bias", "norm", -1),
        ("bert", "bert.encoder.layer.1.attention.self.query.bias", "attention", 1),
        ("bert", "bert.encoder.layer.0.attention.output.dense.weight", "attention", 0),
        ("bert", "bert.encoder.layer.0.attention.output.LayerNorm.weight", "norm", 0),
        ("bert", "bert.encoder.layer.1.intermediate.dense.bias", "intermediate", 1),
        ("bert", "bert.encoder.layer.1.output.dense.weight", "output", 1),
        ("bert", "bert.encoder.layer.1.output.dense.bias", "output", 1),
        ("bert", "cls.predictions.bias", "head", None),
        ("bert", "cls.predictions.transform.LayerNorm.weight", "norm", None),
        ("gpt2", "transformer.wte.weight", "embedding", -1),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", "intermediate", 1),  # stored as [in, out]
        ("gpt2", "transformer.h.1.mlp.c_proj.weight", "output", 1),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", "attention", 0),
        ("gpt2", "transformer.ln_f.weight", "norm", None),
        ("llama", "model.layers.0.mlp.gate_proj.weight", "intermediate", 0),
        ("llama", "model.layers.0.mlp.down_proj.weight", "output", 0),
        ("llama", "model.layers.0.input_layernorm.weight", "norm", 0),
        ("llama", "lm_head.weight", "head", None),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.q.weight", "attention", 1),
        ("t5", "encoder.block.0.layer.1.DenseReluDense.wi.weight", "intermediate", 0),
        ("t5", "encoder.block.0.layer.1.DenseReluDense.wo.weight", "output", 0),
        ("distilbert", "distilbert.transformer.layer.1.ffn.lin1.weight", "intermediate", 1),
        ("bart", "model.decoder.embed_positions.weight", "embedding", -1),  # after the encoder's layers
        ("bart", "model.encoder.layernorm_embedding.weight", "norm", -1),
        ("mixtral", "model.layers.1.mlp.experts.down_proj", "output", 1),
    ],
)
def test_kinds_and_layers(family, name, kind, layer):
    place = places(family)[name]
    assert (place.kind, place.layer) == (kind, layer)


def test_what_embeds_after_the_layers_is_of_the_backbone_or_a_head():
    shapes = {f"gpt.{name}.weight": (4, 4) for name in ("wte", "layers.0.mlp.dense", "relative_embeddings")}
    places = tensor_places({**shapes, "embed_out.weight": (4, 4)}, "gpt.")
    assert [p.kind for p in places.values()] == ["embedding", "other", "embedding", "head"]


@pytest.mark.parametrize("family", [*FAMILIES, *FISHER_ONLY])
def test_each_tensor_of_each_family_has_a_place(family):
    found = places(family)
    assert {p.kind for p in found.values()} <= set(KINDS)
    assert {"embedding", "norm"} <= {p.kind for p in found.values()}
    assert {p.layer for p in found.values() if p.stack} == {0, 1} or family == "albert"


def test_stacks_are_told_apart():
    assert {p.stack for p in places("t5").values()} == {"", "encoder.block", "decoder.block"}


def test_groups_add_up_to_the_whole_without_the_noise():
    model = language_model("bert")
    profile = profile_of(model)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    found = groups(profile)
    assert sum(g.size for g in found) == sum(sizes.values())
    assert sum(g.total for g in found) == pytest.approx(sum(profile.tensor_means[n] * sizes[n] for n in sizes))
    names = [n for n, p in places("bert").items() if (p.kind, p.layer) == ("output", 1)]
    (group,) = (g for g in found if (g.place.kind, g.place.layer) == ("output", 1))
    assert group.mean == pytest.approx(
        sum(profile.tensor_means[n] * sizes[n] for n in names) / sum(sizes[n] for n in names)
    )
    from dataclasses import replace

    quiet = groups(replace(profile, noise=names))
    assert not [g for g in quiet if (g.place.kind, g.place.layer) == ("output", 1)]
