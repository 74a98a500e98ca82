"""The training objective: examples sampled for each counter, their loss, and the same loss on held-out data.

Read `Objective` first. Behind it, `TrainingData` is images in memory or latents sampled from cached posteriors.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from triptych_common import randomness
from triptych_common.diffusion import GaussianDiffusion, Loss
from triptych_common.parallel import Ranks, onto
from triptych_common.storage.run import RunDirectory
from triptych_common.training import TrainState

from triptych_dit.config import DiTConfig
from triptych_dit.model import DiT, drop_labels
from triptych_dit.train_config import TrainConfig
from triptych_dit.weights import LatentSpace, make_diffusion

if TYPE_CHECKING:
    from triptych_common.data import ImageDataset, ImageSource, UnreadableImage
    from triptych_common.data.contents import Contents

PIXEL_TOLERANCE = 0.01  # of resampling, beyond [-1, 1]
VALIDATION_SEED = 2_022  # the same for every run, so that runs can be compared


class Examples(NamedTuple):
    """The inputs of a loss besides the network, on the CPU."""

    x_0: Float[Tensor, "batch channels height width"]
    t: Int[Tensor, " batch"]
    noise: Float[Tensor, "batch channels height width"]
    labels: Int[Tensor, " batch"]


class Objective:
    """Denoising the examples of a training set.  [thesis 2.3.1]

    Everything random about an example (its image, timestep, noise, whether its label is dropped) follows from the seed and
    its counter, so that a resumed run, or one on more ranks, sees the same examples.
    """

    def __init__(self, config: TrainConfig, training_data: "TrainingData | None" = None) -> None:
        self.config, self.training_data = config, training_data
        self.diffusion: GaussianDiffusion = make_diffusion(config.model, config.predict)

    def draw(self, counters: Sequence[int]) -> Examples:
        """Sample the examples with these counters. Counters run on without end; the data are reshuffled every epoch."""
        # A stream for each quantity: a run without flips, say, sees the same noise and timesteps as one with them.
        config, seed, source = self.config, self.config.seed, self.training_data
        if source is None:
            raise ValueError("this objective has no training data: call `examples` with a batch of your own")
        items = randomness.shuffled(seed, "order", counters, len(source))
        flipped = torch.zeros(len(items), dtype=torch.bool)
        if config.horizontal_flip:
            flipped = randomness.uniform(seed, "flip", counters) < 0.5
        x_0 = source.examples(items, flipped, seed, counters)
        return self._noised(x_0, source.labels[items], counters)

    def examples(self, x_0: Tensor, labels: Tensor, counters: Sequence[int]) -> Examples:
        """Examples of a batch of your own, on the CPU: noise, timesteps and dropped labels follow from the counters.

        x_0: images (batch, channels, height, width), as the model takes them: pixels in [-1, 1]. labels: classes (batch,), zeros
            for an unconditional model. counters: numbers of the samples, one for each.
        Raises ValueError, naming the argument, for what does not fit the model.
        """
        check_images(x_0, self.config.model)
        check_classes(labels, self.config.model.num_classes)
        for name, given in (("labels", labels), ("counters", counters)):
            if len(given) != len(x_0):
                raise ValueError(f"{name}: {len(given)} for {len(x_0)} images; pass one for each")
        return self._noised(x_0, labels.long(), counters)

    def _noised(self, x_0: Tensor, labels: Tensor, counters: Sequence[int]) -> Examples:
        config, seed = self.config, self.config.seed
        noise = randomness.normal(seed, "noise", counters, x_0.shape[1:], dtype=config.dtype)
        drop = randomness.uniform(seed, "label-drop", counters)
        t = draw_timesteps(config, counters, len(self.diffusion.schedule))
        return Examples(x_0.to(config.dtype), t, noise, drop_labels(config.model, labels, drop))

    def loss(self, network: nn.Module, examples: Examples, device: torch.device) -> Loss:
        """Loss of each example. `network` is the model, or a parallel wrapper of it."""
        x_0, t, noise, labels = (onto(device, value) for value in examples)
        x_t = self.diffusion.q_sample(x_0, t, noise)
        return self.diffusion.loss(network(x_t, t, labels), x_0, x_t, t, noise)


def check_images(x_0: Tensor, model: DiTConfig, name: str = "x_0") -> None:
    """Raise ValueError unless a batch of images is what a model takes. name: of the argument, for the message."""
    expected = (model.in_channels, *model.input_size)
    if tuple(x_0.shape[1:]) != expected:
        raise ValueError(
            f"{name}: shape {tuple(x_0.shape)}, expected (batch, {', '.join(map(str, expected))}), the model's"
        )
    if not x_0.is_floating_point():
        raise ValueError(
            f"{name}: {x_0.dtype}, expected floating point, pixels in [-1, 1]; divide 0..255 by 127.5, less 1"
        )
    low, high = (float(x_0.min()), float(x_0.max())) if x_0.numel() else (0.0, 0.0)
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(f"{name}: holds NaN or infinity")
    if model.in_channels in (1, 3) and max(-low, high) > 1 + PIXEL_TOLERANCE:
        raise ValueError(f"{name}: values from {low:.4g} to {high:.4g}, expected pixels in [-1, 1]")


def check_classes(labels: Tensor, num_classes: int, name: str = "labels") -> None:
    """Raise ValueError unless labels are integers that a model has classes for; an unconditional one takes zeros."""
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name}: {labels.dtype} {tuple(labels.shape)}, expected integers, one for each image")
    wrong = labels[(labels < 0) | (labels >= max(1, num_classes))]
    if len(wrong):
        raise ValueError(f"{name}: {int(wrong[0])} of {num_classes} classes, expected 0..{max(0, num_classes - 1)}")


def draw_timesteps(config: TrainConfig, counters: Sequence[int], num_steps: int) -> Int[Tensor, " batch"]:
    """Timestep, 0 to num_steps - 1, of each sample counter.

    "uniform" samples each one independently. "uniform_spread" is uniform too, but spreads consecutive counters evenly over
    the timesteps. "logit_normal" samples one in five uniformly and the others as num_steps * sigmoid(-0.6 + 0.8 z) with z
    normal, likewise spread evenly.  [Esser et al. 2024, "Scaling Rectified Flow Transformers"]
    """
    if config.timesteps == "uniform":
        share = randomness.uniform(config.seed, "timestep", counters)
    else:
        share = u = randomness.evenly_spread(config.seed, "timestep", counters)
        if config.timesteps == "logit_normal":
            # One uniform number decides both: below 0.2 it is rescaled, the rest goes through the inverse normal CDF.
            peaked = torch.sigmoid(0.8 * torch.special.ndtri((u - 0.2) / 0.8) - 0.6)
            share = torch.where(u < 0.2, u / 0.2, peaked)
    return (share * num_steps).long().clamp(max=num_steps - 1)


def open_validation_data(config: TrainConfig, training_data: "TrainingData") -> "TrainingData | None":
    """The data to validate on, or None if there is no validation.

    Raises ValueError if there are none, or if they are of another kind than the training data.
    """
    if config.validation_every == 0:
        return None
    try:
        spec = config.validation_data or config.data
        held_out = open_training_data(spec, config.model, "held_out", out=config.out, strict=config.strict)
        check_same_kind(training_data, held_out)
        return held_out
    except (ValueError, OSError) as error:
        raise ValueError(f"validation_every {config.validation_every}: {error}; pass --validation-data") from error


def make_validation(
    config: TrainConfig, held_out: "TrainingData | None", run: RunDirectory, ranks: Ranks
) -> Callable[[TrainState], None]:
    """The callback that logs "validation/mse" and "validation/vb" every `validation_every` steps and at the end.

    These are losses of the averaged weights on held-out images, always with the same noise, labels and timesteps; the
    timesteps are spread evenly over the whole process, whatever training uses.
    """
    if held_out is None:
        return lambda state: None
    held_out.verify(ranks)
    # The same number on every rank: under FSDP, all of them must make the same forward passes.
    n = min(config.validation_images, len(held_out)) // ranks.world_size
    mine = range(ranks.rank * n, (ranks.rank + 1) * n)
    part = config.micro_batch or config.batch_size // ranks.world_size
    fixed = replace(config, seed=VALIDATION_SEED, horizontal_flip=False, timesteps="uniform_spread", snapshots=())
    objective = Objective(fixed, held_out)

    def validate(state: TrainState) -> None:
        if state.step % config.validation_every and state.samples_seen < config.total_images:
            return
        sums = ranks.sum(_loss_sums(state.ema, objective, mine, part, ranks.device))
        mse, vb = (sums / (n * ranks.world_size)).tolist()
        run.log({"step": state.step, "images": state.samples_seen, "validation/mse": mse, "validation/vb": vb})

    return validate


def mean_mse(config: TrainConfig, model: DiT, training_data: "TrainingData", n: int) -> float:
    """Mean squared error of the prediction on the first n examples: timesteps as in training, noise that training never saw."""
    n = min(n, len(training_data))
    fixed = replace(config, seed=VALIDATION_SEED, horizontal_flip=False, precision="float32")
    objective = Objective(fixed, training_data)
    return float(_loss_sums(model, objective, range(n), 250, torch.device("cpu"))[0]) / n


@torch.no_grad()
def _loss_sums(network: nn.Module, objective: Objective, counters: range, part: int, device: torch.device) -> Tensor:
    # In float64, so that the size of the parts hardly matters.
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, len(counters), part):
        losses = objective.loss(network, objective.draw(counters[start : start + part]), device)
        sums += torch.stack([losses.mse.double().sum(), losses.vb.double().sum()])
    return sums


@runtime_checkable
class TrainingData(Protocol):
    """Numbered examples with labels."""

    name: str  # in messages
    identity: str  # of the content, wherever it is stored: a resumed run must have the same
    contents: "Contents | None"  # of pictures, which their name and number alone do not identify
    shape: tuple[int, int, int]  # channels, height and width of an example
    labels: Int[Tensor, " items"]
    num_classes: int
    # For the file of a model trained on it: the autoencoder of its latents (or None), class names.
    facts: dict[str, Any]

    def __len__(self) -> int: ...

    def examples(
        self, items: Int[Tensor, " batch"], flipped: Bool[Tensor, " batch"], seed: int, counters: Sequence[int]
    ) -> Float[Tensor, "batch channels height width"]:
        """x_0 of these items, mirrored where `flipped`. Random draws in it follow from (seed, counter)."""
        ...

    def check_flips(self) -> None:
        """Raise ValueError if there are no mirrored examples."""
        ...

    def verify(self, ranks: Ranks) -> None:
        """Raise ValueError if a file that examples are read from is damaged. The main rank reads each file once, others wait."""


class PixelData:
    """Images in [-1, 1], in memory.

    contents: of those that are no named data set. unusable: the errors of those that were left out.
    """

    def __init__(
        self, dataset: "ImageDataset", contents: "Contents | None" = None, unusable: Sequence["UnreadableImage"] = ()
    ) -> None:
        self.dataset, self.name, self.contents, self.unusable = dataset, dataset.name, contents, unusable
        self.identity = f"{dataset.name}, {len(dataset):,} images"
        _, channels, height, width = dataset.images.shape
        self.shape = (channels, height, width)
        self.labels, self.num_classes = dataset.labels, dataset.num_classes
        self.facts = {"autoencoder": None, "lossy_data": dataset.lossy, "class_names": list(dataset.class_names)}

    def __len__(self) -> int:
        return len(self.dataset)

    def examples(self, items: Tensor, flipped: Tensor, seed: int, counters: Sequence[int]) -> Tensor:
        x_0 = self.dataset.scaled(items)
        return torch.where(flipped[:, None, None, None], x_0.flip(-1), x_0) if bool(flipped.any()) else x_0

    def check_flips(self) -> None:
        """Any image can be mirrored."""

    def verify(self, ranks: Ranks) -> None:
        """Nothing is read from files any more."""


@runtime_checkable
class Pairs(Protocol):
    """Anything with a length and (image, class) pairs, such as a data set of torchvision.

    image: float (channels, height, width) in [-1, 1], or uint8. classes, where there is such an attribute: their names.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


