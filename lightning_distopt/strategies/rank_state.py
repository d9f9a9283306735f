"""What a rank writes beside a checkpoint, and what it finds there again.

A save is a small agreement, by notes in the process group's store rather than by collectives, which a rank that saves
after an exception could not issue in the order of the others:

    [1] every rank writes its sidecar, under the name of this save    [2] all know whether all could
    [3] rank 0 replaces the checkpoint                                [4] all know that, and the old save's sidecars go

So whatever happens in between, the checkpoint that is there has all of its sidecars. Files are read and checked before any
state is touched. Who lost what is said once, in one warning: a checkpoint loads without a sidecar (unless
``strict_sidecars``), and what cannot be restored starts from zero, which is a valid state, though the auxiliary point
``x - mean(e) - s`` moves. Sidecars of another save are refused.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.trainer.states import TrainerFn

from lightning_distopt.data_parallel.merge import merge_states
from lightning_distopt.errors import CheckpointError, SidecarError
from lightning_distopt.exchange.notes import Board
from lightning_distopt.resumable_loader import ResumableLoader
from lightning_distopt.strategies import files
from lightning_distopt.strategies.checkpoint import (
    forget_other_saves,
    forget_save,
    read_sidecar,
    remove_sidecars,
    saves_of,
    write_sidecar,
)
from lightning_distopt.strategies.compat import default_store
from lightning_distopt.strategies.header import KEY, Header, check_sidecar, read_header
from lightning_distopt.strategies.progress import end_unless_inside, is_inside_epoch, places_of, with_places
from lightning_distopt.strategies.random_states import collect_random_states, restore_random_states
from lightning_distopt.strategies.whole import newest_whole_checkpoint

if TYPE_CHECKING:
    from lightning_distopt.data_parallel import GradientSync, UpdateSync
    from lightning_distopt.strategies.compressed_ddp import CompressedDDPStrategy

__all__ = ["RankState"]

_OWN = ("residuals",)  # what differs between ranks in the state of `GradientSync`
_SHARED = ("outer", "flight")  # what does not in that of `UpdateSync`
_UNITS = {"step_ahead": "parameters", "local": "parameters", "gradient": "gradients", "none": "nothing"}
_PATIENCE = 10.0  # seconds that a rank which saves after an exception waits for the others to do so, too
_FOREIGN = "it belongs to another save"


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
        self._board: Board | None = None
        self._saves = 0
        self._last_saves: dict[str, str] = {}
        self._header: Header | None = None
        self._found: dict[str, Any] | None = None
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

    def save(self, checkpoint: dict[str, Any], filepath: Any, write: Callable[[], None]) -> None:
        """Write this rank's sidecar, and on rank 0 the checkpoint; see the module. No sidecar if it has weights only.

        After an exception nothing is raised: where a whole checkpoint cannot be written, a warning says so, and what was
        saved before stays.

        Args:
            checkpoint: of Lightning; gets a header.
            filepath: of the checkpoint.
            write: writes it some other way than to a local file.

        Raises:
            CheckpointError: on all ranks, naming the path and the rank, if a file could not be written.
        """
        path, strategy = os.fspath(filepath), self._strategy
        ending = strategy.is_ending
        if strategy.torn:
            self._warn_of_nothing_written(path, "an exchange failed in the middle of a step, after which ranks differ")
            return
        header = self._mark(checkpoint)
        try:
            if header is not None:
                self._together(path, lambda: self._write_own(checkpoint, header, path), ending)
            self._together(
                path,
                (lambda: files.save_checkpoint(checkpoint, path, strategy.checkpoint_io, write))
                if self._is_first
                else None,
                ending,
            )
        except CheckpointError as error:
            if header is not None:
                forget_save(path, header.save_id)
            if not ending:
                raise
            self._warn_of_nothing_written(path, str(error))
            return
        if header is not None and self._is_first:
            # A plugin of the user's may still be writing the file that replaces the one of before.
            before = "" if files.can_replace(path, strategy.checkpoint_io) else self._last_saves.get(path, "")
            self._last_saves[path] = header.save_id
            forget_other_saves(path, header.save_id, before)

    @property
    def _is_first(self) -> bool:
        return self._strategy.global_rank == 0

    def _warn_of_nothing_written(self, path: str, why: str) -> None:
        rank_zero_warn(f"No checkpoint was written to `{path}`: {why}. What was saved before is as it was.")

    def _mark(self, checkpoint: dict[str, Any]) -> Header | None:
        """Put a header into the checkpoint; none into one of weights only, or before any fit."""
        strategy = self._strategy
        sync = strategy.update_sync or strategy.gradient_sync
        state = self._kept if sync is None else sync.state_dict()
        if "optimizer_states" not in checkpoint or state is None:
            return None
        self._saves += 1
        epoch = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
        batches = epoch.get("current", {}).get("ready", 0)
        header = Header(
            world_size=strategy.world_size,
            algorithm=strategy.strategy_name,
            error_feedback=_feedback(strategy),
            save_id=f"{strategy.run_id}-{checkpoint.get('epoch')}-{checkpoint.get('global_step')}-{batches}-{self._saves}",
            inside_epoch=is_inside_epoch(checkpoint),
            shared={k: v for k, v in state.items() if (k in _SHARED if strategy.sends_updates else k not in _OWN)},
            decision=strategy.decision,
        )
        end_unless_inside(checkpoint)
        checkpoint[KEY] = header.as_dict()
        return header

    def _write_own(self, checkpoint: Mapping[str, Any], header: Header, path: str) -> None:
        strategy = self._strategy
        sync = strategy.update_sync or strategy.gradient_sync
        state = self._kept if sync is None else sync.state_dict()
        assert state is not None
        state = {
            key: value
            for key, value in state.items()
            if (key not in _SHARED if strategy.sends_updates else key in _OWN)
        }
        # Where gradients are averaged all ranks' optimizers are alike; rank 0's is in the checkpoint.
        own = strategy.sends_updates and not self._is_first
        content = {
            "save_id": header.save_id,
            "rank": strategy.global_rank,
            "state": state,
            "optimizers": [optimizer.state_dict() for optimizer in strategy.optimizers] if own else [],
            "random": collect_random_states(),
            "loaders": list(places_of(checkpoint)),
        }
        write_sidecar(path, header.save_id, strategy.global_rank, content)

    def _together(self, path: str, work: Callable[[], None] | None, ending: bool) -> None:
        """Let all ranks do their part, and know that all could."""
        error: CheckpointError | None = None
        try:
            if work is not None:
                work()
        except CheckpointError as caught:
            error = caught
        strategy = self._strategy
        if not dist.is_initialized() or strategy.world_size == 1:
            if error is not None:
                raise error
            return
        said = self._tell("" if error is None else str(error), ending)
        if error is not None:
            raise error
        failed = {rank: text for rank, text in said.items() if text}
        if failed:
            rank = min(failed)
            raise CheckpointError(f"Rank {rank} could not save: {failed[rank]}", path)
        missing = sorted(set(range(strategy.world_size)) - said.keys())
        if missing:
            raise CheckpointError(
                f"ranks {missing} took no part in saving `{path}`. Call `save_checkpoint` on all ranks in the same step.",
                path,
            )

    def _tell(self, text: str, ending: bool) -> dict[int, str]:
        strategy = self._strategy
        if self._board is None:
            self._board = Board(default_store(), strategy.global_rank, strategy.world_size)
        limit = strategy.patience
        return self._board.gather(text, min(limit, _PATIENCE) if ending else limit)

    def close(self) -> None:
        """Forget what belongs to the process group."""
        self._board = None

    @rank_zero_only
    def remove(self, filepath: Any) -> None:
        """Delete the sidecars together with their checkpoint."""
        self._last_saves.pop(os.fspath(filepath), None)
        remove_sidecars(os.fspath(filepath))

    # ---- read -------------------------------------------------------------------------------------------------------

    def read(self, checkpoint: dict[str, Any], path: str) -> dict[str, Any]:
        """Read and check what lies beside a checkpoint that was just loaded, if a fit is to go on from it.

        Changes nothing but the returned checkpoint, which gets this rank's place in its data. All ranks learn which files
        cannot be used.

        Raises:
            CheckpointError: if the checkpoint has a header that cannot be used.
            SidecarError: on all ranks, if the sidecars are those of another save; or if one is missing or unreadable, and
                ``strict_sidecars=True``.
        """
        strategy = self._strategy
        self.path, self._header, self._found = path, None, None
        module = strategy.lightning_module
        if module is None or module.trainer.state.fn != TrainerFn.FITTING:
            return checkpoint  # weights need no sidecar
        self._header = header = read_header(checkpoint, path)
        if header is None:
            return checkpoint
        strategy.adopt(header)
        if header.inside_epoch and not places_of(checkpoint):
            rank_zero_warn(
                f"`{os.path.basename(path)}` was saved inside of an epoch, by a run whose loader could not tell its place: the "
                "epoch begins again with its first batch, so the continuation is not exact. Use `ResumableLoader` (or another "
                "loader with `state_dict`, such as torchdata's `StatefulDataLoader`), or resume from the end of an epoch."
            )
        if header.world_size == strategy.world_size:
            return self._read_own(checkpoint, header)
        return self._read_all(checkpoint, header)

    def _read_own(self, checkpoint: dict[str, Any], header: Header) -> dict[str, Any]:
        reasons: dict[int, str] = {}
        content = self._checked(self._strategy.global_rank, header, reasons)
        self._report(reasons, header)
        self._found = content
        if content is None or not content["loaders"]:
            return checkpoint
        return with_places(checkpoint, content["loaders"])

    def _read_all(self, checkpoint: dict[str, Any], header: Header) -> dict[str, Any]:
        strategy, world = self._strategy, header.world_size
        assert self.path is not None
        merged = "residuals were merged so that their mean over ranks is kept, and " if strategy.uses_residuals else ""
        again = " The epoch's batches are drawn anew." if header.inside_epoch else ""
        rank_zero_warn(
            f"`{os.path.basename(self.path)}.ranks` was written by {world} processes and this run has "
            f"{strategy.world_size}: {merged}every rank continues with rank 0's optimizer state and random numbers of its "
            f"own.{again} Resume with {world} devices for an exact continuation."
        )
        unit = _UNITS[_feedback(strategy)]
        if unit != "nothing" and _UNITS[header.error_feedback] == unit:
            reasons: dict[int, str] = {}
            lying = set().union(*saves_of(self.path).values())
            ranks = (
                range(world) if len(lying) * 2 >= world else sorted(lying & set(range(world)))
            )  # not a million tries
            reasons.update(dict.fromkeys(set(range(world)) - set(ranks), "it does not exist"))

            def states() -> Iterator[dict[str, Any]]:
                for rank in ranks:
                    content = self._checked(rank, header, reasons)
                    if content is not None:
                        yield content["state"]

            state = merge_states(states(), world)
            self._report(reasons, header)
            self._found = {"state": state, "optimizers": [], "random": None}
        return with_places(checkpoint, [ResumableLoader.at_end(place) for place in places_of(checkpoint)])

    def _checked(self, rank: int, header: Header, reasons: dict[int, str]) -> dict[str, Any] | None:
        """Return a rank's sidecar if all of it can be used, else note why not."""
        assert self.path is not None
        try:
            content = read_sidecar(self.path, header.save_id, rank)
            check_sidecar(content, header.save_id, rank)
        except FileNotFoundError:
            others = saves_of(self.path)
            reasons[rank] = _FOREIGN if others and header.save_id not in others else "it does not exist"
        except LookupError:
            reasons[rank] = _FOREIGN
        except Exception as error:  # a damaged file raises what it will
            reasons[rank] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            return content
        return None

    def _report(self, reasons: dict[int, str], header: Header) -> None:
        """Let all ranks know of files that cannot be used, and raise or warn."""
        everyones: list[dict[int, str]] = [{}] * self._strategy.world_size
        dist.all_gather_object(everyones, reasons)
        reasons = {rank: reason for theirs in everyones for rank, reason in theirs.items()}
        if not reasons:
            return
        assert self.path is not None
        shown = dict(sorted(reasons.items())[:8])
        which = "; ".join(f"rank {rank}: {reason}" for rank, reason in shown.items())
        which += f"; and {len(reasons) - len(shown)} more" if len(reasons) > len(shown) else ""
        message = f"{len(reasons)} sidecars in `{os.path.basename(self.path)}.ranks` could not be used ({which})"
        if _FOREIGN in reasons.values():
            newest = newest_whole_checkpoint(os.path.dirname(self.path) or ".")
            cure = (
                f"Resume from `{newest}`, the newest whole checkpoint there"
                if newest
                else "No whole checkpoint is there"
            )
            raise SidecarError(f"{message}: the checkpoint and these files were not saved together. {cure}.")
        if self._strategy.strict_sidecars:
            raise SidecarError(
                f"{message}. Restore the files, or pass `strict_sidecars=False` to start their residuals from zero."
            )
        self.lost += len(reasons)
        rank_zero_warn(
            f"{message}: these residuals and local optimizer states are lost, so the auxiliary point moves once; training "
            "continues from a valid state. Pass `strict_sidecars=True` to make this an error."
        )

    # ---- restore ----------------------------------------------------------------------------------------------------

    def restore(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        """Give this rank what was read; return the checkpoint with its own optimizers."""
        header, found, strategy = self._header, self._found, self._strategy
        self._found = None
        sync = strategy.update_sync or strategy.gradient_sync
        if header is None or sync is None:
            rank_zero_info("The checkpoint was not written by `compressed_ddp`: residuals start from zero.")
            return checkpoint
        if strategy.gradient_sync is not None:
            strategy.gradient_sync.load_state_dict(header.shared)
        before, now = header.error_feedback, _feedback(strategy)
        if before != "none" and _UNITS[before] != _UNITS[now]:
            rank_zero_warn(
                f"The checkpoint was written with `error_feedback={before!r}` and this run has {now!r}: the "
                "residuals beside it, what the ranks had not sent yet, are left out. Resume with the same `error_feedback` "
                "for an exact continuation."
            )
            return checkpoint
        if strategy.update_sync is not None:
            shared = {key: header.shared[key] for key in _SHARED if key in header.shared}
            if shared or found is not None:
                strategy.update_sync.load_state_dict({**(found or {"state": {}})["state"], **shared})
        if found is None:
            return checkpoint
        if strategy.gradient_sync is not None:
            strategy.gradient_sync.load_state_dict({**header.shared, **found["state"]})
        if found["random"] is not None:
            restore_random_states(found["random"])
        return {**checkpoint, "optimizer_states": found["optimizers"]} if found["optimizers"] else checkpoint


def _feedback(strategy: CompressedDDPStrategy) -> str:
    """Return the kind of error feedback that says in which units residuals are, if there are any."""
    forgets = strategy.sends_updates and strategy.error_feedback == "none"
    return "local" if forgets else strategy.error_feedback
