"""Train the frozen digit instruments: `python -m triptych_thesis.instruments.digits [FOLDER]`.

Three minutes on two cores. Run once; the results are committed, since a score means something only while its
instrument stays the same.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from triptych_common.data import load
from triptych_common.images import from_uint8
from triptych_common.metrics.instruments import ARCHITECTURES, FOLDER
from triptych_common.randomness import generator, shuffled

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


def train(network: nn.Module, name: str) -> None:
    """Cross-entropy with augmentation, AdamW, one-cycle learning rate."""
    data = load("mnist5k", "train")
    rng = generator(SEED, f"instrument/{name}")
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    steps = EPOCHS * len(data) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    network.train()
    for step in range(steps):
        items = shuffled(SEED, f"instrument/{name}/order", range(step * BATCH, (step + 1) * BATCH), len(data))
        logits = network(augmented(from_uint8(data.images[items]), rng))
        loss = F.cross_entropy(logits, data.labels[items], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"{name}: step {step + 1}/{steps}, loss {loss.item():.3f}", flush=True)


def main(folder: Path) -> None:
    from safetensors.torch import save
    from triptych_common.storage.provenance import git_commit

    folder.mkdir(parents=True, exist_ok=True)
    held_out = load("mnist5k", "held_out")
    records = {}
    for name, architecture in ARCHITECTURES.items():
        torch.manual_seed(SEED)
        network = architecture()
        train(network, name)
        network.eval()
        with torch.inference_mode():
            correct = network(from_uint8(held_out.images)).argmax(1) == held_out.labels
        content = save(network.state_dict())
        (folder / f"{name}.safetensors").write_bytes(content)
        records[name] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "held_out_accuracy": correct.double().mean().item(),
            "trained_on": "mnist5k train split, 4,000 digits",
            "command": "python -m triptych_thesis.instruments.digits",
            "seed": SEED,
            "commit": git_commit(),
            "torch": torch.__version__,
        }
        print(f"{name}: {records[name]}")
    (folder / "instruments.json").write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
