"""What several test files use."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.train import train
from triptych_gpt.train_config import GptTrainConfig
from triptych_gpt.zoo.collect import collect
from triptych_gpt.zoo.collect_config import CollectConfig
from triptych_gpt.zoo.store import CohortData, Manifest, shard_name, write_shard

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
    """A user's task, of 32 parameters, as the command line takes it."""
    (tmp_path / "other.py").write_text(OTHER_TASK)
    return f"{tmp_path / 'other.py'}:OTHER"


@pytest.fixture(scope="session")
def collect_zoo() -> Callable[..., Path]:
    """Collects a small zoo of digits' networks, in this process and without output."""

    def collected(folder: Path, **options: object) -> Path:
        small = {"task": "mnist_mlp_14", "runs": 12, "epochs": 1, "checkpoints": 5, "cohort_runs": 4, "split_every": 3}
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            collect(CollectConfig(**{**small, "engine": "here", "networks_at_once": 4, **options}, out=folder))
        return folder

    return collected


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, collect_zoo: Callable[..., Path]) -> Path:
    """A zoo, and a model trained on it for a few steps: its updates are poor but not nothing."""
    folder = tmp_path_factory.mktemp("place")
    zoo = collect_zoo(folder / "zoo")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        train(GptTrainConfig(zoo=zoo, out=folder / "gpt", width=16, depth=1, num_heads=2, batch_size=32,
                             total_pairs=640, warmup_pairs=64, lr=1e-2, validation_every=0))  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def write_zoo() -> Callable[..., Manifest]:
    """Writes cohorts as a zoo of a task that does not exist."""

    def written(folder: Path, layout: ParameterLayout, metrics: dict[str, str], *cohorts: CohortData) -> Manifest:
        facts = {"task": "tiny", "layout": layout.to_json(), "dtype": "float32", "metrics": metrics}
        manifest = Manifest.create(folder, {**facts, "checkpoints": cohorts[0].theta.shape[1]})
        for data in cohorts:
            name = shard_name(sorted([*data.runs, *data.dropped]))
            manifest.commit(write_shard(folder, name, data))
        return manifest

    return written
