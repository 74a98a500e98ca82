"""The named experiments: what samples each needs, and what it makes of their scores."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from triptych_common.metrics import Estimate

from triptych_thesis.chapter2.context import Bench, Draw
from triptych_thesis.chapter2.gallery import gallery, needs_gallery
from triptych_thesis.chapter2.scaling import (
    compute,
    needs_compute,
    needs_scaling,
    needs_visual_scaling,
    scaling,
    visual_scaling,
)
from triptych_thesis.chapter2.sizes import Model
from triptych_thesis.chapter2.statistics import LOWER_IS_BETTER, SHOWN, Score, overall, sign_verdict
from triptych_thesis.chapter2.unet import matched, unet_gflops


class Experiment(NamedTuple):
    """needs: what must be sampled and scored first. measure: the result, JSON-able, with "verdicts" by ids of the ledger."""

    needs: Callable[[Bench], list[Draw]]
    measure: Callable[[Bench], dict[str, Any]]


def needs_block_designs(bench: Bench) -> list[Draw]:
    models = [Model(bench.size.designs), *bench.size.others()]
    return [*(bench.draw(model, stage) for model in models for stage in bench.size.stages), *bench.repeated()]


def block_designs(bench: Bench) -> dict[str, Any]:
    """Figure 2.5: adaLN-Zero against the three others, after equally many steps."""
    size, ours = bench.size, Model(bench.size.designs)
    comparisons = [
        bench.compare(bench.draw(ours, stage), bench.draw(other, stage), images=size.count(stage))
        for other in size.others()
        for stage in size.stages
    ]
    return {
        "rows": [bench.row(bench.draw(model, stage)) for model in (ours, *size.others()) for stage in size.stages],
        "comparisons": [c.as_dict() for c in comparisons],
        "noise": bench.noises(),
        "verdicts": {"dit.fig-2.5": overall(c.verdict for c in comparisons)},
    }


def needs_unet(bench: Bench) -> list[Draw]:
    models = (Model(bench.size.unet), Model(bench.size.unet, unet=True))
    return [*(bench.draw(model, stage) for model in models for stage in bench.size.stages), *bench.repeated()]


def unet(bench: Bench) -> dict[str, Any]:
    """Figure 2.2, right: a DiT against a U-Net of as many GFLOPs, trained on the same examples at the same rate."""
    size, ours, theirs = bench.size, Model(bench.size.unet), Model(bench.size.unet, unet=True)
    comparisons = [
        bench.compare(bench.draw(ours, stage), bench.draw(theirs, stage), images=size.count(stage))
        for stage in size.stages
    ]
    rows = [bench.row(bench.draw(model, stage)) for model in (ours, theirs) for stage in size.stages]
    shape = matched(size.shape(theirs))
    for row in rows:
        if row["model"] == theirs.title:
            row["gflops"] = unet_gflops(shape)
    return {
        "rows": rows,
        "comparisons": [c.as_dict() for c in comparisons],
        "channels": list(shape.channels),
        "noise": bench.noises(),
        "verdicts": {"dit.fig-2.2": comparisons[-1].verdict},
    }


def _headline(bench: Bench) -> int | str:
    """Channels that the published guided numbers are on, where the size repeats them; all, where it does not."""
    return bench.size.guidance_channels or "all"


def _fewer_channels(bench: Bench) -> int:
    """All but one; 0 where there is one."""
    return bench.size.guidance_channels or bench.grid[bench.size.main].in_channels - 1


def _guided(bench: Bench, scale: float, channels: int | str = "all") -> Draw:
    return bench.of_main(bench.size.guidance_samples, guidance_scale=scale, guidance_channels=channels)


def _guidance_draws(bench: Bench) -> list[Draw]:
    """A sweep of scales on all channels; then, where the model draws several, on all but one; then the model on its way."""
    size = bench.size
    draws = [_guided(bench, scale) for scale in size.guidance_scales]
    if channels := _fewer_channels(bench):
        draws += [_guided(bench, scale, channels) for scale in size.guidance_scales if scale != 1]
    settings = replace(size.sampler, guidance_scale=size.guidance_scale, guidance_channels=_headline(bench))
    return [*draws, *(Draw(Model(size.main), images, settings, size.guidance_samples) for images in size.kept)]


def guidance(bench: Bench) -> dict[str, Any]:
    """Tables 2.2 and 2.3: what guidance does to each metric, on one trained model, and on how many channels."""
    size = bench.size
    guided, plain = _guided(bench, size.guidance_scale, _headline(bench)), _guided(bench, 1.0)
    comparisons = [
        bench.compare(better, worse, metric, seeds=False, of=metric, better_scale=better.settings.guidance_scale)
        for metric, better, worse in (
            ("frechet", guided, plain), ("precision", guided, plain), ("recall", plain, guided), ("digit_score", guided, plain),
        )
    ]  # fmt: skip
    scales = [scale for scale in size.guidance_scales if scale != 1] if _fewer_channels(bench) else []
    fewer = [
        bench.compare(_guided(bench, scale, _fewer_channels(bench)), _guided(bench, scale), seeds=False, scale=scale)
        for scale in scales
    ]
    return {
        "rows": [{**bench.row(draw), "channels": draw.settings.guidance_channels} for draw in _guidance_draws(bench)],
        "comparisons": [c.as_dict() for c in comparisons],
        "fewer": [c.as_dict() for c in fewer],
        "channels": bench.grid[size.main].in_channels,
        "side": size.side,
        "verdicts": {
            "dit.table-2.3" if size.side == 512 else "dit.table-2.2": against_rivals(
                size.side, partial(bench.score, guided)
            )
        },
        "direction": overall(c.verdict for c in comparisons),
    }


RIVALS = {  # by side: the best published scores that the tables' claims are against, guided rivals among them
    256: {"frechet": 2.30, "digit_score": 267.75},
    512: {"frechet": 3.85},
}


def against_rivals(side: int, score: Callable[[str], Score]) -> str:
    """Whether scores, by metric, are ahead of all that the table of this side lists, as the thesis claims of its guided model;
    digits do not decide that."""
    found = []
    for metric, best in RIVALS.get(side, {}).items():
        ours, sign = score(metric).estimate, -1 if metric in LOWER_IS_BETTER else 1
        low, high = sorted(sign * (bound - best) for bound in (ours.low, ours.high))
        found.append(sign_verdict(Estimate(sign * (ours.value - best), low, high)))
    return overall(found) if found else SHOWN


def _sampled(bench: Bench, sampler: str, steps: int) -> Draw:
    return bench.of_main(bench.size.compute_samples, sampler=sampler, num_inference_steps=steps)


def _sampler_draws(bench: Bench) -> list[Draw]:
    return [_sampled(bench, sampler, steps) for sampler in bench.size.samplers for steps in bench.size.sampler_steps]


def samplers(bench: Bench) -> dict[str, Any]:
    """Quality against denoising steps, sampler by sampler, of the main model: whether more steps are better, and whether faster
    samplers are in few."""
    first, *others = bench.size.samplers
    few, many = min(bench.size.sampler_steps), max(bench.size.sampler_steps)
    pairs = [((name, many), (name, few)) for name in bench.size.samplers]
    pairs += [((name, few), (first, few)) for name in others]
    comparisons = [
        bench.compare(
            _sampled(bench, *better), _sampled(bench, *worse), metric, seeds=False, of=metric,
            pair=[f"{name}, {steps} steps" for name, steps in (better, worse)],
        )
        for metric in ("frechet", "recall")
        for better, worse in pairs
    ]  # fmt: skip
    rows = [bench.row(draw) for draw in _sampler_draws(bench)]
    return {"rows": rows, "comparisons": [c.as_dict() for c in comparisons], "verdicts": {}}


EXPERIMENTS: Mapping[str, Experiment] = {
    "gallery": Experiment(needs_gallery, gallery),
    "block-designs": Experiment(needs_block_designs, block_designs),
    "scaling": Experiment(needs_scaling, scaling),
    "compute": Experiment(needs_compute, compute),
    "guidance": Experiment(_guidance_draws, guidance),
    "visual-scaling": Experiment(needs_visual_scaling, visual_scaling),
    "unet": Experiment(needs_unet, unet),
    "samplers": Experiment(_sampler_draws, samplers),
}
