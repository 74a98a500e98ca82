"""The named experiments: what samples each needs, and what it makes of their scores."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from triptych_dit.study.bench import Bench, Draw
from triptych_dit.study.gallery import gallery, needs_gallery
from triptych_dit.study.scaling import (
    compute,
    needs_compute,
    needs_scaling,
    needs_visual_scaling,
    scaling,
    visual_scaling,
)
from triptych_dit.study.sizes import Model
from triptych_dit.study.statistics import overall
from triptych_dit.study.unet import matched, unet_gflops


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
        "noise": bench.noise()._asdict(),
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
        "noise": bench.noise()._asdict(),
        "verdicts": {"dit.fig-2.2": comparisons[-1].verdict},
    }


def _guidance_draws(bench: Bench) -> list[Draw]:
    """A sweep of scales on all channels; then, where the model draws several, on all but one; then the model on its way."""
    size, main = bench.size, Model(bench.size.main)
    draws = [bench.of_main(size.guidance_samples, guidance_scale=scale) for scale in size.guidance_scales]
    channels = size.guidance_channels or bench.grid[size.main].in_channels - 1
    if channels:
        draws += [
            bench.of_main(size.guidance_samples, guidance_scale=scale, guidance_channels=channels)
            for scale in size.guidance_scales
            if scale != 1
        ]
    settings = replace(size.sampler, guidance_scale=size.guidance_scale)
    return [*draws, *(Draw(main, images, settings, size.guidance_samples) for images in size.kept)]


def guidance(bench: Bench) -> dict[str, Any]:
    """Tables 2.2 and 2.3: what guidance does to each metric, on one trained model."""
    size = bench.size
    guided = bench.of_main(size.guidance_samples, guidance_scale=size.guidance_scale)
    plain = bench.of_main(size.guidance_samples, guidance_scale=1.0)
    comparisons = [
        bench.compare(better, worse, metric, seeds=False, of=metric, better_scale=better.settings.guidance_scale)
        for metric, better, worse in (
            ("frechet", guided, plain), ("precision", guided, plain), ("recall", plain, guided), ("digit_score", guided, plain),
        )
    ]  # fmt: skip
    return {
        "rows": [{**bench.row(draw), "channels": draw.settings.guidance_channels} for draw in _guidance_draws(bench)],
        "comparisons": [c.as_dict() for c in comparisons],
        "channels": bench.grid[size.main].in_channels,
        "verdicts": {},  # the tables' claims are numbers on ImageNet: no digit decides them
        "direction": overall(c.verdict for c in comparisons),
    }


def _sampler_draws(bench: Bench) -> list[Draw]:
    size = bench.size
    return [
        bench.of_main(size.compute_samples, sampler=sampler, num_inference_steps=steps)
        for sampler in size.samplers
        for steps in size.sampler_steps
    ]


def samplers(bench: Bench) -> dict[str, Any]:
    """Quality against denoising steps, sampler by sampler, of the main model."""
    return {"rows": [bench.row(draw) for draw in _sampler_draws(bench)], "verdicts": {}}


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
