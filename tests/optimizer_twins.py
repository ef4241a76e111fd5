"""Slow twins of the optimizers: the published formulas, one number at a time, in float64. Only directions and losses are borrowed.

A twin takes a :class:`Setting` and returns the weights after a number of steps, as a list of numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import copysign, sqrt
from statistics import mean, stdev

import numpy as np
import torch
from optimizer_problem import BATCH, COLUMNS, EPS, MATRIX, ROWS_, TOTAL, Model, examples_of, flat, loss_of

from zo_opt.directions import DIRECTIONS, LowRank, Stream, gaussian, spanned
from zo_opt.optim import agzo as agzo_module

RANGES = ((0, MATRIX), (MATRIX, TOTAL))  # the parameters


@dataclass
class Setting:
    """One run: ``lr`` maps a step to a learning rate for each parameter; ``rule`` is one of RULES."""

    directions: object = "gaussian"
    queries: Callable[[int], int] = lambda step: 1
    lr: Callable[[int], tuple[float, float]] = lambda step: (0.02, 0.02)
    weight_decay: tuple[float, float] = (0.0, 0.0)
    rule: str = "sgd"
    seed: int = 5
    batch: dict = None

    def __post_init__(self):
        self.directions = DIRECTIONS.make(self.directions)
        self.batch = self.batch if self.batch is not None else BATCH
        self.start = flat(Model()).tolist()
        self.move = RULES[self.rule]()
        self.margin = float("inf")  # how far from a tie decisions were: comparing rounded numbers means nothing at ties

    def z(self, step, query):
        shapes = ((ROWS_, COLUMNS), (ROWS_,))
        return self.directions.draw(Stream(self.seed, step, query), shapes, 0, TOTAL, torch.device("cpu")).tolist()

    def moved(self, z):
        """z over the variance of its entries; of LOZO's U V^T that is r."""
        r = self.directions.rank if isinstance(self.directions, LowRank) else 1
        return [x / r if i < MATRIX else x for i, x in enumerate(z)]

    def _weights(self, theta):
        theta = torch.tensor(theta, dtype=torch.float64)
        return theta[:MATRIX].view(ROWS_, COLUMNS), theta[MATRIX:]

    def loss(self, theta, example=None):
        batch = self.batch if example is None else examples_of(self.batch, [example])
        return float(loss_of(*self._weights(theta), batch))

    def gradient(self, theta):
        theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        loss_of(theta[:MATRIX].view(ROWS_, COLUMNS), theta[MATRIX:], self.batch).backward()
        return theta.grad.tolist()

    def two_sided(self, theta, z, example=None):
        return (self.loss(along(theta, EPS, z), example) - self.loss(along(theta, -EPS, z), example)) / (2 * EPS)

    def after(self, step, theta, gradient):
        """theta (1 - lr * wd) - lr * u with u the rule's answer to the gradient; no decay on vectors."""
        update = self.move(gradient)
        new = []
        for i, (t, u) in enumerate(zip(theta, update, strict=True)):
            lr = self.lr(step)[i >= MATRIX]
            decay = self.weight_decay[0] if i < MATRIX else 0.0
            new.append(t - lr * decay * t - lr * u)
        return new

    def decides(self, difference, scale):
        self.margin = min(self.margin, abs(difference) / scale)


def along(theta, scale, z):
    return [t + scale * d for t, d in zip(theta, z, strict=True)]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def weighted_mean(factors, zs):
    """mean_q factor_q z_q."""
    return [sum(f * z[i] for f, z in zip(factors, zs, strict=True)) / len(zs) for i in range(TOTAL)]


# --- update rules: gradient estimate -> u ---


def sgd():
    return lambda g: g


def sign():
    return lambda g: [0.0 if x == 0 else copysign(1.0, x) for x in g]


def momentum(beta=0.9):
    m = [0.0] * TOTAL

    def move(g):
        for i, x in enumerate(g):
            m[i] = beta * m[i] + x
        return list(m)

    return move


def adam(b1=0.9, b2=0.999, eps=1e-8):
    m, v, count = [0.0] * TOTAL, [0.0] * TOTAL, 0

    def move(g):
        nonlocal count
        count += 1
        update = []
        for i, x in enumerate(g):
            m[i] = b1 * m[i] + (1 - b1) * x
            v[i] = b2 * v[i] + (1 - b2) * x * x
            update.append(m[i] / (1 - b1**count) / (sqrt(v[i] / (1 - b2**count)) + eps))
        return update

    return move


def amsgrad(b1=0.9, b2=0.999, eps=1e-8):
    m, v, w = [0.0] * TOTAL, [0.0] * TOTAL, [0.0] * TOTAL

    def move(g):
        update = []
        for i, x in enumerate(g):
            m[i] = b1 * m[i] + (1 - b1) * x
            v[i] = b2 * v[i] + (1 - b2) * x * x
            w[i] = max(w[i], v[i])
            update.append(m[i] / (sqrt(w[i]) + eps))
        return update

    return move


