"""Train a DiT in a loop of your own, on anything that yields images and classes; repeating the command resumes it exactly.

python examples/own_loop.py --steps 2000 --out runs/loop
torchrun --nproc-per-node 2 examples/own_loop.py --parallel fsdp --out runs/loop
"""

import argparse
from pathlib import Path

import torch
from triptych_common import randomness
from triptych_dit import (
    DiTConfig,
    Objective,
    SamplerSettings,
    TrainConfig,
    load_model,
    make_state,
    open_run,
    process_group,
    sample_images,
    save_average,
    training_steps,
)


def batch_of(counters: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Your data: images (batch, channels, height, width) in [-1, 1], and classes. Here squares, bright or dark."""
    labels = (randomness.uniform(0, "class", counters) < 0.5).long()
    images = torch.full((len(labels), 1, 8, 8), -1.0)
    images[:, :, 2:6, 2:6] = labels.float()[:, None, None, None]
    return images, labels


def main(out: Path, steps: int, parallel: str = "ddp", batch_size: int = 32) -> torch.Tensor:
    model = DiTConfig((8, 8), 1, patch_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=2)
    config = TrainConfig(
        out=out, model=model, total_images=steps * batch_size, batch_size=batch_size, lr=3e-3, parallel=parallel,
        ema_half_life_images=20 * batch_size, ema_rampup=0.1, embedding_init="unit",
    )  # fmt: skip
    with process_group(config.device) as ranks, open_run(config, ranks, {"data": "squares"}) as run:
        state, objective = make_state(config, ranks), Objective(config)

        def losses(counters: range) -> dict[str, torch.Tensor]:
            examples = objective.examples(*batch_of(counters), counters)
            return {"loss": objective.loss(state.parallel_model, examples, ranks.device).total.mean()}

        for batch in training_steps(config, state, run):  # from the newest checkpoint on
            state.update(batch, state.accumulate(batch, config.micro_batch, losses))
        save_average(run.path / "model.safetensors", config, state)
    settings = SamplerSettings(sampler="ddim", num_inference_steps=20, guidance_scale=1.5)
    return sample_images(load_model(out), torch.tensor([0, 1]), settings)  # (2, 1, 8, 8), in [-1, 1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/loop"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    main(**vars(parser.parse_args()))
