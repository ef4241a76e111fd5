"""A run in use: what ``predict`` and ``generate`` give is what ``eval`` counts and what transformers writes."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Sentiment, run_main
from text_tasks import command, results
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from zo_opt import ZOError, load_adapter_model, load_run
from zo_opt.tasks.rows import read_rows
from zo_opt.training.writing import prompt_tokens

Options = Callable[..., list[str]]


LEARNS = {
    "optimizer": "adamw", "adapter": "lora", "lr": 0.01, "steps": 6, "query_mode": None, "query_schedule": None, "queries": None
}  # fmt: skip


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, toy_options: Options) -> Path:
    """A run on labels."""
    out = tmp_path_factory.mktemp("labelled") / "run"
    assert run_main(toy_options(**LEARNS, output_dir=out)) == 0
    return out


WRITERS = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Callable[[str], Path]) -> Callable[[str, str], Path]:
    """Architecture and positions -> a run on a task of writing, whose adapter does something."""
    made: dict[tuple[str, str], Path] = {}

    def run(architecture: str, positions: str) -> Path:
        if (architecture, positions) not in made:
            place = tmp_path_factory.mktemp("written")
            rows = [
                {"text": f"the film {i} is", "target": word}
                for i, word in enumerate(["great", "a story", "winter"] * 4)
            ]
            (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            line = command(
                model_name_or_path=tiny_dir(architecture), train_file=place / "rows.jsonl", target_column="target", steps=3,
                adapter="lora", optimizer="adamw", lr=0.02, max_new_tokens=7, output_dir=place / "run", template="{text} It was",
            )  # fmt: skip
            assert run_main([*line, "--adapter.positions", positions]) == 0
            made[architecture, positions] = place / "run"
        return made[architecture, positions]

    return run


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- labels ---


@pytest.mark.parametrize("head", ["lm", "classification"])
def test_predicted_labels_are_those_that_eval_counts(
    head: str, toy_options: Options, sentiment_files: Sentiment, tmp_path: Path
) -> None:
    words = {} if head == "lm" else {"verbalizers": None}
    assert run_main(toy_options(**LEARNS, output_dir=tmp_path / "run", head=head, **words)) == 0
    out = tmp_path / "p.jsonl"
    assert run_main(["predict", str(tmp_path / "run"), "--file", str(sentiment_files.eval), "--out", str(out)]) == 0
    found, right = lines_of(out), [row["label"] for row in read_rows(sentiment_files.eval)]
    scores = results(tmp_path / "run")["after"]["row_scores"]
    assert [float(p["label"] == label) for p, label in zip(found, right, strict=True)] == scores
    assert {p["label"] for p in found} == {"0", "1"}  # both are predicted
    for p in found:
        assert sum(p["probabilities"].values()) == pytest.approx(1)
        assert max(p["probabilities"], key=lambda name: p["probabilities"][name]) == p["label"]
    assert [p["row"] for p in found] == list(range(1, len(right) + 1))


def test_rows_need_no_label_and_no_file_of_the_training(labelled: Path, tmp_path: Path) -> None:
    """The task is in run.json: the training rows may be gone."""
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in labelled.iterdir():
        if path.is_file():
            (moved / path.name).write_bytes(path.read_bytes())
    record = json.loads((moved / "run.json").read_text())
    record["config"]["train_file"] = record["config"]["eval_file"] = str(tmp_path / "gone.jsonl")
    (moved / "run.json").write_text(json.dumps(record))
    rows = [{"text": "the film is charming"}, {"text": "boring", "label": "unknown to the run"}]
    run = load_run(moved)
    assert [p.to_dict() for p in run.predict(rows)] == [p.to_dict() for p in load_run(labelled).predict(rows)]
    [alone] = run.predict(rows[:1])
    assert alone.label == run.predict(rows)[0].label
    with pytest.raises(ZOError, match=r"gone\.jsonl does not exist"):
        run.evaluate()


def test_chunks_and_batches_change_no_label(
    labelled: Path, sentiment_files: Sentiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rows = load_run(labelled), read_rows(sentiment_files.eval)
    whole = run.predict(rows)
    monkeypatch.setattr("zo_opt.training.run.CHUNK", 5)
    apart = run.predict(rows, batch_size=2)
    assert [p.label for p in apart] == [p.label for p in whole]
    assert [p.probabilities["1"] for p in apart] == pytest.approx([p.probabilities["1"] for p in whole], abs=1e-5)


def test_evaluate_gives_what_the_run_reported(labelled: Path, sentiment_files: Sentiment) -> None:
    run, reported = load_run(labelled), results(labelled)["after"]
    for found in (run.evaluate(), run.evaluate(sentiment_files.eval), run.evaluate(read_rows(sentiment_files.eval))):
        assert found.row_scores == reported["row_scores"]
        assert found.loss == pytest.approx(reported["loss"], rel=1e-5)
    assert load_run(labelled, zero_shot=True).evaluate().row_scores == results(labelled)["before"]["row_scores"]


# --- text ---


@pytest.mark.parametrize("positions", ["all", "answer"])
@pytest.mark.parametrize("architecture", WRITERS)
def test_generate_is_transformers_own_on_the_loaded_adapter(
    architecture: str, positions: str, written: Callable[[str, str], Path], tiny_dir: Callable[[str], Path]
) -> None:
    directory, base = written(architecture, positions), tiny_dir(architecture)
    model = load_adapter_model(WRITERS[architecture].from_pretrained(base), directory).eval()
    tokenizer, texts = AutoTokenizer.from_pretrained(base), ["the film is", "two friends and their long way", "a"]
    run = load_run(directory)
    seen: set[str] = set()
    for sampling in ({}, {"do_sample": True, "temperature": 1.5, "top_k": 40}):
        expected: list[str] = []
        for text in texts:
            batch = tokenizer(f"{text} It was", return_tensors="pt", return_token_type_ids=False)
            with torch.random.fork_rng():
                torch.manual_seed(3 if sampling else 0)
                ids = model.generate(**batch, max_new_tokens=7, pad_token_id=0, **sampling)[0]
            start = 0 if architecture == "t5" else batch["input_ids"].shape[1]
            expected.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
        state = torch.get_rng_state()
        assert run.generate(texts, **(sampling | {"seed": 3} if sampling else {})) == expected
        assert torch.equal(torch.get_rng_state(), state)
        seen |= set(expected)
        assert run.generate([{"text": text} for text in texts], **sampling, seed=3 if sampling else 0) == expected
    assert len(seen) > 2


TEXTS = ["a", "the film is", "two friends and their long way home", "winter", "the story of the film is a long way"] * 2


@pytest.mark.parametrize("architecture", WRITERS)
def test_several_prompts_at_once_are_written_as_one_at_a_time(
    architecture: str, written: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(written(architecture, "answer"))
    given: list[int] = []
    generate = type(run.model.wrapped).generate

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        given.append(len(options["input_ids"]))
        return generate(self, *args, **options)

    monkeypatch.setattr(type(run.model.wrapped), "generate", counted)
    for options in ({}, {"max_new_tokens": 20}):
        alone = run.generate(TEXTS, batch_size=1, **options)
        assert set(given) == {1}
        given.clear()
        assert run.generate(TEXTS, batch_size=4, **options) == alone and len(set(alone)) > 2
        assert max(given) == 4 and sum(given[2:]) == len(TEXTS)  # the first two tried whether padding is harmless
        given.clear()
    monkeypatch.setattr("zo_opt.training.run.CHUNK", 3)
    assert list(run.texts(TEXTS, batch_size=2, max_new_tokens=20)) == alone
    with pytest.raises(ZOError, match="batch_size was given with do_sample"):
        run.texts(TEXTS, batch_size=2, do_sample=True)
    assert run.generate(TEXTS, do_sample=True, seed=1) == [run.generate([t], do_sample=True, seed=1)[0] for t in TEXTS]
    with pytest.raises(ZOError, match="a prompt of"):  # before the first is written
        run.texts([*TEXTS, "the film " * 70], form="plain")


def test_where_padding_is_no_harm_is_tried(written: Callable[[str, str], Path]) -> None:
    """On the wrong side it is harm: then prompts of one length alone share a batch, and the texts are the same."""
    run = load_run(written("gpt2", "answer"))
    alone = run.generate(TEXTS, batch_size=1)
    run.scorer.pad_left = False
    assert run.generate(TEXTS, batch_size=4) == alone


def test_the_adapter_changes_what_is_written(written: Callable[[str, str], Path]) -> None:
    texts = ["the film is", "two friends and their long way"]
    directory = written("llama", "answer")
    assert load_run(directory).generate(texts) != load_run(directory, zero_shot=True).generate(texts)


def test_forms_of_prompts(written: Callable[[str, str], Path]) -> None:
    run = load_run(written("llama", "answer"))
    inside, plain = run.generate(["the film is"]), run.generate(["the film is It was"], form="plain")
    assert inside == plain
    run.tokenizer.chat_template = (
        "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} It was{% endif %}"
    )
    assert run.generate([[{"role": "user", "content": "the film is"}]]) == inside
    assert run.generate(["the film is"], form="chat") == inside


def test_markup_is_the_prompts_and_never_what_is_said(written: Callable[[str, str], Path]) -> None:
    """In a user's message and a row's text ``</s>`` is letters; a plain text is the user's own prompt, markup and all."""
    run = load_run(written("llama", "answer"))
    run.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    end = run.tokenizer.eos_token_id
    for prompt, form, ends in (
        ([{"role": "user", "content": "a </s> b"}, {"role": "assistant", "content": "</s>"}], "run", 2),
        ("a </s> b", "chat", 1),
        ("a </s> b", "run", 0),
        ("a </s> b", "plain", 1),
    ):
        assert prompt_tokens(run.scorer, prompt, form, "it").count(end) == ends, (prompt, form)  # type: ignore[arg-type]


