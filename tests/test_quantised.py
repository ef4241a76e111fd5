"""Frozen bases in few bits; GGUF files. What needs torchao or bitsandbytes is skipped where they are not installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, needs, run_main, tokenizer_for
from text_tasks import assert_resumes_to_the_same_bits, results
from tiny_models import build, padded_batch

from zo_opt import LoRAConfig, MeZO, get_adapter_model, trainable_parameters
from zo_opt.adapters import ADAPTERS
from zo_opt.adapters.weights import matrix, rows
from zo_opt.errors import ZOError
from zo_opt.journal.provenance import frozen_state
from zo_opt.models.models import load_model
from zo_opt.models.precision import set_precision
from zo_opt.models.quantisation import KINDS, few_bits
from zo_opt.system.checksum import fingerprint, plain_parts
from zo_opt.system.memory import MappedFiles

Options = Callable[..., list[str]]
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the packages' own, when they are imported


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all that a checkpoint of the model holds."""
    tensors = [part for name, t in frozen_state(model, ()).items() for _, part in plain_parts(name, t)]
    return sum(t.numel() * t.element_size() for t in tensors)


kinds = pytest.mark.parametrize("kind", [needs(kind) for kind in KINDS])
torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


@kinds
@pytest.mark.parametrize("architecture", ["llama", "opt", "bert", "t5"])
def test_near_the_dense_model_and_the_same_in_every_query_mode(kind: str, architecture: str) -> None:
    dense, batch = build(architecture), padded_batch(architecture)
    model = build(architecture)
    assert set_precision(model, f"fp32, {kind}", CPU) == f"fp32, {kind}"
    with torch.no_grad():
        loss, found = (float(m(**batch).loss) for m in (dense, model))
    assert found == pytest.approx(loss, rel=0.05)
    assert found != loss
    assert weight_bytes(model) < 0.75 * weight_bytes(dense)
    targets = ["q", "v"] if architecture == "t5" else None
    adapted = get_adapter_model(model, LoRAConfig(rank=2, target_modules=targets)).eval()
    grads = []
    for mode in ("sequential", "batched"):
        optimizer = MeZO(trainable_parameters(adapted), lr=0.0, zo_eps=0.1, module=adapted, query_mode=mode, seed=1)
        optimizer.step(lambda b: adapted(**b).loss, batch)
        grads.append(optimizer.last_record.projected_grads[0])
    assert grads[0] != 0
    assert grads[1] == pytest.approx(grads[0], rel=2e-2, abs=2e-3)


@kinds
def test_the_same_bits_every_time(kind: str) -> None:
    """A run is resumed and evaluated on a base that is quantised anew."""
    models = [build("llama") for _ in range(2)]
    for model in models:
        set_precision(model, f"mixed, {kind}", CPU)
    first, second = (fingerprint(frozen_state(m, ())) for m in models)
    assert first == second
    assert first != fingerprint(frozen_state(build("llama"), ()))


@pytest.mark.parametrize("kind", [needs("int4"), needs("bnb-int8")])
@pytest.mark.parametrize("method", [m for m in ADAPTERS if m not in ("full", "lisa")])
def test_every_adapter_sits_on_it(kind: str, method: str) -> None:
    """Those that start from the weight start from what the few bits stand for; none is merged into them."""
    model, batch = build("llama"), padded_batch("llama")
    set_precision(model, f"mixed, {kind}", CPU)
    options: dict[str, Any] = {"target_modules": ["q_proj"]} if method in ("spectral", "zo-act") else {}
    if "total_steps" in ADAPTERS[method].__dataclass_fields__:
        options["total_steps"] = 10
    with torch.no_grad():
        before = model(**batch).logits
        adapted = get_adapter_model(model, ADAPTERS[method](**options)).eval()
        assert torch.allclose(adapted(**batch).logits, before, atol=2e-2)
    with pytest.raises(ZOError, match=r"quantis|nonlinearity|no bias"):
        adapted.merge_and_unload()


