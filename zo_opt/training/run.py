"""A finished run in use: labels for new rows, text, figures on other rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from zo_opt.errors import ZOError
from zo_opt.models.precision import check_precision
from zo_opt.record.output import RUN_NAME
from zo_opt.record.progress import Reporter
from zo_opt.tasks.evaluation import Evaluation, Prepared, evaluate
from zo_opt.tasks.metrics import CLASSIFICATION
from zo_opt.tasks.padding import try_padding
from zo_opt.tasks.rows import Example, check_text, make_examples, make_prompts, read_rows
from zo_opt.tasks.scoring import Encoded, Scorer
from zo_opt.tasks.tables import Rows, rows_given
from zo_opt.tasks.tasks import Task
from zo_opt.training.config import TrainConfig
from zo_opt.training.examples import Examples, load_examples
from zo_opt.training.given import GivenRows, given_rows, held_out_apart
from zo_opt.training.loop import train as run_training
from zo_opt.training.options import WHOLE_MODEL
from zo_opt.training.row_record import RowRecord, count_rows, say_of_held_out
from zo_opt.training.run_record import config_of, load_tuned, read_record, task_in
from zo_opt.training.setup import load_base
from zo_opt.training.writing import Form, Prompt, check_writes, options_of, prompt_tokens, samples, write

_NO_RECORD = (
    "this run has no record of its rows, being of an earlier version; which it was trained on is not known for sure."
)
CHUNK = 1024  # rows or prompts that are put into batches of like length together, before the first of them is answered


@dataclass(frozen=True)
class Prediction:
    """What a run says of a row.

    Attributes:
        label: the label that it predicts.
        probabilities: label -> its probability among the labels; they sum to 1.
    """

    label: str
    probabilities: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Run:
    """A run of ``zo-opt train``, loaded: its model with its adapter, in its precision, under its own prompt.

    Args:
        directory: the run's output_dir.
        device: cpu, cuda or auto; the run's own if None.
        precision: of the base; the run's own if None.
        zero_shot: leave the adapter out.
        trust_remote_code: let the base model's own Python code run, whatever the run was started with.
        reporter: told what happens; nobody if None.
        given: the rows of a run on rows from Python.

    Attributes:
        config: the run's options.
        task: its template, label words and columns.
        model: the model of transformers with the adapter in it, in evaluation mode.
        scorer: how the model learned the task.
        rows: which rows it was trained and measured on; None of a run of an earlier version.
        tokenizer: the model's.

    Raises:
        ZOError: the directory holds no run, or its adapter or base model cannot be loaded.
    """

    def __init__(
        self, directory: str | Path, *, device: str | None = None, precision: str | None = None, zero_shot: bool = False,
        trust_remote_code: bool = False, reporter: Reporter | None = None, given: GivenRows | None = None,
    ) -> None:  # fmt: skip
        self.directory, self._given = Path(directory), given
        self.reporter = reporter if reporter is not None else Reporter(Console(quiet=True))
        record, path = read_record(self.directory), self.directory / RUN_NAME
        config = config_of(record, path, trust_remote_code=trust_remote_code)
        task = task_in(record, path)
        self.rows = RowRecord.from_plain(record.get("rows"))
        self.config: TrainConfig = config if device is None else replace(config, device=device)
        self.task: Task = task if task is not None else self._own_examples.task
        if precision not in (None, "fp32") and config.adapter_name in WHOLE_MODEL:
            raise ZOError(
                f"adapter {config.adapter_name!r} trains the model's own weights, which are float32; leave --precision out."
            )
        taken = str(record.get("resolved", {}).get("precision", config.precision)).partition(", ")[0]
        taken = check_precision(precision or taken)
        base = load_base(replace(self.config, precision=taken), self.task, self.reporter)
        self.model: Any = base.model if zero_shot else load_tuned(base.model, self.directory, self.reporter)
        self.model.to(base.device).eval()
        self.scorer: Scorer = base.scorer
        self.device: torch.device = base.device
        self._tried = False
        for note in self.scorer.notes:
            self.reporter.say(note)

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return self.scorer.tokenizer

    @cached_property
    def _own_examples(self) -> Examples:
        return load_examples(self.config, self.reporter, self._given)

    def predict(self, rows: Any, *, batch_size: int | None = None) -> list[Prediction]:
        """The label of each row, with probabilities.

        Args:
            rows: rows with the columns that the run's template shows (a list of mappings or a ``datasets.Dataset``), or a file of them; a
                label in them is not looked at.
            batch_size: rows in a batch; the run's ``eval_batch_size`` if None.

        Raises:
            ZOError: the run's task has no labels; or a row lacks a column.
        """
        return list(self.predictions(rows, batch_size=batch_size))

    def predictions(
        self, rows: Any, *, batch_size: int | None = None, source: str | None = None
    ) -> Iterator[Prediction]:
        """As :meth:`predict`, one after the other, while they are made; all rows are checked before the first is answered.

        ``source``: what the rows are called in sentences.
        """
        if self.task.kind != CLASSIFICATION:
            raise ZOError(
                f"the run in {self.directory} learned a {self.task.kind} task, which has no labels to predict; use generate."
            )
        read, called = rows_of(rows)
        prompts = make_prompts(read, self.task, source or called)
        return self._predictions(prompts, batch_size or self.config.eval_batch_size)

    @torch.no_grad()
    def _predictions(self, examples: Sequence[Example], batch_size: int) -> Iterator[Prediction]:
        for start in range(0, len(examples), CHUNK):
            prepared = self._prepared(examples[start : start + CHUNK])
            found: dict[int, Prediction] = {}
            for indices in prepared.by_length(batch_size):
                scores_BC = prepared.scores(self.model, prepared.batch(indices))
                for i, best, shares in zip(
                    indices, scores_BC.argmax(1).tolist(), scores_BC.softmax(1).tolist(), strict=True
                ):
                    labels = self.task.labels
                    found[i] = Prediction(labels[best], dict(zip(labels, shares, strict=True)))
            yield from (found[i] for i in range(len(prepared)))

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[str]:
        """What the model writes after each prompt.

        Args:
            prompts: texts; or rows, whose columns the run's template shows; or conversations, each a list of messages with
                "role" and "content".
            **options: those of :meth:`texts`, and of transformers' ``generate``: max_new_tokens (the task's own, else up to 64), do_sample,
                temperature, top_p, ...; what is not given is the checkpoint's own.

        Raises:
            ZOError: the model cannot write; a prompt does not fit; or an option is not possible.
        """
        return list(self.texts(prompts, **options))

    def texts(
        self, prompts: Sequence[Prompt], *, form: Form = "run", batch_size: int | None = None, seed: int = 0, streamer: Any = None,
        **options: Any,
    ) -> Iterator[str]:  # fmt: skip
        """As :meth:`generate`, one after the other, while they are written; all prompts are checked before the first.

        Args:
            prompts: as there.
            form: "run": texts and rows stand in the run's own prompt; "chat": texts are what a user says, in the tokenizer's chat
                template; "plain": texts as they are.
            batch_size: prompts at once; the run's ``eval_batch_size`` if None, and one where tokens are drawn or a streamer looks on.
            seed: of sampling, of each prompt anew; the global random state is not touched.
            streamer: of transformers, told each token as it is written.
            **options: of transformers' ``generate``.
        """
        check_writes(self.scorer, self.model)
        if isinstance(prompts, str | Mapping):
            raise ZOError(f"the prompts are a {'text' if isinstance(prompts, str) else 'row'}; give a list of them.")
        if batch_size is None:
            alone = streamer is not None or samples(self.model, options)
            batch_size = 1 if alone else self.config.eval_batch_size
        ids = [prompt_tokens(self.scorer, prompt, form, f"prompt {n}") for n, prompt in enumerate(prompts, start=1)]
        self.scorer.check_tokens([Encoded([one], []) for one in ids], "prompt")
        each = options_of(self.model, self.scorer, ids, batch_size=batch_size, seed=seed, **options)
        return self._texts(list(zip(ids, each, strict=True)), batch_size, seed, streamer)

    def _texts(
        self, prompts: Sequence[tuple[list[int], dict[str, Any]]], batch_size: int, seed: int, streamer: Any
    ) -> Iterator[str]:
        chunk = 1 if batch_size == 1 else CHUNK
        for start in range(0, len(prompts), chunk):
            ids, each = zip(*prompts[start : start + chunk], strict=True)
            written = write(self.model, self.scorer, ids, each, batch_size=batch_size, seed=seed, streamer=streamer)
            new = dict(written)
            yield from (str(self.tokenizer.decode(new[i], skip_special_tokens=True)) for i in range(len(new)))

    def evaluate(self, rows: Any | None = None) -> Evaluation:
        """Metrics and loss on the run's held-out rows, or on others with its columns.

        Raises:
            ZOError: the rows cannot be read or do not fit the task.
        """
        examples, trained_on = self._own_held_out() if rows is None else self._others(rows)
        prepared = self._prepared(examples, trained_on)
        with self.reporter.track("evaluation", len(prepared), "rows") as tracker:
            return evaluate(self.model, prepared, self.config.eval_batch_size, tracker.advance)

    def _prepared(self, examples: Sequence[Example], trained_on: int | None = None) -> Prepared:
        """Rows ready for the model, once it is known how it bears padding."""
        if not self._tried:
            said = len(self.scorer.notes)
            try_padding(self.model, self.scorer, examples)
            for note in self.scorer.notes[said:]:
                self.reporter.say(note)
            self._tried = True
        return Prepared(examples, self.scorer, self.device, None, trained_on=trained_on)

    def _own_held_out(self) -> tuple[Sequence[Example], int | None]:
        """The run's held-out rows, and how many of them it was trained on; training rows are read only where they were cut from these."""
        apart = None if self.config.validation else held_out_apart(self.config, self._given)
        examples = self._own_examples.held_out if apart is None else make_examples(apart[0], self.task, apart[1])
        if self.rows is None:
            self.reporter.say(_NO_RECORD)
            return examples, None
        now = RowRecord.of(self.task, [], examples, private=self.config.private)
        self.rows.check(now, "this run", training=False)
        return examples, self.rows.trained_on

    def _others(self, rows: Any) -> tuple[Sequence[Example], int | None]:
        read, source = rows_of(rows)
        examples = make_examples(read, self.task, source)
        check_text(examples, self.task, source)
        trained_on = None if self.rows is None else self.rows.trained_on_of(examples, self.task)
        if self.rows is None:
            self.reporter.say(_NO_RECORD)
        say_of_held_out(count_rows(examples), trained_on, self.reporter.say)
        return examples, trained_on


