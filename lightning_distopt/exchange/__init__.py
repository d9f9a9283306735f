"""Averages of payloads over ``torch.distributed``, byte for byte counted."""

from lightning_distopt.exchange.all_gather import AllGatherExchange
from lightning_distopt.exchange.all_reduce import AllReduceExchange
from lightning_distopt.exchange.base import Exchange, Means, Steps, overlap
from lightning_distopt.exchange.compressed_mean import CompressedMean
from lightning_distopt.exchange.failure import ask_around, network_failures
from lightning_distopt.exchange.majority_vote import MajorityVote
from lightning_distopt.exchange.meter import Meter
from lightning_distopt.exchange.power_sgd import PowerSGDMean
from lightning_distopt.exchange.scalars import ScalarGather
from lightning_distopt.exchange.sharded_server import ServerResidual, ShardedServerExchange
from lightning_distopt.exchange.tensor_mean import TensorMean

__all__ = [
    "AllGatherExchange",
    "AllReduceExchange",
    "CompressedMean",
    "Exchange",
    "MajorityVote",
    "Means",
    "Meter",
    "PowerSGDMean",
    "ScalarGather",
    "ServerResidual",
    "ShardedServerExchange",
    "Steps",
    "TensorMean",
    "ask_around",
    "network_failures",
    "overlap",
]
