"""``zo-opt train --adapter ...`` for every method, and ``zo-opt merge``: the tuned model as a plain one, or as a LoRA."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import run_main
from safetensors.torch import load_file
from test_wrong_input import assert_one_sentence, tree

from zo_opt import load_adapter_model
from zo_opt.adapters import ADAPTERS

Options = Callable[..., list[str]]
RUNS: dict[str, dict[str, Any]] = {
    "tt": {},
    "tt-lora": {"estimator": "two-sided", "rank": 4, "tt_rank": 2, "lora_alpha": 3.5, "rank_pattern": '{"v_proj": 2}', "layers": 2},
    "tt-lora head": {"estimator": "two-sided", "head": "classification", "template": None, "verbalizers": None},
    "tt-lora answers": {},  # the defaults
    "tt-lora tensorised head": {
        "estimator": "two-sided", "head": "classification", "template": None, "verbalizers": None, "modules_to_tensorize": "[score]",
        "tensorize_rank": 2, "query_mode": "split", "queries": 4,
    },
}  # fmt: skip
RUNS |= {name: {} for name in ADAPTERS if name not in RUNS}
# As training goes on, or by gradients: no journal tells all that happens to them.
CHANGING = ("adalora", "aflora", "lamda", "lamda++", "lisa", "tt-lora answers")
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_options: Options) -> Callable[[str], Path]:
    """Name of a run -> its directory."""
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp("run") / "out"
            options = {
                "output_dir": done[name],
                "steps": 6,
                "lr": 0.02,
                "adapter": name.split(maxsplit=1)[0],
                **RUNS[name],
            }
            assert run_main(toy_options(**options)) == 0
        return done[name]

    return run


def batch(directory: Path) -> dict[str, torch.Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return dict(tokenizer(["a charming film It was", "boring It was"], return_tensors="pt", padding=True))


def tuned(run: Path, base_dir: Path) -> Any:
    config = json.loads((run / "run.json").read_text())["config"]
    if config["head"] == "classification":
        from zo_opt.models.models import load_model

        return load_adapter_model(load_model(str(base_dir), head="classification", labels=2)[0], run).eval()
    return load_adapter_model(transformers.AutoModelForCausalLM.from_pretrained(base_dir), run).eval()


def auto(run: Path) -> Any:
    head = json.loads((run / "run.json").read_text())["config"]["head"]
    return (
        transformers.AutoModelForSequenceClassification
        if head == "classification"
        else transformers.AutoModelForCausalLM
    )


@pytest.mark.parametrize("name", RUNS)
def test_training_replaying_and_evaluating(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = finished(name)
    replayed = run_main(["replay", str(run), "--to", str(tmp_path / "to")])
    if name in CHANGING:
        assert replayed == 2
        assert "has no journal; runs keep one" in capsys.readouterr().err
    else:
        assert replayed == 0
        assert (run / "start" / FILES[1]).read_bytes() != (run / FILES[1]).read_bytes()
        for file in FILES:
            assert (tmp_path / "to" / file).read_bytes() == (run / file).read_bytes()
    capsys.readouterr()
    assert run_main(["eval", str(run)]) == 0
    accuracy = json.loads((run / "results.json").read_text())["after"]["accuracy"]
    assert re.search(rf"accuracy {accuracy:.1%}", capsys.readouterr().out)


def test_options_reach_the_adapter(finished: Callable[[str], Path]) -> None:
    values = json.loads((finished("tt-lora") / FILES[0]).read_text())
    expected = {"rank": 4, "tt_rank": 2, "alpha": 3.5, "rank_pattern": {"v_proj": 2}, "layers": 2}
    assert {k: values[k] for k in expected} == expected
    values = json.loads((finished("tt-lora tensorised head") / FILES[0]).read_text())
    assert (values["modules_to_tensorize"], values["tensorize_rank"], values["modules_to_save"]) == (["score"], 2, None)
    values = json.loads((finished("tt-lora head") / FILES[0]).read_text())
    assert (values["modules_to_save"], values["rank"]) == (["score"], 8)


IN_PLACE = ("full",)
MERGED = ("tt-lora", "tt-lora head", "tt-lora tensorised head", "dora", "adalora", "full")


@pytest.mark.parametrize("name", MERGED)
def test_the_merged_model_loads_with_transformers_alone(
    finished: Callable[[str], Path], tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The same logits to 1e-5 (fp32 checkpoint), which are not the base model's; the run is left as it is."""
    run, to = finished(name), tmp_path / "merged"
    before = tree(run)
    assert run_main(["merge", str(run), "--to", str(to)]) == 0
    assert str(to) in capsys.readouterr().out
    assert tree(run) == before
    merged, inputs = auto(run).from_pretrained(to).eval(), batch(to)
    model = tuned(run, tiny_model_dir)
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        assert torch.equal(model.unload()(**inputs).logits, expected) == (name in IN_PLACE)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers an old question
@pytest.mark.parametrize(
    ("name", "task"), [("tt-lora", "CAUSAL_LM"), ("adalora", "CAUSAL_LM"), ("tt-lora head", "SEQ_CLS")]
)
def test_the_lora_loads_with_peft(
    finished: Callable[[str], Path],
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    task: str,
) -> None:
    """By its own record of the base model's name, found from where that lies; a run's adapter of PEFT's methods without merge as well."""
    run, to = finished(name), tmp_path / "lora"
    assert run_main(["merge", str(run), "--to", str(to), "--as", "lora"]) == 0
    assert sorted(p.name for p in to.iterdir()) == sorted(FILES)
    assert json.loads((to / FILES[0]).read_text())["task_type"] == task
    monkeypatch.chdir(tiny_model_dir.parent)
    kind, options = {
        "CAUSAL_LM": (peft.AutoPeftModelForCausalLM, {}),
        "SEQ_CLS": (peft.AutoPeftModelForSequenceClassification, {"num_labels": 2}),
    }[task]
    inputs = batch(tiny_model_dir)
    for directory in (to, run) if name == "adalora" else (to,):
        theirs = kind.from_pretrained(directory, **options).eval()
        with torch.no_grad():
            torch.testing.assert_close(
                theirs(**inputs).logits, tuned(run, tiny_model_dir)(**inputs).logits, rtol=0, atol=1e-4
            )


