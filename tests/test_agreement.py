"""Models, tokenizers, configurations and labels that say different things: what is scored is still the model's own answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_tokenizer, run_main
from torch import nn

from zo_opt import ZOError, set_precision
from zo_opt.models.agreement import decoder_start, label_outputs
from zo_opt.models.models import load_model
from zo_opt.tasks.evaluation import Prepared
from zo_opt.tasks.padding import check_shapes, try_padding
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring import Scorer, make_scorer
from zo_opt.tasks.tasks import Task, custom_task

VOCABULARY = len(make_tokenizer("plain"))
IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BART = {
    "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
LABELS = {"0": "terrible", "1": "great"}
TEXTS = ("a film is boring", "the", "two friends and their long way home in winter is dreadful")
EXAMPLES = [Example({"text": text}, i % 2) for i, text in enumerate(TEXTS)]


def build(name: str, ending: str, **sizes: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**IDS, **SIZES, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name + ending)(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def scorer_for(model: Any, kind: str = "causal", template: str = "{text} It was", **tokens: Any) -> Scorer:
    tokenizer = make_tokenizer(kind)
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return make_scorer(model, tokenizer, Task("t", template, LABELS))


def prepared(model: Any, scorer: Scorer) -> Prepared:
    try_padding(model, scorer, EXAMPLES)
    return Prepared(EXAMPLES, scorer, torch.device("cpu"), None)


def assert_rows_are_their_own(model: Any, rows: Prepared) -> None:
    """A row's scores are the same alone and in its batch."""
    with torch.no_grad():
        for indices in rows.by_length(8):
            together = rows.scores(model, rows.batch(indices))
            alone = torch.cat([rows.scores(model, rows.batch([i])) for i in indices])
            torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("configured", "token"), [(0, None), (-1, "<pad>"), (3, "<pad>"), (None, None), (9999, None)])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bloom", "OPT"])
def test_the_padding_of_a_head_that_looks_for_the_last_token(name: str, configured: int | None, token: str) -> None:
    sizes = {"GPT2": GPT, "Bloom": {"n_layer": 2, "n_head": 4}, "OPT": {"ffn_dim": 48}}.get(name, {})
    model = build(name, "ForSequenceClassification", **sizes)
    model.config.pad_token_id = configured
    assert_rows_are_their_own(model, prepared(model, scorer_for(model, template="{text}", pad_token=token)))


@pytest.mark.parametrize(
    ("name", "ending", "sizes"),
    [
        ("Rwkv", "ForCausalLM", {"attention_hidden_size": 32}),
        ("Bart", "ForCausalLM", BART),  # counts positions from the padding
        (
            "RecurrentGemma",
            "ForCausalLM",
            {"num_hidden_layers": 3, "num_attention_heads": 2, "lru_width": 32, "attention_window_size": 16},
        ),
        ("FNet", "ForSequenceClassification", {}),
        ("ConvBert", "ForMaskedLM", {"embedding_size": 16}),
    ],
)
def test_models_that_cannot_bear_padding_are_found(name: str, ending: str, sizes: dict[str, Any]) -> None:
    model = build(name, ending, **sizes)
    rows = prepared(model, scorer := scorer_for(model, template="{text} It was"))
    assert not scorer.padding_is_harmless
    assert len(rows.by_length(8)) == 3
    assert_rows_are_their_own(model, rows)
    with pytest.raises(ZOError, match="--batch_size 1"):
        check_shapes(model, scorer, rows.encoded, 2)
    check_shapes(model, scorer, rows.encoded, 1)


@pytest.mark.parametrize(
    ("name", "ending", "sizes"),
    [
        ("Mamba", "ForCausalLM", {}),
        ("CTRL", "LMHeadModel", GPT | {"dff": 48}),
        ("Electra", "ForSequenceClassification", {"embedding_size": 16}),
        ("MPNet", "ForMaskedLM", {}),
        ("T5", "ForConditionalGeneration", T5),
        ("Bart", "ForSequenceClassification", BART | {"num_labels": 2}),
    ],
)
def test_others_are_batched_as_before(name: str, ending: str, sizes: dict[str, Any]) -> None:
    model = build(name, ending, **sizes)
    kind = "masked" if ending != "ForCausalLM" else "causal"
    rows = prepared(model, scorer := scorer_for(model, kind))
    assert scorer.padding_is_harmless
    assert len(rows.by_length(8)) == 1
    assert_rows_are_their_own(model, rows)


def test_a_model_that_the_mixed_form_does_not_fit_is_told_of_the_other() -> None:
    """Mamba multiplies a layer's weight itself, past the layer."""
    model = build("Mamba", "ForCausalLM")
    set_precision(model, "mixed", torch.device("cpu"))
    with pytest.raises(ZOError, match=r"MambaForCausalLM .* cannot be run .*; give --precision fp32\.$"):
        scorer_for(model, template="{text} It was")