RULES = {"sgd": sgd, "sign": sign, "momentum": momentum, "adam": adam, "amsgrad": amsgrad}


# --- methods ---


def mezo(run, steps):
    """g = (L(t + eps z) - L(t - eps z)) / (2 eps); t -= lr * mean_q g_q z_q. With other queries, directions and rules: AdaZeta,
    LOZO (losses at W +- eps U V^T, W -= lr * g * U V^T / r), SubZero, and ZO-SGD with sign, momentum, Adam."""
    theta = run.start
    for k in range(steps):
        zs = [run.z(k, q) for q in range(run.queries(k))]
        theta = run.after(k, theta, weighted_mean([run.two_sided(theta, z) for z in zs], list(map(run.moved, zs))))
    return theta


def conservative(run, steps):
    """The best of t, t - lr g, t + lr g; then decay."""
    theta = run.start
    for k in range(steps):
        zs = [run.z(k, q) for q in range(run.queries(k))]
        g = weighted_mean([run.two_sided(theta, z) for z in zs], zs)
        step = [run.lr(k)[i >= MATRIX] * x for i, x in enumerate(g)]
        losses = {m: run.loss(along(theta, -m, step)) for m in (0.0, 1.0, -1.0)}
        best, second = sorted(losses.values())[:2]
        run.decides(second - best, abs(best))
        length = min(losses, key=losses.get)
        theta = run.after(k, theta, [length * x for x in g])
    return theta


def sparse_mezo(run, steps, density):
    """Perturb and update entries with |t| <= h, h of each parameter the density quantile of its first magnitudes."""
    theta = run.start
    thresholds = []
    for first, last in RANGES:
        magnitudes = sorted(abs(t) for t in theta[first:last])
        h = magnitudes[round(density * len(magnitudes)) - 1]
        thresholds += [h] * (last - first)
    for k in range(steps):
        for t, h in zip(theta, thresholds, strict=True):
            if k > 0 and t not in run.start:  # entries that have moved
                run.decides(abs(t) - h, h)
        mask = [1.0 if abs(t) <= h else 0.0 for t, h in zip(theta, thresholds, strict=True)]
        zs = [[m * d for m, d in zip(mask, run.z(k, q), strict=True)] for q in range(run.queries(k))]
        theta = run.after(k, theta, weighted_mean([run.two_sided(theta, z) for z in zs], zs))
    return theta


def hizoo(run, steps, smoothing):
    """Perturb eps z / sqrt(H); H <- (1-s) H + s |l+ + l- - 2 l0| H z^2 / (2 eps^2), meant over queries; step g z / sqrt(H)."""
    theta, H, s = run.start, [1.0] * TOTAL, smoothing
    for k in range(steps):
        zs = [run.z(k, q) for q in range(run.queries(k))]
        gs, terms = [], []
        l0 = run.loss(theta)
        for z in zs:
            scaled = [d / sqrt(h) for d, h in zip(z, H, strict=True)]
            up, down = run.loss(along(theta, EPS, scaled)), run.loss(along(theta, -EPS, scaled))
            gs.append((up - down) / (2 * EPS))
            terms.append([abs(up + down - 2 * l0) * h * d * d / (2 * EPS**2) for h, d in zip(H, z, strict=True)])
        H = [(1 - s) * h + s * mean(t[i] for t in terms) for i, h in enumerate(H)]
        gradient = weighted_mean(gs, [[d / sqrt(h) for d, h in zip(z, H, strict=True)] for z in zs])
        theta = run.after(k, theta, gradient)
    return theta


def fzoo(run, steps):
    """lr / (N sigma) * sum_i (l_i - l_0) z_i, sigma = std(l_i)."""
    theta = run.start
    for k in range(steps):
        zs = [run.z(k, q) for q in range(run.queries(k))]
        l0, ls = run.loss(theta), [run.loss(along(theta, EPS, z)) for z in zs]
        theta = run.after(k, theta, weighted_mean([(x - l0) / stdev(ls) for x in ls], zs))
    return theta


def grzo(run, steps):
    """Weights d_i / std(d), d_i the difference of example i along its own z_i; one direction an example."""
    theta = run.start
    for k in range(steps):
        examples = len(run.batch["x"])
        zs = [run.z(k, i) for i in range(examples)]
        ds = [run.loss(along(theta, EPS, z), i) - run.loss(along(theta, -EPS, z), i) for i, z in enumerate(zs)]
        theta = run.after(k, theta, weighted_mean([d / stdev(ds) for d in ds], zs))
    return theta


def mezo_svrg(run, steps, interval):
    """Every ``interval`` steps theta~ <- theta and G <- the estimate there, which is the step; between, g(theta) - g(theta~)
    along the step's own z, plus G."""
    theta = run.start
    for k in range(steps):
        zs = [run.z(k, q) for q in range(run.queries(k))]
        here = weighted_mean([run.two_sided(theta, z) for z in zs], zs)
        if k % interval == 0:
            snapshot, G = theta, here
            gradient = G
        else:
            there = weighted_mean([run.two_sided(snapshot, z) for z in zs], zs)
            gradient = [a - b + c for a, b, c in zip(here, there, G, strict=True)]
        theta = run.after(k, theta, gradient)
    return theta


