"""LISA: which layers are trained when, that nothing else moves, and that a resumed run takes the same steps."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
import transformers
from tiny_models import IDS, SIZES, build, padded_batch

from zo_opt import (
    LISAConfig,
    MeZO,
    ZOAdam,
    ZOError,
    ZOKalman,
    get_adapter_model,
    load_adapter_model,
    trainable_parameters,
)
from zo_opt.optim import Adam, ZerothOrderOptimizer
from zo_opt.system.layers import layer_of

BATCH = padded_batch("llama")


def deep(layers=6):
    """A tiny Llama of some depth."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**IDS, **SIZES | {"num_hidden_layers": layers, "hidden_size": 16})
        ).eval()


def active(model):
    """Layers that require grad; all of a layer does, or nothing."""
    grads = collections.defaultdict(set)
    for name, p in model.wrapped.named_parameters():
        if place := layer_of(name):
            grads[place[1]].add(p.requires_grad)
    assert all(len(flags) == 1 for flags in grads.values())
    return {i for i, flags in grads.items() if flags == {True}}


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def moved(before, model):
    """Layers with a parameter that changed (None: outside of all)."""
    after = weights(model.wrapped)
    return {(place[1] if (place := layer_of(n)) else None) for n in before if not torch.equal(before[n], after[n])}


def first_order_step(model, optimizer):
    optimizer.zero_grad()
    model(**BATCH).loss.backward()
    optimizer.step()


def test_which_layers_when():
    """gamma at a time, for interval steps, from the seed and the step alone; each of six is drawn in 40 periods."""
    model, other = (get_adapter_model(deep(), LISAConfig(blocks=2, interval=3, seed=s)) for s in (0, 1))
    drawn, others = [active(model)], [active(other)]
    for step in range(120):
        model.step(step)
        other.step(step)
        drawn.append(active(model))
        others.append(active(other))
    assert all(len(a) == 2 for a in drawn)
    assert all(a == drawn[3 * (step // 3)] for step, a in enumerate(drawn))
    assert set().union(*drawn) == set(range(6))
    assert drawn != others
    late = get_adapter_model(deep(), LISAConfig(blocks=2, interval=3))
    late.step(118)
    assert active(late) == drawn[119]


def test_what_is_outside_of_the_layers_is_always_trained():
    model = get_adapter_model(deep(), LISAConfig(blocks=1))
    outside = {n for n, p in model.wrapped.named_parameters() if p.requires_grad and not layer_of(n)}
    assert outside == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert len(trainable_parameters(model)) == len(list(model.parameters()))


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
])  # fmt: skip
def test_inactive_layers_keep_their_bits_and_cost_no_state(make):
    """Under momentum and decay, whether or not gradients are set to None by zero_grad."""
    model = get_adapter_model(deep(), LISAConfig(blocks=2, interval=2))
    optimizer = make(trainable_parameters(model))
    turns = []
    for step in range(12):
        turn, before = active(model), weights(model.wrapped)
        optimizer.zero_grad(set_to_none=step % 3 == 0)
        model(**BATCH).loss.backward()
        optimizer.step()
        assert moved(before, model) == turn | {None}
        turns.append(turn)
        model.step(step)
        with_state = {id(p) for p in optimizer.state}
        kept = {n for n, p in model.wrapped.named_parameters() if id(p) in with_state}
        assert {layer_of(n)[1] for n in kept if layer_of(n)} <= active(model)
    assert len({tuple(sorted(t)) for t in turns}) > 2


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p, lr=1e-2),
    lambda p: MeZO(p, lr=1e-3, zo_eps=1e-3, seed=0, update_rule=Adam()),
])  # fmt: skip
def test_a_resumed_run_takes_the_same_steps(tmp_path, make):
    config = LISAConfig(blocks=2, interval=2)

    def run(model, optimizer, steps):
        for step in steps:
            if isinstance(optimizer, ZerothOrderOptimizer):
                optimizer.step(lambda: model(**BATCH).loss)
            else:
                first_order_step(model, optimizer)
            model.step(step)

    model = get_adapter_model(deep(), config)
    optimizer = make(trainable_parameters(model))
    run(model, optimizer, range(5))
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, range(5, 11))

    again = load_adapter_model(deep(), tmp_path)
    resumed = make(trainable_parameters(again))
    resumed.load_state_dict(state)
    run(again, resumed, range(5, 11))
    assert active(again) == active(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["sequential", "split"])
