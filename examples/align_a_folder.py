"""Align a folder of pictures with a trained aligner, and average them.

    python examples/align_a_folder.py PICTURES RUN OUT

RUN is the run folder of `triptych-gangealing train`, or its aligner.safetensors.
"""

import sys
from pathlib import Path

import torch
from triptych_common.images import to_uint8, write_png
from triptych_gangealing import align, load_aligner
from triptych_gangealing.pictures import read_picture, warped


def main(pictures: Path, run: Path, out: Path) -> None:
    aligner = load_aligner(run)
    found = align(pictures, aligner)  # a warp for each picture that could be read
    size, padding = aligner.config.input_size, aligner.facts["padding"]
    average = torch.zeros(1, 3, size, size)
    for i, name in enumerate(found.names):
        picture = read_picture(pictures / name)
        image = warped(picture, found.warp.select([i]), size, padding)  # (1, 3, size, size), values in [-1, 1]
        write_png(out / "aligned" / Path(name).with_suffix(".png"), to_uint8(image)[0])
        average += image / len(found.names)
    write_png(out / "average.png", to_uint8(average)[0])
    print(f"aligned {len(found.names)} pictures: {out}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
