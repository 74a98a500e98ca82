"""The Inception network of the ADM evaluation suite: torch-fidelity's port of TensorFlow's graph of 2015-12-05."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from triptych_common.cli import is_out_of_memory
from triptych_common.data.datasets import data_root
from triptych_common.data.files import fetch
from triptych_common.extras import import_extra
from triptych_common.storage import foreign

FILE_NAME = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE_NAME}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

POOL_DIM = 2048
SPATIAL_CHANNELS = 7
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS


@dataclass(frozen=True)
class Inception:
    """The frozen network, and the SHA-256 of its weights, which every score must record."""

    network: nn.Module
    sha256: str

    @property
    def is_published(self) -> bool:
        """Whether the weights are the published ones."""
        return self.sha256 == SHA256

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Float[Tensor, "n 2048"], Float[Tensor, "n 2023"]]:
        """The features for FID and for sFID of uint8 images (n, 3, height, width) on the network's device.

        The first are pool_3. The second are the first 7 of 192 channels of mixed_6/conv in the graph, Mixed_6d.branch1x1 in
        the port, after batch norm and ReLU, flattened as (height, width, channel).  [Nash et al. 2021]
        Raises ValueError for images of another shape or type.
        """
        # The network itself resizes to 299 x 299 as TensorFlow 1 did, bilinear without half-pixel centres, and maps x to
        # (x - 128) / 128: images resized elsewhere get other scores.
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"Inception: images are {images.dtype} {tuple(images.shape)}, expected uint8 (n, 3, height, width)"
            )
        spatial: list[Tensor] = []
        layer = self.network.get_submodule("Mixed_6d.branch1x1")
        hook = layer.register_forward_hook(lambda _module, _inputs, output: spatial.append(output))
        with hook, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # convolutions default to TF32
            (pool,) = self.network(images)
        return pool, spatial[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.inference_mode()
    def probabilities(self, pool: Float[Tensor, "n 2048"]) -> Float[Tensor, "n 1008"]:
        """Class probabilities for the Inception score, on the CPU: softmax of the logits without bias, as in the suite."""
        weight = self.network.get_parameter("fc.weight")
        return torch.cat([(part.to(weight.device) @ weight.T).softmax(1).cpu() for part in pool.split(4096)])


def load_inception(path: Path | None = None, *, device: torch.device | str = "cpu", url: str = URL) -> Inception:
    """The network with the weights in a file; by default the published file, which is downloaded to the cache if needed.

    path: may hold other weights of the same network; then `is_published` is false.
    Raises ImportError without torch-fidelity, FileNotFoundError for an absent file that cannot be downloaded, ValueError
    for one that does not hold such weights, or for a cached one whose hash is not the published one.
    """
    needs = "FID, sFID, IS, precision and recall need a package (torch_fidelity): pip install 'triptych-common[fid]'"
    network_class = import_extra("torch_fidelity.feature_extractor_inceptionv3", needs).FeatureExtractorInceptionV3
    content = _read(path) if path is not None else _published(url)
    try:
        plain = io.BytesIO()  # the port's constructor unpickles whatever it reads, so it reads bytes written here
        torch.save(foreign.read(path or cached_path(), content), plain)
        plain.seek(0)
        network = network_class("inception-v3-compat", ["2048"], feature_extractor_weights_path=plain)
    except Exception as error:  # weights of another network can raise anything
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path or cached_path()}: no weights of torch-fidelity's InceptionV3 ({reason}); expected {FILE_NAME}"
        ) from error
    network = network.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    return Inception(network, hashlib.sha256(content).hexdigest())


def cached_path() -> Path:
    """The path of the published weights: in `$TRIPTYCH_DATA`, unless torch-fidelity has already downloaded them."""
    theirs = Path(torch.hub.get_dir()) / "checkpoints" / FILE_NAME
    ours = data_root() / "inception" / FILE_NAME
    return theirs if theirs.exists() and not ours.exists() else ours


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file; {_remedy()}")
    return path.read_bytes()


def _published(url: str) -> bytes:
    path = cached_path()
    fetch("Inception weights", url, path, _remedy())
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != SHA256:
        raise ValueError(
            f"{path}: SHA-256 {sha256[:12]} differs from the published {SHA256[:12]}; delete the file and repeat the command"
        )
    return content


def _remedy() -> str:
    ours = data_root() / "inception" / FILE_NAME
    return f"fetch {URL} elsewhere and put it at {ours}, or name it with --inception"
