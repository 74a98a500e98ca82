"""StyleGAN2's networks against what the papers say, written out once more, and the names and sizes of published files."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from triptych_common.storage import checkpoint
from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
from triptych_gangealing.stylegan2.discriminator import Discriminator, grouped, minibatch_std
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.weights import read_network, write_network

ARCHITECTURES = ("skip", "resnet", "orig")
G16 = GeneratorConfig(resolution=16, channel_base=96, channel_max=10, z_dim=7, w_dim=6, mapping_layers=2)
D16 = DiscriminatorConfig(resolution=16, channel_base=96, channel_max=10, mapping_layers=2)


def randomised(network, seed=0):
    """In float64, with nothing left at zero, one or too small to matter."""
    rng = torch.Generator().manual_seed(seed)
    network = network.double().requires_grad_(False)
    for name, value in network.state_dict().items():
        drawn = torch.randn(value.shape, generator=rng, dtype=torch.float64)
        value.copy_(drawn * 100 if name.startswith("mapping.fc") and name.endswith("weight") else drawn)
    return network


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_hot(n, classes):
    return F.one_hot(torch.arange(n) % classes, classes).double()


# Names and sizes


def published_generator(base: int, num_layers: int = 8) -> dict[str, tuple[int, ...]]:
    """Of a 256-pixel generator's file, less resampling filters."""
    maps = {r: min(base // r, 512) for r in (4, 8, 16, 32, 64, 128, 256)}
    shapes = {"mapping.w_avg": (512,), "synthesis.b4.const": (maps[4], 4, 4)}
    for i in range(num_layers):
        shapes |= {f"mapping.fc{i}.weight": (512, 512), f"mapping.fc{i}.bias": (512,)}
    for r, out in maps.items():
        for conv, into in (("conv0", maps.get(r // 2)), ("conv1", out)):
            if into is not None:
                name = f"synthesis.b{r}.{conv}"
                shapes |= {f"{name}.weight": (out, into, 3, 3), f"{name}.bias": (out,), f"{name}.noise_strength": ()}
                shapes |= {f"{name}.noise_const": (r, r)}
                shapes |= {f"{name}.affine.weight": (into, 512), f"{name}.affine.bias": (into,)}
        name = f"synthesis.b{r}.torgb"
        shapes |= {f"{name}.weight": (3, out, 1, 1), f"{name}.bias": (3,)}
        shapes |= {f"{name}.affine.weight": (out, 512), f"{name}.affine.bias": (out,)}
    return shapes


def published_discriminator(base: int) -> dict[str, tuple[int, ...]]:
    maps = {r: min(base // r, 512) for r in (4, 8, 16, 32, 64, 128, 256)}
    shapes = {"b256.fromrgb.weight": (maps[256], 3, 1, 1), "b256.fromrgb.bias": (maps[256],)}
    for r in (256, 128, 64, 32, 16, 8):
        shapes |= {f"b{r}.conv0.weight": (maps[r], maps[r], 3, 3), f"b{r}.conv0.bias": (maps[r],)}
        shapes |= {f"b{r}.conv1.weight": (maps[r // 2], maps[r], 3, 3), f"b{r}.conv1.bias": (maps[r // 2],)}
        shapes |= {f"b{r}.skip.weight": (maps[r // 2], maps[r], 1, 1)}
    shapes |= {"b4.conv.weight": (512, 513, 3, 3), "b4.conv.bias": (512,), "b4.fc.weight": (512, 8192)}
    return shapes | {"b4.fc.bias": (512,), "b4.out.weight": (1, 512), "b4.out.bias": (1,)}


def on_meta(network_class, config):
    with torch.device("meta"):
        return network_class(config)


def shapes_of(network):
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


@pytest.mark.parametrize(("base", "millions"), [(32768, "30.03"), (16384, "24.77")])
def test_names_shapes_and_sizes_of_published_networks(base, millions):
    generator = on_meta(Generator, GeneratorConfig(resolution=256, channel_base=base))
    assert shapes_of(generator) == published_generator(base)
    assert f"{sum(p.numel() for p in generator.parameters()) / 1e6:.2f}" == millions
    assert generator.num_ws == generator.config.num_ws == 14
    discriminator = on_meta(Discriminator, DiscriminatorConfig(resolution=256, channel_base=base))
    assert shapes_of(discriminator) == published_discriminator(base)


def test_names_of_conditional_and_of_other_designs():
    conditional = shapes_of(on_meta(Generator, replace(G16, c_dim=5)))
    assert conditional["mapping.embed.weight"] == (6, 5)
    assert conditional["mapping.fc0.weight"] == (6, 7 + 6)
    residual = shapes_of(on_meta(Generator, replace(G16, architecture="resnet")))
    assert residual["synthesis.b8.skip.weight"] == (10, 10, 1, 1)
    assert residual["synthesis.b16.skip.weight"] == (6, 10, 1, 1)
    assert [name for name in residual if "torgb.weight" in name] == ["synthesis.b16.torgb.weight"]
    assert not [name for name in residual if "skip.bias" in name]
    judged = shapes_of(on_meta(Discriminator, replace(D16, c_dim=5)))
    assert judged["mapping.embed.weight"] == (10, 5)
    assert judged["mapping.fc0.weight"] == (10, 10)
    assert judged["b4.out.weight"] == (10, 10)
    assert "mapping.w_avg" not in judged
    skipping = shapes_of(on_meta(Discriminator, replace(D16, architecture="skip")))
    assert [name for name in skipping if "fromrgb.weight" in name] == [f"b{r}.fromrgb.weight" for r in (16, 8, 4)]


@pytest.mark.parametrize("resolution", [8, 16, 32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_resolution_has_its_shapes(resolution, architecture):
    config = GeneratorConfig(resolution=resolution, architecture=architecture)
    generator = on_meta(Generator, config)
    z, noise = (torch.empty(2, n, device="meta") for n in (512, sum(generator.synthesis.noise_sizes)))
    images = generator(z, noise=noise)
    assert images.shape == (2, 3, resolution, resolution)
    assert generator.num_ws == 2 * int(math.log2(resolution)) - 2
    assert generator.synthesis.noise_sizes[-1] == resolution**2
    discriminator = on_meta(Discriminator, DiscriminatorConfig(resolution=resolution, architecture=architecture))
    assert discriminator(images).shape == (2,)


@pytest.mark.parametrize("resolution", [8, 16, 32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("c_dim", [0, 3])
def test_every_parameter_matters_and_every_pixel_does(resolution, architecture, c_dim):
    shared = {
        "resolution": resolution,
        "channel_base": 64,
        "channel_max": 8,
        "architecture": architecture,
        "c_dim": c_dim,
    }
    generator = randomised(Generator(GeneratorConfig(**shared, z_dim=5, w_dim=6, mapping_layers=2)))
    discriminator = randomised(Discriminator(DiscriminatorConfig(**shared, mapping_layers=2)), seed=1)
    c = one_hot(4, c_dim) if c_dim else None
    parameters = [*generator.parameters(), *discriminator.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    images = generator(drawn(4, 5), c)
    images.retain_grad()
    logits = discriminator(images, c)
    assert logits.shape == (4,)
    (logits * torch.arange(1.0, 5)).sum().backward()
    assert images.shape == (4, 3, resolution, resolution)
    assert bool((images.grad != 0).all())
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in parameters)


# The same networks once more


def lrelu(x: Tensor, gain: float = math.sqrt(2)) -> Tensor:
    return torch.where(x > 0, x, x / 5) * gain


def fir(x: Tensor, before: int, after: int, gain: float) -> Tensor:
    """Zeros around, then [1, 3, 3, 1] down the columns and along the rows."""
    taps, channels = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8, x.shape[1]
    x = F.pad(x, (before, after, before, after))
    x = F.conv2d(x, taps.view(1, 1, 4, 1).repeat(channels, 1, 1, 1), groups=channels)
    return gain * F.conv2d(x, taps.view(1, 1, 1, 4).repeat(channels, 1, 1, 1), groups=channels)


def apart(x: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    out[:, :, ::2, ::2] = x
    return out


def up_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Zeros between pixels, the kernel turned half round, the filter with a gain of four."""
    if weight.shape[-1] == 1:
        return fir(apart(F.conv2d(x, weight)), 2, 1, 4)
    return fir(F.conv2d(F.pad(apart(x), (2, 1, 2, 1)), weight.flip(2, 3)), 1, 1, 4)


def dense(p: dict[str, Tensor], name: str, x: Tensor, lr: float = 1.0) -> Tensor:
    weight = p[f"{name}.weight"]
    return x @ (weight * lr / math.sqrt(weight.shape[1])).T + p[f"{name}.bias"] * lr


def unit(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()


def mapped(p: dict[str, Tensor], z: Tensor | None, c: Tensor | None, num_layers: int) -> Tensor:
    parts = [unit(z)] if z is not None else []
    parts += [unit(dense(p, "mapping.embed", c))] if c is not None else []
    x = torch.cat(parts, dim=1)
    for i in range(num_layers):
        x = lrelu(dense(p, f"mapping.fc{i}", x, lr=0.01))
    return x


def synthesised(p: dict[str, Tensor], config: GeneratorConfig, ws: Tensor, noise: list[Tensor] | str) -> Tensor:
    """One image, with a weight of its own in every layer. ws: [num_ws, w_dim]."""
    layer, x, image = 0, p["synthesis.b4.const"][None], None
    root = math.sqrt(0.5)

    def modulated(name: str, w: Tensor, *, demodulate: bool) -> Tensor:
        style = dense(p, f"{name}.affine", w[None])[0]
        weight = p[f"{name}.weight"] * style[:, None, None]
        if demodulate:
            return weight / (weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        return weight / math.sqrt(len(style))

    def styled(name: str, x: Tensor, w: Tensor, *, up: bool, gain: float = 1.0) -> Tensor:
        weight = modulated(name, w, demodulate=True)
        x = up_conv(x, weight) if up else F.conv2d(x, weight, padding=1)
        if noise != "none":
            added = p[f"{name}.noise_const"] if noise == "const" else noise[layer].view(x.shape[2:])
            x = x + added * p[f"{name}.noise_strength"]
        x = lrelu(x + p[f"{name}.bias"][:, None, None]) * gain
        return x if config.conv_clamp is None else x.clamp(-config.conv_clamp * gain, config.conv_clamp * gain)

    for r in config.resolutions:
        name, residual = f"synthesis.b{r}", config.architecture == "resnet" and r > 4
        before = x
        if r > 4:
            x = styled(f"{name}.conv0", x, ws[layer], up=True)
            layer += 1
        x = styled(f"{name}.conv1", x, ws[layer], up=False, gain=root if residual else 1.0)
        layer += 1
        if residual:
            weight = p[f"{name}.skip.weight"]
            x = x + root * up_conv(before, weight / math.sqrt(weight.shape[1]))
        if config.architecture == "skip" or r == config.resolution:
            weight = modulated(f"{name}.torgb", ws[layer], demodulate=False)
            rgb = F.conv2d(x, weight) + p[f"{name}.torgb.bias"][:, None, None]
            if config.conv_clamp is not None:
                rgb = rgb.clamp(-config.conv_clamp, config.conv_clamp)
            image = rgb if image is None else rgb + fir(apart(image), 2, 1, 4)
    return image


def close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("clamp", [None, 0.8])
def test_generator_written_out_image_by_image(architecture, c_dim, clamp):
    config = replace(G16, architecture=architecture, c_dim=c_dim, conv_clamp=clamp)
    generator = randomised(Generator(config))
    p, z, c = generator.state_dict(), drawn(3, 7), one_hot(3, c_dim) if c_dim else None
    ws = mapped(p, z, c, 2)[:, None].repeat(1, 6, 1)
    close(generator.styles(z, c), ws)
    ws = ws + 0.5 * drawn(3, 6, 6)  # every layer a style of its own
    given = drawn(3, sum(generator.synthesis.noise_sizes))
    for noise in ("const", "none", given):
        each = [noise if isinstance(noise, str) else list(row.split([16, 64, 64, 256, 256])) for row in given]
        expected = [synthesised(p, config, w, one) for w, one in zip(ws, each, strict=True)]
        close(generator.synthesis(ws, noise=noise), torch.cat(expected))


def spread_by_loops(x: Tensor, group_size: int, num_channels: int) -> Tensor:
    """Deviation of every entry over an image's group, averaged; images belong together by remainder."""
    n, size = len(x), min(group_size, len(x))
    out = x.new_zeros(n, num_channels, *x.shape[2:])
    parts = x.unflatten(1, (num_channels, -1))
    for i in range(n):
        members = [j for j in range(n) if j % (n // size) == i % (n // size)]
        for k in range(num_channels):
            entries = torch.stack([parts[j, k].flatten() for j in members])
            variance = sum((row - sum(entries) / size).square() for row in entries) / size
            out[i, k] = (variance + 1e-8).sqrt().mean()
    return out


def judged(p: dict[str, Tensor], config: DiscriminatorConfig, images: Tensor, c: Tensor | None) -> Tensor:
    x, image, root = None, images, math.sqrt(0.5)

    def conv(name: str, x: Tensor, *, down: bool = False, activated: bool = True, gain: float = 1.0) -> Tensor:
        weight = p[f"{name}.weight"]
        weight = weight / math.sqrt(weight[0].numel())
        if down:
            padding = 1 + weight.shape[-1] // 2
            x = F.conv2d(fir(x, padding, padding, 1), weight)[:, :, ::2, ::2]
        else:
            x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        x = lrelu(x + p[f"{name}.bias"][:, None, None]) if activated else x
        clamp = config.conv_clamp if activated and name not in ("b4.fromrgb",) else None
        return gain * (x if clamp is None else x.clamp(-clamp, clamp))

    for r in config.resolutions[:0:-1]:
        if r == config.resolution or config.architecture == "skip":
            read = conv(f"b{r}.fromrgb", image)
            x = read if x is None else x + read
            image = fir(image, 1, 1, 1)[:, :, ::2, ::2]
        residual = config.architecture == "resnet"
        skip = conv(f"b{r}.skip", x, down=True, activated=False, gain=root) if residual else 0
        x = skip + conv(f"b{r}.conv1", conv(f"b{r}.conv0", x), down=True, gain=root if residual else 1.0)
    if config.architecture == "skip":
        x = x + conv("b4.fromrgb", image)
    if config.mbstd_channels:
        x = torch.cat([x, spread_by_loops(x, config.mbstd_group_size, config.mbstd_channels)], dim=1)
    x = conv("b4.conv", x)
    x = dense(p, "b4.out", lrelu(dense(p, "b4.fc", x.flatten(1))))
    if c is None:
        return x[:, 0]
    return (x * mapped(p, None, c, 2)).sum(dim=1) / math.sqrt(x.shape[1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("c_dim", "clamp", "group", "maps"), [(0, None, 2, 1), (3, 0.8, 4, 2), (0, 0.8, 9, 0)])
def test_discriminator_written_out(architecture, c_dim, clamp, group, maps):
    config = replace(
        D16, architecture=architecture, c_dim=c_dim, conv_clamp=clamp, mbstd_group_size=group, mbstd_channels=maps
    )
    discriminator = randomised(Discriminator(config))
    images, c = drawn(4, 3, 16, 16), one_hot(4, c_dim) if c_dim else None
    close(discriminator(images, c), judged(discriminator.state_dict(), config, images, c))


# Truncation, noise, batches


def test_truncation_draws_towards_the_mean_style():
    generator = randomised(Generator(G16))
    z, mean = drawn(3, 7), generator.mapping.w_avg.clone()
    w = generator.styles(z)
    assert torch.equal(w, w[:, :1].expand(-1, 6, -1))
    close(generator.styles(z, truncation_psi=0.3), mean + 0.3 * (w - mean))
    part = generator.styles(z, truncation_psi=0.3, truncation_cutoff=4)
    close(part[:, :4], mean + 0.3 * (w - mean)[:, :4])
    assert torch.equal(part[:, 4:], w[:, 4:])
    one = generator(z, truncation_psi=0)
    close(one, generator.synthesis(mean.expand(3, 6, -1)))
    close(one, one[:1].expand_as(one))
    assert float((generator(z) - generator(z).mean(dim=0)).abs().max()) > 0.1
    assert torch.equal(generator.mapping.w_avg, mean)


def test_the_mean_style_is_saved_and_not_trained():
    generator = Generator(G16)
    assert "mapping.w_avg" in generator.state_dict()
    assert "mapping.w_avg" not in dict(generator.named_parameters())
    assert not any("noise_const" in name for name, _ in generator.named_parameters())


def test_noise_is_the_same_for_all_none_or_each_images_own():
    generator = randomised(Generator(G16))
    ws = generator.styles(drawn(1, 7)).expand(3, -1, -1)
    const, none = generator.synthesis(ws), generator.synthesis(ws, noise="none")
    close(const, const[:1].expand_as(const))
    noise = generator.synthesis.noise(5, "noise", [4, 0, 9]).double()
    assert noise.shape == (3, sum(generator.synthesis.noise_sizes))
    own = generator.synthesis(ws, noise=noise)
    assert float((own[0] - own[1]).abs().max()) > 0.1
    close(own[1:2], generator.synthesis(ws[:1], noise=generator.synthesis.noise(5, "noise", [0]).double()))
    fixed = torch.cat([b.flatten() for name, b in generator.named_buffers() if "noise_const" in name])
    close(generator.synthesis(ws, noise=fixed.expand(3, -1)), const)
    for name, value in generator.named_parameters():
        if "noise_strength" in name:
            value.zero_()
    close(generator.synthesis(ws, noise=noise), none)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_image_does_not_depend_on_its_batch(architecture):
    generator = randomised(Generator(replace(G16, architecture=architecture)))
    discriminator = randomised(Discriminator(replace(D16, architecture=architecture, mbstd_group_size=1)))
    z, noise = drawn(4, 7), drawn(4, sum(generator.synthesis.noise_sizes))
    images = generator(z, noise=noise)
    logits = discriminator(images)
    for i in range(4):
        alone = generator(z[i : i + 1], noise=noise[i : i + 1])
        close(alone, images[i : i + 1])
        close(discriminator(alone), logits[i : i + 1])


def test_mixed_styles_reach_their_own_layers():
    """Of six styles, layer k's changes what gradients of block outputs say it may: nothing below its resolution."""
    generator = randomised(Generator(G16))
    seen = {}
    for r in (4, 8, 16):
        block = getattr(generator.synthesis, f"b{r}")
        block.register_forward_hook(lambda module, args, output, r=r: seen.update({r: output[0].sum()}))
    ws = generator.styles(drawn(2, 7)).requires_grad_(True)
    generator.synthesis(ws)
    reached = {}
    for r, total in seen.items():
        (gradient,) = torch.autograd.grad(total, ws, retain_graph=True)
        reached[r] = [k for k in range(6) if bool((gradient[:, k] != 0).any())]
    assert reached == {4: [0], 8: [0, 1, 2], 16: [0, 1, 2, 3, 4]}  # the sixth makes colours alone


@pytest.mark.parametrize(("n", "size", "channels"), [(4, 4, 1), (8, 4, 1), (6, 2, 5), (3, 4, 2), (1, 4, 1)])
def test_minibatch_std_written_out(n, size, channels):
    x = drawn(n, 10, 4, 4)
    close(minibatch_std(x, size, channels), spread_by_loops(x, size, channels))


@pytest.mark.parametrize(("n", "size"), [(4, 4), (12, 4), (6, 2), (3, 4), (8, 1)])
def test_grouped_puts_neighbours_together(n, size):
    order = grouped(n, size)
    assert sorted(order) == list(range(n))
    x = drawn(n, 2, 4, 4)
    arranged = x.new_empty(x.shape)
    arranged[:] = x[order]
    spread = minibatch_std(arranged, size)
    for start in range(0, n, min(size, n)):
        whole = minibatch_std(x[start : start + size], size)[0]
        for member in range(start, min(start + size, n)):
            close(spread[order.index(member)], whole)


def test_bfloat16_is_close_and_stays_inside():
    config = GeneratorConfig(resolution=16, channel_base=512, channel_max=32, z_dim=16, w_dim=16, mapping_layers=2)
    torch.manual_seed(0)
    generator, z = Generator(config).requires_grad_(False), drawn(4, 16).float()
    discriminator = Discriminator(DiscriminatorConfig(resolution=16, channel_base=512, channel_max=32))
    discriminator.requires_grad_(False)
    images, logits = generator(z), discriminator(generator(z))
    types = []
    for block in (generator.synthesis.b16, discriminator.b16):
        block.conv1.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    for count in (1, 2):
        generator.synthesis.bf16_resolutions = discriminator.bf16_resolutions = count
        low, low_logits = generator(z), discriminator(images)
        assert {low.dtype, low_logits.dtype} == {torch.float32}
        assert 1e-5 < float((low - images).abs().max() / images.abs().max()) < 0.05
        assert 1e-7 < float((low_logits - logits).abs().max() / images.abs().max()) < 0.05
    assert types == [torch.bfloat16] * 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_channels_last_gives_the_same(architecture):
    generator = randomised(Generator(replace(G16, architecture=architecture)))
    discriminator = randomised(Discriminator(replace(D16, architecture=architecture)))
    z = drawn(4, 7)
    images = generator(z).contiguous()
    logits = discriminator(images)
    for network in (generator, discriminator):
        network.to(memory_format=torch.channels_last)
    close(generator(z), images)
    close(discriminator(images.contiguous(memory_format=torch.channels_last)), logits)


# What does not fit


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GeneratorConfig(resolution=48), "resolution 48: expected a power of two from 8 to 1024"),
        (lambda: GeneratorConfig(resolution=4), "resolution 4"),
        (lambda: DiscriminatorConfig(resolution=2048), "resolution 2048"),
        (
            lambda: GeneratorConfig(resolution=64, channel_base=32),
            "channel_base 32: expected at least the resolution, 64",
        ),
        (lambda: GeneratorConfig(channel_max=0), "channel_max 0"),
        (lambda: GeneratorConfig(z_dim=0), "z_dim 0"),
        (lambda: GeneratorConfig(c_dim=-1), "c_dim -1"),
        (lambda: DiscriminatorConfig(mbstd_group_size=0), "mbstd_group_size 0"),
        (lambda: Generator(G16).synthesis(torch.ones(2, 5, 6)), "5 styles for each image: expected 6"),
        (
            lambda: Generator(G16)(torch.ones(2, 7), noise="random"),
            "noise 'random': expected 'const', 'none' or values",
        ),
        (
            lambda: Generator(G16)(torch.ones(2, 7), noise=torch.ones(2, 9)),
            "noise of 9 values for each image: expected 656",
        ),
        (lambda: Generator(replace(G16, c_dim=3))(torch.ones(2, 7)), "labels none: expected one-hot rows of 3 classes"),
        (lambda: Generator(replace(G16, c_dim=3))(torch.ones(2, 7), torch.ones(2, 4)), "of 4 classes: .* of 3 classes"),
        (lambda: Generator(G16)(torch.ones(2, 7), torch.ones(2, 4)), "labels of 4 classes: expected none"),
        (lambda: Discriminator(D16)(torch.ones(2, 3, 32, 32)), r"shape \(3, 32, 32\): expected \(3, 16, 16\)"),
        (lambda: Discriminator(D16)(torch.ones(2, 1, 16, 16)), r"shape \(1, 16, 16\): expected \(3, 16, 16\)"),
        (lambda: Discriminator(D16)(torch.ones(2, 3, 16, 16), torch.ones(2, 2)), "unconditional discriminator"),
        (
            lambda: Discriminator(replace(D16, c_dim=2))(torch.ones(2, 3, 16, 16)),
            "labels none: expected one-hot rows of 2",
        ),
        (lambda: Discriminator(D16)(torch.ones(6, 3, 16, 16)), "6 images do not divide into groups of 4"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as refused:
        make()
    assert "\n" not in str(refused.value)


# Copies and files


def test_no_filter_is_saved_and_copies_are_whole():
    generator = randomised(Generator(replace(G16, architecture="resnet")))
    assert not any("filter" in name for name in generator.state_dict())
    z = drawn(2, 7)
    images, twin = generator(z), copy.deepcopy(generator)
    assert torch.equal(twin(z), images)
    twin.synthesis.b4.const.add_(1)
    assert torch.equal(generator(z), images)


@pytest.mark.parametrize("network", [Generator(replace(G16, c_dim=2)), Discriminator(replace(D16, conv_clamp=256.0))])
def test_networks_come_back_from_their_files(network, tmp_path):
    path = tmp_path / "network.safetensors"
    write_network(path, network, {"data": "digits32", "images_seen": 7})
    found, facts = read_network(path)
    assert type(found) is type(network)
    assert found.config == network.config
    assert (facts["data"], facts["images_seen"]) == ("digits32", 7)
    expected = network.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())


def test_weights_of_another_type_are_read_as_float32(tmp_path):
    network = Generator(G16).double()
    write_network(tmp_path / "g.safetensors", network, {})
    const = read_network(tmp_path / "g.safetensors").network.synthesis.b4.const
    assert const.dtype == torch.float32
    assert torch.equal(const, network.synthesis.b4.const.float())


def test_other_files_are_refused(tmp_path):
    path, tensors = tmp_path / "g.safetensors", {"a": torch.ones(2)}
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_network(path)
    torch.save(tensors, path)
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_network(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="not one of triptych's"):
        read_network(path)
    checkpoint.write(path, tensors, {"kind": "DiT"})
    with pytest.raises(ValueError, match="neither a generator nor a discriminator"):
        read_network(path)
    narrow = Generator(replace(G16, channel_max=9))
    narrow.config = G16
    write_network(path, narrow, {})
    with pytest.raises(ValueError, match="another version") as refused:
        read_network(path)
    assert "\n" not in str(refused.value)
