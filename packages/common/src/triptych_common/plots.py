"""One style for every plot: colours that colour-blind readers can tell apart, axes without clutter.

Figures are made without pyplot, so nothing global is left behind; `figure_png` turns one into a PNG file.
"""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, GREY = PALETTE = (
    "#27548a", "#c2571a", "#0b8a6b", "#b8548f", "#c99a12", "#58a0d0", "#6b6b73",
)  # fmt: skip
PALE_BLUE = "#9db4cf"
INK = "#1c1c1e"
MARKERS = "os^DvPX"


def panels(columns: int = 1, rows: int = 1, *, size: tuple[float, float] = (7.2, 3.4)) -> tuple["Figure", list["Axes"]]:
    """A figure and its axes, row by row, with a light grid and open to the top and right. `size` is in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for one in axes:
        one.grid(alpha=0.25, which="both", linewidth=0.5)
        one.set_axisbelow(True)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    return figure, axes


def legend(axes: "Axes", **options: Any) -> None:
    """A legend without a frame, in small type."""
    axes.legend(**{"frameon": False, "fontsize": 8, **options})


def numbers(values: Sequence[Any]) -> Float[np.ndarray, "*shape"]:
    """Values read from JSON, NaN for None."""
    return np.array(values, dtype=np.float64)


def intervals(rows: Sequence[Mapping[str, Any]], value: str = "value") -> Float[np.ndarray, "2 n"]:
    """Matplotlib's error bars: distances from each row's value to its "low" and "high", 0 where it has none."""

    def bound(row: Mapping[str, Any], key: str) -> float:
        return abs(row[key] - row[value]) if row.get(key) is not None and row[value] is not None else 0.0

    return np.array([[bound(row, key) for row in rows] for key in ("low", "high")])


def thousands(value: float, _: Any = None) -> str:
    """1500 as 1.5k, 2000000 as 2M; also a formatter of ticks, `axis.set_major_formatter(thousands)`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def figure_png(figure: "Figure") -> bytes:
    """A matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    return buffer.getvalue()