def forward_gradient(run, steps):
    """The exact derivative along z, times z."""
    theta = run.start
    for k in range(steps):
        zs = [run.z(k, q) for q in range(run.queries(k))]
        exact = run.gradient(theta)
        theta = run.after(k, theta, weighted_mean([dot(exact, z) for z in zs], zs))
    return theta


def kalman(run, steps, memory, noise):
    """The textbook filter, a scalar measurement at a time: y = z . g + noise, g an autoregression with correlation a."""
    theta, a = run.start, memory
    m = [0.0] * TOTAL
    P = [[float(i == j) for j in range(TOTAL)] for i in range(TOTAL)]
    for k in range(steps):
        m = [a * x for x in m]
        P = [[a * a * P[i][j] + (1 - a * a) * (i == j) for j in range(TOTAL)] for i in range(TOTAL)]
        for q in range(run.queries(k)):
            z = run.z(k, q)
            y = run.two_sided(theta, z)
            Pz = [dot(row, z) for row in P]
            S = dot(z, Pz) + noise
            gain = [x / S for x in Pz]
            innovation = y - dot(z, m)
            m = [x + g * innovation for x, g in zip(m, gain, strict=True)]
            P = [[P[i][j] - gain[i] * Pz[j] for j in range(TOTAL)] for i in range(TOTAL)]
        theta = run.after(k, theta, m)
    return theta


def sequence(kind, run, step, query, parameter, rows, columns):
    """One of a parameter's Gaussian sequences, as rows of numbers."""
    found = gaussian.normal((run.seed, step, query, parameter, kind), 0, rows * columns, torch.device("cpu")).tolist()
    return [found[i * columns : (i + 1) * columns] for i in range(rows)]


def product(a, b):
    return [[dot(row, column) for column in zip(*b, strict=True)] for row in a]


def transpose(a):
    return [list(row) for row in zip(*a, strict=True)]


def gram_schmidt(a):
    """The columns of a, orthonormal, one after the other."""
    found = []
    for column in transpose(a):
        rest = column
        for q in found:
            rest = along(rest, -dot(q, rest), q)
        found.append([x / sqrt(dot(rest, rest)) for x in rest])
    return transpose(found)


def plain_vector(run, step, query):
    return [x for (x,) in sequence(spanned._PLAIN, run, step, query, 1, ROWS_, 1)]


def agzo(run, steps, rank, iterations):
    """A from X^T Omega and X^T X A by Gram and Schmidt; z = R A^T in the matrix; (l_q - l_0) / eps along it."""
    theta, x = run.start, run.batch["x"].tolist()
    for k in range(steps):
        a = gram_schmidt(product(transpose(x), sequence(agzo_module._OMEGA, run, k, 0, 0, len(x), rank)))
        for _ in range(iterations):
            a = gram_schmidt(product(transpose(x), product(x, a)))
        zs = []
        for q in range(run.queries(k)):
            matrix = product(sequence(spanned._FACTOR, run, k, q, 0, ROWS_, rank), transpose(a))
            zs.append([z for row in matrix for z in row] + plain_vector(run, k, q))
        l0 = run.loss(theta)
        theta = run.after(k, theta, weighted_mean([(run.loss(along(theta, EPS, z)) - l0) / EPS for z in zs], zs))
    return theta


def p_gap(run, steps, rank, interval, probes, delta):
    """Every ``interval`` steps U diag(s) V^T of the mean of ``probes`` Gaussian queries, which is the step; between, z = U C V^T with
    C = C' - (<S, C'> - xi sqrt(delta) ||S||) / ||S||^2 S."""
    theta, u, s, v = run.start, [], [], []
    for k in range(steps):
        if k % interval == 0:
            zs = [run.z(k, q) for q in range(probes)]
        else:
            zs = []
            for q in range(run.queries(k)):
                c = sequence(spanned._FACTOR, run, k, q, 0, rank, rank)
                inner, square = sum(s[i] * c[i][i] for i in range(rank)), dot(s, s)
                run.decides(inner, sqrt(square))
                length = copysign(sqrt(delta), inner) * sqrt(square)
                for i in range(rank):
                    c[i][i] -= (inner - length) / square * s[i]
                zs.append([z for row in product(product(u, c), transpose(v)) for z in row] + plain_vector(run, k, q))
        gradient = weighted_mean([run.two_sided(theta, z) for z in zs], zs)
        if k % interval == 0:
            u, s, vt = np.linalg.svd(np.array(gradient[:MATRIX]).reshape(ROWS_, COLUMNS), full_matrices=False)
            signs = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(1)])  # of the smaller side
            u, s, v = (u * signs)[:, :rank].tolist(), s[:rank].tolist(), (vt.T * signs)[:, :rank].tolist()
        theta = run.after(k, theta, gradient)
    return theta
