"""AGZO: directions in the span of what enters each linear layer (arXiv 2601.17261)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from zo_opt.choices import Range, check_numbers
from zo_opt.directions import Directions, Stream
from zo_opt.directions.gaussian import normal
from zo_opt.directions.spanned import Spanned, fresh_factor
from zo_opt.errors import ZOError
from zo_opt.estimators import Estimate, OneSided
from zo_opt.estimators.base import estimate_of
from zo_opt.optim.choices import Method
from zo_opt.optim.machine import ZerothOrderOptimizer
from zo_opt.queries.modes import Evaluator
from zo_opt.queries.perturbation import Point

_OMEGA = 18  # which of a parameter's random sequences
_CASTS = {Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16}


class AGZO(ZerothOrderOptimizer):
    """theta <- theta - lr * mean_q (L(theta + zo_eps z_q) - L(theta)) / zo_eps * z_q, with z_W = R A^T for a linear layer's W (out, in).

    Use it on whole models with linear layers, in one process, where a batch has fewer tokens than the layers are wide.

    A (in, r) is an orthonormal basis of the leading right singular directions of the layer's inputs X (tokens, in) in this step's forward at
    the weights: A = qr(X^T Omega), then ``iterations`` times A = qr(X^T X A), Omega (tokens, r) and R (out, r) Gaussian. A gradient
    of W is a sum of rows of X, so that it lies in their span. All other parameters get Gaussian entries. Q + 1 forwards.

    Source: arXiv 2601.17261, as a note on it reports (the paper itself was not at hand): rank 1, three iterations; its zo_eps are 1e-7 and,
    in bf16, 1e-4. [choice] zo_eps 1e-3 and lr 1e-6, MeZO's; Q directions in place of one. [choice] All tokens of X count, those
    of padding too; a layer that runs several times in a forward has the inputs of its first; of micro-batches the first decides.
    [choice] A weight is a linear layer's if ``F.linear`` or ``torch.addmm`` asks for it and no embedding does. [choice] In split mode X is
    the whole batch's, a forward besides the two. In one process only; its steps cannot be replayed from a journal, which knows no
    activations. Other arguments as in :class:`~zo_opt.optim.machine.ZerothOrderOptimizer`.

    Args:
        rank: r, at most what tokens and inputs allow.
        iterations: of the power method.

    Raises:
        ZOError: no trained matrix is a linear layer's weight.

    >>> layer = torch.nn.Linear(3, 2, bias=False)
    >>> x, y = torch.eye(3)[:2], torch.ones(2, 2)
    >>> optimizer = AGZO(layer.parameters(), lr=0.1, rank=2, seed=0)
    >>> before = layer.weight[:, 2].tolist()  # an input that no row has
    >>> for _ in range(300):
    ...     loss = optimizer.step(lambda: (layer(x) - y).square().mean())
    >>> bool(loss < 1e-3), layer.weight[:, 2].tolist() == before
    (True, True)
    """

    method = Method(
        "agzo",
        {"lr": 1e-6, "estimator": OneSided()},
        frozenset({"directions", "estimator", "line_search"}),
        ("rank", "iterations"),
    )
    own_estimates: ClassVar[bool] = True
    own_directions: ClassVar[bool] = True

    def __init__(self, params: Iterable[Any], *, rank: int = 1, iterations: int = 3, **options: Any) -> None:
        check_numbers(Range(least=1, whole=True), rank=rank)
        check_numbers(Range(least=0, whole=True), iterations=iterations)
        super().__init__(params, **options)
        if self.ranks is not None:
            raise ZOError("'agzo' takes its directions from one process's forward; use another optimizer in several.")
        self.rank, self.iterations = rank, iterations
        self._inputs = InputSpans({})

    def distribution(self, step: int) -> Directions:
        return self._inputs

    def forwards(self, step: int, queries: int) -> int:
        return super().forwards(step, queries) + (self.mode == "split")

    def estimate_from(self, evaluator: Evaluator, queries: int) -> Estimate:
        zo_eps, trained = self.choices.zo_eps, evaluator.perturbed.trainables.parameters
        stream = Stream(self.setting.seed, self.step_count, 0)
        inputs = None if self.pending else LinearInputs(trained, self.rank, self.iterations, stream)
        with inputs or nullcontext():
            here = evaluator.at([Point()])
        if inputs is not None:
            if not inputs.bases and any(p.ndim > 1 for p in trained) and bool(here.isfinite()):
                raise ZOError(
                    "'agzo' moves along what enters linear layers, and no trained matrix is such a layer's weight; tune others (adapter "
                    "lora or full), or use mezo."
                )
            self._inputs, self._directions = InputSpans(inputs.bases), None
        perturbed = replace(evaluator.perturbed, directions=self.directions_of(self.step_count))
        split = self.mode == "split"
        losses = replace(evaluator, perturbed=perturbed)(queries, (zo_eps,), base=split)
        base = here.expand(queries) if losses.base is None else losses.base
        slopes = (losses.values[:, 0] - base) / zo_eps
        estimate = estimate_of(losses, torch.where(slopes.isfinite(), slopes, torch.nan), base)
        return replace(estimate, forwards=losses.forwards + 1)


class InputSpans(Spanned):
    """z_W = R A^T, R Gaussian and fresh.

    Args:
        bases: number of a parameter -> A (in, r), and whether the weight is (in, out), so that z_W = A R^T.
    """

    def __init__(self, bases: Mapping[int, tuple[Tensor, bool]]) -> None:
        self._bases = bases

    def factors(self, stream: Stream, parameter: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        if parameter not in self._bases:
            return None
        a_IR, transposed = self._bases[parameter]
        r_OR = fresh_factor(stream, parameter, shape[1] if transposed else shape[0], a_IR.shape[1])
        return (a_IR, r_OR.T) if transposed else (r_OR, a_IR.T)


class LinearInputs(TorchFunctionMode):
    """While it is active, sees what enters linear layers whose weights are trained. The model is not touched, and nothing runs otherwise.

    Args:
        trained: the parameters.
        rank, iterations: of the bases.
        stream: what Omega is drawn from, with a parameter's number.

    Attributes:
        bases: as :class:`InputSpans` has them, on the CPU.
    """

    def __init__(self, trained: Sequence[Tensor], rank: int, iterations: int, stream: Stream) -> None:
        super().__init__()
        self._numbers = {id(p): i for i, p in enumerate(trained)}
        self._rank, self._iterations, self._stream = rank, iterations, stream
        self._casts: list[Tensor] = []  # weights in another dtype, alive as long as their ids are known
        self._looked_up: set[int] = set()
        self.bases: dict[int, tuple[Tensor, bool]] = {}

    @torch._disable_dynamo  # type: ignore[attr-defined]  # as Substitution's
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and len(args) > 1:
            self._see(args[0], args[1], transposed=False)
        elif func is torch.addmm and len(args) > 2:
            self._see(args[1], args[2], transposed=True)
        elif func is F.embedding and (number := self._numbers.get(id(args[1]))) is not None:
            self._looked_up.add(number)
            self.bases.pop(number, None)
        elif func in _CASTS and (number := self._numbers.get(id(args[0]))) is not None:
            self._casts.append(out)
            self._numbers[id(out)] = number
        return out

    def _see(self, x: Tensor, weight: Tensor, *, transposed: bool) -> None:
        number = self._numbers.get(id(weight))
        if number is None or number in self.bases or number in self._looked_up:
            return
        x_NI = x.detach().reshape(-1, x.shape[-1]).float()
        x_NI = x_NI[x_NI.isfinite().all(1)]  # padding may hold anything
        if len(x_NI):
            basis = input_basis(x_NI, self._rank, self._iterations, (*self._stream, number, _OMEGA))
            self.bases[number] = basis.cpu(), transposed


def input_basis(x_NI: Tensor, rank: int, iterations: int, name: tuple[int, ...]) -> Tensor:
    """A (in, r): the leading right singular directions of X by power iteration from the Gaussian sequence of that name."""
    tokens, columns = len(x_NI), min(rank, *x_NI.shape)
    omega_NR = normal(name, 0, tokens * columns, torch.device("cpu")).view(tokens, columns).to(x_NI.device)
    a_IR = _orthonormal(x_NI.T @ omega_NR)
    for _ in range(iterations):
        a_IR = _orthonormal(x_NI.T @ (x_NI @ a_IR))
    return a_IR


def _orthonormal(y: Tensor) -> Tensor:
    q, r = torch.linalg.qr(y)
    unique: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return unique
