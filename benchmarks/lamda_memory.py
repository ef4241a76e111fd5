"""Memory of a forward and backward pass: LoRA against LaMDA, on layers of BART-large's and Llama-7B's shapes.

python benchmarks/lamda_memory.py --out benchmarks/results/lamda_memory.json

The claim (arXiv 2406.12832): up to 1.32 times lower peak memory than LoRA in training. Its projections are filled with nothing here: memory
does not depend on the numbers, and the SVDs would take minutes on a CPU. The layer's input is not counted: a single fp32 layer of LoRA
keeps nothing else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import machine, peak_bytes, show
from torch import Tensor, nn

from zo_opt import LaMDAConfig, LoRAConfig
from zo_opt.adapters import AdapterConfig

CLAIM = 1.32
METHODS: dict[str, AdapterConfig] = {
    "lora r16": LoRAConfig(rank=16),
    "lamda r32, B moving": LaMDAConfig(rank=32),
    "lamda r32, B half frozen": LaMDAConfig(rank=32),
    "lamda r32, core only": LaMDAConfig(rank=32, freeze_share=0.0),
}
LAYERS = {  # (in, out)
    "BART-large 1024 -> 1024": (1024, 1024),
    "BART-large 1024 -> 4096": (1024, 4096),
    "Llama-7B 4096 -> 4096": (4096, 4096),
    "Llama-7B 4096 -> 11008": (4096, 11008),
    "Llama-7B 11008 -> 4096": (11008, 4096),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    cells: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, (inputs, outputs) in LAYERS.items():
            make = lambda i=inputs, o=outputs: nn.Sequential(nn.Linear(i, o))  # noqa: E731
            cells[f"{name}, {str(dtype)[6:]}"] = cell(make, inputs, arguments, dtype)
        for name, (make, width) in {"2 BART-large layers": (bart, 1024), "1 Llama-7B layer": (llama, 4096)}.items():
            cells[f"{name}, {str(dtype)[6:]}"] = cell(make, width, arguments, dtype)
    for name, figures in cells.items():
        for what in ("kept for the backward", "forward and backward", "all of training"):
            lora = figures["lora r16"][what]
            ratios = {f"{m}: lora / lamda": lora / f[what] for m, f in figures.items() if m != "lora r16"}
            show(f"{name}: {what} (lora {lora / 2**20:.1f} MiB; claimed {CLAIM} in all of training)", ratios)
    if arguments.out is not None:
        where = machine(arguments.device, "transformers")
        result = {"claim": CLAIM, "tokens": arguments.tokens, "machine": where, "bytes": cells}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


class Stack(nn.Module):
    """Layers of a model one after the other, on the residual stream."""

    def __init__(self, layers: nn.ModuleList, inputs: Callable[[Tensor], dict[str, Any]]) -> None:
        super().__init__()
        self.layers, self.inputs = layers, inputs

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            out = layer(x, **self.inputs(x))
            x = out[0] if isinstance(out, tuple) else out
        return x


def bart() -> nn.Module:
    config = transformers.BartConfig(
        d_model=1024, encoder_layers=2, decoder_layers=1, vocab_size=8, attn_implementation="sdpa"
    )
    return Stack(transformers.BartModel(config).encoder.layers, lambda x: {"attention_mask": None})


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=1, vocab_size=8
    )
    model = transformers.LlamaModel(config)
    rotary = model.rotary_emb

    def inputs(x: Tensor) -> dict[str, Any]:
        return {"position_embeddings": rotary(x, torch.arange(x.shape[1], device=x.device)[None])}

    return Stack(model.layers, inputs)


def cell(make: Callable[[], nn.Module], width: int, arguments: Any, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Bytes of every method: what autograd keeps after the forward, the peak of both passes, and that with all else a run holds."""
    found = {}
    for method, config in METHODS.items():
        torch.manual_seed(0)
        model = make().to(arguments.device, dtype).eval()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        adapters = adapt(model, config)
        if "half" in method:
            for adapter in adapters:
                adapter.freeze_columns(len(adapter.lora_S) // 2)
        own = [p for adapter in adapters for p in adapter.parameters()]
        x = torch.randn(1, arguments.tokens, width, device=arguments.device, dtype=dtype).requires_grad_()

        def both(model: nn.Module = model, x: Tensor = x) -> None:
            model(x).sum().backward()

        kept = kept_bytes(model, x)
        peak = peak_bytes(both, arguments.device)
        rest = sum(p.numel() * 4 for p in own) + sum(2 * p.numel() * 4 for p in own if p.requires_grad)
        found[method] = {
            "kept for the backward": kept,
            "forward and backward": peak,
            "all of training": weights + rest + peak,  # rest: adapters and AdamW's two moments
        }
    return found


def adapt(model: nn.Module, config: AdapterConfig) -> list[Any]:
    """Adapters on every linear layer, without what starts from the weights."""
    model.requires_grad_(False)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = type(config)(**{**vars(config), "target_modules": names})
    adapted = config.wrap_all(config.find_targets(model))
    for name, module in adapted.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return [module.adapter for module in adapted.values()]


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Storages that autograd keeps after a forward, besides parameters and the input."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(kept.values())


if __name__ == "__main__":
    main()
