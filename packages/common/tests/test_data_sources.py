"""Folders and Hugging Face data sets, made by the tests, as sources of images."""

import os
import pickle
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from triptych_common.data import (
    HubImages,
    ImageDataset,
    ImageFolder,
    ImageSource,
    ImageTooSmall,
    UnreadableImage,
    contents_of,
    in_memory,
    open_source,
)
from triptych_common.data import folder as folder_module
from triptych_common.data.contents import changes


def write_image(path: Path, value: int, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 2 * value, 0)).save(path)


@pytest.fixture
def animals(tmp_path) -> Path:
    """Five images of three classes, beside files that are not images."""
    root = tmp_path / "animals"
    write_image(root / "cat/b.png", 1)
    write_image(root / "cat/a/9.BMP", 2)
    write_image(root / "dog/1.webp", 3)
    write_image(root / "dog/10.jpg", 4)
    write_image(root / "ant.x/z.jpeg", 5)
    (root / "cat/notes.txt").write_text("x")
    (root / "labels").write_text("x")
    (root / "cat/._b.png").write_bytes(b"what one file system leaves on another")
    (root / ".cache").mkdir()
    return root


def test_classes_and_files_come_in_the_order_of_their_names(animals, capsys):
    source = ImageFolder(animals)
    assert isinstance(source, ImageSource)
    assert source.files == ["ant.x/z.jpeg", "cat/a/9.BMP", "cat/b.png", "dog/1.webp", "dog/10.jpg"]
    assert source.labels.tolist() == [0, 1, 1, 2, 2]
    assert (source.class_names, source.num_classes, source.name) == (("ant.x", "cat", "dog"), 3, "animals")
    assert len(source) == 5
    assert "2 files are left out, not images by name or kind (.txt: 1, no suffix: 1)" in capsys.readouterr().out
    assert source.read(2).shape == (3, 10, 12)
    assert source.read(2, (5, 6))[:, 0, 0].tolist() == [1, 2, 0]
    with pytest.raises(ImageTooSmall, match=r"cat/b.png: 12x10 pixels are fewer than the crop's 16x16"):
        source.read(2, 16)
    assert source.read(2, 16, channels=1, allow_upscale=True).shape == (1, 16, 16)


def test_a_folder_is_one_class_without_subfolders_or_on_request(animals):
    flat = ImageFolder(animals / "dog")
    assert (flat.class_names, flat.labels.tolist()) == (("dog",), [0, 0])
    everything = open_source(str(animals), unconditional=True)
    assert (everything.class_names, everything.labels.tolist()) == (("animals",), [0] * 5)
    assert everything.fingerprint() != ImageFolder(animals).fingerprint()


def test_a_divided_folder_is_entered_at_its_split(animals, tmp_path):
    (tmp_path / "whole").mkdir()
    shutil.copytree(animals, tmp_path / "whole/train")
    write_image(tmp_path / "whole/val/cat/1.png", 9)
    assert ImageFolder(tmp_path / "whole").class_names == ("ant.x", "cat", "dog")
    assert open_source(str(tmp_path / "whole"), "held_out").locate(0).endswith("whole/val/cat/1.png")
    with pytest.raises(ValueError, match=r"split 'test' of .*whole: expected one of train, val"):
        ImageFolder(tmp_path / "whole", "test")
    with pytest.raises(
        ValueError, match=r"split 'held_out' of .*animals: expected a folder that is divided into train/"
    ):
        ImageFolder(animals, "held_out")


