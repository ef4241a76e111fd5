"""Prompts -> tensors -> one score a label.

The score of a label is the log-probability of its label words (whole sequences where they have several tokens), compared among
the labels alone; with a classification head it is the head's logit. Only label positions go through the output head.

Shape suffixes: B examples, C labels, S tokens, T tokens of label words, V vocabulary.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zo_opt.errors import ZOError
from zo_opt.training.data import Example
from zo_opt.training.tasks import Task, placeholders

Batch = dict[str, Tensor]
IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """One example as token ids.

    Attributes:
        prompts: one token list, or one a label where label words are part of the sequence.
        words: the label words' tokens, one list a label.
        label: the right label's number.
        truncated: whether text was cut to fit the context.
    """

    prompts: list[list[int]]
    words: list[list[int]]
    label: int
    truncated: bool


class Scorer(ABC):
    """How one kind of model scores labels."""

    pad_left = False

    def __init__(self, model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> None:
        self.tokenizer, self.task = tokenizer, task
        self.max_length = context_length(model, tokenizer, max_length)
        self._forward_arguments = set(inspect.signature(model.forward).parameters)
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ZOError("the tokenizer has neither a padding nor an end token; set tokenizer.pad_token.")
            tokenizer.pad_token = tokenizer.eos_token

    @abstractmethod
    def encode(self, example: Example) -> Encoded:
        """Tokenise one example; text too long for the context is cut so that template and label survive."""

    @abstractmethod
    def scores(self, model: Any, batch: Batch) -> Tensor:
        """Scores of the labels, float32, shape (B, C)."""

    def label_positions(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Rows of the flattened inputs and the position in each from which an example's label is predicted, (B,) each.

        None where this kind of model has no such single position.
        """
        return None

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """Pad to one length: input_ids and attention_mask (B, 1 or C, S), labels (B,)."""
        longest = max(len(p) for e in encoded for p in e.prompts)
        input_ids = torch.tensor(
            [[self._pad(p, longest, self.tokenizer.pad_token_id) for p in e.prompts] for e in encoded]
        )
        mask = torch.tensor([[self._pad([1] * len(p), longest, 0) for p in e.prompts] for e in encoded])
        labels = torch.tensor([e.label for e in encoded])
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    def _pad(self, ids: list[int], length: int, value: int) -> list[int]:
        filling = [value] * (length - len(ids))
        return filling + ids if self.pad_left else ids + filling

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The model's arguments, examples and labels flattened into one axis."""
        inputs = {
            "input_ids": batch["input_ids"].flatten(0, 1),
            "attention_mask": batch["attention_mask"].flatten(0, 1),
        }
        if self.pad_left and "position_ids" in self._forward_arguments:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return inputs

    def _prompt(self, example: Example, room: int, **extra: str) -> tuple[str, bool]:
        """The filled template with at least ``room`` tokens of the context to spare; its longest fields are cut if need be."""
        fields, truncated = dict(example.fields), False
        while True:
            text = self.task.template.format(**fields, **extra)
            excess = len(self._ids(text)) + room - self.max_length
            shown = [n for n in placeholders(self.task.template) if n in fields]
            longest = max(shown, key=lambda n: len(fields[n]))
            if excess <= 0:
                return text, truncated
            if not fields[longest]:
                raise ZOError(
                    f"the template alone needs {excess} tokens more than the context of {self.max_length}; shorten it or raise max_length."
                )
            fields[longest], truncated = self._cut(fields[longest], excess), True

    def _cut(self, text: str, tokens: int) -> str:
        """The text without its last tokens (at least one character shorter)."""
        keep = max(len(self._ids(text, special=False)) - tokens, 0)
        if self.tokenizer.is_fast:
            offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
                "offset_mapping"
            ]
            end = offsets[keep][0] if keep < len(offsets) else len(text) - 1
        else:
            end = len(text) * keep // (keep + tokens)
        return text[: min(end, len(text) - 1)].rstrip()

    def _ids(self, text: str, special: bool = True) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _words(self, example: Example) -> list[list[int]]:
        """Tokens of each label's words as they follow the prompt: with the space before them where the template ends in text."""
        stem = "a" + self.task.template[len(self.task.template.rstrip()) :]
        space = "" if stem != "a" else " "
        words = []
        for label, text in self.task.verbalizers.items():
            filled = text.format(**example.fields)
            before, both = self._ids(stem, special=False), self._ids(stem + space + filled, special=False)
            ids = both[len(before) :] if both[: len(before)] == before else self._ids(space + filled, special=False)
            if not ids:
                raise ZOError(
                    f"the label words {filled!r} of label {label!r} have no tokens; choose other verbalizers."
                )
            words.append(ids)
        return words


