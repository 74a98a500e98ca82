"""Model files: one safetensors file with a DiT's weights, its config and what it was trained to predict."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from triptych_common.diffusion import GaussianDiffusion, NoiseSchedule
from triptych_common.storage import checkpoint

from triptych_dit.config import DiTConfig
from triptych_dit.model import DiT

_KIND = "DiT"
FILE_NAME = "model.safetensors"


class TrainedModel(NamedTuple):
    """A loaded model with the diffusion process it was trained on and the facts of its training."""

    model: DiT
    diffusion: GaussianDiffusion
    facts: dict[str, Any]


def make_diffusion(config: DiTConfig, predict: str) -> GaussianDiffusion:
    """The thesis's process: 1000 linear steps; the variance learned where the model has channels for it."""
    variance = "learned_range" if config.learn_sigma else "fixed_large"
    return GaussianDiffusion(NoiseSchedule.linear(), predict=predict, variance=variance)


def save_model(path: Path, model: DiT, facts: dict[str, Any]) -> None:
    """Write a model; `facts` must be JSON-able and hold "predict"."""
    write_model(path, model.config, model.state_dict(), facts)


def write_model(path: Path, config: DiTConfig, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """The same from a state dict."""
    checkpoint.write(path, tensors, {"kind": _KIND, "config": asdict(config), **facts})


def model_path(path: Path) -> Path:
    """A model file itself, or the one in a run's folder.

    Raises FileNotFoundError for a folder without one.
    """
    if not path.is_dir():
        return path
    if not (path / FILE_NAME).exists():
        raise FileNotFoundError(
            f"{path / FILE_NAME}: no finished model; train one with triptych-dit train --out {path}"
        )
    return path / FILE_NAME


def load_model(path: Path) -> TrainedModel:
    """Read a model file, or the one in a run's folder, onto the CPU in evaluation mode.

    Raises FileNotFoundError where there is none, ValueError for a file of another kind.
    """
    path = model_path(path)
    tensors, facts = checkpoint.read(path)
    if facts.get("kind") != _KIND:
        raise ValueError(f"{path}: not a DiT model file; expected {FILE_NAME} of a triptych-dit training run")
    try:
        config = DiTConfig(**{**facts["config"], "input_size": tuple(facts["config"]["input_size"])})
        model = DiT(config)
        model.load_state_dict(tensors)
        diffusion = make_diffusion(config, facts["predict"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path}: made by another version of triptych ({' '.join(str(error).split())[:200]})"
        ) from error
    return TrainedModel(model.requires_grad_(False).eval(), diffusion, facts)
