"""Samplers with a model of Gaussian data, for which the exact result is known."""

import pytest
import torch
from triptych_common.diffusion import GaussianDiffusion, NoiseSchedule
from triptych_common.randomness import SampleNoise
from triptych_common.samplers import ddim, ddpm, final, guided

MEAN, STD = 0.3, 0.5
DIFFUSION = GaussianDiffusion(NoiseSchedule.linear(), variance="fixed_small")


def gaussian_model(x, t):
    """The optimal noise prediction for data N(MEAN, STD^2): E[noise | x_t] in closed form."""
    alpha_bar = DIFFUSION.schedule.alpha_bar[t][:, None]
    variance = alpha_bar * STD**2 + 1 - alpha_bar
    return (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * MEAN) / variance


def noise(n, dim=1, **kwargs):
    return SampleNoise(0, range(n), (dim,), dtype=torch.float64, **kwargs)


@pytest.mark.parametrize(("sampler", "steps"), [(ddpm, 1000), (ddpm, 250), (ddim, 250), (ddim, 1000)])
def test_sampling_gaussian_data_recovers_mean_and_deviation(sampler, steps):
    x = final(sampler(gaussian_model, DIFFUSION.respaced(steps), noise(4, 1000))).flatten()
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(x.std()) == pytest.approx(STD, abs=0.03)


def test_ddim_maps_noise_to_the_quantile_of_the_data():
    """With many steps DDIM follows the probability flow, which for Gaussians is affine: x = mean + std * z."""
    source = noise(16)
    z = noise(16).draw()
    x = final(ddim(gaussian_model, DIFFUSION, source))
    torch.testing.assert_close(x, MEAN + STD * z, rtol=0, atol=0.02)


def test_ddim_with_eta_one_has_the_deviation_of_ddpm():
    x = final(ddim(gaussian_model, DIFFUSION.respaced(500), noise(4, 1000), eta=1.0)).flatten()
    assert float(x.std()) == pytest.approx(STD, abs=0.03)


def test_steps_count_down_and_the_last_adds_no_noise():
    steps = list(ddpm(gaussian_model, DIFFUSION.respaced(10), noise(2)))
    assert [s.index for s in steps] == list(range(9, -1, -1))
    torch.testing.assert_close(steps[-1].x, steps[-1].x_0)  # posterior mean at step 0 is x_0


def test_one_evaluation_recovers_the_conditional_mean():
    t = torch.tensor([400, 400])
    x_t = noise(2).draw()
    alpha_bar = DIFFUSION.schedule.alpha_bar[400]
    gain = alpha_bar.sqrt() * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)
    expected = MEAN + gain * (x_t - alpha_bar.sqrt() * MEAN)
    torch.testing.assert_close(DIFFUSION.p_params(gaussian_model(x_t, t), x_t, t).x_0, expected)


def test_clipping_bounds_what_the_model_believes():
    for step in ddpm(gaussian_model, DIFFUSION.respaced(20), noise(8), clip_x_0=True):
        assert float(step.x_0.abs().max()) <= 1


def labelled_model(x, t, y):
    """Two data channels and two variance channels, all equal to the label."""
    value = y.double()[:, None, None, None] + 0.1 * torch.arange(4, dtype=torch.float64)[:, None, None]
    return value.expand(len(x), 4, *x.shape[2:]) + 0 * x.sum()


@pytest.mark.parametrize(("channels", "expected"), [("all", 2), (2, 2), (1, 1)])
def test_guidance_extrapolates_the_given_channels_and_keeps_conditional_variance(channels, expected):
    x, t, y = torch.zeros(3, 2, 2, 2, dtype=torch.float64), torch.full((3,), 5), torch.tensor([0, 1, 2])
    out = guided(labelled_model, y, 9, 1.5, guidance_channels=channels)(x, t)
    plain = labelled_model(x, t, y)
    null = labelled_model(x, t, torch.full_like(y, 9))
    torch.testing.assert_close(out[:, :expected], (null + 1.5 * (plain - null))[:, :expected])
    torch.testing.assert_close(out[:, expected:], plain[:, expected:])


def test_guidance_outside_its_interval_and_of_scale_one_is_the_plain_model():
    x, y = torch.zeros(2, 2, 2, 2, dtype=torch.float64), torch.tensor([0, 1])
    t = torch.full((2,), 900)
    for denoise in (guided(labelled_model, y, 9, 4.0, interval=(0, 800)), guided(labelled_model, y, 9, 1.0)):
        assert torch.equal(denoise(x, t), labelled_model(x, t, y))


def test_guidance_without_null_label_is_refused():
    with pytest.raises(ValueError, match=r"no null label; use 1.0"):
        guided(labelled_model, torch.tensor([0]), None, 1.5)
