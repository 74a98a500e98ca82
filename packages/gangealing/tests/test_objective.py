"""Losses of adversarial training against closed forms on linear networks and finite differences, and what a sample is made of.

All in float64, on images of 8 x 8.
"""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from triptych_common import randomness
from triptych_common.parallel import Ranks
from triptych_common.training import Batch, TrainState
from triptych_gangealing.stylegan2 import train
from triptych_gangealing.stylegan2.augment import PRESETS, augment
from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
from triptych_gangealing.stylegan2.data import TrainingImages
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.objective import Objective
from triptych_gangealing.stylegan2.train import Pass, adversarial_step, make_state
from triptych_gangealing.stylegan2.train_config import GanTrainConfig

ALONE = Ranks(0, 1, torch.device("cpu"))
SIDE, PIXELS, STYLES = 8, 3 * 8 * 8, 4
SEED = 3


def few_images(labels=(0,) * 10, seed=0):
    """Random pictures as a training set."""
    pixels = torch.randint(0, 256, (len(labels), 3, SIDE, SIDE), dtype=torch.uint8, generator=rng(seed))
    numbers = torch.tensor(labels)

    class Few(TrainingImages):
        labels, num_classes, resolution = numbers, int(numbers.max()) + 1, SIDE

        def __init__(self):
            pass

        def __len__(self):
            return len(numbers)

        def batch(self, indices):
            return pixels[indices]

    return Few()


def rng(seed):
    return torch.Generator().manual_seed(seed)


def config_of(**options):
    settings = {"augment": "none", "path_length_weight": 2.0, "style_mixing": 0.9, "mbstd_group_size": 4, **options}
    return GanTrainConfig(
        resolution=SIDE, channel_base=32, channel_max=4, z_dim=5, mapping_layers=1, batch_size=8, precision="float64",
        seed=SEED, **settings,
    )  # fmt: skip


class LinearGenerator(Generator):
    """w is z and class side by side, cut to size; images are a sum over layers of a matrix times the layer's style."""

    def __init__(self, c_dim=0):
        nn.Module.__init__(self)
        self.config = GeneratorConfig(SIDE, z_dim=5, w_dim=5, c_dim=c_dim)
        self.matrices = nn.Parameter(torch.randn(STYLES, PIXELS, 5, dtype=torch.float64, generator=rng(1)))
        self.given = []
        self.synthesis = Painter(self)

    def mapping(self, z, c):
        self.given.append(c)
        return z.clone().requires_grad_()


