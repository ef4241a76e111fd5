"""Running text: cut into blocks, each of whose tokens is predicted from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zo_opt.errors import ZOError
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring.base import Batch, Encoded, Measured
from zo_opt.tasks.scoring.text import CausalText, counts
from zo_opt.tasks.tasks import Task

BLOCK = 128  # tokens of a block where max_length is not given


class LanguageModeller(CausalText):
    """Decoder-only models on blocks of ``max_length`` tokens; the text's rows are joined by line ends first.

    Blocks do not overlap, and the last one may be shorter. Where the tokenizer begins a text with a token of its own (Llama's
    ``<s>``), each block begins with it; elsewhere a block's first token is context and predicted from nothing. [choice] as
    in the usual fine-tuning scripts. So perplexity depends on ``max_length``: compare runs of the same one.
    """

    def __init__(self, model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> None:
        super().__init__(model, tokenizer, task, max_length if max_length is not None else BLOCK)
        start = self._ids("")[:1]
        self._start = start if start and start[0] == tokenizer.bos_token_id else []
        if self.max_length < 2:
            raise ZOError(f"max_length={self.max_length} leaves nothing to predict; give blocks of at least 2 tokens.")

    def encode(self, example: Example) -> Encoded:
        """The first block of an example's text."""
        return self.encode_all([example])[0]

    def encode_all(self, examples: Sequence[Example]) -> list[Encoded]:
        ids = self._ids("\n".join(text for e in examples for text in e.fields.values()), special=False)
        room = self.max_length - len(self._start)
        blocks = [self._start + ids[i : i + room] for i in range(0, len(ids), room)]
        if blocks and len(blocks[-1]) < 2:
            blocks.pop()  # one token, with nothing to predict it from
        if not blocks:
            raise ZOError("the text is too short: it has fewer than two tokens; give more of it.")
        return [Encoded([block], [block[1:]]) for block in blocks]

    def measure(self, model: Any, batch: Batch) -> Measured:
        losses: Tensor = self.token_losses(model, batch).double().sum(dim=1)
        tokens = counts(batch)
        return Measured(float(losses.sum()), int(tokens.sum()), (losses / tokens).tolist(), tokens.tolist())
