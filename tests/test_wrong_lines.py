"""Wrong command lines as people type them: each gets one sentence that says what to do, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import run_main

# Command line -> what the sentence must say.
LINES = {
    # near misses
    "trian": "'trian' is no command; .*Did you mean train",
    "evaluate run": "'evaluate' is no command; .*Did you mean eval",
    "train --stpes 3": "Did you mean --steps",
    "train --batchsize 8": "Did you mean --batch_size",
    "train --output out": "Did you mean --output_dir",
    "train --model gpt2": "Did you mean --model_name_or_path",
    "train --eps 0.01": "Did you mean --zo_eps",
    "train --adapter lroa": "Did you mean lora",
    "train --optimizer adamm": "Did you mean adamw",
    "train --schedule consine": "Did you mean cosine",
    "train --task sst3": "Did you mean sst2",
    "train --preset acurate": "Did you mean accurate",
    "train --adapter tt-lora --adapter.rnak 4": "has no option 'rnak'; it has .*Did you mean rank",
    "schedule --query_schedule linaer": "Did you mean linear",
    "schedule --schedule.alhpa 0.5": "Did you mean alpha",
    "compare --methods lora,lroa": "Did you mean lora",
    "compare --optimizer mezo": "Did you mean --methods",
    "plan --batch 4": "Did you mean --batch_size",
    "predict run --files a.csv": "Did you mean --file",
    # numbers that no float can hold
    "train --adapter lora --adapter.alpha " + "9" * 400: "more than 308 digits",
    # names of transformers and PEFT
    "train --learning_rate 1e-4": "Did you mean --lr",
    "train --num_train_epochs 3": "Did you mean --epochs",
    "train --quantize int8": "Did you mean --quantise",
    "train --load_in_4bit": "Did you mean --quantise",
    "train --per_device_train_batch_size 8": "Did you mean --batch_size",
    "train --max_steps 10": "Did you mean --steps",
    "train --max_seq_length 128": "Did you mean --max_length",
    "train --fp16": "Did you mean --precision",
    "train --optim adamw": "Did you mean --optimizer",
    "train --lora_r 8": "Did you mean --adapter.rank",
    "train --adapter lora --lora_alpha 16": r"Did you mean --adapter\.alpha\?",
    "train --lora_dropout 0.1": "perturbation alone, so that there is no dropout",
    "train --logging_steps 10": r"every step is recorded in metrics\.jsonl",
    "train --overwrite_output_dir": "give a new --output_dir",
    "compare --learning_rate 1": "Did you mean --lr",
    # numbers
    "train --steps many": "steps='many' .*whole number of at least 1, such as 1, 10 or 100",
    "train --steps 0": "steps=0 .*at least 1",
    "train --steps 1.5": "steps=1.5 .*whole number",
    "train --steps": "--steps was given without a value; give a whole number",
    "train --lr fast": "lr='fast' .*such as 0, 0.001 or 0.1",
    "train --lr -1": "lr=-1 .*at least 0",
    "train --lr nan": "lr=nan .*at least 0",
    "train --zo_eps 0": "zo_eps=0 .*above 0, such as 0.001, 0.1 or 1",
    "train --batch_size -4": "batch_size=-4 .*at least 1",
    "train --seed x": "seed='x' .*such as 0, 1 or 100",
    "train --adapter lora --adapter.rank 0": "rank=0 .*give a whole number from 1",
    "train --schedule.alpha 2": "alpha=2.0 .*give a number above 0 and below 1",
    "compare --budget_forwards 0": "budget_forwards=0 .*give a positive number",
    "compare --methods lora --seeds a": "seeds='a' .*give whole numbers",
    "generate run --prompt a --temperature 0": "temperature=0 .*above 0",
    "plan --memory 24": "24GB or 22.5GiB",
    "diagnose --queries 1": "at least 2 queries",
    "diagnose --eps_grid 0.01,0.1": r"give a list of numbers, such as \[0.001, 0.01, 0.1\]",
    # devices and choices
    "train --device gpu": "device 'gpu' is not known; give auto.* cpu .*cuda:0",
    "train --device cuda:77": "device 'cuda:77' is not there.*give auto.* cpu .*cuda:0",
    "plan --device gpu": "give auto, cuda or cpu",
    "train --precision fp8": "give auto, mixed or fp32",
    "train --quantise int3": "give int8, int4, bnb-int8 or bnb-nf4",
    "train --resume maybe": "give true or false",
    "completion fish": "give bash or zsh",
    # files and columns
    "train --train_file none.jsonl": "none.jsonl does not exist.*give the path",
    "train --train_file odd.csv --template '{text} was'": "no column 'label'; its columns are review, stars; .*--label_column",
    "train --train_file rows.jsonl --template '{review} was'": "no column 'review'; its columns are text, label; name the right one",
    "train --config none.yaml": "none.yaml cannot be read.*give the path of a YAML file",
    "train --config wrong.yaml": "steps='many' .*whole number",
    "eval nowhere": "nowhere/run.json cannot be read .*give the output_dir of a run",
    "eval run": "run/run.json cannot be read .*give the output_dir of a run",
    "eval": "zo-opt eval needs run_dir: the run's output_dir",
    "predict run": "predict needs --file",
    "replay nowhere --to x": "journal nowhere cannot be read .*give one written by a run",
    "status nowhere": "nowhere is no directory; give the output_dir of a run",
    "schedule --out picture.gif": "ends in .png",
    "diagnose --out taken.png": "taken.png is there already; give another --out",
    # options that do not go together
    "train --patience 2": "patience was given without eval_steps; give both, or leave it out",
    "train --steps 10 --epochs 2": "steps was given with epochs.*leave one out",
    "train --adapter lora --adapter.bottleneck 8": "adapter 'lora' has no option 'bottleneck'; it has .*rank",
    "train --optimizer lozo --directions sphere": "directions is no option of optimizer 'lozo'; leave it out",
    "train out": "'out' stands alone; options are given with their names, such as --output_dir out",
    "generate run": "needs one of --prompt TEXT, --file FILE and --chat",
    "merge run": "merge needs --to",
    "merge run --to out --as gguf": "choose one of model, lora",
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_line_gets_one_sentence(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    (tmp_path / "odd.csv").write_text("review,stars\na,1\nb,2\n")
    (tmp_path / "wrong.yaml").write_text("steps: many\n")
    (tmp_path / "taken.png").touch()
    (tmp_path / "run").mkdir()
    before = sorted(path for path in tmp_path.rglob("*"))
    assert run_main(shlex.split(line)) == 2
    said = capsys.readouterr()
    [sentence] = said.err.splitlines()
    assert said.out == ""
    assert sentence.startswith("zo-opt: error: ") and sentence.endswith((".", "?"))
    assert re.search(LINES[line], sentence), sentence
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_there_are_as_many_as_promised() -> None:
    assert len(LINES) >= 60
