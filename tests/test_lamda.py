"""LaMDA and LaMDA++: the start, the freezing of columns, the backward pass, the ranks."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build, padded_batch, perturb
from torch import nn
from torch.nn import functional as F

from zo_opt import (
    LaMDAConfig,
    LaMDAPlusPlusConfig,
    MeZO,
    ZOError,
    get_adapter_model,
    load_adapter_model,
    trainable_parameters,
)
from zo_opt.adapters.lamda_backward import core_then_columns
from zo_opt.adapters.lamda_pp import allocate_ranks
from zo_opt.adapters.spectrum import energy, leading_triplets
from zo_opt.directions import StepDirections

STEPS = 20


def lamda(**changes):
    return get_adapter_model(build("llama"), LaMDAConfig(**{"rank": 4, "total_steps": STEPS, **changes}))


def adapters_of(model):
    return [m.adapter for m in model.adapted_modules().values()]


def train(model, steps, first=0, optimizer=None):
    batch = padded_batch("llama")
    if optimizer is None:
        optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2, weight_decay=0.1)
    for step in range(first, steps):
        model(**batch).loss.backward()
        optimizer.step()
        model.step(step)
        optimizer.zero_grad()
        yield step, [a.lora_B.detach().clone() for a in adapters_of(model)]


# --- the start ---


@given(
    out=st.integers(1, 12), inputs=st.integers(1, 12), true_rank=st.integers(0, 12), data=st.data(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_leading_triplets_are_the_svds(out, inputs, true_rank, data):
    """Values to 1e-5 of the largest; orthonormal to 1e-5 also where singular values are zero (fp32)."""
    rank = data.draw(st.integers(1, min(out, inputs)))
    generator = torch.Generator().manual_seed(out * 1000 + inputs * 10 + true_rank)
    weight = torch.randn(out, true_rank, generator=generator) @ torch.randn(true_rank, inputs, generator=generator)
    u, sigma, vt = leading_triplets(weight, rank)
    expected = torch.linalg.svd(weight.double(), full_matrices=False)
    size = max(float(expected.S[0]), 1e-6)
    torch.testing.assert_close(sigma.double(), expected.S[:rank], rtol=0, atol=1e-5 * size)
    eye = torch.eye(rank)
    torch.testing.assert_close(u.T @ u, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(vt @ vt.T, eye, rtol=0, atol=1e-5)
    best = (expected.U[:, :rank] * expected.S[:rank]) @ expected.Vh[:rank]
    gap = float(expected.S[rank - 1] - expected.S[rank]) if rank < len(expected.S) else size
    if gap > 1e-3 * size:  # else which of them are leading is rounding
        torch.testing.assert_close(((u * sigma) @ vt).double(), best, rtol=0, atol=1e-5 * size)


def test_projections_and_core_start_as_the_weights_spectrum():
    model = lamda()
    for module in model.adapted_modules().values():
        adapter, expected = module.adapter, torch.linalg.svd(module.base_layer.weight.detach(), full_matrices=False)
        torch.testing.assert_close(adapter.lora_S.detach(), expected.S[:4].diag(), rtol=0, atol=1e-5)
        signs = (adapter.lora_A.detach() * expected.Vh[:4]).sum(1).sign()
        torch.testing.assert_close(adapter.lora_A.detach(), signs[:, None] * expected.Vh[:4], rtol=0, atol=1e-4)
        torch.testing.assert_close(adapter.lora_B.detach(), signs * expected.U[:, :4], rtol=0, atol=1e-4)
        assert not adapter.lora_A.requires_grad


def test_the_svd_start_is_a_residual_and_a_core():
    """W0 - B0 S0 A + B S A: with S at zero, the weight without its leading part."""
    layer = nn.Linear(7, 5)
    model = get_adapter_model(nn.Sequential(layer), LaMDAConfig(rank=3, target_modules=["0"]))
    u, s, vt = torch.linalg.svd(layer.weight.detach())
    with torch.no_grad():
        model.adapted_modules()["0"].adapter.lora_S.zero_()
        expected = layer.weight - (u[:, :3] * s[:3]) @ vt[:3]
        torch.testing.assert_close(model(torch.eye(7)) - layer.bias, expected.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "tensors"),
    [
        ({}, {"lora_A", "lora_S", "lora_B", "start_S", "start_B"}),
        ({"freeze_share": 0.0}, {"lora_A", "lora_S", "lora_B", "start_S"}),
        ({"init": "zero"}, {"lora_A", "lora_S", "lora_B"}),
    ],
)
def test_only_what_the_start_needs_is_kept(options, tensors):
    assert {n for a in adapters_of(lamda(**options)) for n, _ in a.named_parameters()} == tensors


def test_autocast_keeps_the_identity():
    model, batch = lamda(), padded_batch("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        adapted = model(**batch).logits
        assert torch.equal(adapted, model.unload()(**batch).logits)


# --- freezing ---


def test_columns_freeze_in_order_and_keep_their_bits():
    """Under AdamW with momentum and decay: 0.3 * 20 = 6 steps for 4 columns, the largest singular value's first."""
    model, frozen = lamda(), []
    history = [[a.lora_B.detach().clone() for a in adapters_of(model)]]
    for _, columns in train(model, STEPS):
        history.append(columns)
        frozen.append(adapters_of(model)[0].frozen)
    assert frozen[:7] == [0, 1, 2, 2, 3, 4, 4]
    for matrix in range(len(model.adapted)):
        for column in range(4):
            when = next(i for i, count in enumerate(frozen) if count > column)  # frozen after this step
            before, at = history[when][matrix][:, column], history[when + 1][matrix][:, column]
            assert not torch.equal(before, at)  # it moved up to there
            assert all(torch.equal(h[matrix][:, column], at) for h in history[when + 1 :])
    assert model.schedule.moving() == sum(a.lora_S.numel() for a in adapters_of(model))


