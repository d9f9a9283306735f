"""Wrong arguments, settings that cannot go together, broken numbers: an error that names the cause, the value and the cure."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from lightning_distopt import CompressedDDPStrategy
from lightning_distopt.compressors import Compressor, Dense, ScaledSign, text
from lightning_distopt.compressors.base import Field
from lightning_distopt.errors import NonFiniteError, RankMismatchError
from tests.strategies.fits import Agree, At, Failures, compressed, fit, messages_to, trainer
from tests.strategies.models import Manual, Net

# --- at construction ------------------------------------------------------------------------------------------------


class Doubled(Compressor):
    """Unbiased on average and not contractive: its residual may grow."""

    unbiased = True

    def layout(self, numel: int, dtype: torch.dtype, entries: int | None = None) -> tuple[Field, ...]:
        return (Field("values", dtype, numel),)

    def _encode(self, flat: Tensor, key: int) -> dict[str, Tensor]:
        return {"values": 2 * flat}

    def _decode_add_(self, fields: dict[str, Tensor], key: int, out: Tensor, alpha: float) -> None:
        out.add_(fields["values"], alpha=alpha)


class Whole(Doubled):
    """Payloads that cannot be cut."""

    contractive = True
    splittable = False


KNOWN = ", ".join(repr(form.example) for form in text.KNOWN.values())

WRONG = [
    # argument, exception, parts of the message: rule, value, cure
    ({"compressor": "gzip"}, ValueError, [f"`compressor` must be one of {KNOWN}", "got 'gzip'"]),
    ({"compressor": "topk:1.5"}, ValueError, ["`ratio` must be in (0, 1]", "got 1.5", "Use 0.01"]),
    ({"compressor": "topk:0"}, ValueError, ["`ratio` must be in (0, 1]", "got 0.0"]),
    ({"compressor": "topk:much"}, ValueError, ["`compressor='topk:much'`", "'much' is not a number", "'topk:0.01'"]),
    ({"compressor": 0.01}, TypeError, ["`compressor` must be a `Compressor` or a text", "got float", "TopK(0.01)"]),
    ({"compressor": ScaledSign}, TypeError, ["`compressor` must be a `Compressor` or a text", "got ABCMeta"]),
    (
        {"error_feedback": "ahead"},
        ValueError,
        ["`error_feedback` must be one of 'step_ahead', 'local', 'gradient', 'none'", "'ahead'"],
    ),
    (
        {"compressor": "powersgd:2"},
        ValueError,
        ["`error_feedback` must be 'gradient' or 'none' with `compressor=PowerSGD(rank=2)`", "got 'step_ahead'", "Use"],
    ),
    (
        {"compressor": "powersgd:2", "error_feedback": "local"},
        ValueError,
        ["must be 'gradient' or 'none'", "got 'local'", "Use `error_feedback='gradient'`"],
    ),
    (
        {"compressor": "signsgd", "error_feedback": "gradient"},
        ValueError,
        ["`error_feedback` must be 'none' with `compressor=SignSGD()`", "keeps no residual", "got 'gradient'"],
    ),
    ({"compressor": "signsgd"}, ValueError, ["must be 'none'", "got 'step_ahead'", "Use `error_feedback='none'`"]),
    ({"compressor": "powersgd:0"}, ValueError, ["`rank` must be an integer >= 1", "got 0", "`PowerSGD(rank=2)`"]),
    ({"compressor": "powersgd:two"}, ValueError, ["`compressor='powersgd:two'`", "'two' is not a number"]),
    (
        {"compressor": "powersgd:2", "error_feedback": "gradient", "exchange": "all_gather"},
        ValueError,
        ["`exchange` must be 'auto' with `compressor=PowerSGD(rank=2)`", "got 'all_gather'", "Leave it out"],
    ),
    (
        {"compressor": "signsgd", "error_feedback": "none", "server_compression": True},
        ValueError,
        ["`server_compression` must be False with `compressor=SignSGD()`", "got True"],
    ),
    (
        {"compressor": "powersgd:2", "error_feedback": "gradient", "allow_noncontractive": True},
        ValueError,
        ["`allow_noncontractive` must be False with `compressor=PowerSGD(rank=2)`", "got True"],
    ),
    (
        {"error_feedback": "gradient", "server_compression": True},
        ValueError,
        ["`server_compression` must be False with `error_feedback='gradient'`", "got True", "'step_ahead'"],
    ),
    (
        {"error_feedback": "gradient", "coefficient": 0.5},
        ValueError,
        ["`coefficient` belongs to error feedback in units of parameters", "got 0.5", "Leave it out"],
    ),
    (
        {"error_feedback": "gradient", "averaging_period": 5},
        ValueError,
        ["`averaging_period` belongs to error feedback in units of parameters", "got 5", "'gradient'"],
    ),
    ({"error_feedback": "gradient", "sync_every": 2}, ValueError, ["`sync_every` belongs to", "got 2", "'gradient'"]),
    ({"error_feedback": "gradient", "scope": "model"}, ValueError, ["`scope` belongs to", "got 'model'"]),
    ({"allow_noncontractive": 1}, TypeError, ["`allow_noncontractive` must be True or False", "got 1"]),
    (
        {"allow_noncontractive": True, "error_feedback": "none"},
        ValueError,
        ["`allow_noncontractive` belongs to error feedback", "got True", "Leave it out"],
    ),
    (
        {"error_feedback": "gradient", "compressor": Doubled()},
        ValueError,
        ["`error_feedback='gradient'` needs a contractive compressor", "Doubled()", "`allow_noncontractive=True`"],
    ),
    ({"error_feedback": None}, ValueError, ["`error_feedback` must be one of", "got None"]),
    ({"coefficient": 1.5}, ValueError, ["`coefficient` must be in [0, 1]", "got 1.5", "`coefficient=1.0`"]),
    ({"coefficient": -0.1}, ValueError, ["`coefficient` must be in [0, 1]", "got -0.1"]),
    ({"coefficient": float("nan")}, ValueError, ["`coefficient` must be in [0, 1]", "got nan"]),
    ({"coefficient": "half"}, ValueError, ["`coefficient` must be in [0, 1]", "got 'half'"]),
    (
        {"coefficient": 0.5, "error_feedback": "local"},
        ValueError,
        ["`coefficient` must be 0 with `error_feedback='local'`", "got 0.5", "Use `error_feedback='step_ahead'`"],
    ),
    (
        {"coefficient": 0.5, "error_feedback": "none"},
        ValueError,
        ["`coefficient` belongs to error feedback", "got 0.5", "Leave it out"],
    ),
    ({"averaging_period": -1}, ValueError, ["`averaging_period` must be an integer >= 0", "got -1"]),
    ({"averaging_period": 2.5}, TypeError, ["`averaging_period` must be an integer >= 0", "got 2.5"]),
    (
        {"averaging_period": 5, "error_feedback": "none"},
        ValueError,
        ["`averaging_period` belongs to error feedback", "got 5", "Leave it out"],
    ),
    ({"dense_steps": -3}, ValueError, ["`dense_steps` must be an integer >= 0", "got -3", "`dense_steps=0`"]),
    ({"dense_steps": True}, TypeError, ["`dense_steps` must be an integer >= 0", "got True"]),
    ({"sync_every": 0}, ValueError, ["`sync_every` must be an integer >= 1", "got 0", "`sync_every=1`"]),
    ({"sync_every": 2, "error_feedback": "none"}, ValueError, ["`sync_every` belongs to error feedback", "got 2"]),
    ({"scope": "layer"}, ValueError, ["`scope` must be one of 'tensor', 'model'", "got 'layer'"]),
    ({"scope": "model", "error_feedback": "none"}, ValueError, ["`scope` belongs to error feedback", "got 'model'"]),
    ({"bucket_mb": 0}, ValueError, ["`bucket_mb` must be above 0", "got 0", "`bucket_mb=25`"]),
    ({"bucket_mb": "big"}, ValueError, ["`bucket_mb` must be above 0", "got 'big'"]),
    ({"strict_sidecars": "no"}, TypeError, ["`strict_sidecars` must be True or False", "got 'no'"]),
    ({"server_compression": "auto"}, TypeError, ["`server_compression` must be True or False", "got 'auto'"]),
    ({"exchange": "ring"}, ValueError, ["`exchange` must be one of 'auto', 'all_reduce'", "got 'ring'"]),
    (
        {"exchange": "all_reduce", "compressor": "sign"},
        ValueError,
        ["`exchange='all_reduce'` needs a compressor whose payloads can be summed", "ScaledSign()", "'all_gather'"],
    ),
    (
        {"exchange": "sharded_server", "compressor": Whole()},
        ValueError,
        ["`exchange='sharded_server'` needs a compressor whose payloads can be split", "Whole()"],
    ),
    (
        {"compressor": Doubled()},
        ValueError,
        ["`error_feedback='step_ahead'` needs a contractive compressor", "Doubled()", "`error_feedback='none'`"],
    ),
    (
        {"compressor": Doubled(), "error_feedback": "local"},
        ValueError,
        ["`error_feedback='local'` needs a contractive compressor"],
    ),
    (
        {"ddp_comm_hook": fp16_compress_hook},
        ValueError,
        ["brings its own exchange over all ranks and takes no `ddp_comm_hook`", "use `DDPStrategy`"],
    ),
    ({"ddp_comm_state": object()}, ValueError, ["takes no `ddp_comm_state`"]),
    ({"ddp_comm_wrapper": fp16_compress_hook}, ValueError, ["takes no `ddp_comm_wrapper`"]),
    ({"model_averaging_period": 4}, ValueError, ["takes no `model_averaging_period`"]),
    ({"process_group": object()}, ValueError, ["takes no `process_group`"]),
    ({"skip_all_reduce_unused_params": True}, ValueError, ["takes no `skip_all_reduce_unused_params`"]),
    (
        {"ratio": 0.1, "find_unused_parameter": True},
        TypeError,
        ["got unknown arguments ['find_unused_parameter', 'ratio']", "find_unused_parameters, ", "Check the spelling"],
    ),
]


@pytest.mark.parametrize(("arguments", "error", "parts"), WRONG, ids=[str(sorted(row[0].items())) for row in WRONG])
def test_a_wrong_argument_is_refused_at_construction(arguments: Any, error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        CompressedDDPStrategy(**arguments)
    for part in parts:
        assert part in str(caught.value)


def test_what_is_allowed_at_the_edges() -> None:
    for arguments in (
        {"coefficient": 0},
        {"coefficient": 1},
        {"coefficient": 0.0, "error_feedback": "local"},
        {"averaging_period": 0, "error_feedback": "none"},
        {"bucket_mb": float("inf")},
        {"compressor": Doubled(), "error_feedback": "none"},
        {"compressor": Dense("bfloat16"), "exchange": "sharded_server"},
        {"ddp_comm_hook": None, "process_group": None},
    ):
        CompressedDDPStrategy(**arguments)


def test_the_defaults() -> None:
    strategy = CompressedDDPStrategy()
    assert isinstance(strategy.compressor, ScaledSign)
    assert (strategy.coefficient, strategy.averaging_period, strategy.sync_every) == (1.0, 0, 1)
    assert CompressedDDPStrategy(error_feedback="local").coefficient == 0


# --- with the Trainer's settings ------------------------------------------------------------------------------------


def float16() -> MixedPrecision:
    # on a CPU, Lightning replaces `precision="16-mixed"` by bfloat16 before a strategy sees it
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


REFUSED = (
    r"`CompressedDDPStrategy` does not support `precision='16-mixed'`.*Use `precision='bf16-mixed'` or `'32-true'`"
)


@pytest.mark.parametrize("error_feedback", ["step_ahead", "gradient", "none"])
def test_16_mixed_is_refused_by_instance(error_feedback: str) -> None:
    with pytest.raises(MisconfigurationException, match=REFUSED):
        trainer(compressed(error_feedback=error_feedback), plugins=[float16()])
    with pytest.raises(MisconfigurationException, match=REFUSED):
        compressed(precision_plugin=float16())


def test_16_mixed_is_refused_by_name() -> None:
    with pytest.raises(MisconfigurationException, match=REFUSED):
        trainer("compressed_ddp_fork", plugins=[float16()])


@pytest.mark.parametrize("error_feedback", ["step_ahead", "none"])
def test_one_device_works_with_a_note(error_feedback: str, tmp_path: Path) -> None:
    def check(trainer: Trainer, module: Net) -> None:
        assert trainer.strategy.meter.bytes_sent == 0

    with messages_to(tmp_path / "said"):
        fit(Net(), compressed(error_feedback=error_feedback), devices=1, callbacks=[At(train_end=check)])
    said = (tmp_path / "said").read_text()
    assert said.count("`CompressedDDPStrategy` runs on one device: nothing is sent") == 1
    assert "Use `devices=2` or more, or `strategy='auto'`" in said


# --- models that do not fit -----------------------------------------------------------------------------------------


class OfRank(Net):
    """Rank 1 differs."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change

    def setup(self, stage: str) -> None:
        if self.global_rank == 1:
            getattr(self, self.change)()

    def wider(self) -> None:
        self.net[3] = nn.Linear(8, 4)

    def longer(self) -> None:
        self.net.append(nn.Linear(3, 3))

    def renamed(self) -> None:
        self.network = self.net
        del self.net

    def frozen(self) -> None:
        self.net[0].requires_grad_(False)


