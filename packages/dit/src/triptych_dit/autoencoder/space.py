"""The space of the latents that a model works in: which autoencoder's, and how they are scaled."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor
from triptych_common.fields import Checked, Ge, Gt
from triptych_common.storage.files import check

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
    scale_factor: Annotated[float, Gt(0)]
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: Annotated[tuple[float, ...] | None, Gt(0, "numbers above 0")] = None
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
