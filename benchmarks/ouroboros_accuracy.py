"""What Ouroboros' staleness costs in bits a character: tiny-shakespeare, equal steps, several seeds, against back-propagation.

python -m benchmarks.ouroboros_accuracy --data <input.txt or input.txt.gz>
python -m benchmarks.ouroboros_accuracy --data ... --model transformer_xl --memory 128

The same model, data, schedule (warm-up, then cosine to zero) and gradient clipping (each device by itself) for: back-propagation
on one device, and Ouroboros with three modules. The engine runs in one process, which learns bit for bit what processes learn.
Every ``--evaluate`` steps it is drained, evaluated on the validation part and saved to ``--scratch``, where a run that was
stopped goes on; memories begin anew there. Each evaluation is a row of ``benchmarks/results/ouroboros_accuracy.csv``: the rows
of a run are its curve.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.language import MODELS, Model, Size, blocks_of, build, parameters_of, segments, text
from benchmarks.results_file import ResultsFile, versions
from lightning_distopt.model_parallel import StalenessPlan
from lightning_distopt.model_parallel.block import run_layers
from lightning_distopt.model_parallel.ends import authors_split
from lightning_distopt.model_parallel.in_process import InProcessPipeline

__all__ = ["PLANS", "Recipe", "main", "train"]

COLUMNS = ("model", "plan", "seed", "steps", "step", "train_bpc", "val_bpc", "parameters", "seconds", "versions")
KEY = ("model", "plan", "seed", "steps", "step")
PLANS = {
    "backprop": StalenessPlan.preset("ouroboros", 1),
    "ouroboros": StalenessPlan.preset("ouroboros", 3),
    "ouroboros stashed": StalenessPlan.preset("ouroboros", 3, backward_weights="stashed", keep="graph"),
    "ouroboros mean": StalenessPlan.preset("ouroboros", 3, tied_grad="mean"),
    "ouroboros other masks": StalenessPlan.preset("ouroboros", 3, repeatable_dropout=False),
}


class Recipe(NamedTuple):
    """What all plans have in common.

    Attributes:
        model: its name.
        size: of it.
        rows: of a batch.
        lr: greatest learning rate of Adam.
        warmup: steps.
        steps: in all.
        clip: greatest norm of a device's gradient.
        evaluate: steps between evaluations.
    """

    model: str
    size: Size
    rows: int
    lr: float
    warmup: int
    steps: int
    clip: float
    evaluate: int

    def rate(self, step: int) -> float:
        """Return the share of ``lr`` in a step: warm-up, then cosine to zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))))


def train(plan: StalenessPlan, seed: int, recipe: Recipe, data: Sequence[Tensor], file: Path, report: Any) -> float:
    """Train from where ``file`` ends to the last step; return the bits a character of the validation part.

    Args:
        plan: what is stale.
        seed: of weights and random numbers.
        recipe: all else.
        data: the parts to train and to validate.
        file: kept up to date with the state.
        report: called with (step, bits a character in training, in validation) after each evaluation.
    """
    model = build(recipe.model, recipe.size, seed)
    kinds = [type(layer).__name__ for layer in model.layers]
    cuts = authors_split(kinds, plan.stages - 1) if plan.stages > 1 else ()
    stages = [nn.Sequential(*block) for block in blocks_of(model.layers, cuts)]
    make, schedule = partial(torch.optim.Adam, lr=recipe.lr), partial(LambdaLR, lr_lambda=recipe.rate)
    engine = InProcessPipeline(stages, model.head, plan, make, seed, scheduler=schedule, clip=recipe.clip)
    step, found = (_load(file, model, engine), math.nan) if file.exists() else (0, math.nan)
    while step < recipe.steps:
        count = min(recipe.evaluate, recipe.steps - step)
        engine.forget()
        losses = engine.run(islice(segments(data[0], recipe.rows, recipe.size.length, step), count))
        step += count
        found = bits(model, data[1], recipe)
        _save(file, model, engine, step)
        report(step, statistics.mean(losses) / math.log(2), found)
    return found


