"""ADA's augmentations against numpy, scipy and closed forms; adaptive probability."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage, signal, stats
from triptych_common.randomness import uniform
from triptych_gangealing.stylegan2 import augment as pipeline
from triptych_gangealing.stylegan2.augment import BGC, PRESETS, AugmentConfig, adapted_p, augment

GEOMETRIC = ("x_flip", "rotate90", "integer_translation", "scale", "rotation", "anisotropic_scale")
GEOMETRIC += ("fractional_translation",)
COLOUR = ("brightness", "contrast", "luma_flip", "hue", "saturation")
SEED, STREAM = 5, "test/augment"


def images(n=6, channels=3, height=16, width=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, height, width, dtype=dtype, generator=generator) * 2 - 1


def only(*names, **strengths):
    return AugmentConfig(**dict.fromkeys(names, 1.0), **strengths)


def draw(quantity, n):
    return uniform(SEED, f"{STREAM}/{quantity}", range(n)).numpy()


def draw_symmetric(quantity, n):
    return 2 * draw(quantity, n) - 1


def draw_normal(quantity, n):
    return stats.norm.ppf(draw(quantity, n))


def run(x, p, config, counters=None):
    return augment(x, p, SEED, STREAM, range(len(x)) if counters is None else counters, config)


# The filter and the resampling


def test_filter_is_the_orthonormal_one_with_six_vanishing_moments():
    h = pipeline.SYM6.numpy()
    k = np.arange(12)
    assert h.sum() == pytest.approx(math.sqrt(2), abs=1e-12)
    for shift in range(6):
        assert np.dot(h[2 * shift :], h[: 12 - 2 * shift]) == pytest.approx(float(shift == 0), abs=1e-11)
    for moment in range(6):  # of the high-pass partner, about the middle to keep the sums small
        assert abs(np.sum((-1.0) ** k * (k - 5.5) ** moment * h)) < 1e-6


@pytest.mark.parametrize("size", [2, 3, 8, 33])
def test_up_matrix_is_reflection_zero_insertion_and_convolution(size):
    x = np.random.default_rng(0).normal(size=size)
    reflected = np.pad(x, 12, mode="reflect")
    fine = signal.upfirdn(pipeline.SYM6.numpy() * math.sqrt(2), reflected, up=2)[24:]  # sample 0: tap 0 on pixel 0
    expected = fine[pipeline.FIRST : pipeline.FIRST + 2 * size - 1]
    cpu = torch.device("cpu")
    np.testing.assert_allclose(
        pipeline._up_matrix(size, cpu, torch.float64) @ torch.from_numpy(x), expected, atol=1e-12
    )
    fine = np.random.default_rng(1).normal(size=2 * size + 10)
    expected = signal.upfirdn(pipeline.SYM6.numpy()[::-1] / math.sqrt(2), fine, down=1)[11::2][:size]
    np.testing.assert_allclose(
        pipeline._down_matrix(size, cpu, torch.float64) @ torch.from_numpy(fine), expected, atol=1e-12
    )


def test_resampling_the_identity_reproduces_any_image_away_from_its_edges():
    x = images(2, 3, 24, 20)
    out = pipeline._resample(x, torch.eye(3, dtype=torch.float64).repeat(2, 1, 1))
    torch.testing.assert_close(out[..., 4:-4, 4:-4], x[..., 4:-4, 4:-4], atol=1e-9, rtol=0)


def test_resampling_against_scipy_step_by_step():
    """Reflect, insert zeros, filter, interpolate linearly, filter, decimate; where nothing comes from the reflection."""
    x = images(1, 1, 40, 36)
    a = 0.2
    inverse = np.array([[0.7 * math.cos(a), 0.6 * math.sin(a), 0.3], [-0.7 * math.sin(a), 0.6 * math.cos(a), -0.4]])
    h, height, width = pipeline.SYM6.numpy(), 40, 36
    fine = np.pad(x[0, 0].numpy(), 12, mode="reflect")
    for axis in (0, 1):
        fine = signal.upfirdn(h * math.sqrt(2), fine, up=2, axis=axis)
    rows, columns = np.mgrid[0 : 2 * height + 10, 0 : 2 * width + 10]  # fine samples of the output, tap 0 on pixel 0
    delay = np.dot(h, np.arange(12)) / h.sum()
    px, py = (columns - delay) / 2 - (width - 1) / 2, (rows - delay) / 2 - (height - 1) / 2
    source_x, source_y = (r[0] * px + r[1] * py + r[2] for r in inverse)
    at = [2 * (source_y + (height - 1) / 2) + delay + 24, 2 * (source_x + (width - 1) / 2) + delay + 24]
    out = ndimage.map_coordinates(fine, at, order=1)
    for axis in (0, 1):
        out = ndimage.convolve1d(out, h[::-1] / math.sqrt(2), axis=axis, mode="constant", origin=-1)
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[:2] = torch.from_numpy(inverse)
    ours = pipeline._resample(x, matrix[None])[0, 0].numpy()
    expected = out[6::2, 6::2][:height, :width]  # convolve1d centres its twelve taps: the first pixel is at sample 6
    np.testing.assert_allclose(ours[6:-6, 6:-6], expected[6:-6, 6:-6], atol=1e-9)


# Geometric transformations, one by one and together


def test_x_flip_is_exact_and_only_for_half():
    x = images(64)
    out = run(x, 1.0, only("x_flip"))
    flipped = torch.from_numpy(draw("x_flip", 64) < 0.5)
    assert 16 < flipped.sum() < 48
    assert torch.equal(out[flipped], x[flipped].flip(-1))
    assert torch.equal(out[~flipped], x[~flipped])


@pytest.mark.parametrize("size", [15, 16])
def test_quarter_turns_are_exact(size):
    x = images(16, height=size, width=size)
    out = run(x, 1.0, only("rotate90"))
    turns = np.floor(4 * draw("rotate90", 16)).astype(int)
    assert set(turns) == {0, 1, 2, 3}
    for image, turned, k in zip(x, out, turns, strict=True):
        assert np.array_equal(turned.numpy(), np.rot90(image.numpy(), k, axes=(1, 2)))


def test_half_turns_of_an_oblong_are_exact_and_quarter_turns_show_its_middle():
    x = images(16, height=12, width=20)
    out = run(x, 1.0, only("rotate90"))
    for image, turned, k in zip(x.numpy(), out.numpy(), np.floor(4 * draw("rotate90", 16)).astype(int), strict=True):
        if k % 2 == 0:
            assert np.array_equal(turned, np.rot90(image, k, axes=(1, 2)))
        else:
            np.testing.assert_array_equal(turned[:, :, 4:16], np.rot90(image[:, :, 4:16], k, axes=(1, 2)))


def test_integer_translations_are_exact_with_reflected_edges():
    x = images(32, height=16, width=32)
    out = run(x, 1.0, only("integer_translation"))
    dx = np.rint(0.125 * 32 * draw_symmetric("integer_translation/x", 32)).astype(int)
    dy = np.rint(0.125 * 16 * draw_symmetric("integer_translation/y", 32)).astype(int)
    assert abs(dx).max() == 4
    assert abs(dy).max() == 2
    for image, moved, right, down in zip(x.numpy(), out.numpy(), dx, dy, strict=True):
        padded = np.pad(image, ((0, 0), (4, 4), (4, 4)), mode="reflect")
        assert np.array_equal(moved, padded[:, 4 - down : 20 - down, 4 - right : 36 - right])


def expected_forward(n, width, height, p, names):
    """G of the paper's appendix B, image i, by numpy: homogeneous input positions to output positions."""

    def gate(name, threshold=p):
        return draw(f"{name}/gate", n) < threshold

    def apply(name, matrices, threshold=p):
        nonlocal total
        if name.removesuffix("_pre").removesuffix("_post") in names:
            matrices = np.stack([np.array(m, dtype=float) for m in matrices])
            total = np.where(gate(name, threshold)[:, None, None], matrices, np.eye(3)) @ total

    def rotation(a):  # counter-clockwise as seen, y down
        return [[math.cos(a), math.sin(a), 0], [-math.sin(a), math.cos(a), 0], [0, 0, 1]]

    def translation(x, y):
        return [[1, 0, x], [0, 1, y], [0, 0, 1]]

    total = np.stack([np.eye(3)] * n)
    half = 1 - math.sqrt(1 - p)
    apply("x_flip", [np.diag([-1 if u < 0.5 else 1, 1, 1]) for u in draw("x_flip", n)])
    apply("rotate90", [rotation(math.pi / 2 * math.floor(4 * u)) for u in draw("rotate90", n)])
    shifts = zip(*(draw_symmetric(f"integer_translation/{axis}", n) for axis in "xy"), strict=True)
    apply("integer_translation", [translation(round(x * width / 8), round(y * height / 8)) for x, y in shifts])
    apply("scale", [np.diag([2 ** (0.2 * z), 2 ** (0.2 * z), 1]) for z in draw_normal("scale", n)])
    apply("rotation_pre", [rotation(math.pi * u) for u in draw_symmetric("rotation_pre", n)], half)
    anisotropic = draw_normal("anisotropic_scale", n)
    apply("anisotropic_scale", [np.diag([2 ** (0.2 * z), 2 ** (-0.2 * z), 1]) for z in anisotropic])
    apply("rotation_post", [rotation(math.pi * u) for u in draw_symmetric("rotation_post", n)], half)
    shifts = zip(*(draw_normal(f"fractional_translation/{axis}", n) for axis in "xy"), strict=True)
    apply("fractional_translation", [translation(x * width / 8, y * height / 8) for x, y in shifts])
    return total


