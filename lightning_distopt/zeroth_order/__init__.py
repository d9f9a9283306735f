"""Zeroth-order proximal methods: for models that can be asked but not differentiated (arXiv:1902.06158)."""

from lightning_distopt.zeroth_order.base import ZeroOrderOptimizer
from lightning_distopt.zeroth_order.black_box import BlackBoxModule
from lightning_distopt.zeroth_order.estimators import (
    CoordinateEstimator,
    Estimator,
    GaussianEstimator,
    SphereEstimator,
)
from lightning_distopt.zeroth_order.prox_saga import ZOProxSAGA
from lightning_distopt.zeroth_order.prox_sgd import ZOProxSGD
from lightning_distopt.zeroth_order.prox_svrg import ZOProxSVRG
from lightning_distopt.zeroth_order.retry import RetryPolicy
from lightning_distopt.zeroth_order.step_loader import StepLoader

__all__ = [
    "BlackBoxModule",
    "CoordinateEstimator",
    "Estimator",
    "GaussianEstimator",
    "RetryPolicy",
    "SphereEstimator",
    "StepLoader",
    "ZOProxSAGA",
    "ZOProxSGD",
    "ZOProxSVRG",
    "ZeroOrderOptimizer",
]
