"""RSGD's two points: the explore path is the base optimizer's, and the exploit point is what the scheme says."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adam, Optimizer

from lightning_distopt.optimizers import RSGD, Average, Ema, Periodic, Sign, Sparsify
from lightning_distopt.optimizers.residual_schemes import as_scheme

BASES: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": partial(SGD, lr=0.05),
    "momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "ASGD": partial(ASGD, lr=0.05),
    "Adam": partial(Adam, lr=0.02),
}
SCHEMES = ["ema:0.9", "average", "sparsify:0.2", "sign"]


def problem() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """Return a small network and its loss in step t, always the same."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        return (net(inputs) - inputs[:, :2].sin()).square().mean()

    return net, loss


def points(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()]).clone()


def exploit(optimizer: RSGD, net: nn.Module) -> Tensor:
    optimizer.eval()
    found = points(net)
    optimizer.train()
    return found


def path(make: Callable[[Any], Optimizer], steps: int = 23) -> list[Tensor]:
    """Return the points of the base optimizer, the initial one first."""
    net, loss = problem()
    optimizer, found = make(net.parameters()), [points(net)]
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        found.append(points(net))
    return found


def both(
    make: Callable[[Any], Optimizer], scheme: Any, rho: float = 1.0, steps: int = 23
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the explore and the exploit points of RSGD after each step."""
    net, loss = problem()
    optimizer = RSGD(make(net.parameters()), scheme, rho)
    explored, exploited = [points(net)], [points(net)]
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        explored.append(points(net))
        exploited.append(exploit(optimizer, net))
    return explored, exploited


# --- the identities of the specification -----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("base", BASES)
def test_without_reset_the_explore_path_is_the_base_optimizers_bit_for_bit(base: str, scheme: str) -> None:
    explored, exploited = both(BASES[base], scheme)
    assert all(torch.equal(a, b) for a, b in zip(explored, path(BASES[base]), strict=True))
    assert not torch.equal(explored[-1], exploited[-1])


@pytest.mark.parametrize("base", BASES)
def test_with_the_identity_scheme_both_points_are_the_base_optimizers(base: str) -> None:
    explored, exploited = both(BASES[base], "ema:0")
    expected = path(BASES[base])
    assert all(torch.equal(a, b) for a, b in zip(explored, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(exploited, expected, strict=True))


@pytest.mark.parametrize("base", BASES)
def test_the_scalar_scheme_is_the_exponential_average_of_the_iterates(base: str) -> None:
    average, exploited = None, both(BASES[base], "ema:0.9")[1]
    for point, found in zip(path(BASES[base]), exploited, strict=True):
        average = point if average is None else 0.9 * average + 0.1 * point
        torch.testing.assert_close(found, average, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("base", BASES)
def test_the_linear_scheme_is_the_mean_of_the_iterates(base: str) -> None:
    iterates, exploited = path(BASES[base]), both(BASES[base], "average")[1]
    for step in range(1, len(iterates)):
        expected = torch.stack(iterates[1 : step + 1]).mean(0)
        torch.testing.assert_close(exploited[step], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("base", BASES)
def test_the_periodic_scheme_is_lookahead(base: str) -> None:
    net, loss = problem()
    fast, slow = BASES[base](net.parameters()), points(net)
    explored, exploited = both(BASES[base], "periodic:5:0.5")
    for step in range(23):
        fast.zero_grad()
        loss(step).backward()
        fast.step()
        if (step + 1) % 5 == 0:
            slow = slow + 0.5 * (points(net) - slow)
            nn.utils.vector_to_parameters(slow.clone(), net.parameters())
        torch.testing.assert_close(explored[step + 1], points(net), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(exploited[step + 1], slow, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scheme", [*SCHEMES, "periodic:5:0.5"])
@pytest.mark.parametrize("rho", [1.0, 0.6])
def test_steps_are_those_of_the_skeleton_with_an_explicit_residual(scheme: str, rho: float) -> None:
    """The plain reference: x, r and m as in the specification, S from the scheme's definition."""
    net, loss = problem()
    x, r, m = points(net), torch.zeros_like(points(net)), None
    parts = [p.numel() for p in net.parameters()]

    def share(d: Tensor, step: int) -> Tensor:
        name, *numbers = scheme.split(":")
        if name == "ema":
            return (1 - float(numbers[0])) * d
        if name == "average":
            return d / step
        if name == "sign":
            return torch.where(d >= 0, 1.0, -1.0) * d.abs().mean()
        if name == "sparsify":
            kept = []
            for part in d.split(parts):
                mask = torch.zeros_like(part)
                mask[part.abs().topk(max(1, int(part.numel() * float(numbers[0])))).indices] = 1
                kept.append(part * mask)
            return torch.cat(kept)
        return 0.5 * d if step % 5 == 0 else torch.zeros_like(d)

    explored, exploited = both(BASES["momentum"], scheme, rho)
    for step in range(1, 24):
        y = x - rho * r
        nn.utils.vector_to_parameters(y.clone(), net.parameters())
        net.zero_grad()
        loss(step - 1).backward()
        d = torch.cat([p.grad.reshape(-1) for p in net.parameters()]) + 0.01 * y
        m = d if m is None else 0.9 * m + d
        residual = r + 0.05 * m
        x = x - share(residual, step)
        r = residual - share(residual, step)
        if scheme.startswith("periodic") and step % 5 == 0:
            r = torch.zeros_like(r)
        exact = {"rtol": 1e-5, "atol": 1e-7} if scheme == "sign" else {"rtol": 1e-9, "atol": 1e-11}  # a float32 scale
        torch.testing.assert_close(exploited[step], x, **exact)
        torch.testing.assert_close(explored[step], x - rho * r, **exact)


@settings(deadline=None, max_examples=25)
@given(ratio=st.sampled_from([0.1, 0.3, 0.5, 0.9]), seed=st.integers(0, 1000))
def test_the_residual_of_a_contractive_scheme_is_bounded(ratio: float, seed: int) -> None:
    """|r| <= eta M q / (1 - q) with q = sqrt(1 - delta), where every step is at most eta M long."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.zeros(20, dtype=torch.float64))
    optimizer = RSGD(SGD([weight], lr=0.1), f"sparsify:{ratio}")
    q = math.sqrt(1 - int(20 * ratio) / 20)
    for _ in range(40):
        gradient = torch.randn(20, generator=generator, dtype=torch.float64)
        weight.grad = gradient / gradient.norm()
        optimizer.step()
        y = weight.detach().clone()
        optimizer.eval()
        residual = float((weight.detach() - y).norm())
        optimizer.train()
        assert residual <= 0.1 * q / (1 - q) + 1e-12


# --- an optimizer like any other -------------------------------------------------------------------------------------


def test_switching_twice_changes_nothing() -> None:
    net, loss = problem()
    optimizer = RSGD(BASES["Adam"](net.parameters()), "sign")
    for switch in (optimizer.train, optimizer.eval, optimizer.eval, optimizer.train):  # nothing has stepped yet
        switch()
    loss(0).backward()
    optimizer.step()
    y = points(net)
    optimizer.eval()
    x = points(net)
    optimizer.eval()
    assert torch.equal(points(net), x)
    optimizer.train()
    optimizer.train()
    assert torch.equal(points(net), y)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scheme", [*SCHEMES, "periodic:4:0.5"])
def test_a_saved_state_goes_on_bit_for_bit(scheme: str, training: bool) -> None:
    net, loss = problem()
    optimizer = RSGD(BASES["Adam"](net.parameters()), scheme, rho=0.8)

    def run(net: nn.Module, optimizer: RSGD, loss: Callable[[int], Tensor], steps: range) -> None:
        for step in steps:
            optimizer.train()
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()

    run(net, optimizer, loss, range(6))
    if not training:
        optimizer.eval()
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    run(net, optimizer, loss, range(6, 12))

    again, loss_again = problem()
    resumed = RSGD(BASES["Adam"](again.parameters()), scheme, rho=0.8)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert resumed.training is training
    run(again, resumed, loss_again, range(6, 12))
    assert torch.equal(points(again), points(net))
    assert torch.equal(exploit(resumed, again), exploit(optimizer, net))


def test_schedulers_hooks_closures_and_copies_work() -> None:
    net, loss = problem()
    optimizer = RSGD(SGD(net.parameters(), lr=1.0), "ema:0.5")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.base.param_groups[0]["lr"]))

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = loss(0)
        found.backward()
        return found

    for _ in range(3):
        assert optimizer.step(closure) is not None
        scheduler.step()
    assert seen == [1.0, 0.5, 0.25]
    assert isinstance(optimizer, Optimizer)
    twin = pickle.loads(pickle.dumps(RSGD(SGD([nn.Parameter(torch.ones(2))], lr=0.1), "sign")))
    twin.step()
    assert repr(twin).endswith("scheme='sign', rho=1)")


def test_a_frozen_parameter_stays_and_a_new_group_joins() -> None:
    frozen, free, late = (nn.Parameter(torch.ones(2)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = RSGD(SGD([frozen, free], lr=0.5), "ema:0.5")
    free.sum().backward()
    optimizer.step()
    optimizer.add_param_group({"params": [late]})
    late.sum().backward()
    free.grad = None
    optimizer.step()
    optimizer.eval()
    assert (frozen.tolist(), late.tolist()) == ([1.0, 1.0], [0.75, 0.75])
    assert free.tolist() == [0.625, 0.625]  # y is 0.5 since the first step, x comes nearer


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_step_at_the_exploit_point_is_refused() -> None:
    optimizer = RSGD(SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"Call `train\(\)` before the forward pass"):
        optimizer.step()


def test_a_state_of_another_optimizer_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="no entry 'rsgd'"):
        RSGD(SGD([weight], lr=0.1)).load_state_dict(SGD([weight], lr=0.1).state_dict())


@pytest.mark.parametrize("rho", [0, -1.0, 1.5, "1", True, float("nan")])
def test_a_wrong_rho_is_refused(rho: Any) -> None:
    with pytest.raises(ValueError, match=r"`rho` must be in \(0, 1\]"):
        RSGD(SGD([nn.Parameter(torch.ones(2))], lr=0.1), rho=rho)


def test_what_is_no_base_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a torch optimizer"):
        RSGD([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="got RSGD, which switches between two"):
        RSGD(RSGD(SGD([nn.Parameter(torch.ones(2))], lr=0.1)))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("ema:0.5", Ema), ("ema", Ema), ("average", Average), ("sparsify:0.2", Sparsify), ("sign", Sign),
        ("periodic:3:0.25", Periodic), ("periodic", Periodic),
    ],
)  # fmt: skip
def test_schemes_have_texts(text: str, kind: type) -> None:
    scheme = as_scheme(text)
    assert type(scheme) is kind
    assert str(scheme).startswith(text)
    assert as_scheme(scheme) is scheme


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("emma:0.9", ValueError, "got 'emma:0.9'"),
        ("ema:much", ValueError, "numbers after the colon: got 'ema:much'"),
        ("ema:0.9:1", ValueError, "got 'ema:0.9:1'"),
        ("ema:1", ValueError, r"`beta` must be in \[0, 1\): got 1"),
        ("sparsify:0", ValueError, r"`ratio` must be in \(0, 1\]"),
        ("sign:2", ValueError, "got 'sign:2'"),
        ("periodic:0:0.5", ValueError, "`period` must be an integer >= 1: got 0"),
        ("periodic:2.5", ValueError, "`period` must be an integer >= 1: got 2.5"),
        ("periodic:5:0", ValueError, r"`share` must be in \(0, 1\]: got 0"),
        (0.9, TypeError, "must be a text or a ResidualScheme: got 0.9"),
    ],
)
def test_a_wrong_scheme_is_refused(text: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        RSGD(SGD([nn.Parameter(torch.ones(2))], lr=0.1), text)
