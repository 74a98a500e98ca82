"""`triptych-gpt convert`: a checkpoint of the released code as a model file of ours."""

from dataclasses import asdict
from typing import Any

from triptych_common.cli import echo

from triptych_gpt.interop import config_of, load_released
from triptych_gpt.model import FILE_NAME, write_model
from triptych_gpt.presets import PRESETS
from triptych_gpt.settings import RELEASED, ConvertConfig, Released
from triptych_gpt.symmetry.spec import PermutationSpec
from triptych_gpt.zoo.source import TaskSpec


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Write the model; returns where, and what a released file does not hold itself.

    Raises ValueError for a file that is damaged, holds more than tensors or is of other networks, OSError if it cannot be written.
    """
    if config.checkpoint is None:
        raise ValueError("no checkpoint: give the released file, --checkpoint best.pt")
    symmetry, known = _known(config)
    factor = config.metric_factor or (1.0 if config.task is not None else PRESETS[config.released].metric_factor)
    shape = config_of(config.checkpoint, symmetry, num_heads=config.num_heads, metric_factor=factor)
    model = load_released(config.checkpoint, shape)
    path = config.out / FILE_NAME
    spec = TaskSpec(known.task)
    facts = {
        "scale": known.scale,
        "metric": known.metric,
        "better": known.better,
        "trained_range": None,  # not in the file
        "task": asdict(spec),
        **spec.source(),
        "converted_from": config.checkpoint.name,
    }
    write_model(path, shape, model.state_dict(), facts)
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters (width {shape.width}, {shape.depth} blocks, "
    echo(f"wrote {path}: {size}{shape.num_heads} heads), prompted by {known.metric}")
    return {"model": str(path), **facts}


def _known(config: ConvertConfig) -> tuple[PermutationSpec, Released]:
    """What the file does not hold: the networks, and the facts of their training."""
    known = RELEASED[config.released]
    if config.task is None:
        known = known._replace(scale=config.scale or known.scale, metric=config.metric or known.metric)
        return PRESETS[config.released].symmetry, known
    task = TaskSpec(config.task).open()
    better = {metric.name: metric.better for metric in task.metrics}
    assert config.metric is not None  # refused by the config
    assert config.scale is not None
    if config.metric not in better:
        raise ValueError(f"metric {config.metric!r}: task {task.name} scores {', '.join(better)}; choose one of these")
    return task.symmetry, Released(config.scale, config.metric, better[config.metric], config.task)
