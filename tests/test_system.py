"""What the package asks of the machine: it works where Unix's modules are missing, and locks hold between processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from zo_opt.system.files import try_lock

WITHOUT_UNIX = """
import sys
import psutil  # of Linux, it has resource from there
for name in ("fcntl", "resource"):
    sys.modules[name] = None
import zo_opt
assert "transformers" not in sys.modules
import zo_opt.training.loop
from pathlib import Path
from zo_opt.record.output import output_directory, writer
from zo_opt.system.files import GrowingFile
out = Path(sys.argv[1])
with output_directory(out):
    assert writer(out) is None  # nobody can tell without locks
    file = GrowingFile(out / "lines")
    file.append(b"one")
    file.close()
assert (out / "lines").read_bytes() == b"one\\n"
"""


def test_without_fcntl_and_resource(tmp_path: Path) -> None:
    """As on Windows."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_UNIX, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert found.returncode == 0, found.stderr


def test_a_lock_is_one_processs_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    hold = "import sys; from zo_opt.system.files import try_lock; f = open(sys.argv[1]); print(try_lock(f.fileno()), flush=True); input()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with path.open() as file:
            assert not try_lock(file.fileno())
        holder.kill()
        holder.wait()
    with path.open() as file:
        assert try_lock(file.fileno())
