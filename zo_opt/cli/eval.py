"""``zo-opt eval``."""

from __future__ import annotations

import json
from argparse import Namespace
from contextlib import closing
from datetime import datetime

from zo_opt.cli.say import print_json, reporter_of
from zo_opt.errors import ZOError
from zo_opt.system.files import GrowingFile
from zo_opt.training.run import Run

NAME = "evaluations.jsonl"


def run(options: Namespace, command: str) -> None:
    """Evaluate a run, say what came out, and add it to the run's evaluations."""
    reporter, as_json = reporter_of(options)
    out = options.out or options.run_dir / NAME
    if options.out is not None and (out.suffix != ".jsonl" or not out.parent.is_dir()):
        raise ZOError(f"--out {out} is not possible; give a name that ends in .jsonl, in a directory that is there.")
    found = Run(
        options.run_dir, device=options.device, precision=options.precision, zero_shot=options.zero_shot,
        trust_remote_code=options.trust_remote_code, reporter=reporter,
    )  # fmt: skip
    what = "zero-shot" if options.zero_shot else "tuned"
    result = found.evaluate(options.eval_file)
    values = {"run": str(options.run_dir), "zero_shot": options.zero_shot} | result.to_dict()
    reporter.say(f"{what}: {result.describe()}")
    if as_json:
        print_json(values)
    made = {"made": datetime.now().astimezone().isoformat(timespec="seconds"), "command": command}
    with closing(GrowingFile(out)) as file:
        file.append(json.dumps(made | values, ensure_ascii=False).encode())
        file.sync()
    reporter.say(f"added to {out}")
