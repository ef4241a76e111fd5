"""Reading tables, checking rows, holding rows out."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from zo_opt import ZOError
from zo_opt.tasks.builtin import get_task
from zo_opt.tasks.rows import check_classes, column_values, hold_out, make_examples, read_rows

# What Python's splitlines() takes for line ends besides \n and \r; all of them occur inside scraped texts.
SEPARATORS = ["a\x0bb", "a\x0cb", "a\x1eb", "a\x85b", "a\u2028b", "a\u2029b"]
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=20)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def sentence_of(error: pytest.ExceptionInfo[ZOError]) -> str:
    """The error's text, checked to be one sentence on one line."""
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_jsonl(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\n{"text": "a b", "label": 1}\n\n   \n{"text": "c", "label": "x"}')
    assert read_rows(path) == [{"text": "a b", "label": 1}, {"text": "c", "label": "x"}]


def test_csv_quotes_delimit_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"one, ""two""\nthree",1\nfour,0\n\n')
    assert read_rows(path) == [{"text": 'one, "two"\nthree', "label": "1"}, {"text": "four", "label": "0"}]


def test_tsv_quotes_are_text(tmp_path: Path) -> None:
    """As in GLUE: an opening quotation mark swallows nothing."""
    path = write(tmp_path / "a.tsv", 'sentence\tlabel\n"open quote\t1\na "word" here\t0\n')
    assert read_rows(path) == [{"sentence": '"open quote', "label": "1"}, {"sentence": 'a "word" here', "label": "0"}]


@pytest.mark.parametrize(("name", "text"), [("a.csv", "text,label\nx,0\n"), ("a.tsv", "text\tlabel\nx\t0\n")])
def test_byte_order_mark_and_windows_line_ends(tmp_path: Path, name: str, text: str) -> None:
    path = write(tmp_path / name, b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_rows(path) == [{"text": "x", "label": "0"}]


def test_byte_order_mark_in_jsonl(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x"}\r\n')
    assert read_rows(path) == [{"text": "x"}]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
@example(texts=SEPARATORS)
def test_jsonl_keeps_any_text(tmp_path: Path, texts: list[str]) -> None:
    rows = [{"text": t, "label": 0} for t in texts]
    content = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    assert read_rows(write(tmp_path / "a.jsonl", content)) == rows


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(texts=st.lists(TEXTS.filter(lambda t: "\0" not in t), min_size=1, max_size=5))
@example(texts=[*SEPARATORS, "a\r\nb", "a\rb"])
def test_csv_keeps_any_text(tmp_path: Path, texts: list[str]) -> None:
    rows = [{"text": t, "label": "0"} for t in texts]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["text", "label"], lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    assert read_rows(write(tmp_path / "a.csv", file.getvalue())) == rows


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(texts=st.lists(TEXTS.filter(lambda t: not set(t) & set("\0\t\n\r")), min_size=1, max_size=5))
@example(texts=SEPARATORS)
def test_tsv_keeps_any_text_without_tabs_and_line_ends(tmp_path: Path, texts: list[str]) -> None:
    content = "text\tlabel\n" + "".join(f"{t}\t0\n" for t in texts)
    assert read_rows(write(tmp_path / "a.tsv", content)) == [{"text": t, "label": "0"} for t in texts]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b"\n \n", "empty"),
        ("a.csv", b"", "empty"),
        ("a.csv", b"text,label\n", "empty"),
        ("a.tsv", b"text\tlabel\n\n", "empty"),
        ("a.xlsx", b"text\n", r"\.jsonl, .*\.parquet"),
        ("a", b"text\n", r"\.jsonl, .*\.parquet"),
        ("a.jsonl", b'{"text": 1}\n\n{"text": \n', "line 3"),
        ("a.jsonl", b'{"text": 1}\n[1, 2]\n', "line 2.*list.*object"),
        ("a.jsonl", b"3\n", "line 1.*object"),
        ("a.jsonl", b"\xff\xfe\n", "UTF-8"),
        ("a.csv", b"text,label\n\xe9,1\n", "UTF-8"),
        ("a.csv", b"text,label\na,1\nb,c,1\n", "line 3.*more fields"),
        ("a.tsv", b"text\tlabel\na\tb\t1\n", "line 2.*more fields"),
        ("a.csv", b"text,label\n\n\na,1,2\n", "line 4.*more fields"),
    ],
)
def test_unreadable_files_get_a_sentence_with_path_and_line(
    tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ZOError) as error:
        read_rows(path)
    assert str(path) in sentence_of(error)
    assert re.search(what, sentence_of(error))


