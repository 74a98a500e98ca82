"""Perceptual distances against the `lpips` package, torchvision and formulas written out; their weights' files, good and bad."""

import hashlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from triptych_common.storage import checkpoint
from triptych_gangealing.encoders import perceptual
from triptych_gangealing.encoders.perceptual import (
    ENCODER_FILE,
    SSL_DIVISOR,
    Encoder,
    EncoderConfig,
    PerceptualDistance,
    Vgg16,
    open_distance,
    read_encoder,
    read_vgg,
    unit_length,
    write_encoder,
)


def images(n: int = 2, size: tuple[int, int] = (32, 32), seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


@pytest.fixture(scope="module")
def vgg() -> Vgg16:
    """Random weights of such a size that features neither fade nor grow."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Vgg16()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.normal_(module.bias, std=0.1)
    return network


@pytest.fixture(scope="module")
def vgg_file(vgg: Vgg16, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the released SSL network comes: torchvision's `features` alone."""
    path = tmp_path_factory.mktemp("vgg") / "features.pt"
    torch.save(vgg.state_dict(), path)
    return path


class Trunk(nn.Module):
    """Two levels, of which one is smaller; negative features too."""

    least = 4

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 7, 3, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.first(x), self.second(self.first(x)))


def small_encoder(seed: int = 0, **settings: object) -> Encoder:
    """With statistics as of some training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = Encoder(EncoderConfig((4, 6, 8), **settings))
        for _ in range(3):
            encoder(images(8, dtype=torch.float32))
    return encoder.eval()


# --- values


def test_distance_is_the_formula_written_out() -> None:
    torch.manual_seed(0)
    heads = [torch.rand(5), torch.rand(7)]
    shift, scale = (0.1, -0.2, 0.3), (0.5, 0.4, 2.0)
    trunk = Trunk()
    distance = PerceptualDistance(trunk, heads=heads, divisor=3, shift=shift, scale=scale).double()
    a, b = images(2, (6, 5)), images(2, (6, 5), seed=1)

    def scaled(x: Tensor) -> Tensor:
        return torch.stack([(x[:, c] - distance.shift[c]) / distance.scale[c] for c in range(3)], dim=1)

    expected = []
    for n in range(2):
        total = 0.0
        pairs = zip(trunk(scaled(a)), trunk(scaled(b)), distance.heads, strict=True)
        for f, g, head in pairs:
            height, width = f.shape[2:]
            for y in range(height):
                for x in range(width):
                    p, q = f[n, :, y, x], g[n, :, y, x]
                    difference = p / p.norm() - q / q.norm()
                    total += float((head.flatten() * difference**2).sum()) / (height * width)
        expected.append(total / 3)
    torch.testing.assert_close(distance(a, b), torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=0)


def test_vgg_is_torchvisions(vgg: Vgg16) -> None:
    models = pytest.importorskip("torchvision.models.vgg")
    theirs = models.make_layers(models.cfgs["D"], batch_norm=False)
    theirs.load_state_dict(vgg.state_dict())
    x, relus = images(1, (24, 40), dtype=torch.float32), (3, 8, 15, 22, 29)
    with torch.no_grad():
        expected = []
        ours = vgg(x)
        for i, layer in enumerate(theirs[:30]):
            x = layer(x)
            if i in relus:
                expected.append(x.clone())
    assert len(ours) == len(expected)
    for found, wanted in zip(ours, expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, vgg: Vgg16) -> Callable[..., nn.Module]:
    """`lpips.LPIPS` on the same weights of VGG."""
    lpips = pytest.importorskip("lpips")
    models = pytest.importorskip("torchvision.models.vgg")

    def make(state: dict[str, Tensor] | None = None, **options: object) -> nn.Module:
        features = models.make_layers(models.cfgs["D"], batch_norm=False)
        features.load_state_dict(vgg.state_dict() if state is None else state)
        monkeypatch.setattr(
            lpips.pretrained_networks.tv, "vgg16", lambda pretrained: SimpleNamespace(features=features)
        )
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False, **options)

    return make


def test_lpips_is_the_packages_own(package: Callable[..., nn.Module], vgg_file: Path) -> None:
    a, b = images(), images(seed=1)
    expected = package().double()(a, b).flatten()
    found = open_distance("lpips", weights=vgg_file).double()(a, b)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    assert (found > 0.01).all()


def test_ssl_vgg_is_the_package_without_heads_over_18(package: Callable[..., nn.Module], vgg_file: Path) -> None:
    a, b = images(), images(seed=1)
    expected = package(lpips=False).double()(a, b).flatten() / 18
    found = open_distance("ssl-vgg", weights=vgg_file).double()(a, b)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


def test_vanishing_features_have_a_gradient(package: Callable[..., nn.Module], vgg: Vgg16, tmp_path: Path) -> None:
    """Where a layer's features are too small to square, the package has no finite gradient; ours is that of the other layers."""
    state = {name: value.clone() for name, value in vgg.state_dict().items()}
    state["28.weight"] *= 1e-30
    state["28.bias"] *= 0
    torch.save(state, tmp_path / "vanishing.pt")
    ours, theirs = open_distance("lpips", weights=tmp_path / "vanishing.pt"), package(state)
    gradients = []
    for distance in (ours, theirs):
        a = images(1, dtype=torch.float32).requires_grad_()
        distance(a, images(1, seed=1, dtype=torch.float32)).sum().backward()
        gradients.append(a.grad)
    assert torch.isfinite(gradients[0]).all()
    assert gradients[0].abs().max() > 0
    assert not torch.isfinite(gradients[1]).all()


