"""Carry a model between triptych, the released DiT's files and diffusers."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from triptych_common.cli import CommonOptions, echo

from triptych_dit.interop import export_released, load_any, to_diffusers
from triptych_dit.weights import FILE_NAME, TrainedModel, save_model


@dataclass(frozen=True)
class ExportConfig(CommonOptions):
    """Write a model, wherever it comes from, in the format of triptych, of the released DiT or of diffusers."""

    checkpoint: str = "runs/dit"
    """a model file or run folder; a released .pt or "DiT-XL/2@256", "DiT-XL/2@512"; a folder or hub repository of diffusers"""
    format: Literal["diffusers", "released", "triptych"] = "diffusers"
    """a folder for DiTPipeline; model.pt as facebookresearch/DiT reads it; model.safetensors for sample and train"""
    out: Path = Path("runs/export")
    """folder to write"""
    vae: str | None = None
    """diffusers: autoencoder to put beside the model, a folder or hub repository"""
    scheduler: str | None = None
    """diffusers: a scheduler by name; DDIMScheduler by default"""
    labels_file: Path | None = None
    """diffusers: JSON object of labels and names, {"0": "tench, Tinca tinca", ...}"""
    weights: Literal["ema", "model"] | None = None
    """released training checkpoints: which weights; the average where there is one"""
    num_heads: int | None = None
    """released files of a width that was not published: attention heads"""
    num_classes: int | None = None
    """released files and diffusers: classes, where the label table leaves them open"""

    def __post_init__(self) -> None:
        given = [name for name in ("vae", "scheduler", "labels_file") if getattr(self, name) is not None]
        if self.format != "diffusers" and given:
            raise ValueError(
                f"--{given[0].replace('_', '-')} is for --format diffusers, not {self.format}; leave it out"
            )

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the model to `config.out` and return what was written, with notes on what is different there.

    Raises ValueError or OSError for a model that cannot be read, or that the format cannot hold.
    """
    names = None if config.labels_file is None else _names(config.labels_file)
    trained = load_any(
        config.checkpoint, weights=config.weights, num_heads=config.num_heads, num_classes=config.num_classes
    )
    model, facts = trained.model, {**trained.facts, "source": config.checkpoint}
    notes = []
    if config.format == "diffusers":
        to_diffusers(model, config.out, vae=config.vae, scheduler=config.scheduler, id2label=names, facts=facts)
        written = config.out
        notes = _diffusers_notes(trained, config.vae)
    elif config.format == "released":
        written = config.out / "model.pt"
        export_released(model, written)
    else:
        written = config.out / FILE_NAME
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
    if vae is None:
        spec = (trained.facts.get("autoencoder") or {}).get("spec")
        with_it = f"repeat with --vae {spec}, or " if spec else ""
        notes.append(
            f"there is no autoencoder in it: {with_it}open it with DiTPipeline.from_pretrained(folder, vae=...)"
        )
    if config.num_classes and config.null_label is None:
        notes.append("the model has no null label: call the pipeline with guidance_scale=1")
    if config.num_classes > 1000 and config.null_label is not None:
        notes.append(f"the pipeline takes label 1000 as null, so class 1000 is label {config.num_classes} there")
    return notes


def _names(path: Path) -> dict[int, str]:
    try:
        names = json.loads(path.read_text())
        return {int(label): name for label, name in names.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f'{path}: expected a JSON object of labels and names, {{"0": "tench", ...}} ({error})'
        ) from error
