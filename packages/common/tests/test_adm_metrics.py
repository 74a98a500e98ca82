"""The ADM suite's scores against independent computation: loops, closed forms, other decompositions."""

import hashlib
import http.server
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from triptych_common.metrics import (
    FeatureSet,
    Gaussian,
    ImageFeatures,
    NpzImages,
    adm_scores,
    bootstrap,
    bootstrap_rate,
    coverage,
    fit_gaussian,
    frechet_distance,
    frechet_influence,
    gaussian_frechet,
    image_features,
    inception_score,
    load_inception,
    nearest_distances,
    precision_recall,
)
from triptych_common.metrics import inception as inception_module
from triptych_common.testing import random_inception_weights


def features(n, dim, seed, *, scale=1.0, shift=0.0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64) / dim**0.5
    return (torch.randn(n, dim, generator=rng, dtype=torch.float64) @ mix * scale + shift).to(dtype)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_inception_weights(tmp_path_factory.mktemp("inception") / "weights.pth")


@pytest.fixture(scope="module")
def inception(weights):
    return load_inception(weights)


def images(n, height, width, seed=0):
    return torch.randint(
        0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


# Moments and Fréchet distance


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_moments_in_batches_equal_those_of_all_rows(shift):
    x = features(500, 6, 0, shift=shift)
    for chunk in (1, 33, 199, 500):
        mean, covariance = fit_gaussian(x, chunk=chunk)
        np.testing.assert_allclose(mean.numpy(), x.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance.numpy(), np.cov(x.numpy().T), rtol=1e-9, atol=1e-12)


def test_float32_features_lose_nothing_to_float32_sums():
    x = features(4000, 5, 0, shift=300.0, dtype=torch.float32)
    mean, covariance = fit_gaussian(x, chunk=64)
    np.testing.assert_allclose(mean.numpy(), x.numpy().astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance.numpy(), np.cov(x.numpy().astype(np.float64).T), rtol=1e-8)


def test_frechet_equals_eigenvalues_of_the_covariances_product():
    a, b = features(300, 10, 0), features(400, 10, 1, scale=1.4, shift=0.3)
    (mean_a, cov_a), (mean_b, cov_b) = ((x.numpy().mean(0), np.cov(x.numpy().T)) for x in (a, b))
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex))
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * roots.sum().real
    assert gaussian_frechet(fit_gaussian(a), fit_gaussian(b)) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_diagonal_gaussians_has_a_closed_form():
    rng = torch.Generator().manual_seed(0)
    mean_a, mean_b, std_a, std_b = torch.rand(4, 7, generator=rng, dtype=torch.float64)
    expected = float(((mean_a - mean_b) ** 2 + (std_a - std_b) ** 2).sum())
    got = gaussian_frechet(Gaussian(mean_a, (std_a**2).diag()), Gaussian(mean_b, (std_b**2).diag()))
    assert got == pytest.approx(expected, rel=1e-9)


def test_frechet_with_fewer_vectors_than_dimensions_equals_the_nuclear_norm():
    a, b = features(12, 40, 0), features(15, 40, 1, shift=0.2)
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    cross = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()  # tr((S_a S_b)^(1/2))
    expected = (a.mean(0) - b.mean(0)).square().sum() + sum(x.square().sum() for x in centred) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-5)


def test_influence_is_the_derivative_of_the_distance_by_each_vectors_weight():
    x, target = features(60, 4, 0, scale=1.3), fit_gaussian(features(500, 4, 1, shift=0.4))

    def distance(weight):
        mean = weight @ x
        return gaussian_frechet(target, Gaussian(mean, (x - mean).T @ ((x - mean) * weight[:, None])))

    even = torch.full((60,), 1 / 60, dtype=torch.float64)
    mean = even @ x
    _, influence = frechet_influence(x, Gaussian(mean, (x - mean).T @ (x - mean) / 60), target, chunk=7)
    step = 1e-5
    for i in (0, 17, 59):
        towards = torch.zeros(60, dtype=torch.float64)
        towards[i] = 1
        slope = (distance(even + step * (towards - even)) - distance(even - step * (towards - even))) / (2 * step)
        assert slope == pytest.approx(float(influence[i] - influence.mean()), rel=1e-5, abs=1e-7)


