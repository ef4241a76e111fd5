"""LoRA and DoRA; also what other adapters that are a pair of factors export as."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import regex
from torch import Tensor, nn

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.baselines.dora import DoRA, DoRAConfig
from zo_opt.adapters.config import MOST_NAMES, AdapterConfig
from zo_opt.adapters.lora import LoRAConfig
from zo_opt.adapters.peft_format.method import PREFIX, Checkpoint, PeftMethod, as_number, take
from zo_opt.adapters.targets import matches
from zo_opt.errors import ZOError

# Those that draw the factors alone. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also change the base weights when PEFT loads a checkpoint.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


_LONGEST_KEY, _KEY_SECONDS = 1000, 0.5
_COUNTED = re.compile(r"\{[^}]*\d{3}")  # (x{1000}){1000} is a program of a million parts


@runtime_checkable
class LowRank(Protocol):
    """An adapter that adds scaling * B A to a weight."""

    scaling: float

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank)."""


class LoRAFiles(PeftMethod):
    """``lora_A``, ``lora_B`` (``lora_embedding_A``, ``lora_embedding_B``) and DoRA's ``lora_magnitude_vector``."""

    peft_type: ClassVar[str] = "LORA"
    names: ClassVar[tuple[str, ...]] = (
        *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"),
        "lora_magnitude_vector",
    )
    options: ClassVar[frozenset[str]] = frozenset(
        ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "eva_config", "qalora_group_size")
    )

    def write(
        self, config: AdapterConfig, adapted: Mapping[str, AdaptedModule]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        rooted = getattr(config, "use_rslora", False)
        tensors: dict[str, Tensor] = {}
        ranks, alphas = {}, {}
        for name, module in adapted.items():
            adapter = module.adapter
            if not isinstance(adapter, LowRank):
                raise self.refusal(name, f"of type {config.adapter_type!r}, no pair of low-rank factors,")
            a, b = adapter.lora_factors()
            ranks[name] = len(a)
            # Of alpha / r * r, which may not be alpha in its last bit.
            alphas[name] = float(f"{adapter.scaling * (math.sqrt(len(a)) if rooted else len(a)):.12g}")
            infix, suffix = ("embedding_", "") if isinstance(module.base_layer, nn.Embedding) else ("", ".weight")
            tensors |= {f"{PREFIX}{name}.lora_{infix}{x}{suffix}": t for x, t in (("A", a), ("B", b))}
            if isinstance(adapter, DoRA):
                tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = adapter.lora_magnitude_vector
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        return tensors, {
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "use_rslora": rooted,
            "use_dora": isinstance(config, DoRAConfig),
            "rank_pattern": _written(ranks, rank),
            "alpha_pattern": _written(alphas, alpha),
        }

    def read(self, checkpoint: Checkpoint) -> tuple[AdapterConfig, dict[str, Tensor]]:
        values = checkpoint.values
        if values.get("init_lora_weights") not in _HARMLESS_INITS:
            raise ZOError(
                f"the checkpoint was started with init_lora_weights={values['init_lora_weights']!r}, which also changes the base "
                "model's weights; save it with PEFT's path_initial_model_for_weight_conversion, as an ordinary LoRA."
            )
        dora = bool(values.get("use_dora"))
        state: dict[str, Tensor] = {}
        ranks, alphas = {}, {}
        for path, parts in checkpoint.parts.items():
            infix = "embedding_" if "lora_embedding_A" in parts else ""
            a, b = (take(parts, f"lora_{infix}{x}", path, 2) for x in "AB")
            ranks[path], alphas[path] = len(a), self._alpha(checkpoint, path)
            state |= {f"{path}.adapter.lora_A": a, f"{path}.adapter.lora_B": b}
            if dora:
                state[f"{path}.adapter.lora_magnitude_vector"] = take(parts, "lora_magnitude_vector", path, 1)
            if len(parts) != 2 + dora:
                raise ZOError(
                    f"the checkpoint holds {', '.join(sorted(parts))} for {path!r}, which do not go together."
                )
        rank, alpha = _commonest(ranks), _commonest(alphas)
        kind = DoRAConfig if dora else LoRAConfig
        return (
            kind(
                rank=rank,
                alpha=alpha,
                use_rslora=bool(values.get("use_rslora")),
                target_modules=checkpoint.targets,
                rank_pattern=_exceptions(ranks, rank) or None,
                alpha_pattern=_exceptions(alphas, alpha) or None,
            ),
            state,
        )

    @staticmethod
    def _alpha(checkpoint: Checkpoint, path: str) -> float:
        """PEFT's rule: that of the first key of ``alpha_pattern`` that, as a regular expression, fits the path's end."""
        patterns = checkpoint.values.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise ZOError(f"the checkpoint's alpha_pattern is {patterns!r}, not names with numbers; copy it anew.")
        if len(patterns) > MOST_NAMES:
            raise ZOError(
                f"the checkpoint's alpha_pattern has {len(patterns):,} entries; at most {MOST_NAMES:,} are read."
            )
        for key, alpha in patterns.items():
            if _fits(key, path):
                return as_number(f"alpha_pattern of {key}", alpha)
        return checkpoint.number("lora_alpha", 8)


def _fits(key: str, path: str) -> bool:
    """Whether a key of a stranger's ``alpha_pattern`` fits a path's end, as a regular expression of bounded length and time.

    Raises:
        ZOError: it is none, or takes too long.
    """
    if re.fullmatch(r"[\w.]*", key):  # a name; a dot stands for any character, which takes no time
        return re.fullmatch(rf"(.*\.)?({key})", path) is not None
    try:
        if len(key) > _LONGEST_KEY or _COUNTED.search(key):
            raise ValueError(f"longer than {_LONGEST_KEY} characters, or with counted repeats")
        return regex.match(rf"(.*\.)?({key})$", path, timeout=_KEY_SECONDS) is not None
    except (regex.error, ValueError, TimeoutError, RecursionError, OverflowError) as error:
        reason = f"takes more than {_KEY_SECONDS} s to match" if isinstance(error, TimeoutError) else str(error)
        raise ZOError(
            f"the checkpoint's alpha_pattern has {key[:80]!r}, which is no regular expression that can be used ({reason}); "
            "name the modules instead."
        ) from error


Number = TypeVar("Number", int, float)


def _commonest(found: Mapping[str, Number]) -> Number:
    return Counter(found.values()).most_common(1)[0][0]


def _exceptions(found: Mapping[str, Number], common: Number) -> dict[str, Number]:
    """What is other than common, by path; all of them where a path ends in another one that would stand for it."""
    other = {path: value for path, value in found.items() if value != common}
    mistaken = any(matches(path, key) for path in found if path not in other for key in other)
    return dict(found) if mistaken else other


def _written(found: Mapping[str, Number], common: Number) -> dict[str, Number]:
    """The same as PEFT's patterns, of which the first that fits a path's end counts: longer paths come first."""
    return dict(sorted(_exceptions(found, common).items(), key=lambda item: -len(item[0])))
