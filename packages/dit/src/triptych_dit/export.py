"""Carry a model between triptych, the released DiT's files and diffusers."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from triptych_common.cli import echo
from triptych_common.storage.files import read_json

from triptych_dit.interop import export_released, load_any, to_diffusers
from triptych_dit.sampling import autoencoder_of
from triptych_dit.settings import ExportConfig
from triptych_dit.weights import FILE_NAME, TrainedModel, recorded, save_model


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the model to `config.out`; returns what was written, with notes on what differs in that format.

    Raises ValueError or OSError for a model that cannot be read, or that the format cannot hold.
    """
    names = None if config.labels_file is None else _names(config.labels_file)
    trained = load_any(config.checkpoint, **config.loading())
    if config.vae is not None and config.format != "diffusers":
        autoencoder_of(trained, torch.device("cpu"), config.vae)  # refuses another one than the model's
    model, facts = trained.model, {**recorded(trained.facts), "source": config.checkpoint}
    written = config.out / {"diffusers": "", "released": "model.pt", "triptych": FILE_NAME}[config.format]
    notes: list[str] = []
    if config.format == "diffusers":
        to_diffusers(model, written, vae=config.vae, scheduler=config.scheduler, id2label=names, facts=facts)
        notes = _diffusers_notes(trained, config.vae)
    elif config.format == "released":
        export_released(model, written, facts)
        if facts["predict"] == "sample":
            notes = ["the model predicts samples: call create_diffusion of the original code with predict_xstart=True"]
    else:
        save_model(written, model, facts)
    for line in notes:
        echo(f"note: {line}")
    echo(f"wrote {written}")
    return {"written": str(written), "format": config.format, "model": asdict(model.config), "notes": notes}


def _diffusers_notes(trained: TrainedModel, vae: str | None) -> list[str]:
    """What a user of the folder should know."""
    config, notes = trained.model.config, []
    if config.timestep_frequency_shift == 0:
        notes.append(
            "diffusers embeds timesteps by slightly other frequencies than this model was trained with; for the same "
            "outputs call triptych_dit.interop.use_released_timesteps(pipe.transformer)"
        )
    if trained.of_pixels:
        notes.append(
            "the model generates pixels, which DiTPipeline, made for latents, cannot take; its transformer and scheduler open "
            "one by one, with from_pretrained(folder, subfolder=...), and triptych-dit sample reads the folder"
        )
    elif vae is None:
        with_it = f"repeat with --vae {trained.space.spec}, or " if trained.space else ""
        notes.append(
            f"there is no autoencoder in it: {with_it}open it with DiTPipeline.from_pretrained(folder, vae=...)"
        )
    if config.num_classes and config.null_label is None and not trained.of_pixels:
        notes.append("the model has no null label: call the pipeline with guidance_scale=1")
    if config.num_classes > 1000 and config.null_label is not None and not trained.of_pixels:
        notes.append(f"the pipeline takes label 1000 as null, so class 1000 is label {config.num_classes} there")
    return notes


_NAMES = 'expected a JSON object of labels and names, {"0": "tench", ...}'


def _names(path: Path) -> dict[int, str]:
    try:
        return {int(label): name for label, name in read_json(path, dict[str, str], remedy=_NAMES).items()}
    except ValueError as error:
        raise ValueError(error if _NAMES in str(error) else f"{path}: {error}; {_NAMES}") from error
