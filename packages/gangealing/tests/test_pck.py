"""PCK of every variant against loops over points, as one would count by hand."""

import math

import pytest
import torch
from torch import Tensor
from triptych_gangealing.keypoints.pck import ALPHAS, PckTable, box_size, pck

N, K = 40, 7


@pytest.fixture(scope="module")
def scene() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    target = torch.rand(N, K, 2, generator=rng) * 32
    predicted = target + torch.randn(N, K, 2, generator=rng) * torch.rand(N, 1, 1, generator=rng) * 3
    corner = torch.rand(N, 2, generator=rng) * 8
    boxes = torch.cat([corner, corner + 4 + torch.rand(N, 2, generator=rng) * 16], dim=1)
    valid = torch.rand(N, K, generator=rng) < 0.7
    valid[3] = False  # an image without points
    return {"predicted": predicted, "target": target, "valid": valid, "boxes": boxes}


def score(scene: dict[str, Tensor], **settings: object) -> PckTable:
    sizes = {"target box": box_size(scene["boxes"]), "image": torch.full((N,), 32.0)}
    return pck(scene["predicted"], scene["target"], scene["valid"], sizes, **settings)


def counted(scene: dict[str, Tensor], alpha: float, threshold: str) -> tuple[float, float]:
    """PCK per point and per image."""
    hits, points, shares = 0, 0, []
    for i in range(N):
        x0, y0, x1, y1 = scene["boxes"][i].tolist()
        radius = alpha * (32 if threshold == "image" else max(x1 - x0, y1 - y0))
        own = []
        for j in range(K):
            if scene["valid"][i, j]:
                (x, y), (u, v) = scene["predicted"][i, j].tolist(), scene["target"][i, j].tolist()
                own.append(math.hypot(x - u, y - v) <= radius)
        hits, points = hits + sum(own), points + len(own)
        if own:
            shares.append(sum(own) / len(own))
    return hits / points, sum(shares) / len(shares)


def test_every_variant_equals_a_loop(scene: dict[str, Tensor]) -> None:
    table = score(scene, repeats=0)
    assert len(table.scores) == 2 * 2 * 10
    assert table.images == N - 1
    assert table.points == int(scene["valid"].sum())
    assert table.scores[0].pck.low is None
    for threshold in ("target box", "image"):
        for alpha in ALPHAS:
            pooled, mean = counted(scene, alpha, threshold)
            assert table[threshold, "per point", alpha].value == pytest.approx(pooled, abs=1e-9)
            assert table[threshold, "per image", alpha].value == pytest.approx(mean, abs=1e-9)
    variants = {round(table[t, a, 0.05].value, 6) for t in ("target box", "image") for a in ("per point", "per image")}
    assert len(variants) == 4  # they do differ


def test_the_threshold_itself_is_correct() -> None:
    predicted = torch.tensor([[[3.0, 4.0], [3.0, 4.000001], [0.0, 5.0]]], dtype=torch.float64)
    table = pck(predicted, torch.zeros(1, 3, 2), torch.ones(1, 3, dtype=torch.bool), {"image": torch.tensor([50.0])})
    assert table["image", "per point", 0.1].value == pytest.approx(2 / 3)
    assert table["image", "per point", 0.09].value == 0


def test_points_that_could_not_be_transferred_are_misses(scene: dict[str, Tensor]) -> None:
    lost = scene["target"].clone()
    first = tuple(scene["valid"].nonzero()[0].tolist())
    lost[first] = math.nan
    lost[3] = math.nan  # not counted at all
    table = score({**scene, "predicted": lost})
    assert table["image", "per point", 0.01].value == pytest.approx(1 - 1 / int(scene["valid"].sum()))