def test_influences_give_the_spread_of_the_distance_between_independent_sets():
    target = fit_gaussian(features(5000, 12, 1000, shift=0.2))
    draws = [features(300, 12, seed, scale=1.2) for seed in range(120)]
    found = [frechet_influence(x, fit_gaussian(x), target) for x in draws]
    spread = float(torch.tensor([distance for distance, _ in found]).std())
    errors = torch.tensor([float(influence.std()) / 300**0.5 for _, influence in found])
    assert found[0][0] == pytest.approx(gaussian_frechet(target, fit_gaussian(draws[0])), rel=1e-9)
    assert float(errors.mean()) == pytest.approx(spread, rel=0.25)


# Inception score


def test_inception_score_equals_an_explicit_loop():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(9, 0.3), size=23)
    p[3] = np.eye(9)[2]  # exact zeros: 0 log 0 is 0
    scores = []
    for start in range(0, 23, 7):
        part = p[start : start + 7]
        marginal = [sum(row[j] for row in part) / len(part) for j in range(9)]
        kl = [sum(x * np.log(x / m) for x, m in zip(row, marginal, strict=True) if x > 0) for row in part]
        scores.append(np.exp(sum(kl) / len(kl)))
    got = inception_score(torch.from_numpy(p), split_size=7)
    assert got.value == pytest.approx(np.mean(scores), rel=1e-12)
    assert got.low is None


def test_inception_score_reaches_from_one_to_the_number_of_classes():
    assert inception_score(torch.full((30, 8), 1 / 8)).value == pytest.approx(1)
    assert inception_score(torch.eye(8).repeat(5, 1)).value == pytest.approx(8)


def test_probabilities_leave_the_bias_out(inception):
    rng = torch.Generator().manual_seed(0)
    pool = torch.rand(3, 2048, generator=rng)
    weight, bias = inception.network.fc.weight.numpy().astype(np.float64), inception.network.fc.bias
    logits = pool.numpy().astype(np.float64) @ weight.T
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    got = inception.probabilities(pool)
    assert got.shape == (3, 1008)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4)
    assert bias.abs().max() > 1e-3  # large enough for the test to detect it
    assert (torch.from_numpy(expected).log() + bias).softmax(1).sub(torch.from_numpy(expected)).abs().max() > 1e-6


# Inception features


def tensorflow_1_resize(image, side):
    """Bilinear, corners not aligned, no half-pixel centres: output y samples input y * height / side."""
    height, width, _ = image.shape
    out = np.empty((side, side, 3))
    for y in range(side):
        for x in range(side):
            top, left = y * height / side, x * width / side
            y0, x0 = int(top), int(left)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            dy, dx = top - y0, left - x0
            upper = image[y0, x0] * (1 - dx) + image[y0, x1] * dx
            lower = image[y1, x0] * (1 - dx) + image[y1, x1] * dx
            out[y, x] = upper * (1 - dy) + lower * dy
    return out


@pytest.mark.parametrize("size", [(32, 20), (350, 299)])
def test_what_the_network_sees_is_resized_as_tensorflow_1_did(inception, size):
    batch = images(1, *size)
    seen = []
    with inception.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0])):
        inception(batch)
    resized = tensorflow_1_resize(batch[0].permute(1, 2, 0).numpy().astype(np.float64), 299)
    np.testing.assert_allclose(seen[0][0].permute(1, 2, 0).numpy(), (resized - 128) / 128, atol=2e-3)
    half_pixel = F.interpolate(batch.float(), (299, 299), mode="bilinear", align_corners=False)
    if size != (299, 299):
        assert ((half_pixel - 128) / 128 - seen[0]).abs().max() > 0.1  # the test would detect another convention


