"""Settings of sampling, from which `triptych_common.samplers.sampling` makes a sampler. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated

from triptych_common.fields import Checked, Interval

OWN_SAMPLERS = ("ddpm", "ddim")
TIMESTEPS = 1000  # length of the diffusion process that the published models are trained on


@dataclass(frozen=True)
class SamplerSettings(Checked):
    """Which sampler turns noise into data, and in how many steps.

        steps = sampling(SamplerSettings("ddim", num_inference_steps=50), denoise, diffusion, noise)

    Raises ValueError for an unknown or ambiguous sampler or a number of steps outside 1..1000.
    """

    sampler: str = "ddpm"
    """ddpm: ancestral sampling, as published; ddim: deterministic; or a scheduler of diffusers by its name or the beginning
    of it, such as unipc"""
    num_inference_steps: Annotated[int, Interval(ge=1, le=TIMESTEPS)] = 250
    """denoising steps, evenly spaced over the 1000 of training"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sampler_name()

    @property
    def is_own(self) -> bool:
        """Whether the sampler is one of triptych's, rather than a scheduler of diffusers."""
        return self.sampler in OWN_SAMPLERS

    def sampler_name(self) -> str:
        """The sampler's full name, also if `sampler` is only the beginning of it.

        Raises ValueError if no scheduler or several match, or if diffusers is not installed.
        """
        if self.is_own:
            return self.sampler
        from triptych_common.schedulers import find

        return find(self.sampler)
