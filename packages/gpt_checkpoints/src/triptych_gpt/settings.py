"""The settings of sampling and of the smaller commands: what a person types, checked. Imports no torch, so --help is quick."""

from dataclasses import dataclass

from triptych_common import sampler_settings


@dataclass(frozen=True)
class SamplerSettings(sampler_settings.SamplerSettings):
    """How an update is sampled."""

    num_inference_steps: int = 100
    """denoising steps, evenly spaced over the 1000 that the thesis takes"""
    networks_at_once: int = 512
    """networks in a batch"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.networks_at_once < 1:
            raise ValueError(f"networks_at_once {self.networks_at_once}: expected at least 1")
