"""Adapters in the form of Hugging Face's PEFT, and back to the bit. PEFT itself is not imported."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.config import ADAPTERS, AdapterConfig
from zo_opt.adapters.targets import matches
from zo_opt.adapters.weights import is_conv1d, shared_parameters
from zo_opt.errors import ZOError

if TYPE_CHECKING:
    from zo_opt.adapters.model import AdapterModel

PREFIX = "base_model.model."  # before paths of the model in PEFT's files
SHARED = "base_model."  # before names of tensors that belong to no module
PARTS = ("lora_", "vera_")  # what names of tensors in adapted modules begin with
_EXACT = "zo_opt."  # before names of ours: tensors that PEFT's form does not hold to the bit; PEFT passes them over
_NATIVE = {"lora": "LORA", "lora-fa": "LORA", "dora": "LORA", "adalora": "ADALORA", "vera": "VERA"}
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
Form = tuple[dict[str, Any], dict[str, Tensor]]  # PEFT's options and tensors


@runtime_checkable
class LowRank(Protocol):
    """An adapter that adds scaling * B A to a weight."""

    scaling: float

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank)."""


def is_native(wrapped: nn.Module, config: AdapterConfig) -> bool:
    """Whether PEFT has all of it, so that it is saved in PEFT's format: LoRA, LoRA-FA, DoRA, AdaLoRA or VeRA and nothing beside."""
    kinds = {ADAPTERS[name] for name in _NATIVE}
    plain = not config.modules_to_tensorize and config.positions == "all"
    return type(config) in kinds and plain and not _tied(wrapped, config)


def exportable(model: AdapterModel) -> bool:
    """Whether :func:`to_peft` has a form for it."""
    try:
        to_peft(model)
    except ZOError:
        return False
    return True


@torch.no_grad()
def to_peft(model: AdapterModel) -> Form:
    """Options and tensors as PEFT's ``save_pretrained`` writes them; a method that PEFT lacks as a LoRA.

    What :func:`own_state` could not give back to the bit is among the tensors once more under a name of ours.

    Raises:
        ZOError: PEFT has no form for an adapter.
    """
    wrapped, adapted, config, state = (
        model.wrapped,
        model.adapted_modules(),
        model.adapter_config,
        model.adapter_state(),
    )
    config.check_everywhere()
    if not adapted:
        raise ZOError(
            f"adapter {config.adapter_type!r} trains the model's own weights and cannot be exported as an adapter of PEFT's; "
            "save the model (unload)."
        )
    if tied := _tied(wrapped, config):
        raise ZOError(
            f"{tied[0]!r} is trained whole and shares its weight, of which PEFT would train a copy; load the model with "
            "tie_word_embeddings=False, or keep zo_opt's own format (save_pretrained)."
        )
    peft_type = _NATIVE.get(config.adapter_type, "LORA")
    options, tensors = {"LORA": _lora, "ADALORA": _adalora, "VERA": _vera}[peft_type](config, adapted)
    whole = _trained_whole(wrapped, config)
    task = _task_type(wrapped)
    heads = outermost(wrapped, lambda path: path.endswith(_HEADS.get(task or "", ())))
    if any(within(path, heads) for path in adapted):
        task, heads = None, []  # for these tasks PEFT takes the head for trained whole, and adapts nothing in it
    whole = outermost(wrapped, {*whole, *heads}.__contains__)
    for path in whole:
        tensors |= {f"{PREFIX}{path}.{n}": t for n, t in wrapped.get_submodule(path).state_dict().items()}
    if is_native(wrapped, config):
        again = own_state(tensors, {name: tensor.shape for name, tensor in state.items()})
        tensors |= {
            f"{_EXACT}{name}": tensor.clone()
            for name, tensor in state.items()
            if name not in again or not torch.equal(again[name].to(tensor.device), tensor)
        }
    return {
        "peft_type": peft_type,
        "task_type": task,
        "inference_mode": True,
        "bias": "none",
        "target_modules": sorted(adapted),
        "fan_in_fan_out": any(is_conv1d(module.base_layer) for module in adapted.values()),
        "modules_to_save": sorted(whole) or None,
    } | options, tensors


