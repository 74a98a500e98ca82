"""Experiments of chapter 3 that train further models: scaling (Fig. 3.7), and the ablations of thesis 3.4.6."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from triptych_common.cli import echo
from triptych_common.storage.atomic import write_json
from triptych_common.storage.run import differences
from triptych_gpt.evaluation.alignment import prompt_alignment
from triptych_gpt.evaluation.trial import Trial
from triptych_gpt.settings import SamplerSettings
from triptych_gpt.train import train
from triptych_gpt.train_config import GptTrainConfig
from triptych_gpt.trained import load
from triptych_gpt.zoo.zoo import Zoo

from triptych_thesis.chapter3.context import Amounts


@dataclass(frozen=True)
class Study:
    """Which variants of a training run to compare, each trained on so many pairs."""

    total_pairs: int
    widths: tuple[int, ...]
    runs: tuple[int, ...]
    chunk_size: int

    def variants(self, base: GptTrainConfig, checkpoints: int) -> dict[str, dict[str, GptTrainConfig]]:
        """By experiment and name, of runs with so many checkpoints; configs that appear twice are trained once.

        All but the tokenizers are compared with neuron tokens and stratified pairs, whatever `base` has, and layer tokens with
        its learning rate: none is tuned for itself.
        """
        warmup = min(base.warmup_pairs, self.total_pairs // 10)
        base = replace(
            base, total_pairs=self.total_pairs, warmup_pairs=warmup, tokenizer="neuron", chunk_size=None, pairs="stratified"
        )  # fmt: skip
        layer = replace(base, tokenizer="layer")
        return {
            "width": {str(w): replace(base, width=w, num_heads=max(1, w // 64)) for w in self.widths},
            "runs": {str(n): replace(base, runs=n) for n in self.runs},
            "tokenizers": {
                "neuron": base,
                "layer": layer,
                "chunk": replace(base, tokenizer="chunk", chunk_size=self.chunk_size),
            },
            "augmentation": {"layer, augmented": layer, "layer, not augmented": replace(layer, augment="off")},
            "canonicalised zoo": {
                "layer, augmented": layer,
                "layer, canonicalised": replace(layer, augment="off", canonicalise=True),
            },
            "checkpoints": {f"{checkpoints} a run": base, "first and last only": replace(base, pairs="ends")},
            "pairs": {
                "stratified": base,
                "thesis": replace(base, pairs="thesis"),
                "released": replace(base, pairs="released"),
            },
        }


def run_study(
    study: Study, base: GptTrainConfig, folder: Path, settings: SamplerSettings, amounts: Amounts
) -> dict[str, Any]:
    """Train and measure what is missing; returns for each experiment a row a variant, JSON-able."""
    known: dict[GptTrainConfig, tuple[str, dict[str, Any]]] = {}
    results: dict[str, list[dict[str, Any]]] = {}
    for experiment, variants in study.variants(base, Zoo(base.zoo).checkpoints).items():
        results[experiment] = []
        for name, config in variants.items():
            if config not in known:
                where = folder / f"{experiment}-{name}".replace(", ", "-").replace(" ", "-")
                known[config] = (str(where), _measured(replace(config, out=where), settings, amounts))
            results[experiment].append({"name": name, "folder": known[config][0], **known[config][1]})
    write_json(folder / "study.json", results)
    return results


def scaling(results: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Fig. 3.7 as its figure takes it: alignment on unseen and on training runs against parameters, and against runs."""

    def points(rows: list[dict[str, Any]], x: str, split: str) -> list[dict[str, Any]]:
        return [
            {"x": row[x], "r2": row[split]["value"], "low": row[split]["low"], "high": row[split]["high"]}
            for row in rows
        ]

    panels = (("parameters of G.pt", "width", "parameters"), ("training runs", "runs", "training_runs"))
    return {
        "panels": [
            {"label": label, "points": points(results[name], x, "unseen"), "train": points(results[name], x, "train")}
            for label, name, x in panels
        ]
    }


def _measured(config: GptTrainConfig, settings: SamplerSettings, amounts: Amounts) -> dict[str, Any]:
    """Alignment of one variant on unseen and on its own training runs. Raises ValueError where other settings were measured."""
    path = config.out / "alignment.json"
    asked = {
        "train": config.identity(),
        "sampler": asdict(settings),
        "networks": amounts.networks,
        "prompts": amounts.prompts,
    }
    asked = json.loads(json.dumps(asked))
    if path.exists():
        known = json.loads(path.read_text())
        if changed := differences(known["asked"], asked):
            raise ValueError(f"{path}: measured with {changed}; delete {config.out}, or use another --out")
        return known["row"]
    echo(f"study: {config.out.name}")
    train(config)
    trial = Trial(load(config.out), Zoo(config.zoo), settings, config.seed)
    found = {}
    for split, name, held in (("test", "unseen", trial.zoo.splits["test"]), ("train", "train", len(trial.training))):
        theta = trial.starts(split, min(amounts.networks, held))
        alignment = prompt_alignment(
            trial.update, trial.task, trial.metric, theta, prompts=amounts.prompts, trained_best=trial.trained_best
        )
        found[name] = alignment.r2._asdict()
        found[f"{name}_at_best"] = alignment.achieved_at_best._asdict()
    row = {
        "parameters": sum(p.numel() for p in trial.trained.model.parameters()),
        "training_runs": len(trial.training),
        "pairs": config.total_pairs,
        **found,
    }
    write_json(path, {"row": row, "asked": asked})
    return row
