"""Layer and chunk tokens: stretches of theta in order, each with an encoder and a decoder of its own.  [thesis 3.2.2]

They know nothing of permutations: train them with permutation augmentation.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from triptych_gpt.config import GptConfig
from triptych_gpt.tokenizers.encoded import Encoded, warn_if_lossy


def splits(config: GptConfig) -> list[int]:
    """Lengths of the stretches of theta that are a token each: a parameter tensor, or at most chunk_size of its entries."""
    lengths = []
    for span in config.symmetry.layout.spans.values():
        size = span.stop - span.start
        chunk = config.chunk_size or size
        lengths += [min(chunk, size - start) for start in range(0, size, chunk)]
    return lengths


class SequenceTokens(nn.Module):
    """2N tokens: the N stretches of noised theta*, then those of theta. The first N are decoded."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.splits = splits(config)
        warn_if_lossy(max(self.splits), config)
        self.encoders = nn.ModuleList(nn.Linear(size, config.width, bias=False) for size in self.splits * 2)
        self.decoders = nn.ModuleList(nn.Linear(config.width, size, bias=False) for size in self.splits)
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