def test_intervals_resample_images() -> None:
    """Against the spread of fresh draws: points of an image are right together, so that images are what counts."""
    rng = torch.Generator().manual_seed(1)
    everywhere, size = torch.ones(200, 10, dtype=torch.bool), {"image": torch.full((200,), 10.0)}

    def draw() -> PckTable:
        offset = (torch.rand(200, 1, 1, generator=rng) < 0.4).double() * 5
        return pck(offset.expand(-1, 10, 2), torch.zeros(200, 10, 2), everywhere, size, [0.1], repeats=200)

    estimates = [draw()["image", "per point", 0.1] for _ in range(60)]
    spread = torch.tensor([each.value for each in estimates]).std()
    for value, low, high in estimates[:5]:
        assert (high - low) / (2 * 1.96) == pytest.approx(math.sqrt(0.6 * 0.4 / 200), rel=0.25)
        assert low < value < high
    assert spread == pytest.approx(math.sqrt(0.6 * 0.4 / 200), rel=0.3)  # of images: 0.035; of points it would be 0.011
    inside = sum(low <= 0.6 <= high for _, low, high in estimates)
    assert inside >= 53


def test_images_of_one_object_are_resampled_together(scene: dict[str, Tensor]) -> None:
    """Each image five times over: as wide as once if they are of one object, sqrt(5) narrower if they are not."""

    def width(copies: int, objects: Tensor | None) -> float:
        repeated = {name: torch.cat([values] * copies) for name, values in scene.items()}
        size = {"target box": box_size(repeated["boxes"])}
        table = pck(
            repeated["predicted"], repeated["target"], repeated["valid"], size, [0.1], repeats=600, groups=objects
        )
        value, low, high = table["target box", "per point", 0.1]
        assert value == pytest.approx(score(scene, repeats=0)["target box", "per point", 0.1].value)
        return high - low

    once = width(1, None)
    assert width(1, torch.arange(N)) == pytest.approx(once, rel=0.15)
    assert width(5, torch.arange(N).repeat(5)) == pytest.approx(once, rel=0.15)
    assert width(5, torch.arange(5 * N)) == pytest.approx(once / math.sqrt(5), rel=0.15)


def test_intervals_stay_within_bounds_and_never_close_at_them(scene: dict[str, Tensor]) -> None:
    perfect = score({**scene, "predicted": scene["target"]})["image", "per image", 0.01]
    assert perfect.value == perfect.high == 1
    assert perfect.low == pytest.approx(1 - 3 / (N - 1))
    hopeless = score({**scene, "predicted": scene["target"] + 100})["target box", "per point", 0.1]
    assert hopeless.value == hopeless.low == 0
    assert hopeless.high == pytest.approx(3 / (N - 1))
    assert all(0 <= s.pck.low <= s.pck.value <= s.pck.high <= 1 for s in score(scene).scores)


def test_scaling_everything_changes_nothing(scene: dict[str, Tensor]) -> None:
    def scaled(factor: float) -> PckTable:
        where = {name: scene[name].double() * factor for name in ("predicted", "target", "boxes")}
        sizes = {"target box": box_size(where["boxes"])}
        return pck(where["predicted"], where["target"], scene["valid"], sizes)

    assert [s.pck for s in scaled(1).scores] == [s.pck for s in scaled(8).scores]


def test_the_table_names_what_it_shows(scene: dict[str, Tensor]) -> None:
    table = score(scene)
    header, rows = table.rows()
    assert len(rows) == 40
    assert all(len(row) == len(header) for row in rows)
    row = next(row for row in rows if row[:3] == ["image", "per image", "0.05"])
    value, low, high = table["image", "per image", 0.05]
    assert row[3:] == ["1.60", f"{100 * value:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]
    assert table.as_dict()["image, per image, 0.05"] == {"value": value, "low": low, "high": high}
    counted = scene["valid"].any(1)
    expected = 0.1 * box_size(scene["boxes"])[counted].mean()
    assert table.scores[0].threshold_px == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(KeyError, match="there are"):
        table["source box", "per point", 0.1]


def test_bad_input_is_one_line(scene: dict[str, Tensor]) -> None:
    sizes = {"image": torch.full((N,), 32.0)}
    cases = [
        ({"alphas": [0.1, 0.0]}, "expected shares above 0"),
        ({"alphas": []}, "expected shares above 0"),
        ({"sizes": {"image": torch.zeros(N)}}, "numbers above 0"),
        ({"valid": torch.zeros(N, K, dtype=torch.bool)}, "no valid point"),
    ]
    for settings, message in cases:
        given = {"predicted": scene["predicted"], "target": scene["target"], "valid": scene["valid"], "sizes": sizes}
        with pytest.raises(ValueError, match=message) as raised:
            pck(**{**given, **settings})
        assert "\n" not in str(raised.value)
