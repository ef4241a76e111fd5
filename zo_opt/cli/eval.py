"""``zo-opt eval``."""

from __future__ import annotations

from argparse import Namespace

from zo_opt.record.progress import Reporter
from zo_opt.training.run import Run


def run(options: Namespace, command: str) -> None:
    """Evaluate a run and say what came out."""
    reporter = Reporter()
    found = Run(
        options.run_dir, device=options.device, precision=options.precision, zero_shot=options.zero_shot,
        trust_remote_code=options.trust_remote_code, reporter=reporter,
    )  # fmt: skip
    what = "zero-shot" if options.zero_shot else "tuned"
    reporter.say(f"{what}: {found.evaluate(options.eval_file).describe()}")
