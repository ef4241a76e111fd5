"""Only label positions reach the vocabulary: every tensor made for a loss, or for many copies' losses in one forward, is watched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer, tokenizer_for
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zo_opt import MeZO, TTConfig, get_adapter_model, trainable_parameters
from zo_opt.schedules import constant_queries
from zo_opt.tasks.evaluation import Prepared
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring import make_scorer
from zo_opt.tasks.tasks import Task

SINGLE, SEVERAL = {"0": "terrible", "1": "great"}, {"0": "terrible", "1": "not that great"}
TEXTS = ("the film is a charming story of two friends and their long way home in winter " * 3,) * 3 + ("a film",)
QUERIES = 2


class VocabularyRows(TorchDispatchMode):
    """The most rows of the vocabulary's size in one tensor that an operation made (views are none)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not func.is_view and self.vocabulary in leaf.shape:
                self.rows = max(self.rows, leaf.numel() // self.vocabulary)
        return result


def other_model(kind: str) -> Any:
    """Heads in several pieces, or with a cap on the logits."""
    vocabulary = {"vocab_size": len(make_tokenizer("plain")), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    small = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    if kind == "distilbert":
        config: Any = transformers.DistilBertConfig(dim=32, hidden_dim=64, n_layers=4, n_heads=2, **vocabulary)
        model = transformers.DistilBertForMaskedLM
    elif kind == "electra":
        config, model = (
            transformers.ElectraConfig(embedding_size=16, **small, **vocabulary),
            transformers.ElectraForMaskedLM,
        )
    else:
        config = transformers.Gemma2Config(num_key_value_heads=1, head_dim=16, **small, **vocabulary)
        model = transformers.Gemma2ForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model(config).eval()


@pytest.mark.parametrize("mode", ["sequential", "batched", "split"])
@pytest.mark.parametrize("verbalizers", [SINGLE, SEVERAL], ids=["single", "several"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert", "t5", "distilbert", "electra", "gemma2"])
def test_no_tensor_has_the_vocabulary_at_every_position(kind: str, verbalizers: dict[str, str], mode: str) -> None:
    masked, own = kind in ("bert", "distilbert", "electra"), kind in ("distilbert", "electra", "gemma2")
    model = other_model(kind) if own else make_model(kind)
    tokenizer = make_tokenizer("masked" if masked else "causal") if own else tokenizer_for(kind)
    task = Task("t", "{text} It was {mask}." if masked else "{text} It was", verbalizers)
    examples = [Example({"text": text}, i % 2) for i, text in enumerate(TEXTS)]
    targets = {"distilbert": ["q_lin"], "electra": ["query"]}.get(kind)
    scorer = make_scorer(model, tokenizer, task)
    adapted = get_adapter_model(model, TTConfig(rank=2, bottleneck=4, target_modules=targets))
    prepared = Prepared(examples, scorer, torch.device("cpu"), None)
    batch = prepared.batch(range(len(TEXTS)))
    optimizer = MeZO(
        trainable_parameters(adapted), lr=0.0, query_mode=mode, module=adapted, query_schedule=constant_queries(QUERIES)
    )
    with VocabularyRows(len(tokenizer)) as watched:
        optimizer.step(lambda b: prepared.loss(adapted, b), batch)
    copies = 2 * QUERIES if mode == "batched" else 1
    sequences, tokens = batch["input_ids"].shape[:2].numel(), batch["input_ids"].shape[-1]
    words = batch["words"].shape
    if kind == "t5":  # each label's words are decoded, and no other position
        sequences = words[0] if verbalizers is SINGLE else words[:2].numel()
    at_labels = copies * sequences * (1 if verbalizers is SINGLE else words[2] + 1)
    assert at_labels < sequences * tokens  # what one copy's logits at every position would be
    assert watched.rows <= at_labels
    if verbalizers is SEVERAL:
        assert watched.rows > 0  # it does see them
