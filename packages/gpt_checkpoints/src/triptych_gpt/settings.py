"""The settings of sampling and of the smaller commands: what a person types, checked. Imports no torch, so --help is quick."""

from dataclasses import dataclass
from typing import Annotated

from triptych_common import sampler_settings
from triptych_common.fields import Ge


@dataclass(frozen=True)
class SamplerSettings(sampler_settings.SamplerSettings):
    """How an update is sampled."""

    num_inference_steps: int = 100
    """denoising steps, evenly spaced over the 1000 that the thesis takes"""
    networks_at_once: Annotated[int, Ge(1)] = 512
    """networks in a batch"""
