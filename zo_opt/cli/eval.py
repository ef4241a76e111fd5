"""``zo-opt eval``."""

from __future__ import annotations

from argparse import Namespace

from zo_opt.cli.say import print_json, reporter_of
from zo_opt.training.run import Run


def run(options: Namespace, command: str) -> None:
    """Evaluate a run and say what came out."""
    as_json, reporter = options.json, reporter_of(options)
    found = Run(
        options.run_dir, device=options.device, precision=options.precision, zero_shot=options.zero_shot,
        trust_remote_code=options.trust_remote_code, reporter=reporter,
    )  # fmt: skip
    what = "zero-shot" if options.zero_shot else "tuned"
    result = found.evaluate(options.eval_file)
    reporter.say(f"{what}: {result.describe()}")
    if as_json:
        print_json({"run": str(options.run_dir), "zero_shot": options.zero_shot} | result.to_dict())
