"""Numbers a token that passes through a model hold, from the sizes of its layers' linear maps.

Attention is counted as fused, which keeps its output and its mask; an eager one keeps its scores, too.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from zo_opt.adapters import AdapterModel
from zo_opt.system.layers import layer_of

Layer = tuple[str, int]  # stack and index


@dataclass(frozen=True)
class Shape:
    """Sizes that activations follow from.

    Attributes:
        layers: each layer's linear maps, path -> (inputs, outputs).
        hidden: width of the residual stream.
        scores: attention scores a token and token attended to that are kept: none where attention is fused.
        vocabulary: logits a position.
        steps: results that the activation function keeps beyond what follows from its input (GPT-2's is written out step by step).
    """

    layers: dict[Layer, dict[str, tuple[int, int]]]
    hidden: int
    scores: int
    vocabulary: int
    steps: int

    @classmethod
    def of(cls, skeleton: Any) -> Shape:
        """Of a model of transformers without adapters."""
        from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, its weight transposed

        layers: dict[Layer, dict[str, tuple[int, int]]] = defaultdict(dict)
        for name, module in skeleton.named_modules():
            if (layer := layer_of(name)) and isinstance(module, nn.Linear | Conv1D):
                rows, columns = module.weight.shape
                layers[layer][name] = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
        config = skeleton.config.get_text_config()
        scores = 0 if config._attn_implementation != "eager" else 2 * config.num_attention_heads
        vocabulary = config.vocab_size if skeleton.get_output_embeddings() is not None else config.num_labels
        steps = 3 if "gelu_new" in (getattr(config, n, "") for n in ("activation_function", "hidden_act")) else 0
        return cls(dict(layers), config.hidden_size, scores, vocabulary, steps)

    def widest(self, layer: Layer) -> tuple[int, int]:
        """The widest linear map's outputs, and how many are as wide: two in gated blocks."""
        sizes = [size for _, size in self.layers[layer].values()]
        return max(sizes), sizes.count(max(sizes))


def kept(shape: Shape, model: AdapterModel, length: int) -> int:
    """What a forward pass keeps for the backward pass: of all layers from the first one with a trained parameter.

    A linear map's output is kept by what follows it (a norm, attention, which repeats grouped keys and values, an activation function). On top
    come attention's output and mask and, in gated blocks, the activation function's output. A trained matrix keeps its input, a trained
    vector what it scales.
    """
    trained = _trained(model)
    first = min((layer[1] if layer else 0 for layer in trained), default=0)
    total = 2 * shape.hidden
    for layer, maps in shape.layers.items():
        if layer[1] < first:
            continue
        width, number = shape.widest(layer)
        total += sum(max(size, shape.hidden) for _, size in maps.values())
        total += shape.hidden + (1 + shape.scores) * length + width * ((number > 1) + shape.steps)
        inputs = set()
        for site, vectors, matrices in trained.get(layer, ()):
            total += vectors
            if matrices:  # maps of one block that are equally wide have one input
                inputs.add((site.rpartition(".")[0], maps[site][0] if site in maps else shape.hidden))
        total += sum(size for _, size in inputs)
    return total


def at_once(shape: Shape, length: int) -> int:
    """What a forward pass without gradients holds at most at once: the residual stream, a mask, and the widest part of a layer."""
    parts = [4 * shape.hidden + (1 + shape.scores) * length]  # attention: queries, keys, values, output
    for layer in shape.layers:
        width, number = shape.widest(layer)
        parts.append(width * (2 + (number > 1)))
    return 2 * shape.hidden + length + max(parts)


def _trained(model: AdapterModel) -> dict[Layer | None, list[tuple[str, int, bool]]]:
    """Layer (None: outside of all) -> (path of a module, entries of its trained vectors but for biases, whether it has trained matrices)."""
    vectors: dict[str, int] = defaultdict(int)
    matrices: dict[str, bool] = defaultdict(bool)
    for name, parameter in model.wrapped.named_parameters():
        if not parameter.requires_grad:
            continue
        site = name.split(".adapter.")[0] if ".adapter." in name else name.rpartition(".")[0]
        matrices[site] |= parameter.ndim > 1
        vectors[site] += parameter.numel() if parameter.ndim == 1 and not name.endswith("bias") else 0
    found: dict[Layer | None, list[tuple[str, int, bool]]] = defaultdict(list)
    for site, has in matrices.items():
        found[layer_of(site)].append((site, vectors[site], has))
    return found
