"""Tasks as data: a task turns a table's row into a prompt, and what the row asks for into words.

Of three kinds: "classification" has label words (verbalizers), "generation" a target text, "language-modelling" nothing but its text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from string import Formatter
from typing import Any, Literal

from zo_opt.errors import ZOError
from zo_opt.tasks.cells import FILL, is_blank, label_of, name_of, one_spelling, text_of
from zo_opt.tasks.metrics import CLASSIFICATION, GENERATION, KINDS, LANGUAGE_MODELLING

Split = Literal["train", "held_out"]
_FILL = f"{FILL}, or name the column in --optional_columns"


@dataclass(frozen=True)
class Task:
    """A prompt template, its label words and the columns it reads.

    Attributes:
        template: text with ``{column}`` placeholders; ``{mask}`` marks the label position for masked models.
        verbalizers: label -> label words; may hold placeholders (COPA's candidates are columns). None but in classification.
        label_column: the column of the label.
        columns: placeholder -> column, where they differ.
        substitutions: column -> value -> text to show instead.
        kind: "classification", "generation" or "language-modelling".
        target_column: generation: the column of the text to write, or of a list of texts that are all right (the first is learned).
        max_new_tokens: generation: the most tokens that are written in an evaluation.
        metrics: those it reports, the primary one first; all of its kind if empty.
        numbered: whether a label may be given by its number, which counts the labels in their order: of a user's own rows the order is the
            alphabet's, and a number would mean whatever it happens to.
        optional: placeholders whose column may be blank in a row, or missing; see :meth:`filled`.
        conversation: the columns of a conversation, ("messages",) or ("prompt", "completion"); of other tasks none.
        label_names: what the training table calls its labels, one a label, where it holds them as numbers (``ClassLabel``).
        source: a function that gives the rows of a split, "train" or "held_out"; without one, rows come from the user's files.

    >>> task = Task("mine", "{text} It was", {"0": "bad", "1": "good"}, source=lambda split: [{"text": "a film", "label": 1}])
    >>> task.fields({"text": " fine "}), task.label_of(1)
    ({'text': 'fine'}, 1)
    """

    name: str
    template: str
    verbalizers: Mapping[str, str] = field(default_factory=dict)
    label_column: str = "label"
    columns: Mapping[str, str] = field(default_factory=dict)
    substitutions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    kind: str = CLASSIFICATION
    target_column: str = "target"
    max_new_tokens: int = 32
    metrics: tuple[str, ...] = ()
    numbered: bool = True
    optional: tuple[str, ...] = ()
    conversation: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    source: Callable[[Split], Iterable[dict[str, Any]]] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ZOError(f"task {self.name!r} is of kind {self.kind!r}; choose one of {', '.join(KINDS)}.")
        if not self.metrics:
            object.__setattr__(self, "metrics", KINDS[self.kind])

    def __call__(self) -> Task:
        """Itself: where a function that makes a task will do, so does a task."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for run.json; where its own rows come from is left out."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "source"}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Task:
        """What :meth:`to_dict` gave.

        Raises:
            ZOError: its template is not well formed; or it holds something else.
        """
        for name, kind in (
            ("template", str),
            ("verbalizers", dict),
            ("columns", dict),
            ("substitutions", dict),
            ("max_new_tokens", int),
        ):
            if not isinstance(plain[name], kind):
                raise TypeError(f"its {name} is {plain[name]!r}")
        lists = ("metrics", "optional", "conversation", "label_names")
        task = cls(**dict(plain) | {name: tuple(plain.get(name, ())) for name in lists})
        check_template(task.template)
        return task

    @property
    def labels(self) -> list[str]:
        """Label names; a label's number is its position."""
        return list(self.verbalizers)

    def shown(self) -> list[str]:
        """The placeholders of its template and label words."""
        texts = [self.template, *self.verbalizers.values()]
        return list(dict.fromkeys(name for text in texts for name in placeholders(text) if name != "mask"))

    def shown_columns(self) -> list[str]:
        """Columns that a row must have for its prompt."""
        return [self.columns.get(name, name) for name in self.shown() if name not in self.optional]

    def required_columns(self) -> list[str]:
        """Columns that a row must have, that of the label or the target included."""
        if self.conversation:
            return list(self.conversation)
        asked_for = {CLASSIFICATION: [self.label_column], GENERATION: [self.target_column], LANGUAGE_MODELLING: []}
        return self.shown_columns() + asked_for[self.kind]

    def fields(self, row: Mapping[str, Any], where: str = "this row") -> dict[str, str]:
        """Placeholder -> text for one row.

        Raises:
            ZOError: a column that is shown holds no text; ``where`` says in the sentence which row's.
        """
        values = {}
        for name in self.shown():
            column = self.columns.get(name, name)
            blank = name in self.optional and is_blank(row.get(column))
            values[name] = "" if blank else text_of(row[column], column, where, _FILL).strip()
        return {name: self.substitutions.get(name, {}).get(value, value) for name, value in values.items()}

    def filled(self, fields: Mapping[str, str], **extra: str) -> str:
        """The template with a row's texts in it; lines that show nothing but blank optional columns are left out, the last one excepted.

        >>> task = Task("mine", "{instruction}\\n{input}\\nAnswer:", optional=("input",))
        >>> task.filled({"instruction": "Say hello.", "input": ""}), task.filled({"instruction": "Sum up.", "input": "a film"})
        ('Say hello.\\nAnswer:', 'Sum up.\\na film\\nAnswer:')
        """
        blank = {name for name in self.optional if not fields[name]}
        *lines, last = self.template.split("\n")
        kept = [line for line in lines if not blank or not (shown := placeholders(line)) or not blank.issuperset(shown)]
        return "\n".join([*kept, last]).format(**fields, **extra)

    def label_of(self, value: Any, where: str = "this row", called: Sequence[str] = ()) -> int | None:
        """The number of a label given by name, or by number where the task is ``numbered``; None where it is unknown.

        Args:
            value: of the label's column.
            where: which row's, for the sentence.
            called: what the row's own table calls its labels 0, 1, ...; the names count then, whose order may be another than the task's.

        Raises:
            ZOError: the value is no label at all.
        """
        text = label_of(value, self.label_column, where)
        names = [one_spelling(label) for label in self.labels]
        # A number counts positions only where labels have names: of labels 1 and 2, 0 is not the first.
        numbers = any(label.lstrip("-").isdecimal() for label in names)
        if called:
            name = name_of(text, called, self.label_column, where)
            text = text if numbers and not self.label_names else name
        for known in (self.label_names, names) if called else (names, self.label_names):
            if text in known:
                return known.index(text)
        named = self.numbered and not numbers
        return int(text) if named and re.fullmatch(r"\d{1,9}", text) and int(text) < len(names) else None


