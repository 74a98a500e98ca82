"""How metrics are named in text and shown in titles; axes are labelled by `triptych_gpt.evaluation.plots`."""


def named(metric: str) -> str:
    """A metric in running text: "test loss"."""
    return metric.replace("_", " ")


def shown(metric: str, value: float | None) -> str:
    """A value of a metric to three digits, errors in per cent as axes have them; a dash where there is none."""
    if value is None:
        return "–"
    return f"{(100 if metric.endswith('error') else 1) * value:.3g}"