def own_state(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """What :func:`to_peft` was given, of the names and shapes given; names that are not in the file are left out."""
    found = {own_name(name): tensor for name, tensor in tensors.items()}
    state = {}
    for name, shape in shapes.items():
        path, _, part = name.rpartition(".adapter.")
        key = f"{SHARED}{part}" if part in ("vera_A", "vera_B") else name
        if f"{_EXACT}{name}" in tensors:
            state[name] = tensors[f"{_EXACT}{name}"]
        elif part == "ranknum":
            state[name] = torch.full((1,), float(shapes[f"{path}.adapter.lora_A"][0]))
        elif key in found and found[key].ndim == len(shape):
            state[name] = found[key][tuple(slice(size) for size in shape)]  # without what PEFT has of zeros beyond
    return state


def own_name(name: str) -> str:
    """A name in PEFT's file as it is in ``AdapterModel.adapter_state``; tensors of no module keep theirs.

    >>> own_name("base_model.model.layers.0.q_proj.lora_A.weight")
    'layers.0.q_proj.adapter.lora_A'
    """
    if not name.startswith(PREFIX):
        return name
    path, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
    own = f"{path}.adapter.{part.replace('embedding_', '')}"
    return own if part.startswith(PARTS) else name.removeprefix(PREFIX)


def within(path: str, outer: Iterable[str]) -> bool:
    """Whether a module is one of others or lies in one."""
    return any(f"{path}.".startswith(f"{o}.") for o in outer)


def outermost(model: nn.Module, wanted: Callable[[str], bool]) -> list[str]:
    """Paths of the modules with parameters that are wanted, without those that lie in another."""
    paths: list[str] = []
    for path, module in model.named_modules():
        if wanted(path) and next(module.parameters(), None) is not None and not within(path, paths):
            paths.append(path)
    return paths


def _trained_whole(wrapped: nn.Module, config: AdapterConfig) -> list[str]:
    return outermost(wrapped, lambda path: any(matches(path, name) for name in config.modules_to_save or ()))


def _tied(wrapped: nn.Module, config: AdapterConfig) -> list[str]:
    """Modules trained whole that share a parameter with others."""
    shared = shared_parameters(wrapped)
    whole = _trained_whole(wrapped, config)
    return [path for path in whole if any(id(p) in shared for p in wrapped.get_submodule(path).parameters())]


def _lora(config: AdapterConfig, adapted: Mapping[str, AdaptedModule]) -> Form:
    """``lora_A``, ``lora_B`` (in embeddings ``lora_embedding_A``, ``lora_embedding_B``) and DoRA's ``lora_magnitude_vector``."""
    rooted = getattr(config, "use_rslora", False)
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for path, module in adapted.items():
        adapter = module.adapter
        if not isinstance(adapter, LowRank):
            raise _no_form(path, config, f"of type {config.adapter_type!r}, no pair of low-rank factors,")
        a, b = adapter.lora_factors()
        ranks[path] = len(a)
        # Of alpha / r * r, which may not be alpha in its last bit.
        alphas[path] = float(f"{adapter.scaling * (math.sqrt(len(a)) if rooted else len(a)):.12g}")
        infix, suffix = ("embedding_", "") if isinstance(module.base_layer, nn.Embedding) else ("", ".weight")
        tensors |= {f"{PREFIX}{path}.lora_{infix}{x}{suffix}": t for x, t in (("A", a), ("B", b))}
        if (magnitudes := getattr(adapter, "lora_magnitude_vector", None)) is not None:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = magnitudes
    rank, alpha = commonest(ranks), commonest(alphas)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": rooted,
        "use_dora": any(name.endswith("lora_magnitude_vector") for name in tensors),
        # Of PEFT's patterns the first that fits a path's end counts: longer paths come first.
        "rank_pattern": dict(sorted(exceptions(ranks, rank).items(), key=lambda item: -len(item[0]))),
        "alpha_pattern": dict(sorted(exceptions(alphas, alpha).items(), key=lambda item: -len(item[0]))),
    }, tensors


