"""Training of the frozen instrument of coloured digits: its targets and its loss."""

import torch
from triptych_gangealing.digits32 import Digits32
from triptych_gangealing.stylegan2.instrument import reading
from triptych_thesis.instruments.digits32 import loss_of, wanted, whitening


def test_whitened_truth_has_unit_covariance() -> None:
    truth = Digits32("train", seed=5).jitters(range(50_000))
    covariance = torch.cov((wanted(truth) @ whitening(truth)).T)
    torch.testing.assert_close(covariance, torch.eye(13), atol=0.01, rtol=0)


def test_loss_vanishes_at_the_truth_alone() -> None:
    truth = Digits32("train", seed=5).jitters(range(1_000))
    exact = torch.cat([torch.nn.functional.one_hot(truth.label, 10) * 100.0, wanted(truth)], dim=1)
    whiten = whitening(truth)
    assert loss_of(exact, truth, whiten) < 1e-6
    for column in range(10, 23):
        wrong = exact.clone()
        wrong[:, column] += 0.1
        assert loss_of(wrong, truth, whiten) > 1e-3
    read = reading(exact)
    assert torch.equal(read.labels, truth.label)
    for name in ("angle", "scale", "shift_px", "foreground", "background", "gradient"):
        torch.testing.assert_close(getattr(read, name), getattr(truth, name), atol=1e-5, rtol=0)
