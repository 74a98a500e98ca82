"""Cost of a DiT in the thesis's convention."""

import torch

from triptych_dit.config import DiTConfig
from triptych_dit.model import BLOCKS, DiT, TimestepEmbedder


def gflops(config: DiTConfig) -> float:
    """Cost of one forward pass on one input, in GFLOPs: 118.6 for DiT-XL/2.  [thesis Table 2.1 and Figure 2.5]

    Biases, norms and elementwise operations are not counted.
    """
    # A multiply-accumulate counts as one flop, as in the thesis and most papers; hardware's FLOP/s count it as two.
    width, tokens, conditions = config.hidden_size, config.grid[0] * config.grid[1], config.condition_tokens
    sequence = tokens + (conditions if config.block_design == "in_context" else 0)
    block = (4 + 2 * config.mlp_ratio) * width**2 * sequence + 2 * sequence**2 * width  # projections; attention
    if config.block_design == "cross_attention":
        block += 2 * width**2 * (sequence + conditions) + 2 * sequence * conditions * width
    modulations = BLOCKS[config.block_design].modulations * width**2
    final_modulation = 2 * width**2 if modulations else 0
    patch_values = config.patch_size**2 * tokens * width
    embed_and_decode = patch_values * (config.in_channels + config.out_channels)
    timestep = TimestepEmbedder.frequencies * width + width**2
    return (config.depth * (block + modulations) + embed_and_decode + timestep + final_modulation) / 1e9


def parameter_count(config: DiTConfig) -> int:
    """Number of parameters, including the fixed position embedding: 675,129,632 for DiT-XL/2."""
    with torch.device("meta"):
        return sum(p.numel() for p in DiT(config).parameters())
