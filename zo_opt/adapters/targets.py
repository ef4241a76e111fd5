"""Which modules of a model are adapted: by name, by layer, with their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from zo_opt.adapters.weights import is_conv1d
from zo_opt.errors import ZOError
from zo_opt.system.layers import layer_of

RESIDUAL = "residual"  # as a target name: the residual stream where it enters a layer

# Query and value projections of the attention, LoRA's own choice (arXiv 2106.09685, section 4.2): the default of methods
# that add to a weight. Some architectures hold queries, keys and values in one matrix.
_QV, _BERT_QV = ("q_proj", "v_proj"), ("query", "value")
ATTENTION: dict[str, Sequence[str]] = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"), _QV
    ),
    **dict.fromkeys(("olmo", "olmo2", "granite", "phi", "stablelm", "cohere", "opt", "gptj", "bart", "mbart"), _QV),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT_QV),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon"), ("query_key_value",)),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    "distilbert": ("q_lin", "v_lin"),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "gpt2": ("c_attn",),
    "phi3": ("qkv_proj",),
}

# Of serial adapters: after attention output and feed-forward in encoders and in models with plain feed-forwards; around the gated
# feed-forward of the Llama family: before gate and up, after down (methods of arXiv 2406.18060, appendix).
_GATED = ("gate_proj", "up_proj", "down_proj")
_ENCODER = ("attention.output.dense", "output.dense")
SERIAL: dict[str, Sequence[str]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "granite"), _GATED
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "deberta", "deberta-v2", "electra"), _ENCODER),
    **dict.fromkeys(("t5", "mt5"), ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo")),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "bart": ("self_attn.out_proj", "encoder_attn.out_proj", "fc2"),
}
_BEFORE = ("gate_proj", "up_proj")

# What writes into the residual stream: the attention's and the feed-forward's output projections. Adapters on answers sit here: what
# they add goes on to the answer itself.
_OD, _FALCON = ("o_proj", "down_proj"), ("self_attention.dense", "mlp.dense_4h_to_h")
WRITERS: dict[str, Sequence[str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"), _OD),
    **dict.fromkeys(("olmo", "olmo2", "granite", "phi3", "cohere", "stablelm", "helium", "ernie4_5", "exaone4"), _OD),
    "hunyuan_v1_dense": _OD,
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "deberta", "deberta-v2", "electra", "camembert"), _ENCODER),
    **dict.fromkeys(("t5", "mt5"), ("SelfAttention.o", "DenseReluDense.wo")),
    **dict.fromkeys(("bloom", "falcon"), _FALCON),
    **dict.fromkeys(("opt", "bart", "mbart"), ("self_attn.out_proj", "fc2")),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neo": ("out_proj", "mlp.c_proj"),
    "gptj": ("out_proj", "fc_out"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "phi": ("self_attn.dense", "fc2"),
    "distilbert": ("out_lin", "lin2"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
    "mixtral": ("o_proj",),
}


@dataclass(frozen=True)
class Target:
    """A module to adapt: its path in the model, the module, its input and output sizes.

    ``residual``: a whole layer, to be adapted on the residual stream that enters it. In an embedding ``in_features`` is
    the number of rows.
    """

    name: str
    module: nn.Module
    in_features: int
    out_features: int
    residual: bool = False

    @property
    def embedding(self) -> bool:
        """Whether it looks rows up."""
        return isinstance(self.module, nn.Embedding)

    @property
    def device(self) -> torch.device:
        """Where the module's first tensor is."""
        return next(chain(self.module.parameters(), self.module.buffers())).device

    @property
    def serial_place(self) -> tuple[str, int]:
        """Where a serial adapter sits, "before" or "after" the module, and the number of features there."""
        if self.residual or self.name.rsplit(".", 1)[-1] in _BEFORE:
            return "before", self.in_features
        return "after", self.out_features

    def on_meta(self) -> Target:
        """The same target without numbers, to count parameters by."""
        sizes = self.in_features, self.out_features
        if self.embedding:
            return replace(self, module=nn.Embedding(*sizes, device="meta"))
        biased = getattr(self.module, "bias", None) is not None
        return replace(self, module=nn.Linear(*sizes, bias=biased, device="meta"))