def blob(x, y, width, height):
    """A smooth function of position, off centre and not round, reflected at the edges of the image."""
    for_x, for_y = (width - 1) / 2, (height - 1) / 2
    x = for_x - np.abs((x + for_x) % (4 * for_x) - 2 * for_x)
    y = for_y - np.abs((y + for_y) % (4 * for_y) - 2 * for_y)
    return np.exp(-((x - 4) ** 2) / 18 - ((y + 3) ** 2) / 50)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (36, 50)])
@pytest.mark.parametrize("names", [(name,) for name in GEOMETRIC[3:]] + [GEOMETRIC], ids=lambda names: names[0])
def test_geometry_moves_an_analytic_function_as_published(names, height, width):
    n, p = 24, 0.7
    px, py = np.meshgrid(np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2)
    x = torch.from_numpy(blob(px, py, width, height))[None, None].repeat(n, 1, 1, 1)
    out = run(x, p, only(*names))[:, 0].numpy()
    inverse = np.linalg.inv(expected_forward(n, width, height, p, names))
    assert (np.abs(inverse - np.eye(3)).max((1, 2)) > 0.01).sum() > n // 3  # the test moves something
    for image, matrix in zip(out, inverse, strict=True):
        source_x, source_y = (r[0] * px + r[1] * py + r[2] for r in matrix[:2])
        expected = blob(source_x, source_y, width, height)
        assert np.abs(image - expected).max() < 0.03
        assert np.sqrt(np.mean((image - expected) ** 2)) < 0.005


