"""The recipe's federation on processes of its own: TLS, keys, and everything going wrong at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr")
pytest.importorskip("sklearn")

from flwr.app import Context, RecordDict

from lightning_distopt.federated import InProcessGrid
from lightning_distopt.federated.history import History
from lightning_distopt.federated.state import ServerState
from tests.federated.deployment import Deployment
from tests.federated.toy import equal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc"),
]
APP = Path(__file__).parent / "faulty_app"
ROUNDS = 4


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path)
    yield made
    made.close()


def rounds(folder: Path) -> list[dict]:
    return History(folder).read()


def reference(folder: Path) -> ServerState:
    """The same federation in this process, where the killed client fails at once."""
    from tests.federated.faulty_app import faulty_federation

    grid = InProcessGrid(faulty_federation.client_app, 4)
    grid.contexts[3].node_config["fault"] = "liar"
    grid.contexts[4].node_config["fault"] = "hangs"
    config = {"num-server-rounds": ROUNDS, "fraction-train": 1.0, "fraction-evaluate": 0.0, "clients": 4}
    config |= {"min-replies": 2, "state-dir": str(folder)}
    faulty_federation.server_app(grid, Context(1, 0, {}, RecordDict(), config))
    state = ServerState.load(folder)
    assert state is not None
    return state


@pytest.mark.timeout(1800)
def test_a_federation_survives_clients_and_its_server(deployment: Deployment, tmp_path: Path) -> None:
    state, marker = tmp_path / "state", tmp_path / "hangs"
    deployment.superlink()
    for number in range(4):
        key = deployment.key(f"node{number}")
        deployment.flwr("supernode", "register", key.with_suffix(".pub"), "here")
        fault = {2: ' fault="liar"', 3: f' fault="hangs" marker="{marker}"'}.get(number, "")
        deployment.supernode(f"node{number}", f"partition-id={number} num-partitions=4{fault}", key)
    place = "partition-id=0 num-partitions=4"
    deployment.supernode("stranger", place, deployment.key("stranger"))  # a key that nobody has registered
    deployment.supernode("keyless", place, None)
    deployment.supernode("plain", place, None, tls=False)

    run = f'num-server-rounds={ROUNDS} state-dir="{state}"'
    deployment.flwr("run", APP, "here", "--run-config", run)
    deployment.wait_until(marker.exists, 600, "the hanging client's start")
    deployment.kill("node3")
    deployment.wait_until(lambda: len(rounds(state)) >= 2, 600, "round 2")
    deployment.kill("superlink")

    done = len(rounds(state))
    assert done < ROUNDS
    deployment.superlink()
    deployment.flwr("run", APP, "here", "--run-config", f"{run} clients=3")  # those that are left
    deployment.wait_until(lambda: len(rounds(state)) == ROUNDS, 600, "the last round")

    log = rounds(state)
    assert [line["round"] for line in log] == [1, 2, 3, 4]
    for line, reason in zip(log, ("malformed", "non_finite", "norm"), strict=False):
        assert line["metrics"][f"federated/refused_{reason}"] == 1
    first = log[0]["metrics"]
    assert first["federated/participants"] == 2
    assert first["federated/dropped"] + first.get("federated/refused_error", 0) == 1  # whichever comes first
    assert {client for line in log for client in line["clients"]["weights"]} == {"0", "1", "2"}

    expected, reached = reference(tmp_path / "reference"), ServerState.load(state)
    assert reached is not None
    assert equal(reached.arrays, expected.arrays)
    assert equal(reached.v, expected.v)
    nodes = json.loads(deployment.flwr("supernode", "ls", "here", "--format", "json"))["nodes"]
    assert len(nodes) == 4  # those that were registered; nobody else has come in
    assert "No SuperNode found" in deployment.log("superlink")