def bits(model: Model, tokens: Tensor, recipe: Recipe) -> float:
    """Return the bits a character of a text, with memories that begin empty."""
    layers = {str(index): layer for index, layer in enumerate(model.layers)}
    modules = [*model.layers, model.head]
    for module in modules:
        module.eval()
    states: dict[str, Any] = {}
    rows, losses = min(recipe.rows, (len(tokens) - 1) // recipe.size.length), []
    each = (len(tokens) - 1) // rows // recipe.size.length
    with torch.no_grad():
        for x, y in islice(segments(tokens, rows, recipe.size.length), each):
            output, states = run_layers(layers, x, states)
            losses.append(float(model.head(output, y)))
    for module in modules:
        module.train()
    return statistics.mean(losses) / math.log(2)


def _save(file: Path, model: Model, engine: InProcessPipeline, step: int) -> None:
    state = {
        "step": step,
        "batches": engine.workers[0].batches,
        "modules": [module.state_dict() for module in (*model.layers, model.head)],
        "optimizers": [optimizer.state_dict() for optimizer in engine.optimizers],
        "schedulers": [{"last_epoch": s.last_epoch, "lr_lambdas": [None]} for s in engine.schedulers],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    torch.save(state, part)
    part.rename(file)


def _load(file: Path, model: Model, engine: InProcessPipeline) -> int:
    state = torch.load(file, weights_only=True)
    for module, weights in zip((*model.layers, model.head), state["modules"], strict=True):
        module.load_state_dict(weights)
    for optimizer, saved in zip(engine.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    for scheduler, saved in zip(engine.schedulers, state["schedulers"], strict=True):
        scheduler.load_state_dict(saved)
    for worker in engine.workers:
        worker.batches = state["batches"]
        worker.restart()
    return int(state["step"])


def main(args: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=["backprop", "ouroboros"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--evaluate", type=int, default=250)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=2.5e-4)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--clip", type=float, default=0.25)
    parser.add_argument("--scratch", type=Path, default=Path("scratch/ouroboros"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/ouroboros_accuracy.csv"))
    given = parser.parse_args(args)
    train_part, val_part, _, vocabulary = text(given.data)
    size = Size(vocabulary, given.blocks, given.width, given.length, given.memory, given.dropout)
    recipe = Recipe(given.model, size, given.rows, given.lr, given.warmup, given.steps, given.clip, given.evaluate)
    file = ResultsFile(given.results, COLUMNS, KEY)
    model = build(given.model, size)
    parameters = sum(p.numel() for p in parameters_of(*model.layers, model.head))
    print(f"{given.model}: {parameters:,} parameters, {vocabulary} characters")
    last: dict[str, list[float]] = {name: [] for name in given.plans}
    for seed in range(given.seeds):  # all plans of a seed before the next one
        for name in given.plans:
            run = {"model": given.model, "plan": name, "seed": seed, "steps": given.steps}
            begin = time.perf_counter()

            def report(step: int, train_bpc: float, val_bpc: float, run: Any = run, begin: float = begin) -> None:
                row = {
                    **run, "step": step, "train_bpc": f"{train_bpc:.4f}", "val_bpc": f"{val_bpc:.4f}",
                    "parameters": parameters, "seconds": f"{time.perf_counter() - begin:.0f}", "versions": versions(),
                }  # fmt: skip
                file.append(row)
                print(*run.values(), step, row["train_bpc"], row["val_bpc"], row["seconds"], flush=True)

            if file.find(**run, step=given.steps) is None:
                state = given.scratch / f"{given.model}-{name.replace(' ', '-')}-{seed}-{given.steps}.pt"
                train(PLANS[name], seed, recipe, (train_part, val_part), state, report)
            done = file.find(**run, step=given.steps)
            if done is not None:
                last[name].append(float(done["val_bpc"]))
    for name, found in last.items():
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        print(f"{name}: {statistics.mean(found):.4f} +- {spread:.4f} bits a character over {len(found)} seeds")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
