"""How many numbers each method trains on models of published shapes: exact, on the meta device, without weights."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import build

from zo_opt import (
    AdaLoRAConfig,
    BitFitConfig,
    BottleneckConfig,
    FullConfig,
    LaMDAConfig,
    LISAConfig,
    LoRAConfig,
    LoRAFAConfig,
    SpectralConfig,
    TTConfig,
    VeRAConfig,
    ZOError,
    get_adapter_model,
    load_adapter_model,
    trainable_parameters,
)
from zo_opt.adapters import ADAPTERS

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SHAPES = {
    "Llama-2-7B": lambda: transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    ),
    "RoBERTa-base": lambda: transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514),
    "RoBERTa-large": lambda: transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, **LARGE),
    "BERT-base": transformers.BertConfig,
    "DeBERTa-v3-base": lambda: transformers.DebertaV2Config(
        vocab_size=128100, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, type_vocab_size=0,
        relative_attention=True, position_buckets=256, pos_att_type=["p2c", "c2p"], share_att_key=True,
    ),
    "BART-large": transformers.BartConfig,
    "SmolLM2-135M": lambda: transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
}  # fmt: skip

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_NORMS = ["input_layernorm", "post_attention_layernorm", "model.norm"]
DEBERTA = ["query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense"]
BART = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def lora(rank, targets=None):
    return LoRAConfig(rank=rank, target_modules=targets)


def core(rank, targets):
    """LaMDA when all of B is frozen: the core alone."""
    return LaMDAConfig(rank=rank, target_modules=targets, total_steps=10)


# (model, method, adapters, trained numbers): every row of the published table, then our own arithmetic
ROWS = [
    ("Llama-2-7B", TTConfig(rank=5, bottleneck=64), 96, 610_560),
    ("Llama-2-7B", TTConfig(rank=5, bottleneck=64, bias=False), 96, 211_200),  # cores alone
    ("Llama-2-7B", TTConfig(rank=5, bottleneck=64, modules_to_save=LLAMA_NORMS), 96, 876_800),  # 0.88M published
    ("RoBERTa-large", TTConfig(rank=5, bottleneck=64), 48, 136_704),
    ("RoBERTa-large", TTConfig(rank=5, bottleneck=64, bias=False), 48, 84_480),
    ("RoBERTa-large", lora(8), 48, 786_432),
    ("Llama-2-7B", lora(8), 64, 4_194_304),
    ("Llama-2-7B", lora(16, LLAMA), 224, 39_976_960),
    ("Llama-2-7B", lora(64, LLAMA), 224, 159_907_840),
    ("Llama-2-7B", LoRAFAConfig(rank=64, target_modules=LLAMA), 224, 87_031_808),
    ("DeBERTa-v3-base", lora(8, DEBERTA), 72, 1_327_104),
    ("DeBERTa-v3-base", lora(2, DEBERTA), 72, 331_776),
    ("DeBERTa-v3-base", AdaLoRAConfig(rank=12, target_rank=8, target_modules=DEBERTA), 72, 1_991_520),
    ("DeBERTa-v3-base", AdaLoRAConfig(rank=8, target_rank=8, target_modules=DEBERTA), 72, 1_327_680),  # what is left
    ("DeBERTa-v3-base", core(32, DEBERTA), 72, 73_728),
    ("Llama-2-7B", core(32, LLAMA), 224, 229_376),
    ("Llama-2-7B", core(64, LLAMA), 224, 917_504),
    ("Llama-2-7B", core(128, LLAMA), 224, 3_670_016),
    ("BART-large", lora(16, BART), 192, 8_650_752),
    ("BART-large", core(32, BART), 192, 196_608),
    ("RoBERTa-base", VeRAConfig(rank=1024), 24, 43_008),
    ("RoBERTa-large", VeRAConfig(rank=256), 48, 61_440),
    # Houlsby: 2md + d + m an adapter, two a layer
    ("RoBERTa-large", BottleneckConfig(bottleneck=64), 48, 48 * (2 * 64 * 1024 + 1024 + 64)),
    # biases of a layer: 6 vectors of 768 and one of 3072, two norms; of the embeddings' norm, the pooler and two classes
    ("BERT-base", BitFitConfig(), 99, 12 * (5 * 768 + 3072 + 2 * 768) + 768 + 768 + 2),
    ("SmolLM2-135M", SpectralConfig(layers=8), 56, 896),
    ("SmolLM2-135M", FullConfig(), 0, 134_515_008),
    ("SmolLM2-135M", LISAConfig(), 0, 134_515_008),
]


@functools.cache
def base(name):
    """On the meta device; each test takes its adapters out again."""
    config = SHAPES[name]()
    auto = transformers.AutoModelForSequenceClassification
    if name == "BART-large":
        auto = transformers.AutoModelForSeq2SeqLM
    elif isinstance(config, transformers.LlamaConfig):
        auto = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


@pytest.mark.parametrize(
    ("name", "config", "adapters", "count"), ROWS, ids=[f"{n} {c.adapter_type} {count:,}" for n, c, _, count in ROWS]
)
def test_the_number_of_trained_parameters(name, config, adapters, count):
    model = get_adapter_model(base(name), config)
    try:
        assert len(model.adapted) == adapters
        trained = sum(p.numel() for p in trainable_parameters(model))
        if isinstance(config, LaMDAConfig):
            assert trained > count  # B still moves
            model.step(2)  # of 10, eta = 0.3
            trained = model.schedule.moving()
        assert trained == count
        if not adapters:
            assert model.trainable_summary().endswith("in the model itself")
    finally:
        model.unload()


def documented():
    """The rows of the table of docs/methods/adapters.md: name -> its cells."""
    page = (Path(__file__).parents[1] / "docs" / "methods" / "adapters.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:3] == "| `"]
    return {row[0].split("`")[1]: row for row in rows if len(row) == 7}


@pytest.mark.parametrize("name", sorted(documented().keys() - {"--adapter"}))
def test_the_table_in_the_docs(name, tmp_path):
    """Class, mergeable, exchange with PEFT, schedule and parameters at the defaults, as they are."""
    config = ADAPTERS[name]()
    tiny = get_adapter_model(build("llama"), config)
    try:
        tiny.export_peft(tmp_path)
        both_ways = load_adapter_model(build("llama"), tmp_path).adapter_config.adapter_type == name
        exchange = "both ways" if both_ways else "writes a LoRA"
    except ZOError:
        exchange = "no"
    big = get_adapter_model(base("SmolLM2-135M"), config)
    count = sum(p.numel() for p in trainable_parameters(big))
    big.unload()
    row = documented()[name]
    assert row[0] == f"`{name}`, `{type(config).__name__}`"
    assert row[3:] == [
        "yes" if config.mergeable else "no",
        exchange,
        "yes" if tiny.schedule is not None else "no",
        f"{count:,}",
    ]
