"""First-layer filters of a perceptron on square images, before and after an update."""

import math
from typing import Any

from jaxtyping import Float
from torch import Tensor
from triptych_gpt.evaluation.records import plain
from triptych_gpt.layout import ParameterLayout


def first_layer_filters(
    layout: ParameterLayout, theta: Float[Tensor, "*batch D"]
) -> Float[Tensor, "*batch units side side"]:
    """Each hidden unit's weights as the image they are multiplied with.

    Raises ValueError where the first parameter is no matrix over the pixels of a square, grey image.
    """
    name, shape = next(iter(layout.shapes.items()))
    side = _side(shape)
    if not side:
        raise ValueError(
            f"{name}: shape {shape}, expected [units, side * side]; filters are shown of perceptrons on images"
        )
    return layout.unflatten(theta)[name].unflatten(-1, (side, side))


def shows_filters(layout: ParameterLayout) -> bool:
    """Whether `first_layer_filters` takes networks of this layout."""
    return _side(next(iter(layout.shapes.values()))) > 0


def filters_before_and_after(
    layout: ParameterLayout,
    theta: Float[Tensor, " D"],
    theta_star: Float[Tensor, " D"],
    *,
    metric: str,
    before: float | int,
    after: float | int,
    prompt: float | int,
) -> dict[str, Any]:
    """What `figures.filters` draws: both networks' filters, with what was asked and achieved. JSON-able.

    Raises ValueError as `first_layer_filters` does.
    """
    pairs = (("before", theta, before), ("after", theta_star, after))
    shown = {
        key: {"filters": first_layer_filters(layout, network.detach().cpu()), "metric": value}
        for key, network, value in pairs
    }
    return plain({"metric": metric, "prompt": prompt, **shown})


def _side(shape: tuple[int, ...]) -> int:
    """Of the square images that a matrix of this shape is multiplied with; 0 for any other parameter."""
    side = math.isqrt(shape[-1]) if len(shape) == 2 else 0
    return side if side >= 2 and side**2 == shape[-1] else 0