class Painter(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self._matrices = [generator.matrices]  # in a list, not to register it twice

    def noise(self, seed, stream, indices):
        return torch.zeros(len(indices), 0)

    def forward(self, ws, *, noise):
        return torch.einsum("lpw,nlw->np", self._matrices[0], ws).view(-1, 3, SIDE, SIDE)


class LinearDiscriminator(Discriminator):
    """<weight, image>, or <weight, image^2> / 2 where `power` is 2."""

    def __init__(self, power=1, scale=0.02):
        nn.Module.__init__(self)
        self.config, self.power, self.seen = DiscriminatorConfig(SIDE), power, []
        self.weight = nn.Parameter(scale * torch.randn(3, SIDE, SIDE, dtype=torch.float64, generator=rng(2)))

    def forward(self, images, c=None):
        self.seen.append((images.detach(), c))
        return (images**self.power / self.power * self.weight).sum(dim=(1, 2, 3))


def linear(config=None, power=1, c_dim=0, images=None):
    config, images = config or config_of(), images or few_images()
    return Objective(config, images, LinearGenerator(c_dim), LinearDiscriminator(power))


def real_networks(config, images=None):
    state = make_state(config, ALONE, images or few_images())
    return Objective(config, images or few_images(), state.model["generator"], state.model["discriminator"]), state


# --- losses


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def test_losses_of_a_linear_discriminator_are_the_non_saturating_ones():
    objective, counters = linear(), range(20, 32)
    fakes = objective.generated("generator", counters)[0]
    weight = objective.discriminator.weight.detach()
    logits = (fakes * weight).flatten(1).sum(1).detach().numpy()
    loss, mean_w = objective.generator_loss(counters, 0.0)
    assert loss.item() == pytest.approx(float(softplus(-logits).mean()), rel=1e-12)
    latents = randomness.normal(SEED, "generator/z", counters, (5,), dtype=torch.float64)
    torch.testing.assert_close(mean_w, latents.mean(0), rtol=0, atol=1e-14)

    others = (objective.generated("discriminator", counters)[0] * weight).flatten(1).sum(1).detach().numpy()
    reals = (objective.real(counters)[0] * weight).flatten(1).sum(1).detach().numpy()
    loss, sign = objective.discriminator_loss(counters, 0.0)
    assert loss.item() == pytest.approx(float(softplus(others).mean() + softplus(-reals).mean()), rel=1e-12)
    assert float(sign) == pytest.approx(float(np.sign(reals).mean()))
    assert np.unique(np.sign(reals)).tolist() == [-1, 1]  # or the line above could not tell
    loss.backward()
    assert objective.generator.matrices.grad is None  # the generator is not asked how to please here
    d_reals = -1 / (1 + np.exp(reals)) / len(counters)
    d_others = 1 / (1 + np.exp(-others)) / len(counters)
    images = torch.cat([objective.real(counters)[0], objective.generated("discriminator", counters)[0]]).detach()
    expected = torch.einsum("n,nchw->chw", torch.from_numpy(np.concatenate([d_reals, d_others])), images)
    torch.testing.assert_close(objective.discriminator.weight.grad, expected, rtol=0, atol=1e-12)


def test_r1_is_the_squared_norm_of_a_known_gradient():
    objective, counters = linear(), range(12)
    weight = objective.discriminator.weight.detach()
    assert objective.r1_penalty(counters, 0.0).item() == pytest.approx(float(weight.square().sum()), rel=1e-12)
    quadratic = linear(power=2)  # whose gradient is weight * image
    expected = (quadratic.real(counters)[0] * weight).square().flatten(1).sum(1).mean()
    penalty = quadratic.r1_penalty(counters, 0.0)
    assert penalty.item() == pytest.approx(float(expected), rel=1e-12)
    penalty.backward()  # d/dweight of mean(weight^2 image^2)
    by_hand = 2 * weight * quadratic.real(counters)[0].square().mean(0)
    torch.testing.assert_close(quadratic.discriminator.weight.grad, by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.8])
def test_r1_of_a_real_discriminator_by_finite_differences(p):
    """Through the augmentation and the minibatch standard deviation, for every pixel of a pair of images."""
    objective, _ = real_networks(config_of(augment="bgc", mbstd_group_size=2))
    counters, epsilon = [4, 5], 1e-5
    images = objective.real(counters)[0].detach()
    moves = epsilon * torch.eye(images.numel(), dtype=torch.float64).view(-1, *images.shape)
    pairs = torch.cat([images + moves, images - moves])  # pairs, first or second, colour, row, column
    batch = pairs.transpose(0, 1).flatten(
        0, 1
    )  # all the first ones, then all the second: image i is in group i mod n / 2
    if p:
        each = [counter for counter in counters for _ in pairs]
        batch = augment(batch, p, SEED, "discriminator/real/augment", each, PRESETS["bgc"])
    with torch.no_grad():
        up, down = objective.discriminator(batch).view(2, -1).sum(0).chunk(2)
    expected = float(((up - down) / (2 * epsilon)).square().sum()) / len(images)
    penalty = float(objective.r1_penalty(counters, p).detach())
    assert penalty > 1e-4
    assert penalty == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["r1", "path_length"])
def test_penalties_have_the_gradient_of_finite_differences(name):
    """Second derivatives, along a random direction in the weights."""
    objective, _ = real_networks(config_of(augment="bgc"))
    network = objective.discriminator if name == "r1" else objective.generator
    mean = torch.tensor(0.3, dtype=torch.float64)

    def penalty():
        if name == "r1":
            return objective.r1_penalty(range(8), 0.5)
        return objective.path_length_penalty(range(8), mean)[0]

    parameters = list(network.parameters())
    penalty().backward()
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=rng(i)) for i, p in enumerate(parameters)]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True) if p.grad is not None)
    values, epsilon = [], 1e-6
    for sign in (1, -2):  # up by one, then down by two
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += sign * epsilon * d
        values.append(float(penalty().detach()))
    assert abs(slope) > 1e-5
    assert slope == pytest.approx((values[0] - values[1]) / (2 * epsilon), rel=1e-4)


