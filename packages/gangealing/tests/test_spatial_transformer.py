"""The spatial transformer: published sizes, the identity at first, and warps against matrices and loops written out by hand."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from triptych_gangealing.config import PRESETS
from triptych_gangealing.spatial_transformer import (
    ClusterClassifier,
    Similarity,
    SpatialTransformer,
    SpatialTransformerConfig,
    reduced,
    total_variation,
)
from triptych_gangealing.warp import Affine, Warp

TINY = SpatialTransformerConfig(
    input_size=16, channel_max=4, channel_multiplier=2.0, flow_size=4, flow_upsampling=4, image_channels=2
)
TRANSFORMS = [("similarity",), ("flow",), ("similarity", "flow")]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=3, height=16, width=16, seed=1, dtype=torch.float64):
    """Smooth random images."""
    coarse = torch.randn(n, 2, 5, 5, dtype=dtype, generator=rng(seed)).tanh()
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp(-1, 1)


def transformer_of(config=TINY, *, awake=0.0, seed=0, dtype=torch.float64, **options):
    """A transformer in double precision; `awake` is the spread of the weights that start at zero."""
    torch.manual_seed(seed)
    transformer = SpatialTransformer(replace(config, **options)).to(dtype)
    with torch.no_grad():
        for last in last_layers(transformer):
            last.weight.normal_(std=awake)
            last.bias.normal_(std=awake / 4)
    return transformer.requires_grad_(False)


def last_layers(transformer):
    return ([transformer.similarity.head] if transformer.similarity else []) + (
        [transformer.flow.delta[-1]] if transformer.flow else []
    )


def matrix_of(raw):
    """The similarity of four raw numbers, as 3 x 3."""
    theta, s = math.pi * math.tanh(raw[0]), math.exp(raw[1])
    cos, sin = s * math.cos(theta), s * math.sin(theta)
    return np.array([[cos, -sin, raw[2]], [sin, cos, raw[3]], [0, 0, 1]])


def through(matrix, points):
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def inner_points(n, k=6, seed=2):
    return 1.2 * torch.rand(n, k, 2, dtype=torch.float64, generator=rng(seed)) - 0.6


# sizes


def test_digits32_preset_is_small_and_its_flow_as_fine_as_the_image():
    transformer = SpatialTransformer(PRESETS["digits32"])
    assert sum(parameter.numel() for parameter in transformer.parameters()) <= 300_000
    assert transformer(torch.zeros(2, 3, 32, 32)).delta.shape == (2, 2, 32, 32)


# the identity at first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transforms", TRANSFORMS)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (40, 33), (9, 16)])
def test_step_0_is_the_identity_bit_for_bit(transforms, height, width, dtype):
    torch.manual_seed(0)
    transformer = SpatialTransformer(replace(TINY, transforms=transforms, heads=2)).to(dtype)
    images = pictures(2, height, width, dtype=dtype)
    aligned = transformer(images, iterations=3 if "similarity" in transforms else 1)
    identity = Warp.identity(4, dtype=dtype)
    assert torch.equal(aligned.warp.grid((height, width)), identity.grid((height, width)))
    twice = images.repeat_interleave(2, dim=0)
    assert torch.equal(aligned.warp.sample(twice), identity.sample(twice))
    torch.testing.assert_close(aligned.warp.sample(twice), twice)
    if aligned.delta is not None:
        assert not aligned.delta.any()
    if aligned.similarity is not None:
        assert torch.equal(aligned.similarity.affine().matrix, torch.eye(2, 3, dtype=dtype).expand(4, 2, 3))


def test_at_first_only_the_last_layers_have_a_gradient_then_all():
    images, target = pictures(), pictures(seed=5)
    for awake in (0.0, 0.2):
        transformer = transformer_of(awake=awake).requires_grad_()
        (transformer(images).warp.sample(images) - target).square().mean().backward()
        moved = {name for name, p in transformer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        ends = {"similarity.head.weight", "similarity.head.bias", "flow.delta.1.weight", "flow.delta.1.bias"}
        assert moved == (ends if not awake else set(dict(transformer.named_parameters())))


def test_gradients_of_the_sampled_image_equal_finite_differences():
    """Through both networks, the look of the second at what the first did, and the final sampling."""
    transformer, images = transformer_of(awake=0.1), pictures(1)
    bias = transformer.similarity.head.bias

    def loss(values):
        aligned = torch.func.functional_call(transformer, {"similarity.head.bias": values}, (images,))
        return aligned.warp.sample(images, antialias=False).square().sum() + aligned.delta.square().sum()

    start = bias.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(start), start)
    for i in range(4):
        step = 1e-7 * torch.eye(4, dtype=torch.float64)[i]
        slope = (loss(start + step) - loss(start - step)) / 2e-7
        assert slope.item() == pytest.approx(gradient[i].item(), rel=1e-4, abs=1e-6)


# similarity


def with_bias(raw, **options):
    """A transformer whose similarity network says the same of every image."""
    transformer = transformer_of(**options)
    transformer.similarity.head.bias.copy_(torch.tensor(raw, dtype=torch.float64).flatten())
    return transformer


RAW = [0.2, -0.3, 0.1, -0.25]


def test_similarity_by_hand():
    transformer = with_bias([RAW, [-3.0, 0.5, 0.0, 0.7]], transforms=("similarity",), heads=2)
    aligned = transformer(pictures(2))
    expected = [matrix_of(RAW)[:2], matrix_of([-3.0, 0.5, 0.0, 0.7])[:2]] * 2
    np.testing.assert_allclose(aligned.warp.stages[0].matrix, np.array(expected), atol=1e-12)
    assert aligned.delta is None
    assert aligned.similarity.rotation.abs().max() < math.pi


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_iterations_multiply_matrices(iterations):
    transformer = with_bias(RAW, transforms=("similarity",))
    aligned = transformer(pictures(2), iterations=iterations)
    expected = np.linalg.matrix_power(matrix_of(RAW), iterations)
    np.testing.assert_allclose(aligned.similarity.affine().matrix[1], expected[:2], atol=1e-12)
    points = inner_points(2)
    mapped = points.numpy()
    for _ in range(iterations):
        mapped = through(matrix_of(RAW), mapped)
    np.testing.assert_allclose(aligned.warp.map_points(points).points, mapped, atol=1e-12)


def test_similarity_after_another_is_the_product_of_their_matrices():
    numbers = torch.randn(2, 3, 4, dtype=torch.float64, generator=rng(3))
    first, second = (Similarity(part[:, 0], part[:, 1], part[:, 2:]) for part in numbers)
    a, b = (np.concatenate([s.affine().matrix, np.tile([[[0, 0, 1]]], (3, 1, 1))], axis=1) for s in (second, first))
    np.testing.assert_allclose(second.after(first).affine().matrix, (a @ b)[:, :2], atol=1e-12)


def test_each_look_is_at_the_original_image_as_so_far_aligned():
    """Resampling what was seen before would blur it more each time."""
    transformer, images = transformer_of(awake=0.3), pictures(2, 40, 24)
    seen, networks = [], (transformer.similarity, transformer.flow)
    handles = [n.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for n in networks]
    aligned = transformer(images, iterations=3)
    for handle in handles:
        handle.remove()
    assert len(seen) == 4
    torch.testing.assert_close(seen[0], reduced(images, 16))
    matrices = np.tile(np.eye(3), (2, 1, 1))
    for view, later in pairwise(seen):
        raw = transformer.similarity(view)[:, 0].numpy()
        matrices = np.stack([m @ matrix_of(row) for m, row in zip(matrices, raw, strict=True)])
        expected = Warp((Affine(torch.from_numpy(matrices[:, :2])),)).sample(images, (16, 16))
        torch.testing.assert_close(later, expected, atol=1e-9, rtol=1e-9)
    np.testing.assert_allclose(aligned.warp.stages[1].matrix, matrices[:, :2], atol=1e-12)


@pytest.mark.parametrize("padding", ["border", "reflection", "zeros"])
def test_padding_is_what_is_seen_beyond_the_image(padding):
    transformer, images, seen = with_bias([0.0, 1.0, 0.0, 0.0], padding=padding), pictures(1), []
    transformer.flow.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    warp = Warp((transformer(images).warp.stages[1],))
    torch.testing.assert_close(seen[0], warp.sample(images, (16, 16), padding=padding))
    assert padding == "zeros" or seen[0][:, :, 0].abs().max() > 0


# flow


def test_flow_applies_before_the_similarity():
    transformer = with_bias(RAW)
    transformer.flow.delta[-1].bias.copy_(torch.tensor([0.1, -0.2]))
    aligned = transformer(pictures(2), iterations=2)
    assert aligned.delta.shape == (2, 2, 16, 16)
    torch.testing.assert_close(aligned.delta[:, :, 3, 5], torch.tensor([[0.1, -0.2]] * 2, dtype=torch.float64))
    points = inner_points(2)
    expected = through(matrix_of(RAW), through(matrix_of(RAW), points.numpy() + np.array([0.1, -0.2])))
    np.testing.assert_allclose(aligned.warp.map_points(points).points, expected, atol=1e-7)


def test_released_units_are_an_option():
    images = pictures()
    plain, released = (transformer_of(awake=0.1, flow_unit_factor=f)(images).delta for f in (1.0, 8.0))
    torch.testing.assert_close(released, 8 * plain)
    bordered, zeros = (transformer_of(awake=0.1, flow_padding=p)(images).delta for p in ("replicate", "zeros"))
    torch.testing.assert_close(bordered[..., 4:-4, 4:-4], zeros[..., 4:-4, 4:-4])
    assert not torch.allclose(bordered[..., :4, :], zeros[..., :4, :])


# heads


def single(transformer, k):
    """The transformer of head k alone."""
    heads, state = transformer.config.heads, transformer.state_dict()
    for name in ("similarity.head", "flow.delta.1", "flow.mask.1"):
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in state:
                state[f"{name}.{kind}"] = state[f"{name}.{kind}"].chunk(heads)[k]
    alone = SpatialTransformer(replace(transformer.config, heads=1)).double().requires_grad_(False)
    alone.load_state_dict(state)
    return alone


@pytest.mark.parametrize("transforms", TRANSFORMS)
def test_k_heads_equal_k_transformers(transforms):
    transformer, images = transformer_of(awake=0.3, heads=3, transforms=transforms), pictures(2, 20, 28)
    options = {"iterations": 2 if "similarity" in transforms else 1}
    every = transformer(images, **options)
    assert len(every.warp) == 6
    for k in range(3):
        alone = single(transformer, k)(images, **options)
        torch.testing.assert_close(every.warp.grid((9, 9))[k::3], alone.warp.grid((9, 9)), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(every.warp.grid((9, 9))[k::3], every.warp.grid((9, 9))[(k + 1) % 3 :: 3], atol=1e-3)
    head = torch.tensor([2, 0])
    chosen = transformer(images, head=head, **options)
    torch.testing.assert_close(chosen.warp.grid((9, 9)), every.warp.grid((9, 9))[[2, 3]], rtol=1e-9, atol=1e-9)


# batches and sizes


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_warp_does_not_depend_on_the_batch(iterations):
    transformer, images = transformer_of(awake=0.3), pictures(5, 24, 24)
    grid = transformer(images, iterations=iterations).warp.grid((8, 8))
    for part in (slice(0, 1), slice(1, 3), slice(3, 5)):
        alone = transformer(images[part], iterations=iterations).warp.grid((8, 8))
        torch.testing.assert_close(alone, grid[part], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 70), (33, 32), (200, 90)])
def test_any_size(height, width):
    images = pictures(2, height, width)
    aligned = transformer_of(awake=0.2)(images, iterations=2)
    assert aligned.warp.sample(images).shape == images.shape
    assert torch.isfinite(aligned.warp.grid((6, 7))).all()


def test_warps_agree_between_sizes_of_one_picture():
    """They are in normalised coordinates, and what the networks see is nearly the same."""
    transformer = transformer_of(awake=0.1)
    large, small = (
        transformer(pictures(2, size, size), iterations=2).warp.grid((8, 8)) for size in (64, 32)
    )  # bicubic enlargements of the same coarse images
    torch.testing.assert_close(large, small, atol=0.02, rtol=0)


def test_reduction_is_antialiased_and_leaves_the_right_size_alone():
    images = pictures()
    assert reduced(images, 16) is images
    fine = torch.ones(1, 1, 64, 64)
    fine[:, :, ::2, ::2] = fine[:, :, 1::2, 1::2] = -1
    assert reduced(fine, 16)[..., 1:-1, 1:-1].abs().max() < 1e-6
    ramp = (torch.arange(64.0) / 64).expand(1, 1, 64, 64)
    middles = (torch.arange(16.0) * 4 + 1.5) / 64
    torch.testing.assert_close(reduced(ramp, 16)[0, 0, 5, 2:-2], middles[2:-2])


# flips


@pytest.mark.parametrize("transforms", [("flow",), ("similarity", "flow")])
def test_flips_keep_the_smoother_flow_of_the_two(transforms):
    transformer, images = transformer_of(awake=0.4, transforms=transforms, heads=2), pictures(6, 20, 20)
    aligned, flipped = transformer.align_flips(images)
    assert 0 < int(flipped.sum()) < len(flipped) == 12
    plain, mirrored = transformer(images), transformer(images.flip(3))
    variations = torch.stack([total_variation(plain.delta), total_variation(mirrored.delta)])
    torch.testing.assert_close(total_variation(aligned.delta), variations.amin(dim=0))
    twice = images.repeat_interleave(2, dim=0)
    expected = torch.where(flipped[:, None, None, None], mirrored.warp.sample(twice.flip(3)), plain.warp.sample(twice))
    torch.testing.assert_close(aligned.warp.sample(twice), expected)


def test_an_image_and_its_mirror_image_are_aligned_alike():
    transformer, images = transformer_of(awake=0.4), pictures(4)
    (one, flipped), (other, unflipped) = transformer.align_flips(images), transformer.align_flips(images.flip(3))
    assert torch.equal(flipped, ~unflipped)
    torch.testing.assert_close(one.warp.sample(images), other.warp.sample(images.flip(3)))
    points = inner_points(4)
    mirror = torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(one.warp.map_points(points).points, other.warp.map_points(points).points * mirror)


def test_nothing_is_flipped_without_a_reason():
    images = pictures()
    aligned, flipped = transformer_of().align_flips(images)
    assert not flipped.any()
    assert torch.equal(aligned.warp.grid((5, 5)), Warp.identity(3, dtype=torch.float64).grid((5, 5)))


# classifier


def test_classifier_starts_from_a_copy_of_the_similarity_trunk():
    transformer, images = transformer_of(awake=0.3, heads=3), pictures(2, 24, 24)
    torch.manual_seed(9)
    classifier = ClusterClassifier.from_transformer(transformer)
    features = transformer.similarity.trunk(reduced(images, 16))
    torch.testing.assert_close(classifier(images), classifier.head(features))
    assert classifier(images).shape == (2, 3)
    assert classifier.head.weight.abs().max() > 0
    before = transformer.similarity.trunk(reduced(images, 16))
    assert all(parameter.requires_grad for parameter in classifier.parameters())
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(1)
    torch.testing.assert_close(transformer.similarity.trunk(reduced(images, 16)), before)
    assert ClusterClassifier.from_transformer(transformer, num_classes=6)(images).shape == (2, 6)


# what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t(torch.zeros(1, 3, 16, 16)), "images of 3 channels: expected 2"),
        (lambda t: t(torch.zeros(1, 2, 16, 16), iterations=0), "iterations 0: expected at least 1"),
        (lambda t: t(torch.zeros(1, 2, 16, 16), head=torch.tensor([1])), "head 1..1: expected 0 to 0"),
        (lambda t: t(torch.zeros(1, 2, 16, 16), head=torch.tensor([-1])), "head -1..-1: expected 0 to 0"),
    ],
)
def test_transformer_refuses(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(transformer_of(dtype=torch.float32))
    assert "\n" not in str(caught.value)


def test_single_networks_refuse_what_they_cannot():
    images = pictures()
    with pytest.raises(ValueError, match="iterations 2: expected 1, as the transformer has no similarity network"):
        transformer_of(transforms=("flow",))(images, iterations=2)
    with pytest.raises(ValueError, match="no similarity network to start from"):
        ClusterClassifier.from_transformer(transformer_of(transforms=("flow",)))
    with pytest.raises(ValueError, match="expected transforms with flow"):
        transformer_of(transforms=("similarity",)).align_flips(images)
