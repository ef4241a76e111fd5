"""Tiny models, tokenizers and files, built here: no test needs the network or anything outside the checkout."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from zo_opt.models.quantisation import KINDS
from zo_opt.record import report

hypothesis.settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("no deadline")

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
POSITIVE, NEGATIVE = ("wonderful", "charming"), ("dreadful", "boring")
FILLING = (
    "the",
    "film",
    "is",
    "a",
    "story",
    "of",
    "two",
    "friends",
    "and",
    "their",
    "long",
    "way",
    "home",
    "in",
    "winter",
)
LABEL_WORDS = ("It", "was", "terrible", "great", "negative", "positive", "Review", "Sentiment", "Label")
CONTEXT = 64


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def pictures() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Reports come without their picture, which takes longer than all else in a small run; ``with pictures():`` they have it."""
    drawing = report.picture

    @contextmanager
    def drawn() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report, "picture", drawing)
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "picture", lambda metrics, summary: b"not drawn")
        yield drawn


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test leaves behind goes to temporary directories; nothing is fetched."""
    monkeypatch.setenv("ZO_OPT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory (not made yet) that zo_opt uses in this test."""
    monkeypatch.setenv("ZO_OPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer: "causal" puts <s> in front, "masked" adds <s> and </s>, "seq2seq" ends in </s>, "plain" adds nothing."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [*POSITIVE, *NEGATIVE, *FILLING, *LABEL_WORDS]
    # "un", "likely" stay apart: label words of several tokens.
    corpus = [" " + word for word in words] * 3 + ["It was", "Yes", "No", " Yes", " No", " maybe", "maybe"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    single = {"causal": "<s> $A", "masked": "<s> $A </s>", "seq2seq": "$A </s>"}.get(kind)
    if single is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        mask_token="<mask>", model_max_length=CONTEXT,
    )  # fmt: skip


def _configs() -> dict[str, tuple[str, str, Any]]:
    """Architecture -> kind of tokenizer, auto class, configuration."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    small = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
    dropout = {"hidden_dropout_prob": 0.1}
    return {
        "llama": ("causal", "AutoModelForCausalLM", transformers.LlamaConfig(**small, intermediate_size=64, **ids)),
        "gpt2": ("plain", "AutoModelForCausalLM", transformers.GPT2Config(n_embd=32, n_layer=4, n_head=2, n_positions=CONTEXT, **ids)),
        "opt": (
            "causal", "AutoModelForCausalLM",
            transformers.OPTConfig(**small, ffn_dim=64, word_embed_proj_dim=32, **ids),
        ),
        "bert": ("masked", "AutoModelForMaskedLM", transformers.BertConfig(**small, **dropout, intermediate_size=64, **ids)),
        "t5": (
            "seq2seq", "AutoModelForSeq2SeqLM",
            transformers.T5Config(d_model=32, d_ff=64, d_kv=16, num_layers=4, num_heads=2, decoder_start_token_id=0, **ids),
        ),
    }  # fmt: skip


def tokenizer_for(architecture: str) -> transformers.PreTrainedTokenizerFast:
    """A fresh tokenizer of the kind that goes with an architecture."""
    tokenizer = make_tokenizer(_configs()[architecture][0])
    if architecture == "t5":  # whose tokenizer puts a space before a text's first word
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


ARCHITECTURES = ("llama", "gpt2", "opt", "bert", "t5")


def make_model(architecture: str, *, std: float = 0.2, classes: int | None = None) -> Any:
    """A tiny random model in evaluation mode whose outputs are far from uniform; ``classes``: with a classification head."""
    _, auto, config = _configs()[architecture]
    config.vocab_size = len(make_tokenizer("plain"))
    if classes is not None:
        auto, config.num_labels = "AutoModelForSequenceClassification", classes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, auto).from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=std)
            elif parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture -> directory written by save_pretrained, with its tokenizer."""
    built: dict[str, Path] = {}

    def directory(architecture: str) -> Path:
        if architecture not in built:
            path = tmp_path_factory.mktemp(architecture) / f"tiny-{architecture}"
            make_model(architecture).save_pretrained(path)
            tokenizer_for(architecture).save_pretrained(path)
            built[architecture] = path
        return built[architecture]

    return directory


@dataclass(frozen=True)
class Sentiment:
    """Files of a toy task: one of four words decides the label."""

    train: Path
    eval: Path
    rows: list[dict[str, Any]]


@pytest.fixture(scope="session")
def sentiment_files(tmp_path_factory: pytest.TempPathFactory) -> Sentiment:
    """64 training rows (.jsonl) and 32 evaluation rows (.csv) with columns text and label (0 or 1)."""
    directory, rng = tmp_path_factory.mktemp("sentiment"), random.Random(0)
    rows = []
    for i in range(96):
        words = rng.choices(FILLING, k=rng.randint(2, 5))
        words.insert(rng.randrange(len(words) + 1), rng.choice((NEGATIVE, POSITIVE)[i % 2]))
        rows.append({"text": " ".join(words), "label": i % 2})
    (directory / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:64]))
    (directory / "eval.csv").write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows[64:]))
    return Sentiment(directory / "train.jsonl", directory / "eval.csv", rows)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, sentiment_files: Sentiment) -> Path:
    """A tiny Llama that can be tuned: taught to tell the deciding words apart, under other label words than the task's."""
    path = tmp_path_factory.mktemp("taught") / "tiny-llama"
    model, tokenizer = make_model("llama", std=0.05), tokenizer_for("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        rows = sentiment_files.rows[8 * (step % 8) :][:8]
        texts = [f"{row['text']} It was {('negative', 'positive')[row['label']]}" for row in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        logits = model(**batch, logits_to_keep=2).logits[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, -1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.3, "the tiny model has not learned its words"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# AdaZeta's serial adapters, queries on their weights; an adapter of None is the default one, with queries on its activations.
QUICK = {
    "device": "cpu", "precision": "fp32", "adapter": "tt", "query_mode": "sequential", "query_schedule": "constant", "queries": 2,
    "lr": 0.03, "lr_schedule": "constant",
}  # fmt: skip
# Options of parts, under the short names that tests use.
NESTED = {
    **{name: f"adapter.{name}" for name in ("rank", "layers", "bottleneck", "activation", "target_modules", "rank_pattern", "tt_rank", "scale",
                                            "modules_to_tensorize", "tensorize_rank", "init")},
    **{name: f"schedule.{name}" for name in ("queries", "max_queries", "min_queries", "alpha", "beta", "milestones")},
    "lora_alpha": "adapter.alpha", "clip": "step_control.factor", "forwards": "schedule.forwards",
}  # fmt: skip


@pytest.fixture(scope="session")
def toy_options(tiny_model_dir: Path, sentiment_files: Sentiment) -> Callable[..., list[str]]:
    """Options -> command line of a quick run on the toy task; an option given as None is left out, True is a flag."""

    def options(**changes: Any) -> list[str]:
        values = {
            "model_name_or_path": tiny_model_dir, "train_file": sentiment_files.train, "eval_file": sentiment_files.eval,
            "template": "{text} It was", "verbalizers": "terrible,great", **QUICK, **changes,
        }  # fmt: skip
        if values["query_schedule"] != "constant" and "queries" not in changes:
            values["queries"] = None
        line = ["train"]
        for name, value in values.items():
            if value is not None and value is not False:
                option = f"--{NESTED.get(name, name)}"
                line += [option] if value is True else [option, str(value)]
        return line

    return options


def run_main(line: list[str]) -> int:
    """The exit code of ``zo-opt``, in this process."""
    from zo_opt.cli.main import main

    try:
        return main(line)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def needs(kind: str) -> Any:
    """A kind of quantisation as a parameter of a test, which is skipped without its package."""
    missing = find_spec(KINDS[kind]) is None
    return pytest.param(kind, marks=pytest.mark.skipif(missing, reason=f"{KINDS[kind]} is not installed"))
