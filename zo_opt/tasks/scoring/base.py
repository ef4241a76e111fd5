"""Examples -> tokens -> tensors -> a loss: what all kinds of models and tasks share.

Shape suffixes: B examples, C labels, S tokens, T tokens of label words or of a target.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from zo_opt.errors import ZOError
from zo_opt.models.agreement import embedding_rows, padding_id
from zo_opt.models.probes import probe
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring.spelling import Markup, preceding, space_before
from zo_opt.tasks.tasks import Task, placeholders

Batch = dict[str, Tensor]
IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """One example as token ids.

    Attributes:
        prompts: one token list, or one a label where label words are part of the sequence.
        words: the label words' tokens, one list a label; of a text to learn, one list of its tokens.
        label: the right label's number.
        truncated: whether text of the prompt was cut to fit the context.
        references: the right texts: of a generation task, or the right label's words.
        shortened: whether the text to learn was cut.
    """

    prompts: list[list[int]]
    words: list[list[int]]
    label: int = 0
    truncated: bool = False
    references: tuple[str, ...] = ()
    shortened: bool = False


@dataclass
class Measured:
    """What an evaluation learns from one batch.

    Attributes:
        loss: sum of the losses.
        weight: how many losses that is: rows, or tokens.
        values: one number a row: the label predicted, or the mean loss of its tokens.
        weights: how much each row counts for; empty where all count alike.
        texts: what the model writes for each row; empty where it writes nothing.
    """

    loss: float
    weight: int
    values: list[float]
    weights: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


class Scorer(ABC):
    """How one kind of model learns one kind of task."""

    pad_left = False
    either_side = False  # whether padding may go to the left as well
    padding_is_harmless = True  # else rows of one shape alone share a batch
    reads_mask = False  # whether the label is predicted at a mask

    def __init__(self, model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> None:
        self.tokenizer, self.task = tokenizer, task
        self.probed, self.notes = probe(model), list[str]()
        self.max_length = context_length(model, tokenizer, max_length, self.probed.positions)
        self.markup = Markup(tokenizer)
        self.forward_arguments = set(inspect.signature(model.forward).parameters)
        self.pad_id, self._embedding_rows = padding_id(model, tokenizer), embedding_rows(model)

    @abstractmethod
    def encode(self, example: Example) -> Encoded:
        """Tokenise one example; text too long for the context is cut so that template and label (or target) survive."""

    def encode_all(self, examples: Sequence[Example]) -> list[Encoded]:
        """Tokenise examples, one for one; running text is cut into other rows than it came in."""
        return [self.encode(e) for e in examples]

    def check_tokens(self, encoded: Sequence[Encoded], what: str = "row") -> None:
        """Whether the model's embedding has a row for each token; ``what``: of what they are, for the sentence.

        Raises:
            ZOError: it has not; the sentence says which row of the table it is.
        """
        for number, e in enumerate(encoded, start=1):
            highest = max(max(ids, default=0) for ids in [*e.prompts, *e.words])
            if self._embedding_rows is not None and highest >= self._embedding_rows:
                raise ZOError(
                    f"{what} {number} holds token {highest} ({self.tokenizer.convert_ids_to_tokens(highest)!r}), and the model's embedding has "
                    f"{self._embedding_rows} rows; give the tokenizer that belongs to the model, or take the token out."
                )

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The loss that is trained: a mean over the batch, a float32 scalar."""

    @abstractmethod
    def losses(self, model: Any, batch: Batch) -> Tensor:
        """The loss of each row, (B,) float32: what ``loss`` is the mean of."""

    @abstractmethod
    def measure(self, model: Any, batch: Batch) -> Measured:
        """What an evaluation needs of a batch."""

    def answers(self, batch: Batch) -> Tensor | None:
        """The answer positions of the flattened inputs, (N, S) bool; None: what the model's kind has (a causal one's last token)."""
        return None

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """Pad to one length: input_ids and attention_mask (B, 1 or C, S), labels (B,); words (B, C, T), padded with IGNORED."""
        batch = {
            "input_ids": self.padded([e.prompts for e in encoded], self.pad_id),
            "attention_mask": self.padded([[[1] * len(p) for p in e.prompts] for e in encoded], 0),
            "labels": torch.tensor([e.label for e in encoded]),
        }
        if encoded[0].words:
            batch["words"] = self.padded([e.words for e in encoded], IGNORED)
        return batch

    def padded(self, ids: Sequence[Sequence[list[int]]], value: int) -> Tensor:
        """Token lists as one tensor (B, C, S), filled up to the longest on the side that this kind of model takes."""
        longest = max(len(p) for lists in ids for p in lists)

        def fill(p: list[int]) -> list[int]:
            filling = [value] * (longest - len(p))
            return filling + p if self.pad_left else p + filling

        return torch.tensor([[fill(p) for p in lists] for lists in ids])

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The model's arguments, examples and labels flattened into one axis."""
        return {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}

    def prompt_text(self, example: Example, room: int, **extra: str) -> tuple[str, bool]:
        """The filled template with at least ``room`` tokens of the context to spare; its longest fields are cut if need be."""
        fields, truncated = self.letters(example.fields), False
        while True:
            text = self.task.filled(fields, **extra)
            excess = len(self.tokens_of(text)) + room - self.max_length
            shown = [n for n in placeholders(self.task.template) if n in fields]
            longest = max(shown, key=lambda n: len(fields[n]))
            if excess <= 0:
                return text, truncated
            if not fields[longest]:
                raise ZOError(
                    f"{example.where}: the template alone needs, with what follows it, {excess} tokens more than the context of {self.max_length}; "
                    "shorten it or raise max_length."
                )
            fields[longest], truncated = self._cut(fields[longest], excess), True

    def _cut(self, text: str, tokens: int) -> str:
        """The text without its last tokens (at least one character shorter)."""
        keep = max(len(self.tokens_of(text, special=False)) - tokens, 0)
        if self.tokenizer.is_fast:
            shown = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            offsets = shown["offset_mapping"]
            end = offsets[keep][0] if keep < len(offsets) else len(text) - 1
        else:
            end = len(text) * keep // (keep + tokens)
        return text[: min(end, len(text) - 1)].rstrip()

    def letters(self, fields: Mapping[str, str]) -> dict[str, str]:
        """A row's texts, in which nothing is markup."""
        return {name: self.markup.as_letters(text) for name, text in fields.items()}

    def tokens_of(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text, with those that the tokenizer adds to it or without; a start or end token of the template's is not doubled."""
        ids = list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        if not special:
            return ids
        starts, ends = (
            {getattr(self.tokenizer, name) for name in names} - {None}
            for names in (("bos_token_id", "cls_token_id"), ("eos_token_id", "sep_token_id"))
        )
        if len(ids) > 1 and ids[0] == ids[1] and ids[0] in starts:
            ids = ids[1:]
        return ids[:-1] if len(ids) > 1 and ids[-1] == ids[-2] and ids[-1] in ends else ids

    def opening(self, text: str) -> list[int]:
        """Tokens of a text that the model goes on from."""
        return self.tokens_of(text)

    def prompt_ids(self, text: str, example: Example) -> list[int]:
        """Tokens of a filled template.

        Raises:
            ZOError: there are none.
        """
        if ids := self.opening(text):
            return ids
        raise ZOError(
            f"{example.where}: the prompt {text!r} has no tokens; give the row a text, or the template words."
        )

    @cached_property
    def fixed_words(self) -> list[list[int]] | None:
        """Tokens of each label's words, where they are the same in all rows.

        Raises:
            ZOError: two labels' words are the same tokens, or the tokenizer does not know a word.
        """
        if any(map(placeholders, self.task.verbalizers.values())):
            return None
        texts = [text.format() for text in self.task.verbalizers.values()]
        for text in texts:
            if self.tokenizer.unk_token_id in self.following(text):
                raise ZOError(
                    f"the tokenizer does not know all of the label words {text!r}, which become {self.tokenizer.unk_token}; "
                    "choose other words with --verbalizers."
                )
        words = self._words(texts, "")
        if not self.reads_mask:  # whose masks say how long a text is
            self._check_beginnings(words, texts)
        return words

    def _check_beginnings(self, words: Sequence[list[int]], texts: Sequence[str]) -> None:
        for ids, text in zip(words, texts, strict=True):
            for longer, other in zip(words, texts, strict=True):
                if len(ids) < len(longer) and longer[: len(ids)] == ids:
                    raise ZOError(
                        f"the label words {other!r} begin with the tokens of {text!r}, another label's: a text is never likelier than its "
                        f"beginning, so that {other!r} could never be predicted; choose other words with --verbalizers, or use --head classification."
                    )

    def words_of(self, example: Example) -> list[list[int]]:
        """Tokens of each label's words as they follow the prompt.

        Raises:
            ZOError: they have none, or two labels the same.
        """
        if self.fixed_words is not None:
            return self.fixed_words
        return self._words(
            [text.format(**example.fields) for text in self.task.verbalizers.values()], f"{example.where}: "
        )

    def _words(self, texts: Sequence[str], where: str) -> list[list[int]]:
        words: dict[tuple[int, ...], str] = {}
        for label, text in zip(self.task.labels, texts, strict=True):
            ids = tuple(self.following(text))
            if not ids:
                raise ZOError(
                    f"{where}the label words {text!r} of label {label!r} have no tokens; choose other verbalizers."
                )
            if ids in words:
                raise ZOError(
                    f"{where}the label words {words[ids]!r} and {text!r} are the same tokens to this tokenizer, so that no model can tell "
                    "these labels apart; choose other verbalizers."
                )
            words[ids] = text
        return [list(ids) for ids in words]

    def following(self, text: str) -> list[int]:
        """Tokens of a text as it follows the prompt: with a space before it where what precedes it asks for one."""
        before, after_field = preceding(self.task.template)
        if self.markup.ends(before):
            return self.after("", "", text)
        return self.after(before, space_before("a" + before if after_field else before), text)

    def after(self, before: str, space: str, text: str) -> list[int]:
        """Tokens of a text behind another and a space, to which it may belong.

        Args:
            before: the template's letters that precede it.
            space: what stands between them.
            text: a row's text, or label words.
        """
        text = self.markup.as_letters(text)
        white = before[len(before.rstrip()) :]
        stem = "a" + white if white or space else before[-1:]
        return self.continued(stem, stem + space + text)[1]

    def continued(self, before: str, whole: str) -> tuple[list[int], list[int]]:
        """Tokens of a text, and those that a longer one, which begins with it, has behind them; special ones are not added."""
        head, both = self.tokens_of(before, special=False), self.tokens_of(whole, special=False)
        if both[: len(head)] == head:
            return head, both[len(head) :]
        return head, self.tokens_of(whole[len(before) :], special=False)


def context_length(model: Any, tokenizer: Any, max_length: int | None, learned: int | None = None) -> int:
    """The tokens a sequence may have: the least of the model's positions, the tokenizer's limit and ``max_length``.

    Args:
        model: its configuration says how many positions it was made for.
        tokenizer: has a limit, too.
        max_length: the user's.
        learned: what the model's table of positions has room for, which the configuration may count otherwise.
    """
    config: Any = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    positions = positions if positions is None or positions > 0 else None  # XLNet's, -1, are not bounded
    limits = [n for n in (learned or positions, tokenizer.model_max_length, max_length) if n is not None]
    limit = int(min(limits, default=1 << 30))
    if limit < 1:
        raise ZOError(f"max_length={max_length} leaves no room for text; give a positive number of tokens.")
    return limit
