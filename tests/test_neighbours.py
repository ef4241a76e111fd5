"""AGZO, P-GAP and ZO-Act beyond the contracts of their tables: spans, bases, alignment, and what has to be left as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optimizer_twins as twins
import pytest
import torch
from conftest import run_main
from optimizer_problem import BATCH, Model, bits, examples_of, flat, relative_error, same
from optimizer_table import build, setting
from safetensors.torch import load_file
from text_tasks import assert_resumes_to_the_same_bits
from tiny_models import build as tiny
from tiny_models import padded_batch
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode

from zo_opt import AGZO, PGAP, MeZO, ZOActConfig, ZOError, get_adapter_model, load_adapter_model, trainable_parameters
from zo_opt.directions import Stream
from zo_opt.journal import Journal
from zo_opt.optim import agzo, apply, p_gap
from zo_opt.schedules import constant_queries
from zo_opt.training.config import TrainConfig

Options = Callable[..., list[str]]
X = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))


def net_of():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4))


def right_singular(x, rank):
    """V_r (in, r) by torch's SVD, in float64."""
    return torch.linalg.svd(x.double(), full_matrices=False)[2][:rank].T


def outside(rows, basis):
    """The share of a matrix that is not in the span of the columns of an orthonormal basis."""
    rows, basis = rows.double(), basis.double()
    return float((rows - rows @ basis @ basis.T).norm() / rows.norm())


def move(net, optimizer, x=X):
    """What a step on the mean square of the outputs, less a tenth, adds to each parameter."""
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step(lambda b: (net(b) - 0.1).square().mean(), x)
    return [p.detach() - b for p, b in zip(net.parameters(), before, strict=True)]


# --- AGZO ---


@pytest.mark.parametrize("mode", ["sequential", "batched", "split", "auto"])
def test_agzos_steps_lie_in_the_span_of_the_leading_inputs(mode):
    """Of both layers, of which the second sees what the first makes of the batch; with many iterations those of the SVD. Vectors move whole."""
    net = net_of()
    with torch.no_grad():
        inner = net[1](net[0](X))
    optimizer = AGZO(
        net.parameters(), lr=0.1, rank=2, iterations=300, module=net, query_mode=mode, query_schedule=constant_queries(3)
    )  # fmt: skip
    first, bias, second, *_, scale, shift = move(net, optimizer)
    assert outside(first, right_singular(X, 2)) < 1e-4
    assert outside(second, right_singular(inner, 2)) < 1e-4
    assert torch.linalg.matrix_rank(first, rtol=1e-4) == 2
    assert all((vector != 0).all() for vector in (bias, scale, shift))
    assert optimizer.last_record.forwards == (3 if mode == "split" else 4) == optimizer.forwards(0, 3)


@pytest.mark.parametrize(("tokens", "rank"), [(9, 3), (2, 5), (40, 1)])
def test_a_basis_is_orthonormal_and_turns_to_the_svds(tokens, rank):
    x = torch.randn(tokens, 7, generator=torch.Generator().manual_seed(1))
    bases = [agzo.input_basis(x, rank, iterations, (0, 1)) for iterations in (0, 3, 400)]
    for basis in bases:
        assert basis.shape == (7, min(rank, tokens, 7))
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)
    energies = [float((x @ basis).square().sum()) for basis in bases]
    assert energies[0] <= energies[1] * (1 + 1e-5) <= energies[2] * (1 + 1e-4)
    assert outside(bases[2].T, right_singular(x, basis.shape[1])) < 1e-3


def test_three_directions_agree_with_the_twin():
    model, expected = Model(), setting("agzo", queries=lambda step: 3)
    optimizer = build("agzo", model, query_schedule=constant_queries(3))
    for _ in range(20):
        optimizer.step(model, BATCH)
    theta = torch.tensor(twins.agzo(expected, 20, rank=2, iterations=2), dtype=torch.float64)
    assert relative_error(flat(model), theta) <= 1e-5


