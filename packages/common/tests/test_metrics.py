import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from triptych_common.data import load
from triptych_common.metrics import (
    Estimate,
    bootstrap,
    frechet_distance,
    kernel_distance,
    load_instrument,
    nearest_distances,
    precision_recall,
)
from triptych_common.metrics.digits import DigitScorer


def gaussians(n, dim, seed, shift=0.0):
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, dim, generator=rng, dtype=torch.float64)
        @ torch.randn(dim, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
        / dim**0.5
        + shift
    )


def test_frechet_equals_general_matrix_square_root():
    a, b = gaussians(500, 8, 0), gaussians(400, 8, 1, shift=0.4) * 1.3
    ca, cb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    gap = (a.mean(0) - b.mean(0)).numpy()
    expected = gap @ gap + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_commuting_covariances_has_a_closed_form():
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(100_000, 3, generator=rng, dtype=torch.float64)
    base = (base - base.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(base.T)).T)  # exactly N(0, I)
    scale_a, scale_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 1.0]).double()
    shift = torch.tensor([1.0, 0.0, -2.0]).double()
    expected = 5.0 + float(((scale_a - scale_b) ** 2).sum())
    assert frechet_distance(base * scale_a, base * scale_b + shift) == pytest.approx(expected, rel=1e-9)


def test_frechet_survives_singular_covariances():
    a = gaussians(50, 64, 0)  # rank 49 of 64
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_equals_double_loop():
    a, b = gaussians(7, 3, 0), gaussians(5, 3, 1)

    def k(x, y):
        return float((x @ y / 3 + 1) ** 3)

    expected = sum(k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / 42
    expected += sum(k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j) / 20
    expected -= 2 * sum(k(x, y) for x in a for y in b) / 35
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_estimates_read_well():
    assert str(Estimate(1353.5, 1292.0, 1415.0)) == "1,354 [1,292, 1,415]"
    assert str(Estimate(19.11, 13.82, 24.4)) == "19.1 [13.8, 24.4]"
    assert str(Estimate(0.951, -0.0123, 1.0)) == "0.951 [-0.012, 1.000]"


def test_precision_recall_equals_brute_force():
    real, fake = gaussians(40, 2, 0), gaussians(30, 2, 1, shift=0.8)

    def covered(points, by, k):
        out = []
        for p in points:
            hit = False
            for i, c in enumerate(by):
                radius = sorted(float((c - o).norm()) for j, o in enumerate(by) if j != i)[k - 1]
                hit = hit or float((p - c).norm()) <= radius
            out.append(float(hit))
        return out

    precision, recall = precision_recall(real, fake, k=3)
    assert precision.tolist() == covered(fake, real, 3)
    assert recall.tolist() == covered(real, fake, 3)


def test_nearest_distances_do_not_depend_on_chunks():
    a, b = gaussians(50, 4, 0), gaussians(60, 4, 1)
    torch.testing.assert_close(nearest_distances(a, b, k=2, chunk=7), nearest_distances(a, b, k=2))


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(200):
        sample = torch.randn(100, generator=rng)
        estimate = bootstrap(lambda x: float(x.mean()), sample, repeats=60, seed=trial)
        hits += estimate.low <= 0 <= estimate.high
    assert 0.88 <= hits / 200 <= 0.99


def test_copies_of_a_row_carry_no_more_information_than_the_row():
    """Groups of five copies give the interval of single rows, independent copies one narrower by sqrt(5)."""
    sample = torch.randn(80, generator=torch.Generator().manual_seed(3))

    def width(values, groups=None):
        low, high = bootstrap(lambda x: float(x.mean()), values, repeats=1000, groups=groups)[1:]
        return high - low

    once, five = width(sample), sample.repeat(5)
    assert width(sample, torch.arange(80)) == pytest.approx(once, rel=0.1)
    assert width(five, torch.arange(80).repeat(5) * 3) == pytest.approx(once, rel=0.1)  # whatever the groups' numbers
    assert width(five) == pytest.approx(once / 5**0.5, rel=0.1)
    uneven = bootstrap(float_mean, torch.ones(6), repeats=20, groups=torch.tensor([0, 0, 0, 1, 2, 2]))
    assert uneven == (1.0, 1.0, 1.0)


def float_mean(values):
    return float(values.mean())


@pytest.mark.parametrize(("call", "message"), [
    (lambda: frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3)), "at least two vectors"),
    (lambda: frechet_distance(torch.full((5, 3), torch.nan), torch.zeros(5, 3)), "NaN or infinity"),
    (lambda: precision_recall(torch.zeros(3, 2), torch.zeros(9, 2)), "need more than 3"),
    (lambda: load_instrument("inception"), "expected one of mnist_features, mnist_classifier"),
])  # fmt: skip
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def scorer():
    return DigitScorer(load("mnist5k", "train"), load("mnist5k", "held_out"))