@pytest.mark.parametrize("error_feedback", ["step_ahead", "local", "gradient"])
def test_a_compressor_that_is_not_contractive_can_be_tried_with_a_warning(error_feedback: str) -> None:
    with pytest.warns(
        UserWarning, match=rf"`error_feedback='{error_feedback}'` needs a contractive compressor.*Doubled"
    ):
        CompressedDDPStrategy(Doubled(), error_feedback, allow_noncontractive=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", ["wider", "longer", "renamed", "frozen"])
@pytest.mark.parametrize("error_feedback", ["step_ahead", "none"])
def test_ranks_with_different_models_stop_together(tmp_path: Path, change: str, error_feedback: str) -> None:
    notes = Failures(tmp_path).fit(OfRank(change), compressed(error_feedback=error_feedback))
    assert len(notes) == 2
    for note in notes:
        assert note.startswith(RankMismatchError.__name__)
        assert "ranks [1] differ from rank 0" in note
        assert "alike on every rank" in note


@pytest.mark.parametrize("error_feedback", ["step_ahead", "none"])
def test_complex_parameters_are_refused(error_feedback: str) -> None:
    class Complex(Net):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    with pytest.raises(
        Exception, match=r"TypeError.*cannot compress complex parameters: got \['phase'\].*view_as_real"
    ):
        fit(Complex(), compressed(error_feedback=error_feedback))


# --- numbers that are not finite ------------------------------------------------------------------------------------


class Broken(Net):
    """In step 3, rank 1's gradient of one parameter holds a NaN."""

    def on_train_batch_start(self, *args: Any) -> None:
        self.common = [p.detach().clone() for p in self.parameters()]

    def on_after_backward(self) -> None:
        if self.trainer.global_step == 3 and self.global_rank == 1:
            self.net[3].weight.grad[1, 1] = float("nan")

    def optimizer_step(self, *args: Any) -> None:
        # the parameters hold the common model of the step before when the error is raised
        try:
            super().optimizer_step(*args)
        except NonFiniteError:
            assert all(torch.equal(p, x) for p, x in zip(self.parameters(), self.common, strict=True))
            raise


class BrokenLoss(Broken):
    """The loss itself is infinite; clipping spreads that over all parameters."""

    def on_after_backward(self) -> None: ...

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.trainer.global_step == 3 and self.global_rank == 1 else loss


class BrokenManual(Manual, Broken):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@pytest.mark.parametrize(
    ("module", "parameter", "arguments"),
    [
        (Broken, r"net\.3\.weight", {}),
        (Broken, r"net\.3\.weight", {"accumulate_grad_batches": 2}),
        (BrokenLoss, r"net\.\d\.\w+", {"gradient_clip_val": 1.0}),
        (BrokenManual, r"net\.3\.weight", {}),
    ],
)
def test_all_ranks_stop_promptly_and_name_the_culprit(
    tmp_path: Path, module: type[Net], parameter: str, arguments: Any
) -> None:
    start = time.monotonic()
    notes = Failures(tmp_path).fit(module(batches=8), compressed(), callbacks=[Agree()], **arguments)
    assert time.monotonic() - start < 15
    assert len(notes) == 2
    for note in notes:
        assert note.startswith(NonFiniteError.__name__)
        assert re.search(f"`{parameter}` got a NaN or an infinity on rank 1 in step 3, and all 2 ranks stopped", note)
        assert "lower the learning rate, or clip" in note


class BrokenGradient(Broken):
    """Without error feedback, gradients are exchanged in backward, so the NaN must be there before its end."""

    def on_after_backward(self) -> None: ...

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == 3 and self.global_rank == 1:
            self.net[3].weight.register_hook(lambda gradient: gradient * float("nan"))
        return super().training_step(batch, batch_idx)


class BrokenGradientManual(BrokenManual, BrokenGradient):
    def on_after_backward(self) -> None: ...

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 3 and self.global_rank == 1:
            self.net[3].weight.register_hook(lambda gradient: gradient * float("nan"))
        BrokenManual.training_step(self, batch, batch_idx)


@pytest.mark.parametrize("module", [BrokenGradient, BrokenGradientManual])
@pytest.mark.parametrize("compressor", ["bf16", "topk:0.1"])
def test_so_they_do_without_error_feedback(tmp_path: Path, module: type[Net], compressor: str) -> None:
    start = time.monotonic()
    strategy = compressed(error_feedback="none", compressor=compressor)
    notes = Failures(tmp_path).fit(module(batches=8), strategy, callbacks=[Agree()])
    assert time.monotonic() - start < 15
    assert len(notes) == 2
    for note in notes:
        assert note.startswith(NonFiniteError.__name__)
        assert "In step 3 the gradient of `net.3.weight` holds a NaN or an infinity on rank 1, and all 2 ranks" in note


def test_sparse_gradients_need_error_feedback() -> None:
    class Sparse(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3, sparse=True)

    with pytest.raises(
        Exception, match=r"cannot compress sparse gradients, which \['table'\] would make.*`sparse=False`"
    ):
        fit(Sparse(), compressed(error_feedback="none"))
