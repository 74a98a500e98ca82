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

TOKENS = {"raw": 4, "normalised": 2}  # of timestep and metrics
RAW_FREQUENCIES, RAW_OCTAVES = 128, 14.0
DECODER_WIDENING = 4  # hidden width of the edges' decoder over edge_width


class Encoded(NamedTuple):
    """Tokens of a pair of networks (theta and noised theta*), without the scalars' tokens that follow them.

    biases: attention biases of each block over all tokens, including the scalars'. edges: embeddings [n, a, b, edge] of the
    weights between two groups of hidden units, one tensor for each pair of groups; the decoder needs them.
    """

    tokens: Float[Tensor, "n tokens width"]
    biases: Float[Tensor, "depth n heads all all"] | None = None
    edges: tuple[Float[Tensor, "n _ _ edge"], ...] = ()


def warn_if_lossy(largest: int, config: GptConfig) -> None:
    """Warn where a token stands for more parameters than it has channels, so that it cannot represent all of them."""
    if largest > config.width:
        chunks = "" if config.tokenizer == "neuron" else f", or chunk tokens of at most {config.width:,}"
        warnings.warn(
            f"tokens of up to {largest:,} parameters do not fit a width of {config.width:,}, which loses some of them; "
            f"expected no more than the width: make it {largest:,}{chunks}",
            stacklevel=2,
        )


def splits(config: GptConfig) -> list[int]:
    """Number of parameters of each token, in the order of theta: a whole parameter tensor, or at most chunk_size of its entries."""
    lengths = []
    for span in config.symmetry.layout.spans.values():
        size = span.stop - span.start
        chunk = config.chunk_size or size
        lengths += [min(chunk, size - start) for start in range(0, size, chunk)]
    return lengths


def _linears(sizes: Iterable[tuple[int, int]]) -> Any:
    """Linear layers without biases, with these numbers of inputs and outputs."""
    return nn.ModuleList(nn.Linear(*size, bias=False) for size in sizes)


class SequenceTokens(nn.Module):
    """Tokens of N stretches of theta: first those of noised theta*, then those of theta; the first N are decoded.  [thesis 3.2.2]

    Every stretch has its own linear encoder and decoder.
    """

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
    """A parameter tensor, indexed by the hidden units that its axes belong to.

    groups: the groups of these units, at most two, in the spec's order. features: entries of the parameter for each unit (or
    pair of units).
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
        """The inverse of `take`: entries by unit, flattened in the order of theta."""
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
    """Parts by the groups that their axes belong to."""
    together: dict[tuple[str, ...], list[Part]] = {}
    for part in parts:
        together.setdefault(part.groups, []).append(part)
    return together


class Units(nn.Module):
    """Encoder and decoder of the parameters that belong to the units of one group: fan-in from the network's inputs, fan-out to
    its outputs, biases, norms.

    Parameters that belong to no unit are encoded as a group of one unit, the global token. A group whose weights all lie between
    hidden units has no parameters here, and its tokens come from the edges alone.
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
    """A token for each hidden unit, with all parameters of theta and of noised theta* that belong to it.

    A global token comes first if some parameters belong to no unit, then the units of each group, in the spec's order. Encoder
    and decoder are shared by a group's units and no position tells them apart, so that permuting the units of theta and noised
    theta* permutes the update alike: exactly equivariant, for any PermutationSpec.

    Raises ValueError for a parameter with three or more permuting axes.
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
        self.order = sorted(range(len(starts)), key=starts.__getitem__)  # puts decoded parts in the order of theta
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


class Edges(nn.Module):
    """Weights between two groups of hidden units (possibly the same group): edges of a graph over the tokens.

    Such a weight cannot be a feature of either unit's token, since the order of the unit's fan-in permutes. So weight ij has
    an embedding e_ij = W [theta_ij, noised_ij] + b. The mean over j of gelu(e_ij) is added to the token of unit i, the mean
    over i to that of unit j; gelu(e_ij) also biases the attention of each block's heads from i to j and from j to i. With the
    last hidden states h, the update of weight ij is U gelu(A h_i + B h_j + C e_ij), where U is zero at initialisation.
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
        """Embeddings start as large as their inputs, with random offsets.

        No layer normalises them: if they were small, gelu would be linear, and the mean over many edges close to zero.
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
        """Summands of the tokens of the first and of the second group; active: gelu(e_ij)."""
        return self.to_first(active.mean(2)), self.to_second(active.mean(1))

    def biases(
        self, active: Float[Tensor, "n a b edge"]
    ) -> tuple[Float[Tensor, "depth n heads a b"], Float[Tensor, "depth n heads b a"]]:
        """Attention biases of each block's heads, from the first group to the second and from the second to the first."""
        both = self.to_biases(active).unflatten(-1, (2, -1, self.heads))  # (n, a, b, 2, depth, heads)
        return both[:, :, :, 0].permute(3, 0, 4, 1, 2), both[:, :, :, 1].permute(3, 0, 4, 2, 1)

    def decode(
        self,
        first: Float[Tensor, "n a width"],
        second: Float[Tensor, "n b width"],
        edges: Float[Tensor, "n a b edge"],
    ) -> list[Float[Tensor, "n _"]]:
        """Updates of the parts, from the last hidden states of both groups and the embeddings e_ij."""
        ends = self.from_first(first)[:, :, None] + self.from_second(second)[:, None]
        updates = self.decoder(F.gelu(ends + self.from_edge(edges)))
        split = updates.split([part.features for part in self.parts], dim=-1)
        return [part.put(update) for part, update in zip(self.parts, split, strict=True)]


