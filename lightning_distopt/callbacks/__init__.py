"""Callbacks: learning rates of large batches, the exploit point of RSGD, and what the network carries."""

from lightning_distopt.callbacks.communication_monitor import CommunicationMonitor
from lightning_distopt.callbacks.exploit_point import ExploitPoint
from lightning_distopt.callbacks.gradual_warmup import GradualWarmup
from lightning_distopt.callbacks.layerwise_rate_scaling import LayerwiseRateScaling
from lightning_distopt.callbacks.linear_scaling import LinearScaling
from lightning_distopt.callbacks.polynomial_schedule import PolynomialSchedule

__all__ = [
    "CommunicationMonitor",
    "ExploitPoint",
    "GradualWarmup",
    "LayerwiseRateScaling",
    "LinearScaling",
    "PolynomialSchedule",
]
