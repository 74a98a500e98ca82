"""Numbers with their intervals: how they are computed where samples are few, and how they are written everywhere."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from triptych_common.metrics.estimate import Estimate

MISSING = "–"


def quantile(degrees: int) -> float:
    """0.975 quantile of Student's t with so many degrees of freedom; 0 degrees stand for the normal distribution."""
    from scipy.stats import t as student

    return float(student.ppf(0.975, degrees)) if degrees else 1.96


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean of a few values with its 95% interval by Student's t; no interval for a single value."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return Estimate(mean)
    margin = quantile(n - 1) * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return Estimate(mean, mean - margin, mean + margin)


def number(value: float | None, form: str = ".3f") -> str:
    """A value in a format, a dash where there is none or it is not finite."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:{form}}"


def interval(estimate: Estimate | Mapping[str, Any] | None, form: str | None = None, key: str = "value") -> str:
    """An estimate as text: "0.912 [0.890, 0.934]"; without its interval where it has none; a dash for no estimate.

    form: format of all three numbers; by default as many digits as the size of each calls for.
    """
    if isinstance(estimate, Estimate):
        estimate = estimate._asdict()
    if estimate is None or estimate[key] is None:
        return MISSING
    value, low, high = estimate[key], estimate.get("low"), estimate.get("high")
    if form is None:
        return str(Estimate(value, low, high))
    bounds = f" [{low:{form}}, {high:{form}}]" if low is not None and high is not None else ""
    return f"{value:{form}}{bounds}"


def ratio(log_ratio: Mapping[str, Any]) -> str:
    """A difference of logarithms as a factor: "1.83× [1.40, 2.31]"."""
    value, low, high = (math.exp(log_ratio[key]) for key in ("value", "low", "high"))
    return f"{value:.2f}× [{low:.2f}, {high:.2f}]"


def apart(low: Mapping[str, Any], high: Mapping[str, Any]) -> bool:
    """Whether the interval of one estimate lies wholly below another's."""
    return low["high"] is not None and high["low"] is not None and low["high"] < high["low"]
