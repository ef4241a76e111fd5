"""What transformers says of a checkpoint is heard, and damaged files of every kind end in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model, tokenizer_for
from safetensors.torch import load_file, save_file

from zo_opt import ZOError
from zo_opt.models.models import load_model


def change(name: str, value: torch.Tensor | None = None) -> Callable[[Path], None]:
    """Take a weight out of a checkpoint, or put one in."""

    def changed(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        tensors.pop(name, None)
        save_file(tensors | ({} if value is None else {name: value}), path, {"format": "pt"})

    return changed


def config(**values: Any) -> Callable[[Path], None]:
    def changed(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return changed


@pytest.fixture
def copy(tiny_dir: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def copied(architecture: str) -> Path:
        return Path(shutil.copytree(tiny_dir(architecture), tmp_path / "model"))

    return copied


@pytest.mark.parametrize("head", ["lm", "classification"])
@pytest.mark.parametrize(
    ("architecture", "damage", "said"),
    [
        ("llama", change("model.layers.2.mlp.down_proj.weight"), r"lacks the weights model\.layers\.2\.mlp\.down_proj"),
        ("llama", change("model.norm.weight"), r"lacks the weights model\.norm"),
        ("bert", change("bert.embeddings.word_embeddings.weight"), r"lacks the weights .*word_embeddings"),
        ("gpt2", change("transformer.h.1.ln_1.bias"), r"lacks the weights transformer\.h\.1\.ln_1\.bias"),
        ("llama", config(num_hidden_layers=5), r"lacks the weights model\.layers\.4"),
        (
            "llama",
            change("model.layers.2.mlp.down_proj.weight", torch.zeros(3, 5)),
            r"is \(3, 5\) in its file, and \(32, 64\) by",
        ),
        ("opt", config(ffn_dim=80), r"is \(64(, 32)?,?\) in its file, and \(80"),
    ],
)
def test_weights_below_the_head(copy: Any, head: str, architecture: str, damage: Any, said: str) -> None:
    damage(directory := copy(architecture))
    with pytest.raises(ZOError, match=said):
        load_model(str(directory), head=head)


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (change("model.layers.9.mlp.up_proj.weight", torch.zeros(2, 2)), "model.layers.9.mlp.up_proj.weight"),
        (config(num_hidden_layers=3), "model.layers.3"),
        (change("score.weight", torch.zeros(2, 32)), "score.weight"),
    ],
)
def test_weights_that_have_no_place_are_said(copy: Any, damage: Any, left: str) -> None:
    damage(directory := copy("llama"))
    said: list[str] = []
    load_model(str(directory), say=said.append)
    assert any(left in line and "left out" in line for line in said)


def test_nothing_is_said_of_a_whole_checkpoint(copy: Any) -> None:
    said: list[str] = []
    load_model(str(copy("llama")), say=said.append)
    assert said == []


@pytest.mark.parametrize("architecture", ["llama", "bert", "gpt2"])
def test_a_head_of_another_size(tmp_path: Path, architecture: str) -> None:
    make_model(architecture, classes=3).save_pretrained(tmp_path)
    tokenizer_for(architecture).save_pretrained(tmp_path)
    with pytest.raises(
        ZOError, match=r"3 outputs \(LABEL_0, LABEL_1, LABEL_2\), and the rows have 2 labels .*is \(3,.*not \(2,"
    ):
        load_model(str(tmp_path), head="classification", labels=2)


def test_half_a_head_is_no_new_head(tmp_path: Path) -> None:
    make_model("bert", classes=2).save_pretrained(tmp_path)
    tokenizer_for("bert").save_pretrained(tmp_path)
    change("classifier.bias")(tmp_path)
    with pytest.raises(ZOError, match=r"lacks the weights classifier\.bias"):
        load_model(str(tmp_path), head="classification", labels=2)


def test_the_pooler_that_a_language_model_lacks_is_new(copy: Any) -> None:
    model, _ = load_model(str(copy("bert")), head="classification", labels=2)
    assert model.new_modules == ["bert.pooler.dense", "classifier"]


CONTENTS = {"empty": b"", "list": b"[1, 2]", "null": b"null", "cut": None, "binary": b"\xff\xfe\x00"}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "model.safetensors.index.json"],
)
def test_a_damaged_file_ends_in_a_sentence(tmp_path: Path, name: str, content: str) -> None:
    sharded = {"max_shard_size": "20KB"} if "index" in name else {}
    make_model("llama").save_pretrained(tmp_path, **sharded)
    tokenizer_for("llama").save_pretrained(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if CONTENTS[content] is None else CONTENTS[content])
    with pytest.raises(ZOError, match="could not be loaded"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("damage", ["gone", "cut", "misnamed"])
def test_a_damaged_shard_ends_in_a_sentence(tmp_path: Path, damage: str) -> None:
    make_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer_for("llama").save_pretrained(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    if damage == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "misnamed":
        shard.with_name("other.safetensors").write_bytes(content)
    with pytest.raises(ZOError, match="could not be loaded"):
        load_model(str(tmp_path))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    tokenizer_for("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert isinstance(model, transformers.PreTrainedModel)
    with pytest.raises(ZOError, match="could not be loaded"):
        load_model(str(tmp_path))
