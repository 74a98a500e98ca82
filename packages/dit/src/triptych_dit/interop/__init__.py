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
from triptych_dit.interop.pipeline_parts import fitting_autoencoder
from triptych_dit.interop.released import PUBLISHED, export_released, load_released, read_released
from triptych_dit.weights import (
    FETCH,
    FILE_NAME,
    PICTURES,
    STABLE_DIFFUSION,
    Prediction,
    TrainedModel,
    load_model,
    make_diffusion,
)

__all__ = [
    "PUBLISHED", "diffusers_transformer", "export_released", "from_diffusers", "load_any", "load_released", "to_diffusers",
    "use_released_timesteps",
]  # fmt: skip


def load_any(
    spec: str | Path, *, predict: Prediction | None = None, vae: str | None = None, weights: str | None = None,
    num_heads: int | None = None, num_classes: int | None = None, input_size: int | None = None,
) -> TrainedModel:  # fmt: skip
    """Load a model of any kind, onto the CPU and in evaluation mode.

    spec: a model file or run folder of this package, a released file or a published name, a folder with a training script's
        model.safetensors or pytorch_model.bin, or a folder or hub repository of diffusers.
    predict, vae: what the model predicts and the autoencoder of its latents, where its files do not say.
    weights, num_heads, num_classes, input_size: as for `load_released` and `from_diffusers`.
    Raises OSError if there is no such file, ValueError if it is not such a model, for an option that it has no use for, or a
    prediction that contradicts its files.
    """
    path, name = Path(spec).expanduser(), str(spec)
    options: dict[str, Any] = {
        "weights": weights,
        "num_heads": num_heads,
        "num_classes": num_classes,
        "input_size": input_size,
    }
    repository = False
    if "state" in foreign.metadata(path / FILE_NAME if path.is_dir() else path):
        _refuse(name, options, "a model file of triptych's own")
        model, _, facts = load_model(path)
        if model.config.in_channels in PICTURES:
            facts.setdefault("autoencoder", None)
    elif (file := _weights_in(path)) or name in PUBLISHED:
        model, facts = read_released(file or spec, **options)
        facts |= {"source": name, FETCH: name in PUBLISHED}
        if not vae and "autoencoder" not in facts and model.config.in_channels == STABLE_DIFFUSION.latent_channels:
            facts["autoencoder"] = STABLE_DIFFUSION.facts()
    elif path.is_dir() and not is_of_diffusers(path):
        return load_model(path)  # a run without a finished model, of which this raises
    else:
        repository = bool(re.fullmatch(r"(?!runs/)[\w.-]+/[\w.-]+", name)) and not path.parent.exists()
        if not path.is_dir() and (not repository or name in PRESETS):
            raise FileNotFoundError(
                f"{name}: no such file or folder, and no published model; expected a model file, a run's folder, a released .pt, "
                f"{', '.join(known for known in PUBLISHED if '@' in known)}, or a folder or hub repository of diffusers"
            )
        del options["num_classes"]
        _refuse(name, options, "of diffusers")
        model, facts = read_folder(spec, num_classes=num_classes, predict=predict)
        facts[FETCH] = repository
    if predict and facts.setdefault("predict", predict) != predict:
        raise ValueError(f"{name}: predicts the {facts['predict']}, as its files say; leave --predict {predict} out")
    facts.setdefault("predict", "noise")
    known = "autoencoder" in facts and (facts["autoencoder"] or model.config.in_channels in PICTURES)
    if vae and not known:
        facts |= {"autoencoder": fitting_autoencoder(vae, model.config.in_channels).facts(), FETCH: True}
    return TrainedModel(model, make_diffusion(model.config, facts["predict"]), facts)


def _weights_in(path: Path) -> Path | None:
    """The file itself, or that in a folder which a training script of Hugging Face's libraries wrote."""
    names = (FILE_NAME, "pytorch_model.bin")
    return path if path.is_file() else next((path / name for name in names if (path / name).is_file()), None)


def _refuse(name: str, options: dict[str, Any], what: str) -> None:
    given = [option for option, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{name}: {', '.join(given)} has no meaning here, since it is {what}; leave it out")
