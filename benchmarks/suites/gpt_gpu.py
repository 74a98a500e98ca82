"""Thousands of mnist_mlp networks trained and scored at once on one GPU, beside eager PyTorch and `torch.func.vmap` there."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.runner import Job
from benchmarks.suites.gpt_collect import MNIST, SIZES, jobs_of

SIZE = replace(SIZES[MNIST], networks=4000, at_once=4000, device="cuda", repeats=3)


def jobs() -> Sequence[Job]:
    skip = None if torch.cuda.is_available() else "no GPU here: torch.cuda.is_available() is false"
    return [replace(job, gpu=True, skip=skip) for job in jobs_of(MNIST, SIZE) if "own batches" not in job.name]