def make_tokenizer(config: GptConfig) -> NeuronTokens | SequenceTokens:
    """The tokenizer of a config. Raises ValueError where neuron tokens cannot hold one of the parameters."""
    return (NeuronTokens if config.tokenizer == "neuron" else SequenceTokens)(config)


class ScalarTokens(nn.Module):
    """Tokens of the timestep and of the metrics: target - metric, target and metric, in the released order.  [thesis 3.2.2]

    Raw: a token for each scalar x, embedded as [sin(f x), cos(f x), x] for 128 frequencies f from 1 to 2^14, with t in 0..999.

    Normalised: a token of t / 1000 and a token of all metrics. Every metric is embedded on two scales: linear from -1 to 1 over
    the training range, and its rank among the scale's knots (its quantile among training checkpoints, unless knots were merged);
    target - metric is the difference on each scale. Beyond the training range the linear scale continues and the rank is
    clamped. Frequencies start at pi / 4. Two tokens fewer save an eighth of the arithmetic for a network of ten units.

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
    """A metric on a linear scale and as its rank among the knots, both from -1 to 1 over the training range."""
    linear = (metric - scale.low) / (scale.high - scale.low)
    knots = torch.tensor(scale.knots, dtype=torch.float64).to(metric.device, metric.dtype)
    passed = ((metric[:, None] - knots[:-1]) / knots.diff()).clamp(0, 1)  # share of each interval that lies below
    return torch.stack([linear, passed.mean(1)], dim=1) * 2 - 1


def _frequencies(config: GptConfig) -> Float[Tensor, " frequencies"]:
    """Powers of two in float32, as released: raw frequencies turn t = 999 into 16 million radians, where another rounding gives
    another embedding. Computed in every pass, since a buffer outside the state dict would be lost in a model built on meta.
    """
    if config.scalars == "raw":
        return 2 ** torch.linspace(0, RAW_OCTAVES, RAW_FREQUENCIES, device="cpu")
    return math.pi / 4 * 2 ** torch.linspace(0, config.octaves, config.num_frequencies, device="cpu")


def _embed(x: Float[Tensor, "n scales"], frequencies: Float[Tensor, " frequencies"]) -> Float[Tensor, "n features"]:
    """[sin, cos, x] of each scale, one after another."""
    angles = x[:, :, None] * frequencies
    return torch.cat([angles.sin(), angles.cos(), x[:, :, None]], dim=2).flatten(1)
