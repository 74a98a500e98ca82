"""Using an aligner on pictures: against closed forms of known warps, and as commands, misused too."""

import gc
import json
import math
import subprocess
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch.nn import functional as F
from triptych_common.data import decoding
from triptych_common.images import from_uint8, to_uint8
from triptych_common.testing import fails_with, peak_bytes, run_here
from triptych_gangealing import align, cli, correspond, pictures
from triptych_gangealing import folders as commands
from triptych_gangealing.aligner import Aligner, Alignment, load_aligner, write_aligner
from triptych_gangealing.correspondence import transfer
from triptych_gangealing.edit import RunningAverage, propagate
from triptych_gangealing.modes import Directions, Mode
from triptych_gangealing.pictures import (
    Folder,
    Picture,
    align_pictures,
    png_names,
    read_picture,
    shrunk,
    squared,
    warped,
)
from triptych_gangealing.spatial_transformer import ClusterClassifier, SpatialTransformer, SpatialTransformerConfig
from triptych_gangealing.warp import Affine, Flow, Warp, centres, to_normalised, to_pixels

SIZE = 16
CONFIG = SpatialTransformerConfig(input_size=SIZE, channel_max=8, flow_size=4, flow_upsampling=4)
command = partial(run_here, cli.run)


def succeeds(*words: object) -> subprocess.CompletedProcess:
    done = command(*words)
    assert done.returncode == 0, done.stderr
    return done


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
    framed, way = squared(picture.values())
    side = max(size)
    assert framed.shape == (1, 3, side, side)
    corners = torch.tensor([[[0.0, 0.0], [size[1] - 1.0, 0.0], [2.0, size[0] - 1.0]]])  # pixels of the picture
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    in_square = to_normalised(corners + torch.tensor([left, top]), (side, side))
    torch.testing.assert_close(to_pixels(way(in_square), size), corners, rtol=0, atol=1e-5)
    assert torch.equal(framed[0, :, top : top + size[0], left : left + size[1]], picture.values()[0])


def test_pictures_are_aligned_alike_together_or_alone():
    aligner = aligner_of(rotation=0.3, shift=(0.2, -0.1))
    both = [
        Picture(str(i), torch.from_numpy(smooth_picture(*s, i)).permute(2, 0, 1))
        for i, s in enumerate([(9, 9), (12, 20)])
    ]
    together = align_pictures(aligner, both)
    for i, picture in enumerate(both):
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
    found = warped(Picture("x", pixels), Warp.identity(1), SIZE, "border")[0]
    assert float(found[0].abs().max()) < 0.02
    ramp = ((torch.arange(SIZE) + 0.5) * 30 - 0.5) / 479 * 2 - 1
    torch.testing.assert_close(found[1, 1:-1, 8], ramp[1:-1], rtol=0, atol=0.02)


# --- align and correspond, as a library has them


def test_align_takes_tensors_pictures_and_folders(tmp_path, folder):
    """All the same warps; of oblong tensors as of the pictures they are."""
    (folder / "broken.png").write_bytes(b"none")
    run = written(tmp_path / "run", aligner_of(rotation=0.3, shift=(0.2, -0.1)))
    aligner = load_aligner(run)
    found = align(folder, run)
    assert found.names == ("a.png", "b.png", "d.png", "more/c.png")  # what could be read
    pictures = [read_picture(folder / name) for name in found.names]
    for i, picture in enumerate(pictures):
        alone = align(picture.values(), aligner).warp.grid((5, 5))
        torch.testing.assert_close(found.warp.select([i]).grid((5, 5)), alone, rtol=0, atol=1e-5)
    again = align(pictures, aligner)
    assert again.names == tuple(picture.name for picture in pictures)
    assert torch.equal(again.warp.grid((5, 5)), found.warp.grid((5, 5)))
    square = torch.cat([pictures[0].values(), pictures[2].values()])
    assert torch.equal(align(square, aligner).warp.grid((5, 5)), aligner.align(square).warp.grid((5, 5)))
    assert found.select(torch.tensor([3, 0])).names == ("more/c.png", "a.png")


