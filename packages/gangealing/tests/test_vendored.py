"""NVIDIA's networks in place of ours: the adapter on a stand-in for their code, and parity with a plain forward pass of both.

The stand-in has their constructors' signatures and file layout; behind them are this package's own networks.
"""

import sys
import types
from pathlib import Path

import pytest
import torch
from triptych_gangealing.stylegan2 import convert
from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.vendored import FOLDER, vendored

NETWORKS = """
import dnnlib
import torch
from torch_utils import persistence
from triptych_gangealing.stylegan2 import config, discriminator, generator

CALLS = []


def with_filters(network):
    for name, module in list(network.named_modules()):
        if name.endswith(("conv0", "skip")):
            module.register_buffer("resample_filter", torch.ones(4, 4))
    return network


class Generator(torch.nn.Module):
    def __init__(self, z_dim, c_dim, w_dim, img_resolution, img_channels, mapping_kwargs={}, synthesis_kwargs={}):
        super().__init__()
        shape = config.GeneratorConfig(
            img_resolution, c_dim=c_dim, image_channels=img_channels, z_dim=z_dim, w_dim=w_dim,
            mapping_layers=mapping_kwargs.get("num_layers", 8), **synthesis_kwargs,
        )
        whole = with_filters(generator.Generator(shape))
        self.mapping, self.synthesis, self.whole = whole.mapping, whole.synthesis, [whole]
        self.num_ws = shape.num_ws

    def forward(self, z, c, truncation_psi=1, truncation_cutoff=None, noise_mode="random", force_fp32=False):
        assert c.shape == (len(z), self.whole[0].config.c_dim) and force_fp32
        CALLS.append(noise_mode)
        c = c if c.shape[1] else None
        return self.whole[0](
            z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff, noise=noise_mode
        )


class Discriminator(torch.nn.Module):
    def __init__(
        self, c_dim, img_resolution, img_channels, architecture="resnet", channel_base=32768, channel_max=512,
        num_fp16_res=0, conv_clamp=None, cmap_dim=None, block_kwargs={}, mapping_kwargs={}, epilogue_kwargs={},
    ):
        super().__init__()
        shape = config.DiscriminatorConfig(
            img_resolution, c_dim=c_dim, image_channels=img_channels, architecture=architecture,
            channel_base=channel_base, channel_max=channel_max, conv_clamp=conv_clamp,
            mapping_layers=mapping_kwargs.get("num_layers", 8),
            mbstd_group_size=epilogue_kwargs["mbstd_group_size"], mbstd_channels=epilogue_kwargs["mbstd_num_channels"],
        )
        whole = with_filters(discriminator.Discriminator(shape))
        for name, child in whole.named_children():
            self.add_module(name, child)
        self.whole = [whole]

    def forward(self, img, c, force_fp32=False):
        assert c.shape == (len(img), self.whole[0].config.c_dim) and force_fp32
        return self.whole[0](img, c if c.shape[1] else None)[:, None]
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder laid out as theirs is."""
    for name, text in {
        "training/__init__.py": "",
        "training/networks.py": NETWORKS,
        "torch_utils/__init__.py": "",
        "torch_utils/persistence.py": "HERE = True\n",
        "dnnlib/__init__.py": "from . import util\n",
        "dnnlib/util.py": "",
    }.items():
        path = tmp_path / "stylegan2-ada-pytorch" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "stylegan2-ada-pytorch"