def test_path_lengths_of_a_linear_generator_have_a_closed_form():
    objective, counters, mean = linear(), range(30, 38), torch.tensor(1.5, dtype=torch.float64)
    y = randomness.normal(SEED, "path/y", counters, (3, SIDE, SIDE), dtype=torch.float64).flatten(1) / SIDE
    matrices = objective.generator.matrices.detach()
    lengths = torch.einsum("lpw,np->nlw", matrices, y).square().sum(2).mean(1).sqrt()
    penalty, observed = objective.path_length_penalty(counters, mean)
    assert penalty.item() == pytest.approx(float((lengths - 1.5).square().mean()), rel=1e-12)
    assert float(observed) == pytest.approx(float(lengths.mean()), rel=1e-12)
    penalty.backward()  # of length a in the matrix M: M^T y y / (layers * a), y the row
    outer = torch.einsum("n,np,lqw,nq->lpw", 2 * (lengths - 1.5) / lengths / (8 * STYLES), y, matrices, y)
    torch.testing.assert_close(objective.generator.matrices.grad, outer, rtol=0, atol=1e-12)


# --- samples


def styles_of(objective, counters):
    return objective.generated("generator", counters)[2].detach()


def test_style_mixing_replaces_later_layers_at_its_rate_from_a_uniform_cut():
    counters = range(4000)
    objective = linear(config_of(style_mixing=0.9))
    ws = styles_of(objective, counters)
    own, other = (randomness.normal(SEED, f"generator/{z}", counters, (5,), dtype=torch.float64)
                  for z in ("z", "z-mixed"))  # fmt: skip
    is_own, is_other = ((ws == w[:, None]).all(2) for w in (own, other))
    assert (is_own ^ is_other).all()
    assert is_own[:, 0].all()  # the first layer is never replaced
    assert (is_other[:, :-1] <= is_other[:, 1:]).all()  # once replaced, replaced to the end
    mixed = is_other[:, -1]
    assert stats.binomtest(int(mixed.sum()), len(ws), 0.9).pvalue > 0.001
    cuts = is_own[mixed].sum(1)
    assert sorted(Counter(cuts.tolist())) == [1, 2, 3]
    assert stats.chisquare(list(Counter(cuts.tolist()).values())).pvalue > 0.001


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_style_mixing_never_or_always(share):
    ws = styles_of(linear(config_of(style_mixing=share)), range(200))
    assert bool((ws[:, 0] != ws[:, -1]).any(1).all()) == bool(share)
    assert bool((ws[:, 0] == ws[:, -1]).all()) != bool(share)


@pytest.mark.parametrize("noise", [True, False])
def test_noise_can_be_left_out_of_training(noise):
    """Without it, strengths get no gradient: they stay at zero, where a generator gives the same with noise and without."""
    objective, _ = real_networks(config_of(noise=noise), few_images((0, 0)))
    strengths = [p for name, p in objective.generator.named_parameters() if name.endswith("noise_strength")]
    objective.generator_loss(range(8), 0.0)[0].backward()
    moved = [p.grad is not None and float(p.grad) != 0 for p in strengths]
    assert len(moved) == 3
    assert all(moved) if noise else not any(moved)


def test_a_sample_is_the_same_in_any_batch():
    labels = (0, 1, 2, 1, 0, 2, 2)
    images = few_images(labels)
    objective, _ = real_networks(config_of(conditional=True), images)
    with torch.no_grad():
        objective.generator.synthesis.b8.conv0.noise_strength.fill_(0.5)
        whole = [*objective.generated("generator", range(40, 48)), *objective.real(range(40, 48))]
        for part in ([40, 41, 42], [43], [47, 45, 46, 44]):
            again = [*objective.generated("generator", part), *objective.real(part)]
            for a, b in zip(again, whole, strict=True):
                torch.testing.assert_close(a, b[[c - 40 for c in part]], rtol=0, atol=1e-12)
        other = objective.generated("discriminator", range(40, 48))[0]
        assert not torch.equal(other, whole[0])  # the two players see other samples


