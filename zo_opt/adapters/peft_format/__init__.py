"""Adapters in the file format of Hugging Face's PEFT: written, and read. PEFT itself is not imported."""

from zo_opt.adapters.peft_format.export import export_peft
from zo_opt.adapters.peft_format.read import is_peft, read_peft

__all__ = ["export_peft", "is_peft", "read_peft"]