@pytest.mark.parametrize("make", [lambda p: p, lambda p: p.mkdir() or p], ids=["missing", "directory"])
def test_no_such_file(tmp_path: Path, make: object) -> None:
    path = make(tmp_path / "rows.jsonl")  # type: ignore[operator]
    with pytest.raises(ZOError, match="does not exist or is no file") as error:
        read_rows(path)
    assert str(path) in sentence_of(error)


def test_a_field_too_long_for_the_csv_module(tmp_path: Path) -> None:
    """The limit of 131,072 characters is Python's, not the user's: read, or refused with a sentence."""
    path = write(tmp_path / "a.csv", "text,label\n" + "x" * 200_000 + ",1\n")
    try:
        assert len(read_rows(path)[0]["text"]) == 200_000
    except ZOError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"sentence": "a", "label": 1}, {"text": "b", "label": 0}], "row 2.*'sentence'.*text, label"),
        ([{"sentence": "a"}], "row 1.*'label'.*sentence"),
        ([{"sentence": None, "label": 1}], "row 1.*'sentence'"),
        ([{"sentence": "a", "label": 1}, {"sentence": "b", "label": 2}], "row 2.*label 2 is unknown.*0, 1"),
        ([{"sentence": "a", "label": "good"}], "row 1.*label 'good' is unknown.*0, 1"),
    ],
)
def test_rows_that_do_not_fit_the_task(rows: list[dict[str, object]], what: str) -> None:
    with pytest.raises(ZOError) as error:
        make_examples(rows, get_task("sst2"), "my.jsonl")
    assert sentence_of(error).startswith("my.jsonl")
    assert re.search(what, sentence_of(error))


def test_a_short_line_of_a_table_is_told_apart(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.csv", "sentence,label\na,1\nb\n"))
    with pytest.raises(ZOError, match=r"row 2.*'label'"):
        make_examples(rows, get_task("sst2"), "a.csv")


def test_one_class_only() -> None:
    task = get_task("sst2")
    examples = make_examples([{"sentence": "a", "label": 1}] * 3, task, "my.jsonl")
    with pytest.raises(ZOError, match="one class only") as error:
        check_classes(examples, task, "my.jsonl")
    assert sentence_of(error).startswith("my.jsonl")
    check_classes([*examples, *make_examples([{"sentence": "a", "label": 0}], task, "")], task, "my.jsonl")


def test_column_values_sort_numbers_by_size_before_words() -> None:
    rows = [{"label": v} for v in (10, "b", 9, "-1", " a ", 10)]
    assert column_values(rows, "label", "my.csv") == ["-1", "9", "10", "a", "b"]


def test_column_values_of_a_missing_column() -> None:
    with pytest.raises(ZOError, match=r"my\.csv, row 2.*'label'.*text"):
        column_values([{"label": 1}, {"text": "a"}], "label", "my.csv")


@given(rows=st.integers(2, 400), wanted=st.integers(1, 500))
def test_hold_out_partitions_the_rows(rows: int, wanted: int) -> None:
    table = [{"n": i} for i in range(rows)]
    train, held_out = hold_out(table, wanted)
    assert sorted(r["n"] for r in train + held_out) == list(range(rows))
    assert train
    assert 1 <= len(held_out) <= wanted
    assert len(held_out) <= max(1, 0.3 * rows)  # at most 30 %
    assert len(held_out) >= min(wanted, int(0.3 * rows))
    assert hold_out(table, wanted) == (train, held_out)


def test_hold_out_ignores_the_global_random_state() -> None:
    import torch

    table = [{"n": i} for i in range(50)]
    before = torch.get_rng_state()
    torch.manual_seed(1)
    first = hold_out(table, 10)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert hold_out(table, 10) == first
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)
