"""What transformers says of a checkpoint that it loaded: weights missing, left over, or of other sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zo_opt.errors import ZOError

SHOWN = 3  # names in a sentence


def heed_report(
    loaded: Mapping[str, Any], model: Any, head: str, config: Any, name: str, say: Callable[[str], None]
) -> None:
    """Refuse a model with weights that are nobody's; say what the checkpoint holds beyond it.

    Args:
        loaded: transformers' ``output_loading_info``.
        model: what was loaded.
        head: "lm" or "classification"; the latter's weights alone may be missing.
        config: the checkpoint's own, before a number of labels was asked for.
        name: the model's, for sentences.
        say: told of weights that are left out.

    Raises:
        ZOError: weights are of another size, or missing where none may be.
    """
    for weight, there, wanted in sorted(loaded["mismatched_keys"], key=str):
        if head == "classification" and not _below(model, weight):
            raise ZOError(
                f"the head of model {name!r} has {config.num_labels} outputs ({_some(list(config.id2label.values()))}), and the rows have "
                f"{model.config.num_labels} labels ({weight} is {tuple(there)}, not {tuple(wanted)}); give rows with these labels, or a "
                "checkpoint without this head."
            )
        raise ZOError(
            f"{weight!r} of model {name!r} is {tuple(there)} in its file, and {tuple(wanted)} by its config.json; give the two that belong "
            "together."
        )
    if errors := [*loaded.get("error_msgs", ())]:
        raise ZOError(f"model {name!r} could not be loaded ({errors[0]}); copy it anew from where it was saved.")
    missing = sorted(loaded["missing_keys"])
    if head == "lm" and missing:
        raise ZOError(
            f"model {name!r} lacks the weights {_some(missing)}, which would be random; give a checkpoint with its "
            "language-model head, or --head classification to train a new one."
        )
    if lost := [weight for weight in missing if _below(model, weight) or _halved(model, weight, missing)]:
        raise ZOError(
            f"model {name!r} lacks the weights {_some(lost)}, which would be random, and which no new head is for; give a whole checkpoint."
        )
    if over := sorted(loaded["unexpected_keys"]):
        say(f"the checkpoint's weights {_some(over)} have no place in a {type(model).__name__} and are left out.")


def _below(model: Any, weight: str) -> bool:
    """Whether a weight lies below the head. BERT's pooler, which its language model lacks, is part of the head."""
    inside = model.base_model is model or weight.startswith(f"{model.base_model_prefix}.")
    return inside and ".pooler." not in weight


def _halved(model: Any, weight: str, missing: Sequence[str]) -> bool:
    """Whether other parameters of the same module are in the checkpoint."""
    path = weight.rpartition(".")[0]
    return any(f"{path}.{name}" not in missing for name, _ in model.get_submodule(path).named_parameters(recurse=False))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(str, names[:SHOWN])) + more
