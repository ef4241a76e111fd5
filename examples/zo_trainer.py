"""Tune a causal language model with forward passes alone, in the Hugging Face Trainer.

    python examples/zo_trainer.py                       # a tiny random model, in seconds
    python examples/zo_trainer.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --max_steps 200 --learning_rate 1e-4
    python examples/zo_trainer.py --resume              # continue from the last checkpoint, to the same bits

All of ZOTrainingArguments can be given, such as --zo_optimizer, --query_mode split or --max_queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM

from zo_opt import TTConfig, get_adapter_model
from zo_opt.training import ZOTrainer, ZOTrainingArguments

WORDS = {"great": ("wonderful", "charming", "a delight"), "terrible": ("dreadful", "boring", "a mess")}
THINGS = ("the film", "the story", "the acting", "the music")


@dataclass
class Options:
    model_name_or_path: str = "tiny"
    resume: bool = False


def load(name: str) -> tuple[Any, Any]:
    """A model, and text -> token ids."""
    if name == "tiny":
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)), lambda text: list(text.encode())
    return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name).encode


def row(encode: Any, thing: str, word: str, label: str) -> dict[str, torch.Tensor]:
    """A prompt and its label word; the loss is that of the label alone."""
    prompt, whole = encode(f"{thing} is {word}. It was"), encode(f"{thing} is {word}. It was {label}")
    labels = [-100] * len(prompt) + whole[len(prompt) :]
    return {"input_ids": torch.tensor(whole), "labels": torch.tensor(labels)}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right."""
    ids = pad_sequence([r["input_ids"] for r in rows], batch_first=True, padding_value=0)
    labels = pad_sequence([r["labels"] for r in rows], batch_first=True, padding_value=-100)
    mask = pad_sequence([torch.ones_like(r["input_ids"]) for r in rows], batch_first=True, padding_value=0)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def main() -> None:
    parser = HfArgumentParser([Options, ZOTrainingArguments])
    parser.set_defaults(
        output_dir="zo-trainer", max_steps=20, learning_rate=1e-3, zo_eps=1e-2, update_rule="adam", max_queries=4,
        query_schedule="constant", per_device_train_batch_size=8, logging_steps=5, save_steps=10, report_to="none",
    )  # fmt: skip
    options, args = parser.parse_args_into_dataclasses()
    model, encode = load(options.model_name_or_path)
    model = get_adapter_model(model, TTConfig(rank=5, bottleneck=16))
    print(model.trainable_summary())
    rows = [row(encode, thing, word, label) for label in WORDS for word in WORDS[label] for thing in THINGS]
    trainer = ZOTrainer(
        model=model, args=args, train_dataset=rows[::2] + rows[1::2], eval_dataset=rows, data_collator=collate
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()  # an adapter: load_adapter_model(base, output_dir)
    forwards = trainer.zo_optimizer.history.forwards
    print(f"loss {before:.4f} -> {trainer.evaluate()['eval_loss']:.4f} in {forwards} forward passes of a batch")


if __name__ == "__main__":
    main()
