"""Experiments over the grid of sizes and patches: scaling, sampling compute, and the same noise through every model."""

import math
from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

import torch
from triptych_common.images import image_grid, png_bytes
from triptych_common.storage.atomic import write_bytes
from triptych_dit.flops import gflops
from triptych_dit.sample import read_batches

from triptych_thesis.chapter2.context import Bench, Draw
from triptych_thesis.chapter2.scoring import METRICS
from triptych_thesis.chapter2.sizes import Model
from triptych_thesis.chapter2.statistics import (
    FAILS,
    HOLDS,
    LOWER_IS_BETTER,
    SHOWN,
    UNCLEAR,
    correlation,
    overall,
    strong_verdict,
)

SIMILAR = 1.5  # GFLOPs, and Fréchet distances, within this factor are called similar
FIRST = 10  # samples of each model in the picture


def needs_scaling(bench: Bench) -> list[Draw]:
    draws = [bench.draw(Model(name), stage) for name in bench.grid for stage in bench.size.stages]
    return [*draws, *bench.repeated()]


def neighbours(bench: Bench) -> Iterator[tuple[str, str, str]]:
    """(what grows, larger, smaller): models of the grid that are next to each other in size or patch."""
    widths, patches = (list(dict.fromkeys(name.split("/")[i] for name in bench.grid)) for i in (0, 1))
    widths.sort(key=lambda width: max(gflops(c) for n, c in bench.grid.items() if n.startswith(f"{width}/")))
    patches.sort(key=int, reverse=True)
    rows = [("model size", [f"{width}/{patch}" for width in widths]) for patch in patches]
    rows += [("tokens", [f"{width}/{patch}" for patch in patches]) for width in widths]
    for grows, names in rows:
        for smaller, larger in pairwise(name for name in names if name in bench.grid):
            yield grows, larger, smaller


def scaling(bench: Bench) -> dict[str, Any]:
    """Figures 2.2 (left), 2.6, 2.8, 2.9 and 2.10."""
    size = bench.size
    comparisons = [
        bench.compare(
            bench.draw(Model(large), stage), bench.draw(Model(small), stage), grows=grows, images=size.count(stage)
        )
        for grows, large, small in neighbours(bench)
        for stage in size.stages
    ]
    final = [c for c in comparisons if c.about["images"] == size.count(1.0)]
    correlations = {metric: _correlation(bench, metric) for metric in METRICS}
    budgets, similar = _at_equal_training_compute(bench), _similar(bench)
    return {
        "rows": [bench.row(bench.draw(Model(name), stage)) for name in bench.grid for stage in size.stages],
        "comparisons": [c.as_dict() for c in comparisons],
        "correlations": correlations,
        "similar": similar,
        "budgets": budgets,
        "noise": bench.noises(),
        "verdicts": {
            "dit.fig-2.2": overall(c.verdict for c in final),
            "dit.fig-2.6": overall(c.verdict for c in comparisons),
            "dit.fig-2.8": overall([correlations["frechet"]["verdict"], *(pair["verdict"] for pair in similar)]),
            "dit.fig-2.9": overall(found["verdict"] for found in correlations.values()),
            "dit.fig-2.10": _reached(c["verdict"] for c in budgets),
        },
    }


def _correlation(bench: Bench, metric: str) -> dict[str, Any]:
    """Of log GFLOPs with a metric at the last stage of the grid, strong where it should be: down for distances, up otherwise."""
    logs = [math.log(gflops(shape)) for shape in bench.grid.values()]
    r = correlation(logs, [bench.score(bench.draw(Model(name)), metric) for name in bench.grid])
    return {**r._asdict(), "verdict": strong_verdict(r, -1 if metric in LOWER_IS_BETTER else 1)}


