"""What a rank writes beside a checkpoint, and what it finds there again.

Who lost what is said once, in one warning: a checkpoint always loads (unless ``strict_sidecars``), and what cannot be
restored starts from zero, which is a valid state, though the auxiliary point ``x - mean(e) - s`` moves.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_distopt.data_parallel.merge import merge_states
from lightning_distopt.errors import SidecarError
from lightning_distopt.strategies.checkpoint import (
    collect_random_states,
    read_sidecar,
    remove_sidecars,
    restore_random_states,
    write_sidecar,
)

if TYPE_CHECKING:
    from lightning_distopt.strategies.compressed_ddp import CompressedDDPStrategy

__all__ = ["RankState"]

_KEY = "lightning_distopt"
_FORMAT = 1


class RankState:
    """Reads and writes the sidecars of one strategy object.

    Attributes:
        path: the checkpoint that was loaded last.
        lost: sidecars that could not be read since the start; logged as ``feedback/sidecars_lost``.
    """

    def __init__(self, strategy: CompressedDDPStrategy) -> None:
        self._strategy = strategy
        self.path: str | None = None
        self.lost = 0

    # ---- write ------------------------------------------------------------------------------------------------------

    def write(self, checkpoint: dict[str, Any], filepath: Any) -> None:
        """Mark the checkpoint and write this rank's sidecar; a weights-only checkpoint gets none."""
        if "optimizer_states" not in checkpoint:
            return
        strategy = self._strategy
        header = {
            "format": _FORMAT,
            "world_size": strategy.world_size,
            "algorithm": strategy.strategy_name,
            "error_feedback": strategy.error_feedback,
            "save_id": f"{strategy.run_id}-{_moment(checkpoint)}",
        }
        checkpoint[_KEY] = header
        sync = strategy.update_sync or strategy.gradient_sync
        content = {
            **header,
            "rank": strategy.global_rank,
            "state": {} if sync is None else sync.state_dict(),
            # rank 0's optimizers are in the checkpoint itself
            "optimizers": [] if strategy.global_rank == 0 else [o.state_dict() for o in strategy.optimizers],
            "random": collect_random_states(),
        }
        write_sidecar(os.fspath(filepath), strategy.global_rank, content)

    @rank_zero_only
    def remove(self, filepath: Any) -> None:
        """Delete the sidecars together with their checkpoint."""
        remove_sidecars(os.fspath(filepath))

    # ---- read -------------------------------------------------------------------------------------------------------

    def read(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        """Restore this rank from the sidecars of the loaded checkpoint; return the checkpoint with its own optimizers.

        Raises:
            SidecarError: if a sidecar is missing, unreadable or of another save, and ``strict_sidecars=True``.
        """
        header = checkpoint.get(_KEY)
        if self.path is None or header is None:
            rank_zero_info("The checkpoint was not written by `compressed_ddp`: residuals start from zero.")
            return checkpoint
        strategy = self._strategy
        sync = strategy.update_sync or strategy.gradient_sync
        if sync is None:
            return checkpoint
        world = int(header["world_size"])
        if world == strategy.world_size:
            mine = self._try_read(strategy.global_rank, header)
            if mine is None:
                return checkpoint
            sync.load_state_dict(mine["state"])
            restore_random_states(mine["random"])
            if mine["optimizers"]:
                return {**checkpoint, "optimizer_states": mine["optimizers"]}
            return checkpoint
        rank_zero_warn(
            f"`{os.path.basename(self.path)}.ranks` was written by {world} processes and this run has "
            f"{strategy.world_size}: residuals were merged so that their mean over ranks is kept, and every rank continues "
            f"with rank 0's optimizer state. Resume with {world} devices for an exact continuation."
        )
        if strategy.uses_residuals:
            contents = [self._try_read(rank, header) for rank in range(world)]
            sync.load_state_dict(merge_states([None if c is None else c["state"] for c in contents]))
        return checkpoint

    def _try_read(self, rank: int, header: Mapping[str, Any]) -> dict[str, Any] | None:
        assert self.path is not None
        try:
            content = read_sidecar(self.path, rank)
            if content.get("save_id") != header["save_id"] or content.get("rank") != rank:
                raise ValueError("it belongs to another save")
        except Exception as error:  # a damaged file raises what it will
            reason = "it does not exist" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
            reason = reason.splitlines()[0]
            message = f"The sidecar of rank {rank} beside `{os.path.basename(self.path)}` could not be used ({reason})"
            if self._strategy.strict_sidecars:
                raise SidecarError(
                    f"{message}. Restore the file, or pass `strict_sidecars=False` to start its residual from zero."
                ) from error
            self.lost += 1
            warnings.warn(
                f"{message}: its residual and local optimizer state are lost, so the auxiliary point moves once; training "
                "continues from a valid state. Pass `strict_sidecars=True` to make this an error.",
                stacklevel=2,
            )
            return None
        return content


def _moment(checkpoint: Mapping[str, Any]) -> str:
    """When in the run a save happens, which all ranks know without talking."""
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    batches = loops.get("epoch_loop.batch_progress", {}).get("total", {}).get("completed", 0)
    return f"{checkpoint.get('epoch')}-{checkpoint.get('global_step')}-{batches}"