def test_label_words_of_several_lengths_are_refused_where_padding_harms() -> None:
    model = build("Rwkv", "ForCausalLM", attention_hidden_size=32)
    task = Task("t", "{text} It was", {"0": "not that great", "1": "terrible"})
    scorer = make_scorer(model, make_tokenizer("causal"), task)
    rows = prepared(model, scorer)
    with pytest.raises(ZOError, match="label words of one length"):
        check_shapes(model, scorer, rows.encoded, 1)


# --- tokens and positions --------------------------------------------------------------------------------------------


def test_a_token_beyond_the_embedding_is_refused_by_row_and_one_that_pads_is_not_used() -> None:
    model, tokenizer = build("Llama", "ForCausalLM"), make_tokenizer("causal")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    scorer = make_scorer(model, tokenizer, Task("t", "{text} It was", LABELS))
    assert_rows_are_their_own(model, prepared(model, scorer))
    tokenizer.add_tokens(["brandnew"])
    with pytest.raises(ZOError, match=rf"row 2 holds token {VOCABULARY + 1} \('brandnew'\).*{VOCABULARY} rows"):
        Prepared([EXAMPLES[0], Example({"text": "a brandnew film"}, 0)], scorer, torch.device("cpu"), None)


@pytest.mark.parametrize(
    ("name", "ending", "sizes", "room"),
    [
        ("Roberta", "ForMaskedLM", {"pad_token_id": 1, "max_position_embeddings": 34}, 32),
        ("Camembert", "ForMaskedLM", {"pad_token_id": 1, "max_position_embeddings": 34}, 32),
        ("Longformer", "ForMaskedLM", {"pad_token_id": 1, "max_position_embeddings": 34, "attention_window": 16}, 32),
        ("MPNet", "ForMaskedLM", {"pad_token_id": 1, "max_position_embeddings": 34}, 32),
        ("OPT", "ForCausalLM", {"ffn_dim": 48, "max_position_embeddings": 32}, 32),
        ("Bart", "ForConditionalGeneration", BART | {"max_position_embeddings": 32}, 32),
        ("GPT2", "LMHeadModel", GPT | {"max_position_embeddings": 32, "n_positions": 32}, 32),
        ("Llama", "ForCausalLM", {"max_position_embeddings": 32}, 32),
    ],
)
def test_the_longest_row_is_what_the_table_of_positions_has_room_for(
    name: str, ending: str, sizes: Any, room: int
) -> None:
    model = build(name, ending, **sizes)
    scorer = scorer_for(model, "masked" if ending == "ForMaskedLM" else "causal")
    assert scorer.max_length == room
    long = Example({"text": "the film is a story of two friends " * 20}, 0)
    with torch.no_grad():
        assert scorer.scores(model, scorer.collate([scorer.encode(long)])).isfinite().all()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["Roberta", "Camembert", "Bert"])
def test_positions_that_begin_after_the_padding_id(name: str) -> None:
    """Given positions from 0 on, a RoBERTa would read those of its padding."""
    model = build(name, "LMHeadModel" if name == "Bert" else "ForCausalLM", is_decoder=True)
    scorer = scorer_for(model)
    encoded = [scorer.encode(e) for e in EXAMPLES]
    with torch.no_grad():
        scores = scorer.scores(model, scorer.collate(encoded))  # type: ignore[attr-defined]
        for row, e in zip(scores, encoded, strict=True):
            logits = model(input_ids=torch.tensor(e.prompts)).logits[0, -1, [w[0] for w in e.words]]
            torch.testing.assert_close(row.log_softmax(0), logits.log_softmax(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "ending", "sizes"),
    [("Bert", "LMHeadModel", {}), ("Roberta", "ForCausalLM", {}), ("Electra", "ForCausalLM", {"embedding_size": 16})],
)
def test_an_encoder_is_no_decoder(name: str, ending: str, sizes: dict[str, Any]) -> None:
    with pytest.raises(ZOError, match="see those after it"):
        scorer_for(build(name, ending, **sizes))


def test_an_encoder_that_hardly_looks_ahead_is_one() -> None:
    model = build("Bert", "ForMaskedLM")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1e-3 if ".value." in name else 1)
    set_precision(model, "mixed", torch.device("cpu"))
    assert scorer_for(model).probed.sees_ahead is False  # as far as the rounding tells


def test_a_decoder_fills_no_masks() -> None:
    with pytest.raises(ZOError, match="see those before it alone"):
        scorer_for(build("Bert", "ForMaskedLM", is_decoder=True), "masked")


