"""StyleGAN2's operations on this machine's CPU, beside what they are by definition and what no implementation can go under.

The reference inserts zeros between pixels before it filters, filters every pixel before it drops three of four, gives every
image a weight of its own, and adds, activates and scales one after another. The floor is a copy of the larger of what is read
and written, or a plain convolution of as many multiplications. Gradients are those of all inputs, one is compared.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from triptych_common.throughput import keep_freed_memory
from triptych_gangealing.stylegan2 import layers

from benchmarks.runner import Job

MAPS, COLOURS = (8, 128, 64, 64), (8, 3, 256, 256)  # batch, channels, height, width
LAYOUTS = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}  # networks train in the first
Operation = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """An operation in two versions and its floor; inputs are sampled by `inputs(shape)`, the first in a memory format."""

    name: str
    ours: Operation
    reference: Operation
    floor: Operation
    inputs: Callable[[Sequence[int]], list[tuple[int, ...]]] = lambda shape: [tuple(shape)]


def zeros_between(x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    apart = F.pad(x.reshape(n, channels, height, 1, width, 1), (0, 1, 0, 0, 0, 1))
    return apart.reshape(n, channels, 2 * height, 2 * width)


def filtered(x: Tensor, before: int, after: int, gain: float = 1.0) -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
    weight = (gain * taps.outer(taps)).repeat(x.shape[1], 1, 1, 1)
    return F.conv2d(F.pad(x, (before, after, before, after)), weight, groups=x.shape[1])


def reference_up(x: Tensor) -> Tensor:
    return filtered(zeros_between(x), 2, 1, gain=4.0)


def reference_down(x: Tensor) -> Tensor:
    return filtered(x, 1, 1)[:, :, ::2, ::2]


def reference_modulated(x: Tensor, weight: Tensor, styles: Tensor, *, up: bool) -> Tensor:
    n, out, size = len(x), len(weight), weight.shape[-1]
    own = weight * styles[:, None, :, None, None]
    own = own * (own.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    x = F.pad(zeros_between(x), (2, 1, 2, 1)) if up else F.pad(x, (1, 1, 1, 1))
    own = own.flip(3, 4) if up else own
    x = F.conv2d(x.reshape(1, -1, *x.shape[2:]), own.reshape(n * out, -1, size, size), groups=n)
    x = x.reshape(n, out, *x.shape[2:])
    return filtered(x, 1, 1, gain=4.0) if up else x


def reference_conv_down(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(filtered(x, 2, 2), weight)[:, :, ::2, ::2]


def reference_bias_act(x: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu(x + bias[:, None, None], 0.2) * math.sqrt(2)


def with_weight(shape: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(shape), (shape[1], shape[1], 3, 3)]


def with_styles(shape: Sequence[int]) -> list[tuple[int, ...]]:
    return [*with_weight(shape), (shape[0], shape[1])]


def copy_of_four(x: Tensor) -> Tensor:
    """What twice up writes."""
    return x.unsqueeze(0).expand(4, *x.shape).clone()


def plain_conv(x: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def plain_conv_of_a_quarter(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, stride=2, padding=1)


RESAMPLING = [
    Case("up", layers.upsample2d, reference_up, copy_of_four),
    Case("down", layers.downsample2d, reference_down, torch.clone),
]
CONVOLUTIONS = [
    Case(
        "modulated convolution",
        layers.modulated_conv2d,
        lambda *inputs: reference_modulated(*inputs, up=False),
        plain_conv,
        with_styles,
    ),
    Case(
        "modulated convolution up",
        lambda *inputs: layers.modulated_conv2d(*inputs, resample="up"),
        lambda *inputs: reference_modulated(*inputs, up=True),
        plain_conv,
        with_styles,
    ),
    Case(
        "convolution down",
        lambda *inputs: layers.conv2d(*inputs, resample="down"),
        reference_conv_down,
        plain_conv_of_a_quarter,
        with_weight,
    ),
]
ACTIVATION = Case(
    "bias and activation",
    lambda x, bias: layers.bias_act(x, bias, "lrelu"),
    reference_bias_act,
    lambda x, bias: x.clone(),
    lambda shape: [tuple(shape), (shape[1],)],
)


def call(
    operation: Operation, shapes: Sequence[tuple[int, ...]], layout: torch.memory_format, *, backward: bool
) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare an operation on random inputs; what is timed returns its values, or the first input's gradient."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        keep_freed_memory()
        rng = torch.Generator().manual_seed(seed)
        x, *others = (torch.randn(shape, generator=rng) for shape in shapes)
        inputs = [x.to(memory_format=layout), *others]
        if not backward:
            return torch.inference_mode()(lambda: operation(*inputs))
        inputs = [value.requires_grad_(True) for value in inputs]
        values = operation(*inputs).detach()
        gradient = torch.empty_like(values).copy_(torch.randn(values.shape, generator=rng))
        return lambda: torch.autograd.grad(operation(*inputs), inputs, gradient, allow_unused=True)[0]

    return prepare


def jobs_of(case: Case, shape: tuple[int, ...], layout: str) -> Iterator[Job]:
    """Forward, and forward and backward, of floor, reference and ours."""
    shapes, items = case.inputs(shape), shape[0]
    for passes in ("forward", "both"):
        name = f"{case.name} {'x'.join(map(str, shape))} {layout}, {passes}"
        floor, reference = f"{name}: floor", f"{name}: reference"
        for job, operation, against, same_as in (
            (floor, case.floor, (), None),
            (reference, case.reference, (floor,), None),
            (f"{name}: ours", case.ours, (floor, reference), reference),
        ):
            prepare = call(operation, shapes, LAYOUTS[layout], backward=passes == "both")
            yield Job(job, prepare, items, "images", against, same_as)


def jobs() -> Sequence[Job]:
    resampled = [(case, shape, layout) for case in RESAMPLING for shape in (MAPS, COLOURS) for layout in LAYOUTS]
    rest = [(case, MAPS, "channels last") for case in (*CONVOLUTIONS, ACTIVATION)]
    return [job for case, shape, layout in (*resampled, *rest) for job in jobs_of(case, shape, layout)]
