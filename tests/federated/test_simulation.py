"""Flower's simulation on Ray trains what one process trains."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("flwr")
pytest.importorskip("ray")

from lightning_distopt.federated import FedMom, InProcessGrid, lightning_client_app, lightning_server_app
from lightning_distopt.federated.client import shared_state
from lightning_distopt.federated.records import tensors_of, to_record
from tests.federated.lightning_toy import CPU, Line, Points
from tests.federated.toy import equal


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_a_simulation_and_one_process_train_the_same_model() -> None:
    before, results = dict(os.environ), []  # to import it sets variables

    from flwr.simulation import run_simulation

    def strategy() -> FedMom:
        return FedMom(seed=2, fraction_train=0.5, min_available_nodes=4, compressor="topk:0.5")

    client = lightning_client_app(Line, Points, local_epochs=1, optimizer_state="kept", trainer=CPU)
    expected = strategy().start(InProcessGrid(client, 4), to_record(shared_state(Line())), 3)

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    server = lightning_server_app(Line, lambda context: strategy(), 3, on_end=results.append)
    resources = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 2, "log_to_driver": False}}
    try:
        run_simulation(server, client, 4, backend_config=resources)
    finally:
        import ray

        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)
    assert equal(tensors_of(results[0].arrays), tensors_of(expected.arrays))
    for server_round, metrics in expected.evaluate_metrics_clientapp.items():
        assert dict(results[0].evaluate_metrics_clientapp[server_round]) == dict(metrics)
