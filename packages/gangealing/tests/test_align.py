"""Using an aligner on pictures: against closed forms of known warps, and as commands, misused too."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from triptych_common.testing import fails_with, run_here
from triptych_gangealing import cli
from triptych_gangealing.aligner import Aligner, Alignment, load_aligner, write_aligner
from triptych_gangealing.correspondence import transfer
from triptych_gangealing.edit import average, propagate
from triptych_gangealing.latents import Directions, Mode
from triptych_gangealing.pictures import Picture, align_pictures, squared, warped
from triptych_gangealing.spatial_transformer import ClusterClassifier, SpatialTransformer, SpatialTransformerConfig
from triptych_gangealing.warp import Affine, Warp, to_normalised, to_pixels

SIZE = 16
CONFIG = SpatialTransformerConfig(input_size=SIZE, channel_max=8, flow_size=4, flow_upsampling=4)
command = partial(run_here, cli.run)


def aligner_of(heads: int = 1, rotation: float = 0.0, log_scale: float = 0.0, shift=(0.0, 0.0)) -> Aligner:
    """One that warps every image alike: what its last layer's bias says, and no flow."""
    torch.manual_seed(0)
    config = replace(CONFIG, heads=heads)
    transformer = SpatialTransformer(config)
    raw = torch.tensor([math.atanh(rotation / math.pi), log_scale, *shift])
    transformer.similarity.head.bias.data.copy_(raw.repeat(heads))
    mode = Mode(Directions(torch.zeros(4), torch.eye(4)[:1], torch.ones(1)), heads)
    aligner = Aligner(transformer, mode, ClusterClassifier(config) if heads > 1 else None)
    return aligner.requires_grad_(False).eval()


def written(path: Path, aligner: Aligner, **facts) -> Path:
    usual = {"padding": "border", "iterations": 1, "flips": False, "generator": "none"}
    write_aligner(path / "aligner.safetensors", aligner, usual | facts)
    return path


def smooth_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.uniform(0, 255, (height, width, 3)), (2, 2, 0))
    low, high = noise.min(), noise.max()
    return ((noise - low) / (high - low) * 255).round().astype(np.uint8)


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    sizes = {"a.png": (16, 16), "b.png": (16, 24), "more/c.png": (40, 32), "d.png": (16, 16)}
    for seed, (name, size) in enumerate(sizes.items()):
        Image.fromarray(smooth_picture(*size, seed)).save(root / name)
    return root


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


# --- pictures


@pytest.mark.parametrize("size", [(5, 5), (6, 10), (10, 6), (7, 4)])
def test_a_squared_picture_and_the_way_back_from_it(size):
    picture = Picture("x", torch.from_numpy(smooth_picture(*size)).permute(2, 0, 1))
    framed, way = squared(picture)
    side = max(size)
    assert framed.shape == (1, 3, side, side)
    corners = torch.tensor([[[0.0, 0.0], [size[1] - 1.0, 0.0], [2.0, size[0] - 1.0]]])  # pixels of the picture
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    in_square = to_normalised(corners + torch.tensor([left, top]), (side, side))
    torch.testing.assert_close(to_pixels(way(in_square), size), corners, rtol=0, atol=1e-5)
    assert torch.equal(framed[0, :, top : top + size[0], left : left + size[1]], picture.values()[0])


def test_pictures_are_aligned_alike_together_or_alone():
    aligner = aligner_of(rotation=0.3, shift=(0.2, -0.1))
    pictures = [
        Picture(str(i), torch.from_numpy(smooth_picture(*s, i)).permute(2, 0, 1))
        for i, s in enumerate([(9, 9), (12, 20)])
    ]
    together = align_pictures(aligner, pictures)
    for i, picture in enumerate(pictures):
        alone = align_pictures(aligner, [picture])
        torch.testing.assert_close(together.warp.select([i]).grid((5, 5)), alone.warp.grid((5, 5)), rtol=0, atol=1e-5)


