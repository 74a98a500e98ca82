"""Images to latents and back: a frozen `AutoencoderKL` of diffusers, from the hub or from a folder (extra: latents)."""

import logging
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from triptych_common.cli import is_out_of_memory
from triptych_common.extras import import_extra
from triptych_common.storage import checkpoint, torch_file
from triptych_common.storage.bounded import Bounded
from triptych_common.storage.model_file import ModelFormat, refuse_non_finite

from triptych_dit.weights import LatentSpace

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Images = Float[Tensor, "batch channels height width"]
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # diffusers' bounds; untrained networks can leave them
WEIGHTS = tuple(f"diffusion_pytorch_model.{end}" for end in ("safetensors", "fp16.safetensors", "bin"))
_SHARD = r"(?:-\d+-of-\d+)?"
_WEIGHT_FILE = re.compile(
    rf"diffusion_pytorch_model{_SHARD}(?:\.(?P<variant>\w+){_SHARD})?\.(?P<suffix>safetensors|bin)"
)
CHECKPOINT = ModelFormat(
    kinds=("autoencoder",),
    file_name="vae.safetensors",
    expected="an autoencoder",
    mismatch="no autoencoder",
    made="triptych-dit autoencoder --out FOLDER trains one",
    absent="no autoencoder; train one with triptych-dit autoencoder --out {folder}",
)
_DECODED_PIXELS = 2**20  # at once: 16 images of 256 x 256, about 4 GB with Stable Diffusion's decoder
_ENCODING = ("encoder", "quant_conv")  # parts that latents depend on


