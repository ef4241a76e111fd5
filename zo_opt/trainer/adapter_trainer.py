"""What a Trainer must know of an :class:`~zo_opt.adapters.AdapterModel`, which is no ``PreTrainedModel``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.utils.generic import can_return_loss, find_labels

from zo_opt.adapters import AdapterModel, storage
from zo_opt.adapters.model import restore_saved
from zo_opt.errors import ZOError
from zo_opt.trainer.callback import AdapterScheduleCallback

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class AdapterTrainerMixin(_Base):
    """Looks through the adapters at the model's signature; saves the adapters alone, and resumes from them."""

    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.model, AdapterModel):
            return
        wrapped = self.model.wrapped
        if self.args.label_names is None:
            self.label_names = find_labels(type(wrapped))
        self.can_return_loss = can_return_loss(type(wrapped))
        if not hasattr(wrapped, "accepts_loss_kwargs"):
            kinds = [p.kind for p in inspect.signature(wrapped.forward).parameters.values()]
            self.model_accepts_loss_kwargs = inspect.Parameter.VAR_KEYWORD in kinds
        if not any(isinstance(c, AdapterScheduleCallback) for c in self.callback_handler.callbacks):
            self.add_callback(AdapterScheduleCallback())

    def _set_signature_columns_if_needed(self) -> None:
        model = self.model
        self.model = model.wrapped if isinstance(model, AdapterModel) else model
        try:
            super()._set_signature_columns_if_needed()
        finally:
            self.model = model

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not isinstance(self.model, AdapterModel):
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir or ".")
        self.model.save_pretrained(directory)
        processing_class: Any = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing_class is not None:
            processing_class.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not isinstance(self.model, AdapterModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved, what = storage.load(Path(resume_from_checkpoint)), f"the checkpoint {resume_from_checkpoint}"
        kind, ours = saved.config.adapter_type if saved.config else "peft", self.model.adapter_config.adapter_type
        if kind != ours:
            raise ZOError(
                f"{what} holds a {kind!r} adapter and the model a {ours!r} one; give the model the adapter that the run was started with."
            )
        restore_saved(self.model, saved, what)

    def _load_best_model(self) -> None:
        if isinstance(self.model, AdapterModel):
            assert self.state.best_model_checkpoint is not None
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