def test_features_are_those_of_the_networks_own_layers_run_one_by_one(inception):
    batch = images(2, 40, 40)
    seen = []
    with inception.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0])):
        pool, spatial = inception(batch)
    network, x = inception.network, seen[0]
    before = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2"
    before += " Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c"
    for name in before.split():
        x = getattr(network, name)(x)
    branch = network.Mixed_6d.branch1x1
    convolved = F.conv2d(x, branch.conv.weight)
    norm = branch.bn
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    normed = (convolved - norm.running_mean[:, None, None]) * gain[:, None, None] + norm.bias[:, None, None]
    expected = normed.clamp(min=0)
    assert expected.shape == (2, 192, 17, 17)
    assert pool.shape == (2, 2048)
    assert spatial.shape == (2, 2023)
    for y, x_, channel in (
        (0, 0, 0),
        (0, 0, 6),
        (0, 1, 0),
        (1, 0, 3),
        (9, 13, 5),
        (16, 16, 6),
    ):  # height, width, channel
        torch.testing.assert_close(
            spatial[:, (y * 17 + x_) * 7 + channel], expected[:, channel, y, x_], rtol=1e-3, atol=1e-4
        )
    assert expected[:, :7].std() > 0.1
    for name in ("Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c"):
        x = getattr(network, name)(x)
    torch.testing.assert_close(pool, x.mean((2, 3)), rtol=1e-3, atol=1e-4)
    assert pool.std() > 0.01


def test_features_do_not_depend_on_batches(inception, tmp_path):
    batch = images(5, 24, 24)
    np.savez(tmp_path / "x.npz", arr_0=batch.permute(0, 2, 3, 1).numpy())
    one, whole = (image_features(NpzImages(tmp_path / "x.npz"), inception, batch_size=size) for size in (2, 5))
    torch.testing.assert_close(one.pool.vectors, whole.pool.vectors, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.spatial.vectors, inception(batch)[1], rtol=1e-4, atol=1e-5)


def test_images_of_another_kind_are_refused(inception):
    for bad in (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"expected uint8 \(n, 3, height, width\)"):
            inception(bad)


def test_features_that_are_not_finite_are_refused(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    state["Mixed_7c.branch1x1.bn.bias"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"x.npz: features of images 0..1 hold NaN or infinity"):
        image_features(NpzImages(tmp_path / "x.npz"), load_inception(tmp_path / "nan.pth"), batch_size=2)


# The weights file


class Served:
    """A server of one file on this machine."""

    def __init__(self, content):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/weights"

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPTYCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "data" / "inception" / inception_module.FILE_NAME


def test_weights_are_downloaded_once_and_checked(weights, empty_cache, monkeypatch):
    content = weights.read_bytes()
    with Served(b"something else") as url, pytest.raises(ValueError, match="differs from the published 6726825d0af5"):
        load_inception(url=url)
    empty_cache.unlink()
    monkeypatch.setattr(inception_module, "SHA256", hashlib.sha256(content).hexdigest())
    with Served(content) as url:
        assert load_inception(url=url).is_published
    assert load_inception(url="http://127.0.0.1:9/gone").is_published  # from the cache


def test_weights_that_torch_fidelity_fetched_before_are_found(empty_cache):
    theirs = empty_cache.parents[2] / "torch" / "hub" / "checkpoints" / inception_module.FILE_NAME
    assert inception_module.cached_path() == empty_cache
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"x")
    assert inception_module.cached_path() == theirs


def test_the_hash_is_the_one_in_the_files_name():
    assert inception_module.FILE_NAME.endswith(f"-{inception_module.SHA256[:8]}.pth")


