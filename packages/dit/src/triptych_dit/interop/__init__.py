"""Models of other programs: files of the released DiT, and folders of diffusers, both ways."""

import re
from pathlib import Path
from typing import Any

from triptych_common.storage import foreign

from triptych_dit.config import PRESETS
from triptych_dit.interop.diffusers import (
    diffusers_transformer,
    from_diffusers,
    is_of_diffusers,
    read_folder,
    to_diffusers,
    use_released_timesteps,
)
from triptych_dit.interop.released import PUBLISHED, export_released, load_released
from triptych_dit.weights import FILE_NAME, TrainedModel, load_model, make_diffusion

__all__ = [
    "PUBLISHED", "diffusers_transformer", "export_released", "from_diffusers", "load_any", "load_released", "to_diffusers",
    "use_released_timesteps",
]  # fmt: skip

STABLE_DIFFUSION_VAE: dict[str, Any] = {  # what the released models were trained with
    "spec": "stabilityai/sd-vae-ft-ema", "sha256": None, "scale_factor": 0.18215, "shift_factor": 0.0, "downsampling": 8,
    "latent_channels": 4,
}  # fmt: skip


def load_any(
    spec: str | Path, *, weights: str | None = None, num_heads: int | None = None, num_classes: int | None = None
) -> TrainedModel:
    """Load a model of any kind, onto the CPU and in evaluation mode.

    spec: a model file or run folder of this package, a released file or a published name, or a folder or hub repository of
        diffusers.
    weights, num_heads, num_classes: as for `load_released` and `from_diffusers`.
    Raises OSError if there is no such file, ValueError if it is not such a model, or for an option that it has no use for.
    """
    path, name = Path(spec).expanduser(), str(spec)
    options = {"weights": weights, "num_heads": num_heads, "num_classes": num_classes}
    if "state" in foreign.metadata(path / FILE_NAME if path.is_dir() else path):
        _refuse(name, options, "a model file of triptych's own")
        return load_model(path)
    if path.is_file() or name in PUBLISHED:
        model = load_released(spec, weights=weights, num_heads=num_heads, num_classes=num_classes)
        autoencoder = STABLE_DIFFUSION_VAE if model.config.in_channels == 4 else None
        facts: dict[str, Any] = {"predict": "noise", "autoencoder": autoencoder, "source": name}
        return TrainedModel(model, make_diffusion(model.config, "noise"), facts)
    if path.is_dir() and not is_of_diffusers(path):
        return load_model(path)  # a run without a finished model, of which this raises
    repository = re.fullmatch(r"(?!runs/)[\w.-]+/[\w.-]+", name) and not path.parent.exists() and name not in PRESETS
    if not path.is_dir() and not repository:
        raise FileNotFoundError(
            f"{name}: no such file or folder, and no published model; expected a model file, a run's folder, a released .pt, "
            f"{', '.join(known for known in PUBLISHED if '@' in known)}, or a folder or hub repository of diffusers"
        )
    del options["num_classes"]
    _refuse(name, options, "of diffusers")
    model, facts = read_folder(spec, num_classes=num_classes)
    return TrainedModel(model, make_diffusion(model.config, facts["predict"]), facts)


def _refuse(name: str, options: dict[str, Any], what: str) -> None:
    given = [option for option, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{name}: {', '.join(given)} has no meaning here, since it is {what}; leave it out")
