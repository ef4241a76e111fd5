"""A run is bound to its rows: eval and --resume compare, the training file is needed only where rows are cut from it, names are true."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_main

from zo_opt import ZOError
from zo_opt.record.metrics import MetricsWriter
from zo_opt.tasks.evaluation import Evaluation
from zo_opt.tasks.rows import Example
from zo_opt.tasks.tasks import Task
from zo_opt.training.row_record import RowRecord, hashes_of

Options = Callable[..., list[str]]
TASK = Task("t", "{text}", {"a": "a", "b": "b"})
ROWS = [Example({"text": f"x {i}"}, i % 2) for i in range(6)]


def table(path: Path, rows: list[tuple[str, Any]]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "label": v}) + "\n" for t, v in rows))
    return path


def films(n: int, first: int = 0) -> list[tuple[str, int]]:
    return [(f"a {('dreadful', 'charming')[i % 2]} film {i}", i % 2) for i in range(first, first + n)]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What was said since the last call, in one line."""

    def read() -> str:
        captured = capsys.readouterr()
        return " ".join((captured.out + captured.err).split())

    return read


def test_a_hash_is_of_what_the_task_sees() -> None:
    assert len(set(hashes_of(ROWS, TASK))) == 6
    assert hashes_of([Example({"text": "x 0"}, 0, where="elsewhere")], TASK) == hashes_of(ROWS, TASK)[:1]
    renamed = Task("t", "{text}", {"c": "a", "b": "b"})
    others = [
        ([Example({"text": "x"}, 0)], TASK), ([Example({"text": "x 0"}, 1)], TASK), ([Example({"texts": "x 0"}, 0)], TASK), (ROWS[:1], renamed),
        ([Example({"text": "x 0"}, 0, ("a",))], TASK),
    ]  # fmt: skip
    for rows, task in others:
        assert hashes_of(rows, task) != hashes_of(ROWS[:1], TASK)


def test_the_record_comes_back_and_tells_rows_apart() -> None:
    then = RowRecord.of(TASK, ROWS[:4], ROWS[3:], private=False)
    assert then.trained_on == 1
    plain = json.loads(json.dumps(then.to_plain(each=True)))
    assert RowRecord.from_plain(plain) == then
    assert then.trained_on_of(ROWS, TASK) == 4
    then.check(then, "the run", training=True)
    for train, held, training, what in (
        (ROWS[:3], ROWS[3:], True, r"training rows are not those of the run \(4 then, 3 now\)"),
        ([ROWS[1], ROWS[0], *ROWS[2:4]], ROWS[3:], True, r"training rows .*\(4 as then, but changed\)"),
        (ROWS[:4], ROWS[4:], False, r"held-out rows .*\(3 then, 2 now\)"),
    ):
        with pytest.raises(ZOError, match=what):
            then.check(RowRecord.of(TASK, train, held, private=False), "the run", training=training)
    for damage in (3, {}, {"train": []}, plain | {"held_out": {"rows": "3", "sha256": "x", "trained_on": 0}}):
        with pytest.raises(ZOError, match="damaged"):
            RowRecord.from_plain(damage)
    assert RowRecord.from_plain(None) is None


def test_a_private_run_records_nothing_of_its_training_rows() -> None:
    plain = RowRecord.of(TASK, ROWS, ROWS, private=True).to_plain(each=True)
    assert plain["train"] == {"rows": 6}
    assert plain["held_out"]["trained_on"] is None


def test_blank_lines_of_running_text_are_not_trained_on() -> None:
    task = Task("lm", "{text}", kind="language-modelling")
    lines = [Example({"text": text}) for text in ("one", "", " ", "two")]
    assert RowRecord.of(task, lines[:3], lines[1:], private=False).trained_on == 0


def test_rows_trained_on_are_not_called_held_out() -> None:
    words = [Evaluation({"accuracy": 1.0}, 0.0, 1000, trained_on=n).on_rows for n in (0, 12, None)]
    assert words == [
        "1,000 held-out rows",
        "1,000 rows (12 of them trained on)",
        "1,000 rows (whether trained on is not recorded)",
    ]
    kept = Evaluation({"accuracy": 1.0}, 0.0, 4, [1.0] * 4, trained_on=2)
    assert Evaluation.from_dict(kept.to_dict()).trained_on == 2