def test_absent_weights_offline_name_the_remedy(empty_cache):
    with pytest.raises(
        FileNotFoundError, match=r"cannot be fetched .*; fetch https://\S+ elsewhere and put it at \S+, or"
    ):
        load_inception(url="http://127.0.0.1:9/gone")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such weights file"):
        load_inception(empty_cache / "nowhere.pth")


class Payload:
    def __reduce__(self):
        return (print, ("unpickled without restriction",))


@pytest.mark.parametrize("content", [b"junk", {"fc.weight": torch.zeros(3)}, [1, 2], Payload()])
def test_a_file_of_other_things_is_refused(content, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"weights.pth: no weights of torch-fidelity's InceptionV3"):
        load_inception(path)
    assert "unpickled" not in capsys.readouterr().out


# Precision, recall and distances


def brute_force(points, by, k):
    points, by = points.double(), by.double()
    out = []
    for p in points:
        balls = [((c - o) ** 2).sum() for c in by for o in by]
        balls = torch.stack(balls).view(len(by), len(by))
        radii = [sorted(float(d) for j, d in enumerate(row) if j != i)[k - 1] for i, row in enumerate(balls)]
        out.append(float(any(float(((p - c) ** 2).sum()) <= r for c, r in zip(by, radii, strict=True))))
    return out


@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_precision_and_recall_equal_brute_force_even_far_from_the_origin(offset):
    real = features(25, 3, 0, shift=offset, dtype=torch.float32)
    fake = features(30, 3, 1, shift=offset + 0.9, dtype=torch.float32)
    precision, recall = precision_recall(real, fake, k=3, chunk=8)
    assert precision.tolist() == brute_force(fake, real, 3)
    assert recall.tolist() == brute_force(real, fake, 3)
    assert 0 < precision.mean() < 1
    assert 0 < recall.mean() < 1
    assert torch.equal(coverage(fake, real, k=3).any(1), precision.bool())
    assert torch.equal(coverage(real, fake, k=3).any(1), recall.bool())


def test_the_float32_product_alone_would_err_far_from_the_origin():
    real = features(200, 3, 0, shift=3000.0, dtype=torch.float32)
    product = real.square().sum(1)[:, None] + real.square().sum(1) - 2 * real @ real.T
    exact = (real.double()[:, None] - real.double()).square().sum(-1)
    assert (product - exact).abs().max() > 1  # of distances around 1
    nearest = exact.kthvalue(2, dim=1).values.sqrt()
    torch.testing.assert_close(nearest_distances(real, real, k=2).double(), nearest, rtol=1e-6, atol=0)


def test_copies_are_covered_and_at_distance_zero():
    real = features(50, 16, 0, shift=10.0, dtype=torch.float32)
    collapsed = real[:5].repeat(8, 1)  # eight copies each: more than k, so that every ball is a point
    assert nearest_distances(collapsed, real).tolist() == [0.0] * 40
    precision, recall = precision_recall(real, collapsed, k=3)
    assert precision.tolist() == [1.0] * 40
    assert recall.tolist() == [1.0] * 5 + [0.0] * 45


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_neighbours_do_not_depend_on_blocks(chunk):
    a, b = features(45, 20, 0, dtype=torch.float32), features(35, 20, 1, shift=0.5, dtype=torch.float32)
    for part, whole in zip(precision_recall(a, b, chunk=chunk), precision_recall(a, b), strict=True):
        assert part.tolist() == whole.tolist()
    assert nearest_distances(a, b, k=5, chunk=chunk).tolist() == nearest_distances(a, b, k=5).tolist()


