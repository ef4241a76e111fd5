"""LaMDA: a small trained core between projections from the weight's own spectrum (arXiv 2406.12832)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.adapters.adapted import Delta, ParallelAdapter, numbers
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.lamda_backward import core_then_columns
from zo_opt.adapters.options import option
from zo_opt.adapters.schedule import AdapterSchedule
from zo_opt.adapters.spectrum import leading_triplets
from zo_opt.adapters.targets import ATTENTION, Target
from zo_opt.adapters.weights import matrix
from zo_opt.choices import Range
from zo_opt.errors import ZOError

if TYPE_CHECKING:
    from zo_opt.adapters.model import AdapterModel


@dataclass(frozen=True)
class LaMDAConfig(AdapterConfig):
    """h = W0 x + B S A x - B0 S0 A x, A (PMA, rank x in) frozen, S (LDA, rank x rank) trained, B (PMB, out x rank) frozen by and by.

    Use it for many adapters on one model, each of which must be small in the end.

    With W0 = U Sigma V^T: A = V_r^T and B = U_r (arXiv 2406.12832, section 3). Over the first ``freeze_share`` (eta) of training
    the columns of B are frozen one after the other, those of the largest singular values first; then S alone is trained, rank^2
    numbers a matrix. With ``freeze_share=0`` it is so from the start. [choice] After n optimizer steps floor(rank n / floor(eta T))
    columns are frozen.

    [choice] ``init="svd"``: S starts as diag(sigma_r), and the constant B0 S0 A, frozen copies of the start, is taken off again: W0 - B0 S0 A
    is the residual, and the start is the pretrained function to the bit. It is not written into the weight: there it would be rounded
    to the weight's dtype, and ``unload`` could not give W0 back. ``init="zero"``: S starts at zero, with nothing to take off.

    [choice] There is no factor alpha / rank; a rank above the matrix's own is lowered to it. Call ``model.step(global_step)`` after every
    ``optimizer.step()``. It merges into the weights. The SVD of each weight takes a while at the start.

    >>> from zo_opt import get_adapter_model, trainable_parameters
    >>> net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))
    >>> x = torch.ones(1, 12)
    >>> before = net(x)
    >>> model = get_adapter_model(net, LaMDAConfig(rank=4, freeze_share=0.0, target_modules=["0"]))
    >>> [tuple(p.shape) for p in trainable_parameters(model)]
    [(4, 4)]
    >>> torch.equal(model(x), before)
    True
    """

    default_targets: ClassVar[Mapping[str, Sequence[str]]] = ATTENTION

    rank: int = option(32, "rank of the projections and size of the core")
    freeze_share: float = option(0.3, "eta, share of training after which B is frozen", Range(least=0, most=1))
    init: Literal["svd", "zero"] = option("svd", "svd: S starts at the singular values; zero: S starts at zero")
    total_steps: int | None = option(None, "optimizer steps in all; set by the training loop")

    def wrap(self, target: Target, number: int) -> ParallelAdapter:
        return ParallelAdapter(target.module, LaMDA(self, target))

    def schedule(self, model: AdapterModel) -> LaMDASchedule:
        adapters = [m.adapter for m in model.adapted_modules().values() if isinstance(m.adapter, LaMDA)]
        return LaMDASchedule(self, adapters, [p for p in model.wrapped.parameters() if p.requires_grad])


class LaMDA(Delta):
    """B S A x - B0 S0 A x, float32; A is ``lora_A``, S ``lora_S``, B ``lora_B``, and S0 and B0 ``start_S`` and ``start_B``.

    ``start_S`` is None where S starts at zero, and ``start_B`` also where B never moves.

    Attributes:
        frozen: how many columns of B are frozen.
    """

    start_S: nn.Parameter | None
    start_B: nn.Parameter | None

    def __init__(self, config: LaMDAConfig, target: Target) -> None:
        super().__init__()
        outputs, inputs, device = target.out_features, target.in_features, target.device
        rank = min(config.rank_of(target.name), outputs, inputs)
        moves, subtracts = config.freeze_share > 0, config.init == "svd"
        self.lora_A = numbers(device, rank, inputs, trained=False)
        self.lora_S = numbers(device, rank, rank)
        self.lora_B = numbers(device, outputs, rank, trained=moves)
        self.start_S = numbers(device, rank, rank, trained=False) if subtracts else None
        self.start_B = numbers(device, outputs, rank, trained=False) if subtracts and moves else None
        self.frozen = 0 if moves else rank
        self._kept: Tensor | None = None  # the frozen columns of B, while others move

    @torch.no_grad()
    def start_from(self, layer: nn.Module) -> None:
        weight_IO = matrix(layer)
        if weight_IO.is_meta:
            return
        u, sigma, vt = leading_triplets(weight_IO.T, len(self.lora_S))
        self.lora_A.copy_(vt)
        self.lora_B.copy_(u)
        if self.start_S is not None:
            self.lora_S.copy_(sigma.diag())
            self.start_S.copy_(self.lora_S)
        if self.start_B is not None:
            self.start_B.copy_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        u = F.linear(x, self.lora_A)
        columns: Tensor = self.lora_B
        if self._kept is not None and not torch.is_grad_enabled():
            # A query that moves frozen columns must not see it: they would add noise to what is learned of the others.
            columns = torch.cat([self._kept.to(columns.device), columns[:, self.frozen :]], dim=1)
        change = core_then_columns(u, self.lora_S, columns, self.frozen)
        if self.start_S is None:
            return change
        # The same operations on S0 and B0, so that the start is zero to the bit. No gradient asks for S0 u.
        # In place: a third tensor of the output's size would be the peak of a forward pass.
        return change.sub_(F.linear(F.linear(u, self.start_S), self._start_columns()))

    def dense(self) -> Tensor:
        change = self.lora_B @ self.lora_S
        if self.start_S is not None:
            change = change - self._start_columns() @ self.start_S
        return (change @ self.lora_A).T

    @torch.no_grad()
    def freeze_columns(self, count: int) -> None:
        """Put back the columns of B that are frozen, and freeze those up to ``count``."""
        rank = len(self.lora_S)
        if self._kept is not None:
            self.lora_B[:, : self.frozen] = self._kept.to(self.lora_B.device)
        if count <= self.frozen:
            return
        self.frozen = count
        if count < rank:
            self._kept = self.lora_B[:, :count].clone()
        else:  # optimizers leave alone what has no gradient
            self._kept = self.lora_B.grad = None
            self.lora_B.requires_grad_(False)

    def thaw(self) -> None:
        """No column of B is frozen."""
        self._kept, self.frozen = None, 0
        self.lora_B.requires_grad_(True)

    def _start_columns(self) -> Tensor:
        return self.lora_B if self.start_B is None else self.start_B

    def extra_repr(self) -> str:
        return f"rank={len(self.lora_S)}, frozen columns={self.frozen}"


class LaMDASchedule(AdapterSchedule):
    """Freezes the columns of all B over the first eta T steps.

    After an optimizer has moved frozen columns (momentum, weight decay), ``step`` puts their bits back; once all columns of a matrix are
    frozen, it no longer requires grad and no optimizer touches it.
    """

    def __init__(self, config: LaMDAConfig, adapters: Sequence[LaMDA], trained: Sequence[nn.Parameter]) -> None:
        self._config, self._adapters, self._trained = config, adapters, trained
        self._done = torch.zeros((), dtype=torch.int64)  # optimizer steps

    def step(self, global_step: int) -> None:
        self._done.fill_(global_step + 1)
        self._freeze()

    def state(self) -> dict[str, Tensor]:
        return {"steps": self._done}

    def restored(self) -> None:
        if self._config.freeze_share > 0:
            for adapter in self._adapters:
                adapter.thaw()
            if self._done > 0:
                self._freeze()

    def moving(self) -> int:
        still = sum(p.numel() for p in self._trained if p.requires_grad)
        return still - sum(a.frozen * len(a.lora_B) for a in self._adapters if a.lora_B.requires_grad)

    def _freeze(self) -> None:
        if self._config.freeze_share == 0:
            return
        if self._config.total_steps is None:
            raise ZOError("LaMDA freezes over a share of training; set total_steps in its configuration.")
        # Eta T is rarely a whole number in binary: 0.3 * 10 steps must be 3.
        steps = int(self._config.freeze_share * self._config.total_steps + 1e-9)
        for adapter in self._adapters:
            rank = len(adapter.lora_S)
            adapter.freeze_columns(min(rank, rank * int(self._done) // steps) if steps else rank)