def test_align_defaults_to_the_options_of_training(tmp_path):
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    twice = load_aligner(written(tmp_path / "twice", aligner_of(rotation=0.3), iterations=2))
    for found, iterations in ((align(images, twice), 2), (align(images, twice, iterations=1), 1)):
        assert torch.equal(found.warp.grid((4, 4)), twice.align(images, iterations=iterations).warp.grid((4, 4)))


def test_correspond_transfers_points_between_pictures(folder):
    """One warp for both pictures: what is in the middle of the one is in the middle of the other, whatever their shapes."""
    points = torch.tensor([[7.5, 7.5], [9.5, 7.5]])  # of 16 x 16: the middle, and an eighth of the side beside it
    found = correspond(points, folder / "a.png", read_picture(folder / "more/c.png"), aligner_of(rotation=0.3))
    torch.testing.assert_close(found.points, torch.tensor([[15.5, 19.5], [20.5, 19.5]]), rtol=0, atol=1e-3)
    assert found.reliable.all()


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


def test_a_point_is_reliable_only_within_both_images_and_congealed_space():
    """The source was reduced to its half and moved right: its left half comes from outside of congealed space."""
    wide = Warp((Affine(torch.tensor([[[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]])),))
    narrow = Warp((Affine(torch.tensor([[[0.25, 0.0, 0.0], [0.0, 1.0, 0.0]]])),))
    points = torch.tensor(
        [[[11.5, 7.5], [2.0, 7.5], [30.0, 7.5], [11.5, -3.0]]]
    )  # the third and fourth: no pixels of the source
    size = (SIZE, SIZE)
    found = transfer(alignment_of(wide), alignment_of(narrow), points, size, size)
    assert (found.points[0, :2] >= 0).all()  # both arrive within the target
    assert found.reliable[0].tolist() == [True, False, False, False]


def test_points_of_two_clusters_are_refused():
    warp = Warp.identity(1)
    with pytest.raises(ValueError, match="pair 0: clusters 0 and 2; points can be transferred within one cluster only"):
        transfer(alignment_of(warp), alignment_of(warp, 2), torch.zeros(1, 1, 2), (8, 8), (8, 8))


def test_an_average_is_of_those_that_reach():
    images, inside = torch.rand(3, 3, 2, 2), torch.tensor([1.0, 1, 0])[:, None, None, None].expand(-1, 1, 2, 2).clone()
    inside[:, :, 0, 0] = 0
    running = RunningAverage()
    for i in range(3):  # one after another
        running.add(images[i : i + 1], inside[i : i + 1])
    found = running.result()
    torch.testing.assert_close(found[:, 1, 1], images[:2, :, 1, 1].mean(0))
    torch.testing.assert_close(found[:, 0, 0], images[:, :, 0, 0].mean(0))  # nobody's: everybody's
    together = RunningAverage()
    together.add(images, inside)
    torch.testing.assert_close(together.result(), found)
    with pytest.raises(ValueError, match="an average of no images"):
        RunningAverage().result()


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


def bent(scale, seed=0):
    """A smooth flow, then an affine map that shows an edit 1 / scale as large as the picture."""
    flow = torch.nn.functional.interpolate(
        torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) * 0.04, (64, 64)
    )
    matrix = torch.tensor([[[scale, -0.1, 0.1], [0.1, scale, -0.2]]])
    return Warp((Flow(flow), Affine(matrix)))


def test_an_edit_is_what_every_pixel_finds_in_it():
    """Against the inverse of every pixel of the picture, sampled bilinearly: nothing shrinks here."""
    edit, images, warp = torch.zeros(4, 32, 32), torch.rand(1, 3, 120, 90) * 2 - 1, bent(0.7)
    edit[:3] = torch.rand(3, 32, 32) * 2 - 1
    edit[3, 4:12, 8:20] = torch.rand(8, 12)
    edit[3, 25, 3] = 1.0
    places = warp.inverse().map_points(centres((120, 90), images).view(1, -1, 2))
    shown = (places.converged & places.inside).view(1, 1, 120, 90)
    coloured = torch.cat([(edit[:3] + 1) / 2 * edit[3:], edit[3:]])[None]
    layer = torch.nn.functional.grid_sample(coloured, places.points.view(1, 120, 90, 2), align_corners=False) * shown
    expected = ((images + 1) / 2 * (1 - layer[:, 3:]) + layer[:, :3]) * 2 - 1
    assert (expected != images).float().mean() > 0.02
    torch.testing.assert_close(propagate(edit, warp, images), expected, rtol=0, atol=1e-4)


