"""The prefix cache changes the cost of a loss, never its value."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from conftest import make_model, run_main, tokenizer_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zo_opt import TTConfig, ZOError, get_adapter_model
from zo_opt.adapters import AdapterModel
from zo_opt.prompts.prefix_cache import PrefixCache, first_adapted_layer
from zo_opt.prompts.prefix_store import FILE_NAME, FileStore, MemoryStore
from zo_opt.record.metrics import MetricsWriter
from zo_opt.system.layers import layer_of
from zo_opt.tasks.evaluation import Prepared, evaluate
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring import make_scorer
from zo_opt.tasks.tasks import Task

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


def adapted(
    architecture: str, layers: int | list[int] | None = 2, classes: int | None = None, saved: list[str] | None = None
) -> AdapterModel:
    """A tiny model whose adapters do something."""
    config = TTConfig(rank=2, bottleneck=8, layers=layers, modules_to_save=saved)
    model = get_adapter_model(make_model(architecture, classes=classes), config)
    generator = torch.Generator().manual_seed(0)
    for tensor in model.trainable_state().values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return model.eval()


def examples_with(architecture: str, verbalizers: dict[str, str]) -> tuple[Task, list[Example]]:
    task = Task("t", "{text} It was {mask}." if architecture == "bert" else "{text} It was", verbalizers)
    return task, [Example({"text": text}, i % 2) for i, text in enumerate(TEXTS)]


def both(
    model: AdapterModel,
    architecture: str,
    verbalizers: dict[str, str] = SINGLE,
    max_bytes: int = 1 << 23,
    directory: Path | None = None,
    rows_at_once: int = 4,
) -> tuple[Prepared, Prepared, PrefixCache]:
    """The same examples with a filled cache (on disk where a directory is given) and without one."""
    task, examples = examples_with(architecture, verbalizers)
    scorer = make_scorer(model.wrapped, tokenizer_for(architecture), task)
    cache = PrefixCache(model, max_bytes, "device" if directory is None else "disk")
    assert cache.objection is None
    if directory is not None:
        cache.open(directory)
    cached = Prepared(examples, scorer, CPU, cache)
    cached.record(rows_at_once, lambda count: None)
    return cached, Prepared(examples, scorer, CPU, None), cache


@torch.no_grad()
def loss(prepared: Prepared, model: nn.Module, indices: list[int]) -> torch.Tensor:
    return prepared.loss(model, prepared.batch(indices))


@pytest.mark.parametrize(
    ("architecture", "verbalizers", "on_disk"),
    [("llama", SINGLE, False), ("llama", SEVERAL, True), ("gpt2", SEVERAL, False), ("bert", SEVERAL, True), ("opt", SINGLE, True)],
    ids=lambda value: str(value) if not isinstance(value, dict) else "",
)  # fmt: skip
def test_losses_are_those_without_a_cache(
    architecture: str, verbalizers: dict[str, str], on_disk: bool, tmp_path: Path
) -> None:
    model = adapted(architecture)
    cached, plain, cache = both(model, architecture, verbalizers, directory=tmp_path if on_disk else None)
    assert cache.cut == 2
    assert not cache.full
    for indices in ([0, 1, 2, 3, 4, 5], [3, 0], [2], [5, 5, 1]):
        assert "prefix" in cached.batch(indices)
        torch.testing.assert_close(loss(cached, model, indices), loss(plain, model, indices), rtol=1e-5, atol=0)
    with_cache, without = evaluate(model, cached, 4), evaluate(model, plain, 4)
    assert with_cache.accuracy == without.accuracy
    assert with_cache.loss == pytest.approx(without.loss, rel=1e-5)


def test_the_cache_stays_right_when_the_adapters_move() -> None:
    model = adapted("llama")
    cached, plain, _ = both(model, "llama", SINGLE)
    before = loss(cached, model, [0, 1, 3])
    for tensor in model.trainable_state().values():
        tensor.add_(0.2)
    after = loss(cached, model, [0, 1, 3])
    assert not torch.isclose(before, after, rtol=1e-3)
    torch.testing.assert_close(after, loss(plain, model, [0, 1, 3]), rtol=1e-5, atol=0)


def test_the_bound_is_kept_and_rows_beyond_it_are_still_right() -> None:
    model = adapted("llama")
    _, _, whole = both(model, "llama", SINGLE)
    bound = whole.store.bytes // 2
    cached, plain, cache = both(model, "llama", SINGLE, bound)
    assert 0 < cache.store.bytes <= bound
    assert cache.full
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
    task, examples = examples_with("llama", SINGLE)
    empty = Prepared(
        examples, make_scorer(model.wrapped, tokenizer_for("llama"), task), CPU, PrefixCache(model, 1 << 20)
    )
    counts = count_layer_runs(model, lambda: empty.record(4, lambda count: None))
    assert counts[0] > 0
    assert counts[2] == counts[3] == 0


def test_an_exception_inside_leaves_the_model_whole() -> None:
    model = adapted("llama")
    cached, plain, cache = both(model, "llama", SINGLE)
    expected = loss(plain, model, [0, 1])
    batch = cached.batch([0, 1])
    with pytest.raises(RuntimeError, match="inside"), cache.replay(batch["prefix"].flatten(0, 1)):
        raise RuntimeError("inside")
    assert torch.equal(loss(plain, model, [0, 1]), expected)


def test_the_cut_is_below_the_lowest_adapter() -> None:
    model = adapted("llama", [1, 3])
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


# --- to the bit, heads, models that cannot be cut ----------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "on_disk"), [*((name, False) for name in CACHED), ("llama", True)], ids=str)
def test_the_same_bits_in_batches_padded_as_they_were_recorded(
    architecture: str, on_disk: bool, tmp_path: Path
) -> None:
    model = adapted(architecture)
    cached, plain, _ = both(model, architecture, rows_at_once=3, directory=tmp_path if on_disk else None)
    for indices in cached.by_length(3):
        assert "prefix" in cached.batch(indices)
        assert torch.equal(loss(cached, model, indices), loss(plain, model, indices))


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_classification_head_that_is_trained(architecture: str) -> None:
    heads = {"bert": ["pooler", "classifier"]}.get(architecture, ["score"])
    model = adapted(architecture, classes=2, saved=heads)
    cached, plain, _ = both(model, architecture)
    expected = loss(plain, model, [0, 1, 4])
    assert "prefix" in cached.batch([0, 1, 4])
    torch.testing.assert_close(loss(cached, model, [0, 1, 4]), expected, rtol=1e-5, atol=0)
    for tensor in model.trainable_state().values():
        tensor.add_(0.1)
    assert "prefix" in cached.batch([0, 1, 4])
    torch.testing.assert_close(loss(cached, model, [0, 1, 4]), loss(plain, model, [0, 1, 4]), rtol=1e-5, atol=0)
    assert not torch.isclose(loss(plain, model, [0, 1, 4]), expected)


@pytest.mark.parametrize(
    ("architecture", "module"), [("llama", "embed_tokens"), ("gpt2", "lm_head"), ("bert", "word_embeddings")]
)
def test_embeddings_that_are_trained_speak_against_a_cache(architecture: str, module: str) -> None:
    """Those of GPT-2 are tied to its head."""
    objection = PrefixCache(adapted(architecture, saved=[module]), 1 << 20).objection
    assert objection is not None
    assert "is trained" in objection


def test_layers_that_return_tuples() -> None:
    model = adapted("llama")
    layers = list(model.wrapped.model.layers)

    class InTuples(type(layers[0])):  # type: ignore[misc]
        def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
            return super().forward(hidden[0] if isinstance(hidden, tuple) else hidden, *args, **kwargs), None

    class Last(InTuples):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)[0]

    for layer in layers:
        layer.__class__ = InTuples if layer is not layers[-1] else Last
    cached, plain, cache = both(model, "llama")
    assert cache.objection is None
    torch.testing.assert_close(loss(cached, model, [0, 1]), loss(plain, model, [0, 1]), rtol=1e-5, atol=0)


def test_later_layers_that_take_more_than_hidden_states_speak_against_a_cache() -> None:
    model = adapted("llama")
    layers = list(model.wrapped.model.layers)
    seen: list[torch.Tensor] = []
    layers[0].mlp.register_forward_hook(lambda m, a, output: seen.__setitem__(slice(None), [output]))
    layers[3].mlp.register_forward_hook(lambda m, a, output: output + seen.pop() if seen else output)
    objection = PrefixCache(model, 1 << 20).objection
    assert objection is not None
    assert "take more" in objection


def test_nothing_is_recorded_or_used_in_training_mode() -> None:
    """BERT's dropout would make the states random."""
    model = adapted("bert")
    cached, _, cache = both(model, "bert")
    size = cache.store.bytes
    model.train()
    assert "prefix" not in cached.batch([0])
    fresh = PrefixCache(model.eval(), 1 << 20)
    model.wrapped.bert.encoder.layer[1].train()
    batch = cached.scorer.collate(cached.encoded[:2])
    fresh.record(batch, cached.scorer.inputs(batch))
    assert fresh.store.bytes == 0 < size
    model.eval()
    assert "prefix" in cached.batch([0])


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_states_of_weights_that_were_changed_are_not_used(name: str) -> None:
    model = adapted("llama")
    cached, plain, _ = both(model, "llama")
    with torch.no_grad():
        model.wrapped.get_parameter(name).add_(0.3)
    assert "prefix" not in cached.batch([0, 1])
    assert torch.equal(loss(cached, model, [0, 1]), loss(plain, model, [0, 1]))


