"""The problem that every optimizer test solves: a matrix and a vector under a smooth loss, a mean over examples."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from zo_opt.directions import Directions
from zo_opt.optim import OPTIMIZERS

EPS, LR = 0.05, 0.02
ROWS_, COLUMNS, EXAMPLES = 7, 5, 8
MATRIX = ROWS_ * COLUMNS  # entries; then come those of the vector
TOTAL = MATRIX + ROWS_


class Model(nn.Module):
    """Called with a batch, it returns the loss. Evaluated in float64: a comparison measures the optimizer, not the loss's rounding."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.w = nn.Parameter(torch.randn(ROWS_, COLUMNS, generator=generator).to(dtype))
        self.b = nn.Parameter(torch.randn(ROWS_, generator=generator).to(dtype))

    def forward(self, batch):
        return loss_of(self.w.double(), self.b.double(), batch)


def loss_of(w, b, batch):
    return (F.linear(batch["x"], w, b).tanh() - batch["y"]).square().sum(1).mean()


def make_batch(examples=EXAMPLES):
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(examples, COLUMNS, generator=generator), torch.randn(examples, ROWS_, generator=generator)
    return {"x": x.double(), "y": y.double()}


BATCH = make_batch()


def examples_of(batch, which):
    return {k: v[which] for k, v in batch.items()}


def closure_of(model, batch=BATCH):
    return lambda: model(batch)


def make(model, name="mezo", params=None, **options):
    """An optimizer over the model with settings of these tests: a small seed, a large perturbation."""
    options = {"lr": LR, "seed": 5} | ({} if name == "forward-gradient" else {"zo_eps": EPS}) | options
    return OPTIMIZERS[name](params if params is not None else model.parameters(), module=model, **options)


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}  # fmt: skip


def bits(model):
    """The weights as integers: -0.0 and 0.0 differ, NaNs may be equal."""
    return [p.detach().clone().view(INTEGERS[p.dtype]) for p in model.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def relative_error(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


class Ones(Directions):
    """A distribution of one's own, all ones: steps can be told beforehand."""

    name, signs = "ones", True

    def draw(self, stream, shapes, start, stop, device, dtype=torch.float32):
        return torch.ones(stop - start, device=device, dtype=dtype)


class RandomState:
    """The global random states, as they were when it was made."""

    def __init__(self):
        self.torch, self.numpy, self.python = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def is_untouched(self):
        now = RandomState()
        return torch.equal(now.torch, self.torch) and (now.numpy == self.numpy).all() and now.python == self.python
