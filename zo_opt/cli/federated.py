"""``zo-opt federated``: prepares a training for Flower, and reports on it; Flower runs it."""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec
from typing import Any

from zo_opt.cli.say import print_json, reporter_of
from zo_opt.errors import ZOError
from zo_opt.federated.plan import APP
from zo_opt.federated.prepare import prepare
from zo_opt.federated.report import report
from zo_opt.record.progress import Reporter
from zo_opt.system.memory import readable


def run(options: Namespace, command: str) -> None:
    """Prepare or report."""
    reporter, as_json = reporter_of(options)
    values: dict[str, Any] = vars(options)
    action = values.pop("action", None)
    if action is None:
        raise ZOError("say what to do: zo-opt federated prepare, or zo-opt federated report.")
    if action == "report":
        if unheeded := [name for name in values if name != "output_dir"]:
            raise ZOError(f"{unheeded[0]} was given, and federated report shows what was prepared; leave it out.")
        if "output_dir" not in values:
            raise ZOError("federated report needs --output_dir, the directory of the training.")
        found = report(values["output_dir"])
        _say(found, reporter)
        if as_json:
            print_json(found)
        return
    directory = prepare(values, reporter, command)
    reporter.say(f"prepared; run it with: flwr run {directory / APP}")
    if find_spec("flwr") is None:
        reporter.say("Flower is not installed here; where the training runs: pip install 'zo-opt[federated]'")
    if as_json:
        print_json({"output_dir": directory})


def _say(found: dict[str, Any], reporter: Reporter) -> None:
    reporter.say(
        f"{found['rounds']:,} of {found['of']:,} rounds, {found['clients']:,} clients, {found['answered']:,} answers to {found['asked']:,} "
        f"requests ({found['late']:,} late)"
    )
    reporter.say(
        f"a client and round: {readable(round(found['bytes_to_a_client_and_round']))} to it, "
        f"{readable(round(found['bytes_from_a_client_and_round']))} from it"
    )
    for kind, count in sorted(found["refused"].items()):
        reporter.say(f"refused: {kind}, {count:,} times")
    reporter.say(f"no answer can move a weight by more than {found['bound_of_an_answer']:.3g}")
    if found["epsilon"] is not None:
        reporter.say(
            f"epsilon {found['epsilon']:.3g} at delta {found['delta']:g} for one client, all its rows together, asked {found['most_asked']:,} times"
        )
    for evaluation in found["evaluations"]:
        figures = ", ".join(f"{k} {v:.4g}" for k, v in evaluation.items() if isinstance(v, float))
        reporter.say(f"after round {evaluation['round']:,}: {figures}")
