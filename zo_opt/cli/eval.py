"""``zo-opt eval``."""

from __future__ import annotations

from argparse import Namespace

from zo_opt.record.progress import Reporter
from zo_opt.training.evaluate_run import evaluate_run


def run(options: Namespace, command: str) -> None:
    """Evaluate a run and say what came out."""
    reporter = Reporter()
    result = evaluate_run(
        options.run_dir, options.eval_file, options.zero_shot, reporter, precision=options.precision,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    what = "zero-shot" if options.zero_shot else "tuned"
    reporter.say(f"{what}: {result.describe()}")
