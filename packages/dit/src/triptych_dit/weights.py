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

from triptych_dit.autoencoder.space import LatentSpace
from triptych_dit.config import DiTConfig
from triptych_dit.model import DiT

FILE_NAME = "model.safetensors"
PROCESS, PICTURES = "linear, 1000 steps", (1, 3)  # channels of gray and of coloured pictures
FETCH = "fetch_autoencoder"  # fact of a loaded model, never of a file: the user named what is on the hub


Prediction = Literal["noise", "sample"]


@open_ended
class Facts(TypedDict):
    """What a model means: recorded with its weights in every format, and compared wherever it meets data or other models."""

    predict: Prediction
    process: NotRequired[Literal["linear, 1000 steps"]]  # of diffusion: the released one, and so far the only one
    autoencoder: NotRequired[LatentSpace | None]  # None: of pixels; absent: unknown
    class_names: NotRequired[list[str] | None]  # of the first rows of the label table
    data: NotRequired[str]  # identity of what it was trained on


@open_ended
class _FileFacts(Facts):
    config: DiTConfig


_FORMAT = ModelFormat(
    kinds=("DiT",), file_name=FILE_NAME, expected="a trained DiT", mismatch="not a DiT's model file",
    made=f"triptych-dit train --out FOLDER makes {FILE_NAME}",
    absent="no finished model; train one with triptych-dit train --out {folder}", facts=_FileFacts,
)  # fmt: skip


class TrainedModel(NamedTuple):
    """A loaded model with the diffusion process it was trained on and the facts of its training."""

    model: DiT
    diffusion: GaussianDiffusion
    facts: dict[str, Any]  # `Facts`, as JSON has them

    @property
    def space(self) -> LatentSpace | None:
        """The space of its latents; None for a model of pixels, or if it is not known."""
        facts = self.facts.get("autoencoder")
        return LatentSpace.of(facts) if facts else None

    @property
    def of_pixels(self) -> bool:
        """Whether its samples are pictures: its channels are a picture's, and it knows no autoencoder."""
        return not self.facts.get("autoencoder") and self.model.config.in_channels in PICTURES

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of its classes, as far as they are known: fewer than there are classes, if data had fewer."""
        return tuple(self.facts.get("class_names") or ())


def recorded(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a loaded model as other formats take them along: without what belongs to its file."""
    return {name: fact for name, fact in facts.items() if name not in ("kind", "config", FETCH)}


def make_diffusion(config: DiTConfig, predict: Prediction) -> GaussianDiffusion:
    """The thesis's process: 1000 steps, linear schedule, learned variance with `learn_sigma`.  [thesis 2.3.1, 2.4]"""
    variance: Literal["learned_range", "fixed_large"] = "learned_range" if config.learn_sigma else "fixed_large"
    return GaussianDiffusion(NoiseSchedule.linear(), predict=predict, variance=variance)


def save_model(path: Path, model: DiT, facts: dict[str, Any]) -> None:
    """Write a model file; facts, as JSON can hold them, must include the prediction: {"predict": "noise"}."""
    write_model(path, model.config, model.state_dict(), facts)


def write_model(path: Path, config: DiTConfig, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a model file from a state dict."""
    _FORMAT.write(path, tensors, asdict(config), {"process": PROCESS, **facts})


def load_model(path: str | Path) -> TrainedModel:
    """Read a model file, or that in a run's folder, onto the CPU and in evaluation mode.

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
