"""A server that is killed goes on from its folder, bit for bit as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr")

from flwr.serverapp.strategy import FedMedian

from lightning_distopt.errors import CheckpointError
from lightning_distopt.federated import FedMom, InProcessGrid, Privacy, RoundStopping, Service
from lightning_distopt.federated.history import HISTORY_FILE
from lightning_distopt.federated.records import tensors_of, to_record
from lightning_distopt.federated.state import STATE_FILE, ServerState
from tests.federated.toy import equal, start, toy_app

KINDS = {
    "plain": dict,
    "poisson and noise": lambda: {"privacy": Privacy(0.5, 0.8, 1e-5, 6)},
    "median": lambda: {"aggregator": FedMedian()},
    "scheduled": lambda: {"lr": lambda server_round: 0.9**server_round},
}


def strategy(folder: Path, kind: str = "plain", **service) -> FedMom:
    return FedMom(seed=3, fraction_train=0.5, service=Service(state_dir=str(folder), **service), **KINDS[kind]())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", ["between rounds", "while clients work", "while they evaluate"])
def test_a_killed_server_goes_on_bit_for_bit(tmp_path: Path, kind: str, moment: str) -> None:
    class KilledError(Exception):
        pass

    whole = strategy(tmp_path / "whole", kind)
    expected = tensors_of(whole.start(InProcessGrid(toy_app(), 6), to_record(start()), 6).arrays)

    broken = strategy(tmp_path / "broken", kind)
    broken.secret = whole.secret  # drawn anew for each federation
    if moment == "between rounds":
        broken.start(InProcessGrid(toy_app(), 6), to_record(start()), 3)
    else:
        configure = broken.configure_train if moment == "while clients work" else broken.configure_evaluate

        def dies(server_round, *args):
            messages = configure(server_round, *args)
            if server_round == 4:
                raise KilledError
            return messages

        setattr(broken, configure.__name__, dies)
        with pytest.raises(KilledError):
            broken.start(InProcessGrid(toy_app(), 6), to_record(start()), 6)

    resumed = strategy(tmp_path / "broken", kind)
    result = resumed.start(InProcessGrid(toy_app(), 6), to_record(start()), 6)
    assert equal(tensors_of(result.arrays), expected)
    assert equal(resumed.v, whole.v)
    assert list(resumed.history.norms) == list(whole.history.norms)
    if whole.accountant is not None and resumed.accountant is not None:
        assert resumed.accountant.releases == whole.accountant.releases
    logs = [
        [json.loads(line) for line in (tmp_path / name / HISTORY_FILE).read_text().splitlines()]
        for name in ("whole", "broken")
    ]
    for log in logs:
        for line in log:
            del line["metrics"]["federated/round_seconds"]
    assert logs[0] == logs[1]  # a round that was not evaluated yet is evaluated after the restart


def test_a_finished_federation_does_nothing_more(tmp_path: Path) -> None:
    first = strategy(tmp_path).start(InProcessGrid(toy_app(), 6), to_record(start()), 2)
    again = strategy(tmp_path).start(InProcessGrid(toy_app(), 6), to_record(start()), 2)
    assert equal(tensors_of(first.arrays), tensors_of(again.arrays))


def test_stopping_remembers_the_rounds_before(tmp_path: Path) -> None:
    def rounds(folder: Path) -> int:
        return len((folder / HISTORY_FILE).read_text().splitlines())

    def rule() -> RoundStopping:
        return RoundStopping("val/accuracy", patience=3, mode="min")  # the toy's accuracy grows: round 4 ends it

    strategy(tmp_path / "a", stopping=rule()).start(InProcessGrid(toy_app(), 6), to_record(start()), 9)
    assert rounds(tmp_path / "a") == 4
    strategy(tmp_path / "b", stopping=rule()).start(InProcessGrid(toy_app(), 6), to_record(start()), 2)
    strategy(tmp_path / "b", stopping=rule()).start(InProcessGrid(toy_app(), 6), to_record(start()), 9)
    assert rounds(tmp_path / "b") == 4
    strategy(tmp_path / "b", stopping=rule()).start(InProcessGrid(toy_app(), 6), to_record(start()), 9)
    assert rounds(tmp_path / "b") == 4  # what has ended stays so


def test_the_file_holds_tensors_and_plain_values_only(tmp_path: Path) -> None:
    strategy(tmp_path, "poisson and noise").start(InProcessGrid(toy_app(), 6), to_record(start()), 1)
    content = torch.load(tmp_path / STATE_FILE, weights_only=True)
    assert content["round"] == 1
    assert set(content["arrays"]) == set(start())
    assert not list(tmp_path.glob("*.part"))


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_bytes(b"not a state")
    with pytest.raises(CheckpointError, match=STATE_FILE):
        strategy(tmp_path).start(InProcessGrid(toy_app(), 6), to_record(start()), 2)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    strategy(tmp_path).start(InProcessGrid(toy_app(), 6), to_record(start()), 1)
    with pytest.raises(CheckpointError, match=r"layer\.weight"):
        strategy(tmp_path).start(InProcessGrid(toy_app(), 6), to_record({**start(), "layer.weight": torch.zeros(2)}), 2)


def test_spent_privacy_is_not_forgotten(tmp_path: Path) -> None:
    strategy(tmp_path, "poisson and noise").start(InProcessGrid(toy_app(), 6), to_record(start()), 1)
    with pytest.raises(CheckpointError, match="privacy"):
        strategy(tmp_path).start(InProcessGrid(toy_app(), 6), to_record(start()), 2)


def test_other_settings_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    strategy(tmp_path).start(InProcessGrid(toy_app(), 6), to_record(start()), 1)
    other = FedMom(momentum=0.5, seed=3, fraction_train=0.5, service=Service(state_dir=str(tmp_path)))
    other.start(InProcessGrid(toy_app(), 6), to_record(start()), 2)
    assert "'momentum': (0.9, 0.5)" in caplog.text


def test_a_second_start_begins_anew_and_draws_other_noise() -> None:
    plain = FedMom(fraction_evaluate=0.0)
    first, second = (
        tensors_of(plain.start(InProcessGrid(toy_app(), 3), to_record(start()), 3).arrays) for _ in range(2)
    )
    assert equal(first, second)
    private = FedMom(fraction_evaluate=0.0, privacy=Privacy(0.5, 0.8, 1e-5, 3))
    first, second = (
        tensors_of(private.start(InProcessGrid(toy_app(), 3), to_record(start()), 1).arrays) for _ in range(2)
    )
    assert not equal(first, second)
    assert private.accountant is not None
    assert sum(release.rounds for release in private.accountant.releases) == 2


def test_the_log_of_a_state_that_was_removed_is_not_gone_on_with(tmp_path: Path) -> None:
    strategy(tmp_path).start(InProcessGrid(toy_app(), 6), to_record(start()), 3)
    (tmp_path / STATE_FILE).unlink()
    strategy(tmp_path).start(InProcessGrid(toy_app(), 6), to_record(start()), 2)
    assert [json.loads(line)["round"] for line in (tmp_path / HISTORY_FILE).read_text().splitlines()] == [1, 2]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    strategy(tmp_path).start(InProcessGrid(toy_app(), 6), to_record(start()), 2)
    log = tmp_path / HISTORY_FILE
    log.write_text(log.read_text() + '{"round": 3, "met')
    strategy(tmp_path).start(InProcessGrid(toy_app(), 6), to_record(start()), 3)
    assert [json.loads(line)["round"] for line in log.read_text().splitlines()] == [1, 2, 3]
    assert ServerState.load(tmp_path) is not None
