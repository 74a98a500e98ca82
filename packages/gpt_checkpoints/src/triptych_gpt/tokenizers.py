"""Everything a G.pt reads, as tokens: two networks (theta and noised theta*), the timestep and the metrics.

A tokenizer of networks is a module with

    token_kinds: how many consecutive tokens share each learned position embedding
    encode(noised, theta) -> Encoded
    decode(hidden [n, tokens, width], encoded) -> update [n, D], which writes every entry once
    initialize_weights(generator): what differs from N(0, 0.02)

`SequenceTokens` has a token for each parameter tensor or chunk of one, `NeuronTokens` one for each hidden unit.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from triptych_gpt.config import GptConfig, MetricScale
from triptych_gpt.symmetry.spec import PermutationSpec, Piece

TOKENS = {"raw": 4, "normalised": 2}  # of timestep and metrics
RAW_FREQUENCIES, RAW_OCTAVES = 128, 14.0
DECODER_WIDENING = 4  # hidden width of the edges' decoder over edge_width


class Encoded(NamedTuple):
    """Tokens of a pair of networks; the scalars' tokens follow them.

    biases: of each block's attention, over all tokens including the scalars'. edges: for each pair of groups of hidden units, the
    embedded weights between them, which the decoder needs again.
    """

    tokens: Float[Tensor, "n tokens width"]
    biases: Float[Tensor, "depth n heads all all"] | None = None
    edges: tuple[Float[Tensor, "n _ _ edge"], ...] = ()


def warn_if_lossy(largest: int, config: GptConfig) -> None:
    """Warn if a token stands for more parameters than it has channels and so cannot represent all of them."""
    if largest > config.width:
        remedy = "" if config.tokenizer == "neuron" else f", or use chunk tokens of at most {config.width:,}"
        problem = f"tokens of up to {largest:,} parameters do not fit a width of {config.width:,} without loss"
        warnings.warn(f"{problem}; make the width {largest:,}{remedy}", stacklevel=2)


def splits(config: GptConfig) -> list[int]:
    """The number of parameters of each token, in the order of theta: a parameter tensor, or at most chunk_size entries of one."""
    lengths = []
    for span in config.symmetry.layout.spans.values():
        size = span.stop - span.start
        chunk = config.chunk_size or size
        # A chunk never spans two tensors, as in the released models: the rest of a tensor is a shorter token.
        lengths += [min(chunk, size - start) for start in range(0, size, chunk)]
    return lengths


def _linears(sizes: Iterable[tuple[int, int]]) -> Any:
    """Linear layers without biases, of these numbers of inputs and outputs."""
    return nn.ModuleList(nn.Linear(*size, bias=False) for size in sizes)


class SequenceTokens(nn.Module):
    """A token for each parameter tensor, or chunk of one, with a linear encoder and decoder of its own.  [thesis 3.2.2]"""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.splits = splits(config)
        warn_if_lossy(max(self.splits), config)
        # The tokens of noised theta* come first, then as many of theta. Only the first half is decoded.
        self.encoders = _linears((size, config.width) for size in self.splits * 2)
        self.decoders = _linears((config.width, size) for size in self.splits)
        self.token_kinds = [1] * len(self.encoders)  # every token has a position of its own

    def initialize_weights(self, generator: torch.Generator | None = None) -> None:
        # Zero decoders make an untrained model's update zero.
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
    """A piece of a parameter tensor, indexed by the hidden units that its axes belong to."""

    piece: Piece
    order: tuple[int, ...]  # of the piece's dimensions, units first
    groups: tuple[str, ...]  # of the units, two at most, in the spec's order
    features: int  # entries for each unit or pair of units

    def take(self, theta: Float[Tensor, "n D"]) -> Float[Tensor, "n *units features"]:
        """The piece's entries, by unit."""
        units = [self.piece.dims[dim][1] for dim in self.order[: len(self.groups)]]
        value = self.piece.view(theta).permute(0, *(1 + dim for dim in self.order))
        return value.reshape(len(theta), *units, self.features)

    def put(self, entries: Float[Tensor, "n *units features"]) -> Float[Tensor, "n size"]:
        """The inverse of `take`: entries by unit, flattened in the order of the piece."""
        value = entries.reshape(len(entries), *(self.piece.dims[dim][1] for dim in self.order))
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return value.permute(0, *(1 + dim for dim in back)).flatten(1)


