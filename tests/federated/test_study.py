from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr")

from torch.utils.data import TensorDataset

from benchmarks.results_file import ResultsFile
from lightning_distopt.federated import partitions
from recipes.federated import study
from recipes.federated.tasks import Classifier, Task, shakespeare


@pytest.fixture
def task() -> Task:
    x = torch.randn(120, 4)
    y = (x[:, 0] > 0).long()
    parts = partitions.iid(120, 10)
    data = TensorDataset(x, y)
    return Task("toy", lambda lr: Classifier(torch.nn.Linear(4, 2), lr), data, parts, data, (0.1, 1.0), 2, 1, 6, 0.6)


def test_the_study_runs_every_method_and_goes_on_where_it_was_stopped(task: Task, tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "rows.csv", study.COLUMNS, study.KEY)
    methods = len(study.METHODS)
    assert study.measure(task, results, methods + 1, (0, 1), 2) == methods + 1
    assert study.best_rate(task, "fedmom", results) is None
    study.measure(task, results, methods - 1, (0, 1), 2)
    assert study.best_rate(task, "fedmom", results) in task.rates
    assert study.measure(task, results, 1, (0, 1), 2) == 1  # another seed, at the best rate
    assert results.rows()[-1]["seed"] == "1"
    text = study.table(task, results)
    assert all(f"| {method} |" in text for method in study.METHODS)


def test_a_run_comes_back(task: Task) -> None:
    for method in ("fedavg", "fedmom"):
        run = study.Run(method, 1.0, 3)
        assert study.federate(task, run, 2) == study.federate(task, run, 2)


def test_shakespeares_roles_are_the_clients(tmp_path: Path) -> None:
    speeches = [
        f"{role}:\n{'To be or not to be, that is the question. ' * 8}" for role in ("HAMLET", "OPHELIA", "HAMLET")
    ]
    (tmp_path / "input.txt").write_text("\n\n".join(speeches))
    made = shakespeare(tmp_path, clients=2, length=16)
    assert len(made.parts) == 2
    assert sum(len(part) for part in made.parts) == len(made.data)
    inputs, targets = made.data[0]
    assert torch.equal(inputs[1:], targets[:-1])
