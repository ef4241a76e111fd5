"""Tables as people have them, and worse: odd cells, quoting, encodings, headers; read as a run reads them, up to its tokens. For the fuzzing."""

from __future__ import annotations

import csv
import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import make_tokenizer
from rich.console import Console

from zo_opt.record.progress import Reporter
from zo_opt.tasks.scoring import make_scorer
from zo_opt.training.config import TrainConfig
from zo_opt.training.examples import load_examples

MARK = b"\n=====\n"
WORDS = (
    "good",
    "bad",
    "1",
    "0",
    "a film, of two",
    'he said "no"',
    "</s>",
    "<s> <mask>",
    "{text}",
    "C{",
    "été 東京 😀",
    "x" * 300,
)
CELLS: tuple[Any, ...] = (
    "", " ", "\u200b", "\ufeff", "nan", "NaN", "-inf", "inf", "null", "None", "true", "True",
    "01", "1.0", "1e3", "+1", "\u0661", "²", "1_0", "9" * 5000, "--5",
    "line\nline", "a\rb", "tab\tbed", '"', '""', '"open', "a\u2028b", "e\u0301", "\u202e", "\x00", "\ud800", "<pad><unk></s>",
    None, True, False, 0, 1, -1,
    2**63, 10**30, 1.0, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), [], [[]], ["one", "two"], ["", None], [1], {},
    {"text": ["yes"], "answer_start": [0]}, [{"role": "user", "content": "hi"}],
)  # fmt: skip
LABELS: dict[bytes, tuple[str, ...]] = {b"two": ("other",), b"target": (), b"lm": ()} | dict.fromkeys(
    (b"labels", b"words", b"built-in"), ("label",)
)
HEADERS = (
    ("text", "label"), ("label", "text"), ("text", "text", "label"), ("text", "label", "", ""),
)  # fmt: skip
ENCODINGS = (
    *["utf-8"] * 40,
    "utf-8-sig",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-32",
    "latin-1",
    "cp1252",
    "shift_jis",
)
# Which task: the options of a run.
TASKS: dict[bytes, dict[str, Any]] = {
    b"labels": {"template": "{text} It was"},
    b"words": {"template": "{text}", "verbalizers": "1=great,0=terrible"},
    b"two": {"template": '{text}\n{other} "', "label_column": "other"},
    b"built-in": {},
    b"target": {"template": "{text}\nAnswer:", "target_column": "label", "max_new_tokens": 8},
    b"lm": {"task": "lm"},
}  # fmt: skip


def odd_tables(directory: Path) -> list[bytes]:
    """Some hundred tables in several formats: what they are for, the format, the file."""
    del directory
    _llama()
    return [_table(random.Random(seed)) for seed in range(600)]


def _table(rng: random.Random) -> bytes:
    kind = rng.choice(list(TASKS))
    suffix = rng.choice(("csv", "tsv", "jsonl", "jsonl", *["txt"] * (kind == b"lm")))
    fitting = ("sentence", "label") if kind == b"built-in" else ("text", "other", "label")
    header = list(rng.choice((*[fitting] * 8, *HEADERS)))
    odd = rng.choice((0.0, 0.0, 0.0, 0.02, 0.2, 1.0))
    rows = [
        [rng.choice(CELLS) if rng.random() < odd else rng.choice("01") if name in LABELS[kind] else rng.choice(WORDS) for name in header]
        for _ in range(rng.choice((0, 1, *[8] * 6, *[30] * 6)))
    ]  # fmt: skip
    if rng.random() < 0.1 and rows:
        rows[-1] = rows[-1][: rng.randrange(len(header))] if rng.random() < 0.5 else [*rows[-1], "surplus"]
    text = _jsonl(header, rows) if suffix == "jsonl" else _delimited(rng, header, rows, suffix)
    return kind + MARK + suffix.encode() + MARK + text.encode(rng.choice(ENCODINGS), "replace")


def _jsonl(header: list[str], rows: list[list[Any]]) -> str:
    objects = (
        "{" + ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in zip(header, row, strict=False)) + "}"
        for row in rows
    )
    return "\n".join(objects)


def _delimited(rng: random.Random, header: list[str], rows: list[list[Any]], suffix: str) -> str:
    file, quoting = io.StringIO(newline=""), rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONE))
    writer = csv.writer(
        file, delimiter="\t" if suffix == "tsv" else rng.choice(",,,;"), quoting=quoting, escapechar="\\" if quoting == csv.QUOTE_NONE else None,
        lineterminator=rng.choice(("\n", "\r\n", "\r")),
    )  # fmt: skip
    for row in ([] if suffix == "txt" else [header]) + rows:
        writer.writerow(row)
    return file.getvalue()


@cache
def _llama() -> tuple[Any, Any]:
    """Its tokenizer, and of the model no more than the sizes."""
    config = transformers.LlamaConfig(
        vocab_size=600, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=64
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config), make_tokenizer("plain")


def read_odd_table(content: bytes, directory: Path) -> None:
    """As a run does: rows, task, tokens."""
    kind, _, rest = content.partition(MARK)
    suffix, _, rest = rest.partition(MARK)
    name = suffix.decode("ascii", "replace") if suffix in (b"csv", b"tsv", b"jsonl", b"txt") else "csv"
    path = directory / f"rows.{name}"
    path.write_bytes(rest)
    config = TrainConfig(train_file=path, **TASKS.get(kind, {}))
    examples = load_examples(config, Reporter(Console(quiet=True)))
    scorer = make_scorer(*_llama(), examples.task)
    for some in (examples.train, examples.held_out):
        encoded = scorer.encode_all(some)
        assert all(prompt for e in encoded for prompt in e.prompts)
        scorer.collate(encoded)
