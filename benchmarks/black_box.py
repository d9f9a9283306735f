"""What zeroth-order methods reach for their queries: sparse classification, an attack, fine-tuning; speed and memory.

    python -m benchmarks.black_box a9a --data <a9a.gz>
    python -m benchmarks.black_box w8a --data <w8a.gz>
    python -m benchmarks.black_box attack --data <folder of MNIST's idx files>         (also attack_blocks, attack_ten)
    python -m benchmarks.black_box finetune --data <text to fine-tune on> --pretrain <text to begin with>
    python -m benchmarks.black_box speed
    python -m benchmarks.black_box memory
    python -m benchmarks.black_box --table             (the tables of docs/zeroth_order.md)
    python -m benchmarks.black_box --draw docs          (its pictures; with --data <folder of MNIST> that of the digits too)

Every method of a study gets the same budget of queries and the same grid of rates (first seed); its two best rates are then
repeated with the other seeds, and the better mean is reported. Runs are appended to `benchmarks/results/black_box.csv`; what
is there is not run again, so that a study may be stopped and resumed. Queries for the objective that is reported are not
counted.
"""

from __future__ import annotations

import argparse
import itertools
import math
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results_file import ResultsFile, machine, versions
from lightning_distopt.errors import BudgetError
from lightning_distopt.optimizers.proximal import ElasticNet, GroupLasso, Proximal
from lightning_distopt.zeroth_order import (
    CoordinateEstimator,
    Estimator,
    GaussianEstimator,
    ZeroOrderOptimizer,
    ZOProxSAGA,
    ZOProxSGD,
    ZOProxSVRG,
)

FOLDER = Path(__file__).parent / "results"
RESULTS = ResultsFile(
    FOLDER / "black_box.csv",
    (
        "study",
        "method",
        "estimator",
        "rate",
        "seed",
        "queries",
        "objective",
        "slope",
        "extra",
        "seconds",
        "curve",
        "versions",
    ),
    ("study", "method", "estimator", "rate", "seed"),
)
FIGURES = ResultsFile(FOLDER / "black_box_costs.csv", ("figure", "value", "unit", "machine", "versions"), ("figure",))
METHODS: dict[str, type[ZeroOrderOptimizer]] = {
    "ZO-ProxSGD": ZOProxSGD,
    "ZO-ProxSVRG": ZOProxSVRG,
    "ZO-ProxSAGA": ZOProxSAGA,
}
SEEDS = (0, 1, 2)
POINTS = 40  # of a curve, evenly spaced in the logarithm of the queries


@dataclass
class Problem:
    """A problem to be asked about.

    Attributes:
        start: makes the parameters.
        f: ``f(params, indices) -> losses``.
        n: samples.
        proximal: the term that is not smooth.
        scale: 1 / L, the unit of rates.
        report: makes (objective, squared norm of the gradient mapping or NaN, extra) from the parameters.
    """

    start: Callable[[], nn.Parameter]
    f: Callable[[tuple[Tensor, ...], Tensor], Tensor]
    n: int
    proximal: Proximal
    scale: float
    report: Callable[[Tensor], tuple[float, float, str]]


@dataclass
class Study:
    """Methods compared under equal conditions.

    Attributes:
        budgets: queries by estimator.
        rates: the grid by estimator, in units of 1 / L.
        chosen: estimators.
    """

    budgets: dict[str, int]
    rates: dict[str, tuple[float, ...]]
    chosen: dict[str, Estimator]


STUDIES = {
    "a9a": Study(
        {"coordinate": 200_000_000, "Gaussian": 1_000_000},
        {"coordinate": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0), "Gaussian": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)},
        {"coordinate": CoordinateEstimator(), "Gaussian": GaussianEstimator()},
    ),
    "w8a": Study(
        {"coordinate": 100_000_000, "Gaussian": 500_000},
        {"coordinate": (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0), "Gaussian": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)},
        {"coordinate": CoordinateEstimator(), "Gaussian": GaussianEstimator()},
    ),
    "attack": Study({"Gaussian": 60_000}, {"Gaussian": (0.1, 1.0, 10.0, 100.0)}, {"Gaussian": GaussianEstimator(10)}),
    "attack_blocks": Study(
        {"Gaussian": 60_000}, {"Gaussian": (0.1, 1.0, 10.0, 100.0)}, {"Gaussian": GaussianEstimator(10)}
    ),
    "attack_ten": Study(
        {"coordinate": 300_000}, {"coordinate": (1.0, 10.0, 100.0)}, {"coordinate": CoordinateEstimator()}
    ),
}
SAMPLES = {"a9a": 2000, "w8a": 1000, "attack": 100, "attack_blocks": 100, "attack_ten": 10}
FINETUNE_QUERIES, FINETUNE_RATES = 25_600, (3e-4, 1e-3, 3e-3, 1e-2)
METHOD_NAMES = {"sgd": "ZO-ProxSGD", "svrg": "ZO-ProxSVRG", "saga": "ZO-ProxSAGA"}
BLOCKS, BLOCK_WEIGHT = 4, 0.02  # pixels a side of the squares of attack_blocks, and the weight of their norms