def test_an_oblong_picture_is_turned_without_being_squeezed():
    """By 90 degrees: rows of the square become columns."""
    pixels = torch.from_numpy(smooth_picture(8, 16)).permute(2, 0, 1)
    found = align_pictures(aligner_of(rotation=math.pi / 2), [Picture("x", pixels)])
    middle = torch.tensor([[[0.0, 0.0], [0.5, 0.0]]])  # aligned: the middle, and 4 of 16 pixels right of it
    at = to_pixels(found.warp.map_points(middle).points, (8, 16))
    torch.testing.assert_close(at, torch.tensor([[[7.5, 3.5], [7.5, 7.5]]]), rtol=0, atol=1e-4)


def test_photographs_do_not_alias():
    """Stripes one pixel wide, thirty times reduced, are grey; and a ramp stays where it is."""
    pixels = torch.zeros(3, 480, 480, dtype=torch.uint8)
    pixels[0, :, ::2] = 255
    pixels[1] = (torch.arange(480)[:, None] / 479 * 255).round().to(torch.uint8)
    found = warped([Picture("x", pixels)], Warp.identity(1), SIZE, "border")[0]
    assert float(found[0].abs().max()) < 0.02
    ramp = ((torch.arange(SIZE) + 0.5) * 30 - 0.5) / 479 * 2 - 1
    torch.testing.assert_close(found[1, 1:-1, 8], ramp[1:-1], rtol=0, atol=0.02)


# --- correspondence, average, edits


def alignment_of(warp: Warp, cluster: int = 0) -> Alignment:
    n = len(warp)
    return Alignment(warp, torch.full((n,), cluster), torch.zeros(n, dtype=torch.bool), torch.zeros(n))


def test_points_go_through_congealed_space():
    """Two similarities: a closed form in complex numbers."""
    a, b = ((0.4, 0.1, (0.1, 0.2)), (-0.7, -0.2, (0.05, -0.3)))

    def warp_of(rotation, log_scale, shift):
        numbers = [torch.tensor([value], dtype=torch.float64) for value in (rotation, log_scale)]
        return Warp((Affine.similarity(*numbers, torch.tensor([shift], dtype=torch.float64)),))

    points = torch.tensor([[[3.0, 4.0], [7.5, 7.5], [10.0, 6.0]]], dtype=torch.float64)
    found = transfer(alignment_of(warp_of(*a)), alignment_of(warp_of(*b)), points, (SIZE, SIZE), (32, 32))
    for (x, y), (u, v) in zip(points[0].tolist(), found.points[0].tolist(), strict=True):
        z = complex((2 * x + 1) / SIZE - 1, (2 * y + 1) / SIZE - 1)
        congealed = (z - complex(*a[2])) / (math.exp(a[1]) * complex(math.cos(a[0]), math.sin(a[0])))
        there = congealed * math.exp(b[1]) * complex(math.cos(b[0]), math.sin(b[0])) + complex(*b[2])
        assert (u, v) == pytest.approx((((there.real + 1) * 32 - 1) / 2, ((there.imag + 1) * 32 - 1) / 2), abs=1e-9)
    assert found.reliable.all()


def test_a_mirrored_partner_needs_nothing_else():
    plain = Warp.identity(1)
    points = torch.tensor([[[2.0, 5.0]]])
    found = transfer(alignment_of(plain), alignment_of(plain.mirror()), points, (SIZE, SIZE), (SIZE, SIZE))
    torch.testing.assert_close(found.points, torch.tensor([[[13.0, 5.0]]]), rtol=0, atol=1e-5)


def test_points_of_two_clusters_are_refused():
    warp = Warp.identity(1)
    with pytest.raises(ValueError, match="pair 0: clusters 0 and 2; points can be transferred within one cluster only"):
        transfer(alignment_of(warp), alignment_of(warp, 2), torch.zeros(1, 1, 2), (8, 8), (8, 8))


def test_an_average_is_of_those_that_reach():
    images, inside = torch.rand(3, 3, 2, 2), torch.tensor([1.0, 1, 0])[:, None, None, None].expand(-1, 1, 2, 2).clone()
    inside[:, :, 0, 0] = 0
    found = average(images, inside)
    torch.testing.assert_close(found[:, 1, 1], images[:2, :, 1, 1].mean(0))
    torch.testing.assert_close(found[:, 0, 0], images[:, :, 0, 0].mean(0))  # nobody's: everybody's
    torch.testing.assert_close(average(images), images.mean(0))