class CausalScorer(Scorer):
    """Decoder-only models: padded on the left, so that label positions are the last ones."""

    pad_left = True

    def __init__(self, model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> None:
        super().__init__(model, tokenizer, task, max_length)
        self._plain_head = _head_is_linear(model)

    def encode(self, example: Example) -> Encoded:
        words = self._words(example)
        longest = max(map(len, words))
        text, truncated = self._prompt(example, room=longest)
        prompt = self._ids(text)
        if len(prompt) > 1 and prompt[-1] == self.tokenizer.eos_token_id:
            prompt = prompt[:-1]
        if longest == 1:
            return Encoded([prompt], words, example.label, truncated)
        return Encoded([prompt + w for w in words], words, example.label, truncated)

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        multi = any(len(e.prompts) > 1 for e in encoded)
        if multi:  # a batch that mixes both kinds: single words become sequences too
            encoded = [
                e if len(e.prompts) > 1 else replace(e, prompts=[e.prompts[0] + w for w in e.words]) for e in encoded
            ]
        return super().collate(encoded) | {"words": _pad_words(encoded, left=True)}

    def scores(self, model: Any, batch: Batch) -> Tensor:
        words_BCT = batch["words"]
        alone = batch["input_ids"].shape[1] == 1
        positions = 1 if alone else words_BCT.shape[2] + 1
        inputs: dict[str, Any] = self.inputs(batch)
        if "use_cache" in self._forward_arguments:
            inputs["use_cache"] = False
        if alone and self._plain_head:
            hidden_BH = model.base_model(**inputs).last_hidden_state[:, -1].float()
            return _restricted_logits(hidden_BH, model.get_output_embeddings(), words_BCT[:, :, 0])
        if self._plain_head:
            hidden = model.base_model(**inputs).last_hidden_state[:, -positions:]
            logits = model.get_output_embeddings()(hidden.contiguous()).float()
        else:
            if "logits_to_keep" in self._forward_arguments:
                inputs["logits_to_keep"] = positions
            logits = model(**inputs).logits[:, -positions:].float()
        if alone:
            return _word_logits(logits[:, -1], words_BCT)
        logits_BCTV = logits[:, :-1].unflatten(0, batch["input_ids"].shape[:2])
        return _sequence_scores(logits_BCTV, words_BCT)

    def label_positions(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        B, labels, S = batch["input_ids"].shape
        own_words = (batch["words"][:, 0] != IGNORED).sum(1) if labels > 1 else torch.zeros_like(batch["labels"])
        return torch.arange(B, device=own_words.device) * labels, S - 1 - own_words


class MaskedScorer(Scorer):
    """Encoders with a masked-language-model head: one mask a token of the label words."""

    def __init__(self, model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> None:
        super().__init__(model, tokenizer, task, max_length)
        if tokenizer.mask_token_id is None:
            raise ZOError("the tokenizer of this masked model has no mask token; choose another model.")
        self._head = _output_head(model)

    def encode(self, example: Example) -> Encoded:
        # A mask in the text itself would be taken for the label position.
        clean = {name: text.replace(self.tokenizer.mask_token, "") for name, text in example.fields.items()}
        example = replace(example, fields=clean)
        words = self._words(example)
        longest = max(map(len, words))
        counts = [1] if longest == 1 else [len(w) for w in words]
        template_has_mask = "mask" in placeholders(self.task.template)
        prompts, cut = [], False
        for count in counts:
            masks = self.tokenizer.mask_token * count
            if template_has_mask:
                text, truncated = self._prompt(example, room=longest - count, mask=masks)
            else:
                ending = f" {masks}."
                text, truncated = self._prompt(example, room=longest - count + len(self._ids(ending, special=False)))
                text += ending
            prompts.append(self._ids(text))
            cut |= truncated
        return Encoded(prompts, words, example.label, cut)

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        if any(len(e.prompts) > 1 for e in encoded):  # rows whose words have one token each: a prompt a label as well
            encoded = [e if len(e.prompts) > 1 else replace(e, prompts=e.prompts * len(e.words)) for e in encoded]
        return super().collate(encoded) | {"words": _pad_words(encoded, left=False)}

    def scores(self, model: Any, batch: Batch) -> Tensor:
        words_BCT, ids = batch["words"], batch["input_ids"]
        inputs = self.inputs(batch)
        masked = (inputs["input_ids"] == self.tokenizer.mask_token_id).int()
        # Positions of the masks in order, those of shorter label words filled up with positions that count for nothing.
        order = masked.argsort(dim=1, descending=True, stable=True)[:, : words_BCT.shape[2]]
        if self._head is None:
            logits = model(**inputs).logits
            logits = logits.gather(1, order.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
        else:
            hidden = model.base_model(**inputs).last_hidden_state
            label_positions = hidden.gather(1, order.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
            logits = model.get_submodule(self._head)(label_positions)
        logits_BCTV = logits.float().unflatten(0, ids.shape[:2])
        if ids.shape[1] == 1:
            return _word_logits(logits_BCTV[:, 0, 0], words_BCT)
        return _sequence_scores(logits_BCTV, words_BCT)

    def label_positions(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        first = batch["input_ids"][:, 0]
        rows = torch.arange(len(first), device=first.device) * batch["input_ids"].shape[1]
        return rows, (first == self.tokenizer.mask_token_id).int().argmax(1)


class Seq2SeqScorer(Scorer):
    """Encoder-decoders: the prompt is encoded once, each label's words are decoded."""

    def encode(self, example: Example) -> Encoded:
        text, truncated = self._prompt(example, room=0)
        return Encoded([self._ids(text)], self._words(example), example.label, truncated)

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        return super().collate(encoded) | {"words": _pad_words(encoded, left=False)}

    def scores(self, model: Any, batch: Batch) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        words_BCT = batch["words"]
        B, C, T = words_BCT.shape
        inputs = self.inputs(batch)
        mask, hidden = inputs["attention_mask"], model.get_encoder()(**inputs).last_hidden_state
        start = torch.full_like(words_BCT[:, :, :1], model.config.decoder_start_token_id)
        if T == 1:
            decoder_ids = start[:, 0]
        else:
            decoder_ids = torch.cat([start, words_BCT[:, :, :-1].clamp(min=0)], dim=2).flatten(0, 1)
            hidden, mask = hidden.repeat_interleave(C, dim=0), mask.repeat_interleave(C, dim=0)
        outputs = BaseModelOutput(last_hidden_state=hidden)
        logits = model(
            encoder_outputs=outputs, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False
        ).logits.float()
        if T == 1:
            return _word_logits(logits[:, 0], words_BCT)
        return _sequence_scores(logits.unflatten(0, (B, C)), words_BCT)


class ClassificationScorer(Scorer):
    """Models with a classification head: the prompt alone, the head's logits as scores."""

    def encode(self, example: Example) -> Encoded:
        mask = {"mask": self.tokenizer.mask_token or ""} if "mask" in placeholders(self.task.template) else {}
        text, truncated = self._prompt(example, room=0, **mask)
        return Encoded([self._ids(text)], [], example.label, truncated)

    def scores(self, model: Any, batch: Batch) -> Tensor:
        logits: Tensor = model(**self.inputs(batch)).logits.float()
        return logits


def make_scorer(model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> Scorer:
    """The scorer for a model of transformers, by the kind of its head.

    Raises:
        ZOError: the model has no head that scores labels.
    """
    architecture = type(model).__name__
    kinds: dict[str, type[Scorer]] = {
        "ForSequenceClassification": ClassificationScorer,
        "ForMaskedLM": MaskedScorer,
        "ForConditionalGeneration": Seq2SeqScorer,
        "ForCausalLM": CausalScorer,
        "LMHeadModel": CausalScorer,
    }
    for ending, kind in kinds.items():
        if architecture.endswith(ending):
            return kind(model, tokenizer, task, max_length)
    raise ZOError(
        f"{architecture} has no output head that can score labels; load a causal, masked, encoder-decoder or sequence-classification model."
    )


def context_length(model: Any, tokenizer: Any, max_length: int | None) -> int:
    """The tokens a sequence may have: the least of the model's positions, the tokenizer's limit and ``max_length``."""
    config: Any = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if positions is not None and getattr(config, "model_type", "") in ("roberta", "xlm-roberta"):
        positions -= 2  # its position embeddings start at padding_idx + 1
    limits = [n for n in (positions, tokenizer.model_max_length, max_length) if n is not None]
    limit = int(min(limits, default=1 << 30))
    if limit < 1:
        raise ZOError(f"max_length={max_length} leaves no room for text; give a positive number of tokens.")
    return limit


@torch.no_grad()
def _head_is_linear(model: Any) -> bool:
    """Whether logits are the output embedding of the base's last hidden state, without a cap or scale: tried on one token."""
    head = model.get_output_embeddings()
    if not hasattr(head, "weight"):
        return False
    token = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
    logits = model(input_ids=token).logits.float()
    own = head(model.base_model(input_ids=token).last_hidden_state).float()
    return bool((logits - own).abs().max() <= 1e-4 * logits.abs().max())


def _restricted_logits(hidden_BH: Tensor, head: Any, words_BC: Tensor) -> Tensor:
    """Logits of the label words alone: (B, C). The rest of the vocabulary costs more than several layers."""
    logits_BC: Tensor = (head.weight[words_BC].float() * hidden_BH.unsqueeze(1)).sum(-1)
    return logits_BC if head.bias is None else logits_BC + head.bias[words_BC].float()


def _word_logits(logits_BV: Tensor, words_BCT: Tensor) -> Tensor:
    """Logits of label words of one token; a softmax over labels restricts the vocabulary to them."""
    return logits_BV.gather(1, words_BCT[:, :, 0])


def _sequence_scores(logits_BCTV: Tensor, words_BCT: Tensor) -> Tensor:
    """Sum over the label words' tokens of their log-probabilities; padded positions (IGNORED) count nothing."""
    log_probs = logits_BCTV.log_softmax(-1).gather(-1, words_BCT.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    scores: Tensor = (log_probs * (words_BCT != IGNORED)).sum(-1)
    return scores


def _pad_words(encoded: Sequence[Encoded], left: bool) -> Tensor:
    """Label words of all examples, shape (B, C, T), padded with IGNORED."""
    longest = max(len(w) for e in encoded for w in e.words)

    def pad(ids: list[int]) -> list[int]:
        filling = [IGNORED] * (longest - len(ids))
        return filling + ids if left else ids + filling

    return torch.tensor([[pad(w) for w in e.words] for e in encoded])


def _output_head(model: Any) -> str | None:
    """The child that turns hidden states into logits, or None where it is not one module."""
    embeddings = model.get_output_embeddings()
    base = model.base_model
    heads = [
        n for n, child in model.named_children() if child is not base and any(m is embeddings for m in child.modules())
    ]
    others = [n for n, child in model.named_children() if child is not base and n not in heads]
    return heads[0] if len(heads) == 1 and not others else None