def placeholders(template: str) -> list[str]:
    """Names in a template's braces.

    >>> placeholders("{premise} so {choice1}")
    ['premise', 'choice1']
    """
    try:
        return [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ZOError(
            f"template {template!r} is not well formed ({error}); write columns as {{name}} and a literal brace twice."
        ) from error


def as_letters(text: str) -> str:
    """A text in which braces are letters, as a template has them."""
    return text.replace("{", "{{").replace("}", "}}")


def custom_task(
    labels: Sequence[str], *, text_column: str, label_column: str, template: str | None, verbalizers: str | None
) -> Task:
    """A task for the user's own table: ``{text}`` in the template is the text column, any other name a column."""
    template = check_template(template if template is not None else "{text}\nLabel:")
    words = parse_verbalizers(verbalizers, labels) if verbalizers is not None else {v: as_letters(v) for v in labels}
    return Task("custom", template, words, label_column=label_column, columns={"text": text_column}, numbered=False)


def custom_generation_task(*, text_column: str, target_column: str, template: str | None) -> Task:
    """A task that writes the target column of the user's own table; ``{text}`` in the template is the text column."""
    template = check_template(template if template is not None else "{text}\nAnswer:")
    return Task("custom", template, kind=GENERATION, target_column=target_column, columns={"text": text_column})


def check_template(template: str) -> str:
    """The template, if it is well formed and shows something of the row."""
    shown = [name for name in placeholders(template) if name != "mask"]
    try:
        template.format(**dict.fromkeys(["mask", *shown], ""))
    except (ValueError, LookupError, AttributeError) as error:
        raise ZOError(f"template {template!r} is not well formed ({error}); write columns as {{name}}.") from error
    if not shown:
        raise ZOError(f"template {template!r} shows nothing of the row; put a column in braces, such as {{text}}.")
    return template


def parse_verbalizers(text: str, labels: Sequence[str]) -> dict[str, str]:
    """Label words from ``label=word,label=word`` or, in the labels' sorted order, ``word,word``; braces in them are letters.

    >>> parse_verbalizers("0=terrible,1=great", ["0", "1"])
    {'0': 'terrible', '1': 'great'}
    >>> parse_verbalizers("terrible,great", ["0", "1"])
    {'0': 'terrible', '1': 'great'}
    """
    parts = [part.strip() for part in text.split(",")]
    named = ["=" in part for part in parts]
    if all(named):
        pairs = [(one_spelling(label), word.strip()) for label, word in (part.split("=", 1) for part in parts)]
        if sorted(label for label, _ in pairs) != sorted(labels):
            raise ZOError(f"verbalizers {text!r} must name each of the labels {', '.join(labels)} once.")
        words = {label: dict(pairs)[label] for label in labels}  # whose order numbers them
    elif len(parts) == len(labels) and not any(named):
        words = dict(zip(labels, parts, strict=True))
        for label, word in words.items():
            if word in labels and word != label:
                raise ZOError(
                    f"verbalizers {text!r} give the label {label} the word {word!r}, which is another label: words without a label go to "
                    f"{', '.join(labels)}, in this order; write label=word,label=word."
                )
    else:
        raise ZOError(
            f"verbalizers {text!r} give {len(parts)} words for the labels {', '.join(labels)}; give one a label, as label=word,label=word."
        )
    if "" in words.values() or len(set(words.values())) < len(words):
        raise ZOError(f"verbalizers {text!r} must be different words, none empty.")
    return {label: as_letters(word) for label, word in words.items()}
