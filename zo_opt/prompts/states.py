"""What the frozen model makes of a prompt: keys and values of its tokens, and what enters the first adapted layer after it.

Shape suffixes: N sequences, P prompt tokens, T answer tokens, H hidden, W all keys and values of a token side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256

import torch
from torch import Tensor
from torch.nn import functional as F

KeyShapes = Sequence[tuple[int, int, int]]  # of each adapted layer: heads, entries of a key, entries of a value


@dataclass(frozen=True)
class PromptState:
    """A batch of sequences of which the prompt is done: all that a forward from the answer on needs. Sequences come first in every tensor.

    Attributes:
        keys_NPW: keys and values of the prompt's tokens but the last, then the body's output there; padded on the left.
        prompt_NP: which of them there are.
        ids_NT: the last prompt token and the answer's, padded on the right.
        answers_NT: which of them there are.
        places_NT: where they stand in their sequences; of padding: beyond the end.
        positions_NT: their position ids.
        hidden_NTH: what enters the first adapted layer there; without entries where that is the first of all.
    """

    keys_NPW: Tensor
    prompt_NP: Tensor
    ids_NT: Tensor
    answers_NT: Tensor
    places_NT: Tensor
    positions_NT: Tensor
    hidden_NTH: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a batch that is cut into parts."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def ending(self, answer_NTH: Tensor, tokens: int) -> Tensor:
        """The body's output for whole sequences, (N, tokens, H): the prompt's as the frozen base gave it, and the answer's."""
        prompt = self.prompt_NP.shape[1]
        before = self.places_NT[:, :1] + torch.arange(-prompt, 0, device=answer_NTH.device)
        places = torch.cat([torch.where(self.prompt_NP, before, tokens), self.places_NT], 1)
        known = self.keys_NPW[..., self.keys_NPW.shape[-1] - answer_NTH.shape[-1] :]
        values = torch.cat([known.to(answer_NTH.dtype), answer_NTH], 1)
        return scatter(values.new_zeros(len(values), tokens, values.shape[-1]), places, values)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> PromptState:
        """What :meth:`tensors` gave."""
        return cls(**{f.name: tensors[f.name] for f in fields(cls)})


@dataclass(frozen=True)
class Span:
    """One sequence of a padded batch: where it begins, where its answer begins (its last prompt token) and where it ends; a digest."""

    first: int
    answer: int
    end: int
    key: bytes

    @property
    def halves(self) -> tuple[bytes, bytes]:
        """Names for its two parts in a store."""
        return self.key[:16], self.key[16:]


def spans_of(ids_NS: Tensor, attention_NS: Tensor, answers_NS: Tensor, positions_NS: Tensor) -> list[Span]:
    """The sequences of a batch. Tokens before the first answer position are prompt, all from there on are answer."""
    ids, real, answers, positions = (x.cpu().numpy() for x in (ids_NS, attention_NS != 0, answers_NS, positions_NS))
    found = []
    for row, there, asked, numbered in zip(ids, real, answers, positions, strict=True):
        first = int(there.argmax())
        end = first + int(there.sum())
        answer = int(asked.argmax()) if asked.any() else end - 1
        parts = (row[first:end].tobytes(), numbered[first:end].tobytes(), (answer - first).to_bytes(4, "little"))
        digest = sha256(b"".join(parts)).digest()
        found.append(Span(first, answer, end, digest))
    return found


def padded(rows: Sequence[Tensor], *, left: bool) -> Tensor:
    """Rows (P_n, ...) as one tensor (N, P, ...), filled up with zeros."""
    most = max(len(row) for row in rows)

    def filled(row: Tensor) -> Tensor:
        missing = most - len(row)
        return F.pad(row, (0, 0) * (row.ndim - 1) + ((missing, 0) if left else (0, missing)))

    return torch.stack([filled(row) for row in rows])


def scatter(hidden_NSH: Tensor, places_NT: Tensor, value_NTH: Tensor) -> Tensor:
    """Hidden states with others at some places; a place beyond the last is nowhere."""
    index = places_NT.unsqueeze(-1).expand_as(value_NTH)
    return F.pad(hidden_NSH, (0, 0, 0, 1)).scatter(1, index, value_NTH)[:, :-1]


def split_keys(keys_NPW: Tensor, shapes: KeyShapes) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, (N, heads, P, entries), of those side by side."""
    found, start = [], 0
    for heads, keys, values in shapes:
        pair = []
        for entries in (keys, values):
            part = keys_NPW[..., start : start + heads * entries]
            pair.append(part.unflatten(-1, (heads, entries)).transpose(-3, -2))
            start += heads * entries
        found.append((pair[0], pair[1]))
    return found


def join_keys(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Keys and values of all layers side by side, (N, P, W)."""
    return torch.cat([x.transpose(-3, -2).flatten(-2) for pair in pairs for x in pair], dim=-1)