@pytest.mark.parametrize("shift_px", [0, 3])
def test_an_edit_lands_where_the_warp_came_from(shift_px):
    """The aligned image shows what lies `shift_px` to the right: an edit moves there, whole pixels exactly."""
    matrix = torch.tensor([[[1.0, 0, 2 * shift_px / SIZE], [0, 1, 0]]])
    edit = torch.zeros(4, SIZE, SIZE)
    edit[:, 5:8, 4:9] = torch.tensor([1.0, -1, -1, 0.75])[:, None, None]
    images = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    found = propagate(edit, Warp((Affine(matrix),)), images)
    expected = images.clone()
    colour = torch.tensor([1.0, -1, -1])[:, None, None]
    region = (slice(None), slice(5, 8), slice(4 + shift_px, 9 + shift_px))
    expected[0][region] = 0.25 * images[0][region] + 0.75 * colour
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# --- commands


def test_align_writes_what_it_found_and_lists_what_it_could_not_read(tmp_path, folder):
    (folder / "broken.png").write_bytes(b"no picture")
    aligner = written(tmp_path, aligner_of(shift=(0.25, 0.0)))
    done = command("align", "--aligner", aligner, "--images", folder, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert "left out: " in done.stderr
    assert "broken.png: not an image" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["pictures"] == 4
    names = sorted(
        path.relative_to(tmp_path / "out/aligned").as_posix() for path in (tmp_path / "out/aligned").rglob("*.png")
    )
    assert names == ["a.png", "b.png", "d.png", "more/c.png"]
    aligned, original = read(tmp_path / "out/aligned/a.png").astype(int), read(folder / "a.png").astype(int)
    assert np.abs(aligned[:, :14] - original[:, 2:]).max() <= 1  # a quarter of half the side is 2 pixels
    rows = [json.loads(line) for line in (tmp_path / "out/alignment.jsonl").read_text().splitlines()]
    assert rows[0]["picture"] == "a.png"
    assert rows[0]["corners"][0] == pytest.approx([1.5, -0.5], abs=1e-4)
    assert read(tmp_path / "out/average.png").shape == (SIZE, SIZE, 3)


def test_two_pictures_never_become_one(tmp_path, folder):
    Image.fromarray(smooth_picture(16, 16, 9)).save(folder / "a.jpg")
    done = command("align", "--aligner", written(tmp_path, aligner_of()), "--images", folder, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "out/aligned").rglob("*.png")}
    assert names == {"a.jpg.png", "a.png.png", "b.png", "c.png", "d.png"}


