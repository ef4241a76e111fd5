"""Scores against a slow oracle: the plain model on one unpadded example at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from conftest import CONTEXT, make_model, make_tokenizer, tokenizer_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zo_opt import ZOError
from zo_opt.tasks.evaluation import Prepared
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring import Scorer, make_scorer
from zo_opt.tasks.tasks import Task

CAUSAL, ALL = ("llama", "gpt2", "opt"), ("llama", "gpt2", "opt", "bert", "t5")
TEXTS = (
    "the film is a charming story",
    "boring",
    "two friends and their long way home in winter is dreadful",
    "a film",
)
SINGLE = {"0": "terrible", "1": "great", "2": "positive"}
SEVERAL = {"0": "terrible", "1": "not that great", "2": "unlikely"}


def make_task(architecture: str, verbalizers: dict[str, str]) -> Task:
    return Task("t", "{text} It was {mask}." if architecture == "bert" else "{text} It was", verbalizers)


def make_examples(task: Task, texts: tuple[str, ...] = TEXTS) -> list[Example]:
    return [Example({"text": t}, i % len(task.verbalizers)) for i, t in enumerate(texts)]


def scores_of(scorer: Scorer, model: nn.Module, examples: list[Example]) -> Tensor:
    batch = scorer.collate([scorer.encode(e) for e in examples])
    assert batch["labels"].tolist() == [e.label for e in examples]
    with torch.no_grad():
        return scorer.scores(model, batch)


def oracle(architecture: str, model: Any, example: Example, task: Task) -> list[float]:
    """For each label the sum of its words' token log-probabilities, from the plain model's own logits."""
    tokenizer = tokenizer_for(architecture)
    scores = []
    with torch.no_grad():
        for template in task.verbalizers.values():
            word = template.format(**example.fields)
            ids = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
            if architecture == "bert":
                text = task.template.format(**example.fields, mask="<mask>" * len(ids))
                prompt = torch.tensor([tokenizer(text)["input_ids"]])
                places = (prompt[0] == tokenizer.mask_token_id).nonzero().flatten()
                log_probs = model(input_ids=prompt).logits[0].log_softmax(-1)[places]
            elif architecture == "t5":
                prompt = torch.tensor([tokenizer(task.template.format(**example.fields))["input_ids"]])
                start = torch.tensor([[model.config.decoder_start_token_id, *ids]])
                log_probs = model(input_ids=prompt, decoder_input_ids=start).logits[0, :-1].log_softmax(-1)
            else:
                prompt = tokenizer(task.template.format(**example.fields))["input_ids"]
                sequence = torch.tensor([prompt + ids])
                log_probs = model(input_ids=sequence).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            assert len(log_probs) == len(ids)
            scores.append(sum(float(log_probs[i, token]) for i, token in enumerate(ids)))
    return scores


def assert_same_up_to_a_constant_per_row(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.log_softmax(1), expected.log_softmax(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("verbalizers", [SINGLE, SEVERAL], ids=["single", "several"])
@pytest.mark.parametrize("architecture", ALL)
def test_scores_are_the_log_probabilities_of_the_label_words(architecture: str, verbalizers: dict[str, str]) -> None:
    model, task = make_model(architecture), make_task(architecture, verbalizers)
    examples = make_examples(task)
    scorer = make_scorer(model, tokenizer_for(architecture), task)
    expected = torch.tensor([oracle(architecture, model, e, task) for e in examples])
    assert expected.std(1).min() > 0.02  # or the comparison would show nothing
    assert_same_up_to_a_constant_per_row(scores_of(scorer, model, examples), expected)


@pytest.mark.parametrize("architecture", ALL)
def test_label_words_of_one_and_of_several_tokens_in_one_batch(architecture: str) -> None:
    """As in COPA, where each row brings its own candidates."""
    model, task = make_model(architecture), make_task(architecture, {"0": "{a}", "1": "{b}"})
    candidates = [("great", "terrible"), ("not that great", "terrible"), ("positive", "very long indeed")]
    examples = [Example({"text": t, "a": a, "b": b}, 0) for t, (a, b) in zip(TEXTS, candidates, strict=False)]
    scorer = make_scorer(model, tokenizer_for(architecture), task)
    expected = torch.tensor([oracle(architecture, model, e, task) for e in examples])
    assert_same_up_to_a_constant_per_row(scores_of(scorer, model, examples), expected)


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_classification_head(architecture: str) -> None:
    model, task = make_model(architecture, classes=3), Task("t", "{text} It was", SINGLE)
    model.config.pad_token_id = 0
    scorer, examples = make_scorer(model, tokenizer_for(architecture), task), make_examples(task)
    scores = scores_of(scorer, model, examples)
    with torch.no_grad():
        for row, example in zip(scores, examples, strict=True):
            ids = tokenizer_for(architecture)(f"{example.fields['text']} It was")["input_ids"]
            expected = model(input_ids=torch.tensor([ids])).logits[0]
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


def test_masked_prompt_without_a_mask_gets_one_at_its_end() -> None:
    model, task = make_model("bert"), Task("t", "{text} It was", SINGLE)
    scorer = make_scorer(model, tokenizer_for("bert"), task)
    [prompt] = scorer.encode(Example({"text": "a film"}, 0)).prompts
    mask = scorer.tokenizer.mask_token_id
    assert prompt.count(mask) == 1
    head = scorer.tokenizer("a film It was", add_special_tokens=False)["input_ids"]
    assert prompt[1 : 1 + len(head)] == head
    assert mask in prompt[1 + len(head) :]


def test_a_mask_inside_the_text_is_not_the_label_position() -> None:
    """A user's text may hold the literal mask token; the template's own mask still is the one that is read."""
    model, task = make_model("bert"), make_task("bert", SINGLE)
    scorer = make_scorer(model, tokenizer_for("bert"), task)
    example = Example({"text": "a <mask> film"}, 0)
    seen = scorer.encode(example).prompts[0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([seen])).logits[0]
    place = max(i for i, token in enumerate(seen) if token == scorer.tokenizer.mask_token_id)
    words = [w for [w] in scorer.encode(example).words]
    assert_same_up_to_a_constant_per_row(scores_of(scorer, model, [example]), logits[place][words].unsqueeze(0))


def test_an_end_token_that_the_tokenizer_appends_is_not_part_of_a_causal_prompt() -> None:
    model, task = make_model("gpt2"), make_task("gpt2", SINGLE)
    ending = make_scorer(model, make_tokenizer("seq2seq"), task)  # appends </s>
    plain = make_scorer(model, make_tokenizer("plain"), task)
    examples = make_examples(task)
    assert torch.equal(scores_of(ending, model, examples), scores_of(plain, model, examples))


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_token() -> None:
    model, task = make_model("gpt2"), make_task("gpt2", SINGLE)
    tokenizer = make_tokenizer("plain")
    tokenizer.pad_token = None
    scores = scores_of(make_scorer(model, tokenizer, task), model, make_examples(task))
    expected = scores_of(make_scorer(model, make_tokenizer("plain"), task), model, make_examples(task))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    tokenizer.pad_token = tokenizer.eos_token = model.config.pad_token_id = model.config.eos_token_id = None
    with pytest.raises(ZOError, match="padding or an end token"):
        make_scorer(model, tokenizer, task)


@pytest.mark.parametrize(
    ("template", "word"),
    [("{text} It was", " great"), ("{text} It was ", "great"), ("{text}\nAnswer:\n", "great"), ("{text}", " great")],
)
def test_label_words_follow_the_template_with_exactly_one_space(template: str, word: str) -> None:
    tokenizer = tokenizer_for("gpt2")
    scorer = make_scorer(make_model("gpt2"), tokenizer, Task("t", template, {"0": "terrible", "1": "great"}))
    words = scorer.encode(Example({"text": "a film"}, 0)).words
    assert words[1] == tokenizer(word, add_special_tokens=False)["input_ids"]


# --- what goes through the output head -------------------------------------------------------------------------------


@contextmanager
def positions_through(head: nn.Module) -> Iterator[list[int]]:
    """Counts the positions that a linear layer sees."""
    seen: list[int] = []
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output.numel() // output.shape[-1]))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("verbalizers", [SINGLE, SEVERAL], ids=["single", "several"])
@pytest.mark.parametrize("architecture", ALL)
def test_only_label_positions_go_through_the_output_head(architecture: str, verbalizers: dict[str, str]) -> None:
    model, task = make_model(architecture), make_task(architecture, verbalizers)
    scorer, examples = make_scorer(model, tokenizer_for(architecture), task), make_examples(task)
    with positions_through(model.get_output_embeddings()) as seen:
        scores_of(scorer, model, examples)
    longest = max(len(w) for e in examples for w in scorer.encode(e).words)
    assert (longest == 1) == (verbalizers is SINGLE)
    one_past = 1 if architecture in CAUSAL else 0  # the last of a causal sequence's positions comes along
    sequences = len(examples) if longest == 1 else len(examples) * len(verbalizers)
    if architecture in CAUSAL and longest == 1:
        assert seen == []  # the rows of the label words are taken from the head's weight
    else:
        assert len(seen) == 1
        assert 0 < seen[0] <= (sequences if longest == 1 else sequences * (longest + one_past))


# --- truncation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verbalizers", [SINGLE, SEVERAL], ids=["single", "several"])
@pytest.mark.parametrize("architecture", ["gpt2", "bert", "t5"])
def test_long_text_is_cut_so_that_template_and_label_words_survive(
    architecture: str, verbalizers: dict[str, str]
) -> None:
    tokenizer = tokenizer_for(architecture)
    mask = " {mask}." if architecture == "bert" else ""
    task = Task("t", "Review: {text}\nSentiment: It was" + mask, verbalizers)
    scorer = make_scorer(make_model(architecture), tokenizer, task)
    short = scorer.encode(Example({"text": "a film"}, 1))
    long = scorer.encode(Example({"text": "the film is boring " * 40}, 1))
    assert not short.truncated
    assert long.truncated
    assert long.words == short.words
    for prompt in long.prompts:
        assert len(prompt) <= CONTEXT
        text = tokenizer.decode(prompt, skip_special_tokens=True).lstrip()
        assert text.startswith("Review: the film is boring")
        assert "\nSentiment: It was" in text
    assert max(map(len, long.prompts)) > CONTEXT - 12  # no more is cut than must be
    if architecture == "bert":
        masks = [prompt.count(tokenizer.mask_token_id) for prompt in long.prompts]
        assert masks == ([1] if verbalizers is SINGLE else [len(w) for w in long.words])


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_what_is_cut_is_the_longest_column_and_it_is_counted(architecture: str) -> None:
    mask = " {mask}" if architecture == "bert" else ""
    task = Task("t", "{premise} It was {hypothesis}?" + mask, SINGLE)
    scorer = make_scorer(make_model(architecture), tokenizer_for(architecture), task)
    whole, long = "a story of two friends", "boring film " * 60
    examples = [Example({"premise": p, "hypothesis": h}, 0) for p, h in ((long, whole), (whole, whole), (whole, long))]
    prepared = Prepared(examples, scorer, torch.device("cpu"), None)
    assert [e.truncated for e in prepared.encoded] == [True, False, True]
    assert prepared.truncated == 2
    for encoded in prepared.encoded:
        text = scorer.tokenizer.decode(encoded.prompts[0])
        assert whole in text
        assert " It was " in text
        assert "?" in text


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=120), max_length=st.integers(16, CONTEXT))
def test_any_text_fits_any_length(text: str, max_length: int) -> None:
    tokenizer = tokenizer_for("gpt2")
    task = Task("t", "{text} It was", SEVERAL)
    scorer = make_scorer(_gpt2(), tokenizer, task, max_length)
    encoded = scorer.encode(Example({"text": text}, 0))
    assert max(map(len, encoded.prompts)) <= max_length
    ending = tokenizer(" It was", add_special_tokens=False)["input_ids"]
    for prompt, words in zip(encoded.prompts, encoded.words, strict=True):
        assert prompt[-len(words) :] == words
        assert prompt[: -len(words)][-len(ending) :] == ending
    fits = len(tokenizer(text + " It was")["input_ids"]) + max(map(len, encoded.words)) <= max_length
    assert encoded.truncated == (not fits)


_MODELS: dict[str, Any] = {}


def _gpt2() -> Any:
    return _MODELS.setdefault("gpt2", make_model("gpt2"))


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_a_template_longer_than_the_context_is_refused(architecture: str) -> None:
    mask = " {mask}" if architecture == "bert" else ""
    task = Task("t", "{text} " + "It was " * 40 + mask, SINGLE)
    scorer = make_scorer(make_model(architecture), tokenizer_for(architecture), task)
    with pytest.raises(ZOError, match="this row: the template alone needs"):
        scorer.encode(Example({"text": "a film"}, 0))


def test_no_room_at_all_is_refused() -> None:
    with pytest.raises(ZOError, match="max_length=0"):
        make_scorer(_gpt2(), tokenizer_for("gpt2"), Task("t", "{text}", SINGLE), 0)


# --- heads -----------------------------------------------------------------------------------------------------------


def test_a_model_without_a_head_is_refused() -> None:
    headless = transformers.AutoModel.from_config(make_model("llama").config)
    with pytest.raises(ZOError, match="LlamaModel has no output head"):
        make_scorer(headless, tokenizer_for("llama"), Task("t", "{text}", SINGLE))


def test_a_masked_model_needs_a_mask_token() -> None:
    tokenizer = make_tokenizer("masked")
    tokenizer.mask_token = None
    with pytest.raises(ZOError, match="mask token"):
        make_scorer(make_model("bert"), tokenizer, Task("t", "{text}", SINGLE))
