"""StyleGAN2's operations against what they are by definition: zeros inserted, borders padded, taps added up one by one, and a
weight of its own for every image, in float64.
"""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from triptych_gangealing.stylegan2 import layers

FIR = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64).outer(torch.tensor([1.0, 3.0, 3.0, 1.0])) / 64


def correlated(x: Tensor, kernel: Tensor, before: int, after: int) -> Tensor:
    """Each channel with one kernel, over zeros put before and after rows and columns."""
    padded = x.new_zeros(*x.shape[:2], *(size + before + after for size in x.shape[2:]))
    padded[:, :, before : before + x.shape[2], before : before + x.shape[3]] = x
    height, width = (padded.shape[2 + i] - kernel.shape[i] + 1 for i in range(2))
    total = x.new_zeros(*x.shape[:2], height, width)
    for a in range(kernel.shape[0]):
        for b in range(kernel.shape[1]):
            total = total + kernel[a, b] * padded[:, :, a : a + height, b : b + width]
    return total


def up(x: Tensor, gain: float = 1.0) -> Tensor:
    n, channels, height, width = x.shape
    apart = x.new_zeros(n, channels, 2 * height, 2 * width)
    apart[:, :, ::2, ::2] = x
    return correlated(apart, 4 * gain * FIR.to(x).flip(0, 1), 2, 1)


def down(x: Tensor, gain: float = 1.0) -> Tensor:
    return correlated(x, gain * FIR.to(x).flip(0, 1), 1, 1)[:, :, ::2, ::2]


def blur(x: Tensor, padding: int = 0, gain: float = 1.0) -> Tensor:
    return correlated(x, gain * FIR.to(x).flip(0, 1), padding, padding)


