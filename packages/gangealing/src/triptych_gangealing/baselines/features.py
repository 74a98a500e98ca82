"""Correspondence by nearest neighbours of a network's features: what needs neither a generator nor training.

Any network of timm serves, DINOv2's and DINOv3's among them; its weights come from a file, or by name where timm is told to fetch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from triptych_common.extras import import_extra
from triptych_common.storage import foreign

_NEEDED = "matching by features needs a package: pip install 'triptych-gangealing[features]'"
BIAS_COMPONENTS = 1  # directions of position that are removed, where asked


class Encoder:
    """Feature maps of square pictures by a network of timm.

    name: timm's. weights: a file with its state dict; None: random ones, for tests. layer: which of the network's stages, -1 the
    last. size: pixels of the squares that it sees. debias: remove what features of a place have in common over all pictures,
    since transformers encode where they look.
    Raises ImportError without timm, ValueError for an unknown name or weights that do not fit.
    """

    def __init__(
        self, name: str, weights: Path | None, *, layer: int = -1, size: int = 224, debias: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        timm = import_extra("timm", _NEEDED)
        self.size, self.debias, self.device = size, debias, device
        try:
            network = timm.create_model(name, pretrained=False, **_options(name, size))
        except RuntimeError as error:
            raise ValueError(f"features timm:{name}: {error}; timm.list_models() has the names") from error
        if weights is not None:
            state = foreign.network_in(foreign.read(weights), holds=[next(iter(network.state_dict()))]).tensors
            _load(network, state, weights)
        self.network: Any = network.requires_grad_(False).eval().to(device)
        mean, std = (torch.tensor(network.default_cfg[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))
        self.mean, self.std, self.layer = mean, std, layer

    @torch.inference_mode()
    def __call__(self, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n channels rows columns"]:
        """Features of pictures in [-1, 1], of unit length."""
        x = ((images.to(self.device) + 1) / 2 - self.mean) / self.std
        maps = self.network.forward_intermediates(x, intermediates_only=True)[self.layer]
        return F.normalize(maps.float(), dim=1).cpu()

    def settle(self, maps: Mapping[int, Float[Tensor, "channels rows columns"]]) -> None:
        """Remove from all maps, in place, what belongs to places: the first directions of the mean map."""
        if not self.debias or not maps:
            return
        mean = torch.stack(list(maps.values())).mean(0).flatten(1)
        directions, _, _ = torch.linalg.svd(mean - mean.mean(1, keepdim=True), full_matrices=False)
        bias = directions[:, :BIAS_COMPONENTS]
        for value in maps.values():
            flat = value.flatten(1)
            value.copy_(F.normalize(flat - bias @ (bias.T @ flat), dim=0).view_as(value))


def matched(
    source: Float[Tensor, "channels rows columns"],
    target: Float[Tensor, "channels rows columns"],
    points: Float[Tensor, "k 2"],
) -> Float[Tensor, "k 2"]:
    """Normalised points of one picture at the centre of the target's most similar cell; NaN for those that are."""
    here = F.grid_sample(
        source[None], points.nan_to_num()[None, :, None].to(source), align_corners=False, padding_mode="border"
    )
    similarity = F.normalize(here[0, :, :, 0], dim=0).T @ target.flatten(1)  # k cells
    best = similarity.argmax(1)
    rows, columns = target.shape[1:]
    found = torch.stack([(2 * (best % columns) + 1) / columns - 1, (2 * (best // columns) + 1) / rows - 1], 1)
    return torch.where(points.isnan(), torch.nan, found)


def _options(name: str, size: int) -> dict[str, Any]:
    """Transformers interpolate their positions to the size that they see."""
    return {"img_size": size, "dynamic_img_size": False} if name.startswith(("vit", "eva", "deit", "beit")) else {}


def _load(network: Any, state: Mapping[str, Tensor], path: Path) -> None:
    timm = import_extra("timm", _NEEDED)
    own = network.state_dict()
    if "pos_embed" in own and "pos_embed" in state and own["pos_embed"].shape != state["pos_embed"].shape:
        resampled = timm.layers.resample_abs_pos_embed(
            state["pos_embed"], new_size=network.patch_embed.grid_size, num_prefix_tokens=network.num_prefix_tokens
        )
        state = {**state, "pos_embed": resampled}
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    body = [name for name in wrong if not name.startswith(("classifier", "head", "fc"))]
    if body:
        raise ValueError(
            f"{path}: lacks {body[0]} {tuple(own[body[0]].shape)}, of {len(own)} tensors; give this network's weights"
        )
    network.load_state_dict({**own, **{name: state[name] for name in own if name not in wrong}})
