"""``zo-opt compare``."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, fields

from zo_opt.cli.say import print_json, reporter_of
from zo_opt.comparison import output
from zo_opt.comparison.compare import compare
from zo_opt.comparison.config import CompareConfig
from zo_opt.errors import ZOError
from zo_opt.training.config import TrainConfig


def run(options: Namespace, command: str) -> None:
    """Run all methods at one budget and show the table."""
    reporter, as_json = reporter_of(options)
    values = vars(options)
    given = set(values)
    own = {f.name: values.pop(f.name) for f in fields(CompareConfig) if f.name in values}
    rows, directory = compare(CompareConfig(**own), TrainConfig(**values), reporter, command, given)
    reporter.show(*output.to_terminal(rows))
    for reason in output.reasons(rows):
        reporter.say(reason)
    reporter.say(f"table and pictures: {output.NAME}.md, .csv and .png in {directory}")
    if as_json:
        print_json({"output_dir": directory, "methods": [asdict(row) for row in rows]})
    if all(row.score is None for row in rows):
        raise ZOError(f"no run finished; see above, and what each said in the .log files under {directory}.")