def sparse(path: str, n: int) -> Problem:
    """The paper's classification on a part of a LIBSVM file."""
    from recipes.black_box import LibsvmData

    data = LibsvmData(path, limit=n)
    data.setup("fit")
    assert data.train_set is not None
    a, y = data.train_set.tensors
    signed, proximal = -y[:, None] * a, ElasticNet(1e-5, 2e-5)
    scale = 1 / float(0.0962251 * a.square().sum(1).max())  # the largest second derivative of the sigmoid is 0.0962

    def report(x: Tensor) -> tuple[float, float, str]:
        s = torch.sigmoid(signed @ x)
        gradient = signed.T @ (s * (1 - s)) / len(y)
        step = 0.5 * scale
        mapping = (x - proximal(x - step * gradient, step)) / step
        zeros = f"{float((x == 0).double().mean()):.3f}"
        return float(s.mean() + proximal.value(x)), float(mapping.square().sum()), zeros

    return Problem(
        lambda: nn.Parameter(torch.zeros(a.shape[1], dtype=torch.float64)),
        lambda params, indices: torch.sigmoid(signed[indices] @ params[0]),
        len(y),
        proximal,
        scale,
        report,
    )


def attack(folder: str, n: int, blocks: bool = False) -> Problem:
    """A universal perturbation of images of the digit 1, against the network of the recipe."""
    from recipes.black_box.attack import attacked, squares

    images, labels, net = victim_and_images(folder, n)
    proximal: Proximal = GroupLasso(BLOCK_WEIGHT, squares(BLOCKS)) if blocks else ElasticNet(1e-5, 2e-5)

    def f(params: tuple[Tensor, ...], indices: Tensor) -> Tensor:
        a = images[indices]
        moved = attacked(a, params[0])
        logits = net(moved)
        others = torch.cat([logits[:, :1], logits[:, 2:]], 1).amax(1)
        return torch.relu(logits[:, 1] - others) + 0.2 * (moved - a).square().sum((1, 2, 3))

    def report(x: Tensor) -> tuple[float, float, str]:
        moved = attacked(images, x)
        wrong = float((net(moved).argmax(1) != labels).float().mean())
        change = float((moved - images).square().sum((1, 2, 3)).mean())
        extra = f"{wrong:.2f} {change:.2f} {float((x == 0).double().mean()):.2f}"
        return float(f((x,), torch.arange(n)).mean() + proximal.value(x)), math.nan, extra

    return Problem(lambda: nn.Parameter(torch.zeros(1, 28, 28)), f, n, proximal, 1.0, report)


def victim_and_images(folder: str, n: int) -> tuple[Tensor, Tensor, nn.Module]:
    """Return n images of the digit 1 that the network of the recipe reads rightly, their labels, and the network."""
    from recipes.black_box import AttackData, DigitClassifier

    path = train_victim(folder)
    net = DigitClassifier.load_from_checkpoint(path, map_location="cpu").requires_grad_(False).eval().net
    data = AttackData(folder, str(path), label=1, count=n)
    data.setup("fit")
    assert data.images is not None
    images, labels = data.images.tensors
    return images, labels, net


def train_victim(folder: str) -> Path:
    """Train the network of the recipe once, on 20,000 images, and keep it beside the runs."""
    import lightning.pytorch as pl

    from recipes.black_box import DigitClassifier, MnistData

    path = Path("runs") / "black_box" / "victim.ckpt"
    if not path.exists():
        pl.seed_everything(0, verbose=False)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(DigitClassifier(), MnistData(folder, limit=20_000))
        trainer.save_checkpoint(path, weights_only=True)
        print(f"victim: {trainer.callback_metrics['val/accuracy']:.4f} of the test images", flush=True)
    return path