# --- the file ----------------------------------------------------------------------------------------------------------


def runs_below(model: AdapterModel, architecture: str, directory: Path, **options: Any) -> tuple[int, PrefixCache]:
    """Examples for which a second run has to compute the states itself, and its cache; all its losses are right."""
    cached, plain, cache = both(model, architecture, directory=directory, **options)
    for indices in ([0, 1, 2, 3, 4, 5], [4, 2]):
        torch.testing.assert_close(loss(cached, model, indices), loss(plain, model, indices), rtol=1e-5, atol=0)
    assert "prefix" in cached.batch([0, 5]) or cache.full
    cache.store.close(remove=False)
    return cache.recorded_examples, cache


def test_a_second_run_finds_what_the_first_one_left(tmp_path: Path) -> None:
    assert runs_below(adapted("llama"), "llama", tmp_path)[0] == len(TEXTS)
    content = (tmp_path / FILE_NAME).read_bytes()
    again, cache = runs_below(adapted("llama"), "llama", tmp_path)
    assert again == 0
    assert cache.store.notes == []
    assert (tmp_path / FILE_NAME).read_bytes() == content
    # Other tokens have other names: they are added, and nothing is taken for them.
    assert runs_below(adapted("llama"), "llama", tmp_path, verbalizers=SEVERAL)[0] == len(TEXTS)


