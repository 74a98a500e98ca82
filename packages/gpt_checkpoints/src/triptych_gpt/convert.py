"""`triptych-gpt convert`: a released G.pt's checkpoint as a model file of ours."""

from dataclasses import asdict
from typing import Any

from triptych_common.cli import echo

from triptych_gpt.interop import load_released
from triptych_gpt.model import FILE_NAME, write_model
from triptych_gpt.presets import PRESETS
from triptych_gpt.settings import RELEASED, ConvertConfig
from triptych_gpt.zoo.source import TaskSpec


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Write the model; returns where, and what a released file does not hold itself.

    Raises ValueError for a file that is damaged, holds more than tensors or is of another model, OSError if it cannot be written.
    """
    if config.checkpoint is None:
        raise ValueError("no checkpoint: give the released file, --checkpoint best.pt")
    model, known = load_released(config.checkpoint, config.released), RELEASED[config.released]
    path = config.out / FILE_NAME
    facts = {
        "scale": known.scale,
        "metric": known.metric,
        "better": known.better,
        "trained_range": None,  # not in the file
        "task": asdict(TaskSpec(known.task)),
        "converted_from": config.checkpoint.name,
    }
    write_model(path, PRESETS[config.released], model.state_dict(), facts)
    echo(f"wrote {path}: {sum(p.numel() for p in model.parameters()):,} parameters, prompted by {known.metric}")
    return {"model": str(path), **facts}
