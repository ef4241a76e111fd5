"""Decoder-only models: padded on the left, so that what is predicted stands at the end.

Shape suffixes: B examples, C labels, S tokens, T tokens of label words or of a target, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.weights import rows
from zo_opt.errors import ZOError
from zo_opt.models.probes import trying
from zo_opt.tasks.metrics import GENERATION
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring.base import IGNORED, Batch, Encoded, Measured
from zo_opt.tasks.scoring.labels import LabelScorer, sequence_scores, word_logits
from zo_opt.tasks.scoring.texts import TextScorer, Writer, target_lengths, token_nll
from zo_opt.tasks.tasks import Task

HEAD_TOKENS = 512  # positions that go through the output head at once: all of a batch's would be its memory peak
BLOCK = 128  # tokens of a block of running text where max_length is not given


class Causal(Writer):
    """What decoder-only models have in common."""

    pad_left = True

    def __init__(self, model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> None:
        super().__init__(model, tokenizer, task, max_length)
        if self.probed.sees_ahead:
            says = getattr(model.config, "is_decoder", None)
            raise ZOError(
                f"this {type(model).__name__} lets a token see those after it (its config says is_decoder={says}), "
                "so it cannot predict them; give a causal model, an encoder with its masked-language-model head, or --head classification."
            )
        with trying(model):
            self._plain_head = head_is_linear(model)

    def prompt(self, encoded: Encoded) -> list[int]:
        first, continued = encoded.prompts[0], len(encoded.prompts) > 1 or self.task.kind == GENERATION
        return first[: len(first) - len(encoded.words[0])] if continued else first

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        inputs = super().inputs(batch)
        if "position_ids" in self.forward_arguments:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0) + self.probed.first_position
        return inputs

    def answers(self, batch: Batch) -> Tensor:
        N, S = batch["input_ids"].flatten(0, 1).shape
        own = (batch["words"] != IGNORED).sum(-1).flatten()
        if len(own) != N:  # the prompt alone
            own = own.new_zeros(N)
        return torch.arange(S, device=own.device) >= (S - 1 - own).unsqueeze(1)

    def opening(self, text: str) -> list[int]:
        """Without the end token that some tokenizers append."""
        ids = super().opening(text)
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def _hidden(self, model: Any, batch: Batch, positions: int) -> Tensor:
        """The last hidden states that the output head reads, (N, positions, H)."""
        hidden: Tensor = model.base_model(**self._arguments(batch)).last_hidden_state[:, -positions:]
        return hidden

    def _logits(self, model: Any, batch: Batch, positions: int) -> Tensor:
        """The last logits of a model that does more than multiply by its head, (N, positions, V)."""
        keep = {"logits_to_keep": positions} if "logits_to_keep" in self.forward_arguments else {}
        logits: Tensor = model(**self._arguments(batch), **keep).logits[:, -positions:]
        return logits

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        return self.inputs(batch) | ({"use_cache": False} if "use_cache" in self.forward_arguments else {})


class CausalScorer(Causal, LabelScorer):
    """Labels: the prompt alone where each has one token, else the prompt and each label's words."""

    def encode(self, example: Example) -> Encoded:
        words = self.words_of(example)
        longest = max(map(len, words))
        text, truncated = self.prompt_text(example, room=longest)
        prompt = self.prompt_ids(text, example)
        references = (list(self.task.verbalizers.values())[example.label].format(**example.fields),)
        prompts = [prompt] if longest == 1 else [prompt + w for w in words]
        return Encoded(prompts, words, example.label, truncated, references)

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        if any(len(e.prompts) > 1 for e in encoded):  # rows whose words have one token each become sequences too
            encoded = [
                e if len(e.prompts) > 1 else replace(e, prompts=[e.prompts[0] + w for w in e.words]) for e in encoded
            ]
        return super().collate(encoded)

    def scores(self, model: Any, batch: Batch) -> Tensor:
        words_BCT = batch["words"]
        alone = batch["input_ids"].shape[1] == 1
        positions = 1 if alone else words_BCT.shape[2] + 1
        head = model.get_output_embeddings()
        if alone and self._plain_head and not isinstance(head, AdaptedModule):  # an adapter acts on the whole head
            hidden_BH = self._hidden(model, batch, 1)[:, -1].float()
            return _restricted_logits(hidden_BH, head, words_BCT[:, :, 0])
        if self._plain_head:
            logits = head(self._hidden(model, batch, positions).contiguous()).float()
        else:
            logits = self._logits(model, batch, positions).float()
        if alone:
            return word_logits(logits[:, -1], words_BCT)
        logits_BCTV = logits[:, :-1].unflatten(0, batch["input_ids"].shape[:2])
        return sequence_scores(logits_BCTV, words_BCT)