def shaken(network):
    """With random values where a fresh network has zeros or ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in network.state_dict().values():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return network.requires_grad_(False).eval()


def make_generator(**options) -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"resolution": 16, "channel_base": 128, "channel_max": 12, "z_dim": 7, "w_dim": 9, **options}
        return shaken(Generator(GeneratorConfig(mapping_layers=3, **settings)))


def make_discriminator(**options) -> Discriminator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"resolution": 16, "channel_base": 128, "channel_max": 12, "mapping_layers": 2, **options}
        return shaken(Discriminator(DiscriminatorConfig(**settings)))


def inputs(c_dim: int, n: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    z, x = torch.randn(n, 7, generator=generator), torch.randn(n, 3, 16, 16, generator=generator)
    return z, x, torch.eye(c_dim)[torch.arange(n) % c_dim] if c_dim else None


# --- the adapter


@pytest.mark.parametrize("c_dim", [0, 3])
def test_the_adapter_hands_over_shape_weights_and_options(folder, c_dim):
    z, x, c = inputs(c_dim)
    ours = make_generator(c_dim=c_dim, architecture="resnet", conv_clamp=20.0)
    theirs = vendored(ours, folder)
    for options in ({}, {"truncation_psi": 0.4}, {"truncation_psi": 0.4, "truncation_cutoff": 2}, {"noise": "none"}):
        torch.testing.assert_close(theirs(z, c, **options), ours(z, c, **options), rtol=0, atol=0)
    assert not torch.equal(theirs(z, c, noise="none"), theirs(z, c))
    ours = make_discriminator(c_dim=c_dim, architecture="skip", mbstd_group_size=3, mbstd_channels=2, conv_clamp=20.0)
    theirs = vendored(ours, folder)
    torch.testing.assert_close(theirs(x, c), ours(x, c), rtol=0, atol=0)
    assert not any(p.requires_grad for p in theirs.parameters())


def test_nothing_of_theirs_stays_importable(folder, monkeypatch):
    mine = types.ModuleType("dnnlib")  # a module of that name that somebody else has imported
    monkeypatch.setitem(sys.modules, "dnnlib", mine)
    path, before = list(sys.path), set(sys.modules)
    theirs = vendored(make_generator(), folder)
    assert sys.path == path
    assert sys.modules["dnnlib"] is mine
    left = {name for name in set(sys.modules) - before if name.split(".")[0] in ("training", "torch_utils", "dnnlib")}
    assert left == set()
    assert theirs(inputs(0)[0]).shape == (6, 3, 16, 16)  # and it works without

    (folder / "training" / "networks.py").write_text("import torch_utils\nraise RuntimeError('broken')\n")
    with pytest.raises(RuntimeError, match="broken"):
        vendored(make_generator(), folder)
    assert sys.path == path
    assert sys.modules["dnnlib"] is mine
    assert "torch_utils" not in sys.modules


def test_a_missing_folder_names_its_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="no stylegan2-ada-pytorch there; run make vendor-stylegan2-ada"):
        vendored(make_generator(), tmp_path)


@pytest.mark.parametrize(("old", "new"), [
    ("        self.num_ws = shape.num_ws\n", "        self.extra = torch.nn.Parameter(torch.zeros(1))\n"),
    ("        self.num_ws = shape.num_ws\n", "        del self.synthesis.b8.torgb.bias\n"),
])  # fmt: skip
def test_tensors_that_are_not_ours_are_refused(folder, old, new):
    path = folder / "training" / "networks.py"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    name = "extra" if "extra" in new else "synthesis.b8.torgb.bias"
    with pytest.raises(ValueError, match=rf"{name} is not in both networks; fetch commit d72cc7d041b4"):
        vendored(make_generator(), folder)


# --- parity of ours and theirs with the plain forward pass, which inserts zeros and gives every image its own weights


@pytest.fixture(params=["ours", "vendored"])
def implementation(request):
    root = Path(__file__).parents[3]
    if request.param == "ours":
        return lambda network: network
    if not (root / FOLDER / "training" / "networks.py").is_file():
        pytest.skip(f"{FOLDER} is not there: make vendor-stylegan2-ada fetches it")
    return lambda network: vendored(network, root / FOLDER)


@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("architecture", ["skip", "resnet"])
def test_parity(implementation, architecture, c_dim):
    z, x, c = inputs(c_dim)
    generator = make_generator(c_dim=c_dim, architecture=architecture)
    discriminator = make_discriminator(c_dim=c_dim, architecture=architecture, mbstd_group_size=3)
    images = convert.images(generator.config, generator.state_dict(), z, c)
    logits = convert.logits(discriminator.config, discriminator.state_dict(), x, c)
    assert images.std() > 0.1
    assert logits.std() > 0.1
    torch.testing.assert_close(implementation(generator)(z, c), images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(implementation(discriminator)(x, c), logits, rtol=1e-4, atol=1e-4)
