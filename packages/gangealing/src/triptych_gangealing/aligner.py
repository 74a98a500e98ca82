"""A trained alignment: spatial transformer, modes and the classifier of real images; its use, and its file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from triptych_common.cli import echo
from triptych_common.fields import Ge
from triptych_common.parallel import process_group
from triptych_common.storage.files import open_ended
from triptych_common.storage.model_file import ModelFormat
from typing_extensions import TypedDict

from triptych_gangealing.config import Flips, SpatialTransformerConfig
from triptych_gangealing.modes import Directions, Mode
from triptych_gangealing.spatial_transformer import (
    ClusterClassifier,
    SpatialTransformer,
    chosen,
    reduced,
    total_variation,
)
from triptych_gangealing.warp import Warp

FILE = "aligner.safetensors"


@open_ended
class _Use(TypedDict):
    padding: NotRequired[Literal["border", "zeros", "reflection"]]
    iterations: NotRequired[Annotated[int, Ge(1)]]
    flips: NotRequired[bool]


@open_ended
class _Facts(TypedDict):
    config: SpatialTransformerConfig
    has_classifier: bool
    groups: NotRequired[Any]
    facts: _Use


_FORMAT = ModelFormat(
    kinds=("GANgealing aligner",),
    file_name=FILE,
    expected="a trained aligner",
    mismatch="no aligner",
    made=f"triptych-gangealing train --out FOLDER makes {FILE}",
    absent="no such file; train one with triptych-gangealing train --out {folder}",
    facts=_Facts,
)
AT_ONCE = 64  # images
RESAMPLED = 2  # times input_size: enough pixels for the flow network's look at an image that was magnified

Images = Float[Tensor, "n 3 height width"]


@dataclass(frozen=True)
class Alignment:
    """Warps from congealed to image coordinates, cluster and mirroring of each image."""

    warp: Warp
    cluster: Int[Tensor, " n"]
    flipped: Bool[Tensor, " n"]
    roughness: Float[Tensor, " n"]
    """total variation of the flow: large where an image fits badly"""
    names: tuple[str, ...] = ()
    """of the pictures, where they came from a folder, without unreadable ones"""

    @classmethod
    def of_warp(cls, warp: Warp, cluster: Int[Tensor, " n"] | None = None) -> "Alignment":
        """Warps of a method that mirrors nothing and has no roughness, such as a baseline; by default of one cluster."""
        n, device = len(warp), warp.stages[0].tensor.device
        cluster = torch.zeros(n, dtype=torch.long, device=device) if cluster is None else cluster
        zeros = torch.zeros(n, device=device)
        return cls(warp, cluster, zeros.bool(), zeros)

    @classmethod
    def cat(cls, parts: Sequence["Alignment"]) -> "Alignment":
        """Alignments of several batches as one."""
        columns = zip(*((part.cluster, part.flipped, part.roughness) for part in parts), strict=True)
        cluster, flipped, roughness = (torch.cat(values) for values in columns)
        return cls(Warp.cat([part.warp for part in parts]), cluster, flipped, roughness)

    def select(self, indices: Int[Tensor, " m"]) -> "Alignment":
        """The alignment of some of the images."""
        names = self.names and tuple(self.names[i] for i in indices.tolist())
        return self._map(self.warp.select(indices), lambda value: value[indices], names)

    def to(self, device: torch.device | str) -> "Alignment":
        return self._map(self.warp.to(device), lambda value: value.to(device), self.names)

    def _map(self, warp: Warp, function: Callable[[Tensor], Tensor], names: tuple[str, ...]) -> "Alignment":
        return Alignment(warp, function(self.cluster), function(self.flipped), function(self.roughness), names)


class Aligner(nn.Module):
    """Brings images of any size, values in [-1, 1], into joint alignment."""

    def __init__(self, transformer: SpatialTransformer, mode: Mode, classifier: nn.Module | None = None) -> None:
        super().__init__()
        self.transformer, self.mode, self.classifier = transformer, mode, classifier
        self.facts: dict[str, Any] = {}

    @property
    def config(self) -> SpatialTransformerConfig:
        """Shape of the transformer."""
        return self.transformer.config

    @torch.inference_mode()
    def align(
        self, images: Images, *, iterations: int = 1, flips: bool = False, cluster: Int[Tensor, " n"] | None = None
    ) -> Alignment:
        """Warps of images, `AT_ONCE` at a time; the result is on the images' device, whatever that of the networks.

        iterations: how often the similarity network looks. flips: mirror images whose flow is smoother then. cluster: of each
        image; by default the classifier's. A classifier that tells sides apart decides which images are mirrored, whatever
        `flips`. Raises ValueError as the transformer does.
        """
        device, parts = next(self.parameters()).device, []
        for i in range(0, len(images), AT_ONCE):
            part = images[i : i + AT_ONCE].to(device)
            given = None if cluster is None else cluster[i : i + AT_ONCE].to(device)
            head, side = self.assigned(part, given)
            # Either way the warp leads to the image as it is, not to its mirror image.
            if side is not None:
                aligned, flipped = self.transformer.align_turned(part, side, iterations=iterations, head=head), side
            elif flips:
                aligned, flipped = self.transformer.align_flips(part, iterations=iterations, head=head)
            else:
                aligned = self.transformer(part, iterations=iterations, head=head)
                flipped = torch.zeros(len(part), dtype=torch.bool, device=device)
            roughness = part.new_zeros(len(part)) if aligned.delta is None else total_variation(aligned.delta)
            parts.append(Alignment(aligned.warp, head, flipped, roughness).to(images.device))
        return Alignment.cat(parts)

    def options(self, iterations: int | None = None, flips: bool | None = None) -> dict[str, Any]:
        """Options of `align`, by default as in training."""
        return {
            "iterations": self.facts.get("iterations", 1) if iterations is None else iterations,
            "flips": self.facts.get("flips", False) if flips is None else flips,
        }

    def reduced(self, images: Images) -> Float[Tensor, "n 3 new_height new_width"]:
        """Images reduced to at most twice the transformer's input size: enough to find a warp for the originals."""
        side = RESAMPLED * self.config.input_size
        return images if images.shape[-1] <= side else reduced(images, side)

    def clusters(self, images: Images) -> Int[Tensor, " n"]:
        """Cluster of each image; 0 where there is one cluster. Raises ValueError for several clusters without a classifier."""
        return self.assigned(images)[0]

    def assigned(
        self, images: Images, cluster: Int[Tensor, " n"] | None = None
    ) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"] | None]:
        """Cluster of each image, and whether it is to be mirrored, None where no classifier tells.

        cluster: of each image, if it is known; its side is then the likelier one within it.
        Raises ValueError for several clusters without a classifier.
        """
        heads = self.config.heads
        if self.classifier is None or self.config.classifier == "clusters":
            if cluster is None and heads > 1:
                if self.classifier is None:
                    raise ValueError(f"{heads} clusters, no classifier: pass the clusters, or train a classifier")
                cluster = self.classifier(images).argmax(1)
            return torch.zeros(
                len(images), dtype=torch.long, device=images.device
            ) if cluster is None else cluster, None
        sides = self.classifier(images).unflatten(1, (2, heads))  # n side head
        best = sides.flatten(1).argmax(1) % heads if cluster is None else cluster
        return best, chosen(sides.transpose(1, 2), best).argmax(1).bool()


