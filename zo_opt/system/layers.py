"""Stacks of layers in a model, found by the names that architectures give them."""

from __future__ import annotations

import re

_LAYER = re.compile(r"^(.*?\b(?:layers|layer|h|block|blocks))\.(\d+)(?:\.|$)")


def layer_of(name: str) -> tuple[str, int] | None:
    """(stack, index) of the path of a module or parameter; None outside of every stack.

    >>> layer_of("model.layers.3.mlp.up_proj"), layer_of("model.norm")
    (('model.layers', 3), None)
    """
    found = _LAYER.match(name)
    return (found[1], int(found[2])) if found else None
