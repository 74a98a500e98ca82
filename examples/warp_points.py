"""Take points of an aligned image to their places in the image it comes from, and back; draw both.

python examples/warp_points.py OUT.png
"""

import math
import sys
from pathlib import Path

import torch
from triptych_common.images import to_uint8
from triptych_common.storage.files import write_bytes
from triptych_gangealing import Warp, load_generator
from triptych_gangealing.correspondence import matches_figure
from triptych_gangealing.warp import Affine, Flow, centres, to_pixels


def main(out: Path) -> float:
    generator = load_generator("digits32-3")
    image = generator(torch.randn(1, generator.config.z_dim, generator=torch.Generator().manual_seed(0)))
    size = (image.shape[2], image.shape[3])

    # A flow that sways to and fro, then a turn by 30 degrees; normalised coordinates, output to input.
    sway = 0.08 * torch.sin(2 * math.pi * centres((16, 16), image)[..., 1])
    flow = Flow(torch.stack([sway, torch.zeros_like(sway)])[None])
    turn = Affine.similarity(torch.tensor([math.pi / 6]), torch.tensor([0.2]), torch.tensor([[0.1, 0.0]]))
    warp = Warp((flow, turn))

    points = centres((6, 6), image).reshape(1, -1, 2) * 0.6  # (1, 36, 2), in the aligned image
    there = warp.map_points(points)
    back = warp.inverse().map_points(there.points)
    error = float((back.points - points).abs().max())
    print(
        f"{int(there.inside.sum())} of {points.shape[1]} points lie within the image; the way back is exact to {error:.1e}"
    )

    aligned = warp.sample(image)
    pictures = (to_uint8(x)[0].cpu() for x in (aligned, image))
    ends = (to_pixels(x, size)[0] for x in (points, there.points))
    write_bytes(out, matches_figure(*pictures, *ends, ("aligned", "as it is")))
    return error


if __name__ == "__main__":
    main(Path(sys.argv[1]))
