"""Sample images from a released DiT checkpoint.

python examples/sample_released.py --checkpoint DiT-XL/2@256 --labels 207 360 387 974 --out samples.png

A published name is downloaded once (2.7 GB); a path of a file of facebookresearch/DiT, or of a folder of diffusers, will do
as well. The published models draw latents, which take `pip install 'triptych-dit[latents]'` to decode.
"""

import argparse
from pathlib import Path

import torch
from triptych_common.images import image_grid, to_uint8, write_png
from triptych_dit.interop import load_any
from triptych_dit.sampling import SamplerSettings, sample_images


def main(checkpoint: str, labels: list[int], out: Path, steps: int) -> None:
    trained = load_any(checkpoint)
    trained.model.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = SamplerSettings(sampler="ddim", num_inference_steps=steps, guidance_scale=4.0)
    images = to_uint8(sample_images(trained, torch.tensor(labels), settings, seed=0))  # (batch, 3, height, width)
    write_png(out, image_grid(images, columns=len(labels)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="DiT-XL/2@256")
    parser.add_argument("--labels", type=int, nargs="+", default=[207, 360, 387, 974])
    parser.add_argument("--out", type=Path, default=Path("samples.png"))
    parser.add_argument("--steps", type=int, default=50)
    main(**vars(parser.parse_args()))
