"""Where in a sequence adapters act: everywhere, or from the answer on.

With ``positions="answer"`` an adapter acts at the last prompt token, whose output predicts the answer's first token, and at the answer's
tokens. The prompt before it goes through the frozen base, so that its keys and values are the same in every step and every query
(:mod:`zo_opt.adapters.answers`). Three kinds of model differ in what the answer positions are:

- causal: from the last token before the first label on; without labels the last token; in generation all that is written;
- encoder-decoder: all positions of the decoder, none of the encoder;
- encoder: the masks' positions, or the first token where the model has no mask (a classification head reads that one); a copy of the answer
  beside the row where the model takes one (:mod:`zo_opt.adapters.beside`), else within the row.

Shape suffixes: N sequences, S tokens, T answer tokens, C copies, I features.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zo_opt.adapters.targets import Target
from zo_opt.errors import ZOError
from zo_opt.system.replaced import replaced

Kind = Literal["causal", "encoder-decoder", "encoder"]
IGNORED = -100  # in labels


@dataclass
class Positions:
    """Where the adapters of one model act in the forward that runs; all its adapted modules look here.

    Attributes:
        kind: of the model.
        answer_token: encoders: the mask token's id; None: the answer is read at the first token.
        everywhere: adapters act at every token, and nothing is asked here.
        asleep: no adapter acts at all.
        mask_NS: where they act; None: everywhere.
        given_NS: the answer positions of the sequences to come, if somebody knows them.
    """

    kind: Kind
    answer_token: int | None = None
    everywhere: bool = False
    asleep: bool = False
    mask_NS: Tensor | None = None
    given_NS: Tensor | None = None

    def at(self, x: Tensor) -> Tensor | None:
        """The mask over x (..., I), ready to choose by: (..., 1); None: everywhere.

        Raises:
            ZOError: x has other tokens than the sequences.
        """
        if self.mask_NS is None:
            return None
        tokens = x.shape[:-1] if x.is_floating_point() else x.shape
        if tokens.numel() != self.mask_NS.numel():
            raise ZOError(
                f"an adapted layer sees {tokens.numel()} tokens where the model was given {self.mask_NS.numel()}; adapt other "
                "target_modules, or use positions='all'."
            )
        return self.mask_NS.reshape(*tokens, 1)

    def answers(self, ids_NS: Tensor, attention_NS: Tensor | None) -> Tensor:
        """The answer positions of these sequences, (N, S) bool: those that were given, else what the tokens say."""
        if self.given_NS is not None and self.given_NS.shape == ids_NS.shape:
            return self.given_NS
        mask_NS = torch.zeros_like(ids_NS, dtype=torch.bool)
        if self.kind == "encoder":
            if self.answer_token is not None:
                return ids_NS == self.answer_token
            mask_NS[:, 0] = True
            return mask_NS
        places = torch.arange(ids_NS.shape[1], device=ids_NS.device)
        real_NS = torch.ones_like(ids_NS) if attention_NS is None else attention_NS
        last_N = (places * (real_NS != 0)).amax(1)
        return mask_NS.scatter(1, last_N.unsqueeze(1), True)

    def sleep(self) -> AbstractContextManager[None]:
        """Within this context the model is its frozen base."""
        return replaced(self, asleep=True)

    def masked(self, mask_NS: Tensor | None) -> AbstractContextManager[None]:
        """Within this context adapters act where the mask says."""
        return replaced(self, mask_NS=mask_NS)

    def given(self, answers_NS: Tensor | None) -> AbstractContextManager[None]:
        """Within this context sequences have these answer positions; None changes nothing."""
        return replaced(self, given_NS=self.given_NS if answers_NS is None else answers_NS)


def answers_of(labels_NS: Tensor, kind: Kind) -> Tensor:
    """The answer positions that labels of tokens ask for, (N, S) bool. Causal: each token is predicted from the one before it.

    >>> answers_of(torch.tensor([[-100, -100, 5, 7, -100]]), "causal").int().tolist()
    [[0, 1, 1, 1, 1]]
    """
    asked_NS = labels_NS != IGNORED
    if kind == "encoder":
        return asked_NS
    before_NS = torch.cat([asked_NS[:, 1:], torch.zeros_like(asked_NS[:, :1])], dim=1)
    return before_NS.cumsum(1) > 0  # from the first one on: later states see what it writes


def kind_of(model: Any) -> Kind:
    """Which kind of model it is, by its configuration and its way of attending."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    writes = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return "causal" if writes or _looks_back(config) else "encoder"


def _looks_back(config: Any) -> bool:
    """Whether an architecture is a decoder whatever its head: transformers can build a causal model of it, and no masked one."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = getattr(config, "model_type", None)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def backbone_of(model: Any, kind: Kind) -> nn.Module:
    """The module whose output the head reads: the body of a causal model or encoder, the decoder of an encoder-decoder."""
    if kind == "encoder-decoder":
        found: nn.Module = model.get_decoder()
        return found
    body = getattr(model, "base_model", model)
    for name in ("decoder", "model"):  # OPT's body holds one decoder and nothing else
        inner = getattr(body, name, None)
        if isinstance(inner, nn.Module) and len(list(body.children())) == 1:
            body = inner
    return body if isinstance(body, nn.Module) else model


def on_answers(model: Any, targets: list[Target]) -> list[Target]:
    """Those that an adapter on answers can have: of an encoder-decoder, those in its decoder.

    Raises:
        ZOError: there is none.
    """
    if kind_of(model) != "encoder-decoder":
        return targets
    decoder = backbone_of(model, "encoder-decoder")
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    kept = [target for target in targets if target.name.startswith(f"{prefix}.")]
    if not kept:
        raise ZOError(
            "positions='answer' adapts an encoder-decoder's decoder alone, of which no target was named; name some."
        )
    return kept
