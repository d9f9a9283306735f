"""Federated learning across machines that come and go, on Flower (extra ``federated``).

:class:`FedMom` is a strategy of Flower's, :func:`lightning_client_app` makes a client of any LightningModule and DataModule,
:func:`lightning_server_app` runs the two together. Partitions and the privacy accountant need no Flower.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_distopt.federated.privacy import Privacy
from lightning_distopt.federated.screening import Screening
from lightning_distopt.federated.stopping import RoundStopping

if TYPE_CHECKING:
    from lightning_distopt.federated.client import lightning_client_app
    from lightning_distopt.federated.conversation import Deadline
    from lightning_distopt.federated.fedmom import FedMom
    from lightning_distopt.federated.in_process import InProcessGrid
    from lightning_distopt.federated.server import lightning_server_app
    from lightning_distopt.federated.service import Service

__all__ = [
    "Deadline",
    "FedMom",
    "InProcessGrid",
    "Privacy",
    "RoundStopping",
    "Screening",
    "Service",
    "lightning_client_app",
    "lightning_server_app",
]

_NEED_FLOWER = {
    "Deadline": "conversation",
    "FedMom": "fedmom",
    "InProcessGrid": "in_process",
    "Service": "service",
    "lightning_client_app": "client",
    "lightning_server_app": "server",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_FLOWER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_NEED_FLOWER[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "flwr":
            raise ModuleNotFoundError(
                f"`{name}` needs Flower: pip install 'lightning-distopt[federated]' (Python >= 3.11).", name="flwr"
            ) from error
        raise
