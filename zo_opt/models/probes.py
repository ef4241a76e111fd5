"""What a model does, found by running it on three tokens: names and configurations are not asked."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from zo_opt.errors import ZOError, reason_of
from zo_opt.models.quantisation import quantised_layers

TOKENS = 3


@dataclass(frozen=True)
class Probed:
    """What three tokens showed.

    Attributes:
        positions: tokens that the tables of learned positions have room for; None without such a table.
        first_position: what is to be added to positions counted from 0 before the model is given them (RoBERTa's begin after its padding id).
        sees_ahead: whether a token's hidden state depends on later tokens; of an encoder-decoder None.
    """

    positions: int | None = None
    first_position: int = 0
    sees_ahead: bool | None = None


class _Tables(TorchFunctionMode):
    """Notes the rows and the first index of each table that is read at consecutive indices, one a token."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding:
            self._note(*args[:2])
        return func(*args, **(kwargs or {}))

    def _note(self, ids: Tensor, weight: Tensor) -> None:
        read = ids.reshape(
            -1, ids.shape[-1]
        )  # one row, or one and the same a sequence; of relative positions it is a square
        if len(read) > 2 or read.shape[1] < TOKENS or not (read == read[0]).all():
            return
        first = read[0, :TOKENS].tolist()
        if first == list(range(first[0], first[0] + TOKENS)):
            self.found.append((len(weight), first[0]))


@torch.no_grad()
def probe(model: Any) -> Probed:
    """Run a model of transformers on two sequences of three tokens that differ in the last one.

    Raises:
        ZOError: it cannot run them.
    """
    if next(iter(model.parameters())).is_meta:  # sizes alone are asked for
        return Probed()
    config = model.config.get_text_config()
    padding = {getattr(model.config, "pad_token_id", None), getattr(config, "pad_token_id", None)}
    one, other = [i for i in range(4) if i not in padding][:2]
    ids = torch.tensor([[one] * TOKENS, [one] * (TOKENS - 1) + [other]], device=model.device)
    body = model.base_model
    # Of heads that multiply their whole vocabulary nothing is asked.
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    takes = inspect.signature(body.forward).parameters
    if "use_cache" in takes:
        given["use_cache"] = False
    decodes = bool(model.config.is_encoder_decoder)
    if decodes:
        given["decoder_input_ids"] = ids
    with trying(model):
        with _Tables() as tables:
            output = body(**given)
        moved = tables
        if tables.found and not decodes and "position_ids" in takes:
            with _Tables() as moved:
                body(**given, position_ids=torch.arange(TOKENS, device=ids.device).expand(2, -1))
    ahead = None
    if not decodes and (hidden := getattr(output, "last_hidden_state", None)) is not None:
        a, b = hidden[:, : TOKENS - 1].float()
        ahead = bool((a - b).abs().max() > rounding(model) * a.abs().max())
    return Probed(
        min((rows - first for rows, first in tables.found), default=None),
        tables.found[0][1] - moved.found[0][1] if tables.found and moved.found else 0,
        ahead,
    )


@contextmanager
def trying(model: Any) -> Iterator[None]:
    """Within this context a model is tried: what it raises becomes a sentence.

    Raises:
        ZOError: it raised something; lack of memory is raised as it is.
    """
    try:
        yield
    except (ZOError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        mixed = "dtype" in str(error) and str(getattr(model, "base_precision", "")).startswith("mixed")
        mend = (
            "give --precision fp32" if mixed else "load another checkpoint, or the tokenizer that belongs to this one"
        )
        raise ZOError(
            f"a {type(model).__name__} of this configuration cannot be run on this task's tokens ({reason_of(error)}); {mend}."
        ) from error


def rounding(model: Any) -> float:
    """The difference, relative to the largest number, below which two results of a model are one and the same but for rounding."""
    wide = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
    return 1e-4 if wide and next(quantised_layers(model), None) is None else 5e-2
