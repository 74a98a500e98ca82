"""Principal directions of W against numpy's SVD, their cache, and the mixing of styles against layers taken one by one."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from triptych_common import randomness
from triptych_gangealing import modes
from triptych_gangealing.modes import Directions, Mode, mixed, pca, sampled_styles
from triptych_gangealing.stylegan2.config import GeneratorConfig
from triptych_gangealing.stylegan2.generator import Generator

SEED = 5


def generator_of(seed=0, c_dim=0, w_dim=12):
    """A tiny generator whose W is not round."""
    torch.manual_seed(seed)
    config = GeneratorConfig(8, channel_base=64, channel_max=8, c_dim=c_dim, z_dim=10, w_dim=w_dim, mapping_layers=2)
    generator = Generator(config).requires_grad_(False)
    last = generator.mapping.fc1
    last.weight.mul_(torch.linspace(0.3, 3, w_dim)[:, None])
    last.bias.copy_(100 * torch.linspace(-1, 2, w_dim))  # times lr_multiplier 0.01
    return generator.eval()


def directions_of(count=3, dim=12):
    q = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(2)))[0]
    return Directions(torch.arange(dim).float(), q[:count].contiguous(), torch.arange(count, 0, -1).float())


def up_to_sign(found, expected):
    signs = np.sign((found * expected).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found * signs, expected, atol=2e-5)


@pytest.mark.parametrize("n", [200, 5_000])
def test_pca_equals_numpys_svd(n):
    generator = generator_of()
    found = pca(generator, n, 4, SEED)
    w = sampled_styles(generator, range(n), SEED).double().numpy()
    _, spread, rows = np.linalg.svd(w - w.mean(axis=0), full_matrices=False)
    up_to_sign(found.components.numpy(), rows[:4])
    np.testing.assert_allclose(found.mean, w.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.deviations, spread[:4] / np.sqrt(n - 1), rtol=1e-5)
    np.testing.assert_allclose(found.components @ found.components.T, np.eye(4), atol=1e-6)


def test_pca_in_several_portions_is_exact(monkeypatch):
    """No direction is dropped on the way, so portions agree with all samples at once, to the last direction."""
    generator, n = generator_of(), 1_003
    monkeypatch.setattr(modes, "FITTED", 97)
    found = pca(generator, n, 12, SEED)
    whole = PCA().fit(sampled_styles(generator, range(n), SEED).double().numpy())
    up_to_sign(found.components.numpy(), whole.components_)
    np.testing.assert_allclose(found.deviations, whole.explained_variance_**0.5, rtol=1e-5)


def test_pca_samples_are_of_w_and_of_their_seed():
    generator = generator_of()
    z = randomness.normal(SEED, "pca/z", [0], (modes.CHUNK, 10))[0]
    styles = sampled_styles(generator, range(modes.CHUNK + 7), SEED)
    torch.testing.assert_close(styles[: modes.CHUNK], generator.mapping(z))
    portions = [sampled_styles(generator, part, SEED) for part in (range(3), range(3, 4_090), range(4_090, 4_103))]
    torch.testing.assert_close(torch.cat(portions), styles)
    assert not torch.equal(sampled_styles(generator, range(5), SEED + 1), styles[:5])


def test_pca_of_a_conditional_generator_takes_classes_in_turn():
    generator = generator_of(c_dim=3)
    z = randomness.normal(SEED, "pca/z", [0], (modes.CHUNK, 10))[0][:7]
    expected = generator.mapping(z, torch.eye(3)[torch.arange(7) % 3])
    torch.testing.assert_close(sampled_styles(generator, range(7), SEED), expected)


@pytest.mark.parametrize(("n", "count"), [(1_000, 13), (1_000, -1), (5, 5), (0, 1)])
def test_pca_refuses_more_directions_than_there_are(n, count):
    with pytest.raises(ValueError, match=r"principal directions of \d+ samples: expected 0 to") as caught:
        pca(generator_of(), n, count)
    assert "\n" not in str(caught.value)


def test_pca_of_few_samples_and_of_no_direction():
    generator = generator_of()
    few = pca(generator, 5, 4, SEED)
    assert len(few.deviations) == 4
    assert few.deviations.min() > 0
    none = pca(generator, 100, 0, SEED)
    assert none.components.shape == (0, 12)
    torch.testing.assert_close(Mode(none)(0), none.mean)


def counted(monkeypatch):
    calls, fit = [], modes._fit

    def recorded(*args):
        calls.append(args)
        return fit(*args)

    monkeypatch.setattr(modes, "_fit", recorded)
    return calls


def test_cache_serves_any_count_and_only_the_same_mapping_samples_and_seed(tmp_path, monkeypatch):
    calls, generator = counted(monkeypatch), generator_of()
    first = pca(generator, 300, 5, SEED, folder=tmp_path)
    generator.synthesis.b8.conv1.weight.add_(1)  # has no part in W
    generator.mapping.w_avg.add_(1)
    again = pca(generator, 300, 2, SEED, folder=tmp_path)
    assert len(calls) == 1
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(first.components[:2], again.components)
    assert torch.equal(first.mean, again.mean)
    fresh = pca(generator, 300, 5, SEED)
    assert torch.equal(fresh.components, first.components)
    assert torch.equal(fresh.deviations, first.deviations)
    calls.clear()
    pca(generator, 301, 2, SEED, folder=tmp_path)
    pca(generator, 300, 2, SEED + 1, folder=tmp_path)
    generator.mapping.fc0.weight.mul_(2)
    pca(generator, 300, 2, SEED, folder=tmp_path)
    assert len(calls) == 3
    assert len(list(tmp_path.iterdir())) == 4


def test_damaged_cache_is_made_again(tmp_path, monkeypatch):
    generator = generator_of()
    first = pca(generator, 300, 3, SEED, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    calls = counted(monkeypatch)
    assert torch.equal(pca(generator, 300, 3, SEED, folder=tmp_path).components, first.components)
    assert len(calls) == 1
    pca(generator, 300, 3, SEED, folder=tmp_path)
    assert len(calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_unwritable_cache_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="cannot be written") as caught:
        pca(generator_of(), 100, 2, folder=tmp_path / "taken" / "below")
    assert "\n" not in str(caught.value)


def test_mode_starts_at_the_mean_and_moves_along_directions():
    directions = directions_of()
    mode = Mode(directions, modes=2)
    assert torch.equal(mode(), directions.mean.repeat(2, 1))
    mode.begin(mode.origins, torch.tensor([[1.0, 0, -2], [0, 3, 0]]))
    expected = directions.mean + directions.components[0] - 2 * directions.components[2]
    torch.testing.assert_close(mode(0), expected)
    torch.testing.assert_close(mode(torch.tensor([1, 0, 0])), torch.stack([mode(1), expected, expected]))
    torch.testing.assert_close(mode()[1], directions.mean + 3 * directions.components[1])
    mode.begin(torch.eye(12)[:2], mode.alpha)
    torch.testing.assert_close(mode(1), torch.eye(12)[1] + 3 * directions.components[1])


def test_modes_are_evened_out_by_what_they_have_above_an_equal_share():
    mode = Mode(directions_of(), modes=4)
    mode.even_out(torch.tensor([0.5, 0.25, 0.25, 0.0]), 0.1)
    torch.testing.assert_close(mode.handicap, torch.tensor([0.1, 0.0, 0.0, -0.1]))


def test_only_alpha_is_learned_and_by_the_chain_rule():
    directions = directions_of()
    mode = Mode(directions, modes=2)
    assert [name for name, _ in mode.named_parameters()] == ["alpha"]
    assert set(mode.state_dict()) == {"alpha", "origins", "components", "handicap"}
    upstream = torch.randn(12, generator=torch.Generator().manual_seed(3))
    (mode(1) * upstream).sum().backward()
    torch.testing.assert_close(mode.alpha.grad[1], directions.components @ upstream)
    assert not mode.alpha.grad[0].any()


def test_coefficients_lead_to_the_nearest_point():
    directions = directions_of()
    w = torch.randn(4, 12, generator=torch.Generator().manual_seed(4))
    alpha = directions.coefficients(w)
    solved = np.linalg.lstsq(directions.components.T.numpy(), (w - directions.mean).T.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(alpha, solved, atol=1e-5)


def test_directions_first():
    directions = directions_of()
    assert torch.equal(directions.first(2).components, directions.components[:2])
    with pytest.raises(ValueError, match="4 principal directions: expected 0 to 3"):
        directions.first(4)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("cutoff", [0, 2, 6])
def test_mixed_layer_by_layer(shared, cutoff):
    rng = torch.Generator().manual_seed(6)
    w, c = torch.randn(3, 5, generator=rng), torch.randn(*(() if shared else (3,)), 5, generator=rng)
    ws = mixed(w, c, num_ws=6, cutoff=cutoff, psi=0.25)
    assert ws.shape == (3, 6, 5)
    for image in range(3):
        target = c if shared else c[image]
        for layer in range(6):
            expected = 0.75 * target + 0.25 * w[image] if layer < cutoff else w[image]
            torch.testing.assert_close(ws[image, layer], expected)


def test_mixed_at_both_ends_of_psi_and_its_images():
    generator = generator_of()
    w = sampled_styles(generator, range(3), SEED)
    own = w[:, None].repeat(1, generator.num_ws, 1)
    options = {"num_ws": generator.num_ws, "cutoff": 2}
    assert torch.equal(mixed(w, w[0], psi=1, **options), own)
    assert torch.equal(mixed(w, w[0], psi=0, **options)[:, :2], w[0].expand(3, 2, 12))
    assert torch.equal(mixed(w, w, psi=0, **options), own)
    images = generator.synthesis(mixed(w, w[0], psi=0.0, **options))
    torch.testing.assert_close(images[0], generator.synthesis(own)[0])
    assert not torch.allclose(images[1], generator.synthesis(own)[1], atol=1e-3)


@pytest.mark.parametrize("change", [{"cutoff": 7}, {"cutoff": -1}, {"psi": 1.5}, {"psi": -0.1}])
def test_mixed_refuses(change):
    with pytest.raises(ValueError, match="expected 0"):
        mixed(torch.zeros(2, 5), torch.zeros(5), **{"num_ws": 6, "cutoff": 2, "psi": 0.5, **change})


def test_no_modes():
    with pytest.raises(ValueError, match="0 modes"):
        Mode(directions_of(), modes=0)
