"""Neuron tokens: one a hidden unit, with all that is the unit's of theta and of noised theta* together.

Encoder and decoder are shared by a group's units and no position tells them apart, so that permuting the units of theta and
theta* permutes the update alike: exactly equivariant, for any PermutationSpec of parameters with at most two permuting axes.
"""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from triptych_gpt.config import GptConfig
from triptych_gpt.scalars import TOKENS
from triptych_gpt.tokenizers.edges import Edges
from triptych_gpt.tokenizers.encoded import Encoded, warn_if_lossy
from triptych_gpt.tokenizers.parts import Part, by_groups, parts_of


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
        counts = {(group,): count for group, count in config.symmetry.groups.items()}
        if () in together:
            counts = {(): 1, **counts}
        self.depth, self.heads, self.scalars = config.depth, config.num_heads, TOKENS[config.scalars]
        self.token_kinds = list(counts.values())
        self.units = nn.ModuleList(Units(count, together.get(key, ()), config.width) for key, count in counts.items())
        between = [key for key in together if len(key) == 2]
        places = {key[0]: place for place, key in enumerate(counts) if key}
        self.ends = [
            (places[first], places[second]) for first, second in between
        ]  # of each of the edges, among the units
        self.edges = nn.ModuleList(Edges(together[key], config) for key in between)
        starts = [part.span.start for module in (*self.units, *self.edges) for part in module.parts]
        self.order = sorted(range(len(starts)), key=starts.__getitem__)  # of what is decoded, to make it theta's
        warn_if_lossy(max(units.features for units in self.units), config)

    def initialize_weights(self, generator: torch.Generator | None = None) -> None:
        for units in self.units:
            if units.decoder is not None:
                nn.init.zeros_(units.decoder.weight)
        for edges in self.edges:
            edges.initialize_weights(generator)

    def encode(self, noised: Float[Tensor, "n D"], theta: Float[Tensor, "n D"]) -> Encoded:
        tokens = [units.encode(noised, theta) for units in self.units]
        if not self.edges:
            return Encoded(torch.cat(tokens, dim=1))
        embedded = tuple(edges.embedded(noised, theta) for edges in self.edges)
        active = [F.gelu(e) for e in embedded]
        for edges, e, (first, second) in zip(self.edges, active, self.ends, strict=True):
            to_first, to_second = edges.pooled(e)
            tokens[first] = to_first if tokens[first] is None else tokens[first] + to_first
            tokens[second] = to_second if tokens[second] is None else tokens[second] + to_second
        return Encoded(torch.cat(tokens, dim=1), self._biases(active), embedded)

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
        return biases

    def decode(self, hidden: Float[Tensor, "n tokens width"], encoded: Encoded) -> Float[Tensor, "n D"]:
        last = hidden[:, : sum(self.token_kinds)].split(self.token_kinds, dim=1)
        written = [update for units, h in zip(self.units, last, strict=True) for update in units.decode(h)]
        for edges, e, (first, second) in zip(self.edges, encoded.edges, self.ends, strict=True):
            written += edges.decode(last[first], last[second], e)
        return torch.cat([written[place] for place in self.order], dim=1)
