"""Any LightningModule and DataModule as a client of a Flower federation.

w, round ──▶ module ──▶ Trainer.fit ──▶ y                     reply: y, or C(w - y + e) with e kept here
               ▲ local_keys: kept here, never sent
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_distopt.compressors import Compressor
from lightning_distopt.compressors.base import wide
from lightning_distopt.federated.conversation import NAME_KEY, NAME_RECORD
from lightning_distopt.federated.local_training import LocalWork, fit, validate
from lightning_distopt.federated.options import upload_compressor
from lightning_distopt.federated.records import (
    BASE_ROUND,
    COMPRESSED_KEY,
    COMPRESSOR_KEY,
    NUM_EXAMPLES,
    PROX_KEY,
    ROUND_KEY,
    SEED_KEY,
    array_of_payload,
    tensors_of,
    to_record,
)
from lightning_distopt.federated.sampling import key_of

__all__ = ["lightning_client_app", "shared_state"]

ModuleFactory = Callable[[], LightningModule]
DataFactory = Callable[[int, int], LightningDataModule]
_LOCAL, _RESIDUAL, _OPTIMIZERS = "local-arrays", "residual", "optimizers"


def shared_state(module: LightningModule, local_keys: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the entries of a module's state that travel: all but those that match a pattern of ``local_keys``.

    Raises:
        TypeError: if ``local_keys`` is one text, or the state holds something else than tensors.
    """
    if isinstance(local_keys, str):  # its letters would be patterns, and `*` one of them
        raise TypeError(f"`local_keys` must be a sequence of patterns: got {local_keys!r}. Use `[{local_keys!r}]`.")
    state = module.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise TypeError(
            f"The state of {type(module).__name__} must hold tensors only: {len(odd)} entries are others, such as {odd[:3]}. "
            "Keep what `get_extra_state` returns in a buffer."
        )
    return {
        name: tensor for name, tensor in state.items() if not any(fnmatchcase(name, pattern) for pattern in local_keys)
    }