def coarsened(spec: PermutationSpec) -> PermutationSpec:
    """The spec without the groups that would leave a piece of a parameter with more than two: units within units first."""
    # A head's channels within the heads: the head becomes the token, and its channels are features of it.
    fixed: set[str] = set()
    for piece in spec.pieces:
        inner = [group for factors in piece.factors for group, _ in factors[::-1] if group is not None]
        outer = {next((group for group, _ in factors if group is not None), None) for factors in piece.factors}
        free = [group for group in inner if group not in fixed]
        for group in sorted(free, key=lambda group: (group in outer, spec.groups[group])):
            if len([other for other in free if other not in fixed]) > 2:
                fixed.add(group)
    return spec.without(fixed) if fixed else spec


def parts_of(spec: PermutationSpec) -> list[Part]:
    """A part for each piece of a parameter, in the layout's order, under a `coarsened` spec."""
    spec = coarsened(spec)
    rank = {group: place for place, group in enumerate(spec.groups)}
    parts = []
    for piece in spec.pieces:
        units = sorted((rank[group], dim, group) for dim, (group, _) in enumerate(piece.dims) if group is not None)
        first = [dim for _, dim, _ in units]
        rest = [dim for dim in range(len(piece.dims)) if dim not in first]
        features = math.prod(piece.dims[dim][1] for dim in rest)
        parts.append(Part(piece, (*first, *rest), tuple(group for *_, group in units), features))
    return parts


def written(updates: Float[Tensor, "n *units features"], parts: Sequence[Part]) -> list[Float[Tensor, "n _"]]:
    """The update of each part, flattened in the order of theta, from the features of all of them."""
    split = updates.split([part.features for part in parts], dim=-1)
    return [part.put(update) for part, update in zip(parts, split, strict=True)]


def joined(updates: Sequence[Float[Tensor, "n _"]], pieces: Sequence[Piece]) -> Float[Tensor, "n D"]:
    """theta of all pieces, in its order: those of one parameter are put together first."""
    whole: list[Tensor] = []
    for _, group in itertools.groupby(zip(updates, pieces, strict=True), key=lambda pair: pair[1].span.start):
        own = list(group)
        blocks = [
            update.view(len(update), *(where.stop - where.start for where in piece.where)) for update, piece in own
        ]
        ends = [tuple(where.stop for where in piece.where) for _, piece in own]
        for dim in reversed(range(len(own[0][1].shape))):
            if len(blocks) > 1:  # neighbours along this dimension end where no more follow
                last, kept, parts = own[0][1].shape[dim], list[Tensor](), list[Tensor]()
                for block, end in zip(blocks, ends, strict=True):
                    parts.append(block)
                    if end[dim] == last:
                        kept.append(torch.cat(parts, dim + 1))
                        parts = []
                ends = [end for end in ends if end[dim] == last]
                blocks = kept
        whole.append(blocks[0].flatten(1))
    return torch.cat(whole, dim=1)


class Units(nn.Module):
    """Encoder and decoder of what belongs to each unit of a group: weights from inputs and to outputs, biases, norms."""

    def __init__(self, count: int, parts: Sequence[Part], width: int) -> None:
        super().__init__()
        self.count, self.parts = count, list(parts)
        self.features = sum(part.features for part in parts)
        # Where all weights of a group lie between hidden units, its tokens come from the edges alone.
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
        return written(self.decoder(hidden), self.parts)


