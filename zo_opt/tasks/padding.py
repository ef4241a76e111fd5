"""Whether a row's scores are its own: it is tried alone and beside a longer one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zo_opt.errors import ZOError
from zo_opt.models.probes import rounding, trying
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring import Encoded, LabelScorer, Scorer

LONGER = 8  # tokens by which the other row is longer
TRIED = 8  # rows of which the shortest is tried


def shape_of(encoded: Encoded) -> tuple[list[int], list[int]]:
    """The lengths of a row's sequences: rows of one shape are batched without padding."""
    return [len(p) for p in encoded.prompts], [len(w) for w in encoded.words]


def try_padding(model: Any, scorer: Scorer, examples: Sequence[Example]) -> None:
    """Have the scorer pad on the side where it changes nothing; where both do, rows of one shape alone share a batch. Three rows are run.

    Recurrent models read padding as text, others count positions from it or mix all tokens: which, nobody lists.

    Raises:
        ZOError: the model cannot run a row of this task.
    """
    encoded = scorer.encode_all(examples[:TRIED])
    scorer.check_tokens(encoded)
    row = min(encoded, key=shape_of)
    longest = max(map(len, row.prompts))
    more = min(LONGER, scorer.max_length - longest)
    if more < 1 or next(model.parameters()).is_meta:
        return
    alone = _scores(model, scorer, [row])
    sides = (scorer.pad_left, not scorer.pad_left) if scorer.either_side else (scorer.pad_left,)
    for side in sides:
        scorer.pad_left = side
        beside = _scores(model, scorer, [row, replace(row, prompts=[_longer(p, more, scorer) for p in row.prompts])])
        if (alone - beside).abs().max() <= rounding(model) * alone.abs().max().clamp(min=1e-3):
            return
    scorer.pad_left, scorer.padding_is_harmless = sides[0], False
    scorer.notes.append(
        f"what a {type(model).__name__} makes of a row changes when the row is padded; rows of one length alone share a batch."
    )


def check_shapes(model: Any, scorer: Scorer, encoded: Sequence[Encoded], batch_size: int) -> None:
    """Whether rows can be drawn into batches of this size.

    Raises:
        ZOError: the model cannot bear padding, and the rows would need it.
    """
    if scorer.padding_is_harmless:
        return
    for number, e in enumerate(encoded, start=1):
        if len({len(p) for p in e.prompts}) > 1:
            raise ZOError(
                f"what a {type(model).__name__} makes of a row changes when the row is padded, and the label words of row {number} have "
                "different numbers of tokens; give label words of one length (--verbalizers)."
            )
    if batch_size > 1 and len({str(shape_of(e)) for e in encoded}) > 1:
        raise ZOError(
            f"what a {type(model).__name__} makes of a row changes when the row is padded, and these rows have different lengths; give "
            "--batch_size 1."
        )


def _longer(prompt: list[int], more: int, scorer: Scorer) -> list[int]:
    """The prompt with more tokens in front, none of which a head looks for."""
    looked_for = {scorer.tokenizer.eos_token_id, scorer.tokenizer.mask_token_id, scorer.pad_id}
    filler = next((token for token in prompt if token not in looked_for), prompt[0])
    return [filler] * more + prompt


@torch.no_grad()
def _scores(model: Any, scorer: Scorer, encoded: Sequence[Encoded]) -> Tensor:
    batch = {name: tensor.to(model.device) for name, tensor in scorer.collate(encoded).items()}
    with trying(model):
        found = scorer.scores(model, batch) if isinstance(scorer, LabelScorer) else scorer.losses(model, batch)
    return found[0].float().cpu()
