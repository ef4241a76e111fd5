"""Conversations: what of a row is learned, in which tokens, and that generation sees the same prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import make_model, run_main, tokenizer_for
from text_tasks import command, results

import zo_opt
from zo_opt import ZOError
from zo_opt.tasks.chat import asked_of, chat_task
from zo_opt.tasks.rows import make_examples
from zo_opt.tasks.scoring import make_scorer

TEMPLATE = "{% for m in messages %}<s>{{ m['role'][0] }} {{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>a {% endif %}"
THREE = [
    {"role": "system", "content": "friends"}, {"role": "user", "content": "the film"}, {"role": "assistant", "content": "great"},
    {"role": "user", "content": "a story"}, {"role": "assistant", "content": "not terrible"},
]  # fmt: skip
ROWS = [
    {"messages": THREE},
    {"messages": [{"role": "user", "content": "winter"}, {"role": "assistant", "content": "way home"}]},
]


def scorer_for(rows: list[dict[str, Any]], template: str | None = TEMPLATE, **options: Any) -> tuple[Any, list[Any]]:
    task, tokenizer = chat_task(rows[0]), tokenizer_for("llama")
    assert task is not None
    tokenizer.chat_template = template
    return make_scorer(make_model("llama"), tokenizer, task, **options), make_examples(rows, task, "chat.jsonl")


def shown(scorer: Any, encoded: Any) -> tuple[str, str]:
    """Prompt and target as text, special tokens too."""
    return scorer.tokenizer.decode(scorer.prompt(encoded)), scorer.tokenizer.decode(encoded.words[0])


def test_every_answer_is_learned_after_what_was_said_before_it() -> None:
    scorer, examples = scorer_for(ROWS)
    found = [shown(scorer, e) for e in scorer.encode_all(examples)]
    start = "<s>s friends</s>\n<s>u the film</s>\n<s>a "
    assert found == [
        (start, "great</s>"),
        (f"{start}great</s>\n<s>u a story</s>\n<s>a ", "not terrible</s>"),
        ("<s>u winter</s>\n<s>a ", "way home</s>"),
    ]
    assert [e.references for e in scorer.encode_all(examples)] == [("great",), ("not terrible",), ("way home",)]


def test_the_tokens_are_those_of_the_template_as_a_whole() -> None:
    scorer, examples = scorer_for(ROWS)
    whole = scorer.tokenizer.apply_chat_template(THREE, tokenize=True, return_dict=False)
    encoded = scorer.encode_all(examples)[1]
    assert encoded.prompts[0] == whole[: len(encoded.prompts[0])]  # but for the line end behind it
    asked = scorer.tokenizer.apply_chat_template(
        THREE[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert scorer.prompt(encoded) == asked


PAIRS = {
    "texts": {"prompt": "the film", "completion": "great"},
    "messages": {"prompt": [THREE[1]], "completion": [THREE[2]]},
}


@pytest.mark.parametrize("kind", PAIRS)
def test_prompt_and_completion(kind: str) -> None:
    scorer, examples = scorer_for([PAIRS[kind]])
    assert [shown(scorer, e) for e in scorer.encode_all(examples)] == [("<s>u the film</s>\n<s>a ", "great</s>")]


def test_only_the_completion_is_learned() -> None:
    scorer, examples = scorer_for([{"prompt": THREE[:4], "completion": THREE[4:]}])
    assert [shown(scorer, e)[1] for e in scorer.encode_all(examples)] == ["not terrible</s>"]


def test_an_answer_without_weight_is_said_and_not_learned() -> None:
    scorer, examples = scorer_for(
        [{"messages": [*THREE[:2], THREE[2] | {"weight": 0}, THREE[3], THREE[4] | {"weight": 1}]}]
    )
    [encoded] = scorer.encode_all(examples)
    assert "great" in shown(scorer, encoded)[0] and shown(scorer, encoded)[1] == "not terrible</s>"


def test_a_number_is_a_text_as_in_other_columns() -> None:
    scorer, examples = scorer_for([{"prompt": "2 + 2 =", "completion": 4}])
    assert [shown(scorer, e)[1] for e in scorer.encode_all(examples)] == ["4</s>"]


def test_texts_stand_as_they_are_where_there_is_no_template() -> None:
    scorer, examples = scorer_for([{"prompt": "the film is", "completion": " great"}], template=None)
    assert [shown(scorer, e) for e in scorer.encode_all(examples)] == [("<s>the film is", " great</s>")]


def test_markup_in_a_message_is_letters() -> None:
    row = {"messages": [THREE[1] | {"content": "a </s> b"}, THREE[2]]}
    scorer, examples = scorer_for([row])
    [encoded] = scorer.encode_all(examples)
    assert scorer.prompt(encoded).count(scorer.tokenizer.eos_token_id) == 1
    assert scorer.chat_prompt(asked_of(row, ("messages",), "it"), "it") == scorer.prompt(encoded)


def test_a_long_conversation_loses_its_beginning() -> None:
    scorer, examples = scorer_for([{"messages": [THREE[1] | {"content": "the film " * 40}, THREE[2]]}], max_length=40)
    [encoded] = scorer.encode_all(examples)
    assert encoded.truncated and len(encoded.prompts[0]) <= 40
    assert shown(scorer, encoded)[0].endswith("film </s>\n<s>a ") and shown(scorer, encoded)[1] == "great</s>"


@pytest.fixture
def instruct(tiny_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny model whose tokenizer has a chat template."""
    tokenizer = tokenizer_for("llama")
    tokenizer.chat_template = TEMPLATE
    path = tmp_path / "instruct"
    make_model("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_a_run_on_conversations(
    suffix: str, instruct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a file to an answer; training and generation see the same prompt."""
    rows, path = ROWS * 4, tmp_path / f"chat{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows))
    out = tmp_path / "out"
    line = command(model_name_or_path=instruct, train_file=path, steps=2, output_dir=out, max_new_tokens=4)
    assert run_main(line) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["resolved"]["task"]["conversation"] == ["messages"]
    assert "rougeL" in results(out)["after"]
    run = zo_opt.load_run(out)
    by_text, by_messages = run.generate(["winter"]), run.generate([[{"role": "user", "content": "winter"}]])
    assert by_text == by_messages == run.generate([rows[1]])  # the answer that stands there is left out
    capsys.readouterr()
    assert run_main(["generate", str(out), "--prompt", "winter"]) == 0
    assert capsys.readouterr().out == by_text[0] + "\n"
    assert run_main(["eval", str(out)]) == 0
    answers = run.evaluate(rows[:2])  # of which the first has two
    assert (answers.rows, answers.trained_on) == (3, 3)
    for prompts, what in NO_PROMPTS.values():
        with pytest.raises(ZOError, match=what):
            run.generate(prompts)


NO_PROMPTS: dict[str, tuple[Any, str]] = {
    "one text": ("hello", "the prompts are a text; give a list"),
    "one row": (ROWS[1], "the prompts are a row; give a list"),
    "nothing": ([None], "prompt 1 is of type NoneType; give a text, a row, or a list of messages"),
    "texts in a list": ([["a", "b"]], r"prompt 1: .* holds \['a', 'b'\] and no list of messages"),
    "no content": ([[THREE[1], THREE[2] | {"content": None}]], "prompt 1, message 2: column 'content' is empty"),
    "parts": (
        [[THREE[1] | {"content": [{"type": "text", "text": "a"}]}]],
        "prompt 1, message 1: column 'content' holds .* a list and no text",
    ),
    "another role": ([[{"role": "human", "content": "a"}]], "prompt 1, message 1: role 'human' is not known"),
    "a blank text": ([" "], "prompt 1, message 1: column 'content' is blank"),
    "an answer alone": ([{"messages": [THREE[2]]}], "prompt 1: .* an answer to nothing"),
}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, r"row 1: column 'messages' holds \[\] and no list of messages"),
    "a text": ({"messages": "hello"}, "holds 'hello' and no list of messages"),
    "messages without a role": ({"messages": [{"content": "a"}]}, "row 1, message 1: role None is not known; give one of system, user, assistant"),
    "another role": ({"messages": [{"role": "human", "content": "a"}]}, "role 'human' is not known"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}, THREE[2]]}, "message 1: column 'content' holds .*no text"),
    "a blank answer": ({"messages": [THREE[1], {"role": "assistant", "content": " "}]}, "message 2: column 'content' is blank"),
    "a call of a tool": ({"messages": [THREE[1], THREE[2] | {"tool_calls": [1]}]}, "message 2: it calls tools"),
    "nothing to learn": ({"messages": [THREE[1]]}, "column 'messages' holds no answer of the assistant"),
    "an answer to nothing": ({"messages": [THREE[2]]}, "holds no answer of the assistant"),
    "a call as it was written once": ({"messages": [THREE[1], THREE[2] | {"function_call": {"name": "f"}}]}, "message 2: it calls tools"),
    "no answer of weight": ({"messages": [THREE[1], THREE[2] | {"weight": 0}]}, "holds no answer of the assistant"),
    "a completion of nothing": ({"prompt": "a", "completion": None}, "row 1: column 'completion' is empty"),
    "a mapping": ({"prompt": "a", "completion": {"text": "b"}}, "row 1: column 'completion' holds .* a mapping and no text"),
    "a blank prompt": ({"prompt": "", "completion": "a"}, "column 'prompt' is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_are_no_conversations(name: str) -> None:
    row, what = WRONG[name]
    with pytest.raises(ZOError, match=what):
        scorer_for([row])


MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no chat template": ("llama", ROWS[0], "no chat template; give an instruct model"),
    "an encoder": ("bert", ROWS[0], "BertForMaskedLM does not take conversations; load a causal model"),
    "an encoder-decoder": ("t5", PAIRS["texts"], "does not take conversations.*--text_column"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_do_not_converse(
    name: str, tiny_dir: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture, row, what = MODELS[name]
    (tmp_path / "chat.jsonl").write_text((json.dumps(row) + "\n") * 4)
    line = command(
        model_name_or_path=tiny_dir(architecture), train_file=tmp_path / "chat.jsonl", output_dir=tmp_path / "out"
    )
    assert run_main(line) == 2
    assert re.search(what, capsys.readouterr().err)


def test_a_template_that_does_not_ask_where_it_answers() -> None:
    odd = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    scorer, examples = scorer_for(ROWS, template=odd)
    with pytest.raises(
        ZOError, match=r"chat\.jsonl, row 1: this tokenizer's chat template does not write an answer where it asks"
    ):
        scorer.encode_all(examples)
    scorer, examples = scorer_for(ROWS, template="{{ raise_exception('no system here') }}")
    with pytest.raises(ZOError, match=r"row 1 does not fit the tokenizer's chat template \(no system here\)"):
        scorer.encode_all(examples)


def test_what_is_shown_of_a_conversation(instruct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:1] * 8))
    line = command(
        model_name_or_path=instruct, train_file=tmp_path / "chat.jsonl", steps=1, output_dir=tmp_path / "out"
    )
    assert run_main(line) == 0
    said = capsys.readouterr().out
    assert "columns: messages (conversation, whose answers are learned)\n" in said
    tokenizer = tokenizer_for("llama")
    asked, answer = ["|".join(tokenizer.decode([i]) for i in tokenizer(text, add_special_tokens=False)["input_ids"])
                     for text in ("<s>s friends</s>\n<s>u the film</s>\n<s>a ", "great")]  # fmt: skip
    assert f"prompt of the first row, tokens between |: |{asked}|\n".replace("\n|", "\\n|") in said
    assert f"what is learned after it: |{answer}|</s>|\n" in said