def plain(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    maps = []
    for filters in weight:
        parts = [correlated(x[:, i : i + 1], kernel, padding, padding) for i, kernel in enumerate(filters)]
        maps.append(sum(parts[1:], parts[0]))
    return torch.cat(maps, dim=1)


def transposed(x: Tensor, weight: Tensor) -> Tensor:
    """Every pixel puts its kernel, as it is stored, down two pixels after its neighbour's."""
    size = weight.shape[-1]
    height, width = (2 * (s - 1) + size for s in x.shape[2:])
    out = x.new_zeros(len(x), len(weight), height, width)
    for a in range(size):
        for b in range(size):
            rows, columns = slice(a, a + 2 * x.shape[2] - 1, 2), slice(b, b + 2 * x.shape[3] - 1, 2)
            stamped = torch.zeros_like(out)
            stamped[:, :, rows, columns] = torch.einsum("oi,nihw->nohw", weight[:, :, a, b], x)
            out = out + stamped
    return out


def convolved(x: Tensor, weight: Tensor, resample: str = "same") -> Tensor:
    size = weight.shape[-1]
    if resample == "up":
        return blur(transposed(x, weight), padding=1, gain=4.0) if size == 3 else up(plain(x, weight, 0))
    if resample == "down":
        filtered = blur(x, padding=2 if size == 3 else 1)
        return plain(filtered, weight, 0)[:, :, ::2, ::2]
    return plain(x, weight, size // 2)


def modulated(x, weight, styles, demodulate=True, resample="same", gain=1.0):
    images = []
    for image, style in zip(x, styles, strict=True):
        own = weight * style.view(1, -1, 1, 1)
        if demodulate:
            own = own / (own.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        images.append(convolved(image[None], own * gain, resample))
    return torch.cat(images)


def bias_act(x, bias=None, activation="linear", gain=None, clamp=None):
    if bias is not None:
        x = x + bias.reshape(-1, *[1] * (x.ndim - 2)).expand(x.shape[1:])
    if activation == "lrelu":
        x = torch.where(x > 0, x, x / 5)
    x = x * ({"linear": 1, "lrelu": 2**0.5}[activation] if gain is None else gain)
    return x if clamp is None else torch.where(x.abs() < clamp, x, clamp * x.sign())


def case(ours, reference, *shapes, **options):
    name = "-".join([ours.__name__, *(f"{k}{v}" for k, v in options.items()), "x".join(map(str, shapes[0]))])
    if ours in (layers.conv2d, layers.modulated_conv2d):
        name += f"-k{shapes[1][-1]}"
    return pytest.param(ours, reference, shapes, options, id=name)


SIZES = ((2, 3, 5, 8), (1, 1, 4, 7), (3, 2, 6, 3))
CASES = [
    *(case(layers.upsample2d, up, shape) for shape in ((1, 1, 1, 1), (2, 3, 1, 4), *SIZES)),
    case(layers.upsample2d, up, SIZES[0], gain=0.3),
    *(case(layers.downsample2d, down, shape) for shape in ((1, 1, 2, 2), (2, 3, 3, 2), *SIZES)),
    case(layers.downsample2d, down, SIZES[0], gain=3),
    *(case(layers.blur2d, blur, shape, padding=padding) for shape in SIZES for padding in (1, 2)),
    case(layers.blur2d, blur, SIZES[1]),
    case(layers.blur2d, blur, SIZES[0], padding=1, gain=4.0),
    *(
        case(layers.conv2d, convolved, shape, (4, shape[1], size, size), resample=resample)
        for shape in SIZES
        for size in (1, 3)
        for resample in ("same", "up", "down")
    ),
    *(
        case(
            layers.modulated_conv2d,
            modulated,
            shape,
            (4, shape[1], size, size),
            shape[:2],
            demodulate=demodulate,
            resample=resample,
            gain=gain,
        )
        for shape, gain in ((SIZES[0], 1.0), (SIZES[1], 0.7))
        for size, resample in ((1, "same"), (3, "same"), (3, "up"), (3, "down"))
        for demodulate in (True, False)
    ),
    *(
        case(layers.bias_act, bias_act, (2, 3, *rest), (3,), activation=activation, gain=gain, clamp=clamp)
        for rest in ((), (4, 5))
        for activation in ("linear", "lrelu")
        for gain, clamp in ((None, None), (0.5, 0.4))
    ),
    case(layers.bias_act, bias_act, (2, 3, 4, 5), activation="lrelu"),
    case(layers.bias_act, bias_act, (2, 3, 4, 5), clamp=0.5),
]


def drawn(shapes, dtype=torch.float64):
    rng = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]


def derivatives(op, inputs, options):
    """Values, gradients of a weighted sum of them, and gradients of those gradients' squared norm (as in R1)."""
    inputs = [x.detach().clone().requires_grad_(True) for x in inputs]
    values = op(*inputs, **options)
    weights = torch.linspace(-1, 2, values.numel(), dtype=torch.float64).to(values).view(values.shape)
    first = torch.autograd.grad((values * weights).sum(), inputs, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in first) + values.square().sum()
    return [values, *first, *torch.autograd.grad(penalty, inputs)]


@pytest.mark.parametrize(("ours", "reference", "shapes", "options"), CASES)
def test_values_and_first_and_second_gradients(ours, reference, shapes, options):
    inputs = drawn(shapes)
    found, expected = derivatives(ours, inputs, options), derivatives(reference, inputs, options)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("ours", "reference", "shapes", "options"), CASES[::3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_float32_and_bfloat16(ours, reference, shapes, options, dtype, tolerance):
    inputs = drawn(shapes, dtype)
    found = derivatives(ours, inputs, options)[: 1 + len(inputs)]
    expected = derivatives(reference, [x.double() for x in inputs], options)[: 1 + len(inputs)]
    assert {x.dtype for x in found} == {dtype}
    for mine, theirs in zip(found, expected, strict=True):
        largest = max(1, float(theirs.detach().abs().max()))
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize(
    ("op", "shapes", "options"),
    [
        (layers.upsample2d, [(1, 2, 2, 3)], {}),
        (layers.downsample2d, [(1, 2, 4, 3)], {}),
        (layers.blur2d, [(1, 2, 2, 3)], {"padding": 2}),
        (layers.conv2d, [(1, 2, 2, 3), (2, 2, 3, 3)], {"resample": "up"}),
        (layers.conv2d, [(1, 2, 4, 3), (2, 2, 3, 3)], {"resample": "down"}),
        (layers.modulated_conv2d, [(2, 2, 2, 2), (2, 2, 3, 3), (2, 2)], {"resample": "up"}),
        (layers.modulated_conv2d, [(2, 2, 2, 2), (2, 2, 1, 1), (2, 2)], {"demodulate": False}),
        (layers.bias_act, [(2, 2, 3, 1), (2,)], {"activation": "lrelu"}),
        (layers.bias_act, [(2, 2, 3, 1), (2,)], {"activation": "lrelu", "clamp": 0.5}),
    ],
)
def test_numerical_derivatives_of_both_orders(op, shapes, options):
    inputs = [x.requires_grad_(True) for x in drawn(shapes)]
    assert torch.autograd.gradcheck(lambda *xs: op(*xs, **options), inputs)
    assert torch.autograd.gradgradcheck(lambda *xs: op(*xs, **options), inputs)


ORDERS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "rows and columns exchanged": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second pixel": lambda x: x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[:, :, ::2, ::2],
    "reversed batch first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("op", [layers.upsample2d, layers.downsample2d, lambda x: layers.blur2d(x, 1), layers.bias_act])
def test_memory_order_changes_nothing(op, order):
    (x,) = drawn([(3, 5, 6, 4)])
    again = ORDERS[order](x)
    assert again.stride() != x.stride()
    assert torch.equal(again, x)
    torch.testing.assert_close(op(again), op(x), rtol=1e-12, atol=1e-12)


def test_one_colour_for_all_pixels_is_one_tensor_in_memory():
    x = torch.tensor([0.2, -1.0, 3.0], dtype=torch.float64).view(1, 3, 1, 1).expand(2, 3, 6, 6)
    for resampled in (layers.upsample2d(x), layers.downsample2d(x), layers.blur2d(x)):
        inside = resampled[:, :, 1:-1, 1:-1]
        torch.testing.assert_close(inside, x[:, :, :1, :1].expand(inside.shape))


def test_up_and_down_are_each_others_transpose():
    x, y = drawn([(2, 3, 5, 4), (2, 3, 10, 8)])
    torch.testing.assert_close((layers.upsample2d(x) * y).sum(), 4 * (x * layers.downsample2d(y)).sum())


def single(height: int, width: int, row: int, column: int) -> Tensor:
    x = torch.zeros(1, 1, height, width, dtype=torch.float64)
    x[0, 0, row, column] = 1
    return x


def test_an_up_convolution_transposes_the_kernel_as_stored_and_then_filters_with_gain_four():
    """Pixel (1, 1) puts the kernel's corner (0, 2) at (2, 4) of 9x9; the filter reaches two before and one after."""
    out = layers.conv2d(single(4, 4, 1, 1), single(3, 3, 0, 2), resample="up")
    expected = torch.zeros(8, 8, dtype=torch.float64)
    expected[0:4, 2:6] = 4 * FIR
    assert torch.equal(out[0, 0], expected)


def test_a_down_convolution_filters_and_then_correlates():
    """Filtered, pixel (3, 4) covers rows 2..5 and columns 3..6 of 9x9; output (i, j) reads (2i, 2j + 2) through the corner."""
    out = layers.conv2d(single(8, 8, 3, 4), single(3, 3, 0, 2), resample="down")
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[1:3, 1:3] = FIR[0::2, 1::2]
    assert torch.equal(out[0, 0], expected)


def test_a_convolution_correlates():
    out = layers.conv2d(single(5, 5, 2, 2), single(3, 3, 0, 2))
    assert torch.equal(out, single(5, 5, 3, 1))


def test_inputs_are_left_as_they_are():
    x, bias = drawn([(2, 3, 4, 4), (3,)])
    kept = x.clone()
    for given in (None, bias):
        layers.bias_act(x, given, "lrelu", clamp=0.1)
    layers.modulated_conv2d(x, torch.ones(2, 3, 3, 3).double(), torch.ones(2, 3).double(), gain=2)
    assert torch.equal(x, kept)


def test_demodulated_maps_have_unit_variance_for_any_styles():
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 16, 64, 64, generator=rng), 7 * torch.randn(8, 16, 3, 3, generator=rng)
    styles = torch.randn(4, 16, generator=rng) * torch.tensor([0.01, 1.0, 30.0, 1e4])[:, None]
    spread = layers.modulated_conv2d(x, weight, styles)[:, :, 1:-1, 1:-1].std(dim=(2, 3))
    torch.testing.assert_close(spread, torch.ones(4, 8), rtol=0.1, atol=0)


def test_large_styles_do_not_overflow_in_half_precision():
    x, weight, styles = drawn([(2, 3, 4, 4), (4, 3, 3, 3), (2, 3)])
    found = layers.modulated_conv2d(x.half(), 1e3 * weight.float(), 1e5 * styles.float())
    expected = modulated(x, weight, styles)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


def test_no_images_and_no_storage():
    """An empty batch, and shapes alone."""
    for device, n in (("cpu", 0), ("meta", 2)):
        x = torch.empty(n, 3, 8, 6, device=device)
        weight, styles = torch.empty(5, 3, 3, 3, device=device), torch.empty(n, 3, device=device)
        assert layers.upsample2d(x).shape == (n, 3, 16, 12)
        assert layers.downsample2d(x).shape == (n, 3, 4, 3)
        assert layers.modulated_conv2d(x, weight, styles, resample="up").shape == (n, 5, 16, 12)


COMPILED = """
import torch
from triptych_gangealing.stylegan2 import layers

CALLS = {
    "up": (lambda x, w, s: layers.upsample2d(x), 1),
    "down": (lambda x, w, s: layers.downsample2d(x, gain=2), 1),
    "blur": (lambda x, w, s: layers.blur2d(x, 2), 1),
    "bias_act": (lambda x, w, s: layers.bias_act(x, s[0], "lrelu", clamp=0.5), 1),
    "conv up": (lambda x, w, s: layers.conv2d(x, w, resample="up"), 2),
    "conv down": (lambda x, w, s: layers.conv2d(x, w, resample="down"), 2),
    "modulated": (lambda x, w, s: layers.modulated_conv2d(x, w, s, resample="up"), 3),
}
for name, (call, used) in CALLS.items():
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for size in (6, 8):
        x, w, s = torch.randn(2, 3, size, 6), torch.randn(4, 3, 3, 3), torch.rand(2, 3)
        inputs = [t.requires_grad_(True) for t in (x, w, s)]
        found, expected = compiled(*inputs), call(*inputs)
        torch.testing.assert_close(found, expected, msg=name)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs[:used]) for y in (found, expected))):
            torch.testing.assert_close(a, b, msg=name)
print("all compiled")
"""


def test_every_operation_compiles_whole():
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "all compiled", done.stderr
