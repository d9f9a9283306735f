"""What a rank writes beside a checkpoint, and what it finds there again.

Who lost what is said once, in one warning: a checkpoint always loads (unless ``strict_sidecars``), and what cannot be
restored starts from zero, which is a valid state, though the auxiliary point ``x - mean(e) - s`` moves.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.fabric.utilities.apply_func import move_data_to_device
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
    from lightning_distopt.data_parallel import GradientSync, UpdateSync
    from lightning_distopt.strategies.compressed_ddp import CompressedDDPStrategy

__all__ = ["KEY", "RankState"]

KEY = "lightning_distopt"
_FORMAT = 1
_OWN = ("residuals",)  # what differs between ranks in the state of `GradientSync`
_UNITS = {"step_ahead": "parameters", "local": "parameters", "gradient": "gradients", "none": "nothing"}


class RankState:
    """Reads and writes the sidecars of one strategy object.

    Attributes:
        path: the checkpoint that was loaded last.
        lost: sidecars, of all ranks, that could not be used since the start; logged as ``feedback/sidecars_lost``.
    """

    def __init__(self, strategy: CompressedDDPStrategy) -> None:
        self._strategy = strategy
        self._kept: dict[str, Any] | None = None
        self._kept_of: weakref.ref[Any] | None = None
        self.path: str | None = None
        self.lost = 0

    def keep(self) -> None:
        """Keep the engine's state on the CPU when a fit ends, for a checkpoint that is saved afterwards."""
        sync = self._strategy.update_sync or self._strategy.gradient_sync
        if sync is not None:
            self._kept = move_data_to_device(sync.state_dict(), "cpu")
            self._kept_of = weakref.ref(self._strategy.lightning_module)

    def go_on(self, sync: UpdateSync | GradientSync) -> None:
        """Let another fit of the same module in the same processes continue with the residuals of the one before."""
        if self._kept is not None and self._kept_of is not None and self._kept_of() is self._strategy.lightning_module:
            sync.load_state_dict(move_data_to_device(self._kept, self._strategy.root_device))

    # ---- write ------------------------------------------------------------------------------------------------------

    def write(self, checkpoint: dict[str, Any], filepath: Any) -> None:
        """Mark the checkpoint and write this rank's sidecar; none for a weights-only checkpoint, or before any fit."""
        strategy = self._strategy
        sync = strategy.update_sync or strategy.gradient_sync
        state = self._kept if sync is None else sync.state_dict()
        if "optimizer_states" not in checkpoint or state is None:
            return
        checkpoint[KEY] = header = {
            "format": _FORMAT,
            "world_size": strategy.world_size,
            "algorithm": strategy.strategy_name,
            "error_feedback": strategy.error_feedback,
            "save_id": f"{strategy.run_id}-{_moment(checkpoint)}",
            "shared": {} if strategy.sends_updates else {k: v for k, v in state.items() if k not in _OWN},
        }
        if strategy.decision is not None:
            header["decision"] = strategy.decision
        if not strategy.sends_updates:
            state = {key: value for key, value in state.items() if key in _OWN}
        # Where gradients are averaged all ranks' optimizers are alike; rank 0's is in the checkpoint.
        own = strategy.sends_updates and strategy.global_rank > 0
        content = {
            "save_id": header["save_id"],
            "rank": strategy.global_rank,
            "state": state,
            "optimizers": [optimizer.state_dict() for optimizer in strategy.optimizers] if own else [],
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

        A collective: all ranks learn which files cannot be used.

        Raises:
            SidecarError: on all ranks, if a sidecar is missing, unreadable or of another save, and ``strict_sidecars=True``.
        """
        header = checkpoint.get(KEY)
        strategy = self._strategy
        sync = strategy.update_sync or strategy.gradient_sync
        if self.path is None or header is None or sync is None:
            rank_zero_info("The checkpoint was not written by `compressed_ddp`: residuals start from zero.")
            return checkpoint
        if strategy.gradient_sync is not None:
            strategy.gradient_sync.load_state_dict(header["shared"])
        before, now = header["error_feedback"], strategy.error_feedback
        if before != "none" and _UNITS[before] != _UNITS[now]:
            rank_zero_warn(
                f"The checkpoint was written with `error_feedback={before!r}` and this run has {now!r}: the "
                "residuals beside it, what the ranks had not sent yet, are left out. Resume with the same `error_feedback` "
                "for an exact continuation."
            )
            return checkpoint
        if header["world_size"] == strategy.world_size:
            return self._read_own(checkpoint, header)
        self._read_all(header)
        return checkpoint

    def _read_own(self, checkpoint: Mapping[str, Any], header: Mapping[str, Any]) -> Mapping[str, Any]:
        strategy = self._strategy
        mine = self._read([strategy.global_rank], header, ("state", "random", "optimizers"))[0]
        if mine is None:
            return checkpoint
        state, random, optimizers = mine
        self._load(state, header)
        restore_random_states(random)
        return {**checkpoint, "optimizer_states": optimizers} if optimizers else checkpoint

    def _read_all(self, header: Mapping[str, Any]) -> None:
        strategy, world = self._strategy, int(header["world_size"])
        assert self.path is not None
        merged = "residuals were merged so that their mean over ranks is kept, and " if strategy.uses_residuals else ""
        rank_zero_warn(
            f"`{os.path.basename(self.path)}.ranks` was written by {world} processes and this run has "
            f"{strategy.world_size}: {merged}every rank continues with rank 0's optimizer state and random numbers of its "
            f"own. Resume with {world} devices for an exact continuation."
        )
        if strategy.uses_residuals:
            states = self._read(range(world), header, ("state",))
            self._load(merge_states([None if s is None else s[0] for s in states]), header)

    def _load(self, state: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        if self._strategy.update_sync is not None:
            self._strategy.update_sync.load_state_dict(state)
        if self._strategy.gradient_sync is not None:
            self._strategy.gradient_sync.load_state_dict({**header["shared"], **state})

    def _read(self, ranks: Iterable[int], header: Mapping[str, Any], keys: Sequence[str]) -> list[list[Any] | None]:
        """Return these parts of the ranks' sidecars, ``None`` for one that cannot be used."""
        found: list[list[Any] | None] = []
        reasons: dict[int, str] = {}
        for rank in ranks:
            try:
                content = self._checked(rank, header)
                found.append([content[key] for key in keys])
            except Exception as error:  # a damaged file raises what it will
                found.append(None)
                missing = isinstance(error, FileNotFoundError)
                reasons[rank] = "it does not exist" if missing else f"{type(error).__name__}: {error}".splitlines()[0]
        everyones: list[dict[int, str]] = [{}] * self._strategy.world_size
        dist.all_gather_object(everyones, reasons)
        self._report({rank: reason for theirs in everyones for rank, reason in theirs.items()})
        return found

    def _checked(self, rank: int, header: Mapping[str, Any]) -> dict[str, Any]:
        assert self.path is not None
        content = read_sidecar(self.path, rank)
        if content.get("save_id") != header["save_id"] or content.get("rank") != rank:
            raise ValueError("it belongs to another save")
        return content

    def _report(self, reasons: Mapping[int, str]) -> None:
        if not reasons:
            return
        assert self.path is not None
        which = "; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(reasons.items()))
        message = f"{len(reasons)} sidecars in `{os.path.basename(self.path)}.ranks` could not be used ({which})"
        if self._strategy.strict_sidecars:
            raise SidecarError(
                f"{message}. Restore the files, or pass `strict_sidecars=False` to start their residuals from zero."
            )
        self.lost += len(reasons)
        rank_zero_warn(
            f"{message}: these residuals and local optimizer states are lost, so the auxiliary point moves once; training "
            "continues from a valid state. Pass `strict_sidecars=True` to make this an error."
        )


def _moment(checkpoint: Mapping[str, Any]) -> str:
    """When in the run a save happens, which all ranks know without talking."""
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    batches = loops.get("epoch_loop.batch_progress", {}).get("total", {}).get("completed", 0)
    return f"{checkpoint.get('epoch')}-{checkpoint.get('global_step')}-{batches}"
