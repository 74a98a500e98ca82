"""How long it takes until a run knows a folder of many pictures: python -m benchmarks.listing FOLDER [--make 1000000].

--make fills the folder with empty files of a thousand to a class, which is enough for listing: nothing is decoded.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

from triptych_common.data import ImageFolder


def make(folder: Path, files: int, per_class: int = 1_000) -> None:
    """Empty files with the names of pictures, `per_class` in each subfolder."""
    for first in range(0, files, per_class):
        part = folder / f"class-{first // per_class:05d}"
        part.mkdir(parents=True, exist_ok=True)
        for i in range(min(per_class, files - first)):
            os.close(os.open(part / f"{i:05d}.png", os.O_CREAT | os.O_WRONLY))


def measure(folder: Path) -> dict[str, float]:
    """Seconds of a bare walk over the folder, of opening it (also of this process alone, on a machine that has other work), and
    of its identity; memory in megabytes.
    """
    start = time.perf_counter()
    walked = sum(len(names) for _, _, names in os.walk(folder))
    bare, before = time.perf_counter(), time.process_time()
    source = ImageFolder(folder)
    opened, after = time.perf_counter(), time.process_time()
    source.fingerprint()
    source.listing()
    identified = time.perf_counter()
    assert len(source) == walked
    return {
        "files": len(source), "classes": source.num_classes, "walk_s": round(bare - start, 2),
        "open_s": round(opened - bare, 2), "open_cpu_s": round(after - before, 2), "identify_s": round(identified - opened, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", type=int, default=0)
    options = parser.parse_args()
    if options.make:
        make(options.folder, options.make)
    print(json.dumps(measure(options.folder)))
