"""diffusers' schedulers through our adapter: against closed forms, our own samplers, and diffusers called by hand."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from triptych_common.diffusion import GaussianDiffusion, NoiseSchedule
from triptych_common.randomness import SampleNoise
from triptych_common.samplers import ddim, ddpm, diffusers_steps, final
from triptych_common.schedulers import available, find, make_scheduler

MEAN, STD = 0.3, 0.5
DIFFUSION = GaussianDiffusion(NoiseSchedule.linear(), variance="fixed_small")
SIGMAS = (1 / DIFFUSION.schedule.alpha_bar - 1).sqrt().numpy()


def alpha_bar_at(t, x):
    sigma = np.interp(t.double().numpy(), np.arange(1000), SIGMAS)
    return torch.from_numpy(1 / (1 + sigma**2)).to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def best_x_0(x, t):
    """E[x_0 | x_t] for data N(MEAN, STD^2), also between timesteps."""
    alpha_bar = alpha_bar_at(t, x)
    return MEAN + alpha_bar.sqrt() * STD**2 * (x - alpha_bar.sqrt() * MEAN) / (alpha_bar * STD**2 + 1 - alpha_bar)


def best_noise(x, t):
    alpha_bar = alpha_bar_at(t, x)
    return (x - alpha_bar.sqrt() * best_x_0(x, t)) / (1 - alpha_bar).sqrt()


class Float64Noise(SampleNoise):
    """Draws in float64, as diffusers does for float64 data; our sampler draws in float32 and casts."""

    def draw(self):
        rows = [torch.randn(self.shape, generator=source, dtype=torch.float64) for source in self.generators]
        return torch.stack(rows)


def noise(n=4, shape=(64,), kind=Float64Noise):
    return kind(0, range(n), shape)


def exact(scheduler):
    """The scheduler on our float64 table: its own is a float32 product of a thousand factors."""
    scheduler.alphas_cumprod = DIFFUSION.schedule.alpha_bar
    return scheduler


@pytest.mark.parametrize("name", available())
def test_every_scheduler_recovers_mean_and_deviation_of_gaussian_data(name):
    steps = 250 if "Ancestral" in name or name.startswith("DDPM") else 100
    scheduler = make_scheduler(name, DIFFUSION, steps)
    x = final(diffusers_steps(best_noise, DIFFUSION, noise(4, (2000,), SampleNoise), scheduler))
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(x.std()) == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize(("name", "eta"), [("DDIMScheduler", 0.0), ("DDPMScheduler", None)])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_and_ddpm_of_diffusers_are_ours_on_the_same_timesteps(name, eta, clip):
    scheduler = exact(make_scheduler(name, DIFFUSION, 50))
    ours = GaussianDiffusion(DIFFUSION.schedule.visiting(scheduler.timesteps.flip(0)), variance="fixed_small")
    assert int(scheduler.timesteps[0]) == 999
    steps = list(diffusers_steps(best_noise, DIFFUSION, noise(), scheduler, clip_x_0=clip))
    sampler = ddpm if eta is None else ddim
    for theirs, step in zip(steps, sampler(best_noise, ours, noise(), clip_x_0=clip), strict=True):
        assert theirs.index == step.index
        torch.testing.assert_close(theirs.x, step.x, rtol=0, atol=1e-9)
        torch.testing.assert_close(theirs.x_0, step.x_0, rtol=0, atol=1e-9)
    assert bool(max(step.x_0.abs().max() for step in steps) <= 1) == clip


def with_variance(x, t):
    return torch.cat([best_noise(x, t), torch.tanh(x)], dim=1)


def test_ddpm_keeps_the_learned_variance_and_others_leave_it_out():
    learned = GaussianDiffusion(DIFFUSION.schedule, variance="learned_range")
    scheduler = exact(make_scheduler("DDPMScheduler", learned, 50))
    ours = GaussianDiffusion(DIFFUSION.schedule.visiting(scheduler.timesteps.flip(0)), variance="learned_range")
    theirs = final(diffusers_steps(with_variance, learned, noise(4, (2, 3, 3)), scheduler))
    torch.testing.assert_close(theirs, final(ddpm(with_variance, ours, noise(4, (2, 3, 3)))), rtol=0, atol=1e-9)
    plain = make_scheduler("DDIMScheduler", DIFFUSION, 20)
    dropped = make_scheduler("DDIMScheduler", learned, 20)
    assert torch.equal(
        final(diffusers_steps(best_noise, DIFFUSION, noise(), plain)),
        final(diffusers_steps(with_variance, learned, noise(), dropped)),
    )


def test_a_model_of_the_clean_sample_gives_what_a_model_of_the_noise_gives():
    of_sample = GaussianDiffusion(DIFFUSION.schedule, predict="sample", variance="fixed_small")
    for name in ("UniPCMultistepScheduler", "EulerDiscreteScheduler"):
        a = final(diffusers_steps(best_noise, DIFFUSION, noise(), make_scheduler(name, DIFFUSION, 20)))
        b = final(diffusers_steps(best_x_0, of_sample, noise(), make_scheduler(name, of_sample, 20)))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # Euler computes in float32


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_the_result_is_that_of_diffusers_called_by_hand(name):
    import diffusers

    betas = np.linspace(1e-4, 0.02, 1000).tolist()
    by_hand = getattr(diffusers, name)(trained_betas=betas)
    by_hand.set_timesteps(20)
    source = noise(kind=SampleNoise)
    x = source.draw() * by_hand.init_noise_sigma
    for t in by_hand.timesteps:
        scaled = by_hand.scale_model_input(x, t)
        x = by_hand.step(best_noise(scaled, t.expand(4)), t, x, generator=source.generators, return_dict=False)[0]
    ours = final(diffusers_steps(best_noise, DIFFUSION, noise(kind=SampleNoise), make_scheduler(name, DIFFUSION, 20)))
    assert torch.equal(ours, x)


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "SASolverScheduler", "DDPMScheduler"])
def test_a_sample_depends_on_its_index_alone(name):
    def run(indices):
        source = SampleNoise(3, indices, (5, 5))
        return final(diffusers_steps(best_noise, DIFFUSION, source, make_scheduler(name, DIFFUSION, 12)))

    whole = run(range(5))
    torch.testing.assert_close(torch.cat([run([0]), run(range(1, 3)), run([3, 4])]), whole, rtol=0, atol=1e-6)
    assert float((whole[0] - whole[1]).abs().max()) > 0.1


def test_clipping_bounds_what_the_model_believes():
    scheduler = make_scheduler("HeunDiscreteScheduler", DIFFUSION, 10)
    steps = list(diffusers_steps(best_noise, DIFFUSION, noise(), scheduler, clip_x_0=True))
    assert len(steps) == 19  # two evaluations per step, but one for the last
    assert max(float(step.x_0.abs().max()) for step in steps) <= 1
    assert float(steps[0].x.std()) < 2  # scaled as the model's input, unlike diffusers' 157


@pytest.mark.parametrize(("name", "expected"), [
    ("EulerDiscreteScheduler", "EulerDiscreteScheduler"), ("eulerdiscrete", "EulerDiscreteScheduler"),
    ("unipc", "UniPCMultistepScheduler"), ("DDIMScheduler", "DDIMScheduler"), ("ddim", "DDIMScheduler"),
])  # fmt: skip
def test_a_scheduler_is_found_by_its_name_or_the_beginning_of_it(name, expected):
    assert find(name) == expected


@pytest.mark.parametrize(("name", "message"), [
    ("nothing", "sampler 'nothing': expected ddpm, ddim, or one of diffusers' DDIMParallelScheduler, DDIMScheduler"),
    ("euler", "one of diffusers' EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, or a beginning"),
    ("", "sampler ''"), ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"),
    ("LCMScheduler", "expected ddpm"), ("DDIMInverseScheduler", "expected ddpm"), ("SchedulerMixin", "expected ddpm"),
])  # fmt: skip
def test_an_unknown_scheduler_is_one_line_that_lists_them(name, message):
    with pytest.raises(ValueError, match="expected ddpm") as error:
        find(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "steps"), [("pndm", 2), ("eulerd", 1), ("kdpm2a", 2), ("unipc", 1001)])
def test_a_number_of_steps_that_cannot_work_is_refused(name, steps):
    with pytest.raises(ValueError, match=f"num_inference_steps {steps}"):
        make_scheduler(name, DIFFUSION, steps)


def test_without_diffusers_the_remedy_is_named():
    script = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from triptych_common.schedulers import find\n"
        "try: find('unipc')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "pip install 'triptych-common[schedulers]'" in done.stdout, done.stderr
