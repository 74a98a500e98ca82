"""Pickles of stylegan2-ada-pytorch and stylegan3 become our networks, unless they contradict themselves; one line says where."""

import contextlib
import math
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
from triptych_gangealing.stylegan2.convert import difference
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.shapes import build, discriminator_config, generator_config
from triptych_gangealing.stylegan2.weights import load_discriminator, load_generator, open_networks, write_network

SMALL = {"resolution": 16, "channel_base": 128, "channel_max": 12}
KERNEL = torch.tensor([1.0, 3.0, 3.0, 1.0]).outer(torch.tensor([1.0, 3.0, 3.0, 1.0])) / 64


def generator(**options: Any) -> Generator:
    """No bias or noise strength is zero."""
    torch.manual_seed(0)
    made = Generator(GeneratorConfig(**{**SMALL, "z_dim": 20, "w_dim": 20, "mapping_layers": 2, **options}))
    return disturbed(made)


def discriminator(**options: Any) -> Discriminator:
    torch.manual_seed(1)
    return disturbed(Discriminator(DiscriminatorConfig(**{**SMALL, **options})))


def disturbed(network: nn.Module) -> Any:
    with torch.no_grad():
        for name, value in [*network.named_parameters(), *network.named_buffers()]:
            if name.endswith(("bias", "noise_strength", "w_avg")):
                value.add_(torch.randn_like(value) * 0.3)
    return network


class Pickled:
    """What NVIDIA's persistence writes for a module: a call of its function with class name, source text and attributes."""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": "raise SystemExit",
            "class_name": class_name,
            "state": state,
        }

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,), None


THEIR_NAMES = {
    "FullyConnected": "FullyConnectedLayer",
    "Conv2d": "Conv2dLayer",
    "StyledConv": "SynthesisLayer",
    "ToRGB": "ToRGBLayer",
    "Synthesis": "SynthesisNetwork",
    "Mapping": "MappingNetwork",
    "Epilogue": "DiscriminatorEpilogue",
}
FILTERED = ("Conv2d", "StyledConv", "SynthesisBlock", "DiscriminatorBlock")


def their(module: nn.Module, **attributes: Any) -> Pickled:
    """A network of ours as theirs would be pickled; `attributes` are those of the root."""
    kind = type(module).__name__
    buffers = OrderedDict(module.named_buffers(recurse=False))
    if kind in FILTERED:
        buffers["resample_filter"] = KERNEL.clone()
    if kind == "FullyConnected":
        gains = {"weight_gain": np.float64(module.weight_gain), "bias_gain": module.bias_gain}
        attributes = {"activation": module.activation, **gains, **attributes}
    if hasattr(module, "conv_clamp"):
        attributes["conv_clamp"] = module.conv_clamp
    if kind == "StyledConv":
        attributes["activation"] = "lrelu"
    modules = OrderedDict((name, their(child)) for name, child in module.named_children())
    if kind == "Epilogue":
        mbstd = {"group_size": module.config.mbstd_group_size, "num_channels": module.config.mbstd_channels}
        modules["mbstd"] = Pickled(
            "MinibatchStdLayer", {"_parameters": OrderedDict(), "_buffers": OrderedDict(), **mbstd}
        )
    state = {
        "training": True, "_parameters": OrderedDict(module.named_parameters(recurse=False)), "_buffers": buffers,
        "_non_persistent_buffers_set": set(), "_forward_hooks": OrderedDict(), "_modules": modules, "_init_args": (),
        **attributes,
    }  # fmt: skip
    return Pickled(THEIR_NAMES.get(kind, kind), state)


def ada_options(network: Generator | Discriminator) -> dict[str, Any]:
    """What stylegan2-ada-pytorch builds a network with."""
    c = network.config
    common = {"c_dim": c.c_dim, "img_resolution": c.resolution, "img_channels": c.image_channels}
    widths = {
        "channel_base": c.channel_base,
        "channel_max": c.channel_max,
        "num_fp16_res": 4,
        "conv_clamp": c.conv_clamp and int(c.conv_clamp),
    }
    mapping = {"mapping_kwargs": {"num_layers": c.mapping_layers}}
    if isinstance(network, Generator):
        synthesis = {"synthesis_kwargs": {**widths, "architecture": c.architecture, "fp16_channels_last": True}}
        return {**common, "z_dim": c.z_dim, "w_dim": c.w_dim, **mapping, **synthesis}
    epilogue = {"mbstd_group_size": c.mbstd_group_size, "mbstd_num_channels": c.mbstd_channels}
    nested = {"block_kwargs": {"freeze_layers": 0}, "epilogue_kwargs": epilogue}
    return {**common, **widths, "architecture": c.architecture, **mapping, **nested}


