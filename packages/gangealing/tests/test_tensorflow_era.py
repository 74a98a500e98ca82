"""Networks of the TensorFlow era compute here what they computed there: their forward pass on their names, in numpy's layout.

There every convolution is a correlation with the kernel as stored, after upsampling or before downsampling by the filter.
"""

import contextlib
import math
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
from triptych_gangealing.stylegan2.weights import load_discriminator, load_generator, open_networks

WIDTHS = {4: 12, 8: 12, 16: 8}
W, LAYERS = 20, 2
KERNEL = torch.tensor([1.0, 3.0, 3.0, 1.0]).double().outer(torch.tensor([1.0, 3.0, 3.0, 1.0]).double()) / 64
OPTIONS = {
    "resolution": 16,
    "num_channels": 3,
    "label_size": 0,
    "fmap_base": 64,
    "fmap_max": 12,
    "resample_kernel": [1, 3, 3, 1],
}


@contextlib.contextmanager
def nvidia_modules():
    names = ("dnnlib", "dnnlib.tflib", "dnnlib.tflib.network", "dnnlib.util")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    network, easy = type("Network", (), {}), type("EasyDict", (dict,), {})
    network.__module__, easy.__module__ = "dnnlib.tflib.network", "dnnlib.util"
    sys.modules["dnnlib.tflib.network"].Network, sys.modules["dnnlib.util"].EasyDict = network, easy
    try:
        yield network, easy
    finally:
        for name in names:
            del sys.modules[name]


def pickled(path: Path, networks: list[tuple[dict, dict]]) -> Path:
    """(variables by full name, options) of G, D and Gs, as dnnlib.tflib would pickle them."""
    with nvidia_modules() as (network, easy):

        def made(variables, options):
            parts = sorted({name.split("/")[0] for name in variables if name.startswith(("mapping/", "synthesis/"))})
            result = network()
            own = [(k, v) for k, v in variables.items() if k.split("/")[0] not in parts]
            inner = {
                p: made({k.removeprefix(f"{p}/"): v for k, v in variables.items() if k.startswith(f"{p}/")}, {})
                for p in parts
            }
            result.__dict__ = {
                "version": 4, "name": "G", "static_kwargs": easy(options), "components": easy(inner), "variables": own,
                "build_module_src": "raise SystemExit", "build_func_name": "G_main",
            }  # fmt: skip
            return result

        path.write_bytes(pickle.dumps(tuple(made(*pair) for pair in networks), 4))
    return path


