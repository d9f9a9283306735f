"""Averages of payloads over ``torch.distributed``, byte for byte counted."""

from lightning_distopt.exchange.all_gather import AllGatherExchange
from lightning_distopt.exchange.all_reduce import AllReduceExchange
from lightning_distopt.exchange.base import Exchange, Means, Steps, overlap
from lightning_distopt.exchange.meter import Meter
from lightning_distopt.exchange.sharded_server import ServerResidual, ShardedServerExchange

__all__ = [
    "AllGatherExchange",
    "AllReduceExchange",
    "Exchange",
    "Means",
    "Meter",
    "ServerResidual",
    "ShardedServerExchange",
    "Steps",
    "overlap",
]
