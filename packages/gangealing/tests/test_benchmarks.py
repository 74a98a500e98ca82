"""Keypoint benchmarks: small data sets in the published layouts, protocols against pairs worked by hand, and the command."""

import csv
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from triptych_common.testing import fails_with, run_here, strict_json
from triptych_gangealing import cli
from triptych_gangealing.aligner import Aligner, Alignment, write_aligner
from triptych_gangealing.config import SpatialTransformerConfig
from triptych_gangealing.keypoints.benchmarks import SPAIR_MIRRORS, open_benchmark, square_around
from triptych_gangealing.keypoints.protocols import PROTOCOLS, Predictions, by_attribute, measured, score
from triptych_gangealing.keypoints.transfers import identity, mean_keypoint, through
from triptych_gangealing.modes import Directions, Mode
from triptych_gangealing.spatial_transformer import SpatialTransformer
from triptych_gangealing.warp import Affine, Warp

command = partial(run_here, cli.run)
# width and height, box, points by their numbers
PICTURES = {
    "a": ((40, 20), (10, 0, 30, 16), {0: (4, 5), 1: (12, 5), 2: (20, 15)}),
    "b": ((20, 40), (0, 10, 10, 40), {0: (3, 12), 1: (9, 12)}),
    "c": ((30, 30), (0, 0, 20, 20), {0: (10, 10), 1: (20, 10), 2: (15, 29)}),
}
PAIRS = (("a", "b", (0, 1), 0), ("b", "a", (0, 1), 1), ("a", "c", (0, 1, 2), 0))  # source, target, keypoints, viewpoint


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def picture(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.stem))
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def spair_fixture(folder):
    """SPair-71k of three pictures and three pairs."""
    root = folder / "SPair-71k"
    for name, (size, box, points) in PICTURES.items():
        picture(root / "JPEGImages/cat" / f"{name}.jpg", size)
        about = {
            "filename": f"{name}.jpg",
            "image_width": size[0],
            "image_height": size[1],
            "bndbox": box,
            "category": "cat",
        }
        kps = {str(k): list(points[k]) if k in points else None for k in range(4)}
        write_json(root / "ImageAnnotation/cat" / f"{name}.json", {**about, "kps": kps})
    for i, (source, target, keypoints, view) in enumerate(PAIRS):
        pair = {"src_imname": f"{source}.jpg", "trg_imname": f"{target}.jpg", "category": "cat", "mirror": 0}
        pair |= {"kps_ids": [str(k) for k in keypoints], "viewpoint_variation": view, "occlusion": 0}
        write_json(root / "PairAnnotation/test" / f"00000{i}-{source}-{target}:cat.json", pair)
    return root


@pytest.fixture
def spair(tmp_path):
    return spair_fixture(tmp_path)


def predictions(benchmark, moved):
    """The truth of every pair, moved by a vector."""
    return benchmark.points[benchmark.pairs[:, 1]] + torch.tensor(moved)


def value(benchmark, given, protocol, alpha):
    return score(benchmark, given, {protocol: PROTOCOLS[protocol]}, (alpha,), repeats=0)[protocol][0].pairs.value


def test_spair_is_read_with_every_point_of_a_picture(spair):
    found = open_benchmark(f"spair:{spair}", "cat")
    assert [file.name for file in found.files] == ["a.jpg", "b.jpg", "c.jpg"]
    assert found.pairs.tolist() == [[0, 1], [1, 0], [0, 2]]
    assert found.points[0, 2].tolist() == [20, 15]
    assert found.points[1, 2].isnan().all()
    assert found.listed[:, :4].tolist() == [[True, True, False, False]] * 2 + [[True, True, True, False]]
    assert found.box[1].tolist() == [0, 10, 10, 40]
    assert found.attributes["viewpoint_variation"].tolist() == [0, 1, 0]
    assert found.picture(1).size == (40, 20)


