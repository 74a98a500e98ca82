"""Make a run's averaged generator one that ships with the library: `python -m triptych_thesis.chapter4.embed RUN NAME`.

The file's facts record how it was trained, and how far its images are from held-out digits, beside what real digits score.
"""

import json
import sys
from pathlib import Path
from typing import Any

from triptych_common.images import image_grid, write_png
from triptych_common.storage import checkpoint
from triptych_common.storage.files import open_ended, read_json
from triptych_gangealing.stylegan2.generator import Generator, sample_images
from triptych_gangealing.stylegan2.instrument import gan_scores, load_instrument
from triptych_gangealing.stylegan2.train_config import PRESETS
from triptych_gangealing.stylegan2.weights import EMBEDDED, GENERATOR_FILE, read_network, write_network
from typing_extensions import TypedDict

IMAGES, COLUMNS, LIMIT_BYTES = 1_000, 16, 5_000_000


@open_ended
class _Made(TypedDict):
    command: str
    commit: str
    versions: dict[str, str]
    hardware: dict[str, Any]


def embed(run: Path, name: str, folder: Path = EMBEDDED) -> dict[str, Any]:
    """Write `folder`/NAME.safetensors, with its facts, and NAME.png, a grid of its images; returns the facts.

    Raises FileNotFoundError for an unfinished run, ValueError for a generator too large to ship.
    """
    generator, facts = read_network(run / GENERATOR_FILE)
    if not isinstance(generator, Generator):
        raise ValueError(f"{run / GENERATOR_FILE}: expected a generator")
    made = read_json(run / "config.json", _Made, remedy="restore it")
    images = sample_images(generator, range(IMAGES))
    digit = facts["data"].partition(":")[2]
    scores = gan_scores(images, int(digit) if digit else None)
    facts = {
        **{key: facts[key] for key in ("data", "seed", "images_seen")},
        "command": f"triptych-gangealing train-gan --preset {name}" if name in PRESETS else made["command"],
        **{key: made[key] for key in ("commit", "versions", "hardware")},
        "instrument_sha256": load_instrument().sha256,
        "scores": {key: value if isinstance(value, int) else value._asdict() for key, value in scores._asdict().items()},
    }  # fmt: skip
    file = folder / f"{name}.safetensors"
    write_network(file, generator, facts)
    size = file.stat().st_size
    if size > LIMIT_BYTES:
        checkpoint.remove(file)
        limit = f"expected at most {LIMIT_BYTES:,}; train a smaller one"
        raise ValueError(f"{run}: its generator takes {size:,} bytes, {limit}")
    write_png(folder / f"{name}.png", image_grid(images[: COLUMNS * 10], columns=COLUMNS), scale=2)
    return facts


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m triptych_thesis.chapter4.embed RUN NAME")
    print(json.dumps(embed(Path(sys.argv[1]), sys.argv[2]), indent=2))