def test_memory_of_precision_and_recall_does_not_hold_all_pairs():
    script = (
        "import resource, torch\n"
        "from triptych_common.metrics import precision_recall\n"
        "a, b = torch.rand(12_000, 8), torch.rand(3_000, 8)\n"
        "precision_recall(a[:200], b[:200])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "precision_recall(b, a, chunk=2048)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert float(done.stdout) < 250  # MiB; all pairs of the samples would be 550


# Files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_in_batches_and_never_whole(save, tmp_path, monkeypatch):
    whole = images(23, 16, 12).permute(0, 2, 3, 1).numpy()
    save(tmp_path / "x.npz", arr_0=whole)
    largest, read = [0], zipfile.ZipExtFile.read

    def counted(self, n=-1):
        largest[0] = max(largest[0], n if n >= 0 else 10**12)
        return read(self, n)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    source = NpzImages(tmp_path / "x.npz")
    batches = list(source.batches(5))
    assert [len(x) for x in batches] == [5, 5, 5, 5, 3]
    assert torch.cat(batches).permute(0, 2, 3, 1).numpy().tolist() == whole.tolist()
    assert largest[0] == 5 * 16 * 12 * 3
    assert (source.count, source.pool, source.spatial) == (23, None, None)


SOME = np.zeros((5, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(("arrays", "message"), [
    ({"images": SOME, "labels": np.zeros(5)}, "holds images, labels; expected images in arr_0"),
    ({}, "holds nothing; expected images in arr_0"),
    ({"arr_0": SOME.astype(np.float32)}, r"arr_0 is float32 \(5, 8, 8, 3\), expected uint8"),
    ({"arr_0": SOME[..., :2]}, r"arr_0 is uint8 \(5, 8, 8, 2\), expected uint8 \(n, height, width, 3\), or 1 for gray"),
    ({"arr_0": SOME[0]}, r"arr_0 is uint8 \(8, 8, 3\), expected"),
    ({"arr_0": SOME[:0]}, r"arr_0 is uint8 \(0, 8, 8, 3\), expected"),
    ({"arr_0": np.asfortranarray(SOME)}, "Fortran order"),
    ({"arr_0": np.array([{}, None])}, r"arr_0 holds Python objects"),
    ({"mu": np.zeros(2048)}, "only one of mu and sigma"),
    ({"mu": np.zeros(64), "sigma": np.eye(64)}, r"mu is float64 \(64,\), expected floats \(2048,\)"),
    ({"arr_0": SOME, "mu_s": np.full(2023, np.nan), "sigma_s": np.eye(2023)}, "NaN or infinity"),
    ({"mu": np.array([None]), "sigma": np.eye(2048)}, "damaged one .*mu holds Python objects"),
])  # fmt: skip
def test_a_file_of_other_things_is_one_clear_error(arrays, message, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=r"x\.npz: .*" + message):
        NpzImages(tmp_path / "x.npz")


def test_a_damaged_file_is_one_clear_error(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, arr_0=images(40, 8, 8).permute(0, 2, 3, 1).numpy())
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"junk"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"not an npz file, or a damaged one"):
            NpzImages(path)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1  # a byte of an image: only the checksum reveals it
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"damaged one \(Bad CRC-32"):
        list(NpzImages(path).batches(7))
    with zipfile.ZipFile(path, "w") as archive:
        header = content[content.index(b"\x93NUMPY") :][:128]
        archive.writestr("arr_0.npy", header + b"short")
    with pytest.raises(ValueError, match=r"arr_0 has 133 of 7,808 bytes"):
        NpzImages(path)
    with pytest.raises(FileNotFoundError, match="no such npz file"):
        NpzImages(tmp_path / "nowhere.npz")


# All scores together


def a_set(n, seed, statistics=False, **options):
    pool, spatial = features(n, 6, seed, dtype=torch.float32, **options), features(n, 5, seed, dtype=torch.float32)
    given = [fit_gaussian(x * 2) if statistics else None for x in (pool, spatial)]
    return ImageFeatures(FeatureSet(pool, given[0]), FeatureSet(spatial, given[1]))


def test_all_scores_with_intervals_and_without():
    reference, samples = a_set(60, 0), a_set(40, 1, scale=1.2)
    probabilities = features(40, 9, 2).softmax(1)
    without = adm_scores(reference, samples, probabilities, repeats=0)
    scores = adm_scores(reference, samples, probabilities, repeats=30)
    assert without.fid.value == pytest.approx(frechet_distance(reference.pool.vectors, samples.pool.vectors), rel=1e-9)
    assert without.sfid.value == pytest.approx(
        frechet_distance(reference.spatial.vectors, samples.spatial.vectors), rel=1e-9
    )
    assert without.inception_score == inception_score(probabilities)
    assert without.precision.value == pytest.approx(
        float(precision_recall(reference.pool.vectors, samples.pool.vectors)[0].mean())
    )
    for name, estimate in scores.estimates().items():
        assert estimate.value == pytest.approx(getattr(without, name).value, rel=1e-9)
        assert getattr(without, name).low is None
        assert estimate.low < estimate.value < estimate.high
    assert scores.unavailable == {}
    assert "60 reference images and 40 samples: below 10,000" in scores.notes[0]
    assert adm_scores(reference, samples, probabilities, repeats=30) == scores


def test_statistics_in_a_file_count_for_fid_and_its_images_for_the_rest():
    reference, samples = a_set(60, 0, statistics=True), a_set(40, 1)
    scores = adm_scores(reference, samples, features(40, 9, 2).softmax(1), repeats=0)
    assert scores.fid.value == pytest.approx(
        frechet_distance(reference.pool.vectors * 2, samples.pool.vectors), rel=1e-9
    )
    assert scores.recall is not None
    assert any("FID and sFID: by the statistics that came with the 60 reference images" in x for x in scores.notes)


def test_statistics_alone_give_distances_and_the_reason_for_the_rest():
    both = a_set(60, 0, statistics=True)
    alone = ImageFeatures(FeatureSet(None, both.pool.statistics), FeatureSet(None))
    scores = adm_scores(alone, a_set(40, 1), features(40, 9, 2).softmax(1), repeats=0)
    assert scores.fid.value > 0
    assert scores.inception_score.value > 1
    assert (scores.sfid, scores.precision, scores.recall) == (None, None, None)
    assert scores.unavailable == {
        "sfid": "the reference holds neither images nor mu_s and sigma_s",
        "precision": "the reference holds no images",
        "recall": "the reference holds no images",
    }
    swapped = adm_scores(a_set(40, 1), alone, None, repeats=30)
    assert swapped.unavailable["inception_score"] == swapped.unavailable["recall"] == "the samples hold no images"
    assert swapped.fid.low is None  # nothing to resample


def test_too_few_images_or_broken_features_are_refused():
    probabilities = features(40, 9, 2).softmax(1)
    with pytest.raises(ValueError, match="more than 3 vectors, got 3 and 40"):
        adm_scores(a_set(3, 0), a_set(40, 1), probabilities, repeats=0)
    with pytest.raises(ValueError, match="at least two for a covariance"):
        adm_scores(a_set(1, 0), a_set(40, 1), probabilities, repeats=0)
    with pytest.raises(ValueError, match="NaN or infinity"):
        adm_scores(a_set(40, 0, shift=float("nan")), a_set(40, 1), probabilities, repeats=0)
    with pytest.raises(ValueError, match="NaN or infinity"):
        precision_recall(torch.full((9, 2), torch.inf), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="repeats 1: expected at least 2"):
        bootstrap(lambda x: 0.0, torch.zeros(3), repeats=1)


def test_a_rates_interval_stays_within_its_range():
    assert bootstrap_rate(torch.zeros(30)) == (0.0, 0.0, pytest.approx(0.1))
    assert bootstrap_rate(torch.ones(30), repeats=0) == (1.0, None, None)
    estimate = bootstrap_rate((torch.arange(400) % 4 == 0).float())
    assert estimate.value == 0.25
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 400) ** 0.5, rel=0.25)
