"""Decoder-only models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.weights import rows
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring.base import IGNORED, Batch, Encoded, LabelScorer, pad_words, sequence_scores, word_logits
from zo_opt.tasks.scoring.writing import Writer
from zo_opt.tasks.tasks import Task


class CausalScorer(LabelScorer, Writer):
    """Decoder-only models: padded on the left, so that label positions are the last ones."""

    pad_left = True

    def __init__(self, model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> None:
        super().__init__(model, tokenizer, task, max_length)
        self._plain_head = head_is_linear(model)

    def encode(self, example: Example) -> Encoded:
        words = self._words(example)
        longest = max(map(len, words))
        text, truncated = self._prompt(example, room=longest)
        prompt = self._ids(text)
        if len(prompt) > 1 and prompt[-1] == self.tokenizer.eos_token_id:
            prompt = prompt[:-1]
        references = (list(self.task.verbalizers.values())[example.label].format(**example.fields),)
        prompts = [prompt] if longest == 1 else [prompt + w for w in words]
        return Encoded(prompts, words, example.label, truncated, references)

    def prompt(self, encoded: Encoded) -> list[int]:
        alone = len(encoded.prompts) == 1
        return encoded.prompts[0] if alone else encoded.prompts[0][: -len(encoded.words[0])]

    def most_tokens(self, encoded: Sequence[Encoded]) -> int:
        return max(len(words) for e in encoded for words in e.words)

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        multi = any(len(e.prompts) > 1 for e in encoded)
        if multi:  # a batch that mixes both kinds: single words become sequences too
            encoded = [
                e if len(e.prompts) > 1 else replace(e, prompts=[e.prompts[0] + w for w in e.words]) for e in encoded
            ]
        return super().collate(encoded) | {"words": pad_words(encoded, left=True)}

    def scores(self, model: Any, batch: Batch) -> Tensor:
        words_BCT = batch["words"]
        alone = batch["input_ids"].shape[1] == 1
        positions = 1 if alone else words_BCT.shape[2] + 1
        inputs: dict[str, Any] = self.inputs(batch)
        if "use_cache" in self._forward_arguments:
            inputs["use_cache"] = False
        head = model.get_output_embeddings()
        if alone and self._plain_head and not isinstance(head, AdaptedModule):  # an adapter acts on the whole head
            hidden_BH = model.base_model(**inputs).last_hidden_state[:, -1].float()
            return _restricted_logits(hidden_BH, head, words_BCT[:, :, 0])
        if self._plain_head:
            hidden = model.base_model(**inputs).last_hidden_state[:, -positions:]
            logits = head(hidden.contiguous()).float()
        else:
            if "logits_to_keep" in self._forward_arguments:
                inputs["logits_to_keep"] = positions
            logits = model(**inputs).logits[:, -positions:].float()
        if alone:
            return word_logits(logits[:, -1], words_BCT)
        logits_BCTV = logits[:, :-1].unflatten(0, batch["input_ids"].shape[:2])
        return sequence_scores(logits_BCTV, words_BCT)

    def label_positions(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        B, labels, S = batch["input_ids"].shape
        own_words = (batch["words"][:, 0] != IGNORED).sum(1) if labels > 1 else torch.zeros_like(batch["labels"])
        return torch.arange(B, device=own_words.device) * labels, S - 1 - own_words


@torch.no_grad()
def head_is_linear(model: Any) -> bool:
    """Whether logits are the output embedding of the base's last hidden state, without a cap or scale: tried on one token."""
    head = model.get_output_embeddings()
    if not hasattr(head, "weight"):
        return False
    if head.weight.is_meta:
        return True  # of a model without values there is nothing to try
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    logits = model(input_ids=token).logits.float()
    own = head(model.base_model(input_ids=token).last_hidden_state).float()
    return bool((logits - own).abs().max() <= 1e-4 * logits.abs().max())


def _restricted_logits(hidden_BH: Tensor, head: Any, words_BC: Tensor) -> Tensor:
    """Logits of the label words alone: (B, C). The rest of the vocabulary costs more than several layers."""
    logits_BC: Tensor = (rows(head, words_BC) * hidden_BH.unsqueeze(1)).sum(-1)
    return logits_BC if head.bias is None else logits_BC + head.bias[words_BC].float()
