from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Context, Message, RecordDict
from lightning.pytorch.loggers import CSVLogger

from lightning_distopt.federated import (
    Deadline,
    FedMom,
    InProcessGrid,
    Privacy,
    Service,
    lightning_client_app,
    lightning_server_app,
)
from lightning_distopt.federated.conversation import replies_of
from lightning_distopt.federated.history import History
from lightning_distopt.federated.records import tensors_of, to_record
from tests.federated.lightning_toy import CPU, Line, Points
from tests.federated.toy import equal, start, toy_app


class SlowGrid(InProcessGrid):
    """Some clients answer late, or never; what has been asked for is noted."""

    def __init__(self, app, clients: int, late: dict[int, float]) -> None:
        super().__init__(app, clients)
        self.late, self.begun, self.pulls = late, {}, []

    def push_messages(self, messages):
        pushed = super().push_messages(messages)
        self.begun |= dict.fromkeys(pushed, time.monotonic())
        return pushed

    def pull_messages(self, message_ids) -> list[Message]:
        ready = []
        for at in message_ids:
            message = self._pending.get(at)
            if message is None:
                continue
            wait = self.late.get(message.metadata.dst_node_id, 0) if message.metadata.message_type == "train" else 0
            if time.monotonic() - self.begun[at] >= wait:
                self.pulls.append(message.metadata.dst_node_id)
                ready += super().pull_messages([at])
        return ready


def options(**deadline) -> dict:
    return {"service": Service(deadline=Deadline(**deadline)), "fraction_evaluate": 0.0}


def log_of(folder: Path) -> list[dict[str, float]]:
    return [record["metrics"] for record in History(folder).read()]


def test_stragglers_are_dropped_at_the_deadline_and_counted_and_their_weight_goes_with_them(tmp_path: Path) -> None:
    service = Service(state_dir=str(tmp_path), deadline=Deadline(seconds=0.2))
    strategy = FedMom(momentum=0.0, service=service, fraction_evaluate=0.0)
    grid = SlowGrid(toy_app(), 4, {2: 60.0, 4: 60.0})
    arrays = tensors_of(strategy.start(grid, to_record(start()), 1).arrays)
    w = start()["layer.weight"]
    torch.testing.assert_close(arrays["layer.weight"], (10 * (w / 2) + 30 * (w + 2) / 2) / 40)  # clients 0 and 2
    assert strategy.collected is not None
    assert sorted(strategy.collected.weights) == [1, 3]
    assert log_of(tmp_path)[0]["federated/dropped"] == 2


def test_epsilon_is_logged_each_round_and_what_privacy_hides_is_not(tmp_path: Path) -> None:
    strategy = FedMom(privacy=Privacy(0.5, 1.0, 1e-5, 4), fraction_train=0.5, service=Service(state_dir=str(tmp_path)))
    strategy.start(InProcessGrid(toy_app(), 4), to_record(start()), 3)
    spent = [line["federated/epsilon"] for line in log_of(tmp_path)]
    assert 0 < spent[0] < spent[1] < spent[2]
    for record in History(tmp_path).read():
        assert "loss" not in record["metrics"]  # the clients' own figures of training
        assert not {"weights", "norms"} & record["clients"].keys()


def test_the_deadline_waits_for_the_minimum() -> None:
    strategy = FedMom(**options(seconds=0.05, min_replies=3))
    strategy.start(SlowGrid(toy_app(), 4, {1: 0.4, 2: 0.3, 4: 60.0}), to_record(start()), 1)
    assert strategy.collected is not None
    assert sorted(strategy.collected.weights) == [1, 2, 3]


def test_a_round_below_the_minimum_ends_at_the_time_out_and_changes_nothing() -> None:
    strategy = FedMom(**options(seconds=0.05, min_replies=3, timeout=0.3))
    arrays = tensors_of(strategy.start(SlowGrid(toy_app(), 3, {1: 60.0}), to_record(start()), 1).arrays)
    assert equal(arrays, start())


def test_replies_come_in_the_order_of_the_names_whoever_is_faster() -> None:
    grid = SlowGrid(toy_app(), 4, {1: 0.2, 3: 0.1})
    FedMom(**options()).start(grid, to_record(start()), 1)
    assert grid.pulls[-4:] == [1, 2, 3, 4]


def test_no_message_no_reply() -> None:
    assert list(replies_of(InProcessGrid(toy_app(), 1), [], Deadline(), lambda: 0)) == []


def test_metrics_reach_loggers(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    strategy = FedMom(service=Service(loggers=[logger], per_client=True))
    strategy.start(InProcessGrid(toy_app(), 3), to_record(start()), 2)
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    last = dict(zip(rows[0], rows[-1], strict=True))
    assert last["step"] == "2"
    assert float(last["federated/participants"]) == 3
    assert float(last["val/accuracy"]) == pytest.approx(0.12)
    assert float(last["val/accuracy/worst_10"]) == pytest.approx(0.02)
    assert float(last["val/accuracy/client_3"]) == pytest.approx(0.22)  # the toy has no names: Flower's ids
    assert float(last["loss"]) == pytest.approx((0 * 10 + 1 * 20 + 2 * 30) / 60)
    assert float(last["federated/bytes_received"]) > 0


def test_the_server_app_logs_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    server = lightning_server_app(
        Line, lambda context: FedMom(service=Service(loggers=[logger])), 2, datamodule_factory=lambda: Points(0, 1),
        trainer=CPU,
    )  # fmt: skip
    client = lightning_client_app(Line, Points, local_epochs=1, trainer=CPU)
    try:
        server(InProcessGrid(client, 2), Context(1, 0, {}, RecordDict(), {}))
        told = dict(logger.experiment.summary)
    finally:
        wandb.finish()
    assert told["trainer/global_step"] == 2
    assert told["federated/participants"] == 2
    assert {"val/loss", "val/loss/worst_10", "server/val/loss"} <= told.keys()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_the_servers_memory_does_not_grow_with_the_clients() -> None:
    import tracemalloc

    w = {"w": torch.zeros(200_000)}
    peaks = []
    for clients in (4, 24):
        strategy = FedMom(**options())
        grid = InProcessGrid(toy_app(lambda c, r, a: {"w": a["w"] - 1}), clients)
        strategy.history.norms.append(447.0)  # a typical norm is known: nothing is held back
        tracemalloc.start()
        strategy.start(grid, to_record(w), 1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (
        peaks[1] < peaks[0] + 200_000 * 4
    )  # numpy's share, where replies live: less than one model more for 20 clients more


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"seconds": 0.0}, "seconds.*0.0"),
        ({"seconds": 9.0, "timeout": 3.0}, "9.0 and 3.0"),
        ({"min_replies": 0}, "min_replies.*0"),
    ],
)
def test_bad_deadlines_are_refused(numbers: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Deadline(**numbers)
