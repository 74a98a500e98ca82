"""Regularisers of the flow against loops and closed forms, and the schedule of psi."""

import math

import pytest
import torch
from triptych_gangealing.objective import flow_identity, psi_schedule
from triptych_gangealing.spatial_transformer import total_variation


def deltas(n=3, height=5, width=7, scale=2.0):
    return scale * torch.randn(n, 2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def huber(x):
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


def test_total_variation_equals_a_loop():
    delta = deltas()
    for image, found in zip(delta, total_variation(delta), strict=True):
        along_x = [
            huber(float(image[c, i, j + 1] - image[c, i, j])) for c in range(2) for i in range(5) for j in range(6)
        ]
        along_y = [
            huber(float(image[c, i + 1, j] - image[c, i, j])) for c in range(2) for i in range(4) for j in range(7)
        ]
        assert found.item() == pytest.approx(sum(along_x) / len(along_x) + sum(along_y) / len(along_y), rel=1e-12)


def test_total_variation_ignores_a_shift_and_sees_direction():
    delta = deltas(scale=0.1)
    torch.testing.assert_close(total_variation(delta + 3), total_variation(delta))
    ramp = torch.zeros(1, 2, 4, 4)
    ramp[0, 0] = torch.arange(4) * 0.2  # x displacement grows by 0.2 a column: half of the steps along x are 0.2
    torch.testing.assert_close(total_variation(ramp), torch.tensor([0.5 * 0.2**2 / 2]))


def test_total_variation_of_one_flow_on_a_grid_twice_as_fine_is_a_quarter():
    """Steps of one linear flow halve with the grid's spacing, and small ones count squared."""
    coarse, fine = (((torch.arange(n) + 0.5) * 2 / n - 1).expand(1, 2, n, n) * 0.3 for n in (8, 16))
    torch.testing.assert_close(total_variation(coarse), 4 * total_variation(fine))


def test_total_variation_of_one_cell_is_zero():
    assert total_variation(deltas(2, 1, 1)).tolist() == [0, 0]
    column = deltas(1, 4, 1, scale=0.1)
    assert total_variation(column).item() == pytest.approx(float(column.diff(dim=2).square().mean() / 2))


def test_flow_identity():
    delta = deltas()
    expected = [sum(x * x for x in image.flatten().tolist()) / image.numel() for image in delta]
    assert flow_identity(delta).tolist() == pytest.approx(expected)
    assert flow_identity(torch.zeros(2, 2, 3, 3)).tolist() == [0, 0]


def test_both_are_differentiable():
    delta = deltas(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(total_variation, delta)
    assert torch.autograd.gradcheck(flow_identity, delta)


def test_psi_is_half_a_cosine_wave():
    total = 150_000
    assert psi_schedule(0, total) == 1
    assert psi_schedule(total, total) == 0
    assert psi_schedule(total + 5, total) == 0
    assert psi_schedule(total // 2, total) == pytest.approx(0.5)
    assert psi_schedule(total // 3, total) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    falling = [psi_schedule(step, 40) for step in range(42)]
    assert falling == sorted(falling, reverse=True)


def test_psi_without_annealing_and_out_of_range():
    assert psi_schedule(0, 0) == 0
    for step, total in ((-1, 10), (0, -1)):
        with pytest.raises(ValueError, match="expected"):
            psi_schedule(step, total)
