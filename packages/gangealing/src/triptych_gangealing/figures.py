"""Pictures of correspondences."""

from jaxtyping import Float, UInt8
from torch import Tensor
from triptych_common.images import figure_png


def matches_figure(
    source: UInt8[Tensor, "3 height width"],
    target: UInt8[Tensor, "3 target_height target_width"],
    here: Float[Tensor, "k 2"],
    there: Float[Tensor, "k 2"],
    names: tuple[str, str],
) -> bytes:
    """A PNG of two images side by side, lines between points (x, y, in pixels of each) that correspond, coloured by place."""
    from matplotlib.figure import Figure
    from matplotlib.patches import ConnectionPatch

    figure = Figure(figsize=(8, 4))
    axes = figure.subplots(1, 2)
    for axis, image, name in zip(axes, (source, target), names, strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(name, fontsize=9)
    span = here.amax(0) - here.amin(0) if len(here) else here.new_ones(2)
    style = {"lw": 0.7, "alpha": 0.8}
    for a, b in zip(here, there, strict=True):
        place = (a - here.amin(0)) / span.clamp_min(1e-6)
        colour = (float(place[0]), 0.35, float(place[1]))
        ends = tuple(a.tolist()), tuple(b.tolist())
        figure.add_artist(ConnectionPatch(*ends, "data", "data", axesA=axes[0], axesB=axes[1], color=colour, **style))
        for axis, end in zip(axes, ends, strict=True):
            axis.plot(*end, "o", color=colour, ms=3)
    figure.tight_layout()
    return figure_png(figure)
