"""Layers that do not simply follow each other, and inputs that only look the same: nothing may be shared wrongly."""

from __future__ import annotations

import pytest
import torch
from test_shared_prefix import Layer, Stack, assert_unchanged, in_place, one_after_another
from torch import nn

from zo_opt import MeZO


def residual_outside(layers, x):
    for layer in layers:
        x = x + layer(x)
    return x


def beside_each_other(layers, x):
    return sum(layer(x) for layer in layers)


def added_to_in_place(layers, x):
    first = layers[0](x)
    first += x
    return one_after_another(layers[1:], first)


@pytest.mark.parametrize("through", [residual_outside, beside_each_other, added_to_in_place])
def test_layers_that_do_not_simply_follow_each_other(through):
    assert_unchanged(lambda: Stack(through=through))


def test_an_input_that_is_written_anew_in_place():
    def closure(model):
        buffer, evaluations = torch.ones(6, 4), iter(range(100))

        def loss(batch):
            buffer.fill_(1 / (1 + next(evaluations)))
            return one_after_another(model.layers, buffer).square().mean()

        return loss

    assert_unchanged(Stack, closure=closure)


def test_a_number_that_differs_between_evaluations():
    def closure(model):
        evaluations = iter(range(100))

        def loss(batch):
            x, factor = batch["x"] @ model.embedding, 1 + next(evaluations)
            for layer in model.layers:
                x = layer(x, factor)
            return x.square().mean()

        return loss

    def make():
        return Stack([Layer(i, lambda layer, x, factor: (x @ layer.weight * factor).tanh()) for i in range(4)])

    assert_unchanged(make, closure=closure)


def test_inference_mode_with_writes_in_place():
    def closure(model):
        def loss(batch):
            with torch.inference_mode():
                return model(batch)

        return loss

    assert_unchanged(lambda: Stack([Layer(i, in_place if i == 3 else None) for i in range(4)]), closure=closure)


def test_a_layer_in_two_places():
    def make():
        first, second, third = (Layer(i) for i in range(3))
        return Stack([first, second, second, third], trained=(3,))

    assert_unchanged(make)


def test_layers_named_by_other_numbers():
    def make():
        model = Stack(through=lambda layers, x: one_after_another(layers.values(), x))
        layers = dict(zip("379", model.layers, strict=False))
        layers["9"].requires_grad_(True)
        model.layers = nn.ModuleDict(layers)
        return model

    assert_unchanged(make)


def test_a_second_way_through_some_of_the_layers():
    def through(layers, x):
        return one_after_another(layers, x) + one_after_another(layers[1:], 2 * x)

    assert_unchanged(lambda: Stack(through=through))


def test_forward_gradients_through_a_trained_embedding():
    assert_unchanged(lambda: Stack(embedding=True), name="forward-gradient", lr=1e-3)


class Fed(nn.Module):
    """Frozen layers that take an input of their own beside what the layer below gave."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.layers.requires_grad_(False)
        self.own = nn.Parameter(torch.linspace(-1, 1, 4))

    def forward(self, x):
        for layer, own in zip(self.layers, (None, self.own, 2 * self.own), strict=True):
            x = layer(x if own is None else torch.tanh(x) + own)
        return x.sum()


class TakesTwo(nn.Linear):
    def forward(self, x, own=None):
        return super().forward(x if own is None else x * own)


class FedAsArgument(Fed):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(TakesTwo(4, 4).requires_grad_(False) for _ in range(3))

    def forward(self, x):
        for layer, own in zip(self.layers, (None, self.own, 2 * self.own), strict=True):
            x = layer(x, own)
        return x.sum()


@pytest.mark.parametrize("kind", [Fed, FedAsArgument])
def test_a_layer_with_an_input_of_its_own_that_moves(kind):
    losses = []
    for share in (False, True):
        torch.manual_seed(0)
        net = kind()
        optimizer = MeZO([net.own], lr=0.1, zo_eps=0.1, module=net, share_prefix=share)
        losses.append([float(optimizer.step(net, torch.ones(2, 4))) for _ in range(3)])
        losses[-1] += optimizer.last_record.projected_grads
    assert losses[0] == losses[1]
    assert losses[0][-1] != 0
