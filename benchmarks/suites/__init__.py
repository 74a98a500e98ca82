"""Suites by name; each is a function that returns its jobs."""

from collections.abc import Callable, Sequence

from benchmarks.runner import Job
from benchmarks.suites import (
    alignment,
    dit_gpu,
    dit_loading,
    dit_sampling,
    dit_training,
    gan_gpu,
    gan_networks,
    gan_ops,
    gpt_collect,
    gpt_gpu,
    gpt_pairs,
    gpt_policies,
    gpt_training,
    warp,
)

SUITES: dict[str, Callable[[], Sequence[Job]]] = {
    "dit_sampling": dit_sampling.jobs,
    "dit_training": dit_training.jobs,
    "dit_loading": dit_loading.jobs,
    "dit_gpu": dit_gpu.jobs,
    "gpt_collect": gpt_collect.jobs,
    "gpt_pairs": gpt_pairs.jobs,
    "gpt_policies": gpt_policies.jobs,
    "gpt_policies_gpu": gpt_policies.gpu_jobs,
    "gpt_training": gpt_training.jobs,
    "gpt_gpu": gpt_gpu.jobs,
    "gan_ops": gan_ops.jobs,
    "gan_networks": gan_networks.jobs,
    "gan_gpu": gan_gpu.jobs,
    "warp": warp.jobs,
    "alignment": alignment.jobs,
}