def stylegan3_options(network: Generator | Discriminator) -> dict[str, Any]:
    """The synthesis network's options beside the others, and some that did not exist before."""
    options = ada_options(network)
    synthesis = options.pop("synthesis_kwargs", {})
    return {**options, **synthesis, **({"fused_modconv_default": "inference_only"} if synthesis else {})}


@contextlib.contextmanager
def nvidia_modules():
    names = ("torch_utils", "torch_utils.persistence")
    for name in names:
        sys.modules[name] = types.ModuleType(name)

    def rebuild(meta):
        raise AssertionError("NVIDIA's loader ran")

    rebuild.__module__, rebuild.__qualname__ = names[1], "_reconstruct_persistent_obj"
    sys.modules[names[1]]._reconstruct_persistent_obj = rebuild
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def pickled(path: Path, networks: dict[str, Any], protocol: int = 3) -> Path:
    content = {"training_set_kwargs": {"path": "data.zip"}, "augment_pipe": None, **networks}
    with nvidia_modules():
        path.write_bytes(pickle.dumps(content, protocol))
    return path


def same(a: nn.Module, b: nn.Module) -> bool:
    state = b.state_dict()
    return a.state_dict().keys() == state.keys() and all(torch.equal(x, state[k]) for k, x in a.state_dict().items())


SHAPES = [
    {},
    {"architecture": "skip"},
    {"architecture": "resnet"},
    {"architecture": "orig"},
    {"c_dim": 3},
    {"conv_clamp": 256.0},
    {"image_channels": 1},
    {"resolution": 8, "channel_base": 96},
]


@pytest.mark.parametrize("options", [ada_options, stylegan3_options, lambda network: {}])
@pytest.mark.parametrize("shape", SHAPES)
def test_networks_of_both_versions_are_read(tmp_path, options, shape):
    """Also with no options at all: shapes and attributes tell the rest."""
    g, d = generator(**shape), discriminator(**shape, mbstd_group_size=2)
    content = {"G": their(generator(z_dim=8), _init_kwargs=options(generator(z_dim=8)))}
    content |= {"G_ema": their(g, _init_kwargs=options(g)), "D": their(d, _init_kwargs=options(d))}
    path = pickled(tmp_path / "a.pkl", content)
    found_g, found_d = load_generator(path), load_discriminator(path)
    assert found_g.config == g.config
    assert found_d.config == d.config
    assert same(found_g, g)
    assert same(found_d, d)
    assert not found_g.training
    assert not any(p.requires_grad for p in found_g.parameters())


def test_defaults_stand_in_for_options_that_are_not_there(tmp_path):
    g = generator()
    options = {k: v for k, v in ada_options(g).items() if k in ("z_dim", "img_resolution", "synthesis_kwargs")}
    options["synthesis_kwargs"] = {"channel_base": 128}
    assert load_generator(pickled(tmp_path / "a.pkl", {"G_ema": their(g, _init_kwargs=options)})).config == g.config


def test_frozen_layers_and_half_precision_are_read(tmp_path):
    """FreezeD makes buffers of parameters."""
    d = discriminator()
    pickle_of = their(d, _init_kwargs=ada_options(d))
    block = pickle_of.meta["state"]["_modules"]["b16"].meta["state"]["_modules"]["conv0"].meta["state"]
    block["_buffers"]["weight"] = block["_parameters"].pop("weight").detach().half()
    found = load_discriminator(pickled(tmp_path / "a.pkl", {"D": pickle_of}))
    assert found.b16.conv0.weight.dtype == torch.float32
    torch.testing.assert_close(found.b16.conv0.weight, d.b16.conv0.weight, rtol=1e-3, atol=1e-3)


