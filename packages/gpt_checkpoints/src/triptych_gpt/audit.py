"""`triptych-gpt audit`: are the networks a model makes new, or training networks in disguise?"""

from collections.abc import Mapping
from typing import Any

from triptych_common.cli import echo
from triptych_common.plots import figure_png
from triptych_common.storage.files import write_bytes, write_json
from triptych_common.storage.provenance import provenance

from triptych_gpt.evaluation.plots import memorization_figure
from triptych_gpt.evaluation.records import interval, plain, table
from triptych_gpt.evaluation.trial import Trial, memorization
from triptych_gpt.settings import AuditConfig


def audit_command(config: AuditConfig) -> dict[str, Any]:
    """Audit a model, print a table of the groups compared, then the verdict; returns the verdict and the median distances.

    Raises what opening model, task and zoo raises, OSError if the files cannot be written.
    """
    trial = Trial.open(config.model, config.zoo, config.settings, config.seed, config.device, config.task)
    result = plain(memorization(trial, samples=config.samples, prompt=config.target, every=config.every))
    write_json(config.out / "audit.json", {"experiment": "audit", "result": result, **provenance()})
    write_bytes(config.out / "audit.png", figure_png(memorization_figure(result)))
    for line in audit_table(result):
        echo(line)
    echo(result["verdict"][0])
    echo(f"prompted {result['metric']} {result['prompt']:.4g}; searched {result['searched']}")
    echo(f"wrote audit.json, with {len(result['verdict'])} sentences of verdict, and audit.png to {config.out}")
    medians = {group["name"]: group["median_distance"] for group in result["groups"]}
    return {"memorised": result["memorised"], "verdict": result["verdict"], "median_distance": medians}


def audit_table(result: Mapping[str, Any]) -> list[str]:
    """Lines of a table, one for each group: median distance to the nearest training network, and the mean metric."""
    metric = result["metric"]
    rows = [("", "median distance to training", metric)]
    groups = result["groups"]
    rows += [(g["name"], interval(g["median_distance"]), interval(g["metrics"][metric])) for g in groups]
    return table(rows)
