"""Model files: one safetensors file with a DiT's weights, its config and what it was trained to predict."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired

from torch import Tensor
from triptych_common.diffusion import GaussianDiffusion, NoiseSchedule
from triptych_common.storage.files import open_ended
from triptych_common.storage.model_file import ModelFormat
from typing_extensions import TypedDict

from triptych_dit.config import DiTConfig
from triptych_dit.model import DiT

FILE_NAME = "model.safetensors"
FETCH = "fetch_autoencoder"  # fact of a loaded model, never of a file: the user named what is on the hub


@open_ended
class _Facts(TypedDict):
    config: DiTConfig
    predict: Literal["noise", "sample"]
    autoencoder: NotRequired[dict[str, Any] | None]
    class_names: NotRequired[list[str] | None]


_FORMAT = ModelFormat(
    kinds=("DiT",), file_name=FILE_NAME, expected="a trained DiT", mismatch="not a DiT's model file",
    made=f"triptych-dit train --out FOLDER makes {FILE_NAME}",
    absent="no finished model; train one with triptych-dit train --out {folder}", facts=_Facts,
)  # fmt: skip


class TrainedModel(NamedTuple):
    """A loaded model with the diffusion process it was trained on and the facts of its training."""

    model: DiT
    diffusion: GaussianDiffusion
    facts: dict[str, Any]


def make_diffusion(config: DiTConfig, predict: Literal["noise", "sample"]) -> GaussianDiffusion:
    """The thesis's process: 1000 steps, linear schedule, learned variance with `learn_sigma`.  [thesis 2.3.1, 2.4]"""
    variance: Literal["learned_range", "fixed_large"] = "learned_range" if config.learn_sigma else "fixed_large"
    return GaussianDiffusion(NoiseSchedule.linear(), predict=predict, variance=variance)


def save_model(path: Path, model: DiT, facts: dict[str, Any]) -> None:
    """Write a model file; facts, as JSON can hold them, must include the prediction: {"predict": "noise"}."""
    write_model(path, model.config, model.state_dict(), facts)


def write_model(path: Path, config: DiTConfig, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a model file from a state dict."""
    _FORMAT.write(path, tensors, asdict(config), facts)


def facts_of(config: DiTConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the weights of a model file, for checkpoints of a training run."""
    return _FORMAT.facts_of(asdict(config), facts)


def load_model(path: str | Path) -> TrainedModel:
    """Read a model file, that in a run's folder, or any checkpoint of a run, onto the CPU and in evaluation mode.

        model, diffusion, facts = load_model("runs/dit")

    Returns the model, its diffusion process, and the facts of its training (what it predicts, the autoencoder of its latents,
    names of its classes). Raises FileNotFoundError if there is none, ValueError for a file of another kind.
    """
    return _FORMAT.read(Path(path), _build)


def _build(tensors: dict[str, Tensor], facts: dict[str, Any]) -> TrainedModel:
    config = DiTConfig(**{**facts["config"], "input_size": tuple(facts["config"]["input_size"])})
    model = DiT(config)
    model.load_state_dict(tensors)
    facts.pop(FETCH, None)
    return TrainedModel(model.requires_grad_(False).eval(), make_diffusion(config, facts["predict"]), facts)
