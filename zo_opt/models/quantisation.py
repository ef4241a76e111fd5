"""A frozen base in 8 or 4 bits: which layers, by which library."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from zo_opt.adapters.weights import is_quantised
from zo_opt.errors import ZOError
from zo_opt.models.quantised_layers import QuantisedEmbedding, QuantisedLinear, bitsandbytes_layers
from zo_opt.system.checksum import plain_parts
from zo_opt.system.layers import layer_of

# kind -> the package that it needs
KINDS = {"int8": "torchao", "int4": "torchao", "bnb-int8": "bitsandbytes", "bnb-nf4": "bitsandbytes"}
ROWS = 4096  # of an embedding that are quantised at a time
_BITSANDBYTES = {"Linear8bitLt": "bnb-int8", "Linear4bit": "bnb-nf4"}  # as transformers loads them
GROUP = 32  # neighbouring int4 weights that share a scale and a zero point


def check_kind(kind: str) -> None:
    """Whether a kind of quantisation is known and its package installed.

    Raises:
        ZOError: it is not.
    """
    if kind not in KINDS:
        raise ZOError(f"quantise={kind!r} is not known; choose one of {', '.join(KINDS)}.")
    if find_spec(KINDS[kind]) is None:
        raise ZOError(
            f"quantise={kind!r} needs the package {KINDS[kind]}; install it with pip install 'zo-opt[quantised]'."
        )


@torch.no_grad()
def quantise(model: Any, kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Quantise the linear layers of a frozen model in place, one after another, so that no second copy is ever there.

    "int8", "int4": weights of linear layers within the stacks of layers by torchao, symmetric int8 with a scale a row, or
    asymmetric int4 in groups of 32; embedding and output head in int8, kept once where they are tied. Layers whose sizes the int4 kernel
    does not take are kept in int8. "bnb-int8" (LLM.int8(), arXiv 2208.07339), "bnb-nf4" (QLoRA's NF4 with double quantisation, arXiv
    2305.14314): linear layers within the stacks by bitsandbytes; embedding and head stay as they are.
    Rounding is to nearest: the same checkpoint gives the same bits. The model is in evaluation mode after.

    Args:
        model: a model of transformers without adapters.
        kind: one of ``KINDS``.
        device: where the model will run; quantised there, for kernels pack their weights.
        dtype: of the products.

    Raises:
        ZOError: the kind is not known, its package is not installed, or the model has no linear layers to quantise.
    """
    check_kind(kind)
    if next(quantised_layers(model), None) is not None:
        raise ZOError(f"the checkpoint is quantised already; leave --quantise {kind} out.")
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and layer_of(n)}
    if not linear:
        raise ZOError(
            f"a {type(model).__name__} has no nn.Linear in its layers, which is all that is quantised; leave --quantise out."
        )
    with quiet(stderr=True):
        try:
            make = _torchao(kind, dtype) if KINDS[kind] == "torchao" else _bitsandbytes(kind, dtype)
        except ImportError as error:
            raise ZOError(
                f"the installed {KINDS[kind]} cannot be used for quantise={kind!r} ({error}); install the version in constraints.txt."
            ) from error
        for name, module in linear.items():
            _replace(model, name, make(module.to(device)))
        if KINDS[kind] == "torchao":
            _quantise_embeddings(model, device, dtype)
    model.eval()


def adopt(model: Any, dtype: torch.dtype) -> None:
    """Make the layers of a checkpoint that torchao or bitsandbytes quantised such as :func:`quantise` makes, in place, around the same weights.

    Args:
        model: as transformers loaded it.
        dtype: of the products with torchao's weights; bitsandbytes' are in the checkpoint's.

    Raises:
        ZOError: a weight is kept in a way that is not known here.
    """
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and hasattr(module.weight, "__tensor_flatten__"):
            _replace(model, name, QuantisedLinear(module.weight.data, module.bias, dtype))
        elif type(module).__module__.startswith("bitsandbytes.nn") and type(module).__name__ in _BITSANDBYTES:
            module.__class__ = bitsandbytes_layers()[_BITSANDBYTES[type(module).__name__]]
            if module.bias is not None:
                module.bias.data = module.bias.data.float()
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "__tensor_flatten__"):
            raise ZOError(
                f"the checkpoint keeps {name!r} as a {type(parameter).__name__}, which cannot be tuned on; load the checkpoint in full and "
                "add --quantise."
            )


