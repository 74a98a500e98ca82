"""Train a DiT on a folder of your own images, in a loop of your own.

python examples/train_on_own_images.py --images FOLDER --steps 2000 --out runs/mine
triptych-dit sample --checkpoint runs/mine --guidance-scale 1.5 --out runs/mine/samples

FOLDER has one subfolder per class, or just images. For many images, large ones or several GPUs, use `triptych-dit encode`
and `triptych-dit train`.
"""

import argparse
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from triptych_common.data import ImageFolder, in_memory
from triptych_dit import DiT, DiTConfig
from triptych_dit.model import drop_labels
from triptych_dit.weights import make_diffusion, save_model


def main(images: Path, out: Path, steps: int, size: int, batch_size: int = 32) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = in_memory(ImageFolder(images), size)
    config = DiTConfig(
        (size, size), 3, patch_size=4, hidden_size=192, depth=6, num_heads=3, num_classes=dataset.num_classes
    )
    model, diffusion = DiT(config).to(device), make_diffusion(config, predict="noise")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))  # the weights to sample with
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0)

    for step in range(1, steps + 1):
        items = torch.randint(len(dataset), (batch_size,))
        x_0 = dataset.scaled(items).to(device)  # (batch, 3, size, size), in [-1, 1]
        labels = drop_labels(config, dataset.labels[items], torch.rand(batch_size)).to(device)  # for guidance
        t, noise = torch.randint(1000, (batch_size,), device=device), torch.randn_like(x_0)
        x_t = diffusion.q_sample(x_0, t, noise)
        loss = diffusion.loss(model(x_t, t, labels), x_0, x_t, t, noise).total.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.4f}")

    facts = {"predict": "noise", "autoencoder": None, "class_names": list(dataset.class_names)}
    save_model(out / "model.safetensors", average.module, facts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/mine"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--size", type=int, default=32)
    main(**vars(parser.parse_args()))
