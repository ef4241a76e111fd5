"""A model without weights, from its config alone: all that sizes follow from."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from zo_opt.errors import ZOError, reason_of
from zo_opt.models import builtin
from zo_opt.models.models import HEADS, auto_class

# The built-in model's config, known before its weights are fetched.
_BUILT_IN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def read_config(name_or_path: str) -> Any:
    """A model's config: the built-in one's, a local directory's, or a Hugging Face id's ``config.json`` (nothing else is fetched).

    Raises:
        ZOError: there is none, or it cannot be read.
    """
    import transformers

    if name_or_path == builtin.DEFAULT_MODEL:
        return transformers.LlamaConfig(**_BUILT_IN)
    path = Path(name_or_path)
    if path.exists() and not (path / "config.json").is_file():
        raise ZOError(f"{path} holds no config.json; give a directory that does, or a Hugging Face id.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return transformers.AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ZOError(
            f"the config of model {name_or_path!r} could not be read ({reason_of(error)}); give {builtin.DEFAULT_MODEL!r}, a directory "
            "with a config.json, or a Hugging Face id."
        ) from error


def make_skeleton(config: Any, head: str, name: str) -> Any:
    """The model on the meta device, in float32 and evaluation mode.

    Raises:
        ZOError: no head of that kind, or the config describes no model.
    """
    import transformers

    if head not in HEADS:
        raise ZOError(f"head={head!r} is not known; choose one of {', '.join(HEADS)}.")
    kind = auto_class(transformers, config, head, name)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind.from_config(config, dtype=torch.float32).eval()
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise ZOError(f"no model can be made of the config of {name!r} ({reason_of(error)}); give another.") from error
