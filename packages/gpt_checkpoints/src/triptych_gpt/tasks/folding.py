"""Scoring without the inputs that never vary: for a linear first layer they are as good as a bias.

The border of a digit is the same in every image; a sixth of the largest product in scoring would multiply it.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from triptych_gpt.tasks.stack import computes

_GAP = 4  # fewer columns in a row are not worth a copy of their own


class Folding:
    """Which input features of a network vary over some items, and the same network on those alone.

    Does nothing unless inputs are flat and the network begins with a Linear that has a bias.
    """

    def __init__(self, network: nn.Module, parts: Sequence[Tensor]) -> None:
        self.layer = _first_linear(network) if all(part.ndim == 2 for part in parts) else None
        if self.layer is None:
            return
        first = parts[0][0]
        varies = torch.stack([(part != first).any(0) for part in parts]).any(0)
        self._spans = _spans(varies.nonzero().flatten().tolist())
        kept = torch.zeros_like(varies)
        for start, stop in self._spans:
            kept[start:stop] = True
        self._constants = first.masked_fill(kept, 0)[:, None]

    def inputs(self, inputs: Float[Tensor, "items *shape"]) -> Tensor:
        """The features that vary, laid out as a product of weights and inputs reads them."""
        if self.layer is None:
            return inputs
        return self._kept(inputs).T.contiguous().T

    def parameters(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters [networks, *shape] for these inputs: the first bias takes over what the others contribute."""
        parameters = dict(parameters)
        if self.layer is not None:
            weight, bias = f"{self.layer}.weight".lstrip("."), f"{self.layer}.bias".lstrip(".")
            full = parameters[weight]
            parameters[bias] = parameters[bias] + (full @ self._constants.to(full.dtype)).squeeze(-1)
            parameters[weight] = self._kept(full)
        return parameters

    def _kept(self, values: Tensor) -> Tensor:
        return torch.cat([values[..., start:stop] for start, stop in self._spans], -1)


def _first_linear(network: nn.Module) -> str | None:
    """Name of the layer that meets the inputs, where it is a Linear with a bias."""
    path = []
    while isinstance(network, nn.Sequential) and computes(network, nn.Sequential) and len(network):
        name, network = next(iter(network.named_children()))
        path.append(name)
    plain = isinstance(network, nn.Linear) and computes(network, nn.Linear)
    return ".".join(path) if plain and network.bias is not None else None


def _spans(columns: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges that cover the columns, gaps of a few included."""
    spans: list[tuple[int, int]] = []
    for column in columns or [0]:
        if spans and column - spans[-1][1] < _GAP:
            spans[-1] = (spans[-1][0], column + 1)
        else:
            spans.append((column, column + 1))
    return spans
