from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("flwr")
pytest.importorskip("sklearn")

from benchmarks import federated
from benchmarks.results_file import ResultsFile

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads
def test_a_server_holds_as_many_models_for_many_clients_as_for_few() -> None:
    few, many = (federated.copies_of_the_model("FedMom", clients, 2_000_000) for clients in (20, 60))
    assert many < few + 2  # of 40 more


def test_the_tables(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "rows.csv", federated.COLUMNS, federated.KEY)
    for name, value in (("FedAvg of Flower", 2.0), ("FedMom", 3.0)):
        for repeat in range(3):
            results.record(
                what="pace", strategy=name, clients=10, parameters=9, repeat=repeat, value=value, unit="rounds/s"
            )
        results.record(what="memory", strategy=name, clients=10, parameters=9000, repeat=0, value=value, unit="models")
    text = federated.tables(results)
    assert "| FedMom | 3.00 (3.00, 3.00, 3.00) | 1.50 |" in text
    assert "| FedMom | 9,000 | 10 | 3.0 |" in text
