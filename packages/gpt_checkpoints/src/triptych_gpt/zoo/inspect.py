"""Commands that read a zoo: describe it, verify it, and export one of its checkpoints as a plain state dict."""

from typing import Any

import torch
from triptych_common.cli import echo
from triptych_common.progress import Progress
from triptych_common.storage import checkpoint, foreign

from triptych_gpt.evaluation.records import plain
from triptych_gpt.settings import PICKLE_SUFFIXES, ExportConfig, InfoConfig, VerifyConfig
from triptych_gpt.zoo.store import Manifest, damages, refuse_damaged
from triptych_gpt.zoo.zoo import Zoo

QUANTILES = (0.05, 0.5, 0.95)


def info(config: InfoConfig) -> dict[str, Any]:
    """Describe what the zoo holds. Raises FileNotFoundError if there is none, ValueError for a damaged one."""
    zoo = Zoo(config.zoo)
    result = facts_of(zoo)
    rows = {
        "task": f"{zoo.task}, {zoo.layout.size:,} parameters",
        "runs": ", ".join(f"{count:,} {split}" for split, count in zoo.splits.items()) or "none yet",
        "dropped": ", ".join(f"{reason}: {count:,}" for reason, count in result["dropped"].items()) or "none",
        "checkpoints": f"{result['checkpoints']:,}, {zoo.checkpoints:,} a run",
        "bytes": f"{result['bytes']:,} in {result['shards']:,} shards of {zoo.facts['dtype']}",
    }
    if result["checkpoints"]:
        rows["a checkpoint"] = f"{result['bytes_per_checkpoint']:,.0f} bytes"
    for name, value in rows.items():
        echo(f"{name:<14}{value}")
    if result["metrics"]:
        echo(f"{'quantiles':<14}{'':<10}" + "".join(f"{quantile:>12.0%}" for quantile in QUANTILES))
    for name, moments in result["metrics"].items():
        for moment in ("initial", "final", "best"):
            values = "".join(f"{value:>12.5g}" for value in moments[moment])
            echo(f"{name if moment == 'initial' else '':<14}{moment:<10}{values}")
    return result


def facts_of(zoo: Zoo) -> dict[str, Any]:
    """Counts, sizes and quantiles of the metrics over all runs, JSON-able."""
    size, count = zoo.manifest.bytes, len(zoo) * zoo.checkpoints
    return {
        "zoo": str(zoo.path),
        "task": zoo.task,
        "parameters": zoo.layout.size,
        "dtype": zoo.facts["dtype"],
        "runs": zoo.splits,
        "dropped": dict(zoo.manifest.counts()[1].most_common()),
        "checkpoints_per_run": zoo.checkpoints,
        "checkpoints": count,
        "shards": len(zoo.manifest.shards),
        "bytes": size,
        "bytes_per_checkpoint": size / count if count else None,
        "quantiles": list(QUANTILES),
        "metrics": {name: _moments(zoo, name) for name in zoo.metric_names} if count else {},
    }


def _moments(zoo: Zoo, name: str) -> dict[str, Any]:
    values = zoo.metrics(name)
    best = values.amin(1) if zoo.better[name] == "lower" else values.amax(1)
    moments = {"initial": values[:, 0], "final": values[:, -1], "best": best}
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    quantiles = {moment: torch.quantile(found.double(), levels) for moment, found in moments.items()}
    return {"better": zoo.better[name], **plain(quantiles)}


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Compare every file with its checksum and report all that are damaged.

    Raises FileNotFoundError if there is no zoo, ValueError if anything is damaged.
    """
    manifest = Manifest.read(config.zoo)
    size, damaged = manifest.bytes, set()
    with Progress("verify", size, "bytes") as progress:
        for damage in damages(manifest, progress=progress.advance):
            damaged.add(damage.shard)
            echo(str(damage))
    if damaged:
        counts = f"{len(damaged):,} of {len(manifest.shards):,} shards damaged"
        raise ValueError(f"{config.zoo}: {counts}; run {manifest.remedy()}")
    echo(f"{config.zoo}: {len(manifest.shards):,} shards, {size:,} bytes, all as they were written")
    return {"zoo": str(config.zoo), "shards": len(manifest.shards), "bytes": size, "damaged": 0}


def export(config: ExportConfig) -> dict[str, Any]:
    """Write one checkpoint; returns what it is.

    Raises FileNotFoundError if there is no zoo, ValueError for a run or checkpoint that it lacks, OSError if writing fails.
    """
    zoo = Zoo(config.zoo)
    row = zoo.row_of(config.run)
    place = _checkpoint(zoo, row, config.checkpoint)
    refuse_damaged(Manifest(zoo.path, zoo.facts, zoo.shards_of([row])), contents=True)
    state_dict = zoo.layout.state_dict(zoo.theta([row], [place])[0])
    metrics = {name: float(zoo.metrics(name)[row, place]) for name in zoo.metric_names}
    split, step = str(zoo.runs.split[row]), int(zoo.steps[row, place])
    facts = {"task": zoo.task, "run": config.run, "split": split, "checkpoint": place, "step": step, "metrics": metrics}
    if config.out.suffix in PICKLE_SUFFIXES:
        foreign.write(config.out, state_dict)
    else:
        checkpoint.write(config.out, state_dict, {"kind": "state dict", **facts})
    scored = ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())
    echo(f"wrote {config.out}: {zoo.task}, run {config.run}, checkpoint {place} at step {step:,} ({scored})")
    return {"out": str(config.out), **facts}


def _checkpoint(zoo: Zoo, row: int, text: str) -> int:
    """Number of the checkpoint of a run that `text` names, see `ExportConfig.checkpoint`."""
    if text.startswith("best:"):
        name = text.removeprefix("best:")
        values = zoo.metrics(name)[row]
        return int(values.argmin() if zoo.better[name] == "lower" else values.argmax())
    try:
        place = int(text)
    except ValueError:
        place = zoo.checkpoints
    if not -zoo.checkpoints <= place < zoo.checkpoints:
        metrics = ", ".join(f"best:{name}" for name in zoo.metric_names)
        places = f"0..{zoo.checkpoints - 1}, -{zoo.checkpoints}..-1 from the end"
        raise ValueError(f"checkpoint {text!r}: expected {places}, or {metrics}")
    return place % zoo.checkpoints
