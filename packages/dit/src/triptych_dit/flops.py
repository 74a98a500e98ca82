"""Cost of a DiT in the thesis's convention."""

from triptych_dit.config import DiTConfig
from triptych_dit.model import TimestepEmbedder


def gflops(config: DiTConfig) -> float:
    """GFLOPs of one forward pass on one input, one multiply-accumulate counted as one flop; biases, norms and
    elementwise operations are not counted.  [thesis Table 2.1; adaLN-Zero]
    """
    width, tokens = config.hidden_size, config.grid[0] * config.grid[1]
    projections = (4 + 2 * config.mlp_ratio) * width**2 * tokens  # qkv, output, feed-forward
    attention = 2 * tokens**2 * width
    modulation = 6 * width**2
    patch_values = config.patch_size**2 * tokens * width
    embed_and_decode = patch_values * (config.in_channels + config.out_channels)
    timestep = TimestepEmbedder.frequencies * width + width**2
    final_modulation = 2 * width**2
    total = config.depth * (projections + attention + modulation) + embed_and_decode + timestep + final_modulation
    return total / 1e9


def parameter_count(config: DiTConfig) -> int:
    """Parameters of the model, the fixed position embedding among them (675,129,632 for DiT-XL/2)."""
    import torch

    from triptych_dit.model import DiT

    with torch.device("meta"):
        return sum(p.numel() for p in DiT(config).parameters())