def _similar(bench: Bench) -> list[dict[str, Any]]:
    """Models of different widths and nearly equal GFLOPs: whether their distances are nearly equal too.  [thesis 2.5: S/2, B/4]"""
    found = []
    for (a, x), (b, y) in combinations(bench.grid.items(), 2):
        ratio = gflops(x) / gflops(y)
        if x.hidden_size == y.hidden_size or not 1 / SIMILAR <= ratio <= SIMILAR:
            continue
        difference = bench.compare(bench.draw(Model(a)), bench.draw(Model(b))).difference
        bound = math.log(SIMILAR)
        inside, outside = (
            max(-difference.low, difference.high) < bound,
            difference.low > bound or difference.high < -bound,
        )
        verdict = HOLDS if inside else FAILS if outside else UNCLEAR
        found.append({"models": [a, b], "gflops_ratio": ratio, "log_ratio": difference._asdict(), "verdict": verdict})
    return found


def _at_equal_training_compute(bench: Bench) -> list[dict[str, Any]]:
    """Each smaller model at its end against its larger neighbour after no more training compute, where that was measured."""
    size, found = bench.size, []
    for grows, large, small in neighbours(bench):
        budget = gflops(bench.grid[small]) * size.count(1.0)
        within = [s for s in size.stages if gflops(bench.grid[large]) * size.count(s) <= budget]
        if within:
            ours = bench.draw(Model(large), max(within))
            comparison = bench.compare(
                ours, bench.draw(Model(small)), grows=grows, images=ours.images, images_of_smaller=size.count(1.0)
            )
            found.append(comparison.as_dict())
    return found


def _reached(verdicts: Iterator[str]) -> str:
    """The thesis claims an advantage from some budget on: too small a budget cannot refute it."""
    found = list(verdicts)
    return HOLDS if found and set(found) == {HOLDS} else UNCLEAR


def needs_compute(bench: Bench) -> list[Draw]:
    size = bench.size
    draws = [
        bench.draw(Model(name), n=size.compute_samples, num_inference_steps=steps)
        for name in size.compute
        for steps in size.compute_steps
    ]
    return [*draws, *bench.repeated()]


def compute(bench: Bench) -> dict[str, Any]:
    """Figure 2.11: each model at its most steps against the next larger one at no more compute an image."""
    size = bench.size

    def drawn(name: str, steps: int) -> Draw:
        return bench.draw(Model(name), n=size.compute_samples, num_inference_steps=steps)

    comparisons = []
    for small, large in combinations(size.compute, 2):
        most = max(size.compute_steps)
        budget = gflops(size.models[small]) * most
        within = [steps for steps in size.compute_steps if gflops(size.models[large]) * steps <= budget]
        if within:
            ours, theirs = drawn(large, max(within)), drawn(small, most)
            comparisons.append(bench.compare(ours, theirs, steps=max(within), steps_of_smaller=most))
    rows = [bench.row(drawn(name, steps)) for name in size.compute for steps in size.compute_steps]
    for row in rows:
        row["sampling_gflops"] = row["gflops"] * row["steps"]
    verdict = overall(c.verdict for c in comparisons)
    return {"rows": rows, "comparisons": [c.as_dict() for c in comparisons], "verdicts": {"dit.fig-2.11": verdict}}


def needs_visual_scaling(bench: Bench) -> list[Draw]:
    return [bench.draw(Model(name)) for name in bench.grid]


def visual_scaling(bench: Bench) -> dict[str, Any]:
    """Figure 2.7: a row a model, cheapest first; a column has one class, starting noise and sampling noise."""
    names = sorted(bench.grid, key=lambda name: gflops(bench.grid[name]))
    images = torch.cat([next(read_batches(bench.samples(bench.draw(Model(name))), FIRST)) for name in names])
    path = bench.folder / "figures" / "visual-scaling.png"
    write_bytes(path, png_bytes(image_grid(images, columns=FIRST), scale=2))
    return {
        "models": [{"model": name, "gflops": gflops(bench.grid[name])} for name in names],
        "verdicts": {"dit.fig-2.7": SHOWN},
    }
