"""A frozen base in 8 or 4 bits: which layers, by which library."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from zo_opt.adapters.weights import is_quantised
from zo_opt.errors import ZOError
from zo_opt.models.quantised_layers import QuantisedEmbedding, QuantisedLinear, bitsandbytes_layers
from zo_opt.system.layers import layer_of
from zo_opt.system.memory import MappedFiles, trim

# kind -> the package that it needs
KINDS = {"int8": "torchao", "int4": "torchao", "bnb-int8": "bitsandbytes", "bnb-nf4": "bitsandbytes"}
_BITSANDBYTES = {"Linear8bitLt": "bnb-int8", "Linear4bit": "bnb-nf4"}  # as transformers loads them
_PARAMETERS = {"Int8Params": "bnb-int8", "Params4bit": "bnb-nf4"}  # their weights
_HOW: dict[str, dict[str, Any]] = {
    "bnb-int8": {"has_fp16_weights": False},
    "bnb-nf4": {"quant_type": "nf4", "compress_statistics": True},
}
_ENTRIES = 1 << 20  # of a weight that torchao quantises at a time: it takes some 16 bytes for each
GROUP = 32  # neighbouring int4 weights that share a scale and a zero point
_TILE = 64  # rows that the int4 kernel of a CPU packs together


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

    Of a GGUF file they are in few bits already where it was read in this form (``load_model(..., form=...)``).

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
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and layer_of(n)}
    few = list(quantised_layers(model))
    if few and getattr(model, "quantised_as_read", None) != kind:
        raise ZOError(f"the checkpoint is quantised already; leave --quantise {kind} out.")
    if not linear and not any(layer_of(name) for name, module in model.named_modules() if module in few):
        raise ZOError(
            f"a {type(model).__name__} has no nn.Linear in its layers, which is all that is quantised; leave --quantise out."
        )
    with quiet(stderr=True):
        try:
            files = MappedFiles()
            for name in list(linear):
                module = linear.pop(name)
                weight = few_bits(module.weight.data, kind, device, dtype, files)
                model.set_submodule(name, _around(module, weight, dtype))
                del module, weight
                trim()
            if KINDS[kind] == "torchao":
                _quantise_embeddings(model, device, dtype, files)
        except ImportError as error:
            raise ZOError(
                f"the installed {KINDS[kind]} cannot be used for quantise={kind!r} ({error}); install the version in constraints.txt."
            ) from error
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
        kind = type(module)
        if kind is nn.Linear and is_in_few_bits(module.weight):
            model.set_submodule(name, _around(module, module.weight, dtype))
        elif kind is nn.Embedding and _has_a_scale_a_row(module.weight):
            model.set_submodule(name, QuantisedEmbedding(module.weight.data))
        elif kind.__module__.startswith("bitsandbytes.nn") and kind.__name__ in _BITSANDBYTES:
            module.__class__ = bitsandbytes_layers()[_BITSANDBYTES[kind.__name__]]
            if module.bias is not None:
                module.bias.data = module.bias.data.float()
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "__tensor_flatten__"):
            raise ZOError(
                f"the checkpoint keeps {name!r} as a {type(parameter).__name__}, which cannot be tuned on; load the checkpoint in full and "
                "add --quantise."
            )


def quantised_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Layers whose weights are kept in few bits."""
    return (m for m in model.modules() if isinstance(m, QuantisedEmbedding) or is_quantised(m))


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


def is_in_few_bits(weight: Tensor) -> bool:
    """Whether a weight is kept as torchao or bitsandbytes keep it."""
    return hasattr(weight, "__tensor_flatten__") or type(weight).__name__ in _PARAMETERS


def _has_a_scale_a_row(weight: Any) -> bool:
    """Whether it is torchao's symmetric int8, as embeddings are quantised here."""
    if type(weight.data).__name__ != "Int8Tensor" or weight.block_size != [1, weight.shape[-1]]:
        return False
    return weight.zero_point is None or not weight.zero_point.any()


