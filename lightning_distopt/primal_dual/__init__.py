"""Linear models over many workers by primal-dual coordinate ascent: ACPD, CoCoA, CoCoA+, DisDCA."""

try:
    import numba  # noqa: F401
    import scipy.sparse  # noqa: F401
    import sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"`lightning_distopt.primal_dual` needs numba, scipy and scikit-learn: {error}. "
        'Run `pip install "lightning-distopt[primal-dual]"`.'
    ) from error

from lightning_distopt.primal_dual.certificate import Certificate, Row
from lightning_distopt.primal_dual.config import PRESETS, Config, preset
from lightning_distopt.primal_dual.estimators import ACPDClassifier, ACPDRegressor
from lightning_distopt.primal_dual.libsvm import read_libsvm
from lightning_distopt.primal_dual.losses import LOSSES, Loss
from lightning_distopt.primal_dual.server import Server
from lightning_distopt.primal_dual.shard import Shard
from lightning_distopt.primal_dual.simulate import Cluster, Simulation, simulate
from lightning_distopt.primal_dual.split import shards_of
from lightning_distopt.primal_dual.worker import Worker

__all__ = [
    "LOSSES",
    "PRESETS",
    "ACPDClassifier",
    "ACPDRegressor",
    "Certificate",
    "Cluster",
    "Config",
    "Loss",
    "Row",
    "Server",
    "Shard",
    "Simulation",
    "Worker",
    "preset",
    "read_libsvm",
    "shards_of",
    "simulate",
]
