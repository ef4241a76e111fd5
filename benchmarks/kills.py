"""`kill -9` at random instants: is anything lost?

    python benchmarks/kills.py --kills 200 --out benchmarks/results/kills.json

Tiny jobs (a random Llama of 4 layers, 60 steps, a checkpoint every 7) are killed with SIGKILL about ten times each, and resumed; then
they are left to end. Of four instants one is uniform over the time that a start takes, three over a share of the training. Every job is
held against the same job without
a kill: bytes of the adapter and of the journal, every figure in metrics.jsonl but seconds, results, and the names of all files. After every kill the
number of steps on record is compared with the step after which the next attempt goes on. Every attempt is a fork of one process that has
imported everything, and has read model and rows, so that most kills hit what writes; the report's picture is left out. Bar: no failure,
and no step made again that was on record (of runs with a journal; the others go on from their checkpoint).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import FILLING, make_model, tokenizer_for
from killed_runs import Tally, differences, finish, kill_until_done
from rich.console import Console

from zo_opt.cli import main as main_module
from zo_opt.record import report
from zo_opt.record.progress import Reporter
from zo_opt.training import loop
from zo_opt.training.config import TrainConfig

STEPS = 60
JOBS: dict[str, dict[str, Any]] = {
    "adazeta, adam, split": {
        "optimizer": "adazeta", "adapter": "tt", "query_mode": "split", "warmup_steps": 5, "schedule.max_queries": 4,
        "schedule.min_queries": 2,
    },
    "adazeta, learned feedback": {"optimizer": "adazeta", "adapter": "tt-lora", "save_steps": 7},
    "mezo": {"optimizer": "mezo", "lr_schedule": "constant", "lr": 1e-3},
    "mezo, variance schedule": {
        "optimizer": "mezo", "query_mode": "sequential", "schedule": "variance", "schedule.min_queries": 1,
        "schedule.max_queries": 3,
        "lr": 1e-3,
    },
    "hizoo": {"optimizer": "hizoo", "query_mode": "sequential", "lr": 1e-4},
    "zo-conservative (line search)": {"optimizer": "zo-conservative", "query_mode": "sequential", "lr": 1e-3},
    "mezo-svrg": {"optimizer": "mezo-svrg", "query_mode": "sequential", "lr": 1e-4},
    "adamw (backpropagation)": {"optimizer": "adamw", "lr": 1e-3},
    "learned feedback (the defaults)": {"schedule.max_queries": 4, "schedule.min_queries": 2},
    "adalora, mezo": {"optimizer": "mezo", "adapter": "adalora", "lr": 1e-4},
}  # fmt: skip
WITHOUT_JOURNAL = ("adamw (backpropagation)", "adalora, mezo", "learned feedback (the defaults)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills_a_job", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng, tallies = random.Random(options.seed), {name: Tally() for name in JOBS}
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        place = Path(folder)
        common = _inputs(place)
        prepares = {name: _loaded(place, common, name) for name in JOBS}
        wholes = {name: _whole(place, common, name, prepares[name]) for name in JOBS}
        number = 0
        while sum(tally.kills for tally in tallies.values()) < options.kills:
            name = list(JOBS)[number % len(JOBS)]
            number += 1
            out = place / f"job-{number}" / "out"
            _job(out, common, name, wholes[name], rng, options.kills_a_job, tallies[name], prepares[name])
            print(f"job {number}, {name}: {tallies[name].kills} kills, {tallies[name].failures}", flush=True)
    report = {
        name: {"kills": t.kills, **t.phases, "steps made again": t.redone, "failures": t.failures}
        for name, t in tallies.items()
    }
    failures = sum(len(tally.failures) for tally in tallies.values())
    kills = sum(tally.kills for tally in tallies.values())
    result = {
        "kills": kills, "jobs": number, "failures": failures, "seed": options.seed, "by job": report,
        "torch": torch.__version__, "machine": platform.machine(), "seconds": round(time.monotonic() - began),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(failures > 0)


def _inputs(place: Path) -> list[str]:
    """A model and rows on disk; the options that name them."""
    make_model("llama", std=0.05).save_pretrained(place / "model")
    tokenizer_for("llama").save_pretrained(place / "model")
    words = random.Random(0)
    rows = [{"text": " ".join(words.choices(FILLING, k=4)), "label": i % 2} for i in range(48)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model_name_or_path": place / "model", "train_file": place / "rows.jsonl", "template": "{text} It was",
        "verbalizers": "terrible,great", "device": "cpu", "precision": "fp32", "batch_size": 8,
        "held_out": 8, "steps": STEPS, "save_steps": 7,
    }  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def _line(directory: Path, common: list[str], name: str) -> list[str]:
    own = [word for option, value in JOBS[name].items() for word in (f"--{option}", str(value))]
    return ["train", *common, *own, "--output_dir", str(directory)]


def _loaded(place: Path, common: list[str], name: str) -> Callable[[], None]:
    """What gives a fork the model and rows that are read here."""
    given: list[dict[str, Any]] = []
    with mock.patch("zo_opt.cli.train.run", lambda options, _: given.append(vars(options))):
        main_module.main(_line(place / "out", common, name))
    config, reporter = TrainConfig(**given[0]), Reporter(Console(quiet=True))
    examples = loop.load_examples(config, reporter)
    tools = loop.build_tools(config, examples, reporter)

    def prepare() -> None:
        loop.load_examples = lambda *_: examples
        loop.build_tools = lambda *_: tools
        report.picture = lambda *_: b""

    return prepare


def _whole(place: Path, common: list[str], name: str, prepare: Callable[[], None]) -> tuple[Path, tuple[float, float]]:
    """The directory of an uninterrupted run; the seconds that it took, and its training."""
    directory = place / f"whole-{len(list(place.iterdir()))}" / "out"
    directory.parent.mkdir()
    start = time.monotonic()
    code, said = finish(_line(directory, common, name), directory.with_name("log"), prepare)
    if code != 0:
        raise RuntimeError(f"{name}: {said}")
    trained = json.loads((directory / "results.json").read_text())["train_seconds"]
    return directory, (time.monotonic() - start, trained)


def _job(
    directory: Path,
    common: list[str],
    name: str,
    whole: tuple[Path, tuple[float, float]],
    rng: random.Random,
    kills: int,
    tally: Tally,
    prepare: Callable[[], None],
) -> None:
    directory.parent.mkdir()
    journal, before = name not in WITHOUT_JOURNAL, len(tally.failures)
    line = _line(directory, common, name)
    kill_until_done(line, directory, rng, whole[1], kills, tally, journal=journal, prepare=prepare)
    if len(tally.failures) == before:
        tally.failures += [f"differs in {what}" for what in differences(directory, whole[0], journal=journal)]


if __name__ == "__main__":
    main()