def test_a_fine_edit_that_shrinks_does_not_flicker():
    checker = ((torch.arange(96)[:, None] + torch.arange(96)) % 2).float() * 2 - 1
    edit = torch.cat([checker.expand(3, -1, -1), torch.ones(1, 96, 96)])
    found = propagate(
        edit, Warp((Affine(torch.eye(2, 3)[None] * 0.19),)), torch.zeros(1, 3, 96, 96)
    )  # 5.3 times smaller
    assert float(found[0, 0, 42:54, 42:54].std()) < 0.1  # 0.5 to 1 from single pixels of the checker


# --- folders


def test_every_picture_has_a_png_of_its_own():
    names = ["a.jpg", "a.png", "a.jpg.png", "b.jpeg", "more/a.jpg", "c.webp", "c.webp.jpg", "d.JPG"]
    found = png_names(names)
    assert found[:5] == ["a.jpg.png", "a.png.png", "a.jpg.png.png", "b.png", "more/a.png"]
    assert found[7] == "d.png"
    assert len(set(found)) == len(names)
    many = [f"{i}.{suffix}" for i in range(20_000) for suffix in ("jpg", "png")]  # in seconds, not hours
    assert len(set(png_names(many))) == len(many)


def test_a_folder_is_read_twice_one_picture_at_a_time(folder):
    """Pictures that vanish or change in between are reported and left out."""
    (folder / "broken.png").write_bytes(b"no picture")
    found = Folder(folder)
    assert [picture.name for picture in found] == ["a.png", "b.png", "d.png", "more/c.png"]
    assert len(found.unreadable) == 1
    assert (found.pngs["b.png"], found.seen["b.png"]) == ("b.png", (16, 24))
    (folder / "a.png").unlink()
    Image.fromarray(smooth_picture(9, 9)).save(folder / "d.png")
    assert [(i, picture.name) for i, picture in found.again()] == [(1, "b.png"), (3, "more/c.png")]
    assert len(found.unreadable) == 1
    for name in ("b.png", "more/c.png"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="none of 4 pictures could be read a second time"):
        list(found.again())


def test_no_two_whole_pictures_are_held_at_once(tmp_path, folder, monkeypatch):
    """When a picture is decoded, all before it are gone, in both passes."""
    alive: list[weakref.ref] = []
    most = 0
    whole = pictures.to_tensor

    def counted(*args, **options):
        nonlocal most
        gc.collect()
        most = max(most, sum(each() is not None for each in alive))
        made = whole(*args, **options)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(pictures, "to_tensor", counted)
    aligner = written(tmp_path, aligner_of())
    succeeds("align", "--aligner", aligner, "--images", folder, "--out", tmp_path / "out")
    assert len(alive) == 8  # four pictures, twice
    assert most <= 1  # the one that the loop just had


# --- commands


def test_align_writes_its_results_and_lists_unreadable_pictures(tmp_path, folder):
    (folder / "broken.png").write_bytes(b"no picture")
    aligner = written(tmp_path, aligner_of(shift=(0.25, 0.0)))
    done = succeeds("align", "--aligner", aligner, "--images", folder, "--out", tmp_path / "out", "--json")
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
    assert (rows[0]["picture"], rows[0]["aligned"]) == ("a.png", "a.png")
    assert rows[0]["corners"][0] == pytest.approx([1.5, -0.5], abs=1e-4)
    assert read(tmp_path / "out/average.png").shape == (SIZE, SIZE, 3)


