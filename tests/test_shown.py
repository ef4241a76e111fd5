"""What a run says and records of its rows at the start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_main, tokenizer_for
from text_tasks import command

Options = Callable[..., list[str]]


def test_columns_prompt_and_label_words(
    toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"said": f"the film {i}", "mood": "good", "id": i} for i in range(8)] + [
        {"said": "boring", "mood": "bad", "id": 9}
    ] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "text_column": "said",
        "label_column": "mood",
        "verbalizers": "good=great,bad=not terrible",
        "eval_file": None,
    }
    line = toy_options(steps=1, train_file=tmp_path / "rows.jsonl", output_dir=tmp_path / "out", **changes)
    assert run_main(line) == 0
    said = capsys.readouterr().out.splitlines()
    assert "columns: said ({text} in the prompt), mood (label)" in said
    [prompt] = [s for s in said if s.startswith("prompt of the first row")]
    tokenizer = tokenizer_for("llama")
    expected = [tokenizer.decode([i]) for i in tokenizer("the film 0 It was")["input_ids"]]
    assert prompt.endswith(": |" + "|".join(expected) + "|")
    words = {"bad": " not terrible", "good": " great"}  # in the labels' order
    tokens = {
        k: [tokenizer.decode([i]) for i in tokenizer(w, add_special_tokens=False)["input_ids"]]
        for k, w in words.items()
    }
    assert "label words: " + ", ".join(f"{k} -> |{'|'.join(t)}|" for k, t in tokens.items()) in said
    shown = json.loads((tmp_path / "out" / "run.json").read_text())["shown"]
    assert (shown["prompt_tokens"], shown["label_words"]) == (expected, tokens)
    assert shown["columns"] == {"said": "{text} in the prompt", "mood": "label"}


def test_what_is_seldom_meant_is_said(toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"the film {i}", "label": (":heart:", "[b]bad[/b]")[i % 2]} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"train_file": tmp_path / "rows.jsonl", "eval_file": None, "verbalizers": None}
    assert (
        run_main(toy_options(steps=1, output_dir=tmp_path / "out", template=r"{text} {label}\nIt was", **changes)) == 0
    )
    said = capsys.readouterr().out
    assert "the prompt shows the column 'label', which is what the model is to find" in said
    assert "the template holds a backslash and an n, which are letters; a line end is written $'...\\n...'" in said
    assert "label words: :heart: -> |" in said and ", [b]bad[/b] -> |" in said  # neither a picture nor a style


@pytest.mark.parametrize("task", ["writing", "running text"])
def test_what_is_to_be_written(
    task: str, tiny_dir: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text((json.dumps({"text": "the film is", "end": "great"}) + "\n") * 40)
    own = {"target_column": "end"} if task == "writing" else {"task": "lm", "max_length": 16}
    line = command(
        model_name_or_path=tiny_dir("llama"),
        train_file=tmp_path / "rows.jsonl",
        steps=1,
        output_dir=tmp_path / "out",
        **own,
    )
    assert run_main(line) == 0
    said = capsys.readouterr().out
    if task == "writing":
        assert "columns: text ({text} in the prompt), end (text to write)\n" in said
        assert "what is learned after it: | great|</s>|\n" in said
    else:
        assert "columns: text ({text} in the prompt)\n" in said and "what is learned after it" not in said
        tokenizer = tokenizer_for("llama")
        block = [tokenizer.decode([i]) for i in tokenizer("the film is\n")["input_ids"]]
        assert f"prompt of the first row, tokens between |: |{'|'.join(block)}".replace("\n", "\\n") in said


def test_nothing_is_shown_of_a_row_that_is_private(
    toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = toy_options(steps=1, output_dir=tmp_path / "out", privacy_noise=1, privacy_clip=5)
    assert run_main(line) == 0
    assert "prompt of the first row" not in capsys.readouterr().out
    shown = json.loads((tmp_path / "out" / "run.json").read_text())["shown"]
    assert (shown["prompt_tokens"], shown["target_tokens"]) == (None, [])
    assert set(shown["label_words"]) == {"0", "1"}