def load_run(
    directory: str | Path,
    *,
    device: str | None = None,
    precision: str | None = None,
    zero_shot: bool = False,
    trust_remote_code: bool = False,
) -> Run:
    """A finished run, ready to be used; see :class:`Run`.

    Raises:
        ZOError: the directory holds no run, or its adapter or base model cannot be loaded.
    """
    return Run(directory, device=device, precision=precision, zero_shot=zero_shot, trust_remote_code=trust_remote_code)


def train(rows: Any = None, eval_rows: Any = None, *, quiet: bool = False, **options: Any) -> Run:
    """Tune a model, as ``zo-opt train`` does, and give the run.

    Args:
        rows: what to learn: a list of mappings from columns to values, a ``datasets.Dataset``, or a file; the task's own rows if None.
        eval_rows: held-out rows, likewise; some of the others are held out if None.
        quiet: say nothing.
        **options: of :class:`~zo_opt.training.TrainConfig`; those of a part in a mapping, as in ``adapter={"name": "lora", "rank": 4}``.

    Raises:
        ZOError: a mistake in the options or rows.
        NonFiniteLossError: training failed; the last checkpoint is intact.
        InterruptedRunError: SIGINT or SIGTERM; a checkpoint was left, unless no step was made yet.
    """
    given, named = given_rows(rows, eval_rows)
    if twice := named.keys() & options.keys():
        raise ZOError(
            f"{min(twice)} and {'eval_rows' if 'eval_file' in twice else 'rows'} were both given; leave one out."
        )
    config = TrainConfig.from_dict(named | options)
    reporter = Reporter(Console(quiet=True)) if quiet else Reporter()
    _, directory = run_training(config, reporter, "zo_opt.train", config.given(), given)
    return Run(directory, trust_remote_code=config.trust_remote_code, given=given)


def rows_of(rows: Any) -> tuple[Rows, str]:
    """Rows, and what they are called in sentences."""
    if isinstance(rows, str | Path):
        return read_rows(Path(rows)), str(rows)
    return rows_given(rows, "the rows given"), "the rows given"