def test_two_pictures_never_become_one(tmp_path, folder):
    Image.fromarray(smooth_picture(16, 16, 9)).save(folder / "a.jpg")
    succeeds("align", "--aligner", written(tmp_path, aligner_of()), "--images", folder, "--out", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out/aligned").rglob("*.png")}
    assert names == {"a.jpg.png", "a.png.png", "b.png", "c.png", "d.png"}
    rows = [json.loads(line) for line in (tmp_path / "out/alignment.jsonl").read_text().splitlines()]
    assert {row["picture"]: row["aligned"] for row in rows}["a.jpg"] == "a.jpg.png"


def test_a_picture_that_vanishes_meanwhile_is_listed(tmp_path, folder, monkeypatch):
    aligner = written(tmp_path, aligner_of())
    found = commands.align_pictures

    def and_then_one_goes(*args, **options):
        alignment = found(*args, **options)
        (folder / "b.png").unlink()
        return alignment

    monkeypatch.setattr(commands, "align_pictures", and_then_one_goes)
    done = succeeds("align", "--aligner", aligner, "--images", folder, "--out", tmp_path / "out", "--json")
    assert "b.png" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["pictures"] == 3
    rows = [json.loads(line)["picture"] for line in (tmp_path / "out/alignment.jsonl").read_text().splitlines()]
    assert rows == ["a.png", "d.png", "more/c.png"]


def test_the_smoothest_of_each_cluster_are_kept():
    """Ranked with one another the second cluster would have none."""
    cluster, roughness = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0.1, 0.4, 0.2, 0.3, 9.0, 8.0])
    found = replace(alignment_of(Warp.identity(6)), cluster=cluster, roughness=roughness)
    assert commands.smoothest(found, 0.5) == {0, 2, 5}
    assert commands.smoothest(found, 0.01) == {0, 5}
    assert commands.smoothest(found, 1.0) == set(range(6))


def test_a_part_by_smoothness_needs_a_flow(tmp_path, folder):
    torch.manual_seed(0)
    config = replace(CONFIG, transforms=("similarity",))
    mode = Mode(Directions(torch.zeros(4), torch.eye(4)[:1], torch.ones(1)), 1)
    aligner = written(tmp_path, Aligner(SpatialTransformer(config), mode).requires_grad_(False).eval())
    words = ["--aligner", aligner, "--images", folder, "--out", tmp_path / "out"]
    fails_with(
        command("average", *words, "--keep", "0.5"),
        "keep 0.5: a transformer without flow cannot rank its warps; pass --keep 1",
    )
    fails_with(command("average", *words, "--flips", "yes"), "flips yes: a transformer without flow has no measure")
    assert not (tmp_path / "out").exists()
    assert command("average", *words).returncode == 0


@pytest.mark.parametrize("name", ["align", "average", "propagate"])
def test_output_inside_the_pictures_folder_is_refused(tmp_path, folder, name):
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    Image.new("RGBA", (SIZE, SIZE)).save(tmp_path / "edit.png")
    (tmp_path / "link").symlink_to(folder)
    words = ["--aligner", written(tmp_path, aligner_of())] + ["--edit", tmp_path / "edit.png"] * (name == "propagate")
    for images, out in ((folder, folder), (folder, folder / "more"), (tmp_path / "link", folder / "new")):
        done = command(name, *words, "--images", images, "--out", out, "--overwrite")
        fails_with(done, f"out {out}: lies in the pictures' folder {images}; choose one elsewhere")
    assert {path: path.read_bytes() for path in folder.rglob("*.png")} == before
    assert not (folder / "new").exists()