def other_weights(model: AdapterModel) -> None:
    model.wrapped.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3


def other_precision(model: AdapterModel) -> None:
    layer = model.wrapped.model.layers[0].mlp.up_proj
    layer.weight.data = layer.weight.data.double()
    layer.forward = lambda x: nn.functional.linear(x, layer.weight.float())


def other_setting(model: AdapterModel) -> None:
    model.config.rms_norm_eps *= 2
    for layer in model.wrapped.model.layers:
        getattr(layer, "base_layer", layer).input_layernorm.variance_epsilon *= 2


@pytest.mark.parametrize("change", [other_weights, other_precision, other_setting])
def test_the_file_of_another_model_is_built_anew(change: Callable[[AdapterModel], None], tmp_path: Path) -> None:
    runs_below(adapted("llama"), "llama", tmp_path)
    other = adapted("llama")
    change(other)
    again, cache = runs_below(other, "llama", tmp_path)
    assert again == len(TEXTS)
    [note] = cache.store.notes
    assert "another model" in note


def test_the_file_of_another_cut_is_built_anew(tmp_path: Path) -> None:
    runs_below(adapted("llama", 2), "llama", tmp_path)
    assert runs_below(adapted("llama", 1), "llama", tmp_path)[0] == len(TEXTS)


@pytest.mark.parametrize("content", [b"", b"zo_opt.prefix/9 " + b"0" * 4000, bytes(300)])
def test_a_file_that_is_something_else_is_built_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    again, cache = runs_below(adapted("llama"), "llama", tmp_path)
    assert again == len(TEXTS)
    assert len(cache.store.notes) == bool(content)
    assert runs_below(adapted("llama"), "llama", tmp_path)[0] == 0


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1))
def test_a_file_cut_off_anywhere(share: float) -> None:
    with TemporaryDirectory() as name:
        _cut_off_and_read(Path(name), share)