def _damage(run: Path) -> None:
    content = (run / FILES[1]).read_bytes()
    (run / FILES[1]).write_bytes(content[: len(content) // 2])


WRONG: dict[str, tuple[str, list[str], str]] = {
    "adapters that act on answers": ("tt-lora answers", ["--to", "to"], "act from the answer on.*positions='all'"),
    "the same as LoRA": ("tt-lora answers", ["--to", "to", "--as", "lora"], "act from the answer on.*positions='all'"),
    "serial adapters": ("tt", ["--to", "to"], "nonlinearity.*cannot be merged"),
    "new biases": ("bitfit", ["--to", "to"], "no bias to merge into"),
    "a delta as LoRA": ("lamda", ["--to", "to", "--as", "lora"], "'lamda'.*cannot be exported as LoRA"),
    "no destination": ("tt-lora", [], "--to"),
    "another form": ("tt-lora", ["--to", "to", "--as", "gguf"], "gguf.*model, lora"),
    "a destination that holds files": ("tt-lora", ["--to", "full"], "is not empty"),
    "a destination below a file": ("tt-lora", ["--to", "full/file/to"], "cannot be written"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_can_go_wrong(
    finished: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    name, arguments, sentence = WRONG[what]
    run = finished(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before, others = tree(run), tree(tmp_path)
    capsys.readouterr()
    assert run_main(["merge", str(run), *arguments]) == 2
    assert_one_sentence(capsys.readouterr().err, sentence)
    assert (tree(run), tree(tmp_path)) == (before, others)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda run: (run / "run.json").unlink(), r"run\.json"),
        (lambda run: (run / FILES[0]).unlink(), r"adapter_config\.json"),
        (_damage, "is damaged"),
        (shutil.rmtree, r"run\.json"),
    ],
)
def test_damaged_runs(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, sentence: str
) -> None:
    run = Path(shutil.copytree(finished("tt-lora"), tmp_path / "run"))
    change(run)
    capsys.readouterr()
    assert run_main(["merge", str(run), "--to", str(tmp_path / "to")]) == 2
    assert_one_sentence(capsys.readouterr().err, sentence)
    assert not (tmp_path / "to").exists()


@pytest.mark.slow
def test_merging_again_a_bfloat16_checkpoint(
    finished: Callable[[str], Path], tmp_path: Path, tiny_model_dir: Path
) -> None:
    """The merged model keeps the checkpoint's dtype; its tensors are finite and have the checkpoint's names."""
    run = Path(shutil.copytree(finished("tt-lora"), tmp_path / "run"))
    base = tmp_path / "base"
    transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir).to(torch.bfloat16).save_pretrained(base)
    transformers.AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(base)
    record = json.loads((run / "run.json").read_text())
    record["config"]["model_name_or_path"] = str(base)
    (run / "run.json").write_text(json.dumps(record))
    assert run_main(["merge", str(run), "--to", str(tmp_path / "to")]) == 0
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "to", base))
    assert ours.keys() == theirs.keys()
    assert {t.dtype for t in ours.values()} == {torch.bfloat16}
    assert {n.split(".")[-2] for n in ours if not torch.equal(ours[n], theirs[n])} == {"q_proj", "v_proj"}