def test_what_would_shift_labels_or_drop_images_is_refused(animals, tmp_path):
    write_image(animals / "loose.png", 7)
    with pytest.raises(ValueError, match=r"1 images, such as loose.png, are beside the class folders"):
        ImageFolder(animals)
    assert len(ImageFolder(animals, unconditional=True)) == 6
    (animals / "loose.png").unlink()
    (animals / "bee").mkdir()
    with pytest.raises(ValueError, match=r"class folder bee has no images .*remove it"):
        ImageFolder(animals)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no images found \(.jpg, .jpeg"):
        ImageFolder(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; expected a folder of images"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"labels: a file; expected a folder of images"):
        ImageFolder(animals / "labels")


def test_a_folder_that_may_not_be_read_is_an_error(animals, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="dog"):
        ImageFolder(animals)


def test_damaged_images_are_named_and_vanished_ones_are_not_called_damaged(animals):
    source = ImageFolder(animals)
    path = animals / "dog/10.jpg"
    write_image(path, 4, (64, 64))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UnreadableImage, match=r"truncated") as caught:
        source.read(4, 8)
    assert caught.value.path == str(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        source.read(4, 8)


def test_a_fingerprint_follows_names_and_sizes_not_places_and_times(animals, tmp_path):
    first = ImageFolder(animals).fingerprint()
    moved = tmp_path / "elsewhere/animals"
    shutil.copytree(animals, moved)
    os.utime(moved / "cat/b.png", (0, 0))
    assert ImageFolder(moved).fingerprint() == first
    with (moved / "cat/b.png").open("ab") as file:
        file.write(b"x")
    longer = ImageFolder(moved).fingerprint()
    (moved / "cat/b.png").rename(moved / "cat/c.png")
    assert len({first, longer, ImageFolder(moved).fingerprint()}) == 3


def test_changes_of_contents_are_told_in_words(animals, tmp_path):
    def held(folder, **options):
        return contents_of(in_memory(ImageFolder(folder, **options), 8))

    def change(act):
        folder = tmp_path / act.__name__
        shutil.copytree(animals, folder, copy_function=shutil.copyfile)
        act(folder)
        return changes(before, held(folder)), changes(listed, ImageFolder(folder).listing())

    def nothing(folder): ...

    def renamed_class(folder):
        (folder / "cat").rename(folder / "bat")

    def renamed_file(folder):
        (folder / "cat/b.png").rename(folder / "cat/bb.png")

    def added(folder):
        write_image(folder / "dog/x.png", 5)

    def repainted(folder):
        write_image(folder / "cat/a/9.BMP", 77)  # of the same size, whatever it shows

    before, listed = held(animals), ImageFolder(animals).listing()
    assert change(nothing) == ("", "")
    names = "class names: was ant.x, cat, dog; now ant.x, bat, dog"
    assert change(renamed_class) == (names, names)
    assert change(renamed_file) == ("", "class cat: 2 pictures, not the same ones")
    assert change(added) == ("class dog: 2 pictures, now 3",) * 2
    assert change(repainted) == ("class cat: 2 pictures, not the same ones", "")
    one = held(animals, unconditional=True)
    animals.rename(animals.with_name("moved"))
    assert changes(one, held(animals.with_name("moved"), unconditional=True)) == ""
    assert changes(before, one) == "class names: was ant.x, cat, dog; now one class"
    swapped = {**before, "order": one["order"]}
    assert changes(before, swapped) == "the order of classes among the pictures"


def test_files_are_known_to_be_newer_than_a_time(animals):
    source = ImageFolder(animals)
    assert source.changed_since(0, range(1, 4)) == [1, 2, 3]
    assert source.changed_since(time.time_ns() + 10**9, range(5)) == []
    os.utime(animals / source.files[2], ns=(0, time.time_ns() + 10**12))
    assert ImageFolder(animals).changed_since(time.time_ns() + 10**9, [0, 2, 4]) == [2]


def test_each_file_of_a_folder_is_looked_at_once(animals, monkeypatch):
    looked, status, stat = Counter(), folder_module._status, Path.stat
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "_status", lambda entry: looked.update([entry.path]) or status(entry))
        patch.setattr(Path, "stat", lambda path, **how: looked.update([str(path)]) or stat(path, **how))
        source = ImageFolder(animals)
        source.fingerprint()
    assert {looked[source.locate(index)] for index in range(5)} == {1}


def test_a_pickled_folder_reads_the_same(animals):
    source = ImageFolder(animals)
    twin = pickle.loads(pickle.dumps(source))
    assert torch.equal(twin.read(3, 8), source.read(3, 8))
    assert twin.fingerprint() == source.fingerprint()


def test_a_small_folder_fits_in_memory(animals, monkeypatch):
    source = ImageFolder(animals)
    dataset = in_memory(source, (6, 8))
    assert isinstance(dataset, ImageDataset)
    assert torch.equal(dataset.images, torch.stack([source.read(i, (6, 8)) for i in range(5)]))
    assert dataset.labels.tolist() == [0, 1, 1, 2, 2]
    assert (dataset.class_names, dataset.name, dataset.split) == (source.class_names, "animals", "train")
    assert in_memory(source, 6, channels=1).images.shape == (5, 1, 6, 6)
    with pytest.raises(ImageTooSmall, match="allow upscaling"):
        in_memory(source, 64)
    (animals / "cat/b.png").write_bytes(b"junk")
    with pytest.raises(UnreadableImage, match=r"cat/b.png: not an image"):
        in_memory(source, 6)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)  # a machine of 10,000 bytes
    with pytest.raises(ValueError, match=r"5 images of 32x32 would take .* encode them to latents"):
        in_memory(source, 32)


