"""Several processes on one run: what they share, and how they find each other."""

from zo_opt.distributed.processes import (
    WITHIN,
    Distributed,
    launched_rank,
    meet,
    part_of,
    process_group,
    world_size,
)
from zo_opt.errors import RankError

__all__ = ["WITHIN", "Distributed", "RankError", "launched_rank", "meet", "part_of", "process_group", "world_size"]
