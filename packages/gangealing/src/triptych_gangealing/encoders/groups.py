"""Groups of a generator's samples: a descriptor is trained to recognise them in any pose, and k-means groups its outputs."""

import math
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from triptych_common import randomness
from triptych_common.fields import free_names
from triptych_common.images import from_uint8
from triptych_common.parallel import Ranks
from triptych_common.storage import checkpoint
from triptych_common.storage.run import RunDirectory

from triptych_gangealing.config import DESCRIPTOR_POOL
from triptych_gangealing.encoders.descriptor import Groups
from triptych_gangealing.encoders.perceptual import Encoder
from triptych_gangealing.encoders.simclr import LossAndShare, fit, make_views, nt_xent
from triptych_gangealing.encoders.train_config import EncoderTrainConfig
from triptych_gangealing.stylegan2.generator import Generator, sample_images
from triptych_gangealing.warp import Affine, Warp

GROUPS = "groups.safetensors"
BATCH, TEMPERATURE, POOL = 64, 0.2, DESCRIPTOR_POOL
MAX_ANGLE, MAX_LOG_SCALE, MAX_SHIFT = math.pi / 3, 0.4, 0.25  # of views; the shift in normalised units
MAX_SHEAR, MAX_LOG_ASPECT = 0.5, 0.4  # shift in x per unit of y; height over width
AT_ONCE = 256

Images = Float[Tensor, "n 3 height width"]


def open_groups(
    generator: Generator, encoder: Encoder, *, clusters: int, images: int, seed: int, folder: Path, ranks: Ranks
) -> Groups:
    """Groups of a generator's samples, on the ranks' device, in float32; trained once in a run, by its main process.

    encoder: where the descriptor starts. images: how many it is trained on. folder: the run's, where training resumes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(randomness.generator(seed, "descriptor/init").initial_seed())
        groups = Groups(encoder.config, generator.config.resolution, clusters)
    path = folder / GROUPS
    if ranks.is_main and not checkpoint.is_whole(path):
        groups.descriptor.trunk.load_state_dict(encoder.state_dict())
        groups.to(ranks.device)
        _train(groups, generator, images, seed, folder / "descriptor", Ranks(0, 1, ranks.device))
        checkpoint.write(path, groups.state_dict(), {"kind": "groups of samples", **groups.shape()})
    ranks.barrier()
    groups.load_state_dict(checkpoint.read(path)[0])
    return groups.to(ranks.device).requires_grad_(False).eval()


def _train(groups: Groups, generator: Generator, images: int, seed: int, folder: Path, alone: Ranks) -> None:
    from sklearn.cluster import KMeans  # takes a second to import

    pool_images, batch = (max(2, min(most, images)) for most in (POOL, BATCH))
    recipe = EncoderTrainConfig(
        seed=seed, total_images=images, pool_images=pool_images, batch_size=batch, temperature=TEMPERATURE
    )
    pool = sample_images(generator, range(pool_images), seed=seed)
    identity = {"descriptor": recipe.identity(), "generator": checkpoint.digest(generator.state_dict())}
    with RunDirectory(folder, identity, free=free_names(type(recipe)), device=alone.device.type) as directory:
        fit(recipe, directory, pool, alone, groups.descriptor, posed_views, contrast)
    groups.eval()
    with torch.no_grad():
        parts = [groups.descriptor(from_uint8(part.to(alone.device))).cpu() for part in pool.split(AT_ONCE)]
    model = KMeans(len(groups.centres), n_init=10, random_state=seed).fit(torch.cat(parts).double().numpy())
    groups.centres.copy_(torch.from_numpy(model.cluster_centers_))


def posed_views(images: Images, config: EncoderTrainConfig, indices: list[int]) -> Images:
    """`make_views` of images that were turned, scaled, sheared and moved first; also a function of (seed, index) alone."""
    # Shear and aspect too: handwriting differs in both, and a descriptor that ignores them groups by what is written.

    def draw(quantity: str) -> Float[Tensor, " n"]:
        return (randomness.uniform(config.seed, f"descriptor/{quantity}", indices) * 2 - 1).to(images)

    shift = MAX_SHIFT * torch.stack([draw("x"), draw("y")], dim=1)
    pose = Affine.similarity(MAX_ANGLE * draw("angle"), MAX_LOG_SCALE * draw("scale"), shift)
    wider, still = (MAX_LOG_ASPECT / 2 * draw("aspect")).exp(), torch.zeros_like(shift[:, 0])
    rows = [
        torch.stack([wider, wider * MAX_SHEAR * draw("shear"), still], 1),
        torch.stack([still, 1 / wider, still], 1),
    ]
    warp = Warp((pose, Affine(torch.stack(rows, 1))))
    return make_views(warp.sample(images, padding="border"), config, indices)


def contrast(descriptor: nn.Module, first: Images, second: Images, temperature: float) -> LossAndShare:
    """`nt_xent` of descriptions of two views."""
    images = torch.cat([first, second]).contiguous(memory_format=torch.channels_last)
    one, other = descriptor(images).chunk(2)
    return nt_xent(one, other, temperature)
