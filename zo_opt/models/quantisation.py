"""A frozen base in 8 or 4 bits: which layers, by which library."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib.util import find_spec
from typing import Any

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
ROWS = 4096  # of an embedding that are quantised at a time
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
    make = _by_torchao if KINDS[kind] == "torchao" else _by_bitsandbytes
    with quiet(stderr=True):
        try:
            files = MappedFiles()
            for name in list(linear):
                module = linear.pop(name)
                old = module.weight.data
                model.set_submodule(name, make(module.to(device), kind, dtype))
                files.let_go(old)
                del module, old
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
        if kind is nn.Linear and hasattr(module.weight, "__tensor_flatten__"):
            model.set_submodule(name, QuantisedLinear(module.weight.data, module.bias, dtype))
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


def _by_torchao(layer: nn.Linear, kind: str, dtype: torch.dtype) -> nn.Module:
    layer.weight.data = layer.weight.data.to(dtype)
    # Else the int4 kernel does not take it.
    whole_groups = layer.in_features % GROUP == 0 and layer.out_features % 16 == 0
    return QuantisedLinear(_torchao_weight(layer, kind if whole_groups else "int8"), layer.bias, dtype)


def _torchao_weight(layer: nn.Linear, kind: str) -> Tensor:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config: Any
    if kind == "int8":
        config = Int8WeightOnlyConfig(set_inductor_config=False)
    elif layer.weight.device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=GROUP)
    else:
        config = Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    quantize_(layer, config)
    return layer.weight.data


def _by_bitsandbytes(layer: nn.Linear, kind: str, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes

    how: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    more: dict[str, Any] = {"compute_dtype": dtype}
    weight = bitsandbytes.nn.Params4bit
    if kind == "bnb-int8":
        how, more, weight = {"has_fp16_weights": False}, {"threshold": 6.0}, bitsandbytes.nn.Int8Params
    biased, device = layer.bias is not None, layer.weight.device
    new: Any = bitsandbytes_layers()[kind](
        layer.in_features, layer.out_features, bias=biased, device="meta", **how, **more
    )
    new.weight = weight(layer.weight.data.to(dtype), requires_grad=False, **how)
    if biased:
        new.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    made: nn.Module = new.to(device)  # this is when it quantises
    return made


def _quantise_embeddings(model: Any, device: torch.device, dtype: torch.dtype, files: MappedFiles) -> None:
    """Input embedding and output head in int8: once where the head is the embedding's weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding:  # one that scales its rows, say
        return

    def int8(weight: Tensor) -> Any:
        """A few rows at a time: they do not depend on each other, and quantising takes several times their memory."""
        whole: dict[str, Tensor] = {}
        for start in range(0, len(weight), ROWS):
            some = weight.detach()[start : start + ROWS]
            carrier = nn.Linear(some.shape[1], some.shape[0], bias=False, device="meta")
            carrier.weight = nn.Parameter(some.to(device, dtype), requires_grad=False)
            part: Any = _torchao_weight(carrier, "int8")
            files.let_go(some)
            trim()
            names, context = part.__tensor_flatten__()
            for name in names:
                rows = getattr(part, name)
                if name not in whole:
                    whole[name] = rows.new_empty(len(weight), *rows.shape[1:])
                whole[name][start : start + len(rows)] = rows
        return type(part).__tensor_unflatten__(whole, context, None, None)

    rows, weight = int8(embedding.weight), embedding.weight
    model.set_input_embeddings(QuantisedEmbedding(rows))
    if type(head) is nn.Linear:
        own = rows if head.weight is weight else int8(head.weight)
        model.set_output_embeddings(QuantisedLinear(own, head.bias, dtype))
