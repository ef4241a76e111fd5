"""What a run takes its rows for: columns, one prompt as the model sees it, label words as tokens. Said at the start, and kept in run.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from zo_opt.tasks.metrics import GENERATION
from zo_opt.tasks.scoring import Scorer, Writer
from zo_opt.tasks.scoring.base import Encoded
from zo_opt.tasks.tasks import Task

MOST = 48  # tokens that are said of a longer prompt: its beginning and its end
BETWEEN = "|"


@dataclass(frozen=True)
class Shown:
    """What rows are taken for.

    Attributes:
        columns: column -> what it is.
        prompt: the tokens of the first training row's prompt; None where that must not be known (privacy).
        target: the tokens that are learned after it; of labels none.
        words: label -> the tokens of its words; where these are columns, of the first row.
    """

    columns: dict[str, str]
    prompt: list[str] | None
    target: list[str]
    words: dict[str, list[str]]

    def lines(self) -> Iterable[str]:
        """In words, a line each."""
        yield "columns: " + ", ".join(f"{column} ({what})" for column, what in self.columns.items())
        if self.prompt is not None:
            yield f"prompt of the first row, tokens between {BETWEEN}: {_joined(self.prompt)}"
        if self.target:
            yield f"what is learned after it: {_joined(self.target)}"
        if self.words:
            yield "label words: " + ", ".join(f"{label} -> {_joined(tokens)}" for label, tokens in self.words.items())

    def to_plain(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "columns": self.columns,
            "prompt_tokens": self.prompt,
            "target_tokens": self.target,
            "label_words": self.words,
        }


def show(scorer: Scorer, first: Encoded, *, private: bool) -> Shown:
    """What a run's rows are taken for.

    Args:
        scorer: of the run.
        first: the first training row.
        private: nothing may be said of single rows.
    """
    task, tokenizer = scorer.task, scorer.tokenizer
    prompt = scorer.prompt(first) if isinstance(scorer, Writer) else first.prompts[0]
    labels = dict(zip(task.labels, first.words, strict=True)) if task.labels and first.words else {}
    own_words = private and scorer.fixed_words is None if labels else False
    return Shown(
        columns_of(task),
        None if private else tokens_in(tokenizer, prompt),
        tokens_in(tokenizer, first.words[0]) if task.kind == GENERATION and not private else [],
        {} if own_words else {label: tokens_in(tokenizer, ids) for label, ids in labels.items()},
    )


def columns_of(task: Task) -> dict[str, str]:
    """Column -> what it is taken for."""
    if task.conversation:
        return {
            name: "conversation, whose answers are learned" if len(task.conversation) == 1 else name
            for name in task.conversation
        }
    found = {
        task.columns.get(
            name, name
        ): f"{{{name}}} in the prompt{' where it is not blank' if name in task.optional else ''}"
        for name in task.shown()
    }
    learned = {"classification": (task.label_column, "label"), GENERATION: (task.target_column, "text to write")}
    if task.kind in learned:
        column, what = learned[task.kind]
        found[column] = f"{found[column]} and {what}" if column in found else what
    return found


def tokens_in(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as text.

    A token that is part of a character is shown as the tokenizer writes it.
    """
    pieces = [str(tokenizer.decode([i])) for i in ids]
    return [
        str(tokenizer.convert_ids_to_tokens(i)) if "\ufffd" in piece else piece
        for i, piece in zip(ids, pieces, strict=True)
    ]


def _joined(tokens: Sequence[str]) -> str:
    """Tokens in a line: line ends as \\n, the middle of many left out.

    >>> _joined(["a", " film\\n"])
    '|a| film\\\\n|'
    """
    shown = list(tokens)
    if len(shown) > MOST:
        shown = [*shown[: MOST // 3], f"... {len(shown) - MOST} more ...", *shown[len(shown) - 2 * MOST // 3 :]]
    return BETWEEN + BETWEEN.join(shown).replace("\n", "\\n") + BETWEEN
