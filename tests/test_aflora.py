"""AFLoRA: which matrices are frozen when, and that they then keep their bits."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import build, padded_batch
from torch import nn

from zo_opt import AFLoRAConfig, ZOError, get_adapter_model, load_adapter_model, trainable_parameters

STEPS, WARMUP, FINAL = 20, 3, 5


def aflora(**changes):
    options = {"rank": 3, "total_steps": STEPS, "warmup_steps": WARMUP, "final_steps": FINAL, "d_initial": 1.0}
    return get_adapter_model(build("llama"), AFLoRAConfig(**options | changes))


def matrices(model):
    return {f"{n}.{w}": getattr(m.adapter, w) for n, m in model.adapted_modules().items() for w in ("lora_A", "lora_B")}


def train(model, steps, first=0, optimizer=None):
    batch = padded_batch("llama")
    if optimizer is None:
        optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2, weight_decay=0.1)
    for step in range(first, steps):
        model(**batch).loss.backward()
        optimizer.step()
        model.step(step)
        optimizer.zero_grad()
        yield step, {n: p.detach().clone() for n, p in model.adapter_state().items()}


def test_matrices_freeze_on_the_cubic_schedule_and_keep_their_bits():
    """Under AdamW with momentum and decay; d and b train to the end."""
    model = aflora()
    found, total = matrices(model), len(matrices(model))
    frozen_at, states = {}, []
    for step, state in train(model, STEPS):
        states.append(state)
        for name, p in found.items():
            if not p.requires_grad:
                frozen_at.setdefault(name, step)
        passed = min(max((step - WARMUP) / (STEPS - FINAL - WARMUP), 0), 1)
        assert sum(not p.requires_grad for p in found.values()) == int((1 - (1 - passed) ** 3) * total)
    assert len(frozen_at) == total
    for name, when in frozen_at.items():
        if when > WARMUP + 1:
            assert not torch.equal(states[when][name_in(states[0], name)], states[when - 1][name_in(states[0], name)])
        assert all(torch.equal(s[name_in(s, name)], states[when][name_in(s, name)]) for s in states[when:])
    vectors = [n for n in states[0] if "lambda" in n]
    assert len(vectors) == total
    assert all(not torch.equal(states[-1][n], states[-2][n]) for n in vectors)


def name_in(state, ending):
    module, _, which = ending.rpartition(".")
    return next(n for n in state if n == f"{module}.adapter.{which}")


def test_the_lowest_scores_freeze_first():
    """Three layers with given weights and gradients: the quietest matrix goes first."""
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    config = AFLoRAConfig(
        rank=2, total_steps=20, warmup_steps=2, final_steps=2, target_modules=["0", "1", "2"]
    )  # fmt: skip
    model = get_adapter_model(net, config)
    found, order = matrices(model), []
    loudness = dict(zip(found, (5.0, 1.0, 4.0, 2.0, 6.0, 3.0), strict=True))
    for step in range(20):
        for name, p in found.items():
            if p.requires_grad:
                with torch.no_grad():
                    p.fill_(1.0)
                p.grad = torch.full_like(p, loudness[name])
        model.step(step)
        order += [n for n, p in found.items() if not p.requires_grad and n not in order]
    assert [loudness[n] for n in order] == sorted(loudness[n] for n in order) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("stop", [2, 6, 16])
def test_it_continues_from_files_to_the_same_bits(tmp_path, stop):
    model = aflora()
    adamw = torch.optim.AdamW(trainable_parameters(model), lr=1e-2, weight_decay=0.1)
    for _ in train(model, stop, optimizer=adamw):
        pass
    model.save_pretrained(tmp_path)
    again = load_adapter_model(build("llama"), tmp_path)
    assert [p.requires_grad for p in matrices(again).values()] == [p.requires_grad for p in matrices(model).values()]
    resumed = torch.optim.AdamW(trainable_parameters(again), lr=1e-2, weight_decay=0.1)
    resumed.load_state_dict(copy.deepcopy(adamw.state_dict()))
    for _ in zip(train(model, STEPS, stop, adamw), train(again, STEPS, stop, resumed), strict=True):
        pass
    assert all(torch.equal(t, again.adapter_state()[n]) for n, t in model.adapter_state().items())
    assert all(torch.equal(t, again.schedule_state()[n]) for n, t in model.schedule_state().items())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"d_initial": 0}, "d_initial=0"), ({"beta1": 2.0}, "beta1=2.0"), ({"final_steps": "all"}, "final_steps='all'")],
)
def test_impossible_values(options, sentence):
    with pytest.raises(ZOError, match=sentence):
        AFLoRAConfig(**options)
