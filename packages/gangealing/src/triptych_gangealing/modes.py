"""Modes: the target of an alignment is a learned point c of the generator's W space.

c moves along a few principal directions of W only, which keeps its image a likely one; `mixed` gives its pose to an image.
[thesis 4.3.1, equation 4.4]
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from triptych_common import randomness
from triptych_common.storage import checkpoint

from triptych_gangealing.stylegan2.generator import Generator, classes_of

Style = Float[Tensor, "n w"]
CHUNK = 4096  # latents per random generator: changing it changes the samples of a seed
FITTED = 32_768  # styles decomposed at once: 128 MiB in float64 at 512 dimensions
RECIPE = 1  # part of a cached result's key: to be raised with any change to samples or decomposition


@dataclass(frozen=True)
class Directions:
    """Principal directions of W: unit vectors in the order of the standard `deviations` of styles along them."""

    mean: Float[Tensor, " w"]
    components: Float[Tensor, "N w"]
    deviations: Float[Tensor, " N"]

    def coefficients(self, w: Float[Tensor, "*batch w"]) -> Float[Tensor, "*batch N"]:
        """alpha of the point of `mean + alpha components` that is nearest to each style."""
        return (w - self.mean) @ self.components.T

    def first(self, count: int) -> "Directions":
        """The first `count` of them. Raises ValueError for more than there are."""
        if not 0 <= count <= len(self.components):
            raise ValueError(f"{count} principal directions: expected 0 to {len(self.components)}, as many as W has")
        return Directions(self.mean, self.components[:count], self.deviations[:count])


def pca(generator: Generator, n_samples: int, count: int, seed: int = 0, *, folder: Path | None = None) -> Directions:
    """Mean and `count` principal directions of W, of `n_samples` styles of the mapping network; on the CPU, float32.

    A conditional generator's classes alternate. folder: cache of results, named after the mapping network's weights, the number of
    samples and the seed; one file serves every `count`. Of several processes, one must have returned before the others call.

    Raises ValueError for more directions than W or the samples have, ImportError without scikit-learn, OSError where `folder`
    cannot be written.
    """
    w_dim = generator.config.w_dim
    limit = min(w_dim, n_samples - 1)
    if not 0 <= count <= limit:
        found = f"{count} principal directions of {n_samples} samples: expected 0 to {max(limit, 0)}"
        raise ValueError(f"{found}; W has {w_dim} dimensions, and samples must outnumber directions")
    if folder is None:
        return _fit(generator, n_samples, seed).first(count)
    key = _key(generator, n_samples, seed)
    path = folder / f"pca-{key[:16]}.safetensors"
    directions = _read(path, key)
    if directions is None:
        directions = _fit(generator, n_samples, seed)
        facts = {"kind": "PCA of W", "key": key, "n_samples": n_samples, "seed": seed}
        checkpoint.write(path, vars(directions), facts)
    return directions.first(count)


class Mode(nn.Module):
    """K learned points of W: c_k = origin_k + alpha_k components, which start at the mean. Only `alpha` is learned.

    handicap: logarithms of factors on each mode's distances where images choose a mode; 0 unless `even_out` is called.
    """

    origins: Float[Tensor, "modes w"]
    components: Float[Tensor, "N w"]
    handicap: Float[Tensor, " modes"]

    def __init__(self, directions: Directions, modes: int = 1) -> None:
        super().__init__()
        if modes < 1:
            raise ValueError(f"{modes} modes: expected at least 1")
        self.register_buffer("origins", directions.mean.repeat(modes, 1))
        self.register_buffer("components", directions.components.clone())
        self.register_buffer("handicap", torch.zeros(modes))
        self.alpha = nn.Parameter(torch.zeros(modes, len(directions.components)))

    def forward(self, k: Int[Tensor, "*batch"] | int | None = None) -> Float[Tensor, "*rows w"]:
        """c of mode k: one of them, one for each element of k, or all of them in turn."""
        origins, alpha = (self.origins, self.alpha) if k is None else (self.origins[k], self.alpha[k])
        return origins + alpha @ self.components

    @torch.no_grad()
    def begin(self, origins: Float[Tensor, "modes w"], alpha: Float[Tensor, "modes N"]) -> None:
        """Start elsewhere: as in the thesis, with origins at the mean of W and alpha the coefficients of a point."""
        self.origins.copy_(origins)
        self.alpha.copy_(alpha)

    @torch.no_grad()
    def even_out(self, shares: Float[Tensor, " modes"], pull: float) -> None:
        """Make modes with more than an equal share of a batch less attractive, and others more.

        Otherwise modes that are easily matched, such as those with little ink, take everything.  [As for experts: Wang et al.
        2024, "Auxiliary-loss-free load balancing"]
        """
        self.handicap += pull * (shares.to(self.handicap) * len(self.handicap) - 1)


def mixed(
    w: Style, c: Style | Float[Tensor, " w"], *, num_ws: int, cutoff: int, psi: float = 0.0
) -> Float[Tensor, "n num_ws w"]:
    """Styles of targets: c, or c moved by psi towards w, in the first `cutoff` layers, which determine pose; w in the rest.

    c: one target for all images, or one for each. psi 1 gives the images themselves. cutoff `num_ws`: no style mixing.
    Raises ValueError for a cutoff or psi out of range.
    """
    if not 0 <= cutoff <= num_ws:
        raise ValueError(f"style mixing cutoff {cutoff}: expected 0 to {num_ws}, the number of the generator's styles")
    if not 0 <= psi <= 1:
        raise ValueError(f"psi {psi}: expected 0 (the target's pose) to 1 (the image's own)")
    # As in truncation: psi 0 is the centre, here the mode, and psi 1 the sample.
    early = torch.lerp(c.expand_as(w), w, float(psi))
    return torch.cat([early[:, None].expand(-1, cutoff, -1), w[:, None].expand(-1, num_ws - cutoff, -1)], dim=1)


@torch.no_grad()
def sampled_styles(generator: Generator, indices: range, seed: int = 0) -> Float[Tensor, "n w"]:
    """w number `indices` of the stream that `pca` samples, on the weights' device: the same in any portion, up to rounding."""
    parts = []
    weight = next(generator.parameters())
    for number in range(indices.start // CHUNK, -(-indices.stop // CHUNK)):
        z = randomness.normal(seed, "pca/z", [number], (CHUNK, generator.config.z_dim))[0]
        here = range(max(indices.start, number * CHUNK), min(indices.stop, (number + 1) * CHUNK))
        z = z[here.start - number * CHUNK : here.stop - number * CHUNK].to(weight)
        parts.append(generator.mapping(z, classes_of(generator, here)))
    return torch.cat(parts)


def _fit(generator: Generator, n_samples: int, seed: int) -> Directions:
    from sklearn.decomposition import IncrementalPCA  # takes a second to import

    dim = min(generator.config.w_dim, n_samples - 1)
    model = IncrementalPCA(n_components=min(generator.config.w_dim, n_samples))
    # Portions of equal size, as none may have fewer styles than W has dimensions. All directions are kept until the end, so the
    # result is exact.
    portions = -(-n_samples // max(FITTED, 2 * generator.config.w_dim))
    for i in range(portions):
        part = range(n_samples * i // portions, n_samples * (i + 1) // portions)
        model.partial_fit(sampled_styles(generator, part, seed).double().cpu().numpy())
    fitted = (model.mean_, model.components_[:dim], model.explained_variance_[:dim] ** 0.5)
    return Directions(*(torch.from_numpy(values).float() for values in fitted))


def _key(generator: Generator, n_samples: int, seed: int) -> str:
    """Hash of everything the result depends on; of the generator, that is its mapping network alone."""
    weights = {name: value for name, value in generator.mapping.state_dict().items() if name != "w_avg"}
    facts = {
        "mapping_sha256": checkpoint.digest(weights),
        "n_samples": n_samples,
        "seed": seed,
        "recipe": [RECIPE, CHUNK],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: str) -> Directions | None:
    """The cached result; None where there is none, or it is damaged, and then replaced."""
    try:
        tensors, state = checkpoint.read(path)
    except (FileNotFoundError, ValueError):
        return None
    return Directions(**tensors) if state.get("key") == key else None
