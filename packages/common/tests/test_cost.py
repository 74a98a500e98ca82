"""What a training step takes, against what is written out for a network whose activations are known."""

from dataclasses import dataclass, replace
from typing import Annotated

import pytest
import torch
from torch import nn
from triptych_common import cost
from triptych_common.cost import Memory, StepCost, at_once
from triptych_common.fields import Gt
from triptych_common.parallel import Ranks
from triptych_common.training.settings import AccumulatingSettings

ALONE, WIDTH, DEPTH = Ranks(0, 1, torch.device("cpu")), 64, 5


@dataclass(frozen=True)
class Settings(AccumulatingSettings):
    total_images: Annotated[int, Gt(0)] = 10_000


def network() -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.Sigmoid())))


def measured(few: int = 1) -> StepCost:
    net, inputs = network(), torch.zeros(4096, WIDTH)

    def run(counters: range) -> None:
        net(inputs[: len(counters)]).sum().backward()
        net.zero_grad()

    return StepCost.of([(run, 1)], states=1000.0, few=few)


def test_memory_is_counted_while_tensors_live():
    kept = torch.zeros(100)
    with Memory() as memory:
        for _ in range(5):
            kept = kept + 1  # two at once: the new one, and the one before, made within from the second on
        kept.view(10, 10).mul_(2)
    assert max(memory.history) == 2 * 400
    assert memory.now == 400


@pytest.mark.parametrize("few", [1, 8])
def test_a_few_samples_say_what_many_take(few):
    found = measured(few)
    for count in (1, 40, 4096):
        with Memory() as memory:
            found.passes[0][0](range(count))
        assert found.step_bytes(count) == 1000 + max(memory.history)
    # At most the inputs of every layer are kept, and a result is there before the layer's input can go.
    assert float(found.each.max()) == 4 * WIDTH * (DEPTH + 1)
    # The gradients of all weights are there in the end.
    assert float(found.fixed[-1]) >= 1000 + 4 * DEPTH * (WIDTH * WIDTH + WIDTH)


def test_a_batch_that_does_not_fit_is_refused_with_a_part_that_divides_it(monkeypatch):
    config, found = Settings(batch_size=96), StepCost([], torch.tensor([1e9]), torch.tensor([1e8]), multiple=4)
    found.check(config, ALONE)
    monkeypatch.setattr(cost, "available_bytes", lambda device: 5e9)
    with pytest.raises(
        ValueError, match=r"batch_size 96: a step takes about 10.6 GB, this machine has 5.0; pass --micro-batch 24"
    ):
        found.check(config, ALONE)
    found.check(replace(config, micro_batch=24), ALONE)
    with pytest.raises(ValueError, match="choose a smaller model"):
        replace(found, fixed=torch.tensor([6e9])).check(config, ALONE)
    assert "--micro-batch 24" in found.estimate(config, ALONE)["refused"]
    assert at_once(config, Ranks(0, 3, ALONE.device)) == 32


def test_an_estimate_says_memory_and_time():
    estimate = measured().estimate(Settings(batch_size=64), ALONE)
    assert estimate["images_per_second"] > 100
    assert estimate["gigabytes_of_a_step"] < 0.01 < estimate["gigabytes_there"]
    assert estimate["time"]