def test_eval_refuses_rows_that_changed_and_says_which_were_trained_on(
    toy_options: Options, tmp_path: Path, said: Callable[[], str]
) -> None:
    file, out = table(tmp_path / "a.jsonl", films(20)), str(tmp_path / "out")
    assert run_main(toy_options(output_dir=out, train_file=file, eval_file=None, steps=1)) == 0
    assert "6 held-out rows are few" in said()
    assert run_main(["eval", out]) == 0
    assert "on 6 held-out rows" in said()
    table(file, films(22))
    assert run_main(["eval", out]) == 2
    assert "the held-out rows are not those of this run (6 as then, but changed)" in said()
    others = table(tmp_path / "b.jsonl", [*films(3), *films(4, 100)])
    file.unlink()  # which these rows are not cut from
    assert run_main(["eval", out, "--eval_file", str(others)]) == 0
    text = said()
    assert "on 7 rows (" in text
    assert "of them trained on)" in text
    assert run_main(["eval", out]) == 2
    assert "does not exist" in said()


def test_eval_of_held_out_rows_in_a_file_of_their_own(
    toy_options: Options, tmp_path: Path, said: Callable[[], str]
) -> None:
    train, held = table(tmp_path / "a.jsonl", films(12)), table(tmp_path / "b.jsonl", films(6, 50))
    out = str(tmp_path / "out")
    assert run_main(toy_options(output_dir=out, train_file=train, eval_file=held, steps=1)) == 0
    train.unlink()
    said()
    assert run_main(["eval", out]) == 0
    assert "on 6 held-out rows" in said()
    table(held, films(6, 51))
    assert run_main(["eval", out]) == 2
    assert "name rows to evaluate on with --eval_file" in said()
    assert run_main(["eval", out, "--eval_file", str(held)]) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    del record["rows"], record["resolved"]["task"]  # as earlier versions wrote it
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    table(train, films(12))
    said()
    assert run_main(["eval", out]) == 0
    assert "has no record of its rows" in said()


def test_a_run_evaluated_on_its_training_rows_says_so(
    toy_options: Options, tmp_path: Path, said: Callable[[], str]
) -> None:
    file = table(tmp_path / "a.jsonl", films(12))
    assert run_main(toy_options(output_dir=tmp_path / "out", train_file=file, eval_file=file, steps=1)) == 0
    assert "on 12 rows (12 of them trained on)" in said()
    report = (tmp_path / "out" / "report.md").read_text()
    assert "12 of them trained on" in report
    assert "held out" not in report


@pytest.mark.parametrize("changed", ["train", "eval"])
def test_a_run_is_not_resumed_on_other_rows(
    toy_options: Options, tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    files = {"train": table(tmp_path / "a.jsonl", films(12)), "eval": table(tmp_path / "b.jsonl", films(6, 50))}
    out = tmp_path / "out"
    write = MetricsWriter.write

    def die(self: MetricsWriter, record: Any, *rest: Any) -> None:
        write(self, record, *rest)
        if record.step == 1:
            raise SystemError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", die)
        with pytest.raises(SystemError):
            run_main(
                toy_options(output_dir=out, train_file=files["train"], eval_file=files["eval"], steps=3, save_steps=1)
            )
    before = files[changed].read_text()
    table(files[changed], [(text, 1 - label) for text, label in films(12)])
    said()
    assert run_main(["train", "--output_dir", str(out), "--resume"]) == 2
    assert f"the {'training' if changed == 'train' else 'held-out'} rows are not those of the run in" in said()
    files[changed].write_text(before)
    assert run_main(["train", "--output_dir", str(out), "--resume"]) == 0
    each = json.loads((out / "run.json").read_text())["rows"]["train"]["each"]
    assert len(each) == 12 * 12
