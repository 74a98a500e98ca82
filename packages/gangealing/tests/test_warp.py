"""Warps and anti-aliased sampling against what they are by definition: float64 loops, SciPy's interpolation, numpy's inverse."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F
from triptych_gangealing import warp as warp_module
from triptych_gangealing.warp import TOLERANCE, Affine, Flow, InverseFlow, Warp, centres, to_normalised, to_pixels

F64 = torch.float64
SCIPYS = {"border": "nearest", "reflection": "reflect", "zeros": "grid-constant"}
SIZES = [((8, 8), (8, 8)), ((16, 12), (5, 7)), ((11, 21), (6, 4)), ((13, 1), (3, 2)), ((5, 6), (14, 9))]


def drawn(*shape: int, seed: int = 0, dtype=F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)  # along random directions


def waves(n: int, size: tuple[int, int], slope: float, dtype=F64) -> Flow:
    """Flows of a sine along each axis, whose steepest slope along either is `slope` or nearly."""
    x, y = centres(size, torch.empty(0, dtype=F64)).unbind(-1)
    phase = torch.arange(n, dtype=F64)[:, None, None]
    delta = torch.stack((torch.sin(3 * x + phase), torch.cos(3 * y - phase)), dim=1) * (slope / 3)
    return Flow(delta.to(dtype))


def similarities(n: int, seed: int = 1, dtype=F64) -> Affine:
    return Affine.similarity(
        *(drawn(n, *rest, seed=seed + i, dtype=dtype) / 4 for i, rest in enumerate([(), (), (2,)]))
    )


def warps(n: int, dtype=F64) -> Warp:
    return Warp((waves(n, (6, 5), 0.4, dtype), similarities(n, dtype=dtype)))


def looked_up(image: np.ndarray, x: np.ndarray, y: np.ndarray, padding: str) -> np.ndarray:
    """One channel at normalised points."""
    rows, columns = ((np.asarray(p) + 1) / 2 * side - 0.5 for p, side in zip((y, x), image.shape, strict=True))
    return ndimage.map_coordinates(image, [rows, columns], order=1, mode=SCIPYS[padding], cval=0.0)


def tent_matrix(side: int) -> np.ndarray:
    """Half as many, rounded up: each the mean of what it is made of, weighted by a tent of twice its width."""
    half = math.ceil(side / 2)
    pitch, matrix = side / half, np.zeros((half, side))
    for i in range(half):
        for j in range(side):
            matrix[i, j] = max(0.0, 1 - abs((j + 0.5) - (i + 0.5) * pitch) / pitch)
        matrix[i] /= matrix[i].sum()
    return matrix


def sampled_by_definition(image: np.ndarray, grid: np.ndarray, padding: str) -> np.ndarray:
    """One channel, pixel by pixel."""
    pyramid = [image]
    for _ in range(3):
        last = pyramid[-1]
        pyramid.append(tent_matrix(last.shape[0]) @ last @ tent_matrix(last.shape[1]).T)
    pixels = grid * np.array([image.shape[1], image.shape[0]]) / 2
    out = np.zeros(grid.shape[:2])
    for r in range(out.shape[0]):
        for c in range(out.shape[1]):
            around = [(r + i, c + j) for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))]
            near = [at for at in around if 0 <= at[0] < out.shape[0] and 0 <= at[1] < out.shape[1]]
            largest = max([1.0, *(float(np.hypot(*(pixels[at] - pixels[r, c]))) for at in near)])
            level = min(math.log2(largest), 2.5)
            low, high = math.floor(level), math.ceil(level)
            a, b = (looked_up(pyramid[i], *grid[r, c][:, None], padding)[0] for i in (low, high))
            out[r, c] = a + (level - low) * (b - a)
    return out


@pytest.mark.parametrize("padding", list(SCIPYS))
@pytest.mark.parametrize(("size", "out"), SIZES)
def test_sampling_equals_its_definition(size, out, padding):
    images, warp = drawn(2, 2, *size, seed=3), warps(2)
    grid = warp.grid(out)
    for antialias in (True, False):
        found = warp.sample(images, out, padding, antialias)
        assert found.shape == (2, 2, *out)
        for i in range(2):
            for channel in range(2):
                image, points = images[i, channel].numpy(), grid[i].numpy()
                plain = looked_up(image, points[..., 0], points[..., 1], padding)
                expected = sampled_by_definition(image, points, padding) if antialias else plain
                np.testing.assert_allclose(found[i, channel], expected, atol=1e-9)


def test_all_levels_are_met():
    """The test above is of levels between, below and above the limits."""
    found = []
    for size, out in SIZES:
        x, y = to_pixels(warps(2).grid(out), size).unbind(-1)
        found.append(warp_module.pyramid_levels(x, y).flatten())
    level = torch.cat(found)
    assert set(level.floor().int().tolist()) == {0, 1, 2}
    assert level.min() == 0
    assert level.max() == warp_module.MAX_LEVEL
    assert ((level > 0) & (level < 0.5)).any()


def test_levels_of_the_pyramid():
    x = torch.zeros(1, 1, 1, 12, dtype=F64)
    x[..., 5] = 8
    torch.testing.assert_close(warp_module.halved(x).flatten(), torch.tensor([0, 0, 3, 1, 0, 0], dtype=F64))
    for size in ((4, 6), (5, 3), (2, 9), (1, 2), (7, 1), (1, 1), (64, 24)):
        image = drawn(1, 3, *size)
        rows, columns = (torch.from_numpy(tent_matrix(side)) for side in size)
        torch.testing.assert_close(warp_module.halved(image), rows @ image @ columns.mT, rtol=0, atol=1e-12)
        if min(rows.shape[0], columns.shape[0], *size) > 1:
            expected = F.interpolate(image, (len(rows), len(columns)), mode="bilinear", antialias=True)
            torch.testing.assert_close(warp_module.halved(image), expected, rtol=0, atol=1e-12)
        if max(size) < 10:
            assert gradcheck(warp_module.halved, image.requires_grad_())


def test_what_is_made_smaller_does_not_alias():
    board = (torch.arange(64)[:, None] + torch.arange(64) // 2).remainder(2).to(F64).expand(1, 1, -1, -1)
    warp = Warp.identity(1, dtype=F64)
    assert (warp.sample(board, (10, 10), antialias=False) - 0.5).abs().max() > 0.35
    assert (warp.sample(board, (10, 10)) - 0.5).abs().max() < 0.06


@pytest.mark.parametrize(
    ("magnified", "level"), [(0.3, 0.0), (1.0, 0.0), (1.5, math.log2(1.5)), (4.0, 2.0), (9.0, 2.5)]
)
def test_the_level_of_a_magnification(magnified, level):
    log_scale = torch.full((1,), math.log(magnified), dtype=F64)
    turn = Affine.similarity(torch.full((1,), 0.7, dtype=F64), log_scale, torch.zeros(1, 2, dtype=F64))
    x, y = to_pixels(Warp((turn,)).grid((9, 9)), (9, 9)).unbind(-1)
    torch.testing.assert_close(warp_module.pyramid_levels(x, y), torch.full((1, 9, 9), level, dtype=F64))


def test_one_pixel_has_no_neighbours():
    assert warp_module.pyramid_levels(torch.zeros(2, 1, 1), torch.zeros(2, 1, 1)).eq(0).all()
    assert Warp.identity(1).sample(drawn(1, 1, 5, 5, dtype=torch.float32), (1, 1)).shape == (1, 1, 1, 1)


def test_levels_nobody_needs_change_nothing(monkeypatch):
    images, warp = drawn(2, 1, 20, 24).requires_grad_(), warps(2)
    for out in ((10, 12), (20, 24), (3, 3)):
        results = []
        for everything in (False, True):
            with monkeypatch.context() as patch:
                if everything:
                    patch.setattr(warp_module, "_levels_needed", lambda level: (0, 3))
                grid = warp.grid(out).requires_grad_()
                level = warp_module.pyramid_levels(*to_pixels(grid, (20, 24)).unbind(-1))
                values = warp_module.sample_pyramid(images, grid, level, "border")
                results.append([values, *torch.autograd.grad(values.square().sum(), (images, grid))])
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_gradients_of_images_and_stages():
    delta, matrix = waves(2, (3, 4), 0.5).delta, similarities(2).matrix
    images = drawn(2, 2, 9, 7)

    def sampled(images, delta, matrix, padding="border", antialias=True):
        return Warp((Flow(delta), Affine(matrix))).sample(images, (4, 3), padding, antialias)

    inputs = [x.detach().requires_grad_() for x in (images, delta, matrix)]
    for padding in SCIPYS:
        assert gradcheck(lambda *xs, padding=padding: sampled(*xs, padding), inputs)
    assert gradcheck(lambda *xs: sampled(*xs, antialias=False), inputs)
    parameters = [drawn(2, *rest, seed=i).mul(0.3).requires_grad_() for i, rest in enumerate([(), (), (2,)])]
    assert gradcheck(lambda *xs: Warp((Affine.similarity(*xs),)).sample(images, (3, 4)), parameters)


def test_gradients_of_an_inverse():
    delta, matrix = waves(2, (3, 4), 0.5).delta.requires_grad_(), similarities(2).matrix.requires_grad_()
    points = drawn(2, 5, 2).mul(0.3).requires_grad_()

    def mapped(delta, matrix, points):
        return Warp((Flow(delta), Affine(matrix))).inverse().map_points(points).points

    assert gradcheck(mapped, (delta, matrix, points))


@pytest.mark.parametrize("size", [(4, 4), (3, 8), (256, 128)])
def test_pixels_and_normalised_coordinates(size):
    height, width = size
    corners = torch.tensor(
        [[-0.5, -0.5], [width - 0.5, height - 0.5], [0, 0], [(width - 1) / 2, (height - 1) / 2]], dtype=F64
    )
    first = [1 / width - 1, 1 / height - 1]
    expected = torch.tensor([[-1, -1], [1, 1], first, [0, 0]], dtype=F64)
    torch.testing.assert_close(to_normalised(corners, size), expected)
    torch.testing.assert_close(to_pixels(expected, size), corners)
    assert centres(size, corners).shape == (*size, 2)
    torch.testing.assert_close(centres(size, corners)[-1, 0], torch.tensor([1 / width - 1, 1 - 1 / height], dtype=F64))


def test_round_trips_of_the_identity_are_exact_to_a_hundredth_of_a_pixel():
    pixels = torch.rand(2, 500, 2, generator=torch.Generator().manual_seed(0)) * 300 - 22
    identity = Warp((Flow(torch.zeros(2, 2, 16, 16)), *Warp.identity(2).stages))
    there = identity.map_points(to_normalised(pixels, (256, 256)))
    back = identity.inverse().map_points(there.points)
    assert (to_pixels(back.points, (256, 256)) - pixels).abs().max() < 1e-4
    assert there.converged.all()
    assert back.converged.all()
    inside = ((pixels >= -0.5) & (pixels <= 255.5)).all(-1)
    assert torch.equal(back.inside, inside)
    assert inside.any()
    assert not inside.all()
    assert torch.equal(identity.grid((9, 16)), centres((9, 16), pixels).expand(2, -1, -1, -1))
    image = drawn(2, 3, 9, 16, dtype=torch.float32)
    torch.testing.assert_close(identity.sample(image), image, rtol=0, atol=1e-5)


def test_affine_maps_and_their_inverse():
    affine, points = similarities(4), drawn(4, 6, 2)
    expected = [p @ m[:, :2].T + m[:, 2] for p, m in zip(points.numpy(), affine.matrix.numpy(), strict=True)]
    np.testing.assert_allclose(affine(points), expected, atol=1e-12)
    general = Affine(drawn(4, 2, 3, seed=5))
    bottom = np.broadcast_to([[[0.0, 0.0, 1.0]]], (4, 1, 3))
    inverse = np.linalg.inv(np.concatenate((general.matrix.numpy(), bottom), axis=1))[:, :2]
    np.testing.assert_allclose(general.inverse().matrix, inverse, rtol=1e-9)
    scale, turn = math.exp(0.2), 0.5
    one = Affine.similarity(torch.tensor([turn]), torch.tensor([0.2]), torch.tensor([[0.1, -0.3]])).matrix[0]
    c, s = scale * math.cos(turn), scale * math.sin(turn)
    torch.testing.assert_close(one, torch.tensor([[c, -s, 0.1], [s, c, -0.3]]))


def test_flows_are_bilinear_between_cells_and_constant_beyond():
    flow, points = Flow(drawn(2, 2, 4, 7)), drawn(2, 40, 2)
    for i in range(2):
        x, y = points[i].T.numpy()
        delta = [looked_up(flow.delta[i, axis].numpy(), x, y, "border") for axis in range(2)]
        np.testing.assert_allclose(flow(points)[i], points[i].numpy() + np.stack(delta, axis=-1), atol=1e-12)


def test_slopes_of_a_flow():
    flow, points = Flow(drawn(1, 2, 4, 7)), drawn(1, 30, 2)
    found = torch.autograd.functional.jacobian(flow, points)[0, :, :, 0]
    expected = torch.stack([found[i, :, i] for i in range(30)])
    torch.testing.assert_close(flow.jacobian(points)[0], expected)


@pytest.mark.parametrize(("dtype", "slope"), [(torch.float32, 0.7), (F64, 0.7), (torch.float32, 0.3)])
def test_inverse_of_a_warp_that_contracts(dtype, slope):
    warp = Warp((waves(3, (16, 16), slope, dtype), similarities(3, dtype=dtype)))
    points = drawn(3, 200, 2, dtype=dtype).clamp(-1.2, 1.2)
    for one, other in ((warp, warp.inverse()), (warp.inverse(), warp)):
        there = one.map_points(points)
        back = other.map_points(there.points)
        assert there.converged.all()
        assert back.converged.all()
        assert (back.points - points).norm(dim=-1).max() * 128 < 0.01  # pixels of an image of 256
    assert warp.inverse().inverse().stages[0].delta is warp.stages[0].delta


def test_inverse_of_a_flow_that_expands_too_much_for_plain_iteration():
    x = centres((1, 64), torch.empty(0, dtype=F64))[..., 0]
    flow = Flow(torch.stack((2.5 * x.clamp(-0.5, 0.5), 0 * x))[None])  # 3.5 p in the middle
    points = torch.zeros(1, 81, 2, dtype=F64)
    points[..., 0] = torch.linspace(-1.5, 1.5, 81)
    mapped = Warp((flow,)).inverse().map_points(points)
    assert mapped.converged.all()
    torch.testing.assert_close(mapped.points[..., 0], points[..., 0] / 3.5, rtol=0, atol=1e-6)


def test_folds_of_a_flow_are_reported():
    x = centres((1, 64), torch.empty(0, dtype=F64))[..., 0]
    flow = Flow(torch.stack((-1.6 * x.clamp(-0.5, 0.5), 0 * x))[None])  # -0.6 p in the middle
    points = torch.zeros(1, 121, 2, dtype=F64)
    points[..., 0] = torch.linspace(-1.5, 1.5, 121)
    warp = Warp((flow,))
    mapped = warp.inverse().map_points(points)
    residual = (warp.map_points(mapped.points).points - points).norm(dim=-1)
    torch.testing.assert_close(mapped.residual, residual, rtol=0, atol=1e-9)
    assert torch.equal(mapped.converged, mapped.residual <= TOLERANCE)
    outside = points[..., 0].abs() > 0.3  # p - 0.8 or p + 0.8 beyond the fold has one solution
    assert mapped.converged[outside].all()
    folded = (points[..., 0].abs() > 0.02) & (points[..., 0].abs() < 0.24)
    assert not mapped.converged[folded].any()
    nothing = Warp((Flow(torch.full((1, 2, 3, 3), math.nan, dtype=F64)),)).inverse().map_points(points)
    assert not nothing.converged.any()
    assert not nothing.inside.any()


def test_composition_maps_points_as_its_parts_do():
    a, b = warps(3), Warp((similarities(3, seed=8), waves(3, (4, 9), 0.3))).inverse()
    points = drawn(3, 50, 2)
    expected = b.map_points(a.map_points(points).points)
    found = a.compose(b).map_points(points)
    assert torch.equal(found.points, expected.points)
    assert torch.equal(found.residual, expected.residual)
    assert (found.residual > 0).any()
    assert torch.equal(a.compose(b).grid((3, 5)).flatten(1, 2), expected_grid(a, b, (3, 5)))


def expected_grid(a: Warp, b: Warp, size: tuple[int, int]) -> Tensor:
    start = centres(size, a.stages[0].tensor).flatten(0, 1).expand(len(a), -1, -1)
    return b.map_points(a.map_points(start).points).points


def smooth(n: int, side: int) -> Tensor:
    x, y = centres((side, side), torch.empty(0, dtype=F64)).unbind(-1)
    return torch.stack([torch.sin(3 * x + i) * torch.cos(2 * y - i) + x for i in range(n)])[:, None]


def test_composition_resamples_with_the_other_first():
    a, b, image = warps(2), Warp((similarities(2, seed=8),)), smooth(2, 96)
    once, twice = a.compose(b).sample(image), a.sample(b.sample(image))
    wrong = b.sample(a.sample(image))
    known = (a.inside((96, 96)) * a.compose(b).inside((96, 96))).bool()
    assert (once - twice)[known].abs().max() < 0.05
    assert (once - wrong)[known].abs().max() > 0.2


def test_inverse_brings_an_image_back():
    warp, image = Warp((waves(2, (12, 12), 0.4), similarities(2))), smooth(2, 96)
    back = warp.inverse().sample(warp.sample(image))
    known = warp.inverse().inside((96, 96)).bool()
    assert known.float().mean() > 0.5
    assert (back - image)[known].abs().max() < 0.05


def test_a_grid_is_points_mapped():
    for stages in ((Flow(drawn(2, 2, 5, 4) / 9), similarities(2)), (similarities(2), Flow(drawn(2, 2, 5, 4) / 9))):
        warp = Warp(stages)
        found = warp.grid((5, 4))
        torch.testing.assert_close(found.flatten(1, 2), expected_grid(warp, Warp.identity(2, dtype=F64), (5, 4)))


def test_inside_is_up_to_the_edges():
    shift = Affine.similarity(torch.zeros(1), torch.zeros(1), torch.tensor([[0.5, 0.0]]))
    expected = torch.tensor([1.0, 1, 1, 0]).expand(1, 1, 2, 4)
    assert torch.equal(Warp((shift,)).inside((2, 4)), expected)
    edges = torch.tensor([[[0.5, 1.0], [0.5001, 0.0], [-1.5, -1.0], [0.0, -1.001]]])
    assert Warp((shift,)).map_points(edges).inside.tolist() == [[True, False, True, False]]


def test_flows_on_another_grid():
    warp = Warp((waves(2, (6, 5), 0.4), similarities(2), InverseFlow(waves(2, (3, 3), 0.2))))
    resized = warp.resize((4, 10))
    for i, old in ((0, warp.stages[0]), (2, warp.stages[2].flow)):
        new = resized.stages[i] if i == 0 else resized.stages[i].flow
        at = centres((4, 10), old.delta).flatten(0, 1).expand(2, -1, -1)
        torch.testing.assert_close(new.delta.flatten(2).mT, old(at) - at)
    assert resized.stages[1].matrix is warp.stages[1].matrix


def test_mirror_is_for_the_image_the_other_way_round():
    warp, images = warps(2), drawn(2, 3, 10, 13)
    torch.testing.assert_close(warp.mirror().sample(images, (6, 8)), warp.sample(images.flip(3), (6, 8)))


def test_some_of_the_images():
    warp, points = Warp((*warps(4).stages, *warps(4).inverse().stages)), drawn(4, 3, 2)
    whole = warp.map_points(points).points
    for indices in (torch.tensor([2, 0]), [3], slice(1, 3), torch.tensor([True, False, False, True])):
        some = warp.select(indices)
        assert len(some) == len(points[indices])
        torch.testing.assert_close(some.map_points(points[indices]).points, whole[indices], rtol=0, atol=1e-9)


def test_types_of_images_and_warps():
    warp, images = warps(2, torch.float32), drawn(2, 1, 16, 16)
    expected = warp.to(dtype=F64).sample(images, (8, 8))
    for dtype, tolerance in ((F64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        found = warp.sample(images.to(dtype), (8, 8))
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    with torch.autocast("cpu", torch.bfloat16):  # coordinates stay as they are
        torch.testing.assert_close(warp.grid((8, 8)), warps(2, torch.float32).grid((8, 8)), rtol=0, atol=1e-6)
        inverse = warp.inverse().map_points(warp.map_points(drawn(2, 4, 2, dtype=torch.float32)).points)
    assert inverse.converged.all()


def test_what_is_not_a_number_is_sampled_as_such():
    warp = Warp((Affine(torch.full((1, 2, 3), math.nan)),))
    assert warp.sample(torch.ones(1, 1, 8, 8)).isnan().all()
    assert warp.inside((2, 2)).eq(0).all()


def test_bad_input():
    warp, image = warps(2), drawn(2, 1, 4, 4)
    cases = [
        (lambda: Warp(()), "without stages"),
        (lambda: Warp((*warps(2).stages, *warps(3).stages)), "expected as many in every stage"),
        (lambda: warp.compose(warps(2, torch.float32)), "of one type"),
        (lambda: warp.sample(image[:1]), "1 images for 2 warps"),
        (lambda: warp.map_points(drawn(3, 1, 2)), "points of 3 images for 2 warps"),
        (lambda: warp.sample(image, padding="wrap"), "padding_mode"),
        (lambda: warp.sample(image, (0, 4)), "size 0x4"),
        (lambda: warp.resize((3, 0)), "3x0 cells"),
        (lambda: to_pixels(drawn(1, 2), (-1, 4)), "size -1x4"),
        (
            lambda: Affine(torch.tensor([[[1.0, 0, 0], [0, 1, 0]], [[1, 2, 0], [2, 4, 5]]])).inverse(),
            "warp 1 has determinant 0",
        ),
        (lambda: Affine(torch.full((1, 2, 3), math.nan)).inverse(), "determinant nan"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            wrong()
        assert "\n" not in str(caught.value)