class NeuronTokens(nn.Module):
    """A token for each hidden unit, holding its parameters in theta and in noised theta*.

    A group's units share encoder, decoder and position. Permuting the units of both networks therefore permutes the update in the
    same way, exactly and for any PermutationSpec, so that no augmentation is needed.
    A parameter has two kinds of units at most: groups within others, such as the channels of a head, are features of them instead.
    """

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        together: dict[tuple[str, ...], list[Part]] = {}
        symmetry = coarsened(config.symmetry)
        for part in parts_of(symmetry):
            together.setdefault(part.groups, []).append(part)
        counts: dict[tuple[str, ...], int] = {(group,): count for group, count in symmetry.groups.items()}
        if () in together:  # parameters of no unit, such as output biases: a group of one, the global token
            counts = {(): 1, **counts}
        self.depth, self.heads, self.scalars = config.depth, config.num_heads, TOKENS[config.scalars]
        self.token_kinds = list(counts.values())
        units = [Units(n, together.get(key, ()), config.width) for key, n in counts.items()]
        warn_if_lossy(max(each.features for each in units), config)
        between = [key for key in together if len(key) == 2]
        rows = {key[0]: place for place, key in enumerate(counts) if key}
        self.ends = [(rows[first], rows[second]) for first, second in between]  # indices into units
        self.units: Any = nn.ModuleList(units)
        self.edges: Any = nn.ModuleList(Edges(together[key], config) for key in between)
        # Parts are decoded group by group; this puts them back in the order of theta.
        parts = [part for module in (*self.units, *self.edges) for part in module.parts]
        places = [(part.piece.span.start, *(where.start for where in part.piece.where)) for part in parts]
        self.order = sorted(range(len(parts)), key=places.__getitem__)
        self.pieces = [parts[place].piece for place in self.order]

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
        for edges, e, (first, second) in zip(self.edges, active, self.ends, strict=True):
            summands[first].append(edges.to_first(e.mean(2)))  # e: n first second edge
            summands[second].append(edges.to_second(e.mean(1)))
        tokens = torch.cat([sum(rest, own) for own, *rest in summands], dim=1)
        return Encoded(tokens, self._biases(active) if active else None, embedded)

    def _biases(self, active: list[Float[Tensor, "n _ _ edge"]]) -> Float[Tensor, "depth n heads all all"]:
        """Attention biases of every block: zero where there is no edge, and for the scalars' tokens."""
        ends = list(itertools.accumulate(self.token_kinds, initial=0))
        where = [slice(*pair) for pair in itertools.pairwise(ends)]
        total = ends[-1] + self.scalars
        biases = None
        for edges, e, (first, second) in zip(self.edges, active, self.ends, strict=True):
            there, back = edges.biases(e)
            if biases is None:
                biases = there.new_zeros(self.depth, len(e), self.heads, total, total)
            # Added, not assigned: layers of a residual stream connect a group with itself more than once.
            biases[..., where[first], where[second]] += there
            biases[..., where[second], where[first]] += back
        assert biases is not None  # called only if there are edges
        return biases

    def decode(self, hidden: Float[Tensor, "n tokens width"], encoded: Encoded) -> Float[Tensor, "n D"]:
        last = hidden[:, : sum(self.token_kinds)].split(self.token_kinds, dim=1)
        updates = [update for units, h in zip(self.units, last, strict=True) for update in units.decode(h)]
        for edges, e, (first, second) in zip(self.edges, encoded.edges, self.ends, strict=True):
            updates += edges.decode(last[first], last[second], e)
        return joined([updates[place] for place in self.order], self.pieces)


class Edges(nn.Module):
    """Weights between two groups of hidden units (possibly the same group): edges of a graph over the tokens.

    Such a weight is a feature of neither unit's token, since the order of the unit's other end permutes. Instead, weight ij has
    an embedding e_ij = W [theta_ij, noised_ij] + b. The mean over j of gelu(e_ij) is added to the token of unit i, the mean
    over i to that of unit j, and gelu(e_ij) biases the attention of each head from i to j and from j to i. With the last hidden
    states h, the update of weight ij is U gelu(A h_i + B h_j + C e_ij).
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
        # Embeddings start as large as their inputs, with random offsets. No layer normalises them: if they were small, gelu would
        # be linear, and its mean over many edges close to zero.
        nn.init.normal_(self.embed.weight, std=self.embed.in_features**-0.5, generator=generator)
        nn.init.normal_(self.embed.bias, std=0.5, generator=generator)
        nn.init.zeros_(self.decoder.weight)

    def embedded(self, noised: Float[Tensor, "n D"], theta: Float[Tensor, "n D"]) -> Float[Tensor, "n a b edge"]:
        """e_ij of every edge."""
        return self.embed(torch.cat([part.take(x) for x in (theta, noised) for part in self.parts], dim=-1))

    def biases(
        self, active: Float[Tensor, "n a b edge"]
    ) -> tuple[Float[Tensor, "depth n heads a b"], Float[Tensor, "depth n heads b a"]]:
        """Attention biases of each block's heads, from the first group to the second and back; active: gelu(e_ij)."""
        both = self.to_biases(active).unflatten(-1, (2, -1, self.heads))  # n a b 2 depth heads
        return both[:, :, :, 0].permute(3, 0, 4, 1, 2), both[:, :, :, 1].permute(3, 0, 4, 2, 1)

    def decode(
        self, first: Float[Tensor, "n a width"], second: Float[Tensor, "n b width"], edges: Float[Tensor, "n a b edge"]
    ) -> list[Float[Tensor, "n _"]]:
        """Updates of the parts, from the last hidden states of both groups and the embeddings e_ij."""
        ends = self.from_first(first)[:, :, None] + self.from_second(second)[:, None]  # n a b hidden
        return written(self.decoder(F.gelu(ends + self.from_edge(edges))), self.parts)