def test_the_terminal_sees_what_is_written(
    written: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = written("llama", "answer")
    [expected] = load_run(directory).generate(["the film is"])
    capsys.readouterr()
    assert run_main(["generate", str(directory), "--prompt", "the film is"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    (tmp_path / "texts.txt").write_text("the film is\na story\n")
    out = tmp_path / "texts.jsonl"
    assert run_main(["generate", str(directory), "--file", str(tmp_path / "texts.txt"), "--out", str(out)]) == 0
    assert [line["text"] for line in lines_of(out)] == load_run(directory).generate(["the film is", "a story"])


def test_a_conversation_remembers(
    written: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = written("gpt2", "answer")
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    run = load_run(directory)
    run.tokenizer.chat_template = template
    first = [{"role": "user", "content": "the film"}]
    [answer] = run.generate([first], max_new_tokens=3)
    second = [*first, {"role": "assistant", "content": answer.strip()}, {"role": "user", "content": "is a story"}]
    [other] = run.generate([second], max_new_tokens=3)
    monkeypatch.setattr("zo_opt.cli.generate.Run", lambda *_, **__: run)
    monkeypatch.setattr("sys.stdin", io.StringIO("the film\nis a story\n"))
    capsys.readouterr()
    assert run_main(["generate", str(directory), "--chat", "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().out == f"{answer}\n{other}\n"


# --- what cannot be ---


def test_a_prompt_without_tokens_or_with_unknown_ones_is_refused(written: Callable[[str, str], Path]) -> None:
    run = load_run(written("gpt2", "answer"))
    with pytest.raises(ZOError, match="prompt 2 is empty, and this tokenizer begins no text of its own"):
        run.generate(["a film", ""], form="plain")
    run.tokenizer.add_tokens(["zebra"])
    with pytest.raises(ZOError, match=r"prompt 2 holds token \d+ \('zebra'\), and the model's embedding has"):
        run.generate(["a film", "zebra"])


WRONG: dict[str, tuple[list[str], str]] = {
    "no file": (["predict", "RUN"], "--file"),
    "rows without the column": (["predict", "RUN", "--file", "OTHER"], r"other\.jsonl, row 1.*no column 'text'"),
    "a blank cell": (["predict", "RUN", "--file", "BLANK"], r"blank\.jsonl, row 2.*'text' is blank"),
    "no such rows": (["predict", "RUN", "--file", "none.csv"], r"none\.csv does not exist"),
    "no run": (["predict", ".", "--file", "OTHER"], r"run\.json"),
    "a file that is there": (["predict", "RUN", "--file", "OTHER", "--out", "OTHER"], "exists already"),
    "predictions as a picture": (["predict", "RUN", "--file", "OTHER", "--out", "p.png"], r"\.jsonl"),
    "predictions nowhere": (["predict", "RUN", "--file", "OTHER", "--out", "none/p.jsonl"], "does not exist; create"),
    "labels of a run that writes": (["predict", "WRITES", "--file", "OTHER"], "no labels to predict; use generate"),
    "another device": (["predict", "RUN", "--file", "OTHER", "--device", "tpu"], "'tpu'"),
    "no rows in a batch": (["predict", "RUN", "--file", "OTHER", "--batch_size", "0"], "batch_size"),
    "nothing to go on from": (["generate", "WRITES"], "--prompt TEXT, --file FILE and --chat"),
    "two things to go on from": (["generate", "WRITES", "--prompt", "a", "--chat"], "one of --prompt"),
    "no chat template": (["generate", "WRITES", "--prompt", "a", "--form", "chat"], "no chat template"),
    "a temperature without sampling": (["generate", "WRITES", "--prompt", "a", "--temperature", "2"], "temperature was given without do_sample"),
    "a seed without sampling": (["generate", "WRITES", "--prompt", "a", "--seed", "2"], "seed was given without do_sample"),
    "a share above one": (["generate", "WRITES", "--prompt", "a", "--do_sample", "--top_p", "3"], "top_p"),
    "more than the context": (["generate", "WRITES", "--prompt", "a", "--max_new_tokens", "100"], "context of 64"),
    "prompts at once on the terminal": (["generate", "WRITES", "--prompt", "a", "--batch_size", "2"], "batch_size is of no use without --out"),
    "another form": (["generate", "WRITES", "--prompt", "a", "--form", "odd"], "run, chat or plain"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_gets_one_sentence(
    name: str, labelled: Path, written: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    line, what = WRONG[name]
    places = {"RUN": labelled, "WRITES": written("llama", "answer")}
    monkeypatch.chdir(tmp_path)
    for file, rows in (("OTHER", [{"said": "a"}]), ("BLANK", [{"text": "a"}, {"text": " "}])):
        places[file] = tmp_path / f"{file.lower()}.jsonl"
        places[file].write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert run_main([str(places.get(word, word)) for word in line]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert re.search(what, said.splitlines()[-1]), said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("task", [
    {"template": 3}, {"template": "{text"}, {"verbalizers": ["a"]}, {"kind": "odd"}, {"of_a_later_version": 1}, {"max_new_tokens": "many"}, None,
])  # fmt: skip
def test_a_record_without_a_task_of_ours(task: dict[str, Any] | None, labelled: Path, tmp_path: Path) -> None:
    record = json.loads((labelled / "run.json").read_text())
    record["resolved"]["task"] = 7 if task is None else record["resolved"]["task"] | task
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ZOError, match=r"damaged, or of another version|is not well formed|of kind 'odd'"):
        load_run(tmp_path)
