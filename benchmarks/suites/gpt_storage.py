"""What storing checkpoints costs, in bytes and in bfloat16's effect on the metrics: `python -m benchmarks.suites.gpt_storage`.

Not timed, so no suite of the runner; it writes gpt_storage.json beside the suites' results.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from triptych_common.storage.files import write_json
from triptych_common.storage.provenance import provenance
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.tasks import TASKS, Cohort, SupervisedTask
from triptych_gpt.zoo.store import DTYPES, shard_name, write_shard

from benchmarks.suites.gpt_collect import digits
from benchmarks.suites.gpt_pairs import cohort_data, write_environments

CARTPOLE = ParameterLayout({"theta": (1250,)})  # of the released policies' size


def bytes_per_checkpoint(layout: ParameterLayout, runs: int, checkpoints: int) -> dict[str, float]:
    """What the file system sets aside for both files of a shard, and for LMDB's data.mdb alone, one a run."""
    data, found = cohort_data(0, range(runs), layout, checkpoints), {}
    sizes = [span.stop - span.start for span in layout.spans.values()]
    for kind in (*DTYPES, "LMDB"):
        with TemporaryDirectory() as name:
            folder = Path(name)
            if kind == "LMDB":
                write_environments(folder, data, sizes)
                files = list(folder.glob("*/data.mdb"))
            else:
                write_shard(folder, shard_name(data.runs), data, kind)
                files = list((folder / "shards").iterdir())
            found[kind] = sum(512 * file.stat().st_blocks for file in files) / (runs * checkpoints)
    return found


def effect_of_bfloat16(task: SupervisedTask, runs: int, checkpoints: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """By how much each metric of each checkpoint changes when theta is rounded: mean and largest, and, beside them, the mean
    of the metric itself.
    """
    theta = task.train_cohort(Cohort(seed, 0, range(runs), checkpoints), torch.device("cpu"), runs).theta.flatten(0, 1)
    exact, rounded = task.evaluate(theta), task.evaluate(theta.bfloat16().float())
    found = {}
    for name, values in exact.items():
        change = (rounded[name] - values).double()
        found[name] = {
            "mean": values.double().mean().item(),
            "mean_change": change.mean().item(),
            "mean_absolute_change": change.abs().mean().item(),
            "largest_absolute_change": change.abs().max().item(),
        }
    return found


def main(out: Path = Path("benchmarks/results")) -> None:
    sizes = {name: TASKS[name].layout for name in ("mnist_mlp", "cifar_cnn")} | {"cartpole": CARTPOLE}
    result: dict[str, Any] = {
        "bytes_per_checkpoint": {name: bytes_per_checkpoint(layout, 10, 200) for name, layout in sizes.items()},
        "effect_of_bfloat16": effect_of_bfloat16(digits(TASKS["mnist_mlp"].epochs), 50, 200),
    }
    for name, found in result["bytes_per_checkpoint"].items():
        print(f"{name}: " + ", ".join(f"{kind} {count:,.0f}" for kind, count in found.items()) + " bytes a checkpoint")
    for name, found in result["effect_of_bfloat16"].items():
        print(f"bfloat16, {name}: " + ", ".join(f"{kind} {value:.6f}" for kind, value in found.items()))
    write_json(out / "gpt_storage.json", result | provenance())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
