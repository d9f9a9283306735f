"""SGD with residuals: gradients where the base optimizer explores, evaluation where its trajectory is exploited.

    explore  y ──base optimizer──▶ y'        what gradients are taken at, and what the base optimizer moves
    exploit  x ──x - S(x - y')───▶ x'        what is evaluated, saved and returned; the residual is r = x - y

Source: arXiv:2004.05298, versions 1 and 2 (version 3 under this number is another paper). Their text is not at hand but for
the abstract; the update is that of the first state of the authors' code with one worker, and see
:mod:`lightning_distopt.optimizers.residual_schemes` for what is reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_distopt.optimizers.residual_schemes import ResidualScheme, as_scheme

__all__ = ["RSGD"]


class RSGD(Optimizer):
    """Let any optimizer explore at ``y`` while ``x`` follows by a residual scheme.

    With ``m`` the base optimizer's step (momentum, Adam's direction, ..., times its rate)::

        y = x - rho * r          r = 0 at the start
        D = r + m(y)
        x = x - S(D);  r = D - S(D)

    With ``rho = 1`` and a scheme that never resets, ``y`` is the base optimizer's path, bit for bit. Two points are stored
    (the parameters hold one, ``x`` or ``y``, this optimizer the other); the residual is implicit.

    ``train()`` puts ``y`` into the parameters, ``eval()`` puts ``x``; a new optimizer is in train mode. Under Lightning the
    callback :class:`~lightning_distopt.callbacks.ExploitPoint` calls them. BatchNorm's running statistics are those of ``y``.

    Parameter groups and state are the base optimizer's, so schedulers, clipping and loss scaling act on it. The state dict
    is the base's with one more entry, ``rsgd``; loading it needs the parameters as they were when it was made.

    Args:
        base_optimizer: any optimizer of torch's interface that has not stepped yet.
        scheme: "ema:0.9", "average", "sparsify:0.1", "sign", "periodic:5:0.5" or a ``ResidualScheme``.
        rho: share of the residual that is explored, in (0, 1]; below 1 the path is no longer the base optimizer's.

    Raises:
        TypeError: if ``base_optimizer`` is no optimizer, or holds two points of its own.
        ValueError: if ``rho`` or the scheme is outside its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = RSGD(torch.optim.SGD([weight], lr=0.5), "ema:0.5")
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.tolist()
        [0.5, 0.5]
        >>> optimizer.eval()
        >>> weight.tolist()
        [0.75, 0.75]
    """

    def __init__(self, base_optimizer: Optimizer, scheme: ResidualScheme | str = "ema:0.9", rho: float = 1.0) -> None:
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(
                f"`base_optimizer` must be a torch optimizer over the parameters: got {base_optimizer!r}. Write for example "
                "`RSGD(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))`."
            )
        if callable(getattr(base_optimizer, "train", None)):
            raise TypeError(
                f"`base_optimizer` must hold one point: got {type(base_optimizer).__name__}, which switches between two of its "
                "own with `train()` and `eval()`. Wrap the optimizer that it wraps, or use it alone."
            )
        if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 0.0 < rho <= 1.0:
            raise ValueError(
                f"`rho` must be in (0, 1]: got {rho!r}. 1 explores at the base optimizer's point; for gradients at the exploit "
                "point (0) use `compressed_ddp` with `error_feedback='local'`."
            )
        self.base = base_optimizer
        self.scheme = as_scheme(scheme)
        self.rho = float(rho)
        self.steps = 0
        self.training = True
        self._other: dict[Tensor, Tensor] = {}  # the exploit point in train mode, the explore point in eval mode
        # Optimizer.__init__ would make groups and a state of our own; this is the rest of what it does.
        self.__setstate__({"defaults": base_optimizer.defaults})

    # ---- the base optimizer's groups and state ------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's."""
        return self.base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    # ---- a step -------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Let the base optimizer step from ``y``, then let ``x`` follow.

        Raises:
            RuntimeError: in eval mode, where the parameters hold the point that gradients are not taken at.
        """
        if not self.training:
            raise RuntimeError(
                "`RSGD.step` needs the parameters to hold the explore point: got a step after `eval()`, which puts the exploit "
                "point there. Call `train()` before the forward pass; under Lightning add the callback `ExploitPoint`."
            )
        with torch.no_grad():
            paths = [p for p in self._parameters() if p.requires_grad or p in self._other]
            for path in paths:
                self._hold(path)
            exploit = [self._other[path] for path in paths]
            # y = z + (1 / rho - 1)(x - y), where z is the point with the whole residual; 0 for rho = 1
            ahead = [x - y for x, y in zip(exploit, _data(paths), strict=True)] if self.rho < 1 else []
        loss = self.base.step(closure)
        with torch.no_grad():
            points = _data(paths)
            for point, lag in zip(points, ahead, strict=False):
                point.add_(lag, alpha=1.0 - 1.0 / self.rho)
            self.steps += 1
            dropped = self.scheme.advance_(exploit, points, self.steps)
            if dropped or ahead:
                for point, x in zip(points, exploit, strict=True):
                    point.lerp_(x, 1.0 if dropped else 1.0 - self.rho)
        return loss

    def _parameters(self) -> Iterator[Parameter]:
        return (parameter for group in self.base.param_groups for parameter in group["params"])

    def _hold(self, parameter: Tensor) -> None:
        """Begin with both points equal, at the first step, so that weights loaded before it are both."""
        other = self._other.get(parameter)
        if other is None:
            self._other[parameter] = parameter.detach().clone()
        elif other.device != parameter.device:  # Lightning moves parameters when a fit ends
            self._other[parameter] = other.to(parameter.device)

    # ---- the two points -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Put the explore point into the parameters."""
        if not self.training:
            self._swap()
            self.training = True

    def eval(self) -> None:
        """Put the exploit point into the parameters."""
        if self.training:
            self._swap()
            self.training = False

    @torch.no_grad()
    def _swap(self) -> None:
        # By value: views of the parameters (flattened RNN weights, captured graphs) stay what they are.
        for parameter, other in self._other.items():
            held = parameter.detach().clone()
            parameter.copy_(other)
            other.copy_(held)

    # ---- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state and, under ``rsgd``, the point that the parameters do not hold.

        ============ ====================================================================
        ``training`` whether the parameters held the explore point
        ``steps``    counter of steps
        ``other``    the other point, by the parameter's number in the groups; references
        ============ ====================================================================
        """
        numbers: dict[Tensor, int] = {parameter: number for number, parameter in enumerate(self._parameters())}
        other = {numbers[parameter]: point for parameter, point in self._other.items() if parameter in numbers}
        return {**self.base.state_dict(), "rsgd": {"training": self.training, "steps": self.steps, "other": other}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there; the parameters must hold what they held when the state was made.

        Raises:
            ValueError: if the state is not of an ``RSGD``.
        """
        if "rsgd" not in state_dict:
            raise ValueError(
                "`state_dict` must come from `RSGD.state_dict()`: it has no entry 'rsgd'. To go on from a run of the base "
                "optimizer, load it into that before it is wrapped."
            )
        mine = state_dict["rsgd"]
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "rsgd"})
        parameters = list(self._parameters())
        self._other = {
            parameters[int(number)]: point.detach().clone().to(parameters[int(number)])
            for number, point in mine["other"].items()
        }
        self.steps, self.training = int(mine["steps"]), bool(mine["training"])

    def __repr__(self) -> str:
        return f"RSGD({self.base!r}, scheme={str(self.scheme)!r}, rho={self.rho:g})"


def _data(parameters: list[Parameter]) -> list[Tensor]:
    return [parameter.data for parameter in parameters]
