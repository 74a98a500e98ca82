"""Tokens of everything a G.pt reads: networks, theta and noised theta*, and the scalars beside them.

A tokenizer of networks is a module with

    token_kinds: how many consecutive tokens share each learned position embedding
    encode(noised, theta) -> Encoded
    decode(hidden [n, tokens, width], encoded) -> update [n, D], every entry written once
    initialize_weights(generator): what differs from N(0, 0.02); decoders start at zero, so an untrained model's update is zero

`make_tokenizer` chooses one: a token for each parameter tensor or chunk of one (`SequenceTokens`), or for each hidden unit
(`NeuronTokens`, exactly equivariant under permutations of units). `ScalarTokens` embeds timestep and metrics.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from triptych_gpt.config import GptConfig, MetricScale
from triptych_gpt.symmetry.spec import PermutationSpec


class Encoded(NamedTuple):
    """Tokens, before the scalars' are put behind them, and what edges between them there are.

    biases: of attention, for each block, over all tokens, the scalars' among them. edges: embeddings [n, a, b, edge], one for
    every pair of groups that weights lie between; kept for the decoder.
    """

    tokens: Float[Tensor, "n tokens width"]
    biases: Float[Tensor, "depth n heads all all"] | None = None
    edges: tuple[Float[Tensor, "n _ _ edge"], ...] = ()


def warn_if_lossy(largest: int, config: GptConfig) -> None:
    """One line where a token stands for more parameters of theta than it has channels."""
    if largest > config.width:
        chunks = "" if config.tokenizer == "neuron" else f", or chunk tokens of at most {config.width:,}"
        warnings.warn(
            f"tokens of up to {largest:,} parameters do not fit a width of {config.width:,}, which loses some of them; "
            f"expected no more than the width: make it {largest:,}{chunks}",
            stacklevel=2,
        )


def splits(config: GptConfig) -> list[int]:
    """Lengths of the stretches of theta that are a token each: a parameter tensor, or at most chunk_size of its entries."""
    lengths = []
    for span in config.symmetry.layout.spans.values():
        size = span.stop - span.start
        chunk = config.chunk_size or size
        lengths += [min(chunk, size - start) for start in range(0, size, chunk)]
    return lengths


def _linears(sizes: Iterable[tuple[int, int]]) -> Any:
    """Linear layers without biases, of these inputs and outputs."""
    return nn.ModuleList(nn.Linear(*size, bias=False) for size in sizes)


class SequenceTokens(nn.Module):
    """2N tokens: the N stretches of noised theta*, then those of theta. The first N are decoded."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.splits = splits(config)
        warn_if_lossy(max(self.splits), config)
        self.encoders = _linears((size, config.width) for size in self.splits * 2)
        self.decoders = _linears((config.width, size) for size in self.splits)
        self.token_kinds = [1] * len(self.encoders)

    def initialize_weights(self, generator: torch.Generator | None = None) -> None:
        for decoder in self.decoders:
            nn.init.zeros_(decoder.weight)

    def encode(self, noised: Float[Tensor, "n D"], theta: Float[Tensor, "n D"]) -> Encoded:
        stretches = [*noised.split(self.splits, dim=1), *theta.split(self.splits, dim=1)]
        tokens = [encode(x) for encode, x in zip(self.encoders, stretches, strict=True)]
        return Encoded(torch.stack(tokens, dim=1))

    def decode(self, hidden: Float[Tensor, "n tokens width"], encoded: Encoded) -> Float[Tensor, "n D"]:
        first = hidden.unbind(1)[: len(self.decoders)]
        return torch.cat([decode(x) for decode, x in zip(self.decoders, first, strict=True)], dim=1)


@dataclass(frozen=True)
class Part:
    """A parameter seen from the units that its axes belong to.

    groups: theirs, none to two, in the spec's order. features: entries of the parameter for each unit (or pair of units).
    """

    span: slice
    split: tuple[int, ...]  # the parameter's shape, permuting axes as (units, block)
    order: tuple[int, ...]  # of these dimensions: units first
    groups: tuple[str, ...]
    features: int

    def take(self, theta: Float[Tensor, "n D"]) -> Float[Tensor, "n *units features"]:
        """The parameter's entries, by unit."""
        value = theta[:, self.span].view(len(theta), *self.split)
        units = [self.split[dim] for dim in self.order[: len(self.groups)]]
        return value.permute(0, *(1 + dim for dim in self.order)).reshape(len(theta), *units, self.features)

    def put(self, entries: Float[Tensor, "n *units features"]) -> Float[Tensor, "n size"]:
        """What `take` took, back in the order of theta."""
        value = entries.reshape(len(entries), *(self.split[dim] for dim in self.order))
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return value.permute(0, *(1 + dim for dim in back)).reshape(len(entries), self.span.stop - self.span.start)


