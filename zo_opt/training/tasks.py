"""Tasks as data: one row a task. A task turns a table's row into a prompt and its label into label words (verbalizers).

Templates follow MeZO's (arXiv 2305.17333, appendix E.2); SST-2's is the weak one on which zero-shot is near chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from zo_opt.errors import ZOError


@dataclass(frozen=True)
class Task:
    """A prompt template, its label words and the columns it reads.

    Attributes:
        template: text with ``{column}`` placeholders; ``{mask}`` marks the label position for masked models.
        verbalizers: label -> label words; may hold placeholders (COPA's candidates are columns).
        label_column: the column of the label.
        columns: placeholder -> column, where they differ.
        substitutions: column -> value -> text to show instead.
    """

    name: str
    template: str
    verbalizers: Mapping[str, str]
    label_column: str = "label"
    columns: Mapping[str, str] = field(default_factory=dict)
    substitutions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """Label names; a label's number is its position."""
        return list(self.verbalizers)

    def required_columns(self) -> list[str]:
        """Columns that a row must have, the label's included."""
        texts = [self.template, *self.verbalizers.values()]
        names = dict.fromkeys(name for text in texts for name in placeholders(text) if name != "mask")
        return [self.columns.get(name, name) for name in names] + [self.label_column]

    def fields(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Placeholder -> text for one row."""
        texts = [self.template, *self.verbalizers.values()]
        values = {}
        for name in dict.fromkeys(n for text in texts for n in placeholders(text) if n != "mask"):
            value = str(row[self.columns.get(name, name)]).strip()
            values[name] = self.substitutions.get(name, {}).get(value, value)
        return values

    def label_of(self, value: Any) -> int | None:
        """The number of a label given by name or by number; None where it is unknown."""
        text = label_text(value)
        if text in self.verbalizers:
            return self.labels.index(text)
        # A number counts positions only where labels have names: of labels 1 and 2, 0 is not the first.
        named = not any(label.lstrip("-").isdecimal() for label in self.labels)
        return int(text) if named and text.isdecimal() and int(text) < len(self.labels) else None


def label_text(value: Any) -> str:
    """A label as text: JSON's true and false in JSON's spelling."""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


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


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sst2", "{sentence} It was", {"0": "terrible", "1": "great"}),
        Task(
            "rte",
            '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
            {"entailment": "Yes", "not_entailment": "No"},
        ),
        Task(
            "cb",
            'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
            {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
        ),
        Task("boolq", "{passage} {question}?\n", {"false": "No", "true": "Yes"}, label_column="answer"),
        Task(
            "copa",
            "{premise} {question}",
            {"0": "{choice1}", "1": "{choice2}"},
            substitutions={"question": {"cause": "because", "effect": "so"}},
        ),
    )
}


def get_task(name: str) -> Task:
    """The built-in task of that name."""
    if name not in TASKS:
        raise ZOError(
            f"task {name!r} is not known; choose one of {', '.join(TASKS)}, or give --train_file with --template."
        )
    return TASKS[name]


def custom_task(
    labels: Sequence[str], *, text_column: str, label_column: str, template: str | None, verbalizers: str | None
) -> Task:
    """A task for the user's own table: ``{text}`` in the template is the text column, any other name a column."""
    template = check_template(template if template is not None else "{text}\nLabel:")
    words = parse_verbalizers(verbalizers, labels) if verbalizers is not None else {label: label for label in labels}
    return Task("custom", template, words, label_column=label_column, columns={"text": text_column})


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
    """Label words from ``label=word,label=word`` or, in the labels' sorted order, ``word,word``.

    >>> parse_verbalizers("0=terrible,1=great", ["0", "1"])
    {'0': 'terrible', '1': 'great'}
    >>> parse_verbalizers("terrible,great", ["0", "1"])
    {'0': 'terrible', '1': 'great'}
    """
    parts = [part.strip() for part in text.split(",")]
    named = ["=" in part for part in parts]
    if all(named):
        pairs = [(label.strip(), word.strip()) for label, word in (part.split("=", 1) for part in parts)]
        if sorted(label for label, _ in pairs) != sorted(labels):
            raise ZOError(f"verbalizers {text!r} must name each of the labels {', '.join(labels)} once.")
        words = dict(pairs)
    elif len(parts) == len(labels) and not any(named):
        words = dict(zip(labels, parts, strict=True))
    else:
        raise ZOError(
            f"verbalizers {text!r} give {len(parts)} words for the labels {', '.join(labels)}; give one a label, as label=word,label=word."
        )
    if "" in words.values() or len(set(words.values())) < len(words):
        raise ZOError(f"verbalizers {text!r} must be different words, none empty.")
    return words
