"""Which PEFT method stands for which of ours."""

from __future__ import annotations

from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.peft_format.adalora import AdaLoRAFiles
from zo_opt.adapters.peft_format.lora import LoRAFiles
from zo_opt.adapters.peft_format.method import PeftMethod
from zo_opt.adapters.peft_format.vera import VeRAFiles

PEFT_METHODS: dict[str, PeftMethod] = {m.peft_type: m for m in (LoRAFiles(), AdaLoRAFiles(), VeRAFiles())}
_WRITTEN_AS = {"adalora": "ADALORA", "vera": "VERA"}


def method_of(config: AdapterConfig) -> PeftMethod:
    """How a method is written: in PEFT's own form of it, else as a LoRA, which refuses what is no pair of factors."""
    return PEFT_METHODS[_WRITTEN_AS.get(config.adapter_type, "LORA")]
