"""Train the frozen instrument for coloured digits: `python -m triptych_thesis.instruments.digits32 [FOLDER]`.

Some minutes on two cores. Run once: a score means something only while its instrument stays the same.
"""

import sys
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from triptych_common.images import from_uint8
from triptych_common.storage.files import write_json
from triptych_gangealing.digits32 import MAX_GRADIENT, MAX_SHIFT_PX, Digits32, Jitters
from triptych_gangealing.stylegan2.instrument import NAME, PARTS, feature_network, reading
from triptych_gangealing.stylegan2.weights import EMBEDDED

from triptych_thesis.instruments.digits import fit, saved

SEED, STEPS, BATCH = 7, 4_400, 100  # no generator was trained with this seed, so these jitters are others
COLOURS = ("foreground", "background", "gradient")


def wanted(truth: Jitters) -> Float[Tensor, "n 13"]:
    """What the outputs beside the logits should be."""
    turn = torch.stack([truth.angle.cos(), truth.angle.sin()], dim=1)
    place = truth.scale[:, None], truth.shift_px / MAX_SHIFT_PX
    return torch.cat([turn, *place, truth.foreground, truth.background, truth.gradient / MAX_GRADIENT], dim=1)


def whitening(truth: Jitters) -> Float[Tensor, "13 13"]:
    """Takes what is wanted to unit covariance, so that hues, which vary less than brightness, count as much."""
    covariance = torch.cov(wanted(truth).double().T)
    return torch.linalg.inv(torch.linalg.cholesky(covariance)).T.float()


def loss_of(outputs: Float[Tensor, "n 23"], truth: Jitters, whiten: Float[Tensor, "13 13"]) -> Tensor:
    """Cross-entropy of the digit, and the squared error of everything else, whitened."""
    errors = (outputs[:, PARTS[0] :] - wanted(truth)) @ whiten
    return F.cross_entropy(outputs[:, : PARTS[0]], truth.label) + errors.square().sum(1).mean() / 8


def train(network: nn.Module) -> None:
    """Every item is seen once."""
    digits = Digits32("train", copies=STEPS * BATCH // 4_000, seed=SEED)
    whiten = whitening(digits.jitters(range(20_000)))
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(SEED))

    def loss_at(step: int) -> Tensor:
        items = order[step * BATCH : (step + 1) * BATCH]
        return loss_of(network(from_uint8(digits.batch(items))), digits.jitters(items), whiten)

    fit(network, NAME, STEPS, 4e-3, loss_at)


def held_out_scores(network: nn.Module) -> dict[str, float]:
    """Share of digits read right, and median errors of place and colour, on 5,000 jittered held-out digits."""
    digits = Digits32("held_out", copies=5, seed=SEED)
    truth = digits.jitters(range(len(digits)))
    with torch.inference_mode():
        outputs = torch.cat([network(from_uint8(digits.batch(part))) for part in truth.item.split(500)])
    found = reading(outputs)
    return {
        "digit_accuracy": (found.labels == truth.label).double().mean().item(),
        "angle_degrees": (found.angle - truth.angle).abs().median().rad2deg().item(),
        "scale": (found.scale - truth.scale).abs().median().item(),
        "shift_px": (found.shift_px - truth.shift_px).norm(dim=1).median().item(),
        **{name: (getattr(found, name) - getattr(truth, name)).abs().median().item() for name in COLOURS},
    }


def main(folder: Path) -> None:
    torch.manual_seed(SEED)
    network = feature_network()
    train(network)
    record = saved(
        network, folder / f"{NAME}.safetensors", SEED, held_out=held_out_scores(network),
        trained_on=f"digits32 of the mnist5k train split, {STEPS * BATCH:,} items",
        command="python -m triptych_thesis.instruments.digits32",
    )  # fmt: skip
    write_json(folder / "instruments.json", {NAME: record})
    print(record)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else EMBEDDED)
