"""An adapter says which base it was trained on: precision, quantisation, a checksum, and no path of the disk it came from."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model, run_main
from safetensors.torch import load_file, save_file

from zo_opt import LoRAConfig, TTConfig, get_adapter_model, load_adapter_model, set_precision
from zo_opt.adapters.made_for import base_checksum

CPU = torch.device("cpu")
Options = Callable[..., list[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, toy_options: Options) -> Path:
    """A run on a mixed base, whatever this machine is fast at."""
    out = tmp_path_factory.mktemp("mixed") / "out"
    line = toy_options(output_dir=out, steps=2, precision="mixed", adapter="lora", estimator="two-sided")
    assert run_main(line) == 0
    return out


def metadata(directory: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["zo_opt"])
    return found


def test_the_precision_is_recorded_and_no_path_is(run: Path, tiny_model_dir: Path) -> None:
    base = metadata(run)["base"]
    assert base["precision"] == "mixed"
    assert len(base["checksum"]) == 32
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert str(tiny_model_dir.parent).encode() not in (run / file).read_bytes()


def test_another_precision_is_said_on_load(run: Path, tiny_model_dir: Path) -> None:
    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir)

    with pytest.warns(
        UserWarning, match=r'trained on a base in mixed, and this one is in fp32.*set_precision\(model, "mixed"'
    ):
        load_adapter_model(base(), run)
    model = base()
    set_precision(model, "mixed", CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter_model(model, run)


@pytest.mark.parametrize("config", [LoRAConfig(rank=2), TTConfig(rank=2, bottleneck=8)])
def test_another_base_is_said_on_load(tmp_path: Path, config: Any) -> None:
    get_adapter_model(make_model("llama"), config).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter_model(make_model("llama"), tmp_path)
    other = make_model("llama")
    with torch.no_grad():
        other.model.layers[1].input_layernorm.weight.add_(0.5)
    with pytest.warns(UserWarning, match="another base"):
        load_adapter_model(other, tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
def test_the_checksum_is_the_bases_in_every_form(architecture: str) -> None:
    wide, narrow, mixed = (make_model(architecture).bfloat16().float() for _ in range(3))
    set_precision(mixed, "mixed", CPU)
    for model in (wide, narrow, mixed):
        model.requires_grad_(False)
    assert base_checksum(wide) == base_checksum(narrow.bfloat16()) == base_checksum(mixed) is not None


def test_eval_takes_the_runs_precision_or_the_one_given(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = json.loads((run / "results.json").read_text())["after"]
    assert run_main(["eval", str(run)]) == 0
    said = capsys.readouterr().out
    assert "trained on a base in" not in said
    assert f"loss {after['loss']:.3f}" in said
    assert run_main(["eval", str(run), "--precision", "fp32"]) == 0
    assert "trained on a base in mixed, and this one is in fp32" in capsys.readouterr().out.replace("\n", " ")
    assert run_main(["eval", str(run), "--precision", "fp8"]) == 2
    assert "choose one of auto, mixed, fp32" in capsys.readouterr().err.replace("\n", " ")


def test_weights_trained_in_place_have_one_precision(toy_options: Options, tmp_path: Path, capsys: Any) -> None:
    assert (
        run_main(toy_options(output_dir=tmp_path / "out", steps=1, adapter="full", lr=1e-6, estimator="two-sided")) == 0
    )
    assert metadata(tmp_path / "out")["base"]["precision"] == "fp32"
    assert run_main(["eval", str(tmp_path / "out"), "--precision", "mixed"]) == 2
    assert "leave --precision out" in capsys.readouterr().err.replace("\n", " ")


def test_where_an_encoders_answers_stood_is_recorded(tmp_path: Path) -> None:
    model = get_adapter_model(make_model("bert"), LoRAConfig(rank=2, positions="answer"))
    model.save_pretrained(tmp_path)
    assert metadata(tmp_path)["base"]["answers"] == "beside"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter_model(make_model("bert"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    own = metadata(tmp_path)
    del own["base"]["answers"]  # as an earlier version saved it
    save_file(load_file(path), path, {"zo_opt": json.dumps(own)})
    with pytest.warns(UserWarning, match="answers within an encoder's rows, and here they stand beside them"):
        load_adapter_model(make_model("bert"), tmp_path)
