"""What a tokenizer makes of a pair of networks."""

import warnings
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from triptych_gpt.config import GptConfig


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
