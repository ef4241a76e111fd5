"""examples/three_formats.sh: from files as people have them to predictions and answers, with no line of Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
from conftest import make_model, tokenizer_for

ROOT = Path(__file__).parent.parent
TEMPLATE = "{% for m in messages %}<s>{{ m['role'][0] }} {{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>a {% endif %}"


@pytest.mark.slow
def test_the_script_runs_as_printed(tmp_path: Path) -> None:
    """On a tiny model that has a chat template, in place of the built-in one."""
    tokenizer = deepcopy(tokenizer_for("llama"))  # which other tests have, too
    tokenizer.chat_template = TEMPLATE
    model = make_model("llama")
    tokenizer.model_max_length = model.config.max_position_embeddings = 512  # rotary: no weight hangs on it
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "tiny")
    command = tmp_path / "bin/zo-opt"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m zo_opt "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    line = [
        "bash",
        str(ROOT / "examples/three_formats.sh"),
        "out",
        "--model_name_or_path",
        "tiny",
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    done = subprocess.run(line, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    reviews, tickets = (
        [json.loads(text) for text in (tmp_path / "out" / name).read_text().splitlines()]
        for name in ("reviews.jsonl", "tickets.jsonl")
    )
    assert [set(row["probabilities"]) for row in reviews] == [{"0", "1"}] * 4
    assert [set(row["probabilities"]) for row in tickets] == [{"Billing", "Delivery", "Technical"}] * 4
    assert "labels: 0 is 'negative', 1 is 'positive'" in done.stderr and "trained on" not in done.stdout
    assert "label words: 0 -> |" in done.stdout and "More (optional)" in done.stdout
    assert "More (optional) ({More (optional)} in the prompt where it is not blank)" in done.stdout
    assert "columns: messages (conversation, whose answers are learned)" in done.stdout
