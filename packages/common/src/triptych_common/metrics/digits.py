"""Scores of generated digits with intervals, and the scores that real digits get for comparison."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from triptych_common.data import ImageDataset
from triptych_common.metrics.bootstrap import Estimate, bootstrap, bootstrap_rate
from triptych_common.metrics.distances import frechet_distance, kernel_distance
from triptych_common.metrics.instruments import Instrument, load_instrument
from triptych_common.metrics.neighbours import nearest_distances, precision_recall
from triptych_common.randomness import permutation

NEAR_DUPLICATE_QUANTILE = 0.05
NEIGHBOURS = 3


@dataclass(frozen=True)
class DigitScores:
    """Scores of a set of `n` digits against held-out ones; see `DigitScorer` for their meaning."""

    n: int
    frechet: Estimate
    kernel: Estimate
    precision: Estimate
    recall: Estimate
    accuracy: Estimate | None  # None where the digits carry no labels
    near_duplicates: Estimate

    def as_dict(self) -> dict[str, Any]:
        """The scores as JSON can hold them, without those that are None."""
        rows = {k: v._asdict() if isinstance(v, Estimate) else v for k, v in vars(self).items()}
        return {k: v for k, v in rows.items() if v is not None}


class DigitScorer:
    """Scores digits against `held_out`, at equal counts; `train` is the data that the generator was trained on.

    frechet, kernel: distances between the 64 features of a frozen network.
    precision, recall: of the same features, with k = 3.
    accuracy: share of digits that an independent frozen classifier reads as their label.
    near_duplicates: share of digits closer in pixels to some training digit than 95% of held-out digits are. So held-out
        digits score 5% by definition, and copies of training digits 100%.

    `real()` scores training digits themselves: the floor of the distances. Copies would reach it too, but near_duplicates
    exposes them. `class_means()` scores the mean image of each class, a trivial baseline.
    """

    def __init__(self, train: ImageDataset, held_out: ImageDataset, *, seed: int = 0) -> None:
        self.train, self.held_out, self.seed = train, held_out, seed
        self.features: Instrument = load_instrument("mnist_features")
        self.classifier: Instrument = load_instrument("mnist_classifier")
        self._train_pixels = _pixels(train.images)
        to_train = nearest_distances(_pixels(held_out.images), self._train_pixels)
        self.near_duplicate_distance = float(to_train.quantile(NEAR_DUPLICATE_QUANTILE))

    def __call__(self, images: Tensor, labels: Tensor | None) -> DigitScores:
        """Score generated digits.

        images: uint8 (n, 1, 28, 28); those beyond the number of held-out digits are ignored. labels: (n,), the digits they
        should show, or None. The reference is equally many held-out digits, with the same classes if there are enough of
        each, else balanced.

        Raises ValueError for fewer than 10 images, another shape or type, or labels that are not digits.
        """
        if len(images) < 10:
            raise ValueError(f"{len(images)} images: expected at least 10, and 1,000 for scores that mean much")
        if labels is not None:
            classes = self.train.num_classes
            if len(labels) != len(images):
                raise ValueError(f"{len(labels)} labels for {len(images)} images: expected as many")
            if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                raise ValueError(f"labels {int(labels.min())}..{int(labels.max())}: expected 0..{classes - 1}")
        # At equal counts: Fréchet distance falls with n, and precision and recall depend on both counts.
        n = min(len(images), len(self.held_out))
        images, labels = images[:n], None if labels is None else labels[:n]
        real = self._matching(self.held_out, labels, n, "held-out")
        real_features, fake_features = self.features(self.held_out.images[real]), self.features(images)
        precise, recalled = precision_recall(real_features, fake_features, k=NEIGHBOURS)
        near = nearest_distances(_pixels(images), self._train_pixels) < self.near_duplicate_distance
        correct = None if labels is None else self.classifier(images).argmax(1) == labels
        frechet, kernel = (
            bootstrap(distance, fake_features, real_features, repeats=50, seed=self.seed)
            for distance in (frechet_distance, kernel_distance)
        )
        assert frechet.low is not None  # fifty repeats give an interval
        frechet = frechet._replace(low=max(frechet.low, 0.0))  # a distance is not negative
        return DigitScores(
            n, frechet, kernel, self._rate(precise), self._rate(recalled), None if correct is None else self._rate(correct),
            self._rate(near),
        )  # fmt: skip

    def real(self, n: int) -> DigitScores:
        """The scores of `n` training digits."""
        items = self._stratified(self.train, n, "real")
        return self(self.train.images[items], self.train.labels[items])

    def floor(self, n: int, repeats: int = 4) -> Float[Tensor, " repeats"]:
        """Fréchet distances of up to `repeats` disjoint sets of `n` training digits to held-out ones: the real-real floor."""
        n = min(n, len(self.held_out))
        reference = self.features(self.held_out.images[self._matching(self.held_out, None, n, "held-out")])
        repeats = min(repeats, len(self.train) // n)
        items = self._stratified(self.train, n * repeats, "floor").view(repeats, n)
        return torch.tensor([frechet_distance(self.features(self.train.images[row]), reference) for row in items])

    def class_means(self, n: int) -> DigitScores:
        """The scores of `n` images, each the mean training image of its class."""
        labels = torch.arange(n) % self.train.num_classes
        means = torch.stack(
            [self.train.images[self.train.labels == c].float().mean(0) for c in range(self.train.num_classes)]
        )
        return self(means.round().to(torch.uint8)[labels], labels)

    def held_out_accuracy(self) -> Estimate:
        """The classifier's accuracy on held-out digits."""
        return self._rate(self.classifier(self.held_out.images).argmax(1) == self.held_out.labels)

    def instruments(self) -> dict[str, str]:
        """SHA-256 of each instrument's weights, by name."""
        return {i.name: i.sha256 for i in (self.features, self.classifier)}

    def _rate(self, hits: Tensor) -> Estimate:
        return bootstrap_rate(hits, seed=self.seed)

    def _matching(self, dataset: ImageDataset, labels: Tensor | None, n: int, stream: str) -> Int[Tensor, " n"]:
        """`n` items of a data set, with the classes of `labels` if it has enough of each, else stratified."""
        if labels is not None and n < len(dataset):
            counts = torch.bincount(labels, minlength=dataset.num_classes)
            if bool((counts <= torch.bincount(dataset.labels, minlength=dataset.num_classes)).all()):
                picks = [self._of_class(dataset, c, stream)[:count] for c, count in enumerate(counts.tolist())]
                return torch.cat(picks)
        return self._stratified(dataset, n, stream)

    def _stratified(self, dataset: ImageDataset, n: int, stream: str) -> Int[Tensor, " n"]:
        """`n` items that cycle through the classes, so that every consecutive part is balanced too."""
        per_class = [self._of_class(dataset, c, stream) for c in range(dataset.num_classes)]
        depth = max(map(len, per_class))
        rounds = [members[i] for i in range(depth) for members in per_class if i < len(members)]
        return torch.stack(rounds)[:n]

    def _of_class(self, dataset: ImageDataset, label: int, stream: str) -> Tensor:
        members = (dataset.labels == label).nonzero().flatten()
        return members[permutation(self.seed, f"score/{stream}", label, len(members))]


def _pixels(images: UInt8[Tensor, "n channels height width"]) -> Float[Tensor, "n pixels"]:
    return images.flatten(1).float() / 255
