"""AdaLoRA against PEFT's, and what it promises besides."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.adalora.layer import RankAllocator
from tiny_models import build, padded_batch
from torch import nn

from zo_opt import AdaLoRAConfig, ZOError, get_adapter_model, trainable_parameters
from zo_opt.adapters.adalora import budget, keep, triplet_scores
from zo_opt.adapters.sensitivity import Phases

RANK, TARGET, WARMUP, FINAL, STEPS = 6, 3, 3, 6, 20
GAMMA, ALPHA = 0.5, 8.0
FACTORS = ("lora_A", "lora_B", "lora_E")


def ours(**changes):
    options = {
        "rank": RANK, "target_rank": TARGET, "alpha": ALPHA, "total_steps": STEPS, "warmup_steps": WARMUP,
        "final_steps": FINAL, "interval": 2, "orthogonality": GAMMA,
    }  # fmt: skip
    return get_adapter_model(build("llama"), AdaLoRAConfig(**options | changes))


def theirs():
    config = peft.AdaLoraConfig(
        init_r=RANK, target_r=TARGET, lora_alpha=int(ALPHA), total_step=STEPS, tinit=WARMUP, tfinal=FINAL, deltaT=2,
        beta1=0.85, beta2=0.85, orth_reg_weight=GAMMA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        return peft.get_peft_model(build("llama"), config)


def pairs(model, other):
    """Our adapters beside PEFT's layers: (path, factor, our tensor, theirs)."""
    for name, module in model.adapted_modules().items():
        layer = other.base_model.model.get_submodule(name)
        for factor in FACTORS:
            yield name, factor, getattr(module.adapter, factor), getattr(layer, factor)["default"]


def twins():
    model, other = ours(), theirs()
    with torch.no_grad():
        for _, _, mine, other_one in pairs(model, other):
            other_one.copy_(mine)
    return model, other


def test_twenty_steps_are_pefts():
    """Losses with the penalty, gradients, weights, masks and budgets over a whole schedule under AdamW; fp32, 1e-5."""
    model, other = twins()
    batch = padded_batch("llama")
    mine = torch.optim.AdamW(trainable_parameters(model), lr=1e-2, weight_decay=0.1)
    other_one = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for step in range(STEPS):
        loss, expected = model(**batch).loss, other(**batch).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        loss.backward()
        expected.backward()
        for _, factor, a, b in pairs(model, other):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=lambda m, f=factor: f"{f}: {m}")
        mine.step()
        other_one.step()
        model.step(step)
        other.base_model.update_and_allocate(step)
        mine.zero_grad()
        other_one.zero_grad()
        for _, factor, a, b in pairs(model, other):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
            if factor == "lora_E":
                assert torch.equal(a == 0, b == 0)
        assert model.schedule.budget(step) == other.base_model.rankallocator.budget_schedule(step)[0]
    left = sum(int((a != 0).sum()) for _, factor, a, _ in pairs(model, other) if factor == "lora_E")
    assert left == TARGET * len(model.adapted)


def test_masks_over_a_whole_run_are_pefts():
    """On the same weights and gradients, which are random: PEFT's own allocator, and patterns to the bit at every step."""
    model, other = twins()
    generator = torch.Generator().manual_seed(0)
    allocator, seen = other.base_model.rankallocator, set()
    assert isinstance(allocator, RankAllocator)
    for step in range(STEPS):
        with torch.no_grad():
            for _, _, a, b in pairs(model, other):
                a.copy_(torch.randn(a.shape, generator=generator))
                a.grad = torch.randn(a.shape, generator=generator)
                b.copy_(a)
                b.grad = a.grad.clone()
        model.step(step)
        other.base_model.update_and_allocate(step)
        for _, factor, a, b in pairs(model, other):
            assert torch.equal(a, b)
            if factor == "lora_E":
                seen.add(int((a == 0).sum()))
    assert len(seen) > 2  # ranks did differ


@given(
    initial=st.integers(2, 500),
    share=st.floats(0, 1),
    warmup=st.integers(0, 20),
    final=st.integers(0, 20),
    between=st.integers(1, 50),
)
def test_budgets_fall_from_the_first_to_the_last(initial, share, warmup, final, between):
    target, phases = int(share * initial), Phases(warmup, final, warmup + final + between)
    budgets = [budget(t, initial, target, phases) for t in range(phases.total + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert set(budgets[: warmup + 1]) == {initial}
    assert set(budgets[phases.end :]) == {target}
    for t in range(warmup, phases.end):
        assert budgets[t] == int(target + (initial - target) * (1 - (t - warmup) / between) ** 3)


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=5), min_size=1, max_size=4), st.data())
@settings(max_examples=50)
def test_the_lowest_triplets_go(scores, data):
    total = sum(map(len, scores))
    kept = data.draw(st.integers(0, total))
    masks = keep([torch.tensor(s) for s in scores], kept)
    ranked = sorted((s for row in scores for s in row), reverse=True)
    stay = [s for row, mask in zip(scores, masks, strict=True) for s, m in zip(row, mask.tolist(), strict=True) if m]
    limit = ranked[kept] if kept < total else -1.0
    assert sorted(stay, reverse=True) == [s for s in ranked if s > limit]


def test_scores_of_triplets():
    s_lambda, s_p, s_q = (
        torch.tensor([[1.0], [2.0]]),
        torch.tensor([[1.0, 3.0], [3.0, 5.0]]),
        torch.tensor([[4.0], [6]]),
    )
    assert triplet_scores(s_lambda, s_p, s_q).tolist() == [1 + 2 + 4, 2 + 4 + 6]


