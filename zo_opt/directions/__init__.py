"""The only place where randomness is drawn: seed -> direction ``z``. One file a distribution; add a row here for a new one."""

from zo_opt.directions.base import Directions, MatrixDirections, Shapes, StepDirections, Stream
from zo_opt.directions.gaussian import Gaussian, PhiloxGaussian
from zo_opt.directions.low_rank import LowRank, Subspace
from zo_opt.directions.rademacher import Rademacher
from zo_opt.directions.sign_flip import SignFlip
from zo_opt.directions.sparse import Sparse
from zo_opt.directions.sphere import Sphere
from zo_opt.errors import ZOError

DIRECTIONS: dict[str, type[Directions]] = {
    d.name: d for d in (Gaussian, PhiloxGaussian, Rademacher, Sphere, Sparse, LowRank, Subspace, SignFlip)
}

__all__ = [
    "DIRECTIONS",
    "Directions",
    "Gaussian",
    "LowRank",
    "MatrixDirections",
    "PhiloxGaussian",
    "Rademacher",
    "Shapes",
    "SignFlip",
    "Sparse",
    "Sphere",
    "StepDirections",
    "Stream",
    "Subspace",
    "get_directions",
]


def get_directions(directions: str | Directions) -> Directions:
    """The distribution of that name with its default settings (or the given one itself).

    Raises:
        ZOError: there is none of that name.

    >>> get_directions("rademacher").name
    'rademacher'
    """
    if isinstance(directions, Directions):
        return directions
    if directions not in DIRECTIONS:
        raise ZOError(f"directions={directions!r} is not known; choose one of {', '.join(DIRECTIONS)}.")
    return DIRECTIONS[directions]()