def test_layers_whose_weight_is_in_by_out_and_embeddings_that_are_heads():
    """GPT-2: rank 1 in every Conv1D, on the side of its inputs; the table of tokens, looked up as well, moves whole."""
    model, batch = tiny("gpt2"), padded_batch("gpt2")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = AGZO(model.parameters(), lr=1e-3, zo_eps=1e-2, module=model)
    optimizer.step(lambda b: model(**b).loss, batch)
    inputs = optimizer._inputs._bases
    for number, (name, p) in enumerate(model.named_parameters()):
        step = p.detach() - before[name]
        if p.ndim < 2:
            continue
        linear = "c_attn" in name or "c_proj" in name or "c_fc" in name
        assert (number in inputs) == linear, name
        if linear:
            basis, transposed = inputs[number]
            assert transposed
            assert outside(step.T, basis) < 1e-2, name  # weights near 1 round a step of 1e-3
    assert "lm_head.weight" not in before


def test_what_padding_holds_does_not_matter():
    layer, x = nn.Linear(6, 3, bias=False), X.clone()
    x[4] = math.nan
    optimizer = AGZO(layer.parameters(), lr=0.1, rank=2, iterations=200)
    before = layer.weight.detach().clone()
    optimizer.step(lambda: layer(x)[[0, 1, 2, 3, 5]].square().mean())
    assert outside(layer.weight.detach() - before, right_singular(x[[0, 1, 2, 3, 5, 6, 7, 8]], 2)) < 1e-3


def test_of_micro_batches_the_first_says_where_to():
    net = nn.Linear(6, 5, bias=False)
    optimizer = AGZO(net.parameters(), lr=0.1, rank=3, query_schedule=constant_queries(2))
    before = net.weight.detach().clone()
    for rows in (X[:2], X[2:4], X[4:6]):
        optimizer.estimate(lambda b: net(b).square().mean(), rows)
    optimizer.step()
    assert outside(net.weight.detach() - before, right_singular(X[:2], 2)) < 1e-5
    assert optimizer.last_record.forwards == 3 * 3 + 1  # the closure was tried twice at first


@pytest.mark.parametrize("call", [0, 1])
def test_the_model_is_left_as_it_was_when_the_closure_fails(call):
    net, calls = net_of(), []
    before = bits(net)

    def closure():
        calls.append(net(X))
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return calls[-1].square().mean()

    optimizer = AGZO(net.parameters(), lr=0.1, module=net)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert _get_current_function_mode() is None
    assert same(bits(net), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in net.modules())
    expected = net_of()
    AGZO(expected.parameters(), lr=0.1).step(lambda: expected(X).square().mean())
    optimizer.step(lambda: net(X).square().mean())  # the failed step has left nothing behind
    assert same(bits(net), bits(expected))


def test_agzo_without_a_linear_layer():
    theta = nn.Parameter(torch.ones(3, 2))
    with pytest.raises(ZOError, match=r"linear layers.*mezo"):
        AGZO([theta], lr=0.1).step(lambda: theta.square().sum())
    assert (theta == 1).all()


def test_agzo_is_not_replayed(tmp_path):
    model = Model()
    optimizer = build("agzo", model)
    with pytest.raises(ZOError, match="journal"):
        Journal.create(tmp_path / "journal", optimizer, model)
    optimizer.step(model, BATCH)
    with pytest.raises(ZOError, match="forwards"):
        apply(build("agzo", Model()), optimizer.last_update)


def test_agzo_in_several_processes():
    with pytest.raises(ZOError, match="one process"):
        AGZO(net_of().parameters(), lr=0.1, query_mode="distributed")


