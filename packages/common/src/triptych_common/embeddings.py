"""Fixed embeddings: positions on a rectangle, and scalars such as the timestep by frequencies."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def sincos_position_embedding(height: int, width: int, dim: int) -> Float[Tensor, "tokens dim"]:
    """Sine-cosine embedding of every cell of a height x width grid, row-major, float32 (computed in float64).

    The first half of the channels encodes the column, the second half the row; each half is [sin, cos] of
    position * 10000^(-i / (dim / 4)): the layout of the released DiT weights.

    Raises ValueError unless dim is a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"position embedding of dim {dim}: expected a multiple of 4; change hidden_size")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

    def encode(positions: Tensor) -> Tensor:
        angles = positions.to(torch.float64).outer(omega)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([encode(columns.flatten()), encode(rows.flatten())], dim=1).to(torch.float32)


def frequency_embedding(
    values: Float[Tensor, " batch"], dim: int, *, max_period: float = 10000.0, shift: int = 0
) -> Float[Tensor, "batch dim"]:
    """[cos, sin] of values * max_period^(-i / (dim / 2 - shift)), i = 0 .. dim/2 - 1.  [thesis 2.3.2]

    shift: 0 as in the released DiT, 1 as in diffusers' ("downscale_freq_shift").

    Raises ValueError for an odd dim.
    """
    if dim % 2:
        raise ValueError(f"frequency embedding of dim {dim}: expected an even number")
    half = dim // 2
    indices = torch.arange(half, dtype=torch.float32, device=values.device)
    # Divided last, as in diffusers: at t = 999 the other order's rounding moves angles by 1e-4 where shift is 1.
    angles = values[:, None].float() * torch.exp(-math.log(max_period) * indices / (half - shift))
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(values.dtype)