def walk(
    problem: Problem, method: str, estimator: Estimator, budget: int, rate: float, seed: int
) -> Iterator[tuple[Tensor, int]]:
    """Step until the budget is spent; yield the parameters and the queries so far after each step."""
    x = problem.start()
    optimizer = METHODS[method](
        [x], n_samples=problem.n, lr=rate * problem.scale, estimator=estimator, proximal=problem.proximal, max_queries=budget,
        seed=seed,
    )  # fmt: skip
    try:
        while True:
            optimizer.step(objective=problem.f)
            yield x.detach(), optimizer.queries
    except BudgetError:
        return


def run(problem: Problem, method: str, estimator: Estimator, budget: int, rate: float, seed: int) -> dict[str, Any]:
    """Walk until the budget is spent; return the last objective, the slope of the gradient mapping, and the curve."""
    marks = iter([budget * 10 ** (-3 + 3 * k / (POINTS - 1)) for k in range(POINTS)])
    mark, curve, start = next(marks), [], time.perf_counter()
    for x, queries in walk(problem, method, estimator, budget, rate, seed):
        if queries >= mark:
            while queries >= mark:
                mark = next(marks, math.inf)
            curve.append((queries, *problem.report(x)[:2]))
    objective, mapping, extra = problem.report(x)
    curve.append((queries, objective, mapping))
    return {
        "queries": queries,
        "objective": f"{objective:.6g}",
        "slope": f"{slope(curve, budget):.3f}",
        "extra": extra,
        "seconds": f"{time.perf_counter() - start:.1f}",
        "curve": ";".join(f"{q}:{f:.5g}:{g:.4g}" for q, f, g in curve),
    }


def slope(curve: Sequence[tuple[float, float, float]], budget: int) -> float:
    """Return the least-squares slope of log |mapping|^2 over log queries, from 5 % of the budget on."""
    points = [(math.log(q), math.log(g)) for q, _, g in curve if q >= 0.05 * budget and g > 0]
    if len(points) < 3:
        return math.nan
    mx, my = (statistics.mean(values) for values in zip(*points, strict=True))
    return sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)


