"""Gaussian diffusion: the noise schedule, the forward process, its posterior, and the training loss.

Formulas follow "Denoising Diffusion Probabilistic Models" (DDPM, 2020) and "Improved DDPM" (2021), as does section 2.3.1
of the thesis. Every coefficient is a float64 table; a lookup gathers in float64 and then casts to the data's dtype.
"""

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Predict = Literal["noise", "sample"]
Variance = Literal["learned_range", "fixed_large", "fixed_small"]
DecoderLikelihood = Literal["discretized", "gaussian"]
Data = Float[Tensor, "batch *dims"]
Images = Float[Tensor, "batch channels *space"]
Output = Float[Tensor, "batch outputs *space"]  # of a network: the prediction, then the channels of a learned variance
Steps = Int[Tensor, " batch"]  # the index t of each sample's step in the schedule


class NoiseSchedule:
    """Tables of a discrete diffusion process with T steps, all float64 of shape (T,).

    timesteps: the step of the training process that each step stands for, since a model always takes timesteps of the
        process it was trained on, also after `respaced`; by default 0..T-1.
    Raises ValueError for betas outside (0, 1].
    """

    def __init__(self, betas: Float[Tensor, " T"], timesteps: Int[Tensor, " T"] | None = None) -> None:
        # In float32 the product of a thousand factors, and 1 - alpha_bar at the first steps, would lose digits.
        betas = betas.to(torch.float64)
        if betas.ndim != 1 or not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError("betas: expected a vector with every value in (0, 1]")
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        self.betas, self.alpha_bar, self.alpha_bar_prev = betas, alpha_bar, previous
        self.timesteps = torch.arange(len(betas)) if timesteps is None else timesteps
        self.posterior_variance = betas * (1 - previous) / (1 - alpha_bar)
        # Step 0 has zero posterior variance; its logarithm borrows step 1's so that a learned range can use it.
        first = self.posterior_variance[1:2] if len(betas) > 1 else betas[:1]
        self.log_posterior_variance = torch.log(torch.cat([first, self.posterior_variance[1:]]))
        self.posterior_coef_x0 = betas * previous.sqrt() / (1 - alpha_bar)
        self.posterior_coef_xt = (1 - previous) * (1 - betas).sqrt() / (1 - alpha_bar)

    @classmethod
    def linear(cls, num_steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> "NoiseSchedule":
        """Betas from `start` to `end` in equal steps: the schedule of DDPM, DiT and G.pt."""
        return cls(torch.linspace(start, end, num_steps, dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.betas)

    def respaced(self, num_inference_steps: int) -> "NoiseSchedule":
        """The process that visits only `num_inference_steps` of this one's steps, first and last included.

        Steps are rounded from a fractional stride (250 of 1000: 0, 4, 8, ..., 995, 999), as in the released DiT sampler; a
        single step is the last, the noisiest. Raises ValueError for a count outside 1..T.
        """
        total = len(self)
        if not 1 <= num_inference_steps <= total:
            raise ValueError(
                f"num_inference_steps {num_inference_steps}: expected 1..{total}, the schedule has {total} steps"
            )
        if num_inference_steps == 1:
            return self.visiting(torch.tensor([total - 1]))
        stride = (total - 1) / (num_inference_steps - 1)
        # The released sampler sums strides. Multiplying them instead would round some half-way steps differently.
        steps = torch.tensor([round(step) for step in accumulate([0.0] + [stride] * (num_inference_steps - 1))])
        return self.visiting(steps)

    def visiting(self, steps: Int[Tensor, " S"]) -> "NoiseSchedule":
        """The process that visits the given increasing steps of this one, with the same alpha_bar at each."""
        # beta is whatever leads from one visited step's alpha_bar to the next one's.  [Improved DDPM eq. 19]
        alpha_bar = self.alpha_bar[steps]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        return NoiseSchedule(1 - alpha_bar / previous, self.timesteps[steps])


class PosteriorParams(NamedTuple):
    """Mean and log-variance of p(x_{t-1} | x_t), and the model's estimate of the clean data; shapes broadcast to x_t's."""

    mean: Tensor
    log_variance: Tensor
    x_0: Tensor


class Loss(NamedTuple):
    """Per-sample losses, each of shape (batch,). Training minimises the mean of `total`, which is mse + vb."""

    total: Tensor
    mse: Tensor
    vb: Tensor  # bits per dimension; zeros where the variance is fixed


@dataclass(frozen=True)
class GaussianDiffusion:
    """The meaning of a network's output, and its training loss.

        diffusion = GaussianDiffusion(NoiseSchedule.linear(1000))
        x_t = diffusion.q_sample(x_0, t, noise)
        loss = diffusion.loss(model(x_t, t), x_0, x_t, t, noise).total.mean()

    predict: the network outputs the noise in x_t, or the clean sample x_0.
    variance: "learned_range" interpolates the log-variance between the posterior's (v = -1) and beta's (v = 1), where v is
        the second half of the output channels; "fixed_large" is beta, "fixed_small" the posterior variance.
    decoder: likelihood of x_0 in the last term of the bound: "discretized" into bins of width 2/255 (8-bit data in
        [-1, 1]; the released DiT uses it for latents too) or a plain "gaussian" density.
    """

    schedule: NoiseSchedule
    predict: Predict = "noise"
    variance: Variance = "learned_range"
    decoder: DecoderLikelihood = "discretized"

    def respaced(self, num_inference_steps: int) -> "GaussianDiffusion":
        """The same diffusion over fewer steps; see `NoiseSchedule.respaced`."""
        return replace(self, schedule=self.schedule.respaced(num_inference_steps))

    def q_sample(self, x_0: Data, t: Steps, noise: Data) -> Data:
        """Add noise to clean data up to step t: sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise.  [thesis 2.3.1]"""
        alpha_bar = self.schedule.alpha_bar
        return gather(alpha_bar.sqrt(), t, x_0) * x_0 + gather((1 - alpha_bar).sqrt(), t, x_0) * noise

    def q_posterior_mean(self, x_0: Data, x_t: Data, t: Steps) -> Data:
        """Mean of q(x_{t-1} | x_t, x_0).  [DDPM eq. 7]"""
        s = self.schedule
        return gather(s.posterior_coef_x0, t, x_t) * x_0 + gather(s.posterior_coef_xt, t, x_t) * x_t

    def x_0_from_noise(self, x_t: Data, t: Steps, noise: Data) -> Data:
        """Invert `q_sample` for x_0."""
        alpha_bar = self.schedule.alpha_bar
        return gather(alpha_bar.rsqrt(), t, x_t) * x_t - gather((1 / alpha_bar - 1).sqrt(), t, x_t) * noise

    def noise_from_x_0(self, x_t: Data, t: Steps, x_0: Data) -> Data:
        """Invert `q_sample` for the noise."""
        alpha_bar = self.schedule.alpha_bar
        return (gather(alpha_bar.rsqrt(), t, x_t) * x_t - x_0) / gather((1 / alpha_bar - 1).sqrt(), t, x_t)

    def split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split a network output into the prediction and the variance channels (None if the variance is fixed).

        Raises ValueError when the output's channels do not fit x_t and `variance`.
        """
        channels = x_t.shape[1]
        expected = 2 * channels if self.variance == "learned_range" else channels
        if output.shape[1] != expected:
            raise ValueError(
                f"network output has {output.shape[1]} channels for data of {channels}: variance={self.variance!r} "
                f"needs {expected}; set learn_sigma to match"
            )
        return (output[:, :channels], output[:, channels:]) if expected != channels else (output, None)

    def log_variance(self, t: Steps, x_t: Tensor, learned: Tensor | None) -> Tensor:
        """Log-variance of p(x_{t-1} | x_t), broadcastable to x_t; `learned` is v in [-1, 1].  [Improved DDPM eq. 15]"""
        s = self.schedule
        low = gather(s.log_posterior_variance, t, x_t)
        if self.variance == "fixed_small":
            return low
        if self.variance == "fixed_large":  # beta, with the posterior's value at the last step, as in DDPM
            return gather(torch.cat([s.log_posterior_variance[:1], s.betas[1:].log()]), t, x_t)
        assert learned is not None  # `split` returns it for a learned variance
        # Interpolation of logarithms between the two bounds on the optimal variance; nothing keeps v within [-1, 1].
        fraction = (learned + 1) / 2
        return fraction * gather(s.betas.log(), t, x_t) + (1 - fraction) * low

    def p_params(self, output: Output, x_t: Images, t: Steps, *, clip_x_0: bool = False) -> PosteriorParams:
        """Parameters of the reverse step, computed from a network output; `clip_x_0` clips the estimate to [-1, 1]."""
        prediction, learned = self.split(output, x_t)
        x_0 = prediction if self.predict == "sample" else self.x_0_from_noise(x_t, t, prediction)
        if clip_x_0:
            x_0 = x_0.clamp(-1, 1)
        return PosteriorParams(self.q_posterior_mean(x_0, x_t, t), self.log_variance(t, x_t, learned), x_0)

    def loss(self, output: Output, x_0: Images, x_t: Images, t: Steps, noise: Images) -> Loss:
        """Mean squared error of the prediction, plus the variational bound when the variance is learned.

        The weight of the bound is 1 on the full schedule.  [thesis 2.3.1; Improved DDPM eq. 16]
        """
        prediction, learned = self.split(output, x_t)
        target = noise if self.predict == "noise" else x_0
        mse = _mean(torch.square(target - prediction))
        if learned is None:
            return Loss(mse, mse, torch.zeros_like(mse))
        # The mean is detached, so that the bound, a noisier objective than the error, trains the variance alone.
        vb = self.variational_bound(torch.cat([prediction.detach(), learned], dim=1), x_0, x_t, t)
        return Loss(mse + vb, mse, vb)

    def variational_bound(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Steps) -> Tensor:
        """One term of the bound per sample, bits per dimension: KL to the posterior, or at t = 0 the NLL of x_0."""
        p = self.p_params(output, x_t, t)
        true_log_variance = gather(self.schedule.log_posterior_variance, t, x_t)
        kl = normal_kl(self.q_posterior_mean(x_0, x_t, t), true_log_variance, p.mean, p.log_variance)
        if self.decoder == "discretized":
            nll = -discretized_log_likelihood(x_0, p.mean, 0.5 * p.log_variance)
        else:
            nll = 0.5 * (math.log(2 * math.pi) + p.log_variance + (x_0 - p.mean) ** 2 * torch.exp(-p.log_variance))
        return torch.where((t == 0).to(kl.device), _mean(nll), _mean(kl)) / math.log(2)


def gather(table: Float[Tensor, " T"], t: Steps, like: Tensor) -> Tensor:
    """table[t] with the dtype and device of `like`, shaped (batch, 1, 1, ...) to broadcast against it."""
    values = table[t.to(table.device)].to(like.dtype).to(like.device)
    return values.view(-1, *[1] * (like.ndim - 1))


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) of two Gaussians, elementwise, in nats."""
    gap = log_variance2 - log_variance1
    return 0.5 * (gap + torch.exp(-gap) + (mean1 - mean2) ** 2 * torch.exp(-log_variance2) - 1)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of 8-bit data in [-1, 1] under a Gaussian, elementwise, in nats.  [DDPM eq. 13]

    Bins have half-width 1/255; the first and the last extend to infinity. log_scale: log standard deviation.
    """

    def cdf(values: Tensor) -> Tensor:
        return torch.special.ndtr(values * torch.exp(-log_scale))

    centred = x - mean
    above, below = cdf(centred + 1 / 255), cdf(centred - 1 / 255)
    # Far out in the tails float32 rounds probabilities to zero, hence the floor.
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)
