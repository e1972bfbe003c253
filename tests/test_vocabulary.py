"""Training the rows that occur alone: the same losses and weights as with the whole table."""

import contextlib
import copy

import pytest
import torch
from families import VOCAB, classifier_of, language_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from two_devices import pretending, put

from guided_dropout.errors import ModelError
from guided_dropout.vocabulary import occurring_rows

# The padding (0), and the end that some classifiers look for (2).
TOKENS = (0, 2, 5, 7, 8, 30, VOCAB - 1)
CLASSIFIERS = ("bert", "roberta", "electra", "deberta-v2", "modernbert", "gpt2", "opt", "llama", "t5", "bart", "xlnet")


def batch_of(seed, tokens=TOKENS[2:]):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(tokens)[torch.randint(0, len(tokens), (4, 9), generator=generator)]
    ids[:, -1] = 2
    ids[1, 6:], ids[1, 6] = 0, 2
    mask = (ids != 0).long()
    ids[2, 3] = 0  # a padding token in a text, whose row gets no gradient where the table says so
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}


def sample():
    batch = batch_of(9)
    return {name: batch[name][:1] for name in ("input_ids", "attention_mask")}


def train(model, decay=0.0):
    """Three steps with dropout; losses, the last one's on tokens that the others may lack."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=decay)
    torch.manual_seed(0)
    losses = []
    for seed in range(3):
        loss = model.train()(**batch_of(seed, tokens=(5, 7, 8))).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return [*losses, model.eval()(**batch_of(7)).loss.item()]


@pytest.mark.parametrize(
    ("family", "options"),
    # The last starts its decoder with a token of no text.
    [*((family, {}) for family in CLASSIFIERS), ("bart", {"decoder_start_token_id": 4})],
)
def test_losses_and_weights_are_those_of_the_whole_table(family, options):
    whole = classifier_of(family, **options).double()
    few = copy.deepcopy(whole)
    names, parameters = list(few.state_dict()), list(few.parameters())
    table = few.get_input_embeddings()
    facts = table.num_embeddings, table.padding_idx
    wanted = train(whole)
    with occurring_rows(few, TOKENS, sample()):
        assert len(few.get_input_embeddings().weight) == len({*TOKENS, *options.values()})
        assert train(few) == pytest.approx(wanted, rel=1e-10)
    assert all(a is b for a, b in zip(few.parameters(), parameters, strict=True))
    assert list(few.state_dict()) == names
    assert (table.num_embeddings, table.padding_idx) == facts
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(few.state_dict()[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert few(**batch_of(3, tokens=range(3, VOCAB))).loss.item() == pytest.approx(
        whole(**batch_of(3, tokens=range(3, VOCAB))).loss.item(), rel=1e-9
    )


def test_rows_that_occur_decay_whether_or_not_they_are_trained():
    whole = classifier_of("bert").double()
    few = copy.deepcopy(whole)
    wanted = train(whole, decay=0.5)
    with occurring_rows(few, TOKENS, sample()):
        assert train(few, decay=0.5) == pytest.approx(wanted, rel=1e-10)


def test_a_block_that_fails_leaves_the_model_whole():
    model = classifier_of("bert")
    table = model.get_input_embeddings()
    before, wanted = table.weight, table.weight.detach().clone()
    with pytest.raises(ModelError, match="found the token 40, which is in none of the examples"):  # noqa: SIM117
        with occurring_rows(model, TOKENS, sample()):
            model(input_ids=torch.tensor([[5, 40]]))
    assert table.weight is before
    assert torch.equal(table.weight, wanted)
    assert model(input_ids=torch.tensor([[5, 40]])).logits.isfinite().all()


class Waits(TorchDispatchMode):
    """How often numbers are read from tensors, for which a GPU is waited for."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("token", [8, 40])
def test_on_a_gpu_nobody_waits_and_a_strange_token_is_told_at_the_end(token, monkeypatch):
    model = torch.nn.Module()
    model.table = nn.Embedding(VOCAB, 4)
    model.get_input_embeddings = lambda: model.table
    model.forward = lambda input_ids: model.table(input_ids)
    with pretending(monkeypatch):
        put(model.table.weight, "cuda:0")
        ids = put(torch.tensor([[5, token, 7]]), "cuda:0")
        wanted, waits = model.table(ids).detach(), Waits()
        told = pytest.raises(ModelError, match="found the token 40,") if token == 40 else contextlib.nullcontext()
        with told, occurring_rows(model, TOKENS, {"input_ids": ids[:, ::2]}):
            with waits:
                found = model(ids)
                model(ids[:, ::2])
            assert waits.number == 0
            assert (found == wanted).all(-1).tolist() == [[True, token == 8, True]]
        assert torch.equal(model.table(ids), wanted)


def test_a_model_that_moves_within_the_block_comes_back_whole():
    model = classifier_of("bert")
    wanted = {name: value.double() for name, value in model.state_dict().items()}
    with occurring_rows(model, TOKENS, sample()):
        model.double()  # stands for a move to a GPU
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(dict(model.state_dict()), wanted)


def tied():
    return language_model("bert")


def frozen():
    model = classifier_of("bert")
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def clipped():
    model = classifier_of("bert")
    model.get_input_embeddings().max_norm = 1.0
    return model


@pytest.mark.parametrize("build", [tied, frozen, clipped])
def test_a_table_with_another_use_stays_whole(build):
    model = build()
    before = model.get_input_embeddings().weight
    with occurring_rows(model, TOKENS, sample()):
        assert model.get_input_embeddings().weight is before
        model(input_ids=torch.tensor([[40]]))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_and_the_random_state_stay(training):
    model = classifier_of("bart").train(training)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with occurring_rows(model, TOKENS, sample()):
        assert model.training == training
        assert torch.equal(torch.get_rng_state(), state)