def test_classes_are_as_frequent_as_in_the_data_and_the_same_for_both_networks():
    images = few_images((0,) * 70 + (1,) * 20 + (2,) * 10)
    config = config_of(conditional=True)
    objective, counters = linear(config, c_dim=3, images=images), range(3000)
    objective.generator_loss(counters, 0.0)
    classes = objective.discriminator.seen[0][1]
    counts = classes.sum(0).tolist()
    assert sum(counts) == 3000
    assert stats.chisquare(counts, [2100, 600, 300]).pvalue > 0.001
    assert all(torch.equal(c, classes) for c in objective.generator.given)
    assert objective.generator.given != []


def test_real_images_come_once_an_epoch_from_minus_one_to_one_with_their_labels():
    images = few_images(tuple(range(10)))
    with_extremes = images.batch(torch.arange(10))
    with_extremes[0, :, 0, 0] = 0
    objective = linear(config_of(conditional=True), c_dim=10, images=images)
    real, c = objective.real(range(20, 30))
    order = c.argmax(1)
    assert sorted(order.tolist()) == list(range(10))
    torch.testing.assert_close((real + 1) * 127.5, images.batch(order).double(), rtol=0, atol=1e-9)
    assert not torch.equal(objective.real(range(30, 40))[1], c)
    assert real.dtype == torch.float64


def test_a_group_of_the_minibatch_deviation_is_of_consecutive_counters():
    """The losses of a batch are those of its groups: nothing else of a batch matters to a sample."""
    objective, _ = real_networks(config_of(mbstd_group_size=4))
    counters, groups = range(12), [range(i, i + 4) for i in (0, 4, 8)]
    with torch.no_grad():
        for loss in (lambda part: objective.generator_loss(part, 0.0)[0],
                     lambda part: objective.discriminator_loss(part, 0.0)[0],):  # fmt: skip
            apart = sum(loss(group) for group in groups) / 3
            torch.testing.assert_close(loss(counters), apart, rtol=0, atol=1e-12)
            shuffled = [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
            assert abs(loss(shuffled) - apart) > 1e-9  # or the line above could not tell groups apart
    penalties = sum(objective.r1_penalty(group, 0.0) for group in groups) / 3
    torch.testing.assert_close(objective.r1_penalty(counters, 0.0), penalties, rtol=0, atol=1e-12)


# --- passes


def test_adam_is_corrected_for_lazy_regularisation():
    config = config_of(lr=0.01, path_length_every=4, r1_every=16)
    generator, discriminator = real_networks(config)[1].optimizer.param_groups
    assert generator["lr"] == pytest.approx(0.008)
    assert generator["betas"] == pytest.approx((0, 0.99**0.8))
    assert discriminator["lr"] == pytest.approx(0.01 * 16 / 17)
    assert discriminator["betas"] == pytest.approx((0, 0.99 ** (16 / 17)))
    assert generator["eps"] == discriminator["eps"] == 1e-8
    apart = real_networks(config_of(lr=0.01, discriminator_lr=0.02))[1].optimizer.param_groups
    assert [group["lr"] for group in apart] == pytest.approx([0.008, 0.02 * 16 / 17])


def gradients_of_steps(monkeypatch, objective, state, steps):
    """Per step and pass: the gradients that came, after which nothing moves."""
    found = {step: [] for step in steps}
    for step in steps:

        def keep(step=step):
            named = state.model.named_parameters()
            found[step].append({name: p.grad.clone() for name, p in named if p.grad is not None})
            state.optimizer.zero_grad(set_to_none=True)
            return torch.zeros(()), True

        monkeypatch.setattr(state, "optimise", keep)
        adversarial_step(state, objective, Batch(step, 8, range(8 * step, 8 * step + 8)))
    return found


def gradient(loss, network, name):
    """Of a loss in a network's parameters, by their names in the model."""
    named = [(f"{name}.{key}", p) for key, p in network.named_parameters()]
    values = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {key: value for (key, _), value in zip(named, values, strict=True) if value is not None}


def test_a_step_has_up_to_four_passes_and_lazy_ones_weigh_as_much_more(monkeypatch):
    config = config_of(path_length_every=4, r1_every=16, path_length_weight=3.0, r1_gamma=5.0)
    objective, state = real_networks(config)
    found = gradients_of_steps(monkeypatch, objective, state, [0, 1, 4, 16])
    assert {step: len(passes) for step, passes in found.items()} == {0: 4, 1: 2, 4: 3, 16: 4}
    statistics, generator, discriminator = state.model["statistics"], objective.generator, objective.discriminator
    zero = torch.zeros((), dtype=torch.float64)
    expected = [
        gradient(objective.generator_loss(range(8), 0.0)[0], generator, "generator"),
        gradient(3.0 * 4 * objective.path_length_penalty([0, 2, 4, 6], zero)[0], generator, "generator"),
        gradient(objective.discriminator_loss(range(8), 0.0)[0], discriminator, "discriminator"),
        gradient(5.0 / 2 * 16 * objective.r1_penalty(range(8), 0.0), discriminator, "discriminator"),
    ]
    for got, wanted in zip(found[0], expected, strict=True):
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-14, msg=name)
    assert all(p.requires_grad for p in state.model.parameters())
    assert float(statistics.path_length) > 0