def test_rotation_before_and_after_have_together_the_probability_p():
    assert 1 - (1 - (1 - math.sqrt(0.7))) ** 2 == pytest.approx(0.3)
    n = 4000
    x = images(1, 1, 6, 6).repeat(n, 1, 1, 1)
    changed = (run(x, 0.3, only("rotation")) != x).flatten(1).any(1).sum()
    assert abs(changed - 0.3 * n) < 4.5 * math.sqrt(n * 0.3 * 0.7)


# Colour


def expected_colour(x, name):
    """[n, 3, h, w] under one transformation at p = 1, in the words of its definition."""
    n, mean = len(x), x.mean(1, keepdims=True)
    normal, column = draw_normal(name, n), (slice(None), None, None, None)
    if name == "brightness":
        return x + 0.2 * normal[column]
    if name == "contrast":
        return x * 2 ** (0.5 * normal[column])
    if name == "luma_flip":
        return np.where(draw(name, n)[column] < 0.5, x - 2 * mean, x)
    if name == "saturation":
        return mean + (x - mean) * 2 ** normal[column]
    red, green, blue = x[:, 0], x[:, 1], x[:, 2]  # hue: the chroma plane as complex numbers
    chroma = red - (green + blue) / 2 + 1j * (green - blue) * math.sqrt(3) / 2
    chroma = chroma * np.exp(1j * math.pi * draw_symmetric(name, n))[:, None, None]
    thirds = [chroma * np.exp(-2j * math.pi * k / 3) for k in range(3)]
    return mean + np.stack([third.real for third in thirds], 1) * 2 / 3