def _adalora(config: Any, adapted: Mapping[str, AdaptedModule]) -> Form:
    """``lora_A`` (Q), ``lora_E`` (Lambda) and ``lora_B`` (P). PEFT multiplies by lora_alpha / (init_r + 1e-5), one for all modules."""
    adapters: dict[str, Any] = {path: module.adapter for path, module in adapted.items()}
    if trains := [path for path, adapter in adapters.items() if not hasattr(adapter, "lora_E")]:
        raise _no_form(trains[0], config)
    rank = max(len(adapter.lora_E) for adapter in adapters.values())
    tensors: dict[str, Tensor] = {}
    for path, adapter in adapters.items():
        # A module of smaller rank gets triplets that are zero; what its own rank scales differently goes into Lambda.
        missing = rank - len(adapter.lora_E)
        e = adapter.lora_E * ((rank + 1e-5) / (adapter.ranknum + 1e-5))
        tensors[f"{PREFIX}{path}.lora_A"] = F.pad(adapter.lora_A, (0, 0, 0, missing))
        tensors[f"{PREFIX}{path}.lora_E"] = F.pad(e, (0, 0, 0, missing))
        tensors[f"{PREFIX}{path}.lora_B"] = F.pad(adapter.lora_B, (0, missing))
    return {
        "init_r": rank,
        "target_r": min(config.target_rank, rank),
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "deltaT": config.interval,
        "orth_reg_weight": config.orthogonality,
        "tinit": 0,  # the phases are over, or another run's to choose
        "tfinal": 0,
        "total_step": config.total_steps or 1,
    }, tensors


def _vera(config: Any, adapted: Mapping[str, AdaptedModule]) -> Form:
    """``vera_lambda_d``, ``vera_lambda_b`` of each module, ``vera_A`` and ``vera_B`` of all."""
    tensors: dict[str, Tensor] = {}
    rank = 0
    for path, module in adapted.items():
        adapter: Any = module.adapter
        if not hasattr(adapter, "vera_A"):
            raise _no_form(path, config)
        rank = len(adapter.vera_A)
        tensors |= {f"{SHARED}vera_A": adapter.vera_A, f"{SHARED}vera_B": adapter.vera_B}
        # PEFT knows one rank for all: entries of d beyond a module's own are zero.
        d = F.pad(adapter.vera_lambda_d, (0, rank - len(adapter.vera_lambda_d)))
        tensors |= {f"{PREFIX}{path}.vera_lambda_d": d, f"{PREFIX}{path}.vera_lambda_b": adapter.vera_lambda_b}
    return {
        "r": rank,
        "save_projection": True,
        "projection_prng_key": 0,  # of no effect: the factors are saved
        "vera_dropout": 0.0,
        "d_initial": config.d_initial,
    }, tensors


def _no_form(path: str, config: AdapterConfig, what: str = "a tensor train (modules_to_tensorize)") -> ZOError:
    merge = "merge it (merge_and_unload), or " if config.mergeable else ""
    return ZOError(
        f"the adapter at {path!r} is {what} and cannot be exported as LoRA or another of PEFT's adapters; {merge}keep zo_opt's own format "
        "(save_pretrained)."
    )


def _task_type(wrapped: nn.Module) -> str | None:
    """What PEFT calls the task of a class of transformers'; None of any other."""
    if not any(kind.__name__ == "PreTrainedModel" for kind in type(wrapped).__mro__):  # which is not imported here
        return None
    name = type(wrapped).__name__
    if name.endswith("ForConditionalGeneration") and getattr(wrapped.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)


Number = TypeVar("Number", int, float)


def commonest(found: Mapping[str, Number]) -> Number:
    """The most frequent value."""
    return Counter(found.values()).most_common(1)[0][0]


def exceptions(found: Mapping[str, Number], common: Number) -> dict[str, Number]:
    """What is other than common, by path; all of them where a path ends in another one that would stand for it."""
    other = {path: value for path, value in found.items() if value != common}
    mistaken = any(matches(path, key) for path in found if path not in other for key in other)
    return dict(found) if mistaken else other