def test_mirror_pairs_are_permutations_that_undo_themselves():
    counts = {"aeroplane": 25, "bicycle": 14, "bus": 30, "car": 30, "cat": 15, "dog": 16, "tvmonitor": 16}
    assert len(SPAIR_MIRRORS) == 18
    for category, pairs in SPAIR_MIRRORS.items():
        members = [k for pair in pairs for k in pair]
        assert len(set(members)) == len(members), category
        assert max(members) < counts.get(category, 30)
    # As the released code has it, for the categories that it knows.
    order = list(range(16))
    for a, b in SPAIR_MIRRORS["tvmonitor"]:
        order[a], order[b] = b, a
    assert order == [2, 1, 0, 7, 6, 5, 4, 3, 10, 9, 8, 15, 14, 13, 12, 11]


def test_each_protocol_on_pairs_worked_by_hand(spair):
    """Targets are b (box 10 x 30, picture 20 x 40), a (box 20 x 16, picture 40 x 20) and c (box 20 x 20, picture 30 x 30)."""
    found = open_benchmark(f"spair:{spair}", "cat")
    given = Predictions.of(predictions(found, [2.0, 0.0]))  # every point 2 pixels to the right; 7 points
    at = partial(value, found, given)
    assert at("strict", 0.1) == 1.0  # 3, 2 and 2 pixels allowed: the bound counts
    assert at("bound excluded", 0.1) == 2 / 7  # only b's
    assert at("source box", 0.1) == 1.0  # the sources' boxes allow 2, 3 and 2
    assert at("source box", 0.08) == 2 / 7  # 1.6, 2.4, 1.6: only the pair whose source is b
    assert at("image size", 0.05) == 4 / 7  # 2, 2, 1.5
    assert at("each axis", 0.1) == 5 / 7  # b's box is 10 wide: 1 pixel
    assert at("each axis", 0.05) == 0.0
    # Resized to a unit square: 2 pixels are 0.1, 0.05 and 0.067; boxes by the factor of x 1.5, 0.5, 0.67; of y 0.75, 1.0, 0.67.
    assert at("square, scale of x", 0.09) == 2 / 7
    assert at("square, scale of y", 0.09) == 2 / 7  # a's: 0.05 <= 0.09
    assert at("square, smaller scale", 0.099) == 0.0
    assert at("square, smaller scale", 0.14) == 1.0  # 0.1 <= 0.105, 0.05 <= 0.07, 0.067 <= 0.093
    assert at("per image", 0.09) == 1 / 3  # b's pair is right, both others are wrong
    assert at("strict", 0.09) == 2 / 7


def test_strict_labels_exchange_left_and_right_of_a_mirrored_pair(spair):
    """A method that mirrors sources finds the left ear where the right one is: right, once labels are exchanged."""
    found = open_benchmark(f"spair:{spair}", "cat").first(1)
    points = found.points[found.pairs[:, 1]].clone()
    points[0, [0, 1]] = points[0, [1, 0]]
    mirrored = Predictions(points, torch.tensor([True]))
    assert value(found, mirrored, "strict", 0.01) == 1.0
    assert value(found, Predictions.of(points), "strict", 0.01) == 0.0


def test_the_released_code_counts_points_whose_mirror_partner_is_absent(spair):
    """Keypoint 2 is the left one of a pair, 2 and 3: nobody has 3. Both pictures of the last pair have 2, so that it counts."""
    found = open_benchmark(f"spair:{spair}", "cat")
    points = found.points[found.pairs[:, 1]].clone()
    points[2, [0, 1]] = points[2, [1, 0]]
    given = Predictions(points, torch.tensor([False, False, True]), corner=torch.full((3, 2), -50.0))
    distance, _, valid = measured(found, given, PROTOCOLS["as released"])
    assert valid[2].tolist()[:4] == [True, True, True, False]
    assert float(distance[2, 2]) == pytest.approx(math.hypot(15 + 50, 29 + 50))  # transferred from the corner
    assert value(found, given, "as released", 0.1) == 6 / 7
    assert value(found, given, "strict", 0.1) == 1.0  # of 6 points
    assert score(found, given, repeats=0)["strict"][0].points == 6


