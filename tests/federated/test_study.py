from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr")

from torch.utils.data import TensorDataset

from benchmarks.results_file import ResultsFile
from lightning_distopt.errors import NonFiniteError
from lightning_distopt.federated import FedMom, partitions
from recipes.federated import study
from recipes.federated.curves import Curves, draw
from recipes.federated.tasks import Classifier, Task, shakespeare


@pytest.fixture
def task() -> Task:
    x = torch.randn(120, 4)
    y = (x[:, 0] > 0).long()
    parts = partitions.iid(120, 10)
    data = TensorDataset(x, y)
    return Task("toy", lambda lr: Classifier(torch.nn.Linear(4, 2), lr), data, parts, data, (0.1, 1.0), 2, 1, 6, 0.6)


def curves(results: ResultsFile, task: Task) -> Curves:
    return Curves(task.name, results, tuple(study.METHODS), task.rates)


def test_the_study_runs_every_method_and_goes_on_where_it_was_stopped(task: Task, tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "rows.csv", study.COLUMNS, study.KEY)
    methods = len(study.METHODS)
    assert study.measure(task, results, methods + 1, (0, 1), 2) == methods + 1
    assert curves(results, task).best_rate("fedmom") is None
    study.measure(task, results, methods - 1, (0, 1), 2)
    assert curves(results, task).beyond("fedmom") in (0.03, 3.0)  # the best of two rates is at an end
    assert curves(results, task).best_rate("fedmom") is None
    study.measure(task, results, methods, (0, 1), 2)
    assert curves(results, task).best_rate("fedmom") is not None
    assert study.measure(task, results, 1, (0, 1), 2) == 1  # another seed, at the best rate
    assert results.rows()[-1]["seed"] == "1"
    text = curves(results, task).table()
    assert all(f"| {method} |" in text for method in study.METHODS)


def rows(path: Path, **finals: tuple[list[float], ...]) -> Curves:
    """Rows of three rates: at 0.1 the curves given, one a seed; beside it worse ones."""
    results = ResultsFile(path / "rows.csv", study.COLUMNS, study.KEY)
    for method, found in finals.items():
        for seed, curve in enumerate(found):
            nothing = [0.0] * len(curve)
            for rate, values in ((0.1, curve), (1.0, nothing), (0.03, nothing))[: 1 if seed else 3]:
                row = {"task": "toy", "method": method, "rate": rate, "seed": seed, "target": 0.5}
                final = sum(values[-5:]) / 5
                results.append({**row, "final": final, "best": max(values), "accuracies": str(values)})
    return Curves("toy", results, ("fedavg", "fedavgm", "fedmom"))


def test_rounds_are_counted_on_the_mean_of_five_for_all_alike(tmp_path: Path) -> None:
    slow = [at / 20 for at in range(21)]
    fast = [min(1.0, at / 10) for at in range(21)]
    lucky = [1.0 if at == 3 else value for at, value in enumerate(slow)]
    made = rows(tmp_path, fedavg=(slow, slow), fedavgm=(lucky, slow), fedmom=(fast, fast))
    assert made.best_rate("fedmom") == 0.1
    assert made.rounds_to("fedavg", 0.5) == {0: 12, 1: 12}  # the mean over rounds 8 to 12
    assert made.rounds_to("fedmom", 0.5) == {0: 7, 1: 7}
    assert made.rounds_to("fedavg", 0.95) == {0: math.inf, 1: math.inf}
    assert made.rounds_to("fedavgm", 0.5)[0] == 12  # one good round is not the target
    assert made.shares("fedavg") == {0: 1.0, 1: 1.0}
    assert made.shares("fedmom") == {0: 12 / 20, 1: 12 / 20}
    assert "0.60 of its rounds" in made.verdict()
    assert made.verdict().count("reached") == 2


def test_targets_that_are_missed_are_said_to_be(tmp_path: Path) -> None:
    good, bad = [min(1.0, at / 10) for at in range(21)], [at / 100 for at in range(21)]
    made = rows(tmp_path, fedavg=(good, good), fedavgm=(good, good), fedmom=(bad, bad))
    assert "| -, - |" in made.table()
    assert made.verdict().count("missed") == 2
    assert "not finished" in rows(tmp_path / "new", fedavg=(good,)).verdict()


def test_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    made = rows(tmp_path, fedavg=([0.1, 0.5],), fedmom=([0.1, 0.9],))
    draw([made, made], tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert study.main(["--table", "--results", str(tmp_path / "none.csv")]) == 0
    with pytest.raises(SystemExit):
        study.main(["mnist"])


def test_a_run_comes_back(task: Task) -> None:
    for method in ("fedavg", "fedmom"):
        run = study.Run(method, 1.0, 3)
        assert study.federate(task, run, 2) == study.federate(task, run, 2)


def test_a_run_that_diverges_counts_as_nothing_learnt(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    class Diverges(FedMom):
        def aggregate_train(self, server_round, replies):
            if server_round == 2:
                raise NonFiniteError("infinite")
            return super().aggregate_train(server_round, replies)

    monkeypatch.setitem(study.METHODS, "fedmom", lambda seed, options: Diverges(**options))
    curve = study.federate(task, study.Run("fedmom", 0.1, 0), 3)
    assert [value > 0 for value in curve] == [True, True, False, False]


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