def test_normalising_zero_has_a_gradient() -> None:
    lpips = pytest.importorskip("lpips")
    for function, finite in ((unit_length, True), (lpips.normalize_tensor, False)):
        x = torch.zeros(1, 3, 2, 2, requires_grad=True)
        function(x).sum().backward()
        assert bool(torch.isfinite(x.grad).all()) == finite


def test_unit_length_near_zero() -> None:
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(unit_length(x).norm(dim=1), torch.ones(1, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(unit_length(7 * x), unit_length(x))
    assert torch.autograd.gradcheck(unit_length, x.requires_grad_())
    for size in (0.0, 1e-30, 1e-12, 1e-6):
        features = torch.full((1, 3, 1, 1), size, requires_grad=True)
        unit_length(features).square().sum().backward()
        assert torch.isfinite(features.grad).all(), size


@pytest.mark.parametrize("name", ["vgg", "encoder"])
def test_gradients_are_finite_at_black_and_gray_images(name: str, vgg: Vgg16) -> None:
    distance = PerceptualDistance(vgg if name == "vgg" else small_encoder(), divisor=SSL_DIVISOR)
    for a, b in ((torch.zeros(1, 3, 32, 32), images(1, dtype=torch.float32)), (-torch.ones(1, 3, 32, 32),) * 2):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        distance(a, b).sum().backward()
        assert torch.isfinite(a.grad).all()
        assert torch.isfinite(b.grad).all()


def test_what_a_distance_is() -> None:
    """0 between equals, symmetric, the same in any batch, given by features; its network is not trained."""
    distance = PerceptualDistance(small_encoder()).double()
    a, b = images(5), images(5, seed=1)
    assert torch.equal(distance(a, a), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(distance(a, b), distance(b, a))
    torch.testing.assert_close(distance(a[3:4], b[3:4])[0], distance(a, b)[3])
    assert torch.equal(distance.between(distance.features(a), distance.features(b)), distance(a, b))
    assert not any(p.requires_grad for p in distance.parameters())
    before = distance(a, b)
    nn.ModuleList([distance]).train()
    assert torch.equal(distance(a, b), before)


def test_images_that_do_not_fit_are_refused(vgg: Vgg16) -> None:
    distance = PerceptualDistance(vgg)
    for shape in ((1, 3, 15, 40), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match=r"expected \(n, 3, height, width\), at least 16x16"):
            distance.features(torch.zeros(shape))
    with pytest.raises(ValueError, match="expected two of one shape"):
        distance(torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 16, 16))


# --- files


def test_vgg_is_read_from_torchvisions_file_or_its_features(vgg: Vgg16, vgg_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    whole = {f"features.{name}": value for name, value in vgg.state_dict().items()}
    torch.save(whole | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "whole.pth")
    save_file(vgg.state_dict(), tmp_path / "features.safetensors")
    torch.save({"state_dict": {f"module.encoder.{name}": x for name, x in whole.items()}}, tmp_path / "trained.ckpt")
    for path in (tmp_path / "whole.pth", tmp_path / "features.safetensors", tmp_path / "trained.ckpt", vgg_file):
        for name, value in read_vgg(path).state_dict().items():
            assert torch.equal(value, vgg.state_dict()[name])


class Harm:
    """What runs code when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_files_that_are_no_vgg_are_refused(tmp_path: Path, vgg_file: Path) -> None:
    torch.save({"0.weight": Harm(tmp_path / "harmed")}, tmp_path / "harmful.pt")
    torch.save({"0.weight": torch.zeros(64, 3, 5, 5)}, tmp_path / "other.pt")
    torch.save({"0.weight": 1}, tmp_path / "number.pt")
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    (tmp_path / "short.pt").write_bytes(vgg_file.read_bytes()[:1000])
    for name, message in (
        ("harmful.pt", "may run code"),
        ("other.pt", r"0\.weight is \(64, 3, 5, 5\), expected \(64, 3, 3, 3\)"),
        ("number.pt", r"0\.weight is absent"),
        ("list.pt", "holds a list, expected a state dict"),
        ("short.pt", "truncated"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            open_distance("ssl-vgg", weights=tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)
    assert not (tmp_path / "harmed").exists()
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_distance("ssl-vgg", weights=tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="fetch http"):
        open_distance("ssl-vgg")
    for name in ("simclr", "simclr:", "vgg", "lpips:x"):
        with pytest.raises(ValueError, match="expected lpips, ssl-vgg, or simclr:PATH"):
            open_distance(name)


@pytest.fixture
def nothing_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches and no network."""
    monkeypatch.setenv("TRIPTYCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(perceptual, "VGG_URL", "http://127.0.0.1:9/vgg16.pth")
    monkeypatch.setattr(perceptual, "lpips_heads", lambda: [torch.ones(n) for n in (64, 128, 256, 512, 512)])
    return tmp_path


def test_offline_lpips_names_the_remedy(nothing_fetched: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot be fetched .* pass its path as weights") as caught:
        open_distance("lpips")
    assert "\n" not in str(caught.value)
    assert str(nothing_fetched / "data" / "vgg" / perceptual.VGG_FILE) in str(caught.value)


@pytest.mark.parametrize("place", ["data/vgg", "torch/hub/checkpoints"])
def test_fetched_vgg_is_used_if_it_is_the_one_of_its_name(
    place: str, nothing_fetched: Path, vgg_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = hashlib.sha256(vgg_file.read_bytes()).hexdigest()
    monkeypatch.setattr(perceptual, "VGG_FILE", f"vgg16-{sha256[:8]}.pth")
    path = nothing_fetched / place / perceptual.VGG_FILE
    path.parent.mkdir(parents=True)
    path.symlink_to(vgg_file)
    a, b = images(1, dtype=torch.float32), images(1, seed=1, dtype=torch.float32)
    assert torch.equal(open_distance("lpips")(a, b), open_distance("lpips", weights=vgg_file)(a, b))
    path.unlink()
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not that of its name; delete the file"):
        open_distance("lpips")


def test_lpips_without_its_package_names_it(vgg_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None if name == "lpips" else find_spec(name))
    with pytest.raises(ImportError, match=r"pip install 'triptych-gangealing\[lpips\]'"):
        open_distance("lpips", weights=vgg_file)


# --- our own encoder


def test_encoder_gives_the_maps_of_its_last_stages() -> None:
    for size in ((32, 32), (20, 44)):
        maps = small_encoder(compared=3)(images(2, size, dtype=torch.float32))
        assert [tuple(x.shape) for x in maps] == [
            (2, c, size[0] // s, size[1] // s) for c, s in ((4, 1), (6, 2), (8, 4))
        ]
    few = small_encoder(compared=2)(images(2, size, dtype=torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(few, maps[1:], strict=True))
    with pytest.raises(ValueError, match=r"compared 4: expected 1 to 3"):
        EncoderConfig((4, 6, 8), compared=4)
    with pytest.raises(ValueError, match="at least one stage"):
        EncoderConfig(())


def test_encoder_comes_back_from_its_file(tmp_path: Path) -> None:
    encoder, a, b = small_encoder(), images(dtype=torch.float32), images(seed=1, dtype=torch.float32)
    write_encoder(tmp_path / ENCODER_FILE, encoder, {"seed": 3})
    again, facts = read_encoder(tmp_path / ENCODER_FILE)
    assert (again.config, facts) == (encoder.config, {"seed": 3})
    expected = PerceptualDistance(encoder, divisor=18)(a, b)
    for path in (tmp_path, tmp_path / ENCODER_FILE):
        assert torch.equal(open_distance(f"simclr:{path}")(a, b), expected)


def test_files_that_are_no_encoder_are_refused(tmp_path: Path) -> None:
    encoder = small_encoder()
    config = {"widths": [4, 6, 9], "compared": 2}
    checkpoint.write(tmp_path / "other.safetensors", encoder.state_dict(), {"kind": "StyleGAN2 generator"})
    checkpoint.write(tmp_path / "misfit.safetensors", encoder.state_dict(), {"kind": "image encoder", "config": config})
    for name, message in (("other", "holds no encoder"), ("misfit", "do not fit its own config")):
        with pytest.raises(ValueError, match=message) as caught:
            open_distance(f"simclr:{tmp_path / name}.safetensors")
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=ENCODER_FILE):
        open_distance(f"simclr:{tmp_path}")
