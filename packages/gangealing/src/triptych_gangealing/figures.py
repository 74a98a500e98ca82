"""Pictures of correspondences."""

from pathlib import Path

from jaxtyping import Float
from torch import Tensor
from triptych_common.report import figure_png
from triptych_common.run import write_bytes

from triptych_gangealing.pictures import Picture


def draw_matches(
    path: Path, source: Picture, target: Picture, here: Float[Tensor, "k 2"], there: Float[Tensor, "k 2"]
) -> None:
    """Two pictures side by side, with lines between points (x, y, in pixels of each) that correspond, coloured by place."""
    from matplotlib.figure import Figure
    from matplotlib.patches import ConnectionPatch

    figure = Figure(figsize=(8, 4))
    axes = figure.subplots(1, 2)
    for axis, picture in zip(axes, (source, target), strict=True):
        axis.imshow(picture.pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(picture.name, fontsize=9)
    span = here.amax(0) - here.amin(0) if len(here) else here.new_ones(2)
    for a, b in zip(here, there, strict=True):
        place = (a - here.amin(0)) / span.clamp_min(1e-6)
        colour = (float(place[0]), 0.35, float(place[1]))
        line = ConnectionPatch(
            tuple(a.tolist()),
            tuple(b.tolist()),
            "data",
            "data",
            axesA=axes[0],
            axesB=axes[1],
            color=colour,
            lw=0.7,
            alpha=0.8,
        )
        figure.add_artist(line)
        axes[0].plot(*a.tolist(), "o", color=colour, ms=3)
        axes[1].plot(*b.tolist(), "o", color=colour, ms=3)
    figure.tight_layout()
    write_bytes(path, figure_png(figure))
