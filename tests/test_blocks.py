"""Every code block of the documents runs, page by page, in an empty directory.

Python blocks run as they are; a block that begins with ``# name.py`` is also written into that file. Lines of ``zo-opt`` run in this process, on toy
rows, a tiny model and with few steps; other lines of the shell run in the shell. What needs a network, several processes or minutes is looked at
instead: ``pip install`` and ``make`` are what CI runs; tests/test_documents.py checks ``torchrun`` lines and the options of scripts. Pages prepare
what they need in comments (``invisible-code-block``).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Collection
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from conftest import Sentiment
from forked_runs import FORKING
from sybil import Example
from sybil.document import Document
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser
from sybil.region import Lexeme
from transformers import AutoTokenizer

from zo_opt.cli.main import main
from zo_opt.training import run

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md"]
PAGES += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))
TEXTS = {path: (ROOT / path).read_text() for path in PAGES}
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"

# Options of a command that make it quick, in place of those given; what is None is left out.
FEW = {"steps": "2", "batch_size": "4", "max_train_rows": "16", "held_out": "16", "preset": None, "epochs": None}
QUICK: dict[str, dict[str, str | None]] = {
    "train": FEW,
    "diagnose": FEW | {"queries": "4", "eps_grid": "[0.01]"},
    "compare": {"budget_forwards": "6", "budget_seconds": None, "max_train_rows": "16", "held_out": "16", "seeds": "0", "lr_trials": None},
    "plan": {"length": "32"},
    "schedule": {"steps": "20"},
}  # fmt: skip
STOP = """import os, signal
from zo_opt.schedules import Schedule


class Stop(Schedule):
    def __call__(self, step, epoch, history):
        if step == 1 and not os.path.exists("stopped"):
            open("stopped", "w").close()
            os.kill(os.getpid(), signal.SIGINT)
        return 1
"""
OWN_STOP = ("--query_schedule", "my_stop:Stop")
NEEDS = {"quantise": "torchao", "privacy_epsilon": "dp_accounting"}  # packages that not every environment has


def test_blocks_have_a_language_that_runs() -> None:
    """What is to be read and not to be run is ``text`` or ``math``."""
    for path, text in TEXTS.items():
        fences = re.findall(r"^ *```(\w*)$", text, re.M)
        assert set(fences[::2]) <= {"bash", "python", "text", "math"}, path
        assert set(fences[1::2]) <= {""}, path


class Page:
    """Runs a page's blocks in the working directory."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.evaluate_python = PythonEvaluator()

    def run(self, path: str) -> int:
        """Run all blocks; returns how many there are."""
        parsers = (CodeBlockParser("python", self.python), CodeBlockParser("bash", self.shell), SkipParser())
        document = Document.parse(str(ROOT / path), *parsers)
        examples = list(document.examples())
        for example in examples:
            example.evaluate()
        return len(examples)

    def python(self, example: Example) -> None:
        source = str(example.parsed)
        if named := re.match(r"# (\w+\.py)", source):
            Path(named[1]).write_text(source)
        source = re.sub(r"\w+/SmolLM2[\w-]+", str(self.model), source)
        example.parsed = Lexeme(source, example.parsed.offset, example.parsed.line_offset)
        self.evaluate_python(example)

    def shell(self, example: Example) -> None:
        for line in str(example.parsed).replace("\\\n", " ").splitlines():
            words = shlex.split(line.replace("$'", "'"), comments=True)
            if not words:
                continue
            if words[:2] == ["make", "demo"]:  # which is zo-opt train $(ARGS)
                words = ["zo-opt", "train", *shlex.split(words[2].removeprefix("ARGS="))]
            if words[0].endswith("zo-opt"):
                assert self.command(*words[1:]) == 0, line
            elif words[0] == "pip":
                assert "-m pip install" in (ROOT / ".ci" / "run").read_text()
            elif words[0] == "make":
                assert re.search(rf"^make {words[1]}\b", (ROOT / ".ci" / "run").read_text(), re.M)
            elif words[:1] == ["python"]:
                assert (ROOT / words[1]).is_file()
            elif words[0] != "torchrun":
                assert os.system(f"bash -ec {shlex.quote(line)}") == 0, line

    def command(self, name: str, *rest: str) -> int:
        """A line of zo-opt; what it prints may go into a file."""
        line, into = (rest[:-2], rest[-1]) if rest[-2:-1] == (">",) else (rest, None)
        given = {word[2:] for word in line if word.startswith("--")}
        if any(find_spec(package) is None for option, package in NEEDS.items() if option in given):
            return 0
        if "help" in given:
            with pytest.raises(SystemExit, match="0"):
                main([name, *line])
            return 0
        if name == "train" and "resume" in given:
            self.interrupt(line[line.index("--output_dir") + 1])
            line = (*line, *OWN_STOP)
        words = [name, *(self.quick(name, line, given) if name in QUICK else line)]
        if into is None:
            return main(words)
        with Path(into).open("w") as file, redirect_stdout(file):
            return main(words)

    def interrupt(self, directory: str) -> None:
        """In place of the finished run, one that was stopped after a step."""
        shutil.rmtree(directory)
        Path("my_stop.py").write_text(STOP)
        assert self.command("train", "--output_dir", directory, *OWN_STOP) == 130

    def quick(self, name: str, line: tuple[str, ...], given: set[str]) -> list[str]:
        """The line with a tiny model, toy rows and few steps."""
        if "resume" in given or "print_config" in given:
            return list(line)
        options: dict[str, str | None] = dict(QUICK[name])
        if name != "schedule":
            options["model_name_or_path"] = str(self.model)
        if name not in ("schedule", "plan"):
            options["task"] = "lm" if "lm" in line else "sst2"
            options["precision"] = "fp32"
            if "train_file" not in given:
                options["train_file"] = "films.jsonl"
        kept = without(list(line), options.keys())
        return [*kept, *(part for option, value in options.items() if value for part in (f"--{option}", value))]


def without(line: list[str], options: Collection[str]) -> list[str]:
    """A command line without some options and their values."""
    kept: list[str] = []
    dropped = False
    for word in line:
        if word.startswith("--"):
            dropped = word[2:] in options
        if not dropped:
            kept.append(word)
    return kept


@pytest.fixture
def files(sentiment_files: Sentiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what readers have: rows in files of several kinds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    rows = sentiment_files.rows
    films = [{"sentence": row["text"], "label": row["label"]} for row in rows]
    named = [{"text": row["text"], "label": ("no", "yes")[row["label"]]} for row in rows]
    sums = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(48)]
    for name, lines in (
        ("films", films),
        ("my", named),
        ("rows", sentiment_files.rows),
        ("qa", sums),
        ("new", named[:2]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "my.txt").write_text("the story of two friends\n" * 60)
    return tmp_path


@pytest.fixture(scope="session")
def model(tiny_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a chat template, in a directory of its own."""
    directory = tmp_path_factory.mktemp("blocks") / "tiny"
    shutil.copytree(tiny_dir("llama"), directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.filterwarnings("ignore")  # those of transformers' Trainer
@pytest.mark.parametrize("path", [path for path, text in TEXTS.items() if "```bash" in text or "```python" in text])
def test_blocks(path: str, files: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "subprocess", FORKING)  # forks, which need no imports
    monkeypatch.setattr(run, "train", partial(run.train, model_name_or_path=str(model), precision="fp32", quiet=True))
    before = set(sys.modules)
    try:
        assert Page(model).run(path) > 0
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("my_"):
                del sys.modules[name]