class CausalText(Causal, TextScorer):
    """Targets at the end of the sequence."""

    @property
    def end(self) -> list[int]:
        """What a target ends in."""
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    def token_losses(self, model: Any, batch: Batch) -> Tensor:
        targets_BT = batch["words"][:, 0]
        positions = targets_BT.shape[1] + 1  # each token is predicted from the one before it
        if not self._plain_head:
            logits_BTV = self._logits(model, batch, positions)[:, :-1]
            return token_nll(logits_BTV.flatten(0, 1), targets_BT.flatten()).view_as(targets_BT)
        hidden_BTH = self._hidden(model, batch, positions)[:, :-1]
        head = model.get_output_embeddings()
        chunks = zip(hidden_BTH.flatten(0, 1).split(HEAD_TOKENS), targets_BT.flatten().split(HEAD_TOKENS), strict=True)
        return torch.cat([token_nll(head(hidden), targets) for hidden, targets in chunks]).view_as(targets_BT)


class CausalGenerator(CausalText):
    """A text to write: the target follows the prompt, and the tokenizer's end token the target."""

    def encode(self, example: Example) -> Encoded:
        end, whole = self.end, self.following(example.references[0]) + self.end
        # The row's text gives way to the target; where nothing of it would be left, each takes half.
        empty = self.tokens_of(self.task.filled(dict.fromkeys(example.fields, "")))
        fits = len(empty) + len(whole) < self.max_length
        target = whole if fits else whole[: max(self.max_length // 2 - len(end), 1)] + end
        text, truncated = self.prompt_text(example, room=max(len(target), self.task.max_new_tokens))
        prompts = [self.prompt_ids(text, example) + target]
        return Encoded(prompts, [target], truncated=truncated, references=example.references, shortened=target != whole)


class LanguageModeller(CausalText):
    """Running text in blocks of ``max_length`` tokens, each of whose tokens is predicted from those before it; the text's rows are
    joined by line ends first.

    Blocks do not overlap, and the last one may be shorter. Where the tokenizer begins a text with a token of its own (Llama's
    ``<s>``), each block begins with it; elsewhere a block's first token is context and predicted from nothing. [choice] as
    in the usual fine-tuning scripts. So perplexity depends on ``max_length``: compare runs of the same one.
    """

    def __init__(self, model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> None:
        super().__init__(model, tokenizer, task, max_length if max_length is not None else BLOCK)
        start = self.tokens_of("")[:1]
        self._start = start if start and start[0] == tokenizer.bos_token_id else []
        if self.max_length < 2:
            raise ZOError(f"max_length={self.max_length} leaves nothing to predict; give blocks of at least 2 tokens.")

    def encode(self, example: Example) -> Encoded:
        """The first block of an example's text."""
        return self.encode_all([example])[0]

    def encode_all(self, examples: Sequence[Example]) -> list[Encoded]:
        lines = (text for e in examples for text in self.letters(e.fields).values())
        ids = self.tokens_of("\n".join(lines), special=False)
        room = self.max_length - len(self._start)
        blocks = [self._start + ids[i : i + room] for i in range(0, len(ids), room)]
        if blocks and len(blocks[-1]) < 2:
            blocks.pop()  # one token, with nothing to predict it from
        if not blocks:
            raise ZOError("the text is too short: it has fewer than two tokens; give more of it.")
        return [Encoded([block], [block[1:]]) for block in blocks]

    def measure(self, model: Any, batch: Batch) -> Measured:
        losses: Tensor = self.token_losses(model, batch).double().sum(dim=1)
        tokens = target_lengths(batch)
        return Measured(float(losses.sum()), int(tokens.sum()), (losses / tokens).tolist(), tokens.tolist())


@torch.no_grad()
def head_is_linear(model: Any) -> bool:
    """Whether logits are the output embedding of the base's last hidden state, without a cap or scale: tried on one token."""
    head = model.get_output_embeddings()
    if not hasattr(head, "weight"):
        return False
    if head.weight.is_meta:  # sizes alone are asked for
        return True
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    logits = model(input_ids=token).logits.float()
    own = head(model.base_model(input_ids=token).last_hidden_state).float()
    return bool((logits - own).abs().max() <= 1e-4 * logits.abs().max())


def _restricted_logits(hidden_BH: Tensor, head: Any, words_BC: Tensor) -> Tensor:
    """Logits of the label words alone: (B, C). The rest of the vocabulary costs more than several layers."""
    logits_BC: Tensor = (rows(head, words_BC) * hidden_BH.unsqueeze(1)).sum(-1)
    return logits_BC if head.bias is None else logits_BC + head.bias[words_BC].float()
