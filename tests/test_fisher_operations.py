"""Random mixes of operations in a small language model: exact always, whatever rule, product or loop they take."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fisher_oracles import assert_exact, draw_samples, own_loss_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from guided_dropout import estimate_fisher

D, VOCAB, LENGTH = 6, 61, 16


def parameter(*shape):
    return nn.Parameter(torch.randn(shape) / max(1, shape[0] if shape else 1) ** 0.5)


class Block(nn.Module):
    """x [B, T, D] → [B, T, D] with some parameters of its own."""

    def __init__(self, apply, **parameters):
        super().__init__()
        self.apply_to = apply
        for name, p in parameters.items():
            self.register_parameter(name, p) if isinstance(p, nn.Parameter) else self.add_module(name, p)

    def forward(self, x):
        return self.apply_to(self, x)


def rms(m, x):
    return m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def gemma_rms(m, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + m.w.float())


def in_place(m, x):
    y = F.linear(x, m.w)
    y += m.b
    return y


def fused(m, x):
    q, k, v = m.w.chunk(3)
    return F.linear(x, q) * torch.sigmoid(F.linear(x, k)) + F.linear(x, v)


def time_major(m, x):
    return m.norm(m.linear(x.transpose(0, 1))).transpose(0, 1)


def flat(m, x):
    return m.linear(x.reshape(-1, D)).view_as(x)


def flat_time_major(m, x):
    return m.linear(x.transpose(0, 1).reshape(-1, D)).view(x.shape[1], x.shape[0], D).transpose(0, 1)


def experts(m, x):
    rows = x.reshape(-1, D)
    best = F.linear(rows, m.router).softmax(-1).max(-1)
    out = torch.zeros_like(rows)
    for e in best.indices.unique():
        (mine,) = torch.where(best.indices == e)
        hidden = F.silu(F.linear(rows[mine], m.up[e])) @ m.down[e]
        out.index_add_(0, mine, hidden * best.values[mine, None])
    return out.view_as(x)


def depthwise(m, x):
    return F.conv1d(x.transpose(1, 2), m.w, m.b, padding=2, groups=D)[..., : x.shape[1]].transpose(1, 2)


def convolution(m, x):
    return F.conv1d(x.transpose(1, 2), m.w, m.b, padding=2)[..., : x.shape[1]].transpose(1, 2)


def state_space(m, x):
    decay, states = -torch.exp(m.log_a.float()), []
    state = x.new_zeros(x.shape[0], D)
    for t in range(x.shape[1]):
        state = torch.exp(decay) * state + x[:, t]
        states.append(state)
    return torch.stack(states, 1) + x * m.d[None, None]


def weight_normed(m, x):
    return F.linear(x, m.v * (m.g / m.v.norm(dim=1, keepdim=True)))


def relative(m, x):
    place = torch.arange(x.shape[1])
    bias = m.table((place[:, None] - place[None]).clamp(-3, 3) + 3)[..., 0]
    causal = torch.ones(x.shape[1], x.shape[1]).tril().bool()
    return torch.where(causal, x @ x.transpose(1, 2) + bias, -torch.inf).softmax(-1) @ x


BLOCKS = {
    "linear": lambda: nn.Linear(D, D),
    "conv1d of transformers": lambda: Conv1D(D, D),
    "layer norm": lambda: nn.LayerNorm(D),
    "rms norm": lambda: nn.RMSNorm(D),
    "rms norm by hand": lambda: Block(rms, w=parameter(D)),
    "rms norm around one": lambda: Block(gemma_rms, w=parameter(D)),
    "scale": lambda: Block(lambda m, x: x * m.w, w=parameter(D)),
    "shift": lambda: Block(lambda m, x: m.b + x, b=parameter(D)),
    "shift in place": lambda: Block(in_place, w=parameter(D, D), b=parameter(D)),
    "one number": lambda: Block(lambda m, x: x * m.a, a=parameter()),
    "difference and quotient": lambda: Block(lambda m, x: (x - m.b) / (1 + m.w**2), b=parameter(D), w=parameter(D)),
    "weight twice": lambda: Block(lambda m, x: F.linear(F.gelu(F.linear(x, m.w)), m.w), w=parameter(D, D)),
    "weight and its transpose": lambda: Block(lambda m, x: torch.tanh(x @ m.w.T) @ m.w, w=parameter(D, D)),
    "transposed": lambda: Block(lambda m, x: torch.matmul(x, m.w.t()), w=parameter(D, D)),
    "from the left": lambda: Block(lambda m, x: (m.w @ x.transpose(1, 2)).transpose(1, 2), w=parameter(D, D)),
    "einsum": lambda: Block(lambda m, x: torch.einsum("btd,de->bte", x, m.w), w=parameter(D, D)),
    "einsum, heads": lambda: Block(
        lambda m, x: torch.einsum("tbnk,dnk->btd", torch.einsum("dnk,tbd->tbnk", m.w, x.transpose(0, 1)), m.o),
        w=parameter(D, 2, 3), o=parameter(D, 2, 3),
    ),
    "einsum, a matrix a head": lambda: Block(
        lambda m, x: torch.einsum("btnk,nkl->btnl", x.unflatten(-1, (2, 3)), m.w).flatten(-2), w=parameter(2, 3, 3)
    ),
    "function of a weight": lambda: Block(lambda m, x: F.linear(x, m.w.tanh()), w=parameter(D, D)),
    "weight norm": lambda: Block(weight_normed, v=parameter(D, D), g=parameter(D, 1)),
    "part of a weight": lambda: Block(lambda m, x: F.linear(x, m.w[:, :D], m.w[:, D]), w=parameter(D, D + 1)),
    "fused": lambda: Block(fused, w=parameter(3 * D, D)),
    "time major": lambda: Block(time_major, linear=nn.Linear(D, D), norm=nn.LayerNorm(D)),
    "flat": lambda: Block(flat, linear=nn.Linear(D, D)),
    "flat, time major": lambda: Block(flat_time_major, linear=nn.Linear(D, D)),
    "experts": lambda: Block(experts, router=parameter(3, D), up=parameter(3, 4, D), down=parameter(3, 4, D)),
    "depthwise": lambda: Block(depthwise, w=parameter(D, 1, 3), b=parameter(D)),
    "convolution": lambda: Block(convolution, w=parameter(D, D, 3), b=parameter(D)),
    "state space": lambda: Block(state_space, log_a=parameter(D), d=parameter(D)),
    "positions": lambda: Block(lambda m, x: x + m.p[: x.shape[1]], p=parameter(LENGTH, D)),
    "positions, repeated": lambda: Block(
        lambda m, x: x + m.p[None, : x.shape[1]].expand(len(x), -1, -1), p=parameter(LENGTH, D)
    ),
    "positions, transformed": lambda: Block(
        lambda m, x: x + m.linear(m.p)[: x.shape[1]] + m.linear(x), p=parameter(LENGTH, D), linear=nn.Linear(D, D)
    ),
    "relative positions": lambda: Block(relative, table=nn.Embedding(7, 1)),
    "prelu": lambda: nn.PReLU(D),
    "a bias of one number": lambda: Block(lambda m, x: F.linear(x, m.w, m.b), w=parameter(D, D), b=parameter(1)),
    "a bias of one number, addmm": lambda: Block(
        lambda m, x: torch.addmm(m.b, x.reshape(-1, D), m.w).view_as(x), w=parameter(D, D), b=parameter(1)
    ),
    "a bias of the samples": lambda: Block(
        lambda m, x: F.linear(x.reshape(-1, D), m.w, x.reshape(-1, D)).view_as(x), w=parameter(D, D)
    ),
    "no features between": lambda: Block(
        lambda m, x: F.linear(F.linear(x, m.w), m.o, m.b), w=parameter(0, D), o=parameter(D, 0), b=parameter(D)
    ),
    "columns of a larger weight": lambda: Block(
        lambda m, x: F.linear(x, m.w, m.b), w=nn.Parameter(torch.randn(D, D + 2).double()[:, 1:-1]), b=parameter(D)
    ),
    "one number in many places": lambda: Block(lambda m, x: x * m.w, w=nn.Parameter(torch.randn(1).double().expand(D))),
    "attention module": lambda: Block(
        lambda m, x: m.a(x, x, x, attn_mask=torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), need_weights=False)[0],
        a=nn.MultiheadAttention(D, 2, batch_first=True),
    ),
}  # fmt: skip


WIDE = (
    "linear", "conv1d of transformers", "shift in place", "weight twice", "weight and its transpose", "fused",
    "part of a weight", "columns of a larger weight", "flat, time major", "a bias of one number",
    "a bias of one number, addmm", "a bias of the samples",
)  # fmt: skip


class PReLUOverFeatures(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.reshape(-1, D)).view_as(x)


class TinyLM(nn.Module):
    """Embedding, residual blocks, head; tied or not. Position t sees nothing after it."""

    def __init__(self, kinds, seed, tied):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCAB, D)
        made = [BLOCKS[k]() for k in kinds]
        self.blocks = nn.ModuleList(PReLUOverFeatures(b) if isinstance(b, nn.PReLU) else b for b in made)
        self.head = nn.Linear(D, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels=None):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits.transpose(1, 2), labels)
        return SimpleNamespace(logits=logits, loss=loss)


@pytest.mark.parametrize("kind", BLOCKS)
def test_each_operation_is_exact(kind):
    model = TinyLM([kind], seed=1, tied=False).double()
    samples = draw_samples([9, 5, 11, 7])
    profile = estimate_fisher(model, samples, batch_size=3)
    assert_exact(profile.diagonal, own_loss_oracle(model, samples))
    assert bool(profile.coverage["fallback"]) == (kind == "attention module")  # which gives a tuple
    assert set(profile.coverage["reasons"]) == set(profile.coverage["fallback"])


@pytest.mark.parametrize("kind", WIDE)
def test_wide_layers_over_many_rows_are_exact_in_float32(kind, monkeypatch):
    """Where the processor's own products come in; the plan was proved on fewer rows."""
    monkeypatch.setitem(globals(), "D", 64)
    model, samples = TinyLM([kind], seed=1, tied=False).float(), draw_samples([LENGTH] * 9)
    found = estimate_fisher(model, samples, batch_size=9).diagonal
    assert_exact(found, own_loss_oracle(model.double(), samples), rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(list(BLOCKS)), min_size=2, max_size=5),
    lengths=st.lists(st.integers(2, LENGTH), min_size=1, max_size=5),
    batch_size=st.integers(1, 4),
    tied=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_mix_is_exact(kinds, lengths, batch_size, tied, seed):
    model = TinyLM(kinds, seed, tied).double()
    samples = draw_samples(lengths, seed=seed)
    profile = estimate_fisher(model, samples, batch_size=batch_size)
    assert_exact(profile.diagonal, own_loss_oracle(model, samples))