@pytest.mark.parametrize("mode", ["sequential", "batched", "split"])
def test_queries_do_not_see_frozen_columns(mode):
    """Moved by any amount, they change no loss of a step, and no bit of what moves."""

    def after(noise):
        model, batch = lamda(), padded_batch("llama")
        for adapter in adapters_of(model):
            adapter.freeze_columns(3)
        real = StepDirections.range
        starts, at = {}, 0
        for p in trainable_parameters(model):
            starts[id(p)], at = at, at + p.numel()
        columns = torch.zeros(at, dtype=torch.bool)
        for a in adapters_of(model):
            start = starts[id(a.lora_B)]
            columns[start : start + a.lora_B.numel()] = (torch.arange(4) < 3).repeat(len(a.lora_B))

        def changed(self, query, first, last):
            return torch.where(columns[first:last], noise, real(self, query, first, last))

        optimizer = MeZO(trainable_parameters(model), lr=0.1, zo_eps=0.1, module=model, query_mode=mode)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StepDirections, "range", changed)
            optimizer.step(lambda b: model(**b).loss, batch)
        model.step(0)
        return optimizer.last_record.projected_grads, [p.detach().clone() for p in trainable_parameters(model)]

    (one, weights), (other, same) = after(0.0), after(5.0)
    assert one == other and all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


def test_numbers_that_move():
    model = lamda()
    everything = sum(p.numel() for p in trainable_parameters(model))
    assert model.schedule.moving() == everything
    outputs = sum(len(a.lora_B) for a in adapters_of(model))
    moving = [model.schedule.moving() for _ in train(model, 8)]
    assert moving == [everything - n * outputs for n in (0, 1, 2, 2, 3, 4, 4, 4)]


