"""The order of a network's parameters in theta, the flat vector that G.pt reads and writes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call


class Functional:
    """A network as a function of its parameters and of inputs; a parameter of several names needs one only."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        places: dict[
            int, dict[tuple[int, str], str]
        ] = {}  # of each tensor, the modules that hold it and their names for it
        for prefix, module in network.named_modules():
            for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    places.setdefault(id(tensor), {})[id(module), own] = f"{prefix}.{own}".lstrip(".")
        # Not by functional_call's own tie_weights, after which a module used twice is left with a stranger's weights.
        self._names = {name: list(held.values()) for held in places.values() for name in held.values() if len(held) > 1}

    def __call__(self, parameters: Mapping[str, Tensor], inputs: Any) -> Any:
        given = {other: tensor for name, tensor in parameters.items() for other in self._names.get(name, (name,))}
        return functional_call(self.network, given, (inputs,), tie_weights=False)


@dataclass(frozen=True, eq=False)
class ParameterLayout:
    """Names and shapes of a network's parameters, in the order of theta; equal if names, shapes and their order are.

    tied: second names of parameters, such as an output layer's that is the embedding; theta holds them once.
    """

    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {name: tuple(int(n) for n in shape) for name, shape in self.shapes.items()}
        if not shapes:
            raise ValueError("a layout needs at least one parameter, got none; give a network that has weights")
        for name, shape in shapes.items():
            if min(shape, default=1) < 1:
                raise ValueError(f"{name}: shape {shape} has no entries; every dimension must be 1 or more")
        if unknown := [name for name in self.tied.values() if name not in shapes]:
            raise ValueError(f"{unknown[0]}: another name is tied to it, but it is no parameter; make the file again")
        object.__setattr__(self, "shapes", shapes)

    @classmethod
    def of(cls, network: nn.Module) -> "ParameterLayout":
        """Floating-point entries of the network's state_dict, in its order.

        Raises ValueError for a network without any.
        """
        # So BatchNorm's running statistics are in theta, its count of batches is not.
        shapes: dict[str, tuple[int, ...]] = {}
        seen: dict[int, str] = {}
        tied: dict[str, str] = {}
        for name, tensor in network.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point():
                continue
            if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
                raise ValueError(f"{name}: a lazy layer that has no shape yet; call the network on an input first")
            if id(tensor) in seen:
                tied[name] = seen[id(tensor)]
                continue
            seen[id(tensor)] = name
            shapes[name] = tuple(tensor.shape)
        return cls(shapes, tied)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @cached_property
    def spans(self) -> dict[str, slice]:
        """Where in theta each parameter lies."""
        ends = list(accumulate(map(math.prod, self.shapes.values()), initial=0))
        return {name: slice(*pair) for name, pair in zip(self.shapes, pairwise(ends), strict=True)}

    @cached_property
    def size(self) -> int:
        """D, the length of theta."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def flatten(self, state_dict: Mapping[str, Tensor]) -> Float[Tensor, "*batch D"]:
        """theta of a state dict in any order, or of tensors that all have the same batch dimensions in front.

        Entries that are not floating-point are left out. Raises ValueError naming the first tensor that does not fit.
        """
        for name in self.shapes:
            if name not in state_dict:
                raise ValueError(f"{name}: absent from the state dict; give one of the network of this layout")
        for name, tensor in state_dict.items():
            if name in self.tied:
                if not torch.equal(tensor, state_dict[self.tied[name]]):
                    raise ValueError(
                        f"{name}: differs from {self.tied[name]}, which it is tied to; give a network of this layout"
                    )
            elif name not in self.shapes and tensor.is_floating_point():
                raise ValueError(f"{name}: not in the layout; give a state dict of the network of this layout")
        first, shape = next(iter(self.shapes.items()))
        batch = tuple(state_dict[first].shape)[: state_dict[first].ndim - len(shape)]
        for name, shape in self.shapes.items():
            found = tuple(state_dict[name].shape)
            if found != batch + shape:
                raise ValueError(f"{name}: shape {found} in the state dict, the layout expects {batch + shape}")
        return torch.cat([state_dict[name].reshape(*batch, -1) for name in self.shapes], dim=-1)

    def unflatten(self, theta: Float[Tensor, "*batch D"]) -> dict[str, Tensor]:
        """Views of theta, [*batch, *shape] for each parameter. Raises ValueError if theta has another length."""
        self.check(theta)
        batch = theta.shape[:-1]
        return {name: theta[..., self.spans[name]].view((*batch, *shape)) for name, shape in self.shapes.items()}

    def state_dict(self, theta: Float[Tensor, " D"]) -> dict[str, Tensor]:
        """What `load_state_dict` takes: a copy of every parameter, under its second names, too."""
        views = self.unflatten(theta)
        return {name: views[self.tied.get(name, name)].clone() for name in (*views, *self.tied)}

    def check(self, theta: Float[Tensor, "*batch D"]) -> None:
        """Raises ValueError if theta's length is not this layout's."""
        if theta.shape[-1] != self.size:
            raise ValueError(f"theta has {theta.shape[-1]:,} entries, the layout {self.size:,}; use the same network")

    def to_json(self) -> list[list[Any]]:
        """[[name, [dimension, ...]], ..., [second name, name], ...]."""
        # A list, since readers of JSON may reorder an object.
        return [*([name, list(shape)] for name, shape in self.shapes.items()), *map(list, self.tied.items())]

    @classmethod
    def from_json(cls, content: Sequence[Sequence[Any]]) -> "ParameterLayout":
        """The inverse of `to_json`. Raises ValueError for anything else."""
        try:
            tied = {str(name): other for name, other in content if isinstance(other, str)}
            shapes = {str(name): tuple(int(n) for n in shape) for name, shape in content if not isinstance(shape, str)}
        except (TypeError, ValueError) as error:
            raise ValueError("not a parameter layout; expected a list of [name, [dimension, ...]]") from error
        if len(shapes) + len(tied) != len(content):
            raise ValueError("a parameter layout that lists a name twice; make or fetch the file again")
        return cls(shapes, tied)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ParameterLayout):
            return False
        return list(self.shapes.items()) == list(other.shapes.items()) and dict(self.tied) == dict(other.tied)

    def __hash__(self) -> int:
        return hash(tuple(self.shapes.items()))