def driven(gradient_of, steps, **changes):
    """One matrix whose weights stay and whose gradients are given; which triplets are kept after each step."""
    options = {"rank": 3, "target_rank": 1, "total_steps": 20, "warmup_steps": 0, "final_steps": 5, "interval": 1}
    model = get_adapter_model(nn.Sequential(nn.Linear(4, 4)), AdaLoRAConfig(target_modules=["0"], **options | changes))
    adapter, seen = model.adapted_modules()["0"].adapter, []
    for step in range(steps):
        with torch.no_grad():
            for p in (adapter.lora_A, adapter.lora_B, adapter.lora_E):
                p.fill_(1.0)
        gradient = torch.tensor(gradient_of(step))[:, None]
        adapter.lora_A.grad, adapter.lora_E.grad = gradient.expand(3, 4).clone(), gradient.clone()
        adapter.lora_B.grad = gradient.expand(3, 4).T.clone()
        model.step(step)
        seen.append((adapter.lora_E.view(-1) != 0).tolist())
    return seen


def test_a_zeroed_triplet_comes_back_when_its_score_returns():
    """Triplet 0 is quiet in the first steps and loud later; once the pattern is fixed nothing comes back."""
    seen = driven(lambda t: [0.1, 2.0, 1.0] if t < 8 else [9.0, 2.0, 1.0], 20)
    assert [False, True, True] in seen[:8]
    assert seen[14][0]
    assert seen[14] == [True, False, False]
    late = driven(lambda t: [0.1, 2.0, 1.0] if t < 15 else [99.0, 2.0, 1.0], 20)
    assert late[-1] == [False, True, False]


def test_zeroed_lambdas_stay_zero_in_the_final_phase():
    """To the bit, under momentum and decay, while the others move."""
    model, batch = ours(), padded_batch("llama")
    adamw = torch.optim.AdamW(trainable_parameters(model), lr=1e-2, weight_decay=0.1)
    patterns = []
    for step in range(STEPS):
        model(**batch).loss.backward()
        adamw.step()
        model.step(step)
        adamw.zero_grad()
        lambdas = torch.cat([m.adapter.lora_E.detach() for m in model.adapted_modules().values()])
        patterns.append((lambdas, lambdas == 0))
    start = STEPS - FINAL
    assert all(torch.equal(zero, patterns[start][1]) for _, zero in patterns[start:])
    assert not torch.equal(patterns[-1][0], patterns[start][0])
    sizes = [(len(m.adapter.lora_B) + m.adapter.lora_A.shape[1] + 1) for m in model.adapted_modules().values()]
    kept = [int(k.sum()) for k in model.schedule.kept.values()]
    assert model.schedule.moving() == sum(k * s for k, s in zip(kept, sizes, strict=True))


@torch.no_grad()
def test_the_penalty():
    """Mean over P and Q of the distance from orthonormal columns, or of its square."""
    model, squared = ours(), ours(squared_penalty=True)
    adapters = [m.adapter for m in model.adapted_modules().values()]
    eye = torch.eye(RANK, dtype=torch.float64)
    norms = [(f @ f.T - eye).norm() for a in adapters for f in (a.lora_A.double(), a.lora_B.double().T)]
    assert float(model.penalty()) == pytest.approx(GAMMA * float(torch.stack(norms).mean()), rel=1e-6)
    assert float(squared.penalty()) == pytest.approx(GAMMA * float(torch.stack(norms).square().mean()), rel=1e-6)
    assert ours(orthogonality=0.0).penalty() is None


@pytest.mark.parametrize(("rank", "count"), [(12, 1_991_520), (8, 1_327_680)])
def test_counts_of_deberta_v3_base(rank, count):
    """Its six linear layers in twelve layers; before and after the allocation, r12 -> r8."""
    shapes = 12 * [*(4 * [(768, 768)]), (768, 3072), (3072, 768)]
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(*shape) for shape in shapes))
        names = [str(i) for i in range(len(shapes))]
        model = get_adapter_model(net, AdaLoRAConfig(rank=rank, target_rank=8, target_modules=names))
    assert sum(p.numel() for p in trainable_parameters(model)) == count


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_rank": 13}, "target_rank=13 is above rank=12"),
        ({"target_rank": 0}, "target_rank=0"),
        ({"interval": 0}, "interval=0"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"beta2": "a"}, "beta2='a'"),
        ({"orthogonality": -1.0}, "orthogonality=-1.0"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"final_steps": 1.5}, "final_steps=1.5"),
        ({"alpha": 0}, "alpha=0"),
    ],
)
def test_impossible_values(options, sentence):
    with pytest.raises(ZOError, match=sentence):
        AdaLoRAConfig(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"total_steps": None}, "set total_steps"),
        ({"total_steps": 9, "warmup_steps": 4, "final_steps": 5}, "total_steps=9 leaves no step"),
    ],
)
def test_impossible_phases(options, sentence):
    model = ours(**options)
    with pytest.raises(ZOError, match=sentence):
        model.step(0)


def test_phases_left_open_are_an_eighth_and_a_half():
    assert AdaLoRAConfig(total_steps=80).phases() == (10, 40, 80)


def test_missing_gradients_are_a_sentence():
    model = ours()
    with pytest.raises(ZOError, match=r"has no gradient.*before zero_grad"):
        model.step(0)