class Autoencoder:
    """A frozen autoencoder: images in [-1, 1], posterior moments, and the scaled latents a DiT works in.

    Encoding runs in `dtype`, decoding always in full float32; neither depends on the batch beyond float32 rounding.
    space: how latents are scaled. module: the network itself.
    """

    def __init__(
        self, vae: "AutoencoderKL", spec: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"autoencoder dtype {dtype}: expected float32, bfloat16 or float16")
        self.spec, config = spec, vae.config
        self.latent_channels, self.image_channels = config.latent_channels, config.in_channels
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        self.device, self.dtype = torch.device(device), dtype
        self.module = vae.cpu().requires_grad_(False).eval()
        for part in self.module.children():
            part.float()
        # Hashed are names and float32 values, so that a copy in another file format is the same autoencoder.
        weights = self.module.state_dict()
        self.sha256 = checkpoint.digest(weights)
        encoding = {name: value for name, value in weights.items() if name.split(".")[0] in _ENCODING}
        self.encoder_sha256 = checkpoint.digest(encoding)  # which fine-tuned decoders share
        hashes = {"sha256": self.sha256, "encoder_sha256": self.encoder_sha256}
        try:
            self.space = LatentSpace.of_config(config, spec, **hashes)
        except ValueError as error:
            raise ValueError(f"autoencoder {spec}: {error}") from error
        for name, part in self.module.named_children():
            part.to(self.device, dtype if name in _ENCODING else torch.float32)

    def facts(self) -> dict[str, Any]:
        """The facts recorded in a cache of latents and in models trained on them, as JSON can hold them."""
        return self.space.facts()

    @torch.inference_mode()
    def moments(self, images: Images) -> Float[Tensor, "batch moments latent_height latent_width"]:
        """Posterior mean, then log-variance, of each latent value: float32, unscaled, on this autoencoder's device.

        Raises ValueError for images it does not take.
        """
        channels, *size = images.shape[1:]
        if channels != self.image_channels or any(side % self.downsampling for side in size):
            takes = f"{self.image_channels} channels and sides that are multiples of {self.downsampling}"
            given = tuple(images.shape[1:])
            raise ValueError(f"images are {given}: autoencoder {self.spec} takes {takes}; crop to such a size")
        with _full_float32():
            parameters = self.module.encode(images.to(self.device, self.dtype)).latent_dist.parameters
        # The parameters rather than diffusers' mean and std, which would be computed in `dtype`.
        mean, log_variance = parameters.float().chunk(2, dim=1)
        return torch.cat([mean, log_variance.clamp(*LOG_VARIANCE_RANGE)], dim=1)

    @torch.inference_mode()
    def decode(self, latents: Float[Tensor, "batch latent_channels latent_height latent_width"]) -> Images:
        """Images in [-1, 1] of scaled latents. Raises ValueError for latents of another number of channels."""
        channels = latents.shape[1]
        if channels != self.latent_channels:
            raise ValueError(f"latents have {channels} channels, autoencoder {self.spec} has {self.latent_channels}")
        height, width = (side * self.downsampling for side in latents.shape[2:])
        # In parts, since a decoder's activations are hundreds of times larger than its images.
        z = self.space.unscaled(latents.to(self.device, torch.float32))
        with _full_float32():
            parts = [self.module.decode(part).sample for part in z.split(max(1, _DECODED_PIXELS // (height * width)))]
        return torch.cat(parts).clamp(-1, 1)


def scaled_sample(
    moments: Float[Tensor, "batch moments height width"], noise: Float[Tensor, "batch latent_channels height width"],
    space: LatentSpace,
) -> Float[Tensor, "batch latent_channels height width"]:  # fmt: skip
    """Sample latents, scaled as the space is, from posteriors."""
    mean, log_variance = moments.chunk(2, dim=1)
    return space.scaled(mean + torch.exp(0.5 * log_variance) * noise)


def load_autoencoder(
    spec: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, download: bool = True
) -> Autoencoder:
    """Load an `AutoencoderKL` of diffusers, from safetensors files or, if there are none, from a `.bin` restricted to tensors.

    spec: a folder, or a repository of the Hugging Face hub. If the autoencoder is in a subfolder `vae`, as in a pipeline of
        diffusers or a run of `triptych-dit autoencoder`, the folder above it will do.
    dtype: arithmetic of encoding; decoding is always in float32.
    download: fetch from the hub what is not in its cache; not for a name that only a file gives.
    Raises ValueError or OSError, in one line, if it cannot be used, ImportError without diffusers.
    """
    kind = import_autoencoder_kl()
    if _is_unfinished(Path(spec).expanduser()):
        return CHECKPOINT.read(Path(spec).expanduser(), partial(_from_checkpoint, spec, device, dtype), part="ema.vae")
    with _quiet("diffusers"), _quiet("huggingface_hub"):
        folder = _local(spec) if Path(spec).expanduser().exists() else _fetched(spec, download)
        vae = _read(kind, spec, folder)
    try:
        return Autoencoder(vae, spec, device=device, dtype=dtype)
    except TypeError as error:
        raise ValueError(f"autoencoder {spec}: its config holds values of another type ({error})") from error


def _is_unfinished(path: Path) -> bool:
    """Whether this is a checkpoint of a training run, or a run's folder that has no autoencoder yet."""
    return (path.is_file() and path.suffix == ".safetensors") or (
        bool(checkpoint.steps_in(path / "checkpoints")) and not (path / "vae" / "config.json").exists()
    )


def _from_checkpoint(
    spec: str, device: torch.device | str, dtype: torch.dtype, tensors: dict[str, Tensor], facts: dict[str, Any]
) -> Autoencoder:
    vae = import_autoencoder_kl().from_config(facts["config"])
    vae.load_state_dict(tensors)
    return Autoencoder(vae, spec, device=device, dtype=dtype)


def import_autoencoder_kl() -> type["AutoencoderKL"]:
    """The class of diffusers. Raises ImportError, saying what to install, without the library."""
    return import_extra("diffusers", "latents need a package: pip install 'triptych-dit[latents]'", "AutoencoderKL")


def _local(spec: str) -> Path:
    folder = Path(spec).expanduser()
    for candidate in (folder / "vae", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(
        f"autoencoder {spec}: no config.json there; expected a folder that diffusers' save_pretrained or "
        "triptych-dit autoencoder wrote"
    )


def _fetched(spec: str, download: bool) -> Path:
    """The folder of config and weights in the hub's cache, to which they are downloaded if needed and allowed."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    find: Any = hf_hub_download if download else try_to_load_from_cache
    problem = None
    for subfolder in ("", "vae/"):  # the repository's own, or that of a pipeline
        for weights in WEIGHTS:
            try:
                found = [find(spec, subfolder + name) for name in (weights, "config.json")]
                if all(isinstance(path, str) for path in found):
                    return Path(found[-1]).parent
            except (OSError, ValueError, EntryNotFoundError) as error:
                problem = problem or error
                if isinstance(error, LocalEntryNotFoundError):  # no further waiting for the network
                    find = try_to_load_from_cache
    if not download:
        where = "is neither a folder here nor in the hub's cache, and nothing is fetched because a file names it, or by --dry-run"
        raise OSError(f"autoencoder {spec[:100]!r} {where}; give its name on the command line to fetch it")
    raise OSError(
        f"autoencoder {spec}: no such folder here, and not available from the Hugging Face hub ({_one_line(problem)}); "
        "check name and network, or make one with triptych-dit autoencoder"
    ) from problem


def _read(kind: type["AutoencoderKL"], spec: str, folder: Path) -> "AutoencoderKL":
    found = [match for path in sorted(folder.iterdir()) if (match := _WEIGHT_FILE.fullmatch(path.name))]
    if not found:
        raise FileNotFoundError(f"autoencoder {spec}: no {WEIGHTS[0]} beside {folder / 'config.json'}")
    best = min(found, key=lambda match: (match["suffix"] == "bin", match["variant"] or ""))  # pickles are a last resort
    try:
        name = kind.load_config(folder).get("_class_name")
        if name != "AutoencoderKL":
            raise ValueError(f"its config says {name}, expected AutoencoderKL")
        safetensors = best["suffix"] == "safetensors"  # anything else diffusers reads with weights_only
        files = [path for path in folder.iterdir() if path.suffix == f".{best['suffix']}"]  # one, or all shards
        for path in files if not safetensors else ():
            with path.open("rb") as file:
                torch_file.check(file, path.stat().st_size)
        with Bounded(sum(path.stat().st_size for path in files)):
            vae, info = kind.from_pretrained(
                folder,
                torch_dtype=torch.float32,
                variant=best["variant"],
                use_safetensors=safetensors,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except Exception as error:  # a foreign config or file can make diffusers raise anything
        if is_out_of_memory(error):
            raise
        raise ValueError(f"autoencoder {spec}: cannot be read ({_one_line(error)})") from error
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise ValueError(f"autoencoder {spec}: weights do not fit its config ({wrong[0]} and {len(wrong) - 1} others)")
    refuse_non_finite(vae.state_dict(), f"autoencoder {spec}")
    return vae


def _one_line(error: Exception | None) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A library's own warnings would only repeat what is raised here."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _full_float32() -> AbstractContextManager[None]:
    """By default GPUs round the inputs of float32 convolutions to 10 bits of mantissa (TF32)."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