@torchao
def test_what_a_quantised_weight_stands_for() -> None:
    dense, model = build("llama"), build("llama")
    set_precision(model, "fp32, int4", CPU)
    layer, before = model.model.layers[0].self_attn.q_proj, dense.model.layers[0].self_attn.q_proj
    found, weight = matrix(layer), matrix(before)
    assert found.shape == weight.shape
    groups = weight.T.reshape(-1, 32)  # 32 neighbours of an output share sixteen levels
    step = (groups.amax(1) - groups.amin(1)) / 15
    assert ((found - weight).T.reshape(-1, 32).abs() <= 0.55 * step[:, None]).all()
    model.to(torch.bfloat16).float()  # which leaves them as they are
    assert torch.equal(matrix(layer), found)
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), x @ found, rtol=1e-4, atol=1e-4)
    for place in ("get_input_embeddings", "get_output_embeddings"):
        ids = torch.tensor([[1, 7], [7, 3]])
        few, all_rows = rows(getattr(model, place)(), ids), getattr(dense, place)().weight[ids].detach()
        assert few.shape == all_rows.shape
        assert ((few - all_rows).abs() <= 0.51 * all_rows.abs().amax() / 127).all()


@torchao
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_rows_at_a_time_are_the_bits_of_the_whole(kind: str, dtype: torch.dtype) -> None:
    """Against torchao's own, whose memory is many times the weight's."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    weight = torch.randn(1040, 2048, generator=torch.Generator().manual_seed(0))
    found: Any = few_bits(weight, kind, CPU, dtype, MappedFiles())
    theirs = torch.nn.Linear(2048, 1040, bias=False, dtype=dtype)
    theirs.weight.data.copy_(weight)
    whole: Any = {
        "int8": Int8WeightOnlyConfig(set_inductor_config=False),
        "int4": PrototypeInt4WeightOnlyConfig(group_size=32),
    }
    quantize_(theirs, whole[kind])
    expected: Any = theirs.weight
    assert found.shape == weight.shape
    assert found.__tensor_flatten__()[0] == expected.__tensor_flatten__()[0]
    for name in found.__tensor_flatten__()[0]:
        assert torch.equal(getattr(found, name), getattr(expected, name))
    x = torch.randn(3, 2048).to(dtype)
    assert torch.equal(torch.nn.functional.linear(x, found), torch.nn.functional.linear(x, expected))


@torchao
def test_tied_embeddings_are_kept_once() -> None:
    import transformers
    from tiny_models import CONFIGS

    config = CONFIGS["llama"]()
    sizes = []
    for config.tie_word_embeddings in (True, False):
        with torch.random.fork_rng():
            model = transformers.AutoModelForCausalLM.from_config(config)
        set_precision(model, "mixed, int8", CPU)
        sizes.append(weight_bytes(model))
    assert sizes[1] - sizes[0] >= config.vocab_size * config.hidden_size


@torchao
def test_gradients_pass_through() -> None:
    """So that adamw compares on the same base."""
    model = build("llama")
    set_precision(model, "fp32, int4", CPU)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 32, requires_grad=True)
    layer(x).square().sum().backward()
    expected = 2 * (x.detach() @ matrix(layer)) @ matrix(layer).T
    torch.testing.assert_close(x.grad, expected, rtol=1e-3, atol=1e-3)


@torchao
def test_a_run_on_an_int4_base(
    toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tuned, resumed to the same bits, evaluated and replayed: the base is made anew each time."""

    def line(directory: Path) -> list[str]:
        return toy_options(quantise="int4", output_dir=directory)

    assert_resumes_to_the_same_bits(line, tmp_path, monkeypatch)
    out = tmp_path / "whole"
    assert results(out)["precision"] == "fp32, int4"
    capsys.readouterr()
    assert run_main(["eval", str(out)]) == 0
    assert f"accuracy {results(out)['after']['accuracy']:.1%}" in capsys.readouterr().out
    assert run_main(["replay", str(out), "--to", str(tmp_path / "rebuilt")]) == 0


@torchao
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("mixed", 1e-2)])
def test_kept_prompts_change_no_figure_on_an_int4_base(
    precision: str, tolerance: float, toy_options: Options, tmp_path: Path
) -> None:
    """In the run, beside a run without them, and in ``eval``: the tolerances that docs/how-to/memory.md states."""
    losses = []
    for cache in ("device", "off"):
        out = tmp_path / cache
        options = {"quantise": "int4", "precision": precision, "steps": 2, "lr": 1e-4, "prompt_cache": cache}
        assert run_main(toy_options(output_dir=out, **options)) == 0
        assert (results(out)["cache_bytes"] > 0) == (cache == "device")
        assert run_main(["eval", str(out)]) == 0
        [line] = (out / "evaluations.jsonl").read_text().splitlines()
        losses += [results(out)["after"]["loss"], json.loads(line)["loss"]]
    assert losses == pytest.approx([losses[0]] * 4, rel=tolerance)
    lines = [(tmp_path / cache / "metrics.jsonl").read_text().splitlines()[0] for cache in ("device", "off")]
    kept, plain = (json.loads(line)["loss"] for line in lines)
    assert kept == pytest.approx(plain, rel=tolerance)


