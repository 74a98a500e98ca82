import gzip
import hashlib
import http.server
import threading
from typing import ClassVar

import numpy as np
import pytest
import torch
from triptych_common.data import files, load
from triptych_common.data.datasets import stratified_split


def test_mnist5k_is_split_stratified_fixed_and_disjoint():
    train, held_out = load("mnist5k", "train"), load("mnist5k", "held_out")
    assert torch.bincount(train.labels).tolist() == [400] * 10
    assert torch.bincount(held_out.labels).tolist() == [100] * 10
    assert train.images.dtype == torch.uint8
    assert tuple(train.images.shape) == (4000, 1, 28, 28)
    both = torch.cat([train.images, held_out.images]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 5000
    digest = hashlib.sha256(train.images.numpy().tobytes()).hexdigest()
    assert digest == PINNED_TRAIN_SHA256  # instruments and scores rest on this very split


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
    """Serves `files`, honours Range, and breaks off once after 100 bytes when `break_once` is set."""

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


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="expected one of mnist5k, mnist"):
        load("imagenet")
    with pytest.raises(ValueError, match="expected 'train' or 'held_out'"):
        load("mnist5k", "test")


PINNED_TRAIN_SHA256 = "d890f6365ea63cb3eca9c221436bbbcacfe1bde0a2e4cc526636a154eff45dd5"
