"""A frozen model with adapters in it: inject, list the trainables, save, load, remove."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from zo_opt.adapters import storage, table
from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.answers import AnswerForward
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.encoded import EncoderForward
from zo_opt.adapters.kept import KeptForward
from zo_opt.adapters.made_for import differences
from zo_opt.adapters.merged_trains import MergedTrains
from zo_opt.adapters.modules import merged_into, modules_named, put, replaced_targets, train_whole
from zo_opt.adapters.peft_read import from_peft
from zo_opt.adapters.positions import Positions, answers_of, backbone_of, kind_of
from zo_opt.adapters.replacement import tensorize
from zo_opt.adapters.schedule import Watch
from zo_opt.adapters.shapes import adapter_shapes, check_shapes
from zo_opt.adapters.sites import ActivationSites
from zo_opt.adapters.weights import shared_parameters, untie
from zo_opt.errors import ZOError


class AdapterModel(nn.Module):
    """A model whose targets are wrapped by adapters. Calls and unknown attributes go to the wrapped model.

    Attributes:
        adapted: paths of the adapted modules.
        trained: names of all parameters that are trained, those included whose turn comes later (LISA) or is over (AFLoRA).
        schedule: what changes as training goes on, or None; advanced by :meth:`step`.
        positions: where adapters act; None: everywhere.
        answers, encoder: the body's forward and the encoder's, where the frozen part of them is kept.
    """

    def __init__(self, wrapped: nn.Module, config: AdapterConfig, adapted: Sequence[str]) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.adapter_config = config
        self.adapted = list(adapted)
        self.trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
        self._trains = MergedTrains(wrapped)
        self.schedule = config.schedule(self)
        self._watch = Watch(self) if self.schedule is not None else None
        self.positions: Positions | None = None
        self.answers: AnswerForward | None = None
        self.encoder: EncoderForward | None = None
        if config.positions == "answer":
            self.positions = Positions(kind_of(wrapped), config.answer_token)
            for module in self.adapted_modules().values():
                module.positions = self.positions
            self._keep(self.positions)

    def _keep(self, positions: Positions) -> None:
        """Put forwards that keep what is frozen in the place of the body's (of an encoder-decoder: the decoder's) and the encoder's."""
        decodes = positions.kind == "encoder-decoder"
        if not (decodes and positions.everywhere):
            self.answers = AnswerForward(
                self.wrapped, backbone_of(self.wrapped, positions.kind), positions, self.adapted
            )
        if decodes:
            self.encoder = EncoderForward(self.wrapped, self.adapted)

    def prompt_forward(self) -> KeptForward:
        """What keeps the frozen part of a forward: prompts, the layers below adapters that act everywhere, an encoder."""
        if self.encoder is None and self.answers is None:
            self._keep(Positions(kind_of(self.wrapped), everywhere=True))
        found = self.encoder or self.answers
        assert found is not None
        return found

    def activation_sites(self) -> ActivationSites:
        """The adapters' inner activations, for estimators that query those.

        Raises:
            ZOError: the adapters act everywhere or have none, or something else is trained.
        """
        return ActivationSites(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's outputs; a loss among them has the method's penalty added, as in PEFT."""
        with self._answering(kwargs):
            output = self.wrapped(*args, **kwargs)
        if getattr(output, "loss", None) is not None and (penalty := self.penalty()) is not None:
            output.loss = output.loss + penalty
        return output

    def answering(self, answers_NS: torch.Tensor | None) -> AbstractContextManager[None]:
        """Within this context the sequences of a forward have these answer positions, (N, S) bool; of no effect with positions="all"."""
        return nullcontext() if self.positions is None else self.positions.given(answers_NS)

    def _answering(self, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """The answer positions that labels of tokens ask for, where nobody said any."""
        labels, ids = kwargs.get("labels"), kwargs.get("input_ids")
        if self.positions is None or labels is None or ids is None or labels.shape != ids.shape:
            return nullcontext()
        if self.positions.kind == "encoder-decoder" or self.positions.given_NS is not None:
            return nullcontext()
        return self.positions.given(answers_of(labels, self.positions.kind))

    def step(self, global_step: int) -> None:
        """Advance what changes as training goes on; of no effect for methods without a schedule.

        Call it once after every ``optimizer.step()``, before ``zero_grad()``. Training that goes on without it is stopped with an
        error at the optimizer's second step.

        Args:
            global_step: the number of the optimizer step just made, from 0.

        Raises:
            ZOError: a negative number; or what the schedule needs is not there (gradients, ``total_steps``).
        """
        if type(global_step) is not int or global_step < 0:
            raise ZOError(f"global_step={global_step!r} is not possible; give the optimizer step's number, from 0.")
        if self.schedule is not None:
            with torch.no_grad():
                self.schedule.step(global_step)
        if self._watch is not None:
            self._watch.advanced()

    def penalty(self) -> torch.Tensor | None:
        """What the method adds to the loss (AdaLoRA's orthogonality), a scalar with gradient; None for most methods."""
        return self.adapter_config.penalty(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """The trainables by their path in the wrapped model."""
        trained = set(self.trained)
        return {n: p.detach() for n, p in self.wrapped.named_parameters() if n in trained}

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Everything the frozen model does not have: the adapters' tensors, frozen ones included, and modules_to_save."""
        own = {id(p) for adapted in self.adapted_modules().values() for p in adapted.adapter.parameters()}
        trained = set(self.trained)
        return {n: p.detach() for n, p in self.wrapped.named_parameters() if n in trained or id(p) in own}

    def schedule_state(self) -> dict[str, torch.Tensor]:
        """What the schedule's later steps depend on besides ``adapter_state``; empty for methods without one."""
        return self.schedule.state() if self.schedule is not None else {}

    def save_pretrained(self, directory: str | Path, **_: Any) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` (the adapters alone, to the bit).

        LoRA, LoRA-FA, DoRA, AdaLoRA and VeRA in PEFT's format, which ``peft.PeftModel.from_pretrained`` loads with the same logits, all else in
        zo_opt's own. Of a method that changes as training goes on also ``adapter_schedule.safetensors``, with which training continues to
        the same bits. A base model that lies in a directory is named by the last part of its path.
        """
        storage.save(self, Path(directory))

    def export_peft(self, directory: str | Path) -> None:
        """Write the adapters in PEFT's format: a method that PEFT lacks as an ordinary LoRA, if its update is a pair of factors.

        Raises:
            ZOError: PEFT has no such adapter.
        """
        storage.save(self, Path(directory), export=True)

    def merge_and_unload(self) -> nn.Module:
        """Fold the adapters into the weights and return the plain model, which computes the same up to the rounding of its dtype.

        A weight that layers share (an embedding and the output head) parts where an adapter changed one of them; the model's
        config then says that nothing is tied, so that a saved model loads as it is.

        Raises:
            ZOError: the adapters have a nonlinearity between their factors, so that no weight equals them; nothing was changed.
        """
        adapted = self.adapted_modules()
        self.adapter_config.check_mergeable()
        # All can be read before the first one is written.
        parting = shared_parameters(self.wrapped) & {id(merged_into(module)) for module in adapted.values()}
        for module in adapted.values():
            module.merge()
        plain = self.unload()
        if parting:
            untie(plain)
        return plain

    def unload(self) -> nn.Module:
        """Remove the adapters and return the model, to the bit; what was trained in place or by ``modules_to_save`` stays as it is."""
        self._trains.remove()
        for forward in (self.answers, self.encoder):
            if forward is not None:
                forward.remove()
        self.answers = self.encoder = self.positions = None
        self.schedule = None
        if self._watch is not None:
            self._watch.end()
        for name, module in self.adapted_modules().items():
            put(self.wrapped, name, module.base_layer)
        left = dict(self.wrapped.named_parameters())
        self.adapted, self.trained = [], [name for name in self.trained if name in left]
        return self.wrapped

    def adapted_modules(self) -> dict[str, AdaptedModule]:
        """Path in the wrapped model -> the adapted module that stands there."""
        found = ((name, self.wrapped.get_submodule(name)) for name in self.adapted)
        return {name: module for name, module in found if isinstance(module, AdaptedModule)}

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that have made steps on this model's trainables; known for methods with a schedule alone."""
        return list(self._watch.optimizers) if self._watch is not None else []

    def adapter_table(self, *, each: bool = False) -> str:
        """Where adapters sit and what they cost, as text: a line a kind of module, or one an adapter (``each``)."""
        return table.adapter_table(self.wrapped, self.adapted_modules(), trainable_parameters(self), each=each)

    def extra_repr(self) -> str:
        return self.trainable_summary()

    def trainable_summary(self) -> str:
        """One line: how many parameters are trained, of how many, in how many adapters."""
        trained = sum(p.numel() for p in trainable_parameters(self))
        total = sum(p.numel() for p in self.parameters())
        where = {0: "the model itself", 1: "1 adapter"}.get(len(self.adapted), f"{len(self.adapted)} adapters")
        share = 100 * trained / total
        shown = f"{share:.0f}" if share >= 10 else f"{share:.2g}"
        return f"{trained:,} trainable parameters of {total:,} ({shown} %) in {where}"


def get_adapter_model(model: nn.Module, config: AdapterConfig) -> AdapterModel:
    """Freeze a model and put adapters into it. The model is changed in place; the outputs are not.

    Args:
        model: any module; for architectures of transformers the targets have defaults.
        config: the method and where it goes, such as ``TTConfig(rank=5, bottleneck=64)``.

    Returns:
        The model with adapters. Trainables are float32 whatever the model's dtype.

    Raises:
        ZOError: nothing matches, no default for this architecture, or the model has adapters already.
    """
    return _inject(model, config, start=True)


def load_adapter_model(model: nn.Module, directory: str | Path) -> AdapterModel:
    """Put a saved adapter into its base model, to the bit.

    Args:
        model: the base model.
        directory: written by ``save_pretrained``; or by PEFT, with LoRA, DoRA, AdaLoRA or VeRA in it (numbers become float32).

    Warns:
        UserWarning: the adapter was trained on a base in another precision, or on another base.

    Raises:
        ZOError: files missing or damaged, or made for a model of other shapes; or a PEFT option that is not known here.
    """
    _check_bare(model)
    what, saved = f"the adapter in {directory}", storage.load(Path(directory))
    config = saved.config
    if config is None:
        config, tensors = from_peft(model, saved.values, saved.tensors)
        saved = storage.Saved({}, config, tensors, {}, saved.base)
    check_shapes(model, config, saved.state(adapter_shapes(model, config)), what)
    adapted = _inject(model, config, start=False)
    try:
        restore_saved(adapted, saved, what)
    except ZOError:
        adapted.unload()
        raise
    for sentence in differences(saved.base, adapted):
        warnings.warn(sentence, stacklevel=2)
    return adapted


def restore_saved(model: AdapterModel, saved: storage.Saved, what: str) -> None:
    """Put a saved adapter and its schedule's state into a model that has the adapter.

    Raises:
        ZOError: it does not fit the model; the sentence begins with ``what``.
    """
    state = model.adapter_state()
    storage.restore(state, saved.state({name: tensor.shape for name, tensor in state.items()}), what)
    if saved.schedule:
        restore_schedule(model, saved.schedule, what)


def restore_schedule(model: AdapterModel, tensors: dict[str, torch.Tensor], what: str) -> None:
    """Put back what ``schedule_state`` gave.

    Raises:
        ZOError: it does not fit the method or the model.
    """
    storage.restore(model.schedule_state(), tensors, what)
    if model.schedule is not None:
        model.schedule.restored()


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, each once: those that require grad, and those whose turn comes later (LISA)."""
    later = {id(m.wrapped.get_parameter(n)) for m in model.modules() if isinstance(m, AdapterModel) for n in m.trained}
    return [p for p in model.parameters() if p.requires_grad or id(p) in later]


def _inject(model: nn.Module, config: AdapterConfig, *, start: bool) -> AdapterModel:
    """Put adapters in; ``start``: set those that begin as a decomposition of the weight, which a saved adapter overwrites."""
    _check_bare(model)
    targets = config.find_targets(model)
    if start:
        config = config.resolve(targets)
    replaced = replaced_targets(model, config, targets)
    saved = [module for name in config.modules_to_save or () for module in modules_named(model, name)]
    trained = {id(m) for module in saved for m in module.modules()}
    for target in targets:
        if id(target.module) in trained:
            raise ZOError(
                f"module {target.name!r} is in target_modules and within modules_to_save; leave it out of one."
            )
    config.check_ranks([t.name for t in (*targets, *replaced)])
    in_place = config.in_place(model)
    adapted = config.wrap_all(targets)
    adapted |= {t.name: tensorize(t, config.rank_of(t.name, config.tensorize_rank)) for t in replaced}
    if start:
        for module in adapted.values():
            module.start_from_weight()
    # Nothing has been changed so far, and nothing goes wrong from here on.
    model.requires_grad_(False)
    if in_place:
        model.float()
    train_whole(model, saved)
    for target in replaced:
        target.module.requires_grad_(False)  # it may be within a module that is trained whole
    for name in in_place:
        model.get_parameter(name).requires_grad_(True)
    for name, module in adapted.items():
        put(model, name, module)
    return AdapterModel(model, config, list(adapted))


def _check_bare(model: nn.Module) -> None:
    if isinstance(model, AdapterModel) or any(isinstance(m, AdaptedModule) for m in model.modules()):
        raise ZOError("this model has adapters already; call unload() on it before adding others.")