def quantised_checkpoint(kind: str, directory: Path) -> Path:
    """A checkpoint that transformers quantised when it loaded another, with its tokenizer."""
    import transformers

    make_model("opt").save_pretrained(directory / "dense")  # which has biases
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = transformers.TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    else:
        config = transformers.BitsAndBytesConfig(load_in_8bit=kind == "bnb-int8", load_in_4bit=kind == "bnb-nf4")
    made = transformers.AutoModelForCausalLM.from_pretrained(directory / "dense", quantization_config=config)
    made.save_pretrained(directory / "quantised")
    tokenizer_for("opt").save_pretrained(directory / "quantised")
    return directory / "quantised"


@pytest.mark.parametrize("kind", [needs(kind) for kind in ("int8", "bnb-int8", "bnb-nf4")])
def test_a_checkpoint_that_is_quantised_already(
    kind: str, toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tuned as one that is quantised here; whatever would need the weights in full is refused."""
    checkpoint, out = quantised_checkpoint(kind, tmp_path), tmp_path / "out"
    options = {"model_name_or_path": checkpoint, "adapter": "lora", "query_mode": "split", "steps": 5}
    assert run_main(toy_options(output_dir=out, **options)) == 0
    model, _ = load_model(str(checkpoint))
    assert set_precision(model, "fp32", CPU) == "fp32"
    assert weight_bytes(model) < 0.75 * weight_bytes(make_model("opt"))
    with pytest.raises(ZOError, match="is quantised and cannot be trained in place"):
        get_adapter_model(model, ADAPTERS["full"]())
    capsys.readouterr()
    assert run_main(["eval", str(out)]) == 0
    assert f"accuracy {results(out)['after']['accuracy']:.1%}" in capsys.readouterr().out
    assert run_main(["replay", str(out), "--to", str(tmp_path / "rebuilt")]) == 0
    assert run_main(["merge", str(out), "--to", str(tmp_path / "merged")]) == 2
    assert "quantis" in capsys.readouterr().err
    assert run_main(toy_options(output_dir=tmp_path / "twice", quantise=kind, **options)) == 2
    assert "the checkpoint is quantised already" in capsys.readouterr().err
    private = (
        {
            "privacy_epsilon": 8,
            "privacy_clip": 1,
        }
        | options
        | {"query_mode": None, "batch_size": 4}
    )
    assert run_main(toy_options(output_dir=tmp_path / "private", **private)) == (2 if kind == "bnb-int8" else 0)
    if kind == "bnb-int8":
        assert "each row is rounded by what the other rows" in capsys.readouterr().err


MISTAKES = {
    "unknown": ({"quantise": "int3"}, "quantise='int3' is not possible; give int8, int4, bnb-int8 or bnb-nf4"),
    "whole model": ({"quantise": "int4", "adapter": "full"}, "trains the model's own weights"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str, toy_options: Options, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("zo_opt.models.quantisation.find_spec", lambda name: object())
    options, sentence = MISTAKES[case]
    assert run_main(toy_options(**options, output_dir=tmp_path / "out")) == 2
    assert sentence in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_without_the_package(toy_options: Options, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("zo_opt.models.quantisation.find_spec", lambda name: None)
    assert run_main(toy_options(quantise="int4", output_dir=tmp_path / "out")) == 2
    assert (
        "needs the package torchao; install it with pip install 'zo-opt[quantised]'"
        in capsys.readouterr().err.replace("\n", " ")
    )


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_a_gguf_file_that_is_not_there_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(ZOError, match=r"nothing.gguf does not exist"):
        load_model(str(tmp_path / "nothing.gguf"))
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ZOError, match=r"damaged.gguf' could not be loaded"):
        load_model(str(tmp_path / "damaged.gguf"))