def write_aligner(path: Path, aligner: Aligner, facts: Mapping[str, Any]) -> None:
    """Write an aligner. Raises OSError when the disk refuses."""
    _FORMAT.write(path, aligner.state_dict(), asdict(aligner.config), _state(aligner.classifier, facts))


def facts_of(transformer: SpatialTransformer, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the weights of the file of an aligner without a classifier, for checkpoints of a training run."""
    return _FORMAT.facts_of(asdict(transformer.config), _state(None, facts))


def _state(classifier: nn.Module | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    shape = getattr(classifier, "shape", None)  # of `Groups`, which cannot be built again without it
    groups = shape() if shape else None
    return {"has_classifier": classifier is not None, "groups": groups, "facts": dict(facts)}


def load_aligner(path: str | Path) -> Aligner:
    """An aligner from its file or run folder, from a run's checkpoint without a classifier, or from a checkpoint of the released
    code (.pt), on the CPU, for evaluation.

    Raises FileNotFoundError where there is none, ValueError for a file of another kind.
    """
    if (path := Path(path)).suffix in (".pt", ".pth"):
        from triptych_common.storage.bounded import Bounded

        from triptych_gangealing.released import parts  # few have one

        with Bounded(path.stat().st_size if path.is_file() else 0):
            return _build(*parts(path))
    return _FORMAT.read(path, _build)


def _build(tensors: dict[str, Tensor], state: dict[str, Any]) -> Aligner:
    config = SpatialTransformerConfig.from_json(state["config"])
    # The origins are loaded with the other tensors below; directions only give the mode its shape.
    origins, components = tensors["mode.origins"], tensors["mode.components"]
    directions = Directions(origins[0], components, torch.ones(len(components)))
    classifier: nn.Module | None = ClusterClassifier(config) if state["has_classifier"] else None
    if state.get("groups") is not None:
        from triptych_gangealing.encoders.descriptor import Groups  # of few aligners, and more to import

        classifier = Groups.from_shape(state["groups"])
    aligner = Aligner(SpatialTransformer(config), Mode(directions, config.heads), classifier)
    aligner.load_state_dict({name: value.to(torch.float32) for name, value in tensors.items()})
    aligner.facts = state["facts"]
    return aligner.requires_grad_(False).eval()


def take_over(source: str, transformer: SpatialTransformer, mode: Mode) -> None:
    """Replace both networks' weights by those of an aligner. Raises ValueError, naming the first tensor that does not fit."""
    found = load_aligner(source)
    for theirs, ours, what in ((found.transformer, transformer, "transformer"), (found.mode, mode, "mode")):
        given, wanted = ({name: tuple(x.shape) for name, x in part.state_dict().items()} for part in (theirs, ours))
        for name in [*wanted, *given]:
            if given.get(name) != wanted.get(name):
                sizes = f"{name} {given.get(name, 'absent')}, this config wants {wanted.get(name, 'none')}"
                raise ValueError(
                    f"init_from {source}: its {what} has {sizes}; pass its own settings, and a generator of one W"
                )
        ours.load_state_dict(theirs.state_dict())
    echo(f"start from {source}")


def open_aligner(
    path: Path, device: str, iterations: int | None = None, flips: Flips = "trained"
) -> tuple[Aligner, dict[str, Any]]:
    """An aligner on a device, and the options of `Aligner.align`, by default as in training.

    Raises as `load_aligner`, and ValueError for flips or several looks of a transformer that lacks the network for them.
    """
    with process_group(device) as ranks:
        aligner = load_aligner(path).to(ranks.device)
    options = aligner.options(iterations, None if flips == "trained" else flips == "yes")
    if options["flips"] and aligner.transformer.flow is None:
        raise ValueError("flips yes: a transformer without flow has no measure of which is better; pass --flips no")
    if (looks := options["iterations"]) > 1 and aligner.transformer.similarity is None:
        raise ValueError(f"iterations {looks}: a transformer of flow alone looks once; pass --iterations 1")
    return aligner, options