def test_only_the_core_from_the_start():
    """The count at eta = 0, and on the meta device, of DeBERTa-v3-base and Llama-2-7B (methods.md)."""
    with torch.device("meta"):
        deberta = nn.Sequential(*(nn.Linear(768, 768) for _ in range(72)))
        names = [str(i) for i in range(72)]
        model = get_adapter_model(deberta, LaMDAConfig(rank=32, freeze_share=0.0, target_modules=names))
    assert sum(p.numel() for p in trainable_parameters(model)) == 73_728
    model = lamda(freeze_share=0.0, total_steps=None)
    before = adapters_of(model)[0].lora_B.clone()
    for _ in train(model, 3):  # total_steps is not needed
        pass
    assert torch.equal(adapters_of(model)[0].lora_B, before)


def test_the_number_of_steps_is_asked_for():
    with pytest.raises(ZOError, match="set total_steps"):
        lamda(total_steps=None).step(0)


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_it_continues_from_files_to_the_same_bits(tmp_path, stop):
    """Stopped while columns freeze and after; the optimizer's moments by its own state."""
    model = lamda()
    adamw = torch.optim.AdamW(trainable_parameters(model), lr=1e-2, weight_decay=0.1)
    for _ in train(model, stop, optimizer=adamw):
        pass
    model.save_pretrained(tmp_path)
    again = load_adapter_model(build("llama"), tmp_path)
    resumed = torch.optim.AdamW(trainable_parameters(again), lr=1e-2, weight_decay=0.1)
    resumed.load_state_dict(copy.deepcopy(adamw.state_dict()))
    runs = [list(train(m, 10, stop, o)) for m, o in ((model, adamw), (again, resumed))]
    assert all(
        torch.equal(a, b) for (_, one), (_, other) in zip(*runs, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert [a.frozen for a in adapters_of(again)] == [a.frozen for a in adapters_of(model)]
    assert all(torch.equal(t, again.adapter_state()[n]) for n, t in model.adapter_state().items())


# --- the backward pass ---


def operands(frozen=0, tokens=(2, 3), rank=4, out=5):
    generator = torch.Generator().manual_seed(1)
    shapes = ((*tokens, rank), (rank, rank), (out, rank))
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes], frozen


@pytest.mark.parametrize("frozen", [0, 1, 4])
def test_gradients_are_autograds(frozen):
    (u, s, b), _ = operands()
    mask = (torch.arange(4) >= frozen).double()
    weights = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad((F.linear(F.linear(u, s), b) * weights).sum(), (u, s, b))
    found = torch.autograd.grad((core_then_columns(u, s, b, frozen) * weights).sum(), (u, s, b))
    for one, other in zip(found, (*expected[:2], expected[2] * mask), strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivatives_and_forward_mode():
    (u, s, b), _ = operands()
    assert torch.autograd.gradgradcheck(lambda *x: core_then_columns(*x, 0), (u, s, b))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when it loads its derivatives
        assert torch.autograd.gradcheck(lambda *x: core_then_columns(*x, 0), (u, s, b), check_forward_ad=True)


def test_it_runs_under_vmap_and_grad():
    (u, s, b), _ = operands()
    cores = torch.stack([s, 2 * s]).detach()

    def loss(core, u):
        return core_then_columns(u, core, b.detach(), 0).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(cores, u.detach())
    for core, gradient in zip(cores, found, strict=True):
        core.requires_grad_()
        expected = torch.autograd.grad(F.linear(F.linear(u.detach(), core), b.detach()).square().sum(), core)[0]
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("options", [{}, {"freeze_share": 0.0}, {"init": "zero"}])
def test_the_backward_keeps_rank_numbers_a_token(options):
    """Everything that autograd saves besides parameters, of a layer with 64 inputs, 48 outputs and 100 tokens."""
    layer = nn.Sequential(nn.Linear(64, 48))
    model = get_adapter_model(layer, LaMDAConfig(rank=4, target_modules=["0"], **options))
    own = {p.data_ptr() for p in model.parameters()}
    saved = {}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x)
    assert sum(saved.values()) == 100 * 4


# --- LaMDA++ ---


@given(
    count=st.integers(1, 30),
    ranks=st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True),
    mean=st.integers(1, 80),
)
def test_ranks_rise_with_scores_within_the_budget(count, ranks, mean):
    mean = max(mean, min(ranks))
    scores = {str(i): (i * 7919 % 31) / 31 for i in range(count)}
    found = allocate_ranks(scores, ranks, mean)
    assert list(found) == list(scores)
    assert set(found.values()) <= set(ranks)
    assert sum(found.values()) <= mean * count
    ordered = [found[n] for n in sorted(scores, key=lambda n: -scores[n])]
    assert ordered == sorted(ordered, reverse=True)
    if mean >= max(ranks):
        assert set(found.values()) == {max(ranks)}


