"""A run is bound to its rows: they are recorded by hash, and ``eval`` and ``--resume`` compare.

A row's hash is of what the task sees of it: the texts that the template shows, the label's name, the right texts. Of a private run the training
rows are not recorded: a hash gives away whether a row was among them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from zo_opt.errors import ZOError
from zo_opt.system.checksum import checksum
from zo_opt.tasks.rows import Example
from zo_opt.tasks.tasks import Task

DIGITS = 12  # of a single row's hash
MOST_ROWS = 500_000  # of which each one's hash is kept: run.json must stay readable
FEW = 100  # held-out rows below which a share's standard error may be more than five points


@dataclass(frozen=True)
class RowRecord:
    """What is on record of a run's rows.

    Attributes:
        train: the hash of all training rows, in order; None of a private run.
        held_out: that of the held-out ones.
        rows: how many there are of both.
        trained_on: how many of the held-out rows were trained on; None where nobody looked.
        each: the training rows' hashes, one behind another; None where they are not kept.
    """

    train: str | None
    held_out: str
    rows: tuple[int, int]
    trained_on: int | None
    each: str | None = None

    @classmethod
    def of(cls, task: Task, train: Sequence[Example], held_out: Sequence[Example], *, private: bool) -> RowRecord:
        """The record of a run's rows."""
        trained, held = hashes_of(train, task), hashes_of(held_out, task)
        count = (count_rows(train), count_rows(held_out))
        if private:
            return cls(None, _joint(held), count, None)
        each = "".join(trained) if len(train) <= MOST_ROWS else None
        return cls(_joint(trained), _joint(held), count, _seen(held_out, held, set(trained)), each)

    @classmethod
    def from_plain(cls, plain: Any) -> RowRecord | None:
        """What :meth:`to_plain` gave; None of a run of an earlier version, which has none.

        Raises:
            ZOError: it is damaged.
        """
        if plain is None:
            return None
        try:
            train, held = plain["train"], plain["held_out"]
            found = cls(
                train.get("sha256"),
                held["sha256"],
                (train["rows"], held["rows"]),
                held["trained_on"],
                train.get("each"),
            )
        except (KeyError, TypeError, AttributeError):
            found = None
        numbers = () if found is None else (*found.rows, found.trained_on or 0)
        texts = () if found is None else (found.train or "", found.held_out, found.each or "")
        if found is None or any(type(n) is not int for n in numbers) or any(not isinstance(t, str) for t in texts):
            raise ZOError(
                "run.json is damaged where it speaks of the run's rows; give the output_dir of a run of zo-opt train."
            )
        return found

    def to_plain(self, *, each: bool) -> dict[str, Any]:
        """Plain values; ``each``: with every training row's hash."""
        train: dict[str, Any] = {"rows": self.rows[0]}
        if self.train is not None:
            train |= {"sha256": self.train} | ({"each": self.each} if each and self.each is not None else {})
        return {
            "train": train,
            "held_out": {"rows": self.rows[1], "sha256": self.held_out, "trained_on": self.trained_on},
        }

    def trained_on_of(self, examples: Sequence[Example], task: Task) -> int | None:
        """How many of some rows were trained on; None where that is not on record."""
        if self.each is None:
            return None
        each = {self.each[i : i + DIGITS] for i in range(0, len(self.each), DIGITS)}
        return _seen(examples, hashes_of(examples, task), each)

    def check(self, now: RowRecord, whose: str, *, training: bool) -> None:
        """Whether rows are those on record.

        Args:
            now: of the rows as they are.
            whose: the run, for the sentence.
            training: compare the training rows, too.

        Raises:
            ZOError: they are others.
        """
        pairs = [("held-out", self.held_out, now.held_out, self.rows[1], now.rows[1])]
        if training and self.train is not None:
            pairs.insert(0, ("training", self.train, now.train or "", self.rows[0], now.rows[0]))
        for name, then, found, rows_then, rows_now in pairs:
            if then == found:
                continue
            counts = (
                f"{rows_then} then, {rows_now} now" if rows_then != rows_now else f"{rows_now} as then, but changed"
            )
            advice = (
                "or start anew with another --output_dir"
                if training
                else "or name rows to evaluate on with --eval_file"
            )
            raise ZOError(
                f"the {name} rows are not those of {whose} ({counts}); put its files back as they were, {advice}."
            )


def hashes_of(examples: Sequence[Example], task: Task) -> list[str]:
    """The hash of each row."""
    names: Sequence[str] = task.labels or [""]
    return [
        checksum(
            [json.dumps([sorted(e.fields.items()), names[e.label], e.references, *map(astuple, e.turns)]).encode()],
            DIGITS,
        )
        for e in examples
    ]


def count_rows(examples: Sequence[Example]) -> int:
    """How many rows there are: of a conversation each answer is one."""
    return sum(sum(turn.learned for turn in e.turns[1:]) if e.turns else 1 for e in examples)


def _seen(examples: Sequence[Example], hashes: Sequence[str], trained: set[str]) -> int:
    """How many rows are among those trained on; blank lines of running text are not counted."""
    found = [e for e, row in zip(examples, hashes, strict=True) if row in trained]
    return count_rows([e for e in found if e.turns or any(text.strip() for text in e.fields.values())])


def say_of_held_out(rows: int, trained_on: int | None, say: Callable[[str], None]) -> None:
    """That held-out rows are few, or none."""
    if rows < FEW:
        say(f"{rows} held-out row{'s are' if rows > 1 else ' is'} few: read the figures with their standard error.")
    if trained_on:
        say(
            f"of the {rows} rows to evaluate on {trained_on} are trained on, too: the figures are not of new rows alone."
        )


def check_resumed(record: Mapping[str, Any], now: RowRecord, whose: str, say: Callable[[str], None]) -> None:
    """Whether a run that is taken up again has the rows that it began with.

    Raises:
        ZOError: it has others.
    """
    then = RowRecord.from_plain(record.get("rows"))
    if then is None:
        say(
            f"{whose} has no record of its rows, being of an earlier version; whether they are still the same is not known."
        )
        return
    then.check(now, whose, training=True)


def _joint(hashes: Sequence[str]) -> str:
    return checksum([row.encode() for row in hashes], 64)
