"""Rosinality's checkpoints compute here what they compute there: a forward pass on their names, written out in this file."""

import argparse
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.rosinality import fixed_widths, to_rosinality
from triptych_gangealing.stylegan2.weights import load_discriminator, load_generator, open_networks

WIDTHS = {4: 12, 8: 12, 16: 8}
STYLE, LAYERS = 20, 3
KERNEL = torch.tensor([1.0, 3.0, 3.0, 1.0]).outer(torch.tensor([1.0, 3.0, 3.0, 1.0])) / 64


def modulated(name: str, into: int, out: int, size: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.weight": (1, out, into, size, size),
        f"{name}.modulation.weight": (into, STYLE),
        f"{name}.modulation.bias": (into,),
    }


def generator_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A g_ema as their code would save it; nothing in it is zero."""
    shapes = {"input.input": (1, WIDTHS[4], 4, 4)}
    for i in range(1, LAYERS + 1):
        shapes |= {f"style.{i}.weight": (STYLE, STYLE), f"style.{i}.bias": (STYLE,)}
    convs = [
        ("conv1", 12, 12, 4),
        ("convs.0", 12, 12, 8),
        ("convs.1", 12, 12, 8),
        ("convs.2", 12, 8, 16),
        ("convs.3", 8, 8, 16),
    ]
    for i, (name, into, out, resolution) in enumerate(convs):
        shapes |= modulated(f"{name}.conv", into, out, 3)
        shapes |= {f"{name}.noise.weight": (1,), f"{name}.activate.bias": (out,)}
        shapes[f"noises.noise_{i}"] = (1, 1, resolution, resolution)
    for name, into in [("to_rgb1", 12), ("to_rgbs.0", 12), ("to_rgbs.1", 8)]:
        shapes |= modulated(f"{name}.conv", into, 3, 1)
        shapes[f"{name}.bias"] = (1, 3, 1, 1)
    rng = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    for name in state:
        if name.startswith("style.") and name.endswith("weight"):
            state[name] *= 100  # as they are stored at a learning rate of 0.01
    for k in (0, 1):
        state |= {f"convs.{2 * k}.conv.blur.kernel": 4 * KERNEL, f"to_rgbs.{k}.upsample.kernel": 4 * KERNEL}
    return state


def filtered(x: torch.Tensor, kernel: torch.Tensor, up: int, pad: tuple[int, int]) -> torch.Tensor:
    """Zeros in between, zeros around, then a true convolution."""
    n, channels, height, width = x.shape
    spread = x.new_zeros(n, channels, height, up, width, up)
    spread[:, :, :, 0, :, 0] = x
    spread = F.pad(spread.reshape(n * channels, 1, height * up, width * up), pad * 2)
    out = F.conv2d(spread, kernel.flip(0, 1)[None, None])
    return out.reshape(n, channels, *out.shape[2:])


def reference_images(state: dict[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    state = {name: value.double() for name, value in state.items()}

    def lrelu(x):
        return F.leaky_relu(x, 0.2) * math.sqrt(2)

    def convolved(name, x, w, *, demodulate=True, up=False):
        weight = state[f"{name}.weight"][0]
        style = w @ state[f"{name}.modulation.weight"].T / math.sqrt(STYLE) + state[f"{name}.modulation.bias"]
        images = []
        for image, s in zip(x, style, strict=True):
            kernel = weight / math.sqrt(weight[0].numel()) * s[None, :, None, None]
            if demodulate:
                kernel = kernel / (kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
            if up:
                y = F.conv_transpose2d(image[None], kernel.transpose(0, 1), stride=2)
                images.append(filtered(y, state[f"{name}.blur.kernel"], 1, (1, 1)))
            else:
                images.append(F.conv2d(image[None], kernel, padding=kernel.shape[-1] // 2))
        return torch.cat(images)

    def styled(name, i, x, w, up=False):
        x = convolved(f"{name}.conv", x, w, up=up) + state[f"{name}.noise.weight"] * state[f"noises.noise_{i}"]
        return lrelu(x + state[f"{name}.activate.bias"].view(1, -1, 1, 1))

    w = z.double() / (z.double().square().mean(1, keepdim=True) + 1e-8).sqrt()
    for i in range(1, LAYERS + 1):
        w = lrelu(w @ state[f"style.{i}.weight"].T * 0.01 / math.sqrt(STYLE) + 0.01 * state[f"style.{i}.bias"])
    x = styled("conv1", 0, state["input.input"].repeat(len(z), 1, 1, 1), w)
    image = convolved("to_rgb1.conv", x, w, demodulate=False) + state["to_rgb1.bias"]
    for k in (0, 1):
        x = styled(f"convs.{2 * k}", 2 * k + 1, x, w, up=True)
        x = styled(f"convs.{2 * k + 1}", 2 * k + 2, x, w)
        image = filtered(image, state[f"to_rgbs.{k}.upsample.kernel"], 2, (2, 1))
        image = image + convolved(f"to_rgbs.{k}.conv", x, w, demodulate=False) + state[f"to_rgbs.{k}.bias"]
    return image


def discriminator_state(seed: int = 0) -> dict[str, torch.Tensor]:
    shapes = {"convs.0.0.weight": (8, 3, 1, 1), "convs.0.1.bias": (8,)}
    for i, (into, out) in enumerate([(8, 12), (12, 12)], start=1):
        shapes |= {f"convs.{i}.conv1.0.weight": (into, into, 3, 3), f"convs.{i}.conv1.1.bias": (into,)}
        shapes |= {f"convs.{i}.conv2.1.weight": (out, into, 3, 3), f"convs.{i}.conv2.2.bias": (out,)}
        shapes[f"convs.{i}.skip.1.weight"] = (out, into, 1, 1)
    shapes |= {"final_conv.0.weight": (12, 13, 3, 3), "final_conv.1.bias": (12,)}
    shapes |= {"final_linear.0.weight": (12, 192), "final_linear.0.bias": (12,)}
    shapes |= {"final_linear.1.weight": (1, 12), "final_linear.1.bias": (1,)}
    rng = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    return state | {f"convs.{i}.{name}.0.kernel": KERNEL for i in (1, 2) for name in ("conv2", "skip")}


def reference_logits(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    state, x = {name: value.double() for name, value in state.items()}, x.double()

    def layer(weight, bias, x, **options):
        kernel = state[weight]
        x = F.conv2d(x, kernel / math.sqrt(kernel[0].numel()), **options)
        return x if bias is None else F.leaky_relu(x + state[bias].view(1, -1, 1, 1), 0.2) * math.sqrt(2)

    x = layer("convs.0.0.weight", "convs.0.1.bias", x)
    for i in (1, 2):
        name = f"convs.{i}"
        y = layer(f"{name}.conv1.0.weight", f"{name}.conv1.1.bias", x, padding=1)
        y = filtered(y, state[f"{name}.conv2.0.kernel"], 1, (2, 2))
        y = layer(f"{name}.conv2.1.weight", f"{name}.conv2.2.bias", y, stride=2)
        x = filtered(x, state[f"{name}.skip.0.kernel"], 1, (1, 1))
        x = (y + layer(f"{name}.skip.1.weight", None, x, stride=2)) / math.sqrt(2)
    n, _, height, width = x.shape
    group = min(n, 4)
    spread = (x.view(group, n // group, -1).var(0, unbiased=False) + 1e-8).sqrt().mean(1)
    x = torch.cat([x, spread.view(-1, 1, 1, 1).repeat(group, 1, height, width)], 1)
    x = layer("final_conv.0.weight", "final_conv.1.bias", x, padding=1).reshape(n, -1)
    x = x @ state["final_linear.0.weight"].T / math.sqrt(192) + state["final_linear.0.bias"]
    x = F.leaky_relu(x, 0.2) * math.sqrt(2)
    return (x @ state["final_linear.1.weight"].T / math.sqrt(12) + state["final_linear.1.bias"])[:, 0]


def saved(path: Path, content: object, **options) -> Path:
    torch.save(content, path, **options)
    return path


def latents(n: int = 3, size: int = STYLE) -> torch.Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(5))


def test_a_generator_of_theirs_makes_their_images(tmp_path):
    state, average = generator_state(), torch.randn(STYLE)
    generator = load_generator(saved(tmp_path / "a.pt", {"g_ema": state, "latent_avg": average}))
    assert generator.config == GeneratorConfig(16, 128, 12, z_dim=STYLE, w_dim=STYLE, mapping_layers=LAYERS)
    expected = reference_images(state, latents())
    assert expected.std() > 0.5
    assert (generator(latents()).double() - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(generator.mapping.w_avg, average)


def test_a_discriminator_of_theirs_gives_their_logits(tmp_path):
    state = discriminator_state()
    discriminator = load_discriminator(saved(tmp_path / "a.pt", {"d": state}))
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    expected = reference_logits(state, x)
    assert expected.std() > 0.05
    torch.testing.assert_close(discriminator(x).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_in_training_is_read(tmp_path, zipped):
    """With the options of the run, the optimisers, and names that DistributedDataParallel wraps; the average is taken."""
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))])
    content = {
        "g": generator_state(1), "g_ema": {f"module._orig_mod.{k}": v for k, v in generator_state().items()},
        "d": discriminator_state(),
        "g_optim": adam.state_dict(), "args": argparse.Namespace(size=16, path=Path("data")), "ada_aug_p": np.float64(0),
    }  # fmt: skip
    path = saved(tmp_path / "a.pt", content, _use_new_zipfile_serialization=zipped)
    source = open_networks(path)
    assert "mean of 10000 latents" in source.facts["w_avg"]
    generator = source.generator()[0]
    expected = reference_images(generator_state(), latents())
    assert (generator(latents()).double() - expected).abs().max() < 1e-5 * expected.abs().max()
    w = generator.mapping(latents(20_000))
    assert (generator.mapping.w_avg - w.mean(0)).abs().max() < 5 * w.std() / math.sqrt(5000)
    assert source.discriminator is not None


def our_networks(resolution: int = 16, **options) -> tuple[Generator, Discriminator]:
    torch.manual_seed(0)
    shape = {"resolution": resolution, "channel_base": 128, "channel_max": 12}
    generator = Generator(GeneratorConfig(**shape, z_dim=STYLE, w_dim=STYLE, mapping_layers=LAYERS, **options))
    with torch.no_grad():
        for name, value in generator.named_parameters():
            if name.endswith(("bias", "noise_strength")):
                value.add_(torch.randn_like(value) * 0.3)
        generator.mapping.w_avg.normal_()
    return generator, Discriminator(DiscriminatorConfig(**shape))


def test_ours_written_for_them_has_exactly_their_tensors_and_images():
    generator, discriminator = our_networks()
    content = to_rosinality(generator, discriminator)
    assert content.keys() == {"g_ema", "latent_avg", "d"}
    for key, state in (("g_ema", generator_state()), ("d", discriminator_state())):
        assert {k: v.shape for k, v in content[key].items()} == {k: v.shape for k, v in state.items()}
    for key, kernels in (("g_ema", 4), ("d", 4)):
        found = [value for name, value in content[key].items() if name.endswith("kernel")]
        assert len(found) == kernels
        assert all(torch.allclose(value, KERNEL * (4 if key == "g_ema" else 1)) for value in found)
    expected = reference_images(content["g_ema"], latents())
    torch.testing.assert_close(generator(latents()).double(), expected, rtol=0, atol=1e-5)
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(discriminator(x).double(), reference_logits(content["d"], x), rtol=0, atol=1e-5)


def test_there_and_back_is_the_same_network(tmp_path):
    generator, discriminator = our_networks(32)
    path = saved(tmp_path / "a.pt", to_rosinality(generator, discriminator))
    for ours, again in ((generator, load_generator(path)), (discriminator, load_discriminator(path))):
        assert ours.config == again.config
        assert all(torch.equal(x, again.state_dict()[name]) for name, x in ours.state_dict().items())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"architecture": "resnet"}, "architecture resnet"),
        ({"c_dim": 3}, "c_dim 3"),
        ({"image_channels": 1}, "image_channels 1"),
    ],
)
def test_what_their_code_cannot_build_is_not_written(options, expected):
    with pytest.raises(ValueError, match=f"the generator has {expected}: rosinality's code knows only"):
        to_rosinality(our_networks(8, **options)[0])


def test_widths_of_their_code_are_known():
    assert fixed_widths(GeneratorConfig(256))
    assert fixed_widths(GeneratorConfig(256, 16384))
    assert fixed_widths(GeneratorConfig(32))
    assert not fixed_widths(GeneratorConfig(256, 8192))
    assert not fixed_widths(GeneratorConfig(32, channel_max=256))


def refusal(path: Path, load=load_generator) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


def changed(**changes) -> dict[str, torch.Tensor]:
    state = generator_state() | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (changed(convs__1__noise__weight=None), "lacks convs.1.noise.weight"),
        (changed(noises__noise_3=None), "lacks noises.noise_3"),
        (changed(conv1__conv__weight=torch.zeros(12, 12, 3, 3)), "conv1.conv.weight is (12, 12, 3, 3)"),
        (changed(convs__2__conv__weight=torch.zeros(1, 9, 12, 3, 3)), "b16.conv0.weight is (9, 12, 3, 3), not (8, 12, 3, 3)"),
        (changed(extra__weight=torch.zeros(2)), "extra.weight (2,) is no part of rosinality's network"),
        (changed(convs__0__conv__blur__kernel=torch.ones(4, 4) / 4), "convs.0.conv.blur.kernel (4, 4) is another filter"),
        (changed(to_rgbs__1__upsample__kernel=KERNEL), "to_rgbs.1.upsample.kernel (4, 4) is another filter"),
        (changed(style__2__weight=torch.zeros(STYLE, 7)), "mapping.fc1.weight is (20, 7), not (20, 20)"),
        (changed(convs__3__conv__weight=torch.zeros(1, 24, 8, 3, 3)), "feature maps {4: 12, 8: 12, 16: 24}"),
    ],
)  # fmt: skip
def test_the_first_tensor_that_does_not_fit_is_named(tmp_path, state, expected):
    assert expected in refusal(saved(tmp_path / "a.pt", {"g_ema": state}))


def test_files_of_something_else_are_refused(tmp_path):
    assert "holds no networks" in refusal(saved(tmp_path / "a.pt", {"state_dict": {"x": torch.zeros(2)}}))
    assert "holds a list" in refusal(saved(tmp_path / "b.pt", [torch.zeros(2)]))
    assert "holds no discriminator" in refusal(
        saved(tmp_path / "c.pt", {"g_ema": generator_state()}), load_discriminator
    )
    assert "holds no generator" in refusal(saved(tmp_path / "d.pt", {"d": discriminator_state()}))


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_checkpoint_is_refused_by_name_and_does_not_run(tmp_path, zipped):
    witness = tmp_path / "witness"
    content = {"g_ema": generator_state(), "args": Malicious(witness)}
    path = saved(tmp_path / "a.pt", content, _use_new_zipfile_serialization=zipped)
    assert "posix.system" in refusal(path)
    assert not witness.exists()