def test_what_a_decoder_begins_with_is_found_wherever_it_is() -> None:
    model = build("Bart", "ForConditionalGeneration", **BART)
    assert decoder_start(model) == 2
    model.config.decoder_start_token_id, model.generation_config.decoder_start_token_id = None, 3
    assert decoder_start(model) == 3
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(ZOError, match="decoder_start_token_id"):
        scorer_for(model)


# --- labels ----------------------------------------------------------------------------------------------------------


def named(*names: str) -> Any:
    model = build("Bert", "ForSequenceClassification", num_labels=len(names))
    model.config.id2label = dict(enumerate(names))
    return model


@pytest.mark.parametrize(
    ("own", "labels", "outputs", "names", "said"),
    [
        (("positive", "negative"), ("negative", "positive"), [1, 0], ["positive", "negative"], None),
        (("POSITIVE", "NEGATIVE"), ("negative", "positive"), [1, 0], ["POSITIVE", "NEGATIVE"], None),
        (("c", "a", "b"), ("a", "b", "c"), [1, 2, 0], ["c", "a", "b"], None),
        (("1", "0"), ("0", "1"), [1, 0], ["1", "0"], None),
        (("LABEL_0", "LABEL_1"), ("0", "1"), [0, 1], ["LABEL_0", "LABEL_1"], None),
        (("bad", "good"), ("0", "1"), [0, 1], ["bad", "good"], "numbers"),
        (("positive", "negative"), ("neutral", "positive"), [1, 0], ["positive", "neutral"], "training has to teach"),
        (("LABEL_0", "LABEL_1"), ("happy", "sad"), [0, 1], ["happy", "sad"], "training has to teach"),
    ],
)
def test_labels_are_the_outputs_that_bear_their_names(
    own: tuple[str, ...], labels: tuple[str, ...], outputs: list[int], names: list[str], said: str | None
) -> None:
    found, shown, note = label_outputs(named(*own), labels)
    assert (found, shown) == (outputs, names)
    assert said is None if note is None else said is not None and said in note


def test_numbers_that_the_table_names_are_the_outputs_of_these_names() -> None:
    assert label_outputs(named("good", "bad"), ("0", "1"), ("bad", "good")) == ([1, 0], ["good", "bad"], None)
    assert label_outputs(named("LABEL_0", "LABEL_1"), ("0", "1"), ("bad", "good"))[0] == [0, 1]


def test_another_number_of_labels_is_refused() -> None:
    with pytest.raises(ZOError, match=r"3 outputs.*2 labels"):
        label_outputs(named("a", "b", "c"), ("a", "b"))


def test_a_finished_classifier_gives_the_answers_of_its_own_names() -> None:
    model = named("positive", "negative")
    task = custom_task(
        ["negative", "positive"], text_column="text", label_column="label", template="{text}", verbalizers=None
    )
    scorer = make_scorer(model, make_tokenizer("masked"), task)
    batch = scorer.collate([scorer.encode(e) for e in EXAMPLES])
    with torch.no_grad():
        scores = scorer.scores(model, batch)  # type: ignore[attr-defined]
        logits = model(**scorer.inputs(batch)).logits
    assert torch.equal(scores, logits.flip(1))


def test_numbers_do_not_count_the_labels_of_own_rows() -> None:
    own = custom_task(
        ["negative", "positive"], text_column="text", label_column="label", template=None, verbalizers=None
    )
    assert own.label_of("positive") == 1
    assert own.label_of("1") is own.label_of(1) is own.label_of("0") is None
    assert Task("built in", "{text}", {"negative": "bad", "positive": "good"}).label_of(1) == 1


def test_a_merged_classifier_names_its_outputs(tmp_path: Path, sentiment_files: Any, tiny_model_dir: Path) -> None:
    names = {0: "sad", 1: "happy"}
    rows = "".join(json.dumps(r | {"label": names[r["label"]]}) + "\n" for r in sentiment_files.rows)
    (tmp_path / "rows.jsonl").write_text(rows)
    line = ["train", "--model_name_or_path", str(tiny_model_dir), "--train_file", str(tmp_path / "rows.jsonl")]
    line += ["--head", "classification", "--adapter", "lora", "--steps", "1", "--device", "cpu"]
    assert run_main([*line, "--output_dir", str(tmp_path / "out")]) == 0
    assert run_main(["merge", str(tmp_path / "out"), "--to", str(tmp_path / "merged")]) == 0
    merged = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert merged.id2label == {0: "happy", 1: "sad"}
    assert merged.label2id == {"happy": 0, "sad": 1}
    model, tokenizer = load_model(str(tmp_path / "merged"), head="classification", labels=2)
    scorer = make_scorer(
        model,
        tokenizer,
        custom_task(["happy", "sad"], text_column="text", label_column="label", template="{text}", verbalizers=None),
    )
    assert scorer.notes == []