def make_tokenizer(config: GptConfig) -> NeuronTokens | SequenceTokens:
    """The tokenizer of a config. Raises ValueError if neuron tokens cannot hold one of the parameters."""
    return (NeuronTokens if config.tokenizer == "neuron" else SequenceTokens)(config)


class ScalarTokens(nn.Module):
    """Tokens of the timestep and of target - metric, target and metric, in the released order.  [thesis 3.2.2]

    Every scalar x is embedded as [sin(f x), cos(f x), x]. Raw: a token each, with 128 frequencies f from 1 to 2^14 and t in 0..999.
    Normalised: a token of t / 1000 and one of all metrics on `both_scales`, frequencies from pi / 4.
    Raises ValueError for normalised scalars without a metric scale.
    """

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        if config.scalars == "normalised" and config.metric_scale is None:
            raise ValueError("normalised scalars need a metric_scale: give MetricScale.of(metrics), or scalars='raw'")
        self.config = config
        # Scalars in each token. Two tokens fewer save an eighth of the arithmetic for a network of ten units.
        numbers = (1, 1, 1, 1) if config.scalars == "raw" else (1, 6)
        size = 2 * len(_frequencies(config)) + 1
        self.encoders = _linears((count * size, config.width) for count in numbers)

    def forward(
        self, t: Num[Tensor, " n"], metric: Float[Tensor, " n"], target: Float[Tensor, " n"]
    ) -> Float[Tensor, "n tokens width"]:
        dtype = self.encoders[0].weight.dtype
        frequencies = _frequencies(self.config).to(t.device, dtype)
        scalars = self._scaled(t.to(dtype), metric.to(dtype), target.to(dtype))
        tokens = []
        for encode, x in zip(self.encoders, scalars, strict=True):
            angles = x[:, :, None] * frequencies  # n numbers frequencies
            tokens.append(encode(torch.cat([angles.sin(), angles.cos(), x[:, :, None]], dim=2).flatten(1)))
        return torch.stack(tokens, dim=1)

    def _scaled(self, t: Tensor, metric: Tensor, target: Tensor) -> list[Float[Tensor, "n numbers"]]:
        if self.config.scalars == "raw":
            metric, target = metric * self.config.metric_factor, target * self.config.metric_factor
            return [x[:, None] for x in (t, target - metric, target, metric)]
        scale = self.config.metric_scale
        assert scale is not None  # refused by __init__
        metric, target = both_scales(scale, metric), both_scales(scale, target)
        return [t[:, None] / 1000, torch.cat([target - metric, target, metric], dim=1)]


def both_scales(scale: MetricScale, metric: Float[Tensor, " n"]) -> Float[Tensor, "n 2"]:
    """A metric on a linear scale and as its rank among the knots, both from -1 to 1 over the training range.

    The rank is the quantile among training checkpoints, unless knots were merged: it resolves the end where most of them are.
    Beyond the training range the linear scale continues and the rank is clamped.
    """
    linear = (metric - scale.low) / (scale.high - scale.low)
    knots = torch.tensor(scale.knots, dtype=torch.float64).to(metric.device, metric.dtype)
    passed = ((metric[:, None] - knots[:-1]) / knots.diff()).clamp(0, 1)  # share of each interval below the metric
    return torch.stack([linear, passed.mean(1)], dim=1) * 2 - 1


def _frequencies(config: GptConfig) -> Float[Tensor, " frequencies"]:
    # In float32, as released: raw frequencies turn t = 999 into 16 million radians, where another rounding gives another
    # embedding. Computed in every pass, since a buffer outside the state dict would be lost in a model built on meta.
    if config.scalars == "raw":
        return raw_frequencies()
    return math.pi / 4 * 2 ** torch.linspace(0, config.octaves, config.num_frequencies, device="cpu")


def raw_frequencies() -> Float[Tensor, " frequencies"]:
    """The frequencies of the released models, powers of two in float32."""
    return 2 ** torch.linspace(0, RAW_OCTAVES, RAW_FREQUENCIES, device="cpu")
