"""``zo-opt predict``."""

from __future__ import annotations

from argparse import Namespace
from contextlib import closing

from zo_opt.cli.lines import Lines
from zo_opt.cli.say import reporter_of
from zo_opt.errors import ZOError
from zo_opt.tasks.rows import read_rows
from zo_opt.training.run import Run


def run(options: Namespace, command: str) -> None:
    """Label the rows of a file: a JSON object a row, in their order, to a file or to the terminal."""
    if options.file is None:
        raise ZOError("predict needs --file, the rows to label.")
    reporter, _ = reporter_of(options, beside=True)
    rows = read_rows(options.file)  # before the model is loaded
    with closing(Lines(options.out)) as lines:
        found = Run(
            options.run_dir, device=options.device, trust_remote_code=options.trust_remote_code, reporter=reporter
        )
        if meant := [f"{label} is {word!r}" for label, word in found.task.verbalizers.items() if word != label]:
            reporter.say(f"labels: {', '.join(meant)}")
        predictions = found.predictions(rows, batch_size=options.batch_size, source=str(options.file))
        with reporter.track("predicting", len(rows), "rows") as tracker:
            for number, prediction in enumerate(predictions, start=1):
                lines.write({"row": number} | prediction.to_dict())
                tracker.advance(1)
    if options.out is not None:
        reporter.say(f"{len(rows):,} predictions are in {options.out}")
