import gzip
import hashlib
import http.server
import io
import tarfile
import threading
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from triptych_common.data import ImageDataset, ImageSource, UnreadableImage, cifar10, files, load
from triptych_common.data.datasets import _echo_once, stratified_split


def test_mnist5k_is_split_stratified_fixed_and_disjoint():
    train, held_out = load("mnist5k", "train"), load("mnist5k", "held_out")
    assert torch.bincount(train.labels).tolist() == [400] * 10
    assert torch.bincount(held_out.labels).tolist() == [100] * 10
    assert train.images.dtype == torch.uint8
    assert tuple(train.images.shape) == (4000, 1, 28, 28)
    both = torch.cat([train.images, held_out.images]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 5000
    digest = hashlib.sha256(train.images.numpy().tobytes()).hexdigest()
    assert digest == PINNED_TRAIN_SHA256  # instruments and scores depend on exactly this split


def test_scaling_covers_minus_one_to_one():
    scaled = load("mnist5k", "held_out").scaled()
    assert (float(scaled.min()), float(scaled.max())) == (-1.0, 1.0)


def test_stratified_split_takes_equally_of_every_class():
    labels = torch.tensor([0] * 7 + [1] * 5 + [2] * 9)
    train, held_out = stratified_split(labels, 2)
    assert torch.bincount(labels[held_out]).tolist() == [2, 2, 2]
    assert sorted(torch.cat([train, held_out]).tolist()) == list(range(21))


@pytest.fixture
def fake_mnist(monkeypatch):
    """Four small files in MNIST's format, with their hashes declared as the expected ones."""
    rng = np.random.default_rng(0)
    content = {}
    for part, n in (("train", 30), ("t10k", 12)):
        content[f"{part}-images-idx3-ubyte"] = bytes(16) + rng.integers(0, 256, n * 784, dtype=np.uint8).tobytes()
        content[f"{part}-labels-idx1-ubyte"] = bytes(8) + (np.arange(n, dtype=np.uint8) % 10).tobytes()
    monkeypatch.setattr(files, "MNIST_SHA256", {k: hashlib.sha256(v).hexdigest() for k, v in content.items()})
    return content


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_reads_plain_and_packed_files(fake_mnist, tmp_path, monkeypatch, packed):
    (tmp_path / "mnist").mkdir()
    for name, content in fake_mnist.items():
        path = tmp_path / "mnist" / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    monkeypatch.setenv("TRIPTYCH_DATA", str(tmp_path))
    train, held_out = load("mnist", "train"), load("mnist", "held_out")
    assert (len(train), len(held_out)) == (30, 12)
    assert train.images.flatten().tolist() == list(fake_mnist["train-images-idx3-ubyte"][16:])
    assert held_out.labels.tolist() == [i % 10 for i in range(12)]


class _Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`, honours Range, and closes the connection once after 100 bytes if `break_once` is set."""

    files: ClassVar[dict] = {}
    break_once = False
    ranges: ClassVar[list] = []

    def do_GET(self):
        content = self.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        type(self).ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if type(self).break_once:
            type(self).break_once = False
            self.wfile.write(content[start : start + 100])
            self.close_connection = True
            return
        self.wfile.write(content[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(fake_mnist):
    _Server.files = {f"{name}.gz": gzip.compress(content) for name, content in fake_mnist.items()}
    _Server.ranges, _Server.break_once = [], False
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def test_download_resumes_where_it_broke_off(server, fake_mnist, tmp_path):
    _Server.break_once = True
    name = "train-images-idx3-ubyte"
    path = tmp_path / f"{name}.gz"
    with pytest.raises(OSError, match="connection ended after 100 of"):
        files.download(f"{server}{name}.gz", path)
    assert not path.exists()
    files.download(f"{server}{name}.gz", path)
    assert _Server.ranges == [None, "bytes=100-"]
    assert gzip.decompress(path.read_bytes()) == fake_mnist[name]


def test_absent_mnist_is_downloaded_and_checked(server, tmp_path):
    images, labels = files.read_mnist(tmp_path, "t10k", url=server)
    assert images.shape == (12, 28, 28)
    assert labels.shape == (12,)


def test_absent_mnist_offline_names_the_remedy(fake_mnist, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"point TRIPTYCH_DATA at a folder .* or use mnist5k"):
        files.read_mnist(tmp_path, "train", url="http://127.0.0.1:9/")


def test_a_damaged_file_is_refused(fake_mnist, tmp_path):
    name = "train-images-idx3-ubyte"
    for damaged in (gzip.compress(fake_mnist[name])[:-40], gzip.compress(b"other"), b"junk"):
        (tmp_path / f"{name}.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"content is not MNIST's .* delete the file"):
            files.read_mnist(tmp_path, "train", url="http://127.0.0.1:9/")


def test_class_names_are_the_numbers_unless_given():
    digits = load("mnist5k", "held_out")
    assert digits.class_names == tuple("0123456789")
    assert not digits.lossy
    with pytest.raises(ValueError, match="1 class names for 10 classes"):
        ImageDataset("x", "train", digits.images, digits.labels, 10, ("cat",))


def test_a_data_set_in_memory_is_a_source():
    digits = load("mnist5k", "held_out")
    assert isinstance(digits, ImageSource)
    assert torch.equal(digits.read(7, channels=1), digits.images[7])
    assert torch.equal(digits.read(7, 28), digits.images[7].repeat(3, 1, 1))
    pixels = digits.images[7].double().view(14, 2, 14, 2).mean((1, 3))  # an independent box filter; Pillow rounds twice
    assert (digits.read(7, 14, channels=1)[0] - pixels).abs().max() <= 1
    twin = ImageDataset("other", "train", digits.images.clone(), digits.labels.clone(), 10)
    assert twin.fingerprint() == digits.fingerprint()
    twin.images[3, 0, 0, 0] += 1
    assert twin.fingerprint() != digits.fingerprint()


@pytest.fixture
def fake_cifar10(monkeypatch):
    """Six small files in the binary version's format: two records of each class in all of train, one in test."""
    rng = np.random.default_rng(0)
    order = rng.permutation(20) % 10
    labels = {f"data_batch_{i}.bin": order[4 * i - 4 : 4 * i] for i in range(1, 6)} | {"test_batch.bin": np.arange(10)}
    content = {}
    for name, batch in labels.items():
        rows = rng.integers(0, 256, (len(batch), 3073), dtype=np.uint8)
        rows[:, 0] = batch
        content[name] = rows.tobytes()
    monkeypatch.setattr(cifar10, "CIFAR10_SHA256", {k: hashlib.sha256(v).hexdigest() for k, v in content.items()})
    monkeypatch.setattr(cifar10, "PER_CLASS", {"train": 2, "test": 1})
    return content


def pack(path, content: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w:xz") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_reads_the_binary_version_packed_or_not(fake_cifar10, tmp_path, packed):
    folder = tmp_path / "cifar10/cifar-10-batches-bin"
    folder.mkdir(parents=True)
    if packed:
        strangers = {"cifar-10-batches-bin/readme.html": b"", "../outside": b"never written"}
        pack(
            tmp_path / "cifar10/cifar-10-binary.tar.gz",
            strangers | {f"{folder.name}/{k}": v for k, v in fake_cifar10.items()},
        )
    else:
        for name, content in fake_cifar10.items():
            (folder / name).write_bytes(content)
    train, held_out = load("cifar10", "train", tmp_path), load("cifar10", "held_out", tmp_path)
    assert (tuple(train.images.shape), tuple(held_out.images.shape)) == ((20, 3, 32, 32), (10, 3, 32, 32))
    third = fake_cifar10["data_batch_1.bin"][2 * 3073 :]  # label, then rows of red, of green, of blue
    assert int(train.labels[2]) == third[0]
    assert int(train.images[2, 1, 4, 5]) == third[1 + 1024 + 4 * 32 + 5]
    assert held_out.labels.tolist() == list(range(10))
    assert not train.lossy
    assert train.class_names[3] == "cat"
    assert not (tmp_path / "outside").exists()


def test_damaged_cifar10_is_refused(fake_cifar10, tmp_path):
    archive = tmp_path / "cifar10/cifar-10-binary.tar.gz"
    archive.parent.mkdir()
    pack(archive, {f"cifar-10-batches-bin/{k}": v for k, v in fake_cifar10.items()})
    whole = archive.read_bytes()
    for content in (whole[: len(whole) // 2], b"junk", whole[:3000] + b"x" + whole[3001:]):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz.*delete .* and repeat"):
            load("cifar10", "train", tmp_path)
    pack(archive, {f"cifar-10-batches-bin/{k}": v[:-1] + bytes([v[-1] ^ 1]) for k, v in fake_cifar10.items()})
    with pytest.raises(ValueError, match=r"data_batch_1.bin is not CIFAR-10's \(SHA-256 differs\)"):
        load("cifar10", "train", tmp_path)
    unpacked = tmp_path / "cifar10/cifar-10-batches-bin"
    unpacked.mkdir()
    for name, content in fake_cifar10.items():
        (unpacked / name).write_bytes(content)
    (unpacked / "data_batch_3.bin").write_bytes(b"junk")
    with pytest.raises(
        ValueError, match=r"batches-bin/data_batch_3.bin: content is not .*; delete the file and repeat"
    ):
        load("cifar10", "train", tmp_path)


def test_absent_cifar10_is_downloaded_going_on_where_it_broke_off(server, fake_cifar10, tmp_path):
    archive = tmp_path / "packed.gz"
    pack(archive, {f"cifar-10-batches-bin/{k}": v for k, v in fake_cifar10.items()})
    _Server.files, _Server.break_once = {"cifar-10-binary.tar.gz": archive.read_bytes()}, True
    with pytest.raises(FileNotFoundError, match=r"connection ended after 100 of .*; repeat the command to go on"):
        cifar10.read_cifar10(tmp_path / "cifar10", "test", url=server)
    images, labels, copy = cifar10.read_cifar10(tmp_path / "cifar10", "test", url=server)
    assert _Server.ranges == [None, "bytes=100-"]
    assert (images.shape, labels.tolist(), copy) == ((10, 3, 32, 32), list(range(10)), None)


@pytest.fixture
def jpeg_copy():
    """A folder per class: two JPEG files in train, one in test, of one colour that encodes class and number."""
    files = {}
    for label, name in enumerate(cifar10.CIFAR10_CLASSES):
        for part, numbers in (("train", (0, 1)), ("test", (0,))):
            for number in numbers:
                buffer = io.BytesIO()
                Image.new("RGB", (32, 32), (20 * label,) * 3).save(buffer, "JPEG")
                files[f"{part}/{name}/{number:04}.jpg"] = buffer.getvalue()
    return files


@pytest.mark.parametrize("packed", [False, True])
def test_a_jpeg_copy_of_cifar10_is_read_and_marked_lossy(jpeg_copy, fake_cifar10, tmp_path, capsys, packed):
    (tmp_path / "cifar10").mkdir()
    if packed:
        pack(tmp_path / "cifar10/cifar10-jpeg.tar.xz", jpeg_copy)
    for name, content in jpeg_copy.items() if not packed else ():
        (tmp_path / "cifar10" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cifar10" / name).write_bytes(content)
    _echo_once.cache_clear()
    train, held_out = load("cifar10", "train", tmp_path), load("cifar10", "held_out", tmp_path)
    assert capsys.readouterr().out.count("lossy JPEG copies") == 1
    assert train.lossy
    assert held_out.lossy
    assert train.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert train.images[:, 0, 5, 5].tolist() == [20 * label for label in range(10) for _ in range(2)]
    assert len(held_out) == 10

    exact = tmp_path / "cifar10/cifar-10-batches-bin"  # preferred if both exist
    exact.mkdir()
    for name, content in fake_cifar10.items():
        (exact / name).write_bytes(content)
    assert not load("cifar10", "train", tmp_path).lossy


def test_an_incomplete_or_damaged_jpeg_copy_is_refused(jpeg_copy, fake_cifar10, tmp_path):
    path = tmp_path / "cifar10/cifar10-jpeg.tar.xz"
    path.parent.mkdir()
    pack(path, {name: content for name, content in jpeg_copy.items() if "cat/0001" not in name})
    with pytest.raises(ValueError, match=r"expected 2 images of each class in train/, found .* cat 1, .* of 19 files"):
        load("cifar10", "train", tmp_path)
    pack(path, jpeg_copy | {"train/cat/0001.jpg": jpeg_copy["train/cat/0001.jpg"][:-50]})
    with pytest.raises(UnreadableImage, match=r"cifar10-jpeg.tar.xz/train/cat/0001.jpg: (?i:.*truncated)"):
        load("cifar10", "train", tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cifar10-jpeg.tar.xz"):
        load("cifar10", "train", tmp_path)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="expected one of mnist5k, mnist, cifar10"):
        load("imagenet")
    with pytest.raises(ValueError, match="expected 'train' or 'held_out'"):
        load("mnist5k", "test")


PINNED_TRAIN_SHA256 = "d890f6365ea63cb3eca9c221436bbbcacfe1bde0a2e4cc526636a154eff45dd5"