def test_attributes_split_pairs(spair):
    found = open_benchmark(f"spair:{spair}", "cat")
    points = predictions(found, [0.0, 0.0])
    points[1] += 100
    split = by_attribute(found, Predictions.of(points), repeats=0)
    assert {k: one.pairs.value for k, one in split["viewpoint_variation"].items()} == {0: 1.0, 1: 0.0}
    assert list(split) == ["viewpoint_variation", "occlusion"]


def test_known_warps_transfer_points_between_oblong_pictures(spair):
    """Congealed space is the unit square around each picture's points 0 and 1, on a line: exact transfer of both."""
    found = open_benchmark(f"spair:{spair}", "cat")

    def align(pictures):
        matrices = []
        for picture in pictures:
            height, width = picture.size
            _, _, points = PICTURES[picture.name[0]]
            (x0, y), (x1, _) = points[0], points[1]
            middle, half = ((x0 + x1 + 1) / width - 1, (2 * y + 1) / height - 1), (x1 - x0) / width
            matrices.append([[half, 0, middle[0]], [0, half, middle[1]]])
        return Alignment.of_warp(Warp((Affine(torch.tensor(matrices)),)))

    given = through(found, align, 1)
    truth = found.points[found.pairs[:, 1]]
    torch.testing.assert_close(given.points[:, :2], truth[:, :2], rtol=1e-4, atol=1e-3)
    assert given.points[1, 2].isnan().all()  # b has no such point
    assert value(found, given, "strict", 0.01) == 6 / 7


def test_baselines_that_know_no_pixels(spair):
    found = open_benchmark(f"spair:{spair}", "cat")
    same = identity()(found).points
    # a's square is 40 pixels wide, from y = -10 on; b's 40, from x = -10 on: a's (4, 5) is (4, 15) of both, b's (-6, 15).
    torch.testing.assert_close(same[0, 0], torch.tensor([-6.0, 15.0]), rtol=0, atol=1e-4)
    place = mean_keypoint()(found).points
    # Keypoint 2 in a: half of the box, 15/16 down; in c: 15/20 and 29/20. In c, by a alone; in b, by the mean of both.
    torch.testing.assert_close(place[2, 2], torch.tensor([10.0, 18.75]), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        place[0, 2], torch.tensor([0.625 * 10, 10 + 30 * (0.9375 + 1.45) / 2]), rtol=0, atol=1e-4
    )


def test_squares_of_acsm():
    assert square_around((10, 20, 29, 39)) == (9, 19, 30, 40)  # 20 pixels and one more at each end
    left, top, right, bottom = square_around((0, 0, 99, 49))  # grown: -5, -2.5, 104, 51.5
    assert (left, right) == (-5, 104)
    assert (top, bottom) == (-30, 79)
    assert right - left == bottom - top


@pytest.fixture
def cub(tmp_path):
    root = tmp_path / "CUB_200_2011"
    names = {1: "001.Albatross/a.jpg", 2: "001.Albatross/b.jpg", 3: "002.Crow/c.jpg", 4: "002.Crow/d.jpg"}
    for name in names.values():
        picture(root / "images" / name, (60, 50))

    def table(name, rows):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))

    table("images.txt", names.items())
    table("bounding_boxes.txt", [(i, 11.0, 11.0, 40.0, 30.0) for i in names])
    table("train_test_split.txt", [(1, 0), (2, 0), (3, 1), (4, 0)])
    table("parts/part_locs.txt", [(i, p, 20.0 + p, 21.0, int(p != 7)) for i in names for p in range(1, 16)])
    boxes = [{"id": i, "rel_path": names[i], "bbox": {"x1": 11.0, "y1": 11.0, "x2": 50.0, "y2": 40.0}} for i in (1, 3)]
    savemat(root / "val_cub_cleaned.mat", {"images": np.array(boxes, dtype=object)})
    return root


