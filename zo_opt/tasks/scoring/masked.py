"""Encoders with a masked-language-model head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from zo_opt.errors import ZOError
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring.base import Batch, Encoded
from zo_opt.tasks.scoring.labels import LabelScorer, sequence_scores, word_logits
from zo_opt.tasks.scoring.spelling import preceding
from zo_opt.tasks.tasks import Task, placeholders


class MaskedScorer(LabelScorer):
    """Encoders with a masked-language-model head: one mask a token of the label words."""

    reads_mask = True

    def __init__(self, model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> None:
        super().__init__(model, tokenizer, task, max_length)
        decodes = getattr(model.config, "is_decoder", None)
        # An encoder may look ahead by less than the mixed form's rounding: its configuration has the last word.
        if self.probed.sees_ahead is False and decodes is not False:
            raise ZOError(
                f"this {type(model).__name__} lets a token see those before it alone (its config says is_decoder={decodes}), and a mask would "
                "miss the rest; set is_decoder to false in its config.json."
            )
        if tokenizer.mask_token_id is None:
            raise ZOError("the tokenizer of this masked model has no mask token; choose another model.")
        if tokenizer.mask_token in task.template:
            raise ZOError(
                f"the template {task.template!r} holds {tokenizer.mask_token}, the token that is predicted; write {{mask}} in its place."
            )

    def following(self, text: str) -> list[int]:
        """Tokens of a text in the mask's place."""
        before, _ = preceding(self.task.template, "mask")
        before = before if "mask" in placeholders(self.task.template) else before + " "
        letters = before.rstrip(" ")  # many mask tokens take up the space before them
        return self.after(letters, before[len(letters) :][:1], text)

    def encode(self, example: Example) -> Encoded:
        words = self.words_of(example)
        longest = max(map(len, words))
        counts = [1] if longest == 1 else [len(w) for w in words]
        template_has_mask = "mask" in placeholders(self.task.template)
        prompts, cut = [], False
        for count in counts:
            masks = self.tokenizer.mask_token * count
            if template_has_mask:
                text, truncated = self.prompt_text(example, room=longest - count, mask=masks)
            else:
                ending = f" {masks}."
                text, truncated = self.prompt_text(
                    example, room=longest - count + len(self.tokens_of(ending, special=False))
                )
                text += ending
            prompts.append(self.prompt_ids(text, example))
            cut |= truncated
        return Encoded(prompts, words, example.label, cut)

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        if any(len(e.prompts) > 1 for e in encoded):  # rows whose words have one token each: a prompt a label as well
            encoded = [e if len(e.prompts) > 1 else replace(e, prompts=e.prompts * len(e.words)) for e in encoded]
        return super().collate(encoded)

    def scores(self, model: Any, batch: Batch) -> Tensor:
        words_BCT, ids = batch["words"], batch["input_ids"]
        inputs = self.inputs(batch)
        masked = (inputs["input_ids"] == self.tokenizer.mask_token_id).int()
        # Positions of the masks in order, those of shorter label words filled up with positions that count for nothing.
        order = masked.argsort(dim=1, descending=True, stable=True)[:, : words_BCT.shape[2]]
        with _hidden_states_at(model.base_model, order):
            logits_BCTV = model(**inputs).logits.float().unflatten(0, ids.shape[:2])
        if ids.shape[1] == 1:
            return word_logits(logits_BCTV[:, 0, 0], words_BCT)
        return sequence_scores(logits_BCTV, words_BCT)

    def answers(self, batch: Batch) -> Tensor:
        masks: Tensor = batch["input_ids"].flatten(0, 1) == self.tokenizer.mask_token_id
        return masks


@contextmanager
def _hidden_states_at(base: Any, positions_NT: Tensor) -> Iterator[None]:
    """Within this context the base model returns its hidden states at these positions alone: heads work position by position."""

    def gather(_module: Any, _args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden.gather(1, positions_NT.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return output

    handle = base.register_forward_hook(gather)
    try:
        yield
    finally:
        handle.remove()
