"""Methods of alignment by name: the baselines that a learned alignment is compared with."""

from collections.abc import Callable
from typing import Any

from jaxtyping import UInt8
from torch import Tensor
from triptych_common.images import from_uint8

from triptych_gangealing.aligner import Aligner, Alignment
from triptych_gangealing.baselines.congealing import Congealing
from triptych_gangealing.baselines.moments import moments
from triptych_gangealing.warp import Warp

OURS = "GANgealing"  # its name among methods
Images = UInt8[Tensor, "n 3 height width"]
Method = Callable[[Images], Alignment]


def baselines(training: UInt8[Tensor, "m 3 size size"]) -> dict[str, Method]:
    """Baselines: no alignment, moments, moments with the smaller rotation, and classical Congealing.

    training: the stack that Congealing is fitted to.
    """
    congealing = Congealing.fit(training)
    return {
        "none": lambda images: Alignment.of_warp(Warp.identity(len(images))),
        "moments": lambda images: Alignment.of_warp(moments(images)),
        "moments, upright": lambda images: Alignment.of_warp(moments(images, resolve="upright")),
        "Congealing": lambda images: Alignment.of_warp(congealing.align(images)),
    }


def learned(aligner: Aligner, **options: Any) -> Method:
    """A trained aligner as a method; options are those of `Aligner.align`, such as iterations and flips."""
    return lambda images: aligner.align(from_uint8(images), **options)