def random_variables(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def generator_variables(architecture: str = "skip", classes: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {"dlatent_avg": (W,), "lod": ()}
    if classes:
        shapes |= {"mapping/LabelEmbed/weight": (classes, W), "mapping/LabelEmbed/bias": (W,)}
    for i in range(LAYERS):
        into = W * (2 if classes and i == 0 else 1)
        shapes |= {f"mapping/Dense{i}/weight": (into, W), f"mapping/Dense{i}/bias": (W,)}
    shapes["synthesis/4x4/Const/const"] = (1, 12, 4, 4)

    def layer(name, into, out, size, noise=None, resolution=0):
        shapes.update({f"{name}/weight": (size, size, into, out), f"{name}/bias": (out,)})
        shapes.update({f"{name}/mod_weight": (W, into), f"{name}/mod_bias": (into,)})
        if noise is not None:
            shapes.update({f"{name}/noise_strength": (), f"synthesis/noise{noise}": (1, 1, resolution, resolution)})

    layer("synthesis/4x4/Conv", 12, 12, 3, 0, 4)
    for i, (resolution, into, out) in enumerate([(8, 12, 12), (16, 12, 8)]):
        name = f"synthesis/{resolution}x{resolution}"
        layer(f"{name}/Conv0_up", into, out, 3, 2 * i + 1, resolution)
        layer(f"{name}/Conv1", out, out, 3, 2 * i + 2, resolution)
        if architecture == "resnet":
            shapes[f"{name}/Skip/weight"] = (1, 1, into, out)
    for resolution in WIDTHS if architecture == "skip" else [16]:
        layer(f"synthesis/{resolution}x{resolution}/ToRGB", WIDTHS[resolution], 3, 1)
    variables = random_variables(shapes, seed)
    return {k: v * (100 if "mapping/Dense" in k and "weight" in k else 1) for k, v in variables.items()}


def lrelu(x):
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def up(x: torch.Tensor, edge: int) -> torch.Tensor:
    n, channels, height, width = x.shape
    spread = x.new_zeros(n * channels, 1, 2 * height, 2 * width)
    spread[:, 0, ::2, ::2] = x.flatten(0, 1)
    out = F.conv2d(F.pad(spread, (2 + edge, 1 + edge) * 2), 4 * KERNEL[None, None])
    return out.view(n, channels, *out.shape[2:])


def down(x: torch.Tensor, edge: int) -> torch.Tensor:
    n, channels, height, width = x.shape
    out = F.conv2d(F.pad(x.reshape(-1, 1, height, width), (1 + edge,) * 4), KERNEL[None, None])
    return out.view(n, channels, *out.shape[2:])


def reference_images(variables: dict, z: torch.Tensor, architecture: str = "skip", labels: torch.Tensor | None = None):
    v = {name: torch.from_numpy(np.asarray(value)).double() for name, value in variables.items()}

    def normal(x):
        return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()

    def layer(name, x, w, *, size=3, upsampled=False, demodulate=True, noise=None):
        style = w @ v[f"{name}/mod_weight"] / math.sqrt(W) + v[f"{name}/mod_bias"] + 1
        weight = v[f"{name}/weight"] / math.sqrt(v[f"{name}/weight"][..., 0].numel())
        images = []
        for image, s in zip(x.split(1), style, strict=True):
            kernel = weight * s[:, None]
            if demodulate:
                kernel = kernel / (kernel.square().sum((0, 1, 2)) + 1e-8).sqrt()
            kernel = kernel.permute(3, 2, 0, 1)
            images.append(F.conv2d(up(image, 1), kernel) if upsampled else F.conv2d(image, kernel, padding=size // 2))
        x = torch.cat(images)
        if noise is not None:
            x = x + v[f"{name}/noise_strength"] * v[f"synthesis/noise{noise}"]
        x = x + v[f"{name}/bias"].view(1, -1, 1, 1)
        return lrelu(x) if demodulate else x

    x = normal(z.double())
    if labels is not None:
        embedded = (
            labels.double() @ v["mapping/LabelEmbed/weight"] / math.sqrt(labels.shape[1]) + v["mapping/LabelEmbed/bias"]
        )
        x = torch.cat([x, normal(embedded)], 1)
    for i in range(LAYERS):
        weight = v[f"mapping/Dense{i}/weight"]
        x = lrelu(x @ weight * 0.01 / math.sqrt(len(weight)) + 0.01 * v[f"mapping/Dense{i}/bias"])
    w = x
    x = layer("synthesis/4x4/Conv", v["synthesis/4x4/Const/const"].repeat(len(z), 1, 1, 1), w, noise=0)
    image = layer("synthesis/4x4/ToRGB", x, w, size=1, demodulate=False) if architecture == "skip" else None
    for i, resolution in enumerate((8, 16)):
        name, before = f"synthesis/{resolution}x{resolution}", x
        x = layer(f"{name}/Conv0_up", x, w, upsampled=True, noise=2 * i + 1)
        x = layer(f"{name}/Conv1", x, w, noise=2 * i + 2)
        if architecture == "resnet":
            skip = v[f"{name}/Skip/weight"]
            x = (x + F.conv2d(up(before, 0), skip.permute(3, 2, 0, 1) / math.sqrt(skip.shape[2]))) / math.sqrt(2)
        if image is not None:
            image = up(image, 0)
        if architecture == "skip" or resolution == 16:
            rgb = layer(f"{name}/ToRGB", x, w, size=1, demodulate=False)
            image = rgb if image is None else image + rgb
    return image


def discriminator_variables(seed: int = 1) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {"lod": (), "16x16/FromRGB/weight": (1, 1, 3, 8), "16x16/FromRGB/bias": (8,)}
    for resolution, into, out in [(16, 8, 12), (8, 12, 12)]:
        name = f"{resolution}x{resolution}"
        shapes |= {f"{name}/Conv0/weight": (3, 3, into, into), f"{name}/Conv0/bias": (into,)}
        shapes |= {f"{name}/Conv1_down/weight": (3, 3, into, out), f"{name}/Conv1_down/bias": (out,)}
        shapes[f"{name}/Skip/weight"] = (1, 1, into, out)
    shapes |= {"4x4/Conv/weight": (3, 3, 13, 12), "4x4/Conv/bias": (12,), "4x4/Dense0/weight": (192, 12)}
    shapes |= {"4x4/Dense0/bias": (12,), "Output/weight": (12, 1), "Output/bias": (1,)}
    return random_variables(shapes, seed)


def reference_logits(variables: dict, x: torch.Tensor) -> torch.Tensor:
    v = {name: torch.from_numpy(np.asarray(value)).double() for name, value in variables.items()}

    def kernel(name):
        weight = v[f"{name}/weight"]
        return weight.permute(3, 2, 0, 1) / math.sqrt(weight[..., 0].numel())

    def bias(name):
        return v[f"{name}/bias"].view(1, -1, 1, 1)

    x = lrelu(F.conv2d(x.double(), kernel("16x16/FromRGB")) + bias("16x16/FromRGB"))
    for name in ("16x16", "8x8"):
        y = lrelu(F.conv2d(x, kernel(f"{name}/Conv0"), padding=1) + bias(f"{name}/Conv0"))
        y = lrelu(F.conv2d(down(y, 1), kernel(f"{name}/Conv1_down"), stride=2) + bias(f"{name}/Conv1_down"))
        x = (y + F.conv2d(down(x, 0), kernel(f"{name}/Skip"), stride=2)) / math.sqrt(2)
    spread = ((x - x.mean(0)).square().mean(0) + 1e-8).sqrt().mean()
    x = torch.cat([x, spread.expand(len(x), 1, 4, 4)], 1)
    x = lrelu(F.conv2d(x, kernel("4x4/Conv"), padding=1) + bias("4x4/Conv")).flatten(1)
    x = lrelu(x @ v["4x4/Dense0/weight"] / math.sqrt(192) + v["4x4/Dense0/bias"])
    return (x @ v["Output/weight"] / math.sqrt(12) + v["Output/bias"])[:, 0]


def both(path: Path, variables: dict | None = None, **options) -> Path:
    generator = (generator_variables() if variables is None else variables, {**OPTIONS, **options})
    return pickled(path, [(generator_variables(seed=9), OPTIONS), (discriminator_variables(), OPTIONS), generator])


def latents(n: int = 2) -> torch.Tensor:
    return torch.randn(n, W, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_a_generator_makes_its_images(tmp_path, architecture):
    variables = generator_variables(architecture)
    generator = load_generator(both(tmp_path / "a.pkl", variables, architecture=architecture))
    expected_config = GeneratorConfig(16, 128, 12, z_dim=W, w_dim=W, mapping_layers=LAYERS, architecture=architecture)
    assert generator.config == expected_config
    expected = reference_images(variables, latents(), architecture)
    assert expected.std() > 0.1
    assert (generator(latents()).double() - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(generator.mapping.w_avg, torch.from_numpy(variables["dlatent_avg"]))


def test_a_conditional_generator_makes_its_images(tmp_path):
    variables, labels = generator_variables(classes=4), torch.eye(4)[[2, 0]]
    path = both(tmp_path / "a.pkl", variables, label_size=4, mapping_lrmul=0.01, use_noise=True, truncation_psi=None)
    expected = reference_images(variables, latents(), labels=labels)
    assert (load_generator(path)(latents(), labels).double() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_discriminator_gives_its_logits(tmp_path):
    discriminator = load_discriminator(both(tmp_path / "a.pkl"))
    assert discriminator.config == DiscriminatorConfig(16, 128, 12)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    expected = reference_logits(discriminator_variables(), x)
    assert expected.std() > 0.05
    torch.testing.assert_close(discriminator(x).double(), expected, rtol=0, atol=1e-5)


def without(name: str) -> dict[str, np.ndarray]:
    return {k: v for k, v in generator_variables().items() if k != name}


@pytest.mark.parametrize(
    ("variables", "options", "expected"),
    [
        (without("synthesis/8x8/Conv1/mod_bias"), {}, "lacks synthesis/8x8/Conv1/mod_bias"),
        (generator_variables() | {"synthesis/8x8/Conv1/mod_bias": np.zeros((), np.float32)}, {}, "affine.bias is (), not (12,)"),
        (generator_variables() | {"synthesis/8x8/Conv1/weight": np.zeros(3, np.float32)}, {}, "weight is (3,), another number"),
        (generator_variables() | {"synthesis/8x8/Extra": np.zeros(3, np.float32)}, {}, "synthesis/8x8/Extra (3,) is no part"),
        (None, {"resolution": 32}, "lacks synthesis.b32."),
        (None, {"fmap_base": 32}, "by its resolution 16, channel_base 64, channel_max 12"),
        (None, {"nonlinearity": "relu"}, "option nonlinearity is not lrelu"),
        (None, {"resample_kernel": [1, 2, 1]}, "option resample_kernel is not [1, 3, 3, 1]"),
        (None, {"adaptive": True}, "option 'adaptive' is not known here"),
        (None, {"num_channels": "3"}, "image_channels is no whole number"),
        (None, {"architecture": "tree"}, "architecture is not one of"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, variables, options, expected):
    with pytest.raises(ValueError, match=r".") as caught:
        load_generator(both(tmp_path / "a.pkl", variables, **options))
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'a.pkl'}: G_ema: ")


def test_a_conditional_discriminator_is_refused_and_its_generator_read(tmp_path):
    label = {"LabelEmbed/weight": np.zeros((4, 12), np.float32), "LabelEmbed/bias": np.zeros(12, np.float32)}
    pair = (generator_variables(), OPTIONS)
    path = pickled(tmp_path / "a.pkl", [pair, (discriminator_variables() | label, OPTIONS), pair])
    with pytest.raises(
        ValueError, match=r"a\.pkl: D: a conditional discriminator of the TensorFlow era cannot be read"
    ):
        load_discriminator(path)
    assert load_generator(path).config.resolution == 16
    assert open_networks(path).format == "nvidia tensorflow pickle"