@pytest.mark.parametrize("wrong", ["NaN", "Infinity", "1e9", "1e39"])
def test_points_that_are_nowhere_are_refused(tmp_path, folder, wrong):
    (tmp_path / "points.json").write_text(f"[[1, 2], [{wrong}, 0]]")
    aligner = written(tmp_path, aligner_of())
    words = ["--aligner", aligner, "--out", tmp_path / "out", "--points", tmp_path / "points.json"]
    for command_words in (
        ["propagate", "--images", folder],
        ["correspond", "--source", folder / "a.png", "--target", folder / "d.png"],
    ):
        done = command(*command_words, *words)
        if wrong in ("NaN", "Infinity"):
            fails_with(done, f"points.json: {wrong} is no finite number; expected a JSON list of [x, y]")
        else:
            fails_with(done, "points.json: point 1 is [")
            assert "expected finite pixels of a picture; correct it, or leave it out" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_edit_that_cannot_be_read_is_named(tmp_path, folder):
    aligner = written(tmp_path, aligner_of())
    Image.fromarray(smooth_picture(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    words = ["--aligner", aligner, "--images", folder, "--out", tmp_path / "out"]
    fails_with(command("propagate", *words, "--edit", tmp_path / "cut.png"), "cut.png: no picture, or cut short (")
    for path in ("no.png", "pictures"):
        fails_with(
            command("propagate", *words, "--edit", tmp_path / path), f"{path}: no such picture; expected an RGBA one"
        )
    fails_with(command("propagate", *words, "--points", tmp_path / "no.json"), "no.json: no such file; expected a JSON")
    assert not (tmp_path / "out").exists()


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
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["average-2.png"]  # all are of cluster 2
    assert load_aligner(tmp_path).clusters(torch.zeros(2, 3, 16, 16)).tolist() == [2, 2]


def test_propagate_lays_an_edit_over_every_picture(tmp_path, folder):
    edit = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    edit.paste((255, 0, 0, 255), (4, 4, 12, 12))
    edit.save(tmp_path / "edit.png")
    aligner = written(tmp_path, aligner_of())
    words = ["--aligner", aligner, "--images", folder, "--out", tmp_path / "out"]
    succeeds("propagate", *words, "--edit", tmp_path / "edit.png")
    found, original = read(tmp_path / "out/pictures/a.png"), read(folder / "a.png")
    assert (found[5:11, 5:11] == [255, 0, 0]).all()
    assert np.abs(found[:3].astype(int) - original[:3]).max() <= 1
    tall = read(tmp_path / "out/pictures/more/c.png")
    assert (tall[15:25, 11:21] == [255, 0, 0]).all()  # the middle half of the square around 40 x 32
    assert (tall[:, 0] != [255, 0, 0]).any(1).all()


def test_propagate_maps_points_to_every_picture(tmp_path, folder):
    (tmp_path / "points.json").write_text("[[7.5, 7.5], [0, 0]]")
    words = ["--images", folder, "--out", tmp_path / "out", "--points", tmp_path / "points.json"]
    succeeds("propagate", "--aligner", written(tmp_path, aligner_of()), *words)
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
    succeeds("correspond", *words, "--spacing", "4")
    matches = json.loads((tmp_path / "out/matches.json").read_text())
    assert len(matches["source_points"]) == 16
    assert np.array(matches["target_points"]) == pytest.approx(np.array(matches["source_points"]), abs=1e-3)
    assert all(matches["reliable"])
    assert read(tmp_path / "out/matches.png").std() > 10


def test_commands_default_to_the_iterations_of_training(tmp_path, folder):
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
    for alpha, words in ((255, "opaque everywhere"), (0, "transparent everywhere")):
        Image.new("RGBA", (SIZE, SIZE), (9, 9, 9, alpha)).save(tmp_path / "flat.png")
        fails_with(command("propagate", *use, "--edit", tmp_path / "flat.png"), words)
    fails_with(command("align", *use, "--images", tmp_path / "empty"), "no images found")
    fails_with(command("align", *use, "--images", tmp_path / "nowhere"), "nowhere: no such folder")
    fails_with(command("align", *use, "--images", spoiled), "none of 1 pictures can be read")
    fails_with(command("align", *use, "--aligner", tmp_path / "empty"), "aligner.safetensors: no such file")
    fails_with(command("align", *use, "--limit", "0"), "limit 0: expected at least 1", 2)
    fails_with(
        command(
            "propagate",
            *use,
            "--out",
            tmp_path,
            "--overwrite",
            "--images",
            tmp_path / "pictures",
            "--edit",
            folder / "a.png",
        ),
        "would overwrite",
    )
    fails_with(command("average", *use, "--keep", "0"), "keep 0.0: expected a share above 0, at most 1", 2)
    fails_with(
        command("correspond", "--aligner", aligner, "--source", tmp_path / "no.png", "--target", folder / "a.png"),
        "no.png: no such picture",
    )


# --- size and names of files


def test_a_picture_is_filtered_in_parts_as_it_is_whole(monkeypatch):
    monkeypatch.setattr(pictures, "_AT_ONCE_PX", 500)
    for height, width, side in ((90, 40, 32), (11, 200, 32), (200, 11, 32)):
        pixels = torch.from_numpy(smooth_picture(height, width)).permute(2, 0, 1)
        whole = squared(Picture("x", pixels).values())[0]
        left = max(0, (height - width) // 2)
        top = max(0, (width - height) // 2)
        frame = (left, whole.shape[3] - width - left, top, whole.shape[2] - height - top)
        expected = F.interpolate(whole, (side, side), mode="bilinear", align_corners=False, antialias=True)
        torch.testing.assert_close(shrunk(pixels, (side, side), frame), expected, rtol=0, atol=1e-6)


def test_memory_follows_the_output(tmp_path):
    """Of a strip, whose square has 400 megapixels, and of a picture above what is always read whole."""
    Image.new("RGB", (20_000, 50), (9, 90, 200)).save(tmp_path / "strip.jpg")
    Image.new("RGB", (6000, 4000), (9, 90, 200)).save(tmp_path / "large.jpg")
    aligner = aligner_of()
    align(tmp_path, aligner)  # what is imported by then
    assert peak_bytes(lambda: align(tmp_path, aligner)) < 150 << 20


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_very_large_picture_keeps_its_coordinates(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(decoding, "WHOLE_MEGAPIXELS", 0.1)
    Image.fromarray(smooth_picture(60, 80)).resize((800, 600), Image.Resampling.BICUBIC).save(
        tmp_path / f"a{suffix}", quality=95
    )
    whole, reduced = read_picture(tmp_path / f"a{suffix}"), read_picture(tmp_path / f"a{suffix}", 200)
    assert whole.pixels.shape == (3, 600, 800)
    assert reduced.pixels.shape == (3, 150, 200)
    assert reduced.size == whole.size == (600, 800)
    found = [align_pictures(aligner_of(rotation=0.3), [each]).warp for each in (whole, reduced)]
    at = [to_pixels(warp.map_points(torch.zeros(1, 1, 2)).points, (600, 800)) for warp in found]
    torch.testing.assert_close(at[0], at[1], rtol=0, atol=0.5)
    shown = [warped(each, found[0], SIZE, "border") for each in (whole, reduced)]
    torch.testing.assert_close(shown[0], shown[1], rtol=0, atol=0.05)


def test_an_edit_is_the_same_in_parts(monkeypatch):
    pixels = torch.from_numpy(smooth_picture(40, 30)).permute(2, 0, 1)
    warp = align_pictures(aligner_of(rotation=0.3), [Picture("x", pixels)]).warp
    edit = torch.rand(4, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    whole = commands._with_edit(edit, warp, pixels)
    assert torch.equal(whole, to_uint8(propagate(edit, warp, from_uint8(pixels[None])))[0])
    monkeypatch.setattr(commands, "EDITED_PX", 100)
    assert torch.equal(commands._with_edit(edit, warp, pixels), whole)


def test_names_as_long_as_a_disk_takes(tmp_path):
    """Pictures whose PNGs' names would be too long, by bytes and where two would be one; none is lost."""
    root, names = (
        tmp_path / "pictures",
        ["a" * 251 + ".jpg", "a" * 251 + ".png", "é" * 125 + ".jpeg", "b" * 250 + ".gif"],
    )
    (root / ("c" * 255)).mkdir(parents=True)
    for name in [*names, "c" * 255 + "/" + names[0]]:
        Image.fromarray(smooth_picture(8, 8)).save(root / name)
    run = written(tmp_path / "run", aligner_of())
    done = command("align", "--aligner", run, "--images", root, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "alignment.jsonl").read_text().splitlines()]
    assert len({row["aligned"] for row in rows}) == 5
    assert all((tmp_path / "out" / "aligned" / row["aligned"]).is_file() for row in rows)
    done = command("align", "--aligner", run, "--images", root, "--out", tmp_path / ("d" * 256))
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