def few_bits(weight: Tensor, kind: str, device: torch.device, dtype: torch.dtype, files: MappedFiles) -> Tensor:
    """A linear layer's weight, (out, in), in few bits, as its library keeps it.

    Args:
        weight: in full, wherever it is.
        kind, device, dtype: as of :func:`quantise`.
        files: told of what has been read of the weight.
    """
    if KINDS[kind] == "torchao":
        # Else the int4 kernel does not take it.
        whole_groups = weight.shape[1] % GROUP == 0 and weight.shape[0] % 16 == 0
        return _torchao_weight(weight, kind if whole_groups else "int8", device, dtype, files)
    import bitsandbytes

    make = bitsandbytes.nn.Int8Params if kind == "bnb-int8" else bitsandbytes.nn.Params4bit
    few: Tensor = make(weight.to(device, dtype), requires_grad=False, **_HOW[kind]).to(device)  # which quantises
    files.let_go(weight)
    return few


def _torchao_weight(weight: Tensor, kind: str, device: torch.device, dtype: torch.dtype, files: MappedFiles) -> Tensor:
    """Some rows at a time: they do not depend on each other, and quantising takes several times their memory."""
    whole: dict[str, Tensor] = {}
    tiled = kind == "int4" and device.type != "cpu"  # over all rows
    count = len(weight) if tiled else max(_ENTRIES // weight.shape[1] // _TILE, 1) * _TILE
    for start in range(0, len(weight), count):
        some = weight.detach()[start : start + count]
        part: Any = _torchao_part(some.to(device, dtype), kind)
        files.let_go(some)
        if count >= len(weight):
            return cast(Tensor, part)
        names, context = part.__tensor_flatten__()
        for name in names:
            inner = getattr(part, name)
            axis = 1 if name == "scale_and_zero" else 0  # of the rows
            if name not in whole:
                whole[name] = inner.new_empty(*inner.shape[:axis], len(weight), *inner.shape[axis + 1 :])
            whole[name].narrow(axis, start, len(some)).copy_(inner)
        make = type(part).__tensor_unflatten__
        del part, inner
        trim()
    context |= {"shape": weight.shape} if "shape" in context else {}
    few: Tensor = make(whole, context, None, None)
    return few


def _torchao_part(rows: Tensor, kind: str) -> Tensor:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config: Any
    if kind == "int8":
        config = Int8WeightOnlyConfig(set_inductor_config=False)
    elif rows.device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=GROUP)
    else:
        config = Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    carrier = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    carrier.weight = nn.Parameter(rows, requires_grad=False)
    quantize_(carrier, config)
    few: Tensor = carrier.weight.data
    return few


def _around(layer: nn.Linear, weight: Any, dtype: torch.dtype) -> nn.Module:
    """A layer like this one around a weight in few bits."""
    bias = None if layer.bias is None else layer.bias.detach().to(weight.device, torch.float32)
    if hasattr(weight, "__tensor_flatten__"):
        return QuantisedLinear(weight.data, bias, dtype)
    kind = _PARAMETERS[type(weight).__name__]
    more: dict[str, Any] = {"threshold": 6.0} if kind == "bnb-int8" else {"compute_dtype": dtype}
    new: Any = bitsandbytes_layers()[kind](
        layer.in_features, layer.out_features, bias=bias is not None, device="meta", **_HOW[kind], **more
    )
    new.weight = weight
    if bias is not None:
        new.bias = nn.Parameter(bias, requires_grad=False)
    made: nn.Module = new.to(weight.device)
    return made


def _quantise_embeddings(model: Any, device: torch.device, dtype: torch.dtype, files: MappedFiles) -> None:
    """Input embedding and output head in int8: once where the head is the embedding's weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding:  # one that scales its rows, say, or that is in few bits already
        return
    rows, weight = _torchao_weight(embedding.weight, "int8", device, dtype, files), embedding.weight
    model.set_input_embeddings(QuantisedEmbedding(rows))
    if type(head) is nn.Linear:
        own = rows if head.weight is weight else _torchao_weight(head.weight, "int8", device, dtype, files)
        model.set_output_embeddings(QuantisedLinear(own, head.bias, dtype))