def test_one_average_for_each_cluster_there_is(tmp_path, folder):
    aligner = aligner_of(heads=3)
    aligner.classifier.head.weight.data.zero_()
    aligner.classifier.head.bias.data.copy_(torch.tensor([0.0, 0, 5]))
    done = command(
        "average",
        "--aligner",
        written(tmp_path, aligner),
        "--images",
        folder,
        "--out",
        tmp_path / "out",
        "--keep",
        "0.5",
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["average-2.png"]  # all are of cluster 2
    assert load_aligner(tmp_path).clusters(torch.zeros(2, 3, 16, 16)).tolist() == [2, 2]


def test_propagate_lays_an_edit_over_every_picture(tmp_path, folder):
    edit = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    edit.paste((255, 0, 0, 255), (4, 4, 12, 12))
    edit.save(tmp_path / "edit.png")
    aligner = written(tmp_path, aligner_of())
    words = ["--aligner", aligner, "--images", folder, "--out", tmp_path / "out"]
    done = command("propagate", *words, "--edit", tmp_path / "edit.png")
    assert done.returncode == 0, done.stderr
    found, original = read(tmp_path / "out/pictures/a.png"), read(folder / "a.png")
    assert (found[5:11, 5:11] == [255, 0, 0]).all()
    assert np.abs(found[:3].astype(int) - original[:3]).max() <= 1
    tall = read(tmp_path / "out/pictures/more/c.png")
    assert (tall[15:25, 11:21] == [255, 0, 0]).all()  # the middle half of the square around 40 x 32
    assert (tall[:, 0] != [255, 0, 0]).any(1).all()


def test_propagate_says_where_points_are_in_every_picture(tmp_path, folder):
    (tmp_path / "points.json").write_text("[[7.5, 7.5], [0, 0]]")
    words = ["--images", folder, "--out", tmp_path / "out", "--points", tmp_path / "points.json"]
    done = command("propagate", "--aligner", written(tmp_path, aligner_of()), *words)
    assert done.returncode == 0, done.stderr
    places = json.loads((tmp_path / "out/points.json").read_text())
    assert np.array(places["a.png"]["points"]) == pytest.approx(np.array([[7.5, 7.5], [0, 0]]), abs=1e-4)
    assert np.array(places["more/c.png"]["points"][0]) == pytest.approx([15.5, 19.5], abs=1e-4)
    assert places["b.png"]["inside"] == [True, False]  # above the oblong picture


def test_correspond_draws_and_lists_matches(tmp_path, folder):
    aligner = written(tmp_path, aligner_of(rotation=0.2))
    words = [
        "--aligner",
        aligner,
        "--source",
        folder / "a.png",
        "--target",
        folder / "d.png",
        "--out",
        tmp_path / "out",
    ]
    done = command("correspond", *words, "--spacing", "4")
    assert done.returncode == 0, done.stderr
    matches = json.loads((tmp_path / "out/matches.json").read_text())
    assert len(matches["source_points"]) == 16
    assert np.array(matches["target_points"]) == pytest.approx(np.array(matches["source_points"]), abs=1e-3)
    assert all(matches["reliable"])
    assert read(tmp_path / "out/matches.png").std() > 10


def test_pictures_are_looked_at_as_in_training_unless_told_otherwise(tmp_path, folder):
    """Once more turned by 20 degrees a look: corners tell how often it looked."""

    def corners(out: str, *options: str) -> list:
        done = run_here(cli.run, "align", "--images", folder, "--out", tmp_path / out, *options)
        assert done.returncode == 0, done.stderr
        return [json.loads(line)["corners"] for line in (tmp_path / out / "alignment.jsonl").read_text().splitlines()]

    turning = aligner_of(rotation=math.radians(20))
    once, twice = (
        ("--aligner", written(tmp_path / str(iterations), turning, iterations=iterations)) for iterations in (1, 2)
    )
    assert corners("a", *once) != corners("b", *twice)
    assert corners("c", *once, "--iterations", "2") == corners("b", *twice)


def test_bad_input_gets_one_line(tmp_path, folder):
    aligner = written(tmp_path, aligner_of())
    use = ["--aligner", aligner, "--images", folder, "--out", tmp_path / "out"]
    Image.new("RGBA", (20, 20)).save(tmp_path / "large.png")
    (tmp_path / "points.json").write_text('{"x": 1}')
    (tmp_path / "empty").mkdir()
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    (spoiled / "x.png").write_bytes(b"")
    large = "large.png: 20x20 pixels, expected 16x16 as the average picture"
    fails_with(command("propagate", *use, "--edit", tmp_path / "large.png"), large)
    fails_with(command("propagate", *use), "expected one of --edit PICTURE and --points FILE")
    fails_with(command("propagate", *use, "--points", tmp_path / "points.json"), "expected a JSON list of [x, y]")
    fails_with(command("propagate", *use, "--edit", folder / "a.png", "--cluster", "1"), "cluster 1: expected 0 to 0")
    fails_with(command("propagate", *use, "--edit", tmp_path / "points.json"), "points.json: no picture")
    fails_with(command("align", *use, "--images", tmp_path / "empty"), "no images found")
    fails_with(command("align", *use, "--images", tmp_path / "nowhere"), "nowhere: no such folder")
    fails_with(command("align", *use, "--images", spoiled), "none of 1 pictures can be read")
    fails_with(command("align", *use, "--aligner", tmp_path / "empty"), "aligner.safetensors: no such file")
    fails_with(command("align", *use, "--limit", "0"), "limit 0: expected at least 1", 2)
    fails_with(
        command("propagate", *use, "--out", tmp_path, "--images", tmp_path / "pictures", "--edit", folder / "a.png"),
        "would overwrite",
    )
    fails_with(command("average", *use, "--keep", "0"), "keep 0.0: expected a share above 0, at most 1", 2)
    fails_with(
        command("correspond", "--aligner", aligner, "--source", tmp_path / "no.png", "--target", folder / "a.png"),
        "no.png: no such picture",
    )
