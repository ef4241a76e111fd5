"""Label words and targets of encoder-decoders: the tokens that transformers makes of targets, and where the decoder begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from conftest import make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring import make_scorer
from zo_opt.tasks.tasks import Task

WORDS = {"0": "terrible", "1": "great"}
TEMPLATES = ("{text} It was", '{text} It was "', "{text} It was ", "Review: {text}", "{text}\n")
SIZES = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}


def byte_level() -> tuple[Any, Any]:
    """BART's kind: words at a text's start have no space, and every text stands between <s> and </s>."""
    tokenizer = make_tokenizer("masked")
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64} | SIZES
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = transformers.BartConfig(vocab_size=len(tokenizer), init_std=0.2, **sizes, **ids)
    return transformers.BartForConditionalGeneration(config), tokenizer


def unigram() -> tuple[Any, Any]:
    """T5's kind: every word begins with a mark, the first one, too; </s> behind."""
    pieces = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *'▁abcdefghijklmnopqrstuvwxyzIRW:"',
        "▁great",
        "▁terrible",
        "great",
        "▁not",
    ]
    made = Tokenizer(models.Unigram([(piece, -len(pieces) + 10.0 * len(piece)) for piece in pieces], unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    config = transformers.T5Config(
        vocab_size=len(pieces), d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), tokenizer


class Translating(transformers.PreTrainedTokenizerFast):
    """M2M100's kind: targets begin with their language, and sources with another."""

    def _switch_to_input_mode(self) -> None:
        self._begin("<mask>")

    def _switch_to_target_mode(self) -> None:
        self._begin("<s>")

    def _begin(self, token: str) -> None:
        ids = [(name, self.convert_tokens_to_ids(name)) for name in (token, "</s>")]
        self.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A </s>", special_tokens=ids
        )


def translating() -> tuple[Any, Any]:
    model, tokenizer = byte_level()
    made = Translating(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    made.add_special_tokens({"mask_token": "<mask>"})
    return model, made


KINDS = {"byte-level": byte_level, "unigram": unigram, "translating": translating}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_label_words_are_tokens_of_a_target_whatever_the_prompt_ends_in(kind: str, template: str) -> None:
    model, tokenizer = KINDS[kind]()
    made = make_scorer(model, tokenizer, Task("t", template, WORDS))
    encoded = made.encode(Example({"text": "a film"}, 0))
    assert encoded.words == [
        tokenizer(text_target=word, add_special_tokens=False)["input_ids"] for word in WORDS.values()
    ]
    first = tokenizer.convert_ids_to_tokens(encoded.words[1])[0]
    assert first.startswith("▁") == (kind == "unigram")
    assert not first.startswith("Ġ")


@pytest.mark.parametrize("words", [WORDS, {"0": "terrible", "1": "not great"}], ids=["one token", "several"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_labels_that_the_model_is_trained_with(kind: str, words: dict[str, str]) -> None:
    """The model's own loss, given labels as transformers makes them: what it takes off for the words' tokens."""
    torch.manual_seed(0)
    model, tokenizer = KINDS[kind]()
    model.eval()
    made: Any = make_scorer(model, tokenizer, Task("t", "{text} It was", words))
    batch = made.collate([made.encode(Example({"text": "a film"}, 0))])
    expected = []
    with torch.no_grad():
        scores = made.scores(model, batch)[0]
        for word in words.values():
            labels = torch.tensor([tokenizer(text_target=word)["input_ids"]])
            own = torch.tensor([i not in tokenizer.all_special_ids for i in labels[0].tolist()])
            logits = model(**made.inputs(batch), labels=labels).logits[0].log_softmax(-1)
            expected.append(logits.gather(1, labels[0, :, None])[:, 0][own].sum())
    assert float(scores[1] - scores[0]) == pytest.approx(float(expected[1] - expected[0]), abs=1e-4)


def test_a_target_to_write_is_in_its_own_language() -> None:
    model, tokenizer = translating()
    made = make_scorer(model, tokenizer, Task("t", "{text}", kind="generation"))
    [target] = made.encode(Example({"text": "a film"}, references=("great",))).words
    assert target == tokenizer(text_target="great")["input_ids"]
    assert target[0] == tokenizer.bos_token_id
