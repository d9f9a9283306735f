"""The weights of a stage by version: the live ones, and those that a stored batch, or a batch to come, still needs.

Nothing is copied until an update is about to overwrite a version that is still needed: then the parameters move to a copy of
themselves, and the old memory, which graphs may refer to, stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["WeightStash"]


class WeightStash:
    """Weight versions of one module, counted in updates since the last drained state.

    Args:
        parameters: of the module, by name.

    Attributes:
        live: version that the parameters hold now.
        old: earlier versions, by number.
        peak: most versions that were there at once.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self.live = 0
        self.old: dict[int, dict[str, Tensor]] = {}
        self.peak = 1

    def leaves(self, version: int) -> dict[str, Tensor]:
        """Return this version as leaves for a graph; they share memory with what they name, not its version counter.

        Raises:
            KeyError: for a version that was let go.
        """
        weights = self._now() if version == self.live else self.old[version]
        return {name: w.data.requires_grad_(self._parameters[name].requires_grad) for name, w in weights.items()}

    def before_update(self, oldest: int | None) -> None:
        """Make room for the next version: keep the versions from ``oldest`` on, let the others go.

        Args:
            oldest: lowest version that will be read again; ``None`` if none but the next.
        """
        if oldest is not None and oldest <= self.live:
            self.old[self.live] = self._now()
            for parameter in self._parameters.values():
                parameter.data = parameter.data.clone()
        self.old = {v: w for v, w in self.old.items() if oldest is not None and v >= oldest}

    def after_update(self) -> None:
        """Count the update."""
        self.live += 1
        self.peak = max(self.peak, len(self.old) + 1)

    def restart(self) -> None:
        """Count from zero again: the run is drained."""
        self.live, self.old = 0, {}

    def _now(self) -> dict[str, Tensor]:
        return {name: parameter.data for name, parameter in self._parameters.items()}
