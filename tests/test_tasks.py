"""The task table: prompts, label words, labels by name and by number; the user's own tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_main
from text_tasks import command, results

from zo_opt import ZOError
from zo_opt.tasks.builtin import TASKS, get_task, task_rows
from zo_opt.tasks.metrics import CLASSIFICATION, GENERATION
from zo_opt.tasks.rows import check_text, make_examples
from zo_opt.tasks.tasks import (
    Task,
    custom_generation_task,
    custom_task,
    parse_verbalizers,
    placeholders,
)

# One row a classification task as the datasets have it, its label's number, its prompt and its label words.
ROWS = {
    "sst2": (
        {"idx": 7, "sentence": "a charming film ", "label": 1},
        1,
        "a charming film It was",
        ["terrible", "great"],
    ),
    "rte": (
        {"premise": "Two cats sleep.", "hypothesis": "Cats sleep.", "label": 0},
        0,
        'Two cats sleep.\nDoes this mean that "Cats sleep." is true? Yes or No?\n',
        ["Yes", "No"],
    ),
    "cb": (
        {"premise": "It rains.", "hypothesis": "It is dry.", "label": 1},
        1,
        'Suppose It rains. Can we infer that "It is dry."? Yes, No, or Maybe?\n',
        ["Yes", "No", "Maybe"],
    ),
    "boolq": (
        {"passage": "Ice floats.", "question": "does ice float", "answer": True},
        1,
        "Ice floats. does ice float?\n",
        ["No", "Yes"],
    ),
    "copa": (
        {
            "premise": "The man broke his toe.",
            "choice1": "He got a hole in his sock.",
            "choice2": "He dropped a hammer on his foot.",
            "question": "cause",
            "label": 1,
        },
        1,
        "The man broke his toe. because",
        ["He got a hole in his sock.", "He dropped a hammer on his foot."],
    ),
    "mrpc": (
        {"sentence1": "It rains.", "sentence2": "Rain falls.", "label": 1},
        1,
        "Do these two sentences mean the same?\nIt rains.\nRain falls.\nYes or No?\n",
        ["No", "Yes"],
    ),
    "piqa": (
        {"goal": "Boil an egg.", "sol1": "Freeze it.", "sol2": "Put it in hot water.", "label": 1},
        1,
        "Goal: Boil an egg.\nAnswer:",
        ["Freeze it.", "Put it in hot water."],
    ),
}

# One row a generation task, its prompt and its right texts.
TARGETS = {
    "arithmetic": ({"question": "Calculate 5 + 91 =", "answer": "96"}, "Calculate 5 + 91 =", ("96",)),
    "nq_open": ({"question": "who sang help", "answer": ["The Beatles", "Beatles"]}, "Question: who sang help?\nAnswer:",
                ("The Beatles", "Beatles")),
    "sciq": ({"support": "Ice floats.", "question": "What floats?", "answer": "ice"}, "Ice floats.\nQuestion: What floats?\nAnswer:",
             ("ice",)),
}  # fmt: skip
LABELLED = [name for name, task in TASKS.items() if task.kind == CLASSIFICATION]


def test_every_task_of_the_table_has_a_row_here() -> None:
    assert set(ROWS) == set(LABELLED)
    assert set(TARGETS) == {name for name, task in TASKS.items() if task.kind == GENERATION}


def test_a_row_becomes_prompt_and_right_texts() -> None:
    for name, (row, prompt, references) in TARGETS.items():
        task = get_task(name)
        [example] = make_examples([row], task, "here")
        assert task.template.format(**example.fields) == prompt
        assert example.references == references
        assert task.labels == []


def test_targets_may_be_lists_numbers_and_truth_values() -> None:
    task = custom_generation_task(text_column="q", target_column="a", template=None)
    rows = [{"q": "x", "a": value} for value in (["one", "", None, "two"], 7, True)]
    assert [e.references for e in make_examples(rows, task, "here")] == [("one", "two"), ("7",), ("true",)]
    for empty in ("", " ", [], [""]):
        with pytest.raises(ZOError, match=r"here, row 1: column 'a' holds no text"):
            make_examples([{"q": "x", "a": empty}], task, "here")


def test_running_text_is_taken_as_it_is() -> None:
    rows = [{"text": "  indented"}, {"text": ""}, {"text": "7 "}]
    assert [e.fields["text"] for e in make_examples(rows, get_task("lm"), "here")] == ["  indented", "", "7 "]
    blank = make_examples([{"text": " "}, {"text": ""}], get_task("lm"), "here")
    with pytest.raises(ZOError, match="here holds no text"):
        check_text(blank, get_task("lm"), "here")


def test_a_row_becomes_prompt_label_and_label_words() -> None:
    for name, (row, number, prompt, words) in ROWS.items():
        task = get_task(name)
        [example] = make_examples([row], task, "here")
        assert task.template.format(**example.fields) == prompt
        assert [text.format(**example.fields) for text in task.verbalizers.values()] == words
        assert example.label == number


def test_labels_are_known_by_name_and_by_number() -> None:
    for task in map(get_task, LABELLED):
        for number, label in enumerate(task.labels):
            for value in (label, f" {label}\n", number, str(number)):
                assert task.label_of(value) == number, value
        for wrong in (len(task.labels), -1, "nonsense", 0.5, "9" * 5000):
            assert task.label_of(wrong) is None, wrong


def test_names_win_over_numbers() -> None:
    task = Task("t", "{text}", {"1": "one", "0": "zero"})
    assert task.label_of("1") == 0
    assert task.label_of(0) == 1


def test_truth_values_are_names() -> None:
    assert get_task("boolq").label_of(True) == 1
    assert get_task("boolq").label_of(False) == 0
    assert get_task("boolq").label_of("true") == 1


def test_substitutions_apply_to_their_column_only() -> None:
    copa = get_task("copa")
    row = ROWS["copa"][0]
    assert copa.fields({**row, "question": "effect", "premise": "cause"})["question"] == "so"
    assert copa.fields({**row, "question": "effect", "premise": "cause"})["premise"] == "cause"
    assert copa.fields({**row, "question": "why"})["question"] == "why"


def test_required_columns_hold_those_of_label_words_and_label() -> None:
    assert set(get_task("copa").required_columns()) == {"premise", "question", "choice1", "choice2", "label"}
    assert get_task("boolq").required_columns()[-1] == "answer"


def test_an_unknown_task_is_told_the_known_ones() -> None:
    with pytest.raises(ZOError, match=r"'sst3' is not known; choose one of sst2, rte, cb, boolq, copa"):
        get_task("sst3")


def test_custom_task_reads_its_columns() -> None:
    task = custom_task(
        ["bad", "good"], text_column="review", label_column="stars", template="{text} by {author}. It was",
        verbalizers="bad=terrible,good=great",
    )  # fmt: skip
    row = {"review": " fine ", "author": "me", "stars": "good"}
    assert task.required_columns() == ["review", "author", "stars"]
    assert task.template.format(**task.fields(row)) == "fine by me. It was"
    assert dict(task.verbalizers) == {"bad": "terrible", "good": "great"}
    assert task.label_of(row["stars"]) == 1


def test_custom_task_has_defaults() -> None:
    task = custom_task(["no", "yes"], text_column="text", label_column="label", template=None, verbalizers=None)
    assert dict(task.verbalizers) == {"no": "no", "yes": "yes"}
    assert "unlikely" in task.template.format(**task.fields({"text": "unlikely", "label": "no"}))


def test_text_with_braces_is_shown_as_it_is() -> None:
    task = custom_task(
        ["0", "1"], text_column="text", label_column="label", template="{text} It was", verbalizers="a,b"
    )
    [example] = make_examples([{"text": "f{x} = {}", "label": 0}], task, "here")
    assert task.template.format(**example.fields) == "f{x} = {} It was"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [("{text", "template"), ("{text}}", "template"), ("{text:{a}", "template"), ("{text!z}", "template"), ("{text:d}", "template"),
     ("{}", "column"), ("{text.upper}", "column"), ("{nowhere}", "column"),  # a placeholder is a column's name; at the latest the first row tells
     ("It was", "shows nothing of the row"), ("{{text}} It was", "shows nothing of the row"), ("It was {mask}.", "shows nothing of the row")],
)  # fmt: skip
def test_templates_that_cannot_be_filled_are_refused(template: str, sentence: str) -> None:
    with pytest.raises(ZOError, match=sentence):
        task = custom_task(["0", "1"], text_column="text", label_column="label", template=template, verbalizers=None)
        make_examples([{"text": "a", "label": 0}], task, "here")


def test_placeholders_in_order() -> None:
    assert placeholders("{b} and {a} {{c}} {mask}") == ["b", "a", "mask"]


def test_verbalizers_by_label_or_by_order() -> None:
    labels = ["bad", "good"]
    expected = {"bad": "very terrible", "good": "great"}
    assert parse_verbalizers("bad=very terrible,good=great", labels) == expected
    assert parse_verbalizers(" bad = very terrible , good=great ", labels) == expected
    assert parse_verbalizers("very terrible,great", labels) == expected


def test_the_order_in_which_words_are_given_numbers_no_label() -> None:
    words = parse_verbalizers("not_entailment=No,entailment=Yes", get_task("rte").labels)
    assert list(words.items()) == [("entailment", "Yes"), ("not_entailment", "No")]


def test_words_that_are_other_labels_must_name_theirs() -> None:
    with pytest.raises(
        ZOError, match=r"give the label no the word 'yes', which is another label.*go to no, yes, in this order"
    ):
        parse_verbalizers("yes,no", ["no", "yes"])
    assert parse_verbalizers("no=yes,yes=no", ["no", "yes"]) == {"no": "yes", "yes": "no"}


def test_wrong_verbalizers_are_refused() -> None:
    """Too few and too many words, half named, twice the same, empty; labels without words, unknown ones, one named twice."""
    for text in ("terrible", "a,b,c", "bad=a,b", "a,a", "a,", "bad=a,good=", "bad=a,good=a", "", "bad=a", "bad=a,good=b,ugly=c",
                 "bad=a,good=b,bad=c"):  # fmt: skip
        with pytest.raises(ZOError, match="verbalizers"):
            parse_verbalizers(text, ["bad", "good"])


# --- the user's own ---------------------------------------------------------------------------------------------------

RESEARCH = """
from zo_opt.tasks.tasks import Task

