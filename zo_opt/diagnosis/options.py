"""What ``zo-opt diagnose`` can be told beyond the options of a run."""

from dataclasses import dataclass, field
from pathlib import Path

from zo_opt.training.options import PositiveInt

EPS_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass
class DiagnoseConfig:
    """How closely to look.

    Args:
        queries: directions, each on an example of its own.
        eps_grid: values of zo_eps to try.
        out: the picture; numbers beside it as .json.
    """

    queries: PositiveInt = 48
    eps_grid: list[float] = field(default_factory=lambda: list(EPS_GRID))
    out: Path = Path("diagnose.png")