def find_targets(
    model: nn.Module,
    names: Sequence[str],
    layers: int | Sequence[int] | None,
    *,
    embeddings: bool = False,
    residual: bool = False,
) -> list[Target]:
    """Modules whose path ends in one of ``names``, within the given layers; ``embeddings``, ``residual``: these are possible too.

    Raises:
        ZOError: a name or a layer that matches nothing, or a module that is not a linear map.
    """
    if isinstance(names, str):
        names = [names]
    if RESIDUAL in names and not residual:
        raise ZOError(
            f"target {RESIDUAL!r} is no layer with a weight; it is for adapters 'tt' and 'adapter'. Name linear layers."
        )
    if RESIDUAL in names:
        return _residual_targets(model, layers) + (
            find_targets(model, others, layers, embeddings=embeddings)
            if (others := [n for n in names if n != RESIDUAL])
            else []
        )
    found = {n: m for n, m in model.named_modules() if any(matches(n, t) for t in names)}
    for wanted in names:
        if not any(matches(n, wanted) for n in found):
            raise ZOError(
                f"target module {wanted!r} matches nothing in this model; its linear modules are named {_linear_names(model)}."
            )
    targets = []
    for name, module in found.items():
        sizes = (_embedding_sizes(module) if embeddings else None) or _sizes(module)
        if sizes is None:
            raise ZOError(
                f"target module {name!r} is a {type(module).__name__}, not a linear layer; name one of {_linear_names(model)}."
            )
        if in_layers(model, name, layers):
            targets.append(Target(name, module, *sizes))
    if not targets:
        raise ZOError(
            f"layers={layers!r} leaves no target module; this model's layers are numbered {_layer_range(model, found)}."
        )
    for wanted in names:
        if not any(matches(t.name, wanted) for t in targets):
            raise ZOError(
                f"layers={layers!r} leaves nothing of target module {wanted!r}; leave it out, or adapt all layers (layers=None, "
                "on the command line --adapter.layers null)."
            )
    return targets


def matches(name: str, ending: str) -> bool:
    """Whether a module path ends in a name.

    >>> matches("model.layers.3.mlp.up_proj", "mlp.up_proj"), matches("model.layers.3.mlp.up_proj", "proj")
    (True, False)
    """
    return name == ending or name.endswith("." + ending)


def _residual_targets(model: nn.Module, layers: int | Sequence[int] | None) -> list[Target]:
    """Whole layers of every stack; an adapter before one acts on the residual stream."""
    size = getattr(getattr(model, "config", None), "hidden_size", None)
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and layer_of(f"{name}.0") == (name, 0)
    }
    if size is None or not stacks:
        raise ZOError(f"target {RESIDUAL!r} needs a transformer with a list of layers and config.hidden_size.")
    targets = [
        Target(f"{stack}.{i}", layer, size, size, residual=True)
        for stack, stacked in stacks.items()
        for i, layer in enumerate(stacked)
        if in_layers(model, f"{stack}.{i}", layers)
    ]
    return targets


def in_layers(model: nn.Module, name: str, layers: int | Sequence[int] | None) -> bool:
    if layers is None:
        return True
    place = layer_of(name)
    if place is None:
        return False
    stack, index = place
    depth = len(list(model.get_submodule(stack).children()))
    if isinstance(layers, int):
        if not 1 <= layers <= depth:
            raise ZOError(
                f"layers={layers} is not possible in a stack of {depth}; give 1 to {depth}, a list, or None for all."
            )
        return index >= depth - layers
    wrong = [i for i in layers if not 0 <= i < depth]
    if wrong:
        raise ZOError(f"layers {wrong} do not exist; this model's layers are numbered 0 to {depth - 1}.")
    return index in layers


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    if is_conv1d(module):
        weight: Any = module.weight
        return int(weight.shape[0]), int(weight.shape[1])
    return None


def _embedding_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Those that look their input up, and at most scale it; not those that compute positions themselves (OPT's)."""
    plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    return (module.num_embeddings, module.embedding_dim) if isinstance(module, nn.Embedding) and plain else None


def _linear_names(model: nn.Module) -> str:
    names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if n and _sizes(m) is not None})
    return ", ".join(names) if names else "(none)"


def _layer_range(model: nn.Module, names: Sequence[str] | dict[str, nn.Module]) -> str:
    places = [p for p in map(layer_of, names) if p is not None]
    return f"0 to {max(i for _, i in places)}" if places else "in no list of layers (give layers=None)"
