"""What a run leaves: an adapter in PEFT's own format where PEFT has it, a model card, and a word on what can be done with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_model, run_main
from text_tasks import results

from zo_opt import ZOError, get_adapter_model, load_run
from zo_opt.adapters import make_config
from zo_opt.adapters.uses import Uses, uses_of

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # PEFT's
Options = Callable[..., list[str]]
LEARNS: dict[str, Any] = {
    "optimizer": "adamw", "lr": 0.01, "steps": 4, "query_mode": None, "query_schedule": None, "queries": None,
}  # fmt: skip


@pytest.mark.parametrize("adapter", ["lora", "dora", "vera", "adalora"])
def test_peft_alone_loads_a_run_with_the_same_logits(
    adapter: str, toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path
) -> None:
    peft = pytest.importorskip("peft")
    assert run_main(toy_options(**LEARNS, adapter=adapter, output_dir=tmp_path / "run")) == 0
    monkeypatch.chdir(tiny_model_dir.parent)  # the base is named by the last part of its path
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    run, ids = load_run(tmp_path / "run"), torch.arange(2 * 20).view(2, 20) + 5
    with torch.no_grad():
        logits, ours = found(input_ids=ids).logits, run.model(input_ids=ids).logits
        base = load_run(tmp_path / "run", zero_shot=True).model(input_ids=ids).logits
    assert torch.allclose(logits, ours, atol=1e-5) and not torch.allclose(logits, base, atol=1e-3)


USES: dict[str, tuple[dict[str, Any], Uses, str]] = {
    "lora": ({"rank": 2}, Uses(True, "native", False, False), "PEFT's own format, and zo-opt merge"),
    "tt-lora": ({"rank": 2}, Uses(True, "export", False, False), "--as lora a LoRA that PEFT loads"),
    "tt": ({"rank": 2, "bottleneck": 8}, Uses(False, "no", False, False), "neither merged nor loaded by PEFT"),
    "lamda": ({"rank": 2, "total_steps": 9}, Uses(True, "no", False, False), "PEFT has no form for it"),
    "bitfit": ({}, Uses(False, "no", False, False), "neither merged nor loaded by PEFT"),  # a Llama has no biases
    "full": ({}, Uses(True, "no", False, True), "the model's own weights are trained"),
    "lora on answers": ({"rank": 2, "positions": "answer"}, Uses(False, "no", True, False), "acts on answers alone"),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_what_is_said_of_an_adapter_is_so(name: str, tmp_path: Path) -> None:
    options, uses, said = USES[name]
    model = get_adapter_model(make_model("llama"), make_config(name.partition(" ")[0], options))
    assert uses_of(model) == uses and said in uses.before()
    model.save_pretrained(tmp_path / "own")
    native = "peft_type" in json.loads((tmp_path / "own/adapter_config.json").read_text())
    exported, merged = True, True
    try:
        model.export_peft(tmp_path / "peft")
    except ZOError:
        exported = False
    try:
        model.merge_and_unload()
    except ZOError:
        merged = False
    assert (merged, native, exported) == (uses.merges, uses.peft == "native", uses.peft != "no")


def test_the_card_of_a_run(toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run_main(toy_options(**LEARNS, adapter="lora", output_dir=out)) == 0
    said = capsys.readouterr().out
    assert said.index("later: this adapter is saved in PEFT's own format") < said.index("zero-shot evaluation")
    assert f"a plain model: zo-opt merge {out} --to DIR" in said
    card, found, record = (out / "README.md").read_text(), results(out), json.loads((out / "run.json").read_text())
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft" and front["pipeline_tag"] == "text-classification"
    assert "base_model" not in front  # a directory of this machine
    for part in ("train", "held_out"):
        assert f"`{record['rows'][part]['sha256']}`" in card
    assert f"| accuracy | {found['before']['accuracy']:.1%} | {found['after']['accuracy']:.1%} ±" in card
    assert record["command"] in card and "prompt: `{text} It was`" in card and "0 -> `terrible`, 1 -> `great`" in card
    assert "32 rows to evaluate on are few" in card and 'PeftModel.from_pretrained(base, "run")' in card
    assert run_main(["train", "--output_dir", str(out), "--resume", "--steps", "6"]) == 0
    assert "zo-opt train --output_dir run --resume --steps 6" in (out / "README.md").read_text()


def test_the_card_of_a_private_run_gives_no_hash(toy_options: Options, tmp_path: Path) -> None:
    options = {"query_mode": None, "privacy_noise": 1.0, "privacy_clip": 1.0, "query_schedule": None, "queries": None}
    assert run_main(toy_options(**options, steps=2, output_dir=tmp_path / "run")) == 0
    card = (tmp_path / "run/README.md").read_text()
    assert "SHA-256 of the training rows: not recorded, for they are private" in card and "epsilon" in card
    assert "zo-opt merge" not in card.split("## Limits")[0] and "neither merged nor loaded by PEFT" in card