def test_cub_plain_files_and_acsms_list_agree(cub):
    found = open_benchmark(f"cub:{cub}")
    assert [file.name for file in found.files] == ["a.jpg", "b.jpg", "d.jpg"]
    assert len(found) == 10_000
    # Box 11..50 x 11..40 from 1 on is 10..49 x 10..39; grown by 2 and 1.5: 8..51 x 9 (8.5 up)..41 (40.5 up); square: 44.
    assert found.crops[0].tolist() == [8, 3, 51, 46]
    assert found.points[0, 0].tolist() == [20 - 8, 20 - 3]
    assert found.points[0, 6].isnan().all()
    assert found.picture(0).size == (44, 44)
    whole = np.asarray(Image.open(cub / "images/001.Albatross/a.jpg").convert("RGB"))
    assert np.array_equal(found.picture(0).pixels.numpy().transpose(1, 2, 0)[:40], whole[3:43, 8:52])
    listed = open_benchmark(f"cub:{cub / 'val_cub_cleaned.mat'}")
    assert [file.name for file in listed.files] == ["a.jpg", "c.jpg"]
    assert torch.equal(listed.crops[0], found.crops[0])
    # A pass uses each picture once at most.
    assert found.pairs[0].unique().numel() == 2
    assert found.mirrored[6:9].tolist() == [10, 11, 12]
    assert [file.name for file in open_benchmark(f"cub:{cub}", "Albatross").files] == ["a.jpg", "b.jpg"]


def test_willow_and_ap10k(tmp_path):
    willow = tmp_path / "PF-dataset"
    for name in ("car(G)/1.png", "car(G)/2.png"):
        picture(willow / name, (50, 40))
    points = [str(x) for x in (*range(10), *range(10, 20), *range(20, 30), *range(5, 15))]
    header = ",".join(["imageA", "imageB", *(f"{c}{i}" for c in ("XA", "YA", "XB", "YB") for i in range(1, 11))])
    (willow / "test_pairs.csv").write_text(
        f"{header}\nPF-dataset/car(G)/1.png,PF-dataset/car(G)/2.png,{','.join(points)}\n"
    )
    found = open_benchmark(f"willow:{willow}")
    assert found.points[0, 3].tolist() == [3, 13]
    assert found.points[1, 3].tolist() == [23, 8]
    assert found.box[1].tolist() == [20, 5, 29, 14]

    animals = tmp_path / "ap-10k"
    keypoints = [v for k in range(17) for v in (k, 2 * k, 2 * (k != 4))]
    for i in (1, 2):
        picture(animals / "data" / f"{i}.jpg", (50, 40))
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 50, "height": 40} for i in (1, 2)]
    annotations = [{"image_id": i, "category_id": 7, "bbox": [1, 2, 30, 20], "keypoints": keypoints} for i in (1, 2)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "fox"}]}
    write_json(animals / "annotations/ap10k-test-split1.json", content)
    found = open_benchmark(f"ap10k:{animals}", "fox")
    assert found.points[0, 5].tolist() == [5, 10]
    assert found.points[0, 4].isnan().all()
    assert found.box[0].tolist() == [1, 2, 31, 22]
    with pytest.raises(ValueError, match="category dog: expected one of fox"):
        open_benchmark(f"ap10k:{animals}", "dog")


# --- The command


@pytest.fixture
def aligner(tmp_path):
    torch.manual_seed(0)
    shape = SpatialTransformerConfig(input_size=16, channel_max=4, flow_size=4, flow_upsampling=4)
    mode = Mode(Directions(torch.zeros(6), torch.zeros(1, 6), torch.ones(1)))
    path = tmp_path / "aligner.safetensors"
    write_aligner(path, Aligner(SpatialTransformer(shape), mode), {"padding": "border"})
    return path


def test_the_command_scores_methods_and_what_it_wrote(spair, aligner, tmp_path):
    out = tmp_path / "scores"
    given = ["--data", f"spair:{spair}", "--category", "cat", "--aligner", aligner]
    done = command("pck", *given, "--out", out)
    assert "strict" in done.stdout
    scores = strict_json((out / "pck.json").read_text())["scores"]
    assert list(scores) == ["identity", "mean keypoint", "Congealing", "GANgealing"]
    assert list(scores["identity"]) == list(PROTOCOLS)
    # An untrained transformer leaves everything where it is.
    assert scores["GANgealing"]["strict"] == scores["identity"]["strict"]
    table = out / "predictions" / "mean-keypoint.csv"
    again = ["--predictions", table, "--baselines", "none", "--aligner", "None", "--out", tmp_path / "again"]
    command("pck", *given[:4], *again)
    found = strict_json((tmp_path / "again/pck.json").read_text())["scores"]["predictions"]
    assert found == scores["mean keypoint"]


