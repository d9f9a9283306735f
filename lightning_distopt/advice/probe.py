"""A callback that measures model, link and codecs at the start of a fit, says what it found, and ends the fit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_distopt.advice.candidates import CANDIDATES
from lightning_distopt.advice.cost_model import CodecSpeed, Link, Workload, cut
from lightning_distopt.advice.measure import alone, measure_codec, measure_link, timed
from lightning_distopt.advice.report import draw, print_table

__all__ = ["AdviceProbe"]

_REPEATS = 5


class AdviceProbe(Callback):
    """Measures and advises; trains nothing.

    Args:
        link: the link to assume; ``None`` measures the process group's.
        ranks: the number of ranks to assume; ``None`` takes the process group's.
        picture: where to draw the step times, or ``None``.
        measure_overlap: whether an assumed link's overlap is measured all the same: it is this machine's matter.
    """

    def __init__(
        self,
        link: Link | None = None,
        ranks: int | None = None,
        picture: Path | None = None,
        *,
        measure_overlap: bool = True,
    ) -> None:
        self.link = link
        self.ranks = ranks
        self.picture = picture
        self.measure_overlap = measure_overlap

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rank_zero_info("Measuring forward and backward ...")
        device = trainer.strategy.root_device
        loaders = CombinedLoader(trainer.train_dataloader, "max_size_cycle")  # one, or several in a list or a dict
        batch = trainer.strategy.batch_to_device(next(iter(loaders))[0])
        work = self.workload(trainer, pl_module, batch)
        link = self.link
        if link is None:
            rank_zero_info("Measuring the link ...")
            link = measure_link(device)
        elif trainer.world_size > 1 and self.measure_overlap:
            # How far computing and sending share the processor is this machine's matter.
            link = replace(link, overlap=measure_link(device).overlap)
        rank_zero_info("Measuring the compressors ...")
        numel = min(1 << 22, max(1 << 16, work.numel))
        with alone() as group:
            codecs = {c.name: measure_codec(c, device, numel, work.shapes, group) for c in CANDIDATES}
        self.advise(work, link, codecs, self.ranks or trainer.world_size, trainer.is_global_zero)
        trainer.should_stop = True  # before the first epoch, whatever the least numbers of epochs and steps are
        trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None

    def advise(self, work: Workload, link: Link, codecs: dict[str, CodecSpeed], ranks: int, speaks: bool) -> None:
        """Print the table and draw the picture, on one rank."""
        if speaks:
            print_table(work, link, codecs, ranks)
            if self.picture is not None:
                draw(self.picture, work, link, codecs, ranks)
                rank_zero_info(f"Wrote {self.picture}.")

    def workload(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Workload:
        """Time forward and backward of one batch on every rank, without communication; the slowest rank counts."""
        device = trainer.strategy.root_device
        forward, backward = [], []
        params = [p for p in module.parameters() if p.requires_grad]
        ready: dict[Tensor, float] = {}

        def note(param: Tensor) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            ready[param] = time.perf_counter()

        noting = [p.register_post_accumulate_grad_hook(note) for p in params]  # type: ignore[no-untyped-call]
        wants_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        arguments = (batch, 0) if wants_index else (batch,)
        silent: Any = lambda *args, **kwargs: None  # noqa: E731  # what is logged here belongs to no step
        module.log, module.log_dict = silent, silent  # type: ignore[method-assign]
        for _ in range(_REPEATS + 1):
            found: list[Any] = []
            ready.clear()
            with trainer.precision_plugin.forward_context():
                forward.append(timed(lambda found=found: found.append(module.training_step(*arguments)), device))  # type: ignore[misc]
            loss = found[0]["loss"] if isinstance(found[0], dict) else found[0]
            if isinstance(loss, Tensor) and module.automatic_optimization:
                backward.append(timed(loss.backward, device))
            else:  # manual optimization: backward is inside, about two thirds
                backward.append(2 / 3 * forward[-1])
                forward[-1] /= 3
            module.zero_grad()
        del module.log, module.log_dict
        for handle in noting:
            handle.remove()
        seconds = torch.tensor([median(forward[1:]), median(backward[1:])], dtype=torch.float64, device=device)
        if dist.is_initialized():
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        slowest_forward, slowest_backward = seconds.tolist()
        numel = sum(p.numel() for p in params)
        shapes = tuple(tuple(p.shape) for p in params)
        cuts = _cuts(params, ready, slowest_backward) or ((numel, slowest_backward),)
        return Workload(numel, slowest_forward, slowest_backward, 1, cuts, shapes)


def _cuts(params: Sequence[Tensor], ready: dict[Tensor, float], backward: float) -> tuple[tuple[int, float], ...]:
    """Return DDP's buckets in the order in which gradients came; those that did not come, at the end."""
    order = sorted(ready, key=ready.__getitem__)
    if len(order) < 2:
        return ()
    first, last = ready[order[0]], ready[order[-1]]
    seconds = [backward * (ready[p] - first) / max(last - first, 1e-12) for p in order]
    idle = [p.numel() for p in params if p not in ready]
    return cut([*(p.numel() for p in order), *idle], [*seconds, *[backward] * len(idle)], order[0].element_size())