@pytest.mark.parametrize("name", COLOUR)
def test_colour_transformation_by_its_definition(name):
    x = images(16, height=5, width=7)
    np.testing.assert_allclose(run(x, 1.0, only(name)).numpy(), expected_colour(x.numpy(), name), atol=1e-12)


def test_colour_transformations_compose_in_the_papers_order():
    x = images(16, height=4, width=4)
    expected = x.numpy()
    for name in COLOUR:
        expected = expected_colour(expected, name)
    np.testing.assert_allclose(run(x, 1.0, PRESETS["color"]).numpy(), expected, atol=1e-12)


def test_grey_is_treated_as_the_mean_of_its_coloured_treatment():
    grey = images(12, channels=1)
    coloured = run(grey.expand(-1, 3, -1, -1), 1.0, BGC)
    torch.testing.assert_close(run(grey, 1.0, BGC), coloured.mean(1, keepdim=True), atol=1e-9, rtol=0)


# Randomness


@pytest.mark.parametrize("name", GEOMETRIC + COLOUR)
def test_frequency_is_p_times_the_multiplier(name):
    n, p, multiplier = 3000, 0.4, 0.5
    nothing = {"x_flip": 1 / 2, "rotate90": 1 / 4, "luma_flip": 1 / 2, "integer_translation": 1 / 4}.get(name, 0)
    x = images(1, 3, 8, 8).repeat(n, 1, 1, 1)  # 8 pixels: |shift| of at most 1, zero with probability 1/2 an axis
    changed = int((run(x, p, AugmentConfig(**{name: multiplier})) != x).flatten(1).any(1).sum())
    expected = p * multiplier * (1 - nothing)
    assert abs(changed - n * expected) < 4.5 * math.sqrt(n * expected * (1 - expected))


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_a_sample_does_not_depend_on_its_batch(p):
    x = images(20)
    whole = run(x, p, BGC)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(run(x[order], p, BGC, order.tolist()), whole[order], atol=1e-12, rtol=0)
    for i in (0, 7, 19):
        torch.testing.assert_close(run(x[i : i + 1], p, BGC, [i]), whole[i : i + 1], atol=1e-12, rtol=0)


def test_same_arguments_same_images_and_every_argument_counts():
    x = images(8, dtype=torch.float32)
    first = augment(x, 0.8, 1, "a", range(8))
    assert torch.equal(first, augment(x, 0.8, 1, "a", range(8)))
    assert torch.equal(first, augment(x, torch.tensor(0.8, dtype=torch.float64), 1, "a", list(range(8))))
    for other in ((0.8, 2, "a", range(8)), (0.8, 1, "b", range(8)), (0.8, 1, "a", range(8, 16))):
        assert not torch.allclose(first, augment(x, *other), atol=0.1)


def test_ambient_randomness_is_left_alone():
    before = torch.get_rng_state()
    run(images(), 0.8, BGC)
    assert torch.equal(before, torch.get_rng_state())


def test_zero_probability_and_empty_pipeline_change_nothing():
    x = images()
    assert run(x, 0.0, BGC) is x
    assert run(x, torch.tensor(0.0), BGC) is x
    assert torch.equal(run(x, 1.0, AugmentConfig()), x)
    assert run(x[:0], 1.0, BGC).shape == (0, 3, 16, 16)


def test_p_above_one_is_one():
    x = images()
    assert torch.equal(run(x, 1.3, BGC), run(x, 1.0, BGC))


def test_presets_are_unions():
    assert PRESETS["bgc"] == BGC
    for letters, parts in {"bg": ("blit", "geom"), "bgc": ("blit", "geom", "color")}.items():
        for name in GEOMETRIC + COLOUR:
            assert getattr(PRESETS[letters], name) == max(getattr(PRESETS[part], name) for part in parts)
    assert all(getattr(BGC, name) == 1 for name in GEOMETRIC + COLOUR)


# Derivatives, types


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_first_and_second_derivatives(p):
    x = images(3, 3, 3, 4).requires_grad_()

    def squared(x):
        return run(x, p, BGC) ** 2  # augmenting is linear: of itself it has no second derivative

    assert torch.autograd.gradcheck(squared, x)
    assert torch.autograd.gradgradcheck(squared, x, fast_mode=True)


