"""StyleGAN2 at 256 on one GPU: whole training steps, and both networks alone, float32 and with the four highest resolutions in
bfloat16.

Seconds for a thousand images (kimg) are 1,000 over images a second. Reference point: 25,000 kimg of the published
configuration "auto" in 6 d 21 h on one V100, so 23.8 seconds for each.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from triptych_gangealing.stylegan2.train_config import auto

from benchmarks.runner import Job
from benchmarks.suites.gan_networks import Size, jobs_of, round_of, training

SIZES = [Size(64, 64, 10), Size(256, 16, 10)]
AUGMENT_P = 0.2  # a run that adapts it starts at 0, where augmenting costs nothing


def jobs() -> Sequence[Job]:
    skip = None if torch.cuda.is_available() else "no GPU here: torch.cuda.is_available() is false"
    device = torch.device("cuda")
    listed = []
    for name, bf16 in (("float32", 0), ("bfloat16", 4)):
        config = replace(auto(256), data="noise", augment_p=AUGMENT_P, bf16_resolutions=bf16)
        images = round_of(config) * config.batch_size
        against = ("training 256, float32",) if bf16 else ()
        listed.append(Job(f"training 256, {name}", training(config, device), images, "images", against, repeats=5))
        for size in SIZES:
            for job in jobs_of(size, device, bf16=bool(bf16)):
                named = tuple(f"{other}, {name}" for other in job.against)
                listed.append(replace(job, name=f"{job.name}, {name}", against=named))
    return [replace(job, gpu=True, skip=skip) for job in listed]