def test_instruments_have_their_recorded_hash_and_accuracy(scorer):
    assert scorer.held_out_accuracy().value == pytest.approx(scorer.classifier.record["held_out_accuracy"], abs=0.002)
    assert scorer.held_out_accuracy().value > 0.98
    features = scorer.features(scorer.held_out.images)
    assert features.shape == (1000, 64)


def test_an_altered_instrument_is_refused(tmp_path):
    from triptych_common.metrics.instruments import FOLDER

    for path in FOLDER.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "mnist_features.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "mnist_features.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="differs from the recorded"):
        load_instrument("mnist_features", tmp_path)
    for content, message in (
        ("{", "not JSON"),
        ('{"mnist_features": {}}', "sha256: missing"),
        ("{}", "has no mnist_feat"),
    ):
        (tmp_path / "instruments.json").write_text(content)
        with pytest.raises(ValueError, match=rf"instruments.json: .*{message}.*; reinstall the package"):
            load_instrument("mnist_features", tmp_path)


def test_copies_score_like_the_floor_but_are_caught_as_duplicates(scorer):
    copies = scorer.real(1000)
    floor = scorer.floor(1000)
    assert float(floor.min()) * 0.8 <= copies.frechet.value <= float(floor.max()) * 1.25
    assert copies.near_duplicates.value == 1.0
    held_out = scorer(scorer.held_out.images, scorer.held_out.labels)
    assert held_out.near_duplicates.value == pytest.approx(0.05, abs=0.001)
    assert held_out.frechet.value == pytest.approx(0, abs=1e-6)


def test_few_samples_are_compared_with_as_many_real_ones_of_the_same_classes(scorer):
    train = scorer.train
    threes = train.labels == 3
    only_threes = scorer(train.images[threes][:80], train.labels[threes][:80])
    assert only_threes.n == 80
    balanced = scorer.real(80)
    assert balanced.n == 80
    assert balanced.accuracy.value > 0.95
    chosen = scorer._matching(scorer.held_out, train.labels[threes][:80], 80, "held-out")
    assert scorer.held_out.labels[chosen].tolist() == [3] * 80
    assert torch.bincount(scorer.held_out.labels[scorer._matching(scorer.held_out, None, 80, "x")]).tolist() == [8] * 10


@pytest.mark.parametrize(("labels", "message"), [
    (torch.full((20,), 10), "expected 0..9"),
    (torch.full((20,), -1), "expected 0..9"),
    (torch.zeros(7, dtype=torch.long), "7 labels for 20 images"),
])  # fmt: skip
def test_labels_that_are_no_digits_are_refused(scorer, labels, message):
    with pytest.raises(ValueError, match=message):
        scorer(scorer.held_out.images[:20], labels)


def test_a_rate_of_none_or_all_still_has_an_interval(scorer):
    copies = scorer.real(100).near_duplicates
    assert (copies.value, copies.high) == (1.0, 1.0)
    assert copies.low == pytest.approx(0.97)


def test_noise_and_collapse_score_badly_each_in_its_own_way(scorer):
    rng = torch.Generator().manual_seed(0)
    noise = scorer(torch.randint(0, 256, (1000, 1, 28, 28), generator=rng, dtype=torch.uint8), torch.arange(1000) % 10)
    means = scorer.class_means(1000)
    assert noise.accuracy.value < 0.2
    assert noise.frechet.value > 20 * float(scorer.floor(1000).mean())
    assert means.accuracy.value > 0.5  # the mean digits fool the classifier ...
    assert means.recall.value < 0.2  # ... but cover nothing
    assert means.frechet.value > 5 * float(scorer.floor(1000).mean())
    assert means.kernel.value > means.kernel.low > 0


def test_scorer_refuses_what_it_cannot_score(scorer):
    with pytest.raises(ValueError, match="at least 10"):
        scorer(scorer.held_out.images[:3], None)
    with pytest.raises(ValueError, match=r"expected uint8 \(n, 1, 28, 28\)"):
        scorer(torch.zeros(20, 3, 32, 32, dtype=torch.uint8), None)