class PairData:
    """Pairs as `TrainingData`, read when they are needed and checked then.

    Raises ValueError, naming the pair, for images or classes that the model does not take.
    """

    contents: "Contents | None" = None

    def __init__(self, dataset: Pairs, model: DiTConfig, *, name: str = "dataset") -> None:
        if not len(dataset):
            raise ValueError(f"{name}: it is empty")
        self.dataset, self.model, self.name = dataset, model, name
        self.shape, self.num_classes = (model.in_channels, *model.input_size), max(1, model.num_classes)
        names = getattr(dataset, "classes", None)
        names = list(map(str, names)) if names is not None and len(names) == model.num_classes else None
        self.facts: dict[str, Any] = {"autoencoder": None, "lossy_data": False, "class_names": names}
        self.labels: Any = _Classes(self)  # `labels[items]` are read from the pairs
        self._read: tuple[list[int], Tensor, Tensor] = ([], torch.empty(0), torch.empty(0))
        some = torch.arange(0, len(dataset), -(-len(dataset) // 32))
        digest = hashlib.sha256(self._pairs(some)[0].contiguous().numpy().data).hexdigest()[:16]
        self.identity = f"{type(dataset).__name__}, {len(dataset):,} pairs, {digest}"

    def __len__(self) -> int:
        return len(self.dataset)

    def examples(self, items: Tensor, flipped: Tensor, seed: int, counters: Sequence[int]) -> Tensor:
        x_0 = self._pairs(items)[0]
        return torch.where(flipped[:, None, None, None], x_0.flip(-1), x_0) if bool(flipped.any()) else x_0

    def check_flips(self) -> None:
        """Any image can be mirrored."""

    def verify(self, ranks: Ranks) -> None:
        """Nothing of it is a file of ours."""

    def _pairs(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Images and classes of some pairs; those read last are kept, since they are asked for one after the other."""
        wanted = items.tolist()
        if wanted != self._read[0]:
            pairs = [self._pair(item) for item in wanted]
            self._read = wanted, torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])
        return self._read[1:]

    def _pair(self, item: int) -> tuple[Tensor, int]:
        image, label = self.dataset[item]
        image, name = torch.as_tensor(image), f"{self.name}[{item}]"
        if image.dtype == torch.uint8:
            image = image.float() / 127.5 - 1  # as `images.from_uint8`
        check_images(image[None], self.model, name)
        classes = torch.as_tensor(label if self.model.num_classes else 0)
        check_classes(classes.reshape(-1), self.model.num_classes, f"{name}, class")
        return image.float(), int(classes)


@dataclass(frozen=True)
class _Classes:
    data: PairData

    def __getitem__(self, items: Tensor) -> Tensor:
        return self.data._pairs(items)[1]


# By `pictures`, for the next that opens them: listing a folder takes time.
_looked_at: dict[tuple[str, bool], "ImageSource"] = {}


def pictures(spec: str, *, unconditional: bool) -> "ImageSource":
    """Open pictures to look at before training on them; `open_training_data` then needs no second listing of their folder."""
    _looked_at.clear()
    source = _open_pictures(spec, "train", unconditional)
    _looked_at[spec, unconditional or source.num_classes == 1] = source
    return source


def _open_pictures(spec: str, split: str, unconditional: bool) -> "ImageSource":
    from triptych_common import data

    try:
        return data.open_source(spec, split, unconditional=unconditional)
    except (ValueError, OSError):
        from triptych_dit.autoencoder.features import refuse_features

        refuse_features(spec)
        raise


def open_training_data(
    spec: str, model: DiTConfig, split: str = "train", *, out: Path = Path(), strict: bool = False
) -> TrainingData:
    """Open a latent cache, a named data set, a folder of images, or a data set of the hub ("hub:OWNER/NAME").

    Images are cropped to the input size of `model`, except those of named data sets. split: "train" or "held_out".
    out: the run's folder, which will list the images that cannot be used; strict: raise the error of the first of them.
    Raises ValueError or FileNotFoundError if there is no such data, or if it does not fit the model.
    """
    # Imported here: reading images takes Pillow, and training on latents reads none.
    from triptych_common import data

    from triptych_dit.autoencoder.cache import LatentCache, LatentData, is_latent_cache

    opened: TrainingData
    if is_latent_cache(Path(spec)):
        opened = LatentData(LatentCache(Path(spec)))
    elif spec in data.DATASETS:
        opened = PixelData(data.load(spec, split))
    else:
        unconditional, unusable = model.num_classes == 0, list["UnreadableImage"]()
        source = _looked_at.pop((spec, unconditional), None) if split == "train" else None
        source = source or _open_pictures(spec, split, unconditional)
        options: dict[str, Any] = {"channels": model.in_channels, "unusable": None if strict else unusable}
        dataset = data.in_memory(source, model.input_size, split=split, **options)
        data.report_unusable(unusable, len(source), out)
        opened = PixelData(dataset, data.contents_of(dataset), unusable)
    _check_fits(model, opened)
    return opened


def _check_fits(model: DiTConfig, training_data: TrainingData) -> None:
    """Raise ValueError unless the model takes examples of this shape, and has all of their classes."""
    expected = (model.in_channels, *model.input_size)
    if training_data.shape != expected:
        channels, height, width = training_data.shape
        raise ValueError(
            f"{training_data.name} has examples of {training_data.shape}, the model takes {expected}; "
            f"set --model.in-channels {channels} --model.input-size {height} {width}"
        )
    if 0 < model.num_classes < training_data.num_classes:
        raise ValueError(
            f"{training_data.name} has labels 0..{training_data.num_classes - 1}, the model num_classes="
            f"{model.num_classes}; pass --model.num-classes {training_data.num_classes}"
        )


def check_same_kind(ours: TrainingData, theirs: TrainingData) -> None:
    """Raise ValueError unless both have the same classes in the same order, and latents of one autoencoder."""
    from triptych_dit.labels import listed

    mine, others = (list(data.facts.get("class_names") or ()) for data in (ours, theirs))
    if mine and others and mine[: len(others)] != others and ours.num_classes > 1:
        raise ValueError(f"{theirs.name} has the classes {listed(others)}, {ours.name} has {listed(mine)}")
    spaces = [LatentSpace.of(facts) if (facts := data.facts.get("autoencoder")) else None for data in (ours, theirs)]
    if spaces[0] and spaces[1] and (difference := spaces[0].difference(spaces[1])):
        raise ValueError(f"{theirs.name} has latents of another autoencoder than {ours.name}: {difference}")


Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(items: Iterable[Item], function: Callable[[Item], Result], *, depth: int = 2) -> Iterator[Result]:
    """`map(function, items)` with up to `depth` results computed ahead by a background thread; with depth 0, without one.

    Items are taken in the caller's thread, as late as possible. An exception of `function` is raised when its result is due.
    Close the iterator to end the thread early.
    """
    if depth == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    ahead: deque[Future[Result]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