def rows(split):
    if split == "train":
        for i in range(24):
            yield {"text": f"a film, the {i}th", "label": i % 2}

mine = Task("mine", "{text} It was", {"0": "terrible", "1": "great"}, source=rows)

def made():
    return mine

def wrong():
    return "mine"
"""


@pytest.fixture
def research(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working directory."""
    name = f"research_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(RESEARCH)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_task_of_ones_own_stands_wherever_a_name_does(
    research: str, tiny_dir: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record that names code is a stranger's until one says otherwise."""
    assert get_task(f"{research}:mine") is get_task(f"{research}:made")
    assert len(task_rows(f"{research}:mine")) == 24
    assert task_rows(f"{research}:mine", split="held_out") == []
    assert (
        run_main(
            command(model_name_or_path=tiny_dir("llama"), task=f"{research}:mine", steps=2, output_dir=tmp_path / "out")
        )
        == 0
    )
    assert results(tmp_path / "out")["after"]["rows"] == 7  # 30 %
    assert run_main(["eval", str(tmp_path / "out")]) == 2
    assert f"names code outside zo_opt ({research}:mine)" in capsys.readouterr().err
    assert run_main(["eval", str(tmp_path / "out"), "--trust_remote_code"]) == 0


def test_what_is_no_task_is_refused(research: str) -> None:
    for name, sentence in (
        ("wrong", "gives a str"),
        ("rows", "cannot be called without arguments"),
        ("nothing", "cannot be imported"),
    ):
        with pytest.raises(ZOError, match=sentence):
            get_task(f"{research}:{name}")
    with pytest.raises(ZOError, match="kind 'poetry'"):
        Task("t", "{text}", kind="poetry")