def parts_of(spec: PermutationSpec) -> list[Part]:
    """A part for each parameter, in the layout's order.

    Raises ValueError for a parameter with three permuting axes or more.
    """
    rank = {group: place for place, group in enumerate(spec.groups)}
    parts = []
    for name, axes in spec.axes.items():
        split: list[int] = []
        units: list[tuple[int, int, str]] = []  # rank of the group, dimension, group
        for axis, length in zip(axes, spec.layout.shapes[name], strict=True):
            if axis is not None:
                units.append((rank[axis.group], len(split), axis.group))
                split.append(length // axis.block)
            if axis is None or axis.block > 1:
                split.append(length if axis is None else axis.block)
        if len(units) > 2:
            raise ValueError(
                f"{name}: {len(units)} of its axes permute, neuron tokens know at most 2; use layer or chunk tokens"
            )
        units.sort()
        first = [dim for _, dim, _ in units]
        rest = [dim for dim in range(len(split)) if dim not in first]
        features = math.prod(split[dim] for dim in rest)
        groups = tuple(group for *_, group in units)
        parts.append(Part(spec.layout.spans[name], tuple(split), (*first, *rest), groups, features))
    return parts


def by_groups(parts: Sequence[Part]) -> dict[tuple[str, ...], list[Part]]:
    """Parts that lie between the same groups, together."""
    together: dict[tuple[str, ...], list[Part]] = {}
    for part in parts:
        together.setdefault(part.groups, []).append(part)
    return together


class Units(nn.Module):
    """The parameters that belong to the units of one group: fan-in from inputs, fan-out to outputs, biases, norms.

    The global token is a group of one unit, which has what belongs to no unit. A group may have nothing but edges.
    """

    def __init__(self, count: int, parts: Sequence[Part], width: int) -> None:
        super().__init__()
        self.count, self.parts = count, list(parts)
        self.features = sum(part.features for part in parts)
        self.encoder = nn.Linear(2 * self.features, width, bias=False) if parts else None
        self.decoder = nn.Linear(width, self.features, bias=False) if parts else None

    def encode(
        self, noised: Float[Tensor, "n D"], theta: Float[Tensor, "n D"]
    ) -> Float[Tensor, "n count width"] | None:
        if self.encoder is None:
            return None
        entries = [part.take(x).view(len(x), self.count, part.features) for x in (theta, noised) for part in self.parts]
        return self.encoder(torch.cat(entries, dim=-1))

    def decode(self, hidden: Float[Tensor, "n count width"]) -> list[Float[Tensor, "n _"]]:
        if self.decoder is None:
            return []
        updates = self.decoder(hidden).split([part.features for part in self.parts], dim=-1)
        return [part.put(update) for part, update in zip(self.parts, updates, strict=True)]


class NeuronTokens(nn.Module):
    """A global token where something belongs to no unit, then the units of each group, in the spec's order.

    Raises ValueError for a parameter with three permuting axes or more.
    """

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        together = by_groups(parts_of(config.symmetry))
        counts: dict[tuple[str, ...], int] = {(group,): count for group, count in config.symmetry.groups.items()}
        if () in together:
            counts = {(): 1, **counts}
        self.depth, self.heads, self.scalars = config.depth, config.num_heads, TOKENS[config.scalars]
        self.token_kinds = list(counts.values())
        self.units = cast(
            "Sequence[Units]",
            nn.ModuleList(Units(count, together.get(key, ()), config.width) for key, count in counts.items()),
        )
        between = [key for key in together if len(key) == 2]
        places = {key[0]: place for place, key in enumerate(counts) if key}
        self.ends = [
            (places[first], places[second]) for first, second in between
        ]  # of each of the edges, among the units
        self.edges = cast("Sequence[Edges]", nn.ModuleList(Edges(together[key], config) for key in between))
        starts = [part.span.start for units in self.units for part in units.parts]
        starts += [part.span.start for edges in self.edges for part in edges.parts]
        self.order = sorted(range(len(starts)), key=starts.__getitem__)  # of what is decoded, to make it theta's
        warn_if_lossy(max(units.features for units in self.units), config)

    def initialize_weights(self, generator: torch.Generator | None = None) -> None:
        for units in self.units:
            if units.decoder is not None:
                nn.init.zeros_(units.decoder.weight)
        for edges in self.edges:
            edges.initialize_weights(generator)

    def encode(self, noised: Float[Tensor, "n D"], theta: Float[Tensor, "n D"]) -> Encoded:
        summands = [[] if own is None else [own] for own in (units.encode(noised, theta) for units in self.units)]
        embedded = tuple(edges.embedded(noised, theta) for edges in self.edges)
        active = [F.gelu(e) for e in embedded]
        for edges, e, ends in zip(self.edges, active, self.ends, strict=True):
            for place, pooled in zip(ends, edges.pooled(e), strict=True):
                summands[place].append(pooled)
        tokens = torch.cat([sum(rest, first) for first, *rest in summands], dim=1)
        return Encoded(tokens, self._biases(active) if active else None, embedded)

    def _biases(self, active: list[Float[Tensor, "n _ _ edge"]]) -> Float[Tensor, "depth n heads all all"]:
        """Attention biases of every block, zero wherever no edge lies."""
        ends = list(itertools.accumulate(self.token_kinds, initial=0))
        where = [slice(*pair) for pair in itertools.pairwise(ends)]
        total = ends[-1] + self.scalars
        biases = None
        for edges, e, (first, second) in zip(self.edges, active, self.ends, strict=True):
            there, back = edges.biases(e)
            if biases is None:
                biases = there.new_zeros(self.depth, len(e), self.heads, total, total)
            biases[..., where[first], where[second]] += there
            biases[..., where[second], where[first]] += back
        assert biases is not None  # called only where there are edges
        return biases

    def decode(self, hidden: Float[Tensor, "n tokens width"], encoded: Encoded) -> Float[Tensor, "n D"]:
        last = hidden[:, : sum(self.token_kinds)].split(self.token_kinds, dim=1)
        written = [update for units, h in zip(self.units, last, strict=True) for update in units.decode(h)]
        for edges, e, (first, second) in zip(self.edges, encoded.edges, self.ends, strict=True):
            written += edges.decode(last[first], last[second], e)
        return torch.cat([written[place] for place in self.order], dim=1)


DECODER_WIDENING = 4  # the pairwise decoder's hidden width over edge_width


class Edges(nn.Module):
    """All parameters between two groups of units, which may be one and the same.

    e_ij = W [theta_ij, noised_ij] + b. The mean over j of gelu(e_ij) adds to the token of unit i, that over i to that of j;
    gelu(e_ij) gives each block's heads a bias of attention from i to j, and from j to i. With the last hidden states h, the
    update of weight ij is U gelu(A h_i + B h_j + C e_ij), U zero at initialisation.
    """

    def __init__(self, parts: Sequence[Part], config: GptConfig) -> None:
        super().__init__()
        width, edge_width = config.width, config.edge_width
        hidden = DECODER_WIDENING * edge_width
        self.parts, self.heads = list(parts), config.num_heads
        features = sum(part.features for part in parts)
        self.embed = nn.Linear(2 * features, edge_width)
        self.to_first = nn.Linear(edge_width, width, bias=False)
        self.to_second = nn.Linear(edge_width, width, bias=False)
        self.to_biases = nn.Linear(edge_width, 2 * config.depth * config.num_heads, bias=False)
        self.from_first = nn.Linear(width, hidden)
        self.from_second = nn.Linear(width, hidden, bias=False)
        self.from_edge = nn.Linear(edge_width, hidden, bias=False)
        self.decoder = nn.Linear(hidden, features, bias=False)

    def initialize_weights(self, generator: torch.Generator | None = None) -> None:
        """The embedding starts at the size of its inputs, with random offsets: nothing normalises it, and where it was small
        gelu would be linear, and the mean of many edges nearly nothing.
        """
        nn.init.normal_(self.embed.weight, std=self.embed.in_features**-0.5, generator=generator)
        nn.init.normal_(self.embed.bias, std=0.5, generator=generator)
        nn.init.zeros_(self.decoder.weight)

    def embedded(self, noised: Float[Tensor, "n D"], theta: Float[Tensor, "n D"]) -> Float[Tensor, "n a b edge"]:
        """e_ij of every edge."""
        return self.embed(torch.cat([part.take(x) for x in (theta, noised) for part in self.parts], dim=-1))

    def pooled(
        self, active: Float[Tensor, "n a b edge"]
    ) -> tuple[Float[Tensor, "n a width"], Float[Tensor, "n b width"]]:
        """What the edges, gelu(e_ij), add to the tokens of the first and the second group."""
        return self.to_first(active.mean(2)), self.to_second(active.mean(1))

    def biases(
        self, active: Float[Tensor, "n a b edge"]
    ) -> tuple[Float[Tensor, "depth n heads a b"], Float[Tensor, "depth n heads b a"]]:
        """How much each block's heads let the first group heed the second, and the second the first."""
        both = self.to_biases(active).unflatten(-1, (2, -1, self.heads))  # (n, a, b, 2, depth, heads)
        return both[:, :, :, 0].permute(3, 0, 4, 1, 2), both[:, :, :, 1].permute(3, 0, 4, 2, 1)

    def decode(
        self,
        first: Float[Tensor, "n a width"],
        second: Float[Tensor, "n b width"],
        edges: Float[Tensor, "n a b edge"],
    ) -> list[Float[Tensor, "n _"]]:
        """Updates of the parts, from the ends' last hidden states and e_ij."""
        ends = self.from_first(first)[:, :, None] + self.from_second(second)[:, None]
        updates = self.decoder(F.gelu(ends + self.from_edge(edges)))
        split = updates.split([part.features for part in self.parts], dim=-1)
        return [part.put(update) for part, update in zip(self.parts, split, strict=True)]


__all__ = ["Encoded", "NeuronTokens", "SequenceTokens", "make_tokenizer"]


def make_tokenizer(config: GptConfig) -> NeuronTokens | SequenceTokens:
    """The tokenizer of a config. Raises ValueError where neuron tokens cannot hold one of the parameters."""
    return (NeuronTokens if config.tokenizer == "neuron" else SequenceTokens)(config)


TOKENS = {"raw": 4, "normalised": 2}
RAW_FREQUENCIES, RAW_OCTAVES = 128, 14.0


class ScalarTokens(nn.Module):
    """Timestep, target - metric, target and metric, in the released order.  [thesis 3.2.2]

    Raw: a token each, every scalar x as [sin(f x), cos(f x), x] for 128 frequencies f from 1 to 2^14, t counting 0..999.
    Normalised: a token of t / 1000, and one of the metrics, which are told on two scales: from -1 to 1 linearly over the training
    range, and by the place they have among the scale's knots, which is their quantile among training checkpoints where no knots
    were merged; the change is the difference on each. Beyond the range the linear scale goes on and the place stays at its end.
    Frequencies then begin at pi / 4. Two tokens fewer are an eighth fewer products for a network of ten units.

    Raises ValueError for normalised scalars without a metric scale.
    """

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        if config.scalars == "normalised" and config.metric_scale is None:
            raise ValueError(
                "normalised scalars need a metric_scale: give MetricScale.of(training metrics), or scalars='raw'"
            )
        self.config = config
        numbers = (1, 1, 1, 1) if config.scalars == "raw" else (1, 6)  # in each token
        size = 2 * len(_frequencies(config)) + 1
        self.encoders = _linears((count * size, config.width) for count in numbers)

    def forward(
        self, t: Num[Tensor, " n"], metric: Float[Tensor, " n"], target: Float[Tensor, " n"]
    ) -> Float[Tensor, "n tokens width"]:
        dtype = self.encoders[0].weight.dtype
        frequencies = _frequencies(self.config).to(t.device, dtype)
        scalars = self._scaled(t.to(dtype), metric.to(dtype), target.to(dtype))
        embedded = [_embed(x, frequencies) for x in scalars]
        return torch.stack([encode(x) for encode, x in zip(self.encoders, embedded, strict=True)], dim=1)

    def _scaled(self, t: Tensor, metric: Tensor, target: Tensor) -> list[Float[Tensor, "n numbers"]]:
        if self.config.scalars == "raw":
            metric, target = metric * self.config.metric_factor, target * self.config.metric_factor
            return [x[:, None] for x in (t, target - metric, target, metric)]
        scale = self.config.metric_scale
        assert scale is not None  # refused by __init__
        metric, target = both_scales(scale, metric), both_scales(scale, target)
        return [t[:, None] / 1000, torch.cat([target - metric, target, metric], dim=1)]


def both_scales(scale: MetricScale, metric: Float[Tensor, " n"]) -> Float[Tensor, "n 2"]:
    """A metric linearly, and by its place among the knots, every interval as long as the others; both from -1 to 1."""
    linear = (metric - scale.low) / (scale.high - scale.low)
    knots = torch.tensor(scale.knots, dtype=torch.float64).to(metric.device, metric.dtype)
    passed = ((metric[:, None] - knots[:-1]) / knots.diff()).clamp(0, 1)  # share of each interval that lies below
    return torch.stack([linear, passed.mean(1)], dim=1) * 2 - 1


def _frequencies(config: GptConfig) -> Float[Tensor, " frequencies"]:
    """Float32 powers of two, as released: raw ones turn t = 999 into 16 million radians, where another rounding is another
    token. Made afresh in each pass: a buffer outside the state dict would be lost where a model is built on meta.
    """
    if config.scalars == "raw":
        return 2 ** torch.linspace(0, RAW_OCTAVES, RAW_FREQUENCIES, device="cpu")
    return math.pi / 4 * 2 ** torch.linspace(0, config.octaves, config.num_frequencies, device="cpu")


def _embed(x: Float[Tensor, "n scales"], frequencies: Float[Tensor, " frequencies"]) -> Float[Tensor, "n features"]:
    """[sin, cos, x] of each scale, one after another."""
    angles = x[:, :, None] * frequencies
    return torch.cat([angles.sin(), angles.cos(), x[:, :, None]], dim=2).flatten(1)
