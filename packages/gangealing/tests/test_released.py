"""Checkpoints of the released GANgealing code: read by name and shape, compared with their definition written out, and written."""

import argparse
import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from triptych_gangealing import released
from triptych_gangealing.aligner import load_aligner
from triptych_gangealing.cli import run
from triptych_gangealing.stylegan2.config import GeneratorConfig
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.weights import load_generator, write_network

TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
KERNEL = torch.outer(TAPS, TAPS)
SIZE, WIDTH = 32, 8  # pixels, and feature maps from a quarter of them down; theirs are 128 and 512


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(state, name, out, features, size, generator, *, down=False, active=True):
    """A ConvLayer of theirs: a filter where it reduces, weights, and a bias where it is activated."""
    at = int(down)
    if down:
        state[f"{name}.0.kernel"] = KERNEL.clone()
    state[f"{name}.{at}.weight"] = torch.randn(out, features, size, size, generator=generator)
    if active:
        state[f"{name}.{at + 1}.bias"] = 0.1 * torch.randn(out, generator=generator)


def trunk(state, prefix, generator, *, flow):
    """Down to 4 pixels, or to a quarter of the input's and one block more at that size."""
    maps = {32: WIDTH // 4, 16: WIDTH // 2}
    layer(state, f"{prefix}convs.0", maps[32], 3, 1, generator)
    sizes = [32, 16, 8, 8] if flow else [32, 16, 8, 4]
    for i, (size, after) in enumerate(pairwise(sizes), start=1):
        features, out, down = maps.get(size, WIDTH), maps.get(after, WIDTH), size != after
        layer(state, f"{prefix}convs.{i}.conv1", features, features, 3, generator)
        layer(state, f"{prefix}convs.{i}.conv2", out, features, 3, generator, down=down)
        layer(state, f"{prefix}convs.{i}.skip", out, features, 1, generator, down=down, active=False)
    layer(state, f"{prefix}final_conv", WIDTH, WIDTH, 3, generator)


def transformer_state(heads=1, transforms=("similarity", "flow"), seed=0):
    """The state dict of a transformer as their code names it, with random values."""
    generator, state = rng(seed), {}
    for place, kind in enumerate(transforms):
        prefix = f"stns.{place}." if len(transforms) > 1 else ""
        trunk(state, prefix, generator, flow=kind == "flow")
        head = f"{prefix}warp_head"
        if kind == "similarity":
            state[f"{prefix}final_linear.weight"] = torch.randn(WIDTH, WIDTH * 16, generator=generator)
            state[f"{prefix}final_linear.bias"] = 0.1 * torch.randn(WIDTH, generator=generator)
            state[f"{head}.linear.weight"] = 0.05 * torch.randn(4 * heads, WIDTH, generator=generator)
            # Scales below one: pictures are magnified, so that resampling needs no smaller copies of them.
            by_parameter = torch.tensor([0.2, -0.7, 0.05, -0.05]).repeat_interleave(heads)
            state[f"{head}.linear.bias"] = by_parameter + 0.02 * torch.randn(4 * heads, generator=generator)
            state[f"{head}.one_hot"] = torch.tensor([0.0, 0, 1]).view(1, 1, 1, 3)
            state[f"{prefix}input_downsample.kernel_horz"] = TAPS.view(1, 1, 1, 4).repeat(3, 1, 1, 1)
            state[f"{prefix}input_downsample.kernel_vert"] = TAPS.view(1, 1, 4, 1).repeat(3, 1, 1, 1)
        else:
            for name, out in (("flow_out", 2 * heads), ("mask_out", 9 * 16 * heads)):
                for at, n in ((0, WIDTH), (2, out)):
                    state[f"{head}.{name}.{at}.weight"] = torch.randn(n, WIDTH, 3, 3, generator=generator)
                    state[f"{head}.{name}.{at}.bias"] = 0.01 * torch.randn(n, generator=generator)
            state[f"{head}.flow_out.2.weight"] *= 0.01
        state[f"{head}.warper.blur_filter"] = KERNEL[None, None].clone()
    return state


def checkpoint(heads=1, transforms=("similarity", "flow"), seed=0, classes=0):
    modes = {"coefficients": (heads, 2), "directions": (2, 16), "lat_mean": (1, 16)}
    content = {
        "t_ema": transformer_state(heads, transforms, seed),
        "ll": {name: torch.randn(*shape, generator=rng(9)) for name, shape in modes.items()},
        "args": argparse.Namespace(padding_mode="border", flips=heads == 1, transform=list(transforms), flow_size=SIZE),
    }
    if classes:
        state = {}
        trunk(state, "", rng(seed + 1), flow=False)
        state["to_logits.weight"] = torch.randn(classes, WIDTH * 16, generator=rng(4))
        state["to_logits.bias"] = torch.randn(classes, generator=rng(5))
        content["classifier"] = state
    return content


def saved(path, content):
    torch.save(content, path)
    return path


# --- Their definition, written out


def filtered(x, pad):
    n, c, h, w = x.shape
    return F.conv2d(F.pad(x.reshape(n * c, 1, h, w), (pad,) * 4), KERNEL[None, None]).unflatten(0, (n, c))[:, :, 0]


def conv_layer(state, name, x, *, down=False, active=True):
    at = int(down)
    weight = state[f"{name}.{at}.weight"]
    k = weight.shape[-1]
    x = filtered(x, 2 if k == 3 else 1) if down else x
    x = F.conv2d(x, weight / math.sqrt(weight[0].numel()), stride=1 + down, padding=0 if down else k // 2)
    return F.leaky_relu(x + state[f"{name}.{at + 1}.bias"].view(1, -1, 1, 1), 0.2) * math.sqrt(2) if active else x


def features(state, prefix, x):
    x, i = conv_layer(state, f"{prefix}convs.0", x), 1
    while f"{prefix}convs.{i}.conv1.0.weight" in state:
        block, down = f"{prefix}convs.{i}", f"{prefix}convs.{i}.skip.1.weight" in state
        inner = conv_layer(state, f"{block}.conv2", conv_layer(state, f"{block}.conv1", x), down=down)
        x = (inner + conv_layer(state, f"{block}.skip", x, down=down, active=False)) / math.sqrt(2)
        i += 1
    return conv_layer(state, f"{prefix}final_conv", x)


def dense(state, name, x):
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.leaky_relu(x @ weight.T / math.sqrt(weight.shape[1]) + bias, 0.2) * math.sqrt(2)


def matrices(state, prefix, x, head, heads):
    hidden = dense(state, f"{prefix}final_linear", features(state, prefix, x).flatten(1))
    raw = hidden @ state[f"{prefix}warp_head.linear.weight"].T + state[f"{prefix}warp_head.linear.bias"]
    rotation, scale, x_shift, y_shift = raw.view(len(x), 4, heads)[torch.arange(len(x)), :, head].unbind(1)
    cos, sin = (scale.exp() * f(math.pi * rotation.tanh()) for f in (torch.cos, torch.sin))
    return torch.stack([cos, -sin, x_shift, sin, cos, y_shift], 1).view(-1, 2, 3)


def grids(state, x, head, heads=1, transforms=("similarity", "flow")):
    """Sampling grids of images, in normalised coordinates, and the residual flows."""
    prefixes = {kind: f"stns.{i}." if len(transforms) > 1 else "" for i, kind in enumerate(transforms)}
    matrix = torch.eye(2, 3).expand(len(x), 2, 3)
    seen = x
    if "similarity" in transforms:
        matrix = matrices(state, prefixes["similarity"], x, head, heads)
        grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
        seen = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        if "flow" not in transforms:
            return grid
    name = prefixes["flow"] + "warp_head."
    deep = features(state, prefixes["flow"], seen)

    def two(which):
        for at in (0, 2):
            weight = state[f"{name}{which}.{at}.weight"] / math.sqrt(9 * WIDTH)
            inner = F.conv2d(deep if at == 0 else inner.relu(), weight, state[f"{name}{which}.{at}.bias"], padding=1)
        return inner.unflatten(1, (heads, -1))[torch.arange(len(x)), head]

    coarse, mask = two("flow_out"), two("mask_out").view(len(x), 1, 9, 4, 4, 8, 8).softmax(2)
    cells = F.unfold(4 * coarse, 3, padding=1).view(len(x), 2, 9, 1, 1, 8, 8)  # in their units: times the upsampling
    fine = (mask * cells).sum(2).permute(0, 4, 2, 5, 3, 1).reshape(len(x), SIZE, SIZE, 2)
    points = F.affine_grid(torch.eye(2, 3)[None], [1, 3, SIZE, SIZE], align_corners=False) + fine
    return torch.einsum("nhwk,nik->nhwi", torch.cat([points, torch.ones_like(points[..., :1])], -1), matrix)


def pictures(n=3):
    return F.interpolate(torch.randn(n, 3, 6, 6, generator=rng(7)), (SIZE, SIZE), mode="bicubic").clamp(-1, 1)


# --- Reading


@pytest.mark.parametrize("transforms", [("similarity",), ("flow",), ("similarity", "flow")])
def test_grids_are_those_of_the_released_definition(tmp_path, transforms):
    content = checkpoint(transforms=transforms)
    aligner, x = load_aligner(saved(tmp_path / "0750000.pt", content)), pictures()
    expected = grids(content["t_ema"], x, torch.zeros(3, dtype=torch.long), transforms=transforms)
    found = aligner.align(x).warp.grid((SIZE, SIZE))
    assert (expected - F.affine_grid(torch.eye(2, 3)[None], [1, 3, SIZE, SIZE], align_corners=False)).abs().max() > 0.05
    assert float((found - expected).abs().max()) * SIZE / 2 < 1e-4  # pixels
    assert aligner.facts == {"iterations": 1, "padding": "border", "flips": True, "converted_from": "0750000.pt"}


def test_the_classifier_decides_cluster_and_side(tmp_path):
    content, x = checkpoint(heads=3, classes=6), pictures(12)
    state = content["classifier"]
    mean = features(state, "", x).flatten(1).mean(0)
    state["to_logits.bias"] = -state["to_logits.weight"] @ mean / math.sqrt(WIDTH * 16)  # or all would be of one class
    aligner = load_aligner(saved(tmp_path / "cars.pt", content))
    classes = dense(state, "to_logits", features(state, "", x).flatten(1)).argmax(1)
    assert len(classes.unique()) > 2
    found = aligner.align(x)
    assert torch.equal(found.cluster, classes % 3)
    assert torch.equal(found.flipped, classes >= 3)
    turned = torch.where((classes >= 3).view(-1, 1, 1, 1), x.flip(3), x)
    expected = grids(content["t_ema"], turned, classes % 3, heads=3)
    expected[classes >= 3, ..., 0] *= -1  # back to the picture as it is
    assert float((found.warp.grid((SIZE, SIZE)) - expected).abs().max()) * SIZE / 2 < 1e-4
    # Given the cluster, the side is the likelier one within it.
    logits = dense(state, "to_logits", features(state, "", x).flatten(1))
    ones = torch.ones(12, dtype=torch.long)
    assert torch.equal(aligner.align(x, cluster=ones).flipped, logits[:, 4] > logits[:, 1])


def test_modes_are_the_mean_and_coefficients_along_directions(tmp_path):
    content = checkpoint(heads=2)
    modes = content["ll"]
    found = load_aligner(saved(tmp_path / "a.pt", content)).mode()
    torch.testing.assert_close(found, modes["lat_mean"] + modes["coefficients"] @ modes["directions"])


def test_names_of_wrappers_do_not_matter(tmp_path):
    content = checkpoint()
    plain = load_aligner(saved(tmp_path / "a.pt", content)).state_dict()
    content["t_ema"] = {f"module.{name}": value for name, value in content["t_ema"].items()}
    wrapped = load_aligner(saved(tmp_path / "b.pt", content)).state_dict()
    assert all(torch.equal(value, wrapped[name]) for name, value in plain.items())


def without(name):
    def change(content):
        del content["t_ema"][name]

    return change


def test_what_is_no_such_checkpoint_is_one_line(tmp_path, capsys):
    def nan(content):
        content["t_ema"]["stns.0.final_linear.bias"][2] = float("nan")

    def args(content):
        content["args"].padding_mode = "wrap"

    def extra(content):
        content["t_ema"]["stns.0.other.weight"] = torch.ones(1)

    cases = {
        "lacks stns.0.final_conv.1.bias": without("stns.0.final_conv.1.bias"),
        "tensor transformer.similarity.trunk.6.bias has values that are not finite": nan,
        "padding_mode 'wrap', expected one of border": args,
        "stns.0.other.weight (1,) is no part of the released network": extra,
        "holds no ll": lambda content: content.pop("ll"),
        "holds no t_ema": lambda content: content.pop("t_ema"),
        "3 classes, expected 1 clusters": lambda content: content.update(checkpoint(classes=3)),
    }
    for words, change in cases.items():
        content = checkpoint()
        change(content)
        path = saved(tmp_path / "broken.pt", content)
        folders = ["--images", str(tmp_path / "pictures"), "--out", str(tmp_path / "out")]
        assert run(["align", "--aligner", str(path), *folders]) == 1
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1
        assert f"{path}: " in errors[0]
        assert words.replace("stns.0.", "") in errors[0].replace("stns.0.", "")


# --- Converting


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("generator") / "generator.safetensors"
    write_network(path, Generator(GeneratorConfig(SIZE, channel_base=128, channel_max=8, z_dim=16, w_dim=16)), {})
    return path


def test_a_checkpoint_there_and_back_has_the_same_tensors(tmp_path, generator):
    content = checkpoint(heads=2, classes=4)
    source = saved(tmp_path / "cars.pt", content)
    there = ["convert", "--checkpoint", str(source), "--format", "gangealing", "--generator", str(generator)]
    assert run([*there, "--out", str(tmp_path / "again.pt")]) == 0
    again = torch.load(tmp_path / "again.pt", weights_only=False)
    for part in ("t_ema", "ll", "classifier"):
        theirs = {name: value for name, value in content[part].items() if "input_downsample" not in name}
        assert again[part].keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(again[part][name], value, rtol=1e-6, atol=1e-7)
    assert again["args"].padding_mode == "border"
    # Both networks are in the file, and a conversion takes both out.
    assert run(["convert", "--checkpoint", str(tmp_path / "again.pt"), "--out", str(tmp_path / "ours")]) == 0
    x = pictures()
    found = load_aligner(tmp_path / "ours").align(x).warp.grid((SIZE, SIZE))
    assert torch.equal(found, load_aligner(source).align(x).warp.grid((SIZE, SIZE)))
    z = torch.randn(2, 16, generator=rng(3))
    torch.testing.assert_close(load_generator(tmp_path / "ours")(z), load_generator(generator)(z), rtol=1e-4, atol=1e-5)


def exported(aligner):
    return released.to_released(aligner.config, aligner.state_dict(), aligner.facts, classifier=False)


def test_an_aligner_of_another_design_is_not_exported(tmp_path, generator):
    aligner = load_aligner(saved(tmp_path / "a.pt", checkpoint()))
    exported(aligner)
    for change, words in (
        ({"flow_padding": "replicate"}, "flow_padding replicate"),
        ({"flow_activation": "lrelu"}, "lrelu"),
    ):
        state = {name: getattr(aligner.config, name) for name in change}
        for name, value in change.items():
            object.__setattr__(aligner.config, name, value)
        with pytest.raises(ValueError, match=f"{words}, the released code .*--design released"):
            exported(aligner)
        for name, value in state.items():
            object.__setattr__(aligner.config, name, value)
