"""Synchronous pipelines as a Lightning strategy: the schedules are ``torch.distributed.pipelining``'s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distopt.data_parallel.non_finite import NonFinite
from lightning_distopt.exchange import roll_call
from lightning_distopt.model_parallel.block import Block
from lightning_distopt.model_parallel.layered import batch_size_of, loss_of, stateful_names
from lightning_distopt.model_parallel.ties import find_ties
from lightning_distopt.model_parallel.transport import Channel, Endpoint, Receiver, Sender
from lightning_distopt.strategies.checks import choice, count
from lightning_distopt.strategies.compat import without_greetings_to_itself
from lightning_distopt.strategies.no_data import NO_BATCH
from lightning_distopt.strategies.stage_guard import judge_gradients
from lightning_distopt.strategies.staged import StagedStrategy

__all__ = ["SCHEDULES", "PipelineStrategy", "ScheduleName"]

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "interleaved_zero_bubble", "zero_bubble"]
_Signature: TypeAlias = tuple[Any, ...]
_TARGETS = 8192  # tag of the way of targets


@dataclass(frozen=True)
class _Schedule:
    """A schedule of torch: the name of its class, whether it takes several stages a device, and whether they lie in a V."""

    kind: str
    chunks: int = 1
    v_shaped: bool = False


SCHEDULES: dict[str, _Schedule] = {
    "gpipe": _Schedule("ScheduleGPipe"),
    "1f1b": _Schedule("Schedule1F1B"),
    "interleaved": _Schedule("ScheduleInterleaved1F1B", 2),
    "interleaved_zero_bubble": _Schedule("ScheduleInterleavedZeroBubble", 2),
    "zero_bubble": _Schedule("ScheduleZBVZeroBubble", 2, v_shaped=True),
}
"""Schedules by name."""


class PipelineStrategy(StagedStrategy):
    """Train the layers of a model in a synchronous pipeline: what is learned is what one device would learn.

    Each device has a block of layers. A batch is cut into micro-batches, which pass through all devices; then all update at
    once. Devices wait while the pipeline fills and empties: a share ``(K - 1) / (M + K - 1)`` of the time with K devices and M
    micro-batches, less with the interleaved and zero-bubble schedules.

    The model must be a ``LayeredModule`` whose loss is a mean over the batch. Rank 0 alone reads data. Gradient accumulation,
    clipping (by the norm over all devices), schedulers and precision work as on one device; parameters shared by layers on
    several devices are kept equal. Batch norm sees micro-batches. A batch that cannot be cut into as many equal
    micro-batches (a short last one) is cut into fewer. Stateful layers have a state for each micro-batch, whose rows go on in the
    same micro-batch of the next batch; a batch of another size begins anew.

    Args:
        stages: devices that the layers are spread over; ``None`` is all. With fewer there are ``devices / stages`` replicas
            of each, which average their gradients; samplers share out the data among them.
        microbatches: pieces of a batch, >= 1; ``None`` is four a device.
        schedule: "1f1b" (few activations alive), "gpipe", "interleaved" (each device has several blocks), "zero_bubble" (two
            blocks a device in a V, backward split in two), "interleaved_zero_bubble".
        chunks_per_device: blocks a device of the interleaved schedules, >= 2.
        non_finite: what all devices do in a step in which a gradient on any of them holds a NaN or an infinity: "raise",
            "skip" the step, or "zero" the bad entries; counted in ``non_finite_steps``.
        **options: of all pipelines: ``cuts``, ``balance``, ``memory_limit_mb``, ``compressor``, ``error_feedback``,
            ``start_method``, ``timeout`` (seconds), ``process_group_backend``; see ``StagedStrategy``.

    Raises:
        ValueError: for values that cannot work, with the cure.
    """

    strategy_name: ClassVar[str] = "pipeline"
    handles_window: ClassVar[bool] = True
    updates_with_batches: ClassVar[bool] = True

    def __init__(
        self,
        stages: int | None = None,
        microbatches: int | None = None,
        schedule: ScheduleName = "1f1b",
        chunks_per_device: int = 2,
        non_finite: NonFinite = "raise",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.non_finite: NonFinite = choice("non_finite", non_finite, NonFinite)
        self.non_finite_steps = 0
        self.schedule: ScheduleName = choice("schedule", schedule, ScheduleName)
        self.devices = None if stages is None else count("stages", stages, 1)
        self.microbatches = None if microbatches is None else count("microbatches", microbatches, 1)
        self.chunks_per_device = count("chunks_per_device", chunks_per_device, 2)
        if SCHEDULES[schedule].v_shaped and chunks_per_device != 2:
            raise ValueError(
                f"`chunks_per_device` must be 2 with `schedule={schedule!r}`, which folds the layers once: got "
                f"{chunks_per_device}. "
                "Leave it out."
            )
        if stages is not None and microbatches is not None and schedule == "1f1b" and microbatches < stages:
            raise ValueError(
                f"`microbatches` must be at least `stages` with `schedule='1f1b'`: got {microbatches} for {stages} stages. Use "
                f"`microbatches={stages}` or more, or `schedule='gpipe'`."
            )
        self._prepared: dict[_Signature, tuple[Any, int]] = {}
        self._ties: list[tuple[nn.Parameter, Any, bool]] = []
        self._stash: dict[nn.Parameter, Tensor] = {}
        self._targets: tuple[Channel | None, Channel | None] = (None, None)
        self._steps = 0
        self._memories: dict[tuple[int, int, int], dict[int, Any]] = {}

    # ---- lifecycle --------------------------------------------------------------------------------------------------

    @property
    def placement(self) -> tuple[int, ...]:
        devices = self.devices or self.num_nodes * self.num_processes
        made = SCHEDULES[self.schedule]
        if made.v_shaped:
            return (*range(devices), *reversed(range(devices)))
        return tuple(range(devices)) * (self.chunks_per_device if made.chunks > 1 else 1)

    def setup_environment(self) -> None:
        super().setup_environment()
        pieces = self.microbatches
        if pieces is not None and self.schedule != "gpipe" and pieces < self.workers:
            raise ValueError(
                f"`microbatches` must be at least the number of devices with `schedule={self.schedule!r}`: got {pieces} for "
                f"{self.workers}. Use `microbatches={self.workers}` or more, or `schedule='gpipe'`."
            )

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        self._prepared, self._steps, self._stash, self._memories = {}, 0, {}, {}
        if trainer.state.fn == TrainerFn.FITTING:
            self._open_targets()

    def _open_targets(self) -> None:
        first, last = self.rank_of(0), self.rank_of(self.stages - 1)
        sender: Channel | None = None
        receiver: Channel | None = None
        if first != last and self.global_rank == first:
            sender = Sender(
                Endpoint(0, last, _TARGETS, "targets"), 1, 2, None, self.meter, self.timeout, self.root_device
            )
        if first != last and self.global_rank == last:
            end = Endpoint(self.stages - 1, first, _TARGETS, "targets")
            receiver = Receiver(end, 1, None, self.meter, self.timeout, self.root_device)
        self._targets = (sender, receiver)

    def _check_shared(self, blocks: Sequence[Block]) -> None:
        """Keep what several processes share equal: same start here, summed gradients in every step."""
        self._ties = []
        for places in find_ties([dict(block.named_parameters()) for block in blocks]):
            workers = sorted({self.placement[stage] for stage, _ in places})
            if len(workers) == 1:
                continue
            stage, name = places[0]
            parameter = dict(blocks[stage].named_parameters())[name]
            every = [[r * self.workers + w for w in workers] for r in range(self.replicas)]
            made: list[Any] = [dist.new_group(ranks) for ranks in every]  # every process makes every group
            group = made[self.replica]
            ranks = every[self.replica]
            if self.global_rank in ranks:
                value = parameter.detach().to(self.root_device)
                dist.broadcast(value, ranks[0], group=group)
                with torch.no_grad():
                    parameter.copy_(value)
                self._ties.append((parameter, group, self.global_rank == ranks[0]))

    # ---- clipping ---------------------------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        StagedStrategy.precision_plugin.fset(self, precision_plugin)  # type: ignore[attr-defined]
        if precision_plugin is not None:
            precision_plugin.clip_grad_by_norm = self._clip_by_norm_of_all  # type: ignore[method-assign]

    def _clip_by_norm_of_all(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip by the norm over all devices; a parameter on several of them counts once."""
        parameters = [p for p in self.precision_plugin.main_params(optimizer) if p.grad is not None]
        elsewhere = {p for p, _, counts in self._ties if not counts}
        norms = [torch.linalg.vector_norm(p.grad) for p in parameters if p not in elsewhere]
        square = torch.zeros((), dtype=torch.float64, device=self.root_device)
        for norm in norms:
            square += norm.double().square()
        if self.workers > 1:
            dist.all_reduce(square, group=self._pipe)
        norm = square.sqrt().to(norms[0].dtype if norms else torch.float32)
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_val, norm)

    # ---- one batch --------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int = 0, *args: Any, **kwargs: Any) -> Tensor:
        if batch_idx == 0:
            for memory in self._memories.values():
                memory.clear()
        own = [p for p in self._own() if p.requires_grad]
        held = [p.grad for p in own]
        for parameter in own:
            parameter.grad = None
        where = f"pass batch {self._steps} through stage {'/'.join(map(str, self.blocks))}"
        with self.precision_plugin.train_step_context(), self._failures(where, only=False):
            figures, size = self._run(batch)
        window = self._module.trainer.accumulate_grad_batches
        for parameter, group, _ in self._ties:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)
        fresh = {p: p.grad for p in own if p.grad is not None}
        if self._mean is not None:
            fresh = self._mean.average(fresh)
        self._stash = {p: g / window if window > 1 else g for p, g in fresh.items()}
        for parameter, gradient in zip(own, held, strict=True):
            parameter.grad = gradient
        self._module.log_figures("train", figures, size)
        loss: Tensor = figures["loss"]
        return loss

    def _run(self, batch: Any) -> tuple[dict[str, Any], int]:
        x = target = None
        if batch is not NO_BATCH:
            x, target = self._module.split_batch(batch)
        signatures = [_signature(x) if 0 in self.blocks else ()]
        if self.workers > 1:
            self.broadcast_objects(signatures, self.rank_of(0), self._pipe)
        signature = signatures[0]
        number, self._steps = self._steps, self._steps + 1
        sender, receiver = self._targets
        if sender is not None:
            sender.send(number, target)
        if receiver is not None:
            target = receiver.receive(number)
        schedule, pieces = self._schedule_for(signature)
        losses: list[Tensor] = []
        inputs = (x if isinstance(x, tuple) else (x,)) if 0 in self.blocks else ()
        last = self.stages - 1 in self.blocks
        with roll_call.during("pass micro-batches along", waiting=True):
            output = schedule.step(*inputs, **({"target": target, "losses": losses} if last else {}))
        for parameter in self._own():
            # Torch would divide once a stage, and so twice what two stages of this device share.
            if parameter.grad is not None:
                parameter.grad.div_(pieces)
        found = None
        if last:
            with torch.no_grad():
                figures = {"loss": torch.stack([loss.detach() for loss in losses]).mean()}
                found = {**figures, **self._module.metrics(output, target)}, batch_size_of(output)
        result: tuple[dict[str, Any], int] = self._from_last(found)
        return result

    def _schedule_for(self, signature: _Signature) -> tuple[Any, int]:
        """Return the schedule for batches of this shape and its micro-batches; torch's stages hold buffers of one shape."""
        from torch.distributed import pipelining  # it costs time that other strategies need not spend

        if signature not in self._prepared:
            size = signature[0][0][0] if signature[0][0] else 1
            wanted = self.microbatches or 4 * self.workers
            pieces = max(m for m in range(1, min(wanted, size) + 1) if size % m == 0)
            made = SCHEDULES[self.schedule]
            kind = made.kind
            if pieces < wanted and not self._prepared:
                rank_zero_info(
                    f"{type(self).__name__}: a batch of {size} is cut into {pieces} equal micro-batches, not {wanted}. A "
                    "batch size that is a multiple of `microbatches` keeps all devices busier."
                )
            if made.chunks == 1 and pieces < self.workers:
                kind = "ScheduleGPipe"
            if made.chunks > 1 and (pieces < self.workers or pieces % self.workers):
                raise ValueError(
                    f"`schedule={self.schedule!r}` needs batches of a multiple of {self.workers} micro-batches: got a "
                    f"batch of {size}, which can be cut into {pieces}. Use `drop_last=True`, another batch size, or "
                    "`schedule='1f1b'`."
                )
            stages = []
            for k, block in sorted(self.blocks.items()):
                piece = _Piece(block, self._memories.setdefault((k, size, pieces), {}))
                stage = pipelining.PipelineStage(piece, k, self.stages, self.root_device, group=self._pipe)
                if stateful_names(piece.layers):
                    piece.follow(stage)
                stages.append(without_greetings_to_itself(stage))
            held = stages if made.chunks > 1 else stages[0]
            schedule = getattr(pipelining, kind)(held, pieces, loss_fn=self._loss, scale_grads=False)
            self._prepared[signature] = schedule, pieces
        return self._prepared[signature]

    def _loss(self, output: Any, target: Any) -> Tensor:
        with roll_call.during("loss", waiting=False):
            return loss_of(self._module, output, target)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Hand over the gradients that the schedule made."""
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self._module)
        for parameter, gradient in self._stash.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._stash = {}
        closure_loss = self.precision_plugin.post_backward(closure_loss, self._module)
        self.post_backward(closure_loss)
        return closure_loss

    def optimizer_step(
        self, optimizer: Optimizer, closure: Any, model: pl.LightningModule | nn.Module | None = None, **kwargs: Any
    ) -> Any:
        def judged() -> Any:
            loss = closure()
            found = judge_gradients(self.non_finite, self._own(), self._names, self.round, self.meter, self.root_device)
            self.non_finite_steps += found
            return loss

        return super().optimizer_step(optimizer, judged, model, **kwargs)

    def on_train_end(self) -> None:
        super().on_train_end()
        self.share_weights()

    def teardown(self) -> None:
        self._prepared, self._targets, self._memories = {}, (None, None), {}
        super().teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        from lightning_distopt.strategies.registry import register

        register(strategy_registry)


class _Piece(nn.Module):
    """A block as torch calls it: with the tensors of a tuple as arguments of their own.

    Args:
        block: the layers.
        memory: states of stateful layers by micro-batch, changed in place.
    """

    def __init__(self, block: Block, memory: dict[int, Any]) -> None:
        super().__init__()
        self.block, self.memory = block, memory
        self._microbatch: int | None = None

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The layers by name."""
        return dict(self.block.layers.items())

    def follow(self, stage: Any) -> None:
        """Know which micro-batch torch's stage is at; forwards outside of one are its looks at shapes."""
        run = stage.forward_one_chunk

        def forward_one_chunk(microbatch: int, *args: Any, **kwargs: Any) -> Any:
            self._microbatch = microbatch
            try:
                return run(microbatch, *args, **kwargs)
            finally:
                self._microbatch = None

        stage.forward_one_chunk = forward_one_chunk

    def forward(self, *args: Any) -> Any:
        with roll_call.during("forward", waiting=False):
            return self._forward(*args)

    def _forward(self, *args: Any) -> Any:
        x = args[0] if len(args) == 1 else args
        if self._microbatch is None:
            return self.block(x)[0]
        y, self.memory[self._microbatch] = self.block(x, self.memory.get(self._microbatch))
        return y


def _signature(x: Any) -> _Signature:
    tensors = x if isinstance(x, tuple) else (x,)
    return tuple((tuple(t.shape), str(t.dtype)) for t in tensors)
