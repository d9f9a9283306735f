"""Ranks that exist already (torchrun, SLURM, Lightning Fabric), each with a shard of its own.

every rank   reads its shard, tells the others its width, labels and weights (or what is wrong with it)
rank 0       serves and works; the model is equal on all ranks at the end, dual variables stay where their samples are
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import scipy.sparse as sp
import torch.distributed as dist
from numpy.typing import NDArray

from lightning_distopt.errors import DataError
from lightning_distopt.primal_dual.certificate import Certificate, Row
from lightning_distopt.primal_dual.checkpoints import Checkpoint, CheckpointFile, Start
from lightning_distopt.primal_dual.config import Config
from lightning_distopt.primal_dual.ranks import Hooks, Rank, run_rank
from lightning_distopt.primal_dual.shard import Shard
from lightning_distopt.primal_dual.worker import Worker

__all__ = ["Ranks", "agreed", "checkpoint_path", "solve_on_ranks", "these_ranks", "widened"]

Array = NDArray[np.float64]
_LONGEST_WAIT = timedelta(seconds=600)


@dataclass(frozen=True)
class Ranks:
    """The ranks of a fit.

    Attributes:
        rank: of this process.
        world: number of them.
        group: a Gloo group of all.
    """

    rank: int
    world: int
    group: Any


def these_ranks(fabric: Any = None) -> Ranks | None:
    """Return the ranks that this process is one of, with a Gloo group of their own; ``None`` if it is alone.

    Args:
        fabric: a launched ``lightning.Fabric``; ``None`` takes the process group that exists, or, started by ``torchrun``,
            launches a Fabric on CPUs.
    """
    if fabric is None and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from lightning.fabric import Fabric

        world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        fabric = Fabric(accelerator="cpu", strategy="ddp", devices=local, num_nodes=world // local)
        fabric.launch()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)  # its time-out is not that of the default group
    return Ranks(dist.get_rank(), dist.get_world_size(), group)


def agreed(ranks: Ranks, own: Callable[[], Any]) -> list[Any]:
    """Return what ``own()`` gave on each rank.

    Raises:
        DataError: on all ranks, if it failed on any: so none waits for one that has stopped.
    """
    try:
        told: tuple[Any, str | None] = (own(), None)
    except (ValueError, TypeError, OSError) as error:
        told = (None, f"{type(error).__name__}: {error}")
    found: list[Any] = [None] * ranks.world
    dist.all_gather_object(found, told, group=ranks.group)
    wrong = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(found) if text is not None]
    if wrong:
        raise DataError(f"A shard cannot be used, {'; '.join(wrong)}")
    return [content for content, _ in found]


def widened(x: Any, columns: int) -> Any:
    """Return samples with so many columns; arrays are shared."""
    return sp.csr_matrix((x.data, x.indices, x.indptr), shape=(x.shape[0], columns), copy=False)


def solve_on_ranks(
    shard: Shard,
    config: Config,
    ranks: Ranks,
    run: int,
    on_row: Callable[[Row], None],
    *,
    alpha: Array | None = None,
    file: CheckpointFile | None = None,
    checkpoint_every: int = 0,
    timeout: float = 30.0,
) -> tuple[Array, Array, Certificate, list[Row]]:
    """Take part; return ``(w, this shard's alpha, certificate, history)``, alike on all ranks but for alpha.

    Checkpoints are one file a rank. Should they be of different rounds, they are a valid start all the same, for dual
    variables of different samples are feasible independently.

    Args:
        shard: of this rank.
        config: alike on all.
        ranks: see there.
        run: number of the problem.
        on_row: called on rank 0.
        alpha: dual variables to start from.
        file: of this rank's checkpoint.
        checkpoint_every: certified synchronisations between checkpoints; 0 is none.
        timeout: seconds without life after which a rank is lost.

    Raises:
        WorkerLostError: on rank 0, naming the rank that is lost.
        ProtocolError: on the others then.
    """
    # A private name of torch, kept with the others; looked up late, since it lives on a higher floor.
    from lightning_distopt.strategies.compat import default_store

    start = Start(alpha) if file is None else _agreed_start(file.load(), alpha, ranks)
    before = start.rounds

    def keep(version: int, worker: Worker) -> None:
        if file is not None:
            model = worker.model.copy() if worker.settled else np.empty(0)
            drawn = np.array([worker.drawn] if worker.settled else [], np.int64)
            file.save(Checkpoint(worker.alpha.copy(), before + version, sigma=worker.sigma, drawn=drawn, model=model))

    hooks = Hooks(on_row=on_row, keep=keep, checkpoint_every=checkpoint_every if file is not None else 0)
    place = Rank(ranks.rank, ranks.world, ranks.group, default_store(), run, timeout=timeout)
    model, mine, server = run_rank(shard, config, place, hooks, start)
    box: list[Any] = [None if server is None else (server.certificate, server.history)]
    dist.broadcast_object_list(box, src=0, group=ranks.group)
    if file is not None:
        file.remove()
    certificate, history = cast("tuple[Certificate, list[Row]]", box[0])
    return model, mine, certificate, history


def _agreed_start(kept: Checkpoint | None, alpha: Array | None, ranks: Ranks) -> Start:
    """Return where this rank begins: as if nothing had happened, if all ranks have kept the same round."""
    own = Start(alpha) if kept is None else kept.starts([slice(None)])[0]
    found: list[Any] = [None] * ranks.world
    dist.all_gather_object(found, (own.rounds, own.model is not None), group=ranks.group)
    return own if set(found) == {(own.rounds, True)} else Start(own.alpha, min(rounds for rounds, _ in found))


def checkpoint_path(folder: str | os.PathLike[str], problem: int, ranks: Ranks) -> Path:
    """Return the file of this rank's checkpoint."""
    return Path(folder) / f"problem-{problem}.rank-{ranks.rank}-of-{ranks.world}.npz"