def test_running_means_are_of_w_and_of_path_lengths(monkeypatch):
    objective, state = real_networks(config_of())
    statistics, w_avg, length = state.model["statistics"], torch.zeros(5, dtype=torch.float64), 0.0
    monkeypatch.setattr(state, "optimise", lambda: (state.optimizer.zero_grad(), (torch.zeros(()), True))[1])
    for step in range(9):
        counters = range(8 * step, 8 * step + 8)
        if step % 4 == 0:
            mean = torch.tensor(length, dtype=torch.float64)
            length = 0.99 * length + 0.01 * float(objective.path_length_penalty(counters[::2], mean)[1])
        z = randomness.normal(SEED, "generator/z", counters, (5,), dtype=torch.float64)
        w_avg = 0.995 * w_avg + 0.005 * objective.generator.mapping(z).mean(0).detach()
        adversarial_step(state, objective, Batch(step, 8, counters))
    torch.testing.assert_close(objective.generator.mapping.w_avg, w_avg, rtol=0, atol=1e-14)
    assert float(statistics.path_length) == pytest.approx(length, rel=1e-12)
    torch.testing.assert_close(state.ema.mapping.w_avg, w_avg, rtol=0, atol=1e-14)  # not averaged once more


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, None), (2, None), (4, None), (8, None), (1, 4), (1, 1), (2, 1)])
def test_path_lengths_are_of_every_second_sample_however_a_batch_is_divided(ranks, micro_batch):
    """Ranks one after the other here; the mean of their gradients is what the whole batch gives."""
    scale = torch.nn.Linear(1, 1, bias=False).double()
    values = torch.arange(100, dtype=torch.float64).square()
    model = nn.ModuleDict({"generator": scale, "discriminator": nn.Linear(1, 1)})
    state = TrainState(model, torch.optim.SGD(model.parameters()), ALONE, ema_half_life=1, several_passes=True)
    seen, gradients, losses = [], [], []

    def loss(counters):
        seen.extend(counters)
        mean = values[list(counters)].mean()
        return scale.weight.sum() * mean, mean

    for rank in range(ranks):
        size = 8 // ranks
        batch = Batch(5, 8, range(40 + rank * size, 40 + (rank + 1) * size))
        scale.zero_grad()
        play = Pass("generator", 1, 10.0, loss, stride=2)
        losses.append(train._pass(state, batch, play, micro_batch)[1])
        gradients.append(float(scale.weight.grad))
    expected = float(values[[40, 42, 44, 46]].mean())
    assert {40, 42, 44, 46} <= set(seen)
    assert sum(map(float, losses)) / ranks == pytest.approx(expected, rel=1e-12)
    assert sum(gradients) / ranks == pytest.approx(10 * expected, rel=1e-12)
    assert all(not math.isnan(g) for g in gradients)
