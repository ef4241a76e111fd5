"""The prefix cache changes the cost of a loss, never its value."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from conftest import make_model, tokenizer_for
from torch import nn

from zo_opt import TTConfig, get_adapter_model
from zo_opt.adapters import AdapterModel
from zo_opt.adapters.targets import layer_of
from zo_opt.training.data import Example
from zo_opt.training.evaluation import Prepared, evaluate
from zo_opt.training.prefix_cache import PrefixCache, first_adapted_layer
from zo_opt.training.scoring import make_scorer
from zo_opt.training.tasks import Task

CACHED = ("llama", "gpt2", "bert", "opt")
SINGLE, SEVERAL = {"0": "terrible", "1": "great"}, {"0": "terrible", "1": "not that great"}
TEXTS = (
    "a film",
    "the film is a charming story",
    "boring",
    "two friends and their long way home in winter",
    "winter is dreadful",
    "home",
)
CPU = torch.device("cpu")


def adapted(architecture: str, layers: int | list[int] | None = 2, seed: int = 0) -> AdapterModel:
    """A tiny model whose adapters do something."""
    model = get_adapter_model(make_model(architecture), TTConfig(rank=2, bottleneck=8, layers=layers))
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.trainable_state().values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return model.eval()


def examples_with(architecture: str, verbalizers: dict[str, str]) -> tuple[Task, list[Example]]:
    task = Task("t", "{text} It was {mask}." if architecture == "bert" else "{text} It was", verbalizers)
    return task, [Example({"text": text}, i % 2) for i, text in enumerate(TEXTS)]


def both(
    model: AdapterModel, architecture: str, verbalizers: dict[str, str], megabytes: float = 8
) -> tuple[Prepared, Prepared, PrefixCache]:
    """The same examples with a filled cache and without one."""
    task, examples = examples_with(architecture, verbalizers)
    scorer = make_scorer(model.wrapped, tokenizer_for(architecture), task)
    cache = PrefixCache(model, int(megabytes * 2**20))
    cached = Prepared(examples, scorer, CPU, cache, offset=100)
    cached.record(4, lambda count: None)
    return cached, Prepared(examples, scorer, CPU, None, 0), cache


@torch.no_grad()
def loss(prepared: Prepared, model: nn.Module, indices: list[int]) -> torch.Tensor:
    return prepared.loss(model, prepared.batch(indices))


@pytest.mark.parametrize("verbalizers", [SINGLE, SEVERAL], ids=["single", "several"])
@pytest.mark.parametrize("architecture", CACHED)
def test_losses_are_those_without_a_cache(architecture: str, verbalizers: dict[str, str]) -> None:
    model = adapted(architecture)
    cached, plain, cache = both(model, architecture, verbalizers)
    assert cache.cut == 2
    assert not cache.full
    for indices in ([0, 1, 2, 3, 4, 5], [3, 0], [2], [5, 5, 1]):
        assert "prefix" in cached.batch(indices)
        torch.testing.assert_close(loss(cached, model, indices), loss(plain, model, indices), rtol=1e-5, atol=0)
    with_cache, without = evaluate(model, cached, 4), evaluate(model, plain, 4)
    assert with_cache.accuracy == without.accuracy
    assert with_cache.loss == pytest.approx(without.loss, rel=1e-5)


@pytest.mark.parametrize("architecture", CACHED)
def test_the_cache_stays_right_when_the_adapters_move(architecture: str) -> None:
    model = adapted(architecture)
    cached, plain, _ = both(model, architecture, SINGLE)
    before = loss(cached, model, [0, 1, 3])
    for tensor in model.trainable_state().values():
        tensor.add_(0.2)
    after = loss(cached, model, [0, 1, 3])
    assert not torch.isclose(before, after, rtol=1e-3)
    torch.testing.assert_close(after, loss(plain, model, [0, 1, 3]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("architecture", CACHED)
def test_the_bound_is_kept_and_rows_beyond_it_are_still_right(architecture: str) -> None:
    model = adapted(architecture)
    _, _, whole = both(model, architecture, SINGLE)
    bound = whole.bytes / 2
    cached, plain, cache = both(model, architecture, SINGLE, bound / 2**20)
    assert 0 < cache.bytes <= bound
    assert cache.full
    assert cache.recorded_examples == len(TEXTS)
    kept = [i for i in range(len(TEXTS)) if "prefix" in cached.batch([i])]
    left_out = [i for i in range(len(TEXTS)) if i not in kept]
    assert kept
    assert left_out
    for indices in ([*kept], [*left_out], [kept[0], left_out[0]]):
        torch.testing.assert_close(loss(cached, model, indices), loss(plain, model, indices), rtol=1e-5, atol=0)


def count_layer_runs(model: AdapterModel, run: Callable[[], Any]) -> dict[int, int]:
    """Layer -> calls of the linear modules inside it (those of adapters not counted)."""
    counts: dict[int, int] = {}
    with ExitStack() as stack:
        for name, module in model.wrapped.named_modules():
            place = layer_of(name + ".")
            leaf = not any(True for _ in module.children()) and ".adapter" not in name
            if place is None or not leaf or not any(True for _ in module.parameters()):
                continue
            counts.setdefault(place[1], 0)

            def count(*_: Any, layer: int = place[1]) -> None:
                counts[layer] += 1

            stack.callback(module.register_forward_hook(count).remove)
        run()
    return counts


@pytest.mark.parametrize("architecture", CACHED)
def test_layers_below_the_cut_do_not_run(architecture: str) -> None:
    model = adapted(architecture)
    cached, plain, _ = both(model, architecture, SINGLE)
    whole = count_layer_runs(model, lambda: loss(plain, model, [0, 1, 2]))
    replayed = count_layer_runs(model, lambda: loss(cached, model, [0, 1, 2]))
    assert sorted(whole) == [0, 1, 2, 3]
    assert min(whole.values()) > 0
    assert replayed == {0: 0, 1: 0, 2: whole[2], 3: whole[3]}
    assert count_layer_runs(model, lambda: loss(plain, model, [0, 1, 2])) == whole  # and afterwards they do again


def test_recording_runs_only_the_layers_below_the_cut() -> None:
    model = adapted("llama")
    cached, _, _ = both(model, "llama", SINGLE)
    counts = count_layer_runs(model, lambda: cached.record(4, lambda count: None))
    assert counts[2] == counts[3] == 0


def test_an_exception_inside_leaves_the_model_whole() -> None:
    model = adapted("llama")
    cached, plain, cache = both(model, "llama", SINGLE)
    expected = loss(plain, model, [0, 1])
    batch = cached.batch([0, 1])
    with pytest.raises(RuntimeError, match="inside"), cache.replay(batch["prefix"].flatten(0, 1)):
        raise RuntimeError("inside")
    assert torch.equal(loss(plain, model, [0, 1]), expected)


@pytest.mark.parametrize("layers", [[1, 3], [1]])
def test_the_cut_is_below_the_lowest_adapter(layers: list[int]) -> None:
    model = adapted("llama", layers)
    cached, plain, cache = both(model, "llama", SINGLE)
    assert cache.cut == 1
    torch.testing.assert_close(loss(cached, model, [0, 1]), loss(plain, model, [0, 1]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("architecture", "layers"), [("llama", None), ("llama", [0, 3]), ("gpt2", 4), ("t5", None), ("t5", 1)]
)
def test_no_cache_where_nothing_can_be_cut(architecture: str, layers: int | list[int] | None) -> None:
    assert first_adapted_layer(adapted(architecture, layers)) is None


def test_adapters_outside_the_layers_turn_the_cache_off() -> None:
    config = TTConfig(rank=2, bottleneck=8, target_modules=["lm_head", "3.mlp.down_proj"])
    assert first_adapted_layer(get_adapter_model(make_model("llama"), config)) is None
