"""Train the frozen digit instruments: `python -m triptych_thesis.instruments.digits [FOLDER]`.

Three minutes on two cores. Run once: a score means something only while its instrument stays the same.
"""

import hashlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from triptych_common.data import load
from triptych_common.images import from_uint8
from triptych_common.metrics.instruments import ARCHITECTURES, FOLDER
from triptych_common.randomness import generator, shuffled
from triptych_common.storage.files import write_bytes, write_json
from triptych_common.storage.provenance import git_commit

SEED, EPOCHS, BATCH = 0, 60, 100


def augmented(images: Tensor, rng: torch.Generator) -> Tensor:
    """Random rotation (12 degrees), scale (0.85 to 1.15), shear (0.15) and shift (2.5 px) of each image."""
    n = len(images)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=rng)

    angle, scale, shear = between(-12, 12) * math.pi / 180, between(0.85, 1.15), between(-0.15, 0.15)
    shift_x, shift_y = between(-2.5, 2.5) / 14, between(-2.5, 2.5) / 14
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, shear - sin, shift_x, sin, cos, shift_y], dim=1).view(n, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # zero padding is black


def fit(network: nn.Module, name: str, steps: int, max_lr: float, loss_at: Callable[[int], Tensor]) -> None:
    """AdamW at a one-cycle learning rate on the loss of each step's minibatch."""
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=max_lr, total_steps=steps)
    network.train()
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"{name}: step {step + 1}/{steps}, loss {loss.item():.3f}", flush=True)
    network.eval()


def saved(network: nn.Module, path: Path, seed: int, **facts: Any) -> dict[str, Any]:
    """Write an instrument; returns its record in instruments.json."""
    content = save(network.state_dict())
    write_bytes(path, content)
    hashed = {"sha256": hashlib.sha256(content).hexdigest()}
    return hashed | facts | {"seed": seed, "commit": git_commit(), "torch": torch.__version__}


def train(network: nn.Module, name: str) -> None:
    """Cross-entropy with augmentation."""
    data = load("mnist5k", "train")
    rng = generator(SEED, f"instrument/{name}")

    def loss_at(step: int) -> Tensor:
        items = shuffled(SEED, f"instrument/{name}/order", range(step * BATCH, (step + 1) * BATCH), len(data))
        logits = network(augmented(from_uint8(data.images[items]), rng))
        return F.cross_entropy(logits, data.labels[items], label_smoothing=0.05)

    fit(network, name, EPOCHS * len(data) // BATCH, 3e-3, loss_at)


def main(folder: Path) -> None:
    held_out = load("mnist5k", "held_out")
    records = {}
    for name, architecture in ARCHITECTURES.items():
        torch.manual_seed(SEED)
        network = architecture()
        train(network, name)
        with torch.inference_mode():
            correct = network(from_uint8(held_out.images)).argmax(1) == held_out.labels
        records[name] = saved(
            network, folder / f"{name}.safetensors", SEED, held_out_accuracy=correct.double().mean().item(),
            trained_on="mnist5k train split, 4,000 digits", command="python -m triptych_thesis.instruments.digits",
        )  # fmt: skip
        print(f"{name}: {records[name]}")
    write_json(folder / "instruments.json", records)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