def quantised_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers of layers that :func:`quantise` made: their dtypes are to stay as they are."""
    return [t for m in quantised_layers(model) for t in [*m.parameters(), *m.buffers()]]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once, and of what quantised tensors keep inside.

    >>> weight_bytes(nn.Linear(3, 5, dtype=torch.bfloat16))
    40
    """
    found: dict[int, int] = {}

    def visit(tensor: Any) -> None:
        found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        state = getattr(tensor, "quant_state", None)  # bitsandbytes' 4-bit weights
        for part in (state, getattr(state, "state2", None)):
            for inner in vars(part).values() if part is not None else ():
                if isinstance(inner, Tensor):
                    visit(inner)
        if isinstance(scale := getattr(tensor, "SCB", None), Tensor):
            visit(scale)

    for tensor in [*model.parameters(), *model.buffers()]:
        for _, part in plain_parts("", tensor):
            visit(part)
    return sum(found.values())


@contextmanager
def quiet(*, stderr: bool = False) -> Iterator[None]:
    """Without what other packages say on being imported, of kernels for other machines say; ``stderr``: nor what they write there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()) if stderr else nullcontext():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def quantised_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Layers whose weights are kept in few bits."""
    return (m for m in model.modules() if isinstance(m, QuantisedEmbedding) or is_quantised(m))


def _torchao(kind: str, dtype: torch.dtype) -> Callable[[nn.Linear], nn.Module]:
    from torchao.quantization import quantize_

    def make(layer: nn.Linear) -> nn.Module:
        layer.weight.data = layer.weight.data.to(dtype)
        config = _int4_config(layer) if kind == "int4" else None
        quantize_(layer, _int8_config() if config is None else config)
        return QuantisedLinear(layer.weight.data, layer.bias, dtype)

    return make


def _int8_config() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)


def _int4_config(layer: nn.Linear) -> Any:
    """torchao's int4 for the layer's device; None where the kernel does not take the layer's sizes."""
    if layer.in_features % GROUP or layer.out_features % 16:
        return None
    if layer.weight.device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=GROUP)
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)


def _bitsandbytes(kind: str, dtype: torch.dtype) -> Callable[[nn.Linear], nn.Module]:
    import bitsandbytes

    made = bitsandbytes_layers()[kind]

    def make(layer: nn.Linear) -> nn.Module:
        sizes, device, biased = (layer.in_features, layer.out_features), layer.weight.device, layer.bias is not None
        new: Any
        if kind == "bnb-nf4":
            options = {"quant_type": "nf4", "compress_statistics": True}
            new = made(*sizes, bias=biased, compute_dtype=dtype, device="meta", **options)
            new.weight = bitsandbytes.nn.Params4bit(layer.weight.data.to(dtype), requires_grad=False, **options)
        else:
            new = made(*sizes, bias=biased, has_fp16_weights=False, threshold=6.0, device="meta")
            new.weight = bitsandbytes.nn.Int8Params(
                layer.weight.data.to(dtype), requires_grad=False, has_fp16_weights=False
            )
        if biased:
            new.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
        made_there: nn.Module = new.to(device)  # this is when it quantises
        return made_there

    return make


def _quantise_embeddings(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Input embedding and output head in int8: once where the head is the embedding's weight."""
    from torchao.quantization import quantize_

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain, linear = type(embedding) is nn.Embedding, type(head) is nn.Linear
    tied = linear and head.weight is getattr(embedding, "weight", None)
    if not plain:  # one that scales its rows, say
        return

    def int8(weight: Tensor) -> Any:
        """A few rows at a time: they do not depend on each other, and quantising takes several times their memory."""
        parts: list[Any] = []
        for some in weight.detach().split(ROWS):
            carrier = nn.Linear(some.shape[1], some.shape[0], bias=False, device="meta")
            carrier.weight = nn.Parameter(some.to(device, dtype), requires_grad=False)
            quantize_(carrier, _int8_config())
            parts.append(carrier.weight.data)
        names, context = parts[0].__tensor_flatten__()
        whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return type(parts[0]).__tensor_unflatten__(whole, context, None, None)

    rows = int8(embedding.weight)
    model.set_input_embeddings(QuantisedEmbedding(rows))
    if linear:
        model.set_output_embeddings(QuantisedLinear(rows if tied else int8(head.weight), head.bias, dtype))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
