"""Tune a causal language model with forward passes alone, in a loop of one's own under accelerate, without a Trainer.

    python examples/accelerate_loop.py                  # a tiny random model, in seconds
    python examples/accelerate_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 200 --lr 1e-4
    python examples/accelerate_loop.py --steps 40 --resume  # continue; to the same bits from the end of an epoch

accelerate wraps the optimizer, and its wrapper's ``step`` returns nothing: ``estimate`` is called on the optimizer itself, ``step``
on the wrapper. Micro-batches of a step share their directions without more ado.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, get_scheduler

from zo_opt import LoRAConfig, MeZO, get_adapter_model, trainable_parameters
from zo_opt.optim import Adam
from zo_opt.schedules import constant_queries

TEXTS = ["a wonderful film", "a dreadful film", "a charming story", "a boring story"] * 4


def load(name: str) -> tuple[Any, Any]:
    """A model, and texts -> a batch."""
    if name == "tiny":
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))

        def encode(texts: list[str]) -> dict[str, torch.Tensor]:
            ids = torch.tensor([list(text.encode().ljust(20)) for text in texts])
            return {"input_ids": ids, "labels": ids}

        return model, encode
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
        batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    return AutoModelForCausalLM.from_pretrained(name), tokenize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--micro_batches", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=Path("accelerate-loop"))
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=options.micro_batches)
    model, collate = load(options.model)
    model = get_adapter_model(model, LoRAConfig(rank=4))
    zo = MeZO(
        trainable_parameters(model), lr=options.lr, zo_eps=1e-2, seed=0, module=model, directions="rademacher",
        query_schedule=constant_queries(4), update_rule=Adam(),
    )  # fmt: skip
    scheduler = get_scheduler("constant_with_warmup", zo, num_warmup_steps=5)
    model, optimizer, loader = accelerator.prepare(model, zo, DataLoader(TEXTS, batch_size=4, collate_fn=collate))
    accelerator.register_for_checkpointing(scheduler)
    state = options.output_dir / "state"
    if options.resume:
        accelerator.load_state(str(state))

    while zo.step_count < options.steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = zo.estimate(lambda b: model(**b).loss, batch)
                optimizer.step()  # nothing until all micro-batches of the step are estimated
                if accelerator.sync_gradients:
                    scheduler.step()
                    accelerator.print(
                        f"step {zo.step_count}: loss {float(loss):.4f}, {zo.history.forwards} forward passes"
                    )
            if zo.step_count == options.steps:
                break
    accelerator.save_state(str(state))
    accelerator.unwrap_model(model).save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