def averaged(curve: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Return the curve with the gradient mapping's mean over all queries so far: what the theory bounds by 1 / T."""
    total, before, out = 0.0, (0.0, curve[0][2]), []
    for q, f, g in curve:
        total += (q - before[0]) * (g + before[1]) / 2
        before = (q, g)
        out.append((q, f, total / q))
    return out


def baseline(problem: Problem, name: str, budget: int, seed: int) -> dict[str, Any] | None:
    """Run an optimizer of nevergrad on the whole objective, each evaluation n queries; ``None`` where it is missing."""
    try:
        import nevergrad
    except ImportError:
        return None
    start, everything = time.perf_counter(), torch.arange(problem.n)
    parametrization = nevergrad.p.Array(shape=problem.start().shape)
    parametrization.random_state.seed(seed)
    optimizer = nevergrad.optimizers.registry[name](parametrization, budget=budget // problem.n)
    curve, dtype = [], problem.start().dtype

    def value(point: Any) -> float:
        x = torch.as_tensor(point, dtype=dtype)
        return float(problem.f((x,), everything).mean() + problem.proximal.value(x))

    for k in range(1, budget // problem.n + 1):
        asked = optimizer.ask()
        optimizer.tell(asked, value(asked.value))
        if k % max(1, budget // problem.n // POINTS) == 0:
            best = optimizer.provide_recommendation().value
            curve.append((k * problem.n, value(best), math.nan))
    return {
        "queries": budget // problem.n * problem.n,
        "objective": f"{curve[-1][1]:.6g}",
        "slope": "nan",
        "extra": problem.report(torch.as_tensor(optimizer.provide_recommendation().value, dtype=dtype))[2],
        "seconds": f"{time.perf_counter() - start:.1f}",
        "curve": ";".join(f"{q}:{f:.5g}:{g:.4g}" for q, f, g in curve),
    }


def zoo(folder: str, images: int) -> None:
    """Attack images one by one with ZOO as ART has it (each its own perturbation), counting what it asks."""
    try:
        from art.attacks.evasion import ZooAttack
        from art.estimators.classification import BlackBoxClassifierNeuralNetwork
    except ImportError:
        print("ART is not installed: its ZOO is left out.")
        return
    key = {"study": "attack_ten", "method": "ART ZOO", "estimator": "coordinate", "rate": "-", "seed": 0}
    if RESULTS.find(**key) is not None:
        return
    clean, labels, net = victim_and_images(folder, images)
    asked, start = 0, time.perf_counter()

    def predict(batch: Any) -> Any:
        nonlocal asked
        asked += len(batch)
        return net(torch.as_tensor(batch, dtype=torch.float32)).softmax(1).numpy()

    black_box = BlackBoxClassifierNeuralNetwork(
        predict, input_shape=(1, 28, 28), nb_classes=10, channels_first=True, clip_values=(-0.5, 0.5)
    )
    attack = ZooAttack(
        black_box, max_iter=150, binary_search_steps=2, use_resize=False, use_importance=False, verbose=False
    )
    moved = torch.as_tensor(attack.generate(clean.numpy()), dtype=torch.float32)
    wrong = float((net(moved).argmax(1) != labels).float().mean())
    change = float((moved - clean).square().sum((1, 2, 3)).mean())
    RESULTS.append({**key, "queries": asked, "objective": "nan", "slope": "nan", "extra": f"{wrong:.2f} {change:.2f}",
                    "seconds": f"{time.perf_counter() - start:.1f}", "curve": "", "versions": versions()})  # fmt: skip
    print(f"ART's ZOO: {asked} queries for {images} images, {wrong:.2f} misread, change {change:.2f}", flush=True)


def best_rates(name: str, method: str, estimator: str) -> list[float]:
    """Return the rates of the grid, the lowest last objective of the first seed first."""
    rows = [r for r in mine(name, method, estimator) if int(r["seed"]) == SEEDS[0]]
    return [float(r["rate"]) for r in sorted(rows, key=lambda r: float(r["objective"]))]


def best_rate(name: str, method: str, estimator: str) -> float:
    """Return the rate with the lowest mean of last objectives, of those that all seeds were run with."""
    objectives: dict[float, list[float]] = {}
    for row in mine(name, method, estimator):
        objectives.setdefault(float(row["rate"]), []).append(float(row["objective"]))
    most = max(len(values) for values in objectives.values())
    return min((r for r in objectives if len(objectives[r]) == most), key=lambda r: statistics.mean(objectives[r]))


def mine(name: str, method: str, estimator: str) -> list[dict[str, str]]:
    return [r for r in RESULTS.rows() if (r["study"], r["method"], r["estimator"]) == (name, method, estimator)]


def plan(name: str) -> Iterator[tuple[str, str, float, int]]:
    """Yield the runs of a study: the grid with the first seed, then its two best rates with the others."""
    study = STUDIES[name]
    for estimator in study.chosen:
        for rate, method in itertools.product(study.rates[estimator], METHODS):
            yield method, estimator, rate, SEEDS[0]
        for seed, method in itertools.product(SEEDS[1:], METHODS):
            for rate in best_rates(name, method, estimator)[:2]:
                yield method, estimator, rate, seed


def make_problem(name: str, data: str) -> Problem:
    """Make the problem of a study."""
    if name.startswith("attack"):
        return attack(data, SAMPLES[name], blocks=name == "attack_blocks")
    return sparse(data, SAMPLES[name])


def measure(name: str, data: str, until: float) -> None:
    """Run what is missing of a study, and no run after ``until``."""
    problem = make_problem(name, data)
    study = STUDIES[name]
    for method, estimator, rate, seed in plan(name):
        key = {"study": name, "method": method, "estimator": estimator, "rate": f"{rate:g}", "seed": seed}
        if RESULTS.find(**key) is not None:
            continue
        if time.monotonic() > until:
            return
        found = run(problem, method, study.chosen[estimator], study.budgets[estimator], rate, seed)
        RESULTS.append({**key, **found, "versions": versions()})
        print(f"{name} {method:12} {estimator:10} {rate:<6g} seed {seed}  {found['objective']}  slope {found['slope']}  "
              f"{found['extra']}  {found['seconds']} s", flush=True)  # fmt: skip
    for estimator, optimizer in itertools.product(study.chosen, ("CMA", "OnePlusOne")):
        for seed in SEEDS:
            key = {"study": name, "method": f"nevergrad {optimizer}", "estimator": estimator, "rate": "-", "seed": seed}
            if RESULTS.find(**key) is not None or time.monotonic() > until:
                continue
            compared = baseline(problem, optimizer, study.budgets[estimator], seed)
            if compared is not None:
                RESULTS.append({**key, **compared, "versions": versions()})
                print(
                    f"{name} nevergrad {optimizer} {estimator} seed {seed}  {compared['objective']}  {compared['seconds']} s",
                    flush=True,
                )


def finetune(data: str, pretrain: str, until: float) -> None:
    """Pre-train a small Transformer with gradients on one text, then fine-tune it on another by queries."""
    import lightning.pytorch as pl

    from recipes.black_box import FineTuning, TextData, TransformerLM

    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    start = Path("runs") / "black_box" / "start.ckpt"
    if not start.exists():
        pl.seed_everything(0, verbose=False)
        trainer = pl.Trainer(max_steps=400, limit_val_batches=0, **quiet)
        module = TransformerLM(optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
        trainer.fit(module, TextData(pretrain, length=64, batch_size=32))
        trainer.save_checkpoint(start)

    class Traced(FineTuning):
        """Keeps the objective of every evaluation beside its queries."""

        curve: list[tuple[int, float]]

        def on_evaluation(self, value: float) -> None:
            self.curve.append((self.optimizers().optimizer.queries, value))  # type: ignore[union-attr]

    def fine_tune(method: str, rate: float, seed: int) -> None:
        name = METHOD_NAMES[method]
        key = {"study": "finetune", "method": name, "estimator": "Gaussian", "rate": f"{rate:g}", "seed": seed}
        if RESULTS.find(**key) is not None or time.monotonic() > until:
            return
        began = time.perf_counter()
        tuned = Traced(str(start), method=method, lr=rate, seed=seed, max_queries=FINETUNE_QUERIES,  # type: ignore[arg-type]
                       options={"schedule": "constant"} if method == "sgd" else None)  # fmt: skip
        tuned.curve = []
        texts = TextData(data, length=64, steps=FINETUNE_QUERIES // 64, limit=1000)
        trainer = pl.Trainer(max_epochs=1, limit_val_batches=0, **quiet)
        trainer.fit(tuned, texts)
        queries = int(trainer.callback_metrics["zo/queries"])
        end = pl.Trainer(**quiet).validate(tuned, texts, verbose=False)[0]["val/loss"]
        RESULTS.append({**key, "queries": queries, "objective": f"{end:.4f}", "slope": "nan",
                        "extra": f"{tuned.curve[0][1]:.4f}", "seconds": f"{time.perf_counter() - began:.1f}",
                        "curve": ";".join(f"{q}:{f:.5g}:nan" for q, f in tuned.curve), "versions": versions()})  # fmt: skip
        print(f"finetune {name} {rate:g} seed {seed}: {end:.4f} with {queries} queries", flush=True)

    for rate, method in itertools.product(FINETUNE_RATES, METHOD_NAMES):
        fine_tune(method, rate, SEEDS[0])
    for seed, (method, name) in itertools.product(SEEDS[1:], METHOD_NAMES.items()):
        for rate in best_rates("finetune", name, "Gaussian")[:2]:
            fine_tune(method, rate, seed)


# ---- speed and memory ------------------------------------------------------------------------------------------------


def speed() -> None:
    """Time a query of a small network, by closure and by objective; the same optimizer, estimator and samples."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 1))
    inputs, targets = torch.randn(256, 20), torch.randn(256)
    names = [name for name, _ in net.named_parameters()]

    def closure(indices: Tensor) -> Tensor:
        return (net(inputs[indices]).squeeze(1) - targets[indices]).square()

    def objective(params: tuple[Tensor, ...], indices: Tensor) -> Tensor:
        values = dict(zip(names, params, strict=True))
        return (torch.func.functional_call(net, values, (inputs[indices],)).squeeze(1) - targets[indices]).square()

    for name, estimator in (
        ("coordinates", CoordinateEstimator()),
        ("Gaussian, each sample", GaussianEstimator(1, "per_example")),
    ):
        seconds = {}
        for form, asked in (("closure", {"closure": closure}), ("objective", {"objective": objective})):
            optimizer = ZOProxSGD(net.parameters(), n_samples=256, lr=1e-6, batch_size=40, estimator=estimator)
            optimizer.step(**asked)  # type: ignore[arg-type]
            times = []
            for _ in range(3):
                before, start = optimizer.queries, time.perf_counter()
                while time.perf_counter() - start < 1.0:
                    optimizer.step(**asked)  # type: ignore[arg-type]
                times.append((time.perf_counter() - start) / (optimizer.queries - before))
            seconds[form] = min(times)
            _figure(f"seconds a query, {name}, {form}", f"{seconds[form]:.3e}", "s")
        _figure(f"speed-up of the objective, {name}", f"{seconds['closure'] / seconds['objective']:.1f}", "times")


def memory() -> None:
    """Compare peak memory of inference and of training by queries, each in a process of its own."""
    base, inference, training = (
        min(int(subprocess.run([sys.executable, "-m", "benchmarks.black_box", "--peak", kind], capture_output=True, text=True,
                               check=True).stdout.split()[-1]) for _ in range(2))
        for kind in ("nothing", "inference", "training")
    )  # fmt: skip
    _figure("peak memory of inference", f"{(inference - base) / 1024:.0f}", "MB above an idle process")
    _figure("peak memory of ZO-ProxSGD, layer by layer", f"{(training - base) / 1024:.0f}", "MB above an idle process")
    _figure("memory of ZO-ProxSGD over inference", f"{(training - base) / (inference - base):.3f}", "times")
    _figure("the same, whole processes", f"{training / inference:.3f}", "times")


def peak(kind: str) -> int:
    """Return this process's largest resident size in KiB, after a walk over a model of 75 million parameters."""
    torch.set_num_threads(1)
    if kind != "nothing":
        layers = [layer for _ in range(75) for layer in (nn.Linear(1000, 1000), nn.Tanh())]
        model, inputs = nn.Sequential(*layers).requires_grad_(False), torch.randn(32, 1000)
        with torch.inference_mode():
            model(inputs)
        if kind == "training":
            optimizer = ZOProxSGD(model.parameters(), n_samples=32, lr=1e-6, batch_size=32, replacement=False,
                                  estimator=GaussianEstimator(1, "per_batch"), module=model)  # fmt: skip
            for _ in range(2):
                optimizer.step(lambda i: model(inputs[i]).square().mean(1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _figure(figure: str, value: str, unit: str) -> None:
    FIGURES.append({"figure": figure, "value": value, "unit": unit, "machine": machine(), "versions": versions()})
    print(f"{figure}: {value} {unit}", flush=True)


# ---- tables and pictures ---------------------------------------------------------------------------------------------


def curves(name: str, method: str, estimator: str) -> list[list[tuple[float, float, float]]]:
    """Return the curves of a method at its best rate, one a seed."""
    rate = f"{best_rate(name, method, estimator):g}" if not method.startswith("nevergrad") else "-"
    found = [r for r in mine(name, method, estimator) if r["rate"] == rate]
    return [[tuple(map(float, p.split(":"))) for p in r["curve"].split(";")] for r in found]  # type: ignore[misc]


def reached(curve: Sequence[tuple[float, float, float]], objective: float) -> float:
    """Return the queries after which the objective was no higher than ``objective``; infinite if never."""
    return next((q for q, f, _ in curve if f <= objective), math.inf)


def table(name: str) -> str:
    """Return a study as a Markdown table: mean and spread over seeds at each method's best rate."""
    lines = [
        f"`{name}`", "",
        "| estimator | method | best rate | queries | objective, mean (lowest to highest) | slope | of means "
        "| to SGD's last | extra |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    methods = [*METHODS, *sorted({r["method"] for r in RESULTS.rows() if r["method"].startswith("nevergrad")})]
    for estimator, method in itertools.product(STUDIES[name].chosen, methods):
        found = mine(name, method, estimator)
        if not found:
            continue
        rate = "-" if method.startswith("nevergrad") else f"{best_rate(name, method, estimator):g}"
        rows = [r for r in found if r["rate"] == rate]
        values = [float(r["objective"]) for r in rows]
        slopes = [float(r["slope"]) for r in rows]
        budget = STUDIES[name].budgets[estimator]
        means = [slope(averaged(c), budget) for c in curves(name, method, estimator)]
        target = statistics.mean(c[-1][1] for c in curves(name, "ZO-ProxSGD", estimator))
        to = statistics.mean(reached(c, target) for c in curves(name, method, estimator))
        lines.append(
            f"| {estimator} | {method} | {rate} | {int(rows[0]['queries']):,} | {statistics.mean(values):.5g} "
            f"({min(values):.5g} to {max(values):.5g}, {len(rows)} seeds) | {statistics.mean(slopes):.2f} | "
            f"{statistics.mean(means):.2f} | "
            f"{'never' if math.isinf(to) else f'{to:.3g}'} | {rows[0]['extra']} |"
        )
    return "\n".join(lines)


def draw(folder: Path) -> None:
    """Write one picture a study: objective, and where it is known the gradient mapping, against queries."""
    from matplotlib.figure import Figure

    colours = {"ZO-ProxSGD": "#4c566a", "ZO-ProxSVRG": "#d1495b", "ZO-ProxSAGA": "#00798c", "nevergrad CMA": "#edae49",
               "nevergrad OnePlusOne": "#8f6bb3"}  # fmt: skip
    for name, study in STUDIES.items():
        shown = [e for e in study.chosen if all(mine(name, m, e) for m in METHODS)]
        if not shown:
            continue
        kinds = 1 if name.startswith("attack") else 2
        figure = Figure(figsize=(4.6 * kinds, 3.6 * len(shown)), layout="constrained", dpi=130)
        axes = figure.subplots(len(shown), kinds, squeeze=False)
        for row, estimator in enumerate(shown):
            for method, colour in colours.items():
                for number, curve in enumerate(
                    curves(name, method, estimator) if mine(name, method, estimator) else []
                ):
                    label = {"label": method} if number == 0 else {}
                    queries = [q for q, _, _ in curve]
                    for kind in range(kinds if not method.startswith("nevergrad") else 1):
                        axes[row, kind].plot(
                            queries, [p[kind + 1] for p in curve], color=colour, linewidth=1.3, **label
                        )
            axes[row, 0].set(xlabel="queries", ylabel="objective", xscale="log", title=f"{name}, {estimator} estimator")
            axes[row, 0].legend(frameon=False, fontsize=8)
            if kinds == 2:
                axes[row, 1].set(xlabel="queries", ylabel="squared gradient mapping", xscale="log", yscale="log")
        for axis in axes.flat:
            axis.grid(True, color="#dddddd", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / f"zeroth_order_{name}.png")


def draw_digits(path: Path, folder: str) -> None:
    """Write the perturbations that the best rates end at (first seed), and digits that they move."""
    from recipes.black_box.attack import draw_attacks

    images, _, net = victim_and_images(folder, 8)
    found = {"untouched": torch.zeros(1, 28, 28)}
    for name, note in (("attack", ""), ("attack_blocks", ", squares")):
        problem = make_problem(name, folder)
        for method in METHODS:
            rate = best_rate(name, method, "Gaussian")
            budget, estimator = STUDIES[name].budgets["Gaussian"], STUDIES[name].chosen["Gaussian"]
            *_, (x, _) = walk(problem, method, estimator, budget, rate, SEEDS[0])
            found[method.removeprefix("ZO-") + note] = x
    draw_attacks(path, found, images, net)


def main() -> int:
    """Measure one study, or print all tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.black_box", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", nargs="?", choices=[*STUDIES, "finetune", "speed", "memory"], help="what to measure")
    parser.add_argument("--data", help="the study's file or folder")
    parser.add_argument("--pretrain", help="text that the Transformer begins with")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after this time")
    parser.add_argument("--table", action="store_true", help="print what has been measured as Markdown")
    parser.add_argument("--draw", type=Path, help="folder to write the pictures to")
    parser.add_argument("--peak", choices=["nothing", "inference", "training"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    until = time.monotonic() + 60 * options.minutes
    if options.peak:
        print(peak(options.peak))
    elif options.study in ("speed", "memory"):
        (speed if options.study == "speed" else memory)()
    elif options.study:
        if options.data is None or (options.study == "finetune" and options.pretrain is None):
            parser.error(f"`{options.study}` needs --data{' and --pretrain' if options.study == 'finetune' else ''}.")
        if options.study == "finetune":
            finetune(options.data, options.pretrain, until)
        else:
            measure(options.study, options.data, until)
            if options.study == "attack_ten":
                zoo(options.data, images=SAMPLES["attack_ten"])
    if options.draw:
        draw(options.draw)
        if options.data is not None:
            draw_digits(options.draw / "zeroth_order_digits.png", options.data)
    if options.table:
        print("\n\n".join(table(name) for name in STUDIES if any(r["study"] == name for r in RESULTS.rows())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