# --- P-GAP ---


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (3, 1)])
def test_the_leading_triplets_of_an_estimate(shape):
    """Against torch's SVD; of a matrix of zeros still orthonormal."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    u, sigma, v = p_gap.leading(gradient, 3)
    left, expected, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    r = min(3, *shape)
    torch.testing.assert_close(sigma.double(), expected[:r], rtol=1e-5, atol=1e-6)
    best = (left[:, :r] * expected[:r]) @ right[:r]
    torch.testing.assert_close(((u * sigma) @ v.T).double(), best, rtol=1e-4, atol=1e-5)
    for factor in (u, v, *p_gap.leading(torch.zeros(shape), 3)[::2]):
        torch.testing.assert_close(factor.T @ factor, torch.eye(r), rtol=0, atol=1e-5)


@pytest.mark.parametrize("delta", [0.0, 0.25, 4.0])
def test_directions_are_aligned_with_the_estimate(delta):
    """<S, U^T z V> = xi sqrt(delta) ||S||, z = U U^T z V V^T, and xi is a fair sign: 256 of them within 5 standard deviations."""
    u, sigma, v = p_gap.leading(torch.randn(8, 6, generator=torch.Generator().manual_seed(4)), 3)
    directions, signs = p_gap.Aligned({0: (u, sigma, v)}, delta), []
    squares = torch.zeros(3, 3)
    for query in range(256):
        z = directions.draw(Stream(1, 2, query), ((8, 6),), 0, 48, torch.device("cpu")).view(8, 6)
        inner = u.T @ z @ v
        torch.testing.assert_close(u @ inner @ v.T, z, rtol=1e-4, atol=1e-5)
        along = float((inner.diagonal() * sigma).sum() / sigma.norm())
        assert abs(along) == pytest.approx(math.sqrt(delta), abs=1e-5)
        signs.append(math.copysign(1, along))
        squares += inner.square() / 256
    if delta:
        assert abs(sum(signs)) < 5 * 16
    # The others are Gaussian entries: variance 1, its estimate's deviation sqrt(2 / 256).
    off = squares[~torch.eye(3, dtype=torch.bool)]
    assert (off - 1).abs().max() < 5 * math.sqrt(2 / 256)


def test_probes_come_every_interval_and_make_the_basis():
    """The step is their own estimate, whose leading triplets are kept; matrices move within them until the next."""
    net = net_of()
    optimizer = PGAP(net.parameters(), lr=0.1, rank=2, interval=3, probes=5, module=net)
    queries = []
    for step in range(7):
        moved = move(net, optimizer)
        queries.append(optimizer.last_record.queries)
        for parameter, change in zip(net.parameters(), moved, strict=True):
            if parameter.ndim < 2:
                assert "u" not in optimizer.state[parameter]
                continue
            u, sigma, v = (optimizer.state[parameter][name] for name in ("u", "sigma", "v"))
            if step % 3 == 0:
                expected = p_gap.leading(-change / 0.1, 2)
                torch.testing.assert_close((u * sigma) @ v.T, (expected[0] * expected[1]) @ expected[2].T, rtol=1e-3, atol=1e-4)  # fmt: skip
            else:
                assert outside(change, v) < 1e-4
                assert outside(change.T, u) < 1e-4
    assert queries == [5, 1, 1, 5, 1, 1, 5]
    assert optimizer.history.forwards == 2 * sum(queries)


def test_a_matrix_that_comes_in_is_probed():
    net = net_of()
    net[2].weight.requires_grad_(False)
    optimizer, queries = PGAP(net.parameters(), lr=0.1, rank=2, interval=100, probes=4), []
    for step in range(4):
        net[2].weight.requires_grad_(step >= 2)
        move(net, optimizer)
        queries.append(optimizer.last_record.queries)
    assert queries == [4, 1, 4, 1]


def test_split_probes_are_at_most_the_examples():
    model = Model()
    optimizer = build("p-gap", model, probes=20, query_mode="split")
    optimizer.step(model, BATCH)
    assert (optimizer.last_record.queries, optimizer.last_record.forwards) == (8, 2)
    optimizer.step(model, examples_of(BATCH, slice(0, 3)))
    assert optimizer.last_record.queries == 1


# --- ZO-Act ---


def seen_by(net, name, run):
    """What enters a module while ``run`` runs."""
    inputs = []
    handle = net.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    run()
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in inputs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_basis_is_that_of_the_first_batchs_inputs(dtype, tmp_path):
    """Of every linear layer of the layers; other batches do not move it, and a saved one begins no second time."""
    base, batch = tiny("llama", dtype=dtype), padded_batch("llama")
    name = "model.layers.1.mlp.down_proj"
    x = seen_by(base, name, lambda: base(**batch)).float()
    model = get_adapter_model(base, ZOActConfig(rank=2))
    assert len(model.adapted) == 14
    with torch.no_grad():
        model(**batch)
    adapter = model.adapted_modules()[name].adapter
    basis = adapter.lora_A.detach().clone()
    assert outside(basis, right_singular(x, 2)) < 1e-4
    torch.testing.assert_close(basis @ basis.T, torch.eye(2), rtol=0, atol=1e-5)
    assert not adapter.lora_B.any()
    other = {"input_ids": batch["input_ids"].flip(1)}
    with torch.no_grad():
        model(**other)
        assert torch.equal(adapter.lora_A, basis)
        model.save_pretrained(tmp_path)
        again = load_adapter_model(tiny("llama", dtype=dtype), tmp_path)
        again(**other)
    assert torch.equal(again.adapted_modules()[name].adapter.lora_A, basis)


def test_coefficients_learn_as_the_weight_would_within_the_span():
    """The gradient of C is that of the weight times A: nothing of it is lost where the inputs have the basis's rank."""
    x = X[:2]
    layer, plain = nn.Linear(6, 3), nn.Linear(6, 3)
    plain.load_state_dict(layer.state_dict())
    model = get_adapter_model(nn.Sequential(layer), ZOActConfig(rank=2, target_modules=["0"]))
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    adapter = model.adapted_modules()["0"].adapter
    torch.testing.assert_close(adapter.lora_B.grad @ adapter.lora_A, plain.weight.grad, rtol=1e-4, atol=1e-5)