def test_bad_input_is_one_line(spair, aligner, tmp_path):
    given = ["pck", "--data", f"spair:{spair}", "--category", "cat", "--aligner", aligner, "--baselines", "none"]

    def refused(words, *options):
        fails_with(command(*given, *options, "--out", tmp_path / "out"), words)

    refused("category unicorn: expected one of aeroplane", "--category", "unicorn")
    refused("no pairs of cat; splits are test", "--split", "val")
    refused("data coco:x: expected mnist5k, mnist, or one of spair:PATH", "--data", "coco:x")
    refused("no such folder", "--data", f"spair:{tmp_path / 'absent'}")
    tables = {
        "pair,keypoint,x,y\n0,0,-1,-1\n": "(-1, -1), which is padding",
        "pair,keypoint,x,y\n9,0,1,1\n": "row 1: pair 9, expected a whole number from 0 to 2",
        "pair,keypoint,x,y\n0,0,1,1\n0,0,2,2\n": "come twice",
        "pair,x,y\n0,1,1\n": "lacks the columns keypoint",
        "pair,keypoint,x,y\n0,0,nan,1\n": "a point that is not finite",
        "pair,keypoint,x,y\n0,0,a,1\n": "x holds something else than numbers",
    }
    for text, words in tables.items():
        table = tmp_path / "given.csv"
        table.write_text(text)
        refused(words, "--predictions", table)
    annotation = spair / "ImageAnnotation/cat/a.json"
    whole = json.loads(annotation.read_text())
    write_json(annotation, {**whole, "kps": {**whole["kps"], "1": [400, 5]}})
    refused("keypoint 1 at (400, 5), outside its 40 x 20 pixels")
    write_json(annotation, {**whole, "image_width": 41})
    refused("40 x 20 pixels, annotated as 41 x 20")
    write_json(annotation, {**whole, "bndbox": [1, 2]})
    refused("a.json")
    write_json(annotation, whole)
    (spair / "JPEGImages/cat/b.jpg").unlink()
    refused("b.jpg: no such picture")
    annotation.unlink()
    refused("no annotation of a.jpg, which a pair names")


def test_predictions_in_parquet(spair, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = open_benchmark(f"spair:{spair}", "cat")
    rows = [(p, k, *found.points[found.pairs[p, 1], k].tolist()) for p, k in found.listed.nonzero().tolist()]
    columns = dict(zip(("pair", "keypoint", "x", "y"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), tmp_path / "truth.parquet")
    given = ["--data", f"spair:{spair}", "--category", "cat", "--aligner", "None", "--baselines", "none"]
    command("pck", *given, "--predictions", tmp_path / "truth.parquet", "--out", tmp_path / "out")
    scores = strict_json((tmp_path / "out/pck.json").read_text())["scores"]["predictions"]
    assert all(one[0]["over pairs"]["value"] == 1.0 for name, one in scores.items())
    many = pa.table({name: pa.array(np.zeros(1_100_000)) for name in columns})  # a few bytes that claim many rows
    pq.write_table(many, tmp_path / "many.parquet")
    assert (tmp_path / "many.parquet").stat().st_size < 100_000
    done = command("pck", *given, "--predictions", tmp_path / "many.parquet", "--out", tmp_path / "o")
    fails_with(done, "many.parquet: 1,100,000 rows in")
    with (tmp_path / "broken.csv").open("w") as file:
        csv.writer(file).writerows([("pair", "keypoint", "x", "y"), (0, 0, 1)])
    done = command("pck", *given, "--predictions", tmp_path / "broken.csv", "--out", tmp_path / "o")
    fails_with(done, "rows of different lengths")
