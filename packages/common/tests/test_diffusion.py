"""The diffusion process against closed forms and against the schedulers of diffusers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from triptych_common.diffusion import GaussianDiffusion, NoiseSchedule, discretized_log_likelihood, gather, normal_kl

SCHEDULE = NoiseSchedule.linear()
T = torch.tensor([0, 1, 2, 17, 500, 998, 999])
DTYPE = torch.float64


@pytest.fixture
def data():
    rng = torch.Generator().manual_seed(0)
    x_0, noise, output = (torch.randn(len(T), 3, 4, 4, generator=rng, dtype=DTYPE) for _ in range(3))
    return x_0.clamp(-1, 1), noise, output


def test_schedule_values_of_the_published_process():
    assert float(SCHEDULE.alpha_bar[-1]) == pytest.approx(4.0358e-5, rel=1e-4)
    product = 1.0
    for step in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
        assert float(SCHEDULE.alpha_bar[step]) == pytest.approx(product, rel=1e-12)


def test_posterior_equals_bayes_rule_on_gaussians(data):
    """q(x_{t-1}|x_t,x_0) by completing the square of q(x_t|x_{t-1}) q(x_{t-1}|x_0), sharing no code."""
    x_0, noise, _ = data
    diffusion = GaussianDiffusion(SCHEDULE)
    x_t = diffusion.q_sample(x_0, T, noise)
    mean = diffusion.q_posterior_mean(x_0, x_t, T)
    for row, t in enumerate(T.tolist()):
        if t == 0:
            torch.testing.assert_close(mean[row], x_0[row], rtol=1e-12, atol=1e-12)
            continue
        beta, alpha_bar_prev = float(SCHEDULE.betas[t]), float(SCHEDULE.alpha_bar[t - 1])
        precision = (1 - beta) / beta + 1 / (1 - alpha_bar_prev)
        expected = math.sqrt(1 - beta) / beta * x_t[row] + math.sqrt(alpha_bar_prev) / (1 - alpha_bar_prev) * x_0[row]
        torch.testing.assert_close(mean[row], expected / precision, rtol=1e-9, atol=1e-12)
        assert float(SCHEDULE.posterior_variance[t]) == pytest.approx(1 / precision, rel=1e-9)


def test_q_sample_is_undone_both_ways(data):
    x_0, noise, _ = data
    diffusion = GaussianDiffusion(SCHEDULE)
    x_t = diffusion.q_sample(x_0, T, noise)
    torch.testing.assert_close(diffusion.x_0_from_noise(x_t, T, noise), x_0, rtol=0, atol=1e-10)
    torch.testing.assert_close(diffusion.noise_from_x_0(x_t, T, x_0), noise, rtol=0, atol=1e-9)


@pytest.mark.parametrize("predict", ["noise", "sample"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_reverse_step_equals_diffusers(data, predict, variance):
    x_0, noise, output = data
    diffusion = GaussianDiffusion(SCHEDULE, predict=predict, variance=variance)
    x_t = diffusion.q_sample(x_0, T, noise)
    learned = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=DTYPE).clamp(-1, 1)
    full = torch.cat([output, learned], dim=1) if variance == "learned_range" else output
    p = diffusion.p_params(full, x_t, T)

    scheduler = DDPMScheduler(
        1000, trained_betas=SCHEDULE.betas.numpy(), clip_sample=False, variance_type=variance,
        prediction_type={"noise": "epsilon", "sample": "sample"}[predict],
    )  # fmt: skip
    scheduler.betas = SCHEDULE.betas  # its own are float32
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    scheduler.one = torch.tensor(1.0, dtype=DTYPE)
    for row, t in enumerate(T.tolist()):
        one = slice(row, row + 1)
        drawn = torch.Generator().manual_seed(row)
        theirs = scheduler.step(full[one], t, x_t[one], generator=drawn)
        torch.testing.assert_close(p.x_0[one], theirs.pred_original_sample, rtol=1e-9, atol=1e-9)
        z = torch.randn(x_t[one].shape, generator=torch.Generator().manual_seed(row), dtype=DTYPE)
        log_variance = p.log_variance[one]
        if variance == "learned_range":
            # Its range ends at the log of a posterior variance clipped at 1e-20; ours borrows step 1's at step 0, as
            # the released sampler does. No noise is drawn there, so samples agree.
            assert t == 0 or torch.allclose(
                log_variance, scheduler._get_variance(t, predicted_variance=learned[one]), rtol=1e-9, atol=1e-9
            )
        ours = p.mean[one] + (torch.exp(0.5 * log_variance) * z if t else 0)
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-9, atol=1e-9)


def test_ddim_step_equals_diffusers(data):
    from triptych_common.randomness import SampleNoise
    from triptych_common.samplers import ddim

    diffusion = GaussianDiffusion(SCHEDULE, variance="fixed_small").respaced(50)
    scheduler = DDIMScheduler(1000, trained_betas=SCHEDULE.betas.numpy(), clip_sample=False, set_alpha_to_one=True)
    scheduler.alphas_cumprod = SCHEDULE.alpha_bar
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=DTYPE)
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=DTYPE) / 3

    def denoise(x, t):
        return torch.einsum("ij,bjhw->bihw", weights, x) * torch.cos(t.double() / 300)[:, None, None, None]

    noise = SampleNoise(0, [0, 1], (3, 4, 4), dtype=DTYPE)
    x = SampleNoise(0, [0, 1], (3, 4, 4), dtype=DTYPE).draw()
    steps = diffusion.schedule.timesteps.tolist()
    for step in ddim(denoise, diffusion, noise):
        t = steps[step.index]
        previous = steps[step.index - 1] if step.index else -1
        # diffusers derives the previous step from an even stride, our sampler from the rounded steps
        scheduler.num_inference_steps = 1
        scheduler.config.num_train_timesteps = t - previous
        x = scheduler.step(denoise(x, torch.tensor([t, t])), t, x).prev_sample
        torch.testing.assert_close(step.x, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("count", "head", "tail"), [
    (250, [0, 4, 8], [995, 999]), (50, [0, 20, 41, 61], [999]), (1000, [0, 1], [998, 999]), (1, [999], [999]),
])  # fmt: skip
def test_respacing_visits_the_released_steps(count, head, tail):
    respaced = SCHEDULE.respaced(count)
    steps = respaced.timesteps.tolist()
    assert len(steps) == len(set(steps)) == count
    assert steps[: len(head)] == head
    assert steps[-len(tail) :] == tail
    torch.testing.assert_close(respaced.alpha_bar, SCHEDULE.alpha_bar[steps], rtol=1e-11, atol=0)


@pytest.mark.parametrize("count", [0, 1001])
def test_impossible_step_counts_are_refused(count):
    with pytest.raises(ValueError, match=f"num_inference_steps {count}: expected 1..1000"):
        SCHEDULE.respaced(count)


def test_kl_equals_torch_distributions():
    rng = torch.Generator().manual_seed(0)
    m1, l1, m2, l2 = (torch.randn(50, generator=rng, dtype=DTYPE) for _ in range(4))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(m1, (l1 / 2).exp()), normal(m2, (l2 / 2).exp()))
    torch.testing.assert_close(normal_kl(m1, l1, m2, l2), expected)


def test_discretized_likelihood_sums_to_one_over_the_256_levels():
    levels = torch.arange(256, dtype=DTYPE) / 127.5 - 1
    for mean, log_scale in ((0.1, -2.0), (-0.99, -3.0), (1.2, -1.0)):
        parts = discretized_log_likelihood(levels, torch.full_like(levels, mean), torch.full_like(levels, log_scale))
        assert float(parts.exp().sum()) == pytest.approx(1, abs=1e-9)


def test_variational_bound_is_zero_for_the_true_posterior_and_loss_trains_variance_alone(data):
    x_0, noise, _ = data
    diffusion = GaussianDiffusion(SCHEDULE)
    x_t = diffusion.q_sample(x_0, T, noise)
    perfect = torch.cat([noise, -torch.ones_like(noise)], dim=1)  # true noise, variance of the posterior
    bound = diffusion.variational_bound(perfect, x_0, x_t, T)
    torch.testing.assert_close(bound[1:], torch.zeros(len(T) - 1, dtype=DTYPE), rtol=0, atol=1e-9)

    output = perfect.clone().add_(0.1).requires_grad_()
    loss = diffusion.loss(output, x_0, x_t, T, noise)
    torch.testing.assert_close(loss.total, loss.mse + loss.vb)
    (gradient,) = torch.autograd.grad(loss.vb.sum(), output)
    assert float(gradient[:, :3].abs().max()) == 0
    assert float(gradient[:, 3:].abs().max()) > 0


def test_bound_in_bits_equals_written_out_kl(data):
    x_0, noise, output = data
    diffusion = GaussianDiffusion(SCHEDULE)
    x_t = diffusion.q_sample(x_0, T, noise)
    learned = torch.zeros_like(output)
    bound = diffusion.variational_bound(torch.cat([output, learned], 1), x_0, x_t, T)
    for row, t in enumerate(T.tolist()):
        if t == 0:
            continue
        low, high = math.log(SCHEDULE.posterior_variance[t]), math.log(SCHEDULE.betas[t])
        model_log_variance = (low + high) / 2
        predicted = diffusion.x_0_from_noise(x_t, T, output)[row : row + 1]
        one, x = T[row : row + 1], x_t[row : row + 1]
        gap = diffusion.q_posterior_mean(x_0[row : row + 1], x, one) - diffusion.q_posterior_mean(predicted, x, one)
        kl = 0.5 * (
            model_log_variance
            - low
            + math.exp(low - model_log_variance)
            - 1
            + (gap**2).mean() * math.exp(-model_log_variance)
        )
        assert float(bound[row]) == pytest.approx(float(kl) / math.log(2), rel=1e-9)


def test_fixed_variance_loss_is_the_mean_squared_error_of_what_is_predicted(data):
    x_0, noise, output = data
    for predict, target in (("noise", noise), ("sample", x_0)):
        diffusion = GaussianDiffusion(SCHEDULE, predict=predict, variance="fixed_small")
        loss = diffusion.loss(output, x_0, diffusion.q_sample(x_0, T, noise), T, noise)
        torch.testing.assert_close(loss.total, ((output - target) ** 2).mean(dim=(1, 2, 3)))
        assert float(loss.vb.abs().max()) == 0


def test_gaussian_decoder_is_the_density(data):
    x_0, noise, output = data
    diffusion = GaussianDiffusion(SCHEDULE, decoder="gaussian")
    t = torch.zeros(len(T), dtype=torch.long)
    x_t = diffusion.q_sample(x_0, t, noise)
    full = torch.cat([output, torch.zeros_like(output)], 1)
    p = diffusion.p_params(full, x_t, t)
    density = torch.distributions.Normal(p.mean, torch.exp(0.5 * p.log_variance)).log_prob(x_0)
    expected = -density.flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(diffusion.variational_bound(full, x_0, x_t, t), expected)


def test_output_channels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs 2; set learn_sigma"):
        GaussianDiffusion(SCHEDULE).p_params(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.tensor([3]))


def test_tables_are_gathered_in_float64_and_cast_last(data):
    """float32 coefficients are the correctly rounded float64 ones at every step."""
    t = torch.arange(1000)
    for table in (SCHEDULE.alpha_bar.rsqrt(), (1 / SCHEDULE.alpha_bar - 1).sqrt(), SCHEDULE.posterior_coef_x0):
        assert torch.equal(gather(table, t, torch.zeros(1000, 1)), table.float()[:, None])


def test_steps_may_stay_on_the_cpu_while_data_live_elsewhere():
    """The meta device stands in for a GPU: mixing devices fails there too."""
    for predict in ("noise", "sample"):
        diffusion = GaussianDiffusion(SCHEDULE, predict=predict)
        x_0, noise = torch.zeros(2, 2, 1, 4, 4, device="meta")
        t = torch.tensor([0, 7])
        x_t = diffusion.q_sample(x_0, t, noise)
        loss = diffusion.loss(torch.zeros(2, 2, 4, 4, device="meta"), x_0, x_t, t, noise)
        assert loss.total.device.type == "meta"