def test_without_an_average_the_generator_in_training_is_read(tmp_path):
    g = generator()
    path = pickled(tmp_path / "a.pkl", {"G": their(g, _init_kwargs=ada_options(g))})
    assert same(load_generator(path), g)
    with pytest.raises(ValueError, match=r"a\.pkl: holds no discriminator"):
        load_discriminator(path)


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        load_generator(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"img_resolution": 32}, "lacks synthesis.b32."),
        ({"img_resolution": 8}, "is no part of the network expected by its resolution 8"),
        ({"img_resolution": 2**30}, "resolution is no whole number"),
        ({"img_resolution": 24}, "resolution 24: expected a power of two"),
        ({"img_channels": 1}, "torgb.weight is (3, 12, 1, 1), not (1, 12, 1, 1)"),
        ({"z_dim": 32}, "mapping.fc0.weight is (20, 20), not (20, 32)"),
        ({"c_dim": 5}, "lacks mapping.embed."),
        ({"mapping_kwargs": {"num_layers": 3}}, "lacks mapping.fc2."),
        ({"mapping_kwargs": {"num_layers": 2, "lr_multiplier": 0.1}}, "option lr_multiplier is not 0.01"),
        ({"mapping_kwargs": {"activation": "relu"}}, "option activation is not lrelu"),
        ({"synthesis_kwargs": {"channel_base": 64}}, "expected by its resolution 16, channel_base 64, channel_max 12"),
        ({"synthesis_kwargs": {"resample_filter": [1, 2, 1]}}, "option resample_filter is not [1, 3, 3, 1]"),
        ({"synthesis_kwargs": {"resample_filter": None}}, "option resample_filter is not [1, 3, 3, 1]"),
        ({"synthesis_kwargs": {"use_noise": False}}, "option use_noise is not True"),
        ({"synthesis_kwargs": {"architecture": "resnet"}}, "lacks synthesis.b8.skip.weight"),
        ({"synthesis_kwargs": {"architecture": ["skip"]}}, "architecture is not one of skip, resnet, orig"),
        ({"init_res": [4, 8]}, "option 'init_res' is not known here"),
        ({"synthesis_kwargs": {"conv_clamp": -1}}, "conv_clamp is"),
        ({"w_dim": torch.zeros(3)}, "w_dim is no whole number"),
        ({"synthesis_kwargs": {"kernel_size": torch.zeros(3)}}, "option kernel_size is not 3"),
    ],
)
def test_options_that_tensors_contradict_are_refused(tmp_path, changes, expected):
    g = generator()
    message = refusal(pickled(tmp_path / "a.pkl", {"G_ema": their(g, _init_kwargs={**ada_options(g), **changes})}))
    assert expected in message
    assert "G_ema: " in message


def inner(pickle_of: Pickled, path: str) -> dict[str, Any]:
    for name in path.split("."):
        pickle_of = pickle_of.meta["state"]["_modules"][name]
    return pickle_of.meta["state"]


def test_the_first_tensor_that_does_not_fit_is_named(tmp_path):
    def broken(number, change):
        g = generator()
        pickle_of = their(g, _init_kwargs=ada_options(g))
        change(inner(pickle_of, "synthesis.b8.conv0"))
        return refusal(pickled(tmp_path / f"{number}.pkl", {"G_ema": pickle_of}))

    name = "synthesis.b8.conv0"
    assert f"lacks {name}.bias (12,)" in broken(1, lambda s: s["_parameters"].pop("bias"))
    wrong = broken(2, lambda s: s["_parameters"].update(weight=nn.Parameter(torch.zeros(6, 12, 3, 3))))
    assert f"{name}.weight is (6, 12, 3, 3), not (12, 12, 3, 3)" in wrong
    assert f"{name}.extra (2,) is no part" in broken(3, lambda s: s["_buffers"].update(extra=torch.zeros(2)))
    blurred = broken(4, lambda s: s["_buffers"].update(resample_filter=torch.ones(4, 4) / 16))
    assert f"{name}.resample_filter (4, 4) is another filter than [1, 3, 3, 1]" in blurred
    assert "resample_filter (6, 6)" in broken(5, lambda s: s["_buffers"].update(resample_filter=torch.ones(6, 6) / 36))
    assert f"{name}.activation is 'relu', here it is lrelu" in broken(6, lambda s: s.update(activation="relu"))
    assert f"{name}.conv_clamp is 256, here it is None" in broken(7, lambda s: s.update(conv_clamp=256))


