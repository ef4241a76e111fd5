"""The readers of files that may be anybody's, each with valid files to begin with: for tests/test_fuzz.py and benchmarks/fuzz.py.

``Target.run`` gives one input to one reader and lets :class:`ZOError` pass: whatever else comes out is a bug. ``mutate`` changes an
input as a stranger would: values of JSON, bytes, whole parts. An input of several files has ``SEPARATOR`` between them.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from odd_tables import odd_tables, read_odd_table
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn

from zo_opt import AdaLoRAConfig, DoRAConfig, LoRAConfig, MeZO, VeRAConfig, ZOError, get_adapter_model
from zo_opt.adapters import ADAPTERS, AdapterModel, load_adapter_model, make_config
from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.storage import CONFIG_NAME, SCHEDULE_NAME, WEIGHTS_NAME
from zo_opt.comparison.compare import resumed_options
from zo_opt.comparison.config import CompareConfig
from zo_opt.comparison.lr_search import best_lr
from zo_opt.comparison.options import check, plain, run_config
from zo_opt.comparison.results import summarise
from zo_opt.comparison.runs import Run as OneRun
from zo_opt.journal import Journal, read_journal, replay
from zo_opt.journal.format import make_line
from zo_opt.optim import OPTIMIZERS
from zo_opt.record import checkpoint
from zo_opt.record.metrics import make_line as make_metrics_line
from zo_opt.record.metrics import read_metrics
from zo_opt.record.watch import Watched
from zo_opt.tasks.rows import column_values, hold_out, make_examples, read_rows
from zo_opt.tasks.tasks import custom_task
from zo_opt.training.config import TrainConfig
from zo_opt.training.options import GROUPS, PARTS
from zo_opt.training.parsing import Parser, parse_arguments
from zo_opt.training.parts import TABLES, own_options
from zo_opt.training.run_record import read_config

SEPARATOR = b"\n=====\n"
Run = Callable[[bytes, Path], None]


def empty(directory: Path) -> None:
    """Take everything out of it."""
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        seeds: valid inputs, made in an empty directory.
        read: reads an input, put into an empty directory.
    """

    seeds: Callable[[Path], list[bytes]]
    read: Run

    def run(self, content: bytes, directory: Path) -> bool:
        """Read one input; whether it was accepted. Raises only what is a bug."""
        empty(directory)
        try:
            self.read(content, directory)
        except ZOError as error:
            str(error).encode()  # can be printed
            return False
        return True


