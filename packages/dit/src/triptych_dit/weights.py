"""Model files: one safetensors file with a DiT's weights, its config and what it means: prediction, latents, classes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

import torch
from jaxtyping import Float
from torch import Tensor
from triptych_common.diffusion import GaussianDiffusion, NoiseSchedule
from triptych_common.fields import FINITE, Checked, Ge, Gt
from triptych_common.storage.files import check, open_ended
from triptych_common.storage.model_file import ModelFormat
from typing_extensions import TypedDict

from triptych_dit.config import DiTConfig
from triptych_dit.model import DiT

FILE_NAME = "model.safetensors"
PROCESS, PICTURES = "linear, 1000 steps", (1, 3)  # channels of gray and of coloured pictures
FETCH = "fetch_autoencoder"  # fact of a loaded model, never of a file: the user named what is on the hub


Latents = Float[Tensor, "*batch channels height width"]
_PLACE, _HASHES = ("spec",), ("encoder_sha256", "sha256")
_CHANNELWISE = ("latents_mean", "latents_std")


@dataclass(frozen=True)
class LatentSpace(Checked):
    """Latents (z - mean) / std * scale_factor for an autoencoder's z, channel by channel, of about unit variance.

    This is what diffusers' pipelines compute from an autoencoder's config.  [Rombach et al. 2022, D.1]
    spec: the autoencoder, a folder or a name on the hub. sha256, encoder_sha256: hashes of its weights.
    shift_factor: the mean of all channels; latents_mean, latents_std: one of each channel, instead.
    What is None is unknown, but for a mean and std of None, which are 0 and 1.
    """

    spec: str
    scale_factor: Annotated[float, Gt(0), FINITE]
    shift_factor: Annotated[float, FINITE] = 0.0
    latents_mean: Annotated[tuple[float, ...] | None, FINITE] = None
    latents_std: Annotated[tuple[float, ...] | None, Gt(0, "numbers above 0"), FINITE] = None
    downsampling: Annotated[int | None, Ge(1)] = None
    latent_channels: Annotated[int | None, Ge(1)] = None
    image_channels: Annotated[int | None, Ge(1)] = None
    sha256: str | None = None
    encoder_sha256: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift_factor and self.latents_mean is not None:
            raise ValueError("both a shift_factor and latents_mean, expected one of them")
        for name in _CHANNELWISE:
            numbers = getattr(self, name)
            if numbers is not None and self.latent_channels not in (None, len(numbers)):
                raise ValueError(f"{len(numbers)} {name} for {self.latent_channels} channels")

    @classmethod
    def of(cls, facts: Mapping[str, Any], source: str = "autoencoder") -> "LatentSpace":
        """The space that a file records. Raises ValueError, naming the source, for anything else."""
        return check(facts, cls, source=source, remedy="make or fetch the file again")

    @classmethod
    def of_config(cls, config: Mapping[str, Any], spec: str, **hashes: str) -> "LatentSpace":
        """The space of a config of diffusers' `AutoencoderKL`."""
        mean, std = (config.get(name) for name in _CHANNELWISE)
        return cls(
            spec, float(config.get("scaling_factor", 0.18215)), float(config.get("shift_factor") or 0.0),
            None if mean is None else tuple(map(float, mean)), None if std is None else tuple(map(float, std)),
            2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"], config.get("in_channels", 3), **hashes,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What is known, as JSON can hold it."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}

    @property
    def is_channelwise(self) -> bool:
        """Whether there is more to undo than a division by the scale factor."""
        return bool(self.shift_factor) or self.latents_mean is not None or self.latents_std is not None

    def statistics(self, like: Tensor) -> tuple[Float[Tensor, "_ 1 1"], Float[Tensor, "_ 1 1"]]:
        """Mean and standard deviation of each channel of z, or one for all."""
        mean, std = self.latents_mean or (self.shift_factor,), self.latents_std or (1.0,)
        return tuple(torch.tensor(numbers).to(like).view(-1, 1, 1) for numbers in (mean, std))  # type: ignore[return-value]

    def scaled(self, z: Latents) -> Latents:
        """Latents of what the encoder gives."""
        mean, std = self.statistics(z)
        return (z - mean) / std * self.scale_factor

    def unscaled(self, latents: Latents) -> Latents:
        """What the decoder takes, for latents."""
        mean, std = self.statistics(latents)
        return latents * std / self.scale_factor + mean

    def difference(self, other: "LatentSpace") -> str | None:
        """In what latents of one are none of the other, as far as both are known; None if in nothing."""
        names = [field.name for field in fields(self) if field.name not in _PLACE + _HASHES]
        # The first hash that both know decides: a decoder that is tuned further changes no latent.
        known = (name for name in _HASHES if None not in (getattr(self, name), getattr(other, name)))
        for name in (*[*known][:1], *names):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs and (None not in (ours, theirs) or name in _CHANNELWISE):
                ours, theirs = (side[:12] if name in _HASHES else side for side in (ours, theirs))
                return f"{name} is {ours}, {other.spec} has {theirs}"
        return None


STABLE_DIFFUSION = LatentSpace(  # what the released models were trained with
    "stabilityai/sd-vae-ft-ema", 0.18215, downsampling=8, latent_channels=4, image_channels=3
)


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


def facts_of(config: DiTConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the weights of a model file, for checkpoints of a training run."""
    return _FORMAT.facts_of(asdict(config), {"process": PROCESS, **facts})


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