def lightning_client_app(
    module_factory: ModuleFactory,
    datamodule_factory: DataFactory,
    *,
    local_steps: int | None = None,
    local_epochs: int | None = None,
    optimizer_state: Literal["fresh", "kept"] = "fresh",
    prox: float = 0.0,
    local_keys: Sequence[str] = (),
    trainer: dict[str, Any] | None = None,
    mods: Sequence[Mod] = (),
) -> ClientApp:
    """Return a Flower ``ClientApp`` that trains and evaluates with Lightning.

    Uploads are compressed where the server asks for it (``FedMom(compressor="topk:0.01")``); what is left out is kept in the
    client's state and sent later, if the compressor is contractive. Client, round and the server's seed decide all randomness.

    Args:
        module_factory: makes the module; without arguments.
        datamodule_factory: makes the data of one client from ``(partition, partitions)``, numbers from Flower's node config.
            A node config with ``client-name`` names the client; else its partition does.
        local_steps: optimizer steps in a round; give this or ``local_epochs``.
        local_epochs: passes over the client's data in a round.
        optimizer_state: ``"fresh"`` each round, or ``"kept"`` in the client's state.
        prox: weight of FedProx's term ``(mu/2) |y - w|²``, at least 0; a ``proximal-mu`` from the server comes before it.
        local_keys: patterns (``"head.*"``) of entries that stay on the client: never sent, never overwritten.
        trainer: arguments of the Trainer; the defaults are quiet.
        mods: of Flower, around training; for example ``LocalDpMod(...)``, not together with compressed uploads.

    Raises:
        TypeError: if ``local_keys`` is one text.
        ValueError: if a number is out of range.

    Example:
        ``app = lightning_client_app(MyModule, lambda part, of: MyData(part, of), local_epochs=1)``
    """
    work = LocalWork(local_steps, local_epochs, optimizer_state, prox, dict(trainer or {}))
    if isinstance(local_keys, str):
        raise TypeError(f"`local_keys` must be a sequence of patterns: got {local_keys!r}. Use `[{local_keys!r}]`.")
    local_keys = tuple(local_keys)
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict({NAME_RECORD: ConfigRecord({NAME_KEY: _name(context)})}), reply_to=message)

    @app.train(mods=list(mods))
    def train(message: Message, context: Context) -> Message:
        config = _config(message)
        received = _arrays(message)
        with _seeded(config, context):
            module = _module(module_factory, received, context, local_keys)
            mu = float(config.get(PROX_KEY, work.prox))  # type: ignore[arg-type]
            kept = context.state.config_records.get(_OPTIMIZERS)
            state = None if kept is None else kept.get("bytes")
            examples, metrics, state = fit(
                module, datamodule_factory(*_partition(context)), work, mu, state if isinstance(state, bytes) else None
            )
            if state is not None:
                context.state[_OPTIMIZERS] = ConfigRecord({"bytes": state})
            compressor = upload_compressor(str(config[COMPRESSOR_KEY])) if COMPRESSOR_KEY in config else None
            names = config.get(COMPRESSED_KEY, [])
            trained = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
            reply = {name: trained[name] for name in received}
            mine = {name: tensor for name, tensor in trained.items() if name not in received}
            if mine:
                context.state[_LOCAL] = to_record(mine)
            arrays = (
                to_record(reply)
                if compressor is None
                else _compressed(reply, received, names if isinstance(names, list) else [], compressor, context)
            )
        told = MetricRecord({NUM_EXAMPLES: examples, BASE_ROUND: int(config.get(ROUND_KEY, 0)), **metrics})  # type: ignore[arg-type]
        return Message(RecordDict({"arrays": arrays, "metrics": told}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        config = _config(message)
        with _seeded(config, context):
            module = _module(module_factory, _arrays(message), context, local_keys)
            examples, metrics = validate(module, datamodule_factory(*_partition(context)), work)
        told = MetricRecord({NUM_EXAMPLES: examples, BASE_ROUND: int(config.get(ROUND_KEY, 0)), **metrics})  # type: ignore[arg-type]
        return Message(RecordDict({"metrics": told}), reply_to=message)

    return app


def _module(
    factory: ModuleFactory, received: dict[str, Tensor], context: Context, local_keys: Sequence[str]
) -> LightningModule:
    """Return the module with what was received, and what is kept here.

    Raises:
        ValueError: if the server's arrays are not those of the module.
    """
    module = factory()
    shared = shared_state(module, local_keys)
    if set(shared) != set(received):
        odd = sorted(set(shared) ^ set(received))
        raise ValueError(
            f"The server's arrays are not those of {type(module).__name__}: {len(odd)} differ, such as {odd[:3]}. Use the same "
            f"`module_factory` and `local_keys={list(local_keys)}` on both sides."
        )
    kept = context.state.array_records.get(_LOCAL)
    mine = {} if kept is None else tensors_of(kept)
    module.load_state_dict({**module.state_dict(), **received, **mine})
    return module


def _compressed(
    reply: dict[str, Tensor],
    received: dict[str, Tensor],
    names: Sequence[Any],
    compressor: Compressor,
    context: Context,
) -> ArrayRecord:
    """Return payloads of ``w - y + e`` for the names that the server asks for, the rest as it is; keep the residuals."""
    kept = context.state.array_records.get(_RESIDUAL)
    residual = tensors_of(kept) if kept is not None and compressor.contractive else {}
    arrays = to_record({name: tensor for name, tensor in reply.items() if name not in names})
    left = {}
    for number, name in enumerate(name for name in reply if name in names):
        dtype = wide(reply[name].dtype)
        buffer = received[name].to(dtype) - reply[name].to(dtype)
        if name in residual:
            buffer.add_(residual[name])
        arrays[name] = array_of_payload(compressor, buffer, key_of(torch.initial_seed(), "codec", number))
        left[name] = buffer
    if compressor.contractive:
        context.state[_RESIDUAL] = to_record(left)
    return arrays


def _config(message: Message) -> ConfigRecord:
    return next(iter(message.content.config_records.values()), ConfigRecord())


def _arrays(message: Message) -> dict[str, Tensor]:
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise ValueError(f"The server must send one array record: got {len(records)}.")
    return tensors_of(records[0])


def _partition(context: Context) -> tuple[int, int]:
    config = context.node_config
    if "partition-id" not in config or "num-partitions" not in config:
        raise ValueError(
            f"The node config must have `partition-id` and `num-partitions`: got {sorted(config)}. Start the SuperNode with "
            "`--node-config 'partition-id=0 num-partitions=10'`."
        )
    return int(config["partition-id"]), int(config["num-partitions"])


def _name(context: Context) -> str:
    config = context.node_config
    return str(config.get("client-name", config.get("partition-id", context.node_id)))


@contextmanager
def _seeded(config: ConfigRecord, context: Context) -> Iterator[None]:
    """Let the server's seed, the round and the client decide what is random, and leave the generators as they were."""
    seed = key_of(int(config.get(SEED_KEY, 0)), "client", int(config.get(ROUND_KEY, 0)), _name(context))  # type: ignore[arg-type]
    with isolate_rng():
        seed_everything(seed % 2**32, verbose=False)
        yield
