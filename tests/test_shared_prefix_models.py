"""A shared prefix on transformers models: frozen layers run once a step, and losses are those without it."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from test_shared_prefix import steps
from tiny_models import CONFIGS, SEQ2SEQ, build, padded_batch, perturb

from zo_opt import TTConfig, get_adapter_model, trainable_parameters
from zo_opt.system.layers import layer_of


def adapted(name, depth=4):
    """Adapters in the last of four layers."""
    config = CONFIGS[name]
    try:
        CONFIGS[name] = lambda: _deeper(config(), depth)
        model = build(name)
    finally:
        CONFIGS[name] = config
    model = get_adapter_model(model, TTConfig(rank=2, bottleneck=4, layers=1))
    perturb(trainable_parameters(model))
    return model


def _deeper(config, depth):
    for key in ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if key in type(config).__dict__.get("attribute_map", {}) or hasattr(config, key):
            setattr(config, key, depth)
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * depth)[:depth]
    return config


@contextmanager
def counted(model):
    """Forwards of every linear layer, by path."""
    calls: Counter[str] = Counter()
    linear = [(n, m) for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and layer_of(n)]
    handles = [m.register_forward_hook(lambda *_, n=n: calls.update([n])) for n, m in linear]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, "split") for name in ("llama", "gemma2", "bert", "roberta", "opt", "gpt2", "t5", "bart")]
    + [(name, mode) for name in ("llama", "t5") for mode in ("sequential", "batched")],
)
def test_transformers(name, mode):
    """Layers that return states, tuples of them, position biases; encoders beside decoders; padding."""
    batches, runs, work = [padded_batch(name), padded_batch(name, seed=1)], [], []
    for share in (False, True):
        model = adapted(name)
        with counted(model) as calls:
            runs.append(steps(model, share, batches, lambda m: lambda b: m(**b).loss, queries=2, query_mode=mode))
        work.append(calls)
    # A decoder sees what the encoder's last layer, which is adapted, made of the input.
    stack = "encoder." if name in SEQ2SEQ else ""
    below = {n: c for n, c in work[1].items() if layer_of(n)[1] < 3 and stack in layer_of(n)[0] + "."}
    assert len(below) >= 6
    if name != "gemma2":  # its layers take masks of two kinds, of which the first layer sees one: nothing is shared
        assert set(below.values()) == {len(batches)}
        above = [{n: c for n, c in counts.items() if n not in below} for counts in work]
        assert above[0] == above[1]
    (plain, weights), (shared, shared_weights) = runs
    if mode == "batched":  # the frozen layers' part has one copy's shape instead of all copies'
        for (loss, grads, _), (shared_loss, shared_grads, _) in zip(plain, shared, strict=True):
            assert shared_loss == pytest.approx(loss, rel=1e-6)
            assert shared_grads == pytest.approx(grads, rel=1e-3, abs=1e-3)
        return
    assert shared == plain
    assert all(torch.equal(a, b) for a, b in zip(weights, shared_weights, strict=True))