# --- a model to load into ---


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "v_proj"):
            setattr(self, name, nn.utils.skip_init(nn.Linear, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.v_proj(self.q_proj(x))


class Net(nn.Module):
    """As much of a transformer as adapters look at."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


BASE = Net()
TARGETS_OF = {"target_modules": ["q_proj", "v_proj"]}


def load(directory: Path) -> None:
    model = copy.deepcopy(BASE)
    try:
        load_adapter_model(model, directory)
    except ZOError:
        assert not any(isinstance(module, AdaptedModule) for module in model.modules()), "half loaded"
        raise


def write(directory: Path, content: bytes, *names: str) -> None:
    for name, part in zip(names, content.split(SEPARATOR), strict=False):
        (directory / name).write_bytes(part)


# --- adapters ---


def save_in_own_format(model: AdapterModel, directory: Path) -> None:
    """Whatever the method, without a checksum, as versions before PEFT's format did."""
    directory.mkdir(exist_ok=True)
    (directory / CONFIG_NAME).write_text(json.dumps({"format": "zo_opt/1"} | model.adapter_config.to_dict()))
    (directory / WEIGHTS_NAME).write_bytes(safetensors_bytes(model.adapter_state()))


def save_as_peft(model: AdapterModel, directory: Path) -> None:
    """Without what is zo_opt's in the file."""
    model.export_peft(directory)
    (directory / WEIGHTS_NAME).write_bytes(safetensors_bytes(load_file(directory / WEIGHTS_NAME)))


def own_adapters(directory: Path) -> list[bytes]:
    found = []
    for kind in ADAPTERS:
        options = {"total_steps": 10} if "total_steps" in ADAPTERS[kind].__dataclass_fields__ else {}
        where = {} if kind in ("full", "bitfit", "lisa") else TARGETS_OF
        try:
            model = get_adapter_model(copy.deepcopy(BASE), make_config(kind, where | options))
        except ZOError:  # for transformers alone
            continue
        model.save_pretrained(directory)
        names = (CONFIG_NAME, WEIGHTS_NAME, SCHEDULE_NAME)
        found.append(SEPARATOR.join((directory / n).read_bytes() for n in names if (directory / n).exists()))
        for path in directory.iterdir():
            path.unlink()
    return found


def read_adapter(content: bytes, directory: Path) -> None:
    write(directory, content, CONFIG_NAME, WEIGHTS_NAME, SCHEDULE_NAME)
    load(directory)


def peft_adapters(directory: Path) -> list[bytes]:
    found = []
    configs: list[Any] = [
        LoRAConfig(rank=2, **TARGETS_OF, alpha_pattern={"layers.0.q_proj": 3.0}), DoRAConfig(rank=2, **TARGETS_OF),
        AdaLoRAConfig(rank=3, target_rank=2, total_steps=10, **TARGETS_OF), VeRAConfig(rank=3, **TARGETS_OF),
    ]  # fmt: skip
    for config in configs:
        save_as_peft(get_adapter_model(copy.deepcopy(BASE), config), directory)
        found.append((directory / CONFIG_NAME).read_bytes() + SEPARATOR + (directory / WEIGHTS_NAME).read_bytes())
    config = json.loads((directory / CONFIG_NAME).read_text())
    assert config["peft_type"] == "VERA"
    first = found[0].split(SEPARATOR)
    values = json.loads(first[0]) | {"alpha_pattern": {"^layers.0.q_proj": 2, "v_proj": 5}}
    return [*found, json.dumps(values).encode() + SEPARATOR + first[1]]


def lying_headers(directory: Path) -> list[bytes]:
    """A header alone; its length and some data are put around it."""
    save_in_own_format(get_adapter_model(copy.deepcopy(BASE), LoRAConfig(rank=8, **TARGETS_OF)), directory)
    content = (directory / WEIGHTS_NAME).read_bytes()
    length = int.from_bytes(content[:8], "little")
    return [content[8 : 8 + length]]


def read_header(content: bytes, directory: Path) -> None:
    config = LoRAConfig(rank=8, **TARGETS_OF).to_dict() | {"format": "zo_opt/1"}
    (directory / CONFIG_NAME).write_text(json.dumps(config))
    data = len(content).to_bytes(8, "little") + content + bytes(2048)
    (directory / WEIGHTS_NAME).write_bytes(data)
    load(directory)


# --- journals ---


def journals(directory: Path) -> list[bytes]:
    """The lines without checksums, which are put back: a stranger can."""
    found = []
    for name in ("mezo", "hizoo", "sparse-mezo", "lozo", "zo-adam"):
        model = nn.utils.skip_init(nn.Linear, 3, 2)
        nn.init.ones_(model.weight), nn.init.ones_(model.bias)
        optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01)
        path = directory / name
        with Journal.create(path, optimizer, model) as journal:
            for _ in range(3):
                optimizer.step(lambda model=model: model.weight.square().sum() + model.bias.sum())
                journal.append(optimizer.last_update)
        found.append(b"\n".join(line[:-13] for line in path.read_bytes().splitlines()))
        path.unlink()
    return found


def read_checksummed(content: bytes, directory: Path) -> None:
    path, checksum, lines = directory / "journal", "", []
    for text in content.split(b"\n"):
        checksum, line = make_line(text, checksum)
        lines.append(line)
    path.write_bytes(b"".join(lines))
    read_journal(path, needed=1)
    model = nn.utils.skip_init(nn.Linear, 3, 2)
    nn.init.ones_(model.weight), nn.init.ones_(model.bias)
    replay(path, model)


def whole_journals(directory: Path) -> list[bytes]:
    found = []
    for content in journals(directory):
        checksum, lines = "", []
        for text in content.split(b"\n"):
            checksum, line = make_line(json.loads(text), checksum)
            lines.append(line)
        found.append(b"".join(lines))
    return found


def read_raw_journal(content: bytes, directory: Path) -> None:
    (directory / "journal").write_bytes(content)
    read_journal(directory / "journal")


# --- runs ---


def records(directory: Path) -> list[bytes]:
    del directory
    lora = {"name": "lora", "rank": 2, "layers": [0], "alpha": 2.0}
    config = TrainConfig(adapter=lora, schedule={"name": "stepwise", "milestones": "0:1,5:2"})
    return [
        json.dumps({"command": "zo-opt train", "config": c.to_dict(), "resolved": {"labels": 2}}).encode()
        for c in (config, TrainConfig(), TrainConfig(adapter={"name": "tt-lora", "tt_rank": 3}, schedule="linear"))
    ]


def read_run(content: bytes, directory: Path) -> None:
    (directory / "run.json").write_bytes(content)
    read_config(directory).check()


def tuned() -> tuple[Any, MeZO, Any]:
    model = get_adapter_model(copy.deepcopy(BASE), LoRAConfig(rank=1, **TARGETS_OF))
    optimizer = MeZO([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def checkpoints(directory: Path) -> list[bytes]:
    model, optimizer, scheduler = tuned()
    optimizer.step(lambda: model(torch.ones(1, 8)).square().sum())
    checkpoint.save_checkpoint(directory / checkpoint.NAME, model, optimizer, scheduler, {"progress": {}, "run": {}})
    content = (directory / checkpoint.NAME).read_bytes()
    state = json.dumps(checkpoint.read_state(directory / checkpoint.NAME)).encode()
    (directory / checkpoint.NAME).unlink()
    return [state, content]


def read_checkpoint(content: bytes, directory: Path) -> None:
    """A whole file; or the JSON in it, put into one that is sound."""
    path = directory / checkpoint.NAME
    path.write_bytes(content)
    model, optimizer, scheduler = tuned()
    if content[:1] == b"{":
        tensors = {f"adapter.{n}": t.contiguous() for n, t in model.adapter_state().items()}
        path.write_bytes(safetensors_bytes(tensors, {"state": content.decode("utf-8", "replace")}))
    else:
        checkpoint.newest(directory, lambda _: None)
    checkpoint.step_of(path)
    checkpoint.load_checkpoint(path, model, optimizer, scheduler)


def metrics(directory: Path) -> list[bytes]:
    del directory
    line = {
        "step": 0,
        "epoch": 0,
        "loss": 1.0,
        "lr": 0.1,
        "queries": 1,
        "dropped": 0,
        "forwards": 2,
        "tokens": 8,
        "projected_grads": [1.0],
    }
    return [b"".join(make_metrics_line(line | {"step": i}, 0.5) + b"\n" for i in range(3))]


def read_metric_lines(content: bytes, directory: Path) -> None:
    """With checksums that fit where there is room for one, so that what lines say is looked at."""
    lines = content.split(b"\n")
    for number, line in enumerate(lines):
        with contextlib.suppress(ValueError, KeyError, AttributeError, TypeError, RecursionError):
            values = json.loads(line)
            values.pop("checksum", None)
            lines[number] = make_metrics_line(values, values.pop("seconds"))
    (directory / "metrics.jsonl").write_bytes(b"\n".join(lines))
    (directory / "run.json").write_bytes(records(directory)[0])
    read_metrics(directory)
    Watched(directory).look()


# --- rows and options ---


def tables(directory: Path) -> list[bytes]:
    del directory
    return [
        b"csv" + SEPARATOR + b'text,label\n"a, b",0\nc,1\nd,1\n',
        b"tsv" + SEPARATOR + b"text\tlabel\na\t-1\nb\t2\n",
        b"jsonl" + SEPARATOR + b'{"text": "a", "label": 0}\n{"text": "b \\u00e9", "label": "1"}\n',
        b"txt" + SEPARATOR + b"one\r\ntwo\n",
    ]


def read_table(content: bytes, directory: Path) -> None:
    kind, _, rest = content.partition(SEPARATOR)
    suffix = kind.decode("ascii", "replace") if kind in (b"csv", b"tsv", b"jsonl", b"txt") else "jsonl"
    path = directory / f"rows.{suffix}"
    path.write_bytes(rest)
    rows = read_rows(path)
    labels = column_values(rows, "label", "rows")
    make_examples(
        rows, custom_task(labels, text_column="text", label_column="label", template=None, verbalizers=None), "rows"
    )
    if len(rows) > 1:
        hold_out(rows, 10)


def option_files(directory: Path) -> list[bytes]:
    del directory
    return [
        b"steps: 5\nlr: 1e-3\nadapter:\n  name: lora\n  layers: [1, 2]\n  alpha: 2.0\ntrain_file: null\n",
        b"{steps: 5, adapter: {target_modules: [q_proj], rank_pattern: {q: 3}}, schedule: linear, step_control: none}\n",
    ]


def read_options(content: bytes, directory: Path) -> None:
    (directory / "options.yaml").write_bytes(content)
    line = ["--config", str(directory / "options.yaml")]
    TrainConfig(**parse_arguments(line, lambda: Parser(prog="zo-opt train"))).check()


# --- command lines ---

ODD_VALUES = (
    "", " ", "0", "1", "-1", "2", "16", "1e400", "nan", "-inf", "1e-3", "1.5", "true", "null", "none", "[]", "[0]", "[0.0, 1.0]",
    "{}", '{"name": "adam"}',
    "{", "*x", "!!python/object:os.system", "a:b", "os:system", "lora", "tt", "full", "lisa", "mezo", "zo-adam", "adamw", "grzo", "forward-gradient",
    "adam", "gaussian", "low-rank", "linear", "stepwise", "every-example", "variance", "clip", "split", "batched", "distributed", "data", "2x4",
    "classification", "generation", "accuracy", "f1", "int4", "disk", "sst2", "arithmetic", "lm", "{text} It was", "0=a,1=b", "\x00",
    "\ud800", "é" * 9, "9" * 400,
)  # fmt: skip
LINE_OPTIONS = [f.name for group in GROUPS for f in fields(group)]
OWN_OPTIONS = [
    f"{part}.{option}" for part in PARTS for name in TABLES[part] for option in own_options(part, TABLES[part][name])
]


def read_line(content: bytes, directory: Path) -> None:
    """A line drawn with the content as seed: some options, of the run and of its parts, with odd values."""
    rng, line = random.Random(content), []
    for _ in range(rng.randint(1, 7)):
        name = rng.choice(LINE_OPTIONS if rng.random() < 0.7 else OWN_OPTIONS)
        name = name[:-1] if rng.random() < 0.05 else name
        value = rng.choice(ODD_VALUES)
        line += [[f"--{name}", value], [f"--{name}={value}"], [f"--{name}"]][rng.choices((0, 1, 2), (8, 3, 1))[0]]
    TrainConfig(**parse_arguments(line, lambda: Parser(prog="zo-opt train"))).check()


# --- a comparison's directory ---


def comparisons(directory: Path) -> list[bytes]:
    del directory
    side = {"loss": 0.5, "accuracy": 0.8, "row_scores": [1.0, 0.0, 1.0], "row_weights": None, "rows": 3}
    results = {
        "before": side, "after": side, "metric": "accuracy", "lr": 0.1, "batch_size": 16, "trainable": 5, "trainable_end": 5,
        "adapter_bytes": 20, "train_peak_memory": 1000, "steps": 3, "forwards": 6,
    }  # fmt: skip
    record = {"command": "zo-opt compare", "options": plain(CompareConfig()), "base": TrainConfig().to_dict()}
    text = side | {"perplexity": 1e90, "loss": 207.0, "row_scores": [206.0, None, 208.0], "row_weights": [1, 2, 3]}
    language = results | {"before": text, "after": text, "metric": "perplexity"}
    kinds = (
        ("record", record),
        ("outcome", {"state": "finished", "reason": ""}),
        ("results", results),
        ("results", language),
    )
    return [kind.encode() + SEPARATOR + json.dumps(values).encode() for kind, values in kinds]


def read_comparison(content: bytes, directory: Path) -> None:
    """One of its files changed, the others as they were; taken up again and summed up."""
    files = dict(one.split(SEPARATOR, 1) for one in comparisons(directory))
    kind, _, rest = content.partition(SEPARATOR)
    files[kind] = rest
    run = directory / "runs" / "mezo" / "seed-0"
    run.mkdir(parents=True, exist_ok=True)
    places = {
        b"record": directory / "compare.json",
        b"outcome": run.with_name("seed-0.json"),
        b"results": run / "results.json",
    }
    for name, path in places.items():
        path.write_bytes(files[name])
    (run / "metrics.jsonl").write_bytes(metrics(directory)[0])
    options, base, _ = resumed_options(CompareConfig(output_dir=directory, resume=True), TrainConfig(), ())
    for method in check(options):
        run_config(base, method).check()
    runs = [OneRun("mezo", TrainConfig(output_dir=run, lr=0.1))]
    summarise("mezo", runs, runs)
    best_lr(runs)


TARGETS = {
    "adapter": Target(own_adapters, read_adapter),
    "peft": Target(peft_adapters, read_adapter),
    "safetensors": Target(lying_headers, read_header),
    "journal": Target(journals, read_checksummed),
    "raw_journal": Target(whole_journals, read_raw_journal),
    "run": Target(records, read_run),
    "checkpoint": Target(checkpoints, read_checkpoint),
    "metrics": Target(metrics, read_metric_lines),
    "rows": Target(tables, read_table),
    "tables": Target(odd_tables, read_odd_table),
    "options": Target(option_files, read_options),
    "lines": Target(lambda directory: [b"73", b"140"], read_line),
    "comparison": Target(comparisons, read_comparison),
}


# --- changes ---

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 10**9, 10**12, -(10**18), 2**63, 10**30, 1e308, -0.0, 0.5, 1e-320, "", "x", "é\u202e", "\x00",
    "../../etc/passwd", "(a+)+$", "(.*)*b", "((x{999}){999}){999}", "q_proj", "layers.0.q_proj", "layers", "lora", "nan", "9" * 5000,
    [], [[]], [0], [None], ["q_proj"], {}, {"a": 1}, {"q_proj": 10**9}, {"": 0}, [1] * 50, list(range(300)),
)  # fmt: skip
TOKENS = (
    b"NaN", b"Infinity", b'"\\ud800"', b"[" * 3000, b'{"a":' * 3000, b"null", b"1e999", b"9" * 5000, b"\xff\xfe", b"\x00", b"\n", b"\r", b'"', b",",
    b"\t", SEPARATOR, b"&a [*a]", b"&a [1]\nb: *a", b"!!python/object/apply:os.system [id]", b"*a", b"? ", b"- ", b": ", b"{}", b"[]", b"<<: ",
)  # fmt: skip


def mutate(rng: random.Random, content: bytes) -> bytes:
    """One input more, from a valid one: one to three changes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        content = (_change_json if rng.random() < 0.6 else _change_bytes)(rng, content)
    return content


def _change_json(rng: random.Random, content: bytes) -> bytes:
    """Another value somewhere in one of the JSON texts of the input, which are files or lines."""
    mark = SEPARATOR if SEPARATOR in content else b"\n"
    parts = content.split(mark)
    number = rng.randrange(len(parts))
    try:
        value = json.loads(parts[number])
    except (ValueError, RecursionError):
        return _change_bytes(rng, content)
    places = list(_places(value))
    if not places:
        parts[number] = _text(rng.choice(HOSTILE))
        return mark.join(parts)
    holder, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice((*map(str, HOSTILE[17:27]), key + "x"))] = rng.choice(HOSTILE)
    elif kind == 2:
        other, where = rng.choice(places)
        holder[key] = (
            copy.deepcopy(other.get(where) if isinstance(other, dict) else other[where % len(other)]) if other else None
        )
    else:
        holder[key] = rng.choice(HOSTILE)
    parts[number] = _text(value)
    return mark.join(parts)


def _text(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _change_bytes(rng: random.Random, content: bytes) -> bytes:
    place, kind = rng.randrange(len(content) + 1), rng.randrange(6)
    end = min(len(content), place + rng.choice((1, 1, 4, 16, 100)))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + content[end:]
    if kind == 2:
        return content[:place] + rng.choice(TOKENS) + content[place:]
    if kind == 3:
        return content[:place] + rng.choice(TOKENS) + content[end:]
    if kind == 4:
        return content[:end] + content[place:]
    flipped = bytes(b ^ (1 << rng.randrange(8)) for b in content[place:end])
    return content[:place] + flipped + content[end:]
