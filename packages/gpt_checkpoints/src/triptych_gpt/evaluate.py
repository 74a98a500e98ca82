"""`triptych-gpt evaluate`: how well a trained G.pt follows prompts on networks it never saw, beside baselines."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from triptych_common.cli import echo
from triptych_common.plots import figure_png
from triptych_common.storage.checkpoint import digest
from triptych_common.storage.files import open_ended, read_json, write_bytes, write_json
from triptych_common.storage.provenance import provenance
from triptych_common.storage.run import RunDirectory
from typing_extensions import TypedDict

from triptych_gpt.evaluation.plots import alignment_figure, quality
from triptych_gpt.evaluation.records import interval, plain, table
from triptych_gpt.evaluation.trial import Trial, alignment_beside_baselines, quality_against_sampler_steps
from triptych_gpt.settings import EvaluateConfig
from triptych_gpt.zoo.source import json_digest

USUAL = 32  # networks


@open_ended
class _Written(TypedDict):
    result: dict[str, Any]
    sha256: str  # of the result


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure what is missing; returns R^2 of the model and of each baseline, with 95% intervals.

    Raises what `Trial.open` raises, and ValueError for a zoo with too few unseen networks, or a folder of another model's results.
    """
    trial = Trial.open(config.model, config.zoo, config.settings, config.seed, config.device, config.task)
    networks = config.networks or max(1, min(USUAL, trial.zoo.splits.get("test", 0)))
    trial.rows("test", networks)  # refused before there is a folder
    trial.rows("validation", min(networks, 16) if config.sampler_steps else 0)
    if config.networks is None and networks < USUAL:
        echo(f"{networks:,} networks, all test runs of {config.zoo}, rather than {USUAL}")
    amounts = {"networks": networks, "prompts": config.prompts}
    identity = {
        "weights": digest(trial.trained.model.state_dict())[:16],
        "zoo": trial.zoo_identity(),
        **amounts,
        "sampler": asdict(config.settings),
        "seed": config.seed,
    }
    with RunDirectory(config.out, identity) as run:
        result = _measured(run.path / "alignment.json", lambda: alignment_beside_baselines(trial, **amounts))
        write_bytes(run.path / "alignment.png", figure_png(alignment_figure(result)))
        wrote = ["alignment.json", "alignment.png"]
        if config.sampler_steps:
            name = "sampler-steps-" + "-".join(str(steps) for steps in config.sampler_steps)
            samplers = _measured(
                run.path / f"{name}.json", lambda: quality_against_sampler_steps(trial, config.sampler_steps, **amounts)
            )
            write_bytes(run.path / f"{name}.png", figure_png(quality(samplers["rows"])))
            wrote += [f"{name}.json", f"{name}.png"]
    for line in alignment_table(result["alignment"]):
        echo(line)
    echo(f"wrote {', '.join(wrote)} to {config.out}")
    return {"out": str(config.out), "r2": {name: one["r2"] for name, one in result["alignment"].items()}}


def alignment_table(alignments: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a table, one for each update: R^2 between prompts and achieved values, and what the best prompt achieved."""
    first = next(iter(alignments.values()))
    rows = [("", "prompt alignment (R^2)", f"{first['metric']} at the best prompt")]
    rows += [(name, interval(one["r2"]), interval(one["achieved_at_best"])) for name, one in alignments.items()]
    return table(rows)


def _measured(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result at `path`, measured and written if it is not there yet. Raises ValueError for a damaged file."""
    if path.exists():
        remedy = "delete this file and repeat the command, which measures it again"
        written = read_json(path, _Written, remedy=remedy)
        if written["sha256"] != json_digest(written["result"]):
            raise ValueError(f"{path}: altered since it was written (its checksum differs); {remedy}")
        return written["result"]
    began = time.perf_counter()
    result = plain(measure())
    made = {"seconds": round(time.perf_counter() - began, 1), **provenance()}
    write_json(path, {"result": result, "sha256": json_digest(result), **made})
    return result
