"""Answers of an encoder beside their rows: the row as the frozen base sees it, and copies of its answer that the adapters act on.

In an encoder every token sees every other, so that a change at the answer would go on to the whole row. Here, as in a causal model, the
prompt goes through the frozen base: a row's tokens see each other as they do there, and a copy of the answer's tokens sees the prompt and
itself. Without adapters a copy is what the base makes of the answer. A query is one copy more, and not one row more.

Shape suffixes: N rows, S tokens, T answer tokens, C copies, H hidden, K keys (S + C T).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.adapters.layout import Layout
from zo_opt.prompts.states import scatter
from zo_opt.system.vmap import is_batched


class Beside:
    """One forward's rows and copies.

    Args:
        answers_NS: the answer positions.
        real_NS: 0 where there is no token.
        copies: C.
        dtype: of the hidden states.
        spoiled: all copies but the first get something else.

    Attributes:
        layout: what layers see.
        acting_NK: where adapters act.
    """

    def __init__(
        self, answers_NS: Tensor, real_NS: Tensor, copies: int, dtype: torch.dtype, *, spoiled: bool = False
    ) -> None:
        (rows, tokens), self._copies, self._dtype, self._spoiled = answers_NS.shape, copies, dtype, spoiled
        self.places_NT, valid_NT = places_of(answers_NS)
        self._real_NS, self._prompt_NS = real_NS != 0, (real_NS != 0) & ~answers_NS
        self.layout = Layout("tokens", copies, rows, valid_NT=valid_NT, before=tokens, others_NS=self._real_NS)
        own_NC = valid_NT.repeat(1, copies)
        self.acting_NK = torch.cat([torch.zeros_like(answers_NS), own_NC], 1)

    def mask(self) -> Tensor:
        """What each token sees, added to scores: (N, 1, K, K)."""
        tokens = self._real_NS.shape[1]
        beside = self.acting_NK.shape[1] - tokens
        each = torch.ones(beside // self._copies, beside // self._copies, device=self._real_NS.device)
        own = torch.block_diag(*[each] * self._copies).bool() & self.acting_NK[:, None, tokens:]
        of_row = F.pad(self._real_NS[:, None].expand(-1, tokens, -1), (0, beside))
        of_copies = torch.cat([self._prompt_NS[:, None].expand(-1, beside, -1), own], 2)
        seen = torch.cat([of_row, of_copies], 1)
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device)
        return mask.masked_fill(~seen, torch.finfo(self._dtype).min)[:, None]

    def within(self, stack: ExitStack, layers: Sequence[nn.Module], ended: Callable[[Tensor], Tensor]) -> None:
        """Within the stack of contexts these layers see rows and copies; before them and after them there are rows alone.

        Args:
            stack: which ends it.
            layers: in their order.
            ended: takes what the copies end as, (C, N, T, H), and gives what is to stand there.
        """
        stack.callback(layers[0].register_forward_pre_hook(self._enter, with_kwargs=True).remove)

        def rows_of(hidden_NKH: Tensor) -> Tensor:
            answers_CNTH = ended(self.layout.take(hidden_NKH))
            return scatter(hidden_NKH[:, : self.layout.before], self.places_NT, answers_CNTH[0])

        stack.callback(layers[-1].register_forward_hook(lambda _m, _a, output: changed(output, rows_of)).remove)

    def _enter(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden_NSH = args[0] if args else kwargs["hidden_states"]
        answer_NTH = Layout("rows", 1, len(hidden_NSH), self.places_NT).take(hidden_NSH)[0]
        others = [answer_NTH.flip(-1) if self._spoiled else answer_NTH] * (self._copies - 1)
        hidden_NKH = torch.cat([hidden_NSH, answer_NTH, *others], 1)
        return ((hidden_NKH, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden_NKH})


def changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a layer gives, with its hidden states changed: they alone, or the first of a tuple."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def places_of(answers_NS: Tensor) -> tuple[Tensor, Tensor]:
    """The answer positions of each row, (N, T), padded with S; and which are real. T is one at least."""
    counts_N, tokens = answers_NS.sum(1), answers_NS.shape[1]
    most = tokens if is_batched(answers_NS) else max(int(counts_N.max()), 1)
    places = torch.arange(tokens, device=answers_NS.device).expand_as(answers_NS)
    places_NT = torch.where(answers_NS, places, tokens).sort(1).values[:, :most]
    return places_NT, places_NT < tokens
