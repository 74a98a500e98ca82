"""Weights between two hidden units, whose both ends permute: edges of a graph over the tokens.

Where units meet units a weight cannot be a feature of either token alone: the order of its fan-in permutes. Each edge has an
embedding of its own, which adds to the tokens of both its ends, biases the attention between them, and with them is decoded.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from triptych_gpt.config import GptConfig
from triptych_gpt.tokenizers.parts import Part

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