def test_equal_groups_where_the_budget_is_their_mean():
    scores = {str(i): float(-i) for i in range(6)}
    assert list(allocate_ranks(scores, (16, 32, 48), 32).values()) == [48, 48, 32, 32, 16, 16]


@pytest.mark.parametrize("order", ["easy-first", "hard-first"])
def test_ranks_follow_the_spectra(tmp_path, order):
    base = build("llama")
    for i, layer in enumerate(base.model.layers):  # steep spectra in the second layer
        for projection in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            u, s, vt = torch.linalg.svd(projection.weight.data, full_matrices=False)
            projection.weight.data = (u * s * (0.3 if i else 0.9) ** torch.arange(len(s))) @ vt
    config = LaMDAPlusPlusConfig(rank=3, ranks=(2, 4), order=order)
    model = get_adapter_model(base, config)
    steep = 4 if order == "easy-first" else 2
    sizes = {n: len(m.adapter.lora_S) for n, m in model.adapted_modules().items()}
    assert sizes == {n: steep if ".1." in n else 6 - steep for n in sizes}
    assert model.adapter_config.rank_pattern == sizes
    assert config.rank_pattern is None
    energies = {n: energy(m.base_layer.weight, [2])[0] for n, m in model.adapted_modules().items()}
    assert min(e for n, e in energies.items() if ".1." in n) > max(e for n, e in energies.items() if ".0." in n)
    perturb(trainable_parameters(model))
    model.save_pretrained(tmp_path)
    again = load_adapter_model(build("llama"), tmp_path)  # other weights: the ranks come from the file
    assert {n: len(m.adapter.lora_S) for n, m in again.adapted_modules().items()} == sizes


def test_a_given_pattern_is_kept_and_meta_has_the_mean():
    config = LaMDAPlusPlusConfig(rank=3, ranks=(2, 4), rank_pattern={"q_proj": 5})
    model = get_adapter_model(build("llama"), config)
    assert {len(a.lora_S) for a in adapters_of(model)} == {5, 3}
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = get_adapter_model(net, LaMDAPlusPlusConfig(rank=3, ranks=(2, 4), target_modules=["0", "1"]))
    assert {len(a.lora_S) for a in adapters_of(model)} == {3}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LaMDAConfig(freeze_share=1.5), r"freeze_share=1.5"),
        (lambda: LaMDAConfig(freeze_share=float("nan")), "freeze_share=nan"),
        (lambda: LaMDAConfig(init="random"), r"'random'.*svd"),
        (lambda: LaMDAConfig(total_steps=1.5), r"total_steps=1.5"),
        (lambda: LaMDAPlusPlusConfig(ranks=()), "ranks="),
        (lambda: LaMDAPlusPlusConfig(ranks=(0, 4)), "ranks="),
        (lambda: LaMDAPlusPlusConfig(rank=8, ranks=(16, 32)), "rank=8 is below"),
        (lambda: LaMDAPlusPlusConfig(order="random"), r"'random'.*easy-first"),
    ],
)
def test_impossible_values(make, sentence):
    with pytest.raises(ZOError, match=sentence):
        make()


def test_broken_weights_are_a_sentence_and_change_nothing():
    layer = nn.Linear(4, 4)
    layer.weight.data[0, 0] = float("nan")
    net = nn.Sequential(layer)
    with pytest.raises(ZOError, match="NaN or infinity"):
        get_adapter_model(net, LaMDAConfig(rank=2, target_modules=["0"]))
    assert net[0] is layer
