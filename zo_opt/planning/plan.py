"""What a method needs for a model of which nothing is known but its config: one training step, run without values.

No formula a method: the step is the training loop's own (:mod:`zo_opt.planning.dry_run`), and what is alive in it is counted. What cannot be
seen are scratch memory inside operations, the CUDA context, and what an allocator rounds up or loses between blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import nn

from zo_opt.adapters import AdapterModel, trainable_parameters
from zo_opt.optim import Backpropagation
from zo_opt.planning.dry_run import DryRun, dry_run
from zo_opt.planning.plan_step import Setting, TrainingStep, make_step
from zo_opt.queries import modes as query_modes
from zo_opt.system.layers import layer_of
from zo_opt.training.methods import WHOLE_MODEL, Method

LONG_SWEEP = (
    1 << 28
)  # trainables of which a zeroth-order step, which goes through them chunk by chunk, takes a while even without values
_META = torch.device("meta")


@dataclass(frozen=True)
class Footprint:
    """What one method needs, in bytes except ``trainable`` (a number of parameters).

    Attributes:
        trainable: parameters that are trained.
        adapter: what ``save_pretrained`` writes, frozen tensors included.
        weights: the model's tensors, those of adapters included.
        gradients: of all parameters that have one. Those that come late in the backward pass are not there at the peak.
        optimizer: what the optimizer keeps from step to step.
        activations: the rest of the peak.
        saved: of the activations, what the forward pass keeps for the backward pass.
        peak: the most bytes at once in a step after the first.
    """

    trainable: int
    adapter: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    saved: int
    peak: int


def plan_method(skeleton: nn.Module, method: Method, setting: Setting) -> Footprint:
    """What a method needs for a model.

    Args:
        skeleton: a model on the meta device, without adapters, float32 (:func:`~zo_opt.planning.skeleton.make_skeleton`); left as it is.
        method: of :func:`~zo_opt.training.methods.get_method`.
        setting: what is common to all methods.

    Raises:
        ZOError: the method does not fit the model or the setting.
        RuntimeError: the model or the method does what cannot be done without values.

    >>> from zo_opt.training.methods import get_method
    >>> from zo_opt.planning.skeleton import make_skeleton, read_config
    >>> skeleton = make_skeleton(read_config("smollm2-135m-instruct"), "lm", "")
    >>> found = plan_method(skeleton, get_method("mezo:tt-lora"), Setting(batch_size=2, length=32, precision="fp32"))
    >>> found.weights - found.adapter  # four bytes for each of 134,515,008 parameters, and sixty-four frequencies
    538060288
    """
    stacks = _equal_stacks(skeleton)
    depth = len(next(iter(stacks.values()))) if stacks else 0
    swept = method.zeroth_order and method.adapter in WHOLE_MODEL
    if not swept or depth <= 3 or sum(p.numel() for p in skeleton.parameters()) <= LONG_SWEEP:
        return _footprint(deepcopy(skeleton), method, setting)
    # All but the number of layers being equal, every figure is linear in it.
    two, three = (_footprint(_cut(skeleton, list(stacks), n), method, setting) for n in (2, 3))
    return Footprint(**{k: v + (depth - 2) * (vars(three)[k] - v) for k, v in vars(two).items()})


def _footprint(model: nn.Module, method: Method, setting: Setting) -> Footprint:
    """Two steps; the second one, when the optimizer's state is there, is looked at."""
    with dry_run() as run, _copies_as_on(setting.device):
        run.hold([*model.parameters(), *model.buffers()])
        step = make_step(model, method, setting, _META)
        adapted, weights = step.model, run.now - sum(t.nbytes for t in step.batch.values())
        if isinstance(step.optimizer, Backpropagation):
            _make_state(step.optimizer, adapted)
        else:
            step()
        state = run.now - weights - sum(t.nbytes for t in step.batch.values())
        run.forget_peak()
        found = _Watched(step, run)
        found()
    return Footprint(
        trainable=sum(p.numel() for p in trainable_parameters(adapted)),
        adapter=sum(t.nbytes for t in adapted.adapter_state().values()),
        weights=weights,
        gradients=found.gradients,
        optimizer=state,
        activations=run.peak - weights - state - found.gradients_at_peak,
        saved=found.saved,
        peak=run.peak,
    )


class _Watched:
    """One step, and what was there in it."""

    def __init__(self, step: TrainingStep, run: DryRun) -> None:
        self._step, self._run = step, run
        self.saved = self.gradients = self.gradients_at_peak = 0

    def __call__(self) -> None:
        before = self._run.now

        def forward_done() -> None:
            self.saved = self._run.now - before if torch.is_grad_enabled() else 0

        self._step.estimate(forward_done)
        gradients = [p.grad for p in self._step.model.parameters() if p.grad is not None]
        self.gradients = sum(g.nbytes for g in gradients)
        self.gradients_at_peak = sum(g.nbytes for g in gradients if self._run.there_at_peak(g))
        self._step.advance()


@contextmanager
def _copies_as_on(device: str) -> Iterator[None]:
    """As many copies of the trainables share a forward as pay on that device. (Where so many do not fit, a run takes fewer.)"""
    tokens = query_modes.BATCHED_TOKENS
    unknown = patch.object(query_modes.Evaluator, "predicted_memory", side_effect=RuntimeError)
    with patch.dict(tokens, meta=tokens[device]), unknown:
        yield


def _make_state(optimizer: Backpropagation, model: AdapterModel) -> None:
    """AdamW's first step, of which only the moments stay."""
    for parameter in trainable_parameters(model):
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.adamw.step()
    model.step(0)
    optimizer.zero_grad()
    optimizer.step_count = 1


def _equal_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of layers by path, if all layers of all lists have the same tensors as their neighbours and all lists one length; else none."""
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and layer_of(f"{name}.0") == (name, 0)
    }
    alike = all(
        len({tuple((n, p.shape) for n, p in layer.named_parameters()) for layer in list(stack)[1:]}) == 1
        for stack in stacks.values()
    )  # T5's first layer has the position biases of all others
    return stacks if alike and len({len(stack) for stack in stacks.values()}) == 1 else {}


def _cut(skeleton: nn.Module, stacks: Sequence[str], layers: int) -> nn.Module:
    model = deepcopy(skeleton)
    for name in stacks:
        parent, _, child = name.rpartition(".")
        kept = nn.ModuleList(list(model.get_submodule(name).children())[:layers])
        setattr(model.get_submodule(parent), child, kept)
    return model
