"""What is markup and what is letters; label words as tokens; what is cut, and what is said of it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import transformers
from conftest import make_model, run_main, tokenizer_for
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from zo_opt import ZOError
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring import Scorer, make_scorer
from zo_opt.tasks.scoring.labels import LabelScorer
from zo_opt.tasks.scoring.spelling import Markup
from zo_opt.tasks.tasks import Task, custom_generation_task, custom_task

WORDS = {"0": "terrible", "1": "great"}
SPECIAL = {0, 1, 2, 3, 4}  # ids of <pad> <s> </s> <unk> <mask>


@cache
def parts(architecture: str, **kind: Any) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    return make_model(architecture, **kind), tokenizer_for(architecture)


def scorer(
    architecture: str, template: str = "{text} It was", words: dict[str, str] | None = None, **kind: Any
) -> Scorer:
    task = Task("t", template, WORDS if words is None else words)
    return make_scorer(*parts(architecture, **kind), task)


@pytest.mark.parametrize("markup", ["</s>", "<s>", "<pad>", "<unk>", "<mask>", "<s></s>", "<<s>"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
def test_markup_in_a_text_is_letters(architecture: str, markup: str) -> None:
    """The special tokens of a prompt are those of one without: the template's and the tokenizer's own."""
    made = scorer(architecture)
    for text in (f"a {markup} film", markup, f"{markup}{markup} film"):
        [prompt], [plain] = (made.encode(Example({"text": t}, 0)).prompts for t in (text, "a film"))
        assert [i for i in prompt if i in SPECIAL] == [i for i in plain if i in SPECIAL]
        shown = made.tokenizer.decode([i for i in prompt if i not in SPECIAL]).replace(" ", "")
        assert markup in shown, "nothing of it is lost"


def test_markup_in_targets_label_words_and_running_text_is_letters() -> None:
    model, tokenizer = parts("llama")
    task = custom_generation_task(text_column="text", target_column="target", template=None)
    target = make_scorer(model, tokenizer, task).encode(Example({"text": "a"}, references=("yes</s> no",))).words[0]
    assert target.count(2) == 1
    assert target[-1] == 2
    words = scorer("llama", words={"0": "</s>", "1": "<s>"}).words_of(Example({"text": "a"}, 0))
    assert not {1, 2} & {i for ids in words for i in ids}
    [block] = make_scorer(model, tokenizer, Task("lm", "{text}", kind="language-modelling")).encode_all(
        [Example({"text": "one </s> two"})]
    )
    assert block.prompts[0].count(2) == 0


@pytest.mark.parametrize(
    "tokenizer", [transformers.ByT5Tokenizer(), transformers.CanineTokenizer()], ids=["byt5", "canine"]
)
def test_markup_of_slow_tokenizers(tokenizer: Any) -> None:
    special = set(tokenizer.all_special_ids)
    for token in tokenizer.all_special_tokens:
        text = Markup(tokenizer).as_letters(f"a {token} b")
        assert not special & set(tokenizer(text, add_special_tokens=False)["input_ids"]), token


def test_markup_of_a_template_is_markup_and_a_start_token_stands_once() -> None:
    made = scorer("llama", "<s>{text}</s>It was")  # whose tokenizer puts <s> in front
    [prompt] = made.encode(Example({"text": "</s> a"}, 0)).prompts
    assert [i for i in prompt if i in SPECIAL] == [1, 2]
    assert prompt[0] == 1
    both = scorer("bert", "<s>{text} {mask}</s>")  # and </s> behind
    [prompt] = both.encode(Example({"text": "a film"}, 0)).prompts
    assert [i for i in prompt if i in SPECIAL] == [1, 4, 2]
    plain = scorer("gpt2", "<s>{text} It was")  # of a tokenizer that adds none
    assert plain.encode(Example({"text": "a film"}, 0)).prompts[0].count(1) == 1
    with pytest.raises(ZOError, match=r"holds <mask>, .* write \{mask\}"):
        scorer("bert", "{text} It was <mask>.")


def test_a_prompt_without_tokens_is_refused_with_its_row() -> None:
    made = make_scorer(*parts("gpt2"), Task("t", "{text}", WORDS))
    heads = make_scorer(*parts("gpt2", classes=2), Task("t", "{text}", WORDS))
    writes = make_scorer(*parts("gpt2"), Task("t", "{text}", kind="generation"))
    for one in (made, heads, writes):
        rows = [
            Example({"text": text}, 0, ("x",), where=f"my.csv, row {n}") for n, text in enumerate(("a", ""), start=1)
        ]
        with pytest.raises(ZOError, match=r"my\.csv, row 2: the prompt '' has no tokens"):
            one.encode_all(rows)


def test_braces_are_letters() -> None:
    names = ["{a}", "C{", "D}", "{}", "{{x}}"]
    task = custom_task(names, text_column="text", label_column="label", template="{text} {{n}}:", verbalizers=None)
    assert task.shown() == ["text"]
    made = make_scorer(*parts("llama"), task)
    encoded = made.encode(Example({"text": "{text} {"}, 1))
    assert "{text} { {n}:" in made.tokenizer.decode(encoded.prompts[0])
    assert encoded.references == ("C{",)
    assert [made.tokenizer.decode(ids).strip() for ids in encoded.words] == names
    chosen = custom_task(["0", "1"], text_column="text", label_column="label", template=None, verbalizers="0={no},1=}{")
    assert [words.format() for words in chosen.verbalizers.values()] == ["{no}", "}{"]


# --- label words ---


def word_level(*, lower: bool) -> Any:
    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "film", "great", "bad", "it", "was"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        made.normalizer = normalizers.Lowercase()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize(
    ("words", "lower", "said"),
    [
        (("great", "Great"), True, "'great' and 'Great' are the same tokens"),
        (("bad film", "bad  film"), False, "are the same tokens"),
        (("great", "schlecht"), False, "does not know all of the label words 'schlecht', which become <unk>"),
        (("great", "bad day"), False, "does not know all of the label words 'bad day'"),
        (("schlecht", "gut"), False, "does not know all of the label words 'schlecht'"),
        (
            ("bad film", "bad"),
            False,
            "'bad film' begin with the tokens of 'bad', another label's.*could never be predicted",
        ),
    ],
)
def test_label_words_are_checked_as_tokens(words: tuple[str, str], lower: bool, said: str) -> None:
    task = Task("t", "{text} it was", dict(zip("01", words, strict=True)))
    made = make_scorer(parts("llama")[0], word_level(lower=lower), task)
    with pytest.raises(ZOError, match=said):
        made.encode(Example({"text": "a film"}, 0))


def test_candidates_of_a_row_are_checked_with_the_row() -> None:
    made = make_scorer(*parts("llama"), Task("t", "{text}", {"0": "{a}", "1": "{b}"}))
    made.encode(Example({"text": "x", "a": "great", "b": "Great"}, 0))
    with pytest.raises(ZOError, match=r"my\.csv, row 7: the label words 'great' and 'great' are the same tokens"):
        made.encode(Example({"text": "x", "a": "great", "b": "great"}, 0, where="my.csv, row 7"))


@pytest.mark.parametrize(
    ("architecture", "template", "word"),
    [
        ("llama", "{text} It was", " great"),
        ("llama", "{text} It was ", "great"),
        ("llama", "{text}\nLabel:\n", "great"),
        ("llama", '{text} It was "', "great"),
        ("llama", "{text} (", "great"),
        ("llama", 'The "{text}"', " great"),
        ("llama", "{text}", " great"),
        ("llama", "{text}它很", "great"),
        ("llama", "{text}<s>", "great"),
        ("t5", '{text} It was "', "great"),
        ("bert", "{text} It was {mask}.", " great"),
        ("bert", "{text} It was {mask}\n", " great"),
        ("bert", "{mask} news: {text}", "great"),
        ("bert", "({mask}) {text}", "great"),
        ("bert", "{text}:\n{mask}", "great"),
        ("bert", "{text}", " great"),
        ("bert", "{text}\n", " great"),
    ],
)
def test_the_space_before_a_word_is_decided_by_what_precedes_it(architecture: str, template: str, word: str) -> None:
    made = scorer(architecture, template)
    expected = made.tokenizer(word, add_special_tokens=False)["input_ids"]
    assert made.words_of(Example({"text": "a film"}, 0))[1] == expected


def test_the_tokens_of_label_words_and_their_cost_are_said() -> None:
    several, single = (scorer("llama", words=words) for words in ({"0": "not that great", "1": "great"}, WORDS))
    assert isinstance(several, LabelScorer)
    assert isinstance(single, LabelScorer)
    [note] = several.word_notes()
    count = len(several.words_of(Example({"text": "a"}, 0))[0])
    assert f"'not that great' {count}, 'great' 1" in note
    assert "2 sequences a row" in note
    assert single.word_notes() == []


# --- cutting ---


@pytest.mark.parametrize(("text", "target"), [(1, 40), (30, 40), (60, 50), (3, 20)])
def test_a_target_is_whole_where_template_and_target_fit(text: int, target: int) -> None:
    """Followed by the end token; the row's text gives way."""
    task = custom_generation_task(text_column="text", target_column="target", template="{text} It was")
    made = make_scorer(*parts("llama"), Task(**{**vars(task), "max_new_tokens": 2}))
    encoded = made.encode(Example({"text": " film" * text}, references=((" film" * target).strip(),)))
    whole = made.tokenizer(" film" * target, add_special_tokens=False)["input_ids"]
    assert encoded.words[0] == [*whole, 2]
    assert not encoded.shortened
    assert len(encoded.prompts[0]) <= made.max_length
    assert encoded.truncated == (text + 2 + target + 2 > made.max_length)
    assert "It was" in made.tokenizer.decode(encoded.prompts[0])


def test_what_is_said_of_cutting_is_true(
    tiny_model_dir: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["text\ttarget"] + ["film " * n + "\t" + "great " * m for n, m in ((90, 1), (1, 90), (1, 1), (90, 90))] * 2
    (tmp_path / "a.tsv").write_text("\n".join(rows) + "\n")
    line = [
        "train",
        "--model_name_or_path",
        str(tiny_model_dir),
        "--train_file",
        str(tmp_path / "a.tsv"),
        "--target_column",
        "target",
    ]
    line += [
        "--eval_file",
        str(tmp_path / "a.tsv"),
        "--template",
        "{text}:",
        "--max_new_tokens",
        "2",
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    assert run_main([*line, "--output_dir", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    said = " ".join((captured.out + captured.err).split())
    assert "4 of 8 training prompts were longer than 64 tokens with what follows them" in said
    assert "4 of 8 training targets were longer than 64 tokens have room for" in said
