"""Language modelling: blocks of running text, their loss, perplexity, whole runs."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FILLING, make_model, run_main, tokenizer_for
from hypothesis import given, settings
from hypothesis import strategies as st
from text_tasks import CPU, adapted, assert_resumes_to_the_same_bits, command, results

from zo_opt import MeZO, trainable_parameters
from zo_opt.errors import ZOError
from zo_opt.schedules import constant_queries
from zo_opt.tasks.builtin import get_task
from zo_opt.tasks.evaluation import Prepared, evaluate
from zo_opt.tasks.rows import Example, hold_out, read_rows
from zo_opt.tasks.scoring import make_scorer

ARCHITECTURES = ("llama", "gpt2", "opt")  # the first and last begin a text with a token of their own
LINES = ["the film is a story of two friends", "", "  and their long way home in winter", "boring " * 9]
EXAMPLES = [Example({"text": line}) for line in LINES]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=20, deadline=None)
@given(lines=st.lists(st.text("ab é\t", max_size=12), min_size=1, max_size=6), length=st.integers(2, 20))
def test_blocks_hold_the_whole_text_once(architecture: str, lines: list[str], length: int) -> None:
    tokenizer = tokenizer_for(architecture)
    ids = tokenizer("\n".join(lines), add_special_tokens=False)["input_ids"]
    scorer = make_scorer(_MODELS[architecture], tokenizer, get_task("lm"), length)
    start = [] if architecture == "gpt2" else [tokenizer.bos_token_id]
    examples = [Example({"text": line}) for line in lines]
    if len(start + ids) < 2:
        with pytest.raises(ZOError, match="too short"):
            scorer.encode_all(examples)
        return
    blocks = [e.prompts[0] for e in scorer.encode_all(examples)]
    assert all(block[: len(start)] == start for block in blocks)
    assert all(len(block) == length for block in blocks[:-1])
    assert 2 <= len(blocks[-1]) <= length
    text = [token for block in blocks for token in block[len(start) :]]
    assert text == ids[: len(text)]
    assert len(ids) - len(text) <= (0 if start else 1)  # a last token alone has nothing to predict it from


_MODELS = {name: make_model(name) for name in ARCHITECTURES}


@torch.no_grad()
def losses_of(model, block: list[int]) -> torch.Tensor:
    """Negative log-likelihoods of a block's tokens after the first, in float64, by the definition."""
    log_probs = model(input_ids=torch.tensor([block])).logits[0].double().log_softmax(-1)
    return torch.stack([-log_probs[i, token] for i, token in enumerate(block[1:])])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_perplexity_is_exp_of_the_mean_loss_of_a_token(architecture: str) -> None:
    model = adapted(architecture)
    scorer = make_scorer(model.wrapped, tokenizer_for(architecture), get_task("lm"), 9)
    prepared = Prepared(EXAMPLES, scorer, CPU, None)
    expected = [losses_of(model, e.prompts[0]) for e in prepared.encoded]
    assert len({len(e) for e in expected}) == 2  # the last block is shorter: the means of rows and of tokens differ
    found = evaluate(model, prepared, 3)
    tokens = torch.cat(expected)
    assert found.loss == pytest.approx(float(tokens.mean()), rel=1e-5)
    assert found.value == found.metrics["perplexity"] == pytest.approx(float(tokens.mean().exp()), rel=1e-5)
    assert list(found.row_scores) == pytest.approx([float(e.mean()) for e in expected], rel=1e-5)
    assert list(found.row_weights) == [len(e) for e in expected]
    weighted = sum(w * s for w, s in zip(found.row_weights, found.row_scores, strict=True)) / sum(found.row_weights)
    assert math.exp(weighted) == pytest.approx(found.value)
    trained = prepared.loss(model, prepared.batch(list(range(len(prepared)))))
    assert trained.item() == pytest.approx(sum(float(e.mean()) for e in expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_kept_layers_change_nothing(architecture: str) -> None:
    model = adapted(architecture)
    scorer = make_scorer(model.wrapped, tokenizer_for(architecture), get_task("lm"), 9)
    cached, plain = Prepared(EXAMPLES, scorer, CPU, model.prompt_forward()), Prepared(EXAMPLES, scorer, CPU, None)
    cached.record(2, lambda _: None)
    assert "prompt.hidden_NTH" in cached.batch([0, len(cached) - 1])
    assert evaluate(model, cached, 3).row_scores == pytest.approx(evaluate(model, plain, 3).row_scores, rel=1e-5)


@pytest.mark.parametrize("mode", ["batched", "split"])
def test_query_modes_agree(mode: str) -> None:
    """One query is the same thing in every mode."""
    found = []
    for query_mode in ("sequential", mode):
        model = adapted("llama")
        scorer = make_scorer(model.wrapped, tokenizer_for("llama"), get_task("lm"), 9)
        prepared = Prepared(EXAMPLES, scorer, CPU, None)
        optimizer = MeZO(
            trainable_parameters(model), lr=0.0, zo_eps=1e-2, query_mode=query_mode, module=model, seed=3,
            query_schedule=constant_queries(1), directions="rademacher",
        )  # fmt: skip
        optimizer.step(lambda b, p=prepared, m=model: p.loss(m, b), prepared.batch([0, 1, 2]))
        found.append(torch.tensor(optimizer.last_record.projected_grads))
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("architecture", "name"), [("bert", "BertForMaskedLM"), ("t5", "T5ForConditionalGeneration")])
def test_models_that_are_not_causal_are_refused(architecture: str, name: str) -> None:
    with pytest.raises(ZOError, match=f"{name} does not predict each token.*load a causal model"):
        make_scorer(make_model(architecture), tokenizer_for(architecture), get_task("lm"))


def test_text_files_are_read_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two\x0b\n\n")
    assert [row["text"] for row in read_rows(tmp_path / "a.txt")] == ["one", "", "  two\x0b"]


def test_the_end_of_a_text_is_held_out() -> None:
    rows = [{"text": str(i)} for i in range(10)]
    assert hold_out(rows, 256, last=True) == (rows[:7], rows[7:])
    assert hold_out(rows, 2, last=True) == (rows[:8], rows[8:])
    assert hold_out(rows[:2], 9, last=True) == (rows[:1], rows[1:2])


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text in which each word is followed by the same one, mostly."""
    rng, words = random.Random(0), []
    for _ in range(700):
        at = FILLING.index(words[-1]) + 1 if words and rng.random() < 0.9 else rng.randrange(len(FILLING))
        words.append(FILLING[at % len(FILLING)])
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("\n".join(" ".join(words[i : i + 10]) for i in range(0, len(words), 10)) + "\n")
    return path


def test_a_run_learns_the_text(
    tiny_dir: Callable[[str], Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = command(
        model_name_or_path=tiny_dir("llama"), train_file=text_file, task="lm", max_length=32, optimizer="adamw", adapter="tt-lora",
        lr=0.03, steps=30, output_dir=tmp_path / "out",
    )  # fmt: skip
    assert run_main(line) == 0
    out = results(tmp_path / "out")
    assert (out["kind"], out["metric"]) == ("language-modelling", "perplexity")
    before, after = out["before"]["perplexity"], out["after"]["perplexity"]
    assert after < 0.6 * before
    assert after == pytest.approx(math.exp(out["after"]["loss"]))
    assert len(out["after"]["row_weights"]) == len(out["after"]["row_scores"]) == out["after"]["rows"]
    said = capsys.readouterr().out
    shown = f"perplexity {before:,.2f} -> {after:,.2f} ({after - before:+.2f}, less is better) with"
    assert shown in said
    page = (tmp_path / "out" / "report.md").read_text()
    assert re.search(rf"\| perplexity after \| \*\*{re.escape(f'{after:,.2f}')}\*\* ± [0-9.]+ \(-", page)
    assert run_main(["eval", str(tmp_path / "out"), "--eval_file", str(text_file)]) == 0
    assert "tuned: perplexity" in capsys.readouterr().out


def test_resumed_runs_end_in_the_same_bits(
    tiny_dir: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(directory: Path) -> list[str]:
        return command(
            model_name_or_path=tiny_dir("gpt2"),
            train_file=text_file,
            task="lm",
            max_length=32,
            output_dir=directory,
            lr=0.02,
        )

    assert_resumes_to_the_same_bits(line, tmp_path, monkeypatch)


def test_perplexity_beyond_all_numbers_is_reported(
    tiny_dir: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infinite in words, null in JSON."""
    monkeypatch.setattr("zo_opt.tasks.evaluation.perplexity", lambda _: math.inf)
    line = command(model_name_or_path=tiny_dir("gpt2"), train_file=text_file, task="lm", max_length=32, steps=1)
    assert run_main([*line, "--output_dir", str(tmp_path / "out")]) == 0
    assert results(tmp_path / "out")["after"]["perplexity"] is None


def test_rows_of_a_table_are_a_text_too(tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("story,other\n" + "".join(f"the film is {i},x\n" for i in range(30)))
    line = command(
        model_name_or_path=tiny_dir("gpt2"), train_file=tmp_path / "rows.csv", task="lm", text_column="story", max_length=16,
        steps=1, output_dir=tmp_path / "out",
    )  # fmt: skip
    assert run_main(line) == 0


@pytest.mark.slow
def test_wikitext(tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """Real text, where it is at hand."""
    found = [*(Path(__file__).parents[2] / "shared" / "data" / "wikitext-2").glob("*.txt")]
    if not found:
        pytest.skip("no shared data here")
    line = command(
        model_name_or_path=tiny_dir("llama"), train_file=found[0], task="lm", max_length=64, steps=1, max_train_rows=60, held_out=30,
        output_dir=tmp_path / "out",
    )  # fmt: skip
    assert run_main(line) == 0
    assert results(tmp_path / "out")["after"]["perplexity"] > 1
