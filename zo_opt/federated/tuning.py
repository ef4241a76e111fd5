"""A plan's model, ready to be tuned by a pool's numbers, and what they make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from zo_opt.adapters import trainable_parameters
from zo_opt.errors import ZOError
from zo_opt.federated.plan import Plan
from zo_opt.federated.weights import Weights
from zo_opt.journal.provenance import frozen_state
from zo_opt.record.progress import Reporter
from zo_opt.system.checksum import fingerprint
from zo_opt.tasks.evaluation import evaluate
from zo_opt.tasks.rows import Example, check_text, make_examples, read_rows
from zo_opt.training.config import TrainConfig
from zo_opt.training.examples import Examples, load_examples
from zo_opt.training.row_record import RowRecord
from zo_opt.training.setup import Tools, build_tools
from zo_opt.training.stepper import training_loss

QUIET = Reporter(Console(quiet=True))


@dataclass(frozen=True)
class Tuning:
    """A model with rows and weights that follow from numbers."""

    tools: Tools
    weights: Weights
    eval_batch_size: int

    def loss(self, rows: Sequence[int]) -> Any:
        """The training loss of rows by their numbers, at the weights as they are."""
        return training_loss(self.tools.model, self.tools.train, self.tools.train.batch(rows))

    def evaluate(self) -> dict[str, Any]:
        """Metrics on the held-out rows, as plain values; without a row's own."""
        found = evaluate(self.tools.model, self.tools.held_out, self.eval_batch_size)
        plain = found.to_dict()
        return {name: value for name, value in plain.items() if name not in ("row_scores", "row_weights")}


def build(config: TrainConfig, examples: Examples, reporter: Reporter = QUIET) -> Tools:
    """The frozen model with its adapter at the start.

    Raises:
        ZOError: something is wrong with model, adapter or rows.
    """
    tools = build_tools(config, examples, reporter)
    if tools.model.schedule is not None:
        raise ZOError(
            f"adapter {config.adapter_name!r} changes on its own as training goes on, which clients at different rounds cannot share; choose "
            "another adapter."
        )
    return tools


def prints(tools: Tools) -> dict[str, str]:
    """Fingerprints of the weights to be tuned and of the frozen model's, as :class:`Pool` takes them; what an adapter froze is in neither:
    its last bits may be the machine's.
    """
    own = tools.model.adapter_state()
    return {
        "start": fingerprint(tools.model.trainable_state()),
        "base": fingerprint(frozen_state(tools.model, own.values())),
    }


def tuning(plan: Plan, examples: Examples, *, record: bool = True) -> Tuning:
    """A plan's model on these rows.

    Args:
        plan: the plan.
        examples: training rows, which a server has none of, and held-out ones, which a client has none of.
        record: keep what is frozen of their forwards.

    Raises:
        ZOError: something is wrong; or the model is another one than the plan's.
    """
    tools = build(plan.config, examples)
    for name, found in prints(tools).items():
        if found != getattr(plan.pool, name):
            what = {"start": "the adapter starts from other weights", "base": "this is another base model"}[name]
            raise ZOError(
                f"{what} than the plan's: versions, device or precision differ; take those of who prepared the training."
            )
    if record:
        tools.record_prompts(plan.config, plan.directory, QUIET)
    return Tuning(tools, Weights(trainable_parameters(tools.model), plan.pool), plan.config.eval_batch_size)


def own_examples(plan: Plan, path: Path) -> Examples:
    """A client's own rows, which are all to train on.

    Raises:
        ZOError: they cannot be read, or do not fit the task.
    """
    rows: Sequence[Example] = make_examples(read_rows(path), plan.task, str(path))
    check_text(rows, plan.task, str(path))
    return Examples(plan.task, rows, [], RowRecord.of(plan.task, rows, [], private=True))


def planned_examples(plan: Plan) -> Examples:
    """The rows that the plan names, as the server has them."""
    return load_examples(plan.config, QUIET)


def local(plan: Plan, node: Mapping[str, Any]) -> Plan:
    """The plan as one client runs it: ``model`` and ``device`` of its own Flower configuration in place of the plan's."""
    config = plan.config
    if "model" in node:
        config = replace(config, model_name_or_path=str(node["model"]))
    if "device" in node:
        config = replace(config, device=str(node["device"]))
    return replace(plan, config=config)
