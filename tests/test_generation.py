"""Generation tasks: the teacher-forced loss, what is written, whole runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, run_main, tokenizer_for
from text_tasks import CPU, adapted, assert_resumes_to_the_same_bits, command, results
from torch import Tensor

from zo_opt import MeZO, trainable_parameters
from zo_opt.errors import ZOError
from zo_opt.prompts.store import MemoryStore
from zo_opt.queries.nesting import map_tensors
from zo_opt.schedules import constant_queries
from zo_opt.tasks.evaluation import Prepared, evaluate
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring import Scorer, causal, make_scorer
from zo_opt.tasks.scoring.texts import TextScorer, Writer
from zo_opt.tasks.tasks import custom_generation_task

ARCHITECTURES = ("llama", "gpt2", "opt", "t5")
TASK = custom_generation_task(text_column="text", target_column="a", template="{text} It was")
EXAMPLES = [
    Example({"text": shown}, references=references)
    for shown, references in (
        ("the film is charming", ("great",)),
        ("a story", ("not that terrible, all in all", "fine")),
        ("boring", ("a long way home",)),
        ("two friends and their long way home", ("x",)),
    )
]


def scorer_for(architecture: str, max_new_tokens: int = 6, max_length: int | None = None) -> Any:
    task = replace(TASK, max_new_tokens=max_new_tokens)
    scorer = make_scorer(make_model(architecture), tokenizer_for(architecture), task, max_length)
    assert isinstance(scorer, TextScorer) and isinstance(scorer, Writer)
    return scorer


@torch.no_grad()
def loss_of_row(model: Any, scorer: Any, example: Example) -> Tensor:
    """By the model's own loss, one row without padding."""
    encoded = scorer.encode(example)
    prompt, [target] = scorer.prompt(encoded), encoded.words
    if model.config.is_encoder_decoder:
        return model(input_ids=torch.tensor([prompt]), labels=torch.tensor([target])).loss
    return model(input_ids=torch.tensor([prompt + target]), labels=torch.tensor([[-100] * len(prompt) + target])).loss


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_is_the_mean_of_the_rows_own_losses(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, scorer = adapted(architecture), scorer_for(architecture)
    expected = [loss_of_row(model, scorer, e) for e in EXAMPLES]
    prepared = Prepared(EXAMPLES, scorer, CPU, None)
    for chunk in (512, 3):  # positions through the output head at once
        monkeypatch.setattr(causal, "HEAD_TOKENS", chunk)
        for rows in ([0, 1, 2, 3], [2], [3, 1]):
            loss = prepared.loss(model, prepared.batch(rows))
            assert loss.dtype == torch.float32
            assert loss.item() == pytest.approx(sum(float(expected[i]) for i in rows) / len(rows), rel=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_targets_end(architecture: str) -> None:
    """So that a tuned model stops; and the prompt does not end."""
    scorer = scorer_for(architecture)
    for example in EXAMPLES:
        encoded = scorer.encode(example)
        assert encoded.words[0][-1] == scorer.tokenizer.eos_token_id
        shown = scorer.tokenizer.decode(scorer.prompt(encoded), skip_special_tokens=True)
        assert shown.lstrip() == f"{example.fields['text']} It was"
        written = scorer.tokenizer.decode(encoded.words[0], skip_special_tokens=True)
        assert written.strip() == example.references[0]
        if architecture != "t5":
            assert scorer.prompt(encoded)[-1] != scorer.tokenizer.eos_token_id
            assert written[0] == " "  # the template ends in text


@torch.no_grad()
def written_slowly(model: Any, scorer: Any, example: Example) -> str:
    """One row, the whole sequence anew for every token, without padding or cache."""
    ids, end = scorer.prompt(scorer.encode(example)), scorer.tokenizer.eos_token_id
    new: list[int] = []
    while len(new) < scorer.task.max_new_tokens and end not in new:
        if model.config.is_encoder_decoder:
            start = [model.config.decoder_start_token_id]
            logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([start + new])).logits
        else:
            logits = model(input_ids=torch.tensor([ids + new])).logits
        new.append(int(logits[0, -1].argmax()))
    return str(scorer.tokenizer.decode(new, skip_special_tokens=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_is_greedy_with_adapters_in(architecture: str) -> None:
    model, scorer = adapted(architecture), scorer_for(architecture)
    expected = [written_slowly(model, scorer, e) for e in EXAMPLES]
    assert len(set(expected)) > 1
    plain = [written_slowly(make_model(architecture), scorer, e) for e in EXAMPLES]
    assert expected != plain  # the adapters change what is written
    assert scorer.generate(model, [scorer.encode(e) for e in EXAMPLES], CPU) == expected


def test_the_checkpoints_way_of_generating_is_left_aside() -> None:
    model, scorer = adapted("llama"), scorer_for("llama")
    encoded = [scorer.encode(e) for e in EXAMPLES]
    expected = scorer.generate(model, encoded, CPU)
    own = model.wrapped.generation_config
    own.do_sample, own.temperature, own.top_k, own.repetition_penalty, own.max_length = True, 3.0, 20, 5.0, 3
    state = torch.get_rng_state()
    assert scorer.generate(model, encoded, CPU) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert model.wrapped.generation_config is own


@pytest.mark.parametrize("positions", ["all", "answer"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_what_is_kept_of_prompts_changes_nothing(architecture: str, positions: str) -> None:
    """The layers below the first adapter, or whole prompts; what is written is written from the prompt on anyway."""
    model, scorer = adapted(architecture, positions=positions), scorer_for(architecture)
    prompts = model.prompt_forward()
    prompts.recorder.store = MemoryStore(1 << 23, CPU)
    cached, plain = Prepared(EXAMPLES, scorer, CPU, prompts), Prepared(EXAMPLES, scorer, CPU, None)
    cached.record(2, lambda _: None)
    assert prompts.objection is None
    assert "prompt.hidden_NTH" in cached.batch([0, 3])
    assert prompts.recorder.recorded == len(EXAMPLES)
    found = evaluate(model, cached, 3)
    assert prompts.recorder.recorded == len(EXAMPLES)
    prompts.objection = "for comparison"
    expected = evaluate(model, plain, 3)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert (found.metrics, found.row_scores) == (expected.metrics, expected.row_scores)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_query_modes_agree(architecture: str) -> None:
    """Batched copies see what sequential ones do; split ones what each row gives alone, by its derivative along z."""
    scorer, found = scorer_for(architecture), {}
    for mode in ("sequential", "batched", "split"):
        model = adapted(architecture)
        prepared = Prepared(EXAMPLES, scorer, CPU, None)
        optimizer = MeZO(
            trainable_parameters(model), lr=0.0, zo_eps=1e-2, query_mode=mode, module=model, seed=3,
            query_schedule=constant_queries(4), directions="rademacher",
        )  # fmt: skip
        closure = lambda b, p=prepared, m=model: p.loss(m, b)  # noqa: E731
        batch = prepared.batch([0, 1, 2, 3])
        optimizer.step(closure, batch)
        found[mode] = torch.tensor(optimizer.last_record.projected_grads)
        if mode == "sequential":
            found["rows"] = torch.stack([grads_of_row(model, closure, batch, i) for i in range(4)])
    torch.testing.assert_close(found["batched"], found["sequential"], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found["split"], found["rows"].diagonal(), rtol=1e-2, atol=1e-3)


def grads_of_row(model: Any, closure: Callable[[Any], Tensor], batch: Any, row: int) -> Tensor:
    """Projected gradients of one row's loss along the directions of the step."""
    optimizer = MeZO(
        trainable_parameters(model), lr=0.0, zo_eps=1e-2, seed=3, query_schedule=constant_queries(4),
        directions="rademacher", query_mode="sequential",
    )  # fmt: skip
    alone = map_tensors(lambda x: x[row : row + 1], batch)
    optimizer.step(lambda: closure(alone))
    return torch.tensor(optimizer.last_record.projected_grads)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_it_can_be_differentiated(architecture: str) -> None:
    model, scorer = adapted(architecture), scorer_for(architecture)
    prepared = Prepared(EXAMPLES, scorer, CPU, None)
    prepared.loss(model, prepared.batch([0, 1, 2])).backward()
    grads = [p.grad for p in trainable_parameters(model)]
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert any(g.abs().max() > 0 for g in grads if g is not None)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_prompts_leave_room_for_what_is_written(architecture: str) -> None:
    scorer = scorer_for(architecture, max_new_tokens=10, max_length=40)
    long = Example({"text": "the film is charming " * 40}, references=("great",))
    encoded = scorer.encode(long)
    assert encoded.truncated
    assert len(scorer.prompt(encoded)) + (0 if architecture == "t5" else 10) <= 40
    assert "It was" in scorer.tokenizer.decode(scorer.prompt(encoded))
    wordy = Example({"text": "a film"}, references=("the film is charming " * 40,))
    if architecture == "t5":
        assert len(scorer.encode(wordy).words[0]) == 40
        assert scorer.encode(wordy).words[0][-1] == scorer.tokenizer.eos_token_id
    else:
        encoded = scorer.encode(wordy)
        assert (encoded.shortened, encoded.truncated) == (True, False)
        assert len(encoded.words[0]) == 20  # half of the context
        assert encoded.words[0][-1] == scorer.tokenizer.eos_token_id
        assert scorer.prompt(encoded) == scorer.prompt(
            scorer.encode(Example({"text": "a film"}, references=("great",)))
        )


def test_scores_come_in_the_rows_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are evaluated by length; the best reference counts; only the first line of what is written does."""
    scorer = scorer_for("llama")
    said = {
        "the film is charming": "great\nand",
        "a story": "Fine!",
        "boring": "home",
        "two friends and their long way home": "",
    }

    def generate(self: Scorer, _model: Any, encoded: list[Any], _device: Any) -> list[str]:
        shown = [self.tokenizer.decode(self.prompt(e), skip_special_tokens=True) for e in encoded]  # type: ignore[attr-defined]
        return [said[s.removesuffix(" It was")] for s in shown]

    monkeypatch.setattr(type(scorer), "generate", generate)
    found = evaluate(adapted("llama"), Prepared(EXAMPLES, scorer, CPU, None), 3)
    assert found.primary == "rougeL"
    assert list(found.row_scores) == pytest.approx([1.0, 1.0, 0.4, 0.0])
    assert found.value == pytest.approx(0.6)
    assert found.metrics["exact_match"] == 0.5
    with pytest.raises(ZOError, match=r"no accuracy.*rougeL"):
        _ = found.accuracy


def test_models_that_cannot_write_are_refused() -> None:
    with pytest.raises(ZOError, match="BertForMaskedLM cannot write text"):
        make_scorer(make_model("bert"), tokenizer_for("bert"), TASK)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, sentiment_files: Any) -> Path:
    """Rows whose answer is one of two words."""
    path = tmp_path_factory.mktemp("answers") / "rows.jsonl"
    rows = [{"text": r["text"], "answer": ("terrible", "great")[r["label"]]} for r in sentiment_files.rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_learns_to_answer(
    answers: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {
        "model_name_or_path": tiny_model_dir,
        "train_file": answers,
        "target_column": "answer",
        "template": "{text} It was",
    }
    line = command(
        **own, max_new_tokens=3, optimizer="adamw", adapter="tt", lr=0.01,
        **{"adapter.rank": 8, "adapter.bottleneck": 32, "adapter.layers": 4},
        steps=80, held_out=16, output_dir=tmp_path / "out",
    )  # fmt: skip
    assert run_main(line) == 0
    out = results(tmp_path / "out")
    assert (out["kind"], out["metric"]) == ("generation", "rougeL")
    assert out["before"]["exact_match"] == 0
    assert out["after"]["exact_match"] > 0.7
    assert out["after"]["loss"] < 0.7 * out["before"]["loss"]
    assert out["after"]["rows"] == len(out["after"]["row_scores"]) == len(out["before"]["row_scores"]) == 16
    assert out["after"]["rougeL"] == pytest.approx(sum(out["after"]["row_scores"]) / 16)
    said = capsys.readouterr().out
    assert re.search(rf"ROUGE-L 0\.0% -> {out['after']['rougeL']:.1%} \(\+[0-9.]+ points\) with", said)
    page = (tmp_path / "out" / "report.md").read_text()
    assert f"**{out['after']['rougeL']:.1%}**" in page
    assert f"| exact match before, after | 0.0%, {out['after']['exact_match']:.1%} |" in page
    assert run_main(["eval", str(tmp_path / "out")]) == 0
    assert f"tuned: ROUGE-L {out['after']['rougeL']:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_resumed_runs_end_in_the_same_bits(
    architecture: str, tiny_dir: Callable[[str], Path], answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(directory: Path) -> list[str]:
        return command(
            model_name_or_path=tiny_dir(architecture), train_file=answers, target_column="answer", output_dir=directory, held_out=6,
            max_new_tokens=3, lr=0.02,
        )  # fmt: skip

    assert_resumes_to_the_same_bits(line, tmp_path, monkeypatch)


def test_a_builtin_prompt_on_rows_of_ones_own(tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [{"question": f"what is {i}", "answer": [str(i), "none"]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = command(
        model_name_or_path=tiny_dir("llama"),
        train_file=tmp_path / "rows.jsonl",
        task="nq_open",
        steps=1,
        output_dir=tmp_path / "out",
    )
    assert run_main(line) == 0
    assert results(tmp_path / "out")["metric"] == "exact_match"
