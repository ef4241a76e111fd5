"""The only place where randomness is drawn: seed -> direction ``z``. One file a distribution; add a line to DIRECTIONS for a new one."""

from zo_opt.choices import Table
from zo_opt.directions.base import Directions, MatrixDirections, Shapes, StepDirections, Stream
from zo_opt.directions.gaussian import Gaussian, PhiloxGaussian
from zo_opt.directions.low_rank import LowRank, Subspace
from zo_opt.directions.rademacher import Rademacher
from zo_opt.directions.sign_flip import SignFlip
from zo_opt.directions.sparse import Sparse
from zo_opt.directions.sphere import Sphere

DIRECTIONS: Table[Directions] = Table(
    "directions",
    Directions,
    {
        "gaussian": Gaussian,
        "philox-gaussian": PhiloxGaussian,
        "rademacher": Rademacher,
        "sphere": Sphere,
        "sparse": Sparse,
        "low-rank": LowRank,
        "subspace": Subspace,
        "sign-flip": SignFlip,
    },
)

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
]