def _cut_off_and_read(directory: Path, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    states = {bytes([k]) * 16: torch.randn(k + 1, 3, generator=generator) for k in range(6)}
    store = FileStore(directory / FILE_NAME, 1 << 20, "f" * 32)
    assert all(store.put(key, tensor) for key, tensor in states.items())
    store.close(remove=False)
    path = directory / FILE_NAME
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    store = FileStore(path, 1 << 20, "f" * 32)
    kept = [key for key in states if key in store]
    assert kept == list(states)[: len(kept)]  # the first ones
    assert len(kept) == 6 or share < 1
    for key, written in states.items():
        found = store.get(key)
        assert (found is None) == (key not in kept)
        assert found is None or torch.equal(found, written)
        assert store.put(key, written)
        again = store.get(key)
        assert again is not None
        assert torch.equal(again, written)
    store.close(remove=True)
    assert not path.exists()


def test_bits_come_back(tmp_path: Path) -> None:
    store = FileStore(tmp_path / FILE_NAME, 1 << 20, "f" * 32)
    for name, dtype in ((b"a", torch.float32), (b"b", torch.bfloat16), (b"c", torch.float16)):
        states = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
        states[1, 0] = float("inf")
        assert store.put(name * 16, states[1:4])
        found = store.get(name * 16)
        assert found is not None
        assert found.dtype == dtype
        assert torch.equal(found, states[1:4])
    store.close(remove=True)


@pytest.mark.parametrize(
    "byte", [49 + 3, 49 + 17, 49 + 21, 49 + 30, -1], ids=["name", "tokens", "width", "digest", "states"]
)
def test_a_record_damaged_anywhere_is_never_used(byte: int, tmp_path: Path) -> None:
    path, key = tmp_path / FILE_NAME, b"k" * 16
    store = FileStore(path, 1 << 20, "f" * 32)
    assert store.put(key, torch.ones(2, 3))
    store.close(remove=False)
    content = bytearray(path.read_bytes())
    assert content[49 : 49 + 16] == key
    content[byte] ^= 1
    path.write_bytes(content)
    store = FileStore(path, 1 << 20, "f" * 32)
    assert store.get(key) is None
    assert store.put(key, torch.ones(2, 3))
    assert torch.equal(store.get(key), torch.ones(2, 3))  # type: ignore[arg-type]
    store.close(remove=True)


def test_a_damaged_record_is_computed_anew_counted_and_never_used(tmp_path: Path) -> None:
    model = adapted("llama")
    cached, plain, cache = both(model, "llama", directory=tmp_path)
    path, recorded = tmp_path / FILE_NAME, cache.recorded_examples
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40  # the last record is the longest text's: 3
    path.write_bytes(content)
    assert torch.isclose(loss(cached, model, [3, 0]), loss(plain, model, [3, 0]), rtol=1e-5)
    assert cache.store.damaged == 1
    assert cache.recorded_examples == recorded + 2
    batch = cached.batch([3, 0])
    assert "prefix" in batch
    assert cache.store.damaged == 1
    assert torch.isclose(loss(cached, model, [3, 0]), loss(plain, model, [3, 0]), rtol=1e-5)
    cache.store.close(remove=False)
    assert runs_below(model, "llama", tmp_path)[0] == 0  # the record written anew comes after the damaged one


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    model = adapted("llama")
    cached, plain, cache = both(model, "llama", directory=tmp_path)
    with (tmp_path / FILE_NAME).open("r+b") as file:
        file.truncate(100)
    assert torch.isclose(loss(cached, model, [3, 0]), loss(plain, model, [3, 0]), rtol=1e-5)
    assert cache.store.damaged > 0


def test_a_full_disk_stops_the_writing_alone(tmp_path: Path) -> None:
    model = adapted("llama")
    _, _, whole = both(model, "llama")
    cache = PrefixCache(model, 1 << 23, "disk")
    cache.open(tmp_path)
    assert isinstance(cache.store, FileStore)
    cache.store._file = FullDisk(cache.store._file, whole.store.bytes // 2)
    task, examples = examples_with("llama", SINGLE)
    scorer = make_scorer(model.wrapped, tokenizer_for("llama"), task)
    cached, plain = Prepared(examples, scorer, CPU, cache), Prepared(examples, scorer, CPU, None)
    cached.record(2, lambda count: None)
    [note] = cache.store.notes
    assert "No space left" in note
    held = [i for i in range(len(TEXTS)) if "prefix" in cached.batch([i])]
    assert 0 < len(held) < len(TEXTS)
    for i in range(len(TEXTS)):
        torch.testing.assert_close(loss(cached, model, [i]), loss(plain, model, [i]), rtol=1e-5, atol=0)
    assert cache.store.damaged == 0
    assert (tmp_path / FILE_NAME).stat().st_size == cache.store.bytes
    assert cache.store.notes == [note]


class FullDisk:
    """A file on a disk with so much room."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, content: Any) -> int:
        if self._room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = int(self._file.write(content[: self._room]))
        self._room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    cache = PrefixCache(adapted("llama"), 1 << 20, "disk")
    with pytest.raises(ZOError, match=r"plain.* cannot be written .*prefix_cache_dir"):
        cache.open(tmp_path / "plain")


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    first = FileStore(tmp_path / FILE_NAME, 1 << 20, "f" * 32)
    with pytest.raises(ZOError, match="in use by another run"):
        FileStore(tmp_path / FILE_NAME, 1 << 20, "f" * 32)
    first.close(remove=False)
    FileStore(tmp_path / FILE_NAME, 1 << 20, "f" * 32).close(remove=True)


def test_the_bound_holds_for_the_file(tmp_path: Path) -> None:
    model = adapted("llama")
    _, whole = runs_below(model, "llama", tmp_path)
    bound = whole.store.bytes * 2 // 3
    _, cache = runs_below(model, "llama", tmp_path, max_bytes=bound)  # an earlier run was allowed more
    assert cache.full
    assert 0 < cache.store.bytes == (tmp_path / FILE_NAME).stat().st_size <= bound


def test_memory_keeps_copies() -> None:
    store, states = MemoryStore(1 << 10, CPU), torch.ones(2, 3)
    store.put(b"a", states)
    states.zero_()
    assert torch.equal(store.get(b"a"), torch.ones(2, 3))  # type: ignore[arg-type]


# --- whole runs --------------------------------------------------------------------------------------------------------


def results(directory: Path) -> dict[str, Any]:
    out: dict[str, Any] = json.loads((directory / "results.json").read_text())
    return out


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_every_place_gives_the_same_run(toy_options: Callable[..., list[str]], tmp_path: Path) -> None:
    for place in ("device", "cpu", "disk", "off"):
        assert run_main(toy_options(output_dir=tmp_path / place, steps=3, prefix_cache=place)) == 0
        assert not (tmp_path / place / FILE_NAME).exists()  # a finished run needs it no more
    for place in ("cpu", "disk"):
        assert losses(tmp_path / place) == losses(tmp_path / "device")
        assert results(tmp_path / place)["cache_bytes"] >= results(tmp_path / "device")["cache_bytes"] > 0
    assert losses(tmp_path / "off") == pytest.approx(losses(tmp_path / "device"), rel=1e-4)
    assert results(tmp_path / "off")["cache_bytes"] == 0
    assert "of cached hidden states on disk" in (tmp_path / "disk" / "report.md").read_text()


def test_a_resumed_run_takes_the_file_up_again(
    toy_options: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = MetricsWriter.write

    def killed(self: MetricsWriter, record: Any, *rest: Any) -> None:
        write(self, record, *rest)
        if record.step == 2:
            raise MemoryError("killed")

    options = {"steps": 5, "save_steps": 2, "prefix_cache": "disk"}
    assert run_main(toy_options(output_dir=tmp_path / "whole", **options)) == 0
    monkeypatch.setattr(MetricsWriter, "write", killed)
    with pytest.raises(MemoryError):
        run_main(toy_options(output_dir=tmp_path / "broken", **options))
    monkeypatch.setattr(MetricsWriter, "write", write)
    assert (tmp_path / "broken" / FILE_NAME).stat().st_size > 1000
    assert run_main(["train", "--output_dir", str(tmp_path / "broken"), "--resume"]) == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert results(tmp_path / "whole")["prepared_rows"] == 96
    assert results(tmp_path / "broken")["prepared_rows"] == 0


def test_another_run_uses_the_file_of_a_directory_given(toy_options: Callable[..., list[str]], tmp_path: Path) -> None:
    options = {"steps": 2, "prefix_cache": "disk", "prefix_cache_dir": tmp_path / "states"}
    for name, rows in (("first", 96), ("second", 0)):
        assert run_main(toy_options(output_dir=tmp_path / name, **options)) == 0
        assert results(tmp_path / name)["prepared_rows"] == rows
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert (tmp_path / "states" / FILE_NAME).exists()


def test_damage_is_said_in_one_sentence(
    toy_options: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"steps": 2, "prefix_cache": "disk", "prefix_cache_dir": tmp_path / "states"}
    assert run_main(toy_options(output_dir=tmp_path / "first", **options)) == 0
    path = tmp_path / "states" / FILE_NAME
    content = bytearray(path.read_bytes())
    content[49 + 44 + 5] ^= 1  # past the file's header and the first record's
    content[-3] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert run_main(toy_options(output_dir=tmp_path / "second", **options)) == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if "checksum" in x or "is damaged" in x]
    assert "2 cached hidden states failed their checksum and were computed anew" in line
    assert losses(tmp_path / "second") == pytest.approx(losses(tmp_path / "first"), rel=1e-4)