@pytest.mark.parametrize("make", [MeZO, ZOAdam, ZOKalman])
def test_zeroth_order_follows_the_turns(make, mode):
    """Only what has its turn is perturbed and moved; the update rule's memory begins anew with the layers."""
    model = get_adapter_model(deep(), LISAConfig(blocks=1, interval=2))
    chosen = trainable_parameters(model)
    if make is ZOKalman:  # holds d x d numbers
        chosen = [p for p in chosen if p.ndim == 1]
    optimizer = make(chosen, lr=1e-4, zo_eps=1e-3, seed=0, module=model, query_mode=mode)
    for step in range(8):
        turn, before = active(model), weights(model.wrapped)
        optimizer.step(lambda b: model(**b).loss, BATCH)
        assert moved(before, model) == turn | {None}
        model.step(step)
        assert active(model) == turn or not optimizer.state


def test_the_first_step_of_adam_is_no_longer_than_lr_after_a_turn():
    """Fresh moments under an old bias correction would make it 0.1 / sqrt(0.001) = 3.2 times as long, and 6 times after ten steps."""
    model = get_adapter_model(deep(), LISAConfig(blocks=1, interval=4))
    optimizer = MeZO(
        trainable_parameters(model), lr=1e-3, zo_eps=1e-3, seed=0, directions="rademacher", update_rule=Adam()
    )
    for step in range(4):
        optimizer.step(lambda: model(**BATCH).loss)
        model.step(step)
    before = weights(model.wrapped)
    optimizer.step(lambda: model(**BATCH).loss)
    longest = max(float((p - before[n]).abs().max()) for n, p in weights(model.wrapped).items())
    assert longest == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("zeroth_order", [True, False])
def test_an_optimizer_of_nothing_that_changes_turns_keeps_its_state(zeroth_order):
    model = get_adapter_model(deep(), LISAConfig(blocks=1, interval=1))
    outside = [p for n, p in model.wrapped.named_parameters() if not layer_of(n)]
    optimizer = ZOAdam(outside, lr=1e-4) if zeroth_order else torch.optim.AdamW(outside, lr=1e-4)
    for step in range(3):
        if zeroth_order:
            optimizer.step(lambda: model(**BATCH).loss)
        else:
            first_order_step(model, optimizer)
        model.step(step)
    assert len(optimizer.state) == len(outside)


def test_training_on_without_it_is_an_error():
    model = get_adapter_model(deep(), LISAConfig())
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=1e-3)
    first_order_step(model, optimizer)
    with pytest.raises(ZOError, match=r"model\.step"):
        first_order_step(model, optimizer)


def test_layers_that_may_be_drawn():
    model = get_adapter_model(deep(), LISAConfig(blocks=1, interval=1, layers=[1, 4]))
    seen = set(active(model))
    for step in range(20):
        model.step(step)
        seen |= active(model)
    assert seen == {1, 4}


def test_encoder_and_decoder_are_one_urn():
    model = get_adapter_model(build("t5"), LISAConfig(blocks=3))
    places = {layer_of(n) for n, p in model.wrapped.named_parameters() if p.requires_grad} - {None}
    assert len(places) == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"blocks": 7}, "blocks=7 layers cannot be drawn from 6"),
        ({"blocks": 2, "layers": 1}, "cannot be drawn from 1"),
        ({"blocks": 0}, "blocks=0"),
        ({"interval": 0}, "interval=0"),
        ({"seed": -1}, "seed=-1"),
        ({"target_modules": ["q_proj"]}, "whole layers"),
    ],
)
def test_mistakes(options, sentence):
    with pytest.raises(ZOError, match=sentence):
        get_adapter_model(deep(), LISAConfig(**options))
