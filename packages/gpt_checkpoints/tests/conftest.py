"""What several test files use."""

from pathlib import Path

import pytest

OTHER_TASK = """
import torch
from torch import nn
from triptych_gpt.tasks import Items, SupervisedTask

def network():
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))

def points(part):
    inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    return Items(inputs, (inputs[:, 0] > 0).long())

OTHER = SupervisedTask(name="other", network=network, data=points, epochs=1, batch_size=16)
"""


@pytest.fixture
def other_task(tmp_path: Path) -> str:
    """A task of a user's own, of 32 parameters, as the command line takes it."""
    (tmp_path / "other.py").write_text(OTHER_TASK)
    return f"{tmp_path / 'other.py'}:OTHER"