def test_a_learning_rate_of_the_mapping_in_its_modules_alone_is_refused(tmp_path):
    g = generator()
    pickle_of = their(g, _init_kwargs={})
    inner(pickle_of, "mapping.fc1")["bias_gain"] = 1.0
    assert "mapping.fc1.bias_gain is 1.0, here it is 0.01" in refusal(pickled(tmp_path / "a.pkl", {"G_ema": pickle_of}))


def test_a_stylegan3_network_is_refused_as_such(tmp_path):
    state = {
        "_parameters": OrderedDict(weight=nn.Parameter(torch.zeros(3, 3))),
        "_buffers": OrderedDict(),
        "_modules": OrderedDict(),
    }
    synthesis = {**state, "_parameters": OrderedDict(), "_modules": OrderedDict(input=Pickled("SynthesisInput", state))}
    root = {**synthesis, "_modules": OrderedDict(synthesis=Pickled("SynthesisNetwork", synthesis))}
    assert "a StyleGAN3 network" in refusal(pickled(tmp_path / "a.pkl", {"G_ema": Pickled("Generator", root)}))


def test_something_else_than_a_generator_is_refused(tmp_path):
    layer = their(generator().mapping.fc0)
    assert "has blocks of resolution []" in refusal(pickled(tmp_path / "a.pkl", {"G_ema": layer}))
    assert "holds no networks" in refusal(pickled(tmp_path / "b.pkl", {"G_ema": None}))


def test_our_own_files_are_read(tmp_path):
    g, d = generator(), discriminator()
    write_network(tmp_path / "generator.safetensors", g, {"images": 5})
    write_network(tmp_path / "discriminator.safetensors", d, {})
    source = open_networks(tmp_path)
    assert source.facts["images"] == 5
    assert same(source.generator()[0], g)
    assert same(load_discriminator(tmp_path), d)
    assert same(load_generator(tmp_path / "generator.safetensors"), g)
    with pytest.raises(ValueError, match="holds no generator"):
        load_generator(tmp_path / "discriminator.safetensors")


def test_absent_files_are_named(tmp_path):
    for path in (tmp_path / "a.pkl", tmp_path / "a.pt", tmp_path / "a.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=path.name):
            load_generator(path)


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
@pytest.mark.parametrize("options", [{}, {"c_dim": 3}, {"conv_clamp": 0.5}])
def test_the_plain_forward_pass_agrees_with_both_networks(architecture, options):
    for network in (
        generator(architecture=architecture, **options),
        discriminator(architecture=architecture, **options),
    ):
        assert difference(network.eval(), network.state_dict()) < 1e-4


@pytest.mark.parametrize(("group", "channels"), [(1, 1), (2, 3), (4, 0)])
def test_the_plain_forward_pass_agrees_for_other_spreads(group, channels):
    d = discriminator(mbstd_group_size=group, mbstd_channels=channels)
    assert difference(d, d.state_dict()) < 1e-4


def test_a_network_whose_outputs_differ_is_refused():
    g, d = generator(), discriminator()
    for network, name in ((g, "synthesis.b8.conv0.weight"), (d, "b8.conv1.weight")):
        flipped = {k: v.flip(2, 3) if k == name else v for k, v in network.state_dict().items()}
        with pytest.raises(ValueError, match="outputs of the converted network differ from the source's by"):
            difference(network, flipped)
        broken = {k: v * math.nan if k == name else v for k, v in network.state_dict().items()}
        with pytest.raises(ValueError, match="by nan, more than rounding"):
            difference(network, broken)


def test_a_config_is_inferred_from_shapes_alone():
    for shape in ({}, {"resolution": 64, "channel_base": 512}, {"channel_base": 1000, "channel_max": 40}, {"c_dim": 4}):
        for network, infer in ((generator(**shape), generator_config), (discriminator(**shape), discriminator_config)):
            state = network.state_dict()
            found = infer(state)
            widths = {r: network.config.channels_at(r) for r in network.config.resolutions}
            assert {r: found.channels_at(r) for r in found.resolutions} == widths
            assert same(build(found, state), network)
