"""Score a file of samples."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triptych_common import data
from triptych_common.cli import CommonOptions, say
from triptych_common.metrics.digits import NEAR_DUPLICATE_QUANTILE, DigitScorer
from triptych_common.run import provenance, write_json

from triptych_dit.sample import read_npz


@dataclass(frozen=True)
class EvaluateConfig(CommonOptions):
    """Score samples of digits against held-out real ones, on the CPU."""

    out: Path = Path("runs/samples")
    """where to write scores.json"""
    samples: Path = Path("runs/samples/samples.npz")
    """npz file with arr_0 (NHWC uint8) and, for class accuracy, arr_1 (labels)"""
    data: str = "mnist5k"
    """data set the model was trained on; its held-out split is the reference"""

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Write scores.json and return its content.

    Raises ValueError for samples that are not 28x28 gray digits.
    """
    images, labels = read_npz(config.samples)
    config.out.mkdir(parents=True, exist_ok=True)
    scorer = DigitScorer(data.load(config.data, "train"), data.load(config.data, "held_out"), seed=config.seed)
    scores = scorer(images, labels)
    floor = scorer.floor(scores.n)
    result = {
        "samples": str(config.samples),
        "reference": f"{config.data} held-out, n={scores.n}",
        "scores": scores.as_dict(),
        "floor": {"frechet": float(floor.mean()), "sets": floor.tolist(), "real": scorer.real(scores.n).as_dict()},
        "near_duplicates_among_held_out": NEAR_DUPLICATE_QUANTILE,
        "instruments": scorer.instruments(),
    }
    path = config.out / "scores.json"
    write_json(path, {**result, **provenance()})
    for name, value in vars(scores).items():
        say(f"{name:<16}{value}")
    say(f"{'frechet floor':<16}{floor.mean():.3g} ({len(floor)} sets of {scores.n} training digits)")
    if scores.n < 1000:
        say(f"note: n={scores.n} is below 1,000; distances are inflated, compare them with the floor only")
    say(f"wrote {path}")
    return result