def test_gradient_penalty_against_the_jacobian_written_out():
    """R1 through the augmentation, as if D were sum(tanh): its gradient with every matrix in the open."""
    x = images(2, 3, 5, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(run(x, 0.9, BGC).tanh().sum(), x, create_graph=True)
    (ours,) = torch.autograd.grad(gradient.square().sum(), x)
    jacobian = torch.autograd.functional.jacobian(lambda x: run(x, 0.9, BGC).flatten(), x).flatten(1)
    t = run(x, 0.9, BGC).flatten().tanh().detach()
    hessian = jacobian.T @ torch.diag(-2 * t * (1 - t**2)) @ jacobian
    expected = 2 * hessian @ (jacobian.T @ (1 - t**2))
    torch.testing.assert_close(ours.flatten(), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_precisions(dtype):
    x = images(8).to(dtype)
    out = run(x, 0.9, BGC)
    assert out.dtype == dtype
    exact = run(x.double(), 0.9, BGC)
    assert (out.double() - exact).abs().max() < max(4e-4, 4 * float(torch.finfo(dtype).eps) * exact.abs().max())


def test_autocast_does_not_coarsen():
    x = images(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(x, 1.0, BGC), run(x, 1.0, BGC))
        inside = run(x, 1.0, BGC)
    assert torch.equal(inside, run(x, 1.0, BGC))


def test_training_after_inference_mode():
    pipeline._up_matrix.cache_clear()
    pipeline._down_matrix.cache_clear()
    x = images(2, 3, 11, 11)
    with torch.inference_mode():
        first = run(x, 1.0, BGC)
    x.requires_grad_()
    out = run(x, 1.0, BGC)
    out.sum().backward()
    assert torch.equal(out.detach(), first)


def test_torch_compile_steps_around_it():
    """In a subprocess: the type-checking hook of the tests is no food for torch.compile."""
    program = """
import torch
from triptych_gangealing.stylegan2.augment import augment
def network(x):
    return torch.tanh(augment(2 * x, 0.8, 0, "a", range(4)))
x = torch.rand(4, 3, 8, 8)
print((torch.compile(network, backend="eager")(x) - network(x)).abs().max().item())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_equals_cpu():
    x = images(16)
    torch.testing.assert_close(run(x.cuda(), 0.7, BGC).cpu(), run(x, 0.7, BGC), atol=1e-9, rtol=0)
    y = x[:2, :, :6, :6].contiguous().cuda().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda y: run(y, 1.0, BGC) ** 2, y, nondet_tol=1e-9)


# Bad input


@pytest.mark.parametrize(
    ("x", "p", "counters", "message"),
    [
        (images(), -0.1, None, "probability -0.1"),
        (images(), math.nan, None, "probability nan"),
        (images(), 0.5, [0, 1], "2 counters for 6 images"),
        (images(channels=4), 0.5, None, "4 channels: expected 1 or 3"),
        (images(height=1), 0.5, None, "1x16"),
    ],
)
def test_bad_input_is_one_clear_line(x, p, counters, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(x, p, BGC, counters)
    assert "\n" not in str(caught.value)


def test_any_number_of_channels_may_move():
    x = images(channels=5)
    assert run(x, 0.9, PRESETS["bg"]).shape == x.shape


@pytest.mark.parametrize("name", ["hue", "scale_std"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_config_refuses_what_is_no_multiplier_or_strength(name, value):
    with pytest.raises(ValueError, match=name):
        replace(BGC, **{name: value})


def test_config_refuses_a_multiplier_above_one():
    with pytest.raises(ValueError, match=r"hue=1\.5"):
        replace(BGC, hue=1.5)


# Adaptive probability


def test_p_takes_500_thousand_images_from_0_to_1_and_back():
    share, p = 4 * 64 / 500_000, 0.0
    adjustments = 500_000 // (4 * 64)
    for _ in range(adjustments):
        p = adapted_p(p, 250 / 256, 0.6, share)
    assert p == pytest.approx(adjustments * share)
    assert p == pytest.approx(1.0, abs=share)
    assert p - adapted_p(p, 100 / 256, 0.6, share) == pytest.approx(256 / 500_000)


def test_p_stops_at_zero_stays_at_the_target_and_passes_one():
    assert adapted_p(0.01, 0.0, 0.5, 0.1) == 0
    assert adapted_p(0.4, 0.5, 0.5, 0.1) == 0.4
    assert adapted_p(1.0, 1.0, 0.5, 0.1) == pytest.approx(1.1)
