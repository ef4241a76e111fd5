"""Tiny randomly initialised transformers models with default tensor-train targets, and padded batches for them."""

from __future__ import annotations

import torch
import transformers

VOCABULARY = 50
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**IDS, **SIZES, num_key_value_heads=2),
    "mistral": lambda: transformers.MistralConfig(**IDS, **SIZES, num_key_value_heads=2),
    "qwen2": lambda: transformers.Qwen2Config(**IDS, **SIZES, num_key_value_heads=2),
    "gemma": lambda: transformers.GemmaConfig(**IDS, **SIZES, num_key_value_heads=2, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**IDS, **SIZES, num_key_value_heads=2, head_dim=8),
    "opt": lambda: transformers.OPTConfig(
        **IDS, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    ),
    "gpt2": lambda: transformers.GPT2Config(**IDS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "bert": lambda: transformers.BertConfig(**IDS, **SIZES, **NO_DROPOUT),
    "roberta": lambda: transformers.RobertaConfig(**IDS, **SIZES, **NO_DROPOUT),
    "deberta-v2": lambda: transformers.DebertaV2Config(
        **IDS, **SIZES, **NO_DROPOUT, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0
    ),
    "t5": lambda: transformers.T5Config(
        **IDS, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "bart": lambda: transformers.BartConfig(
        **IDS, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, decoder_start_token_id=2,
    ),
}  # fmt: skip
MASKED, SEQ2SEQ = ("bert", "roberta", "deberta-v2"), ("t5", "bart")


def build(name, *, dtype=torch.float32, seed=0):
    """In evaluation mode, weights large enough that every part of the model matters."""
    auto = transformers.AutoModelForCausalLM
    if name in MASKED:
        auto = transformers.AutoModelForSequenceClassification
    elif name in SEQ2SEQ:
        auto = transformers.AutoModelForSeq2SeqLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(CONFIGS[name]())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.2)
    return model.to(dtype).eval()


def padded_batch(name, examples=4, tokens=9, seed=0):
    """Token ids of different lengths (the first one is full), their mask, and labels. Padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(tokens // 2, tokens, (examples, 1), generator=generator)
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths).long()
    ids = torch.randint(3, VOCABULARY, (examples, tokens), generator=generator) * mask
    if name in MASKED:
        labels = torch.randint(0, 2, (examples,), generator=generator)
    elif name in SEQ2SEQ:
        labels = torch.randint(3, VOCABULARY, (examples, 5), generator=generator)
    else:
        labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def perturb(parameters, std=0.1, seed=5):
    """Move trainables away from their start, where adapters are identities."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
