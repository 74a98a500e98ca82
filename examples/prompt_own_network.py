"""Prompt a network of one's own: train many small networks, train a G.pt on their checkpoints, and let it improve another one.

python examples/prompt_own_network.py OUT

A few runs and a few steps, so that it takes seconds and shows the way rather than good networks; `triptych-gpt collect --preset
laptop` and `triptych-gpt train --preset laptop` do the same at a useful size.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from triptych_gpt import SamplerSettings, SupervisedTask, load, prompt
from triptych_gpt.tasks import Items, OptimizerSettings
from triptych_gpt.train import train
from triptych_gpt.train_config import GptTrainConfig
from triptych_gpt.zoo.collect import collect
from triptych_gpt.zoo.collect_config import CollectConfig


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))


def circles(part: str) -> Items:
    """Points in the plane, labelled by whether they are within the unit circle."""
    points = 2 * torch.randn(256, 2, generator=torch.Generator().manual_seed(int(part == "test")))
    return Items(points, (points.norm(dim=1) < 1).long())


TASK = SupervisedTask(
    name="circles", network=network, data=circles, epochs=4, batch_size=32, optimizer=OptimizerSettings("Adam", {"lr": 0.03})
)  # fmt: skip


def main(out: Path) -> list[float]:
    """Returns the test loss of the network before its update, and of the networks generated from it."""
    zoo, run = out / "zoo", out / "gpt"
    # Runs 0-7 train the model; the second and third cohort are the zoo's test and validation runs.
    cohorts = {"runs": 24, "cohort_runs": 8, "split_every": 3, "checkpoints": 8}
    task = f"{__file__}:TASK"  # the file with the task is run, so it is named wherever it is needed
    collect(CollectConfig(task=task, out=zoo, engine="here", networks_at_once=8, **cohorts))
    size = {"width": 64, "depth": 1, "total_pairs": 1_280, "warmup_pairs": 128}
    train(GptTrainConfig(zoo=zoo, task=task, out=run, lr=1e-2, validation_every=0, **size))

    own = network()  # yours: a module, a state dict or the path of a file of one
    answers = prompt(load(run, task), own, test_loss=0.4, samples=3, settings=SamplerSettings(num_inference_steps=10))
    for answer in answers:
        print(
            f"test loss {answer.path[0]:.3f}, prompted for {answer.asked}, achieved {answer.achieved['test_loss']:.3f}"
        )
    own.load_state_dict(answers[0].state_dict)
    return [answers[0].path[0], *(answer.achieved["test_loss"] for answer in answers)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