def test_open_source_takes_names_and_folders_and_lists_them_in_its_error(animals):
    assert isinstance(open_source("mnist5k", "held_out"), ImageDataset)
    one_class = open_source("mnist5k", "held_out", unconditional=True)
    assert (one_class.num_classes, one_class.class_names, int(one_class.labels.max())) == (1, ("mnist5k",), 0)
    assert isinstance(open_source(str(animals)), ImageFolder)
    with pytest.raises(
        ValueError, match=r"data 'imagenet': expected mnist5k, mnist, cifar10, a folder of images, or hub:"
    ):
        open_source("imagenet")
    with pytest.raises(ValueError, match="data '': expected mnist5k"):
        open_source("")
    with pytest.raises(ValueError, match="has no columns"):
        open_source("mnist5k", image_column="picture")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)) for i in range(6)]


@pytest.fixture
def table(pictures, tmp_path, monkeypatch):
    """Six rows with an image, a class label, a caption and a number."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kinds = {
        "picture": datasets.Image(),
        "kind": datasets.ClassLabel(names=["x", "y", "z"]),
        "caption": datasets.Value("string"),
        "number": datasets.Value("int64"),
    }
    rows = {"picture": pictures, "kind": [2, 1, 0, 0, 1, 2], "caption": list("abcabc"), "number": [70, 5, 5, 70, 5, 5]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))


def test_a_saved_data_set_is_read_exactly(table, pictures, tmp_path):
    table.save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"))
    assert isinstance(source, HubImages)
    assert isinstance(source, ImageSource)
    assert (source.labels.tolist(), source.class_names) == ([2, 1, 0, 0, 1, 2], ("x", "y", "z"))
    assert np.array_equal(source.read(4).permute(1, 2, 0).numpy(), np.array(pictures[4]))
    twin = pickle.loads(pickle.dumps(source))
    assert torch.equal(twin.read(5, 16), source.read(5, 16))
    with pytest.raises(ImageTooSmall, match=r"saved\[0\].*: 30x20 pixels are fewer"):
        source.read(0, 24)
    by_number = open_source(str(tmp_path / "saved"), label_column="number")
    assert (by_number.labels.tolist(), by_number.class_names) == ([1, 0, 0, 1, 0, 0], ("5", "70"))
    by_caption = open_source(str(tmp_path / "saved"), image_column="picture", label_column="caption")
    assert by_caption.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert open_source(str(tmp_path / "saved"), unconditional=True).num_classes == 1
    with pytest.raises(ValueError, match=r"split 'held_out' of .*saved: expected one of train"):
        open_source(str(tmp_path / "saved"), "held_out")


def test_parquet_and_splits_give_the_same_source(table, tmp_path):
    import datasets

    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet/train.parquet")
    parts = datasets.DatasetDict({"train": table, "validation": table.select([4, 1]), "test": table.select([0])})
    parts.save_to_disk(tmp_path / "parts")
    packed, saved = open_source(f"hub:{tmp_path / 'parquet'}"), HubImages(tmp_path / "parts")
    assert packed.fingerprint() == saved.fingerprint()
    assert torch.equal(packed.read(3), saved.read(3))
    held_out = HubImages(tmp_path / "parts", "held_out")
    assert held_out.labels.tolist() == [1, 1]
    assert torch.equal(held_out.read(0), saved.read(4))
    assert held_out.fingerprint() != saved.fingerprint()
    with pytest.raises(ValueError, match=r"parts: expected one of train, validation, test"):
        HubImages(tmp_path / "parts", "val")


def test_wrong_columns_list_the_right_ones(table, tmp_path, capsys):
    import datasets

    second = table.select_columns(["picture"]).rename_column("picture", "second")
    datasets.concatenate_datasets([table, second], axis=1).save_to_disk(tmp_path / "two")
    with pytest.raises(
        ValueError, match=r"2 image columns, name one with image_column: picture \(Image\), kind \(Class"
    ):
        HubImages(tmp_path / "two")
    table.save_to_disk(tmp_path / "one")
    listing = r"picture \(Image\), kind \(ClassLabel\), caption \(string\), number \(int64\)"
    with pytest.raises(ValueError, match=rf"image_column 'img': expected one of {listing}"):
        HubImages(tmp_path / "one", image_column="img")
    with pytest.raises(ValueError, match=rf"label_column 'label': expected one of {listing}"):
        HubImages(tmp_path / "one", label_column="label")
    for column in ("caption", "number"):
        with pytest.raises(ValueError, match=rf"column '{column}' holds (string|int64), not images"):
            HubImages(tmp_path / "one", image_column=column)
    with pytest.raises(ValueError, match="label_column 'picture': expected an integer or a string in every row"):
        HubImages(tmp_path / "one", label_column="picture")
    table.remove_columns("kind").save_to_disk(tmp_path / "unlabelled")
    assert HubImages(tmp_path / "unlabelled").class_names == ("unlabelled",)
    assert "no column of class labels, read as one class" in capsys.readouterr().out
    hidden = {"image": table["picture"][:2], "label": [0, -1]}
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    datasets.Dataset.from_dict(hidden, features=kinds).save_to_disk(tmp_path / "hidden")
    with pytest.raises(ValueError, match="label_column 'label' has 1 unlabelled rows; pick another split"):
        HubImages(tmp_path / "hidden")


def test_raw_bytes_serve_as_images_and_damaged_rows_are_named(table, tmp_path):
    import datasets

    rows = table.cast_column("picture", datasets.Image(decode=False))["picture"]
    content = [row["bytes"] for row in rows]
    raw = datasets.Dataset.from_dict({"jpg": [content[0], content[1][:-400], None], "label": ["x", "y", "x"]})
    raw.save_to_disk(tmp_path / "raw")
    source = HubImages(tmp_path / "raw", image_column="jpg", label_column="label")
    assert torch.equal(source.read(0), open_source_of(table, tmp_path).read(0))
    with pytest.raises(UnreadableImage, match=r"raw\[1\]: .*truncated"):
        source.read(1)
    with pytest.raises(UnreadableImage, match=r"raw\[2\]: the row has no image"):
        source.read(2)
    assert source.fingerprint().startswith("names-and-sizes:")


def open_source_of(table, tmp_path) -> ImageSource:
    table.save_to_disk(tmp_path / "whole")
    return open_source(str(tmp_path / "whole"))


def test_without_the_network_or_the_library_there_is_one_line(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match=r"^Hugging Face data set nobody/nothing: .*reach.*; check its name and the network"
    ):
        open_source("hub:nobody/nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'triptych-common\[hub\]'"):
        open_source("hub:nobody/nothing")


def test_each_file_is_listed_once_and_only_if_regular(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "x.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)  # followed, it would repeat every picture until the path is too long
    (tmp_path / "a" / "y.png").symlink_to(tmp_path / "a" / "x.png")
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b" / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    assert ImageFolder(tmp_path).files == ["a/x.png", "b/x.png"]
    assert "(links to files listed already: 1, pipes, devices, broken links: 3)" in capsys.readouterr().out