def test_what_makes_no_basis():
    net = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(ZOError, match="positions"):
        ZOActConfig(positions="answer")
    model = get_adapter_model(net, ZOActConfig(rank=4, target_modules=["0"]))
    with pytest.raises(ZOError, match=r"3 tokens.*rank 4"):
        model(X[:3])
    optimizer = MeZO(trainable_parameters(model), lr=0.1, module=model, query_mode="split", query_schedule=constant_queries(2))  # fmt: skip
    with pytest.raises(ZOError, match="run the model once"):
        optimizer.step(lambda b: model(b).square().mean(), X)
    model(X)
    optimizer.step(lambda b: model(b).square().mean(), X)


def test_privacy_refuses_a_start_from_the_rows():
    config = TrainConfig(adapter="zo-act", optimizer="mezo", privacy_noise=1.0, privacy_clip=1.0)
    with pytest.raises(ZOError, match="starts from the rows"):
        config.check()


# --- runs ---

RUNS: dict[str, dict[str, Any]] = {
    "agzo": {"optimizer": "agzo", "adapter": "lora", "layers": 1},
    "p-gap": {"optimizer": "p-gap", "adapter": "lora", "layers": 1, "optimizer.rank": 2, "optimizer.interval": 3, "optimizer.probes": 3},
    "zo-act": {"optimizer": "mezo", "adapter": "zo-act", "rank": 2, "update_rule": "adam", "estimator": "one-sided"},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_resumed_to_the_same_bits(
    toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Steps after the checkpoint come from the journal, where there is one, or are done again."""

    def line(directory: Path) -> list[str]:
        return toy_options(output_dir=directory, lr=0.01, prompt_cache_mb=0, **RUNS[name])

    assert_resumes_to_the_same_bits(line, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_replayed_or_keeps_no_journal(
    toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run, to = tmp_path / "run", tmp_path / "to"
    assert run_main(toy_options(output_dir=run, steps=8, lr=0.01, **RUNS[name])) == 0
    assert (run / "journal").exists() == (name != "agzo")
    code = run_main(["replay", str(run), "--to", str(to)])
    if name == "agzo":
        assert code == 2
        assert "has no journal" in capsys.readouterr().err
        return
    assert code == 0
    found, expected = (load_file(d / "adapter_model.safetensors") for d in (to, run))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    if name == "zo-act":  # the start has the basis, which does not move
        start = load_file(run / "start" / "adapter_model.safetensors")
        bases = [n for n in start if n.endswith("lora_A")]
        assert bases
        assert all(torch.equal(start[n], expected[n]) and start[n].any() for n in bases)
        assert json.loads((run / "adapter_config.json").read_text())["adapter_type"] == "zo-act"
        assert not any(start[n.replace("lora_A", "lora_B")].any() for n in bases)


def test_linear_is_what_a_torch_function_mode_sees():
    """What AGZO stands on: ``nn.Linear`` asks ``F.linear`` with its weight second."""
    layer = nn.Linear(6, 3)
    with agzo.LinearInputs([layer.weight], 1, 1, Stream(0, 0, 0)) as inputs:
        out = layer(X)
    assert inputs.bases.keys() == {0}
    torch.testing.assert_close(out, F.linear(X, layer.weight, layer.bias))
